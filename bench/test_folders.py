"""Files to result: adapter folders of a real model's shapes, against the same in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_clients
from measure import conditions, spread

import glora_ops
from glora_ops import GloraWarning, State
from glora_ops.adapters import read_adapter

MODEL, CLIENTS, RANK, DTYPE, SERVER = "llama-3.2-1b", 32, 24, torch.float32, 32


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Folders just written: their pages are in the system's cache."""
    root = tmp_path_factory.mktemp("clients")
    folders = write_clients(root, MODEL, CLIENTS, RANK, DTYPE)
    yield folders
    for file in root.rglob("*.safetensors"):
        file.unlink()


def test_files_to_result(clients: list[Path], benchmark: Any) -> None:
    """aggregate_adapters on warm files; between its rounds aggregate on the same in memory."""
    adapters = [read_adapter(folder) for folder in clients]
    scalings = [{m: x.scaling for m, x in a.modules.items()} for a in adapters]
    weights = [a.num_examples or 1 for a in adapters]
    size = adapters[0].stored.signature[0]
    assert size >= 50e6
    held = [{m: a.factors(m) for m in a.modules} for a in adapters]
    largest = max(
        len(adapters) * x.rank * (x.d_out + x.d_in) * x.b_dtype.itemsize
        for x in adapters[0].modules.values()
    )
    in_memory: list[float] = []

    def from_memory() -> State:
        return glora_ops.aggregate(held, weights, scalings, SERVER)

    def from_files() -> State:
        return glora_ops.aggregate_adapters(clients, rank=SERVER)

    def setup() -> None:
        start = time.perf_counter()
        from_memory()
        in_memory.append(time.perf_counter() - start)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GloraWarning)
        if benchmark.disabled:
            one, two = from_files(), from_memory()
            assert all(torch.equal(m.u, two.modules[k].u) for k, m in one.modules.items())
            state = one
        else:
            state = benchmark.pedantic(from_files, setup=setup, rounds=3)
    info = benchmark.extra_info
    info.update(
        op="aggregate_adapters", model=MODEL, clients=len(clients), rank=SERVER, r=RANK,
        dtype=str(DTYPE).removeprefix("torch."), adapter_mb=size / 1e6, files=True,
        modules=len(state.modules), largest_mb=largest / 1e6, captured=state.captured,
        attainable=state.attainable, captured_of_optimum=state.captured / state.attainable,
        state_mb=sum(x.nbytes for m in state.modules.values() for x in vars(m).values()) / 1e6,
        **conditions(),
    )  # fmt: skip
    if benchmark.stats is None:
        return
    own = benchmark.stats.stats.data
    info["memory_ms"] = 1e3 * spread(in_memory)[0]
    info["rate_of_memory"] = spread([m / f for m, f in zip(in_memory, own, strict=True)])[0]
    child = [sys.executable, str(Path(__file__).with_name("folders.py")), str(clients[0].parent)]
    done = subprocess.run([*child, "--measure"], capture_output=True, text=True, check=True)
    info.update(json.loads(done.stdout))
