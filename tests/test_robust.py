"""Bad clients: signed inner products, the three rules, and what reaches the state."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Problem, Recipe, problems, regauge
from test_invariance import permuted, widened

import glora_ops as glora
from glora_ops import inner_products
from glora_ops.robust import FEWEST, RULES, TELLING, Verdict, cosines, judge, median_cosines

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def attacks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attacks", ROOT / "experiments/attacks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def updates(problem: Problem) -> np.ndarray:
    """(K, d_out · d_in), dense."""
    pairs = zip(problem.arrays(), problem.scaling, strict=True)
    return np.stack([(s * b @ a).ravel() for (b, a), s in pairs])


def inner(problem: Problem) -> torch.Tensor:
    return inner_products.of_pairs(problem.clients, problem.scaling.tolist())


def verdict(rule: str, problem: Problem) -> Verdict:
    return judge(rule, inner(problem), problem.weights.tolist())


def near(found: tuple[float | None, ...], expected: tuple[float | None, ...], tol: float) -> bool:
    return all(
        (x is None) == (y is None) and (x is None or abs(x - y) <= tol * max(1.0, abs(y)))
        for x, y in zip(found, expected, strict=True)
    )


def crowd(count: int, own: float = 0.1, seed: int = 0) -> Problem:
    """Clients that share most of what they learnt."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((12, 3)), rng.standard_normal((3, 10))
    clients = [
        (torch.from_numpy(b + own * rng.standard_normal(b.shape)), torch.from_numpy(a))
        for _ in range(count)
    ]
    recipe = Recipe(seed=seed, m=12, n=10, dtype="float64")
    return Problem(recipe, clients, np.full(count, 1 / count), np.ones(count), 3)


def spoilt(problem: Problem, **scalings: float) -> Problem:
    """Client i's update times what ``c<i>`` says."""
    scaling = problem.scaling.copy()
    for name, factor in scalings.items():
        scaling[int(name[1:])] = factor
    return replace(problem, scaling=scaling)


@st.composite
def crowds(draw: st.DrawFn) -> Problem:
    """Clients that agree more or less, up to a third of them spoilt."""
    count = draw(st.integers(3, 9))
    problem = crowd(count, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), draw(st.integers(0, 99)))
    bad = draw(st.lists(st.sampled_from([-1.0, -10.0, 100.0, 0.0]), max_size=count // 3))
    weights = draw(st.lists(st.sampled_from([1.0, 3.0, 0.1]), min_size=count, max_size=count))
    scaling = np.append(np.ones(count - len(bad)), bad)
    return replace(problem, scaling=scaling, weights=np.array(weights) / sum(weights))


# --- inner products --------------------------------------------------------------------------


@given(problem=problems(("float64", "float32", "bfloat16")))
def test_inner_products_are_those_of_the_dense_updates(problem: Problem) -> None:
    dense = updates(problem)
    size = np.array(
        [
            abs(s) * (np.linalg.norm(b, axis=0) @ np.linalg.norm(a, axis=1))
            for (b, a), s in zip(problem.arrays(), problem.scaling, strict=True)
        ]
    )
    error = np.abs(inner(problem).numpy() - dense @ dense.T)
    # What was taken for rounding, 16 N u64, and the rounding of the dense products themselves.
    assert (error <= 2**-45 * np.outer(size, size) + 1e-300).all()


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(9, r), torch.randn(r, 7)) for r in (1, 4, 2, 5, 1, 3)]
    scalings = [1.0, -2.0, 0.5, 1.0, 3.0, 0.0]
    whole = inner_products.of_pairs(pairs, scalings)
    for rows in (1, 3, 7):
        monkeypatch.setattr(inner_products, "ROWS", rows)
        torch.testing.assert_close(inner_products.of_pairs(pairs, scalings), whole)


