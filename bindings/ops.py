"""The ops' bodies: shapes and dtypes in order, then the algorithm in a device's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from glora_ops import algorithm
from glora_ops.isolation import exact_products, one_thread
from glora_ops.linalg.canonical import positive
from glora_ops.linalg.ragged import Ragged
from glora_ops.linalg.vocabulary import Vocabulary, working
from glora_ops.packing import pack
from glora_ops.solvers.base import Factors, Settings, fill
from glora_ops.solvers.nspace_exact import exact_limit
from glora_ops.solvers.operators import Voters
from glora_ops.solvers.tall import TallSolver

from . import schemas

__all__ = ["register"]

Tensors = tuple[Tensor, ...]


def register(ops: Callable[[], Ops], key: str) -> None:
    """Bind every op to a dispatch key, run in isolation, outputs contiguous.

    `ops` is called when an op is: a device's imports wait for its first tensor.
    """
    for name in schemas.NAMES:
        schemas.LIBRARY.impl(name, _isolated(ops, name.replace(".", "_")), key)


def _isolated(ops: Callable[[], Ops], name: str) -> Callable[..., Any]:
    @wraps(getattr(Ops, name))
    def run(*args: Any, **kwargs: Any) -> Any:
        with exact_products(), one_thread():
            out = getattr(ops(), name)(*args, **kwargs)
        if isinstance(out, Tensor):
            return out.contiguous()
        return tuple(x.contiguous() for x in out)

    return run


def _roundoff(*factors: Tensor) -> float:
    """Unit roundoff of the coarsest dtype the factors are stored in."""
    return max(torch.finfo(x.dtype).eps / 2 for x in factors)


def _modules(x: Tensor, dim: int = 3) -> Tensor:
    """With the module dimension, added where the caller left it out."""
    return x if x.dim() == dim else x[None]


def _per_client(x: Tensor, stack: Tensor) -> Tensor:
    return x.to(stack.device, torch.float64).expand(stack.shape[0], -1)


def _like(batched: bool, *outputs: Tensor) -> Tensors:
    return outputs if batched else tuple(x[0] for x in outputs)


def _alive(x: Tensor) -> Tensor:
    """(L, N) bool: which rows are not zero, whatever the range of squares."""
    alive = torch.linalg.vector_norm(x, dim=-1) > 0
    if not bool(alive.all()):
        alive[~alive] = (x[~alive] != 0).any(-1)
    return alive


def _patterns(b: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Modules in which the same pairs of rows are alive, and those pairs: (m,), (n,) int64."""
    alive = _alive(b) & _alive(a)
    patterns, which = torch.unique(alive, dim=0, return_inverse=True)
    for k, pattern in enumerate(patterns):
        pattern[0] |= ~pattern.any()  # a module without any keeps one that is zero
        yield which.eq(k).nonzero()[:, 0], pattern.nonzero()[:, 0]


def _by_module(run: Callable[[slice], Tensors], modules: int) -> Tensors:
    """Run one module at a time and stack: an adaptive iteration stops for each on its own."""
    parts = [run(slice(l, l + 1)) for l in range(modules)]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


