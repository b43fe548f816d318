"""The ops' bodies: shapes and dtypes in order, then the algorithm in a device's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from glora_ops import algorithm
from glora_ops.errors import require
from glora_ops.isolation import exact_products
from glora_ops.krylov_route import Iteration
from glora_ops.packing import pack
from glora_ops.ragged import Ragged
from glora_ops.solver import Coordinates, Principal, Side, fill, gram_route_limit
from glora_ops.vocabulary import Vocabulary

from . import schemas

__all__ = ["register"]


def _roundoff(*factors: Tensor) -> float:
    """Unit roundoff of the coarsest dtype the factors are stored in."""
    return max(torch.finfo(x.dtype).eps / 2 for x in factors)


def _modules(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[None]


def _per_client(x: Tensor, modules: int) -> Tensor:
    return x.double().expand(modules, -1)


def _like(batched: bool, *outputs: Tensor) -> tuple[Tensor, ...]:
    return outputs if batched else tuple(x[0] for x in outputs)


def _by_module(run: Callable[..., tuple[Tensor, ...]], modules: int) -> tuple[Tensor, ...]:
    """Run one module at a time and stack: an adaptive iteration stops for each on its own."""
    return tuple(torch.cat(parts) for parts in zip(*(run(l) for l in range(modules)), strict=True))


class Ops:
    """Bodies of ``torch.ops.glora.*`` over one vocabulary; names and arguments as the schemas'."""

    def __init__(self, v: Vocabulary) -> None:
        self.v = v

    def canonicalize(self, b, a, offsets, scaling, tau_rel=0.1, max_rank=-1):
        schemas.check_pair(b, a)
        schemas.check_offsets(offsets)
        schemas.check_clients("scaling", scaling, offsets, b)
        ragged = Ragged.of(offsets, b.shape[-2], b.device, max_rank)
        rows_b, rows_a, scale = self.v.pair(_modules(b), _modules(a))
        clients = algorithm.canonicalize(
            self.v, self.v.gram(rows_b, ragged), self.v.gram(rows_a, ragged), ragged,
            _per_client(scaling, rows_b.shape[0]), tau_rel, _roundoff(b, a),
        )  # fmt: skip
        t_u, t_v = clients.t_u / scale[..., None], clients.t_v * scale[..., None]
        return _like(b.dim() == 3, t_u, t_v, clients.sigma, clients.f)

    def _voters(self, x, offsets, t, row_weights, extra=None):
        schemas.check_coordinates(x, offsets, t, row_weights)
        side, scale = self._side(x, offsets, t.shape[-1])
        return side, self._coordinates(side, _modules(t) * scale[..., None], row_weights, extra)

    def _factor_voters(self, x, offsets, weights, extra=None):
        schemas.check_stack("x", x)
        schemas.check_offsets(offsets)
        schemas.check_clients("weights", weights, offsets, x)
        side, _ = self._side(x, offsets)
        votes = side.ragged.spread(_per_client(weights, side.rows.shape[0]))
        return side, self._coordinates(side, algorithm.factor_voters(self.v, side), votes, extra)

    def _side(self, x, offsets, max_rank=-1):
        rows, scale = self.v.rows(_modules(x))
        # "left" only names the seeded signs: every single stack draws the same ones.
        return Side("left", rows, Ragged.of(offsets, x.shape[-2], x.device, max_rank)), scale

    def _coordinates(self, side, t, votes, extra):
        rows = side.rows
        if extra is None:
            extra = rows.new_zeros(rows.shape[0], rows.shape[-1], 0)
        return Coordinates(
            t.double(), _modules_rows(votes).double(), _modules(extra).to(rows.dtype)
        )

    def projector_matmul(self, x, offsets, t, row_weights, omega):
        schemas.check_columns("omega", omega, x)
        side, voters = self._voters(x, offsets, t, row_weights)
        y = algorithm.projector_matmul(self.v, side, voters, _modules(omega))
        return y if x.dim() == 3 else y[0]

    def projector_matmul_factors(self, x, offsets, weights, omega):
        schemas.check_columns("omega", omega, x)
        side, voters = self._factor_voters(x, offsets, weights)
        y = algorithm.projector_matmul(self.v, side, voters, _modules(omega))
        return y if x.dim() == 3 else y[0]

    def projector_svd(self, x, offsets, t, row_weights, rank, oversample=16, power_iters=-1,
                      tol=1e-3, extra=None, warm=None, seed=0):  # fmt: skip
        side, voters = self._voters(x, offsets, t, row_weights, extra)
        return self._svd(side, voters, rank, oversample, power_iters, tol, warm, seed, x.dim() == 3)

    def projector_svd_factors(self, x, offsets, weights, rank, oversample=16, power_iters=-1,
                              tol=1e-3, extra=None, warm=None, seed=0):  # fmt: skip
        side, voters = self._factor_voters(x, offsets, weights, extra)
        return self._svd(side, voters, rank, oversample, power_iters, tol, warm, seed, x.dim() == 3)

    def _svd(self, side, voters, rank, oversample, power_iters, tol, warm, seed, batched):
        schemas.check_solver(rank, oversample, power_iters, tol)
        how = Iteration(oversample, power_iters, tol, seed)
        warm = None if warm is None else _modules(warm)

        def finish(found: Principal) -> tuple[Tensor, ...]:
            top = found.eigenvalues[..., :rank].sum(-1)
            explained = (top / found.trace.where(found.trace > 0, 1.0)).clamp(max=1.0)
            return found.basis, fill(found.eigenvalues, rank + oversample), explained

        def one(l: int) -> tuple[Tensor, ...]:
            here = slice(l, l + 1)
            return finish(algorithm.projector_svd(
                self.v,
                Side(side.name, side.rows[here], side.ragged),
                Coordinates(voters.t[here], voters.votes[here], voters.extra[here]),
                rank, how, None if warm is None else warm[here],
            ))  # fmt: skip

        return _like(batched, *_by_module(one, side.rows.shape[0]))

    def core(self, u, v, b, a, offsets, weights, scaling):
        schemas.check_pair(b, a)
        schemas.check_columns("u", u, b)
        schemas.check_columns("v", v, a)
        schemas.check_offsets(offsets)
        schemas.check_clients("weights", weights, offsets, b)
        schemas.check_clients("scaling", scaling, offsets, b)
        ragged = Ragged.of(offsets, b.shape[-2], b.device)
        rows_b, rows_a, _ = self.v.pair(_modules(b), _modules(a))
        modules = rows_b.shape[0]
        coef = ragged.spread(_per_client(weights, modules) * _per_client(scaling, modules))
        c, _, _ = algorithm.core(self.v, _modules(u), _modules(v), rows_b, rows_a, coef)
        return c if b.dim() == 3 else c[0]

    def aggregate(self, b, a, offsets, weights, scaling, rank, basis="consensus", tau_rel=0.1,
                  anchor=0.5, oversample=16, power_iters=-1, tol=1e-3, warm_u=None, warm_v=None,
                  seed=0):  # fmt: skip
        schemas.check_aggregate(b, a, offsets, weights, scaling, rank, basis, tau_rel, anchor,
                                oversample, power_iters, tol, warm_u, warm_v, seed)  # fmt: skip
        ragged = Ragged.of(offsets, b.shape[-2], b.device)
        how = Iteration(oversample, power_iters, tol, seed)
        stacks = _modules(b), _modules(a)
        modules = stacks[0].shape[0]
        shared = _per_client(weights, modules), _per_client(scaling, modules)
        warm = [None if w is None else _modules(w) for w in (warm_u, warm_v)]

        def run(here: slice) -> tuple[Tensor, ...]:
            return algorithm.aggregate(
                self.v, stacks[0][here], stacks[1][here], ragged, shared[0][here],
                shared[1][here], rank, basis, tau_rel, anchor, how,
                *(None if w is None else w[here] for w in warm), _roundoff(b, a),
            )  # fmt: skip

        if ragged.rows <= gram_route_limit(rank):
            out = run(slice(None))
        else:
            out = _by_module(lambda l: run(slice(l, l + 1)), modules)
        return _like(b.dim() == 3, *out)

    def aggregate_list(self, lora_B, lora_A, weights, scaling, rank, *settings):
        schemas.check_lists(lora_B, lora_A)
        packed = pack(list(zip(lora_B, lora_A, strict=True)))
        return self.aggregate(packed.b, packed.a, packed.offsets, weights, scaling, rank, *settings)

    def readout(self, u, s, v, rank, scaling=1.0, pad="zero", seed=0):
        require(rank >= 1, "rank", rank, "an integer ≥ 1")
        require(scaling > 0, "scaling", scaling, "the receiving adapter's alpha/r, above zero")
        schemas.check_choice("pad", pad, schemas.PADS)
        require(
            u.shape[-1] == s.shape[-1] == v.shape[-1] and u.shape[:-2] == s.shape[:-1],
            "s",
            tuple(s.shape),
            f"one value per column of u {tuple(u.shape)} and v {tuple(v.shape)}",
        )
        batched = u.dim() == 3
        u, v, s = _modules(u), _modules(v), s if batched else s[None]
        return _like(batched, *algorithm.readout(u, s, v, rank, scaling, pad, seed))


def _modules_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x[None]


def register(v: Vocabulary, key: str) -> None:
    """Bind every op to a dispatch key, run under `exact_products`, outputs contiguous."""
    ops = Ops(v)
    for name in schemas.NAMES:
        schemas.LIBRARY.impl(name, _isolated(getattr(ops, name.replace(".", "_"))), key)


def _isolated(body: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        with exact_products():
            out = body(*args, **kwargs)
        if isinstance(out, Tensor):
            return out.contiguous()
        return tuple(x.contiguous() for x in out)

    return run
