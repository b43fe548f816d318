"""Fixed steps in N-space on tensor cores, emulated: what their rounding and their filters cost.

    python bench/nspace_emulation.py [--only NAME…] [--recipes NAME…]    # a table, no clock, no GPU

The solver is the one that CUDA tensors take, in words whose long products are imitated: 16 columns
exactly, their sum cut to 24 bits, promoted into a second fp32 accumulator every 256 columns. Every
answer is judged by the float64 reference on the same stored factors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor

from glora_ops import algorithm, reference
from glora_ops.solvers import fixed_nspace

Pair = tuple[Tensor, Tensor]
U32 = 2.0**-24
COLUMNS, PROMOTED = 16, 256


# --- tensor cores ----------------------------------------------------------------------------


def cut24(x: Tensor) -> Tensor:
    """float64 cut, not rounded, to 24 significant bits."""
    return (x.view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


def fp32(x: Tensor) -> Tensor:
    return x.float().double()


def summed(x: Tensor, w: Tensor, promoted: bool) -> Tensor:
    """x w of exact products (L, n, c) (L, c, k), sums as a tensor core may take them."""
    total = acc = torch.zeros(*x.shape[:-1], w.shape[-1], dtype=torch.float64)
    for start in range(0, x.shape[-1], COLUMNS):
        here = slice(start, start + COLUMNS)
        acc = cut24(acc + x[..., here] @ w[..., here, :])
        if promoted and (start + COLUMNS) % PROMOTED == 0:
            total, acc = fp32(total + acc), torch.zeros_like(acc)
    return fp32(total + acc)


def thirds(x: Tensor) -> list[Tensor]:
    """x as a sum of three bf16 numbers, the largest first."""
    out, rest = [], x
    for _ in range(3):
        out.append(rest.bfloat16().double())
        rest = rest - out[-1]
    return out


def factored(g: Tensor) -> Tensor:
    """L of g = L Lᵀ (n, n) fp64, pivoted, as `jacobi.cholesky` has it."""
    n, g = len(g), g.clone()
    out, end = torch.zeros_like(g), n * 2.0**-53 * g.diagonal().max()
    for k in range(n):
        i = int(g.diagonal().argmax())
        if not g[i, i] > end:
            break
        out[:, k] = g[i] * g[i, i].rsqrt()
        g -= out[:, k, None] * out[:, k]
        g[i], g[:, i] = 0, 0
    return out


def turned_until_orthogonal(w: Tensor) -> Tensor:
    """One-sided Jacobi on w (n, n) in its own precision, the kernel's ring of pairs."""
    half = (w.shape[1] + 1) // 2
    p, q = w[:, :half], torch.nn.functional.pad(w[:, half:], (0, 2 * half - w.shape[1]))
    for _ in range(40):
        turned = 0
        for _ in range(2 * half - 1):
            pp, qq, pq = (p * p).sum(0), (q * q).sum(0), (p * q).sum(0)
            turns = pq.abs() > 2.0**-19 * pp.sqrt() * qq.sqrt()
            turned += int(turns.sum())
            gap, pq = qq - pp, torch.where(turns, 2 * pq, 0.0)
            far = torch.copysign((gap * gap + pq * pq).sqrt(), gap)
            t = pq / torch.where(turns, gap + far, 1.0)
            c = (1 + t * t).rsqrt()
            p, q = c * p - c * t * q, c * t * p + c * q
            p, q = (
                torch.cat([p[:, :1], q[:, :1], p[:, 1:-1]], 1)[:, :half],
                torch.cat([q[:, 1:], p[:, -1:]], 1),
            )
        if not turned:
            break
    return torch.cat([p, q], 1)


