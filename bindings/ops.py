"""The ops: for each its schema, what is checked, what comes out, and its body in any vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from glora_ops import algorithm
from glora_ops.certificates import CLIENT_STATS, STATS
from glora_ops.errors import require
from glora_ops.krylov import Iteration
from glora_ops.packing import check_pair, pack, shown
from glora_ops.ragged import Ragged
from glora_ops.solver import Coordinates, Side, fill, gram_route_limit
from glora_ops.vocabulary import Vocabulary, working

from . import checks
from .library import Op, Ops, Outputs, Tensors, schema

__all__ = ["Aggregate", "Ops", "Readout"]

F64 = torch.float64


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any factor is fp64, otherwise fp32."""
    return F64 if any(t.dtype == F64 for t in tensors) else torch.float32


def _modules(x: Tensor, dim: int = 3) -> Tensor:
    """With the module dimension, added where the caller left it out."""
    return x if x.dim() == dim else x[None]


def _per_client(x: Tensor, stack: Tensor) -> Tensor:
    return x.to(stack.device, F64).expand(stack.shape[0], -1)


def _roundoff(*factors: Tensor) -> float:
    """Unit roundoff of the coarsest dtype the factors are stored in."""
    return max(torch.finfo(x.dtype).eps / 2 for x in factors)


def _by_module(run: Callable[[slice], Tensors], modules: int) -> Tensors:
    """Run one module at a time and stack: an adaptive iteration stops for each on its own."""
    parts = [run(slice(l, l + 1)) for l in range(modules)]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


@schema(
    "canonicalize(Tensor b, Tensor a, Tensor offsets, Tensor scaling, float tau_rel=0.1, "
    "int max_rank=-1) -> (Tensor t_u, Tensor t_v, Tensor sigma, Tensor f)"
)
class Canonicalize(Op):
    """Clients' canonical forms: T_U, T_V (N, r_max), σ and soft votes f (N)."""

    def check(self) -> None:
        checks.pair(self.b, self.a)
        checks.clients(self.b, self.offsets, scaling=self.scaling)

    def outputs(self) -> Outputs:
        rows = self.b.shape[-2]
        width: int | torch.SymInt = self.max_rank
        if width < 0:
            width = torch.library.get_ctx().new_dynamic_size()
        return ((rows, width), F64), ((rows, width), F64), ((rows,), F64), ((rows,), F64)

    def body(self, device: Ops) -> Tensors:
        v = device.v
        ragged = Ragged.of(self.offsets, self.b.shape[-2], self.b.device, self.max_rank)
        b, a, scale = v.pair(_modules(self.b), _modules(self.a))
        clients = algorithm.canonicalize(
            v,
            v.gram(b, ragged),
            v.gram(a, ragged),
            ragged,
            _per_client(self.scaling, b),
            self.tau_rel,
            _roundoff(self.b, self.a),
        )
        t_u, t_v = clients.t_u / scale[..., None], clients.t_v * scale[..., None]
        return t_u, t_v, clients.sigma, clients.f


class _Voters(Op):
    """One stack x of clients that vote in coordinates t, column j of T_i with its row's weight."""

    def check_voters(self) -> None:
        checks.stack("x", self.x)
        checks.clients(self.x, self.offsets)
        rows, t, votes = tuple(self.x.shape[:-1]), self.t, self.row_weights
        per_row = f"floats, one row per row of the stack, {(*rows, 'max_rank')}"
        checks.floats("t", t, t.shape[:-1] == rows, per_row, "canonicalize makes it")
        per_row = f"floats, one per row of the stack, {rows}"
        checks.floats("row_weights", votes, votes.shape == rows, per_row)

    def voters(self, v: Vocabulary, extra: Tensor | None = None) -> tuple[Side, Coordinates]:
        side, scale = self.side(v, self.t.shape[-1])
        t = _modules(self.t).double() * scale[..., None]
        return side, Coordinates(t, _modules(self.row_weights, 2).double(), _extra(extra, side))

    def side(self, v: Vocabulary, max_rank: int = -1) -> tuple[Side, Tensor]:
        rows, scale = v.rows(_modules(self.x))
        ragged = Ragged.of(self.offsets, self.x.shape[-2], self.x.device, max_rank)
        # "left" only names the seeded signs: every single stack draws the same ones.
        return Side("left", rows, ragged), scale


class _FactorVoters(_Voters):
    """One stack x of clients that vote with the whole span of their rows, each with its weight."""

    def check_voters(self) -> None:
        checks.stack("x", self.x)
        checks.clients(self.x, self.offsets, weights=self.weights)

    def voters(self, v: Vocabulary, extra: Tensor | None = None) -> tuple[Side, Coordinates]:
        side, _ = self.side(v)
        votes = side.ragged.spread(_per_client(self.weights, side.rows))
        return side, Coordinates(algorithm.factor_voters(v, side), votes, _extra(extra, side))


def _extra(extra: Tensor | None, side: Side) -> Tensor:
    """Further columns in the working precision; none where the caller gave none."""
    return (side.rows[:, :0].mT if extra is None else _modules(extra)).to(working(side.rows.dtype))


