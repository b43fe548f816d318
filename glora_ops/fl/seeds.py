"""Every random number of a run is drawn from a stream named by what it is for.

A stream depends on the seed and its name only, never on what was drawn before: there is no
generator state to save, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["numpy_stream", "stream_seed", "torch_stream"]


def stream_seed(seed: int, *name: object) -> int:
    """A 63-bit seed for the stream `name`, e.g. ``stream_seed(seed, "batches", round, client)``."""
    text = "/".join(map(str, (seed, *name)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(seed: int, *name: object) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, *name))


def numpy_stream(seed: int, *name: object) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, *name))
