"""What each method does to dense matrices, transcribed from its publication in NumPy float64."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Pair = tuple[Array, Array]  # B (d_out, r), A (r, d_in)


def update(pair: Pair, s: float) -> Array:
    return s * pair[0] @ pair[1]


def mean_update(pairs: list[Pair], weights: list[float], s: float) -> Array:
    return sum(w * update(p, s) for p, w in zip(pairs, weights, strict=True))


def zero_padded_mean(pairs: list[Pair], weights: list[float]) -> Pair:
    rank = max(a.shape[0] for _, a in pairs)
    b = np.zeros((pairs[0][0].shape[0], rank))
    a = np.zeros((rank, pairs[0][1].shape[1]))
    for (b_i, a_i), w in zip(pairs, weights, strict=True):
        b[:, : b_i.shape[1]] += w * b_i
        a[: a_i.shape[0]] += w * a_i
    return b, a


def truncated(w: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def frobenius_shares(pairs: list[Pair]) -> list[float]:
    norms = [np.linalg.norm(b @ a) for b, a in pairs]
    return [n / sum(norms) for n in norms]


def best_rotation(m: Array) -> Array:
    """The rotation (no reflection) R that maximises tr(Rᵀ M): Kabsch."""
    u, _, vt = np.linalg.svd(m)
    signs = np.ones(len(u))
    signs[-1] = np.sign(np.linalg.det(u @ vt))
    return (u * signs) @ vt
