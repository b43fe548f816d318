"""Spectra that small eigenproblems and SVDs are tested on; descending, largest one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["SPECTRA", "orthogonal"]


def orthogonal(n: int, seed: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return q


def _uniform(n: int) -> np.ndarray:
    return np.sort(np.r_[1.0, np.random.default_rng(n).random(n - 1)])[::-1].copy()


def _graded(n: int) -> np.ndarray:
    return np.logspace(0, -14, n)


def _repeated(n: int) -> np.ndarray:
    return np.repeat([1.0, 0.5, 0.1, 1e-3], -(-n // 4))[:n]


def _clusters(n: int) -> np.ndarray:
    width = np.where(np.arange(n) < n // 2, 1e-9, 1e-13)
    level = np.where(np.arange(n) < (n + 1) // 2, 1.0, 0.5)
    return level * (1 - width * np.arange(n) / n)


def _deficient(n: int) -> np.ndarray:
    return np.where(np.arange(n) < (n + 1) // 2, np.linspace(1, 0.5, n), 0.0)


def _one(n: int) -> np.ndarray:
    return np.where(np.arange(n) < 1, 1.0, 0.0)


SPECTRA: dict[str, Callable[[int], np.ndarray]] = {
    "uniform": _uniform,
    "graded": _graded,
    "repeated": _repeated,
    "clusters": _clusters,
    "deficient": _deficient,
    "rank one": _one,
    "identity": np.ones,
}
