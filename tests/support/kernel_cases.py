"""What kernel tests share: the device they run on, poisoned outputs and guarded inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from strategies import DEVICE
from torch import Tensor

__all__ = ["DEVICE", "DTYPES", "guarded", "poisoned"]

# The interpreter multiplies bf16 wrongly; kernels up-cast there, so bf16 *loads* are tested too.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Numbers before and after every buffer, and what stands there: no rounding of anything.
EDGE, MARK = 128, 77


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (or a huge integer) inside a marked frame, which is looked at in the end.

    Whatever a kernel forgets to write shows, and so does whatever it writes beside its output.
    """
    frames: list[Tensor] = []
    empty = torch.empty

    def framed(make: Callable[..., Tensor], fresh: bool) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            if fresh:
                x.fill_(torch.nan if x.is_floating_point() else 2**30)
            frame = empty(x.numel() + 2 * EDGE, dtype=x.dtype, device=x.device).fill_(MARK)
            frames.append(frame)
            return frame[EDGE:-EDGE].view(x.shape).copy_(x)

        return made

    with (
        patch.object(torch, "empty", framed(empty, True)),
        patch.object(torch, "empty_like", framed(torch.empty_like, True)),
        patch.object(torch, "zeros_like", framed(torch.zeros_like, False)),
        patch.object(Tensor, "new_empty", framed(Tensor.new_empty, True)),
        patch.object(Tensor, "new_zeros", framed(Tensor.new_zeros, False)),
    ):
        yield
    for frame in frames:
        assert (frame[:EDGE] == MARK).all(), "written before a buffer"
        assert (frame[-EDGE:] == MARK).all(), "written beyond a buffer"


def guarded(x: Tensor, rows: int = 3) -> tuple[Tensor, Tensor]:
    """A copy of x (…, n, d) inside a NaN frame of `rows` rows and 16 columns, and the frame.

    A kernel that reads beyond its rows computes NaN.
    """
    n, d = x.shape[-2:]
    frame = x.new_full((*x.shape[:-2], n + 2 * rows, d + 32), torch.nan)
    inside = frame[..., rows : rows + n, 16 : 16 + d]
    inside.copy_(x)
    return inside, frame
