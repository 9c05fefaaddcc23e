"""Write an affine edit into the weights: a model without hooks that answers the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.sites import (
    Decoder,
    find_decoder,
    resolve_site,
    site_names,
)
from manifold_unlearn.arrays import require_finite
from manifold_unlearn.intervene.hooked_bake import LeastSquares
from manifold_unlearn.intervene.hooks import STREAM, expand_stream, is_intervened
from manifold_unlearn.intervene.linear import SiteLinear, linear_at
from manifold_unlearn.intervene.maps import AffineSiteMap, SiteMap, affine_parts, is_affine


def is_bakeable(model: nn.Module, site: str, site_map: AffineSiteMap | None = None) -> bool:
    """Whether :func:`bake` can write a map at this site into the weights exactly.

    Parameters
    ----------
    model : torch.nn.Module
    site : str
        A site that exists, or ``"stream"``.
    site_map : AffineSiteMap, optional
        With it, the answer also minds whether the architecture has room for its bias.

    Raises
    ------
    ValueError
        The site does not exist, or the map is not affine or not fitted.
    """
    if site == STREAM:
        return not find_decoder(model).normalizes_writes
    resolve_site(model, site)
    if site == "embed":
        return True
    linear = linear_at(model, site)
    if linear is None:
        return False
    if site_map is None or not bool(affine_parts(site_map, site)[1].any()):
        return True
    return linear.module.bias is not None or _biased_config(model, linear.path) is not None


def bake(
    model: nn.Module,
    site_maps: Mapping[str, SiteMap | AffineSiteMap],
    *,
    least_squares: LeastSquares | None = None,
) -> Any:
    """Model whose weights do what :func:`intervene` does with these maps on all tokens.

    Exact where a linear map writes or reads the site: ``layers.i.mlp`` and ``layers.i.attn``
    (their output matrices ``W -> M W``), ``layers.i.mlp.hidden`` (``W -> W M``), ``embed`` (the
    tables; tied output embeddings are untied first), the path of any linear module, and
    ``"stream"`` (all writers together). A bias goes where the architecture has one to save;
    ``mlp_bias`` or ``attention_bias`` is set in the configuration where needed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    site_maps : mapping of str to AffineSiteMap
        Objects with ``matrix_ (d, d)`` and ``bias_ (d,)``; with ``least_squares`` any map.
    least_squares : LeastSquares, optional
        Where a site or a map has no exact weight edit, come as close to the hooked model as the
        output matrices of the blocks can, instead of refusing. Its ``bake`` method also says how
        close that is. Not asked where all maps bake exactly.

    Returns
    -------
    transformers.PreTrainedModel
        An edited copy; ``model`` is never touched. ``save_pretrained`` writes it and plain
        transformers loads it.

    Raises
    ------
    ValueError
        A site that has no exact weight edit (names those that have), a map that is not affine or
        of another width, a bias for which the architecture has no parameter, an edited weight
        that overflows the model's dtype.
    RuntimeError
        An :func:`intervene` block is open on the model.
    """
    if not site_maps:
        raise ValueError("site_maps is empty; give at least one site with its map.")
    if is_intervened(model):
        raise RuntimeError("the model is being intervened on; leave the with block, then bake.")
    if least_squares is not None and not all(
        is_affine(m) and is_bakeable(model, name) for name, m in site_maps.items()
    ):
        return least_squares.bake(model, site_maps).model
    for name in site_maps:
        if not is_bakeable(model, name):
            raise ValueError(_not_bakeable(model, name))
    parts = {n: affine_parts(m, n) for n, m in expand_stream(model, site_maps).items()}
    config_fields = _fields_for_biases(model, parts)
    _check_widths(model, parts)
    edited = copy.deepcopy(model)
    _enable_biases(edited, config_fields)
    for name, (matrix, bias) in parts.items():
        if name == "embed":
            _bake_embedding(find_decoder(edited), edited, matrix, bias)
        else:
            linear = linear_at(edited, name)
            assert linear is not None
            if linear.module is _output_embeddings(edited):
                _untie(edited)
            _bake_linear(linear, matrix, bias)
    for path, weight in edited.named_parameters():
        require_finite(weight.detach(), f"the baked weight {path}")
    return edited


def _not_bakeable(model: nn.Module, name: str) -> str:
    bakeable = [n for n in site_names(model) if is_bakeable(model, n)]
    near = [n for n in bakeable if n.startswith(name + ".")] or bakeable[:4]
    return (
        f"site {name!r} has no exact weight edit: no single linear map writes or reads it. "
        f"Bakeable are 'embed', 'layers.i.attn', 'layers.i.mlp', 'layers.i.mlp.hidden' and "
        f"'stream'; here {', '.join(near)}. Fit the map there, keep it as a hook, or "
        "ask for the nearest weights: bake(..., least_squares=LeastSquares(...))."
    )


def _check_widths(model: nn.Module, parts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (matrix, _) in parts.items():
        if name == "embed":
            width = find_decoder(model).tables[0].weight.shape[1]
        else:
            linear = linear_at(model, name)
            assert linear is not None
            width = linear.width
        if matrix.shape[0] != width:
            raise ValueError(
                f"the map at {name!r} was fitted for width {matrix.shape[0]}; the site has width "
                f"{width}. Fit it on activations of this site."
            )


def _bake_linear(linear: SiteLinear, matrix: Tensor, bias: Tensor) -> None:
    module: Any = linear.module
    old = module.bias.detach().to("cpu", torch.float64) if module.bias is not None else None
    if linear.role == "writes":
        weight = matrix @ linear.weight
        new_bias = bias if old is None else matrix @ old + bias
    else:
        weight = linear.weight @ matrix
        shift = linear.weight @ bias
        new_bias = shift if old is None else old + shift
    linear.write(weight)
    if module.bias is not None:
        with torch.no_grad():
            module.bias.copy_(new_bias)


def _output_embeddings(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _untie(model: Any) -> None:
    """Give the output embeddings a matrix of their own, if they share the token table."""
    output = _output_embeddings(model)
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _bake_embedding(decoder: Decoder, model: Any, matrix: Tensor, bias: Tensor) -> None:
    _untie(model)
    first = decoder.tables[0]
    scale = float(getattr(first, "embed_scale", 1.0))
    with torch.no_grad():
        for table in decoder.tables:
            rows = table.weight.detach().to("cpu", torch.float64) @ matrix.T
            table.weight.copy_(rows + bias / scale if table is first else rows)


def _fields_for_biases(
    model: nn.Module, parts: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, nn.Module]:
    """Configuration fields to set so that every bias has a parameter, with a model built so."""
    fields: dict[str, nn.Module] = {}
    for name, (_, bias) in parts.items():
        if name == "embed" or not bias.any():
            continue
        linear = linear_at(model, name)
        assert linear is not None
        if linear.module.bias is not None:
            continue
        found = _biased_config(model, linear.path)
        if found is None:
            raise ValueError(
                f"the map at {name!r} has a bias, and {type(model).__name__} has no parameter to "
                f"keep it in ({linear.path}.bias cannot be configured). Fit with affine=False, or "
                "keep the map as a hook."
            )
        fields[found[0]] = found[1]
    return fields


def _biased_config(model: Any, path: str) -> tuple[str, nn.Module] | None:
    """Configuration field that gives the linear module at ``path`` a bias, with a meta twin."""
    config = getattr(model, "config", None)
    for field in ("mlp_bias", "attention_bias"):
        if config is None or getattr(config, field, None) is not False:
            continue
        trial = copy.deepcopy(config)
        setattr(trial, field, True)
        with torch.device("meta"):
            twin = type(model)(trial)
        if twin.get_submodule(path).bias is not None:
            return field, twin
    return None


def _enable_biases(model: Any, fields: Mapping[str, nn.Module]) -> None:
    """Set the fields, and give every linear module that then has a bias one of zeros."""
    for field, twin in fields.items():
        setattr(model.config, field, True)
        for path, planned in twin.named_modules():
            module: Any = model.get_submodule(path)
            if getattr(planned, "bias", None) is not None and module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(planned.bias.shape))
