"""The report of runs: tables in Markdown, and the folder they are written to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.marks import digests, unchanged

__all__ = [
    "COLUMNS",
    "difference_rows",
    "markdown",
    "rows_of",
    "strangers",
    "table",
    "unfinished",
    "write_report",
]

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


def unfinished(folders: Iterable[str]) -> str:
    return "Unfinished and left out: " + ", ".join(folders)


def markdown(summary: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """A summary as a page."""
    metric, reference = summary["metric"], summary["reference"]
    parts = [
        f"## {summary['config']}",
        summary["about"],
        f"{summary['task']}; {summary['clients']}; {summary['rounds']} rounds. Metric: {metric}.",
        table(COLUMNS, rows_of(summary)),
        "± is one standard deviation over seeds. *Server model*: what the server holds, at its own "
        "rank. *Received*: what clients are sent next, each at its own rank, mean over clients. "
        "*Own*: the same on held-out examples in each client's own mix of labels, mean over "
        "clients; *worst client*: the least of them. "
        "*Captured*: share of the exact update's energy that the last round kept.",
        "**All metrics** of the server's model after the last round:",
        table(("metric", *summary["methods"]), metric_rows(summary)),
    ]
    differences = difference_rows(summary)
    if differences:
        rough = any(d["rough"] for d in summary["differences"].values())
        parts += [
            f"**{reference} minus the other**, server model, paired by seed:",
            table(("other", "mean", "95 % bootstrap interval", "seeds won"), differences),
            "Few seeds: the interval is rough." if rough else "",
        ]
    if summary["sweeps"]:
        rates = list(dict.fromkeys(lr for s in summary["sweeps"].values() for lr in s["scores"]))
        body = [
            (label, *(f"{s['scores'][lr]:.4f}" if lr in s["scores"] else "–" for lr in rates),
             f"{s['chosen']:g}")
            for label, s in summary["sweeps"].items()
        ]  # fmt: skip
        parts += [
            "**Learning rates**, swept on a seed and held-out examples of their own:",
            table(("method", *rates, "chosen"), body),
        ]
    if summary["failures"]:
        parts.append(
            f"{len(summary['failures'])} replies failed, the first: "
            f"{summary['failures'][0]['reason']}"
        )
    if summary["silent"]:
        parts.append(
            "Nobody replied, so that nothing was learnt, and left out: "
            + ", ".join(summary["silent"])
        )
    if summary["left_out"]:
        parts.append("Left out by robust rules: " + ", ".join(
            f"{x['client']} ({x['method']}, seed {x['seed']}: {x['rounds']} rounds)"
            for x in summary["left_out"]))  # fmt: skip
    if summary["unfinished"]:
        parts.append(unfinished(summary["unfinished"]))
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = ["| " + " | ".join(header) + " |", "| :-- |" + " --: |" * (len(header) - 1)]
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
    held = {path.name: path.read_bytes() for path in folder.iterdir()} | {PAGE: page.encode()}
    (folder / PAGE).write_bytes(f"{page}{MARK}{json.dumps(digests(held))} -->\n".encode())


def strangers(folder: Path) -> list[str]:
    """What in a folder `write_report` did not write, or somebody has changed since, by name."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    try:
        page, _, mark = (folder / PAGE).read_bytes().decode().rpartition(MARK)
        found = json.loads(mark.removesuffix(" -->\n"))
    except (OSError, ValueError):
        page, found = "", {}
    own = found if isinstance(found, dict) else {}
    page_is_own = digests({PAGE: page.encode()}).items() <= own.items()
    page_is_own = page_is_own and not (folder / PAGE).is_symlink()
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if not (page_is_own if entry.name == PAGE else unchanged(entry, own))
    )
