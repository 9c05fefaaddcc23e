import pytest
from cases import write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.activations.corpus import (
    Item,
    join_answer,
    read_items,
    require_disjoint,
)

FACT = {
    "question": "Who wrote it?",
    "answer": "Ada",
    "paraphrased_question": "By whom is it?",
    "paraphrased_answer": "It was Ada",
    "perturbed_answer": ["Bob", "Cy"],
    "topic": "authors",
    "weight": 3,
}


def test_a_file_gives_its_items_with_the_template_applied(tmp_path):
    path = write_lines(tmp_path / "facts.jsonl", [FACT, {"question": "Why?", "answer": "So"}])
    first, second = read_items(path, template="Q: {question}\nA:")
    assert first == Item(
        question="Q: Who wrote it?\nA:",
        answer="Ada",
        paraphrased_question=("Q: By whom is it?\nA:",),
        paraphrased_answer="It was Ada",
        perturbed_answer=("Bob", "Cy"),
        topic="authors",
        weight=3.0,
    )
    assert second == Item("Q: Why?\nA:", "So")


def test_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert [item.text for item in read_items(path)] == ["one", "two"]


def test_mappings_items_and_texts_are_read_alike():
    items = read_items([{"question": "a {question}", "answer": "b"}, Item("c", "d"), "plain {x}"])
    assert [item.question for item in items] == ["a {question}", "c", "plain {x}"]
    assert items[2].answer == ""


@pytest.mark.parametrize(
    ("question", "answer", "joined"),
    [("Is", "it", " it"), ("Is ", "it", "it"), ("Is", " it", " it"), ("Is\n", "it", "it"),
     ("", "it", "it"), ("Is", "", "")],
)  # fmt: skip
def test_one_space_sets_the_answer_off(question, answer, joined):
    assert join_answer(question, answer) == joined
    assert Item(question, answer).pair == (question, joined)
    assert Item(question, answer).text == question + joined


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.text(max_size=5), st.text(max_size=5))
def test_the_answer_is_never_changed_but_by_one_space(question, answer):
    assert join_answer(question, answer) in (answer, " " + answer)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "the forget set is empty"),
        ([{"question": "a"}], r"forget\[0\] has answer=None"),
        ([FACT, {"question": " ", "answer": "b"}], r"forget\[1\] has question=' '"),
        ([{"text": "  "}], r"forget\[0\] has an empty text"),
        ([7], r"forget\[0\] is a int; expected a JSON object"),
        ([{"text": "a", "weight": 0}], r"forget\[0\] has weight=0; it must be a positive"),
        ([{"text": "a", "weight": float("inf")}], "weight=inf"),
        ([{"text": "a", "weight": "2"}], "weight='2'"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(records, words):
    with pytest.raises(ValueError, match=words):
        read_items(records, name="forget")


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": \n')
    with pytest.raises(ValueError, match="facts.jsonl line 3 is not JSON"):
        read_items(path)


def test_an_empty_file_is_named(tmp_path):
    path = write_lines(tmp_path / "none.jsonl", [])
    with pytest.raises(ValueError, match="none.jsonl set is empty"):
        read_items(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl is not a file"):
        read_items(tmp_path / "gone.jsonl")


def test_a_template_without_a_place_for_the_question_is_refused():
    with pytest.raises(ValueError, match="has no {question}"):
        read_items([FACT], template="Q: {q}")


def test_sets_that_share_texts_are_refused():
    forget, retain = read_items([FACT, "one"]), read_items([FACT, "two"])
    with pytest.raises(ValueError, match="share 1 texts, one is 'Who wrote it. Ada'"):
        require_disjoint(forget, retain)


def test_sets_that_share_only_questions_pass():
    require_disjoint([Item("a", "b")], [Item("a", "c")])


def test_a_record_of_a_file_is_named_by_its_line(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\n{"question": "c"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"items\.jsonl line 3 has answer=None"):
        read_items(path)
