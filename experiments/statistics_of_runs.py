"""Tests over seeds and over instances, as docs/experiments.md's protocol names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from scipy.stats import binomtest

__all__ = ["bootstrap_accuracy", "holm", "mcnemar", "sign_permutation"]

EXHAUSTIVE = 16  # differences up to which every sign pattern is tried
DRAWN = 100_000
ROUNDING = 1e-12


def sign_permutation(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference of pairs: how many sign patterns are as far from zero.

    Exact up to 16 pairs (2ⁿ patterns, the least p is 2^(1−n)); beyond, 100,000 seeded ones with the
    observed pattern among them.
    """
    x = np.asarray(differences, dtype=float)
    if len(x) <= EXHAUSTIVE:
        signs = np.array(list(product((1.0, -1.0), repeat=len(x))))
    else:
        drawn = np.random.default_rng(0).integers(2, size=(DRAWN, len(x)))
        signs = np.vstack([np.ones(len(x)), 2.0 * drawn - 1])
    far = np.abs(signs @ x) >= abs(x.sum()) - ROUNDING
    return float(far.mean())


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: of the k-th smallest of n, (n − k + 1)·p, never falling, ≤ 1."""
    out: dict[str, float] = {}
    least = 0.0
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - k) * p[name]))
        out[name] = least
    return {name: out[name] for name in p}


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, float]:
    """Instances that only one got right, only the other, and the exact two-sided p of McNemar."""
    only = sum(a and not b for a, b in zip(one, other, strict=True))
    rest = sum(b and not a for a, b in zip(one, other, strict=True))
    p = binomtest(only, only + rest).pvalue if only + rest else 1.0
    return only, rest, float(p)


def bootstrap_accuracy(right: Sequence[bool], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of an accuracy over instances."""
    x = np.asarray(right, dtype=float)
    rows = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    low, high = np.quantile(x[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)
