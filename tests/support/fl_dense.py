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


def verdict(rule: str, updates: Array, weights: list[float]) -> tuple[Array, Array]:
    """Trust and scale of clients with these updates (K, n): the rules, written from their text."""
    w, norms = np.array(weights), np.linalg.norm(updates, axis=1)
    trust, scale = np.ones(len(w)), np.ones(len(w))
    if rule == "geometric-median":
        x = w @ updates / w.sum()
        for _ in range(3000):
            trust = 1 / np.sqrt(np.sum((updates - x) ** 2, axis=1) + 1e-8 * np.median(norms) ** 2)
            x = (w * trust) @ updates / (w @ trust)
        return trust * w.sum() / (w @ trust), scale
    kept = np.ones(len(w), dtype=bool)
    if rule == "gate":
        cosine = updates @ updates.T / np.outer(norms, norms)
        own = np.array([np.median(np.delete(row, i)) for i, row in enumerate(cosine)])
        kept = own >= np.median(own) / 2
        trust = kept * w.sum() / (w @ kept)
    return trust, np.minimum(1, 2 * np.median(norms[kept]) / norms)
