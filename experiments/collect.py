"""Folders of runs -> results/rounds.csv (a line per run and round) and results/sweeps.json.

python experiments/collect.py RUNS

Settings and sweeps that RUNS does not hold stay as they are stored.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from glora_ops.fl.load import load_runs

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("config", "method", "seed", "lr", "round", "score", "loss", "received",
           "captured", "effective_rank", "norm", "turn", "apart", "apart_turned", "columns", "rows",
           "megabytes")  # fmt: skip


def off_diagonal(table: list[list[float | None]]) -> float | str:
    """Mean over pairs of different clients."""
    values = [
        x for i, row in enumerate(table) for j, x in enumerate(row) if i != j and x is not None
    ]
    return fmean(values) if values else ""


def row(run: Any, line: dict[str, Any], received: Sequence[float]) -> dict[str, Any]:
    """One round of one run; empty where nothing was measured."""
    aligned = line.get("alignment")
    numbers = {
        "score": line.get("metrics", {}).get(run.metric, ""),
        "loss": line.get("metrics", {}).get("loss", ""),
        "received": fmean(received) if received else "",
        **{k: v for k, v in line.get("update", {}).items() if k != "spectrum"},
        **line.get("misalignment", {}),
        "columns": off_diagonal(aligned["columns"]) if aligned else "",
        "rows": off_diagonal(aligned["rows"]) if aligned else "",
        "megabytes": (line["bytes_down"] + line["bytes_up"]) / 1e6,
    }
    short = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in numbers.items()}
    return {"config": run.about["config"]["name"], "method": run.method, "seed": run.seed,
            "lr": run.about["lr"], "round": line["round"], **short}  # fmt: skip


def main(home: Path) -> None:
    RESULTS.mkdir(exist_ok=True)
    runs, _ = load_runs(p for p in sorted(home.iterdir()) if p.is_dir() and p.name != "sweep")
    rows = [
        row(run, line, run.received if line is run.lines[-1] else [])
        for run in runs
        if run.done
        for line in run.lines
    ]
    path, fresh = RESULTS / "rounds.csv", {x["config"] for x in rows}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows += [x for x in csv.DictReader(file) if x["config"] not in fresh]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    path = RESULTS / "sweeps.json"
    sweeps = json.loads(path.read_text()) if path.exists() else {}
    for outcome in sorted((home / "sweep").glob("*/*.json")):
        sweeps[f"{outcome.parent.name}/{outcome.stem}"] = json.loads(outcome.read_text())
    path.write_text(json.dumps(sweeps, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
