"""Fixed steps in N-space on tensor cores, emulated: what their rounding and their filters cost.

    python bench/nspace_emulation.py [--only NAME…] [--recipes NAME…]    # a table, no clock, no GPU

Nothing of this is built into glora; docs/solvers.md says what was found. The mean's bases are
sought in coordinates of the clients' orthonormal bases, with both N × N overlap matrices Γ held as
fp16 pairs: subspace iteration with a Chebyshev filter, a number of steps told beforehand, one
small eigenproblem for the anchor and one a side. Tensor cores are imitated: products of 16 columns
exactly, their sum cut to 24 bits, promoted into a second fp32 accumulator every 256 columns.
Every answer is judged by the float64 reference on the same stored factors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from torch import Tensor

from glora_ops import reference
from glora_ops.linalg.client_forms import Clients, canonicalize
from glora_ops.linalg.orthonormal import DEPENDENT, inverse_cholesky
from glora_ops.linalg.ragged import Ragged
from glora_ops.linalg.random_signs import start_matrix

Pair = tuple[Tensor, Tensor]
U32 = 2.0**-24
COLUMNS, PROMOTED = 16, 256
OVERSAMPLE = 16


# --- tensor cores ----------------------------------------------------------------------------


def cut24(x: Tensor) -> Tensor:
    """float64 cut, not rounded, to 24 significant bits."""
    return (x.view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


def fp32(x: Tensor) -> Tensor:
    return x.float().double()


def summed(x: Tensor, w: Tensor, promoted: bool = True) -> Tensor:
    """x w of exact products, sums as a tensor core may take them."""
    total = acc = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[1], COLUMNS):
        here = slice(start, start + COLUMNS)
        acc = cut24(acc + x[:, here] @ w[here])
        if promoted and (start + COLUMNS) % PROMOTED == 0:
            total, acc = fp32(total + acc), torch.zeros_like(acc)
    return fp32(total + acc)


def terms(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """x as a sum of so many numbers of a short format, the largest first; lower ones scaled."""
    bits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    out, rest = [], x
    for i in range(count):
        scale = 2.0 ** (i * bits)
        out.append((rest * scale).to(dtype).double() / scale)
        rest = rest - out[-1]
    return out


def split_product(x: Tensor, w: Tensor, promoted: bool) -> Tensor:
    """Stored rows x (bf16, or fp32 as three terms) times an fp32 w as three bf16 terms."""
    exact = bool((x.bfloat16().double() == x).all())
    left = [x] if exact else terms(x, torch.bfloat16, 3)
    right = terms(w, torch.bfloat16, 3)
    pairs = [(i, j) for i in range(len(left)) for j in range(3) if i + j < 3]
    out = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
    for i, j in sorted(pairs, key=sum, reverse=True):
        out = fp32(out + summed(left[i], right[j], promoted))
    return out


def scales(z: Tensor) -> Tensor:
    """(k,): the power of two above each column's largest entry."""
    peak = z.abs().amax(0)
    return torch.exp2(torch.frexp(torch.where(peak > 0, peak, 1.0)).exponent.double())


class Metric:
    """Γ (N, N) as fp16 hi + lo; products of hi alone, or of all pairs but lo · lo."""

    def __init__(self, gamma: Tensor) -> None:
        self.hi, self.lo = terms(gamma, torch.float16, 2)

    def rounded(self, z: Tensor, precise: bool) -> Tensor:
        """z as it enters a product: 11 or 22 bits of each column's largest entry."""
        scale = scales(z)
        return sum(terms(z / scale, torch.float16, 2 if precise else 1)) * scale

    def times(self, z: Tensor, precise: bool = False) -> Tensor:
        scale = scales(z)
        hi, lo = terms(z / scale, torch.float16, 2)
        out = summed(self.hi, hi)
        if precise:
            out = fp32(summed(self.hi, lo) + summed(self.lo, hi) + out)
        return fp32(out * scale)


