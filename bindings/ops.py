"""The ops: for each its schema, what is checked, what comes out, and its body in any vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from glora_ops import algorithm
from glora_ops.certificates import CLIENT_STATS, STATS
from glora_ops.errors import require
from glora_ops.linalg.canonical import positive
from glora_ops.linalg.ragged import Ragged
from glora_ops.linalg.vocabulary import Vocabulary, working
from glora_ops.packing import check_pair, pack, shown
from glora_ops.runtime import scratch
from glora_ops.runtime.threads import all_threads
from glora_ops.solvers.base import Factors, Settings, fill
from glora_ops.solvers.nspace_exact import exact_limit
from glora_ops.solvers.operators import Voters
from glora_ops.solvers.tall import TallSolver

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


def _by_module(run: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """One module at a time, stacked again: an adaptive iteration stops for each on its own."""

    def each(first: Tensor, *rest: Tensor | None) -> Tensors:
        parts = [
            run(*(None if x is None else x[l : l + 1] for x in (first, *rest)))
            for l in range(len(first))
        ]
        return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    return each


def _at_most(rank: int, rows: int, longest: int) -> int:
    """The rank worked with: one direction more than there can be, and zeros from there on."""
    return min(rank, min(rows, longest) + 1)


def _alive(b: Tensor, a: Tensor) -> Tensor | None:
    """(L, N) bool: pairs with no zero row, None if all; only what begins with zeros is read on."""
    begins = b[..., :16].any(-1) & a[..., :16].any(-1)
    return None if bool(begins.all()) else b.any(-1) & a.any(-1)


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
        rows, where = self.b.shape[-2], self.b.device
        width = Ragged.of(self.offsets, rows, where, self.max_rank).max_rank
        solver = _factors(self, device.v, Settings(1, tau_rel=self.tau_rel))
        clients, scale = solver.clients, solver.scale[..., None]
        size = solver.ragged.per_row(solver.size)[..., None]
        t_u, t_v = clients.t_u / scale, clients.t_v * scale / size
        return fill(t_u, width), fill(t_v, width), clients.sigma, clients.soft


def _factors(op: Op, v: Vocabulary, s: Settings) -> TallSolver:
    """The factors of all of an op's modules, in a range where products are safe."""
    b, a = _modules(op.b), _modules(op.a)
    ragged = Ragged.of(op.offsets, b.shape[-2], b.device)
    return TallSolver(v, Factors(b, a, ragged, _per_client(op.scaling, b), _roundoff(b, a)), s)


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

    def voters(self, v: Vocabulary, extra: Tensor | None = None) -> tuple[Tensor, Ragged, Voters]:
        rows, ragged, scale = self.side(v, self.t.shape[-1])
        t = _modules(self.t)[..., : ragged.max_rank].double() * scale[..., None]
        votes = _modules(self.row_weights, 2).double()
        return rows, ragged, Voters(t, votes, _extra(extra, rows))

    def side(self, v: Vocabulary, max_rank: int = -1) -> tuple[Tensor, Ragged, Tensor]:
        Ragged.of(self.offsets, self.x.shape[-2], self.x.device, max_rank)  # more columns are zero
        rows, scale = v.rows(_modules(self.x))
        return rows, Ragged.of(self.offsets, self.x.shape[-2], self.x.device), scale


class _FactorVoters(_Voters):
    """One stack x of clients that vote with the whole span of their rows, each with its weight."""

    def check_voters(self) -> None:
        checks.stack("x", self.x)
        checks.clients(self.x, self.offsets, weights=self.weights)

    def voters(self, v: Vocabulary, extra: Tensor | None = None) -> tuple[Tensor, Ragged, Voters]:
        rows, ragged, _ = self.side(v)
        votes = ragged.per_row(_per_client(self.weights, rows))
        t = algorithm.factor_voters(v, rows, ragged)
        return rows, ragged, Voters(t, votes, _extra(extra, rows))


