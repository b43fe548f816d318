"""The batched SVD kernel against NumPy's, over the spectra that glora meets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glora_ops.kernels.launching import Call, observed
from glora_ops.kernels.svd import launch_svd
from kernel_cases import DEVICE, guarded, poisoned
from spectra import SPECTRA, orthogonal

U64 = 2.0**-53
# The interpreter needs a second per matrix of side 33.
LARGE = (64, 80, 128) if DEVICE == "cuda" else (33,)


def matrix(sigma: np.ndarray, seed: int = 0) -> np.ndarray:
    n = len(sigma)
    return (orthogonal(n, seed) * sigma) @ orthogonal(n, seed + 1000)


def solve(*matrices: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    with poisoned():
        answer = launch_svd(torch.from_numpy(np.stack(matrices)).to(DEVICE))
    return list(zip(*(part.cpu().numpy() for part in answer), strict=True))


def faults(c: np.ndarray, x: np.ndarray, s: np.ndarray, y: np.ndarray) -> list[str]:
    """What is wrong with an SVD, backward stable to 10·n·2⁻⁵³."""
    n = len(c)
    tol = 10 * n * U64
    size = np.linalg.norm(c, 2)
    found = {
        "order": (np.diff(s) <= 0).all() and (s >= 0).all(),
        "singular values": abs(s - np.linalg.svd(c)[1]).max() <= tol * size,
        "left": np.linalg.norm(x.T @ x - np.eye(n), 2) <= tol,
        "right": np.linalg.norm(y.T @ y - np.eye(n), 2) <= tol,
        "reconstruction": np.linalg.norm((x * s) @ y.T - c, 2) <= tol * size,
    }
    return [name for name, good in found.items() if not good]


@pytest.mark.parametrize("n", [1, 2, 5, 16, *LARGE])
def test_is_the_singular_value_decomposition(n: int) -> None:
    names = ("graded",) if n == 33 else SPECTRA
    matrices = [matrix(SPECTRA[name](n)) for name in names]
    for name, c, answer in zip(names, matrices, solve(*matrices), strict=True):
        assert not faults(c, *answer), name


def test_what_is_wrong_is_found() -> None:
    c = matrix(SPECTRA["uniform"](8))
    ((x, s, y),) = solve(c)
    assert not faults(c, x, s, y)
    wrong = {
        "sides exchanged": (y, s, x),
        "signs lost": (abs(x), s, abs(y)),
        "single precision": (x.astype(np.float32).astype(float), s, y),
        "ascending": (x[:, ::-1], s[::-1], y[:, ::-1]),
        "null space not completed": (x * (s > s[-1]), s * (s > s[-1]), y),
    }
    for name, answer in wrong.items():
        assert faults(c, *answer), name


def test_a_core_whose_rows_and_columns_are_badly_scaled() -> None:
    """Loud and silent directions on either side: graded rows, graded columns, permuted."""
    rng = np.random.default_rng(3)
    c = rng.standard_normal((9, 9)) * np.logspace(0, -9, 9)
    for case in (c, c.T.copy(), c[rng.permutation(9)][:, rng.permutation(9)]):
        (answer,) = solve(case)
        assert not faults(case, *answer)


def test_zero_rows_and_columns_are_completed() -> None:
    zero = np.zeros((6, 6))
    corner, shifted = zero.copy(), zero.copy()
    corner[:2, :2] = [[0, 2], [1, 0]]
    shifted[0, 1:] = 1
    for c, (x, s, y) in zip((zero, corner, shifted), solve(zero, corner, shifted), strict=True):
        assert not faults(c, x, s, y)
        assert (s[np.linalg.matrix_rank(c) :] == 0).all()


@pytest.mark.parametrize("exponent", [-900, 301, 1000])
def test_powers_of_two_change_no_other_bit(exponent: int) -> None:
    c = matrix(SPECTRA["graded"](5))
    (x, s, y), (left, scaled, right) = solve(c, c * 2.0**exponent)
    assert (scaled == s * 2.0**exponent).all()
    assert (x == left).all()
    assert (y == right).all()


def test_not_finite_is_not_a_number() -> None:
    bad = matrix(SPECTRA["uniform"](4))
    good = bad.copy()
    bad[1, 2] = np.nan
    (_, lost, _), (_, worse, _), fine = solve(bad, good * np.inf, good)
    assert np.isnan(lost).all()
    assert np.isnan(worse).all()
    assert not faults(good, *fine)


def test_same_bits_in_any_batch_and_memory() -> None:
    matrices = [matrix(SPECTRA[name](5), seed) for seed, name in enumerate(SPECTRA)]
    together = solve(*matrices)
    (alone,) = solve(matrices[2])
    assert all((x == y).all() for x, y in zip(together[2], alone, strict=True))
    inside, _ = guarded(torch.from_numpy(np.stack(matrices)).to(DEVICE))
    transposed = (part.cpu().numpy() for part in launch_svd(inside.mT))
    for c, *answer in zip(matrices, *transposed, strict=True):
        assert not faults(c.T, *answer)


@pytest.mark.parametrize("batch", [(), (1,), (3, 4), (0,)])
def test_one_launch_for_any_batch(batch: tuple[int, ...]) -> None:
    calls: list[Call] = []
    with observed(lambda call: calls.append(call) is None):
        x, s, y = launch_svd(torch.eye(2, dtype=torch.float64, device=DEVICE).expand(*batch, 2, 2))
    assert s.shape == (*batch, 2)
    assert x.shape == y.shape == (*batch, 2, 2)
    assert len(calls) == (0 not in batch)


def test_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n: got 200, expected 1 to 128"):
        launch_svd(torch.eye(200, dtype=torch.float64, device=DEVICE))
