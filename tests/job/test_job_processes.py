"""Jobs by real processes: launched, killed, doubled; and what each of them reads and holds."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from job_clients import save_client, save_clients
from job_processes import WORKER, signalled, started, until, workers_of

from glora_ops import aggregate_adapters, job
from glora_ops.errors import Refused

LIMIT = 8_000
MODULE = 4_320  # bytes of the largest module of six clients: each is a part
DYING_WORKER = Path(__file__).parents[1] / "support" / "dying_worker.py"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, and the system's counts")


def test_a_worker_of_torchrun_that_is_killed_is_restarted_and_the_bytes_are_those_of_one_process(
    tmp_path: Path,
) -> None:
    """Two workers, the first killed before its third part: nothing that was done is done again."""
    clients = save_clients(tmp_path / "clients", 6, layers=4)
    expected = aggregate_adapters(clients, max_bytes=LIMIT)
    planned = job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    assert len(planned.about["parts"]) >= 10
    launched = started(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1,
        DYING_WORKER, tmp_path / "job", tmp_path / "died",
    )  # fmt: skip
    said, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, said
    assert (tmp_path / "died").exists(), said
    assert job.status(tmp_path / "job").missing == []
    times = {n: planned.part(n).stat().st_mtime_ns for n in range(len(planned.about["parts"]))}
    died = (tmp_path / "died").stat().st_mtime_ns
    assert times[0] < died
    assert times[2] < died < times[4]
    for state, name in ((expected, "one"), (job.join(tmp_path / "job"), "two")):
        state.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_workers_of_a_driver_that_is_killed_stop_and_what_they_did_is_not_done_again(
    tmp_path: Path,
) -> None:
    clients = save_clients(tmp_path / "clients", 6, layers=28)
    planned = job.plan(clients, tmp_path / "job", max_bytes=MODULE)
    assert len(planned.about["parts"]) == 112
    call = "import sys; from glora_ops import job; job.torchrun(sys.argv[1], 2)"
    driver = started("-c", call, tmp_path / "job")
    until(lambda: [*tmp_path.glob("job/parts/*.json")], driver)
    working = workers_of(tmp_path / "job")
    assert len(working) == 2
    signalled(working, signal.SIGSTOP)
    driver.kill()
    driver.wait()
    signalled(working, signal.SIGCONT)
    until(lambda: not workers_of(tmp_path / "job"))
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("job/parts/*.json")}
    assert 0 < len(made) < 112
    assert len(job.work(tmp_path / "job", 0, 1).found) == len(made)
    assert {p: p.stat().st_mtime_ns for p in made} == made
    for state, name in (
        (aggregate_adapters(clients, max_bytes=MODULE), "one"),
        (job.join(tmp_path / "job"), "two"),
    ):
        state.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_client_that_changes_while_a_worker_computes_is_refused_by_name(tmp_path: Path) -> None:
    """Between its check and its parts: the same length, another file."""
    clients = save_clients(tmp_path / "clients", 6, layers=28)
    job.plan(clients, tmp_path / "job", max_bytes=MODULE)
    worker = started("-m", WORKER, tmp_path / "job")
    until(lambda: [*tmp_path.glob("job/parts/*.json")], worker)
    worker.send_signal(signal.SIGSTOP)
    file = clients[3] / "adapter_model.safetensors"
    shutil.copy(file, tmp_path / "copy")
    os.replace(tmp_path / "copy", file)
    worker.send_signal(signal.SIGCONT)
    said, _ = worker.communicate(timeout=300)
    assert worker.returncode == 1
    assert said.startswith("refused: client 'c3', file 'adapter_model.safetensors'"), said
    assert "changed" in said
    assert job.status(tmp_path / "job").missing
    with pytest.raises(Refused, match=r"client 'c3'.*planned"):
        job.work(tmp_path / "job", 0, 1)


def test_two_workers_of_one_index_are_harmless(tmp_path: Path) -> None:
    clients = save_clients(tmp_path / "clients", 4)
    expected = aggregate_adapters(clients, max_bytes=LIMIT)
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    command = "import sys; from glora_ops import job; job.work(sys.argv[1], 0, 1)"
    both = [started("-c", command, tmp_path / "job") for _ in range(3)]
    for process in both:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for state, name in ((expected, "one"), (job.join(tmp_path / "job"), "two")):
        state.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert not [*tmp_path.rglob(".*")]


COUNTED = """
import sys
from glora_ops import job
from glora_ops.adapters.stored import Stored

read = 0
fill = Stored._fill

def counting(self, file, target):
    global read
    if self.path.name == "adapter_model.safetensors":
        read += target.numel() * target.element_size()
    fill(self, file, target)

Stored._fill = counting
job.work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
print(read)
"""


def test_together_workers_read_each_byte_once_to_check_it_and_once_to_compute(
    tmp_path: Path,
) -> None:
    """Checks read whole files, parts read factors and full weights: no worker reads another's."""
    clients = [save_client(tmp_path / f"c{i}", i, 3, layers=4) for i in range(3)]
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in clients]
    headers = [
        8 + int.from_bytes((folder / "adapter_model.safetensors").read_bytes()[:8], "little")
        for folder in clients
    ]
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    read = []
    for index in range(2):
        process = started("-c", COUNTED, tmp_path / "job", index, 2)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        read.append(int(said))
    assert sum(read) == sum(sizes) + sum(sizes) - sum(headers)


def test_the_command_starts_workers_of_its_own(tmp_path: Path) -> None:
    clients = save_clients(tmp_path / "clients", 3)
    planned = job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    command = "from glora_ops.cli import app; app()"
    launched = started("-c", command, "job", "work", tmp_path / "job", "--workers", 2)
    said, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, said
    assert f"0 parts made, {len(planned.about['parts'])} there already" in said


def test_an_engine_gives_the_folder_of_one_process_and_goes_on_after_its_driver_was_killed(
    tmp_path: Path,
) -> None:
    """The second driver is handed what the first one's workers left, and clears the job away."""
    clients = save_clients(tmp_path / "clients", 4, layers=4)
    call = "from glora_ops.cli import app; app()"
    out = tmp_path / "out"
    command = ["-c", call, "aggregate", *clients, "-o", out, "--readout", 4]
    engine = [*command, "--engine", "torchrun", "--workers", 2]
    one = started(*command)
    said, _ = one.communicate(timeout=300)
    assert one.returncode == 0, said
    expected = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    shutil.rmtree(out)
    driver = started(*engine)
    place = tmp_path / "out.job"
    until(lambda: [*place.glob("parts/*.json")], driver)
    driver.kill()
    driver.wait()
    assert not out.exists()
    made = {p: p.stat().st_mtime_ns for p in place.glob("parts/*.json")}
    again = started(*engine, "--job", place)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == expected
