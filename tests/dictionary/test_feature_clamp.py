"""Clamped latents: the formula, identity to the bit elsewhere, in a model, on disk."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manifold_unlearn.dictionary import SparseAutoencoder, Transcoder
from manifold_unlearn.dictionary.chosen_latents import latent_activations
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.intervene.edit import Edit
from manifold_unlearn.intervene.hooks import intervene

RULES = [
    {"name": "relu"},
    {"name": "topk", "k": 4},
    {"name": "abs_topk", "k": 4},
    {"name": "groupmax", "k": 8},
    {"name": "batch_topk", "k": 4},
    {"name": "jumprelu"},
    {"name": "gated"},
]


def trained_looking(rule, **how):
    """A dictionary whose every parameter differs from its start."""
    coder = SparseAutoencoder(12, 48, rule, random_state=0, **how).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(0.2 * torch.rand(parameter.shape, generator=draw))
        if rule["name"] == "batch_topk":
            coder.nonlinearity.threshold.fill_(0.4)
    return coder


def rows_of(n=64, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
@pytest.mark.parametrize("ranked", [False, True])
def test_activations_of_chosen_latents_are_columns_of_the_code(rule, ranked):
    coder, rows = trained_looking(rule, rank_by_norm=ranked), rows_of()
    chosen = torch.tensor([40, 3, 17, 5, 9])
    with torch.no_grad():
        found = latent_activations(coder, rows, chosen)
        expected = coder.encode(rows)[:, chosen]
    assert (expected != 0).any()
    torch.testing.assert_close(found, expected)


def test_a_batch_topk_dictionary_in_training_mode_neither_learns_nor_looks_at_the_batch():
    coder, rows = trained_looking({"name": "batch_topk", "k": 4}), rows_of()
    chosen = torch.arange(10)
    expected = coder.encode(rows)[:, chosen]
    coder.train()
    found = latent_activations(coder, rows[:1], chosen)
    torch.testing.assert_close(found, expected[:1])
    assert float(coder.nonlinearity.threshold) == pytest.approx(0.4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "unit_rms"])
def test_zeroing_takes_the_latents_out_and_keeps_the_reconstruction_error(rule, normalization):
    coder, rows = trained_looking(rule, normalization=normalization), rows_of()
    chosen = list(range(0, 48, 3))
    with torch.no_grad():
        code = coder.encode(rows)
        cut = code.clone()
        cut[:, chosen] = 0
        expected = rows + coder.decode(cut, rows) - coder.decode(code, rows)
        found = FeatureClamp(coder, chosen)(rows)
    fires = (code[:, chosen] != 0).any(1)
    assert int(fires.sum()) > 0
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[~fires], rows[~fires])
    assert (found[fires] != rows[fires]).any(1).all()


def test_a_deep_dictionary_is_clamped_through_its_last_layer():
    coder, rows = trained_looking({"name": "topk", "k": 4}, deep=6), rows_of()
    with torch.no_grad():
        code = coder.encode(rows)
        cut = code.clone()
        cut[:, [0, 5, 8]] = 0
        expected = rows + coder.decode(cut, rows) - coder.decode(code, rows)
        torch.testing.assert_close(FeatureClamp(coder, [0, 5, 8])(rows), expected)


def test_negative_scaled_and_steered_values_follow_the_formula():
    coder, rows = trained_looking({"name": "relu"}), rows_of()
    chosen = [1, 2]
    code = coder.encode(rows).detach().numpy()[:, chosen]
    directions, plain = coder.W_dec.detach().numpy()[chosen], rows.numpy()
    on = code > 0
    cases = {
        "negative": (FeatureClamp(coder, chosen, -3.0), np.where(on, -3.0, 0.0)),
        "one each": (FeatureClamp(coder, chosen, [1.0, -2.0]), np.where(on, [1.0, -2.0], 0.0)),
        "scaled": (FeatureClamp(coder, chosen, 0.5, "scale"), 0.5 * code),
        "steered": (
            FeatureClamp(coder, chosen, 2.0, only_when_active=False),
            np.full_like(code, 2.0),
        ),
    }
    for name, (clamp, wanted) in cases.items():
        found = clamp.transform(plain)
        assert found.dtype == np.float32
        expected = plain + (wanted - code) @ directions
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


def test_only_the_rows_of_a_planted_latent_are_touched_and_it_is_gone():
    draw = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(12, 12, generator=draw))
    coder = SparseAutoencoder(12, 12, {"name": "relu"}, centered=False)
    with torch.no_grad():
        coder.encoder.copy_(directions.T)
        coder.decoder.copy_(directions.T)
    code = torch.rand(50, 12, generator=draw) * (torch.rand(50, 12, generator=draw) < 0.3)
    found = FeatureClamp(coder, [7])(code @ directions.T).detach() @ directions
    code[:, 7] = 0
    torch.testing.assert_close(found, code, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rule", "read"),
    [({"name": "relu"}, 3), ({"name": "jumprelu"}, 3), ({"name": "topk", "k": 4}, 512)],
    ids=["relu", "jumprelu", "topk"],
)
def test_it_costs_what_the_chosen_latents_cost_and_rules_of_rank_their_encoder(rule, read):
    n, d, chosen = 50, 16, 3
    coder = SparseAutoencoder(d, 512, rule, random_state=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        FeatureClamp(coder, range(chosen))(rows_of(n, d))
    assert counter.get_total_flops() == 2 * n * d * (read + chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_come_back_in_their_dtype(dtype):
    rows = rows_of().to(dtype)
    found = FeatureClamp(trained_looking({"name": "topk", "k": 4}), [0, 1]).transform(rows)
    assert found.dtype == dtype
    assert (found != rows).any()


def test_in_a_model_a_clamp_leaves_no_trace_also_after_an_exception(llama):
    width = llama.config.hidden_size
    coder = SparseAutoencoder(width, 4 * width, {"name": "relu"}, random_state=0)
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        before = llama(ids).logits
        with intervene(llama, {"layers.0": FeatureClamp(coder, range(width))}):
            inside = llama(ids).logits
        with (
            pytest.raises(ZeroDivisionError),
            intervene(llama, {"layers.0": FeatureClamp(coder, range(width))}),
        ):
            raise ZeroDivisionError
        assert not torch.equal(inside, before)
        assert torch.equal(llama(ids).logits, before)


def test_a_clamp_of_another_width_is_refused(llama):
    clamp = FeatureClamp(SparseAutoencoder(7, 20, random_state=0), [1])
    with (
        pytest.raises(ValueError, match="was fitted for width 7"),
        intervene(llama, {"layers.0": clamp}),
        torch.no_grad(),
    ):
        llama(torch.tensor([[1, 2]]))


def test_saved_and_loaded_alone_and_in_an_edit_it_is_the_same(tmp_path):
    clamp = FeatureClamp(trained_looking({"name": "topk", "k": 4}), [4, 2], [-1.0, 0.0])
    rows = rows_of()
    clamp.save(tmp_path / "clamp")
    Edit({"layers.0": clamp}).save(tmp_path / "edit")
    loaded = FeatureClamp.load(tmp_path / "clamp")
    in_edit = Edit.load(tmp_path / "edit")["layers.0"]
    for other in (loaded, in_edit):
        assert torch.equal(other.transform(rows), clamp.transform(rows))


def test_what_cannot_be_clamped_is_refused():
    coder = trained_looking({"name": "relu"})
    with pytest.raises(ValueError, match="latent 48 is not among the 48"):
        FeatureClamp(coder, [3, 48])
    with pytest.raises(ValueError, match="name one of them twice"):
        FeatureClamp(coder, [3, 3])
    with pytest.raises(ValueError, match="at least one whole number"):
        FeatureClamp(coder, [])
    with pytest.raises(ValueError, match="at least one whole number"):
        FeatureClamp(coder, [1.5])
    with pytest.raises(ValueError, match="one finite number, or one a latent"):
        FeatureClamp(coder, [3, 4], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="one finite number"):
        FeatureClamp(coder, [3, 4], float("nan"))
    with pytest.raises(ValueError, match="rule='double'"):
        FeatureClamp(coder, [3], rule="double")
    with pytest.raises(ValueError, match="Transcoder does not write the rows"):
        FeatureClamp(Transcoder(12, 48, 12), [3])
