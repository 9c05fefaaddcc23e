"""Results rendered: pictures and one HTML file."""

from manifold_unlearn.report.attacks import attack_curves, backdoor_table, jailbreak_table
from manifold_unlearn.report.dashboard import FeatureDashboard
from manifold_unlearn.report.dictionary import importance_scatter, place_cells, sparsity_frontier
from manifold_unlearn.report.embedding import embedding_scatter, geodesic_paths
from manifold_unlearn.report.geometry import bandwidth_curve, dimension_histogram, spectrum
from manifold_unlearn.report.html import Report
from manifold_unlearn.report.neuronpedia import (
    attribution_feature,
    neuronpedia_batch,
    neuronpedia_feature,
)
from manifold_unlearn.report.plots import (
    EmbeddingPanel,
    before_after_bars,
    embedding_by_site,
    item_slopes,
    separability_heatmap,
    tradeoff_curve,
)
from manifold_unlearn.report.steering import (
    dimension_by_layer,
    layer_position_heatmap,
    path_in_coordinates,
    probability_ribbons,
)

__all__ = [
    "EmbeddingPanel",
    "FeatureDashboard",
    "Report",
    "attack_curves",
    "attribution_feature",
    "backdoor_table",
    "bandwidth_curve",
    "before_after_bars",
    "dimension_by_layer",
    "dimension_histogram",
    "embedding_by_site",
    "embedding_scatter",
    "geodesic_paths",
    "importance_scatter",
    "item_slopes",
    "jailbreak_table",
    "layer_position_heatmap",
    "neuronpedia_batch",
    "neuronpedia_feature",
    "path_in_coordinates",
    "place_cells",
    "probability_ribbons",
    "separability_heatmap",
    "sparsity_frontier",
    "spectrum",
    "tradeoff_curve",
]
