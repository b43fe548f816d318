"""Pipes, devices, sockets and folders where a file is named: refused by name, never waited for."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import CLIENTS, everything, glora


def socket_at(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.fchdir(here)
    os.close(here)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": socket_at,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
}
NAMED: dict[str, tuple[str, list[str]]] = {
    "weights": ("w.json", ["aggregate", *CLIENTS, "-o", "out2", "--weights", "w.json"]),
    "tensors": ("ann/adapter_model.safetensors", ["aggregate", *CLIENTS, "-o", "out2"]),
    "configuration": ("ann/adapter_config.json", ["compare", *CLIENTS]),
    "examples": ("ann/glora.json", ["inspect", "ann"]),
    "state": ("out/server.safetensors", ["readout", "out", "-r", "2", "-o", "r2"]),
    "a state by its name": ("out/server.safetensors", ["inspect", "out/server.safetensors"]),
    "state to update": ("out/server.safetensors", ["update", "out", "--add", "bob"]),
    "toml": ("c.toml", ["fl", "run", "c.toml", "-o", "runs"]),
    "run": ("runs/seed0/run.json", ["fl", "report", "runs", "-o", "report"]),
    "rounds": ("runs/seed0/metrics.jsonl", ["fl", "report", "runs", "-o", "report"]),
}


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_file_is_refused_and_nothing_is_waited_for(
    odd: str, named: str, work: Path
) -> None:
    name, command = NAMED[named]
    if "out" in name:
        glora("aggregate", "ann", "bob", "-o", "out")
    path = work / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    ODD[odd](path)
    before = everything(work)
    said = glora(*command, code=1)
    assert "refused" in said.stderr
    assert any(part in said.stderr for part in (path.name, path.parent.name, *name.split("/"))), (
        said.stderr
    )
    assert everything(work) == before


def test_a_file_that_becomes_a_pipe_while_it_is_used_is_not_waited_for(work: Path) -> None:
    from glora_ops.adapters import read_adapter
    from glora_ops.errors import GloraError

    adapter = read_adapter(shutil.copytree(work / "ann", work / "eve"))
    file = Path(str(adapter.stored.path))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(GloraError, match="pipe"):
        adapter.factors(next(iter(adapter.modules)))