def _carrying(rows: Tensor, ragged: Ragged, voters: Voters) -> tuple[Tensor, Ragged, Voters]:
    """One module's stack without the rows that carry nothing: zero ones, or never used by T.

    A client keeps as many rows as it has rows or columns of T that carry something: the vote of
    column j stands at row j.
    """
    alive, needed = _alive(rows, rows), voters.t.any(-1)
    used = (needed if alive is None else needed & alive).double()[..., None]
    t = ragged.pad(voters.t * used)[0]
    lines, columns = ragged.pad(used)[0, ..., 0] > 0, (t != 0).any(-2) & ragged.exists
    counts = torch.maximum(lines.sum(-1), columns.sum(-1))
    if int(counts.sum()) in (0, ragged.rows):
        return rows, ragged, voters
    by_row, by_column = ((~x).to(torch.int8).argsort(dim=-1, stable=True) for x in (lines, columns))
    kept = torch.arange(ragged.max_rank, device=counts.device) < counts[:, None]
    live = (ragged.marks[:-1, None] + by_row)[kept]
    t = t.gather(-2, by_row[..., None].expand_as(t)).gather(-1, by_column[:, None].expand_as(t))
    votes = ragged.pad(voters.votes[..., None])[0, ..., 0].gather(-1, by_column)
    fewer = ragged.keeping(counts)
    t, votes = t[kept][None, :, : fewer.max_rank], votes[kept][None]
    return _picked(rows, live), fewer, Voters(t, votes, voters.extra)


def _extra(extra: Tensor | None, rows: Tensor) -> Tensor:
    """Further columns in the working precision; none where the caller gave none."""
    return (rows[:, :0].mT if extra is None else _modules(extra)).to(working(rows.dtype))


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
        rows, ragged, voters = self.voters(device.v)
        return (algorithm.projector_matmul(device.v, rows, ragged, voters, _modules(self.omega)),)


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
        rows, ragged, voters = self.voters(device.v, self.extra)
        warm = None if self.warm is None else _modules(self.warm)

        def run(
            rows: Tensor, t: Tensor, votes: Tensor, extra: Tensor, start: Tensor | None
        ) -> Tensors:
            stack, kept, some = _carrying(rows, ragged, Voters(t, votes, extra))
            longest = stack.shape[-1]
            inner = _at_most(self.rank, kept.rows + some.extra.shape[-1], longest)
            s = Settings(
                inner,
                oversample=min(self.oversample, longest),
                power_iters=self.power_iters,
                tol=self.tol,
                seed=self.seed,
            )
            basis, values, trace = algorithm.projector_svd(device.v, stack, kept, some, s, start)
            explained = (values[..., :inner].sum(-1) / positive(trace)).clamp(max=1.0)
            return fill(basis, self.rank), fill(values, self.rank + self.oversample), explained

        return _by_module(run)(rows, voters.t, voters.votes, voters.extra, warm)


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
        solver = _factors(self, device.v, Settings(1))
        wide = torch.promote_types(self.u.dtype, self.v.dtype)  # one launch serves both sides
        u, v = _modules(self.u).to(wide), _modules(self.v).to(wide)
        coef = solver.coefficients(_per_client(self.weights, solver.b))
        return device.v.core(solver.b, solver.a, u, v, coef)[:1]


@schema(
    "client_stats(Tensor b, Tensor a, Tensor offsets, Tensor weights, Tensor scaling, "
    "Tensor u, Tensor s, Tensor v) -> Tensor"
)
class ClientStats(Op):
    """`aggregate`'s client_stats (K, 4) for given bases and singular values of the update."""

    def check(self) -> None:
        checks.pair(self.b, self.a)
        checks.clients(self.b, self.offsets, weights=self.weights, scaling=self.scaling)
        checks.columns("u", self.u, self.b)
        checks.columns("v", self.v, self.a)
        checks.spectrum(self.u, self.s, self.v)

    def outputs(self) -> Outputs:
        return (((self.offsets.shape[0] - 1, len(CLIENT_STATS)), F64),)

    def body(self, device: Ops) -> Tensors:
        v, solver = device.v, _factors(self, device.v, Settings(1))
        reach = v.times(solver.b, _modules(self.u)), v.times(solver.a, _modules(self.v))
        coef = solver.coefficients(_per_client(self.weights, solver.b))
        return (
            algorithm.client_stats(
                solver.v, solver.clients, reach, _modules(self.s, 2).double(), coef
            ),
        )


