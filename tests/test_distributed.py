"""Clients spread over the ranks of a process group: the bits of one process, and one verdict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank
import torch
import torch.distributed as dist

from glora_ops import GloraError, aggregate, distributed

SCRIPT = Path(rank.__file__)
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::glora_ops.errors.GloraWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]


def ranks(case: str, folder: Path, lost: int | None = None) -> None:
    """Three of them, one of which may be lost."""
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), case, str(folder), str(number), "3"],
            env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    try:
        for number, process in enumerate(started):
            if number != lost:
                said, _ = process.communicate(timeout=300)
                assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_whoever_holds_the_clients_the_state_is_that_of_one_process_to_the_bit(
    tmp_path: Path,
) -> None:
    """One, two and three ranks, of which some have no clients; gathered, or left where it is."""
    ranks("agree", tmp_path)
    for number, (splits, settings) in enumerate(rank.SPLITS):
        expected = aggregate(rank.clients(), max_bytes=3 * rank.BYTES, **settings)
        expected.save(tmp_path / "expected")
        assert (tmp_path / f"{number}").read_bytes() == (tmp_path / "expected").read_bytes()
        told = [torch.load(tmp_path / f"{number}-{r}") for r in range(len(splits))]
        own = [modules for modules, _ in told]
        assert sorted(m for modules in own for m in modules) == sorted(expected)
        assert all(own)
        for name, fields in (item for modules in own for item in modules.items()):
            for field, x in fields.items():
                assert torch.equal(x, getattr(expected[name], field)), (name, field)
        for r, (modules, sent) in enumerate(told):  # each factor that another solves, once
            mine, _ = rank.of_rank(splits, r, {})
            pairs = (pair for client in mine for m, pair in client.items() if m not in modules)
            assert sent == sum(x.nbytes for pair in pairs for x in pair)


def test_what_one_rank_refuses_or_fails_in_is_the_same_error_on_all(tmp_path: Path) -> None:
    ranks("refuse", tmp_path)
    said = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[0].keys() == rank.REFUSED.keys()
    for name, (_, expected) in rank.REFUSED.items():
        assert re.search(expected, said[0][name], re.DOTALL), said[0][name]


def test_a_rank_that_is_killed_is_named_by_all_others(tmp_path: Path) -> None:
    ranks("lose", tmp_path, lost=1)
    for number in (0, 2):
        solved, said = json.loads((tmp_path / f"{number}.json").read_text())
        assert "nothing from rank 1 of 3 while solving" in said
        assert "start them again" in said
        assert solved == 2


@pytest.mark.cluster
def test_a_rank_that_is_silent_is_named_by_all_others_when_its_time_is_up(tmp_path: Path) -> None:
    ranks("stop", tmp_path, lost=1)
    for number in (0, 2):
        _, said = json.loads((tmp_path / f"{number}.json").read_text())
        assert "nothing from rank 1 of 3 while solving, expected every rank's answer within" in said


def test_without_a_group_that_can_move_factors_it_says_what_to_call() -> None:
    with pytest.raises(GloraError, match=r"group: got none.*init_process_group"):
        distributed.aggregate(rank.clients())


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_group_of_gpus_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(GloraError, match=r"moves cuda:nccl.*cpu:gloo,cuda:nccl"):
        distributed.aggregate(rank.clients())


@pytest.mark.usefixtures("alone")
def test_a_rank_alone_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "isend", None)
    state = distributed.aggregate(rank.clients(), max_bytes=rank.BYTES)
    assert state is not None
    assert [*state] == [*aggregate(rank.clients())]
