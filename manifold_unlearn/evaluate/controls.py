"""Models whose verdict is known beforehand."""

from __future__ import annotations

import copy
from typing import Any

import torch

from manifold_unlearn.arrays import generator


def shuffled_weights(model: Any, random_state: int = 0) -> Any:
    """Return a copy of a model with the entries of every weight tensor in another order.

    It knows nothing, whatever a forget set says of it: an evaluation that does not call it
    destroyed takes ruin for forgetting.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is. Tensors that are tied stay tied.
    random_state : int, default=0

    Returns
    -------
    torch.nn.Module
        Of the same dtype, on the same device, with the same entries in each tensor.
    """
    made, draw = copy.deepcopy(model), generator(random_state)
    with torch.no_grad():
        for weight in made.parameters():
            order = torch.randperm(weight.numel(), generator=draw).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return made
