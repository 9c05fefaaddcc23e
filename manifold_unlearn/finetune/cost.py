"""What a run costs, counted the same way for every method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Cost:
    """Floating-point operations; filled when the block that counts them ends."""

    flops: int = 0


@contextmanager
def counted() -> Iterator[Cost]:
    """Count the floating-point operations of all matrix products in the block, gradients included.

    A product of ``(m, k)`` by ``(k, n)`` counts as ``2 m k n``; a forward pass of a model comes to
    about twice its weights a token, a backward pass to twice as much as the forward pass. Attention
    in a fused kernel counts on a GPU only. Counting takes time: do not take seconds in the same
    run.

    Yields
    ------
    Cost

    Examples
    --------
    >>> with counted() as cost:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> cost.flops
    48
    """
    from torch.utils.flop_counter import FlopCounterMode

    cost = Cost()
    with FlopCounterMode(display=False) as counter:
        try:
            yield cost
        finally:
            cost.flops = int(counter.get_total_flops())
