import json

import numpy as np
import pytest
import torch
from cases import hooks, same_state, state

from manifold_unlearn import intervene
from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.evaluate import (
    choice_questions,
    dictionary_unlearning,
    forget_latents,
    plain,
    score_choices,
)


def test_latents_are_those_that_fire_on_forget_tokens_and_hardly_on_retain_tokens():
    forget = np.array([0.5, 0.2, 0.0, 0.3, 0.9])
    retain = np.array([0.0, 0.01, 0.0, 0.009, 0.5])
    assert forget_latents(forget, retain, retain_threshold=0.01).tolist() == [0, 3]
    assert forget_latents(forget, retain, retain_threshold=0.02).tolist() == [0, 3, 1]
    assert forget_latents(forget, retain, retain_threshold=0.6).tolist() == [4, 0, 3, 1]


@pytest.fixture(scope="module")
def bed(tiny_testbed):
    """Questions, and the ids of tokens that forget texts have and retain texts have not."""
    world, tokenizer = tiny_testbed.world, tiny_testbed.tokenizer
    forget, retain = list(world.forget)[::3], list(world.retain)[::8]

    def ids(part):
        return {t for text in world.texts(part) for t in tokenizer(text).input_ids}

    return {
        "forget_texts": [item.text for item in forget],
        "retain_texts": [item.text for item in world.retain],
        "forget_questions": choice_questions(forget),
        "retain_questions": choice_questions(retain),
        "names": sorted(ids("forget") - ids("retain")),
    }


def token_dictionary(model, token_ids):
    """At ``embed``: a latent for each token, which fires on it alone."""
    table = model.get_input_embeddings().weight.detach()
    own = table[token_ids]
    direction = own / own.norm(dim=1, keepdim=True)
    reached = table @ direction.T
    reached[token_ids, range(len(token_ids))] = -torch.inf
    highest, own_reach = reached.max(0).values, own.norm(dim=1)
    assert (highest < own_reach).all()
    sae = SparseAutoencoder(table.shape[1], len(token_ids), {"name": "relu"}, centered=False)
    with torch.no_grad():
        sae.encoder.copy_(direction)
        sae.decoder.copy_(direction)
        sae.b_enc.copy_(-(highest + own_reach) / 2)
    return sae


def run(bed, tiny_testbed, coder, **options):
    given = {k: v for k, v in bed.items() if k != "names"}
    settings = {"counts": (100,), "multipliers": (5.0,), "retain_thresholds": (0.01,)} | options
    return dictionary_unlearning(
        tiny_testbed.told, tiny_testbed.tokenizer, coder, "embed", scoring="answer", **given,
        **settings,
    )  # fmt: skip


def test_latents_of_the_names_to_forget_unlearn_without_harm(bed, tiny_testbed):
    model, tokenizer = tiny_testbed.told, tiny_testbed.tokenizer
    coder, weights = token_dictionary(model, bed["names"]), state(tiny_testbed.told)
    found = run(bed, tiny_testbed, coder, multipliers=(0.01, 5.0))
    assert [s.multiplier for s in found.settings] == [0.01, 5.0]
    strong = found.settings[1]
    assert strong.retain.mean == 1 and strong.keeps  # nothing fires on retain questions
    assert found.best is strong
    assert found.score == 1 - strong.forget.mean > 0.3
    # the same by hand: the rows of these tokens moved
    table = model.get_input_embeddings().weight.detach()
    own = table[bed["names"]]
    direction = own / own.norm(dim=1, keepdim=True)

    def moved(h):
        f = (h @ direction.T + coder.b_enc.detach()).relu()
        return h + torch.where(f > 0, -5.0 - f, 0.0) @ direction

    right = score_choices(
        plain(model), tokenizer, bed["forget_questions"], scoring="answer"
    ).always_right.values
    hand = score_choices(
        lambda: intervene(model, {"embed": moved}),
        tokenizer,
        bed["forget_questions"],
        scoring="answer",
    ).accuracy.values
    np.testing.assert_array_equal(strong.forget.values, hand[right == 1])
    assert found.n_forget == len(right) >= len(strong.forget.values)
    assert hooks(model) == 0 and same_state(model, weights)
    written = json.loads(json.dumps(found.to_json()))
    assert written["score"] == found.score
    assert [s["keeps"] for s in written["settings"]] == [s.keeps for s in found.settings]


def test_frequencies_are_shares_of_the_tokens_that_are_not_special(bed, tiny_testbed):
    coder = token_dictionary(tiny_testbed.told, bed["names"])
    found = run(bed, tiny_testbed, coder)
    tokenizer = tiny_testbed.tokenizer
    for texts, frequency in (
        (bed["forget_texts"], found.forget_frequency),
        (bed["retain_texts"], found.retain_frequency),
    ):
        ids = [t for text in texts for t in tokenizer(text).input_ids]
        ids = np.array([t for t in ids if t not in tokenizer.all_special_ids])
        expected = [(ids == token).mean() for token in bed["names"]]
        np.testing.assert_allclose(frequency, expected)
    assert found.retain_frequency.max() == 0 < found.forget_frequency.max()


def test_a_dictionary_whose_latents_fire_everywhere_scores_nothing(bed, tiny_testbed):
    d = tiny_testbed.told.config.hidden_size
    everywhere = SparseAutoencoder(d, 8, {"name": "relu"}, centered=False, random_state=0)
    with torch.no_grad():
        everywhere.b_enc.fill_(100)
    found = run(bed, tiny_testbed, everywhere)
    assert found.settings[0].latents == ()
    assert found.settings[0].forget.mean == found.settings[0].retain.mean == 1
    assert found.score == 0
    harmful = run(bed, tiny_testbed, everywhere, retain_thresholds=(2.0,))
    assert len(harmful.settings[0].latents) == 8
    assert not harmful.settings[0].keeps and harmful.best is None
    assert harmful.score == 0
    assert harmful.settings[0].forget.mean < 1  # it would have scored


def test_what_cannot_be_measured_is_refused(bed, tiny_testbed):
    coder = token_dictionary(tiny_testbed.told, bed["names"])
    with pytest.raises(ValueError, match="counts=.0., .* all positive"):
        run(bed, tiny_testbed, coder, counts=(0,))
    wrong = [type(q)(q.question, q.options, 1) for q in bed["retain_questions"]]
    with pytest.raises(ValueError, match="answers none of the .* retain questions right"):
        run(bed | {"retain_questions": wrong}, tiny_testbed, coder)
