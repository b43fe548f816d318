"""Whole runs on digits: learning, gauges, lost replies, bytes, restarts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fl_runs import accuracies, config, reproducible, run_small, state

from glora_ops.errors import GloraError
from glora_ops.fl.diagnostics import own_score
from glora_ops.fl.gauge import turned
from glora_ops.fl.load import load_runs
from glora_ops.fl.messages import Client, Sent
from glora_ops.fl.methods import METHODS
from glora_ops.fl.records import Run
from glora_ops.fl.run import Plan, run
from glora_ops.fl.tasks.base import Answer
from glora_ops.fl.tasks.digits import Digits

WIDTHS = [(128, 128)] * 8 + [(256, 128), (128, 256)] * 2  # modules of the digits' transformer
PER_RANK = sum(d_out + d_in for d_out, d_in in WIDTHS)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_learns_digits(name: str, tmp_path: Path) -> None:
    done = run_small(tmp_path / "run", {"kind": name}, training={"rounds": 4, "steps": 6})
    start, *_, end = accuracies(done)
    assert start < 0.25
    assert end > start + 0.15
    assert done.done
    last = done.lines()[-1]
    assert set(last) >= {"metrics", "by_rank", "update", "alignment", "misalignment", "bytes_up"}


def test_a_run_repeats_bit_for_bit(tmp_path: Path) -> None:
    one, other = (run_small(tmp_path / x, {"kind": "glora"}) for x in "ab")
    assert reproducible(one) == reproducible(other)
    assert all(torch.equal(x, state(other)[name]) for name, x in state(one).items())
    third = run_small(tmp_path / "c", {"kind": "glora"}, seed=1)
    assert accuracies(third) != accuracies(one)


# --- the unit test of the claim ----------------------------------------------------------------


ADAPTER: dict[str, Any] = {"kind": "glora", "mode": "adapter"}
GAUGED = {"rounds": 5, "steps": 6, "batch": 16}


@pytest.mark.parametrize(
    "method",
    [ADAPTER, ADAPTER | {"momentum": 0.5}, {"kind": "glora", "mode": "delta"},
     {"kind": "glora", "mode": "delta", "context": True, "step": 0.7},
     {"kind": "glora", "step": 0.5}, ADAPTER | {"basis": "update"},
     ADAPTER | {"basis": "projector"},
     ADAPTER | {"server": {"kind": "fedadam", "lr": 0.01}}],
    ids=["consensus", "momentum", "delta", "context", "restart", "update", "projector", "fedadam"],
)  # fmt: skip
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_a_random_gauge_on_every_reply_leaves_gloras_curve(
    method: dict[str, Any], moments: str, tmp_path: Path
) -> None:
    how = GAUGED | {"optimiser_state": moments}
    plain, gauged = (
        run_small(tmp_path / str(gauge), method, training=how, clients={"gauge": gauge})
        for gauge in (1.0, 10.0)
    )
    for a, b in zip(accuracies(plain), accuracies(gauged), strict=True):
        assert abs(a - b) <= 0.015  # rounding, amplified by training
    for a, b in zip(plain.lines()[1:], gauged.lines()[1:], strict=True):
        assert b["update"]["norm"] == pytest.approx(a["update"]["norm"], rel=0.02)


def test_the_same_gauge_ruins_factor_averaging(tmp_path: Path) -> None:
    plain, gauged = (
        run_small(
            tmp_path / str(gauge), {"kind": "fedit"}, training=GAUGED, clients={"gauge": gauge}
        )
        for gauge in (1.0, 10.0)
    )
    assert accuracies(gauged)[-1] < accuracies(plain)[-1] - 0.15
    assert gauged.lines()[-1]["update"]["captured"] < plain.lines()[-1]["update"]["captured"] - 0.2


def test_a_run_that_moves_nothing_can_be_read_again(tmp_path: Path) -> None:
    """B stays 0 beside a rate that underflows: an update without a single direction."""
    done = run_small(tmp_path, {"kind": "fedit"}, training={"lr": 1e-60, "rounds": 2})
    assert [line["update"]["spectrum"] for line in done.lines()[1:]] == [[0.0], [0.0]]


# --- faults ------------------------------------------------------------------------------------


def test_lost_replies_are_tolerated_and_reported(tmp_path: Path) -> None:
    done = run_small(
        tmp_path / "run", {"kind": "glora"}, clients={"lost": 0.5}, training={"rounds": 5}
    )
    lines = done.lines()[1:]
    assert all(len(x["clients"]) + len(x["failures"]) == 4 for x in lines)
    failures = [f for x in lines for f in x["failures"]]
    assert 3 <= len(failures) <= 17
    assert all("lost" in f["reason"] for f in failures)
    assert accuracies(done)[-1] > accuracies(done)[0] + 0.1


def test_a_round_without_any_reply_keeps_the_state(tmp_path: Path) -> None:
    done = run_small(tmp_path / "run", {"kind": "glora"}, clients={"lost": 0.999})
    assert len(set(accuracies(done))) == 1
    assert [x["round"] for x in done.lines()] == [0, 1, 2, 3]


def test_a_client_that_diverges_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    done = run_small(
        tmp_path / "run",
        {"kind": "fedit"},
        training={"optimiser": "sgd", "lr": 1e30, "clip": 0.0, "rounds": 1},
    )
    (failure, *_) = done.lines()[1]["failures"]
    assert "loss" in failure["reason"]
    assert "finite" in failure["reason"]


def test_what_is_not_finite_is_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with a gradient that is not: √ of a square at zero."""
    plain = Digits.loss

    def loss(self: Digits, model: torch.nn.Module, rows: np.ndarray) -> torch.Tensor:
        zeros = [p for n, p in model.named_parameters() if "lora_B" in n and p.requires_grad]
        return plain(self, model, rows) + sum(x.square().sum().sqrt() for x in zeros)

    monkeypatch.setattr(Digits, "loss", loss)
    done = run_small(tmp_path / "run", {"kind": "fedit"}, training={"rounds": 1, "steps": 1})
    assert len(done.lines()[1]["failures"]) == 4
    assert "not finite" in done.lines()[1]["failures"][0]["reason"]


