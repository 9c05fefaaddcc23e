import numpy as np
import pytest
import torch

from manifold_unlearn.manifold.geodesic import GeodesicMap
from manifold_unlearn.steer.between import path_between
from manifold_unlearn.steer.path_geodesic import geodesic_path
from manifold_unlearn.steer.preimage import KernelPreimage
from manifold_unlearn.steer.spline import CentroidSpline

KINDS = ("chord", "spline", "diffusion", "geodesic", "tangent", "preimage")
STRAIGHT = ("chord", "preimage")
"""Kernel components by default are many: the line in them is the chord but for little."""


pytestmark = pytest.mark.filterwarnings("ignore:n_components=8 is more than")


@pytest.fixture(scope="module")
def half_circle():
    """Rows on half a unit circle in 5 dimensions, labeled by eighths of it."""
    draw = np.random.default_rng(0)
    angle = np.sort(draw.uniform(0, np.pi, 800))
    X = np.zeros((800, 5))
    X[:, 0], X[:, 1] = np.cos(angle), np.sin(angle)
    return X, np.minimum(angle // (np.pi / 8), 7).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_but_the_chord_stays_on_the_circle(kind, half_circle):
    X, labels = half_circle
    path = path_between(X, labels, 0, 7, 21, kind=kind)
    radius = torch.as_tensor(path.points)[:, :2].norm(dim=1)
    ends = torch.tensor([0.5, 7.5]) * np.pi / 8
    angle = torch.atan2(path.points[[0, -1], 1], path.points[[0, -1], 0])
    assert torch.allclose(angle.double(), ends.double(), atol=0.02)
    assert len(path.points) == 21
    assert (radius.min() < 0.3) == (kind in STRAIGHT)
    if kind not in STRAIGHT:
        assert radius.min() > 0.97 and radius.max() < 1.03


def test_it_is_what_the_named_functions_make(half_circle):
    X, labels = half_circle
    order = list(range(8))
    spline = CentroidSpline(order=order).fit(X, labels)
    made = path_between(X, labels, 1, 5, 9, order=order)
    assert torch.equal(made.points, spline.path(1, 5, 9).points)
    straight = path_between(X, labels, 1, 5, 9, kind="chord", order=order)
    assert torch.equal(straight.points, spline.path(1, 5, 9).chord().points)
    rows = torch.as_tensor(X)
    along = geodesic_path(GeodesicMap(1).fit(X), rows[labels == 1], rows[labels == 5], 9)
    assert torch.equal(path_between(X, labels, 1, 5, 9, kind="geodesic").points, along.points)
    bowed = KernelPreimage().fit(X).path(X[labels == 1], X[labels == 5], 9)
    assert torch.equal(path_between(X, labels, 1, 5, 9, kind="preimage").points, bowed.points)


def test_a_circle_of_labels_is_gone_around_the_shorter_way():
    angle = np.arange(700) % 7 * 2 * np.pi / 7
    X = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    path = path_between(X, np.arange(700) % 7, 0, 6, 20, periodic=True)
    assert path.points[:, 0].min() > 0.6
    assert torch.allclose(
        path.points.norm(dim=1), torch.ones(20, dtype=path.points.dtype), atol=0.02
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "arc"}, "kind='arc' is not one of chord, spline, diffusion, geodesic, tangent"),
        ({"kind": "geodesic", "periodic": True}, "periodic and order are for splines"),
        ({"kind": "tangent", "order": [0, 1]}, "periodic and order are for splines"),
        ({"kind": "geodesic", "end": 9}, "no row is labeled 9"),
        ({"kind": "geodesic", "labels": [1, 2]}, r"labels has shape \(2,\)"),
        ({"kind": "preimage", "periodic": True}, "periodic and order are for splines"),
        ({"kind": "preimage", "end": 0}, "start and end are the same label, 0"),
        ({"end": 9}, "label 9 was not fitted"),
        ({"end": 0}, "start and end are the same label, 0"),
    ],
)
def test_what_cannot_be_joined_is_named(options, message, half_circle):
    X, labels = half_circle
    given = {"labels": labels, "start": 0, "end": 7} | options
    with pytest.raises(ValueError, match=message):
        path_between(X, **given)
