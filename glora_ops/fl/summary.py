"""What runs say: means with spread, and paired differences with an interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import require
from .load import RunData

__all__ = ["bootstrap", "summarise"]

CONFIDENCE = 0.95  # why: what readers expect of an interval
RESAMPLES = 10_000  # why: an interval's ends then move by a hundredth of its length
FEW = 5  # seeds below which an interval is said to be rough


def summarise(
    runs: Sequence[RunData], sweeps: Mapping[str, Any], reference: str | None = None
) -> dict[str, Any]:
    """One configuration's numbers, JSON-able.

    Parameters
    ----------
    runs : sequence of RunData
        Of one configuration.
    sweeps : mapping
        Of `load_runs`.
    reference : str, optional
        Method that the others are compared with; by default the first one of kind glora.

    Returns
    -------
    dict
        methods (mean and spread of everything), differences (paired by seed, reference minus
        other), sweeps, failures, silent, left_out (by robust rules), unfinished.
    """
    config = runs[0].about["config"]
    finished = [run for run in runs if run.done and not run.silent]
    _require_one_experiment(runs)
    known = {m: arm for run in finished for m, arm in run.about["config"]["methods"].items()}
    labels = [m for m in known if any(run.method == m for run in finished)]
    silent = [str(run.folder) for run in runs if run.silent]
    found = ", ".join([config["name"], *(f"nobody replied in {folder}" for folder in silent)])
    require(bool(labels), "runs", found, "at least one finished run", "run with --resume")
    grouped = {m: {r.seed: r for r in finished if r.method == m} for m in labels}
    kinds = {m: known[m]["kind"] for m in labels}
    if reference is None:
        reference = next((m for m in labels if kinds[m] == "glora"), labels[0])
    require(reference in labels, "reference", repr(reference), f"one of {labels}")
    return {
        "config": config["name"],
        "about": config["about"],
        "metric": finished[0].metric,
        "rounds": max(run.lines[-1]["round"] for run in finished),
        "task": _task(runs[0]),
        "clients": _population(config),
        "reference": reference,
        "methods": {m: _method(list(seeds.values()), kinds[m]) for m, seeds in grouped.items()},
        "differences": {
            m: paired(grouped[reference], grouped[m]) for m in labels if m != reference
        },
        "sweeps": {
            key.split("/")[1]: outcome
            for key, outcome in sweeps.items()
            if key.split("/")[0] == config["name"]
        },
        "failures": [
            {"method": run.method, "seed": run.seed, **f}
            for run in runs if run.done for f in run.failures
        ],
        "silent": silent,
        "left_out": [
            {"method": run.method, "seed": run.seed, "client": name, "rounds": rounds}
            for run in finished for name, rounds in run.left_out.items()
        ],
        "unfinished": [str(run.folder) for run in runs if not run.done],
    }  # fmt: skip


def _require_one_experiment(runs: Sequence[RunData]) -> None:
    """Refuse runs that only share the name of their configuration; arms may come later."""
    seen: dict[tuple[str, int], RunData] = {}
    arms: dict[str, RunData] = {}
    measured: dict[str, Any] = {}
    for run in runs:
        one, mine = (
            {**r.about["config"], "methods": 0, "about": 0, "hours": 0} for r in (runs[0], run)
        )
        odd = [key for key in mine if mine[key] != one.get(key)]
        both = f"{runs[0].folder} and {run.folder}"
        apart = "report them one by one, each with its -o"
        require(not odd, "runs", f"{both}, which differ in {', '.join(odd)}",
                f"one configuration {one['name']!r}", apart)  # fmt: skip
        arm = arms.setdefault(run.method, run)
        here, there = (
            r.about["config"]["methods"][r.method] | {"lr": r.about["lr"]} for r in (run, arm)
        )
        require(here == there, "runs", f"{arm.folder} and {run.folder}, {there} and {here}",
                f"one setting of {run.method!r}", apart)  # fmt: skip
        if run.done:
            shape = measured.setdefault(run.method, _measured(run))
            require(shape == _measured(run), "runs", both, "the same rounds and metrics",
                    "restore metrics.jsonl, or report them apart")  # fmt: skip
        other = seen.setdefault((run.method, run.seed), run)
        require(other is run, "runs", f"{other.folder} and {run.folder}",
                "one run of a method and seed", apart)  # fmt: skip


def _measured(run: RunData) -> Any:
    """Rounds and names of what a run measured."""
    rounds = [(line["round"], sorted(line["metrics"])) for line in run.evaluated]
    return rounds, sorted(run.lines[-1].get("misalignment", ()))


def _task(run: RunData) -> str:
    config = run.about["config"]
    name = " ".join(x for x in (config["task"]["kind"], config["task"]["name"]) if x)
    on = f" on {config['model']['name']}" if config["model"]["name"] else ""
    return f"{name}{on}, {sum(run.about['examples'])} training examples"


def _population(config: Mapping[str, Any]) -> str:
    c = config["clients"]
    how = {"dirichlet": f"Dirichlet({c['alpha']:g})", "iid": "IID", "task": "one task each",
           "shard": f"{c['shards_per_client']} shards each"}[c["partition"]]  # fmt: skip
    ranks = ", ".join(map(str, c["ranks"]))
    return (
        f"{c['count']} clients, {how}, ranks {ranks}, {c['participation']:.0%} a round, "
        f"{config['training']['steps']} steps each, first A {c['start']}"
        + (f", random gauge of condition {c['gauge']:g}" if c["gauge"] > 1 else "")
        + (f", {c['lost']:.0%} of replies lost" if c["lost"] else "")
        + (f", {c['wire']} on the wire" if c["wire"] != "float32" else "")
    )


def _method(runs: Sequence[RunData], kind: str) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds) of one method's numbers."""
    ranks = {rank for run in runs for rank in run.about["config"]["clients"]["ranks"]}
    last = [run.lines[-1] for run in runs]
    updates = [line["update"] for line in last if "update" in line]
    received = [mean(run.received) for run in runs if run.received]
    own = [run.own for run in runs if run.own]
    combine = [line["seconds"].get("combine", 0.0) for run in runs for line in run.lines[1:]]
    return {
        "kind": kind,
        "note": "zero-padded" if kind == "fedit" and len(ranks) > 1 else "",
        "lr": runs[0].about["lr"],
        "seeds": [run.seed for run in runs],
        "score": spread([run.score for run in runs]),
        "received": spread(received) if received else None,
        "own": spread([mean(x) for x in own]) if own else None,
        "worst": spread([min(x) for x in own]) if own else None,
        "start": mean(run.evaluated[0]["metrics"][run.metric] for run in runs),
        "megabytes_down": mean(run.total("bytes_down") for run in runs) / 1e6,
        "megabytes_up": mean(run.total("bytes_up") for run in runs) / 1e6,
        "combine_seconds": mean(combine) if combine else 0.0,
        "captured": mean(u["captured"] for u in updates) if updates else None,
        "effective_rank": mean(u["effective_rank"] for u in updates) if updates else None,
        "misalignment": _means([line["misalignment"] for line in last if "misalignment" in line]),
        "metrics": {
            name: spread([run.evaluated[-1]["metrics"][name] for run in runs])
            for name in runs[0].evaluated[-1]["metrics"]
        },
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean(row[name] for row in rows) for name in rows[0]} if rows else {}


def mean(values: Iterable[float]) -> float:
    """The mean, not a number where one of a diverged run is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.mean(list(values)))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    with np.errstate(over="ignore", invalid="ignore"):
        apart = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean(values), "spread": apart}


def paired(one: Mapping[int, RunData], other: Mapping[int, RunData]) -> dict[str, Any]:
    """one − other, seed by seed: mean, bootstrap interval over seeds, seeds won.

    The percentile interval resamples seeds; below five seeds it is rough and says so.
    """
    seeds = sorted(set(one) & set(other))
    gains = [one[s].score - other[s].score for s in seeds]
    low, high = bootstrap(gains)
    return {
        "seeds": seeds,
        "gains": gains,
        "mean": mean(gains) if gains else None,
        "low": low,
        "high": high,
        "won": sum(g > 0 for g in gains),
        "rough": len(seeds) < FEW,
    }


def bootstrap(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean; None with fewer than two values."""
    if len(values) < 2:
        return None, None
    x = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    means = x[draws].mean(1)
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
