"""A dictionary as SAEBench takes custom ones."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.formats.hooks import hook_of
from manifold_unlearn.dictionary.nonlinearity import Gated

ARCHITECTURES = {"relu": "standard", "abs_topk": "abstopk", "batch_topk": "batchtopk"}
"""Names there of the nonlinearities that have another here"""


@dataclass
class SAEBenchConfig:
    """The fields that SAEBench asks of ``sae.cfg``, by its names."""

    model_name: str
    """as TransformerLens knows it, such as ``"gemma-2-2b"``"""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    """such as ``"blocks.5.hook_resid_post"``"""
    context_size: int = 128
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = ""
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, without what SAEBench adds to a configuration as it loads it."""
        return asdict(self)


class SAEBenchAdapter:
    """An autoencoder with the methods and attributes that SAEBench asks of custom ones.

    Decoder rows have length 1, as it wants them: activations and encoder are scaled instead, so
    that the outputs stay. The dictionary is copied. Nothing of ``sae_bench`` is needed to make one;
    hand it to its evaluations as ``selected_saes=[("name", adapter)]``.

    Parameters
    ----------
    coder : SparseAutoencoder
        Without a normalization of rows and without hidden layers.
    model_name : str, optional
        As TransformerLens knows it. Default: ``coder.origin["model"]``.
    hook_name : str, optional
        As TransformerLens names it. Default: that of ``coder.origin["site"]``.
    context_size : int, default=128

    Attributes
    ----------
    W_enc : nn.Parameter of shape (d_in, d_sae)
    W_dec : nn.Parameter of shape (d_sae, d_in)
        Rows of length 1.
    b_enc : nn.Parameter of shape (d_sae,)
    b_dec : nn.Parameter of shape (d_in,)
    device, dtype
    cfg : SAEBenchConfig

    Raises
    ------
    ValueError
        No autoencoder, one that cannot decode without its input, a name that is missing, a hook
        outside of the blocks.

    References
    ----------
    Karvonen et al. (2025), SAEBench, arXiv 2503.09532; ``sae_bench/custom_saes``.

    Examples
    --------
    >>> from manifold_unlearn.dictionary import SparseAutoencoder
    >>> sae = SparseAutoencoder(16, 64, random_state=0)
    >>> adapter = SAEBenchAdapter(sae, model_name="gpt2", hook_name="blocks.5.hook_resid_post")
    >>> adapter.cfg.hook_layer, adapter.W_dec.shape
    (5, torch.Size([64, 16]))
    """

    def __init__(
        self,
        coder: SparseAutoencoder,
        *,
        model_name: str | None = None,
        hook_name: str | None = None,
        context_size: int = 128,
    ) -> None:
        _require_plain(coder)
        self._coder = copy.deepcopy(coder).eval().requires_grad_(False)
        site = coder.origin.get("site")
        hook = hook_name or (hook_of(site) if isinstance(site, str) else None)
        model = model_name or coder.origin.get("model")
        if not model or not hook:
            raise ValueError(
                f"model_name={model!r}, hook_name={hook!r}: the dictionary does not say where it "
                "is from; give both, such as 'gemma-2-2b' and 'blocks.5.hook_resid_post'."
            )
        block = re.match(r"blocks\.(\d+)\.", hook)
        if block is None:
            raise ValueError(
                f"hook_name={hook!r} is in no block of TransformerLens; give one such as "
                "'blocks.5.hook_resid_post'."
            )
        shape = coder.nonlinearity
        self.cfg = SAEBenchConfig(
            model_name=str(model),
            d_in=coder.d_in,
            d_sae=coder.d_sae,
            hook_layer=int(block[1]),
            hook_name=hook,
            context_size=context_size,
            architecture=ARCHITECTURES.get(shape.name, shape.name),
            apply_b_dec_to_input=coder.centered,
            activation_fn_str=ARCHITECTURES.get(shape.name, shape.name),
            activation_fn_kwargs={"k": shape.k} if hasattr(shape, "k") else {},
        )
        self._expose()

    def _expose(self) -> None:
        coder = self._coder
        norm = coder.decoder.norm(dim=1)
        self._norm = torch.where(norm > 0, norm, 1.0)

        def shown(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.contiguous(), requires_grad=False)

        self.W_enc = shown(coder.W_enc * self._norm)
        self.W_dec = shown(coder.W_dec / self._norm[:, None])
        self.b_enc, self.b_dec = shown(coder.b_enc * self._norm), shown(coder.b_dec)
        shape = coder.nonlinearity
        if isinstance(shape, Gated):  # asked for in place of b_enc
            gained = coder.b_enc * shape.log_gain.exp()
            self.b_mag = shown((gained + shape.magnitude_bias) * self._norm)
        self.device, self.dtype = coder.device, coder.dtype
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., d_sae) of rows (..., d_in)."""
        return self._coder.encode(x) * self._norm

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Rows (..., d_in) of activations (..., d_sae)."""
        return self._coder.decode(feature_acts / self._norm)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., d_in) made again."""
        return self.decode(self.encode(x))

    __call__ = forward

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device or a dtype, in place, as ``nn.Module.to`` does."""
        self._coder.to(*args, **kwargs)
        self._expose()
        return self

    def eval(self) -> Self:
        """As it is: it always is in evaluation mode."""
        return self

    def check_decoder_norms(self) -> bool:
        """Whether all decoder rows have length 1."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        norms = self.W_dec.float().norm(dim=1)
        return bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-2 if half else 1e-5))


def _require_plain(coder: SparseAutoencoder) -> None:
    if not isinstance(coder, SparseAutoencoder):
        raise ValueError(
            f"SAEBench takes what makes its own rows again; a {type(coder).__name__} does not."
        )
    if coder.normalization != "none" or coder.deep:
        raise ValueError(
            f"a dictionary with normalization={coder.normalization!r} and deep={coder.deep} is no "
            "sum of its decoder's rows by its activations alone, which SAEBench needs."
        )
