"""Gradient unlearners: losses, one loop, and what protects the retain set."""

from manifold_unlearn.finetune.ascent import (
    WGA,
    GradDiff,
    GradientAscent,
    SatImp,
)
from manifold_unlearn.finetune.disentangle import (
    Disentangled,
)
from manifold_unlearn.finetune.distillation import (
    CEU,
    UNDIAL,
)
from manifold_unlearn.finetune.features import (
    FeatureSuppression,
)
from manifold_unlearn.finetune.objectives import (
    objective,
)
from manifold_unlearn.finetune.preference import (
    DPO,
    NPO,
    SimNPO,
)
from manifold_unlearn.finetune.remain import (
    SFRon,
)
from manifold_unlearn.finetune.representation import (
    RMU,
    AdaptiveRMU,
    CircuitBreaker,
)
from manifold_unlearn.finetune.train import (
    TrainConfig,
    TrainResult,
    fine_tune,
    train,
)
from manifold_unlearn.finetune.trainable import (
    LoRA,
)

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "RMU",
    "UNDIAL",
    "WGA",
    "AdaptiveRMU",
    "CircuitBreaker",
    "Disentangled",
    "FeatureSuppression",
    "GradDiff",
    "GradientAscent",
    "LoRA",
    "SFRon",
    "SatImp",
    "SimNPO",
    "TrainConfig",
    "TrainResult",
    "fine_tune",
    "objective",
    "train",
]
