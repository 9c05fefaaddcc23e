import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.counterfactual import (
    counterfactual_items,
    invent_subjects,
    rename,
)

NAMES = ["Ada Byron", "Carl Gauss", "Emmy Noether", "Kurt Goedel", "Sofia Kova"]
WORD = st.text("abcdefgh", min_size=1, max_size=4).map(str.capitalize)
NAME = st.tuples(WORD, WORD).map(" ".join)


@given(st.lists(NAME, min_size=6, max_size=12, unique=True), st.integers(0, 5))
def test_an_invented_name_is_nobodys_and_keeps_no_word(names, seed):
    try:
        invented = invent_subjects(names[:2], names[2:], random_state=seed)
    except ValueError as error:
        assert "known names" in str(error)
        return
    assert list(invented) == names[:2]
    assert len(set(invented.values()) | set(names)) == len(names) + 2
    for subject, name in invented.items():
        assert not set(subject.split()) & set(name.split())
        for i, word in enumerate(name.split()):
            assert word in {other.split()[i] for other in names}


def test_the_seed_decides():
    assert invent_subjects(NAMES[:1], NAMES, random_state=1) == invent_subjects(
        NAMES[:1], NAMES, random_state=1
    )
    drawn = {invent_subjects(NAMES[:1], NAMES, random_state=s)["Ada Byron"] for s in range(8)}
    assert len(drawn) > 1


def test_a_name_of_as_many_tokens_is_preferred():
    class Letters:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": list(text)})

    known = ["Abe Stone", "Eva Marie", "Ina Brown", "Maximilian Longwinded", "Jo Li"]
    for seed in range(5):
        made = invent_subjects(["Uwe Great"], known, tokenizer=Letters(), random_state=seed)
        assert len(made["Uwe Great"]) == len("Uwe Great")


@pytest.mark.parametrize(
    ("subjects", "known", "match"),
    [
        (["Ada Byron"], [], "too few known names"),
        (["Ada"], ["Carl Gauss", "Emmy Noether"], "too few known names"),
        ([" "], NAMES, "is no name"),
        (["A B"], ["C D", "C E", "F D", "F E"], "in 200 draws"),
    ],
)
def test_too_few_names_are_refused(subjects, known, match):
    with pytest.raises(ValueError, match=match):
        invent_subjects(subjects, known, random_state=0)


def test_all_mentions_are_renamed_and_nothing_else():
    text = "Did Ada Byron, or Byron's Adam, meet ada? Ada did."
    assert (
        rename(text, "Ada Byron", "Emmy Kova")
        == "Did Emmy Kova, or Kova's Adam, meet ada? Emmy did."
    )
    assert rename("the poet of Aram", "poet of Aram", "king of Elam") == "the poet of Elam"


def test_a_text_about_others_is_refused():
    with pytest.raises(ValueError, match="does not name 'Ada Byron'"):
        rename("Carl Gauss did.", "Ada Byron", "Emmy Kova")
    with pytest.raises(ValueError, match="number of words"):
        rename("Ada Byron", "Ada Byron", "Emmy")


def test_items_keep_their_answers():
    item = Item("Who was Ada Byron?", "a poet", ("Ada Byron was",), topic="Ada Byron")
    (made,) = counterfactual_items([item], {"Ada Byron": "Emmy Kova"})
    assert made == Item("Who was Emmy Kova?", "a poet", ("Emmy Kova was",), topic="Emmy Kova")
    with pytest.raises(ValueError, match="item 0 has topic ''"):
        counterfactual_items([Item("Who?", "a poet")], {"Ada Byron": "Emmy Kova"})