# --- the iteration ---------------------------------------------------------------------------


class Block(NamedTuple):
    """Coordinates z (N, k), orthonormal in a metric, their images Γ z, and the pivots of both."""

    z: Tensor
    image: Tensor
    pivots: Tensor


@dataclass
class Recipe:
    """What the iteration is told beforehand.

    Attributes
    ----------
    steps, degree, mean_steps : int
        Plain steps of the anchor, its filter's degree, and plain steps of a mean, whose is 2.
    floor : float
        b is at least this fraction of θ₁.
    drop : float
        What is left of a column's squared length below which it depends on earlier ones.
    whole : bool
        A block that spans all there is takes neither step nor filter.
    rounded : bool
        Orthonormalise what entered the product, not what it was rounded from.
    precise_filter : bool
        Products of two terms in filters too.
    promoted : bool
        Accumulators moved into a second one every 256 columns.
    """

    steps: int = 2
    degree: int = 3
    mean_steps: int = 1
    floor: float = 1e-6
    drop: float = DEPENDENT
    rounded: bool = True
    whole: bool = True
    precise_filter: bool = False
    promoted: bool = True


def orthonormal(metric: Metric, z: Tensor, r: Recipe, precise: bool = False) -> Block:
    """Gram–Schmidt in the metric, by columns; twice where it is precise. Zero columns stay zero.

    z is rounded as the product rounds it *before* its Gram matrix is made: then zᵀ Γ z is that of
    one block in one metric, and a small remainder is not lost in the rounding of the large.
    """
    z = metric.rounded(z, precise) if r.rounded else z
    image = metric.times(z, precise)
    pivots = None
    for _ in range(2 if precise else 1):
        length = (z * image).sum(0).clamp(min=0).sqrt()
        unit = torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0)
        gram = unit[:, None] * (z.T @ image) * unit
        w = unit[:, None] * inverse_cholesky((gram + gram.T) / 2, r.drop)
        z, image = fp32(z @ w), fp32(image @ w)
        if pivots is None:
            pivots = torch.where(w.diagonal() > 0, 1 / w.diagonal(), 0.0)
        if precise:
            z = metric.rounded(z, True) if r.rounded else z
            image = metric.times(z, True)
    return Block(z, image, pivots)


def lower_end(pivots: Tensor, floor: float) -> float:
    """b: the smallest pivot of a column that is there, never below `floor` of the largest."""
    there = pivots[pivots > 0]
    return max(float(there.min()), floor * float(there.max())) if len(there) else 1.0


Operator = Callable[[Tensor, bool], Tensor]


def filtered(
    operator: Operator, metric: Metric, block: Block, b: float, r: Recipe, degree: int
) -> Tensor:
    """T_degree(2 M/b − 1) z by its recurrence, `operator` taking images Γ z to M z."""
    before, z = block.z, fp32(2 / b * operator(block.image, r.precise_filter) - block.z)
    for _ in range(degree - 1):
        moved = operator(metric.times(z, r.precise_filter), r.precise_filter)
        before, z = z, fp32(2 * (2 / b * moved - z) - before)
    return z


def eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


