"""What runs on a GPU have shown, bench/results/gpu/*/run.jsonl, as Markdown for the pages.

Rehearsals are never shown. Of a step that ran more than once the last attempt counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from page_parts import table

from gpu.lines import NAME, attempts, read

__all__ = ["GOALS", "section"]

Line = dict[str, Any]
HOW = (
    "`python bench/gpu_run.py OUT --minutes 9` measures all there is in one run, each step within "
    "a time limit of its own ([bench/README.md](../bench/README.md#on-a-gpu)); OUT belongs below "
    "`bench/results/gpu`, and `python bench/report_gpu.py` puts its tables here. What launches "
    "must move and multiply is counted apart, [bench/results/gpu.md](../bench/results/gpu.md)."
)


def section(folder: Path) -> str:
    """Everything stored below `folder`, newest name last."""
    runs = [(path.parent, read(path)) for path in sorted(folder.glob(f"*/{NAME}"))]
    real = [(at, lines) for at, lines in runs if not any(x.get("rehearsal") for x in lines)]
    if not real:
        return f"## GPU: not measured yet\n\n{HOW}"
    return "\n\n".join(["## GPU", HOW, *(one(at, lines) for at, lines in real)])


def one(at: Path, lines: list[Line]) -> str:
    """One folder's run: the card, how every step ended, and what is to be known from each."""
    found = {step: rows for step, rows in attempts(lines).items() if step != "run"}
    rows = {step: [x for x in part if x["kind"] == "row"] for step, part in found.items()}
    parts = [f"### {at.name}", card(rows.get("ceilings", [])), outcomes(found)]
    for step, shown in SHOWN.items():
        told = shown(rows.get(step, []))
        if told:
            parts.append(told)
    if (at / "rows.json").exists():
        parts.append(single_parts(json.loads((at / "rows.json").read_text())))
    return "\n\n".join(part for part in parts if part)


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def card(rows: list[Line]) -> str:
    versions = next((x for x in rows if x["what"] == "versions"), None)
    if versions is None:
        return ""
    rates = [f"{x['of']} {number(x['tflop_s'])}" for x in rows if "tflop_s" in x]
    copies = [f"copies {number(x['gb_s'])} GB/s" for x in rows if "gb_s" in x]
    return (
        f"{versions['device']}; Python {versions['python']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, glora {versions['glora']}. "
        + "; ".join([*copies, *(["products " + ", ".join(rates) + " TFLOP/s"] if rates else [])])
        + "."
    )


def outcomes(found: dict[str, list[Line]]) -> str:
    body = []
    for step, lines in found.items():
        last = lines[-1]
        how = last.get("outcome", "skipped" if last["kind"] == "skipped" else "cut off")
        failed = [x for x in lines if x["kind"] == "row" and ("error" in x or x.get("ok") is False)]
        body.append([step, how, number(last.get("seconds")), str(len(failed))])
    return table(["step", "ended", "seconds", "rows that failed"], body)


def headline(rows: list[Line]) -> str:
    """Milliseconds beside the peers', and what each answer captures."""
    timed = [x for x in rows if "ms" in x]
    ours = {x["case"]: x["ms"] for x in timed if x["way"] == "glora, replayed"}
    body = []
    for x in timed:
        low, high = x["ms_quartiles"]
        glora = ours.get(x["case"])
        body.append([
            f"{x['case']}, {x['dtype']}, R = {x['rank']}, q = {x['q']}", x["way"],
            f"{number(x['ms'])} ({number(low)}–{number(high)}), {x['rounds']} rounds",
            "–" if glora is None else f"×{x['ms'] / glora:.2f}",
            number(GOALS.get(x["case"]) if x["way"] == "glora, replayed" else None),
            f"{x['captured'] / x['optimum']:.4f}", number(x.get("peak_gb")),
        ])  # fmt: skip
    header = ["server step", "way", "ms (quartiles)", "÷ glora, replayed", "goal, ms",
              "captured / optimum", "peak GB"]  # fmt: skip
    return table(header, body) if body else ""


def facts(rows: list[Line]) -> str:
    """The worst of each fact."""
    sums = [x for x in rows if x.get("fact") == "sum" and "error_u32" in x]
    body = []
    for word, d in dict.fromkeys((x["word"], x["d"]) for x in sums):
        same = [x for x in sums if (x["word"], x["d"]) == (word, d)]
        body.append([f"{word}, sums of {d}", *(
            number(next((x["error_u32"] for x in same if x["dtype"] == dtype), None))
            for dtype in ("bfloat16", "float16", "float32")
        )])  # fmt: skip
    parts = [table(["worst error in u32", "bf16", "fp16", "fp32"], body)] if body else []
    bits = [x for x in rows if x.get("fact") == "bits" and "unequal" in x]
    if bits:
        bad = sum(x["unequal"] for x in bits)
        parts.append(f"{sum(x['repeats'] for x in bits)} repeats: {bad} differed in a bit.")
    return "\n\n".join(parts)


def failing_tests(rows: list[Line]) -> str:
    counts = [x["so_far"] for x in rows if "so_far" in x]
    failed = [f"`{x['test'].rpartition('/')[2]}`" for x in rows if "test" in x]
    if not counts:
        return ""
    told = ", ".join(f"{n} {outcome}" for outcome, n in counts[-1].items())
    return f"Tests: {told}." + (f" Failed: {', '.join(failed)}." if failed else "")


def profile(rows: list[Line]) -> str:
    total = sum(x["ms"] for x in rows)
    body = [
        [f"`{x['kernel']}`", str(x["calls"]), number(x["ms"]), f"{100 * x['ms'] / total:.0f} %"]
        for x in rows[:12]
    ]
    return table(["kernel, 7B, K = 100", "calls", "ms", "of all shown"], body) if body else ""


def probes(rows: list[Line]) -> str:
    body = [[x["probe"], x["of"], number(x["ms"]), number(x["tflop_s"])] for x in rows if "ms" in x]
    return table(["probe", "of", "ms", "TFLOP/s"], body) if body else ""


def single_parts(stored: dict[str, Any]) -> str:
    """The pytest-benchmark rows of bench/test_gpu.py."""
    body = []
    for i in (entry["extra_info"] for entry in stored["benchmarks"]):
        share = i.get("share_of_copy")
        body.append([
            f"{i['case']}, {i['dtype'].removeprefix('torch.')}", i["way"],
            number(i["event_ms_cold"]), number(i["event_ms_warm"]), number(i["peak_bytes"] / 1e9),
            "–" if share is None else f"{100 * share:.0f} %",
        ])  # fmt: skip
    return table(["single part", "way", "cold, ms", "warm, ms", "peak, GB", "of copy speed"], body)


# Milliseconds at most, and three times faster than plain torch.
GOALS = {"7B, K = 10": 12, "7B, K = 100": 35, "4096², K = 100": 3, "1024², K = 8": 0.5}
# What of each step is shown, in order.
SHOWN = {
    "headline": headline, "facts": facts, "tests": failing_tests, "profile": profile,
    "probes": probes,
}  # fmt: skip
