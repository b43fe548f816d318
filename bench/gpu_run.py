"""Everything there is to learn from a GPU, in one run of some minutes that may be cut off anywhere.

    python bench/gpu_run.py OUT --minutes 9              # all steps, most wanted first
    python bench/gpu_run.py OUT --only smoke headline    # some again, into the same files
    python bench/gpu_run.py OUT --rehearse               # without a device: nothing is measured

Each step is a process with a time limit; what it finds stands in OUT/run.jsonl line by line, at
once. What no time is left for is named there. bench/README.md says what is needed and what to do
with the files.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from gpu.lines import NAME, Lines
from gpu.parent import Step, run

STEPS = [
    Step("ceilings", 30, "versions; copy bandwidth and product rates of this card"),
    Step("smoke", 75, "every kernel once, small, against float64; seconds to compile"),
    Step("facts", 45, "truncated sums, bits that repeat, long grids, captures, host time"),
    Step("tests", 200, "kernels, contract and graphs under pytest"),
    Step("headline", 120, "server steps beside plain torch and an implicit randomized SVD"),
    Step("profile", 30, "where the time of one call goes, by kernel"),
    Step("counters", 60, "bytes, occupancy and stalls of single kernels, by ncu"),
    Step("probes", 60, "tiles and rates that the next design counts on"),
    Step("rows", 3600, "bench/test_gpu.py: the pytest-benchmark rows", asked=True),
    Step("memcheck", 1200, "accesses beyond a buffer, by compute-sanitizer", asked=True),
]


def main() -> None:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for run.jsonl, log.txt and some tables")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: 9)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--rehearse", action="store_true", help="interpreter and tiny shapes")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    # A rehearsal is no measurement: a busy machine may take its time.
    patience = 20 if given.rehearse else 1
    chosen = [
        replace(s, seconds=patience * s.seconds)
        for s in STEPS
        if (s.name in given.only if given.only else not s.asked)
    ]
    out = given.out.resolve()
    Lines(out / NAME, step="run").add(
        "start", minutes=given.minutes, rehearsal=given.rehearse, steps=[s.name for s in chosen]
    )
    bad = run(chosen, out, 60 * patience * given.minutes, given.rehearse)
    print(f"{out / NAME}: " + (f"not done: {', '.join(bad)}" if bad else "all done"))
    sys.exit(len(bad) > 0)


if __name__ == "__main__":
    main()
