"""The evidence that sequences have gathered, kept beside their keys and values in the KV cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from manifold_unlearn.arrays import working_dtype


class EvidenceTrace:
    """Evidence after every token that a cache holds, as one more layer of that cache.

    It follows the sequences because a cache takes its layers along: beams that are reordered,
    sequences that are repeated or selected, a reset, a deep copy. Tokens cropped away are left out
    when the next pass begins, by the length that the cache then has.

    Parameters
    ----------
    beside : transformers cache layer
        A layer of the cache; the trace passes for one of its kind.
    """

    keys = values = None
    is_initialized = is_croppable = True
    supports_early_init = False

    def __init__(self, beside: Any) -> None:
        self.is_sliding = getattr(beside, "is_sliding", False)
        self.is_compileable = getattr(beside, "is_compileable", False)
        # a cache of fixed size is never cropped, and its tensors keep their addresses
        self.only_last = getattr(beside, "max_cache_len", None) is not None
        self.evidence: dict[int, Tensor] = {}

    def start(self, key: int, past: int | Tensor) -> Tensor | None:
        """Evidence ``(batch, ...)`` after the first ``past`` tokens; None if it is not known."""
        known = self.evidence.get(key)
        if known is None:
            return None
        if self.only_last:
            return known[:, -1] * (past > 0)
        assert isinstance(past, int)
        return known[:, past - 1] if known.shape[1] >= past else None

    def extend(self, key: int, past: int | Tensor, evidence: Tensor) -> None:
        """Add the evidence ``(batch, length, ...)`` after each token that follows ``past``."""
        known = self.evidence.get(key)
        if self.only_last:
            last = evidence[:, -1:]
            if known is None or known.shape != last.shape:
                self.evidence[key] = last.clone()
            else:
                known.copy_(last)
            return
        assert isinstance(past, int)
        kept = evidence[:, :0] if known is None else known[:, :past]
        unread = evidence.new_zeros(len(evidence), past - kept.shape[1], *evidence.shape[2:])
        self.evidence[key] = torch.cat([kept, unread, evidence], dim=1)

    def _each(self, act: Callable[[Tensor], Tensor]) -> None:
        self.evidence = {key: act(known) for key, known in self.evidence.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row the evidence of the beam it continues."""
        self._each(lambda known: known.index_select(0, beam_idx.to(known.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._each(lambda known: known.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self._each(lambda known: known[indices, ...])

    def reset(self) -> None:
        """Forget all sequences."""
        self.evidence = {}

    def crop(self, *_tokens: int) -> None:
        """Nothing: the next pass says how many tokens are left."""

    def offload(self) -> None:
        """Nothing: a number a token may stay where it is."""

    def prefetch(self) -> None:
        """Nothing."""

    def get_seq_length(self) -> int:
        """Tokens whose evidence is kept."""
        return max((known.shape[1] for known in self.evidence.values()), default=0)

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions


class ForwardPass:
    """Where the forward pass now running stands in its sequences, and what they have gathered."""

    def __init__(self) -> None:
        self.past: int | Tensor = 0
        """Tokens in the cache before this pass; a tensor where the cache counts on the device."""
        self._mask: Any = None
        self._cache: Any = None
        self._packed = False
        self._gathered: dict[int, Tensor] = {}
        self._traced: WeakSet[Any] = WeakSet()

    def begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Take note of what the pass is given: a forward pre-hook of the decoder."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache is self._cache:
            self._keep(cache)  # of a pass that was cut short behind the sites, as capture does
        self._cache = cache
        past = self._cache.get_seq_length() if self._cache is not None else 0
        # a cache that counts on the device counts in place, while the pass runs
        self.past = past.clone() if isinstance(past, Tensor) else past
        self._mask = kwargs.get("attention_mask")
        self._packed = kwargs.get("cu_seq_lens_q") is not None
        self._gathered = {}

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Put the evidence of the pass into its cache: a forward hook of the decoder."""
        self._keep(_cache_of(output) if self._cache is None else self._cache)
        self._cache, self._gathered = None, {}

    def _keep(self, cache: Any) -> None:
        """Put what was gathered beside the keys and values of its tokens."""
        if cache is not None and self._gathered and _layers(cache):
            trace = _trace_of(cache)
            if trace is None:
                trace = EvidenceTrace(_layers(cache)[0])
                _layers(cache).append(trace)
            if not torch.compiler.is_compiling():
                self._traced.add(cache)
            for key, evidence in self._gathered.items():
                trace.extend(key, self.past, evidence)

    def present(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``(batch, length)`` of ``h`` that are not padding, and each sequence's first."""
        return _present(self._mask, self.past, h)

    def start(self, key: int, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Evidence ``(batch, *shape)`` before the first row of this pass.

        Raises
        ------
        ValueError
            Texts packed into one row, a cache of other sequences, or one without layers.

        Warns
        -----
        UserWarning
            The cache was filled where this map did not run: its tokens count as no evidence.
        """
        if self._packed:
            raise ValueError(
                "the pass has several texts packed into one row (cu_seq_lens_q): evidence cannot "
                "be told apart there. Use generate() instead of generate_batch(), one text a row."
            )
        trace = _trace_of(self._cache) if self._cache is not None else None
        fresh = isinstance(self.past, int) and self.past == 0
        start = None if trace is None or fresh else trace.start(key, self.past)
        if start is not None:
            if len(start) != len(h):
                raise ValueError(
                    f"the cache has the evidence of {len(start)} sequences; the pass has {len(h)}. "
                    "Repeat or select sequences by the methods of the cache."
                )
            return start.to(h.device)
        if isinstance(self.past, int) and self.past > 0:
            warnings.warn(
                f"the cache holds {self.past} tokens that passed before this intervene() block; "
                "they count as no evidence. Fill the cache inside the block.",
                stacklevel=2,
            )
        return h.new_zeros(len(h), *shape, dtype=working_dtype(h.dtype))

    def gather(self, key: int, evidence: Tensor) -> None:
        """Keep the evidence ``(batch, length, *shape)`` after every row of this pass."""
        self._gathered[key] = evidence.detach()

    def withdraw(self, keys: list[int]) -> None:
        """Take the evidence of these maps, and traces without any, out of the caches."""
        for cache in list(self._traced):
            trace = _trace_of(cache)
            if trace is not None:
                trace.evidence = {k: v for k, v in trace.evidence.items() if k not in keys}
                if not trace.evidence:
                    _layers(cache).remove(trace)


def _cache_of(output: Any) -> Any:
    """Cache in what a decoder answered, if there is one."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _layers(cache: Any) -> list[Any]:
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if not isinstance(layers, list):
        raise ValueError(
            f"the cache is a {type(cache).__name__} without a list of layers: evidence over a "
            "sequence cannot follow it. Use a DynamicCache or a StaticCache, or use_cache=False."
        )
    return layers


def _trace_of(cache: Any) -> EvidenceTrace | None:
    last = _layers(cache)[-1:]
    return last[0] if last and isinstance(last[0], EvidenceTrace) else None


def _present(mask: Any, past: int | Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a pass that are not padding, and first rows, by whatever mask the pass was given.

    In a mask ``(batch, 1, length, total)`` a row that attends to nothing is padding, and one that
    attends to a single token is the first. Padding on the right cannot be told from such a mask.
    """
    batch, length = h.shape[:2]
    if isinstance(mask, dict):  # one a kind of layer
        given = [part for part in mask.values() if part is not None]
        whole = mask.get("full_attention")
        mask = whole if whole is not None else next(iter(given), None)
    at = torch.arange(length, device=h.device) + past
    if mask is None:
        return h.new_ones(batch, length, dtype=torch.bool), (at == 0).expand(batch, length)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(
            f"attention_mask is {getattr(mask, 'shape', type(mask).__name__)}; evidence over a "
            "sequence needs one of shape (batch, total) or (batch, 1, length, total)."
        )
    mask = mask.to(h.device)
    if mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        reach = allowed[:, 0].sum(-1)
        return (reach > 0).expand(batch, length), (reach == 1).expand(batch, length)
    seen = mask != 0
    first = seen & (seen.cumsum(1) == 1)
    at = at.clamp(max=mask.shape[1] - 1) if mask.shape[1] > length else at - past
    return seen[:, at], first[:, at]
