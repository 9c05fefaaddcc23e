"""Least squares on Gram matrices: new answers to some keys, old answers to the others."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_change(
    forget_gram: Tensor,
    cross: Tensor,
    retain_gram: Tensor,
    *,
    retain_cross: Tensor | None = None,
    ridge: float = 3.0,
    null_space: float | None = None,
    damping: float = 1e-4,
    n_passes: int = 1,
) -> Tensor:
    """Change of a linear map that moves the answers to forget keys and spares retain keys.

    With ``A = K_f' K_f / n_f``, ``C = K_f' D / n_f`` and ``H = K_r' K_r / n_r`` the solution ``X``
    of ``(A + ridge H + mu I) X = C``; further passes solve again for what is left of ``C``
    (iterated Tikhonov regularization), so that ``K_f X`` comes closer to ``D``.

    Parameters
    ----------
    forget_gram : float64 Tensor of shape (k, k)
        ``A``: mean outer product of the forget keys.
    cross : float64 Tensor of shape (k, d)
        ``C``: mean product of forget keys and the wanted changes of the answers.
    retain_gram : float64 Tensor of shape (k, k)
        ``H``: mean outer product of the retain keys.
    retain_cross : float64 Tensor of shape (k, d), optional
        Mean product of retain keys and wanted changes of their answers. Default: zero, no answer to
        a retain key shall change.
    ridge : float
        Weight of what happens to retain keys, against what forget keys shall reach.
    null_space : float, optional
        Share of the retain keys' energy (trace of ``H``), in (0, 1]: the fewest directions that
        hold it are not touched at all. 1 leaves the exact null space.
    damping : float
        ``mu`` as a share of the mean diagonal entry of ``A + ridge H``.
    n_passes : int

    Returns
    -------
    float64 Tensor of shape (k, d)
        Row keys are changed by ``key @ X``.

    Raises
    ------
    ValueError
        A parameter out of range, keys that are all zero, or no direction left to edit.

    References
    ----------
    Meng et al. (2023), MEMIT, arXiv 2210.07229 (the ridge); Fang et al. (2025), AlphaEdit, arXiv
    2410.02355 (the null space).
    """
    for name, value in {"ridge": ridge, "damping": damping}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be finite and not negative.")
    if n_passes < 1:
        raise ValueError(f"n_passes={n_passes} must be at least 1.")
    basis = None if null_space is None else spared_basis(retain_gram, null_space)
    if basis is not None:
        forget_gram, retain_gram = (basis.T @ g @ basis for g in (forget_gram, retain_gram))
        cross = basis.T @ cross
        retain_cross = None if retain_cross is None else basis.T @ retain_cross
    system = forget_gram + ridge * retain_gram
    level = system.diagonal().mean()
    if not float(level) > 0:
        raise ValueError(
            "the keys are zero in every direction that may be edited; choose another layer, or "
            "lower null_space."
        )
    system = system + max(damping, 1e-12) * level * torch.eye(
        len(system), dtype=system.dtype, device=system.device
    )
    factor = torch.linalg.cholesky(system)
    wanted = cross if retain_cross is None else cross + ridge * retain_cross
    change = torch.cholesky_solve(wanted, factor)
    for _ in range(n_passes - 1):
        change = change + torch.cholesky_solve(cross - forget_gram @ change, factor)
    return change if basis is None else basis @ change


def spared_basis(retain_gram: Tensor, energy: float) -> Tensor:
    """Orthonormal basis of what is left without the leading directions that hold an energy share.

    Parameters
    ----------
    retain_gram : float64 Tensor of shape (k, k)
    energy : float
        In (0, 1]; see ``null_space`` of :func:`ridge_change`.

    Returns
    -------
    float64 Tensor of shape (k, r)

    Raises
    ------
    ValueError
        The share is out of range, or the retain keys fill all directions.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"null_space={energy} is a share of energy: more than 0, at most 1.")
    values, vectors = torch.linalg.eigh(retain_gram)
    values = values.clamp(min=0).flip(0)
    total = values.sum()
    rounding = len(values) * torch.finfo(values.dtype).eps * values[0]
    before = values.cumsum(0) - values  # energy held by the directions ahead of each
    protected = int(((before < energy * total) & (values > rounding)).sum())
    free = len(values) - protected
    if free == 0:
        raise ValueError(
            f"null_space={energy} protects all {len(values)} directions of the keys; lower it, or "
            "use ridge alone."
        )
    return vectors[:, :free]
