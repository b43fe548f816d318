"""The batched eigenproblem kernel against NumPy's, over the spectra that glora meets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from glora_ops.kernels import jacobi
from glora_ops.kernels.eigh import launch_eigh
from glora_ops.kernels.jacobi import MAX_SIZE
from glora_ops.kernels.launching import Call, observed
from kernel_cases import DEVICE, guarded, poisoned
from spectra import SPECTRA, orthogonal

U64 = 2.0**-53
# The interpreter needs a second per matrix of side 33.
LARGE = (64, 80, 128) if DEVICE == "cuda" else (33,)


def symmetric(lam: np.ndarray, seed: int = 0) -> np.ndarray:
    q = orthogonal(len(lam), seed)
    g = (q * lam) @ q.T
    return (g + g.T) / 2


def solve(*grams: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    with poisoned():
        lam, v = launch_eigh(torch.from_numpy(np.stack(grams)).to(DEVICE))
    return list(zip(lam.cpu().numpy(), v.cpu().numpy(), strict=True))


def faults(g: np.ndarray, lam: np.ndarray, v: np.ndarray) -> list[str]:
    """What is wrong with an eigendecomposition, backward stable to 10·n·2⁻⁵³."""
    n = len(g)
    tol = 10 * n * U64
    size = np.linalg.norm(g, 2)
    want = np.maximum(np.linalg.eigvalsh(g)[::-1], 0)
    found = {
        "order": (np.diff(lam) <= 0).all() and (lam >= 0).all(),
        "eigenvalues": abs(lam - want).max() <= tol * size,
        "orthonormality": np.linalg.norm(v.T @ v - np.eye(n), 2) <= tol,
        "reconstruction": np.linalg.norm((v * lam) @ v.T - g, 2) <= tol * size,
    }
    return [name for name, good in found.items() if not good]


@pytest.mark.parametrize("n", [1, 2, 5, 16, *LARGE])
def test_is_the_eigendecomposition(n: int) -> None:
    names = ("graded", "clusters") if n == 33 else SPECTRA
    grams = [symmetric(SPECTRA[name](n)) for name in names]
    for name, g, (lam, v) in zip(names, grams, solve(*grams), strict=True):
        assert not faults(g, lam, v), name


@pytest.mark.parametrize("n", [5, 16, *LARGE])
def test_in_single_it_errs_by_fp32_and_vectors_stay_orthonormal(n: int) -> None:
    """Clusters and ties included, which sweeps in fp64 would need many more of to tell apart."""
    names = ("clusters",) if n == 33 else SPECTRA
    grams = [symmetric(SPECTRA[name](n)) for name in names]
    with poisoned():
        got = launch_eigh(torch.from_numpy(np.stack(grams)).to(DEVICE), precise=False)
    for name, g, lam, v in zip(names, grams, *(x.cpu().numpy() for x in got), strict=True):
        tol, size = 4 * n * 2.0**-24, np.linalg.norm(g, 2)
        assert (np.diff(lam) <= 0).all(), name
        assert abs(lam - np.maximum(np.linalg.eigvalsh(g)[::-1], 0)).max() <= tol * size, name
        assert np.linalg.norm((v * lam) @ v.T - g, 2) <= tol * size, name
        assert np.linalg.norm(v.T @ v - np.eye(n), 2) <= 2.0**-34, name


@pytest.mark.parametrize("precise", [True, False])
def test_rows_beyond_64_are_a_block_of_their_own(precise: bool) -> None:
    g = symmetric(SPECTRA["deficient"](66))
    with poisoned():
        lam, v = (
            x[0].cpu().numpy() for x in launch_eigh(torch.from_numpy(g[None]).to(DEVICE), precise)
        )
    if precise:
        assert not faults(g, lam, v)
    else:
        assert np.linalg.norm((v * lam) @ v.T - g, 2) <= 2.0**-17
        assert np.linalg.norm(v.T @ v - np.eye(66), 2) <= 2.0**-34


@pytest.mark.skipif(DEVICE == "cuda", reason="the bound is compiled in")
def test_twenty_sweeps_are_enough_and_forty_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the bound changes no bit on any spectrum; two sweeps would."""
    grams = [symmetric(SPECTRA[name](7)) for name in ("clusters", "graded", "uniform")]
    assert jacobi.SWEEPS.value == 40
    whole = solve(*grams)
    monkeypatch.setattr(jacobi, "SWEEPS", tl.constexpr(20))
    for (lam, v), (some, w) in zip(whole, solve(*grams), strict=True):
        assert (lam == some).all()
        assert (v == w).all()
    monkeypatch.setattr(jacobi, "SWEEPS", tl.constexpr(2))
    assert any((v != w).any() for (_, v), (_, w) in zip(whole, solve(*grams), strict=True))


