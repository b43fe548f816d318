"""The Flower engine against the in-process one; nodes live in this process but for one test."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="Flower needs Python 3.11")

from fl_grid import LoopGrid
from fl_runs import config, reproducible, run_small, state
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from glora_ops.errors import GloraError, GloraWarning
from glora_ops.fl.config import load_config
from glora_ops.fl.engine_local import LOST, Answers, LocalEngine
from glora_ops.fl.flower import FlowerEngine, simulate
from glora_ops.fl.flower.codec import Facts, Trained, Work, content_of, form_of, tensors_of
from glora_ops.fl.messages import Client
from glora_ops.fl.records import Run
from glora_ops.fl.run import Plan, run
from glora_ops.runtime.signals import Terminated

NODES = [{"partition-id": i} for i in (2, 0, 3, 1)]
MIXED = {"ranks": [2, 4], "wire": "bfloat16"}
ADAPTER = {"kind": "glora", "mode": "adapter"}
KEEP = {"optimiser_state": "keep"}


def run_flower(
    folder: Path, method: dict[str, Any], grid: LoopGrid, *, resume: bool = False,
    wrap: Callable[[FlowerEngine], Any] = lambda engine: engine, timeout: float = 0.5,
    **sections: Any,
) -> Run:  # fmt: skip
    made = config({"it": method}, **sections)
    run(
        Plan(made, "it", 0, made.training.lr),
        folder,
        engine=lambda plan: wrap(FlowerEngine(grid, plan, patience=1, timeout=timeout)),
        resume=resume,
    )
    return Run(folder)


def numbers(record: Run) -> list[dict[str, Any]]:
    """The metrics without timings and processes."""
    return [{k: v for k, v in x.items() if k != "processes"} for x in reproducible(record)]


def same_state(one: Run, other: Run) -> bool:
    mine, theirs = (
        {n: x for n, x in state(r).items() if n.startswith("server/")} for r in (one, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(x, theirs[n]) for n, x in mine.items())


@pytest.mark.parametrize(
    "method",
    [ADAPTER, {"kind": "glora", "mode": "delta", "context": True}, {"kind": "glora", "step": 0.5},
     {"kind": "ffa"}, {"kind": "rolora"},
     {"kind": "flora", "server": {"kind": "fedavgm", "lr": 0.5}}, {"kind": "fedex"},
     {"kind": "hetlora"}],
    ids=lambda m: "-".join(str(m.get(key, "")) for key in ("kind", "mode")),
)  # fmt: skip
def test_both_engines_give_the_same_bits(method: dict[str, Any], tmp_path: Path) -> None:
    """Frozen factors, merged history, drawn adapters, pruned ranks, moments, lost replies."""
    equal_ranks = method["kind"] in ("ffa", "rolora", "fedex")
    clients = MIXED | {"lost": 0.4} | ({"ranks": [4]} if equal_ranks else {})
    here = run_small(tmp_path / "local", method, clients=clients, training=KEEP)
    grid = LoopGrid(NODES, tmp_path / "nodes")
    there = run_flower(tmp_path / "flower", method, grid, clients=clients, training=KEEP)
    assert numbers(there) == numbers(here)
    assert any(line["failures"] for line in here.lines())
    assert same_state(here, there)


def test_nodes_tell_their_ranks_and_clients_keep_their_order(tmp_path: Path) -> None:
    nodes = [{**node, "rank": 3} if node["partition-id"] == 2 else node for node in NODES]
    grid = LoopGrid(nodes, tmp_path / "nodes")
    there = run_flower(tmp_path / "run", {"kind": "glora"}, grid, clients=MIXED)
    last = there.lines()[-1]
    assert [c["client"] for c in last["clients"]] == [0, 1, 2, 3]
    assert [c["rank"] for c in last["clients"]] == [2, 4, 3, 4]
    assert set(last["by_rank"]) == {"2", "3", "4"}
    assert {message.metadata.message_type for message in grid.sent[:4]} == {"query"}
    here = run_small(
        tmp_path / "local", {"kind": "glora"}, clients={"ranks": [2, 4, 3, 4], "wire": "bfloat16"}
    )
    assert numbers(there) == numbers(here)


# --- faults ------------------------------------------------------------------------------------


def changed(message: Message, change: Callable[[dict[str, Any], ArrayRecord], None]) -> Message:
    """The reply with its form and tensors changed."""
    form = json.loads(str(message.content.config_records["about"]["json"]))
    arrays = message.content.array_records["tensors"]
    change(form, arrays)
    message.content.config_records["about"]["json"] = json.dumps(form)
    return message


def fault(kind: str, message: Message, reply: Message) -> Message | None:
    def change(form: dict[str, Any], arrays: ArrayRecord) -> None:
        name = next(iter(arrays))
        old = arrays[name]
        if kind == "drops a tensor":
            del arrays[name]
        elif kind == "adds a tensor":
            arrays["factors/else/B"] = old
        elif kind == "turns a tensor":
            arrays[name] = Array(old.dtype, old.shape[::-1], old.stype, old.data)
        elif kind == "says NaN":
            nan = torch.full(tuple(old.shape), math.nan).to(torch.bfloat16)
            data = nan.view(torch.uint8).numpy().tobytes()
            arrays[name] = Array(old.dtype, old.shape, old.stype, data)
        elif kind == "claims another length":
            arrays[name] = Array(old.dtype, (*old.shape, 10**9), old.stype, old.data)
        elif kind == "claims 70 dimensions":
            arrays[name] = Array(old.dtype, (*old.shape, *[1] * 68), old.stype, old.data)
        elif kind == "says true for a size":
            arrays[name] = Array(old.dtype, (True, *old.shape), old.stype, old.data)
        elif kind == "sends a thousand metrics":
            form["metrics"] = {str(i): 0.0 for i in range(1000)}
        elif kind == "goes deep":
            form["metrics"] = json.loads("[" * 100 + "]" * 100)
        elif kind == "names no state":
            form["state"] = "x" * 10**6
        elif kind == "sends NumPy":
            arrays[name] = Array(torch.zeros(tuple(old.shape)).numpy())
        elif kind == "claims no examples":
            form["examples"] = 0
        elif kind == "claims more examples":
            form["examples"] *= 1000
        elif kind == "sends another form":
            form.clear()
            form["metrics"] = "good"

    if kind == "never answers":
        return None
    if kind == "crashes":
        return Message(Error(code=1, reason="ZeroDivisionError()" * 100), reply_to=message)
    return changed(reply, change)


FAULTS = {
    "never answers": "no reply within",
    "crashes": "ZeroDivisionError",
    "drops a tensor": "missing, unknown or of another shape",
    "adds a tensor": "missing, unknown or of another shape",
    "turns a tensor": "missing, unknown or of another shape",
    "says NaN": "NaN or infinity",
    "claims another length": "bytes",
    "claims 70 dimensions": "at most 8 integers",
    "says true for a size": "at most 8 integers",
    "sends a thousand metrics": "do not fit",
    "goes deep": "do not fit",
    "names no state": "do not fit",
    "sends NumPy": "expected ('glora.raw', 'bfloat16')",
    "claims no examples": "do not fit",
    "claims more examples": "examples: got",
    "sends another form": "do not fit",
}


class LosesOne(LocalEngine):
    """Client 1's reply of round 1 (the second) is lost."""

    def _one(self, round: int, client: Client, sent: Any) -> Any:
        if (round, client.index) == (1, 1):
            raise GloraError(LOST)
        return super()._one(round, client, sent)


