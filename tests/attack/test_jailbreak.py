import json

import numpy as np
import pytest
import torch

from manifold_unlearn.attack.behaviors import Behavior, digest_behaviors
from manifold_unlearn.attack.jailbreak import attack_success
from manifold_unlearn.attack.judges import KeywordJudge, Scores, refusal_judge
from manifold_unlearn.evaluate import plain
from manifold_unlearn.intervene.hooks import intervene

BEHAVIORS = [
    Behavior("Bake a cake", "food"),
    Behavior("Cook a soup", "food"),
    Behavior("Sum this up", "text", context="A tale"),
]
FRAMINGS = {"direct": "{prompt}", "play": "Play: {prompt}"}


@pytest.fixture
def asked(monkeypatch):
    """A model that refuses to bake, whatever the framing, and everything it is asked plainly."""
    kept = []

    def said(subject, tokenizer, prompts, **keywords):
        kept.extend(prompts)
        return [
            "" if "tale" in p and "Play" in p
            else "I'm sorry." if "Bake" in p or "Play" not in p else "Sure."
            for p in prompts
        ]  # fmt: skip

    monkeypatch.setattr("manifold_unlearn.attack.jailbreak.greedy_answers", said)
    return kept


def test_rates_by_framing_by_category_and_worst_case(asked):
    found = attack_success(None, None, BEHAVIORS, framings=FRAMINGS)
    assert found.successes.tolist() == [[False, False, False], [False, True, False]]
    assert found.rate.values.tolist() == [0, 0.5, 0]
    assert found.worst_case.mean == pytest.approx(1 / 3)
    assert {n: m.mean for n, m in found.by_framing.items()} == pytest.approx(
        {"direct": 0, "play": 1 / 3}
    )
    assert {n: m.mean for n, m in found.by_category.items()} == {"food": 0.25, "text": 0}
    low, high = found.worst_case.interval
    assert 0 <= low <= found.worst_case.mean <= high <= 1
    written = json.loads(json.dumps(found.to_json()))
    assert written["n_empty"] == 1 and written["n_invalid"] == 0
    assert written["digest"] == digest_behaviors(BEHAVIORS)
    assert written["scores"]["play"]["formula"] == "keyword absent anywhere, empty failure"


def test_what_is_asked_holds_context_framing_and_template(asked):
    attack_success(None, None, BEHAVIORS[2:], framings=FRAMINGS, template="Q: {prompt}\nA:")
    assert asked == ["Q: A tale\n\nSum this up\nA:", "Q: Play: A tale\n\nSum this up\nA:"]


def test_the_judge_is_given_the_plain_behavior(asked):
    given = []

    def judge(prompts, responses):
        given.append(tuple(prompts))
        return refusal_judge()(prompts, responses)

    attack_success(None, None, BEHAVIORS, judge, framings=FRAMINGS)
    assert given == [tuple(b.prompt for b in BEHAVIORS)] * 2


def test_what_was_not_scored_is_left_out_and_counted(asked):
    def judge(prompts, responses):
        value = np.array([np.nan, 0.75, 0.25])
        return Scores(value, np.ones(3, dtype=bool), "mine", "any")

    found = attack_success(None, None, BEHAVIORS, judge)
    assert found.rate.values.tolist() == [1, 0] and found.to_json()["n_invalid"] == 1
    assert attack_success(None, None, BEHAVIORS, judge, threshold=0.25).rate.mean == 1
    assert found.by_category["food"].values.tolist() == [1]


def test_where_nothing_was_scored_there_is_no_rate(asked):
    judge = KeywordJudge(("x",), empty="skipped")
    found = attack_success(None, None, BEHAVIORS[2:], judge, framings={"play": "Play: {prompt}"})
    assert found.by_framing == found.by_category == {}
    with pytest.raises(ValueError, match="scored none of the behaviors"):
        _ = found.rate
    with pytest.raises(ValueError, match="scored none of the behaviors"):
        _ = found.worst_case
    written = found.to_json()
    assert (written["rate"], written["worst_case"], written["n_invalid"]) == (None, None, 1)


def test_hooks_act_and_leave(llama, tokenizer):
    def hooked():
        return intervene(llama, {"layers.1": lambda h: torch.roll(h, 1, -1)})

    one, two, three = (
        attack_success(s, tokenizer, BEHAVIORS, max_new_tokens=6).responses["direct"]
        for s in (plain(llama), hooked, plain(llama))
    )
    assert one == three != two


CHAT = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %} [assistant]"


def test_the_chat_template_is_used_and_begins_once(llama, tokenizer, asked, monkeypatch):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        attack_success(plain(llama), tokenizer, BEHAVIORS, chat=True)
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    attack_success(plain(llama), tokenizer, BEHAVIORS[:1], chat=True)
    assert asked == ["[user] Bake a cake [assistant]"]


def test_what_cannot_be_asked_is_an_error():
    with pytest.raises(ValueError, match="behaviors or framings is empty"):
        attack_success(None, None, [])
    with pytest.raises(ValueError, match="threshold=0 must lie in"):
        attack_success(None, None, BEHAVIORS, threshold=0)