def single_eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs (n, n) by sweeps in fp32, the vectors made orthonormal by Newton and Schulz."""
    n, size = len(g), torch.exp2(torch.frexp(g.diagonal().max()).exponent.double())
    w = turned_until_orthogonal(factored(g / size).float()).double()
    length, order = w.square().sum(0).sort(descending=True, stable=True)
    rank = int((length > 0).sum())
    v = w[:, order[:rank]] / length[:rank].sqrt()
    v = v @ (1.5 * torch.eye(rank, dtype=v.dtype) - 0.5 * v.mT @ v)
    spare = torch.linalg.qr(torch.cat([v, torch.eye(n, dtype=v.dtype)], 1))[0][:, rank:n]
    return length[:n] * size, torch.cat([v, spare], 1)


class TensorCores(CpuVocabulary):
    """The CPU's words with the long products of a tensor core; Gram matrices stay fp64."""

    def __init__(self, promoted: bool = True, rounded: bool = True, single: bool = True) -> None:
        self.promoted, self.rounded, self.single = promoted, rounded, single

    def _split(self, x: Tensor, w: Tensor) -> Tensor:
        """Stored rows x (bf16, or fp32 as three terms) times an fp32 w as three bf16 terms."""
        x, w = x.double(), w.double()
        left = [x] if bool((x.bfloat16().double() == x).all()) else thirds(x)
        right = thirds(w)
        pairs = [(i, j) for i in range(len(left)) for j in range(3) if i + j < 3]
        out = torch.zeros(x.shape[0], x.shape[1], w.shape[2], dtype=torch.float64)
        for i, j in sorted(pairs, key=sum, reverse=True):
            out = fp32(out + summed(left[i], right[j], self.promoted))
        return out

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return self._split(rows, omega.expand(len(rows), -1, -1))

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return self._split(rows.mT, z.float()).float()

    def overlaps(self, q: Tensor, scale: Tensor | None = None) -> Tensor:
        q = q if scale is None else q * scale[..., None]
        gram = self._split(q, q.mT)
        return (gram.tril() + gram.tril(-1).mT).float()

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().product(x, y)
        return summed(x.double(), y.double(), self.promoted).float()

    def eigh(self, g: Tensor, precise: bool = True) -> tuple[Tensor, Tensor]:
        if precise or not self.single:
            return super().eigh(g)
        lam, v = zip(*map(single_eigh, g), strict=True)
        return torch.stack(lam), torch.stack(v)

    def inverse_cholesky(self, g: Tensor, drop: float) -> Tensor:
        """From the other triangle, as the kernel takes it: only where z is rounded are they one."""
        return super().inverse_cholesky(g.mT, drop)

    def metric_product(
        self, gamma: Tensor, z: Tensor, precise: bool = False, unit: bool = False
    ) -> Tensor:
        both = super().metric_product(gamma, z, precise, unit)
        if self.rounded:
            return both
        peak = z.abs().amax(-2, keepdim=True)
        z = z / torch.exp2(torch.frexp(peak).exponent) if unit else z
        return torch.cat([z, both[..., z.shape[-2] :, :]], -2)


# --- populations -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Clients of a kind, in a gauge of a condition, and how much the server keeps."""

    kind: str
    d_out: int = 256
    d_in: int = 200
    clients: int = 24
    ranks: tuple[int, ...] = (8,)
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    condition: float = 10.0
    empty: int = 0
    equal: bool = False

    def __str__(self) -> str:
        r = "/".join(map(str, self.ranks))
        empty = f", {self.empty} empty" if self.empty else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.kind}, {self.d_out} × {self.d_in}, K = {self.clients}{empty}, r = {r}, "
            f"R = {self.rank}, {dtype}, gauge {self.condition:g}"
        )


def basis(rng: np.random.Generator, d: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, r)))[0]


