"""The difference of two models as a low-rank adapter that peft loads onto the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from manifold_unlearn.artifact import replacing


@dataclass(frozen=True)
class LoraExport:
    """An adapter on disk, and what of the difference it holds."""

    directory: Path
    rank: int
    """Of the adapter of every module"""
    kept_energy: dict[str, float]
    """By module path: share of the squared Frobenius norm of its weight's change that the adapter
    has, 0 to 1"""


def export_lora(original: Any, edited: Any, rank: int, directory: str | Path) -> LoraExport:
    """Write what a bake changed as a LoRA adapter: factors of the truncated SVD of each change.

    ``peft.PeftModel.from_pretrained(original, directory)`` then answers as ``edited`` does, up to
    the energy left out and the rounding of the factors (float32).

    Parameters
    ----------
    original, edited : transformers.PreTrainedModel
        Of one architecture; only weights of linear modules may differ. Neither is touched.
    rank : int
        Of every module's adapter; a change of lower rank is held exactly.
    directory : str or path
        Written whole or not at all; what was there is replaced.

    Returns
    -------
    LoraExport

    Raises
    ------
    ValueError
        Models that are alike, of other shapes or parameters, or that differ in a parameter that no
        adapter of a linear module can hold (a bias, a norm, an embedding); a rank below 1.
    ImportError
        peft is not installed.

    References
    ----------
    Hu et al. (2022), LoRA, arXiv 2106.09685; Eckart and Young (1936) for the truncation.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'manifold-unlearn[lora]'") from error
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    changes = _changes(original, edited)
    rank = min(rank, max(min(change.shape) for change, _ in changes.values()))
    tensors: dict[str, Tensor] = {}
    kept = {}
    for path, (change, _) in changes.items():
        down, up, kept[path] = truncated(change, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down.float().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.float().contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(changes),
        fan_in_fan_out=any(transposed for _, transposed in changes.values()),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=getattr(original, "name_or_path", None) or None,
    )
    directory = Path(directory)
    with replacing(directory) as staged:
        staged.mkdir()
        save_file(tensors, staged / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(staged)
    return LoraExport(directory, rank, kept)


def truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best factors of a rank, and the share of the energy that they keep.

    Parameters
    ----------
    change : float64 Tensor of shape (d_out, d_in)
    rank : int
        Where the matrix has less, the factors are filled with zeros.

    Returns
    -------
    (Tensor of shape (rank, d_in), Tensor of shape (d_out, rank), float)
        Each factor has the square roots of the singular values.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    kept = float(s[:rank].square().sum() / s.square().sum())
    root = s[:rank].sqrt()
    down, up = root[:, None] * vh[:rank], u[:, :rank] * root
    short = rank - len(root)
    if short > 0:
        down = torch.nn.functional.pad(down, (0, 0, 0, short))
        up = torch.nn.functional.pad(up, (0, short))
    return down, up, kept


def _changes(original: Any, edited: Any) -> dict[str, tuple[Tensor, bool]]:
    """By module path the change ``(d_out, d_in)``, float64, and whether it is stored ``.T``."""
    before, after = dict(original.named_parameters()), dict(edited.named_parameters())
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(
            f"the models have not the same parameters: {', '.join(odd[:3])}. Export against the "
            "model that was edited, and bake without biases that it does not have."
        )
    found = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise ValueError(
                f"{name} is {tuple(old.shape)} in one, {tuple(new.shape)} in the other."
            )
        change = new.detach().to("cpu", torch.float64) - old.detach().to("cpu", torch.float64)
        if not bool(change.any()):
            continue
        path, _, kind = name.rpartition(".")
        module = original.get_submodule(path)
        transposed = type(module).__name__ == "Conv1D"
        if kind != "weight" or not (isinstance(module, nn.Linear) or transposed):
            raise ValueError(
                f"{name} differs, and an adapter holds changes of linear modules' weights only; "
                "save the edited model whole."
            )
        found[path] = (change.T if transposed else change, transposed)
    if not found:
        raise ValueError("the models are alike; there is no change to export.")
    return found
