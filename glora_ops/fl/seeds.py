"""Every random number of a run is drawn from a stream named by what it is for.

A stream depends on the seed and its name only, never on what was drawn before: there is no
generator state to save, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["number", "numpy_stream", "torch_stream"]


def number(seed: int, *name: object) -> int:
    """A 63-bit seed for the stream `name`, e.g. ``number(seed, "batches", round, client)``."""
    text = "/".join(map(str, (seed, *name)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(seed: int, *name: object) -> torch.Generator:
    return torch.Generator().manual_seed(number(seed, *name))


def numpy_stream(seed: int, *name: object) -> np.random.Generator:
    return np.random.default_rng(number(seed, *name))
