"""Jobs on Ray: the bytes of one process, a worker killed, a refusal handed through.

``make test-cluster``: Ray starts processes of its own, which takes longer than everything else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_clients import save_clients
from safetensors.torch import load_file, save_file

from glora_ops import aggregate_adapters, job
from glora_ops.errors import Refused
from glora_ops.job.ray import RayExecutor

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster
LIMIT = 8_000


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield RayExecutor()
    ray.shutdown()


def test_a_worker_of_ray_that_is_killed_is_repeated_and_the_bytes_are_those_of_one_process(
    executor: RayExecutor, tmp_path: Path
) -> None:
    clients = save_clients(tmp_path / "clients", 4)
    aggregate_adapters(clients, max_bytes=LIMIT).save(tmp_path / "one")
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)

    def dying(folder: str, index: int, died: Path) -> None:
        from glora_ops.job import parts, work

        save, saved = parts.save_tensors, []

        def save_or_die(*arguments: object) -> None:
            saved.append(arguments)
            if len(saved) == 2 and index == 0 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            save(*arguments)  # type: ignore[arg-type]

        parts.save_tensors = save_or_die  # type: ignore[assignment]
        try:
            work(folder, index, 2)
        finally:
            parts.save_tensors = save

    died = tmp_path / "died"
    answers = [executor.submit(dying, str(tmp_path / "job"), index, died) for index in range(2)]
    for answer in answers:
        answer.result(timeout=300)
    assert died.exists()
    job.join(tmp_path / "job").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_a_worker_refuses_is_raised_as_it_is(executor: RayExecutor, tmp_path: Path) -> None:
    clients = save_clients(tmp_path / "clients", 3)
    bad = clients[1] / "adapter_model.safetensors"
    save_file({k: x * float("nan") for k, x in load_file(bad).items()}, bad)
    with pytest.raises(Refused) as refused:
        aggregate_adapters(clients, executor=executor, workers=2)
    assert {refusal.client for refusal in refused.value.refusals} == {"c1"}
