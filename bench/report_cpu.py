"""Tables and pictures from stored benchmark JSON, and from nothing else.

python bench/report_cpu.py [JSON …] [--root FOLDER]

Renews the generated parts of docs/performance.md and README.md, the pictures beside the former, and
bench/results/cpu.md with every row. Without files: every JSON under bench/results. Ratios are peer
time over glora time, per round, medians: ×2.0 means glora was twice as fast.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import report_gpu
from goals import allowed, goals
from page_parts import renew, table
from report_pictures import AXES, curves, exponent, growth_picture, picture
from stored_json import Row, load, ms, name_of, threads

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def against(arm: dict[str, Any] | None, *, named: bool = False) -> str:
    if arm is None:
        return "–"
    how = f", q = {arm['steps']}, {arm['form']}" if named else ""
    return f"×{arm['ratio']:.2f} ({ms(arm['median_ms'])} ms{how})"


def step_lines(rows: list[Row]) -> list[list[str]]:
    return [
        [
            row.case, row.call, row.time, against(row.matched, named=True), against(row.peer("1")),
            f"{row.info['captured_of_optimum']:.4f}", row.memory,
            f"{row.info['percent_of_floor']:.0f} %",
        ]
        for row in rows
    ]  # fmt: skip


STEP_HEADER = [
    "case", "call", "ms (quartiles)", "vs (0), equal captured", "vs (1)", "captured / optimum",
    "peak beyond inputs (of one dense)", "of floor",
]  # fmt: skip


def update_table(rows: list[Row]) -> str:
    """The drop-in op with and without per-client statistics, a line for each case."""
    lists = [r for r in rows if r.has(op="aggregate.list", power_iters=None)]
    lean = {r.case: r for r in lists if not r.info["client_statistics"]}
    body = [
        [
            row.case, ms(lean[row.case].ms), ms(row.ms),
            against(lean[row.case].matched, named=True), against(row.matched),
            against(lean[row.case].peer("1")),
            f"{lean[row.case].info['captured_of_optimum']:.4f}",
        ]
        for row in lists
        if row.info["client_statistics"]
    ]  # fmt: skip
    header = [
        "`update`, from lists", "ms", "with statistics, ms", "vs (0)", "with statistics",
        "vs (1)", "captured / optimum",
    ]  # fmt: skip
    return table(header, body)


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Rows of the op from row stacks: (update, consensus) of each case."""
    found = {(r.case, r.info["basis"]): r for r in rows if r.has(op="aggregate")}
    cases = dict.fromkeys(case for case, _ in found)
    return [(found[case, "update"], found[case, "consensus"]) for case in cases]


def both_table(rows: list[Row]) -> str:
    body = []
    for mean, consensus in pairs(rows):
        if mean.info["population"] != "partly" or mean.has(d_out=1024, dtype="bfloat16"):
            continue  # in bench/results/cpu.md
        body.append([
            mean.case, ms(mean.ms), against(mean.matched, named=True), against(mean.peer("1")),
            ms(consensus.ms), f"×{consensus.matched['ratio']:.2f}" if consensus.matched else "–",
            against(consensus.peer("1")), f"{consensus.info['captured_of_optimum']:.4f}",
        ])  # fmt: skip
    header = [
        "with statistics, from row stacks", "`update`, ms", "vs (0)", "vs (1)",
        "`consensus`, ms", "vs (0), q = 1", "vs (1)", "captured / optimum",
    ]  # fmt: skip
    return table(header, body)


def model_table(rows: list[Row]) -> str:
    """A line for each model; everything in ms a module."""
    found = {(r.case, r.info["basis"], r.info["client_statistics"]): r for r in rows}
    body = []
    for case in dict.fromkeys(case for case, _, _ in found):
        lean, mean = found[case, "update", False], found[case, "update", True]
        consensus, modules = found[case, "consensus", True], mean.info["modules"]
        zero, one = mean.peer("0", 1), mean.peer("1")
        body.append([
            case, ms(lean.ms / modules), *(
                f"{ms(r.ms / modules)} (× {1 / (modules * r.arms['one_module']['ratio']):.2f})"
                for r in (mean, consensus)
            ),
            *("–" if a is None else ms(a["median_ms"] / modules) for a in (zero, one)),
            f"{mean.info['captured_of_optimum']:.4f}", mean.memory,
        ])  # fmt: skip
    header = [
        "ms a module (of one module alone)", "`update`, no client statistics", "`update`",
        "`consensus`", "loop of (0), q = 1", "loop of (1)", "captured / optimum",
        "peak beyond inputs",
    ]  # fmt: skip
    return table(header, body)