def test_received_is_what_every_client_is_sent(tmp_path: Path) -> None:
    """Pruned ranks too: here each client keeps half of its rank once its tail has shrunk."""
    done = run_small(
        tmp_path / "small" / "it" / "seed0",
        {"kind": "hetlora", "gamma": 0.5, "penalty": 10.0},
        training={"rounds": 3},
        clients={"count": 4, "ranks": [8, 4]},
    )
    last = done.lines()[-1]
    assert last["sent_ranks"] != [8, 4, 8, 4]
    assert set(last["by_rank"]) == set(map(str, last["sent_ranks"]))
    (found,), _ = load_runs([tmp_path])
    scores = [last["by_rank"][str(r)]["accuracy"] for r in last["sent_ranks"]]
    assert found.received == scores


def test_participation_is_a_seeded_sample_shared_by_methods(tmp_path: Path) -> None:
    asked = []
    for name in ("glora", "flexlora"):
        done = run_small(
            tmp_path / name,
            {"kind": name},
            training={"rounds": 4, "steps": 1},
            clients={"count": 10, "ranks": [1, 2, 4], "participation": 0.3},
        )
        asked.append([[c["client"] for c in x["clients"]] for x in done.lines()[1:]])
    assert asked[0] == asked[1]
    assert all(len(set(round)) == 3 for round in asked[0])
    assert len({tuple(round) for round in asked[0]}) > 1
    assert [c["rank"] for c in done.lines()[1]["clients"]] == [
        [1, 2, 4][i % 3] for i in asked[0][0]
    ]


