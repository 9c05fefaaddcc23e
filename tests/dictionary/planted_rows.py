"""Rows that are sparse sums of known directions: what a dictionary should find."""

from functools import cache

import torch
from torch.nn.functional import normalize

from manifold_unlearn.dictionary import DictionaryTraining

N, D, TRUE, LATENTS = 8192, 32, 40, 64


def directions(n, d, seed):
    """Seeds far from those of the dictionaries, which draw their own alike."""
    seed += 1000
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def codes(n_latents=TRUE, mean_l0=2.0, seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    on = torch.rand(n, n_latents, generator=draw) < mean_l0 / n_latents
    return on * (0.5 + torch.rand(n, n_latents, generator=draw))


@cache
def planted_rows():
    """Rows, and the directions they are sparse sums of."""
    true = directions(TRUE, D, 1)
    return codes() @ true + 0.3 * directions(1, D, 2), true


def recovery(found, true):
    """Mean over the true directions of the best cosine."""
    return float((normalize(found.detach(), dim=1) @ true.T).max(0).values.mean())


def unexplained(coder, x, y=None):
    y = x if y is None else y
    with torch.no_grad():
        return float((y - coder(x)).square().sum() / (y - y.mean(0)).square().sum())


QUICK = DictionaryTraining(n_steps=300, batch_size=128, lr=2e-2)
JUMP = {"name": "jumprelu", "threshold": 0.3, "bandwidth": 0.3}
SHAPES = {
    "topk": ({"name": "topk", "k": 3}, {}),
    "batch_topk": ({"name": "batch_topk", "k": 2}, {}),
    "jumprelu": (JUMP, {"sparsity_coefficient": 0.04}),
    "gated": ({"name": "gated"}, {"sparsity_coefficient": 0.4}),
    "relu": ({"name": "relu"}, {"sparsity_coefficient": 0.15}),
}
