"""Small runs on digits, and what of a run must be reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from glora_ops.fl.config import Config
from glora_ops.fl.records import Run
from glora_ops.fl.run import Plan, run


def config(methods: dict[str, dict[str, Any]], **sections: dict[str, Any]) -> Config:
    """Four clients of rank 4 on digits, three rounds of four steps, unless told otherwise."""
    base: dict[str, dict[str, Any]] = {
        "clients": {"count": 4, "ranks": [4], "alpha": 0.5},
        "training": {"rounds": 3, "steps": 4, "batch": 8, "lr": 0.005},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return Config.model_validate({"name": "small", "methods": methods, **base})


def run_small(folder: Path, method: dict[str, Any], seed: int = 0, **sections: Any) -> Run:
    made = config({"it": method}, **sections)
    run(Plan(made, "it", seed, made.training.lr), folder)
    return Run(folder)


def reproducible(record: Run) -> list[dict[str, Any]]:
    """The metrics without timings."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in record.lines()]


def state(record: Run) -> dict[str, Tensor]:
    return load_file(record.checkpoint_path)


def accuracies(record: Run) -> list[float]:
    return [line["metrics"]["accuracy"] for line in record.lines()]
