"""A SuperLink and SuperNodes as processes of their own: TLS, authentication, kills, restarts.

Minutes each: ``make test-deployment``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr", reason="Flower needs Python 3.11")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from flower_deployment import APP, Deployment, make_key  # noqa: E402
from test_fl_flower import numbers, same_state  # noqa: E402

from glora_ops.errors import GloraError  # noqa: E402
from glora_ops.fl.config import load_config  # noqa: E402
from glora_ops.fl.engine_local import LocalEngine  # noqa: E402
from glora_ops.fl.messages import Client  # noqa: E402
from glora_ops.fl.records import Run  # noqa: E402
from glora_ops.fl.run import Plan, run  # noqa: E402

pytestmark = pytest.mark.deployment
CONFIG = APP / "federation" / "experiment.toml"


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Everything started in the test carries this in its environment; nothing may outlive it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("GLORA_TEST_MARK", mark)
    yield mark
    assert wait_until(lambda: not marked(mark), 20), [p.cmdline() for p in marked(mark)]


def marked(mark: str) -> list[psutil.Process]:
    out = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GLORA_TEST_MARK") == mark and process.pid != os.getpid():
                out.append(process)
        except psutil.Error:
            continue
    return out


def wait_until(true: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def here(there: Run, folder: Path, path: Path = CONFIG) -> Run:
    """The same run in this process; the replies that were lost there are lost here."""
    config = load_config(path)
    gone = {(line["round"], f["client"]) for line in there.lines() for f in line["failures"]}

    class Losing(LocalEngine):
        def _one(self, round: int, client: Client, sent: Any) -> Any:
            if (round + 1, client.index) in gone:
                raise GloraError("lost there")
            return super()._one(round, client, sent)

    c = config.clients
    run(
        Plan(config, "glora", 0, config.training.lr),
        folder,
        engine=lambda plan: Losing(plan.trainer, plan.parts, c.wire, c.lost, plan.seed),
    )
    return Run(folder)


def learnt(record: Run) -> list[dict[str, Any]]:
    """The metrics but for what depends on why a reply was lost."""
    return [
        {k: v for k, v in line.items() if k not in ("failures", "bytes_down", "bytes_up")}
        for line in numbers(record)
    ]


class Background(threading.Thread):
    """`flwr run` in a thread; what it raised is raised by `result`."""

    def __init__(self, work: Callable[[], str]) -> None:
        super().__init__(daemon=True)
        self.work, self.log = work, ""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.log = self.work()
        except Exception as error:
            self.error = error

    def until(self, true: Callable[[], Any], seconds: float) -> None:
        assert wait_until(lambda: true() or not self.is_alive(), seconds)
        if self.error is not None:
            raise self.error

    def result(self, seconds: float) -> str:
        self.join(seconds)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.log


def test_the_script_runs_two_rounds_on_nodes_of_their_own(tmp_path: Path, mark: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/flower_deployment.py"), "-o", str(tmp_path / "a")],
        capture_output=True, text=True, check=False, timeout=500, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    there = Run(tmp_path / "a" / "digits_deployed" / "glora" / "seed0")
    assert there.done
    servers = set()
    for line in there.lines()[1:]:
        clients = line["processes"]["clients"]
        assert set(clients) == {"0", "1", "2"}
        assert len(set(clients.values())) == 3
        servers.add(line["processes"]["server"])
        assert servers.isdisjoint(clients.values())
        assert not line["failures"]
    assert len(servers) == 1
    whole = here(there, tmp_path / "b")
    assert numbers(there) == numbers(whole)
    assert same_state(there, whole)


def test_a_killed_node_loses_its_reply_and_nothing_else(tmp_path: Path, mark: str) -> None:
    """And a node whose key is not registered never takes its place."""
    (tmp_path / "d").mkdir()
    there = Run(tmp_path / "runs" / "digits_deployed" / "glora" / "seed0")
    with Deployment(3, tmp_path / "d") as deployment:
        running = Background(lambda: deployment.run(400, out=str(tmp_path / "runs"), timeout=240.0))
        running.until(there.lines, 200)
        node = psutil.Process(deployment.processes["node1"].pid)
        running.until(lambda: executor(node), 60)
        deployment.kill("node1")
        make_key(deployment.folder, "node1")  # another key, which nobody registered
        deployment.start_node(1)
        running.result(400)
        log = (deployment.folder / "node1.log").read_text()
        assert deployment.processes["node1"].poll() not in (None, 0), log
    assert there.done
    failures = [line["failures"] for line in there.lines()]
    assert [[f["client"] for f in x] for x in failures] == [[], [1], [1]], failures
    whole = here(there, tmp_path / "local")
    assert learnt(there) == learnt(whole)
    assert same_state(there, whole)


def executor(node: psutil.Process) -> bool:
    """Whether a ClientApp is at work below the node."""
    try:
        return any("flwr-clientapp" in " ".join(p.cmdline()) for p in node.children(recursive=True))
    except psutil.Error:
        return False


def test_a_killed_server_resumes_to_the_same_result(tmp_path: Path, mark: str) -> None:
    """SIGKILL to the SuperLink and the ServerApp after a round; the nodes live on."""
    (tmp_path / "d").mkdir()
    there = Run(tmp_path / "runs" / "digits_deployed" / "glora" / "seed0")
    with Deployment(3, tmp_path / "d") as deployment:
        running = Background(lambda: deployment.run(400, out=str(tmp_path / "runs")))
        running.until(lambda: len(there.lines()) == 2, 300)
        deployment.kill("superlink")
        with pytest.raises(Exception, match="flwr run"):
            running.result(120)
        assert not there.done
        deployment.start_superlink()
        deployment.run(400, out=str(tmp_path / "runs"), resume=True)
        assert all(deployment.processes[f"node{i}"].poll() is None for i in range(3))
    assert there.done
    # Where the machine stands still for three minutes Flower gives up an upload; nothing else may
    # be missing, what the nodes kept least of all.
    reasons = [f["reason"] for line in there.lines() for f in line["failures"]]
    assert all("objects are unavailable" in reason for reason in reasons), reasons
    whole = here(there, tmp_path / "local")
    assert learnt(there) == learnt(whole)
    assert same_state(there, whole)


def test_a_killed_node_comes_back_under_its_key(tmp_path: Path, mark: str) -> None:
    """Flower turns it away while it counts the dead one as online; then it takes part again."""
    (tmp_path / "d").mkdir()
    path = tmp_path / "long.toml"
    path.write_text(CONFIG.read_text().replace("rounds = 2", "rounds = 6"))
    there = Run(tmp_path / "runs" / "digits_deployed" / "glora" / "seed0")
    with Deployment(3, tmp_path / "d") as deployment:
        running = Background(
            lambda: deployment.run(800, config=str(path), out=str(tmp_path / "runs"), timeout=240.0)
        )
        running.until(lambda: len(there.lines()) == 2, 300)
        node = psutil.Process(deployment.processes["node1"].pid)
        running.until(lambda: executor(node), 60)
        deployment.kill("node1")
        before = [line["processes"]["clients"]["1"] for line in there.lines()[1:]]
        while not there.done:
            if "node1" not in deployment.processes or deployment.processes["node1"].poll():
                deployment.start_node(1)
            time.sleep(1)
            assert running.is_alive() or there.done, deployment.logs()
        running.result(60)
    lines = there.lines()
    assert {f["client"] for line in lines for f in line["failures"]} == {1}
    missed = [line["round"] for line in lines if line["failures"]]
    assert missed == list(range(missed[0], missed[-1] + 1)), missed
    assert missed[-1] < 6, [line["failures"] for line in lines]
    assert lines[-1]["processes"]["clients"]["1"] not in before
    whole = here(there, tmp_path / "local", path)
    assert learnt(there) == learnt(whole)
    assert same_state(there, whole)
