"""Each op alone, against plain torch and against its counted floor; see bench/README.md.

The plain-torch arms may hold what glora never forms: orthonormal bases of all clients, made
before the clock starts. Values are compared with float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from measure import Arm, Floor
from peers import OVERSAMPLE, Lapack, by_lapack, omega
from populations import Case, Population, population
from torch import Tensor

CASES = [
    Case(1024, 1024, clients=8, ranks=(8,), rank=16),
    Case(4096, 4096, clients=32, ranks=(16,), rank=32),
]
ops = torch.ops.glora
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass(frozen=True)
class Prepared:
    """Inputs of the single ops, and the formed bases their plain-torch arms start from.

    Attributes
    ----------
    t : Tensor (N, r) fp64
    votes : Tensor (N,) fp64
        w_i f_ij.
    bases : Tensor (N, d_out)
        Rows √(w_i f_ij) q_ij, formed from t: what the ops avoid.
    u, s, v : Tensor
        A server state.
    """

    p: Population
    t: Tensor
    votes: Tensor
    bases: Tensor
    u: Tensor
    s: Tensor
    v: Tensor


@lru_cache(maxsize=2)
def prepared(case: Case) -> Prepared:
    p = population(case)
    offsets = p.packed.offsets
    t, _, _, f = ops.canonicalize(p.b, p.a, offsets, p.scaling)
    votes = p.weights.repeat_interleave(offsets.diff()) * f
    bases = torch.cat([t[lo:hi, : hi - lo].mT @ p.b[lo:hi].double() for lo, hi in spans(p)])
    bases = (votes.sqrt()[:, None] * bases).to(p.b.dtype)
    u, s, v, *_ = ops.aggregate(p.b, p.a, offsets, p.weights, p.scaling, case.rank)
    return Prepared(p, t, votes, bases, u, s, v)


def spans(p: Population) -> list[tuple[int, int]]:
    marks = p.packed.offsets.tolist()
    return list(pairwise(marks))


def as_is(name: str, call: Callable[[], Any], answer: str, start: str) -> Arm:
    return Arm.fastest(name, {"as it is": call}, answer, start)


def close_to(
    truth: Tensor, bound: float, pick: Callable[[Any], Tensor] = lambda x: x
) -> Callable[[str, Any], dict[str, float]]:
    """Relative Frobenius error to the float64 truth, asserted for every arm."""

    def judge(name: str, answer: Any) -> dict[str, float]:
        error = float((pick(answer).double() - truth).norm() / truth.norm())
        assert error <= bound, f"{name}: relative error {error:.1e} above {bound:.1e}"
        return {"relative_error": error}

    return judge


@each_case
def test_canonicalize(case: Case, race: Any) -> None:
    """Peer: thin QR of both factors and a small SVD, client by client (singular values agree)."""
    p = population(case)

    def loop(b: list[Tensor], a: list[Tensor], lapack: Lapack) -> list[Tensor]:
        out = []
        for x, y, s in zip(b, a, p.scaling.tolist(), strict=True):
            (q, r), (z, l) = lapack.qr(x), lapack.qr(y.mT)
            left, sigma, right = lapack.svd(s * (r @ l.mT))
            out += [q @ left, sigma, z @ right.mT]
        return out

    wide = loop([x.double() for x in p.lora_b], [x.double() for x in p.lora_a], Lapack(1))
    calls = by_lapack(lambda lapack: loop(p.lora_b, p.lora_a, lapack))
    squares = sum(case.rank_of(i) ** 2 for i in range(case.clients))
    d = case.d_out + case.d_in
    race(
        case,
        lambda: ops.canonicalize(p.b, p.a, p.packed.offsets, p.scaling),
        [Arm.fastest("loop_qr", calls, "Q, Σ, Z, formed", "lists")],
        Floor(case.rows * d * 4 + 2 * squares * 8, 2 * squares * d),
        close_to(
            torch.cat(wide[1::3]),
            1e-5,
            lambda x: x[2] if isinstance(x, tuple) else torch.cat(x[1::3]),
        ),
        op="canonicalize",
    )


@each_case
def test_projector_matmul(case: Case, race: Any) -> None:
    """Peer: two products with the formed, weighted bases."""
    x = prepared(case)
    k = case.rank + OVERSAMPLE
    om = omega(case.d_out, k)
    bases = x.bases.double()
    race(
        case,
        lambda: ops.projector_matmul(x.p.b, x.p.packed.offsets, x.t, x.votes, om),
        [as_is("formed", lambda: x.bases.mT @ (x.bases @ om), "the same", "formed bases")],
        Floor((case.rows + 2 * k) * case.d_out * 4, 4 * case.rows * case.d_out * k),
        close_to(bases.mT @ (bases @ om.double()), 1e-5),
        op="projector_matmul",
    )


@each_case
def test_projector_matmul_factors(case: Case, race: Any) -> None:
    """Peer: linalg.qr of every client's factor, two products each."""
    p = population(case)
    k = case.rank + OVERSAMPLE
    om = omega(case.d_out, k)
    weights = p.weights.tolist()

    def loop(factors: list[Tensor], z: Tensor, lapack: Lapack) -> Tensor:
        y = torch.zeros_like(z)
        for w, x in zip(weights, factors, strict=True):
            q = lapack.orthonormal(x)
            y.addmm_(q, q.mT @ z, alpha=w)
        return y

    squares = sum(case.rank_of(i) ** 2 for i in range(case.clients))
    calls = by_lapack(lambda lapack: loop(p.lora_b, om, lapack))
    race(
        case,
        lambda: ops.projector_matmul.factors(p.b, p.packed.offsets, p.weights, om),
        [Arm.fastest("loop_qr", calls, "the same", "lists")],
        Floor(
            (case.rows + 2 * k) * case.d_out * 4,
            4 * case.rows * case.d_out * k + 2 * squares * case.d_out,
        ),
        close_to(loop([x.double() for x in p.lora_b], om.double(), Lapack(1)), 1e-5),
        op="projector_matmul.factors",
    )