# --- bytes -------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "adapter": ADAPTER,
    "restart": {"kind": "glora"},
    "restart of rank 2": {"kind": "glora", "context_rank": 2},
    "context": {"kind": "glora", "mode": "delta", "context": True},
}


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        ("restart", [0, 8, 8], [4, 4, 4]),  # all of W_t, of rank 8; the adapter is drawn
        ("restart of rank 2", [0, 2, 2], [4, 4, 4]),
        ("context", [0, 8, 8], [4, 4, 4]),  # the readout and the rest of W_t
        ("fedit", [0, 4, 4], [4, 4, 4]),
        ("adapter", [0, 4, 4], [4, 4, 4]),
        ("ffa", [0, 2, 2], [2, 2, 2]),  # A is drawn by the client and never travels
        ("rolora", [0, 2, 2], [2, 2, 2]),  # the factor that was not trained is held already
        ("flora", [0, 16, 16], [4, 4, 4]),  # each stack of 4 · rank once
        ("fedex", [0, 24, 24], [4, 4, 4]),  # average and residual of rank (4 + 1) · 4
    ],
)
def test_bytes_by_round(name: str, down: list[int], up: list[int], tmp_path: Path) -> None:
    # Two steps: after one, A is what it was, since B was zero, and would not be sent again.
    lines = run_small(tmp_path / "run", MODES.get(name, {"kind": name}), training={"steps": 2})
    lines = lines.lines()[1:]
    unit = 4 * 4 * PER_RANK  # d_out + d_in numbers of 4 bytes, to or from four clients
    assert [x["bytes_down"] for x in lines] == [d * unit for d in down]
    assert [x["bytes_up"] for x in lines] == [u * unit for u in up]


def test_bfloat16_on_the_wire_halves_bytes_and_still_learns(tmp_path: Path) -> None:
    full, half = (
        run_small(
            tmp_path / wire,
            {"kind": "glora"},
            clients={"wire": wire},
            training={"rounds": 4, "steps": 6},
        )
        for wire in ("float32", "bfloat16")
    )
    for a, b in zip(full.lines()[1:], half.lines()[1:], strict=True):
        assert b["bytes_up"] * 2 == a["bytes_up"]
        assert b["bytes_down"] * 2 == a["bytes_down"]
    losses = [[x["metrics"]["loss"] for x in r.lines()] for r in (full, half)]
    assert losses[0] != losses[1]
    assert abs(accuracies(half)[-1] - accuracies(full)[-1]) < 0.1


# --- clients -----------------------------------------------------------------------------------


def test_what_is_evaluated_is_the_dense_model(tmp_path: Path) -> None:
    """Frozen weights + merged pairs + s·B·A, by PEFT and by hand."""
    plan = Plan(config({"it": {"kind": "fedex"}}), "it", 0, 0.01)
    generator = torch.Generator().manual_seed(3)

    def pairs(rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            m: (
                0.05 * torch.randn(o, rank, generator=generator),
                0.05 * torch.randn(rank, i, generator=generator),
            )
            for m, (o, i) in plan.setup.shapes.items()
        }

    one, two, adapter = pairs(5), pairs(3), pairs(4)
    found = plan.trainer.evaluate(Sent(adapter, {}, 2.0, merged=(one, two))).metrics
    model = plan.task.model()
    with torch.no_grad():
        for m, module in model.named_modules():
            if m in one:
                module.weight += sum(b @ a for b, a in (one[m], two[m]))
                module.weight += 2.0 * adapter[m][0] @ adapter[m][1]
    assert plan.task.evaluate(model).metrics["loss"] == pytest.approx(found["loss"], rel=1e-5)
    # and nothing of it remains
    start = plan.trainer.evaluate(
        plan.method.broadcast(plan.method.start(plan.setup), Client(0, 4))
    ).metrics
    assert start == pytest.approx(plan.task.evaluate(plan.task.model()).metrics, rel=1e-5)


def test_frozen_factors_stay_and_every_pair_of_a_readout_learns() -> None:
    plan = Plan(config({"it": ADAPTER}, clients={"ranks": [8]}), "it", 0, 0.01)
    server = plan.method.start(plan.setup)
    client = Client(0, 8)
    for train in ("A", "B"):
        sent = plan.method.broadcast(server, client)
        sent = Sent({m: (b + 0.1, a) for m, (b, a) in sent.factors.items()}, {}, 2.0, train)
        learnt = plan.trainer.train(sent, client, plan.parts[0], 0, {})
        for m, (b, a) in learnt.factors.items():
            assert torch.equal(b, sent.factors[m][0]) == (train == "A")
            assert torch.equal(a, sent.factors[m][1]) == (train == "B")
    # A state of rank 1, read out at rank 8: seven padded pairs, all of which move.
    one = {m: (b[:, :1] + 0.1, a[:1]) for m, (b, a) in sent.factors.items()}
    from glora_ops.fl.messages import Reply

    server = plan.method.combine(server, [Reply(client, sent, one, {}, 5)])
    readout = plan.method.broadcast(server, client)
    learnt = plan.trainer.train(readout, client, plan.parts[0], 1, {})
    for m, (b, _) in learnt.factors.items():
        assert ((b - readout.factors[m][0]).abs().amax(0) > 0).all()


