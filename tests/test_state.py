"""The Python API: `aggregate` with its checks, and `State` with its files."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file
from strategies import Recipe, build, distance, norm, problems

import glora_ops as glora
from glora_ops import GloraError, GloraWarning, ModuleState, Refused, State, errors, reference


def pairs(seed: int = 0, **recipe: object) -> list:
    return build(Recipe(seed=seed, **recipe)).clients


def modules(seed: int = 0) -> list[dict]:
    """Three clients, two modules of one shape and one of another, ranks that differ."""
    q = pairs(seed, ranks=(3, 2, 4))
    k = pairs(seed + 1, ranks=(1, 2, 4))
    up = pairs(seed + 2, ranks=(3, 2, 4), m=30, n=7)
    return [{"q": q[i], "k": k[i], "up": up[i]} for i in range(3)]


def dense(m: ModuleState) -> np.ndarray:
    left, right = m.update
    return (left.double() @ right.double()).numpy()


def mean(clients: list, weights: list[float], scalings: list[float]) -> np.ndarray:
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    return reference.mean_update(arrays, weights, scalings)


@pytest.fixture
def state() -> State:
    return glora.aggregate(modules(), weights=[3, 1, 2], scalings=[2.0, -1.0, 0.5], rank=9)


# --- aggregate ---------------------------------------------------------------------------------


@given(problem=problems(("float32", "bfloat16", "float64"), cut="N", condition=1.0, loud=1.0))
def test_bare_pairs_make_a_state_of_one_unnamed_module(problem):
    weights = list(300 * problem.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GloraWarning)
        state = glora.aggregate(
            problem.clients, weights=weights, scalings=list(problem.scaling), rank=problem.rank
        )
    assert tuple(state.modules) == ("",)
    assert state.rank == problem.rank
    assert sum(state.weights) == pytest.approx(1)
    args = problem.arrays(), problem.weights, problem.scaling
    limit = bounds.exact_bound(bounds.storage_scale(*args))
    if problem.exact:
        assert norm(dense(state.modules[""]) - reference.mean_update(*args)) <= limit


def test_every_module_is_what_it_is_alone(state):
    clients = modules()
    assert tuple(state.modules) == ("q", "k", "up")
    for name, m in state.modules.items():
        alone = glora.aggregate(
            [c[name] for c in clients], weights=[3, 1, 2], scalings=[2.0, -1.0, 0.5], rank=9
        )
        assert distance(dense(m), dense(alone.modules[""])) < 1e-6
        truth = mean([c[name] for c in clients], [0.5, 1 / 6, 1 / 3], [2.0, -1.0, 0.5])
        assert distance(dense(m), truth) < 1e-5
    assert state.captured == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("max_bytes", [None, 1500, 5000, 2**28])
def test_batches_do_not_change_the_result(state, max_bytes):
    seen = []
    other = glora.aggregate(
        modules(),
        weights=[3, 1, 2],
        scalings=[2.0, -1.0, 0.5],
        rank=9,
        max_bytes=max_bytes,
        progress=lambda done, total: seen.append((done, total)),
    )
    for name, m in state.modules.items():
        if max_bytes in (None, 2**28):
            assert torch.equal(m.u, other.modules[name].u)
        assert distance(dense(other.modules[name]), dense(m)) < 1e-6
    assert seen[-1] == (3, 3)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})


def test_defaults_are_equal_weights_scaling_one_and_twice_the_largest_rank():
    clients = pairs(ranks=(1, 3, 2))
    state = glora.aggregate(clients)
    assert state.weights == (1 / 3, 1 / 3, 1 / 3)
    assert state.rank == 6
    assert state.clients == ("client 0", "client 1", "client 2")
    assert distance(dense(state.modules[""]), mean(clients, [1 / 3] * 3, [1.0] * 3)) < 1e-5


def test_scalings_may_differ_by_module():
    clients = modules()
    scalings = [{"q": 1.0, "k": 2.0, "up": 3.0}, 0.5, 2.0]
    state = glora.aggregate(clients, scalings=scalings, rank=9)
    for name, first in scalings[0].items():
        want = mean([c[name] for c in clients], [1 / 3] * 3, [first, 0.5, 2.0])
        assert distance(dense(state.modules[name]), want) < 1e-5


@pytest.mark.parametrize("missing", ["zero", "renormalise"])
def test_a_client_without_a_module(missing):
    clients = modules()
    del clients[1]["k"]
    state = glora.aggregate(clients, weights=[3, 1, 2], rank=9, missing=missing)
    assert state.modules["k"].present.tolist() == [True, False, True]
    assert state.modules["q"].present.all()
    share = [0.5, 1 / 3] if missing == "zero" else [0.6, 0.4]
    want = mean([clients[0]["k"], clients[2]["k"]], share, [1.0, 1.0])
    assert distance(dense(state.modules["k"]), want) < 1e-5
    assert float(state.modules["k"].client_stat("norm")[1]) == 0
    assert "not in every client" in state.report()


def test_signed_weights_are_task_arithmetic():
    clients = pairs(ranks=(2, 3))
    state = glora.aggregate(clients, weights=[1.0, -0.4], basis="update", normalise=False, rank=5)
    assert state.weights == (1.0, -0.4)
    assert distance(dense(state.modules[""]), mean(clients, [1.0, -0.4], [1.0, 1.0])) < 1e-5
    for wrong in (
        {"basis": "consensus", "normalise": False},
        {"basis": "projector", "normalise": False},
        {"basis": "update", "normalise": True},
    ):
        with pytest.raises(Refused, match=r"client 1.*-0\.4.*negative votes do not exist"):
            glora.aggregate(clients, weights=[1.0, -0.4], rank=5, **wrong)
    # Weights that sum to zero are fine as signed ones: a difference.
    state = glora.aggregate(clients, weights=[1.0, -1.0], basis="update", normalise=False, rank=5)
    assert distance(dense(state.modules[""]), mean(clients, [1.0, -1.0], [1.0, 1.0])) < 1e-5


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
def test_rank_auto_is_the_smallest_that_holds_the_target(target, basis):
    clients = pairs(3, ranks=(4, 4, 4), spectrum="geometric")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GloraWarning)
        state = glora.aggregate(clients, rank="auto", captured=target, basis=basis)
        assert state.captured >= min(target, 1 - 1e-6)
        table = state.settings["rank_to_captured"]
        assert table[str(state.rank)] == state.captured
        assert state.settings["rank"] == state.rank
        assert json.loads(json.dumps(state.settings)) == state.settings
        if state.rank > 1:
            below = glora.aggregate(clients, rank=state.rank - 1, basis=basis)
            assert below.captured < target
    again = glora.aggregate(clients, rank=state.rank, basis=basis)
    assert torch.equal(again.modules[""].u, state.modules[""].u)


def test_a_warm_state_changes_little_and_helps():
    rng = torch.Generator().manual_seed(0)
    clients = [
        (torch.randn(60, 4, generator=rng), torch.randn(4, 50, generator=rng)) for _ in range(80)
    ]
    cold = glora.aggregate(clients, rank=8, basis="update", power_iters=0)
    good = glora.aggregate(clients, rank=8, basis="update", power_iters=6)
    warm = glora.aggregate(clients, rank=8, basis="update", power_iters=0, warm=good)

    def held(state):
        return norm(dense(state.modules[""]))

    assert held(cold) < held(warm) <= held(good) * (1 + 1e-4)


def test_a_nearly_silent_outcome_is_warned_about():
    tied = pairs(0, kind="pool", ranks=(3, 3), spectrum="flat")
    with pytest.warns(GloraWarning, match="tie"):
        state = glora.aggregate(tied, rank=2, basis="projector")
    assert state.ambiguous == ("",)
    loud = pairs(0, ranks=(2,) * 6, loud=1e4, cut="r")
    with pytest.warns(GloraWarning, match="could hold"):
        state = glora.aggregate(loud, rank=2)
    assert state.captured < 0.9 * state.attainable


def test_one_client_and_zero_updates_have_defined_results():
    (b, a), *_ = pairs()
    one = glora.aggregate([(b, a)])
    assert distance(dense(one.modules[""]), (b.double() @ a.double()).numpy()) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = glora.aggregate([(0 * b, a), (b, 0 * a)], rank=3)
    assert (dense(nothing.modules[""]) == 0).all()
    assert nothing.captured == nothing.attainable == 1
    assert nothing.report()
    silent = glora.aggregate([(b, a), (b, -3 * a)], weights=[1, 0], rank=4)
    assert distance(dense(silent.modules[""]), (b.double() @ a.double()).numpy()) < 1e-6


# --- refusals ----------------------------------------------------------------------------------

B, A = torch.ones(4, 2), torch.ones(2, 3)
NAN = B.clone()
NAN[1, 0] = float("nan")
INF = A.clone()
INF[0, 2] = float("inf")


@pytest.mark.parametrize(
    ("clients", "settings", "says"),
    [
        ([], {}, "clients: got 0"),
        ([{}], {}, "clients"),
        ([(B, A)], {"weights": [1, 2]}, "weights: got 2"),
        ([(B, A)], {"weights": [0.0]}, "above zero"),
        ([(B, A)], {"weights": [float("nan")]}, r"client 'client 0'.*nan"),
        ([(B, A)], {"weights": [float("inf")]}, r"client 'client 0'.*inf"),
        ([(B, A)], {"weights": [-1.0]}, r"client 'client 0'.*-1\.0"),
        ([(B, A)], {"scalings": [1.0, 2.0]}, "scalings: got 2"),
        ([(B, A)], {"scalings": [float("nan")]}, "scaling cannot be used; found nan"),
        ([(B, A)], {"rank": 0}, "rank: got 0"),
        ([(B, A)], {"rank": 2.5}, r"rank: got 2\.5"),
        ([(B, A)], {"rank": "best"}, "rank: got 'best'"),
        ([(B, A)], {"rank": "auto", "captured": 0.0}, r"captured: got 0\.0"),
        ([(B, A)], {"rank": "auto", "captured": 1.5}, r"captured: got 1\.5"),
        ([(B, A)], {"basis": "mean"}, "basis: got 'mean'"),
        ([(B, A)], {"missing": "guess"}, "missing: got 'guess'"),
        ([(B, A)], {"names": ["a", "b"]}, "names: got 2"),
        ([(B, A)] * 2, {"names": ["a", "a"]}, "names"),
        ([(NAN, A)], {}, r"client 'client 0', tensor 'B'.*not finite.*1 of 8.*\[1, 0\]"),
        ([(B, INF)], {"names": ["ann"]}, r"client 'ann', tensor 'A'.*not finite"),
        ([(B, A), (torch.ones(5, 2), A)], {}, r"client 'client 1'.*d_out 4"),
        ([(B, A[:1])], {}, "not a factor pair"),
        ([(B[0], A)], {}, "not a factor pair"),
        ([{"q": (B, A)}, {"q": (B, torch.ones(2, 9))}], {}, r"tensor 'q'.*d_in 3"),
        # Types.
        (None, {}, "clients: got None of type NoneType, expected a list"),
        ("ab", {}, "clients: got 'ab' of type str"),
        ({"q": (B, A)}, {}, "clients: got .* of type dict"),
        ([B], {}, r"client 'client 0': not a factor pair.*of type Tensor"),
        ([("B", "A")], {}, r"client 'client 0'.*found str, str"),
        ([(B, A), (B, A.tolist())], {}, r"client 'client 1'.*found Tensor, list"),
        ([(B, A, B)], {}, "not a factor pair"),
        ([(B.int(), A)], {}, "not a factor pair.*fp32"),
        ([(B.cfloat(), A)], {}, "not a factor pair.*fp32"),
        ([(np.array([["x"]]), np.ones((1, 3)))], {}, "not a factor pair.*found ndarray, ndarray"),
        ([{1: (B, A)}], {}, r"tensor '1': not a factor pair.*module name that is text"),
        ([(B, A)], {"weights": "1"}, "weights: got '1' of type str"),
        ([(B, A)], {"weights": 1.0}, r"weights: got 1\.0 of type float"),
        ([(B, A)], {"weights": ["1"]}, r"client 'client 0': weight cannot be used; found '1'"),
        ([(B, A)], {"weights": [None]}, "weight cannot be used; found None"),
        ([(B, A)], {"weights": [1j]}, "weight cannot be used; found 1j"),
        ([(B, A)], {"scalings": 2.0}, r"scalings: got 2\.0 of type float"),
        ([(B, A)], {"scalings": ["2"]}, "scaling cannot be used; found '2'"),
        ([(B, A)], {"scalings": [None]}, "scaling cannot be used; found None"),
        ([(B, A)], {"scalings": [{"q": 1.0}]}, "no scaling for a module"),
        ([(B, A)], {"names": "a"}, "names: got 'a' of type str"),
        ([(B, A)], {"names": [1]}, r"names: got \[1\], expected text"),
        ([(B, A)], {"rank": True}, "rank: got True"),
        ([(B, A)], {"rank": 2**40}, "rank: got 1099511627776, expected an integer from 1"),
        ([(B, A)], {"seed": "x"}, "seed: got 'x'"),
        ([(B, A)], {"seed": 2**64}, "seed: got 18446744073709551616"),
        ([(B, A)], {"power_iters": 1.5}, r"power_iters: got 1\.5"),
        ([(B, A)], {"oversample": None}, "oversample: got None"),
        ([(B, A)], {"max_bytes": 0}, "max_bytes: got 0"),
        ([(B, A)] * 3, {"max_bytes": 167}, "max_bytes: got 167, expected at least 168, .*raise it"),
        ([(B, A)], {"tau_rel": "0.1"}, r"tau_rel: got '0\.1'"),
        ([(B, A)], {"tau_rel": float("inf")}, "tau_rel: got inf"),
        ([(B, A)], {"anchor": float("nan")}, "anchor: got nan"),
        ([(B, A)], {"tol": None}, "tol: got None"),
        ([(B, A)], {"basis": 3}, "basis: got 3"),
        ([(B, A)], {"rank": "auto", "captured": "all"}, "captured: got 'all'"),
        ([(B, A)], {"warm": "last"}, "warm: got 'last' of type str"),
        # Sizes that fp64 cannot square, or whose squares it loses.
        ([(B, A)] * 3, {"weights": [1e308] * 3}, "weights: got .*expected a finite sum"),
        ([(B, A)], {"weights": [1e31], "normalise": False}, "weights: got .*1e-30 to 1e"),
        ([(B, A)], {"weights": [1e-200], "normalise": False}, "weights: got .*1e-30 to 1e"),
        *(
            (
                [(B, A)],
                {"scalings": [s]},
                rf"scaling cannot be used; found {re.escape(repr(s))}.*1e-30 to",
            )
            for s in (1e31, 1e150, 1e155, -1e200, 1e-200, float("inf"))
        ),
        ([(1e60 * B.double(), A)], {}, "tensor 'B': values are too large.*1e[+]60.*1e-40 to 1e40"),
        ([(B, 1e-60 * A.double())], {}, "tensor 'A': values are too large or too small.*1e-60"),
    ],
)
def test_what_cannot_be_aggregated_is_refused_by_name(clients, settings, says):
    with pytest.raises(GloraError, match=says):
        glora.aggregate(clients, **settings)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rank": 2.5}, r"rank: got 2\.5"),
        ({"rank": "2"}, "rank: got '2'"),
        ({"rank": 2, "scaling": "1"}, "scaling: got '1'"),
        ({"rank": 2, "scaling": float("inf")}, "scaling: got inf"),
        ({"rank": 2, "scaling": None}, "scaling: got None"),
        ({"rank": 2, "pad": None}, "pad: got None"),
        ({"rank": 2, "seed": 1.5}, r"seed: got 1\.5"),
    ],
)
def test_what_cannot_be_read_out_is_refused_by_name(state, arguments, says):
    with pytest.raises(GloraError, match=says):
        state.readout(**arguments)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
def test_the_sizes_that_are_accepted_are_computed_with(basis, size):
    """Scalings at the ends of their range change the size of the state and nothing else."""
    clients = [(b.double() * 1e20, a.double() * 1e20) for b, a in pairs()]
    want = glora.aggregate(clients, rank=4, basis=basis)
    got = glora.aggregate(clients, scalings=[size] * len(clients), rank=4, basis=basis)
    assert got.captured == pytest.approx(want.captured, rel=1e-9)
    for (b, a), (c, d) in ((x.modules[""].update, y.modules[""].update) for x, y in [(got, want)]):
        assert distance((b @ a).numpy() / size, (c @ d).numpy()) < 1e-9


def test_numpy_arrays_are_as_good_as_tensors():
    clients = [(b.float(), a.float()) for b, a in pairs()]
    want = glora.aggregate(clients, weights=[3, 1, 2], rank=4)
    arrays = []
    for b, a in clients:
        b, a = b.numpy().copy(), a.numpy()[::-1].copy()[::-1]  # negative strides
        b.flags.writeable = False
        arrays.append((b, a.astype(a.dtype.newbyteorder())))
    weights = np.array([3, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", GloraWarning)
        got = glora.aggregate(
            arrays, weights=weights, scalings=torch.ones(3), rank=np.int64(4), seed=np.int32(0),
            tau_rel=np.float64(0.1), tol=np.float64(1e-3),
        )  # fmt: skip
    for name in ("u", "s", "v"):
        assert torch.equal(getattr(got.modules[""], name), getattr(want.modules[""], name))
    assert json.dumps(got.settings)


def test_all_refusals_come_at_once():
    with pytest.raises(Refused) as caught:
        glora.aggregate([(NAN, A), (B, INF), (torch.ones(5, 2), A)])
    assert [r.client for r in caught.value.refusals] == ["client 0", "client 1", "client 2"]
    assert "leave the client out" in str(caught.value)


# --- readouts ----------------------------------------------------------------------------------


def test_readouts_of_several_modules_and_of_one(state):
    out = state.readout(4, 2.0)
    assert set(out) == {"q", "k", "up"}
    for name, (b, a) in out.items():
        m = state.modules[name]
        best = reference.optimum(dense(m), 4)
        assert distance(2.0 * (b.double() @ a.double()).numpy(), best) < 1e-6
    b, a = glora.aggregate(pairs(), rank=4).readout(2)
    assert b.shape == (20, 2)
    assert a.shape == (2, 16)


def test_the_report_says_what_was_done(state):
    text = state.report()
    for word in ("3 clients", "rank 9", "consensus", "captured", "gap", "effective rank"):
        assert word in text


# --- files -------------------------------------------------------------------------------------


def same(one: State, two: State) -> None:
    assert list(one.modules) == list(two.modules)
    for name, m in one.modules.items():
        for part, x in vars(m).items():
            y = getattr(two.modules[name], part)
            assert x.dtype == y.dtype
            assert torch.equal(x, y), (name, part)
    assert one.clients == two.clients
    assert one.weights == two.weights
    assert one.settings == two.settings
    assert one.layout == two.layout
    assert set(one.dense) == set(two.dense)
    for name, x in one.dense.items():
        assert torch.equal(x, two.dense[name])


def test_a_saved_state_loads_bit_for_bit(state, tmp_path):
    path = tmp_path / "server.safetensors"
    state.save(path)
    same(state, State.load(path))
    same(state, State.load(str(path)))
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_everything_a_state_may_hold_survives(tmp_path):
    clients = [{"layers.0/q": pair, "ünï.κ $\\frac{$": pair} for pair in pairs()]
    state = glora.aggregate(
        clients,
        rank="auto",
        captured=0.8,
        names=["ann", "bob/x\n", "c \udcff"],
    )
    layer = {"kind": "conv2d", "kernel": [2, 4], "fan_in_fan_out": False}
    state = replace(
        state,
        dense={"head.weight": torch.randn(3, 4).bfloat16(), "scale": torch.tensor(2.0)},
        layout={
            "base_model": "m", "revision": None, "task_type": "CAUSAL_LM", "lora_dropout": 0.1,
            "modules_to_save": ["head"], "modules": dict.fromkeys(state.modules, layer),
        },
    )  # fmt: skip
    state.save(tmp_path / "s.safetensors")
    same(state, State.load(tmp_path / "s.safetensors"))


def test_the_file_is_plain_safetensors_with_json(state, tmp_path):
    path = tmp_path / "s.safetensors"
    state.save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["glora"])
    assert about["format_version"] == 3
    assert about["settings"]["basis"] == "consensus"
    assert load_file(path)["modules/q/u"].shape == (20, 9)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(state, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    state.save(path)
    before = path.read_bytes()
    other = glora.aggregate(pairs(7), rank=3)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        other.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(tmp_path):
    """A process that rewrites a file over and over is killed: what is there can be read."""
    path = tmp_path / "s.safetensors"
    code = """
