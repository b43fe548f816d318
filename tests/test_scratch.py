"""Stacks in files: the same bits, memory that does not grow with the clients, nothing left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_batches import Counting, factors, model, same

import glora_ops as glora
from glora_ops import GloraError, batches
from glora_ops.runtime import scratch

pytestmark = pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_bytes", [1, 5_000])
def test_same_bits(
    dtype: torch.dtype, max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 1)  # every module alone, as large ones are
    made: list[int] = []
    plain = scratch._reserve
    monkeypatch.setattr(
        scratch, "_reserve", lambda file, size: (made.append(file), plain(file, size))
    )
    clients = [{m: (b.to(dtype), a.to(dtype)) for m, (b, a) in c.items()} for c in model()]
    told = []
    with_files = glora.aggregate(
        clients, rank=6, max_bytes=max_bytes, scratch=tmp_path, progress=lambda *x: told.append(x)
    )
    assert made
    assert not list(tmp_path.iterdir())
    assert told[-1] == (15, 15)
    same(with_files, glora.aggregate(clients, rank=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_hold_the_stacks(dtype: torch.dtype, tmp_path: Path) -> None:
    """The allocator's own log: in memory a stack of 4 MB in fp32 and the solver, here it alone."""
    clients = [tuple(x.to(dtype) for x in factors(i, 8, 2048, 2048)) for i in range(32)]
    sources = [Counting({"": pair}) for pair in clients]
    activities = [torch.profiler.ProfilerActivity.CPU]

    def peak(**limit: object) -> int:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            glora.aggregate(sources, rank=8, power_iters=1, **limit)
        alive = most = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        return most

    stacked = 32 * 8 * (2048 + 2048) * 4
    peak()  # test matrices are kept
    assert peak(max_bytes=1, scratch=tmp_path) <= peak() - 0.9 * stacked


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    class Failing(Counting):
        def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glora.aggregate([Failing(c) for c in model()], rank=4, max_bytes=1, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    assert scratch.empty((3,), torch.float32).numel() == 3
    assert getattr(scratch._here, "folder", None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="files without a name")
def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from glora_ops.runtime import scratch\n"
        "with scratch.in_folder(sys.argv[1]): x = scratch.empty((1000,), torch.float32)\n"
        "x.fill_(1); print(float(x.sum()), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1000.0\n"
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [factors(i, 3, 20, 30) for i in range(2)]
    with pytest.raises(GloraError, match=r"max_bytes: got 1, expected at least .* scratch"):
        glora.aggregate(pairs, max_bytes=1)
    with pytest.raises(GloraError, match=r"scratch: got .*none.*an existing folder"):
        glora.aggregate(pairs, max_bytes=1, scratch=tmp_path / "none")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scratch, "_reserve", full)
    with pytest.raises(GloraError, match=r"No space left on device.*raise max_bytes"):
        glora.aggregate(pairs, max_bytes=1, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
