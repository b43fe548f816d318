"""`make fuzz`: SEED and COUNT decide every input; outcomes are counted, findings are written down.

A finding is a traceback, an input that takes longer than `LONGEST` seconds, or one that makes the
process grow by `GROWTH` bytes. Each is written to tests/fuzz/cases, where the tests find it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS, Files, outcome, sound

CASES = Path(__file__).parent / "cases"
LONGEST = 60  # seconds: of hangs, not of a busy machine
GROWTH = 2**30


class Hang(BaseException):
    """No error that anybody catches."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def grown() -> int:
    """Most memory this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(target: str, files: Files) -> tuple[str, str]:
    """The outcome, and of a finding what was raised."""
    held = grown()
    with TemporaryDirectory() as folder:
        try:
            with limited():
                found, why = outcome(target, files, Path(folder)), ""
        except Hang as error:
            found, why = "hang", str(error)
        except Exception:  # none is expected: whatever it is, it is the finding
            found, why = "traceback", traceback.format_exc()
    if grown() - held > GROWTH:
        found, why = "memory", f"{(grown() - held) / 2**20:.0f} MiB"
    return found, why


def drawn(seed: int, number: int) -> tuple[str, Files]:
    """Input `number` of a seed."""
    rng = random.Random(f"{seed}/{number}")
    (target,) = rng.choices(list(TARGETS), [t.share for t in TARGETS.values()])
    return target, TARGETS[target].draw(rng)


def inputs(seed: int, numbers: range) -> tuple[Counter[tuple[str, str]], list[dict[str, Any]]]:
    """Outcomes by target and kind, and the findings."""
    import torch

    torch.set_num_threads(1)
    sound()
    counts: Counter[tuple[str, str]] = Counter()
    findings = []
    for number in numbers:
        target, files = drawn(seed, number)
        found, why = judged(target, files)
        counts[target, found] += 1
        if found in ("hang", "traceback", "memory"):
            findings.append({"target": target, "found": found, "why": why, "files": files})
    return counts, findings


def write_case(finding: dict[str, Any]) -> Path:
    files = {name: content.decode("latin-1") for name, content in finding["files"].items()}
    text = json.dumps({"target": finding["target"], "files": files}, indent=1)
    path = CASES / f"{finding['target']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.write_text(text + "\n")
    return path


def read_case(path: Path) -> tuple[str, Files]:
    case = json.loads(path.read_text())
    return case["target"], {name: text.encode("latin-1") for name, text in case["files"].items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    parts = [range(k, given.count, given.jobs) for k in range(given.jobs)]
    with get_context("spawn").Pool(given.jobs) as pool:
        results = pool.starmap(inputs, [(given.seed, part) for part in parts])
    total: Counter[tuple[str, str]] = sum((counts for counts, _ in results), Counter())
    for target in TARGETS:
        kinds = {kind: n for (name, kind), n in sorted(total.items()) if name == target}
        print(f"{target:<10}" + "  ".join(f"{kind} {n}" for kind, n in kinds.items()))
    seen: dict[str, int] = Counter()
    for _, findings in results:
        for finding in findings:
            last = finding["why"].strip().splitlines()[-3:]
            seen["\n  ".join(last)] += 1
            if seen["\n  ".join(last)] == 1:
                print(f"{finding['found']}: {write_case(finding)}\n{finding['why']}")
    print(f"{sum(total.values())} inputs, {sum(seen.values())} findings, {len(seen)} of a kind")
    return bool(seen)


if __name__ == "__main__":
    sys.exit(main())
