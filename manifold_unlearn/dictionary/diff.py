"""What models have in common, and what of a forgotten topic one of them still carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import generator, require_finite
from manifold_unlearn.dictionary.coding import select_latents
from manifold_unlearn.dictionary.crosscoder import Crosscoder
from manifold_unlearn.dictionary.latent_scaling import LatentScaling, measure_latent_scaling

THREE = ("target", "unlearned", "reference")
"""Streams of a crosscoder over the model that knows, its unlearned copy, the one never told."""


@dataclass(frozen=True, eq=False)
class ModelDiff:
    """In which models each latent of a crosscoder is present.

    Attributes
    ----------
    streams : tuple of str
        Names of the models, in the order of the crosscoder's streams.
    scaling : LatentScaling
    carried : Tensor of shape (d_sae, n_streams), bool
        Whether a model has a latent: it fires, and is not absent by
        :meth:`LatentScaling.absent`.
    """

    streams: tuple[str, ...]
    scaling: LatentScaling
    carried: Tensor

    def latents(self, *names: str) -> Tensor:
        """Numbers (m,) of the latents that these models carry and no others do.

        Raises
        ------
        ValueError
            A name that is no stream.
        """
        wanted = torch.zeros(len(self.streams), dtype=torch.bool, device=self.carried.device)
        wanted[[self._number(name) for name in names]] = True
        alike = (self.carried == wanted).all(1) & (self.scaling.fires > 0)
        return alike.nonzero()[:, 0]

    def _number(self, name: str) -> int:
        if name not in self.streams:
            raise ValueError(f"{name!r} is no stream; there are {', '.join(self.streams)}.")
        return self.streams.index(name)

    @property
    def shared(self) -> Tensor:
        """Latents (m,) that all models carry."""
        return self.latents(*self.streams)

    @property
    def silent(self) -> Tensor:
        """Latents (m,) that never fired."""
        return (self.scaling.fires == 0).nonzero()[:, 0]

    def counts(self) -> dict[str, int]:
        """Latents by the models that carry them, ``"target+unlearned"``; and ``"silent"``."""
        alive = self.carried[self.scaling.fires > 0]
        found = {}
        for row, n in zip(*alive.unique(dim=0, return_counts=True), strict=True):
            names = [name for name, has in zip(self.streams, row.tolist(), strict=True) if has]
            found["+".join(names)] = int(n)
        return found | {"silent": len(self.silent)}


def diff_models(
    crosscoder: Crosscoder,
    batches: Iterable[Tensor],
    streams: Sequence[str] = THREE,
    *,
    max_error: float = 0.2,
    max_reconstruction: float = 0.5,
) -> ModelDiff:
    """Sort the latents of a crosscoder over models by the models that have them.

    Parameters
    ----------
    crosscoder : Crosscoder
        Over the models.
    batches : iterable of Tensor (n, n_streams, d)
        The same tokens in all models.
    streams : sequence of str
        Names of the models.
    max_error, max_reconstruction : float
        Below both a model does not have a latent; see :meth:`LatentScaling.absent`.

    Raises
    ------
    ValueError
        Another number of names than streams, a name twice, or as :func:`measure_latent_scaling`.
    """
    streams = tuple(streams)
    if len(streams) != crosscoder.n_streams or len(set(streams)) != len(streams):
        raise ValueError(
            f"streams={streams} must be {crosscoder.n_streams} different names, one a stream of "
            "the crosscoder."
        )
    scaling = measure_latent_scaling(crosscoder, batches)
    absent = scaling.absent(max_error=max_error, max_reconstruction=max_reconstruction)
    return ModelDiff(streams, scaling, ~absent & (scaling.fires > 0)[:, None])


class Share(NamedTuple):
    """How much of what the target has beyond the reference a model still has.

    Attributes
    ----------
    value : float
        1 as the target, 0 as the reference.
    interval : tuple of two floats
        95 %, groups of rows resampled.
    """

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class ResidualKnowledge:
    """Latents of a topic that the target has and the reference has not, and what is left of them.

    Attributes
    ----------
    latents : Tensor of shape (m,), int64
        Most energy first.
    forget_rate : Tensor of shape (m,), float64
        Share of the forget rows in which each fires.
    energy : Tensor of shape (m,), float64
        Share of each in what the target has beyond the reference; sums to 1.
    share : Tensor of shape (m,), float64
        Left of each latent in the model: 1 as in the target, 0 as in the reference; exactly so
        for these two themselves.
    interval : Tensor of shape (m, 2), float64
        95 % bootstrap interval of ``share``.
    total : Share
        Of all together.
    alone : Share
        As ``total``, but of what the other latents leave of each stream: smaller where the model
        says the same in other latents. Only as good as the crosscoder: two streams of one model
        may come out different.
    """

    latents: Tensor
    forget_rate: Tensor
    energy: Tensor
    share: Tensor
    interval: Tensor
    total: Share
    alone: Share

    def still_there(self, least: float = 0.5) -> Tensor:
        """Latents (k,) of which at least this share is left."""
        return self.latents[self.share >= least]

    def to_json(self) -> dict[str, Any]:
        """All figures, as JSON holds them."""
        names = ("latents", "forget_rate", "energy", "share", "interval")
        return {name: getattr(self, name).tolist() for name in names} | {
            name: getattr(self, name)._asdict() for name in ("total", "alone")
        }


@torch.no_grad()
def residual_knowledge(
    crosscoder: Crosscoder,
    rows: Tensor,
    group: Tensor,
    background: Iterable[Tensor],
    *,
    target: int = 0,
    model: int = 1,
    reference: int = 2,
    min_forget_rate: float = 0.01,
    min_ratio: float = 2.0,
    max_error: float = 0.2,
    max_reconstruction: float = 0.5,
    n_resamples: int = 1000,
    random_state: Any = 0,
) -> ResidualKnowledge:
    """Which features of a forgotten topic are still there.

    A latent belongs to what is to be forgotten if it fires in at least ``min_forget_rate`` of the
    rows and ``min_ratio`` times as often as in the background, if the target has it (``beta`` of
    the error above 1/2) and the reference has not (:meth:`LatentScaling.absent`, looked for by the
    target's direction). What a model has of it beyond the reference is the projection of the
    difference of their streams on the target's direction, weighted by the activations.

    Parameters
    ----------
    crosscoder : Crosscoder
        Over at least the three models.
    rows : Tensor of shape (n, n_streams, d)
        Of the forget texts.
    group : Tensor of shape (n,), int
        Which text, or better which subject, a row is of: resampled as a whole.
    background : iterable of Tensor (n, n_streams, d)
        Rows of retain or general texts.
    target, model, reference : int
        Streams.
    min_forget_rate, min_ratio, max_error, max_reconstruction : float
    n_resamples : int
    random_state : int, RandomState or None

    Raises
    ------
    ValueError
        No latent passes: names how many pass each condition. Groups that do not fit the rows,
        fewer than 2, streams that coincide or do not exist.
    """
    named = {"target": target, "model": model, "reference": reference}
    if len(set(named.values())) < 3 or not all(
        0 <= s < crosscoder.n_streams for s in named.values()
    ):
        raise ValueError(
            f"{named} must be three different streams of the {crosscoder.n_streams} there are."
        )
    rows = rows.to(crosscoder.device)
    require_finite(rows, "rows")
    if group.shape != rows.shape[:1] or group.is_floating_point():
        raise ValueError(
            f"group has shape {tuple(group.shape)} and dtype {group.dtype}; expected "
            f"({len(rows)},) integers, one a row."
        )
    labels, number = group.to(rows.device).unique(return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"{len(labels)} group of rows has no spread; give rows of more texts.")
    beyond = measure_latent_scaling(crosscoder, background, target=target)
    here = measure_latent_scaling(crosscoder, [rows], target=target)
    absent = here.absent(max_error=max_error, max_reconstruction=max_reconstruction)
    conditions = {
        f"fire in {min_forget_rate} of the rows": here.fires >= min_forget_rate,
        f"fire {min_ratio} times as often as in the background": here.fires
        >= min_ratio * beyond.fires,
        "are in the target": here.error[:, target] > 0.5,
        "are not in the reference": absent[:, reference],
    }
    chosen = torch.stack(list(conditions.values())).all(0).nonzero()[:, 0]
    if len(chosen) == 0:
        told = "; ".join(f"{int(passed.sum())} {name}" for name, passed in conditions.items())
        raise ValueError(
            f"no latent passes all conditions ({told}; of {crosscoder.d_sae}). Train the "
            "crosscoder on more forget texts or with more latents, or relax a condition."
        )
    streams = (target, model, reference)
    whole, alone = _present(crosscoder, rows, number, chosen, streams)
    order = (whole[..., 0] - whole[..., 2]).sum(0).argsort(descending=True)
    chosen, whole, alone = chosen[order], whole[:, order], alone[:, order]
    weights = _resampled(len(labels), n_resamples, random_state).to(rows.device)
    of_latent, interval = _share(whole, weights)
    size = (whole[..., 0] - whole[..., 2]).sum(0)
    return ResidualKnowledge(
        latents=chosen,
        forget_rate=here.fires[chosen],
        energy=size / size.sum(),
        share=of_latent,
        interval=interval,
        total=_total(whole, weights),
        alone=_total(alone, weights),
    )


def _present(
    crosscoder: Crosscoder, rows: Tensor, number: Tensor, chosen: Tensor, streams: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Sums ``f (d . y)`` (groups, latents, streams): y the stream, or what others leave of it."""
    with evaluating(crosscoder):
        code = crosscoder.code(rows)
    value = select_latents(code, chosen).dense().double()
    made = crosscoder.decode(code).double()
    decoder = crosscoder.W_dec.double()[chosen]
    direction = decoder[:, streams[0]]
    whole, alone = [], []
    for s in streams:
        stream = rows[:, s].double()
        own = value * (decoder[:, s] * direction).sum(1)
        whole.append(value * (stream @ direction.T))
        alone.append(value * ((stream - made[:, s]) @ direction.T + own))
    n_groups = int(number.max()) + 1
    found = []
    for parts in (whole, alone):
        each = torch.stack(parts, dim=-1)
        found.append(each.new_zeros(n_groups, *each.shape[1:]).index_add(0, number, each))
    return found[0], found[1]


def _total(sums: Tensor, weights: Tensor) -> Share:
    """Share of all latents together."""
    value, interval = _share(sums.sum(1, keepdim=True), weights)
    return Share(float(value), (float(interval[0, 0]), float(interval[0, 1])))


def _share(sums: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Share (m,) and its interval (m, 2) of sums (groups, m, 3), groups weighted (draws, groups).

    Summed over groups first, then divided: texts in which a latent is strong count for more.
    """

    def of(drawn: Tensor) -> Tensor:
        above = drawn[..., 1] - drawn[..., 2]
        return above / (drawn[..., 0] - drawn[..., 2])

    drawn = of(torch.einsum("bg,gms->bms", weights, sums))
    ends = torch.tensor([0.025, 0.975], dtype=drawn.dtype, device=drawn.device)
    return of(sums.sum(0)), drawn.nanquantile(ends, dim=0).T


def _resampled(n_groups: int, n_resamples: int, random_state: Any) -> Tensor:
    """How often each group is drawn, (n_resamples, n_groups), float64."""
    draw = generator(random_state)
    picked = torch.randint(n_groups, (n_resamples, n_groups), generator=draw)
    ones = torch.ones(picked.shape, dtype=torch.float64)
    return torch.zeros(n_resamples, n_groups, dtype=torch.float64).scatter_add(1, picked, ones)