import sys, torch, glora_ops
torch.manual_seed(0)
states = [glora_ops.aggregate([(torch.randn(400, 8), torch.randn(8, 400))], rank=r)
          for r in (3, 8)]
states[0].save(sys.argv[1])
print("go", flush=True)
while True:
    for s in states:
        s.save(sys.argv[1])
"""
    for pause in (0.0, 0.004, 0.011):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().strip() == "go"
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        assert State.load(path).rank in (3, 8)


def test_a_state_of_bare_pairs_has_no_peft_folder_to_write(state, tmp_path):
    with pytest.raises(GloraError, match=r"layout: got None.*readout"):
        state.write_adapter(tmp_path / "out", 4)


# --- a state at hand -----------------------------------------------------------------------------


def test_a_state_says_what_it_is(state):
    said = repr(state)
    assert "\n" not in said
    for part in ("3 clients", "3 modules", "rank 9", "basis consensus", "attainable"):
        assert part in said
    one = glora.aggregate([(torch.eye(4, 1), torch.eye(1, 4))], rank=1)
    assert repr(one) == (
        "State(1 client, 1 module, rank 1, basis consensus, captured 1.0000 of 1.0000 attainable)"
    )


def test_a_state_is_gone_through_by_its_modules(state):
    assert list(state) == ["q", "k", "up"]
    assert len(state) == 3
    assert all(state[name] is state.modules[name] for name in state)


def test_a_state_moves_its_bases_and_nothing_else(state):
    moved = replace(state, dense={"head": torch.ones(2)}).to("meta")
    for name in moved:
        m = moved[name]
        assert {x.device.type for x in (m.u, m.s, m.v)} == {"meta"}
        assert m.stats is state[name].stats
    assert moved.dense["head"].device.type == "meta"
    assert moved.captured == state.captured
    assert state["q"].u.device.type == "cpu"


def test_a_state_draws_itself(state, tmp_path):
    state.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(GloraError, match="png"):
        state.plot(tmp_path / "spectra.gif")


def test_eight_modules_have_eight_colours_that_differ():
    from matplotlib.colors import to_rgb

    from glora_ops.analysis.plots import NAMED_LINES, line_colours

    drawn = torch.tensor([to_rgb(colour) for colour in line_colours(NAMED_LINES)])
    apart = torch.cdist(drawn, drawn) + 9 * torch.eye(NAMED_LINES)
    assert NAMED_LINES == 8
    assert float(apart.min()) > 0.25  # in viridis neighbours are 0.13 apart
    assert len(line_colours(20)) == 20


def test_every_warning_has_a_class_of_its_own(tmp_path):
    eye = [(torch.eye(6)[:, i : i + 1], torch.eye(5)[i : i + 1]) for i in range(2)]
    with pytest.warns(errors.TieWarning):
        glora.aggregate(eye, rank=1)
    torch.manual_seed(0)
    strangers = [{name: (torch.randn(6, 2), torch.randn(2, 5))} for name in ("a", "b")]
    with pytest.warns(errors.StrangerWarning):
        glora.aggregate(strangers, rank=4)
    assert issubclass(errors.TieWarning, GloraWarning)
    found = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, GloraWarning)
    ]
    assert {c.__name__ for c in found} <= set(errors.__all__)


def test_every_warning_is_of_a_class_of_its_own_and_not_of_the_base():
    """Whoever silences one keeps the others; the base is for `except` and for filters of all."""
    raised = [
        f"{path.name}:{call.lineno}"
        for path in Path(glora.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("warn")
        if any(ast.unparse(argument) == "GloraWarning" for argument in call.args)
    ]
    assert raised == []
