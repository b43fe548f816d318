"""A job on Ray whose clients lie in an S3 store that now and then fails, a worker killed.

``make test-cluster``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from job_clients import save_clients
from object_server import SECRET, serving, upload
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster
GLORA = "from glora_ops.cli import app; app()"


def state(folder: Path) -> dict[str, Any]:
    """What a state's file says of itself, without its checksum and where the clients lie."""
    with safe_open(folder / "server.safetensors", "pt") as file:
        about = json.loads(file.metadata()["glora"])
    del about["sha256"]
    for client in about["record"]["clients"]:
        del client["path"]
    return about


def workers_of(address: str) -> list[int]:
    """Ray's processes that are at a task and have this store in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            called = (place / "cmdline").read_bytes()
            ours = address.encode() in (place / "environ").read_bytes()
        except OSError:
            continue
        if called.startswith(b"ray::work") and ours:
            found.append(int(place.name))
    return found


def test_a_worker_of_ray_that_reads_from_s3_is_killed_and_the_state_is_that_of_folders(
    tmp_path: Path,
) -> None:
    """24 clients × 112 modules; tensors, certificates, record equal but for where clients lie."""
    clients = save_clients(tmp_path / "clients", 24, layers=28, times=8)
    command = [sys.executable, "-c", GLORA, "aggregate", "--readout", "4"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    one, two, place = (tmp_path / name for name in ("one", "two", "job"))
    subprocess.run([*command, *clients, "-o", one], env=quiet, check=True, timeout=300)
    with serving() as store:
        environment = quiet | store.environment
        os.environ.update(store.environment)
        urls = upload(clients)
        shutil.rmtree(tmp_path / "clients")
        for i, fault in enumerate(("500", "cut", "short", "slow")):
            store.faults[f"c{i}/adapter_model.safetensors"] = [fault] * 2
        driver = subprocess.Popen(
            [*command, *urls, "-o", two, "--engine", "ray", "--workers", "2", "--job", place],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        for _ in range(15_000):
            at_work = workers_of(store.address)
            if len([*place.glob("parts/*.json")]) >= 2 and at_work:
                break
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.02)
        before = {path.name for path in place.glob("parts/*.json")}
        os.kill(at_work[0], signal.SIGKILL)
        said, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, said
    parts = len([*place.glob("parts/*.json")])
    assert 2 <= len(before) < parts
    for name in ("server.safetensors", "r4/adapter_model.safetensors"):
        expected, found = load_file(one / name), load_file(two / name)
        assert expected.keys() == found.keys()
        assert all(x.equal(found[key]) for key, x in expected.items())
    assert len(state(one)["modules"]) == 112
    assert state(one) == state(two)
    assert SECRET not in said
    for path in [*two.rglob("*"), *place.rglob("*")]:
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
