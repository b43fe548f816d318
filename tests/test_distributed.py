"""Clients spread over the ranks of a process group: the bits of one process, and one verdict."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rank
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from glora_ops import GloraError, Refusal, aggregate, distributed
from glora_ops.distributed_schema import Told
from glora_ops.runtime import letters
from glora_ops.runtime import ranks as ranks_module
from glora_ops.runtime.ranks import NOTHING, Message, Ranks

SCRIPT = Path(rank.__file__)
BYTE = torch.uint8
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


def heard(message: bytes, monkeypatch: pytest.MonkeyPatch, form: Any = None) -> Message:
    """What rank 0 of two makes of a message of rank 1."""
    sent = iter([torch.tensor([len(message)]), torch.frombuffer(bytearray(message), dtype=BYTE)])
    monkeypatch.setattr(Ranks, "_pass", lambda self, doing, out, into: into[1].copy_(next(sent)))
    return Ranks(None, 0, 2).exchange("testing", [NOTHING] * 2, None, form)[1]  # type: ignore[arg-type]


def test_what_is_no_message_is_refused_by_its_rank_and_never_unpickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plain(text: str, **tensors: Tensor) -> bytes:
        return save({"plain": torch.tensor([*text.encode()], dtype=BYTE)} | tensors)

    good = '{"verdict": null, "content": null}'
    assert heard(plain(good), monkeypatch) == (None, [])
    for wrong, form in (
        (pickle.dumps((None, None, [])), None),
        (b"{}", None),
        (save({}), None),
        (plain("{"), None),
        (plain(good.replace("}", ', "more": 1}')), None),
        (plain(good.replace("null", '[{"problem": 1}]', 1)), None),
        (plain(good, x=torch.ones(1)), None),
        (plain(good), Told),
        (plain(good[:-5] + '{"asked": {}, "clients": [], "threads": 1, "kind": null}}'), Told),
        (plain(good[:-5] + "[1]}"), list[str]),
    ):
        with pytest.raises(GloraError, match=r"a message of rank 1 that does not fit.*one version"):
            heard(wrong, monkeypatch, form)
    for module in (distributed, ranks_module, letters):
        assert "pickle" not in Path(str(module.__file__)).read_text()


def test_a_message_arrives_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided, shared, overlapping, empty and of no axis, of all dtypes and more than ten."""
    x = torch.randn(6, 4, dtype=torch.float64)
    x[0, :2] = torch.tensor([float("nan"), -0.0])
    tensors = [x.to(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.bool)]
    tensors += [x, x, x[2:], x[1:3], x.T, x[:, 1], x[:0], x.new_empty(0, 3), x[0, 0], x[3:3]]
    content = {"a\udcff": [0.1, 5e-324, 1e300 / 3, -0.0, 2**63], "b": None}
    verdict = (Refusal("a", "b\udcff", found="c", more=3),)
    message = letters.packed(None, content, tensors).numpy().tobytes()
    told, got = heard(message, monkeypatch, dict)
    assert repr(told) == repr(content)
    for one, other in zip(tensors, got, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        flat = (y.contiguous().view(-1).view(BYTE) for y in (one, other))
        assert torch.equal(*flat)
    with pytest.raises(GloraError) as caught:
        heard(letters.packed(verdict, None, []).numpy().tobytes(), monkeypatch, Told)
    assert caught.value.refusals == verdict
