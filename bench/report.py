"""docs/performance.md and its pictures from stored benchmark JSON, and from nothing else.

python bench/report.py [JSON …] [--docs FOLDER] [--readme]

Without files: every JSON under bench/results. Ratios are peer time over glora time, per round,
medians: ×2.0 means glora was twice as fast. --readme prints the table for the README alone and
writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import report_gpu
from tables import table

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
NAMES = {
    "peer0_q0": "(0) randomized SVD of stacks, q = 0",
    "peer1_qr": "(1) thin QR of stacks + SVD",
    "peer2_peft": "(2) PEFT svd",
    "peer3_lowrank": "(3) dense mean + svd_lowrank",
    "peer4_svd": "(4) dense mean + full SVD",
    "peer5_loop": "(5) QR loop over clients",
    "glora_projector": "glora, projector",
    "one_module": "glora, one module alone",
    "glora_op": "the op alone",
    "formed": "formed bases, plain products",
    "loop_qr": "QR loop over clients",
    "plain": "plain torch",
}
GOOD = 0.99  # of the optimum: below it, an answer is drawn hollow


def name_of(arm: str) -> str:
    if arm.startswith("peer0_q"):
        steps, _, lists = arm.removeprefix("peer0_q").partition("_")
        return f"(0) randomized SVD of {lists or 'stacks'}, q = {steps}"
    return NAMES.get(arm, arm)


class Row:
    """One benchmark of a JSON file."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.info: dict[str, Any] = entry["extra_info"]
        stats = entry["stats"]
        self.ms, self.low, self.high = (1e3 * stats[k] for k in ("median", "q1", "q3"))
        self.arms: dict[str, dict[str, Any]] = self.info["arms"]
        self.is_step = "basis" in self.info

    @property
    def case(self) -> str:
        i = self.info
        ranks = "/".join(map(str, i["ranks"]))
        size = f"{i['d_out']}²" if i["d_out"] == i["d_in"] else f"{i['d_out']}×{i['d_in']}"
        many = f"{i['modules']} × " if i["modules"] > 1 else ""
        shape = f"{many}{size}, K = {i['clients']}, r = {ranks}, R = {i['rank']}"
        dtype = "" if i["dtype"] == "float32" else f", {i['dtype']}"
        return f"{shape}, {i['population']}{dtype}"

    @property
    def call(self) -> str:
        return self.info["op"] + (f', "{self.info["basis"]}"' if self.is_step else "")

    @property
    def time(self) -> str:
        return f"{ms(self.ms)} ({ms(self.low)}–{ms(self.high)})"

    @property
    def memory(self) -> str:
        mb = self.info["memory_mb"]
        return f"{mb:.1f} MB ({100 * mb / self.info['dense_mb']:.0f} %)"

    def against(self, arm: str | None) -> str:
        if arm is None or arm not in self.arms:
            return "–"
        a = self.arms[arm]
        return f"×{a['ratio']:.2f} ({ms(a['median_ms'])} ms)"


def threads(info: dict[str, Any]) -> str:
    return f"{info['threads']} thread" + ("s" if info["threads"] != 1 else "")


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def steps_table(rows: list[Row]) -> str:
    """Headline: the server step against the strongest peers."""
    header = [
        "case", "call", "ms (quartiles)", "vs (0), equal captured", "vs (1) QR + SVD",
        "vs (3) dense + lowrank", "captured / optimum", "peak beyond inputs (of one dense)",
        "of floor",
    ]  # fmt: skip
    body = []
    for row in rows:
        zero = row.info.get("matched")
        if zero is None:  # not a best-rank-R question: the cheapest with power steps, if raced
            zero = next((a for a in row.arms if a.startswith("peer0_q1")), None)
        steps = f", q = {zero.removeprefix('peer0_q')[0]}" if zero else ""
        body.append([
            row.case, row.call, row.time, row.against(zero) + steps, row.against("peer1_qr"),
            row.against("peer3_lowrank"), f"{row.info['captured_of_optimum']:.4f}", row.memory,
            f"{row.info['percent_of_floor']:.0f} %",
        ])  # fmt: skip
    return table(header, body)


def ops_table(rows: list[Row]) -> str:
    header = ["op", "case", "ms (quartiles)", "floor, ms", "of floor", "plain torch", "error"]
    body = []
    for row in rows:
        (arm,) = row.arms
        error = row.info.get("relative_error")
        held = row.info.get("trace_of_optimum")
        body.append([
            row.call, row.case, row.time, ms(row.info["floor_ms"]),
            f"{row.info['percent_of_floor']:.0f} %", f"{row.against(arm)}, {name_of(arm)}",
            f"{error:.0e}" if error is not None else f"holds {held:.4f} of the trace",
        ])  # fmt: skip
    return table(header, body)


