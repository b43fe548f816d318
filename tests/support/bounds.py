"""Theory to tolerance: the accuracy contract as functions, and the wrong answers it must reject.

All errors are Frobenius norms of differences of d_out × d_in updates. The unit of every statement
is S = Σ |w_i||s_i|‖B_i‖_F‖A_i‖_F of the stored factors after balancing: rounding the factors, or
the products of them, to a relative precision u moves the mean update by a small multiple of u·S.

A tolerance says nothing until something fails it. :func:`assert_within` therefore first checks that
the bound rejects answers known to be wrong, and only then that the answer in hand passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

U32 = 2.0**-24

Array = np.ndarray
Client = tuple[Array, Array]


# ---- (a), (b), (c): arithmetic -------------------------------------------------------------------


def storage_scale(clients: Sequence[Client], weights: Array, scaling: Array) -> float:
    """S, every pair (b_j, a_j) balanced exactly: ‖B_i‖_F‖A_i‖_F = Σ_j ‖b_j‖‖a_j‖ then."""
    total = 0.0
    for (b, a), w, s in zip(clients, weights, scaling, strict=True):
        norm_b = np.linalg.norm(np.asarray(b, np.float64), axis=0)
        norm_a = np.linalg.norm(np.asarray(a, np.float64), axis=1)
        total += abs(w * s) * (norm_b * norm_a).sum()
    return float(total)


def exact_bound(size: float) -> float:
    """(a), R large enough for Ŵ = W̄: ‖Ŵ − W̄‖ ≤ 32·u32·S, for every stored dtype."""
    return 32 * U32 * size


def cut_bound(size: float, kappa_p: float, kappa_w: float) -> float:
    """(a), R cuts something: 32·u32·S·(1 + κ_P + κ_W) against the reference on the same factors."""
    return exact_bound(size) * (1 + kappa_p + kappa_w)


def stored_bound(bound: float, reference_change: float) -> float:
    """(c), two stored sets that differ by a rounded gauge: (a) + 3 × the reference's own change."""
    return bound + 3 * reference_change


# ---- solver and quality --------------------------------------------------------------------------


def solver_captured(exact_captured: float) -> float:
    """A randomized solver captures at least this, the exact route ``exact_captured``."""
    return exact_captured - 1e-3


def solver_bound(exact_error: float, norm: float) -> float:
    """… and its update errs by at most 1.01 × the exact route's error + 1e-3·‖W̄‖."""
    return 1.01 * exact_error + 1e-3 * norm


def quality_bound(optimum_error: float, norm: float) -> float:
    """``consensus``, R = 2r, rank-r readout: shared, noisy, partly shared, disjoint clients."""
    return 1.10 * optimum_error + 0.03 * norm


def frozen_bound(norm: float) -> float:
    """``consensus``, R = 2r, rank-r readout on frozen A, where the optimum's error is zero."""
    return 0.12 * norm


def update_bound(optimum_error: float, norm: float) -> float:
    """``update``: the Frobenius optimum, but for rounding."""
    return 1.001 * optimum_error + 1e-6 * norm


def loud_bound(projector_error: float) -> float:
    """``consensus`` at R = r, error to the honest mean under one client 100 × louder than 15."""
    return 1.5 * projector_error


# ---- what a tolerance must reject ----------------------------------------------------------------


class Wrong(NamedTuple):
    """An answer that is wrong, unless it lies within ``same`` of the truth by coincidence."""

    name: str
    value: Array
    same: float


class Verdict(NamedTuple):
    """What :func:`assert_within` found: error/bound of the answer, and which wrong ones counted."""

    ratio: float
    rejected: tuple[str, ...]
    skipped: tuple[str, ...]


def factor_mean(clients: Sequence[Client], weights: Array, scaling: Array) -> Array:
    """What averaging the factors gives: Σw · (Σ p_i √|s_i| B_i)(Σ p_i √|s_i| sgn(s_i) A_i).

    Smaller ranks are padded with zeros, which is the usual (and wrong) practice.
    """
    r = max(b.shape[1] for b, _ in clients)
    p = np.asarray(weights, np.float64) / np.sum(weights)
    mean_b = np.zeros((clients[0][0].shape[0], r))
    mean_a = np.zeros((r, clients[0][1].shape[1]))
    for (b, a), p_i, s_i in zip(clients, p, scaling, strict=True):
        mean_b[:, : b.shape[1]] += p_i * np.sqrt(abs(s_i)) * b
        mean_a[: a.shape[0]] += p_i * np.sqrt(abs(s_i)) * np.sign(s_i) * a
    return np.sum(weights) * (mean_b @ mean_a)


def wrong_answers(
    clients: Sequence[Client], weights: Array, scaling: Array, rank: int, truth: Array
) -> list[Wrong]:
    """Zero, the factor mean, and the truth short of its last direction.

    Each may coincide with the truth, and is then no wrong answer:

    - zero, where the clients cancel to rounding: ‖truth‖ ≤ 32·u32·S;
    - the factor mean, where there is one client or all send the same A (or the same B) at the same
      scaling: a distance ≤ 32·u32·S. Frozen A makes factor averaging *right*;
    - the truth of rank R cut to its best R − 1. Where R exceeds the rank that 32·u32·S can see, the
      last direction seen is dropped instead. In cut mode σ_R may still hide below κ times that,
      and a bound that wide cannot tell: such draws are skipped, not passed, and are to be counted.

    The first two are exempt only at the precision of the *exact* bound: a bound that κ has blown up
    until zero passes says nothing, and :func:`assert_within` fails rather than accept it.
    """
    same = exact_bound(storage_scale(clients, weights, scaling))
    x, sigma, yt = np.linalg.svd(truth, full_matrices=False)
    keep = max(min(rank, int((sigma > same).sum())) - 1, 0)
    short = (x[:, :keep] * sigma[:keep]) @ yt[:keep]
    return [
        Wrong("zero", np.zeros_like(truth), same),
        Wrong("factor mean", factor_mean(clients, weights, scaling), same),
        Wrong("best rank R-1", short, np.inf),
    ]


def assert_within(
    actual: Array, truth: Array, bound: float, wrong: Sequence[Wrong], what: str = "update"
) -> Verdict:
    """‖actual − truth‖_F ≤ bound, by a bound that every wrong answer misses.

    Returns which wrong answers were rejected and which were skipped because they coincide with the
    truth: a test over many draws asserts that enough of each were rejected.
    """
    rejected, skipped = [], []
    for name, value, same in wrong:
        distance = float(np.linalg.norm(value - truth))
        if distance > bound:
            rejected.append(name)
        elif distance <= same:
            skipped.append(name)
        else:
            raise AssertionError(
                f"{what}: the bound {bound:.3e} is vacuous: the wrong answer {name!r} passes it, "
                f"at {distance:.3e} from the truth (distance/bound = {distance / bound:.3g})"
            )
    error = float(np.linalg.norm(actual - truth))
    ratio = error / bound if bound > 0 else (0.0 if error == 0 else np.inf)
    if not error <= bound:  # a NaN fails too
        raise AssertionError(
            f"{what}: error {error:.3e} exceeds the bound {bound:.3e} (error/bound = {ratio:.3g}, "
            f"error/‖truth‖ = {error / max(float(np.linalg.norm(truth)), 1e-300):.3g})"
        )
    return Verdict(ratio, tuple(rejected), tuple(skipped))
