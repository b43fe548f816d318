"""The random test matrices of the randomized solver: one per (seed, side, dimension)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .recording import refuse_in_recording

__all__ = ["SIDES", "sign_matrix", "start_matrix"]

SIDES = {"left": 0, "right": 1, "probe": 2, "pad": 3}


def _signs(seed: int, side: str, dim: int, count: int) -> Tensor:
    key = np.array([seed & (2**64 - 1), (SIDES[side] << 48) | dim], dtype=np.uint64)
    words = np.random.Generator(np.random.Philox(key=key)).bytes((count * dim + 7) // 8)
    bits = np.unpackbits(np.frombuffer(words, dtype=np.uint8), count=count * dim)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(count, dim).T


@lru_cache(maxsize=64)
def sign_matrix(
    seed: int, side: str, dim: int, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Random signs Ω (dim, count), the same bits on every device and for every module.

    Philox is counter-based, so column j depends on (seed, side, dim, j) alone and a wider
    matrix extends a narrower one. Signs are exact in bf16. Kept, so that a repeated call copies
    nothing to the device.
    """
    refuse_in_recording(f"random signs of dimension {dim}", device)
    return _signs(seed, side, dim, count).to(device=device, dtype=dtype)


def start_matrix(
    seed: int, side: str, dim: int, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Where an iteration starts, (dim, min(count, dim)): signs, or the whole space if they fill it.

    A small square matrix of signs is often singular, and a direction it misses never comes back.
    """
    if count < dim:
        return sign_matrix(seed, side, dim, count, dtype, device)
    return torch.eye(dim, dtype=dtype, device=device).T
