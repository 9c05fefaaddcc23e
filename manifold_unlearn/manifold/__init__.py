"""Geometry on arrays: neighbors, kernels, spectra, diffusion maps; samples with known answers."""

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.diffusion import DiffusionMap
from manifold_unlearn.manifold.neighbors import Neighbors, nearest_neighbors

__all__ = ["DiffusionMap", "Neighbors", "nearest_neighbors", "samples"]