@schema(
    "projector_matmul(Tensor x, Tensor offsets, Tensor t, Tensor row_weights, Tensor omega) "
    "-> Tensor"
)
class ProjectorMatmul(_Voters):
    """y = Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω (d, k)."""

    def check(self) -> None:
        self.check_voters()
        checks.columns("omega", self.omega, self.x)

    def outputs(self) -> Outputs:
        return ((tuple(self.omega.shape[-2:]), result_dtype(self.x)),)

    def body(self, device: Ops) -> Tensors:
        side, voters = self.voters(device.v)
        return (algorithm.projector_matmul(device.v, side, voters, _modules(self.omega)),)


@schema(
    "projector_matmul.factors(Tensor x, Tensor offsets, Tensor weights, Tensor omega) -> Tensor"
)
class ProjectorMatmulFactors(_FactorVoters, ProjectorMatmul):
    """y = Σ_i w_i P_i Ω (d, k), P_i the orthogonal projector on the span of client i's rows."""


# What both forms of `projector_svd` take and return beside their voters.
_SVD = (
    "int rank, int oversample=16, int power_iters=-1, float tol=1e-3, Tensor? extra=None, "
    "Tensor? warm=None, int seed=0) -> (Tensor basis, Tensor eigenvalues, Tensor explained)"
)


@schema(f"projector_svd(Tensor x, Tensor offsets, Tensor t, Tensor row_weights, {_SVD}")
class ProjectorSvd(_Voters):
    """Basis (d, R), eigenvalues (R + p) and explained fraction of the sum of projectors."""

    def check(self) -> None:
        self.check_voters()
        checks.columns("extra", self.extra, self.x)
        checks.columns("warm", self.warm, self.x)

    def outputs(self) -> Outputs:
        basis = (self.x.shape[-1], self.rank)
        return (basis, result_dtype(self.x)), ((self.rank + self.oversample,), F64), ((), F64)

    def body(self, device: Ops) -> Tensors:
        side, voters = self.voters(device.v, self.extra)
        how = Iteration(self.oversample, self.power_iters, self.tol, self.seed)
        warm = None if self.warm is None else _modules(self.warm)

        def run(here: slice) -> Tensors:
            found = algorithm.projector_svd(
                device.v,
                Side(side.name, side.rows[here], side.ragged),
                Coordinates(voters.t[here], voters.votes[here], voters.extra[here]),
                self.rank,
                how,
                None if warm is None else warm[here],
            )
            held = found.eigenvalues[..., : self.rank].sum(-1)
            explained = (held / found.trace.where(found.trace > 0, 1.0)).clamp(max=1.0)
            return found.basis, fill(found.eigenvalues, self.rank + self.oversample), explained

        return _by_module(run, side.rows.shape[0])


@schema(f"projector_svd.factors(Tensor x, Tensor offsets, Tensor weights, {_SVD}")
class ProjectorSvdFactors(_FactorVoters, ProjectorSvd):
    """The same of Σ_i w_i P_i, P_i the orthogonal projector on the span of client i's rows."""


@schema(
    "core(Tensor u, Tensor v, Tensor b, Tensor a, Tensor offsets, Tensor weights, "
    "Tensor scaling) -> Tensor"
)
class Core(Op):
    """C = Σ w_i s_i (UᵀB_i)(A_iV) (R_u, R_v)."""

    def check(self) -> None:
        checks.pair(self.b, self.a)
        checks.columns("u", self.u, self.b)
        checks.columns("v", self.v, self.a)
        checks.clients(self.b, self.offsets, weights=self.weights, scaling=self.scaling)

    def outputs(self) -> Outputs:
        return (((self.u.shape[-1], self.v.shape[-1]), F64),)

    def body(self, device: Ops) -> Tensors:
        ragged = Ragged.of(self.offsets, self.b.shape[-2], self.b.device)
        b, a, _ = device.v.pair(_modules(self.b), _modules(self.a))
        coef = ragged.spread(_per_client(self.weights, b) * _per_client(self.scaling, b))
        wide = torch.promote_types(self.u.dtype, self.v.dtype)  # one launch serves both sides
        u, v = _modules(self.u).to(wide), _modules(self.v).to(wide)
        return algorithm.core(device.v, u, v, b, a, coef)[:1]


# What both forms of `aggregate` take and return beside their factors.
_AGGREGATE = (
    'Tensor weights, Tensor scaling, int rank, str basis="consensus", float tau_rel=0.1, '
    "float anchor=1.0, int oversample=16, int power_iters=-1, float tol=1e-3, "
    "Tensor? warm_u=None, Tensor? warm_v=None, int seed=0) -> (Tensor u, Tensor s, Tensor v, "
    "Tensor eig_u, Tensor eig_v, Tensor stats, Tensor client_stats)"
)


