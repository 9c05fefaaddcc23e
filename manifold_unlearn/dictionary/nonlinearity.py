"""What makes a code sparse: which latents fire, and how much."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Nonlinearity(nn.Module, ABC):
    """From pre-activations (n, d_sae) to activations of the same shape."""

    name: ClassVar[str]
    chooses: ClassVar[bool] = False
    """Whether it keeps few latents by a rule of rank: such have :meth:`choice`."""

    @abstractmethod
    def forward(self, pre: Tensor) -> Tensor:
        """Activations (n, d_sae) of pre-activations."""

    def config(self) -> dict[str, Any]:
        """What :func:`make_nonlinearity` needs to make it again, tensors apart."""
        return {"name": self.name}


class Choosing(Nonlinearity):
    """Keeps few latents, by rank or by a threshold; the others are exactly 0."""

    chooses = True

    @abstractmethod
    def choice(self, pre: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and latents to keep, int64 (nnz,) each, rows ascending.

        Parameters
        ----------
        pre : Tensor of shape (n, d_sae)
        scale : Tensor of shape (d_sae,), optional
            Multiplies what is compared, not what is answered: the lengths of the decoder's rows.
        """

    def shaped(self, value: Tensor) -> Tensor:
        """Activation of a latent that is kept, from its pre-activation."""
        return value.relu()

    def forward(self, pre: Tensor, scale: Tensor | None = None) -> Tensor:
        """Activations (n, d_sae); ``scale`` as for :meth:`choice`."""
        row, latent = self.choice(pre.detach(), scale)
        kept = torch.zeros_like(pre, dtype=torch.bool)
        kept[row, latent] = True
        return torch.where(kept, self.shaped(pre), 0.0)


class ReLU(Nonlinearity):
    """``max(pre, 0)``."""

    name = "relu"

    def forward(self, pre: Tensor) -> Tensor:
        """Activations (n, d_sae)."""
        return pre.relu()


_FOLDS = 8