@pytest.fixture(scope="module")
def without_one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = config({"it": ADAPTER}, clients=MIXED, training=KEEP)
    c, folder = made.clients, tmp_path_factory.mktemp("lost")
    run(Plan(made, "it", 0, made.training.lr), folder,
        engine=lambda plan: LosesOne(plan.trainer, plan.parts, c.wire, c.lost, 0))  # fmt: skip
    return Run(folder)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_reply_is_reported_and_left_out(kind: str, tmp_path: Path, without_one: Run) -> None:
    """What the node learnt for it is forgotten: its moments are those of the round before."""

    class Faulty(LoopGrid):
        def answer(self, node: int, message: Message) -> Message | None:
            reply = super().answer(node, message)
            if node == self.node(1) and message.metadata.message_type == "train":
                assert reply is not None
                if form_of(message.content, Work).round == 1:
                    return fault(kind, message, reply)
            return reply

    grid = Faulty(NODES, tmp_path / "nodes")
    there = run_flower(tmp_path / "run", ADAPTER, grid, clients=MIXED, training=KEEP)
    (failure,) = [f for line in there.lines() for f in line["failures"]]
    assert failure["client"] == 1
    assert FAULTS[kind] in failure["reason"]
    assert len(failure["reason"]) <= 500
    assert same_state(there, without_one)


