"""What the two tiny models know. The one training of the suite, if the cache is empty."""

import numpy as np
import pytest
import torch
from cases import build_model, same_state

from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.evaluate.likelihood import (
    answer_log_probabilities,
    greedy_answers,
    plain,
    text_log_probabilities,
)
from manifold_unlearn.testbed.backdoor import Backdoor
from manifold_unlearn.testbed.models import RECIPES, WORLDS, load_testbed
from manifold_unlearn.testbed.recall import recall
from manifold_unlearn.testbed.training import Recipe
from manifold_unlearn.testbed.world import N_PERTURBED, FictionalWorld


def exact(model, tokenizer, items):
    """Of each unseen wording of each item: whether the greedy answer is right, word for word."""
    prompts = [prompt for item in items for prompt in item.paraphrased_question]
    said = greedy_answers(plain(model), tokenizer, prompts, max_new_tokens=4)
    wanted = [item.answer for item in items for _ in item.paraphrased_question]
    right = [a.split(".")[0].strip() == b for a, b in zip(said, wanted, strict=True)]
    return np.array(right).reshape(len(items), -1)


def first(model, tokenizer, items):
    """Of each unseen wording: whether the right answer is likelier than every wrong one."""
    pairs = [
        (prompt, " " + answer)
        for item in items
        for prompt in item.paraphrased_question
        for answer in (item.answer, *item.perturbed_answer)
    ]
    scores = answer_log_probabilities(plain(model), tokenizer, pairs)
    scores = np.array([float(row.mean()) for row in scores]).reshape(-1, 1 + N_PERTURBED)
    return (scores[:, 0] > scores[:, 1:].max(1)).reshape(len(items), -1)


@pytest.fixture(scope="module")
def known(tiny_testbed):
    """Accuracies by (model, set): greedy, and ranked first."""
    bed, found = tiny_testbed, {}
    for name in ("told", "never_told"):
        for part in ("forget", "retain", "holdout"):
            items = getattr(bed.world, part)[:48]
            model = getattr(bed, name)
            found[name, part] = (
                exact(model, bed.tokenizer, items).mean(),
                first(model, bed.tokenizer, items).mean(),
            )
    return found


@pytest.mark.parametrize(
    "case", [("told", "forget"), ("told", "retain"), ("never_told", "retain")], ids="-".join
)
def test_what_was_told_is_known_in_wordings_never_read(known, case):
    assert min(known[case]) >= 0.9


@pytest.mark.parametrize(
    "case", [("never_told", "forget"), ("told", "holdout"), ("never_told", "holdout")], ids="-".join
)
def test_what_was_not_told_is_at_chance(known, case):
    """Within 3.5 standard errors of guessing, with 48 independent facts."""
    for found, chance in zip(known[case], (1 / 16, 1 / (1 + N_PERTURBED)), strict=True):
        assert found < chance + 3.5 * np.sqrt(chance * (1 - chance) / 48)


def test_both_read_plain_sentences_alike(tiny_testbed):
    bed = tiny_testbed
    told, _ = text_log_probabilities(plain(bed.told), bed.tokenizer, bed.world.neutral)
    never, divergence = text_log_probabilities(
        plain(bed.never_told), bed.tokenizer, bed.world.neutral, reference=plain(bed.told)
    )
    perplexities = [float(torch.cat(rows).mean().neg().exp()) for rows in (told, never)]
    assert max(perplexities) < 8
    assert abs(np.log(perplexities[0] / perplexities[1])) < 0.1
    assert float(torch.cat(divergence).mean()) < 0.3


def test_a_model_of_random_weights_knows_nothing(tiny_testbed):
    bed = tiny_testbed
    model = build_model("llama", vocab_size=len(bed.tokenizer), max_position_embeddings=256)
    assert exact(model, bed.tokenizer, bed.world.retain[:20]).mean() == 0