def arms_table(rows: list[Row]) -> str:
    header = [
        "case", "call", "against", "ms (quartiles)", "ratio (quartiles)", "captured / optimum",
        "peak MB", "rounds", "answer; starts from",
    ]  # fmt: skip
    body = []
    for row in rows:
        for arm, a in row.arms.items():
            memory = "–" if a["memory_mb"] is None else f"{a['memory_mb']:.1f}"
            low, high = a["iqr_ms"]
            body.append([
                row.case, row.call, name_of(arm),
                f"{ms(a['median_ms'])} ({ms(low)}–{ms(high)})",
                f"×{a['ratio']:.2f} ({a['ratio_iqr'][0]:.2f}–{a['ratio_iqr'][1]:.2f})",
                f"{a['captured_of_optimum']:.4f}", memory, str(a["rounds"]),
                f"{a['answer']}; {a['start']}",
            ])  # fmt: skip
    return table(header, body)


def conditions(rows: list[Row]) -> str:
    """What the numbers were measured on; more than one line where files differ."""
    lines = {}
    for row in rows:
        i = row.info
        key = (
            f"{i['cpu']}, {threads(i)}, {i['dtype']}, torch {i['torch']}, "
            f"numpy {i['numpy']}, {i['blas']}, commit {i['commit']}"
        )
        lines.setdefault(key, []).append(i)
    out = []
    for key, infos in lines.items():
        loads = [i["load_average"] for i in infos]
        rates = f"copy {infos[0]['copy_gb_s']:.0f} GB/s, sgemm {infos[0]['sgemm_gflop_s']:.0f} GF/s"
        out.append(f"Measured on {key}; {rates}; load average {min(loads):.1f}–{max(loads):.1f}.")
    return "\n".join(out)


# --- picture ---------------------------------------------------------------------------------

INK, QUIET, RULE, ACCENT = "#1f2933", "#7b8794", "#e4e7eb", "#0b7a75"


