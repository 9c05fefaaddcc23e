import numpy as np
import pytest
import torch

from manifold_unlearn.manifold import DiffusionMap, samples
from manifold_unlearn.manifold.drift import drift_operator


@pytest.mark.parametrize("density_amplitude", [0.0, 0.6])
@pytest.mark.parametrize("speed", [0.0, 3.0])
def test_a_circle_that_turns_has_the_complex_spectrum(density_amplitude, speed):
    sample = samples.circle(1500, n_features=6, density_amplitude=density_amplitude, random_state=0)
    angle = sample.intrinsic_coordinates[:, 0]
    tangent = np.stack([-np.sin(angle), np.cos(angle)], 1) @ sample.isometry
    rates, vectors = drift_operator(sample.points, speed * tangent).eigenpairs(5)
    exact = np.array([0, -1 + 1j * speed, -1 - 1j * speed, -4 + 2j * speed, -4 - 2j * speed])
    np.testing.assert_allclose(rates, exact, rtol=0.05, atol=1e-9)
    if speed:
        wave = np.exp(1j * angle)
        overlap = abs(np.vdot(wave, vectors[:, 1])) / np.linalg.norm(vectors[:, 1])
        assert overlap / np.sqrt(1500) > 0.99


def test_drift_to_the_middle_is_the_ornstein_uhlenbeck_process():
    line = np.linspace(-4, 4, 800)[:, None] @ np.eye(1, 3)
    operator = drift_operator(line, -line)
    rates, _ = operator.eigenpairs(4)
    np.testing.assert_allclose(rates.real, [0, -1, -2, -3], rtol=0.05, atol=1e-9)
    np.testing.assert_allclose(np.asarray(operator.generator.sum(1)), 0, atol=1e-6)


def test_the_target_measure_gives_the_same_process_with_real_coordinates():
    line = np.linspace(-4, 4, 800)[:, None] @ np.eye(1, 3)
    target = np.exp(-(line[:, 0] ** 2) / 2)
    fitted = DiffusionMap(3).fit(line, target=target)
    np.testing.assert_allclose(fitted.generator_eigenvalues_, [1, 2, 3], rtol=0.06)
    hermite = np.stack([line[:, 0], line[:, 0] ** 2 - 1], 1)
    inner = abs(line[:, 0]) < 2.5
    for component in (0, 1):
        found, exact = fitted.embedding_[inner, component], hermite[inner, component]
        assert abs(np.corrcoef(found, exact)[0, 1]) > 0.99
    np.testing.assert_allclose(fitted.transform(line), fitted.embedding_, atol=1e-6)
    plain = DiffusionMap(3).fit(line)
    assert plain.generator_eigenvalues_[0] < 0.3


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (np.ones(5), {}, r"target has shape \(5,\); expected \(200,\)"),
        (np.zeros(200), {}, "target must be positive and finite"),
        (np.full(200, np.nan), {}, "target must be positive and finite"),
        (np.ones(200), {"alpha": 0.5}, "target needs alpha=1"),
    ],
)
def test_targets_that_do_not_fit_are_named(target, options, message):
    X = samples.circle(200, random_state=0).points
    with pytest.raises(ValueError, match=message):
        DiffusionMap(2, **options).fit(X, target=target)


def test_drifts_that_do_not_fit_are_named():
    X = samples.circle(200, random_state=0).points
    with pytest.raises(ValueError, match=r"drift has shape \(200, 1\), X has \(200, 2\)"):
        drift_operator(X, X[:, :1])
    with pytest.raises(ValueError, match="takes 200 rows beyond the kernel's reach"):
        drift_operator(X, 1e9 * np.ones_like(X))
    with pytest.raises(ValueError, match="bandwidth=-1 must be positive"):
        drift_operator(X, X, bandwidth=-1)
    with pytest.raises(ValueError, match="all 9 samples are equal"):
        drift_operator(torch.ones(9, 2), torch.ones(9, 2))
