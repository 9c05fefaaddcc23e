"""Targets along geodesics: walk from forget to retain until the odds turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.erase.aim import Aim
from manifold_unlearn.erase.targets import Targets
from manifold_unlearn.manifold.graph_geodesics import (
    connected_parts,
    join_parts,
    symmetric_graph,
)
from manifold_unlearn.manifold.neighbors import nearest_neighbors

_NEIGHBORS = 12
_JOINED = 3  # nearest parts that a part is joined to
_STEPS = 32  # places looked at along a path
_SOURCES = 256
_ENTRIES = 2**24


def geodesic_targets(landmarks: Tensor, aim: Aim, log_ratio: Callable[[Tensor], Tensor]) -> Targets:
    """First places where retain is as likely as forget, on shortest paths to the rows aimed at.

    Paths run over the neighbor graph of landmarks and rows together: to the pair or the nearest
    semantic neighbor where there is a choice, else to the nearest row along the graph. Where the
    odds never turn the target is the path's end.

    Parameters
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
    aim : Aim
    log_ratio : callable
        Nats (n,) of forget over retain at points (n, n_features).
    """
    points = torch.cat([landmarks.double(), aim.rows.double()])
    graph = _joint_graph(points)
    m = len(landmarks)
    if aim.choice is None:
        goals = np.arange(m, len(points))
        _, before, _ = dijkstra(graph, indices=goals, min_only=True, return_predecessors=True)
        paths = _walked(np.broadcast_to(before, (m, len(points))), np.arange(m))
    else:
        paths = _paths_to(graph, aim.choice[:, 0].cpu().numpy() + m, m)
    nodes = torch.from_numpy(paths).to(points.device)
    targets = torch.empty_like(landmarks, dtype=torch.float64)
    for part in row_blocks(m, max(1, _ENTRIES // (points.shape[1] * max(_STEPS, paths.shape[1])))):
        along = _even_places(points[nodes[part]])
        # the last place is the path's end, whatever its odds
        odds = log_ratio(along.reshape(-1, points.shape[1])).reshape(along.shape[:2]).double()
        odds[:, -1] = odds[:, -1].clamp_max(0)
        targets[part] = _crossing(along, odds)
    return Targets(targets, None)


def _joint_graph(points: Tensor) -> object:
    k = min(_NEIGHBORS, len(points) - 1)
    found = nearest_neighbors(points, k)
    rows = torch.arange(len(points), device=points.device).repeat_interleave(k)
    lengths = found.squared_distances.sqrt().reshape(-1)
    graph = symmetric_graph(rows, found.indices.reshape(-1), lengths, len(points))
    parts = connected_parts(graph)
    return join_parts(graph, points, parts, _JOINED) if len(parts.sizes) > 1 else graph


def _paths_to(graph: object, goals: np.ndarray, m: int) -> np.ndarray:
    """Paths of the nodes 0 to m - 1, each to its own goal."""
    distinct, which = np.unique(goals, return_inverse=True)
    found = []
    for block in row_blocks(len(distinct), _SOURCES):
        _, before = dijkstra(graph, indices=distinct[block], return_predecessors=True)
        walkers = np.flatnonzero((which >= block.start) & (which < block.stop))
        found.append((walkers, _walked(before[which[walkers] - block.start], walkers)))
    longest = max(path.shape[1] for _, path in found)
    paths = np.empty((m, longest), dtype=np.int64)
    for walkers, path in found:
        paths[walkers, : path.shape[1]] = path
        paths[walkers, path.shape[1] :] = path[:, -1:]
    return paths


def _walked(before: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Nodes (n, length) from each start to its goal, which is repeated behind the end.

    ``before`` (n, n_nodes) holds for every walker the node after each on its way; negative at a
    goal.
    """
    nodes = [starts.astype(np.int64)]
    everyone = np.arange(len(starts))
    while True:
        following = before[everyone, nodes[-1]]
        if (following < 0).all():
            return np.stack(nodes, axis=1)
        nodes.append(np.where(following < 0, nodes[-1], following).astype(np.int64))


def _even_places(polygons: Tensor) -> Tensor:
    """Places (n, steps, d) at even distances along polygons (n, length, d)."""
    n, length, d = polygons.shape
    if length == 1:
        return polygons.expand(n, _STEPS, d)
    pieces = (polygons[:, 1:] - polygons[:, :-1]).norm(dim=2)
    reached = torch.cat([pieces.new_zeros(n, 1), pieces.cumsum(1)], dim=1)
    share = torch.linspace(0, 1, _STEPS, dtype=polygons.dtype, device=polygons.device)
    wanted = reached[:, -1:] * share
    piece = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, length - 2)
    size = pieces.gather(1, piece)
    within = (wanted - reached.gather(1, piece)) / torch.where(size > 0, size, 1.0)
    at = piece[:, :, None].expand(-1, -1, d)
    low, high = polygons.gather(1, at), polygons.gather(1, at + 1)
    return low + within.clamp(0, 1)[:, :, None] * (high - low)


def _crossing(along: Tensor, odds: Tensor) -> Tensor:
    """Points (n, d) where the odds (n, steps) first fall to 0, between the places if need be."""
    everyone = torch.arange(len(along), device=along.device)
    first = (odds <= 0).long().argmax(1)
    last = (first - 1).clamp_min(0)
    above, below = odds[everyone, last], odds[everyone, first]
    fall = above - below
    share = torch.where(fall > 0, above / torch.where(fall > 0, fall, 1.0), 1.0).clamp(0, 1)
    low, high = along[everyone, last], along[everyone, first]
    return low + share[:, None] * (high - low)
