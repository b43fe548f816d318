"""How much work an aggregation is, counted and never timed: products, eigenproblems, bytes.

Flops of the long dimension are counted where the algorithm asks its vocabulary for them, in units
of 2N(d_out + d_in)(R + p): one pass of all factors over a block of the width of the iteration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from glora_ops.bindings.cpu import CHUNK, CpuVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import glora_ops  # noqa: F401  # registers the ops
from glora_ops.linalg.ragged import Ragged
from glora_ops.runtime.threads import exact_products

P = 16


class Counted(CpuVocabulary):
    """The CPU's vocabulary with a tally; what one word says in others is counted there."""

    def __init__(self) -> None:
        self.flops: Counter[str] = Counter()
        self.eigenproblems: list[tuple[int, ...]] = []
        self.singular: list[tuple[int, ...]] = []

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        squares = int(ragged.ranks.square().sum())
        self.flops["gram"] += 2 * rows.shape[0] * squares * rows.shape[-1]
        return super().gram(rows, ragged)

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        self.flops["times"] += 2 * rows.numel() * omega.shape[-1]
        return super().times(rows, omega)

    def turned(self, rows: Tensor, ragged: Ragged, t: Tensor) -> Tensor:
        self.flops["turned"] += 2 * rows.numel() * t.shape[-1]
        return super().turned(rows, ragged, t)

    def overlaps(self, q: Tensor) -> Tensor:
        self.flops["overlaps"] += q.numel() * q.shape[-2]  # half of the square
        before = self.flops["times"]
        out = super().overlaps(q)
        assert self.flops["times"] == before
        return out

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        self.flops["product"] += 2 * x.numel() * y.shape[-1]
        return super().product(x, y)

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        self.flops["lift"] += 2 * rows.numel() * z.shape[-1]
        return super().lift(rows, z)

    def combine(self, y: Tensor, c: Tensor, onto: Tensor | None = None) -> Tensor:
        self.flops["combine"] += 2 * y.numel() * c.shape[-1]
        return super().combine(y, c, onto)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        self.flops["inner"] += 2 * y.numel() * z.shape[-1]
        return super().inner(y, z)

    def eigh(self, g: Tensor) -> tuple[Tensor, Tensor]:
        self.eigenproblems.append(tuple(g.shape))
        return super().eigh(g)

    def svd(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.singular.append(tuple(c.shape))
        return super().svd(c)


def counted(
    basis: str, clients: int, rank: int, d: int, server: int, modules: int = 1, steps: int = -1
) -> Counted:
    rng = torch.Generator().manual_seed(0)
    b, a = (torch.randn(modules, clients * rank, d, generator=rng) for _ in range(2))
    v, ones = Counted(), torch.ones(clients)
    with exact_products():
        Ops(v).aggregate(
            b, a, torch.arange(clients + 1) * rank, ones / clients, ones, server, basis,
            power_iters=steps,
        )  # fmt: skip
    return v


def passes(v: Counted, clients: int, rank: int, d: int, server: int, modules: int = 1) -> float:
    return v.flops.total() / (4 * modules * clients * rank * d * (server + P))


def orders(v: Counted) -> list[int]:
    return [shape[-1] for shape in v.eigenproblems]


# The exact solver makes one N × N product a side, which is N/(R + p) passes; the rest is a few.
@pytest.mark.parametrize(
    ("basis", "most"), [("update", 2.0), ("consensus", 3.5), ("projector", 3.5)]
)
@pytest.mark.parametrize("shape", [(8, 8, 512, 16), (16, 8, 512, 32), (4, 4, 300, 8)])
def test_products_of_the_gram_route(
    basis: str, most: float, shape: tuple[int, int, int, int]
) -> None:
    clients, rank, _, server = shape
    v = counted(basis, *shape)
    assert passes(v, *shape) <= most + clients * rank / (server + P)
    assert v.flops["overlaps"] == 0


# Fixed numbers of power steps: the products must not grow beyond these passes.
@pytest.mark.parametrize(
    ("basis", "steps", "most"),
    [("update", 0, 5), ("update", 2, 9), ("consensus", 0, 16), ("consensus", 2, 26)],
)
@pytest.mark.parametrize("shape", [(80, 16, 1024, 16), (160, 16, 1024, 16)])
def test_products_of_the_iterative_solvers(
    basis: str, steps: int, most: float, shape: tuple[int, int, int, int]
) -> None:
    v = counted(basis, *shape, steps=steps)
    assert passes(v, *shape) <= most


@pytest.mark.parametrize("basis", ["update", "consensus", "projector"])
@pytest.mark.parametrize(
    ("small", "large", "factor"),
    [
        ((8, 8, 512, 16), (8, 8, 1024, 16), 2.0),
        ((80, 16, 1024, 16), (80, 16, 2048, 16), 2.0),
        ((80, 16, 1024, 16), (160, 16, 1024, 16), 2.0),
    ],
)
def test_products_grow_in_proportion(
    basis: str,
    small: tuple[int, int, int, int],
    large: tuple[int, int, int, int],
    factor: float,
) -> None:
    """Twice the dimension, or in iterations twice the clients: twice the work, no more."""
    one, two = (counted(basis, *shape, steps=2) for shape in (small, large))
    ratio = two.flops.total() / one.flops.total()
    assert ratio <= 1.02 * factor
    assert ratio >= 0.9 * factor


@pytest.mark.parametrize("basis", ["update", "consensus", "projector"])
def test_eigenproblems_of_the_gram_route(basis: str) -> None:
    """As many calls for 16 clients as for 4 and for 5 modules as for 1, none above N + R."""
    calls = set()
    for clients, modules in ((4, 1), (16, 1), (4, 5)):
        v = counted(basis, clients, 8, 256, 16, modules)
        calls.add((len(v.eigenproblems), len(v.singular)))
        assert max(orders(v)) <= clients * 8 + 16
        # Of all modules together, or of both sides of all of them; `update` has its SVD already.
        assert all(shape[0] in (modules, 2 * modules) for shape in v.eigenproblems)
        assert v.singular == [(modules, 16, 16)] * (basis != "update")
    ((eigenproblems, _),) = calls
    assert eigenproblems <= (4 if basis == "update" else 8)


@pytest.mark.parametrize(("basis", "most"), [("update", 8), ("consensus", 30), ("projector", 30)])
def test_eigenproblems_of_the_iterative_solvers(basis: str, most: int) -> None:
    """None of them knows N: their orders are those of the block, R + p, and of its powers."""
    for clients in (80, 240):
        v = counted(basis, clients, 16, 512, 16, steps=2)
        assert len(v.eigenproblems) <= most
        assert max(orders(v)) <= 3 * (16 + P)


@pytest.mark.parametrize("basis", ["update", "consensus"])
def test_the_counts_would_notice(basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass too many, or one eigenproblem of order N, breaks the limits above."""
    plain: Callable[..., Tensor] = Counted.gram

    def wasteful(self: Counted, rows: Tensor, ragged: Ragged) -> Tensor:
        for _ in range(4):
            self.times(rows, rows.new_ones(rows.shape[0], rows.shape[-1], 16 + P))
        self.eigh(torch.eye(rows.shape[-2], dtype=torch.float64)[None])
        return plain(self, rows, ragged)

    monkeypatch.setattr(Counted, "gram", wasteful)
    with pytest.raises(AssertionError):
        test_products_of_the_iterative_solvers(
            basis, 2, {"update": 9, "consensus": 26}[basis], (80, 16, 1024, 16)
        )
    with pytest.raises(AssertionError):
        test_eigenproblems_of_the_iterative_solvers(basis, {"update": 8, "consensus": 30}[basis])


@pytest.mark.parametrize(("d", "k", "m"), [(192, 8192, 32), (4096, 48, 16), (700, 900, 900)])
def test_fp64_copies_are_pieces(d: int, k: int, m: int) -> None:
    """fp64 inner products of fp32 columns, tall, wide or both: no operand is copied whole."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64 and "_to_copy" in str(func):
                self.numbers = max(self.numbers, out.numel())
            return out

    rng = torch.Generator().manual_seed(0)
    y, z = (torch.randn(2, d, n, generator=rng) for n in (k, m))
    for other in (z, y) if k < d else (z,):
        with Largest() as copies:
            found = CpuVocabulary().inner(y, other)
        assert 0 < copies.numbers <= 2 * CHUNK
        want = y.double().mT @ other.double()
        assert float((found - want).abs().max()) <= 1e-12 * float(want.abs().max())
