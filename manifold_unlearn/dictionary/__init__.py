"""Sparse dictionaries: autoencoders, transcoders, crosscoders, cross-layer transcoders."""

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.crosscoder import Crosscoder
from manifold_unlearn.dictionary.nonlinearity import make_nonlinearity
from manifold_unlearn.dictionary.settings import DictionaryTraining, Measured, TrainingHistory
from manifold_unlearn.dictionary.streams import (
    RowStream,
    stream_activations,
    stream_paired,
    stream_rows,
    stream_saved,
)
from manifold_unlearn.dictionary.train import train_dictionaries
from manifold_unlearn.dictionary.transcoder import Transcoder

__all__ = [
    "CrossLayerTranscoder",
    "Crosscoder",
    "DictionaryTraining",
    "Measured",
    "RowStream",
    "SparseAutoencoder",
    "SparseCode",
    "SparseCoder",
    "TrainingHistory",
    "Transcoder",
    "make_nonlinearity",
    "stream_activations",
    "stream_paired",
    "stream_rows",
    "stream_saved",
    "train_dictionaries",
]
