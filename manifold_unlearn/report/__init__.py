"""Results rendered: pictures and one HTML file."""

from manifold_unlearn.report.html import Report
from manifold_unlearn.report.plots import (
    EmbeddingPanel,
    before_after_bars,
    embedding_by_site,
    item_slopes,
    separability_heatmap,
    spectrum,
    tradeoff_curve,
)

__all__ = [
    "EmbeddingPanel",
    "Report",
    "before_after_bars",
    "embedding_by_site",
    "item_slopes",
    "separability_heatmap",
    "spectrum",
    "tradeoff_curve",
]
