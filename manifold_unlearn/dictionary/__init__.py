"""Sparse dictionaries: autoencoders, transcoders, crosscoders, cross-layer transcoders."""

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.constrained import DecoderSpanEraser
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.crosscoder import Crosscoder
from manifold_unlearn.dictionary.diff import (
    ModelDiff,
    ResidualKnowledge,
    diff_models,
    residual_knowledge,
)
from manifold_unlearn.dictionary.difference_lens import (
    ActivationDifference,
    activation_difference,
)
from manifold_unlearn.dictionary.feature_eraser import FeatureEraser
from manifold_unlearn.dictionary.formats import (
    FORMATS,
    DictionaryFormatError,
    load,
    save,
)
from manifold_unlearn.dictionary.guardrail import FeatureGuardrail
from manifold_unlearn.dictionary.latent_scaling import LatentScaling, measure_latent_scaling
from manifold_unlearn.dictionary.nonlinearity import make_nonlinearity
from manifold_unlearn.dictionary.settings import DictionaryTraining, Measured, TrainingHistory
from manifold_unlearn.dictionary.streams import (
    RowStream,
    stream_activations,
    stream_paired,
    stream_rows,
    stream_saved,
)
from manifold_unlearn.dictionary.suppress import Suppression, suppress_features
from manifold_unlearn.dictionary.train import train_dictionaries
from manifold_unlearn.dictionary.transcoder import Transcoder

__all__ = [
    "FORMATS",
    "ActivationDifference",
    "CrossLayerTranscoder",
    "Crosscoder",
    "DecoderSpanEraser",
    "DictionaryFormatError",
    "DictionaryTraining",
    "FeatureClamp",
    "FeatureEraser",
    "FeatureGuardrail",
    "LatentScaling",
    "Measured",
    "ModelDiff",
    "ResidualKnowledge",
    "RowStream",
    "SparseAutoencoder",
    "SparseCode",
    "SparseCoder",
    "Suppression",
    "TrainingHistory",
    "Transcoder",
    "activation_difference",
    "diff_models",
    "load",
    "make_nonlinearity",
    "measure_latent_scaling",
    "residual_knowledge",
    "save",
    "stream_activations",
    "stream_paired",
    "stream_rows",
    "stream_saved",
    "suppress_features",
    "train_dictionaries",
]
