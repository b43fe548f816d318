"""Tables and a picture from stored benchmark JSON, and from nothing else.

python bench/report.py [JSON …] [--readme] [--picture PNG]

Without files: every JSON under bench/results. Ratios are peer time over glora time, per round,
medians: ×2.0 means glora was twice as fast. --readme prints the table for the README alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "peer0_q0": "(0) randomized SVD of stacks, q = 0",
    "peer1_qr": "(1) thin QR of stacks + SVD",
    "peer2_peft": "(2) PEFT svd",
    "peer3_lowrank": "(3) dense mean + svd_lowrank",
    "peer4_svd": "(4) dense mean + full SVD",
    "peer5_loop": "(5) QR loop over clients",
    "glora_projector": "glora, projector",
    "one_by_one": "the same op, module by module",
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
        return f"{shape}, {i['population']}"

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


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        if case.endswith(", partly") and "/" not in case and (case, "consensus") in raced
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
    fig.savefig(path, dpi=130, facecolor="white")
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: bench/results/*.json")
    parser.add_argument("--readme", action="store_true", help="the headline table alone")
    parser.add_argument("--picture", type=Path, help="default: beside the first JSON, .png")
    given = parser.parse_args()
    files = given.json or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no JSON in {RESULTS}: run pytest bench --benchmark-json FILE first")
    rows = [Row(e) for file in files for e in json.loads(file.read_text())["benchmarks"]]
    steps, ops = [r for r in rows if r.is_step], [r for r in rows if not r.is_step]
    if steps:
        print(steps_table(steps), end="\n\n")
    print(conditions(rows))
    if given.readme:
        return
    if steps:
        print("\n### Every arm\n\n" + arms_table(steps))
    if ops:
        print("\n### Single ops\n\n" + ops_table(ops))
    if steps:
        path = given.picture or files[0].with_suffix(".png")
        picture(steps, path)
        print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
