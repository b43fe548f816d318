"""The ops' bodies: shapes and dtypes in order, then the algorithm in a device's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from glora_ops import algorithm, scratch
from glora_ops.isolation import exact_products, one_thread
from glora_ops.krylov import Iteration
from glora_ops.packing import pack
from glora_ops.ragged import Ragged
from glora_ops.solver import Coordinates, Side, fill, gram_route_limit
from glora_ops.vocabulary import Vocabulary, working

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


def _by_module(run: Callable[[slice], Tensors], modules: int) -> Tensors:
    """Run one module at a time and stack: an adaptive iteration stops for each on its own."""
    parts = [run(slice(l, l + 1)) for l in range(modules)]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


def _at_most(rank: int, rows: int, longest: int) -> int:
    """The rank worked with: one direction more than there can be, and zeros from there on."""
    return min(rank, min(rows, longest) + 1)


def _filled(x: Tensor, count: int) -> Tensor:
    """The first `count` of every module's numbers (L, n), zeros after them."""
    return fill(x[..., None, :], count)[..., 0, :]


def _dead(x: Tensor) -> Tensor:
    """(L, N) bool: the rows that are zero; only those that begin with zeros are read on."""
    dead = (x[..., :16] == 0).all(-1)
    if bool(dead.any()):
        dead &= torch.linalg.vector_norm(x, torch.inf, dim=-1) == 0
    return dead


def _picked(x: Tensor, live: Tensor) -> Tensor:
    """(L, n, d): the rows of a stack named by live (n,), where the stack may be large in a file."""
    if not x.is_cpu:
        return x.index_select(-2, live)
    out = scratch.empty((len(x), len(live), x.shape[-1]), x.dtype)
    return torch.index_select(x, -2, live, out=out)


def _by_pattern(run: Callable[[Tensor, Tensor], Tensors], alive: Tensor) -> Tensors:
    """Run modules with the same rows alive (L, N) at a time: each as if it stood alone."""
    alive[~alive.any(-1), 0] = True  # a module without any keeps one, which is zero
    patterns, which = alive.unique(dim=0, return_inverse=True)
    members = [(which == i).nonzero()[:, 0] for i in range(len(patterns))]
    parts = [run(m, p.nonzero()[:, 0]) for m, p in zip(members, patterns, strict=True)]
    order = torch.cat(members).argsort()
    return tuple(torch.cat(outputs)[order] for outputs in zip(*parts, strict=True))


