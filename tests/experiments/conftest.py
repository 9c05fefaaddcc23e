"""Experiments as modules: they stand outside the package."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def experiment(request):
    """The script that the test's module names as ``SCRIPT``; its neighbors can be imported."""
    path = EXPERIMENTS / request.module.SCRIPT
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        for name, found in list(sys.modules.items()):
            if (getattr(found, "__file__", None) or "").startswith(str(EXPERIMENTS)):
                del sys.modules[name]
