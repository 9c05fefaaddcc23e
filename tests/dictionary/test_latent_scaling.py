"""Presence of latents in streams: planted truth, least squares latent by latent, artifacts."""

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import Crosscoder
from manifold_unlearn.dictionary.latent_scaling import measure_latent_scaling

D, LATENTS, STREAMS = 10, 10, 3


def crosscoder_of(decoder, encoder, threshold=0.0):
    """ReLU crosscoder of given weights, (n_latents, n_streams, d) each."""
    n, s, d = decoder.shape
    made = Crosscoder(s, d, n, {"name": "relu"}).eval()
    with torch.no_grad():
        made.decoder.copy_(torch.tensor(decoder).reshape(n, -1))
        made.encoder.copy_(torch.tensor(encoder).reshape(n, -1))
        made.b_enc.fill_(-threshold)
        made.b_dec.copy_(torch.linspace(-1, 1, s * d))
        made.b_enc.sub_(made.encoder @ made.b_dec)  # what is read is the row without the bias
    return made


def planted(strengths, n=500):
    """Rows of orthonormal latents, each at a strength of its own in each stream."""
    draw = np.random.default_rng(0)
    directions = np.linalg.qr(draw.normal(size=(D, D)))[0]
    code = (draw.random((n, LATENTS)) < 0.3) * draw.uniform(0.5, 1.5, (n, LATENTS))
    decoder = strengths[:, :, None] * directions[:, None]
    rows = np.einsum("nl,lsd->nsd", code, decoder)
    encoder = decoder / (strengths**2).sum(1)[:, None, None]
    made = crosscoder_of(decoder, encoder, 1e-3)
    rows += made.b_dec.detach().numpy().reshape(STREAMS, D)
    return made, torch.tensor(rows, dtype=torch.float32), code


def strengths():
    """Shared by all; in the first alone; in the first two; at half length in the third; ..."""
    found = np.ones((LATENTS, STREAMS))
    found[0] = (1, 0, 0)
    found[1] = (1, 1, 0)
    found[2] = (1, 1, 0.5)
    found[3] = (0, 0.1, 1)
    return found


def test_the_ratios_are_the_planted_strengths():
    made, rows, code = planted(strengths())
    found = measure_latent_scaling(made, rows.split(90))
    target = strengths().argmax(1)
    assert found.target[:4].tolist() == target[:4].tolist() == [0, 0, 0, 2]
    expected = strengths() / strengths().max(1, keepdims=True)
    np.testing.assert_allclose(found.nu_error, expected, atol=2e-2)
    np.testing.assert_allclose(found.nu_reconstruction, expected, atol=2e-2)
    np.testing.assert_allclose(found.relative_norm, expected, atol=1e-6)
    np.testing.assert_allclose(found.fires, (code > 0).mean(0), atol=1e-12)
    assert found.exclusive().nonzero()[:, 0].tolist() == [0, 3]
    assert found.absent()[:5].tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
        [True, True, False],
        [False, False, False],
    ]


def test_delta_norm_is_its_formula():
    made, rows, _ = planted(strengths())
    found = measure_latent_scaling(made, [rows])
    a, b = strengths()[:, 0], strengths()[:, 2]
    expected = 0.5 * ((b - a) / np.maximum(a, b) + 1)
    np.testing.assert_allclose(found.delta_norm(0, 2), expected, atol=1e-6)


def test_coefficients_are_those_of_least_squares_latent_by_latent():
    draw = np.random.default_rng(1)
    decoder, encoder = draw.normal(size=(2, 16, 2, 6))
    made = crosscoder_of(decoder, encoder, 0.5)
    rows = torch.tensor(draw.normal(size=(200, 2, 6)), dtype=torch.float32)
    found = measure_latent_scaling(made, rows.split(64), target=1)
    with torch.no_grad():
        f = made.encode(rows).double().numpy()
        made_of = made(rows).double().numpy()
    bias = made.b_dec.detach().double().numpy().reshape(2, 6)
    W = made.W_dec.detach().double().numpy()
    for j in range(16):
        design = np.einsum("n,d->nd", f[:, j], W[j, 1]).ravel()
        for s in range(2):
            own = np.einsum("n,d->nd", f[:, j], W[j, s])
            error = rows[:, s].double().numpy() - made_of[:, s] + own
            written = made_of[:, s] - bias[s]
            for y, beta in ((error, found.error), (written, found.reconstruction)):
                best = np.linalg.lstsq(design[:, None], y.ravel(), rcond=None)[0][0]
                assert float(beta[j, s]) == pytest.approx(best, rel=1e-4, abs=1e-5)
    ratio = found.error[:, 0] / found.error[:, 1]
    torch.testing.assert_close(found.nu_error[:, 0], ratio)


def test_complete_shrinkage_is_flagged_and_not_called_exclusive():
    made, rows, _ = planted(strengths())
    with torch.no_grad():  # the crosscoder denies the second stream a latent that it has
        made.W_dec[5, 1] = 0
    found = measure_latent_scaling(made, [rows])
    assert float(found.nu_error[5, 1]) == pytest.approx(1, abs=0.02)
    assert found.shrunk().nonzero().tolist() == [[5, 1]]
    assert not bool(found.absent()[5, 1])


def test_latent_decoupling_is_flagged_and_not_called_exclusive():
    """Two latents of one feature: what each does for one stream, the other does for the rest."""
    base = strengths()
    made, rows, _ = planted(base)
    with torch.no_grad():
        for weight in (made.encoder, made.decoder):
            weight[6] = weight[7]
        made.b_enc[6] = made.b_enc[7]
        made.W_dec[6, 1] = 0  # the one writes to the first and third, the other to the second
        made.W_dec[7, [0, 2]] = 0
    found = measure_latent_scaling(made, [rows])
    assert found.decoupled().nonzero().tolist() == [[6, 1], [7, 0], [7, 2]]
    assert found.shrunk().nonzero().tolist() == []
    assert not found.exclusive()[[6, 7]].any()
    assert float(found.nu_error[6, 1]) == pytest.approx(0, abs=0.02)


def test_a_silent_latent_is_nowhere_and_exclusive_to_none():
    made, rows, _ = planted(strengths())
    with torch.no_grad():
        made.b_enc[0] = -100
    found = measure_latent_scaling(made, [rows])
    assert float(found.fires[0]) == 0
    assert found.error[0].tolist() == [0, 0, 0]
    assert not found.absent()[0].any()
    assert not found.exclusive()[0]


def test_batchtopk_counts_by_its_threshold_whatever_the_batches():
    made = Crosscoder(2, 6, 24, {"name": "batch_topk", "k": 3}, random_state=0)
    rows = torch.randn(60, 2, 6, generator=torch.Generator().manual_seed(0))
    made(rows)  # learns a threshold
    made.train()
    whole, parts = measure_latent_scaling(made, [rows]), measure_latent_scaling(made, rows.split(7))
    torch.testing.assert_close(whole.error, parts.error)
    assert made.training


def test_bad_input_is_refused():
    made, rows, _ = planted(strengths())
    with pytest.raises(ValueError, match="target=3 is no stream"):
        measure_latent_scaling(made, [rows], target=3)
    with pytest.raises(ValueError, match="no rows"):
        measure_latent_scaling(made, [])
    with pytest.raises(ValueError, match="rows have shape"):
        measure_latent_scaling(made, [rows[:, :2]])
    broken = rows.clone()
    broken[4] = float("nan")
    with pytest.raises(ValueError, match="the first is row 4"):
        measure_latent_scaling(made, [broken])