def test_a_sign_is_seen_and_a_size_is_not() -> None:
    torch.manual_seed(0)
    b, a = torch.randn(9, 2), torch.randn(2, 7)
    found = cosines(inner_products.of_pairs([(b, a), (-b, a), (50 * b, a), (b * 0, a)], [1.0] * 4))
    torch.testing.assert_close(found[0, :3], torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    assert found[3].isnan().all()


def test_an_update_that_cancels_to_rounding_is_none() -> None:
    """Its cosines would be those of noise, and it would be left out or counted among the judges."""
    problem = crowd(4)
    b, a = problem.clients[3]
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    pair = (torch.cat([b, b], 1) @ turn, turn.mT @ torch.cat([a, -a]))
    assert 0 < (pair[0] @ pair[1]).norm() < 1e-13
    found = verdict("gate", replace(problem, clients=[*problem.clients[:3], pair]))
    assert found.norms[3] == 0
    assert found.cosines[3] is None
    assert found.left_out == ()


def test_too_many_pairs_are_refused_before_anything_is_read() -> None:
    b, a = torch.ones(2, 1), torch.ones(1, 2)
    with pytest.raises(glora.GloraError, match=r"2049.*at most 2097152 pairs.*groups"):
        glora.aggregate([(b, a)] * 2049, rank=1, robust="clip")
    inner_products.check_pairs(2048)


# --- invariance ------------------------------------------------------------------------------


def undecided(one: Verdict) -> bool:
    """Whether rounding may decide who is left out."""
    known = np.array([c for c in one.cosines if c is not None])
    if one.rule != "gate" or len(known) < FEWEST:
        return False
    usual = float(np.median(known))
    return bool(np.abs(known - usual / 2).min() < 1e-6) or abs(usual - TELLING) < 1e-6


def check_same(one: Verdict, two: Verdict, order: list[int], tol: float) -> None:
    if undecided(one):
        return
    assert (one.applied, one.reason[:30]) == (two.applied, two.reason[:30])
    for name in ("norms", "cosines", "scale", "distances"):
        before, after = getattr(one, name), getattr(two, name)
        assert near(after, tuple(before[i] for i in order), tol), name
    # Trust moves the mean as far as the client is from it: identical ones may share it anyhow.
    for i, trust in zip(order, two.trust, strict=True):
        apart = one.distances[i]
        reach = 1.0 if apart is None else min(1.0, apart / np.median(one.norms))
        assert abs(trust - one.trust[i]) * reach <= tol * max(1.0, trust), "trust"


@pytest.mark.parametrize("rule", RULES)
def test_no_gauge_and_no_width_moves_a_verdict(rule: str) -> None:
    @given(
        problem=crowds() | problems(("float64",), condition=1.0, dead=False, spectrum="geometric"),
        seed=st.integers(0, 99),
        condition=st.sampled_from([3.0, 1e2, 1e3]),
        columns=st.integers(0, 6),
    )
    def check(problem: Problem, seed: int, condition: float, columns: int) -> None:
        other = regauge(problem, seed, condition)
        other = widened(other, seed, columns) if columns else other
        order = list(range(len(problem.clients)))
        check_same(verdict(rule, problem), verdict(rule, other), order, 1e-6)

    check()


@pytest.mark.parametrize("rule", RULES)
def test_no_order_of_the_clients_moves_a_verdict(rule: str) -> None:
    @given(problem=crowds() | problems(("float64", "bfloat16")), seed=st.integers(0, 99))
    def check(problem: Problem, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(problem.clients)).tolist()
        check_same(verdict(rule, problem), verdict(rule, permuted(problem, seed)), order, 1e-6)

    check()


@pytest.mark.parametrize("rule", RULES)
def test_the_tolerance_sees_a_client_turned_round(rule: str) -> None:
    problem = crowd(6)
    other = replace(problem, scaling=np.array([1.0, 1, 1, 1, 1, -3]))
    with pytest.raises(AssertionError):
        check_same(verdict(rule, problem), verdict(rule, other), list(range(6)), 1e-6)


# --- the rules -------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [2.0, 1.5])
def test_clip_shortens_to_c_median_norms(c: float) -> None:
    problem = spoilt(crowd(7), c2=100.0, c5=1e-3)
    found = judge("clip", inner(problem), problem.weights.tolist(), c)
    norms = np.linalg.norm(updates(problem), axis=1)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-9)
    np.testing.assert_allclose(found.scale, np.minimum(1, c * np.median(norms) / norms), rtol=1e-9)
    assert found.scale[2] < 0.03
    assert found.trust == (1.0,) * 7
    assert found.left_out == ()


