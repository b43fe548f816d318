"""What kernel tests share: the device they run on, poisoned outputs and guarded inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from strategies import DEVICE
from torch import Tensor

__all__ = ["DEVICE", "DTYPES", "guarded", "poisoned"]

# The interpreter multiplies bf16 wrongly; kernels up-cast there, so bf16 *loads* are tested too.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (or a huge integer), so that whatever a kernel forgets to write shows."""

    def fill(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(2**30)

    empty, like, new = torch.empty, torch.empty_like, Tensor.new_empty
    with (
        patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        patch.object(torch, "empty_like", lambda *a, **k: fill(like(*a, **k))),
        patch.object(Tensor, "new_empty", lambda *a, **k: fill(new(*a, **k))),
    ):
        yield


def guarded(x: Tensor, rows: int = 3) -> tuple[Tensor, Tensor]:
    """A copy of x (…, n, d) inside a NaN frame of `rows` rows and 16 columns, and the frame.

    A kernel that reads beyond its rows computes NaN.
    """
    n, d = x.shape[-2:]
    frame = x.new_full((*x.shape[:-2], n + 2 * rows, d + 32), torch.nan)
    inside = frame[..., rows : rows + n, 16 : 16 + d]
    inside.copy_(x)
    return inside, frame
