import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    SparseAutoencoder,
    Transcoder,
)
from manifold_unlearn.evaluate import dictionary_fidelities, dictionary_fidelity


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(n=600, d=16, k=3, noise=0.0, seed=0, shape=None):
    """Rows of k orthogonal directions each and a dictionary that knows them; its codes."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(d, d)))[0]
    codes = np.zeros((n, d))
    for row in codes:
        row[rng.choice(d - 2, size=k, replace=False)] = rng.uniform(1, 2, size=k)  # 2 latents dead
    bias = rng.normal(size=d)
    rows = codes @ directions + bias + noise * rng.normal(size=(n, d))
    sae = SparseAutoencoder(d, d, shape or {"name": "relu"}).double()
    with torch.no_grad():
        sae.decoder.copy_(torch.tensor(directions))
        sae.encoder.copy_(torch.tensor(directions))
        sae.b_dec.copy_(torch.tensor(bias))
    return sae, torch.tensor(rows), codes


def figures(y, y_hat):
    """Every figure from its formula, in numpy."""
    error, centered = y - y_hat, y - y.mean(0)
    total = (centered**2).sum()
    norm, norm_hat = np.linalg.norm(y, axis=1), np.linalg.norm(y_hat, axis=1)
    return {
        "fvu": (error**2).sum() / total,
        "explained_variance": 1 - (error**2).sum() / total,
        "explained_without_bias": 1 - error.var(0, ddof=1).sum() / y.var(0, ddof=1).sum(),
        "explained_by_row": (1 - (error**2).sum(1) / (centered**2).sum(1)).mean(),
        "mse": (error**2).mean(),
        "cosine": ((y * y_hat).sum(1) / norm / norm_hat).mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "relative_bias": (norm_hat**2).mean() / (y * y_hat).sum(1).mean(),
    }


def test_a_dictionary_that_knows_the_directions_is_exact():
    sae, rows, codes = planted(shape={"name": "topk", "k": 3})
    found = dictionary_fidelity(sae, rows)
    (use,), (out,) = found.codes, found.outputs
    assert found.l0 == use.l0 == 3
    assert use.l0_counts.tolist() == [0, 0, 0, 600]
    assert (use.l0_quantile(0), use.l0_quantile(0.5), use.l0_quantile(1)) == (0, 3, 3)
    np.testing.assert_array_equal(use.n_fired, (codes > 0).sum(0))
    np.testing.assert_allclose(use.total, codes.sum(0))
    assert use.l1 == pytest.approx(codes.sum(1).mean())
    assert use.dead == 2 / 16
    assert use.dense == ((codes > 0).mean(0) > 0.1).mean()
    assert out.fvu < 1e-25
    assert out.cosine == pytest.approx(1)
    assert out.relative_bias == pytest.approx(1)


@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_figures_are_those_of_their_formulas_whatever_the_block(block):
    sae, rows, _ = planted(noise=0.3)
    with torch.no_grad():
        sae.b_enc.fill_(-0.5)  # shrinks
    found = dictionary_fidelity(sae, rows, block=block)
    y_hat = sae(rows).detach().numpy()
    expected = figures(rows.numpy(), y_hat)
    out = found.outputs[0]
    for name, value in expected.items():
        assert getattr(out, name) == pytest.approx(value, rel=1e-10), name
    assert expected["relative_bias"] < 0.99
    error = ((rows.numpy() - y_hat) ** 2).sum(0) / ((rows.numpy() - rows.numpy().mean(0)) ** 2).sum(
        0
    )
    np.testing.assert_allclose(out.fvu_by_dimension, error, rtol=1e-10)
    assert found.fvu == pytest.approx(out.fvu)
    fires = sae.encode(rows).detach().numpy() > 0
    np.testing.assert_array_equal(found.codes[0].l0_counts, np.bincount(fires.sum(1)))


def test_an_error_that_is_the_same_everywhere_is_free_for_one_of_the_variances_only():
    sae, rows, _ = planted()
    shift = 5.0
    targets = rows + shift
    out = dictionary_fidelity(sae, rows, targets).outputs[0]
    assert out.explained_without_bias == pytest.approx(1)
    assert out.explained_variance == pytest.approx(
        1 - 600 * 16 * shift**2 / ((rows - rows.mean(0)) ** 2).sum().item()
    )


def test_the_zero_dictionary_explains_nothing():
    rows = draw(200, 8).double() + 3
    sae = SparseAutoencoder(8, 8, {"name": "relu"}).double()
    with torch.no_grad():
        sae.encoder.zero_()
    found = dictionary_fidelity(sae, rows)
    out, use = found.outputs[0], found.codes[0]
    assert (use.l0, use.l1, use.dead, use.dense) == (0, 0, 1, 0)
    assert (out.l2_ratio, out.cosine, out.n_zero) == (0, 0, 200)
    assert out.explained_without_bias == pytest.approx(0)
    assert out.fvu == pytest.approx((rows**2).sum().item() / ((rows - rows.mean(0)) ** 2).sum())
    assert np.isnan(out.relative_bias) and out.to_json()["relative_bias"] is None


def test_rows_of_zeros_are_left_out_of_ratios_and_counted():
    sae, rows, _ = planted()
    with torch.no_grad():
        sae.b_dec.zero_()
    rows = rows - rows.mean(0)
    rows[:5] = 0
    out = dictionary_fidelity(sae, rows).outputs[0]
    kept, made = rows[5:].numpy(), sae(rows[5:]).detach().numpy()
    assert out.n_zero >= 5
    assert out.l2_ratio == pytest.approx(figures(kept, made)["l2_ratio"])


def test_the_interval_of_the_fvu_is_over_texts():
    sae, rows, _ = planted(noise=0.3)
    groups = np.repeat(np.arange(30), 20)
    out = dictionary_fidelity(sae, rows, groups=groups).outputs[0]
    y, y_hat = rows.numpy(), sae(rows).detach().numpy()
    error = ((y - y_hat) ** 2).sum(1).reshape(30, 20).sum(1)
    spread = ((y - y.mean(0)) ** 2).sum(1).reshape(30, 20).sum(1)
    np.testing.assert_allclose(out.by_group, np.stack([error, spread], 1))
    drawn = np.random.default_rng(0).integers(0, 30, size=(2000, 30))
    expected = np.percentile(error[drawn].sum(1) / spread[drawn].sum(1), [2.5, 97.5])
    assert out.fvu_interval == pytest.approx(tuple(expected))
    assert out.fvu_interval[0] < out.fvu < out.fvu_interval[1]
    assert dictionary_fidelity(sae, rows).outputs[0].fvu_interval is None


def test_a_transcoder_is_judged_by_what_it_shall_write():
    coder = Transcoder(6, 40, 4, {"name": "topk", "k": 3}, skip=True, random_state=0)
    with torch.no_grad():
        coder.W_skip.copy_(draw(6, 4, seed=2))
    rows, targets = draw(50, 6), draw(50, 4, seed=1)
    out = dictionary_fidelity(coder, rows, targets).outputs[0]
    expected = figures(targets.double().numpy(), coder(rows).detach().double().numpy())
    assert out.fvu == pytest.approx(expected["fvu"], rel=1e-6)
    with pytest.raises(ValueError, match="Transcoder writes other rows than it reads"):
        dictionary_fidelity(coder, rows)
    with pytest.raises(ValueError, match=r"answers rows \(1, 4\); the targets are \(1, 5\)"):
        dictionary_fidelity(coder, rows, draw(50, 5))


def test_a_crosscoder_is_judged_stream_by_stream():
    coder = Crosscoder(2, 5, 30, {"name": "topk", "k": 4}, random_state=0)
    rows = draw(60, 2, 5)
    rows[:, 1] *= 10
    found = dictionary_fidelity(coder, rows)
    made = coder(rows).detach().double().numpy()
    for i, out in enumerate(found.outputs):
        expected = figures(rows[:, i].double().numpy(), made[:, i])
        assert out.fvu == pytest.approx(expected["fvu"], rel=1e-6)
        assert out.cosine == pytest.approx(expected["cosine"], rel=1e-6)
    y = rows.double().numpy()
    whole = ((y - made) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert found.fvu == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("shape", [{"name": "topk", "k": 3}, {"name": "relu"}])
def test_a_cross_layer_transcoder_is_judged_layer_by_layer(shape):
    coder = CrossLayerTranscoder(3, 6, 20, 4, shape, skip=True, random_state=0)
    torch.nn.init.normal_(coder.W_skip, generator=torch.Generator().manual_seed(0))
    rows, targets = draw(40, 3, 6), draw(40, 3, 4, seed=1)
    found = dictionary_fidelity(coder, rows, targets)
    made = coder(rows).detach().double().numpy()
    fires = coder.encode(rows).detach().numpy() != 0
    assert len(found.codes) == len(found.outputs) == 3
    for i, (use, out) in enumerate(zip(found.codes, found.outputs, strict=True)):
        np.testing.assert_array_equal(use.n_fired, fires[:, i].sum(0))
        expected = figures(targets[:, i].double().numpy(), made[:, i])
        assert out.fvu == pytest.approx(expected["fvu"], rel=1e-6)
    assert found.l0 == pytest.approx(fires.sum((1, 2)).mean())


def test_a_stream_of_batches_gives_what_the_rows_give():
    sae, rows, _ = planted(noise=0.3)
    other = Transcoder(16, 24, 5, {"name": "topk", "k": 3}, random_state=0).double()
    targets = draw(600, 5).double()
    batches = (
        {"a": rows[i : i + 90], "b": (rows[i : i + 90], targets[i : i + 90])}
        for i in range(0, 600, 90)
    )
    found = dictionary_fidelities({"a": sae, "b": other}, batches, block=32)
    for name, whole in (
        ("a", dictionary_fidelity(sae, rows)),
        ("b", dictionary_fidelity(other, rows, targets)),
    ):
        got, expected = found[name].to_json(), whole.to_json()
        assert got["outputs"][0].pop("explained_by_row") is None
        expected["outputs"][0].pop("explained_by_row")
        assert got["codes"][0] == pytest.approx(expected["codes"][0])
        assert got["outputs"][0] == pytest.approx(expected["outputs"][0])
    with pytest.raises(ValueError, match=r"a batch has rows of \['a'\], none of 'b'"):
        dictionary_fidelities({"b": other}, [{"a": rows}])


def test_the_rule_of_evaluation_holds_and_the_dictionary_stays_as_it_was():
    rows = draw(64, 8)
    coder = SparseAutoencoder(8, 32, {"name": "batch_topk", "k": 4}, random_state=0)
    coder.train()
    coder(rows)
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    found = dictionary_fidelity(coder, rows, block=5)
    assert coder.training
    assert all(torch.equal(before[name], value) for name, value in coder.state_dict().items())
    coder.eval()
    assert found.l0 == pytest.approx((coder.encode(rows) != 0).sum(1).double().mean().item())


def test_what_cannot_be_judged_is_refused():
    sae, rows, _ = planted()
    with pytest.raises(ValueError, match="0 rows with 0 targets"):
        dictionary_fidelity(sae, rows[:0])
    with pytest.raises(ValueError, match="target rows of stream 0 are all alike"):
        dictionary_fidelity(sae, rows[:1].expand(4, -1))
    bad = rows.clone()
    bad[7, 2] = float("nan")
    with pytest.raises(ValueError, match=r"rows contains NaN.*the first is row 7"):
        dictionary_fidelity(sae, bad)
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        dictionary_fidelity(sae, rows, groups=[0, 1, 2])
    with pytest.raises(ValueError, match="q=2 must be between 0 and 1"):
        dictionary_fidelity(sae, rows).codes[0].l0_quantile(2)