def largest(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest values of each row (n, d), int64 (n, k), in no order.

    On the CPU in two rounds where rows are long: the k largest lie in the k groups of columns with
    the largest maxima, so few candidates are left.
    """
    n, d = values.shape
    if not values.is_cpu or d % _FOLDS or d // _FOLDS < 4 * k:
        return values.topk(k, dim=1, sorted=False).indices
    size = d // _FOLDS
    groups = values.reshape(n, _FOLDS, size).amax(1).topk(k, dim=1, sorted=False).indices
    firsts = torch.arange(_FOLDS, device=values.device)[:, None] * size
    candidates = (groups[:, None] + firsts).flatten(1)
    chosen = values.gather(1, candidates).topk(k, dim=1, sorted=False).indices
    return candidates.gather(1, chosen)


class TopK(Choosing):
    """The ``k`` largest of every row, if positive.

    Parameters
    ----------
    k : int
        At least 1.

    References
    ----------
    Gao et al. (2024), Scaling and evaluating sparse autoencoders, section 2.3.
    """

    name = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        self.k = int(k)

    def choice(self, pre: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and latents to keep, rows ascending."""
        ranked = self._ranked(pre if scale is None else pre * scale)
        k = min(self.k, pre.shape[1])
        latent = largest(ranked, k)
        row = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
        return row, latent.flatten()

    def _ranked(self, values: Tensor) -> Tensor:
        return values

    def config(self) -> dict[str, Any]:
        """Name and k."""
        return {"name": self.name, "k": self.k}


class AbsTopK(TopK):
    """The ``k`` of largest absolute value of every row, with their signs."""

    name = "abs_topk"

    def shaped(self, value: Tensor) -> Tensor:
        """Pre-activation as it is."""
        return value

    def _ranked(self, values: Tensor) -> Tensor:
        return values.abs()


class GroupMax(Choosing):
    """The largest of each of ``k`` equal groups of neighboring latents, if positive.

    Parameters
    ----------
    k : int
        Number of groups; must divide the number of latents.
    """

    name = "groupmax"

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        self.k = int(k)

    def choice(self, pre: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and latents to keep, rows ascending."""
        n, d_sae = pre.shape
        if d_sae % self.k:
            raise ValueError(f"k={self.k} groups do not divide {d_sae} latents.")
        ranked = pre if scale is None else pre * scale
        groups = ranked.reshape(n, self.k, -1)
        first = torch.arange(self.k, device=pre.device) * groups.shape[2]
        latent = groups.argmax(dim=2) + first
        row = torch.arange(n, device=pre.device).repeat_interleave(self.k)
        return row, latent.flatten()

    def config(self) -> dict[str, Any]:
        """Name and k."""
        return {"name": self.name, "k": self.k}


class BatchTopK(Choosing):
    """While training the ``k * n`` largest of a batch of n rows, after it those above a threshold.

    The threshold is the running mean of the smallest activation that was kept, so that a row's
    code does not depend on its batch. Before the first update it is 0: a ReLU.

    Parameters
    ----------
    k : int
        Latents a row, on average.
    decay : float, default=0.999
        Of the running mean.

    References
    ----------
    Bussmann et al. (2024), BatchTopK sparse autoencoders.
    """

    name = "batch_topk"
    threshold: Tensor

    def __init__(self, k: int, decay: float = 0.999) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        self.k, self.decay = int(k), float(decay)
        self.register_buffer("threshold", torch.zeros(()))

    def choice(self, pre: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and latents to keep, rows ascending."""
        ranked = pre if scale is None else pre * scale
        if not self.training:
            row, latent = (ranked > self.threshold.clamp(min=0)).nonzero(as_tuple=True)
            return row, latent
        n, d_sae = pre.shape
        values, at = ranked.flatten().topk(min(self.k * n, pre.numel()), sorted=False)
        self._learn(values)
        at = at[values > 0].sort().values
        return at // d_sae, at % d_sae

    @torch.no_grad()
    def _learn(self, values: Tensor) -> None:
        positive = values[values > 0]
        if len(positive) == 0:
            return
        least = positive.min().to(self.threshold)
        fresh = self.threshold == 0
        kept = self.decay * self.threshold + (1 - self.decay) * least
        self.threshold.copy_(torch.where(fresh, least, kept))

    def config(self) -> dict[str, Any]:
        """Name, k and decay."""
        return {"name": self.name, "k": self.k, "decay": self.decay}


class JumpReLU(Nonlinearity):
    """``pre`` where it exceeds its latent's threshold, else 0.

    The threshold learns through rectangles of width ``bandwidth`` around the jump
    (straight-through estimators).

    Parameters
    ----------
    d_sae : int
    threshold : float, default=0.001
        To begin with; positive.
    bandwidth : float, default=0.001

    References
    ----------
    Rajamanoharan et al. (2024), Jumping ahead: improving reconstruction fidelity with JumpReLU
    sparse autoencoders, section 3.
    """

    name = "jumprelu"

    def __init__(self, d_sae: int, threshold: float = 1e-3, bandwidth: float = 1e-3) -> None:
        super().__init__()
        if threshold <= 0 or bandwidth <= 0:
            raise ValueError(f"threshold={threshold} and bandwidth={bandwidth} must be positive.")
        self.bandwidth = float(bandwidth)
        self.threshold = nn.Parameter(torch.full((d_sae,), float(threshold)))

    def forward(self, pre: Tensor) -> Tensor:
        """Activations (n, d_sae)."""
        found: Tensor = _Jump.apply(pre, self.threshold, self.bandwidth)
        return found

    def step(self, pre: Tensor) -> Tensor:
        """1 where a latent fires, else 0, with a gradient to the threshold: its sum is the L0."""
        found: Tensor = _Step.apply(pre, self.threshold, self.bandwidth)
        return found

    def config(self) -> dict[str, Any]:
        """Name and bandwidth."""
        return {"name": self.name, "bandwidth": self.bandwidth}


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold / ctx.bandwidth) * (grad * near).sum(0)
        return grad * (pre > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(grad * near).sum(0) / ctx.bandwidth, None


class Gated(Nonlinearity):
    """A gate says which latents fire, a rescaled reading of the same product how much.

    ``1[pre + gate_bias > 0] * relu(pre * exp(log_gain) + magnitude_bias)``.

    Parameters
    ----------
    d_sae : int

    References
    ----------
    Rajamanoharan et al. (2024), Improving dictionary learning with gated sparse autoencoders,
    equations 3 to 7.
    """

    name = "gated"

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.gate_bias = nn.Parameter(torch.zeros(d_sae))
        self.log_gain = nn.Parameter(torch.zeros(d_sae))
        self.magnitude_bias = nn.Parameter(torch.zeros(d_sae))

    def forward(self, pre: Tensor) -> Tensor:
        """Activations (n, d_sae)."""
        magnitude = (pre * self.log_gain.exp() + self.magnitude_bias).relu()
        return torch.where(pre + self.gate_bias > 0, magnitude, 0.0)

    def gate(self, pre: Tensor) -> Tensor:
        """``relu(pre + gate_bias)``: what the sparsity penalty and the auxiliary loss see."""
        return (pre + self.gate_bias).relu()


def make_nonlinearity(config: Mapping[str, Any] | str, d_sae: int) -> Nonlinearity:
    """Nonlinearity of a configuration such as ``{"name": "topk", "k": 32}``, or of a name alone.

    Raises
    ------
    ValueError
        An unknown name, or parameters that it does not take.
    """
    from manifold_unlearn.dictionary.partitioned import PartitionedBatchTopK

    config = {"name": config} if isinstance(config, str) else config
    given = {key: value for key, value in config.items() if key != "name"}
    kinds: dict[str, Any] = {
        kind.name: kind
        for kind in (
            ReLU,
            TopK,
            AbsTopK,
            GroupMax,
            BatchTopK,
            PartitionedBatchTopK,
            JumpReLU,
            Gated,
        )
    }
    kind = kinds.get(config.get("name", ""))
    if kind is None:
        raise ValueError(f"nonlinearity {config.get('name')!r} is not one of {', '.join(kinds)}.")
    listed = inspect.signature(kind).parameters.values()
    known = {p.name: p for p in listed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    sized = known.pop("d_sae", None) is not None
    needed = {p.name for p in known.values() if p.default is p.empty}
    if not needed <= given.keys() <= known.keys():
        optional = sorted(known.keys() - needed)
        raise ValueError(
            f"nonlinearity {kind.name} takes {', '.join(sorted(needed)) or 'nothing'}"
            f"{', and may take ' + ', '.join(optional) if optional else ''}; got "
            f"{', '.join(sorted(given)) or 'nothing'}."
        )
    if sized:
        given["d_sae"] = d_sae
    made: Nonlinearity = kind(**given)
    return made