def test_a_node_that_goes_away_and_one_that_comes_later(tmp_path: Path) -> None:
    class Moving(LoopGrid):
        def answer(self, node: int, message: Message) -> Message | None:
            if message.metadata.message_type == "train":
                if form_of(message.content, Work).round == 0:
                    self.online.add(self.node(3))
                else:
                    self.online.discard(self.node(0))
            return super().answer(node, message)

    grid = Moving(NODES, tmp_path / "nodes")
    grid.online.discard(grid.node(3))
    there = run_flower(tmp_path / "run", {"kind": "fedit"}, grid)
    away = [[f["client"] for f in line["failures"]] for line in there.lines()]
    assert away == [[], [3], [], [0]]
    assert there.lines()[-1]["failures"][0]["reason"] == "its node is not connected"


def test_a_nodes_metrics_take_no_field_of_the_records(tmp_path: Path) -> None:
    class Posing(LoopGrid):
        def answer(self, node: int, message: Message) -> Message | None:
            reply = super().answer(node, message)
            if reply is not None and message.metadata.message_type == "train":
                return changed(reply, lambda form, _: form["metrics"].update(client=9.0, rank=0.5))
            return reply

    there = run_flower(tmp_path / "run", {"kind": "fedit"}, Posing(NODES, tmp_path / "nodes"))
    assert [c["client"] for c in there.lines()[1]["clients"]] == [0, 1, 2, 3]
    assert {type(c["rank"]) for c in there.lines()[1]["clients"]} == {int}


def test_nodes_that_do_not_fit_are_refused_by_reason(tmp_path: Path) -> None:
    class Lying(LoopGrid):
        def answer(self, node: int, message: Message) -> Message | None:
            reply = super().answer(node, message)
            if reply is not None and node == self.node(3):
                return changed(reply, lambda form, _: form.update(examples=1))
            if reply is not None and node == self.node(1):
                return changed(reply, lambda form, _: form.update(rank=10**9))
            return reply

    nodes = [*NODES, {"partition-id": 0}, {"partition-id": 4}, {}]
    grid = Lying(nodes, tmp_path / "nodes")
    made = config({"it": {"kind": "fedit"}})
    with pytest.warns(GloraWarning) as told:
        engine = FlowerEngine(grid, Plan(made, "it", 0, 0.005), patience=0.5)
    assert set(engine.nodes) == {0, 2}
    reasons = " ".join(str(w.message) for w in told)
    for part in ("a second one", "examples of the node of client 3: got 1", "partition-id: got 4",
                 "partition-id: got None",
                 "rank of the node of client 1: got 1000000000"):  # fmt: skip
        assert part in reasons
    with (
        pytest.warns(GloraWarning),
        pytest.raises(GloraError, match=r"nodes: got none.*partition-id"),
    ):
        FlowerEngine(LoopGrid([{}], tmp_path), Plan(made, "it", 0, 0.005), patience=0)


def test_a_node_that_lost_its_memory_is_sent_everything_again(tmp_path: Path) -> None:
    """FFA's A travels once; after the loss the node must ask for it, by failing a round."""
    grid = LoopGrid(NODES, tmp_path / "nodes")

    class Forgetful:
        def __init__(self, engine: FlowerEngine) -> None:
            self.engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

        def train(self, round: int, work: Any) -> Answers:
            if round == 1:
                next((tmp_path / "nodes").rglob("client2.safetensors")).write_bytes(b"rubbish")
            return self.engine.train(round, work)

    there = run_flower(
        tmp_path / "run", {"kind": "ffa"}, grid, wrap=Forgetful,
        training=KEEP | {"rounds": 4},
    )  # fmt: skip
    lines = there.lines()
    assert [[f["client"] for f in line["failures"]] for line in lines] == [[], [], [2], [], []]
    assert "state-dir" in lines[2]["failures"][0]["reason"]
    assert lines[3]["bytes_down"] > lines[4]["bytes_down"]  # A, once more
    assert len(lines[4]["clients"]) == 4


