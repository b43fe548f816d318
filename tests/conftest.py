"""Profiles of hypothesis, one thread per worker, the tally of what was drawn, adapter folders."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

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

# Whatever starts the tests in the background may have them ignore Ctrl-C, which they send.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("quick", max_examples=10, derandomize=True, database=None, **COMMON)
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


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the client `name` of CLIENTS, saved once by PEFT; not to be changed."""
    import peft_models  # slow to import: only where it is needed
    from adapter_folders import CLIENTS

    root = tmp_path_factory.mktemp("clients")

    def get(name: str) -> Path:
        if not (root / name).exists():
            base, config = CLIENTS[name]
            peft_models.save_client(root / name, base, **config)
        return root / name

    return get


@pytest.fixture
def client(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A sound adapter of the mixed model, to be spoilt."""
    return shutil.copytree(saved("alpha"), tmp_path / "client-7")
