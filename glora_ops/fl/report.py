"""What the runs say: means with spread, paired differences with an interval, sweeps, failures."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Refusals, Refused, listing, require
from .forms import read_about, read_sweep
from .records import Run, replied

__all__ = [
    "RunData",
    "by_config",
    "load_runs",
    "markdown",
    "strangers",
    "summarise",
    "unfinished",
    "with_finished",
    "write_report",
]

CONFIDENCE = 0.95
RESAMPLES = 10_000
FEW = 5  # seeds below which an interval is said to be rough


@dataclass(frozen=True)
class RunData:
    """One finished or unfinished run, as its folder has it."""

    folder: Path
    about: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    done: bool

    @property
    def method(self) -> str:
        return str(self.about["method"])

    @property
    def seed(self) -> int:
        return int(self.about["seed"])

    @property
    def metric(self) -> str:
        return str(self.about["metric"])

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """The rounds in which something was measured."""
        return [line for line in self.lines if "metrics" in line]

    @property
    def score(self) -> float:
        """The headline metric of the server's model after the last round."""
        return float(self.evaluated[-1]["metrics"][self.metric])

    @property
    def received(self) -> float | None:
        """The same of what clients are sent, mean over clients (each at its own rank)."""
        line = self.lines[-1]
        if "by_rank" not in line:
            return None
        return mean(line["by_rank"][str(r)][self.metric] for r in line["sent_ranks"])

    @property
    def own(self) -> list[float]:
        """What clients read of it in their own mix of labels, as far as that was judged."""
        return [score for score in self.lines[-1].get("own", []) if score is not None]

    def total(self, name: str) -> float:
        return float(sum(line[name] for line in self.lines))

    @property
    def silent(self) -> bool:
        """Whether it ran to its end without a single reply: its model is the base."""
        return self.done and not replied(self.lines)

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        return [f | {"round": line["round"]} for line in self.lines for f in line["failures"]]

    @property
    def left_out(self) -> dict[str, int]:
        """Rounds in which a robust rule left a client out, by its name."""
        judged = [line["robust"] for line in self.lines if "robust" in line]
        return dict(Counter(name for verdict in judged for name in verdict["left_out"]))


def load_runs(folders: Iterable[Path]) -> tuple[list[RunData], dict[str, dict[str, Any]]]:
    """Every run below the folders, and the outcomes of sweeps by ``config/method``.

    Raises
    ------
    GloraError
        If there is no run.
    """
    runs, sweeps, refusals = [], {}, Refusals()
    folders = list(folders)
    found = {p.parent for folder in folders for name in ("run.json", "metrics.jsonl")
             for p in folder.rglob(name)}  # fmt: skip
    for place in sorted(found):
        if not place.name.startswith("seed"):  # a trial of a sweep
            continue
        run = Run(place)
        with listing(refusals):
            about = read_about(run.about_path)
            runs.append(_sound(RunData(place, about, run.lines(), run.done)))
    for path in sorted({p for folder in folders for p in folder.rglob("sweep/*.json")}):
        with listing(refusals):
            sweeps[f"{path.resolve().parents[1].name}/{path.stem}"] = read_sweep(path)
    if refusals:
        raise Refused(refusals)
    require(
        bool(runs), "runs", ", ".join(map(str, folders)), "a folder with runs",
        "glora fl run makes them",
    )  # fmt: skip
    return runs, sweeps


def _sound(run: RunData) -> RunData:
    """The run, if every round it measured has the same metrics, its headline among them."""
    names = [sorted(line["metrics"]) for line in run.evaluated]
    require(all(run.metric in found and found == names[0] for found in names), "metrics",
            f"{str(run.folder)!r} with other metrics in another round",
            f"the same in each, with {run.metric!r}", "restore metrics.jsonl")  # fmt: skip
    return run


def by_config(runs: Iterable[RunData]) -> dict[str, list[RunData]]:
    out: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        out[run.about["config"]["name"]].append(run)
    return dict(out)


def with_finished(runs: Iterable[RunData]) -> tuple[dict[str, list[RunData]], list[str]]:
    """The runs of each configuration that has a finished one, and the folders of all others.

    Raises
    ------
    GloraError
        If no run is finished.
    """
    groups = by_config(runs)
    ready = {name: mine for name, mine in groups.items() if any(run.done for run in mine)}
    require(bool(ready), "runs", ", ".join(groups), "at least one finished run",
            "go on with glora fl run --resume")  # fmt: skip
    left = [str(run.folder) for name, mine in groups.items() if name not in ready for run in mine]
    return ready, left


