"""results/protocol.jsonl -> results/protocol.md: sweeps, cells, tests; prints which mode is glora.

python experiments/protocol_tables.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import orientations
from outer_bounds import BOUNDS
from protocol import ARMS, CELLS, LONG, RESULTS, SEEDS, SKEWED, TUNING, Ledger
from statistics_of_runs import holm, mcnemar, sign_permutation

from glora_ops.fl.report_folder import table
from glora_ops.fl.summary import bootstrap

MODES = ("consensus", "restart", "momentum")  # candidates for glora, fixed on the tuning seeds
Run = Mapping[str, Any]
Runs = dict[str, dict[str, dict[int, Run]]]  # cell, arm, seed
Choice = tuple[float, str]  # rate and knobs as JSON


def reported(ledger: Ledger) -> Runs:
    out: Runs = defaultdict(lambda: defaultdict(dict))
    for x in ledger.done.values():
        if x["held_out"] == "test":
            out[x["cell"]][x["arm"]][x["seed"]] = x
    return out


def tuned(ledger: Ledger) -> dict[str, dict[str, dict[Choice, float]]]:
    """Mean score of every choice that all tuning seeds have tried, by cell and arm."""
    tried: dict[tuple[str, str, Choice], list[float]] = defaultdict(list)
    for x in ledger.done.values():
        if x["held_out"] == "validation":
            choice = (x["lr"], json.dumps(x["knobs"], sort_keys=True))
            tried[x["cell"], x["arm"], choice].append(x["end_point"])
    out: dict[str, dict[str, dict[Choice, float]]] = defaultdict(lambda: defaultdict(dict))
    for (cell, arm, choice), scores in tried.items():
        if len(scores) == len(TUNING):
            out[cell][arm][choice] = fmean(scores)
    return out


def mode_of_glora(scores: Mapping[str, Mapping[str, Mapping[Choice, float]]]) -> dict[str, float]:
    """Mean over the skewed cells of each candidate's best score; only where all are swept."""
    skewed = ["_".join(c) for c in SKEWED]
    if any(not scores.get(cell, {}).get(mode) for cell in skewed for mode in MODES):
        return {}
    return {m: fmean(max(scores[cell][m].values()) for cell in skewed) for m in MODES}


def cell_table(arms: Mapping[str, Mapping[int, Run]], glora: str) -> str:
    """One row an arm: end point, the clients' own scores, bytes, and glora minus the arm.

    Bounds are described and not tested: Holm's family is the arms that compete.
    """
    gains = {
        arm: [arms[glora][s]["end_point"] - runs[s]["end_point"] for s in sorted(runs)
              if s in arms.get(glora, {})]
        for arm, runs in arms.items()
    }  # fmt: skip
    p = {
        arm: sign_permutation(x)
        for arm, x in gains.items()
        if arm not in (glora, *BOUNDS) and len(x) > 1
    }
    corrected = holm(p)
    rows = []
    for arm, runs in sorted(arms.items(), key=lambda x: -fmean(mean_of(x[1]))):
        own = [fmean(x for x in r["own"] if x is not None) for r in runs.values()]
        worst = [min(x for x in r["own"] if x is not None) for r in runs.values()]
        first = next(iter(runs.values()))
        row = [
            arm + " **(glora)**" * (arm == glora) + " *(bound)*" * (arm in BOUNDS),
            shown(first["lr"], first["knobs"]), str(len(runs)),
            pm(mean_of(runs)), pm(own), pm(worst),
            f"{fmean(r['bytes'] for r in runs.values()) / 1e6:.1f}",
        ]  # fmt: skip
        if arm != glora and len(gains[arm]) > 1:
            low, high = bootstrap(gains[arm])
            won = sum(x > 0 for x in gains[arm])
            row += [f"{fmean(gains[arm]):+.3f}", f"{low:+.3f} … {high:+.3f}",
                    f"{won} of {len(gains[arm])}",
                    *(f"{x[arm]:.3f}" if arm in x else "–" for x in (p, corrected)),
                    instances(arms[glora], runs)]  # fmt: skip
        else:
            row += ["–"] * 6
        rows.append(row)
    header = ("arm", "rate, knobs", "seeds", "end point", "own", "worst client", "MB",
              "glora minus", "95 %", "ahead", "p", "p (Holm)", "McNemar")  # fmt: skip
    return table(header, rows)


def instances(one: Mapping[int, Run], other: Mapping[int, Run]) -> str:
    """Seeds where one model is right on more digits by McNemar at 0.05, and where the other is."""
    ahead = behind = 0
    if not all(r["predictions"] for runs in (one, other) for r in runs.values()):
        return "–"
    for seed in sorted(set(one) & set(other)):
        right = [
            [a == b for a, b in zip(r[seed]["predictions"], r[seed]["labels"], strict=True)]
            for r in (one, other)
        ]
        only, rest, p = mcnemar(*right)
        ahead += p < 0.05 and only > rest
        behind += p < 0.05 and only < rest
    return f"{ahead} : {behind}"


def mean_of(runs: Mapping[int, Run]) -> list[float]:
    return [r["end_point"] for r in runs.values()]


def pm(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def shown(lr: float, knobs: Mapping[str, Any]) -> str:
    return ", ".join([f"{lr:.4g}", *(f"{k} {v}" for k, v in knobs.items())])


def main() -> None:
    ledger = Ledger(RESULTS)
    runs, scores = reported(ledger), tuned(ledger)
    modes = mode_of_glora(scores)
    glora = max(modes, key=lambda m: modes[m]) if modes else ""
    said = ", ".join(f"{m} {x:.3f}" for m, x in modes.items()) or "not all sweeps are done"
    parts = ["# Digits by the protocol", "Printed by `experiments/protocol_tables.py`.",
             f"**glora** is {glora or 'not fixed yet'}: mean tuning score of {said}."]  # fmt: skip
    for cell in ("_".join(c) for c in (*CELLS, orientations.CELL, LONG)):
        if runs.get(cell) and (glora or "restart") in runs[cell]:
            missing = [a for a, r in runs[cell].items() if len(r) < len(SEEDS)]
            note = f" Not all seeds yet: {', '.join(missing)}." if missing else ""
            parts += [f"## {cell}", f"McNemar: seeds with p < 0.05 for glora : for the arm.{note}",
                      cell_table(runs[cell], glora or "restart")]  # fmt: skip
    parts.append("## Sweeps")
    for cell, arms in scores.items():
        rows = [
            (arm, "; ".join(f"{shown(lr, json.loads(k))}: {x:.3f}"
                            for (lr, k), x in sorted(arms[arm].items(), key=lambda y: y[0][::-1])),
             "{}".format(shown((c := max(arms[arm], key=lambda y: arms[arm][y]))[0],
                               json.loads(c[1]))))
            for arm in ARMS if arm in arms
        ]  # fmt: skip
        parts += [f"### {cell}", table(("arm", "score at each rate", "chosen so far"), rows)]
    RESULTS.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(parts[2])


if __name__ == "__main__":
    main()
