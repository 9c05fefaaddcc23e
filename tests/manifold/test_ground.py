import numpy as np
import pytest
import torch

from manifold_unlearn.manifold import DiffusionMap, samples
from manifold_unlearn.manifold.ground import fit_metric


def cloud(n_samples=300, n_features=6, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n_features, n_features))
    return torch.from_numpy(rng.standard_normal((n_samples, n_features)) @ mixing + 3)


def test_cosine_and_rms_are_the_angle():
    X = cloud()
    unit = X / X.norm(dim=1, keepdim=True)
    angles = 2 - 2 * unit @ unit.T
    for name, factor in (("cosine", 1), ("rms", 6)):
        rows = fit_metric(name, X).apply(X)
        squared = torch.cdist(rows, rows).square()
        torch.testing.assert_close(squared, factor * angles, atol=1e-6, rtol=1e-6)
    assert torch.allclose(fit_metric("rms", X).apply(X).square().mean(1), torch.ones(300).double())


def test_whitened_rows_have_covariance_one():
    X = cloud(5000)
    rows = fit_metric("mahalanobis", X).apply(X)
    torch.testing.assert_close(torch.cov(rows.T), torch.eye(6).double(), atol=0.04, rtol=0)


def test_whitening_follows_the_reference():
    reference = cloud(4000)
    X = reference[:50] * torch.linspace(1, 5, 6)
    rows = fit_metric("mahalanobis", X, reference).apply(reference)
    torch.testing.assert_close(torch.cov(rows.T), torch.eye(6).double(), atol=0.04, rtol=0)


def test_fewer_rows_than_features_are_whitened_finitely():
    rows = fit_metric("mahalanobis", cloud(10, 40)).apply(cloud(10, 40))
    assert torch.isfinite(rows).all()


def test_metrics_that_cannot_be_fitted_are_named():
    X = cloud()
    with pytest.raises(ValueError, match="metric='manhattan' is not known"):
        fit_metric("manhattan", X)
    with pytest.raises(ValueError, match="all 5 are equal"):
        fit_metric("mahalanobis", torch.ones(5, 3))
    with pytest.raises(ValueError, match="reference has no part in metric='cosine'"):
        fit_metric("cosine", X, X)
    with pytest.raises(ValueError, match="reference has 2 features, X has 6"):
        fit_metric("mahalanobis", X, X[:, :2])
    with pytest.raises(ValueError, match="row 2 is 0"):
        fit_metric("rms", X).apply(torch.cat([X[:2], 0 * X[:1]]))


def explained(embedding, functions):
    design = np.c_[np.ones(len(embedding)), embedding]
    rest = functions - design @ np.linalg.lstsq(design, functions, rcond=None)[0]
    return 1 - (rest**2).sum() / ((functions - functions.mean(0)) ** 2).sum()


SAMPLE = samples.circle(800, n_features=8, random_state=0)
LENGTHS = np.exp(np.random.default_rng(0).standard_normal((800, 1)))


@pytest.mark.parametrize("metric", ["cosine", "rms"])
def test_directions_carry_the_circle_whatever_the_lengths(metric):
    X = SAMPLE.points * LENGTHS
    with pytest.warns(UserWarning, match="falls into"):
        plain = DiffusionMap(2).fit(X)
    fitted = DiffusionMap(2, metric=metric).fit(X)
    assert explained(fitted.embedding_, SAMPLE.eigenfunctions[:, :2]) > 0.99
    assert explained(plain.embedding_, SAMPLE.eigenfunctions[:, :2]) < 0.9
    np.testing.assert_allclose(fitted.transform(X), fitted.embedding_, atol=1e-6)
    np.testing.assert_allclose(fitted.transform(5 * X), fitted.embedding_, atol=1e-6)


def test_whitening_undoes_a_linear_map(tmp_path):
    rng = np.random.default_rng(1)
    mixing = np.diag(np.logspace(0, 3, 8)) @ rng.standard_normal((8, 8))
    wide = SAMPLE.points + 0.01 * rng.standard_normal((800, 8))
    plain = DiffusionMap(2, metric="mahalanobis").fit(wide)
    mixed = DiffusionMap(2, metric="mahalanobis").fit(wide @ mixing)
    assert explained(plain.embedding_, mixed.embedding_) > 0.97
    mixed.save(tmp_path / "map")
    loaded = DiffusionMap.load(tmp_path / "map")
    assert (loaded.transform(wide @ mixing) == mixed.transform(wide @ mixing)).all()


def test_retain_rows_set_the_whitening():
    reference = np.random.default_rng(0).standard_normal((500, 8)) * np.logspace(0, 2, 8)
    whitened = DiffusionMap(2, metric="mahalanobis").fit(SAMPLE.points, reference=reference)
    scaled = DiffusionMap(2).fit(SAMPLE.points / reference.std(0))
    assert explained(whitened.embedding_, scaled.embedding_) > 0.95