@dataclass
class Emulated:
    """One module's consensus of R columns, as the kernels would make it."""

    b: Tensor
    a: Tensor
    offsets: Tensor
    weights: Tensor
    scaling: Tensor
    rank: int
    roundoff: float
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        v, n = CpuVocabulary(), int(self.offsets[-1])
        self.ragged = Ragged.of(self.offsets, n, torch.device("cpu"))
        grams = [v.gram(x[None], self.ragged) for x in (self.b, self.a)]  # fp64 client blocks
        s = self.scaling[None]
        self.clients: Clients = canonicalize(v, *grams, self.ragged, s, 0.1, self.roundoff)
        self.votes = self.weights / self.weights.sum()
        self.columns = min(self.rank + OVERSAMPLE, n)
        self.whole = self.rank + OVERSAMPLE >= min(n, self.b.shape[1], self.a.shape[1])
        self.metrics, self.signs = [], []
        for side, x, t in zip(("left", "right"), (self.b, self.a), self.turns, strict=True):
            omega = start_matrix(
                0, side, x.shape[1], self.columns, torch.float64, torch.device("cpu")
            )
            self.metrics.append(Metric(self._whitened(x, t)))
            # A block as wide as the coordinates or the long space is all of it.
            all_of_it = self.columns == n
            self.signs.append(
                torch.eye(n).double() if all_of_it else self._pulled(t, summed(x, omega))
            )

    @property
    def turns(self) -> tuple[Tensor, Tensor]:
        return self.clients.t_u[0], self.clients.t_v[0]

    def _pulled(self, t: Tensor, z: Tensor) -> Tensor:
        """T_iᵀ z_i in fp32."""
        pad = self.ragged.pad
        return fp32(self.ragged.unpad(fp32(pad(t[None])).mT @ pad(z[None])))[0]

    def _whitened(self, x: Tensor, t: Tensor) -> Tensor:
        """Γ = Tᵀ (x xᵀ) T from sums in fp32, its diagonal blocks from fp64 ones."""
        raw = split_product(x, x.T, self.recipe.promoted)
        half = self._pulled(t, raw)
        gamma = self._pulled(t, half.T)
        gamma = (gamma + gamma.T) / 2
        for lo, hi in pairwise(self.offsets.tolist()):
            gamma[lo:hi, lo:hi] = 0
        return gamma + torch.diag((self.clients.sigma[0] > 0).double())

    def mean(self, p: Tensor) -> Tensor:
        """D of Σ p_i ΔW_i."""
        return fp32(self.ragged.per_row(p[None]) * self.clients.sigma)[0][:, None]

    def anchor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left and right coordinates of W̃'s leading triplets, and their votes."""
        norm, r, (g_u, g_v) = self.clients.norm[0], self.recipe, self.metrics
        safe = torch.where(norm > 0, norm, 1.0)
        mean_norm = (self.votes * norm).sum()
        p = self.votes * (norm > 0) * (1 / safe + 0.02 / mean_norm.clamp(min=1e-300))
        d = self.mean(p)

        def operator(image: Tensor, precise: bool) -> Tensor:
            return fp32(d * g_v.times(fp32(d * image), precise))

        z = fp32(d * self.signs[1])
        if not (self.whole and r.whole):
            block = orthonormal(g_u, z, r)
            for _ in range(r.steps):
                block = orthonormal(g_u, operator(block.image, False), r)
            b = lower_end(block.pivots, r.floor)
            z = filtered(operator, g_u, block, b, r, r.degree)
        block = orthonormal(g_u, z, r, precise=True)
        image = fp32(d * block.image)
        theta, turn = eigenpairs(image.T @ g_v.times(image, True))
        theta, turn = theta[: self.rank], turn[:, : self.rank]
        sigma = theta.sqrt()
        inverse = torch.where(sigma > 0, 1 / torch.where(sigma > 0, sigma, 1.0), 0.0)
        x, y = fp32(block.z @ turn), fp32(image @ turn * inverse)
        size = p * self.clients.size[0]
        at = float(sigma[self.rank - 1]) if self.rank <= len(sigma) else 0.0
        noise = 0.5 * self.roundoff * float(size.norm())
        c = max(at, 0.01 * float(sigma[0]), noise)
        vote = (sigma > 8 * U32 * size.sum()) * theta / (theta + c * c)
        return x, y, vote

    def side(self, index: int, voice: Tensor, known: Tensor, vote: Tensor) -> Tensor:
        """Coordinates (N, R) of a mean projector's leading eigenvectors."""
        metric, r = self.metrics[index], self.recipe
        f = fp32(known * vote.sqrt())

        def operator(image: Tensor, precise: bool) -> Tensor:
            return fp32(voice[:, None] * image + f @ (f.T @ image))

        # A column of the anchor without a vote leaves its place to more of Ω.
        spare = fp32(voice[:, None] * self.signs[index])
        here = known.shape[1]
        z = torch.cat([torch.where(vote > 0, known, spare[:, :here]), spare[:, here:]], 1)
        if self.whole and r.whole:
            z = torch.cat([known * (vote > 0), spare], 1)
        else:
            block = orthonormal(metric, z, r)
            for _ in range(r.mean_steps):
                block = orthonormal(metric, operator(block.image, False), r)
            b = lower_end(block.pivots, r.floor)
            z = filtered(operator, metric, block, b, r, 2)
        block = orthonormal(metric, z, r, precise=True)
        energy = block.image.T @ (voice[:, None] * block.image) + (
            (f.T @ block.image).T @ (f.T @ block.image)
        )
        values, turn = eigenpairs(energy)
        keep = min(self.rank, int((values > 1e-13 * values[0]).sum()))
        return fp32(block.z @ turn[:, :keep])

    def lifted(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Q z (d, R) from the stored rows, and one CholeskyQR."""
        pad = self.ragged.pad
        rows = fp32(self.ragged.unpad(fp32(pad(t[None])) @ pad(z[None])))[0]
        u = split_product(x.T.contiguous(), rows, self.recipe.promoted)
        return fp32(u @ inverse_cholesky(u.T @ u, DEPENDENT))

    def update(self) -> np.ndarray:
        """Ŵ (d_out, d_in)."""
        x, y, vote = self.anchor()
        voice = fp32(self.ragged.per_row(self.votes[None]) * self.clients.soft)[0]
        (t_u, t_v), promoted = self.turns, self.recipe.promoted
        u = self.lifted(self.b, t_u, self.side(0, voice, x, vote))
        v = self.lifted(self.a, t_v, self.side(1, voice, y, vote))
        coef = self.ragged.per_row((self.weights * self.scaling)[None])[0][:, None]
        c = split_product(self.b, u, promoted).T @ (coef * split_product(self.a, v, promoted))
        left, s, right = torch.linalg.svd(c)
        k = len(s)
        u, v = fp32(u @ fp32(left[:, :k])), fp32(v @ fp32(right[:k].T))
        return ((u * s) @ v.T).numpy()


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
        for kind in ("partly", "frozen", "loud")
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
        Case(kind, d_out=1152, d_in=1088, clients=66, ranks=(16,), rank=64)
        for kind in ("partly", "disjoint", "frozen")
    ],
}  # fmt: skip

# The recipe, and what becomes of it without one of its parts or with more of another.
RECIPES = {
    "recipe": Recipe(),
    "two-term filters": Recipe(precise_filter=True),
    "not rounded first": Recipe(rounded=False),
    "drop 1e-6": Recipe(drop=1e-6),
    "b ≥ 3e-3 θ₁": Recipe(floor=3e-3),
    "b ≥ 0": Recipe(floor=0.0),
    "one step": Recipe(steps=1),
    "four steps": Recipe(steps=4),
    "degree 5": Recipe(degree=5),
    "two steps a mean": Recipe(mean_steps=2),
    "iterated when whole": Recipe(whole=False),
    "not promoted": Recipe(promoted=False),
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
    ranks = torch.tensor([0, *(b.shape[1] for b, _ in stored)])
    b, a = torch.cat([b.T for b, _ in stored]), torch.cat([a for _, a in stored])
    given = torch.from_numpy(weights), torch.from_numpy(ones)
    rank = min(case.rank, min(len(b), max(b.shape[1], a.shape[1])) + 1)
    out = {}
    for name, recipe in recipes.items():
        got = Emulated(b, a, ranks.cumsum(0), *given, rank, unit, recipe).update()
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
