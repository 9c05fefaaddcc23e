"""Shortest paths on neighbor graphs: connected parts, distances from sources, all pairs, paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks

Graph: TypeAlias = "scipy.sparse.csr_matrix"
"""Symmetric; entries are lengths of edges, all positive."""

_SOURCES = 256  # rows of distances computed at a time
_BLOCK = 2**24  # entries of one dense block
_MOST_PARTS = 4096
_HOPS = 12  # hubs through which a row reaches the others


class Parts(NamedTuple):
    """``component`` (n,) of each node, the largest is 0; ``sizes`` descending."""

    component: np.ndarray
    sizes: np.ndarray


def symmetric_graph(rows: Tensor, columns: Tensor, lengths: Tensor, n_nodes: int) -> Graph:
    """Undirected graph of the edges; of edges given twice the shorter, of zero length a positive.

    Parameters
    ----------
    rows, columns : Tensor of shape (m,), int64
    lengths : Tensor of shape (m,)
    n_nodes : int
    """
    i, j, w = (t.cpu().numpy() for t in (rows, columns, lengths.double()))
    w = np.maximum(w, 1e-12 * (np.median(w) if len(w) else 1.0))
    low, high = np.minimum(i, j), np.maximum(i, j)
    order = np.lexsort((w, low * n_nodes + high))
    low, high, w = low[order], high[order], w[order]
    first = np.r_[True, (np.diff(low) != 0) | (np.diff(high) != 0)] & (low != high)
    low, high, w = low[first], high[first], w[first]
    ends = (np.r_[low, high], np.r_[high, low])
    return scipy.sparse.csr_matrix((np.r_[w, w], ends), shape=(n_nodes, n_nodes))


def connected_parts(graph: Graph) -> Parts:
    """Connected components, the largest first; ties by their first node."""
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Parts(rank[labels], sizes[order])


def join_parts(graph: Graph, points: Tensor, parts: Parts, n_nearest: int) -> Graph:
    """Connected graph: parts are joined at their nearest pairs by straight edges.

    Each part to its ``n_nearest`` nearest parts, and along a minimum spanning tree of the parts.

    Raises
    ------
    ValueError
        More than 4096 parts.
    """
    n_parts = len(parts.sizes)
    if n_parts > _MOST_PARTS:
        raise ValueError(
            f"the graph falls into {n_parts} parts; at most {_MOST_PARTS} are joined. "
            "Raise n_neighbors."
        )
    gaps, pairs = _nearest_pairs(points.double(), parts.component, n_parts)
    tree = scipy.sparse.csgraph.minimum_spanning_tree(np.maximum(gaps, 1e-300)).nonzero()
    near = np.argsort(gaps + np.diag(np.full(n_parts, np.inf)), axis=1)[:, :n_nearest]
    near = near[:, : n_parts - 1]
    a = np.r_[tree[0], np.repeat(np.arange(n_parts), near.shape[1])]
    b = np.r_[tree[1], near.ravel()]
    i, j = pairs[a, b], pairs[b, a]
    old = graph.tocoo()
    rows, columns = np.r_[old.row, i], np.r_[old.col, j]
    return symmetric_graph(
        torch.from_numpy(rows.astype(np.int64)),
        torch.from_numpy(columns.astype(np.int64)),
        torch.from_numpy(np.r_[old.data, gaps[a, b]]),
        len(points),
    )


def _nearest_pairs(
    points: Tensor, component: np.ndarray, n_parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances between parts, and at [a, b] the node of part a that is nearest to part b."""
    device = points.device
    part = torch.from_numpy(component).to(device)
    gaps = torch.full((n_parts, n_parts), float("inf"), dtype=torch.float64, device=device)
    pairs = torch.zeros(n_parts, n_parts, dtype=torch.int64, device=device)
    nodes = torch.from_numpy(np.flatnonzero(component > 0)).to(device)
    order = part.argsort(stable=True)
    starts = torch.searchsorted(part[order], torch.arange(n_parts, device=device)).tolist()
    bounds = [*starts, len(part)]
    for block in row_blocks(len(nodes), max(1, _BLOCK // len(points))):
        rows = nodes[block]
        distances = torch.cdist(points[rows], points[order])
        found = [distances[:, bounds[b] : bounds[b + 1]].min(1) for b in range(n_parts)]
        least = torch.stack([f.values for f in found], 1)
        at = torch.stack([order[bounds[b] + f.indices] for b, f in enumerate(found)], 1)
        for a in part[rows].unique():
            own = part[rows] == a
            value, row = least[own].min(0)
            better = value < gaps[a]
            mate = at[own].gather(0, row[None])[0]
            gaps[a] = torch.where(better, value, gaps[a])
            pairs[a] = torch.where(better, rows[own][row], pairs[a])
            fresh = better & (value < gaps[:, a])
            gaps[:, a] = torch.where(fresh, value, gaps[:, a])
            pairs[:, a] = torch.where(fresh, mate, pairs[:, a])
    gaps.fill_diagonal_(0)
    exact = (points[pairs] - points[pairs.mT]).norm(dim=2)
    exact.fill_diagonal_(0)
    return exact.cpu().numpy(), pairs.cpu().numpy()


def distances_from(graph: Graph, sources: np.ndarray, device: torch.device | str) -> Tensor:
    """Lengths of the shortest paths from ``sources`` to all nodes, (n_sources, n), float32.

    By Dijkstra's algorithm on the CPU, by relaxation of all edges at once on another device.
    """
    place = torch.device(device)
    out = torch.empty(len(sources), graph.shape[0], dtype=torch.float32, device=place)
    for block in row_blocks(len(sources), _SOURCES):
        if place.type == "cpu":
            rows = scipy.sparse.csgraph.dijkstra(graph, indices=sources[block])
            out[block] = torch.from_numpy(rows).float()
        else:
            out[block] = relaxed_distances(graph, sources[block], place)
    return out


def relaxed_distances(graph: Graph, sources: np.ndarray, device: torch.device) -> Tensor:
    """:func:`distances_from` by sweeps over all edges until nothing shortens (Bellman-Ford)."""
    edges = graph.tocoo()
    start = torch.from_numpy(edges.row.astype(np.int64)).to(device)
    end = torch.from_numpy(edges.col.astype(np.int64)).to(device)
    lengths = torch.from_numpy(edges.data).to(device, torch.float32)
    out = torch.full((len(sources), graph.shape[0]), float("inf"), device=device)
    out[torch.arange(len(sources)), torch.from_numpy(sources.astype(np.int64)).to(device)] = 0
    into = end.expand(len(sources), -1)
    for _ in range(graph.shape[0]):
        swept = out.scatter_reduce(1, into, out[:, start] + lengths, "amin")
        if torch.equal(swept, out):
            break
        out = swept
    return out


def all_pairs_through_hubs(
    graph: Graph, hubs: Tensor, rows_from: Callable[[np.ndarray], Tensor]
) -> Tensor:
    """Distances between all nodes, (n, n), float32, from those of the hubs.

    ``D(x, y)`` is the least ``D(s, x) + D(s, y)`` over the 12 hubs ``s`` nearest to x, or to y, or
    the length of the edge. It exceeds the shortest path by the detour to a hub on the way, small
    against distances of many edges; at a cost of 12 additions a pair.

    Parameters
    ----------
    graph : Graph
    hubs : Tensor of shape (n_hubs,), int64
    rows_from : callable
        Distances (n_sources, n) from given nodes.
    """
    n_nodes = graph.shape[0]
    table = rows_from(hubs.cpu().numpy())
    near = table.mT.contiguous().topk(min(_HOPS, len(hubs)), dim=1, largest=False)
    out = torch.empty(n_nodes, n_nodes, dtype=table.dtype, device=table.device)
    for block in row_blocks(n_nodes, max(1, _BLOCK // (8 * n_nodes))):
        best = table[near.indices[block, 0]] + near.values[block, :1]
        for hop in range(1, near.indices.shape[1]):
            other = table[near.indices[block, hop]]
            torch.minimum(best, other.add_(near.values[block, hop : hop + 1]), out=best)
        out[block] = best
    _take_shorter_half(out)
    edges = graph.tocoo()
    i = torch.from_numpy(edges.row.astype(np.int64)).to(out.device)
    j = torch.from_numpy(edges.col.astype(np.int64)).to(out.device)
    lengths = torch.from_numpy(edges.data).to(out)
    out[i, j] = torch.minimum(out[i, j], lengths)
    return out.fill_diagonal_(0)


def _take_shorter_half(square: Tensor) -> None:
    """Make ``square`` the minimum of itself and its transpose, in place, by blocks."""
    for rows in row_blocks(len(square), 1024):
        for columns in row_blocks(rows.stop, 1024):
            least = torch.minimum(square[rows, columns], square[columns, rows].mT)
            square[rows, columns], square[columns, rows] = least, least.mT


def with_entries(graph: Graph, indices: Tensor, lengths: Tensor, *, outward: bool) -> Graph:
    """``graph`` and new nodes behind its own, joined by one-way edges.

    Parameters
    ----------
    indices : Tensor of shape (n_new, k), int64
        Nodes joined to each new one.
    lengths : Tensor of shape (n_new, k)
        Infinite where there is no edge.
    outward : bool
        Whether the edges leave the new nodes; else they enter. One way, so that the new nodes are
        no short cuts for the others.
    """
    n_nodes, n_new = graph.shape[0], len(indices)
    valid = torch.isfinite(lengths).cpu().numpy()
    new = np.broadcast_to(np.arange(n_nodes, n_nodes + n_new)[:, None], valid.shape)[valid]
    old = indices.cpu().numpy()[valid]
    data = np.maximum(lengths.double().cpu().numpy()[valid], 1e-300)
    edges = graph.tocoo()
    rows, columns = (new, old) if outward else (old, new)
    size = n_nodes + n_new
    ends = (np.r_[edges.row, rows], np.r_[edges.col, columns])
    return scipy.sparse.csr_matrix((np.r_[edges.data, data], ends), shape=(size, size))


def shortest_path(graph: Graph, start: int, stop: int) -> np.ndarray:
    """Nodes of the shortest path, both ends included; ``graph`` must join them."""
    _, before = scipy.sparse.csgraph.dijkstra(graph, indices=start, return_predecessors=True)
    path = [stop]
    while path[-1] != start:
        path.append(int(before[path[-1]]))
    return np.array(path[::-1])