@schema(f"aggregate(Tensor b, Tensor a, Tensor offsets, {_AGGREGATE}")
class Aggregate(Op):
    """The server step: Ŵ = u·diag(s)·vᵀ, u (d_out, R), v (d_in, R), and its certificates."""

    def check(self) -> None:
        checks.pair(self.b, self.a)
        checks.clients(self.b, self.offsets, weights=self.weights, scaling=self.scaling)
        checks.columns("warm_u", self.warm_u, self.b)
        checks.columns("warm_v", self.warm_v, self.a)

    def outputs(self) -> Outputs:
        dtype = result_dtype(self.b, self.a)
        return self.state(self.b.shape[-1], self.a.shape[-1], self.offsets.shape[0] - 1, dtype)

    def state(self, d_out: int, d_in: int, clients: int, dtype: torch.dtype) -> Outputs:
        eigenvalues = ((self.rank + self.oversample,), F64)
        return (
            ((d_out, self.rank), dtype),
            ((self.rank,), F64),
            ((d_in, self.rank), dtype),
            eigenvalues,
            eigenvalues,
            ((len(STATS),), F64),
            ((clients, len(CLIENT_STATS)), F64),
        )

    def body(self, device: Ops) -> Tensors:
        ragged = Ragged.of(self.offsets, self.b.shape[-2], self.b.device)
        b, a = _modules(self.b), _modules(self.a)
        weights, scaling = _per_client(self.weights, b), _per_client(self.scaling, b)
        warm_u, warm_v = (None if x is None else _modules(x) for x in (self.warm_u, self.warm_v))
        captured = device.captured and self.power_iters >= 0

        def run(here: slice) -> Tensors:
            return algorithm.aggregate(
                device.v,
                b[here],
                a[here],
                ragged,
                weights[here],
                scaling[here],
                self.rank,
                self.basis,
                self.tau_rel,
                self.anchor,
                Iteration(self.oversample, self.power_iters, self.tol, self.seed),
                None if warm_u is None else warm_u[here],
                None if warm_v is None else warm_v[here],
                _roundoff(b, a),
                captured,
            )

        together = captured or ragged.rows <= gram_route_limit(self.rank)
        return run(slice(None)) if together else _by_module(run, b.shape[0])


@schema(f"aggregate.list(Tensor[] lora_B, Tensor[] lora_A, {_AGGREGATE}")
class AggregateList(Aggregate):
    """The same from PEFT's matrices (d_out, r_i) and (r_i, d_in)."""

    def check(self) -> None:
        clients = len(self.lora_B)
        require(
            clients == len(self.lora_A) >= 1,
            "lora_A",
            f"{len(self.lora_A)} matrices beside {clients} in lora_B",
            "one lora_A for every lora_B, and at least one client",
        )
        for i, (b, a) in enumerate(zip(self.lora_B, self.lora_A, strict=True)):
            check_pair(f"client {i}", b, a, self.lora_B[0], self.lora_A[0])
        checks.per_client("weights", self.weights, clients, self.lora_A[0])
        checks.per_client("scaling", self.scaling, clients, self.lora_A[0])
        checks.columns("warm_u", self.warm_u, self.lora_B[0].mT)
        checks.columns("warm_v", self.warm_v, self.lora_A[0])

    def outputs(self) -> Outputs:
        d_out, d_in = self.lora_B[0].shape[0], self.lora_A[0].shape[1]
        dtype = result_dtype(*self.lora_B, *self.lora_A)
        return self.state(d_out, d_in, len(self.lora_B), dtype)

    def body(self, device: Ops) -> Tensors:
        rest = dict(vars(self))
        packed = pack(list(zip(rest.pop("lora_B"), rest.pop("lora_A"), strict=True)))
        return Aggregate(packed.b, packed.a, packed.offsets, **rest).body(device)


@schema(
    "readout(Tensor u, Tensor s, Tensor v, int rank, float scaling=1.0, "
    'str pad="zero", int seed=0) -> (Tensor lora_b, Tensor lora_a)'
)
class Readout(Op):
    """An adapter of any rank in PEFT's layouts, (d_out, r) and (r, d_in)."""

    scaling: float

    def check(self) -> None:
        require(
            0 < self.scaling < inf,
            "scaling",
            self.scaling,
            "the receiving adapter's alpha/r, finite, above zero",
        )
        u, s, v = self.u, self.s, self.v
        shape = "floats (d, R) or (L, d, R)"
        for name, x in (("u", u), ("v", v)):
            checks.floats(name, x, x.dim() in (2, 3), shape, "aggregate makes it")
        fits = all(s.shape == (*x.shape[:-2], x.shape[-1]) for x in (u, v))
        shape = f"one float per column of u {tuple(u.shape)} and v {tuple(v.shape)}"
        checks.floats("s", s, fits, shape)
        require(u.dtype == v.dtype, "v", shown(v), f"{u.dtype}".replace("torch.", "") + ", as u")

    def outputs(self) -> Outputs:
        d_out, d_in = self.u.shape[-2], self.v.shape[-2]
        return ((d_out, self.rank), self.u.dtype), ((self.rank, d_in), self.v.dtype)

    def body(self, device: Ops) -> Tensors:
        u, s, v = _modules(self.u), _modules(self.s, 2), _modules(self.v)
        return algorithm.readout(device.v, u, s, v, self.rank, self.scaling, self.pad, self.seed)