def unfinished(folders: Iterable[str]) -> str:
    return "Unfinished and left out: " + ", ".join(folders)


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
        one, mine = ({**r.about["config"], "methods": 0, "about": 0, "hours": 0}
                     for r in (runs[0], run))  # fmt: skip
        odd = [key for key in mine if mine[key] != one.get(key)]
        both = f"{runs[0].folder} and {run.folder}"
        apart = "report them one by one, each with its -o"
        require(not odd, "runs", f"{both}, which differ in {', '.join(odd)}",
                f"one configuration {one['name']!r}", apart)  # fmt: skip
        arm = arms.setdefault(run.method, run)
        here, there = (
            {"robust": None, **r.about["config"]["methods"][r.method], "lr": r.about["lr"]}
            for r in (run, arm)
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
    received = [run.received for run in runs if run.received is not None]
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


# --- text ------------------------------------------------------------------------------------

COLUMNS = ("method", "lr", "seeds", "server model", "received", "own", "worst client", "MB down",
           "MB up", "combine s", "captured", "eff. rank")  # fmt: skip


def rows_of(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The main table's cells, best server model first."""
    ordered = sorted(summary["methods"].items(), key=lambda kv: -kv[1]["score"]["mean"])
    return [
        (
            label + (f" ({m['note']})" if m["note"] else ""),
            f"{m['lr']:g}",
            str(len(m["seeds"])),
            _pm(m["score"]),
            *(_pm(m[name]) if m[name] else "–" for name in ("received", "own", "worst")),
            f"{m['megabytes_down']:.2f}",
            f"{m['megabytes_up']:.2f}",
            f"{m['combine_seconds']:.3f}",
            "–" if m["captured"] is None else f"{m['captured']:.3f}",
            "–" if m["effective_rank"] is None else f"{m['effective_rank']:.1f}",
        )
        for label, m in ordered
    ]


def metric_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every metric of the task, method by method."""
    found = [m["metrics"] for m in summary["methods"].values()]
    return [(name, *(_pm(m[name]) if name in m else "–" for m in found)) for name in found[0]]


def difference_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = []
    for label, d in summary["differences"].items():
        if d["mean"] is None:
            continue
        interval = "one seed" if d["low"] is None else f"{d['low']:+.4f} … {d['high']:+.4f}"
        out.append((label, f"{d['mean']:+.4f}", interval, f"{d['won']} of {len(d['seeds'])}"))
    return out


def _pm(value: Mapping[str, float | None]) -> str:
    """One seed has no spread."""
    return " ± ".join(f"{x:.4f}" for x in (value["mean"], value["spread"]) if x is not None)


def markdown(summary: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """A summary as a page."""
    metric, reference = summary["metric"], summary["reference"]
    parts = [
        f"## {summary['config']}",
        summary["about"],
        f"{summary['task']}; {summary['clients']}; {summary['rounds']} rounds. Metric: {metric}.",
        _table(COLUMNS, rows_of(summary)),
        "± is one standard deviation over seeds. *Server model*: what the server holds, at its own "
        "rank. *Received*: what clients are sent next, each at its own rank, mean over clients. "
        "*Own*: the same on held-out examples in each client's own mix of labels, mean over "
        "clients; *worst client*: the least of them. "
        "*Captured*: share of the exact update's energy that the last round kept.",
        "**All metrics** of the server's model after the last round:",
        _table(("metric", *summary["methods"]), metric_rows(summary)),
    ]
    differences = difference_rows(summary)
    if differences:
        rough = any(d["rough"] for d in summary["differences"].values())
        parts += [
            f"**{reference} minus the other**, server model, paired by seed:",
            _table(("other", "mean", "95 % bootstrap interval", "seeds won"), differences),
            "Few seeds: the interval is rough." if rough else "",
        ]
    if summary["sweeps"]:
        rates = list(dict.fromkeys(lr for s in summary["sweeps"].values() for lr in s["scores"]))
        body = [
            (label, *(f"{s['scores'][lr]:.4f}" if lr in s["scores"] else "–" for lr in rates),
             f"{s['chosen']:g}")
            for label, s in summary["sweeps"].items()
        ]  # fmt: skip
        parts += ["**Learning rates**, swept on a seed and held-out examples of their own:",
                  _table(("method", *rates, "chosen"), body)]  # fmt: skip
    if summary["failures"]:
        parts.append(f"{len(summary['failures'])} replies failed, the first: "
                     f"{summary['failures'][0]['reason']}")  # fmt: skip
    if summary["silent"]:
        parts.append("Nobody replied, so that nothing was learnt, and left out: "
                     + ", ".join(summary["silent"]))  # fmt: skip
    if summary["left_out"]:
        parts.append("Left out by robust rules: " + ", ".join(
            f"{x['client']} ({x['method']}, seed {x['seed']}: {x['rounds']} rounds)"
            for x in summary["left_out"]))  # fmt: skip
    if summary["unfinished"]:
        parts.append(unfinished(summary["unfinished"]))
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |",
             "| :-- |" + " --: |" * (len(header) - 1)]  # fmt: skip
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# --- the folder ------------------------------------------------------------------------------

PAGE = "report.md"
MARK = "\n<!-- SHA-256 of what glora fl report wrote: "


def write_report(
    folder: Path, summaries: Sequence[Mapping[str, Any]], pages: Sequence[str]
) -> None:
    """report.json and report.md beside the pictures; its last line tells what the folder held."""
    text = json.dumps(summaries, indent=1) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    page = "# Federated runs\n\n" + "\n".join(pages)
    digests = {PAGE: _digest(page.encode())}
    digests |= {path.name: _digest(path.read_bytes()) for path in sorted(folder.iterdir())}
    (folder / PAGE).write_bytes(f"{page}{MARK}{json.dumps(digests)} -->\n".encode())


def strangers(folder: Path) -> list[str]:
    """What in a folder `write_report` did not write, or somebody has changed since, by name."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    try:
        page, _, mark = (folder / PAGE).read_bytes().decode().rpartition(MARK)
        digests = json.loads(mark.removesuffix(" -->\n"))
    except (OSError, ValueError):
        page, digests = "", {}
    own = digests if isinstance(digests, dict) else {}
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_symlink()
        or not entry.is_file()
        or entry.name not in own
        or own[entry.name] != _digest(page.encode() if entry.name == PAGE else entry.read_bytes())
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
