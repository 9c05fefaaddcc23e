"""Sparse dictionaries of every public format, in and out."""

from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.loading import FORMATS, load, save
from manifold_unlearn.dictionary.formats.saelens_writing import fold_encoder_bias

__all__ = ["FORMATS", "DictionaryFormatError", "fold_encoder_bias", "load", "save"]
