"""What hypothesis draws: spectra, ranks, weights, gauges and ties, never entries.

A `Recipe` is drawn; `build` turns it into stored factors deterministically, so that a falsifying
example is one line that can be pasted: ``build(Recipe(seed=3, kind="frozen", …))``.

Every contract test reports its draws to `TALLY`, which the end of the session prints.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from glora_ops import STATS, Packed, pack

BASES = ("consensus", "projector", "update")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KINDS = ("generic", "pool", "aligned", "rotated", "partly", "frozen", "cancelling")
SPECTRA = ("flat", "linear", "geometric", "steep", "tied", "deficient")
GAPS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)
WEIGHTS = ("equal", "nearly", "uneven", "one silent")
SCALINGS = ("ones", "mixed", "negative")
RANKS = ("1", "dim-1", "dim", "dim+1", "r", "2r", "N", ">d")

#: Counts of what was drawn; see `conftest.py`.
TALLY: Counter[str] = Counter()

DEVICE = os.environ.get("GLORA_DEVICE", "cpu")

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a problem.

    Attributes
    ----------
    ranks : tuple of int
        Rank of each client's update.
    gap : float
        Relative distance of near ties (of spectra, weights and cancelling clients); 0 is exact.
    condition : float
        Of each client's gauge.
    widen : int
        Columns beyond the rank that each pair is stored with.
    dead : bool
        Whether one pair (b_j, a_j) of every client has a zero factor beside a huge one.
    loud : float
        Norm of the first client over the others'.
    mute : bool
        Whether one more client sends an update of zero.
    cut : str
        How the server rank R relates to the problem, one of `RANKS`.
    """

    seed: int
    m: int = 20
    n: int = 16
    ranks: tuple[int, ...] = (3, 2, 4)
    kind: str = "generic"
    spectrum: str = "geometric"
    gap: float = 0.0
    weights: str = "equal"
    scaling: str = "ones"
    condition: float = 1.0
    widen: int = 0
    dead: bool = False
    loud: float = 1.0
    mute: bool = False
    cut: str = "dim"
    dtype: str = "float32"


