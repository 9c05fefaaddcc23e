import numpy as np
import pytest
import torch
from scipy.spatial.distance import directed_hausdorff

from manifold_unlearn.comparison.hausdorff import hausdorff_distance

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((300, 6)), RNG.standard_normal((200, 6))


def ring(radius, n_points=4000):
    angle = np.linspace(0, 2 * np.pi, n_points, endpoint=False)
    return radius * np.c_[np.cos(angle), np.sin(angle)]


def test_shifted_grid_is_as_far_as_the_shift():
    grid = np.stack(np.meshgrid(np.arange(30.0), np.arange(30.0)), -1).reshape(-1, 2)
    assert hausdorff_distance(grid, grid + [0.0, 0.25]) == pytest.approx(0.25, abs=1e-12)
    assert hausdorff_distance(grid, grid) == 0


def test_concentric_circles_are_as_far_as_their_radii():
    assert hausdorff_distance(ring(1), ring(1.75)) == pytest.approx(0.75, abs=1e-12)


def test_it_is_directed_where_asked():
    assert hausdorff_distance(A[:50], A, directed=True) == 0
    assert hausdorff_distance(A, A[:50], directed=True) > 1
    assert hausdorff_distance(A[:50], A) == hausdorff_distance(A, A[:50], directed=True)


def test_it_is_that_of_scipy():
    expected = max(directed_hausdorff(A, B)[0], directed_hausdorff(B, A)[0])
    assert hausdorff_distance(A, B) == pytest.approx(expected, rel=1e-12)


def test_the_quantile_does_not_follow_outliers():
    far = np.r_[A, np.full((3, 6), 1e6)]
    assert hausdorff_distance(A, far) > 1e6
    assert hausdorff_distance(A, far, quantile=0.99) == 0
    nearest = np.sqrt(((A[:, None] - B) ** 2).sum(-1))
    expected = max(
        np.sort(nearest.min(1))[int(np.ceil(0.9 * 300)) - 1],
        np.sort(nearest.min(0))[int(np.ceil(0.9 * 200)) - 1],
    )
    assert hausdorff_distance(A, B, quantile=0.9) == pytest.approx(expected)


def test_a_metric_up_to_motions():
    C = RNG.standard_normal((150, 6))
    rotation, _ = np.linalg.qr(RNG.standard_normal((6, 6)))
    ab, bc, ac = (hausdorff_distance(*pair) for pair in ((A, B), (B, C), (A, C)))
    assert ac <= ab + bc
    assert hausdorff_distance(B, A) == ab
    moved = hausdorff_distance(3 * A @ rotation + 1, 3 * B @ rotation + 1)
    assert moved == pytest.approx(3 * ab, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_of_any_float_dtype(dtype):
    found = hausdorff_distance(torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype))
    assert found == pytest.approx(hausdorff_distance(A, B), rel=2e-2)


def test_one_row_a_side_is_a_distance():
    assert hausdorff_distance(np.zeros((1, 2)), np.array([[3.0, 4.0]])) == pytest.approx(5)


@pytest.mark.parametrize(
    ("X", "Y", "options", "message"),
    [
        (A, B[:, :2], {}, "A has 6 features, B has 2"),
        (A, B[:0], {}, "0 sample"),
        (A, B, {"quantile": 0.0}, "quantile=0.0 must lie in"),
        (A, B, {"quantile": 1.5}, "quantile=1.5 must lie in"),
        (np.where(np.eye(300, 6) > 0, np.inf, A), B, {}, "A contains NaN or infinity"),
    ],
)
def test_impossible_requests_are_refused(X, Y, options, message):
    with pytest.raises(ValueError, match=message):
        hausdorff_distance(X, Y, **options)
