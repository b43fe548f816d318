"""Pictures of docs/performance.md: times of one server step, and their growth."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from stored_json import Row, ms, name_of, threads

__all__ = ["AXES", "curves", "exponent", "growth_picture", "picture"]

GOOD = 0.99  # of the optimum: below it, an answer is drawn hollow

INK, QUIET, RULE, ACCENT = "#1f2933", "#7b8794", "#e4e7eb", "#0b7a75"


def panel(axes: Any, row: Row, limits: tuple[float, float]) -> None:
    """Times of one race as dots with quartiles on a logarithmic axis; quality and memory beside."""
    from matplotlib.ticker import LogLocator, NullLocator

    i = row.info
    entries = [
        (name_of(arm, a), a["median_ms"], *a["iqr_ms"], a["captured_of_optimum"], a["memory_mb"],
         not a["peer"], f"×{a['ratio']:.2f}")
        for arm, a in row.arms.items()
    ]  # fmt: skip
    entries.append((
        f"glora, {i['basis']}", row.ms, row.low, row.high, i["captured_of_optimum"],
        i["memory_mb"], True, "",
    ))  # fmt: skip
    entries.sort(key=lambda e: e[1], reverse=True)
    wide = limits[1] / limits[0]
    axes.set_xscale("log")
    axes.set_xlim(limits)
    axes.set_ylim(-0.7, len(entries) - 0.3)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
    for y, (name, median, low, high, quality, memory, ours, ratio) in enumerate(entries):
        color = ACCENT if ours else QUIET
        weight = "bold" if ours else "normal"
        axes.hlines(y, limits[0], median, color=color if ours else RULE, lw=1.2, zorder=1,
                    alpha=0.5 if ours else 1)  # fmt: skip
        axes.hlines(y, low, high, color=color, lw=3.5, alpha=0.45, zorder=2)
        axes.plot(
            median, y, "o", ms=7, mec=color, mew=1.6, zorder=3,
            mfc=color if quality >= GOOD else "white",
        )  # fmt: skip
        axes.text(-0.02, y, name, ha="right", color=INK, weight=weight, **beside)
        axes.text(1.12, y, ms(median), ha="right", color=INK, weight=weight, **beside)
        axes.text(1.25, y, ratio, ha="right", color=QUIET, **beside)
        axes.text(1.41, y, f"{quality:.4f}", ha="right", color=INK, weight=weight, **beside)
        shown = "" if memory is None else f"{memory:.1f}"
        axes.text(1.53, y, shown, ha="right", color=INK, weight=weight, **beside)
    top = len(entries) - 0.25
    for x, text in ((1.12, "ms"), (1.25, "/ glora"), (1.41, "captured"), (1.53, "MB")):
        axes.text(x, top, text, ha="right", color=QUIET, **beside)
    axes.set_title(
        f"{i['basis']}: {row.case} (a dense matrix: {i['dense_mb']:.0f} MB)", x=-0.5, loc="left",
        fontsize=10.5, color=INK, pad=16,
    )  # fmt: skip
    axes.set_yticks([])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide < 60 else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=QUIET, which="both", labelsize=8)
    axes.set_xlabel("milliseconds (logarithmic)", fontsize=8, color=QUIET)


def picture(rows: list[Row], path: Path) -> None:
    """One panel per case and basis, of the cases in which both bases were raced."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    raced = {
        (row.case, row.info["basis"]): row
        for row in rows
        if row.info["op"] == "aggregate" and row.info["drawn"]
    }
    cases = list(dict.fromkeys(case for case, _ in raced))
    if not cases:
        return
    height = 3.3 * len(cases) + 1.5
    fig, grid = plt.subplots(len(cases), 2, figsize=(18, height), squeeze=False)
    fig.subplots_adjust(
        left=0.165, right=0.86, top=1 - 1.25 / height, bottom=1.15 / height, wspace=1.4,
        hspace=0.62,
    )  # fmt: skip
    for line, case in zip(grid, cases, strict=True):
        pair = [raced[case, basis] for basis in ("update", "consensus")]
        times = [x for row in pair for x in (row.low, row.high)]
        times += [x for row in pair for a in row.arms.values() for x in a["iqr_ms"]]
        for axes, row in zip(line, pair, strict=True):
            panel(axes, row, (0.7 * min(times), 1.4 * max(times)))
    first = rows[0].info
    fig.suptitle(
        "One server step: K clients' LoRA factors to a rank-R update",
        x=0.012, y=1 - 0.25 / height, ha="left", fontsize=15, weight="bold", color=INK,
    )  # fmt: skip
    fig.supxlabel(
        f"{first['cpu']}, {threads(first)}, {first['dtype']}, torch {first['torch']}, "
        f"commit {first['commit']}. Medians and quartiles of interleaved rounds; / glora: median "
        "ratio within a round. Captured: energy of the mean update held, over the optimum\n"
        f"(hollow dot: below {GOOD}). MB: peak beyond inputs. glora's times include its "
        "certificates; the peers compute none.",
        x=0.012, y=0.2 / height, ha="left", fontsize=9, color=QUIET,
    )  # fmt: skip
    fig.savefig(path, dpi=80, facecolor="white")
    plt.close(fig)


AXES = {"K": "clients K", "d": "dimension d"}
Curve = dict[tuple[str, str, str], list[dict[str, Any]]]


def curves(growth: list[dict[str, Any]]) -> Curve:
    """Points by (solver, basis, axis), in order."""
    found: Curve = defaultdict(list)
    for i in sorted(growth, key=lambda i: i["value"]):
        found[i["growth"], i["basis"], i["axis"]].append(i)
    return found


def exponent(points: list[dict[str, Any]], what: str) -> float:
    """Least-squares slope of log(what) over log(value)."""
    x = [math.log(i["value"]) for i in points]
    y = [math.log(i[what]) for i in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def growth_picture(growth: list[dict[str, Any]], path: Path) -> None:
    """Time over each size on double logarithmic axes; lines rise with the predicted exponent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    solvers = sorted({i["growth"] for i in growth})
    fig, grid = plt.subplots(
        len(solvers), len(AXES), figsize=(15, 3.6 * len(solvers)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (solver, basis, axis), points in curves(growth).items():
        axes = grid[solvers.index(solver)][list(AXES).index(axis)]
        color = ACCENT if basis == "consensus" else QUIET
        x = [i["value"] for i in points]
        line = [points[0]["median_ms"] * i["predicted"] / points[0]["predicted"] for i in points]
        axes.plot(x, line, color=color, lw=1, alpha=0.5)
        axes.plot(
            x, [i["median_ms"] for i in points], "o", color=color, ms=5,
            label=f"{basis}: {exponent(points, 'median_ms'):.2f}, "
            f"predicted {exponent(points, 'predicted'):.2f}",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(x, [str(value) for value in x])
        axes.set_title(f"{solver} solver, {AXES[axis]}", loc="left", fontsize=10, color=INK)
        axes.set_ylabel("ms", fontsize=8, color=QUIET)
        axes.legend(fontsize=8, frameon=False)
        axes.grid(color=RULE, lw=0.6)
        axes.tick_params(colors=QUIET, which="both", labelsize=8)
    fig.savefig(path, dpi=110, facecolor="white")
    plt.close(fig)
