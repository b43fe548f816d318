"""The kernels' tests, the contract and the graphs under pytest: every failure a line at once."""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.step import Step, main

TESTS = Path(__file__).resolve().parents[2] / "tests"
NEEDED = ("pytest", "hypothesis", "scipy")
OFTEN = 50  # tests between two lines of counts


class Told:
    """A pytest plugin that tells of failures at once and of numbers now and then."""

    def __init__(self, step: Step) -> None:
        self.step, self.counts = step, Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.failed(report)
        elif self.counts.total() % OFTEN == 0:
            self.tell()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed(report)

    def failed(self, report: Any) -> None:
        reason = str(getattr(report.longrepr, "reprcrash", "") or report.longrepr)
        reason = reason.rpartition(str(TESTS.parent))[2].strip("/")
        with self.step.row(test=report.nodeid, error=reason.splitlines()[0][:300]) as r:
            r["ok"] = False

    def tell(self) -> None:
        self.step.lines.add("row", so_far=dict(self.counts))


def body(step: Step) -> None:
    with step.row(needed=NEEDED) as r:
        r["missing"] = [name for name in NEEDED if find_spec(name) is None]
        r["ok"] = not r["missing"]
    if step.wrong:
        return
    os.environ["GLORA_HYPOTHESIS_PROFILE"] = "quick"
    if not step.rehearse:
        os.environ["GLORA_DEVICE"] = "cuda"
    import pytest

    many = ["-n", str(min(os.cpu_count() or 1, 12))] if find_spec("xdist") else []
    chosen = (
        [str(TESTS / "test_kernel_passes.py"), "-k", "nothing_to_add or two_to_the_31_in"]
        if step.rehearse
        else [*many, *map(str, sorted(TESTS.glob("test_kernel_*.py"))), str(TESTS / "test_gpu.py")]
    )
    told = Told(step)
    status = pytest.main(
        ["-p", "no:cacheprovider", f"--junitxml={step.out / 'junit.xml'}", *chosen], plugins=[told]
    )
    told.tell()
    with step.row(pytest=int(status)) as r:
        r["ok"] = status == 0


if __name__ == "__main__":
    main(body)