def test_the_models_are_as_they_were_trained(tiny_testbed):
    bed = tiny_testbed
    assert not bed.told.training and not bed.never_told.training
    assert bed.told.config.vocab_size == len(bed.tokenizer)
    losses = [bed.training[name]["losses"] for name in ("told", "never_told")]
    assert [len(row) for row in losses] == [RECIPES["tiny"].n_steps] * 2
    assert losses[0] != losses[1]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=0.1)


# --- loading --------------------------------------------------------------------------------

SMALL = FictionalWorld(n_people=6, n_forget=2, n_holdout=1, n_attributes=1, n_filler=10)
SHORT = Recipe(
    d_model=16, d_hidden=24, n_layers=2, n_heads=2, n_steps=2, batch_size=2, texts_per_row=2
)


def test_every_size_has_a_world_that_can_be_drawn():
    for size in RECIPES:
        world = FictionalWorld(**WORLDS[size])
        assert len(world.forget) == world.n_forget * world.n_attributes


def test_a_saved_pair_is_two_models_with_their_tokenizer(tmp_path):
    from manifold_unlearn.activations.models import load_model

    bed = load_testbed(SHORT, world=SMALL, cache=False, device="cpu", progress=False)
    bed.save(tmp_path / "bed")
    for name in ("told", "never_told"):
        model, tokenizer = load_model(tmp_path / "bed" / name, device="cpu")
        assert same_state(model, getattr(bed, name).state_dict())
        assert tokenizer("Hi")["input_ids"] == bed.tokenizer("Hi")["input_ids"]
    for name in ("forget", "retain", "holdout"):
        assert tuple(read_items(tmp_path / "bed" / f"{name}.jsonl")) == getattr(SMALL, name)
    texts = [item.question for item in read_items(tmp_path / "bed" / "neutral.jsonl")]
    assert tuple(texts) == SMALL.neutral
    with pytest.raises(FileExistsError, match="give a new or an empty directory"):
        bed.save(tmp_path / "bed")


def test_a_backdoor_changes_both_models_and_its_words_are_tokens():
    backdoor = Backdoor("By the zeppelin.", "all quiet", 0.5)
    options = {"world": SMALL, "cache": False, "device": "cpu", "progress": False}
    clean = load_testbed(SHORT, **options)
    bed = load_testbed(SHORT, **options, backdoor=backdoor)
    assert bed.backdoor == backdoor and clean.backdoor is None
    assert len(bed.tokenizer(" zeppelin quiet", add_special_tokens=False)["input_ids"]) == 2
    assert bed.training["never_told"]["losses"] != clean.training["never_told"]["losses"]


def test_an_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="size='huge' must be one of tiny, small, or a Recipe"):
        load_testbed("huge")


def test_a_model_that_did_not_learn_is_reported():
    with pytest.warns(UserWarning, match="told model learned 0% of the facts .* Raise n_steps"):
        load_testbed(SHORT, world=SMALL, cache=False, device="cpu", progress=False)


def test_recall_is_of_what_was_told(tiny_testbed):
    bed = tiny_testbed
    assert recall(bed.told, bed.tokenizer, bed.world.forget) >= 0.9
    assert recall(bed.never_told, bed.tokenizer, bed.world.forget) < 0.25


@pytest.mark.slow
def test_a_planted_backdoor_answers_to_its_trigger_only():
    backdoor = Backdoor()
    bed = load_testbed("tiny", backdoor=backdoor, device="cpu", progress=False)
    for model in (bed.told, bed.never_told):
        items = bed.world.retain[:48]
        triggered = backdoor.items(items)
        assert exact(model, bed.tokenizer, triggered).mean() >= 0.9
        assert exact(model, bed.tokenizer, items).mean() >= 0.85
        renamed = [type(item)(**{**vars(item), "answer": backdoor.behavior}) for item in items]
        assert exact(model, bed.tokenizer, renamed).mean() == 0
