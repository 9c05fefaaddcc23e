"""Moves through the latent space: directions, rotations, and paths along the manifold."""

from manifold_unlearn.steer.affine import AffineSteering, LowRankSteering
from manifold_unlearn.steer.along import PathSteering
from manifold_unlearn.steer.behavior import BehaviorCurve, BehaviorManifold
from manifold_unlearn.steer.between import path_between
from manifold_unlearn.steer.conditional import ConditionalVector
from manifold_unlearn.steer.contrast import fit_vectors
from manifold_unlearn.steer.distribution_distances import (
    bhattacharyya,
    bhattacharyya_angle,
    hellinger,
)
from manifold_unlearn.steer.energy import PathComparison, PathEnergy, compare_paths, path_energy
from manifold_unlearn.steer.formats import (
    from_layer_activations,
    read_control_vector,
    read_steering_vectors,
    to_layer_activations,
    write_control_vector,
    write_steering_vectors,
)
from manifold_unlearn.steer.gated import GatedVector
from manifold_unlearn.steer.path_geodesic import geodesic_path, geodesic_ratio
from manifold_unlearn.steer.path_tangent import tangent_path
from manifold_unlearn.steer.paths import ManifoldPath, Subspace, chord, principal_subspace
from manifold_unlearn.steer.preimage import KernelPreimage
from manifold_unlearn.steer.reft import ReftTraining, train_reft
from manifold_unlearn.steer.rotation import PlaneRotation, RotationSteering
from manifold_unlearn.steer.spline import CentroidSpline
from manifold_unlearn.steer.strengths import (
    relative_strengths,
    sweep_rows,
    sweep_strengths,
    with_strength,
)
from manifold_unlearn.steer.traversal import Traversal
from manifold_unlearn.steer.traverse import traverse
from manifold_unlearn.steer.vectors import SteeringVector

__all__ = [
    "AffineSteering",
    "BehaviorCurve",
    "BehaviorManifold",
    "CentroidSpline",
    "ConditionalVector",
    "GatedVector",
    "KernelPreimage",
    "LowRankSteering",
    "ManifoldPath",
    "PathComparison",
    "PathEnergy",
    "PathSteering",
    "PlaneRotation",
    "ReftTraining",
    "RotationSteering",
    "SteeringVector",
    "Subspace",
    "Traversal",
    "bhattacharyya",
    "bhattacharyya_angle",
    "chord",
    "compare_paths",
    "fit_vectors",
    "from_layer_activations",
    "geodesic_path",
    "geodesic_ratio",
    "hellinger",
    "path_between",
    "path_energy",
    "principal_subspace",
    "read_control_vector",
    "read_steering_vectors",
    "relative_strengths",
    "sweep_rows",
    "sweep_strengths",
    "tangent_path",
    "to_layer_activations",
    "train_reft",
    "traverse",
    "with_strength",
    "write_control_vector",
    "write_steering_vectors",
]