def test_the_gate_leaves_out_by_cosine_and_then_clips_by_the_others_norms() -> None:
    problem = spoilt(crowd(7), c1=-5.0, c4=-1.0, c6=30.0)
    problem.weights[:] = [1, 4, 2, 1, 1, 1, 2]
    found = judge("gate", inner(problem), problem.weights.tolist())
    dense = updates(problem)
    unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    agreement = [np.median(np.delete(unit @ unit[i], i)) for i in range(7)]
    np.testing.assert_allclose(found.cosines, agreement, rtol=1e-9)
    assert found.cosine_limit == pytest.approx(np.median(agreement) / 2)
    assert found.left_out == (1, 4)
    norms = np.linalg.norm(dense, axis=1)
    limit = 2 * np.median(norms[[0, 2, 3, 5, 6]])
    np.testing.assert_allclose(found.scale, np.minimum(1, limit / norms), rtol=1e-9)
    kept = np.array([1, 0, 1, 1, 0, 1, 1]) * problem.weights
    np.testing.assert_allclose(
        np.array(found.trust) * problem.weights, kept * problem.weights.sum() / kept.sum()
    )


def test_the_geometric_median_is_where_the_unit_vectors_balance() -> None:
    """Σ w_i (X − ΔW_i)/‖X − ΔW_i‖ = 0: a dense condition that shares nothing with the iteration."""
    problem = spoilt(crowd(9, own=0.5), c1=-1.0, c4=40.0)
    problem.weights[:] = [1, 1, 2, 1, 3, 1, 1, 0.5, 1]
    found = judge("geometric-median", inner(problem), problem.weights.tolist())
    dense, w = updates(problem), problem.weights
    x = (w * found.trust) @ dense / w.sum()
    pulls = (x - dense) / np.linalg.norm(x - dense, axis=1, keepdims=True)
    assert np.linalg.norm(w @ pulls) < 1e-6 * w.sum()
    mean = w @ dense / w.sum()
    away = (mean - dense) / np.linalg.norm(mean - dense, axis=1, keepdims=True)
    assert np.linalg.norm(w @ away) > 0.1 * w.sum()  # the mean is none
    assert sum(w * found.trust) == pytest.approx(w.sum())
    np.testing.assert_allclose(found.distances, np.linalg.norm(x - dense, axis=1), rtol=1e-5)


def test_where_cosines_cannot_tell_the_gate_says_so_and_takes_the_geometric_median() -> None:
    rng = np.random.default_rng(0)
    shapes = ((40, 2), (2, 30))
    clients = [
        tuple(torch.from_numpy(rng.standard_normal(shape)) for shape in shapes) for _ in range(9)
    ]
    problem = replace(crowd(9), clients=clients)
    found = verdict("gate", problem)
    assert found.applied == "geometric-median"
    assert "below 0.1" in found.reason
    assert found.trust == verdict("geometric-median", problem).trust
    assert found.left_out == ()


@pytest.mark.parametrize("rule", RULES)
def test_two_clients_cannot_judge_each_other(rule: str) -> None:
    for problem in (spoilt(crowd(2), c1=-100.0), crowd(1), spoilt(crowd(4), c0=0.0, c3=0.0)):
        found = verdict(rule, problem)
        assert found.applied == "none"
        assert "fewer than 3" in found.reason
        assert set(found.trust) == set(found.scale) == {1.0}


def test_clients_without_update_or_weight_are_not_asked() -> None:
    crowded = spoilt(crowd(8), c0=0.0, c1=0.0, c2=-7.0)
    crowded.weights[[2, 3]] = 0
    found = verdict("gate", crowded)
    assert found.cosines[:4] == (None,) * 4
    assert found.left_out == ()
    assert found.scale[4:] == (1.0,) * 4


@pytest.mark.parametrize("rule", RULES)
def test_identical_clients_stay_as_they_are(rule: str) -> None:
    problem = crowd(5, own=0.0)
    found = verdict(rule, problem)
    np.testing.assert_allclose(found.trust, 1, rtol=1e-3)
    np.testing.assert_allclose(found.scale, 1)