def test_what_is_wrong_is_found() -> None:
    g = symmetric(SPECTRA["uniform"](8))
    ((lam, v),) = solve(g)
    assert not faults(g, lam, v)
    wrong = {
        "ascending": (lam[::-1], v[:, ::-1]),
        "rows for columns": (lam, v.T),
        "single precision": (lam, v.astype(np.float32).astype(float)),
        "eigenvalue of rounding size lost": (np.where(lam == lam[-1], 0, lam), v),
        "two vectors swapped": (lam, v[:, [1, 0, *range(2, 8)]]),
    }
    for name, answer in wrong.items():
        assert faults(g, *answer), name


def test_mean_projectors_in_gram_form() -> None:
    """Five clients of rank 3 that share two directions exactly: ties, clusters and zeros."""
    shared = orthogonal(40, 1)[:, :2]
    columns = []
    for client in range(5):
        own = orthogonal(40, 2 + client)[:, :1]
        columns.append(np.linalg.qr(np.hstack([shared, own]))[0] / np.sqrt(5))
    m = np.hstack(columns)
    g = m.T @ m
    ((lam, v),) = solve(g)
    assert not faults(g, lam, v)
    assert np.allclose(lam[:2], 1, atol=1e-14)
    assert (lam[7:] < 1e-15).all()


def test_zero_and_duplicates_complete_the_basis() -> None:
    duplicate = np.ones((6, 6))
    padded = np.zeros((6, 6))
    padded[:3, :3] = symmetric(np.array([3.0, 2.0, 1.0]))
    for g, (lam, v) in zip(
        (np.zeros((6, 6)), duplicate, padded),
        solve(np.zeros((6, 6)), duplicate, padded),
        strict=True,
    ):
        assert not faults(g, lam, v)
        assert (lam[np.linalg.matrix_rank(g) :] == 0).all()


def test_rounding_below_zero_is_clamped() -> None:
    g = symmetric(np.array([1.0, 0.5, 0.0, 0.0])) - 1e-17 * np.eye(4)
    ((lam, v),) = solve(g)
    assert not faults(g, lam, v)


@pytest.mark.parametrize("exponent", [-900, 301, 1000])
def test_powers_of_two_change_no_other_bit(exponent: int) -> None:
    g = symmetric(SPECTRA["graded"](5))
    (lam, v), (scaled, same) = solve(g, g * 2.0**exponent)
    assert (scaled == lam * 2.0**exponent).all()
    assert (v == same).all()


def test_not_finite_is_not_a_number() -> None:
    bad = symmetric(SPECTRA["uniform"](5))
    bad[1, 2] = np.nan
    good = symmetric(SPECTRA["uniform"](5))
    endless = good * np.inf
    (lam, _), (fine, v), (worse, _) = solve(bad, good, endless)
    assert np.isnan(lam).all()
    assert np.isnan(worse).all()
    assert not faults(good, fine, v)


def test_same_bits_in_any_batch_and_memory() -> None:
    grams = [symmetric(SPECTRA[name](5), seed) for seed, name in enumerate(SPECTRA)]
    together = solve(*grams)
    (alone,) = solve(grams[2])
    assert all((x == y).all() for x, y in zip(together[2], alone, strict=True))
    inside, _ = guarded(torch.from_numpy(np.stack(grams)).to(DEVICE))
    lam, v = launch_eigh(inside.mT)  # strided; symmetric up to rounding
    for g, *answer in zip(grams, lam.cpu().numpy(), v.cpu().numpy(), strict=True):
        assert not faults(g, *answer)


@pytest.mark.parametrize("batch", [(), (1,), (3, 4), (0,)])
def test_one_launch_for_any_batch(batch: tuple[int, ...]) -> None:
    calls: list[Call] = []
    with observed(lambda call: calls.append(call) is None):
        lam, v = launch_eigh(torch.eye(2, dtype=torch.float64, device=DEVICE).expand(*batch, 2, 2))
    assert lam.shape == (*batch, 2)
    assert v.shape == (*batch, 2, 2)
    assert len(calls) == (0 not in batch)


def test_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n: got 129, expected 1 to 128"):
        launch_eigh(torch.eye(MAX_SIZE + 1, dtype=torch.float64, device=DEVICE))
