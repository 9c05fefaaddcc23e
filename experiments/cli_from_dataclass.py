"""Command-line flags from a frozen dataclass: one flag a field, its default the field's."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
RESULTS = Path(__file__).parent / "results"


def parse(presets: dict[str, Config], description: str | None) -> tuple[str, Config]:
    """Preset named by ``--preset``, with single fields replaced by their flags."""
    first = next(iter(presets.values()))
    assert is_dataclass(first)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    for field in fields(first):
        default = getattr(first, field.name, MISSING)
        many = isinstance(default, tuple)
        kind = type(default[0]) if many and default else str if many else type(default)
        parser.add_argument(
            "--" + field.name.replace("_", "-"), dest=field.name, type=kind,
            nargs="+" if many else None, default=None,
        )  # fmt: skip
    options = vars(parser.parse_args())
    name = options.pop("preset")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v is not None}
    chosen = presets[name]
    values = {f.name: given.get(f.name, getattr(chosen, f.name)) for f in fields(first)}
    return name, type(chosen)(**values)


def environment() -> dict[str, Any]:
    """Versions and hardware that a result was measured with."""
    import torch

    packages = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {p: metadata.version(p) for p in packages} | {"git": _revision()},
        "hardware": {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu},
    }


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _revision() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write(name: str, preset: str, result: dict[str, Any]) -> Path:
    """``results/NAME/PRESET.json``: a result with the environment it was measured in."""
    path = RESULTS / name / f"{preset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"config": result.pop("config"), **environment(), **result}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    for claim in whole["claims"]:
        word = "holds" if claim["holds"] else "DOES NOT HOLD"
        print(f"{claim['claim']}: {claim['value']} (target {claim['target']}): {word}")
    return path
