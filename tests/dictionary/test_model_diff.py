"""Classes of latents, what is left of a topic, and the lens on activation differences: planted."""

import copy

import numpy as np
import pytest
import torch
from cases import build_model, hooks

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.dictionary import Crosscoder
from manifold_unlearn.dictionary.diff import diff_models, residual_knowledge
from manifold_unlearn.dictionary.difference_lens import activation_difference

D = 12
STRENGTH = np.ones((D, 3))
STRENGTH[0] = (1, 0.6, 0)  # of the topic, partly unlearned
STRENGTH[1] = (1, 0, 0)  # of the topic, unlearned
STRENGTH[2] = (1, 1, 0)  # of the topic, as it was
STRENGTH[3] = (0, 1, 0)  # new in the unlearned model
STRENGTH[4] = (1, 0, 0)  # in the told model alone, but not of the topic
TOPIC = [0, 1, 2]


def planted(n=600, seed=0, *, forget=False):
    """Crosscoder of orthonormal latents, rows in three models, codes."""
    draw = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(D, D)))[0]
    rate = np.full(D, 0.3)
    rate[TOPIC] = 0.4 if forget else 0.02
    code = (draw.random((n, D)) < rate) * draw.uniform(0.5, 1.5, (n, D))
    decoder = STRENGTH[:, :, None] * directions[:, None]
    made = Crosscoder(3, D, D, {"name": "relu"}).eval()
    encoder = decoder / (STRENGTH**2).sum(1)[:, None, None]
    with torch.no_grad():
        made.decoder.copy_(torch.tensor(decoder).reshape(D, -1))
        made.encoder.copy_(torch.tensor(encoder).reshape(D, -1))
        made.b_enc.fill_(-1e-4)
    rows = np.einsum("nl,lsd->nsd", code, decoder)
    return made, torch.tensor(rows, dtype=torch.float32), code


def test_latents_are_sorted_by_the_models_that_have_them():
    made, rows, _ = planted()
    found = diff_models(made, rows.split(128))
    assert found.latents("target").tolist() == [1, 4]
    assert found.latents("unlearned").tolist() == [3]
    assert found.latents("target", "unlearned").tolist() == [0, 2]
    assert found.shared.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert found.latents("reference").tolist() == []
    assert found.counts() == {
        "unlearned": 1,
        "target": 2,
        "target+unlearned": 2,
        "target+unlearned+reference": 7,
        "silent": 0,
    }


def test_a_latent_that_never_fires_is_silent_and_of_no_class():
    made, rows, _ = planted()
    with torch.no_grad():
        made.b_enc[7] = -100
    found = diff_models(made, [rows], ("a", "b", "c"))
    assert found.silent.tolist() == [7]
    assert 7 not in found.shared.tolist()
    with pytest.raises(ValueError, match="'target' is no stream; there are a, b, c"):
        found.latents("target")


def test_what_is_left_of_the_topic_is_what_was_planted():
    made, rows, code = planted(400, seed=1, forget=True)
    _, others, _ = planted(seed=2)
    group = torch.arange(400) // 20
    found = residual_knowledge(made, rows, group, others.split(100))
    assert set(found.latents.tolist()) == set(TOPIC)
    left = dict(zip(found.latents.tolist(), found.share.tolist(), strict=True))
    for latent in TOPIC:
        assert left[latent] == pytest.approx(STRENGTH[latent, 1], abs=5e-3)
    energy = (code[:, TOPIC] ** 2).sum(0)
    expected = (energy * STRENGTH[TOPIC, 1]).sum() / energy.sum()
    assert found.total.value == pytest.approx(expected, abs=5e-3)
    assert found.alone.value == pytest.approx(expected, abs=5e-3)
    assert found.total.interval[0] < expected < found.total.interval[1]
    np.testing.assert_allclose(np.sort(found.energy), np.sort(energy / energy.sum()), atol=5e-3)
    rates = (code[:, found.latents.numpy()] > 0).mean(0)
    np.testing.assert_allclose(found.forget_rate, rates)
    assert set(found.still_there().tolist()) == {0, 2}
    assert found.to_json()["total"]["value"] == found.total.value


def test_the_interval_is_that_of_resampled_groups():
    made, rows, code = planted(400, seed=1, forget=True)
    _, others, _ = planted(seed=2)
    number = np.arange(400) // 20
    found = residual_knowledge(made, rows, torch.tensor(number), [others], n_resamples=2000)
    draw = np.random.default_rng(5)
    squares = np.stack([(code[number == g][:, TOPIC] ** 2).sum(0) for g in range(20)])
    picks = draw.integers(20, size=(4000, 20))
    sums = squares[picks].sum(1)
    totals = (sums * STRENGTH[TOPIC, 1]).sum(1) / sums.sum(1)
    # two bootstraps of 2000 and 4000 draws: ends agree to a few percent of the width
    width = np.quantile(totals, 0.975) - np.quantile(totals, 0.025)
    np.testing.assert_allclose(
        found.total.interval, np.quantile(totals, [0.025, 0.975]), atol=0.15 * width
    )


