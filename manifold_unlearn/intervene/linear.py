"""The linear module that writes or reads a site, whatever the architecture calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.sites import find_decoder, resolve_site


@dataclass(frozen=True)
class SiteLinear:
    """A linear module that writes a site, or reads it."""

    module: nn.Module
    path: str
    role: Literal["writes", "reads"]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``(d_in, d_out)``, as in GPT-2's Conv1D."""
        return type(self.module).__name__ == "Conv1D"

    @property
    def width(self) -> int:
        """Width of the site."""
        d_out, d_in = self.weight.shape
        return d_out if self.role == "writes" else d_in

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), float64 on the CPU."""
        return self.weight_as("cpu")

    def weight_as(self, device: torch.device | str) -> Tensor:
        """Return the weight ``(d_out, d_in)`` in float64 on a device."""
        stored: Tensor = self.module.weight.detach().to(device, torch.float64)  # type: ignore
        return stored.T if self.transposed else stored

    def write(self, weight: Tensor) -> None:
        """Store ``(d_out, d_in)`` in the module's own layout, dtype and device."""
        stored: Tensor = self.module.weight  # type: ignore
        with torch.no_grad():
            stored.copy_(weight.T if self.transposed else weight)


def linear_at(model: nn.Module, name: str) -> SiteLinear | None:
    """Linear module behind a site, or None where there is none.

    Parameters
    ----------
    model : torch.nn.Module
    name : str
        ``layers.i.attn`` and ``layers.i.mlp`` mean their output matrices, ``layers.i.mlp.hidden``
        the matrix that reads it; any path of a linear module means that module.

    Raises
    ------
    ValueError
        The site does not exist.
    """
    site = resolve_site(model, name)
    role: Literal["writes", "reads"] = "writes" if site.reads == "output" else "reads"
    module = site.module
    if name.startswith("layers."):
        layout = find_decoder(model).layout
        for part, out in ((".attn", layout.attn_out), (".mlp", layout.mlp_out)):
            if name.endswith(part):
                module = getattr(module, out)
    weight = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    if not is_linear or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    path = next(path for path, candidate in model.named_modules() if candidate is module)
    return SiteLinear(module, path, role)
