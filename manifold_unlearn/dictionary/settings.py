"""How dictionaries are trained, and what the training measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Sparsity: TypeAlias = Literal["auto", "l1", "l0", "tanh", "none"]
Center: TypeAlias = Literal["geometric_median", "mean", "keep"]


@dataclass(frozen=True)
class DictionaryTraining:
    """How dictionaries are trained: what all losses, optimizers and schedules need to know.

    The loss is free of the rows' scale: unexplained variance, plus ``sparsity_coefficient`` times
    the penalty, plus ``aux_coefficient`` times the auxiliary loss of dead latents.

    Attributes
    ----------
    n_steps, n_tokens : int, optional
        Length; one of both. With tokens: ``n_tokens`` over the rows a step reads.
    batch_size : int
        Rows a step, where rows are given as they are; a stream has a batch size of its own.
    lr : float, optional
        Of Adam. None: ``2e-4 / sqrt(d_sae / 2**14)`` (Gao et al. 2024).
    betas : (float, float)
    warmup, decay : float
        Shares of the steps: the rate rises linearly over the first, falls to 0 over the last.
    sparsity : {"auto", "l1", "l0", "tanh", "none"}
        Penalty. "auto": L1 for ReLU and for gates, L0 for JumpReLU, none where a rule of rank
        chooses. "tanh" is a soft count, for JumpReLU and ReLU.
    sparsity_coefficient : float, optional
        The L1 penalty is counted in standard deviations of the rows, the others in latents. None:
        0.1 for L1, 0.001 for the others.
    sparsity_warmup : float
        Share of the steps over which the coefficient rises linearly from 0.
    target_l0 : float, optional
        The L0 penalty is ``(L0 / target - 1)^2``.
    group_sizes : tuple of int
        Latents of each Matryoshka group. Empty: none.
    aux_k : int, optional
        Dead latents that rebuild the error. None: half the width of the rows.
    aux_coefficient : float
        0 turns the auxiliary loss off.
    dead_after : int, optional
        Rows without firing after which a latent counts as dead. None: a tenth of the training,
        at most 10 million.
    resample_every : int
        Steps between resamplings of dead latents to rows that are badly rebuilt. 0: never.
    delta_coefficient : float
        Of the loss of the difference of a crosscoder's two streams; needs exclusive latents.
    k_start : int, optional
        Rules of rank begin with this k and come down to theirs, linearly.
    k_anneal : float
        Share of the steps over which k comes down.
    unit_norm : bool, optional
        Keep the decoder's rows at norm 1. None: yes, but for crosscoders and cross-layer
        transcoders, whose lengths say how much a latent belongs to a stream, and for dictionaries
        that have been trained before, whose outputs would change.
    normalize : bool
        Train on rows whose mean distance from their center is ``sqrt(d)``, measured on the first
        rows; folded into the weights at the end.
    center : {"geometric_median", "mean", "keep"}
        The center of the first rows, where ``b_dec`` begins if it is 0; "keep" leaves biases as
        they are.
    from_rows : float
        Share of a row, drawn from the first ones, in the directions that each latent of a fresh
        dictionary begins with; the rest is random. Faster than random alone.
    first_rows : int
        Rows to measure scale and center on, and to draw those directions from.
    dtype : {"float32", "bfloat16"}
        Of the large products (autocast); weights and moments keep their own dtype.
    clip : float, optional
        Largest norm of a gradient.
    log_every : int
        Steps between measurements.
    random_state : int

    Raises
    ------
    ValueError
        A value out of range, or both or none of ``n_steps`` and ``n_tokens``.
    """

    n_steps: int | None = None
    n_tokens: int | None = None
    batch_size: int = 1024
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.02
    decay: float = 0.2
    sparsity: Sparsity = "auto"
    sparsity_coefficient: float | None = None
    sparsity_warmup: float = 0.1
    target_l0: float | None = None
    group_sizes: tuple[int, ...] = ()
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after: int | None = None
    resample_every: int = 0
    delta_coefficient: float = 0.0
    k_start: int | None = None
    k_anneal: float = 0.5
    unit_norm: bool | None = None
    normalize: bool = True
    center: Center = "geometric_median"
    from_rows: float = 0.5
    first_rows: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = 1.0
    log_every: int = 50
    random_state: int = 0

    def __post_init__(self) -> None:
        if (self.n_steps is None) == (self.n_tokens is None):
            raise ValueError(f"n_steps={self.n_steps}, n_tokens={self.n_tokens}: give one of both.")
        for name in ("n_steps", "n_tokens", "aux_k", "dead_after", "k_start"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"{name}={given} must be at least 1.")
        for name in ("batch_size", "first_rows", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("warmup", "decay", "sparsity_warmup", "k_anneal", "from_rows"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share: from 0 to 1.")
        for name in ("sparsity_coefficient", "aux_coefficient", "delta_coefficient"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.resample_every < 0:
            raise ValueError(f"resample_every={self.resample_every} must not be negative.")
        for name in ("lr", "clip", "target_l0"):
            if (given := getattr(self, name)) is not None and given <= 0:
                raise ValueError(f"{name}={given} must be positive.")
        for name, allowed in (
            ("sparsity", get_args(Sparsity)),
            ("center", get_args(Center)),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}.")

    def rate(self, step: int, n_steps: int, d_sae: int) -> float:
        """Learning rate of step ``step`` of 0 ... n_steps - 1."""
        top = self.lr if self.lr is not None else 2e-4 / (d_sae / 2**14) ** 0.5
        rise, fall = self.warmup * n_steps, self.decay * n_steps
        up = 1.0 if rise <= 0 else min((step + 1) / rise, 1.0)
        down = 1.0 if fall <= 0 else min((n_steps - step) / fall, 1.0)
        return top * min(up, down)

    def coefficient(self, step: int, n_steps: int, penalty: str) -> float:
        """Coefficient of a sparsity penalty ("l1", "l0", "tanh") at a step."""
        full = self.sparsity_coefficient
        full = full if full is not None else 0.1 if penalty == "l1" else 1e-3
        rise = self.sparsity_warmup * n_steps
        return full * (1.0 if rise <= 0 else min((step + 1) / rise, 1.0))

    def k_at(self, step: int, n_steps: int, k: int) -> int:
        """The k of a rule of rank at a step, ``k`` being its own."""
        span = self.k_anneal * n_steps
        if self.k_start is None or span <= 0 or step >= span:
            return k
        return round(self.k_start + (k - self.k_start) * step / span)

    def silence(self, n_rows: int) -> int:
        """Rows without firing after which a latent is dead, in a training of ``n_rows``."""
        return self.dead_after if self.dead_after is not None else min(n_rows // 10, 10_000_000)


@dataclass(frozen=True)
class Measured:
    """One dictionary after ``step`` steps; means over the steps since the measurement before.

    Attributes
    ----------
    name : str
    step, n_tokens : int
    loss, fvu : float
        ``fvu`` is the fraction of variance unexplained, a batch's own.
    l0 : float
        Latents that fire a row (and a layer).
    dead : float
        Share of the latents that count as dead.
    """

    name: str
    step: int
    n_tokens: int
    loss: float
    fvu: float
    l0: float
    dead: float


@dataclass(frozen=True)
class TrainingHistory:
    """What a training measured.

    Attributes
    ----------
    measured : tuple of Measured
        Step by step, dictionary by dictionary.
    n_steps, n_tokens : int
    seconds : float
        Of this call.
    """

    measured: tuple[Measured, ...]
    n_steps: int
    n_tokens: int
    seconds: float

    def of(self, name: str = "") -> list[Measured]:
        """Measurements of one dictionary."""
        found = [m for m in self.measured if m.name == name]
        if not found:
            names = sorted({m.name for m in self.measured})
            raise ValueError(f"no dictionary {name!r} was trained; there are {names}.")
        return found
