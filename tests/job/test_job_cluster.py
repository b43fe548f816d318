"""As large as a night's work, killed where it hurts: ``make test-cluster``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from job_clients import save_client
from job_processes import started, until, workers_of

from glora_ops import job

KILLS = Path(__file__).parents[1] / "crash" / "kills.py"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]


class Night:
    """24 clients of 112 modules, and what one process makes of them."""

    def __init__(self, root: Path) -> None:
        self.out, self.place = root / "out", root / "out.job"
        clients = [
            save_client(root / "clients" / f"c{i}", i, (4, 8, 16)[i % 3], layers=28, times=16)
            for i in range(24)
        ]
        call = "from glora_ops.cli import app; app()"
        command = ["-c", call, "aggregate", *clients, "-o", self.out, "--readout", 8]
        self.command = [*command, "--workers", 2, "--job", self.place, "--engine"]
        self.ended(started(*command))
        self.expected = self.files()

    def ended(self, process: subprocess.Popen[str]) -> None:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said

    def files(self) -> dict[str, bytes]:
        found = (p for p in self.out.rglob("*") if p.is_file())
        return {str(p.relative_to(self.out)): p.read_bytes() for p in found}

    def made(self) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in self.place.glob("parts/*.json")}

    def is_repeated(self, before: dict[Path, int]) -> None:
        """The same bytes, and what was made is not made again."""
        assert self.files() == self.expected
        assert {p: t for p, t in self.made().items() if p in before} == before
        parts = len(job.read_job(self.place).about["parts"])
        assert len(self.made()) == parts > 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Night:
    return Night(tmp_path_factory.mktemp("night"))


@pytest.fixture
def night(whole: Night) -> Night:
    for folder in (whole.out, whole.place):
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def test_a_night_of_torchrun_whose_worker_is_killed_gives_the_bytes_of_one_process(
    night: Night,
) -> None:
    driver = started(*night.command, "torchrun")
    until(lambda: len(night.made()) > 2, driver)
    first, *others = workers_of(night.place)
    os.kill(first, signal.SIGKILL)
    before = night.made()
    assert others
    assert not night.out.exists()
    night.ended(driver)
    night.is_repeated(before)


MOMENTS: dict[str, Callable[[Night], object]] = {
    "planned": lambda night: (night.place / "plan.json").exists(),
    "begun": lambda night: night.made(),
    "half done": lambda night: len(night.made()) > 8,
    "joined": lambda night: [*night.out.parent.glob(".out.*.new")],
}


@pytest.mark.parametrize(
    ("engine", "moment"), [*(("torchrun", moment) for moment in MOMENTS), ("ray", "begun")]
)
def test_after_its_driver_was_killed_the_same_command_goes_on(
    night: Night, engine: str, moment: str
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    driver = started(*night.command, engine)
    until(lambda: MOMENTS[moment](night), driver)
    driver.kill()
    driver.wait()
    until(lambda: not workers_of(night.place))
    assert not night.out.exists()
    before = night.made()
    night.ended(started(*night.command, engine))
    night.is_repeated(before)
    assert not [*night.out.parent.glob(".*")]


def test_join_is_killed_at_arbitrary_moments() -> None:
    command = [sys.executable, str(KILLS), "--kills", "36", "--only", "job join"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36 kills: old or new whole each time" in done.stdout
