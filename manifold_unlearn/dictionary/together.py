"""Processes that train one dictionary together, where torch.distributed has been started."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Together:
    """The default process group, or one process alone: then nothing is done.

    Attributes
    ----------
    rank, world : int
    """

    def __init__(self) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.world = dist.get_world_size() if started else 1

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Mean over the processes, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.world

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.world == 1:
            return tensor
        found = tensor.clone()
        self.average([found])
        return found

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world == 1:
            return tensor
        found = tensor.clone()
        dist.all_reduce(found)
        return found

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """What process 0 holds, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def gather(self, numbers: tuple[int, ...], device: torch.device) -> list[list[int]]:
        """The numbers of each process, in order of rank."""
        mine = torch.tensor(numbers, device=device)
        if self.world == 1:
            return [mine.tolist()]
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [row.tolist() for row in found]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()
