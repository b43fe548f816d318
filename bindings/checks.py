"""Checks of metadata that ops share; values of tensors are the Python API's to check."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glora_ops.errors import require, unfit
from glora_ops.packing import FLOATS, shown

if TYPE_CHECKING:
    from .library import Op

REALS = (*FLOATS, torch.int64, torch.int32)

BASES = ("consensus", "projector", "update")
PADS = ("zero", "trainable")
#: Power steps that may be asked for; a handful settles what can be settled.
MOST_STEPS = 1000

#: What an argument of this name may be, in whichever op it stands.
NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda x: x >= 1, "an integer ≥ 1"),
    "max_rank": (lambda x: x == -1 or x >= 1, "-1 (the largest rank) or an integer ≥ 1"),
    "basis": (lambda x: x in BASES, f"one of {BASES}"),
    "tau_rel": (lambda x: 0 <= x < inf, "a finite fraction ≥ 0"),
    "anchor": (lambda x: 0 <= x < inf, "a finite weight ≥ 0 (0: no anchor)"),
    "oversample": (lambda x: x >= 1, "an integer ≥ 1"),
    "power_iters": (
        lambda x: -1 <= x <= MOST_STEPS,
        f"-1 (adaptive) or an integer from 0 to {MOST_STEPS}",
    ),
    "tol": (lambda x: 0 < x < inf, "a positive fraction"),
    "pad": (lambda x: x in PADS, f"one of {PADS}"),
}


def floats(name: str, x: Tensor, fits: bool, expected: str, remedy: str = "") -> None:
    """A tensor of floats whose shape fits."""
    require(x.dtype in FLOATS and fits, name, shown(x), expected, remedy)


def stack(name: str, x: Tensor) -> None:
    """A row stack."""
    floats(
        name,
        x,
        x.dim() in (2, 3) and all(n > 0 for n in x.shape),
        "a non-empty row stack (N, d) or (L, N, d) in fp32, bf16, fp16 or fp64",
        "stack lora_A as it is and lora_B transposed (glora_ops.pack does)",
    )


def pair(b: Tensor, a: Tensor) -> None:
    """Both stacks of the same clients."""
    stack("b", b)
    stack("a", a)
    require(
        b.shape[:-1] == a.shape[:-1],
        "a",
        shown(a),
        f"the same modules and rows as b, {tuple(b.shape[:-1])}",
        "row j of a and row j of b are one rank-one pair",
    )


def clients(rows: Tensor, offsets: Tensor, **values: Tensor) -> None:
    """Where the clients of a stack begin, and one number for each."""
    require(
        offsets.dim() == 1
        and offsets.dtype == torch.int64
        and offsets.shape[0] >= 2
        and offsets.device.type == "cpu",
        "offsets",
        f"{shown(offsets)} on {offsets.device}",
        "int64 (K + 1,) with K ≥ 1, on the CPU",
    )
    for name, x in values.items():
        per_client(name, x, offsets.shape[0] - 1, rows)


def per_client(name: str, x: Tensor, count: int, rows: Tensor) -> None:
    """One number for each client, or for each in every module of the stack."""
    shapes = [(count,)] + ([(rows.shape[0], count)] if rows.dim() == 3 else [])
    require(
        x.dtype in REALS and tuple(x.shape) in shapes,
        name,
        shown(x),
        f"one real number per client, {' or '.join(map(str, shapes))}",
    )


def columns(name: str, x: Tensor | None, rows: Tensor) -> None:
    """Columns in the space of a stack's rows; None is none."""
    if x is not None:
        space = (*rows.shape[:-2], rows.shape[-1])
        expected = f"floats, columns in the stack's space, {(*space, 'k')}"
        floats(name, x, x.shape[:-1] == space, expected)


def spectrum(u: Tensor, s: Tensor, v: Tensor) -> None:
    """One singular value per pair of columns."""
    fits = all(s.shape == (*x.shape[:-2], x.shape[-1]) for x in (u, v))
    shape = f"one float per column of u {tuple(u.shape)} and v {tuple(v.shape)}"
    floats("s", s, fits, shape)


def numbers(call: Op) -> None:
    """Every argument that `NUMBERS` knows."""
    for name in call.arguments:
        if name in NUMBERS:
            value, (holds, expected) = getattr(call, name), NUMBERS[name]
            if not holds(value):
                default = getattr(type(call), name, None)
                remedy = "" if default is None else f"{default!r} is the default"
                raise unfit(name, repr(value), expected, remedy)
