"""The tests of experiments/statistics_of_runs.py against published and independent values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fl_runs import config
from scipy import stats

from glora_ops.fl.tasks.digits import Digits

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from orientations import SEEN, UNSEEN, Orientations
from protocol import FIRST, Ledger, end_point, rate_at, wanted
from protocol_tables import cell_table
from statistics_of_runs import bootstrap_accuracy, holm, mcnemar, sign_permutation


def test_fishers_sign_permutation_of_darwins_maize() -> None:
    """Fisher (1935), The Design of Experiments, §21: 1,726 of 32,768 patterns, in eighths of an
    inch."""
    maize = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_permutation(maize) == 1726 / 32768


def test_sign_permutation_against_scipy_and_its_least_value() -> None:
    rng = np.random.default_rng(1)
    for n in (5, 10, 18):
        x = rng.normal(0.3, 1, n)
        found = stats.permutation_test(
            (x,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        # Exact but for n = 18, where 100,000 patterns have a standard error of at most 0.0016.
        assert sign_permutation(list(x)) == pytest.approx(found.pvalue, abs=0.005)
    assert sign_permutation([1.0] * 10) == 2 / 1024
    assert sign_permutation([0.1, -0.1, 0.2, -0.2]) == 1.0
    assert sign_permutation([0.0, 0.0]) == 1.0


def test_holm_by_hand() -> None:
    """Four of them: 4·0.005, 3·0.01, 2·0.03 and the one before, which must not be passed."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0})
    rng = np.random.default_rng(0)
    wrong = sum(min(holm(dict(enumerate(rng.random(5)))).values()) < 0.05 for _ in range(2000))
    assert wrong / 2000 < 0.065  # familywise: 0.05 and three standard errors of 2,000 draws


def test_bounds_are_shown_and_change_no_arms_p_value() -> None:
    def runs(*scores: float) -> dict[int, dict[str, Any]]:
        return {seed: {"end_point": x, "own": [x], "lr": 0.1, "knobs": {}, "bytes": 1,
                       "predictions": "0", "labels": "0"}
                for seed, x in enumerate(scores)}  # fmt: skip

    arms = {"restart": runs(0.9, 0.8, 0.7, 0.9), "fedit": runs(0.5, 0.6, 0.6, 0.4),
            "flora": runs(0.9, 0.7, 0.8, 0.85)}  # fmt: skip
    alone = cell_table(arms, "restart").splitlines()
    among = cell_table(arms | {"central": runs(0.99, 0.98, 0.95, 0.97)}, "restart").splitlines()
    (bound,) = set(among) - set(alone)
    assert set(alone) < set(among)
    assert bound.startswith("| central *(bound)* |")
    assert "| – | – | 0 : 0 |" in bound


def test_mcnemar_by_the_binomial_tail() -> None:
    one = [True] * 10 + [False] * 2 + [True] * 50
    other = [False] * 10 + [True] * 2 + [True] * 50
    only, rest, p = mcnemar(one, other)
    assert (only, rest) == (10, 2)
    assert p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar([True], [True]) == (0, 0, 1.0)


def test_bootstrap_of_an_accuracy_is_the_binomials() -> None:
    # A quantile falls on a digit of 300 (0.0033), and the binomial is off the normal by another.
    low, high = bootstrap_accuracy([True] * 210 + [False] * 90)
    assert low == pytest.approx(0.7 - 1.96 * (0.21 / 300) ** 0.5, abs=0.006)
    assert high == pytest.approx(0.7 + 1.96 * (0.21 / 300) ** 0.5, abs=0.006)


@pytest.mark.parametrize("best", [-4, 0, 3])
def test_a_sweep_ends_with_its_best_inside_and_two_falls_above(best: int) -> None:
    tried: dict[int, float] = {}
    for k in wanted(tried):
        tried[k] = -abs(k - best)
    assert max(tried, key=lambda k: tried[k]) == best
    assert set(tried) >= {best - 1, best, best + 1, best + 2}
    assert len(tried) <= 5 + abs(best)
    assert rate_at(0) == FIRST
    assert rate_at(2) == pytest.approx(2 * FIRST)


def test_two_rates_that_are_level_are_both_inside() -> None:
    level = {-1: 0.7901861252115059, 0: 0.7901861252115060}
    tried: dict[int, float] = {}
    for k in wanted(tried):
        tried[k] = level.get(k, 0.5)
    assert set(tried) == {-2, -1, 0, 1, 2}


def test_the_ledger_repeats_nothing_and_takes_up_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    run = {"cell": "x", "arm": "a", "seed": 0, "lr": 0.1, "knobs": {"b": 1, "a": 2},
           "held_out": "test", "seconds": 3.0}  # fmt: skip
    Ledger(path).add(run)
    with path.open("a") as file:
        file.write('{"cell": "x", "arm": "a", "se')
    again = Ledger(path)
    assert Ledger.key(run | {"knobs": {"a": 2, "b": 1}}) in again.done
    assert len(again.done) == 1
    again.add(run | {"seed": 1})
    assert len(Ledger(path).done) == 2


def test_the_end_point_is_the_last_round_or_the_second_half() -> None:
    scores = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # round 0 to 8
    assert end_point("full", scores) == 0.8
    assert end_point("sparse", scores) == pytest.approx(np.mean([0.5, 0.6, 0.7, 0.8]))


def test_judged_orientations_are_none_of_a_clients() -> None:
    task = Orientations(config({"it": {"kind": "fedit"}}), 0, None)
    assert not set(SEEN) & set(UNSEEN)
    plain = Digits(0)
    for k, (lean, inverted) in enumerate(SEEN):
        own = plain.train[np.flatnonzero(task.labels == k)].leaning(lean).x
        torch.testing.assert_close(
            task.train.x[task.labels == k], 1 - own if inverted else own, rtol=0, atol=1e-6
        )
    metrics, answers = task.evaluate(task.model())
    new = [a for a in answers if a.label is None]
    assert len(new) == len(plain.held_out) == len(answers) / 2
    assert metrics["accuracy"] == pytest.approx(np.mean([a.score for a in new]))
    straight = [i for i in range(len(new)) if UNSEEN[i % len(UNSEEN)] == (0, False)]
    torch.testing.assert_close(task.unseen.x[straight], plain.held_out.x[straight])
