"""The package's own format: what ``save`` of any dictionary writes."""

from __future__ import annotations

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.crosscoder import Crosscoder
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.source import Coder, Family, Source, Which
from manifold_unlearn.dictionary.transcoder import Transcoder

_KINDS: dict[str, type[SparseCoder] | type[CrossLayerTranscoder]] = {
    kind.kind: kind
    for kind in (SparseCoder, SparseAutoencoder, Transcoder, Crosscoder, CrossLayerTranscoder)
}


def _recognizes(source: Source) -> bool:
    return source.has("artifact.json")


def _read(source: Source, _: Which) -> Coder:
    kind = artifact.load(source.directory)[2]
    if kind not in _KINDS:
        raise DictionaryFormatError(
            f"{source} holds a {kind}, not one of {', '.join(_KINDS)}; load it with that class."
        )
    try:
        return _KINDS[kind].load(source.directory).eval()
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise DictionaryFormatError(
            f"{source.at('artifact.json')} does not describe the weights beside it ({error!r}); "
            "restore it."
        ) from error


FAMILY = Family("own", "artifact.json, tensors.safetensors", _recognizes, _read)
