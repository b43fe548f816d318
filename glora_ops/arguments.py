"""What the Python API takes: arguments as plain numbers and lists, or an error that names them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from .bindings.checks import BASES, MOST_STEPS, NUMBERS
from .errors import Refusal, Refused, require, unfit

__all__ = [
    "LEAST", "MOST", "PADDING", "SMALL", "check_padding", "check_settings", "check_weights",
    "integer", "kind", "number", "sequence", "usable",
]  # fmt: skip

MISSING = ("zero", "renormalise")
#: Moduli of weights and scalings: what they multiply is squared in fp64.
LEAST, MOST = 1e-30, 1e30
#: Ranks up to SMALL are padded whatever the data; larger ones up to PADDING times the directions
#: that there can be. Beyond that a result would be zeros but for a sixteenth at most.
SMALL, PADDING = 1024, 16


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `aggregate` among `settings` that are neither clients nor per client.

    As plain numbers, so that a state can be saved; raises `GloraError` for the first that is none.
    """
    out = dict(settings)
    for name, least in _INTEGERS.items():
        also = {"rank": ', "auto" or None', "max_bytes": " or None"}.get(name, "")
        unset = also and out.get(name) is None
        if name in out and not unset and not (name == "rank" and out[name] == "auto"):
            out[name] = integer(name, out[name], least, also)
    for name, (holds, expected) in _NUMBERS.items():
        if name in out:
            value = number(out[name])
            require(value is not None and holds(value), name, repr(out[name]), expected)
            out[name] = value
    if "normalise" in out:
        out["normalise"] = bool(out["normalise"])
    for name, choices in (("basis", BASES), ("missing", MISSING)):
        if name in out:
            require(out[name] in choices, name, repr(out[name]), f"one of {choices}")
    return out


_INTEGERS = {"rank": 1, "oversample": 1, "power_iters": -1, "seed": -(2**63), "max_bytes": 1}
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "captured": (lambda x: 0 < x <= 1, "a fraction in (0, 1]"),
    **{name: NUMBERS[name] for name in ("tau_rel", "anchor", "tol")},
}


def check_padding(name: str, rank: int, directions: int, whose: str) -> None:
    """Refuse a rank whose result would be larger than the data by nothing but zeros."""
    require(
        rank <= max(SMALL, PADDING * directions),
        name,
        rank,
        f"at most {max(SMALL, PADDING * directions)}, the larger of {SMALL} and {PADDING} times "
        f"the {directions} directions of {whose}",
        "all that lies beyond them is zero",
    )


def integer(name: str, value: Any, least: int = -(2**63), also: str = "") -> int:
    """`value` as an integer of the kind that the argument `name` takes, or `GloraError`."""
    index: int | None = None
    if hasattr(value, "__index__") and not isinstance(value, bool):
        with suppress(TypeError):  # a tensor of several numbers has the attribute too
            index = operator.index(value)
    most = {"rank": 2**31, "oversample": 2**31, "power_iters": MOST_STEPS + 1}.get(name, 2**63)
    require(
        index is not None and least <= index < most,
        name,
        f"{value!r:.80}",
        f"an integer from {least} to {most - 1}{also}",
    )
    return index  # type: ignore[return-value]  # not None: `require` has seen to it


def number(value: Any) -> float | None:
    """`value` as a float; None where it is none, text included."""
    if isinstance(value, (str, bytes)):
        return None
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        return float(value)
    return None


def usable(value: float) -> bool:
    """Whether a weight or a scaling is of a size that can be computed with."""
    return value == 0 or LEAST <= abs(value) <= MOST


def kind(value: object) -> str:
    """A value of the wrong type, for a message."""
    return f"{' '.join(repr(value).split()):.40} of type {type(value).__name__}"


def sequence(name: str, value: Any, expected: str) -> list[Any]:
    """`value` as a list, where it is something to go through in order."""
    ordered = isinstance(value, (Sequence, np.ndarray, Tensor))
    ordered = ordered and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) != 0
    if not ordered:  # only then: describing a list of factors prints them all
        raise unfit(name, kind(value), expected)
    return list(value)


def check_weights(
    weights: Sequence[float] | None, names: Sequence[str], settings: Mapping[str, Any]
) -> list[float]:
    """Weights as used, one per client; `Refused` with every offender."""
    if weights is None:
        return [1 / len(names) for _ in names]
    weights = sequence("weights", weights, f"one number per client, {len(names)}")
    require(len(weights) == len(names), "weights", len(weights), f"one per client, {len(names)}")
    normalise = settings.get("normalise", True)
    signed = settings.get("basis") == "update" and not normalise
    numbers = [number(w) for w in weights]
    refusals = [
        Refusal(
            "weight cannot be used",
            client=name,
            found=repr(given) if w is None else str(w),
            expected="a finite number" if signed else "a finite number ≥ 0",
            remedy="negative votes do not exist; task arithmetic needs basis='update' and "
            "normalise=False (--basis update --no-normalise)"
            if w is not None and w < 0 and not signed
            else "",
        )
        for name, given, w in zip(names, weights, numbers, strict=True)
        if w is None or not math.isfinite(w) or (w < 0 and not signed)
    ]
    if refusals:
        raise Refused(refusals)
    used = [w for w in numbers if w is not None]
    total = sum(used)
    require(
        any(w != 0 for w in used) and (not normalise or total > 0),
        "weights",
        f"{used[:8]} with sum {total}",
        "at least one above zero",
    )
    if normalise:
        require(math.isfinite(total), "weights", f"{used[:8]}", "a finite sum", "divide them all")
        return [w / total for w in used]
    require(all(map(usable, used)), "weights", f"{used[:8]}", f"0 or of modulus {LEAST} to {MOST}")
    require(
        settings.get("missing") != "renormalise" or min(used) >= 0,
        "missing",
        "'renormalise'",
        "'zero' with signed weights",
        "weights whose signs cancel cannot be renormalised",
    )
    return used
