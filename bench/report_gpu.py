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
    """What a captured consensus must move and multiply."""
    header = [
        "captured consensus", "launches: kernels + torch", "one read of the factors, ms",
        "moved, GB", "of which product / torch", "products bf16 / tf32 / fp64, ms", "floor, ms",
    ]  # fmt: skip
    body = []
    for r in counts["rows"]:
        moved, work = r["moved_gb"], r["product_ms"]
        body.append([
            f"{r['case']}, {r['dtype']}, q = {r['steps']}",
            f"{r['kernels']} + {r['operations']}", number(r["read_ms"]),
            number(sum(moved.values())),
            f"{number(moved['product_kernel'])} / {number(moved['torch'])}",
            " / ".join(number(work.get(unit)) for unit in ("bf16", "tf32", "fp64")),
            number(sum(r["floor_ms"].values())),
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
        f"{counts['versions']['triton']}): every launch's operands once, as if no cache held "
        f"anything, and its products, at an H100's datasheet rates ({rates['bytes'] / 1e12:.2f} "
        f"TB/s; {rates['bf16'] / 1e12:.0f}, {rates['tf32'] / 1e12:.0f} and "
        f"{rates['fp64'] / 1e12:.0f} TFLOP/s in bf16, tf32 and fp64). The floor adds the larger of "
        "the two of every launch. R = 64 (16 at 1024²), clients of rank 16, the anchor included.",
        counted(counts),
        "So the goal for K = 100 below is out of reach on paper, by a factor of three. The factors "
        "themselves are read 12½ times (q = 1). The rest are tall blocks of 2R fp32 columns, which "
        "the orthonormalisations read and write again and again: **they are the next bottleneck**, "
        "at K = 10 the only one. There the iteration belongs into N-space, as on the CPU, with "
        "fixed steps: both stacks' fp64 Gram matrices (N = 160) would take 2 ms at these rates. "
        "For many rows fewer columns, and two-term products in the steps before the last, would "
        "shorten it: three-term products alone take longer than the goal. Where launches decide "
        "(1024²), torch's small operations for votes, certificates and statistics outnumber the "
        "kernels by three to one; sharing launches between the two sides would save a twentieth "
        "of all. The default, adaptive mode looks at values and cannot be counted so; beyond the "
        "Gram route it goes module by module and synchronises, which leaves the goal, set for "
        "default arguments, further away.",
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