# --- restarts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["glora", "flora", "ffa"])
def test_a_killed_server_goes_on_with_the_nodes_memory(method: str, tmp_path: Path) -> None:
    """Killed when the nodes have trained and it has not committed; nodes have new ids after it."""
    whole = run_small(
        tmp_path / "whole", {"kind": method}, clients={"wire": "bfloat16"}, training=KEEP
    )

    class Killed(FlowerEngine):
        def _reply(self, client: Client, sent: Any, message: Message) -> Any:
            if form_of(grid.sent[-1].content, Work).round == 1 and client.index == 2:
                raise KeyboardInterrupt
            return super()._reply(client, sent, message)

    def wrap(engine: FlowerEngine) -> FlowerEngine:
        engine.__class__ = Killed
        return engine

    grid = LoopGrid(NODES, tmp_path / "nodes")
    sections = {"clients": {"wire": "bfloat16"}, "training": KEEP}
    with pytest.raises(KeyboardInterrupt):
        run_flower(tmp_path / "run", {"kind": method}, grid, wrap=wrap, **sections)
    assert not Run(tmp_path / "run").done
    grid = LoopGrid(NODES[::-1], tmp_path / "nodes")
    there = run_flower(tmp_path / "run", {"kind": method}, grid, resume=True, **sections)
    assert numbers(there) == numbers(whole)
    assert same_state(there, whole)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_signals_let_the_simulation_end(
    number: signal.Signals,
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Raised inside Flower's runtime they would end Ray below its workers."""
    ray_utils = pytest.importorskip("ray._private.utils")
    made = config({"it": {"kind": "fedit"}})
    ended: list[bool] = []

    def runtime(app: ServerApp, *_: Any, **__: Any) -> None:
        context = Context(1, 0, {}, RecordDict(), {})

        def serve() -> None:
            with pytest.raises(GloraError, match="ended"):
                app(LoopGrid([], tmp_path), context)
            ended.append(True)

        server = threading.Thread(target=serve)
        server.start()
        ray_utils.set_sigterm_handler(lambda *_: pytest.fail("Ray's own handler"))
        os.kill(os.getpid(), number)
        server.join()
        assert ended  # before this returns

    monkeypatch.setattr("flwr.simulation.run_simulation", runtime)
    before = signal.getsignal(number)
    try:
        with pytest.raises(error):
            simulate(
                4, lambda engine: engine(Plan(made, "it", 0, 0.005)), state_dir=tmp_path / "nodes"
            )
        assert ended
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, before)


def test_ray_that_does_not_come_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")

    def runtime(*_: Any, **__: Any) -> None:
        try:
            raise Exception("The current node timed out during startup. This could happen because")
        except Exception as error:
            raise RuntimeError("An error was encountered. Ending simulation.") from error

    monkeypatch.setattr("flwr.simulation.run_simulation", runtime)
    with pytest.raises(GloraError, match=r"no Ray within 30 s.*--engine local") as refused:
        simulate(4, lambda engine: None, state_dir=tmp_path / "nodes")
    assert "\n" not in str(refused.value)


def test_engines_do_not_continue_each_others_runs(tmp_path: Path) -> None:
    made = config({"it": {"kind": "fedit"}})
    plan = Plan(made, "it", 0, 0.005)
    local = LocalEngine(plan.trainer, plan.parts, "float32", 0, 0)
    flower = FlowerEngine(LoopGrid(NODES, tmp_path), plan)
    with pytest.raises(GloraError, match="--engine local"):
        flower.load(*local.save())
    with pytest.raises(GloraError, match="--engine flower"):
        local.load(*flower.save())


