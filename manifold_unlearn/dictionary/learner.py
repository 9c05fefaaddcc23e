"""One dictionary in training: its optimizer, its scale, how long each latent has been silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from manifold_unlearn.arrays import generator, require_finite
from manifold_unlearn.dictionary.criterion import Criterion, Dictionary, Judged
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.crosscoder import Crosscoder
from manifold_unlearn.dictionary.settings import DictionaryTraining, Measured
from manifold_unlearn.dictionary.together import Together

Given: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


class Learner:
    """A dictionary, its optimizer and its counts.

    Parameters
    ----------
    name : str
    coder : SparseCoder or CrossLayerTranscoder
        Trained in place.
    config : DictionaryTraining
    n_steps, step_rows : int
        Length of the training, and rows of a step over all processes.
    together : Together
        The processes that train.
    """

    def __init__(
        self,
        name: str,
        coder: Dictionary,
        config: DictionaryTraining,
        n_steps: int,
        step_rows: int,
        together: Together,
    ) -> None:
        self.name, self.coder, self.config, self.n_steps = name, coder, config, n_steps
        self.together = together
        self.criterion = Criterion(coder, config)
        self.encoders = self.criterion.encoders
        self.dead_after = config.silence(n_steps * step_rows)
        device = coder.device
        self.silent = torch.zeros(len(self.encoders), coder.d_sae, dtype=torch.int64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.n_summed = 0
        self.scale_in = self.scale_out = torch.ones(1, dtype=coder.dtype, device=device)
        self.parameters = [p for p in coder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, betas=config.betas, fused=True)
        k = getattr(self.encoders[0].nonlinearity, "k", None)
        self.k = k if isinstance(k, int) else None
        if config.k_start is not None and self.k is None:
            raise ValueError(f"k_start={config.k_start}: {self.called} has no k to come down to.")
        alone = not isinstance(coder, Crosscoder | CrossLayerTranscoder)
        self.fresh = not bool(coder.b_dec.any())
        kept = alone and (self.fresh or (not config.normalize and self._of_unit_norm()))
        self.unit_norm = kept if config.unit_norm is None else config.unit_norm

    @property
    def called(self) -> str:
        """As errors say."""
        return f"dictionary {self.name!r}" if self.name else "the dictionary"

    @property
    def dead(self) -> Tensor:
        """Boolean (n_encoders, d_sae)."""
        return self.silent > self.dead_after

    def arrays(self, given: Given) -> tuple[Tensor, Tensor]:
        """Rows in and out on the dictionary's device and in its dtype, scaled."""
        x, y = given if isinstance(given, tuple) else (given, given)
        device, dtype = self.coder.device, self.coder.dtype
        rows = x.to(device, dtype, non_blocking=True) * self.scale_in
        if y is x:
            return rows, rows
        return rows, y.to(device, dtype, non_blocking=True) * self.scale_out

    @torch.no_grad()
    def begin(self, first: Sequence[Given]) -> None:
        """Start from the first rows: scale, and for a fresh dictionary biases and directions.

        Fresh is one whose ``b_dec`` is 0. ``b_dec`` becomes the center of what is to be written,
        ``b_enc`` what takes the center of the rows off where the dictionary does not subtract it.
        A dictionary that normalizes each row is left as it is; one that is not fresh becomes the
        same dictionary of the scaled rows.

        Raises
        ------
        ValueError
            Rows that are not finite, or all alike; nothing has been changed.
        """
        pairs = [self.arrays(given) for given in first]
        x, y = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        self._check(x, y)
        if self.unit_norm:
            self._to_unit_norm()
        if all(encoder.normalization == "none" for encoder in self.encoders):
            paired = any(isinstance(given, tuple) for given in first)
            into = self._center(x)
            out = self._center(y) if paired else into
            if self.config.normalize:
                self.scale_in = self.together.mean(_to_root_width(x - into))
                self.scale_out = self.scale_in
                if paired:
                    self.scale_out = self.together.mean(_to_root_width(y - out))
            if not self.fresh:
                self._fold(1 / self.scale_in, 1 / self.scale_out)
            elif self.config.center != "keep":
                x, into = x * self.scale_in, into * self.scale_in
                y, out = y * self.scale_out, out * self.scale_out
                self._turn_to_rows(x - into, y - out)
                self._begin_biases(into, out)
                if self.encoders[0].nonlinearity.chooses:
                    self._fit_encoder(x, y)
        self.together.broadcast([p.data for p in self.coder.parameters()])
        self.together.broadcast(self.coder.buffers())

    def _check(self, x: Tensor, y: Tensor) -> None:
        for what, rows in (("reads", x), ("writes", y)):
            require_finite(rows.flatten(1), f"what {self.called} {what}")
        if bool((y == y[:1]).all()):
            raise ValueError(
                f"the {len(y)} first rows that {self.called} is to write are all alike; "
                "give rows that differ."
            )

    def _turn_to_rows(self, x: Tensor, y: Tensor) -> None:
        """Turn latents toward rows, each to another as far as there are, and keep their lengths."""
        share = self.config.from_rows
        draw = generator(self.config.random_state)
        for i, encoder in enumerate(self.encoders):
            layers = isinstance(self.coder, CrossLayerTranscoder)
            read = x[:, i] if layers else x.flatten(1)
            wrote = y[:, i:].flatten(1)
            n_turned = min(len(read), encoder.d_sae)  # two latents of one row would compete
            chosen = torch.randperm(len(read), generator=draw)[:n_turned].to(x.device)
            for weight, rows in ((encoder.encoder, read), (encoder.decoder, wrote)):
                length = weight[:n_turned].norm(dim=1, keepdim=True)
                turned = share * normalize(rows[chosen], dim=1)
                turned += (1 - share) * normalize(weight[:n_turned], dim=1)
                weight[:n_turned] = length * normalize(turned, dim=1)
        self.coder.constrain()

    def _fit_encoder(self, x: Tensor, y: Tensor) -> None:
        """Stretch the encoders so that the first outputs are of the size that fits best.

        Outputs less ``b_dec`` grow with the encoder and ``b_enc``; the factor is that of least
        squares. The decoder's transpose would overshoot: the latents that fire overlap.
        """
        coder, x, y = self.coder, x[:1024], y[:1024]
        buffers = [buffer.clone() for buffer in coder.buffers()]  # thresholds learn with each pass
        bias = coder.b_dec.reshape(y.shape[1:])
        wrote = coder(x) - bias
        for buffer, value in zip(coder.buffers(), buffers, strict=True):
            buffer.copy_(value)
        factor = ((y - bias) * wrote).sum() / wrote.square().sum().clamp(min=1e-30)
        if 0.05 < float(factor) < 1:
            for encoder in self.encoders:
                encoder.encoder.mul_(factor)
                encoder.b_enc.mul_(factor)

    def _center(self, rows: Tensor) -> Tensor:
        """Of each stream its own."""
        if self.config.center == "mean":
            return rows.mean(0)
        if rows.ndim == 2:
            return geometric_median(rows)
        return torch.stack([geometric_median(stream) for stream in rows.unbind(1)])

    def _begin_biases(self, into: Tensor, out: Tensor) -> None:
        self.coder.b_dec.copy_(out.reshape(self.coder.b_dec.shape))
        layers = isinstance(self.coder, CrossLayerTranscoder)
        for i, encoder in enumerate(self.encoders):
            if not (encoder.centered or encoder.b_in is not None or encoder.b_enc.any()):
                encoder.b_enc.sub_(encoder.encoder @ (into[i] if layers else into.flatten()))

    def step(self, given: Given, step: int) -> None:
        """One update; ``step`` counts from 0.

        Raises
        ------
        FloatingPointError
            The loss or its gradient is not finite; the weights are as before the step.
        """
        if self.k is not None:
            self._set_k(self.config.k_at(step, self.n_steps, self.k))
        x, y = self.arrays(given)
        dead = [row.nonzero()[:, 0] for row in self.dead]
        weight = self.config.coefficient(step, self.n_steps, self.criterion.penalty)
        judged = self.criterion(x, y, dead, weight)
        self.optimizer.zero_grad()
        judged.loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.together.average(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm + self.together.mean(judged.loss.detach()))):
            raise FloatingPointError(
                f"{self.called}, step {step}: the loss is {judged.loss.item():g}, its "
                f"gradient's norm {float(norm):g}. The weights are those before this step. Lower "
                "lr, or remove rows that are not finite."
            )
        if self.config.clip is not None and float(norm) > self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        if self.unit_norm:
            self._remove_parallel()
        self.optimizer.param_groups[0]["lr"] = self.config.rate(
            step, self.n_steps, self.coder.d_sae
        )
        self.optimizer.step()
        if self.unit_norm:
            self._to_unit_norm()
        self.coder.constrain()
        self._count(judged, len(x))
        every = self.config.resample_every
        if every and (step + 1) % every == 0 and step + 1 < self.n_steps:
            self.resample(x, y, step)

    @torch.no_grad()
    def _count(self, judged: Judged, n_rows: int) -> None:
        fired = torch.stack([part.fired for part in judged.parts]).to(torch.int64)
        fired = self.together.total(fired) > 0
        self.silent += n_rows * self.together.world
        self.silent.masked_fill_(fired, 0)
        self.together.average(b for b in self.coder.buffers() if b.is_floating_point())
        n_fired = torch.stack([part.n_fired for part in judged.parts]).sum()
        l0 = n_fired / (n_rows * len(judged.parts))
        self.sums += torch.stack([judged.loss.detach(), judged.fvu, l0]).to(self.sums)
        self.n_summed += 1

    def measure(self, step: int, n_tokens: int) -> Measured:
        """Means since the last measurement; begins anew."""
        loss, fvu, l0 = (self.together.mean(self.sums) / max(self.n_summed, 1)).tolist()
        self.sums.zero_()
        self.n_summed = 0
        dead = float(self.dead.double().mean())
        return Measured(self.name, step, n_tokens, loss, fvu, l0, dead)

    def _set_k(self, k: int) -> None:
        for encoder in self.encoders:
            encoder.nonlinearity.k = k  # type: ignore[assignment]

    def _of_unit_norm(self) -> bool:
        norms = torch.cat([encoder.decoder.detach().norm(dim=1) for encoder in self.encoders])
        return bool(((norms - 1).abs() < 1e-3).all())

    @torch.no_grad()
    def _to_unit_norm(self) -> None:
        for encoder in self.encoders:
            norm = encoder.decoder.norm(dim=1, keepdim=True)
            encoder.decoder.div_(norm.clamp(min=torch.finfo(norm.dtype).tiny))

    @torch.no_grad()
    def _remove_parallel(self) -> None:
        """Take from the gradient what would only change the lengths of the decoder's rows."""
        for encoder in self.encoders:
            if (gradient := encoder.decoder.grad) is not None:
                along = torch.linalg.vecdot(gradient, encoder.decoder)
                gradient.addcmul_(encoder.decoder, along[:, None], value=-1)

    @torch.no_grad()
    def resample(self, x: Tensor, y: Tensor, step: int) -> None:
        """Point dead latents at rows that are badly rebuilt, and forget their moments.

        Rows are drawn in proportion to the square of their error. A latent's decoder becomes the
        row's direction, its encoder the same at a fifth of the mean length of the living.

        References
        ----------
        Bricken et al. (2023), Towards monosemanticity, appendix on training.
        """
        draw = generator((self.config.random_state * 1_000_003 + step) % 2**63)
        none = [torch.empty(0, dtype=torch.int64) for _ in self.encoders]
        parts = self.criterion(x, y, none, 0.0).parts
        out = self.criterion.decoded(parts)
        for i, (part, dead) in enumerate(zip(parts, self.dead, strict=True)):
            few = dead.nonzero()[:, 0]
            if len(few) == 0:
                continue
            encoder = part.coder
            error = (y - out)[:, i:].flatten(1).square().sum(1)
            chosen = torch.multinomial(
                error.square().double().cpu() + 1e-300, len(few), replacement=True, generator=draw
            ).to(x.device)
            read = encoder.read(encoder.scaled(part.rows).rows)[chosen]
            wrote = part.relative(part.target)[chosen] - encoder.b_dec
            living = encoder.encoder[~dead].norm(dim=1)
            length = 0.2 * (living.mean() if len(living) else 1.0)
            encoder.encoder[few] = length * normalize(read, dim=1)
            encoder.decoder[few] = normalize(wrote, dim=1)
            encoder.b_enc[few] = 0
            for parameter in (encoder.encoder, encoder.decoder, encoder.b_enc):
                for name in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][name][few] = 0
            self.silent[i, few] = 0
        self.coder.constrain()
        self.together.broadcast([p.data for p in self.parameters])

    def leave(self) -> None:
        """The dictionary with its own k, in evaluation mode."""
        if self.k is not None:
            self._set_k(self.k)
        self.coder.eval()

    @torch.no_grad()
    def fold(self) -> None:
        """Make it a dictionary of rows that are not scaled."""
        self._fold(self.scale_in, self.scale_out)

    @torch.no_grad()
    def _fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        if bool((scale_in == 1).all()) and bool((scale_out == 1).all()):
            return
        if isinstance(self.coder, CrossLayerTranscoder | Crosscoder):
            self.coder.fold_scale(scale_in.flatten(), scale_out.flatten())
        else:
            self.coder.fold_scale(float(scale_in), float(scale_out))

    def state(self) -> dict[str, Tensor]:
        """Everything that a training goes on from, by name."""
        found = {f"weights/{name}": value for name, value in self.coder.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"moments/{i}/{name}": value for name, value in moments.items()}
        for name in ("silent", "sums", "scale_in", "scale_out"):
            found[name] = getattr(self, name)
        found["unit_norm"] = torch.tensor(self.unit_norm)
        return found | {"n_summed": torch.tensor(self.n_summed)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take on what :meth:`state` gave."""
        weights = {n.removeprefix("weights/"): v for n, v in state.items() if n[:8] == "weights/"}
        self.coder.load_state_dict(weights)
        moments: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            if name.startswith("moments/"):
                _, i, kind = name.split("/")
                moments.setdefault(int(i), {})[kind] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for name in ("silent", "sums", "scale_in", "scale_out"):
            setattr(self, name, state[name].to(self.coder.device))
        self.n_summed = int(state["n_summed"])
        self.unit_norm = bool(state["unit_norm"])


def _to_root_width(rows: Tensor) -> Tensor:
    """Factor that brings the rows' mean norm to ``sqrt(d)``: (1,), or (n_streams, 1)."""
    norm = rows.norm(dim=-1, keepdim=True).mean(0)
    return rows.shape[-1] ** 0.5 / norm.clamp(min=torch.finfo(rows.dtype).tiny)


def geometric_median(rows: Tensor, *, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """Point of least summed distance to the rows (n, d), by Weiszfeld's iteration: (d,)."""
    middle = rows.mean(0)
    scale = (rows - middle).norm(dim=1).mean()
    for _ in range(max_iter):
        weight = 1 / (rows - middle).norm(dim=1).clamp(min=float(scale) * 1e-6 + 1e-30)
        moved = (rows * weight[:, None]).sum(0) / weight.sum()
        if bool((moved - middle).norm() <= tol * scale):
            return moved
        middle = moved
    return middle