@each_case
def test_projector_svd(case: Case, race: Any) -> None:
    """Peer: randomized SVD of the formed, weighted bases with as many power steps."""
    x = prepared(case)
    steps, k, rank = 2, case.rank + OVERSAMPLE, case.rank
    om = omega(case.d_out, k)
    gram = x.bases.double() @ x.bases.double().mT
    best = torch.linalg.eigvalsh(gram).flip(0)[:rank].sum()

    def formed(lapack: Lapack) -> Tensor:
        m = x.bases
        y = m.mT @ (m @ om)
        for _ in range(steps):
            y = m.mT @ (m @ lapack.orthonormal(y))
        return lapack.svd(y)[0][:, :rank]

    def judge(name: str, answer: Any) -> dict[str, float]:
        basis = (answer[0] if name == "glora" else answer).double()
        held = float((x.bases.double() @ basis).square().sum() / best)
        assert held >= 0.98, f"{name}: {held:.4f} of the trace that rank {rank} can hold"
        return {"trace_of_optimum": held}

    calls = by_lapack(formed)
    randomized = (6 + 4 * steps) * case.rows * case.d_out * k
    exact = 2 * case.rows * (case.rows + rank) * case.d_out
    race(
        case,
        lambda: ops.projector_svd(x.p.b, x.p.packed.offsets, x.t, x.votes, rank, power_iters=steps),
        [Arm.fastest("formed", calls, "the basis alone", "formed bases")],
        Floor((case.rows + rank) * case.d_out * 4, min(randomized, exact)),
        judge,
        op="projector_svd",
        steps=steps,
    )


@each_case
def test_core(case: Case, race: Any) -> None:
    """Peer: the same three products, all in fp32."""
    x = prepared(case)
    p = x.p

    def plain(u: Tensor, v: Tensor, b: Tensor, a: Tensor, coef: Tensor) -> Tensor:
        return (b @ u).mT @ (coef * (a @ v))

    coef = (p.weights * p.scaling).repeat_interleave(p.packed.offsets.diff())[:, None]
    truth = plain(*(t.double() for t in (x.u, x.v, p.b, p.a)), coef)
    d = case.d_out + case.d_in
    race(
        case,
        lambda: ops.core(x.u, x.v, p.b, p.a, p.packed.offsets, p.weights, p.scaling),
        [as_is("plain", lambda: plain(x.u, x.v, p.b, p.a, p.coef), "the same", "row stacks")],
        Floor((case.rows + case.rank) * d * 4, 2 * case.rows * case.rank * d),
        close_to(truth, 1e-5),
        op="core",
    )


@each_case
def test_readout(case: Case, race: Any) -> None:
    """Peer: the slices themselves."""
    x = prepared(case)
    r = case.rank // 2

    def plain() -> tuple[Tensor, Tensor]:
        root = x.s[:r].sqrt().to(x.u.dtype)
        return x.u[:, :r] * root, (x.v[:, :r] * root).mT.contiguous()

    truth = (x.u[:, :r].double() * x.s[:r].double()) @ x.v[:, :r].double().mT
    race(
        case,
        lambda: ops.readout(x.u, x.s, x.v, r),
        [as_is("plain", plain, "the same", "the state")],
        Floor(2 * r * (case.d_out + case.d_in) * 4, 0),
        close_to(truth, 1e-5, lambda pair: pair[0].double() @ pair[1].double()),
        op="readout",
    )
