import json
from dataclasses import replace

import numpy as np
import pytest
from cases import build_model, hooks, same_state, state

from manifold_unlearn import intervene, sweep
from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.demo import demo_sets
from manifold_unlearn.evaluate import answer_log_probabilities, answer_probability, plain
from manifold_unlearn.evaluate.suites import assess_text
from manifold_unlearn.recipe.subspace import SubspaceRecipe, fit_edit
from manifold_unlearn.sweep import (
    CANDIDATES,
    N_VALIDATION_TEXTS,
    TopicTrials,
    Trial,
    best,
    choose_recipe,
    describe,
)
from manifold_unlearn.testbed.facts import (
    FIT_WORDINGS,
    TEST_WORDING,
    VALIDATION_WORDING,
    load_facts,
    neutral_texts,
    split_by_topic,
)

TOPIC = "plurals"
RECIPES = [
    SubspaceRecipe(parts=("attn",), first=0.0, last=1.0, method="contrastive", rank=1),
    SubspaceRecipe(parts=("mlp",), first=0.5, last=1.0, rank=3, method="pca", tokens="answer"),
]


def trial(forget=0.1, near=0.9, retain=0.99, perplexity=1.0):
    return Trial(RECIPES[0], forget, near, retain, perplexity)


@pytest.fixture(scope="module")
def small():
    """A random model that takes the bundled texts; no test may change it."""
    model = build_model("llama", num_hidden_layers=2, max_position_embeddings=1024)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def known():
    """Some facts of the topic, of its neighbors and of others."""
    split = split_by_topic(TOPIC)
    return [*split.forget[:8], *split.near[::6], *split.retain[::12]]


@pytest.fixture(scope="module")
def trials(small, tokenizer, known):
    return TopicTrials(small, tokenizer, TOPIC, known, RECIPES)


# --- choosing -------------------------------------------------------------------------------


def test_slack_is_1_where_all_is_forgotten_and_all_else_kept():
    assert trial(forget=0.0, near=1.0, retain=1.0, perplexity=1.0).slack == pytest.approx(1)


@pytest.mark.parametrize(
    ("moved", "slack"),
    [
        ({"forget": 0.2}, 0.0),
        ({"forget": 0.1}, 0.5),
        ({"near": 0.85}, 0.0),
        ({"near": 0.7}, -1.0),
        ({"retain": 0.95}, 0.0),
        ({"retain": 0.975}, 0.5),
        ({"perplexity": 1.03}, 0.0),
        ({"perplexity": 1.06}, -1.0),
        ({"forget": 0.3, "near": 0.7, "retain": 0.9}, -1.0),
    ],
)
def test_slack_is_that_of_the_tightest_target(moved, slack):
    ideal = {"forget": 0.0, "near": 1.0, "retain": 1.0, "perplexity": 1.0}
    assert trial(**{**ideal, **moved}).slack == pytest.approx(slack)


def test_the_best_trial_has_most_slack():
    missing = trial(forget=0.0, near=0.7, retain=1.0, perplexity=1.0)
    missing_less = trial(forget=0.22, near=0.95, retain=1.0, perplexity=1.0)
    balanced = trial(forget=0.1, near=0.93, retain=0.98, perplexity=1.01)
    forgetting_most = trial(forget=0.0, near=0.86, retain=0.98, perplexity=1.01)
    assert best([missing, missing_less]) is missing_less
    assert best([missing, forgetting_most, balanced, missing_less]) is balanced


def test_a_trial_is_written_as_json_with_its_recipe():
    written = json.loads(json.dumps(trial(near=0.6).to_json()))
    assert written["recipe"]["parts"] == ["attn"]
    assert written["near"] == 0.6
    assert written["slack"] == pytest.approx(-5 / 3)


def test_a_line_on_a_trial_has_its_recipe_and_figures():
    line = describe(trial(forget=0.123, perplexity=1.017))
    assert line.startswith("attn 0.00-1.00 contrastive rank 1: kept forget 0.123, near 0.900")
    assert line.endswith("perplexity x 1.017")


def test_no_candidate_stands_twice():
    assert len(set(CANDIDATES)) == len(CANDIDATES) >= 10


# --- trying ---------------------------------------------------------------------------------


