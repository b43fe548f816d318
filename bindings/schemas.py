"""Every schema of ``torch.ops.glora``, its fake, and the checks on metadata.

Python owns the schemas; `register` binds a vocabulary to a dispatch key. Values are never looked
at here (the Python API does that), so no op synchronises for its checks.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from glora_ops.certificates import CLIENT_STATS, STATS
from glora_ops.errors import GloraError, require

__all__ = ["BASES", "LIBRARY", "NAMES", "PADS", "result_dtype"]

BASES = ("consensus", "projector", "update")
PADS = ("zero", "trainable")

LIBRARY = torch.library.Library("glora", "DEF")

SCHEMAS = {
    "canonicalize": "(Tensor b, Tensor a, Tensor offsets, Tensor scaling, float tau_rel=0.1, "
    "int max_rank=-1) -> (Tensor t_u, Tensor t_v, Tensor sigma, Tensor f)",
    "projector_matmul": "(Tensor x, Tensor offsets, Tensor t, Tensor row_weights, Tensor omega) "
    "-> Tensor",
    "projector_matmul.factors": "(Tensor x, Tensor offsets, Tensor weights, Tensor omega) "
    "-> Tensor",
    "projector_svd": "(Tensor x, Tensor offsets, Tensor t, Tensor row_weights, int rank, "
    "int oversample=16, int power_iters=-1, float tol=1e-3, Tensor? extra=None, "
    "Tensor? warm=None, int seed=0) -> (Tensor basis, Tensor eigenvalues, Tensor explained)",
    "projector_svd.factors": "(Tensor x, Tensor offsets, Tensor weights, int rank, "
    "int oversample=16, int power_iters=-1, float tol=1e-3, Tensor? extra=None, "
    "Tensor? warm=None, int seed=0) -> (Tensor basis, Tensor eigenvalues, Tensor explained)",
    "core": "(Tensor u, Tensor v, Tensor b, Tensor a, Tensor offsets, Tensor weights, "
    "Tensor scaling) -> Tensor",
    "aggregate": "(Tensor b, Tensor a, Tensor offsets, Tensor weights, Tensor scaling, int rank, "
    'str basis="consensus", float tau_rel=0.1, float anchor=1.0, int oversample=16, '
    "int power_iters=-1, float tol=1e-3, Tensor? warm_u=None, Tensor? warm_v=None, int seed=0, "
    "bool client_statistics=True) "
    "-> (Tensor u, Tensor s, Tensor v, Tensor eig_u, Tensor eig_v, Tensor stats, "
    "Tensor client_stats)",
    "aggregate.list": "(Tensor[] lora_B, Tensor[] lora_A, Tensor weights, Tensor scaling, "
    'int rank, str basis="consensus", float tau_rel=0.1, float anchor=1.0, int oversample=16, '
    "int power_iters=-1, float tol=1e-3, Tensor? warm_u=None, Tensor? warm_v=None, int seed=0, "
    "bool client_statistics=True) "
    "-> (Tensor u, Tensor s, Tensor v, Tensor eig_u, Tensor eig_v, Tensor stats, "
    "Tensor client_stats)",
    "client_stats": "(Tensor b, Tensor a, Tensor offsets, Tensor weights, Tensor scaling, "
    "Tensor u, Tensor s, Tensor v) -> Tensor",
    "readout": '(Tensor u, Tensor s, Tensor v, int rank, float scaling=1.0, str pad="zero", '
    "int seed=0) -> (Tensor lora_b, Tensor lora_a)",
}
NAMES = tuple(SCHEMAS)

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any factor is fp64, otherwise fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# --- metadata checks -------------------------------------------------------------------------
# One per op, with the op's own arguments: the op and its fake both call it first.

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REALS = (*FLOATS, torch.int64, torch.int32)


def check_canonicalize(
    b: Tensor, a: Tensor, offsets: Tensor, scaling: Tensor, tau_rel: float, max_rank: int
) -> None:
    _check_pair(b, a)
    _check_offsets(offsets)
    _check_clients("scaling", scaling, offsets.shape[0] - 1, b)
    _check_tau(tau_rel)
    require(
        max_rank == -1 or max_rank >= 1,
        "max_rank",
        max_rank,
        "-1 (the largest rank) or more than 0",
    )


def check_voters(x: Tensor, offsets: Tensor, t: Tensor, row_weights: Tensor) -> None:
    _check_stack("x", x)
    _check_offsets(offsets)
    require(
        t.dtype in FLOATS and t.dim() == x.dim() and t.shape[:-1] == x.shape[:-1],
        "t",
        _shape(t),
        f"floats, one row per row of the stack, {(*x.shape[:-1], 'max_rank')}",
        "canonicalize makes it",
    )
    require(
        row_weights.dtype in FLOATS and row_weights.shape == x.shape[:-1],
        "row_weights",
        _shape(row_weights),
        f"floats, one per row of the stack, {tuple(x.shape[:-1])}",
    )


def check_factor_voters(x: Tensor, offsets: Tensor, weights: Tensor) -> None:
    _check_stack("x", x)
    _check_offsets(offsets)
    _check_clients("weights", weights, offsets.shape[0] - 1, x)


def check_omega(omega: Tensor, x: Tensor) -> None:
    _check_columns("omega", omega, x)


def check_solver(
    x: Tensor,
    rank: int,
    oversample: int,
    power_iters: int,
    tol: float,
    extra: Tensor | None,
    warm: Tensor | None,
) -> None:
    _check_iteration(rank, oversample, power_iters, tol)
    for name, columns in (("extra", extra), ("warm", warm)):
        if columns is not None:
            _check_columns(name, columns, x)


def check_core(
    u: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    weights: Tensor,
    scaling: Tensor,
) -> None:
    _check_pair(b, a)
    _check_columns("u", u, b)
    _check_columns("v", v, a)
    _check_offsets(offsets)
    for name, x in (("weights", weights), ("scaling", scaling)):
        _check_clients(name, x, offsets.shape[0] - 1, b)


def check_client_stats(
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    weights: Tensor,
    scaling: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
) -> None:
    check_core(u, v, b, a, offsets, weights, scaling)
    _check_spectrum(u, s, v)


def check_aggregate(
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    weights: Tensor,
    scaling: Tensor,
    warm_u: Tensor | None,
    warm_v: Tensor | None,
) -> None:
    _check_pair(b, a)
    _check_offsets(offsets)
    for name, x in (("weights", weights), ("scaling", scaling)):
        _check_clients(name, x, offsets.shape[0] - 1, b)
    for name, warm, stack in (("warm_u", warm_u, b), ("warm_v", warm_v, a)):
        if warm is not None:
            _check_columns(name, warm, stack)


def check_lists(
    lora_b: list[Tensor],
    lora_a: list[Tensor],
    weights: Tensor,
    scaling: Tensor,
    warm_u: Tensor | None,
    warm_v: Tensor | None,
) -> None:
    require(
        len(lora_b) == len(lora_a) >= 1,
        "lora_A",
        f"{len(lora_a)} matrices beside {len(lora_b)} in lora_B",
        "one lora_A for every lora_B, and at least one client",
    )
    for i, (b, a) in enumerate(zip(lora_b, lora_a, strict=True)):
        found = f"lora_B {_shape(b)} and lora_A {_shape(a)}"
        require(
            b.dtype in FLOATS
            and a.dtype in FLOATS
            and b.dim() == a.dim() == 2
            and b.shape[1] == a.shape[0] >= 1,
            f"client {i}",
            found,
            "PEFT's layouts (d_out, r) and (r, d_in) with one r, in fp32, bf16, fp16 or fp64",
        )
        d_out, d_in = lora_b[0].shape[0], lora_a[0].shape[1]
        require(
            b.shape[0] == d_out > 0 and a.shape[1] == d_in > 0,
            f"client {i}",
            found,
            f"the module's d_out = {d_out} and d_in = {d_in}",
        )
    for name, x in (("weights", weights), ("scaling", scaling)):
        _check_clients(name, x, len(lora_b), lora_a[0])
    for name, warm, stack in (("warm_u", warm_u, lora_b[0].mT), ("warm_v", warm_v, lora_a[0])):
        if warm is not None:
            _check_columns(name, warm, stack)


def check_settings(
    rank: int,
    basis: str,
    tau_rel: float,
    anchor: float,
    oversample: int,
    power_iters: int,
    tol: float,
) -> None:
    _check_iteration(rank, oversample, power_iters, tol)
    _check_choice("basis", basis, BASES)
    _check_tau(tau_rel)
    require(
        0 <= anchor < inf, "anchor", anchor, "a finite weight ≥ 0", "1 is the default, 0 drops it"
    )


def check_readout(u: Tensor, s: Tensor, v: Tensor, rank: int, scaling: float, pad: str) -> None:
    require(rank >= 1, "rank", rank, "an integer ≥ 1")
    require(
        0 < scaling < inf, "scaling", scaling, "the receiving adapter's alpha/r, finite, above zero"
    )
    _check_choice("pad", pad, PADS)
    for name, x in (("u", u), ("v", v)):
        require(
            x.dtype in FLOATS and x.dim() in (2, 3),
            name,
            _shape(x),
            "floats (d, R) or (L, d, R)",
            "aggregate makes it",
        )
    _check_spectrum(u, s, v)
    require(u.dtype == v.dtype, "v", _shape(v), f"{u.dtype}".replace("torch.", "") + ", as u")


def _check_spectrum(u: Tensor, s: Tensor, v: Tensor) -> None:
    require(
        s.dtype in FLOATS
        and u.shape[-1] == s.shape[-1] == v.shape[-1]
        and u.shape[:-2] == s.shape[:-1] == v.shape[:-2],
        "s",
        _shape(s),
        f"one float per column of u {tuple(u.shape)} and v {tuple(v.shape)}",
    )


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _check_stack(name: str, x: Tensor) -> None:
    require(
        x.dtype in FLOATS and x.dim() in (2, 3) and all(n > 0 for n in x.shape),
        name,
        _shape(x),
        "a non-empty row stack (N, d) or (L, N, d) in fp32, bf16, fp16 or fp64",
        "stack lora_A as it is and lora_B transposed (glora_ops.pack does)",
    )


def _check_pair(b: Tensor, a: Tensor) -> None:
    _check_stack("b", b)
    _check_stack("a", a)
    require(
        b.shape[:-1] == a.shape[:-1],
        "a",
        _shape(a),
        f"the same modules and rows as b, {tuple(b.shape[:-1])}",
        "row j of a and row j of b are one rank-one pair",
    )


def _check_offsets(offsets: Tensor) -> None:
    require(
        offsets.dim() == 1
        and offsets.dtype == torch.int64
        and offsets.shape[0] >= 2
        and offsets.device.type == "cpu",
        "offsets",
        f"{_shape(offsets)} on {offsets.device}",
        "int64 (K + 1,) with K ≥ 1, on the CPU",
    )


def _check_clients(name: str, x: Tensor, clients: int, stack: Tensor) -> None:
    shapes = [(clients,)] + ([(stack.shape[0], clients)] if stack.dim() == 3 else [])
    require(
        x.dtype in REALS and tuple(x.shape) in shapes,
        name,
        _shape(x),
        f"one real number per client, {' or '.join(map(str, shapes))}",
    )


def _check_columns(name: str, x: Tensor, stack: Tensor) -> None:
    require(
        x.dtype in FLOATS
        and x.dim() == stack.dim()
        and x.shape[-2] == stack.shape[-1]
        and x.shape[:-2] == stack.shape[:-2],
        name,
        _shape(x),
        f"floats, columns in the stack's space, {(*stack.shape[:-2], stack.shape[-1], 'k')}",
    )


def _check_iteration(rank: int, oversample: int, power_iters: int, tol: float) -> None:
    require(rank >= 1, "rank", rank, "an integer ≥ 1")
    require(oversample >= 1, "oversample", oversample, "an integer ≥ 1", "16 is the default")
    require(power_iters >= -1, "power_iters", power_iters, "-1 (adaptive) or an integer ≥ 0")
    require(0 < tol < inf, "tol", tol, "a positive fraction", "1e-3 is the default")


def _check_tau(tau_rel: float) -> None:
    require(0 <= tau_rel < inf, "tau_rel", tau_rel, "a finite fraction ≥ 0", "0.1 is the default")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, name, repr(value), f"one of {', '.join(map(repr, choices))}")


# --- fakes -----------------------------------------------------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"glora::{name}", lib=LIBRARY)


@_fake("canonicalize")
def _canonicalize(
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    scaling: Tensor,
    tau_rel: float = 0.1,
    max_rank: int = -1,
) -> tuple[Tensor, ...]:
    check_canonicalize(b, a, offsets, scaling, tau_rel, max_rank)
    width = torch.library.get_ctx().new_dynamic_size() if max_rank < 0 else max_rank
    t = b.new_empty(*b.shape[:-1], width, dtype=torch.float64)
    row = b.new_empty(b.shape[:-1], dtype=torch.float64)
    return t, torch.empty_like(t), row, torch.empty_like(row)


@_fake("projector_matmul")
def _projector_matmul(
    x: Tensor, offsets: Tensor, t: Tensor, row_weights: Tensor, omega: Tensor
) -> Tensor:
    check_voters(x, offsets, t, row_weights)
    check_omega(omega, x)
    return x.new_empty(omega.shape, dtype=result_dtype(x))


@_fake("projector_matmul.factors")
def _projector_matmul_factors(x: Tensor, offsets: Tensor, weights: Tensor, omega: Tensor) -> Tensor:
    check_factor_voters(x, offsets, weights)
    check_omega(omega, x)
    return x.new_empty(omega.shape, dtype=result_dtype(x))


@_fake("projector_svd")
def _projector_svd(
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
) -> tuple[Tensor, ...]:
    check_voters(x, offsets, t, row_weights)
    check_solver(x, rank, oversample, power_iters, tol, extra, warm)
    return _eigenpairs(x, rank, oversample)


@_fake("projector_svd.factors")
def _projector_svd_factors(
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
) -> tuple[Tensor, ...]:
    check_factor_voters(x, offsets, weights)
    check_solver(x, rank, oversample, power_iters, tol, extra, warm)
    return _eigenpairs(x, rank, oversample)


def _eigenpairs(x: Tensor, rank: int, oversample: int) -> tuple[Tensor, ...]:
    batch = x.shape[:-2]
    return (
        x.new_empty(*batch, x.shape[-1], rank, dtype=result_dtype(x)),
        x.new_empty(*batch, rank + oversample, dtype=torch.float64),
        x.new_empty(batch, dtype=torch.float64),
    )


@_fake("core")
def _core(
    u: Tensor,
    v: Tensor,
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    weights: Tensor,
    scaling: Tensor,
) -> Tensor:
    check_core(u, v, b, a, offsets, weights, scaling)
    return b.new_empty(*b.shape[:-2], u.shape[-1], v.shape[-1], dtype=torch.float64)


@_fake("aggregate")
def _aggregate(
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
) -> tuple[Tensor, ...]:
    check_aggregate(b, a, offsets, weights, scaling, warm_u, warm_v)
    check_settings(rank, basis, tau_rel, anchor, oversample, power_iters, tol)
    clients = client_statistics * (offsets.shape[0] - 1)
    dtype = result_dtype(b, a)
    return _results(b, b.shape[:-2], b.shape[-1], a.shape[-1], clients, rank, oversample, dtype)


@_fake("aggregate.list")
def _aggregate_list(
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
) -> tuple[Tensor, ...]:
    check_lists(lora_b, lora_a, weights, scaling, warm_u, warm_v)
    check_settings(rank, basis, tau_rel, anchor, oversample, power_iters, tol)
    d_out, d_in = lora_b[0].shape[0], lora_a[0].shape[1]
    dtype = result_dtype(*lora_b, *lora_a)
    clients = client_statistics * len(lora_b)
    return _results(lora_b[0], (), d_out, d_in, clients, rank, oversample, dtype)


def _results(
    like: Tensor,
    batch: tuple[int, ...],
    d_out: int,
    d_in: int,
    clients: int,
    rank: int,
    oversample: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return like.new_empty(*batch, *shape, dtype=dtype)

    return (
        empty(d_out, rank, dtype=dtype),
        empty(rank),
        empty(d_in, rank, dtype=dtype),
        empty(rank + oversample),
        empty(rank + oversample),
        empty(len(STATS)),
        empty(clients, len(CLIENT_STATS)),
    )


@_fake("client_stats")
def _client_stats(
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    weights: Tensor,
    scaling: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
) -> Tensor:
    check_client_stats(b, a, offsets, weights, scaling, u, s, v)
    shape = (*b.shape[:-2], offsets.shape[0] - 1, len(CLIENT_STATS))
    return b.new_empty(shape, dtype=torch.float64)


@_fake("readout")
def _readout(
    u: Tensor,
    s: Tensor,
    v: Tensor,
    rank: int,
    scaling: float = 1.0,
    pad: str = "zero",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    check_readout(u, s, v, rank, scaling, pad)
    return u.new_empty(*u.shape[:-1], rank), v.new_empty(*v.shape[:-2], rank, v.shape[-2])


# --- autograd --------------------------------------------------------------------------------


def _refuse_gradients(name: str) -> Callable[..., Any]:
    overload = name.partition(".")[2] or "default"
    op = getattr(getattr(torch.ops.glora, name.partition(".")[0]), overload)

    def autograd(*args: Any, **kwargs: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in leaves
        ):
            raise GloraError(
                f"torch.ops.glora.{name}: got an input that requires grad, expected none; "
                "aggregation is not differentiable, so detach the factors first "
                "(glora_ops.aggregate does)"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return autograd


for _name in NAMES:
    LIBRARY.impl(_name, _refuse_gradients(_name), "Autograd")
