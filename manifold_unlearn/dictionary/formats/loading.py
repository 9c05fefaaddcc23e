"""One way in for every format, and one way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.formats import (
    circuit_tracer,
    crosscoders,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    linear_layers,
    llama_scope,
    openai,
    own,
    qwen_scope,
    saelens,
    sparsify,
    transcoder_circuits,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.saelens_writing import write_saelens
from manifold_unlearn.dictionary.formats.source import Coder, Family, Source
from manifold_unlearn.dictionary.formats.sparsify import write_sparsify

Writable: TypeAlias = Literal["saelens", "sparsify", "own"]

_FAMILIES = {
    family.name: family
    for family in (
        own.FAMILY,
        saelens.FAMILY,
        sparsify.FAMILY,
        dictionary_learning.FAMILY,
        gemma_scope.FAMILY,
        gemma_scope_2.FAMILY,
        llama_scope.FAMILY,
        qwen_scope.FAMILY,
        openai.FAMILY,
        transcoder_circuits.FAMILY,
        circuit_tracer.FAMILY,
        circuit_tracer.CROSS_LAYER,
        crosscoders.FAMILY,
        crosscoders.LEARNED,
        linear_layers.FAMILY,
    )
}
FORMATS = tuple(_FAMILIES)
"""Names of the formats that are read."""

_KEYWORDS = sorted({name for family in _FAMILIES.values() for name in family.takes})
_DEPTH, _MANY = 4, 5000  # levels of directories that are looked into, and how many at most


def load(path: str | Path, format: str = "auto", **which: Any) -> Coder:  # noqa: A002
    """Sparse dictionary of a local file or directory, of whatever library wrote it.

    No file runs code: ``.pt`` files are read by ``torch.load(weights_only=True)``, and where they
    hold a pickled configuration, by a machine that takes the pickle apart and calls nothing.

    Parameters
    ----------
    path : str or Path
        A directory, a file of weights, or a configuration. Of a directory of directories the one
        dictionary inside, if there is but one.
    format : str, default="auto"
        One of ``FORMATS``; "auto" looks at file names, names of tensors and configurations.
    **which
        ``layer``: of files that hold one layer each. ``step``: of the checkpoints of
        dictionary_learning; ``dict_class``: what its file does not say. ``k``: of Qwen Scope,
        where the path does not say it. ``scale``: of a crosscoder, a factor for each stream.

    Returns
    -------
    SparseAutoencoder, Transcoder, Crosscoder, SparseCoder or CrossLayerTranscoder
        In evaluation mode, with the dtype of the file. ``origin`` holds the format, our names of
        the sites it reads and writes, the model, and what the file said.

    Raises
    ------
    FileNotFoundError
        Nothing stands at the path, or a part of the dictionary is missing.
    DictionaryFormatError
        No format or several are recognized; the file is truncated, damaged, malicious, holds
        values that are not finite or shapes that do not fit; or it holds what cannot be expressed.
        A ``ValueError``.

    Examples
    --------
    >>> from manifold_unlearn.dictionary import SparseAutoencoder
    >>> from manifold_unlearn.dictionary.formats import load, save
    >>> import tempfile, os
    >>> place = os.path.join(tempfile.mkdtemp(), "sae")
    >>> save(SparseAutoencoder(4, 8, {"name": "topk", "k": 2}), place, format="sparsify")
    >>> load(place).nonlinearity.k
    2
    """
    if unknown := sorted(which.keys() - set(_KEYWORDS)):
        raise TypeError(f"load() takes {', '.join(_KEYWORDS)}; got {', '.join(unknown)}.")
    if format != "auto" and format not in _FAMILIES:
        raise ValueError(f"format={format!r} is not one of auto, {', '.join(FORMATS)}.")
    source = Source(path)
    with _understanding(source):
        family = _recognized(source) if format == "auto" else _FAMILIES[format]
        if family is None:
            return load(_inside(source), "auto", **which)
        if format != "auto" and not family.recognizes(source):
            raise DictionaryFormatError(
                f"{source} is not of the format {format} ({family.holds}); it holds "
                f"{_held(source)}."
            )
        if odd := sorted(which.keys() - set(family.takes)):
            raise ValueError(f"{source} is of the format {family.name}, without {', '.join(odd)}.")
        return family.read(source, which)


@contextmanager
def _understanding(source: Source) -> Iterator[None]:
    """A configuration may say anything: what no reader foresaw is the file's fault too."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise DictionaryFormatError(
            f"{source}: what it says does not fit together ({error!r}); it is damaged or of "
            "another format. Fetch it again, or give format=."
        ) from error


def _recognized(source: Source) -> Family | None:
    """The one format of a source; None where only its directories may have one."""
    found: list[Family] = []
    unread: DictionaryFormatError | None = None
    for family in _FAMILIES.values():
        try:
            found += [family] * family.recognizes(source)
        except DictionaryFormatError as error:  # of a file that may be of no dictionary
            unread = error
    if unread is not None and not found:
        raise unread
    if len(found) > 1:
        names = ", ".join(family.name for family in found)
        raise DictionaryFormatError(
            f"{source} may be of the formats {names}; give format= one of them. It holds "
            f"{_held(source)}."
        )
    return found[0] if found else None


def _inside(source: Source) -> Path:
    """The one dictionary in the directories of a source."""
    found: list[Path] = []
    level = [source.directory] if source.path.is_dir() else []
    for _ in range(_DEPTH):
        level = sorted(inner for outer in level for inner in outer.iterdir() if inner.is_dir())
        if len(level) > _MANY:
            raise DictionaryFormatError(
                f"{source} holds {len(level)} directories; give the path of a dictionary."
            )
        known = {inner for inner in level if _recognized(Source(inner)) is not None}
        found += sorted(known)
        level = [inner for inner in level if inner not in known]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(p.relative_to(source.directory)) for p in found[:20])
        raise DictionaryFormatError(
            f"{source} holds {len(found)} dictionaries ({listed}{', ...' * (len(found) > 20)}); "
            "give the path of one."
        )
    formats = "; ".join(f"{family.name} ({family.holds})" for family in _FAMILIES.values())
    raise DictionaryFormatError(
        f"{source} holds {_held(source)}: no format that is known. Those are {formats}."
    )


def _held(source: Source) -> str:
    return ", ".join(source.names[:12]) + ", ..." * (len(source.names) > 12) or "no files"


def save(coder: Coder, path: str | Path, format: Writable = "own") -> None:  # noqa: A002
    """Write a dictionary as a directory that ``load`` and the library of the format read.

    What comes back encodes and decodes to the same bits. A BatchTopK dictionary is written to
    SAELens as it writes its own: as JumpReLU with the learned threshold. Both files of SAELens
    and sparsify bear a digest in the metadata of the weights, which ``load`` verifies.

    Parameters
    ----------
    coder : SparseCoder or CrossLayerTranscoder
    path : str or Path
        Replaced as a whole if it holds such a dictionary.
    format : {"saelens", "sparsify", "own"}, default="own"

    Raises
    ------
    DictionaryFormatError
        The format cannot hold a part of the dictionary; the message names it.
    FileExistsError
        The directory holds something else.
    ValueError
        An unknown format.
    """
    if format == "own":
        path = Path(path)
        artifact.refuse_foreign(path)
        coder.save(path)
    elif format == "saelens":
        write_saelens(coder, path)
    elif format == "sparsify":
        write_sparsify(coder, path)
    else:
        raise ValueError(f"format={format!r} is not one of saelens, sparsify, own.")