# What both forms of `aggregate` take and return beside their factors.
_AGGREGATE = (
    'Tensor weights, Tensor scaling, int rank, str basis="consensus", float tau_rel=0.1, '
    "float anchor=1.0, int oversample=16, int power_iters=-1, float tol=1e-3, "
    "Tensor? warm_u=None, Tensor? warm_v=None, int seed=0, bool client_statistics=True) "
    "-> (Tensor u, Tensor s, Tensor v, "
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
            ((clients * self.client_statistics, len(CLIENT_STATS)), F64),
        )

    def body(self, device: Ops) -> Tensors:
        whole = Ragged.of(self.offsets, self.b.shape[-2], self.b.device)
        b, a = _modules(self.b), _modules(self.a)
        longest = max(b.shape[-1], a.shape[-1])
        weights, scaling = _per_client(self.weights, b), _per_client(self.scaling, b)
        warm_u, warm_v = (None if x is None else _modules(x) for x in (self.warm_u, self.warm_v))
        fixed, roundoff = device.fixed_steps and self.power_iters >= 0, _roundoff(b, a)

        def of_some(
            ragged: Ragged, b: Tensor, a: Tensor, weights: Tensor, scaling: Tensor,
            *warm: Tensor | None,
        ) -> Tensors:  # fmt: skip
            """Modules in which the same rows are alive."""
            s = Settings(
                _at_most(self.rank, ragged.rows, longest),
                self.basis,
                self.tau_rel,
                self.anchor,
                min(self.oversample, longest),
                self.power_iters,
                self.tol,
                self.seed,
                self.client_statistics,
            )

            def run(
                b: Tensor, a: Tensor, weights: Tensor, scaling: Tensor, *warm: Tensor | None
            ) -> Tensors:
                factors = Factors(b, a, ragged, scaling, roundoff)
                solver = algorithm.choose(device.v, factors, s, fixed)
                return algorithm.aggregate(solver, weights, s, (warm[0], warm[1]))

            together = fixed or ragged.rows <= exact_limit(s.rank)
            u, sigma, v, eig_u, eig_v, *told = (run if together else _by_module(run))(
                b, a, weights, scaling, *warm
            )
            count = self.rank + self.oversample
            eig = fill(eig_u, count), fill(eig_v, count)
            return fill(u, self.rank), fill(sigma, self.rank), fill(v, self.rank), *eig, *told

        alive = None if fixed else _alive(b, a)  # by shape where the steps are fixed
        if alive is None:
            return of_some(whole, b, a, weights, scaling, warm_u, warm_v)

        def of_pattern(some: Tensor, live: Tensor) -> Tensors:
            ragged = whole.keeping(torch.bincount(whole.owner[live], minlength=whole.clients))
            stacks = (_picked(x[some], live) for x in (b, a))
            warm = (None if x is None else x[some] for x in (warm_u, warm_v))
            return of_some(ragged, *stacks, weights[some], scaling[some], *warm)

        return _by_pattern(of_pattern, alive)


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
        with all_threads():
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
        checks.spectrum(u, s, v)
        require(u.dtype == v.dtype, "v", shown(v), f"{u.dtype}".replace("torch.", "") + ", as u")

    def outputs(self) -> Outputs:
        d_out, d_in = self.u.shape[-2], self.v.shape[-2]
        return ((d_out, self.rank), self.u.dtype), ((self.rank, d_in), self.v.dtype)

    def body(self, device: Ops) -> Tensors:
        u, s, v = _modules(self.u), _modules(self.s, 2), _modules(self.v)
        return algorithm.readout(device.v, u, s, v, self.rank, self.scaling, self.pad, self.seed)
