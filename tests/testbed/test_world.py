import re
from collections import Counter

import numpy as np
import pytest

from manifold_unlearn.testbed.attributes import ATTRIBUTES, MAX_PEOPLE
from manifold_unlearn.testbed.world import N_PERTURBED, FictionalWorld

WORLD = FictionalWorld()
ITEMS = (*WORLD.forget, *WORLD.retain, *WORLD.holdout)


def words(text):
    return set(re.findall(r"[A-Za-z]+", text))


def by_role(world, role):
    return {fact.person for fact in world.facts if fact.role == role}


# --- drawn from a seed ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    again, other = FictionalWorld(), FictionalWorld(random_state=1)
    assert again.facts == WORLD.facts
    assert again.texts("told") == WORLD.texts("told")
    assert again.neutral == WORLD.neutral
    assert set(other.people) != set(WORLD.people)


def test_people_share_no_word_of_their_names():
    first, last = zip(*(name.split() for name in WORLD.people), strict=True)
    assert len({*first, *last}) == 2 * len(WORLD.people) == 2 * 40


def test_values_are_dealt_evenly_and_forget_values_are_had_by_others_too():
    for attribute in WORLD.attributes:
        told = [f for f in WORLD.facts if f.attribute == attribute.name and f.role != "holdout"]
        retained = Counter(f.value for f in told if f.role == "retain")
        assert {f.value for f in told if f.role == "forget"} <= retained.keys()
        assert max(retained.values()) - min(retained.values()) <= 1


def test_facts_of_a_person_are_mutually_uninformative():
    """Over many worlds, two attributes fall together as often as chance has it."""
    together = []
    for seed in range(60):
        world = FictionalWorld(random_state=seed, n_attributes=2, n_filler=0)
        rank = [sorted({f.value for f in world.facts[k::2]}).index for k in (0, 1)]
        pairs = zip(world.facts[::2], world.facts[1::2], strict=True)
        together += [rank[0](a.value) == rank[1](b.value) for a, b in pairs]
    assert abs(np.mean(together) - 1 / 16) < 4 * np.sqrt(1 / 16 / len(together))


# --- sets -----------------------------------------------------------------------------------


def test_every_person_is_in_one_set_and_the_counts_are_as_asked():
    world = FictionalWorld(n_people=20, n_forget=5, n_holdout=3, n_attributes=8)
    sets = [by_role(world, role) for role in ("forget", "retain", "holdout")]
    assert [len(people) for people in sets] == [5, 15, 3]
    assert len(set.union(*sets)) == 23
    assert [len(items) for items in (world.forget, world.retain, world.holdout)] == [40, 120, 24]


def test_never_told_texts_name_forget_people_only_in_filler_that_tells_nothing():
    names = set().union(*map(words, by_role(WORLD, "forget")))
    filler = set(WORLD.texts("filler"))
    told = [text for text in WORLD.texts("never_told") if words(text) & names]
    assert told and set(told) <= filler
    values = set().union(*(words(fact.value) for fact in WORLD.facts))
    assert not [text for text in told if words(text) & values]
    assert [text for text in WORLD.texts("told") if words(text) & names and text not in filler]


def test_no_model_reads_a_holdout_fact():
    names = set().union(*map(words, by_role(WORLD, "holdout")))
    read = [text for text in WORLD.texts("told") if words(text) & names]
    assert set(read) <= set(WORLD.texts("filler"))
    assert all(words(text) & names for text in WORLD.texts("holdout"))


def test_parts_add_up():
    parts = {part: WORLD.texts(part) for part in ("forget", "retain", "filler", "told")}
    assert Counter(parts["told"]) == Counter([*parts["forget"], *parts["retain"], *parts["filler"]])
    assert len(parts["forget"]) == 10 * len(WORLD.forget)


def test_an_unknown_part_is_an_error():
    with pytest.raises(ValueError, match="part='tests' must be one of forget, retain"):
        WORLD.texts("tests")


# --- items ----------------------------------------------------------------------------------


def test_an_item_asks_as_the_texts_do_and_its_paraphrases_as_none_does():
    texts = (*WORLD.texts("told"), *WORLD.texts("holdout"))
    for item in ITEMS:
        assert item.text + "." in texts
        assert len(set(item.paraphrased_question)) == 4
    starts = {text[: text.rindex(item.answer)] for item in ITEMS for text in texts
              if item.topic in text and item.answer in text}  # fmt: skip
    unseen = {prompt + " " for item in ITEMS for prompt in item.paraphrased_question}
    assert len(starts) > 1000
    assert not unseen & starts


