"""Sparse dictionaries: autoencoders, transcoders, crosscoders, cross-layer transcoders."""

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.cards import FeatureCard, feature_cards
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.coding import code_rows, select_latents, select_rows
from manifold_unlearn.dictionary.constrained import DecoderSpanEraser
from manifold_unlearn.dictionary.contexts import Context, FeatureContexts, find_contexts
from manifold_unlearn.dictionary.corpus import CorpusCode, corpus_codes, stream_codes
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
from manifold_unlearn.dictionary.effects import LogitEffects, logit_effects
from manifold_unlearn.dictionary.feature_eraser import FeatureEraser
from manifold_unlearn.dictionary.formats import (
    FORMATS,
    DictionaryFormatError,
    fold_encoder_bias,
    load,
    save,
)
from manifold_unlearn.dictionary.geometry import (
    LatentClusters,
    cluster_reconstruction,
    decoder_coherence,
    duplicated_latents,
    latent_clusters,
)
from manifold_unlearn.dictionary.guardrail import FeatureGuardrail
from manifold_unlearn.dictionary.importance import (
    LatentImportance,
    latent_importance,
    latent_statistics,
)
from manifold_unlearn.dictionary.labels import LatentLabel, judged_labels, label_latents
from manifold_unlearn.dictionary.latent_scaling import LatentScaling, measure_latent_scaling
from manifold_unlearn.dictionary.nonlinearity import make_nonlinearity
from manifold_unlearn.dictionary.settings import DictionaryTraining, Measured, TrainingHistory
from manifold_unlearn.dictionary.spanning import SpanningLatents, spanning_latents
from manifold_unlearn.dictionary.streams import (
    RowStream,
    stream_activations,
    stream_paired,
    stream_rows,
    stream_saved,
)
from manifold_unlearn.dictionary.suppress import Suppression, suppress_features
from manifold_unlearn.dictionary.tiling import Tiling, tile_manifold
from manifold_unlearn.dictionary.train import train_dictionaries
from manifold_unlearn.dictionary.transcoder import Transcoder

__all__ = [
    "FORMATS",
    "ActivationDifference",
    "Context",
    "CorpusCode",
    "CrossLayerTranscoder",
    "Crosscoder",
    "DecoderSpanEraser",
    "DictionaryFormatError",
    "DictionaryTraining",
    "FeatureCard",
    "FeatureClamp",
    "FeatureContexts",
    "FeatureEraser",
    "FeatureGuardrail",
    "LatentClusters",
    "LatentImportance",
    "LatentLabel",
    "LatentScaling",
    "LogitEffects",
    "Measured",
    "ModelDiff",
    "ResidualKnowledge",
    "RowStream",
    "SpanningLatents",
    "SparseAutoencoder",
    "SparseCode",
    "SparseCoder",
    "Suppression",
    "Tiling",
    "TrainingHistory",
    "Transcoder",
    "activation_difference",
    "cluster_reconstruction",
    "code_rows",
    "corpus_codes",
    "decoder_coherence",
    "diff_models",
    "duplicated_latents",
    "feature_cards",
    "find_contexts",
    "fold_encoder_bias",
    "judged_labels",
    "label_latents",
    "latent_clusters",
    "latent_importance",
    "latent_statistics",
    "load",
    "logit_effects",
    "make_nonlinearity",
    "measure_latent_scaling",
    "residual_knowledge",
    "save",
    "select_latents",
    "select_rows",
    "spanning_latents",
    "stream_activations",
    "stream_codes",
    "stream_paired",
    "stream_rows",
    "stream_saved",
    "suppress_features",
    "tile_manifold",
    "train_dictionaries",
]