def files_table(files: list[dict[str, Any]]) -> str:
    header = [
        "clients", "each, MB", "modules", "folders → state, s", "in memory → state, s",
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


def growth_table(growth: list[dict[str, Any]]) -> str:
    header = [
        "solver", "basis", "grows", "values", "ms", "exponent", "predicted", "peak MB",
        "captured / attainable",
    ]  # fmt: skip
    body = [
        [
            solver, basis, AXES[axis], ", ".join(str(i["value"]) for i in points),
            ", ".join(ms(i["median_ms"]) for i in points),
            f"{exponent(points, 'median_ms'):.2f}", f"{exponent(points, 'predicted'):.2f}",
            ", ".join(f"{i['memory_mb']:.0f}" for i in points),
            f"{min(i['captured_of_optimum'] for i in points):.4f}",
        ]
        for (solver, basis, axis), points in curves(growth).items()
    ]  # fmt: skip
    return table(header, body)


def ops_table(rows: list[Row]) -> str:
    header = ["op", "case", "ms (quartiles)", "floor, ms", "of floor", "plain torch", "error"]
    body = []
    for row in rows:
        ((name, arm),) = row.arms.items()
        error, held = row.info.get("relative_error"), row.info.get("trace_of_optimum")
        body.append([
            row.call, row.case, row.time, ms(row.info["floor_ms"]),
            f"{row.info['percent_of_floor']:.0f} %", f"{against(arm)}, {name_of(name, arm)}",
            f"{error:.0e}" if error is not None else f"holds {held:.4f} of the trace",
        ])  # fmt: skip
    return table(header, body)


def arms_table(rows: list[Row]) -> str:
    header = [
        "case", "call", "against", "ms (quartiles)", "ratio (quartiles)", "captured / optimum",
        "peak MB", "rounds", "answer; starts from; LAPACK",
    ]  # fmt: skip
    body = []
    for row in rows:
        for name, a in row.arms.items():
            memory = "–" if a["memory_mb"] is None else f"{a['memory_mb']:.1f}"
            low, high = a["iqr_ms"]
            body.append([
                row.case, row.call, name_of(name, a),
                f"{ms(a['median_ms'])} ({ms(low)}–{ms(high)})",
                f"×{a['ratio']:.2f} ({a['ratio_iqr'][0]:.2f}–{a['ratio_iqr'][1]:.2f})",
                f"{a['captured_of_optimum']:.4f}", memory, str(a["rounds"]),
                f"{a['answer']}; {a['start']}; {a['variant'].removeprefix('LAPACK on ')}",
            ])  # fmt: skip
    return table(header, body)


def readme_table(steps: list[Row], models: list[Row]) -> str:
    """A large stack, a small one and a model, per-client statistics included."""
    body = []
    for mean, consensus in pairs(steps):
        if mean.info["drawn"]:
            zero, one = mean.matched, mean.peer("1")
            body.append([mean.case, *(ms(x) for x in (
                mean.ms, consensus.ms, zero["median_ms"], one["median_ms"],
            ))])  # fmt: skip
    told = {(r.case, r.info["basis"]): r for r in models if r.info["client_statistics"]}
    for case in dict.fromkeys(case for case, _ in told):
        mean, consensus = told[case, "update"], told[case, "consensus"]
        one = mean.peer("1")
        body.append([case, *(ms(x) for x in (
            mean.ms, consensus.ms, mean.peer("0", 1)["median_ms"],
        )), "–" if one is None else ms(one["median_ms"])])  # fmt: skip
    header = ["ms", "`update`", "`consensus`", "randomized SVD of stacks", "exact: QR + SVD"]
    return table(header, body)


def conditions(rows: list[Row]) -> str:
    """What the numbers were measured on; more than one line where files differ."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        i = row.info
        key = (
            f"{i['cpu']}, {threads(i)}, torch {i['torch']}, numpy {i['numpy']}, {i['blas']}, "
            f"commit {i['commit']}"
        )
        lines.setdefault(key, []).append(i)
    out = []
    for key, infos in lines.items():
        loads = [i["load_average"] for i in infos]
        rates = f"copy {infos[0]['copy_gb_s']:.0f} GB/s, sgemm {infos[0]['sgemm_gflop_s']:.0f} GF/s"
        out.append(f"Measured on {key}; {rates}; load average {min(loads):.1f}–{max(loads):.1f}.")
    return "\n".join(out)


def everything(
    steps: list[Row], models: list[Row], ops: list[Row], growth: list[dict[str, Any]], about: str
) -> str:
    """bench/results/cpu.md."""
    return "\n\n".join([
        "# Every bench row",
        "Generated by `python bench/report_cpu.py` from `cpu.json`; how it is measured stands in "
        "[bench/README.md](../README.md), what it means in "
        "[docs/performance.md](../../docs/performance.md).",
        about, "## One server step", table(STEP_HEADER, step_lines([*steps, *models])),
        "## Every arm", arms_table([*steps, *models]), "## Single ops", ops_table(ops),
        "## Growth",
        "One size at a time, two power steps. Predicted: the exponent, fitted over the same "
        "values, of N·d·(N + 2R) solved exactly and N·d·(R + 16) by iterations.",
        growth_table(growth),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: bench/results/*.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="whose pages are renewed")
    given = parser.parse_args()
    files = given.json or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no JSON in {RESULTS}: run make bench first")
    rows, growth, runs = load(files)
    steps = [r for r in rows if r.is_step and "one_module" not in r.arms]
    models = [r for r in rows if "one_module" in r.arms]
    ops = [r for r in rows if not r.is_step]
    about, docs = conditions(rows), given.root / "docs"
    picture(steps, docs / "performance.png")
    growth_picture(growth, docs / "growth.png")
    renew(docs / "performance.md", {
        "conditions": about, "goals": goals([*steps, *models], runs),
        "update": update_table(steps), "both": both_table(steps), "models": model_table(models),
        "files": files_table(runs),
        "pictures": "![Times of one server step](performance.png)\n![Growth](growth.png)",
    })  # fmt: skip
    renew(given.root / "README.md", {"speed": readme_table(steps, models)})
    results = given.root / "bench" / "results"
    (results / "cpu.md").write_text(everything(steps, models, ops, growth, about), "utf-8")
    report_gpu.write(given.root)
    print(f"renewed below {given.root}: docs/performance.md, README.md, bench/results/*.md")


if __name__ == "__main__":
    main()
