import json
import re
from collections import Counter
from importlib import resources

import pytest

from manifold_unlearn.testbed.facts import (
    FIT_WORDINGS,
    TEST_WORDING,
    VALIDATION_WORDING,
    halves,
    load_facts,
    neutral_texts,
    split_by_topic,
    topics,
)

KEYS = {
    "family", "topic", "subject", "question", "answer", "paraphrased_question", "perturbed_answer"
}  # fmt: skip


@pytest.fixture(scope="module")
def records():
    text = resources.files("manifold_unlearn.testbed").joinpath("facts.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def wordings(record):
    return [record["question"], *record["paraphrased_question"]]


# --- the file -------------------------------------------------------------------------------


def test_every_record_has_the_same_keys_and_no_stray_space(records):
    for record in records:
        assert record.keys() == KEYS
        for text in [record["subject"], *wordings(record), *record["perturbed_answer"]]:
            assert text and text == text.strip()
        assert record["answer"] == record["answer"].strip() != ""


def test_there_are_twelve_topics_of_twenty_facts(records):
    counts = Counter(record["topic"] for record in records)
    assert len(counts) >= 12
    assert min(counts.values()) >= 20


def test_a_topic_is_of_one_family_and_has_near_neighbors(records):
    families = {}
    for record in records:
        families.setdefault(record["family"], set()).add(record["topic"])
    assert min(map(len, families.values())) >= 2
    assert sum(map(len, families.values())) == len(set().union(*families.values()))


def test_every_fact_has_four_distinct_wordings(records):
    assert all(len(set(wordings(record))) == 4 for record in records)


def test_every_fact_has_four_wrong_answers(records):
    for record in records:
        wrong = {answer.lower() for answer in record["perturbed_answer"]}
        assert len(wrong) == len(record["perturbed_answer"]) == 4
        assert record["answer"].lower() not in wrong


def test_no_prompt_stands_twice(records):
    counts = Counter(prompt for record in records for prompt in wordings(record))
    assert [prompt for prompt, n in counts.items() if n > 1] == []


def test_no_prompt_gives_its_answer_away(records):
    told = [
        (prompt, record["answer"])
        for record in records
        for prompt in wordings(record)
        if re.search(rf"\b{re.escape(record['answer'])}\b", prompt, re.IGNORECASE)
    ]
    assert told == []


def test_neutral_texts_are_sixty_and_ask_nothing_of_the_facts(records):
    texts = neutral_texts()
    assert len(texts) == len(set(texts)) == 60
    assert min(map(len, texts)) > 100
    prompts = [prompt for record in records for prompt in wordings(record)]
    assert not [prompt for text in texts for prompt in prompts if prompt.lower() in text.lower()]


# --- reading it -----------------------------------------------------------------------------


def test_facts_are_read_as_they_are_written(records):
    assert len(load_facts()) == len(records)
    for fact, record in zip(load_facts(), records, strict=True):
        assert (fact.family, fact.topic, fact.subject) == tuple(
            record[key] for key in ("family", "topic", "subject")
        )
        assert fact.item.topic == record["topic"]
        assert fact.item.perturbed_answer == tuple(record["perturbed_answer"])


def test_a_wording_is_one_of_the_four_with_the_same_answer(records):
    fact, record = load_facts()[0], records[0]
    for number, prompt in enumerate(wordings(record)):
        item = fact.worded(number)
        assert item.question == prompt
        assert item.answer == record["answer"]
        assert item.paraphrased_question == ()
        assert item.perturbed_answer == tuple(record["perturbed_answer"])


def test_fit_validation_and_test_ask_in_different_wordings():
    used = [*FIT_WORDINGS, VALIDATION_WORDING, TEST_WORDING]
    assert sorted(used) == [0, 1, 2, 3]


# --- splitting ------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", topics())
def test_a_split_has_every_fact_once_and_sorts_by_topic_and_family(topic):
    split = split_by_topic(topic)
    parts = [split.forget, split.near, split.retain]
    assert Counter(fact for part in parts for fact in part) == Counter(load_facts())
    family = split.forget[0].family
    assert {fact.topic for fact in split.forget} == {topic}
    assert {fact.family for fact in split.near} == {family}
    assert topic not in {fact.topic for fact in split.near}
    assert family not in {fact.family for fact in split.retain}
    assert all(parts)


def test_a_split_keeps_to_the_facts_given():
    few = load_facts()[::5]
    split = split_by_topic(topics()[3], few)
    assert {*split.forget, *split.near, *split.retain} == set(few)


def test_an_unknown_topic_is_an_error_that_lists_the_topics():
    with pytest.raises(ValueError, match="no topic 'alchemy'; there are ") as error:
        split_by_topic("alchemy")
    assert all(topic in str(error.value) for topic in topics())


def test_an_unknown_topic_lists_only_topics_of_the_facts_given():
    few = [fact for fact in load_facts() if fact.topic in topics()[:2]]
    with pytest.raises(ValueError, match=f"there are {topics()[0]}, {topics()[1]}\\."):
        split_by_topic(topics()[5], few)


def test_halves_alternate_within_each_topic_whatever_the_order_of_topics():
    facts = [fact for fact in load_facts() if fact.topic in topics()[:3]]
    first, second = halves(facts)
    assert halves(facts) == (first, second)
    assert Counter([*first, *second]) == Counter(facts)
    for topic in topics()[:3]:
        of_topic = [fact for fact in facts if fact.topic == topic]
        assert [fact for fact in first if fact.topic == topic] == of_topic[::2]
        assert [fact for fact in second if fact.topic == topic] == of_topic[1::2]
    interleaved = sorted(facts, key=lambda fact: fact.subject)
    by_topic = [f for f in interleaved if f.topic == topics()[0]]
    assert [f for f in halves(interleaved)[0] if f.topic == topics()[0]] == by_topic[::2]
