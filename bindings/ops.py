"""The ops' bodies: shapes and dtypes in order, then the algorithm in a device's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from glora_ops import algorithm
from glora_ops.isolation import exact_products, one_thread
from glora_ops.linalg.ragged import Ragged
from glora_ops.linalg.vocabulary import Vocabulary, working
from glora_ops.packing import pack
from glora_ops.solvers.base import Coordinates, Side, fill, gram_route_limit
from glora_ops.solvers.krylov import Iteration

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
        ragged = Ragged.of(offsets, b.shape[-2], b.device, max_rank)
        rows_b, rows_a, scale = self.v.pair(_modules(b), _modules(a))
        clients = algorithm.canonicalize(
            self.v,
            self.v.gram(rows_b, ragged),
            self.v.gram(rows_a, ragged),
            ragged,
            _per_client(scaling, rows_b),
            tau_rel,
            _roundoff(b, a),
        )
        t_u, t_v = clients.t_u / scale[..., None], clients.t_v * scale[..., None]
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
        rows_b, rows_a, _ = self.v.pair(_modules(b), _modules(a))
        coef = ragged.spread(_per_client(weights, rows_b) * _per_client(scaling, rows_b))
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
        ragged = Ragged.of(offsets, b.shape[-2], b.device)
        rows_b, rows_a = _modules(b), _modules(a)
        modules = rows_b.shape[0]
        w, s = _per_client(weights, rows_b), _per_client(scaling, rows_b)
        start_u, start_v = (None if x is None else _modules(x) for x in (warm_u, warm_v))
        captured = self.captured and power_iters >= 0

        def run(here: slice) -> Tensors:
            return algorithm.aggregate(
                self.v,
                rows_b[here],
                rows_a[here],
                ragged,
                w[here],
                s[here],
                rank,
                basis,
                tau_rel,
                anchor,
                Iteration(oversample, power_iters, tol, seed),
                None if start_u is None else start_u[here],
                None if start_v is None else start_v[here],
                _roundoff(b, a),
                captured,
            )

        together = captured or ragged.rows <= gram_route_limit(rank)
        return _like(b.dim() == 3, *(run(slice(None)) if together else _by_module(run, modules)))

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
        rows, scale = self.v.rows(_modules(x))
        # "left" only names the seeded signs: every single stack draws the same ones.
        return Side("left", rows, Ragged.of(offsets, x.shape[-2], x.device, max_rank)), scale

    def _voters(
        self,
        x: Tensor,
        offsets: Tensor,
        t: Tensor,
        row_weights: Tensor,
        extra: Tensor | None = None,
    ) -> tuple[Side, Coordinates]:
        side, scale = self._side(x, offsets, t.shape[-1])
        t = _modules(t).double() * scale[..., None]
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
            found = algorithm.projector_svd(
                self.v,
                Side(side.name, side.rows[here], side.ragged),
                Coordinates(voters.t[here], voters.votes[here], voters.extra[here]),
                rank,
                how,
                None if start is None else start[here],
            )
            held = found.eigenvalues[..., :rank].sum(-1)
            explained = (held / found.trace.where(found.trace > 0, 1.0)).clamp(max=1.0)
            return found.basis, fill(found.eigenvalues, rank + how.oversample), explained

        return _by_module(run, side.rows.shape[0])


def _extra(extra: Tensor | None, side: Side) -> Tensor:
    """Further columns in the working precision; none where the caller gave none."""
    return (side.rows[:, :0].mT if extra is None else _modules(extra)).to(working(side.rows.dtype))