# --- what reaches the state ------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
@pytest.mark.parametrize("rule", RULES)
def test_the_state_is_that_of_the_judged_clients(rule: str, basis: str) -> None:
    """Weights and scalings of the verdict, given by hand, make the same state."""
    problem = spoilt(crowd(7), c1=-1.0, c4=90.0)
    pairs, scalings = problem.clients, problem.scaling.tolist()
    weights = np.array([1, 2, 1, 1, 1, 3, 1]) / 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", glora.GloraWarning)
        state = glora.aggregate(pairs, weights.tolist(), scalings, rank=6, basis=basis, robust=rule)
        record = state.settings["robust"]
        found = list(zip(weights, scalings, record["clients"], strict=True))
        again = glora.aggregate(
            pairs, [w * c["trust"] for w, _, c in found], [s * c["scale"] for _, s, c in found],
            rank=6, basis=basis,
        )  # fmt: skip
    torch.testing.assert_close(state.weights, again.weights)
    one, two = (s.modules[""] for s in (state, again))
    torch.testing.assert_close(one.update[0] @ one.update[1], two.update[0] @ two.update[1])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["rule"] == rule
    assert record["clip"] == 2
    assert record["left_out"] == (["client 1"] if rule == "gate" else [])


def test_one_verdict_over_all_modules() -> None:
    """A client that is odd in one module of three and loud in none is not left out of that one."""
    torch.manual_seed(0)
    shared = {m: (torch.randn(8, 2), torch.randn(2, 6)) for m in ("a", "b", "c")}
    clients = [
        {m: (b + 0.1 * torch.randn_like(b), a) for m, (b, a) in shared.items()} for _ in range(5)
    ]
    clients[1]["b"] = (-clients[1]["b"][0], clients[1]["b"][1])
    del clients[2]["c"]
    state = glora.aggregate(clients, rank=4, robust="gate")
    record = state.settings["robust"]
    assert record["left_out"] == []
    dense = torch.stack([
        torch.cat([(x[m][0] @ x[m][1]).flatten() if m in x else torch.zeros(48) for m in shared])
        for x in clients
    ]).double()  # fmt: skip
    unit = dense / dense.norm(dim=1, keepdim=True)
    expected = median_cosines(unit @ unit.T, torch.ones(5, dtype=torch.bool))
    found = torch.tensor([c["cosine"] for c in record["clients"]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_no_gauge_and_no_order_moves_the_server_update(rule: str) -> None:
    @settings(max_examples=25)
    @given(problem=crowds(), seed=st.integers(0, 99), condition=st.sampled_from([3.0, 1e2]))
    def check(problem: Problem, seed: int, condition: float) -> None:
        found = []
        for each in (problem, permuted(regauge(problem, seed, condition), seed)):
            if undecided(verdict(rule, each)):
                return
            state = glora.aggregate(
                each.clients, each.weights.tolist(), each.scaling.tolist(), 12, robust=rule
            )  # of full rank: no cut that could fall into a tie
            b, a = state.readout(12)
            found.append(b @ a)
        size = float(np.median(verdict(rule, problem).norms))
        assert (found[0] - found[1]).norm() <= 1e-6 * size

    check()


@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_on_any_number_of_threads(rule: str) -> None:
    torch.manual_seed(0)
    clients = [
        {m: (torch.randn(30, 3), torch.randn(3, 20)) for m in ("a", "b", "c", "d")}
        for _ in range(6)
    ]
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            states.append(glora.aggregate(clients, rank=4, robust=rule, max_bytes=50_000))
    finally:
        torch.set_num_threads(before)
    for state in states[1:]:
        assert state.settings["robust"] == states[0].settings["robust"]
        for name, m in state.modules.items():
            assert torch.equal(m.u, states[0].modules[name].u)


def test_off_by_default_and_nothing_is_recorded() -> None:
    problem = crowd(3)
    assert "robust" not in glora.aggregate(problem.clients, rank=2).settings


@pytest.mark.parametrize("rule", RULES)
def test_signed_weights_are_refused_by_name(rule: str) -> None:
    how = {"basis": "update", "normalise": False, "names": ["ann", "bob", "cyd"]}
    glora.aggregate(crowd(3).clients, [1, -0.5, 1], rank=3, **how)
    with pytest.raises(glora.Refused, match=r"(?s)'bob'.*-0\.5.*robust"):
        glora.aggregate(crowd(3).clients, [1, -0.5, 1], rank=3, robust=rule, **how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"robust": "krum"}, "'krum', expected one of"),
        ({"robust": "clip", "clip": 0}, "clip: got 0"),
        ({"robust": "clip", "clip": float("inf")}, "clip: got inf"),
    ],
)
def test_unfit_arguments_are_refused(how: dict[str, object], said: str) -> None:
    with pytest.raises(glora.GloraError, match=said):
        glora.aggregate(crowd(3).clients, rank=2, **how)