class Ops:
    """Bodies of ``torch.ops.glora.*`` over one vocabulary; names and arguments as the schemas'.

    Parameters
    ----------
    captured : bool
        Whether `aggregate` with a fixed number of power steps takes the captured route.
    """

    def __init__(self, v: Vocabulary, captured: bool = False) -> None:
        self.v = v
        self.captured = captured

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
        width = Ragged.of(offsets, b.shape[-2], b.device, max_rank).max_rank
        ragged = Ragged.of(offsets, b.shape[-2], b.device)
        rows_b, rows_a, scale, size = self.v.pair(_modules(b), _modules(a), ragged)
        clients = algorithm.canonicalize(
            self.v,
            self.v.gram(rows_b, ragged),
            self.v.gram(rows_a, ragged),
            ragged,
            _per_client(scaling, rows_b) * size,
            tau_rel,
            _roundoff(b, a),
        )
        t_u = clients.t_u / scale[..., None]
        t_v = clients.t_v * (scale / ragged.spread(size))[..., None]
        t_u, t_v = fill(t_u, width), fill(t_v, width)
        return _like(b.dim() == 3, t_u, t_v, clients.sigma, clients.f)

    def projector_matmul(
        self, x: Tensor, offsets: Tensor, t: Tensor, row_weights: Tensor, omega: Tensor
    ) -> Tensor:
        schemas.check_voters(x, offsets, t, row_weights)
        schemas.check_omega(omega, x)
        side, voters = self._voters(x, offsets, t, row_weights)
        return self._matmul(side, voters, omega)

    def projector_matmul_factors(
        self, x: Tensor, offsets: Tensor, weights: Tensor, omega: Tensor
    ) -> Tensor:
        schemas.check_factor_voters(x, offsets, weights)
        schemas.check_omega(omega, x)
        side, voters = self._factor_voters(x, offsets, weights)
        return self._matmul(side, voters, omega)

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
        side, voters = self._voters(x, offsets, t, row_weights, extra)
        how = Iteration(oversample, power_iters, tol, seed)
        return _like(x.dim() == 3, *self._svd(side, voters, rank, how, warm))

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
        side, voters = self._factor_voters(x, offsets, weights, extra)
        how = Iteration(oversample, power_iters, tol, seed)
        return _like(x.dim() == 3, *self._svd(side, voters, rank, how, warm))

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
        ragged = Ragged.of(offsets, b.shape[-2], b.device)
        rows_b, rows_a, _, size = self.v.pair(_modules(b), _modules(a), ragged)
        coef = ragged.spread(_per_client(weights, rows_b) * _per_client(scaling, rows_b) * size)
        wide = torch.promote_types(u.dtype, v.dtype)  # one launch serves both sides
        u, v = _modules(u).to(wide), _modules(v).to(wide)
        c, _, _ = algorithm.core(self.v, u, v, rows_b, rows_a, coef)
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
    ) -> Tensors:
        schemas.check_aggregate(b, a, offsets, weights, scaling, warm_u, warm_v)
        schemas.check_settings(rank, basis, tau_rel, anchor, oversample, power_iters, tol)
        whole = Ragged.of(offsets, b.shape[-2], b.device)
        rows_b, rows_a = _modules(b), _modules(a)
        w, s = _per_client(weights, rows_b), _per_client(scaling, rows_b)
        start_u, start_v = (None if x is None else _modules(x) for x in (warm_u, warm_v))
        captured = self.captured and power_iters >= 0
        longest = max(b.shape[-1], a.shape[-1])

        def of_some(some: slice | Tensor, live: Tensor | None) -> Tensors:
            """Modules in which the same rows are alive."""
            stack_b, stack_a, ragged = rows_b[some], rows_a[some], whole
            if live is not None:
                ragged = whole.keeping(torch.bincount(whole.owner[live], minlength=whole.clients))
                stack_b, stack_a = _picked(stack_b, live), _picked(stack_a, live)
            inner = _at_most(rank, ragged.rows, longest)
            how = Iteration(min(oversample, longest), power_iters, tol, seed)

            def run(here: slice) -> Tensors:
                return algorithm.aggregate(
                    self.v,
                    stack_b[here],
                    stack_a[here],
                    ragged,
                    w[some][here],
                    s[some][here],
                    inner,
                    basis,
                    tau_rel,
                    anchor,
                    how,
                    None if start_u is None else start_u[some][here],
                    None if start_v is None else start_v[some][here],
                    _roundoff(b, a),
                    captured,
                )

            together = captured or ragged.rows <= gram_route_limit(inner)
            u, sigma, v, eig_u, eig_v, *told = (
                run(slice(None)) if together else _by_module(run, len(stack_b))
            )
            count = rank + oversample
            eig = _filled(eig_u, count), _filled(eig_v, count)
            return fill(u, rank), _filled(sigma, rank), fill(v, rank), *eig, *told

        dead = None if captured else _dead(rows_b) | _dead(rows_a)  # by shape where captured
        if dead is None or not bool(dead.any()):
            return _like(b.dim() == 3, *of_some(slice(None), None))
        return _like(b.dim() == 3, *_by_pattern(of_some, ~dead))

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
    ) -> Tensors:
        schemas.check_lists(lora_b, lora_a, weights, scaling, warm_u, warm_v)
        packed = pack(list(zip(lora_b, lora_a, strict=True)))
        return self.aggregate(
            packed.b, packed.a, packed.offsets, weights, scaling, rank, basis, tau_rel, anchor,
            oversample, power_iters, tol, warm_u, warm_v, seed,
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

    def _side(self, x: Tensor, offsets: Tensor, max_rank: int = -1) -> tuple[Side, Tensor]:
        Ragged.of(offsets, x.shape[-2], x.device, max_rank)  # columns beyond every rank are zero
        rows, scale = self.v.rows(_modules(x))
        # "left" only names the seeded signs: every single stack draws the same ones.
        return Side("left", rows, Ragged.of(offsets, x.shape[-2], x.device)), scale

    def _voters(
        self,
        x: Tensor,
        offsets: Tensor,
        t: Tensor,
        row_weights: Tensor,
        extra: Tensor | None = None,
    ) -> tuple[Side, Coordinates]:
        side, scale = self._side(x, offsets, t.shape[-1])
        t = _modules(t)[..., : side.ragged.max_rank].double() * scale[..., None]
        return side, Coordinates(t, _modules(row_weights, 2).double(), _extra(extra, side))

    def _factor_voters(
        self, x: Tensor, offsets: Tensor, weights: Tensor, extra: Tensor | None = None
    ) -> tuple[Side, Coordinates]:
        side, _ = self._side(x, offsets)
        votes = side.ragged.spread(_per_client(weights, side.rows))
        t = algorithm.factor_voters(self.v, side)
        return side, Coordinates(t, votes, _extra(extra, side))

    def _matmul(self, side: Side, voters: Coordinates, omega: Tensor) -> Tensor:
        y = algorithm.projector_matmul(self.v, side, voters, _modules(omega))
        return y if omega.dim() == 3 else y[0]

    def _svd(
        self, side: Side, voters: Coordinates, rank: int, how: Iteration, warm: Tensor | None
    ) -> Tensors:
        start = None if warm is None else _modules(warm)

        def run(here: slice) -> Tensors:
            some = Coordinates(voters.t[here], voters.votes[here], voters.extra[here])
            stack, some = _carrying(Side(side.name, side.rows[here], side.ragged), some)
            longest = stack.rows.shape[-1]
            inner = _at_most(rank, stack.ragged.rows + some.extra.shape[-1], longest)
            found = algorithm.projector_svd(
                self.v,
                stack,
                some,
                inner,
                replace(how, oversample=min(how.oversample, longest)),
                None if start is None else start[here],
            )
            held = found.eigenvalues[..., :inner].sum(-1)
            explained = (held / found.trace.where(found.trace > 0, 1.0)).clamp(max=1.0)
            eigenvalues = fill(found.eigenvalues, rank + how.oversample)
            return fill(found.basis, rank), eigenvalues, explained

        return _by_module(run, side.rows.shape[0])


def _carrying(side: Side, voters: Coordinates) -> tuple[Side, Coordinates]:
    """One module's stack without the rows that carry nothing: zero ones, or never used by T.

    A client keeps as many rows as it has rows or columns of T that carry something: the vote of
    column j stands at row j.
    """
    ragged = side.ragged
    used = (~_dead(side.rows) & (voters.t != 0).any(-1)).double()[..., None]
    t = ragged.pad(voters.t * used)[0]
    rows, columns = ragged.pad(used)[0, ..., 0] > 0, (t != 0).any(-2) & ragged.exists
    counts = torch.maximum(rows.sum(-1), columns.sum(-1))
    if int(counts.sum()) in (0, ragged.rows):
        return side, voters
    by_row, by_column = ((~x).to(torch.int8).argsort(dim=-1, stable=True) for x in (rows, columns))
    kept = torch.arange(ragged.max_rank, device=counts.device) < counts[:, None]
    live = (ragged.marks[:-1, None] + by_row)[kept]
    t = t.gather(-2, by_row[..., None].expand_as(t)).gather(-1, by_column[:, None].expand_as(t))
    votes = ragged.pad(voters.votes[..., None])[0, ..., 0].gather(-1, by_column)
    fewer = ragged.keeping(counts)
    return (
        Side(side.name, _picked(side.rows, live), fewer),
        replace(voters, t=t[kept][None, :, : fewer.max_rank], votes=votes[kept][None]),
    )


def _extra(extra: Tensor | None, side: Side) -> Tensor:
    """Further columns in the working precision; none where the caller gave none."""
    return (side.rows[:, :0].mT if extra is None else _modules(extra)).to(working(side.rows.dtype))
