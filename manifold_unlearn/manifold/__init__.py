"""Geometry on arrays: neighbors, kernels, diffusion maps, geodesics, tangent charts, dimension."""

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.bandwidth import BandwidthCurve, bandwidth_curve
from manifold_unlearn.manifold.curvature import Curvature
from manifold_unlearn.manifold.diffusion import DiffusionMap
from manifold_unlearn.manifold.dimension import (
    DimensionEstimate,
    DimensionProfile,
    dimension_profile,
    estimate_dimension,
    intrinsic_dimension,
)
from manifold_unlearn.manifold.drift import DriftOperator, drift_operator
from manifold_unlearn.manifold.geodesic import GeodesicMap
from manifold_unlearn.manifold.grassmann import (
    align_frames,
    subspace_angles,
    subspace_distance,
    subspace_mean,
    subspace_path,
    transport,
)
from manifold_unlearn.manifold.metric import (
    EmbeddingMetric,
    metric_distances,
    pullback_metric,
    pushforward_metric,
    simplex_volumes,
)
from manifold_unlearn.manifold.neighbors import (
    ApproximateNeighbors,
    Neighbors,
    approximate_neighbors,
    nearest_neighbors,
)
from manifold_unlearn.manifold.spd import spd_distance, spd_mean
from manifold_unlearn.manifold.tangent import TangentBundle
from manifold_unlearn.manifold.validity import ManifoldReport, check_manifold

__all__ = [
    "ApproximateNeighbors",
    "BandwidthCurve",
    "Curvature",
    "DiffusionMap",
    "DimensionEstimate",
    "DimensionProfile",
    "DriftOperator",
    "EmbeddingMetric",
    "GeodesicMap",
    "ManifoldReport",
    "Neighbors",
    "TangentBundle",
    "align_frames",
    "approximate_neighbors",
    "bandwidth_curve",
    "check_manifold",
    "dimension_profile",
    "drift_operator",
    "estimate_dimension",
    "intrinsic_dimension",
    "metric_distances",
    "nearest_neighbors",
    "pullback_metric",
    "pushforward_metric",
    "samples",
    "simplex_volumes",
    "spd_distance",
    "spd_mean",
    "subspace_angles",
    "subspace_distance",
    "subspace_mean",
    "subspace_path",
    "transport",
]