# --- breakdown -------------------------------------------------------------------------------


def test_a_slice_of_the_attack_table(attacks: ModuleType) -> None:
    """At 30 % bad the plain consensus goes where it is pushed; gate and geometric median do not."""
    honest = attacks.population(0)
    for attack in ("sign flip", "−10×", "×100", "injection", "collusion"):
        clients = attacks.attacked(attack, honest, 6, 0)
        found = {
            rule: attacks.error(attacks.ours(rule, clients), honest[:14]) for rule in (None, *RULES)
        }
        assert found[None] > 0.3, attack
        # A loud client that points with the others counts c = 2 times: 0.3 (c − 1).
        assert found["gate"] < (0.32 if attack == "×100" else 0.05), attack
        assert found["geometric-median"] < 0.2, attack
        # Clipping bounds a push and turns nobody round: 0.3 (1 + c).
        assert found["clip"] < 0.95, attack


def test_clip_alone_does_not_stop_a_sign_flip(attacks: ModuleType) -> None:
    """Must fail: what a weaker rule would let pass for the gate's result."""
    honest = attacks.population(0)
    clients = attacks.attacked("sign flip", honest, 6, 0)
    assert attacks.error(attacks.ours("clip", clients), honest[:14]) > 0.5


def test_more_than_half_decide(attacks: ModuleType) -> None:
    """Must fail: no rule knows who is honest."""
    honest = attacks.population(0)
    clients = attacks.attacked("sign flip", honest, 11, 0)
    for rule in ("gate", "geometric-median"):
        assert attacks.error(attacks.ours(rule, clients), honest[:9]) > 1.5


def test_the_table_is_that_of_the_results(attacks: ModuleType) -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert attacks.table() in page
    assert attacks.beyond() in page


def test_stored_results_are_what_the_api_gives(attacks: ModuleType) -> None:
    rows = json.loads(attacks.OUT.read_text(encoding="utf-8"))
    for row in rows:
        if row["seed"] == 0 and row["bad"] == 6 and not row["aggregate"].startswith("PEFT"):
            aggregate = attacks.AGGREGATES[row["aggregate"]]
            honest = attacks.population(0)
            clients = attacks.attacked("collusion", honest, 6, 0)
            found = attacks.error(aggregate(clients, 6), honest[:14])
            assert found == pytest.approx(row["collusion"], rel=1e-2, abs=1e-3), row["aggregate"]


def test_peft_sums_are_the_rows_they_share(attacks: ModuleType) -> None:
    honest = attacks.population(0)[:4]
    for combination, aggregate in (("cat", attacks.mean), ("linear", attacks.factors)):
        torch.testing.assert_close(attacks.peft(combination, honest, 0), aggregate(honest, 0))


def test_the_report_names_who_pulls_against_the_mean() -> None:
    problem = spoilt(crowd(5), c3=-1.0)
    names = ["ann", "bob", "cyd", "dan", "eve"]
    state = glora.aggregate(problem.clients, None, problem.scaling.tolist(), 6, names=names)
    assert "1 of 5 clients (dan) pull against the mean" in state.report()
    assert "against the mean" not in glora.aggregate(crowd(5).clients, rank=6).report()


@pytest.mark.parametrize(("own", "tells"), [(1.0, True), (1.35, True), (2.2, False)])
def test_honest_clients_are_spared_down_to_the_threshold(
    own: float, tells: bool, attacks: ModuleType
) -> None:
    """On 40 × 32 own parts of 1.35 times the shared factors make a median cosine of 0.12."""
    usual, odd, rules = [], 0, set()
    for seed in range(50):
        pairs = attacks.population(seed, own)
        found = judge("gate", inner_products.of_pairs(pairs, [1.0] * 20), [1.0] * 20)
        usual.append(float(np.median(found.cosines)))
        odd += int((np.array(found.cosines) < usual[-1] / 2).sum())
        rules.add(found.applied)
    print(f"\nmedian cosine {np.mean(usual):.3f}: {odd} of 1000 honest clients below half of it")
    if tells:
        assert "gate" in rules
        assert odd <= 5
    else:  # what the threshold keeps the gate from
        assert rules == {"geometric-median"}
        assert odd > 50
