"""Two point clouds: how far their manifolds differ, and maps from one onto the other."""

from manifold_unlearn.comparison.align import align_manifolds
from manifold_unlearn.comparison.alignment import ManifoldAlignment
from manifold_unlearn.comparison.compare import ManifoldComparison, compare_manifolds
from manifold_unlearn.comparison.hausdorff import hausdorff_distance
from manifold_unlearn.comparison.mmd import mmd
from manifold_unlearn.comparison.similarity import (
    cka,
    mutual_knn,
    procrustes_distance,
    representational_similarity,
)
from manifold_unlearn.comparison.subspaces import grassmann_distance, principal_angles
from manifold_unlearn.comparison.transport import gromov_wasserstein, sinkhorn

__all__ = [
    "ManifoldAlignment",
    "ManifoldComparison",
    "align_manifolds",
    "cka",
    "compare_manifolds",
    "grassmann_distance",
    "gromov_wasserstein",
    "hausdorff_distance",
    "mmd",
    "mutual_knn",
    "principal_angles",
    "procrustes_distance",
    "representational_similarity",
    "sinkhorn",
]