def test_optimiser_state_is_reset_or_kept_as_told(tmp_path: Path) -> None:
    reset, kept = (
        run_small(tmp_path / how, {"kind": "fedit"}, training={"optimiser_state": how})
        for how in ("reset", "keep")
    )
    assert accuracies(reset)[:2] == accuracies(kept)[:2]
    assert reproducible(reset)[2] != reproducible(kept)[2]
    assert not any(name.startswith("engine/") for name in state(reset))
    assert any(name.startswith("engine/3/blocks.0.q/A:exp_avg") for name in state(kept))


# --- moments that mean something ---------------------------------------------------------------

KEPT = {"optimiser_state": "keep"}


@pytest.mark.parametrize("turn", [True, False])
def test_kept_moments_mean_the_same_in_whatever_gauge_a_readout_comes(turn: bool) -> None:
    """The same update, its directions turned and mixed: one curve, if the client may turn back."""
    plan = Plan(config({"it": ADAPTER}, training=KEPT), "it", 0, 0.01)
    client, trainer, rows = Client(0, 4), plan.trainer, plan.parts[0]
    sent = replace(plan.method.broadcast(plan.method.start(plan.setup), client), turn=turn)
    learnt = trainer.train(sent, client, rows, 0, {})
    again = Sent(learnt.factors, {}, sent.scaling, turn=turn)
    state = trainer.train(again, client, rows, 1, learnt.state).state
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    other = {m: (b @ rotation, rotation.mT @ a) for m, (b, a) in again.factors.items()}
    one, two = (
        trainer.train(replace(again, factors=f), client, rows, 2, state).factors
        for f in (again.factors, other)
    )
    distance, moved = 0.0, 0.0
    for m, (b, a) in again.factors.items():
        found, expected = (x[m][0] @ x[m][1] for x in (two, one))
        distance += float((found - expected).square().sum())
        moved += float((expected - b @ a).square().sum())
    assert (distance < 1e-4 * moved) is turn


def test_a_fresh_adapter_has_no_moments_of_another(tmp_path: Path) -> None:
    """Where adapters are drawn each round, keeping moments changes nothing but a head's."""
    restart = {"kind": "glora"}
    reset, kept = (
        run_small(tmp_path / how, restart, training={"optimiser_state": how})
        for how in ("reset", "keep")
    )
    assert reproducible(reset) == reproducible(kept)


