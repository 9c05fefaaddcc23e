"""Curvature of a manifold from its second fundamental form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from manifold_unlearn.manifold.charts import Charts


class Curvature(NamedTuple):
    """Extrinsic and intrinsic curvature of a k-manifold at some points.

    The variance that sampling adds to the squares is taken off.

    Attributes
    ----------
    principal : array or Tensor of shape (n_samples, k)
        Unsigned principal curvatures, descending, in inverse units of the data: square roots of
        the eigenvalues of ``sum_c <II_ac, II_bc>``. On a hypersurface the absolute values of the
        classical ones.
    directions : array or Tensor of shape (n_samples, n_features, k)
        Their unit tangent vectors.
    mean : array or Tensor of shape (n_samples, n_features)
        Mean curvature vector, trace of the second fundamental form over k.
    scalar : array or Tensor of shape (n_samples,)
        Scalar curvature ``|trace II|**2 - |II|**2`` (Gauss equation), inverse squared units.
    gauss : array or Tensor of shape (n_samples,)
        Mean sectional curvature, ``scalar / (k * (k - 1))``: on a surface the Gauss curvature.
        0 on curves.
    """

    principal: Any
    directions: Any
    mean: Any
    scalar: Any
    gauss: Any


def curvature_of(charts: Charts) -> Curvature:
    """Curvature at the feet of charts of order 2, as tensors."""
    second, spread = charts.second, charts.spread
    k = second.shape[1]
    third = torch.einsum("nacd,nbcd->nab", second, second)
    third -= torch.einsum("nacbc->nab", spread)
    values, vectors = torch.linalg.eigh(third)
    trace = torch.einsum("naad->nd", second)
    squared_trace = trace.square().sum(1) - torch.einsum("naabb->n", spread)
    scalar = squared_trace - third.diagonal(dim1=1, dim2=2).sum(1)
    if k == 1:
        scalar = torch.zeros_like(scalar)
    return Curvature(
        principal=values.clamp_min(0).sqrt().flip(1),
        directions=charts.bases @ vectors.flip(2),
        mean=trace / k,
        scalar=scalar,
        gauss=scalar / max(1, k * (k - 1)),
    )
