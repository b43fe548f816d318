"""Profiles of hypothesis, one thread per worker, and the tally of what was drawn."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from strategies import TALLY

COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
    "print_blob": True,
}
# Triton decides at import between interpreter and compiler, so kernels are tested in a process of
# their own (`make test`), or on a device (`make test-gpu`).
KERNELS = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("GLORA_DEVICE") == "cuda"
collect_ignore_glob = [] if KERNELS else ["test_kernel_*.py"]

settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("deep", max_examples=300, **COMMON)
settings.load_profile(os.environ.get("GLORA_HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its counts to the controller."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["glora_tally"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    TALLY.update(getattr(node, "workeroutput", {}).get("glora_tally", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLY["drawn"]:
        return
    terminalreporter.section("drawn cases of the accuracy contract")
    for name, number in sorted(TALLY.items(), key=lambda item: (item[0] != "drawn", item[0])):
        terminalreporter.write_line(f"{number:8d}  {name}")