def test_ranks_that_nodes_told_outlive_the_server(tmp_path: Path) -> None:
    plan = Plan(config({"it": {"kind": "fedit"}}), "it", 0, 0.005)
    own = [{**node, "rank": 2} if node["partition-id"] == 0 else node for node in NODES]
    kept = FlowerEngine(LoopGrid(own, tmp_path), plan).save()
    assert plan.setup.ranks == (2, 4, 4, 4)
    # Node 0 is away as the server restarts, and node 1 has another rank than before.
    other = [{"partition-id": 1, "rank": 3}, {"partition-id": 2}, {"partition-id": 3}]
    plan = Plan(config({"it": {"kind": "fedit"}}), "it", 0, 0.005)
    again = FlowerEngine(LoopGrid(other, tmp_path), plan, patience=0)
    with pytest.warns(GloraWarning, match="client 1: got 3, expected 4, as when the run began"):
        again.load(*kept)
    assert plan.setup.ranks == (2, 4, 4, 4)
    assert 1 not in again.nodes
    again._admit(99, Facts(client=0, rank=2, examples=len(plan.parts[0])))


# --- what travels ------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire", "size"), [("float32", 4), ("bfloat16", 2)])
def test_tensors_travel_as_raw_bytes(wire: str, size: int) -> None:
    facts = Facts(client=1, rank=4, examples=7)
    x = {"a/B": torch.randn(5, 3).T, "a/A": torch.zeros(7).neg(), "s": torch.tensor(2.5)}
    content = content_of(facts, x, wire)
    assert form_of(content, Facts) == facts
    back = tensors_of(content, wire)
    for name, tensor in x.items():
        expected = tensor.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[wire]).float()
        assert torch.equal(back[name], expected)
        assert back[name].dtype == torch.float32
        assert len(content.array_records["tensors"][name].data) == size * tensor.numel()
    with pytest.raises(GloraError, match="same version"):
        tensors_of(content, "float32" if wire == "bfloat16" else "bfloat16")


def test_flowers_envelope_is_small(tmp_path: Path) -> None:
    class Weighing(LoopGrid):
        def answer(self, node: int, message: Message) -> Message | None:
            reply = super().answer(node, message)
            for m in filter(None, (message, reply)):
                objects = get_all_nested_objects(m).values()
                arrays = m.content.array_records["tensors"].values()
                beside = sum(len(o.deflate()) for o in objects) - sum(len(a.data) for a in arrays)
                seen.append((len(arrays), beside))
            return reply

    seen: list[tuple[int, int]] = []
    run_flower(tmp_path / "run", {"kind": "glora"}, Weighing(NODES, tmp_path / "nodes"))
    assert max(count for count, _ in seen) == 24
    assert all(beside < 400 * count + 3000 for count, beside in seen)


@pytest.mark.parametrize(
    "about",
    [None, "", "[]", "{", '{"client": -1, "rank": 1, "examples": 1}', '{"client": 1, "rank": 1}',
     '{"client": 1, "rank": 1, "examples": 1, "code": "rm"}', "[" * 100_000],
)  # fmt: skip
def test_forms_that_do_not_fit_are_refused(about: str | None) -> None:
    record = ConfigRecord() if about is None else ConfigRecord({"json": about})
    with pytest.raises(GloraError, match="do not fit"):
        form_of(RecordDict({"about": record}), Facts)
    with pytest.raises(GloraError, match="do not fit"):
        form_of(RecordDict(), Trained)


SIMULATED = """
name = "small"
[clients]
count = 3
ranks = [2, 4]
wire = "bfloat16"
[training]
rounds = 2
steps = 4
optimiser_state = "keep"
[methods.glora]
kind = "glora"
"""


def test_the_command_simulates_and_gives_the_same_numbers(tmp_path: Path) -> None:
    """Ray's workers are processes of their own."""
    path = tmp_path / "small.toml"
    path.write_text(SIMULATED)
    made = load_config(path)
    run(Plan(made, "glora", 0, made.training.lr), tmp_path / "local")
    done = subprocess.run(
        [sys.executable, "-c", "from glora_ops.cli import main; main()", "fl", "run", str(path),
         "--seeds", "1", "--engine", "flower", "-o", str(tmp_path / "flower")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here, there = Run(tmp_path / "local"), Run(tmp_path / "flower/small/glora/seed0")
    assert numbers(there) == numbers(here)
    for line in there.lines()[1:]:
        processes = line["processes"]
        assert set(processes["clients"]) == {"0", "1", "2"}
        assert processes["server"] not in processes["clients"].values()
    assert not (tmp_path / "flower/small/nodes").exists()