def test_turning_is_the_nearest_and_changes_no_update() -> None:
    b, a = torch.randn(9, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    found_b, found_a = turned({"m": (b @ q, q.mT @ a)}, {"m": (b, a)})["m"]
    torch.testing.assert_close(found_b, b)
    torch.testing.assert_close(found_a, a)
    near_b, near_a = turned({"m": (b, a)}, {"m": (a.mT[:3].repeat(3, 1), b.mT[:, :7])})["m"]
    torch.testing.assert_close(near_b @ near_a, b @ a)
    best = (near_b - a.mT[:3].repeat(3, 1)).square().sum() + (near_a - b.mT[:, :7]).square().sum()
    for seed in range(20):
        noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
        r = torch.linalg.qr(noise).Q
        apart = (b @ r - a.mT[:3].repeat(3, 1)).square().sum()
        assert apart + (r.mT @ a - b.mT[:, :7]).square().sum() >= best


# --- restarts ----------------------------------------------------------------------------------

RESTARTED = {
    "clients": {"count": 5, "ranks": [2, 4], "participation": 0.6, "lost": 0.1, "gauge": 3.0},
    "training": {"rounds": 5, "steps": 3, "optimiser_state": "keep", "dropout": 0.1},
}
KILLED = """
import json, sys
from pathlib import Path
from glora_ops.fl.config import Config
from glora_ops.fl.run import Plan, run

config = Config.model_validate(json.loads(sys.argv[1]))
run(Plan(config, "it", 0, config.training.lr), Path(sys.argv[2]), resume=True)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at arbitrary moments, twice, then resumed: metrics and state equal bit for bit."""
    made = config({"it": {"kind": "glora", "mode": "delta"}}, **RESTARTED)
    whole = run_small(tmp_path / "whole", {"kind": "glora", "mode": "delta"}, **RESTARTED)
    folder = tmp_path / "killed"
    moments = random.Random(time.time_ns())
    for lines in (2, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, made.model_dump_json(), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        while len(Run(folder).lines()) < lines and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = len(Run(folder).lines())
    run(Plan(made, "it", 0, made.training.lr), folder, resume=True)
    assert before >= 3
    assert reproducible(Run(folder)) == reproducible(whole)
    assert set(state(Run(folder))) == set(state(whole))
    assert all(torch.equal(x, state(Run(folder))[name]) for name, x in state(whole).items())


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("flora", "before the line"),
        ("flexlora", "before the checkpoint"),
        ("hetlora", "in the checkpoint"),
        ("restart", "before the checkpoint"),
        ("context", "before the line"),
        ("fedadam", "before the checkpoint"),
    ],
)
def test_a_crash_between_any_two_writes_loses_nothing(
    name: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adam = {"kind": "flora", "server": {"kind": "fedadam", "lr": 0.01}}
    method = (MODES | {"fedadam": adam}).get(name, {"kind": name})
    made = config({"it": method}, **RESTARTED)
    whole = run_small(tmp_path / "whole", method, **RESTARTED)

    class Crash(BaseException):
        pass

    def crash(self: Run, *args: Any) -> None:
        if self.lines() and self.lines()[-1]["round"] >= 2:
            if when == "in the checkpoint":
                left = self.folder / ".checkpoint.safetensors.0123abcd.new"
                left.mkdir()
                (left / ".glora-lock").touch()
                (left / "checkpoint.safetensors").write_bytes(b"half")
                with self.metrics_path.open("a") as file:
                    file.write('{"round": 3, "cut o')
            raise Crash
        original(self, *args)

    target = "append" if when == "before the line" else "commit"
    original = getattr(Run, target)
    folder = tmp_path / "crashed"
    with monkeypatch.context() as patch:
        patch.setattr(Run, target, crash)
        with pytest.raises(Crash):
            run(Plan(made, "it", 0, made.training.lr), folder)
    run(Plan(made, "it", 0, made.training.lr), folder, resume=True)
    assert reproducible(Run(folder)) == reproducible(whole)
    assert all(torch.equal(x, state(Run(folder))[n]) for n, x in state(whole).items())
    assert not list(folder.glob(".*"))


def test_killed_before_its_first_checkpoint_a_run_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config({"it": {"kind": "fedit"}}, training={"rounds": 1, "steps": 1})
    plan = Plan(made, "it", 0, 0.005)

    def crash(self: Run, *args: Any) -> None:
        with self.metrics_path.open("a") as file:
            file.write('{"round": 0, "cut o')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "run")
    assert [x["round"] for x in run(plan, tmp_path / "run", resume=True)] == [0, 1]