def update_of(case: Case, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """(U_i, σ_i, V_i) of each client."""
    most = max(case.ranks)
    common = basis(rng, case.d_out, most), basis(rng, case.d_in, most)
    # Coordinate axes in turn: exactly orthogonal until they run out, and exactly tied.
    taken = 0
    for i in range(case.clients):
        r = case.ranks[i % len(case.ranks)]
        own = basis(rng, case.d_out, r), basis(rng, case.d_in, r)
        half, sigma = (r + 1) // 2, np.geomspace(1, 0.2, r)
        both = [
            np.linalg.qr(np.hstack([c[:, :half], o[:, half:]]))[0]
            for c, o in zip(common, own, strict=True)
        ]
        turned = common[0][:, :r] @ basis(rng, r, r), common[1][:, :r] @ basis(rng, r, r)
        axes = [np.eye(d)[:, (taken + np.arange(r)) % d] for d in (case.d_out, case.d_in)]
        taken += r
        u, v = {
            "shared": turned, "partly": both, "disjoint": own, "flat": own, "loud": both,
            "graded": both, "deficient": both, "frozen": (own[0], common[1][:, :r]),
            "ties": axes, "copies": (common[0][:, :r], common[1][:, :r]), "cancelling": own,
        }[case.kind]  # fmt: skip
        if case.kind in ("flat", "ties"):
            sigma = np.ones(r)
        elif case.kind == "graded":
            sigma = np.geomspace(1, 1e-7, r)
        elif case.kind == "deficient":
            sigma = np.where(np.arange(r) < half, sigma, 0.0)
        elif case.kind == "loud" and i == 0:
            sigma = 100 * sigma
        yield u, sigma, v


def build(case: Case, seed: int) -> tuple[list[Pair], np.ndarray]:
    """Stored factors and weights; empty clients have no row at all."""
    rng = np.random.default_rng(seed)
    stored: list[Pair] = []
    for i, (u, sigma, v) in enumerate(update_of(case, rng)):
        r = len(sigma)
        if case.kind == "cancelling" and i % 2:
            b, a = stored[-1]
            stored.append((-b, a))
            continue
        if case.kind == "ties":
            b, a = u, v.T
        else:
            stretch = np.geomspace(case.condition**-0.5, case.condition**0.5, r)
            left, right = basis(rng, r, r) * stretch, basis(rng, r, r)
            b, a = (
                u * np.sqrt(sigma) @ left @ right,
                right.T @ np.linalg.inv(left) @ (np.sqrt(sigma)[:, None] * v.T),
            )
        stored.append(
            tuple(torch.from_numpy(np.ascontiguousarray(x)).to(case.dtype).double() for x in (b, a))
        )
    for i in range(case.empty):
        nothing = torch.zeros(case.d_out, 0).double(), torch.zeros(0, case.d_in).double()
        stored.insert(2 * i, nothing)
    count = len(stored)
    even = case.equal or case.kind in ("ties", "cancelling")
    return stored, np.full(count, 1 / count) if even else rng.dirichlet(np.full(count, 2.0))


def stacks(case: Case, clients: list[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Row stacks and offsets, stored as the case says."""
    b, a = torch.cat([b.mT for b, _ in clients]), torch.cat([a for _, a in clients])
    ranks = torch.tensor([0, *(len(a) for _, a in clients)])
    return b.to(case.dtype), a.to(case.dtype), ranks.cumsum(0)


BF16, FP32 = torch.bfloat16, torch.float32
KINDS = (
    "shared",
    "partly",
    "disjoint",
    "frozen",
    "flat",
    "loud",
    "deficient",
    "graded",
    "cancelling",
)
CASES: dict[str, list[Case]] = {
    "kinds": [Case(kind) for kind in KINDS],
    "gauges": [
        Case(kind, dtype=dtype, condition=condition)
        for kind in ("partly", "frozen", "loud", "deficient")
        for dtype, condition in ((BF16, 100.0), (FP32, 10.0), (FP32, 1000.0))
    ],
    "ties": [
        Case("ties", clients=16), Case("ties", clients=40), Case("copies", equal=True),
        Case("copies", equal=True, rank=5), Case("frozen", equal=True, dtype=FP32, condition=1.0),
    ],
    "ranks": [
        *(Case(kind, rank=1) for kind in ("partly", "disjoint", "loud")),
        *(Case(kind, rank=R) for kind in ("partly", "graded") for R in (7, 8, 9)),
        *(Case(kind, d_out=96, d_in=64, clients=16, rank=R) for kind in ("partly", "disjoint")
          for R in (64, 80, 100)),
        Case("disjoint", clients=2, rank=16), Case("partly", clients=1, rank=4),
    ],
    "ragged": [
        *(Case(kind, clients=10, ranks=(4, 8, 16, 32, 64), rank=32)
          for kind in ("shared", "partly", "disjoint", "graded")),
        Case("partly", empty=4), Case("loud", empty=8),
        Case("partly", clients=3, empty=20, rank=30),
    ],
    "graded": [
        *(Case("graded", dtype=dtype, condition=condition)
          for dtype, condition in ((BF16, 100.0), (FP32, 10.0), (FP32, 1000.0))),
        Case("graded", ranks=(16,), clients=12, rank=32), Case("graded", ranks=(4,), clients=40),
    ],
    "long": [
        Case(kind, d_out=1152, d_in=1088, clients=64, ranks=(16,), rank=64)
        for kind in ("partly", "disjoint", "frozen")
    ],
}  # fmt: skip


def constant(name: str, value: float) -> AbstractContextManager[object]:
    """The solver with another constant."""
    return patch.object(fixed_nspace, name, value)


@dataclass(frozen=True)
class Recipe:
    """What is taken out of the solver or put in: its words, a change while it runs, q."""

    words: CpuVocabulary = field(default_factory=TensorCores)
    change: Callable[[], AbstractContextManager[object]] = nullcontext
    steps: int = 1


# The recipe, and what becomes of it without one of its parts or with more of another.
RECIPES = {
    "recipe": Recipe(),
    "q = 2": Recipe(steps=2),
    "not rounded first": Recipe(TensorCores(rounded=False)),
    "not promoted": Recipe(TensorCores(promoted=False)),
    "eigh in fp64": Recipe(TensorCores(single=False)),
    "drop 1e-6": Recipe(change=lambda: constant("DEPENDENT", 1e-6)),
    "drop 1e-4": Recipe(change=lambda: constant("DEPENDENT", 1e-4)),
    "b ≥ 3e-3 θ₁": Recipe(change=lambda: constant("LOWEST", 3e-3)),
    "b ≥ 0.1 θ₁": Recipe(change=lambda: constant("LOWEST", 0.1)),
    "degree 5": Recipe(change=lambda: constant("ANCHOR_DEGREE", 5)),
    "degree 6": Recipe(change=lambda: constant("ANCHOR_DEGREE", 6)),
    "one step": Recipe(change=lambda: constant("LEAST", 1), steps=0),
    "no place left": Recipe(
        change=lambda: patch.object(
            fixed_nspace,
            "_placed",
            lambda known, vote, spare: torch.cat(
                [known * (vote[..., None, :] > 0), spare[..., known.shape[-1] :]], -1
            ),
        )
    ),
    "iterated when whole": Recipe(
        change=lambda: patch.object(algorithm, "fixed_in_nspace", lambda *_: True)
    ),
}


class Judged(NamedTuple):
    """An emulated answer beside the reference's."""

    over_bound: float  # ‖Ŵ − Ŵ_ref‖ over the bound (a) of the contract
    captured: float  # the reference's minus this one's; the contract's 1e-3
    excess: float  # error beyond 1.01 × the reference's, over ‖W̄‖; the contract's 1e-3
    flagged: bool


def judge(case: Case, seed: int, recipes: dict[str, Recipe]) -> dict[str, Judged]:
    stored, weights = build(case, seed)
    unit = torch.finfo(case.dtype).eps / 2
    ones = np.ones(len(stored))
    want = reference.aggregate(
        [(b.numpy(), a.numpy()) for b, a in stored], weights, ones, case.rank, unit_roundoff=unit
    )
    size = reference.storage_scale([(b.numpy(), a.numpy()) for b, a in stored], weights, ones)
    bound = 32 * U32 * size * (1 + want.kappa_p + min(want.kappa_w, 1e30))
    norm, best = np.linalg.norm(want.w_bar), np.linalg.norm(want.w_hat - want.w_bar)
    given = torch.from_numpy(weights), torch.from_numpy(ones)
    out = {}
    for name, recipe in recipes.items():
        with torch.no_grad(), recipe.change():
            u, s, v, *_ = Ops(recipe.words, fixed_steps=True).aggregate(
                *stacks(case, stored), *given, case.rank, power_iters=recipe.steps
            )
        got = ((u.double() * s) @ v.double().mT).numpy()
        error = np.linalg.norm(got - want.w_bar)
        out[name] = Judged(
            float(np.linalg.norm(got - want.w_hat) / bound),
            float((error**2 - best**2) / norm**2) if norm > 8 * U32 * size else 0.0,
            float((error - 1.01 * best) / norm) if norm > 8 * U32 * size else 0.0,
            want.flagged,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["recipe"])
    given = parser.parse_args()
    recipes = {name: RECIPES[name] for name in given.recipes}
    print("| clients | recipe | over (a) | captured short | error beyond 1 % | flagged |")
    print("| :-- | :-- | --: | --: | --: | --: |")
    for case in (case for name in given.only for case in CASES[name]):
        found = [judge(case, seed, recipes) for seed in range(given.seeds)]
        for name in recipes:
            rows = [f[name] for f in found]
            worst = [max(r[i] for r in rows) for i in range(3)]
            flags = sum(r.flagged for r in rows)
            print(
                f"| {case} | {name} | {worst[0]:.2g} | {worst[1]:.1e} | {worst[2]:.1e} "
                f"| {flags} of {len(rows)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
