"""Erasure confined to the span of decoder rows: where it moves, what it removes, that it bakes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.constrained import DecoderSpanEraser
from manifold_unlearn.intervene.bake import bake
from manifold_unlearn.intervene.hooks import intervene

SPAN = [0, 1, 2, 3]


def data(n=3000, d=12):
    """Correlated rows whose classes differ along the first two latents and one beyond the span."""
    draw = np.random.default_rng(0)
    mix = draw.normal(size=(d, d))
    X = draw.normal(size=(n, d)) @ mix
    y = np.repeat([1, 0], n // 2)
    coder = SparseAutoencoder(d, 3 * d, {"name": "topk", "k": 3}, random_state=0)
    W = coder.W_dec.detach().numpy().astype(float)
    X[y == 1] += 6 * W[0] + 3 * W[1] + 4 * W[9]
    basis = np.linalg.qr(W[SPAN].T)[0]
    return coder, X, y, basis


@pytest.mark.parametrize("method", ["leace", "contrastive", "all"])
def test_every_move_lies_in_the_span_of_the_decoder_rows(method):
    coder, X, y, basis = data()
    eraser = DecoderSpanEraser(coder, method=method, rank=2, latents=SPAN).fit(X, y)
    moved = eraser.transform(X) - X
    outside = moved - moved @ basis @ basis.T
    assert abs(moved).max() > 0.5
    assert abs(outside).max() < 1e-9
    np.testing.assert_allclose(eraser.transform(X), X @ eraser.matrix_.T + eraser.bias_, atol=1e-9)


def test_leace_is_the_closed_form_in_the_coordinates_of_the_span():
    coder, X, y, basis = data()
    eraser = DecoderSpanEraser(coder, latents=SPAN, shrinkage=0.0).fit(X, y)
    z = X @ basis
    retain = z[y == 0]
    S = np.cov(retain.T, bias=True)
    difference = z[y == 1].mean(0) - retain.mean(0)
    # S A (A' S A)^-1 A' with A = S^-1 difference
    read = np.linalg.solve(S, difference)
    matrix = np.outer(difference, read) / (difference @ read)
    expected = X - ((z - retain.mean(0)) @ matrix.T) @ basis.T
    np.testing.assert_allclose(eraser.transform(X), expected, atol=1e-6)


def test_no_linear_probe_of_the_span_reads_the_classes_afterwards_and_before_it_did():
    coder, X, y, basis = data()
    eraser = DecoderSpanEraser(coder, latents=SPAN).fit(X, y)
    before, after = X @ basis, eraser.transform(X) @ basis
    probe = LogisticRegression(C=1e4)
    assert probe.fit(before, y).score(before, y) > 0.7
    gap = after[y == 1].mean(0) - after[y == 0].mean(0)
    assert abs(gap).max() < 1e-9
    assert probe.fit(after, y).score(after, y) < 0.55


def test_reading_all_of_the_span_leaves_the_retain_mean_there():
    coder, X, y, basis = data()
    eraser = DecoderSpanEraser(coder, method="all", latents=SPAN).fit(X, y)
    left = eraser.transform(X) @ basis
    np.testing.assert_allclose(left, np.tile((X[y == 0] @ basis).mean(0), (len(X), 1)), atol=1e-8)


def test_contrastive_reads_the_direction_of_largest_forget_moment():
    coder, X, y, basis = data()
    eraser = DecoderSpanEraser(coder, method="contrastive", latents=SPAN, shrinkage=0.0).fit(X, y)
    z = X @ basis - (X[y == 0] @ basis).mean(0)
    S, M = (z[y == k].T @ z[y == k] / (y == k).sum() for k in (0, 1))
    values, vectors = np.linalg.eig(np.linalg.solve(S, M))
    best = basis @ vectors[:, values.real.argmax()].real
    read = eraser.map_.read[:, 0].numpy()
    cosine = abs(best @ read) / np.linalg.norm(best) / np.linalg.norm(read)
    assert cosine == pytest.approx(1, abs=1e-6)


def test_a_dependent_decoder_row_does_not_disturb_the_span():
    coder, X, y, _ = data()
    with torch.no_grad():
        coder.decoder[5] = 2 * coder.decoder[0]
    once = DecoderSpanEraser(coder, latents=[0, 1]).fit(X, y)
    twice = DecoderSpanEraser(coder, latents=[0, 1, 5]).fit(X, y)
    np.testing.assert_allclose(once.transform(X), twice.transform(X), atol=1e-6)


def test_baked_it_is_what_the_hook_does(llama):
    width = llama.config.hidden_size
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(200, width, generator=draw)
    y = torch.arange(200) < 100
    X[y] += 1.0
    coder = SparseAutoencoder(width, 2 * width, {"name": "relu"}, random_state=0)
    eraser = DecoderSpanEraser(coder, latents=[0, 1, 2]).fit(X, y.long())
    linear = {"layers.1.mlp": eraser.linear()}
    ids = torch.tensor([[1, 9, 8, 7]])
    with torch.no_grad():
        with intervene(llama, linear):
            hooked = llama(ids).logits
        torch.testing.assert_close(bake(llama, linear)(ids).logits, hooked, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(llama(ids).logits, hooked)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    coder, X, y, _ = data()
    eraser = DecoderSpanEraser(coder, method="contrastive", rank=2, latents=SPAN).fit(X, y)
    eraser.save(tmp_path / "span")
    loaded = DecoderSpanEraser.load(tmp_path / "span")
    assert np.array_equal(loaded.transform(X), eraser.transform(X))
    assert loaded.latents_.tolist() == SPAN


def test_bad_input_is_refused():
    coder, X, y, _ = data()
    with pytest.raises(ValueError, match="rank=5 is above the dimension 4"):
        DecoderSpanEraser(coder, method="contrastive", rank=5, latents=SPAN).fit(X, y)
    with pytest.raises(ValueError, match="method='pca'"):
        DecoderSpanEraser(coder, method="pca", latents=SPAN).fit(X, y)
    with pytest.raises(ValueError, match="rank=0"):
        DecoderSpanEraser(coder, rank=0, latents=SPAN).fit(X, y)
    with pytest.raises(ValueError, match="shrinkage=2"):
        DecoderSpanEraser(coder, shrinkage=2, latents=SPAN).fit(X, y)
    with pytest.raises(ValueError, match="latent 99 is not among"):
        DecoderSpanEraser(coder, latents=[99]).fit(X, y)
    with pytest.raises(ValueError, match="do not vary in the span"):
        DecoderSpanEraser(coder, latents=SPAN).fit(np.where(y[:, None] == 1, X, 1.0), y)
    with pytest.raises(ValueError, match="means are equal within the span"):
        DecoderSpanEraser(coder, latents=SPAN).fit(np.concatenate([X, X]), np.repeat([1, 0], 3000))
    silent = SparseAutoencoder(12, 36, random_state=0)
    with torch.no_grad():
        silent.decoder[:4] = 0
    with pytest.raises(ValueError, match="they span nothing"):
        DecoderSpanEraser(silent, latents=SPAN).fit(X, y)