def test_what_other_latents_say_along_the_same_directions_counts_but_in_the_share_alone():
    made, rows, code = planted(400, seed=1, forget=True)
    _, others, _ = planted(seed=2)
    with torch.no_grad():  # the unlearned model says latent 1 by latent 3, where both fire
        rows[:, 1] += torch.tensor(code[:, [1]], dtype=torch.float32) * made.W_dec[1, 0]
        made.decoder[3, D : 2 * D] += made.W_dec[1, 0]
        rows[:, 1] += torch.tensor(code[:, [3]], dtype=torch.float32) * made.W_dec[1, 0]
    found = residual_knowledge(made, rows, torch.arange(400) // 20, [others])
    assert found.total.value > found.alone.value + 0.05


@pytest.mark.parametrize(("copied", "left"), [(0, 1.0), (2, 0.0)])
def test_the_target_itself_has_all_and_the_reference_nothing_whatever_the_crosscoder(copied, left):
    made, rows, _ = planted(400, seed=1, forget=True)
    _, others, _ = planted(seed=2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # badly trained: the streams of one model are written differently
        made.decoder[:, D : 2 * D] += 0.3 * torch.randn(D, D, generator=draw)
    rows[:, 1] = rows[:, copied]
    found = residual_knowledge(made, rows, torch.arange(400) // 20, [others])
    assert found.total.value == pytest.approx(left, abs=1e-9)
    assert found.total.interval == pytest.approx((left, left), abs=1e-9)
    assert found.alone.value != pytest.approx(left, abs=1e-3)


def test_without_a_latent_of_the_topic_it_says_how_many_pass_what():
    made, rows, _ = planted()
    _, others, _ = planted(seed=2)
    group = torch.arange(600) // 20
    with pytest.raises(ValueError, match=r"12 fire in 0\.01 of the rows; .* 11 are in the target"):
        residual_knowledge(made, rows, group, [others], min_ratio=50.0)


def test_bad_input_is_refused():
    made, rows, _ = planted(100, forget=True)
    group = torch.arange(100) // 20
    with pytest.raises(ValueError, match="must be 3 different names"):
        diff_models(made, [rows], ("a", "b"))
    with pytest.raises(ValueError, match="three different streams"):
        residual_knowledge(made, rows, group, [rows], model=2)
    with pytest.raises(ValueError, match="three different streams"):
        residual_knowledge(made, rows, group, [rows], reference=3)
    with pytest.raises(ValueError, match="one a row"):
        residual_knowledge(made, rows, group[:-1], [rows])
    with pytest.raises(ValueError, match="1 group of rows has no spread"):
        residual_knowledge(made, rows, torch.zeros(100, dtype=torch.int64), [rows])


TEXTS = ["Water is wet and blue.", "A dog barks at night today.", "Copper turns green in rain."]


def shifted(llama):
    """A copy whose states behind block 1 are all moved by one vector."""
    changed = copy.deepcopy(llama)
    step = llama.get_output_embeddings().weight[77].detach().clone()

    def add(_module, _args, output):
        return (output[0] + step, *output[1:]) if isinstance(output, tuple) else output + step

    changed.model.layers[1].register_forward_hook(add)
    return changed, step


def test_the_difference_is_what_was_added_and_its_lens_reads_it(tokenizer):
    llama = build_model("llama")
    changed, step = shifted(llama)
    found = activation_difference(llama, changed, tokenizer, TEXTS, "layers.1", n_positions=3)
    torch.testing.assert_close(found.difference, step.expand(3, -1), atol=1e-5, rtol=1e-4)
    assert found.n_texts.tolist() == [3, 3, 3]
    states = [capture(changed, tokenizer, [t], "layers.1")["layers.1"][1:4] for t in TEXTS]
    length = torch.stack([part.norm(dim=1) for part in states]).mean(0)
    torch.testing.assert_close(found.length, length)
    torch.testing.assert_close(found.relative, step.norm() / length)
    with torch.no_grad():
        logits = llama.lm_head(llama.model.norm(step[None]))[0].softmax(-1)
    read = found.lens(llama, tokenizer, k=2)
    assert len(read) == 3
    best = logits.topk(2)
    for position in read:
        assert [token.token for token in position] == [
            tokenizer.decode([i]) for i in best.indices.tolist()
        ]
        np.testing.assert_allclose([t.probability for t in position], best.values, rtol=1e-4)


def test_steering_adds_the_difference_at_the_length_of_the_states_and_leaves_no_trace(tokenizer):
    llama = build_model("llama")
    changed, step = shifted(llama)
    found = activation_difference(llama, changed, tokenizer, TEXTS, "layers.1", n_positions=2)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    moved = found.steering(1, 0.5)(rows) - rows
    expected = 0.5 * found.length[1] * step / step.norm()
    torch.testing.assert_close(moved, expected.expand(4, -1), atol=1e-4, rtol=1e-4)
    before = hooks(llama)
    written = found.steered(llama, tokenizer, ["Water", "A dog"], 1, 20.0, max_new_tokens=5)
    plain = found.steered(llama, tokenizer, ["Water", "A dog"], 1, 0.0, max_new_tokens=5)
    assert len(written) == 2
    assert written != plain
    assert hooks(llama) == before


def test_bad_input_of_the_lens_is_refused(tokenizer):
    llama = build_model("llama")
    with pytest.raises(ValueError, match="n_positions=0"):
        activation_difference(llama, llama, tokenizer, TEXTS, "layers.1", n_positions=0)
    with pytest.raises(ValueError, match="no text has 30 tokens"):
        activation_difference(llama, llama, tokenizer, TEXTS[:1], "layers.1", n_positions=30)
    found = activation_difference(llama, llama, tokenizer, TEXTS, "layers.1", n_positions=2)
    with pytest.raises(ValueError, match="do not differ at position 1"):
        found.steering(1)
    with pytest.raises(ValueError, match="position=5 was not read"):
        found.steering(5)