class Ops:
    """Bodies of ``torch.ops.glora.*`` over one vocabulary; names and arguments as the schemas'.

    Parameters
    ----------
    fixed_steps : bool
        Whether `aggregate` with a fixed number of power steps looks at no value.
    """

    def __init__(self, v: Vocabulary, fixed_steps: bool = False) -> None:
        self.v = v
        self.fixed_steps = fixed_steps

    def canonicalize(
        self,
        b: Tensor,
        a: Tensor,
        offsets: Tensor,
        scaling: Tensor,
        tau_rel: float = 0.1,
        max_rank: int = -1,
    ) -> Tensors:
        schemas.check_canonicalize(b, a, offsets, scaling, tau_rel, max_rank)
        ragged = Ragged.of(offsets, b.shape[-2], b.device, max_rank)
        clients = self._tall(b, a, ragged, scaling, Settings(1, tau_rel=tau_rel)).clients
        return _like(b.dim() == 3, clients.t_u, clients.t_v, clients.sigma, clients.soft)

    def projector_matmul(
        self, x: Tensor, offsets: Tensor, t: Tensor, row_weights: Tensor, omega: Tensor
    ) -> Tensor:
        schemas.check_voters(x, offsets, t, row_weights)
        schemas.check_omega(omega, x)
        return self._matmul(omega, *self._voters(x, offsets, t, row_weights))

    def projector_matmul_factors(
        self, x: Tensor, offsets: Tensor, weights: Tensor, omega: Tensor
    ) -> Tensor:
        schemas.check_factor_voters(x, offsets, weights)
        schemas.check_omega(omega, x)
        return self._matmul(omega, *self._factor_voters(x, offsets, weights))

    def projector_svd(
        self,
        x: Tensor,
        offsets: Tensor,
        t: Tensor,
        row_weights: Tensor,
        rank: int,
        oversample: int = 16,
        power_iters: int = -1,
        tol: float = 1e-3,
        extra: Tensor | None = None,
        warm: Tensor | None = None,
        seed: int = 0,
    ) -> Tensors:
        schemas.check_voters(x, offsets, t, row_weights)
        schemas.check_solver(x, rank, oversample, power_iters, tol, extra, warm)
        s = Settings(rank, oversample=oversample, power_iters=power_iters, tol=tol, seed=seed)
        voters = self._voters(x, offsets, t, row_weights, extra)
        return _like(x.dim() == 3, *self._svd(*voters, s, warm))

    def projector_svd_factors(
        self,
        x: Tensor,
        offsets: Tensor,
        weights: Tensor,
        rank: int,
        oversample: int = 16,
        power_iters: int = -1,
        tol: float = 1e-3,
        extra: Tensor | None = None,
        warm: Tensor | None = None,
        seed: int = 0,
    ) -> Tensors:
        schemas.check_factor_voters(x, offsets, weights)
        schemas.check_solver(x, rank, oversample, power_iters, tol, extra, warm)
        s = Settings(rank, oversample=oversample, power_iters=power_iters, tol=tol, seed=seed)
        voters = self._factor_voters(x, offsets, weights, extra)
        return _like(x.dim() == 3, *self._svd(*voters, s, warm))

    def core(
        self,
        u: Tensor,
        v: Tensor,
        b: Tensor,
        a: Tensor,
        offsets: Tensor,
        weights: Tensor,
        scaling: Tensor,
    ) -> Tensor:
        schemas.check_core(u, v, b, a, offsets, weights, scaling)
        solver = self._tall(b, a, Ragged.of(offsets, b.shape[-2], b.device), scaling)
        wide = torch.promote_types(u.dtype, v.dtype)  # one launch serves both sides
        u, v = _modules(u).to(wide), _modules(v).to(wide)
        coef = solver.coefficients(_per_client(weights, solver.b))
        c, _, _ = self.v.core(solver.b, solver.a, u, v, coef)
        return c if b.dim() == 3 else c[0]

    def aggregate(
        self,
        b: Tensor,
        a: Tensor,
        offsets: Tensor,
        weights: Tensor,
        scaling: Tensor,
        rank: int,
        basis: str = "consensus",
        tau_rel: float = 0.1,
        anchor: float = 1.0,
        oversample: int = 16,
        power_iters: int = -1,
        tol: float = 1e-3,
        warm_u: Tensor | None = None,
        warm_v: Tensor | None = None,
        seed: int = 0,
        client_statistics: bool = True,
    ) -> Tensors:
        schemas.check_aggregate(b, a, offsets, weights, scaling, warm_u, warm_v)
        schemas.check_settings(rank, basis, tau_rel, anchor, oversample, power_iters, tol)
        s = Settings(
            rank, basis, tau_rel, anchor, oversample, power_iters, tol, seed, client_statistics
        )
        rows_b, rows_a = _modules(b), _modules(a)
        ragged = Ragged.of(offsets, b.shape[-2], b.device)
        w, scale = _per_client(weights, rows_b), _per_client(scaling, rows_b)
        warm = [None if x is None else _modules(x) for x in (warm_u, warm_v)]
        fixed = self.fixed_steps and power_iters >= 0

        def run(here: slice | Tensor, rows: slice | Tensor, ragged: Ragged) -> Tensors:
            left, right = (x[here][:, rows] for x in (rows_b, rows_a))
            factors = Factors(left, right, ragged, scale[here], _roundoff(b, a))
            solver = algorithm.choose(self.v, factors, s, fixed)
            start_u, start_v = (None if x is None else x[here] for x in warm)
            return algorithm.aggregate(solver, w[here], s, (start_u, start_v))

        whole = slice(None)
        if fixed or ragged.rows <= exact_limit(rank):
            return _like(b.dim() == 3, *run(whole, whole, ragged))
        # Dead rows do not count; a module comes to what its own rows say, and adaptive iterations
        # stop for each on its own.
        places: list[Tensor] = []
        outputs: list[Tensors] = []
        for here, rows in _patterns(rows_b, rows_a):
            kept = ragged
            if len(rows) < ragged.rows:
                ends = torch.searchsorted(rows.cpu(), offsets)
                kept = Ragged.of(ends, len(rows), b.device)
            for some in here.split(len(here) if kept.rows <= exact_limit(rank) else 1):
                outputs.append(run(some, rows if kept is not ragged else whole, kept))
                places.append(some)
        back = torch.cat(places).argsort()
        joined = (
            torch.cat(x)[back] if len(outputs) > 1 else x[0] for x in zip(*outputs, strict=True)
        )
        return _like(b.dim() == 3, *joined)

    def client_stats(
        self,
        b: Tensor,
        a: Tensor,
        offsets: Tensor,
        weights: Tensor,
        scaling: Tensor,
        u: Tensor,
        s: Tensor,
        v: Tensor,
    ) -> Tensor:
        schemas.check_client_stats(b, a, offsets, weights, scaling, u, s, v)
        solver = self._tall(b, a, Ragged.of(offsets, b.shape[-2], b.device), scaling)
        reach = self.v.times(solver.b, _modules(u)), self.v.times(solver.a, _modules(v))
        coef = solver.coefficients(_per_client(weights, solver.b))
        told = algorithm.client_stats(solver.clients, reach, _modules(s, 2).double(), coef)
        return told if b.dim() == 3 else told[0]

    def aggregate_list(
        self,
        lora_b: list[Tensor],
        lora_a: list[Tensor],
        weights: Tensor,
        scaling: Tensor,
        rank: int,
        basis: str = "consensus",
        tau_rel: float = 0.1,
        anchor: float = 1.0,
        oversample: int = 16,
        power_iters: int = -1,
        tol: float = 1e-3,
        warm_u: Tensor | None = None,
        warm_v: Tensor | None = None,
        seed: int = 0,
        client_statistics: bool = True,
    ) -> Tensors:
        schemas.check_lists(lora_b, lora_a, weights, scaling, warm_u, warm_v)
        packed = pack(list(zip(lora_b, lora_a, strict=True)))
        return self.aggregate(
            packed.b, packed.a, packed.offsets, weights, scaling, rank, basis, tau_rel, anchor,
            oversample, power_iters, tol, warm_u, warm_v, seed, client_statistics,
        )  # fmt: skip

    def readout(
        self,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        rank: int,
        scaling: float = 1.0,
        pad: str = "zero",
        seed: int = 0,
    ) -> Tensors:
        schemas.check_readout(u, s, v, rank, scaling, pad)
        batched = u.dim() == 3
        return _like(
            batched,
            *algorithm.readout(
                self.v, _modules(u), _modules(s, 2), _modules(v), rank, scaling, pad, seed
            ),
        )

    # --- shared parts ------------------------------------------------------------------------

    def _tall(
        self, b: Tensor, a: Tensor, ragged: Ragged, scaling: Tensor, s: Settings | None = None
    ) -> TallSolver:
        b, a, roundoff = _modules(b), _modules(a), _roundoff(b, a)
        factors = Factors(b, a, ragged, _per_client(scaling, b), roundoff)
        return TallSolver(self.v, factors, s or Settings(1))

    def _side(
        self, x: Tensor, offsets: Tensor, max_rank: int = -1
    ) -> tuple[Tensor, Ragged, Tensor]:
        rows, power = self.v.rows(_modules(x))
        return rows, Ragged.of(offsets, x.shape[-2], x.device, max_rank), power

    def _voters(
        self,
        x: Tensor,
        offsets: Tensor,
        t: Tensor,
        row_weights: Tensor,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, Ragged, Voters]:
        rows, ragged, power = self._side(x, offsets, t.shape[-1])
        t = _modules(t).double() * power[..., None]
        votes = _modules(row_weights, 2).double()
        return rows, ragged, Voters(t, votes, _extra(extra, rows))

    def _factor_voters(
        self, x: Tensor, offsets: Tensor, weights: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, Ragged, Voters]:
        rows, ragged, _ = self._side(x, offsets)
        votes = ragged.per_row(_per_client(weights, rows))
        t = algorithm.factor_voters(self.v, rows, ragged)
        return rows, ragged, Voters(t, votes, _extra(extra, rows))

    def _matmul(self, omega: Tensor, rows: Tensor, ragged: Ragged, voters: Voters) -> Tensor:
        y = algorithm.projector_matmul(self.v, rows, ragged, voters, _modules(omega))
        return y if omega.dim() == 3 else y[0]

    def _svd(
        self, rows: Tensor, ragged: Ragged, voters: Voters, s: Settings, warm: Tensor | None
    ) -> Tensors:
        start = None if warm is None else _modules(warm)

        def run(here: slice) -> Tensors:
            mine = Voters(voters.t[here], voters.votes[here], voters.extra[here])
            basis, values, trace = algorithm.projector_svd(
                self.v, rows[here], ragged, mine, s, None if start is None else start[here]
            )
            explained = values[..., : s.rank].sum(-1) / positive(trace)
            return basis, fill(values, s.columns), explained.clamp(max=1.0)

        return _by_module(run, rows.shape[0])


def _extra(extra: Tensor | None, rows: Tensor) -> Tensor:
    """Further columns in the working precision; none where the caller gave none."""
    return (rows[:, :0].mT if extra is None else _modules(extra)).to(working(rows.dtype))
