"""How a hooked edit without an exact weight edit is baked all the same: by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifold_unlearn.activations.tokens import Text, TokenSelection
from manifold_unlearn.intervene.layer_edit import Writer
from manifold_unlearn.intervene.least_squares import BakeResult, least_squares_bake
from manifold_unlearn.intervene.maps import AffineSiteMap, SiteMap
from manifold_unlearn.intervene.targets import hooked_targets, token_rows


@dataclass(frozen=True)
class LeastSquares:
    """Texts and parameters with which :func:`bake` approximates maps that do not bake exactly.

    The model under the maps is the teacher on the ``forget`` texts; the ``retain`` texts are held.
    """

    tokenizer: Any
    forget: Sequence[Text]
    """Texts on which the maps act; those on which they do nothing drop out with a warning"""
    retain: Sequence[Text]
    where: TokenSelection | None = None
    """Tokens of the forget texts that shall come to the hooked states. Default: those that move"""
    layers: Sequence[int] | None = None
    """Blocks to edit. Default: all behind which the maps change a state"""
    ridge: float = 3.0
    null_space: float | None = None
    writers: Sequence[Writer] = ("mlp",)
    n_passes: int = 1
    damping: float = 1e-4

    def bake(self, model: Any, site_maps: Mapping[str, SiteMap | AffineSiteMap]) -> BakeResult:
        """Edited copy of a model that does without hooks what it does under these maps.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            Never touched.
        site_maps : mapping of str to SiteMap
            What :func:`intervene` takes.

        Raises
        ------
        ValueError, RuntimeError
            As :func:`~manifold_unlearn.intervene.targets.hooked_targets` and
            :func:`~manifold_unlearn.intervene.least_squares.least_squares_bake`.
        """
        targets = hooked_targets(
            model, self.tokenizer, self.forget, site_maps, layers=self.layers, where=self.where
        )
        return least_squares_bake(
            model,
            targets,
            token_rows(model, self.tokenizer, self.retain),
            ridge=self.ridge,
            null_space=self.null_space,
            writers=self.writers,
            n_passes=self.n_passes,
            damping=self.damping,
        )
