"""The GPU's part of docs/performance.md: what is counted, and whatever runs are stored."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tables import table

__all__ = ["section"]

FOLDER = Path(__file__).resolve().parent / "results" / "gpu"
GOALS = {
    "pass kernels, bf16, large": "≥ 60 % of the measured copy bandwidth",
    "7B, K = 100, r = 16, R = 64, bf16": "≤ 25 ms, ≥ 5 × plain torch of the same mathematics",
    "1024², K = 8, replayed": "no goal: reported",
}


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def counted(counts: dict[str, Any]) -> str:
    """What a consensus by fixed steps must move, multiply and issue, now and before."""
    header = [
        "consensus by fixed steps", "launches: kernels + torch", "moved, GB",
        "device, ms: small problems / all", "bound by memory / L2 / products / instructions, ms",
        "host, ms", "before: launches", "GB", "device, ms", "host, ms",
    ]  # fmt: skip
    former = {(r["case"], r["dtype"], r["steps"]): r for r in counts["former"]}
    body = []
    for r in counts["rows"]:
        before = former[r["case"], r["dtype"], r["steps"]]
        bound = r["bound_ms"]
        body.append([
            f"{r['case']}, {r['dtype']}, q = {r['steps']}",
            f"{r['kernels']} + {r['operations']}", number(sum(r["moved_gb"].values())),
            f"{number(bound.get('instructions'))} / {number(sum(r['floor_ms'].values()))}",
            " / ".join(number(bound.get(b)) for b in ("memory", "L2", "products", "instructions")),
            number(r["host_ms"]), f"{before['kernels']} + {before['operations']}",
            number(sum(before["moved_gb"].values())), number(sum(before["floor_ms"].values())),
            number(before["host_ms"]),
        ])  # fmt: skip
    return table(header, body)


def measured(rows: list[dict[str, Any]]) -> str:
    header = [
        "case", "way", "cold, ms", "warm, ms", "peak, GB", "factors at copy speed, ms",
        "share of copy",
    ]  # fmt: skip
    body = []
    for i in rows:
        steps = f", q = {i['steps']}" if i.get("steps") is not None else ""
        ranks = f", {i['ranks']}" if "ranks" in i else ""
        share = i.get("share_of_copy")
        body.append([
            f"{i['case']}, {i['dtype'].removeprefix('torch.')}{ranks}", i["way"] + steps,
            number(i["event_ms_cold"]), number(i["event_ms_warm"]),
            number(i["peak_bytes"] / 1e9), number(i.get("one_pass_floor_ms", i.get("floor_ms"))),
            "–" if share is None else f"{100 * share:.0f} %",
        ])  # fmt: skip
    return table(header, body)


def picture(rows: list[dict[str, Any]], path: Path) -> bool:
    """Cold device milliseconds of every way of the server step, a panel per case, if any ran."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for i in rows:
        if "ranks" in i:
            steps = f", q = {i['steps']}" if i.get("steps") is not None else ""
            name = f"{i['case']}, {i['dtype'].removeprefix('torch.')}, {i['ranks']}"
            cases[name].append((i["way"] + steps, i["event_ms_cold"]))
    if not cases:
        return False
    fig, grid = plt.subplots(
        len(cases), 1, figsize=(9, 2.6 * len(cases)), squeeze=False, layout="constrained"
    )
    for axes, (name, bars) in zip(grid[:, 0], cases.items(), strict=True):
        axes.barh([way for way, _ in bars], [ms for _, ms in bars], color="#0b7a75")
        axes.set_xscale("log")
        axes.set_title(f"{name}: ms, cold", loc="left", fontsize=10)
    fig.savefig(path, dpi=110, facecolor="white")
    plt.close(fig)
    return True


def section(docs: Path, folder: Path = FOLDER) -> list[str]:
    """Paragraphs and tables, in order."""
    counts = json.loads((folder / "counts.json").read_text())
    runs = sorted(path for path in folder.glob("*.json") if path.name != "counts.json")
    parts = ["## On a GPU"]
    if not runs:
        parts.append(
            "**Nothing here was run or timed on a GPU: there was none.** What follows is counted "
            "(`python bench/gpu_counts.py`); what compilers made of the kernels stands in "
            "[kernels/README.md](../kernels/README.md). On a machine with a GPU `make test-gpu` "
            "checks and `make bench-gpu` measures: its JSON goes to `bench/results/gpu`, its "
            "tables and pictures come here by themselves."
        )
    rates = counts["rates"]
    parts += [
        f"Counted on tensors without values (torch {counts['versions']['torch']}, Triton "
        f"{counts['versions']['triton']}), at the rates assumed for an H200 "
        f"({rates['bytes'] / 1e12:.1f} TB/s, L2 {rates['l2'] / 1e12:.1f} TB/s; "
        f"{rates['bf16'] / 1e12:.0f}, {rates['tf32'] / 1e12:.0f} and {rates['fp64'] / 1e12:.0f} "
        "TFLOP/s in bf16, tf32 and fp64). A launch takes the longest of its operands once, what "
        "its tiles read again from L2, its products, and the instructions of small problems (nine "
        "sweeps of Jacobi); launches add up. Replayed, a call takes the device's time; eagerly no "
        "less than the host's (30 µs a kernel, 6 µs a torch operation). R = 64 (16 at 1024²), "
        "clients of rank 16, the anchor included. Lower bounds and a ranking, no prediction.",
        counted(counts),
        "**Products with few columns are bound by L2**: every tile reads its operands again. "
        "Small problems of a 7B, a quarter to a half of the time before, are a tenth to a "
        "quarter; of one module they are most of it. What is left is the iteration in the long "
        "space itself, 7½ + 4q reads of the factors and tall blocks orthonormalised after every "
        "half step: it belongs into N-space where N allows it. Where launches decide "
        "(1024²), torch's small operations for votes, certificates and statistics outnumber the "
        "kernels by three to one. The default, adaptive mode looks at values and cannot be counted "
        "so; beyond the exact solver's N it goes module by module and synchronises.",
        "Goals: " + "; ".join(f"{what}: {goal}" for what, goal in GOALS.items()) + ".",
    ]
    for path in runs:
        rows = [e["extra_info"] for e in json.loads(path.read_text())["benchmarks"]]
        first = rows[0]
        parts += [
            f"### {first['device']}, {path.stem}",
            f"torch {first['torch']} (CUDA or HIP {first['cuda']}), Triton {first['triton']}, "
            f"commit {first['commit']}; `make bench-gpu`.",
            measured(rows),
        ]
        shown = docs / f"gpu_{path.stem}.png"
        if picture(rows, shown):
            parts.append(f"![Server steps on {first['device']}]({shown.name})")
    return parts