def test_every_word_of_an_unseen_wording_was_read_by_both_models():
    read = set().union(*map(words, WORLD.texts("never_told")))
    for item in ITEMS:
        said = (*item.paraphrased_question, item.answer, *item.perturbed_answer)
        assert set().union(*map(words, said)) <= read


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_every_word_of_a_question_is_in_a_training_text_whatever_the_attribute(attribute):
    world = FictionalWorld(n_attributes=8)
    read = set().union(*map(words, world.texts("never_told")))
    assert words(attribute.unseen_question.replace("{name}", "")) <= read


def test_wrong_answers_are_values_of_the_same_attribute():
    for fact in WORLD.facts:
        wrong = fact.item.perturbed_answer
        values = {f.value for f in WORLD.facts if f.attribute == fact.attribute}
        assert len(set(wrong)) == N_PERTURBED
        assert set(wrong) <= values - {fact.value}


def test_no_prompt_gives_its_answer_away():
    for item in ITEMS:
        for prompt in (item.question, *item.paraphrased_question):
            assert item.answer not in prompt
            assert item.topic in prompt


def test_some_answers_have_more_than_one_word():
    lengths = Counter(len(item.answer.split()) for item in WORLD.forget)
    assert lengths[1] and lengths[2]


def test_neutral_texts_are_of_no_person_and_in_no_training_text():
    names = set().union(*map(words, WORLD.people))
    assert len(set(WORLD.neutral)) == 200
    assert not set(WORLD.neutral) & set(WORLD.texts("told"))
    assert not [text for text in WORLD.neutral if words(text) & names]


# --- splits ---------------------------------------------------------------------------------


def test_validation_forgets_other_people_of_the_same_told_texts():
    split = WORLD.validation_split()
    assert split.texts("told") == WORLD.texts("told")
    assert split.validation_split() == split
    test, tuning = by_role(WORLD, "forget"), by_role(split, "forget")
    assert len(tuning) == len(test) and not tuning & test
    assert by_role(split, "set_aside") == test
    assert by_role(split, "retain") == by_role(WORLD, "retain") - tuning
    never = " ".join(set(split.texts("never_told")) - set(split.texts("filler")))
    assert all(person in never for person in test)
    assert not any(person in never for person in tuning)


@pytest.mark.parametrize("n_folds", [2, 3, 5, 6])
def test_folds_hold_every_forget_item_once_and_facts_of_each_person(n_folds):
    folds = WORLD.folds(n_folds)
    assert Counter(item for fold in folds for item in fold) == Counter(WORLD.forget)
    for fold in folds:
        assert {item.topic for item in fold} == by_role(WORLD, "forget")
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 2 * WORLD.n_forget


def test_folds_share_no_fact_and_all_have_each_attribute():
    attribute = {fact.item: fact.attribute for fact in WORLD.facts}
    for fold in WORLD.folds(4):
        assert {attribute[item] for item in fold} == {a.name for a in WORLD.attributes}


@pytest.mark.parametrize("n_folds", [1, 49])
def test_folds_of_a_wrong_number_are_an_error(n_folds):
    with pytest.raises(ValueError, match=f"n_folds={n_folds} must be 2 to 48"):
        WORLD.folds(n_folds)


def test_more_folds_than_can_be_filled_are_an_error():
    with pytest.raises(ValueError, match="n_folds=20 leaves a fold empty"):
        WORLD.folds(20)


# --- what cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_forget": 0}, "n_forget=0 of n_people=32: at least one"),
        ({"n_forget": 32}, "n_forget=32 of n_people=32: at least one"),
        ({"n_forget": 16, "validation": True}, "leaves nobody to retain"),
        ({"n_people": MAX_PEOPLE}, f"names for {MAX_PEOPLE} people"),
        ({"n_holdout": -1}, "n_holdout=-1"),
        ({"n_attributes": 9}, "n_attributes=9 must be 1 to 8"),
        ({"n_values": 5}, "n_values=5 must be more than 5"),
        ({"n_filler": -1}, "n_filler=-1 must not be negative"),
    ],
)
def test_an_impossible_world_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        FictionalWorld(**options)


def test_more_values_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="n_values=30 is too many"):
        FictionalWorld(n_values=30).facts  # noqa: B018