def test_resume_refuses_another_run_and_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = config({"it": {"kind": "fedit"}}, training={"rounds": 1, "steps": 1})
    plan = Plan(made, "it", 0, 0.005)
    run(plan, folder)
    with pytest.raises(GloraError, match="resume"):
        run(plan, folder)
    assert [x["round"] for x in run(plan, folder, resume=True)] == [0, 1]
    with pytest.raises(GloraError, match=r"lr 0\.006 instead of 0\.005"):
        run(Plan(made, "it", 0, 0.006), folder, resume=True)
    other = config({"it": {"kind": "ffa"}}, training={"rounds": 1, "steps": 2})
    words = r"training\.steps 2 instead of 1, methods\.it\.kind ffa instead of fedit"
    with pytest.raises(GloraError, match=words):
        run(Plan(other, "it", 0, 0.005), folder, resume=True)
    fewer = Plan(made, "it", 0, 0.005)
    fewer.parts[0] = fewer.parts[0][1:]  # other data under the same name
    with pytest.raises(GloraError, match="examples"):
        run(fewer, folder, resume=True)
    more = config(
        {"it": {"kind": "fedit"}, "new": {"kind": "ffa"}}, training={"rounds": 1, "steps": 1}
    )
    assert len(run(Plan(more, "it", 0, 0.005), folder, resume=True)) == 2  # arms may come later
    (folder / "done").unlink()
    (folder / "checkpoint.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(GloraError, match="checkpoint"):
        run(plan, folder, resume=True)


def test_run_json_tells_what_was_run(tmp_path: Path) -> None:
    done = run_small(tmp_path / "run", {"kind": "fedit"}, training={"rounds": 1, "steps": 1})
    about = json.loads(done.about_path.read_text())
    assert about["metric"] == "accuracy"
    assert about["config"]["training"]["steps"] == 1
    assert sum(about["examples"]) == 700
    assert about["versions"]["torch"].startswith("2.")
    assert about["parameters"] > 200_000


def test_predictions_say_what_the_metrics_say(tmp_path: Path) -> None:
    """Accuracy and every client's own score again, from the stored answers and the partition."""
    made = config({"it": ADAPTER}, clients={"alpha": 0.1})
    plan = Plan(made, "it", 0, made.training.lr)
    run(plan, tmp_path / "run")
    record = Run(tmp_path / "run")
    answers = [json.loads(x) for x in record.predictions_path.read_text().splitlines()]
    last = record.lines()[-1]
    assert {x["round"] for x in answers} == {3}
    assert len({x["id"] for x in answers}) == len(answers) == 300
    right = np.array([x["prediction"] == x["truth"] for x in answers])
    assert right.mean() == pytest.approx(last["metrics"]["accuracy"])
    # All clients have one rank, and the server's model is of another: judge what they are sent.
    server, *_ = record.restore(plan.method.start(plan.setup))
    sent = plan.trainer.evaluate(plan.method.broadcast(server, Client(0, 4))).answers
    truth = np.array([x.truth for x in sent])
    right = np.array([x.prediction == x.truth for x in sent])
    accuracy = np.array([right[truth == digit].mean() for digit in range(10)])
    for own, rows in zip(last["own"], plan.parts, strict=True):
        shares = np.bincount(plan.task.labels[rows], minlength=10) / len(rows)
        assert own == pytest.approx(shares @ accuracy)
    assert min(last["own"]) < np.mean(last["own"])


def test_own_scores_are_none_where_nothing_of_a_client_is_judged() -> None:
    answers = [
        Answer(0, "a", "b", 0.25, 0),
        Answer(1, "a", "a", 0.75, 0),
        Answer(2, "", "", 1, None),
    ]
    assert own_score(answers, np.array([3, 5])) == 0.5
    assert own_score(answers, np.array([0, 5])) is None


def test_other_weights_of_the_same_name_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config({"it": {"kind": "fedit"}}, training={"rounds": 1, "steps": 1})
    run(Plan(made, "it", 0, 0.005), tmp_path / "run")
    assert len(run(Plan(made, "it", 0, 0.005), tmp_path / "run", resume=True)) == 2
    plain = Digits.model

    def other(self: Digits) -> torch.nn.Module:
        model = plain(self)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return model

    monkeypatch.setattr(Digits, "model", other)
    with pytest.raises(GloraError, match="weights"):
        run(Plan(made, "it", 0, 0.005), tmp_path / "run", resume=True)


def test_a_run_has_one_process(tmp_path: Path) -> None:
    """A second one, resumed while the first is at work, would mix its rounds into the first's."""
    folder = tmp_path / "run"
    with Run(folder).held(), pytest.raises(GloraError, match=r"another process.*--resume"):
        Run(folder).held().__enter__()
    with Run(folder).held():  # and a run that ended lets go
        pass
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.safetensors", "done"])
def test_a_folder_that_is_no_runs_is_left_alone(name: str, tmp_path: Path) -> None:
    made = config({"it": {"kind": "fedit"}}, training={"rounds": 1, "steps": 1})
    (tmp_path / name).write_text("mine")
    for resume in (False, True):
        with pytest.raises(GloraError, match=f"{name} but no run.json"):
            run(Plan(made, "it", 0, 0.005), tmp_path, resume=resume)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}
