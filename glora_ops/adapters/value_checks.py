"""Values of an adapter that cannot be computed with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import Refusal, Refusals
from ..values import extent, out_of_range
from .read import TENSORS_NAME, Adapter

__all__ = ["check_values"]


def check_values(adapter: Adapter, digest: Any = None) -> list[Refusal]:
    """Find values that cannot be computed with, reading the file once, piece by piece.

    Parameters
    ----------
    adapter : Adapter
    digest : object of `hashlib`, optional
        Updated with every byte of the tensor file on the way.

    Returns
    -------
    list of Refusal
        One per tensor: values that are not finite, their number and the place of the first; fp64
        factors whose squares leave fp64's range.
    """
    extents = _extents(adapter, digest)
    if not all(len(names) == 1 or bool(x.isfinite().all()) for names, x in extents.items()):
        extents = _extents(adapter, apart=True)  # which ones of those that came together?
    dense = {tensor.key for t in (adapter.dense, adapter.base_copies) for tensor in t.values()}
    problems = Refusals()

    def refuse(key: str, problem: str, found: str, expected: str) -> None:
        problems.append(
            Refusal(problem, adapter.name, TENSORS_NAME, key, found, expected, _DIVERGED)
        )

    for (key, *_), overall in extents.items():
        beyond = None if key in dense else out_of_range(overall.dtype, float(overall.abs().max()))
        if not bool(overall.isfinite().all()):
            refuse(
                key,
                "values are not finite",
                _where_not_finite(adapter, key) if len(problems) < problems.SHOWN else "",
                "finite numbers",
            )
        elif beyond is not None:
            refuse(key, *beyond)
    problems += _untied(adapter)
    return problems


def _extents(
    adapter: Adapter, digest: Any = None, apart: bool = False
) -> dict[tuple[str, ...], Tensor]:
    """Smallest and largest value of tensors that `Stored.scan` gives together."""
    found: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for names, piece in adapter.stored.scan(digest, apart=apart):
        if piece.is_floating_point() or piece.is_complex():
            found[names].append(extent(_real(piece)))
    return {names: extent(torch.stack(ends)) for names, ends in found.items()}


_DIVERGED = "the training diverged: leave this client out"


def _real(x: Tensor) -> Tensor:
    """`x` in a dtype that torch compares: float8 has neither minima nor tests."""
    if x.is_complex():
        return torch.view_as_real(x).flatten()
    return x.float() if x.dtype.itemsize == 1 else x


def _untied(adapter: Adapter) -> Iterator[Refusal]:
    """Pairs that ``ensure_weight_tying`` should have kept equal, and did not."""
    for copy, one in adapter.tied.items():
        if copy in adapter.dense:
            equal = torch.equal(adapter.dense_tensor(copy), adapter.dense_tensor(one))
            key = adapter.dense[copy].key
        else:
            (b, a), (one_b, one_a) = adapter.factors(copy), adapter.factors(one)
            same = adapter.modules[copy].scaling == adapter.modules[one].scaling
            equal = same and torch.equal(b, one_a.mT) and torch.equal(a, one_b.mT)
            key = adapter.modules[copy].b_key
        if not equal:
            yield Refusal(
                "ensure_weight_tying is set, but the pair is not tied",
                adapter.name,
                TENSORS_NAME,
                key,
                f"other values or another scaling than {one!r}",
                "the same once more",
                "train with ensure_weight_tying=False, or leave this client out",
            )


def _where_not_finite(adapter: Adapter, key: str) -> str:
    (tensor,) = adapter.stored.read(key)
    wrong = ~torch.isfinite(tensor if tensor.is_complex() else _real(tensor))
    first = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {tensor.numel()}, the first {tensor[first].item()} at {first}"
