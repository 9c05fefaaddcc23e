"""Latents chosen by how often they fire on either side, and clamped."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.feature_eraser import FeatureEraser
from manifold_unlearn.dictionary.selection import firing_rates
from manifold_unlearn.intervene.edit import Edit


def planted(n=400, d=16, rates=((0.6, 0.0), (0.3, 0.0), (0.9, 0.2), (0.02, 0.0))):
    """Orthonormal dictionary, its codes, labels: latents that fire at given rates, the rest at .3.

    ``rates``: (on forget, on retain) of the first latents.
    """
    draw = np.random.default_rng(0)
    directions = np.linalg.qr(draw.normal(size=(d, d)))[0]
    y = np.repeat([1, 0], n // 2)
    rate = np.full((n, d), 0.3)
    for latent, (forget, retain) in enumerate(rates):
        rate[:, latent] = np.where(y == 1, forget, retain)
    code = (draw.random((n, d)) < rate) * draw.uniform(0.5, 1.5, (n, d))
    coder = SparseAutoencoder(d, d, {"name": "relu"}, centered=False)
    with torch.no_grad():
        coder.b_enc.fill_(-1e-4)  # what rounding leaves does not fire
        for weight in (coder.encoder, coder.decoder):
            weight.copy_(torch.tensor(directions.T))
    return coder, (code @ directions.T).astype(np.float32), y, code, directions


def test_rates_are_those_of_the_planted_code():
    coder, X, y, code, _ = planted()
    rates = firing_rates(coder, torch.tensor(X), torch.tensor(y == 1), block=37)
    on = code > 0
    np.testing.assert_allclose(rates.forget, on[y == 1].mean(0))
    np.testing.assert_allclose(rates.retain, on[y == 0].mean(0))
    mean = [code[y == 1, j][on[y == 1, j]].mean() for j in range(16)]
    np.testing.assert_allclose(rates.activation, mean, atol=2e-4)


def test_it_chooses_the_planted_latents_in_the_order_of_their_ratio():
    coder, X, y, code, _ = planted()
    eraser = FeatureEraser(coder).fit(X, y)
    assert eraser.latents_.tolist() == [0, 1]  # the third fires on retain, the fourth too seldom
    rate = (code[y == 1, 0] > 0).mean()
    np.testing.assert_allclose(eraser.forget_rate_[0], rate, rtol=1e-6)
    np.testing.assert_allclose(eraser.ratio_[0], rate / (0 + 1 / 200), rtol=1e-6)
    assert FeatureEraser(coder, 1).fit(X, y).latents_.tolist() == [0]
    wide = FeatureEraser(coder, max_retain_rate=0.25).fit(X, y)
    assert {0, 1, 2} <= set(wide.latents_.tolist())


def test_after_it_the_planted_latents_are_gone_and_other_rows_as_they_were():
    coder, X, y, code, directions = planted()
    eraser = FeatureEraser(coder).fit(X, y)
    erased = eraser.transform(X)
    gone = code.copy()
    gone[:, :2] = 0
    np.testing.assert_allclose(erased @ directions, gone, atol=2e-3)
    fires = (code[:, :2] > 0).any(1)
    assert fires.any()
    assert np.array_equal(erased[~fires], X[~fires])
    assert np.array_equal(eraser.gate(X), fires.astype(X.dtype))


def test_a_negative_value_is_in_units_of_the_mean_activation():
    coder, X, y, code, directions = planted()
    erased = FeatureEraser(coder, 1, value=-2.0).fit(X, y).transform(X) @ directions
    on = code[:, 0] > 0
    mean = code[(y == 1) & on, 0].mean()
    np.testing.assert_allclose(erased[on, 0], -2 * mean, atol=2e-3)
    np.testing.assert_allclose(erased[~on, 0], 0, atol=1e-4)


def test_torch_in_torch_out_in_the_dtype_given():
    coder, X, y, _, _ = planted()
    eraser = FeatureEraser(coder).fit(torch.tensor(X), torch.tensor(y))
    assert isinstance(eraser.latents_, torch.Tensor)
    half = torch.tensor(X).bfloat16()
    assert eraser.transform(half).dtype == torch.bfloat16


def test_it_is_an_estimator_that_clones_and_leaves_the_dictionary_alone():
    coder, X, y, _, _ = planted()
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    coder.train()
    eraser = FeatureEraser(coder, 3, value=-1.0)
    assert clone(eraser).get_params(deep=False)["n_latents"] == 3
    with pytest.raises(NotFittedError):
        eraser.transform(X)
    eraser.fit(X, y).transform(X)
    assert coder.training
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    coder, X, y, _, _ = planted()
    eraser = FeatureEraser(coder, 2, value=-1.0).fit(X, y)
    Edit({"layers.0": eraser}).save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")["layers.0"]
    assert np.array_equal(loaded.transform(X), eraser.transform(X))
    assert np.array_equal(loaded.ratio_, eraser.ratio_)
    assert loaded.get_params(deep=False)["value"] == -1.0


def test_where_no_latent_passes_it_says_how_near_the_nearest_came():
    coder, X, y, code, _ = planted(rates=((0.6, 0.5), (0.1, 0.0)))
    best = (code[y == 1, 1] > 0).mean()
    with pytest.raises(ValueError, match=f"the best fires in {best:.4f} of the forget rows"):
        FeatureEraser(coder, min_forget_rate=0.5, max_retain_rate=0.01).fit(X, y)
    with pytest.raises(ValueError, match="none fires so often"):
        FeatureEraser(coder, min_forget_rate=0.99, max_retain_rate=0.01).fit(X, y)


def test_bad_input_is_refused():
    coder, X, y, _, _ = planted()
    with pytest.raises(ValueError, match="the forget set is empty"):
        FeatureEraser(coder).fit(X, np.zeros_like(y))
    with pytest.raises(ValueError, match="the dictionary reads 16"):
        FeatureEraser(coder).fit(X[:, :5], y)
    with pytest.raises(ValueError, match="n_latents=0"):
        FeatureEraser(coder, 0).fit(X, y)
    with pytest.raises(ValueError, match="min_forget_rate=0 "):
        FeatureEraser(coder, min_forget_rate=0).fit(X, y)
    with pytest.raises(ValueError, match="max_retain_rate=2 "):
        FeatureEraser(coder, max_retain_rate=2).fit(X, y)
    with pytest.raises(ValueError, match="not a SparseAutoencoder"):
        FeatureEraser(None).fit(X, y)
    broken = X.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="the first is row 3"):
        FeatureEraser(coder).fit(broken, y)