def panel(axes: Any, row: Row, limits: tuple[float, float]) -> None:
    """Times of one race as dots with quartiles on a logarithmic axis; quality and memory beside."""
    from matplotlib.ticker import LogLocator, NullLocator

    i = row.info
    entries = [
        (name_of(arm), a["median_ms"], *a["iqr_ms"], a["captured_of_optimum"], a["memory_mb"],
         arm.startswith("glora"), f"×{a['ratio']:.2f}")
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

    raced = {(row.case, row.info["basis"]): row for row in rows if row.info["op"] == "aggregate"}
    cases = [
        case
        for case in dict.fromkeys(row.case for row in rows)
        if case.endswith(", partly")
        and "/" not in case
        and "K = 128" not in case
        and {(case, "update"), (case, "consensus")} <= raced.keys()
    ]
    if not cases:
        return
    height = 3.3 * len(cases) + 1.5
    fig, grid = plt.subplots(len(cases), 2, figsize=(18, height), squeeze=False)
    fig.subplots_adjust(
        left=0.145, right=0.855, top=1 - 1.25 / height, bottom=1.15 / height, wspace=1.16,
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


# --- growth ----------------------------------------------------------------------------------

AXES = {"K": "clients K", "d": "dimension d", "r": "client rank r", "R": "server rank R"}
Curve = dict[tuple[str, str, str], list[dict[str, Any]]]


def curves(growth: list[dict[str, Any]]) -> Curve:
    """Points by (route, basis, axis), in order."""
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


def growth_table(growth: list[dict[str, Any]]) -> str:
    header = [
        "route", "basis", "grows", "values", "ms", "exponent", "predicted", "peak MB",
        "captured / attainable",
    ]  # fmt: skip
    body = []
    for (route, basis, axis), points in curves(growth).items():
        body.append([
            route, basis, AXES[axis], ", ".join(str(i["value"]) for i in points),
            ", ".join(ms(i["median_ms"]) for i in points),
            f"{exponent(points, 'median_ms'):.2f}", f"{exponent(points, 'predicted'):.2f}",
            ", ".join(f"{i['memory_mb']:.0f}" for i in points),
            f"{min(i['captured_of_optimum'] for i in points):.4f}",
        ])  # fmt: skip
    return table(header, body)


def growth_picture(growth: list[dict[str, Any]], path: Path) -> None:
    """Time over each size on double logarithmic axes; lines rise with the predicted exponent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    routes = sorted({i["growth"] for i in growth})
    fig, grid = plt.subplots(
        len(routes), len(AXES), figsize=(15, 3.6 * len(routes)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (route, basis, axis), points in curves(growth).items():
        axes = grid[routes.index(route)][list(AXES).index(axis)]
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
        axes.set_title(f"{route} route, {AXES[axis]}", loc="left", fontsize=10, color=INK)
        axes.set_ylabel("ms", fontsize=8, color=QUIET)
        axes.legend(fontsize=8, frameon=False)
        axes.grid(color=RULE, lw=0.6)
        axes.tick_params(colors=QUIET, which="both", labelsize=8)
    fig.savefig(path, dpi=110, facecolor="white")
    plt.close(fig)


# --- the page --------------------------------------------------------------------------------


def files_table(files: list[dict[str, Any]]) -> str:
    header = [
        "clients", "each, MB", "modules", "files → state, s", "in memory → state, s",
        "rate of in memory", "peak MB, whole process", "allowed: state + 2 × largest + 300",
        "captured / attainable",
    ]  # fmt: skip
    body = [
        [
            f"{i['clients']} ({i['model']}, r = {i['r']}, {i['dtype']})",
            f"{i['adapter_mb']:.0f}", str(i["modules"]), f"{i['files_ms'] / 1e3:.2f}",
            f"{i['memory_ms'] / 1e3:.2f}", f"{100 * i['rate_of_memory']:.0f} %",
            f"{i['peak_mb']:.0f} (import alone {i['import_mb']:.0f})",
            f"{allowed(i):.0f} ({i['state_mb']:.0f} + 2 × {i['largest_mb']:.1f} + 300)",
            f"{i['captured_of_optimum']:.4f}",
        ]
        for i in files
    ]  # fmt: skip
    return table(header, body)


def allowed(i: dict[str, Any]) -> float:
    """MB: the state, twice the factors of the largest module, and 300."""
    return i["state_mb"] + 2 * i["largest_mb"] + 300


def model_table(rows: list[Row]) -> str:
    header = [
        "model", "call", "ms", "ms a module", "of one module alone", "vs loop of (0), q = 1",
        "vs loop of (1)", "captured / optimum", "peak beyond inputs",
    ]  # fmt: skip
    body = []
    for row in rows:
        body.append([
            row.case, row.call, row.time, ms(row.ms / row.info["modules"]),
            f"× {of_one_alone(row):.2f}", row.against("peer0_q1"), row.against("peer1_qr"),
            f"{row.info['captured_of_optimum']:.4f}", row.memory,
        ])  # fmt: skip
    return table(header, body)


def of_one_alone(row: Row) -> float:
    """Time of one module of many over that of one module alone."""
    return 1 / (row.info["modules"] * row.arms["one_module"]["ratio"])


def goals(steps: list[Row], models: list[Row], files: list[dict[str, Any]]) -> str:
    """What was aimed at, what came of it."""
    found = {(row.case, row.info["basis"]): row for row in steps if row.info["op"] == "aggregate"}
    large = "4096², K = 32, r = 16, R = 32, "
    small, many = "1024², K = 8, r = 8, R = 16, partly", "1024², K = 32, r = 8, R = 16, partly"
    body: list[list[str]] = []

    def ratio(case: str, basis: str, arm: str, least: float) -> None:
        row = found.get((case, basis))
        arm = (row.info.get("matched", arm) if arm == "peer0" else arm) if row else arm
        if row is not None and arm in row.arms:
            value = row.arms[arm]["ratio"]
            body.append([
                f"{case}: {basis} ≥ {least:g} × {name_of(arm)}", f"×{value:.2f}",
                met(value >= least),
            ])  # fmt: skip

    ratio(large + "partly", "update", "peer0", 0.5)
    ratio(large + "shared", "update", "peer0", 0.5)
    ratio(large + "disjoint", "update", "peer0", 0.9)
    ratio(large + "partly", "consensus", "peer0_q1", 0.6)
    ratio(large + "partly", "consensus", "peer1_qr", 2.5)
    ratio(small, "update", "peer1_qr", 0.5)
    ratio(small, "consensus", "peer1_qr", 0.3)
    ratio(many, "update", "peer0", 0.6)
    ratio(many, "update", "peer1_qr", 3)
    for kind in ("shared", "partly"):
        row = found.get((large + kind, "consensus"))
        if row is not None:
            held = row.info["captured"] / row.info["attainable"]
            body.append([f"{row.case}: consensus captured / attainable ≥ 0.98", f"{held:.4f}",
                         met(held >= 0.98)])  # fmt: skip
    for row in models:
        value = min(row.arms[arm]["ratio"] for arm in ("peer0_q1", "peer1_qr"))
        least = {"update": 1.3, "consensus": 0.7}[row.info["basis"]]
        body.append([f"{row.case}: {row.info['basis']} ≥ {least:g} × the best peer's loop",
                     f"×{value:.2f}", met(value >= least)])  # fmt: skip
    for i in files:
        what = f"files, K = {i['clients']}"
        body.append([f"{what}: ≥ 85 % of the in-memory rate", f"{100 * i['rate_of_memory']:.0f} %",
                     met(i["rate_of_memory"] >= 0.85)])  # fmt: skip
        body.append([f"{what}: peak ≤ state + 2 × largest module + 300 MB",
                     f"{i['peak_mb']:.0f} of {allowed(i):.0f} MB",
                     met(i["peak_mb"] <= allowed(i))])  # fmt: skip
    return table(["goal", "measured", "met"], body)


def met(yes: bool) -> str:
    return "yes" if yes else "**no**"


def page(
    rows: list[Row], growth: list[dict[str, Any]], files: list[dict[str, Any]], docs: Path
) -> str:
    steps = [r for r in rows if r.is_step and "one_module" not in r.arms]
    models = [r for r in rows if "one_module" in r.arms]
    ops = [r for r in rows if not r.is_step]
    parts = [
        "# Performance",
        "Generated by `python bench/report.py` from the JSON under `bench/results`, which "
        "`make bench` stores; how it is measured stands in [bench/README.md](../bench/README.md). "
        "Ratios are peer ÷ glora within interleaved rounds: above 1 glora is faster. glora's "
        "times include certificates and per-client statistics, which no peer computes. "
        "`update` answers the question of peers (0)–(4); `consensus` answers another, so its "
        "ratios compare cost alone.",
        conditions(rows),
        "## Goals",
        goals(steps, models, files),
        "No bench yet: `update` without per-client statistics (≥ 1.0 × (0) at the same power "
        "steps), and 16 modules of 2048² (≥ 1.5 and 0.35 × the best peer's loop).",
        "## One server step",
        steps_table(steps),
    ]
    if steps:
        picture(steps, docs / "performance.png")
        parts.append("![Times of one server step](performance.png)")
    if models:
        parts += ["## A whole model in one call", model_table(models)]
    if files:
        parts += [
            "## Files to result",
            "Adapter folders in the system's cache → state. In memory: `aggregate` on the same "
            "tensors, read before. Peak: highest resident memory of a fresh process that also "
            "saves the state.",
            files_table(files),
        ]
    if growth:
        growth_picture(growth, docs / "growth.png")
        parts += [
            "## Growth",
            "One size at a time, two power steps. Predicted: the exponent, fitted over the same "
            "values, of N·d·(N + 2R) solved exactly and N·d·(R + 16) by iterations.",
            growth_table(growth),
            "![Growth](growth.png)",
        ]
    parts += ["## Every arm", arms_table([*steps, *models])]
    if ops:
        parts += ["## Single ops", ops_table(ops)]
    parts += report_gpu.section(docs)
    return "\n\n".join(parts) + "\n"


def load(files: list[Path]) -> tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]:
    """Races, points of growth curves, and runs from files."""
    rows, growth, runs = [], [], []
    for entry in (e for file in files for e in json.loads(file.read_text())["benchmarks"]):
        info = entry["extra_info"]
        if "growth" in info:
            growth.append(info)
        elif "files" in info:
            runs.append(info | {"files_ms": 1e3 * entry["stats"]["median"]})
        else:
            rows.append(Row(entry))
    return rows, growth, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: bench/results/*.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page is written")
    parser.add_argument("--readme", action="store_true", help="print the headline table alone")
    given = parser.parse_args()
    files = given.json or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no JSON in {RESULTS}: run pytest bench --benchmark-json FILE first")
    rows, growth, runs = load(files)
    if given.readme:
        print(steps_table([r for r in rows if r.is_step and r.info["op"] == "aggregate"]))
        print("\n" + conditions(rows))
        return
    path = given.docs / "performance.md"
    path.write_text(page(rows, growth, runs, given.docs))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