@dataclass(frozen=True, eq=False)
class Problem:
    """Stored factors and how they are to be aggregated."""

    recipe: Recipe
    clients: list[Pair]
    weights: np.ndarray
    scaling: np.ndarray
    rank: int

    def __repr__(self) -> str:
        return f"build({self.recipe!r})"

    @property
    def exact(self) -> bool:
        """Whether R holds all directions there can be, so that nothing is cut."""
        rows = sum(b.shape[1] for b, _ in self.clients)
        return self.rank >= min(rows, max(self.recipe.m, self.recipe.n))

    @property
    def unit(self) -> float:
        return torch.finfo(DTYPES[self.recipe.dtype]).eps / 2

    def arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The stored numbers, exactly, for the reference."""
        return [(b.double().numpy(), a.double().numpy()) for b, a in self.clients]

    def packed(self) -> Packed:
        return pack(self.clients)


# --- building ----------------------------------------------------------------------------------


def orthonormal(rng: np.random.Generator, d: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, r)))[0]


def spectrum(recipe: Recipe, r: int) -> np.ndarray:
    """Singular values of one client's update, the first 1."""
    j = np.arange(r)
    return {
        "flat": np.ones(r),
        "linear": np.linspace(1, 0.4, r) if r > 1 else np.ones(1),
        "geometric": 0.6**j,
        "steep": np.geomspace(1, 1e-7, r) if r > 1 else np.ones(1),
        "tied": (1 - recipe.gap) ** j,
        "deficient": np.where(j < (r + 1) // 2, 0.8**j, 0.0),
    }[recipe.spectrum]


def directions(
    recipe: Recipe, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(U_i, σ_i, V_i) of every client, before norms and gauges."""
    m, n, ranks = recipe.m, recipe.n, recipe.ranks
    pool = min(m, n)
    u, v = orthonormal(rng, m, pool), orthonormal(rng, n, pool)
    start = np.cumsum((0, *ranks))
    out = []
    for i, r in enumerate(ranks):
        own_u, own_v = orthonormal(rng, m, r), orthonormal(rng, n, r)
        turn, back = orthonormal(rng, r, r), orthonormal(rng, r, r)
        picked = (
            np.arange(start[i], start[i + 1]) if start[-1] <= pool else rng.permutation(pool)[:r]
        )
        half = (r + 1) // 2
        left, right = {
            "generic": (own_u, own_v),
            "pool": (u[:, picked], v[:, picked]),
            "aligned": (u[:, :r], v[:, :r]),
            "rotated": (u[:, :r] @ turn, v[:, :r] @ back),
            "partly": (
                np.linalg.qr(np.hstack([u[:, :half], own_u[:, half:]]))[0],
                np.linalg.qr(np.hstack([v[:, :half], own_v[:, half:]]))[0],
            ),
            "frozen": (u[:, picked] if start[-1] <= pool else own_u, v[:, :r]),
            "cancelling": (own_u, own_v),
        }[recipe.kind]
        values = spectrum(recipe, r)
        if recipe.kind == "cancelling" and i % 2:
            before_u, before_s, before_v = out[i - 1]
            left, values, right = -before_u, before_s * (1 - recipe.gap), before_v
        out.append((left, values, right))
    return out


def store(recipe: Recipe, rng: np.random.Generator, u, sigma, v) -> Pair:
    """A gauge of the wanted condition and width, rounded to the dtype."""
    r = len(sigma)
    width = r + recipe.widen
    turn = orthonormal(rng, width, width)
    gauge = np.geomspace(recipe.condition**-0.5, recipe.condition**0.5, r)
    mix = orthonormal(rng, r, r) * gauge @ turn[:r]
    root = np.sqrt(sigma)
    b, a = (u * root) @ mix, np.linalg.pinv(mix) @ (root[:, None] * v.T)
    if recipe.kind == "frozen" and recipe.condition == 1 and not recipe.widen:
        b, a = u * sigma, v.T
    if recipe.dead:
        at = int(rng.integers(width + 1))
        b = np.insert(b, at, 1e3 * rng.standard_normal(len(b)), axis=1)
        a = np.insert(a, at, 0.0, axis=0)
    return as_stored(b, recipe.dtype), as_stored(a, recipe.dtype)


def as_stored(x: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[dtype])


def build(recipe: Recipe) -> Problem:
    """The problem of a recipe; the same numbers every time."""
    rng = np.random.default_rng(recipe.seed)
    parts = directions(recipe, rng)
    count = len(parts)
    norms = 2.0 ** rng.uniform(-1, 1, count)
    norms[1::2] = norms[0::2][: count // 2] if recipe.kind == "cancelling" else norms[1::2]
    if recipe.kind in ("aligned", "frozen", "pool") and recipe.weights != "uneven":
        norms[:] = 1.0
    scaling = {
        "ones": np.ones(count),
        "mixed": rng.choice([0.25, 0.5, 2.0, 4.0], count),
        "negative": rng.choice([-2.0, -0.5, 1.0, 2.0], count),
    }[recipe.scaling]
    norms, scaling = norms / np.abs(scaling), scaling.astype(float)
    if recipe.dtype == "float16":  # its range is short: loudness goes into the scaling
        scaling[0] *= recipe.loud
    else:
        norms[0] *= recipe.loud
    clients = [
        store(recipe, rng, u, sigma * norm, v)
        for (u, sigma, v), norm in zip(parts, norms, strict=True)
    ]
    if recipe.kind == "cancelling":  # exactly: the same stored numbers, one factor negated
        for i in range(1, count, 2):
            b, a = clients[i - 1]
            shrink = 1 - recipe.gap
            clients[i] = (-b, a)
            scaling[i] = scaling[i - 1] * shrink
    weights = {
        "equal": np.ones(count),
        "nearly": 1 + recipe.gap * np.arange(count),
        "uneven": 10.0 ** -rng.uniform(0, 3, count),
        "one silent": np.where(np.arange(count) == count - 1, float(count == 1), 1.0),
    }[recipe.weights]
    if recipe.mute:
        b, a = clients[0]
        zero = (torch.zeros_like(b), a) if recipe.seed % 2 else (b, torch.zeros_like(a))
        clients.append(zero)
        weights, scaling = np.append(weights, weights.mean()), np.append(scaling, 1.0)
    heard = [k for k in range(count) if weights[k] != 0]
    dim = max(
        int(np.linalg.matrix_rank(np.hstack([parts[k][side] for k in heard]), tol=1e-9))
        for side in (0, 2)
    )
    rows = sum(b.shape[1] for b, _ in clients)
    rank = {
        "1": 1,
        "dim-1": dim - 1,
        "dim": dim,
        "dim+1": dim + 1,
        "r": max(recipe.ranks),
        "2r": 2 * max(recipe.ranks),
        "N": rows,
        ">d": max(recipe.m, recipe.n) + 3,
    }[recipe.cut]
    return Problem(recipe, clients, weights / weights.sum(), scaling, max(rank, 1))


# --- drawing -----------------------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn, dtypes: Sequence[str] = ("float32",), **fixed: object) -> Recipe:
    """Recipes in which every hard case of the contract has a fair share."""
    m, n = draw(st.sampled_from([(20, 16), (13, 24), (24, 13), (9, 9), (6, 30), (30, 7), (18, 18)]))
    r_max = min(5, m, n)
    count = draw(st.sampled_from([1, 2, 2, 3, 3, 4, 5, 6]))
    ranks = draw(
        st.lists(st.integers(1, r_max), min_size=count, max_size=count)
        | st.integers(1, r_max).map(lambda r: [r] * count)
    )
    recipe = Recipe(
        seed=draw(st.integers(0, 2**16)),
        m=m,
        n=n,
        ranks=tuple(ranks),
        kind=draw(st.sampled_from(KINDS)),
        spectrum=draw(st.sampled_from(SPECTRA)),
        gap=draw(st.sampled_from(GAPS)),
        weights=draw(st.sampled_from(WEIGHTS)),
        scaling=draw(st.sampled_from(SCALINGS)),
        condition=draw(st.sampled_from([1.0, 1.0, 10.0, 1e2, 1e4])),
        widen=draw(st.sampled_from([0, 0, 1, 4])),
        dead=draw(st.sampled_from([False, False, True])),
        loud=draw(st.sampled_from([1.0, 1.0, 1.0, 1e2, 1e6])),
        mute=draw(st.sampled_from([False, False, False, True])),
        cut=draw(st.sampled_from(RANKS)),
        dtype=draw(st.sampled_from(list(dtypes))),
    )
    return replace(recipe, **fixed)


def problems(dtypes: Sequence[str] = ("float32",), **fixed: object) -> st.SearchStrategy[Problem]:
    return recipes(dtypes, **fixed).map(build)


# --- running -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answer:
    """What the op returned, with its numbers by name."""

    u: Tensor
    s: Tensor
    v: Tensor
    eig_u: Tensor
    eig_v: Tensor
    stats: Tensor
    client_stats: Tensor

    def stat(self, name: str) -> float:
        return float(self.stats[STATS.index(name)])

    @property
    def w_hat(self) -> np.ndarray:
        return ((self.u.double() * self.s.double()) @ self.v.double().mT).numpy()

    @property
    def flagged(self) -> bool:
        return bool(self.stat("ambiguous"))


def aggregate(problem: Problem, basis: str, **settings: object) -> Answer:
    """The op on a problem, weights as given; on the device that GLORA_DEVICE names."""
    packed = problem.packed()
    out = torch.ops.glora.aggregate(
        packed.b.to(DEVICE),
        packed.a.to(DEVICE),
        packed.offsets,
        torch.from_numpy(problem.weights).to(DEVICE),
        torch.from_numpy(problem.scaling).to(DEVICE),
        problem.rank,
        basis,
        **settings,
    )
    return Answer(*(x.cpu() for x in out))


def count(problem: Problem, answer: Answer, what: str) -> None:
    """Enter one draw in `TALLY`: which test, and what was hard about it."""
    gap = min(answer.stat(name) for name in ("gap_u", "gap_v", "gap_w"))
    TALLY["drawn"] += 1
    TALLY[f"drawn by {what}"] += 1
    TALLY["exact ties at the cut"] += gap < 1e-9
    TALLY["near ties at the cut"] += 1e-9 <= gap < 1e-2
    TALLY["flagged"] += answer.flagged
    TALLY["nothing cut"] += problem.exact
    TALLY["deficient"] += bool(
        problem.recipe.widen or problem.recipe.dead or problem.recipe.spectrum == "deficient"
    )
    TALLY["ill-conditioned"] += answer.stat("rho_max") > 100
    TALLY["cancelling"] += problem.recipe.kind == "cancelling"
    TALLY["frozen A"] += problem.recipe.kind == "frozen"
    TALLY["loud"] += problem.recipe.loud > 1


def regauge(problem: Problem, seed: int, condition: float, dtype: str | None = None) -> Problem:
    """(B G, G⁻¹ A) with cond G as given, stored in `dtype` (the problem's own by default)."""
    rng = np.random.default_rng(seed)
    dtype = dtype or problem.recipe.dtype
    clients = []
    for b, a in problem.arrays():
        r = b.shape[1]
        left, right = orthonormal(rng, r, r), orthonormal(rng, r, r)
        d = np.geomspace(condition**-0.5, condition**0.5, r)
        pair = (b @ (left * d) @ right.T, (right / d) @ left.T @ a)
        clients.append(tuple(as_stored(x, dtype) for x in pair))
    return replace(problem, clients=clients, recipe=replace(problem.recipe, dtype=dtype))


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """‖x − y‖/‖y‖."""
    return norm(x - y) / max(norm(y), math.ulp(0.0))
