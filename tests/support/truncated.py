"""Sums as a tensor core may make them: products exact, the accumulator cut to 24 bits, not rounded.

Published for V100 and A100, unknown for later chips: every 16 columns the exact partial sum is
added to the accumulator and what does not fit in 24 bits is cut off. A coherent sum of d terms
then errs by d/16 halves of a last place, always downwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.kernels import precision
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["TruncatingVocabulary", "truncated_dots", "truncated_product"]

COLUMNS = 16
KEPT = -(1 << 29)  # 24 of a double's 53 bits


def cut(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.int64) & KEPT).view(np.float64)


def accumulated(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y + x w on fp64 arrays (…, m, c) and (…, c, n), the sum cut every COLUMNS columns."""
    for c in range(0, x.shape[-1], COLUMNS):
        y = cut(y + x[..., c : c + COLUMNS] @ w[..., c : c + COLUMNS, :])
    return y


@contextmanager
def truncated_dots() -> Iterator[None]:
    """Inside, fp32 dots of kernels in Triton's interpreter are truncated ones."""
    exact = InterpreterBuilder.create_dot

    def dot(self, a, b, d, *rest):
        if d.dtype.scalar != tl.float32:
            return exact(self, a, b, d, *rest)
        y = accumulated(*(h.data.astype(np.float64) for h in (d, a, b)))
        return TensorHandle(y.astype(np.float32), d.dtype.scalar)

    with patch.object(InterpreterBuilder, "create_dot", dot):
        yield


def terms(x: Tensor, w: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """What one fp32 product is made of, the smallest first: w in three terms of 8 bits."""
    rest, parts = w.double().numpy(), []
    for _ in range(2):
        high = (np.ascontiguousarray(rest).view(np.int64) & -(1 << 45)).view(np.float64)
        parts.append(high)
        rest = rest - high
    return [(x.double().numpy(), part) for part in (rest, *reversed(parts))]


def truncated_product(x: Tensor, w: Tensor) -> Tensor:
    """x w (L, m, c) (L, c, n) in fp32, promoted every `precision.PROMOTED` columns."""
    pairs, total = terms(x, w.float()), np.float32(0)
    for start in range(0, x.shape[-1], precision.PROMOTED):
        y = np.float64(0)
        for c in range(start, min(start + precision.PROMOTED, x.shape[-1]), COLUMNS):
            for part, other in pairs:
                stop = min(c + COLUMNS, start + precision.PROMOTED)
                y = cut(y + part[..., c:stop] @ other[..., c:stop, :])
        total = total + y.astype(np.float32)
    return torch.from_numpy(total)


class TruncatingVocabulary(CpuVocabulary):
    """The CPU's words with the long products of a tensor core; Gram matrices stay fp64."""

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return truncated_product(rows, omega).double()

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return truncated_product(rows.mT, z).mT.contiguous().mT

    def combine(self, y: Tensor, c: Tensor, onto: Tensor | None = None) -> Tensor:
        out = truncated_product(y, c).mT.contiguous().mT
        return out if onto is None else onto.add_(out)
