"""A state whose clients lie beside it, replaced in place and killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from job_clients import save_clients
from kills import killer

from glora_ops import State, aggregate_adapters, state_file


def test_a_kill_while_a_state_is_replaced_leaves_the_old_or_the_new(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed right before each of its calls that change files, in turn."""
    monkeypatch.setattr(state_file, "BESIDE", 2)
    state = aggregate_adapters(save_clients(tmp_path / "in", 3, layers=1, head=False), rank=3)
    path = tmp_path / "server.safetensors"
    other = replace(state, weights=tuple(reversed(state.weights)))
    found = []
    for point in range(1, 200):
        state.save(path)
        pid = os.fork()
        if not pid:
            try:
                sys.addaudithook(killer(point, signal.SIGKILL))
                other.save(path)
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        weights = State.load(path).weights
        assert weights in (state.weights, other.weights)
        found.append(weights == other.weights)
        if not killed:
            break
    assert len(found) > 10
    assert found == sorted(found)
    assert set(found) == {False, True}
