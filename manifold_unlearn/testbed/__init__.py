"""Models and facts to try methods on."""

from manifold_unlearn.testbed.backdoor import (
    Backdoor,
)
from manifold_unlearn.testbed.models import (
    Testbed,
    load_testbed,
)
from manifold_unlearn.testbed.world import (
    FictionalWorld,
)

__all__ = [
    "Backdoor",
    "FictionalWorld",
    "Testbed",
    "load_testbed",
]