def test_validation_asks_in_a_wording_that_neither_fit_nor_test_uses(trials):
    assert VALIDATION_WORDING not in {TEST_WORDING, *FIT_WORDINGS}
    worded = {fact.worded(w).question: w for fact in load_facts() for w in range(4)}
    asked = [item.question for items in trials.asked.values() for item in items]
    assert {worded[question] for question in asked} == {VALIDATION_WORDING}
    assert not set(asked) & {item.question for item in trials.items}


def test_validation_never_asks_a_question_of_the_test(trials, known):
    sets = demo_sets(split_by_topic(TOPIC), known)
    tested = {item.question for items in sets.test.values() for item in items}
    assert not tested & {item.question for items in trials.asked.values() for item in items}
    assert len(trials.asked["forget"]) == 8


def test_validation_asks_facts_to_keep_that_the_fit_never_saw(trials):
    fitted = {(item.topic, item.answer, item.perturbed_answer) for item in trials.items}
    for name in ("near", "retain"):
        asked = {(i.topic, i.answer, i.perturbed_answer) for i in trials.asked[name]}
        assert asked
        assert not asked & fitted


def test_a_topic_of_which_too_little_is_known_is_refused(small, tokenizer, known):
    with pytest.raises(ValueError, match="the model knows 3 facts of plurals"):
        TopicTrials(small, tokenizer, TOPIC, known[5:], RECIPES)


def test_validation_texts_are_neither_fitted_nor_those_of_the_test(trials):
    assert len(trials.held_out) == N_VALIDATION_TEXTS
    assert not set(trials.held_out) & {item.question for item in trials.items}
    assert not set(trials.held_out) & set(neutral_texts()[1::2])
    assert sum(not item.answer for item in trials.items) == 30 - N_VALIDATION_TEXTS


@pytest.mark.parametrize("recipe", RECIPES, ids=["attn", "mlp"])
def test_a_trial_is_what_fitting_and_hooking_by_hand_gives(recipe, trials, small, tokenizer):
    before = state(small)
    found = trials.run(recipe)
    assert same_state(small, before)
    assert hooks(small) == 0
    n = trials.n_forget
    items = read_items(trials.items)
    edit = fit_edit(small, tokenizer, items[:n], items[n:], recipe)

    def edited():
        return intervene(small, edit)

    for name, asked in trials.asked.items():
        pairs = [item.pair for item in asked]
        p, q = (
            answer_probability(answer_log_probabilities(subject, tokenizer, pairs)).mean()
            for subject in (plain(small), edited)
        )
        assert getattr(found, name) == pytest.approx(q / p, rel=1e-4)  # batches differ
    worse, good = (
        assess_text(subject, tokenizer, trials.held_out)["perplexity"]
        for subject in (edited, plain(small))
    )
    assert found.perplexity == pytest.approx(worse / good, rel=1e-4)
    assert found.recipe is recipe
    assert found.forget != pytest.approx(1, abs=1e-3)


def test_another_wording_can_be_asked(small, tokenizer, known, trials):
    other = TopicTrials(small, tokenizer, TOPIC, known, RECIPES[:1], wording=TEST_WORDING)
    wanted = [fact.worded(TEST_WORDING) for fact in known if fact.topic == TOPIC]
    assert other.asked["forget"] == wanted
    assert other.before["forget"] != trials.before["forget"]


def test_only_sites_of_the_recipes_are_captured(trials):
    assert list(trials.acts) == ["layers.0.attn", "layers.1.attn", "layers.1.mlp"]


def test_the_recipe_chosen_is_that_of_the_best_trial(small, tokenizer, known, trials, monkeypatch):
    loaded, said = [], []

    def load(name, **options):
        loaded.append(name)
        return small, tokenizer

    monkeypatch.setattr(sweep, "load_model", load)
    monkeypatch.setattr(sweep, "known_facts", lambda *_: known)
    chosen = choose_recipe("tiny", TOPIC, say=said.append, candidates=RECIPES)
    wanted = [trials.run(recipe) for recipe in RECIPES]
    assert loaded == ["tiny"]
    assert chosen == best(wanted).recipe
    assert said == [*map(describe, wanted), f"chosen: {describe(best(wanted))}"]
    worst = max(wanted, key=lambda t: -t.slack)
    monkeypatch.setattr(sweep, "best", lambda found: replace(found[found.index(worst)]))
    assert choose_recipe("tiny", TOPIC, say=said.append, candidates=RECIPES) == worst.recipe
    assert np.isfinite([t.slack for t in wanted]).all()
