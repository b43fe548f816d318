"""Canonical forms from Gram matrices on a device: against the factors, and against the CPU's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.kernels.canonical_solve import MAX_RANK, launch_canonical_solve
from glora_ops.kernels.launching import Call, observed
from kernel_cases import DEVICE, poisoned
from spectra import orthogonal

from glora_ops.linalg.canonical import balance, canonical_forms
from glora_ops.linalg.ragged import Ragged

U64 = 2.0**-53
KNOWN = ("sigma", "soft", "hard", "size", "noise", "tau", "norm", "loudest")
D_OUT, D_IN = 70, 75
Pair = tuple[np.ndarray, np.ndarray]


def plain(r: int, seed: int = 0) -> Pair:
    rng = np.random.default_rng(100 * seed + r)
    return rng.standard_normal((r, D_OUT)), rng.standard_normal((r, D_IN))


def gauged(r: int, condition: float) -> Pair:
    """fp32 factors in a gauge of this condition."""
    b, a = plain(r)
    g = orthogonal(r, 1) * np.geomspace(1, condition, r)
    return (g.T @ b).astype(np.float32).astype(float), (np.linalg.inv(g) @ a).astype(
        np.float32
    ).astype(float)


def widened(rank: int, r: int) -> Pair:
    """A rank-`rank` update stored at rank r."""
    b, a = plain(rank)
    mix = np.random.default_rng(7).standard_normal((rank, r))
    return mix.T @ b, np.linalg.pinv(mix) @ a


def with_dead_rows(r: int) -> Pair:
    b, a = plain(r)
    b[1], a[1] = 0, 1e30
    a[r - 1] = 0
    return b, a


def tied(r: int) -> Pair:
    """All singular values equal, directions not along the rows."""
    b, a = np.eye(r, D_OUT), np.eye(r, D_IN)
    return orthogonal(r, 3) @ b, orthogonal(r, 4) @ a


@dataclass(frozen=True)
class Solved:
    """What came out for one client, cut to its rank, and what stands beyond it."""

    t_u: np.ndarray
    t_v: np.ndarray
    sigma: np.ndarray
    size: float
    beyond: float


def grams(pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1, K, r, r) twice and the ranks; NaN beyond a client's rank."""
    width = max(len(b) for b, _ in pairs)
    out = torch.full((2, 1, len(pairs), width, width), torch.nan, dtype=torch.float64)
    for k, pair in enumerate(pairs):
        for side, x in enumerate(pair):
            out[side, 0, k, : len(x), : len(x)] = torch.from_numpy(x @ x.T)
    ranks = torch.tensor([len(b) for b, _ in pairs])
    return out[0].to(DEVICE), out[1].to(DEVICE), ranks.to(DEVICE)


def solve(pairs: list[Pair]) -> list[Solved]:
    with poisoned():
        answer = launch_canonical_solve(*grams(pairs))
    t_u, t_v, sigma, size = (part[0].cpu().numpy() for part in answer)
    out = []
    for k, (b, _) in enumerate(pairs):
        r = len(b)
        rest = (t_u[k, r:], t_u[k, :, r:], t_v[k, r:], t_v[k, :, r:], sigma[k, r:])
        beyond = sum(abs(x).sum() for x in rest)
        out.append(Solved(t_u[k, :r, :r], t_v[k, :r, :r], sigma[k, :r], size[k], beyond))
    return out


def on_the_cpu(pair: Pair) -> Solved:
    def eigh(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam, vec = torch.linalg.eigh(g)
        return lam.flip(-1).clamp_(min=0), vec.flip(-1)

    balanced = balance(*(torch.from_numpy(x @ x.T) for x in pair))
    forms = canonical_forms(balanced, eigh)
    return Solved(
        forms.t_u.numpy(), forms.t_v.numpy(), forms.sigma.numpy(), float(balanced.size), 0.0
    )


def faults(pair: Pair, got: Solved) -> list[str]:
    """What is wrong with a client's canonical form, from its factors and from the CPU's answer."""
    b, a = pair
    r, size = len(b), got.size
    q, z = b.T @ got.t_u, a.T @ got.t_v
    alive = got.sigma > 0
    want = on_the_cpu(pair)
    # Squares carry 2⁻⁵³‖G_A‖‖G_B‖; vectors lose that relative to σ², as on the CPU.
    square = 32 * r * U64 * size**2
    slack = 64 * r * U64 * np.outer(*2 * (size / np.where(alive, got.sigma, np.inf),)) + 1e-14
    orthonormal = [abs(x.T @ x - np.diag(alive * 1.0)) <= slack for x in (q, z)]
    found = {
        "size": abs(size - want.size) <= 4 * r * U64 * want.size,
        "order": (np.diff(got.sigma) <= 0).all(),
        "sigma": (abs(got.sigma**2 - want.sigma**2) <= square).all(),
        "true sigma": (abs(got.sigma**2 - np.linalg.svd(b.T @ a)[1][:r] ** 2) <= square).all(),
        "update": np.linalg.norm((q * got.sigma) @ z.T - b.T @ a) <= 2.0**-23 * size,
        "orthonormality": all(x.all() for x in orthonormal),
        "dropped columns": not q[:, ~alive].any() and not z[:, ~alive].any(),
        "padding": got.beyond == 0,
    }
    return [name for name, good in found.items() if not good]


CASES = {
    "rank 1": plain(1),
    "rank 3": plain(3),
    "rank 11": plain(11),
    "full block": gauged(16, 1e2),
    "condition 1e4": gauged(8, 1e4),
    "over-parametrised": widened(4, 12),
    "dead rows": with_dead_rows(7),
    "ties": tied(6),
    "zero": (np.zeros((4, D_OUT)), plain(4)[1]),
}


def test_is_the_canonical_form() -> None:
    for (name, pair), got in zip(CASES.items(), solve(list(CASES.values())), strict=True):
        if name == "zero":
            assert not got.t_u.any()
            assert not got.t_v.any()
            assert not got.sigma.any()
            assert got.size == 0
        else:
            assert not faults(pair, got), name


def test_ragged_ranks_across_blocks() -> None:
    """Ranks on both sides of the block sides 16, 32 (and 64) in one call."""
    pairs = [plain(2), plain(17), gauged(33, 1e2)]
    if DEVICE == "cuda":
        pairs += [gauged(64, 1e3), widened(16, 64)]
    for pair, got in zip(pairs, solve(pairs), strict=True):
        assert not faults(pair, got), len(pair[0])


def test_what_is_wrong_is_found() -> None:
    pair = plain(6)
    (good,) = solve([pair])
    assert not faults(pair, good)
    t_u, t_v, s = good.t_u, good.t_v, good.sigma
    wrong = {
        "sides exchanged": (t_v, t_u, s),
        "sign": (-t_u, t_v, s),
        "last direction lost": (t_u * (s > s[-1]), t_v * (s > s[-1]), s * (s > s[-1])),
        "not orthonormal": (t_u * (1 + 1e-9), t_v, s),
        "zero": (0 * t_u, 0 * t_v, 0 * s),
    }
    for name, answer in wrong.items():
        assert faults(pair, Solved(*answer, good.size, 0.0)), name


def test_over_parametrised_updates_have_the_true_rank() -> None:
    (got,) = solve([widened(4, 12)])
    assert (got.sigma > 0).sum() == 4


def test_directions_are_dropped_at_the_level_of_rounding() -> None:
    """σ² against 16·r·2⁻⁵³: 1e-6 is kept, 3e-8 is not, on the CPU as here."""
    sigma = np.array([1.0, 1e-3, 1e-6, 3e-8])
    pair = np.eye(4, D_OUT), sigma[:, None] * np.eye(4, D_IN)
    (got,) = solve([pair])
    assert np.allclose(got.sigma, [1, 1e-3, 1e-6, 0], rtol=1e-14, atol=0)
    assert (on_the_cpu(pair).sigma > 0).tolist() == (got.sigma > 0).tolist()


def test_the_clean_up_leaves_rounding_alone() -> None:
    b, a = plain(11)
    (got,) = solve([(b, a)])
    for x in (b.T @ got.t_u, a.T @ got.t_v):
        assert abs(x.T @ x - np.eye(11)).max() <= 2 * 11 * U64


def test_a_dead_pair_changes_nothing() -> None:
    b, a = plain(3)
    alone, beside = solve(
        [(b, a), (np.vstack([b, np.full(D_OUT, 1e30)]), np.vstack([a, np.zeros(D_IN)]))]
    )
    assert np.allclose(beside.sigma[:3], alone.sigma, rtol=1e-14)
    assert beside.sigma[3] == 0
    assert not beside.t_u[3].any()
    assert not beside.t_v[3].any()


def test_power_of_two_gauges_change_no_other_bit() -> None:
    b, a = plain(5)
    d = 2.0 ** np.array([-60, 3, 0, 17, 60])[:, None]
    one, two = solve([(b, a), (d * b, a / d)])
    assert (one.sigma == two.sigma).all()
    assert one.size == two.size
    assert (one.t_u == d * two.t_u).all()
    assert (one.t_v == two.t_v / d).all()


def test_balanced_grams_are_taken_as_they_are() -> None:
    """What `canonical.balance` made goes in as well; its D is then left to the caller."""
    b, a = plain(4)
    d = np.array([1e3, 1e-2, 1.0, 30.0])[:, None]
    gram_b, gram_a, ranks = grams([(d * b, a / d)])
    pair = balance(gram_b.cpu(), gram_a.cpu())
    raw = launch_canonical_solve(gram_b, gram_a, ranks)
    done = launch_canonical_solve(pair.gram_b.to(DEVICE), pair.gram_a.to(DEVICE), ranks)
    assert torch.equal(raw[0].cpu(), pair.d[..., None] * done[0].cpu())
    assert torch.equal(raw[1].cpu(), pair.d_inverse[..., None] * done[1].cpu())
    assert torch.equal(raw[2], done[2])


def test_not_finite_is_not_a_number() -> None:
    b, a = plain(3)
    bad = b.copy()
    bad[1, 4] = np.nan
    lost, endless, fine = solve([(bad, a), (b, a * np.inf), (b, a)])
    assert np.isnan(lost.size)
    assert np.isnan(endless.size) or np.isinf(endless.size)
    assert not faults((b, a), fine)


@pytest.mark.parametrize(("ranks", "launches"), [((1,), 1), ((16, 2), 1), ((17, 4, 4), 2)])
def test_launches_count_block_sides_only(ranks: tuple[int, ...], launches: int) -> None:
    for modules in (1, 2):
        calls: list[Call] = []
        gram_b, gram_a, marks = grams([plain(r) for r in ranks])
        with observed(lambda call: (calls.append(call), False)[1]):  # noqa: B023
            launch_canonical_solve(
                gram_b.expand(modules, -1, -1, -1), gram_a.expand(modules, -1, -1, -1), marks
            )
        assert len(calls) == launches


def test_modules_do_not_meet() -> None:
    one, two = grams([plain(3), plain(2)]), grams([plain(3, 1), plain(2, 1)])
    both = launch_canonical_solve(torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]]), one[2])
    for part, first, second in zip(
        both, launch_canonical_solve(*one), launch_canonical_solve(*two), strict=True
    ):
        assert torch.equal(part, torch.cat([first, second]))


def test_one_more_launch_makes_votes_and_sizes_of_clients() -> None:
    """Every number the CPU's words know of them: negative and zero scaling, an empty client."""
    rng, ranks, device = torch.Generator().manual_seed(1), [3, 0, 5, 2, 4], torch.device(DEVICE)
    offsets = torch.tensor([0, *ranks]).cumsum(0)
    here, there = (Ragged.of(offsets, 14, x, 6) for x in (torch.device("cpu"), device))
    rows = [torch.randn(2, 14, 20, generator=rng, dtype=torch.float64) for _ in range(2)]
    rows[0][:, 5] *= 1e-3  # below what is stored: soft votes have it, hard ones do not
    rows[1][:, 12] = 0  # a dead pair
    scaling = torch.tensor([[1.0, 1, -2, 0, 0.5], [0, 3, 1, 1, -1]], dtype=torch.float64)
    grams = [CpuVocabulary().gram(x, here) for x in rows]
    calls: list[Call] = []
    with poisoned(), observed(lambda call: (calls.append(call), True)[1]):
        got = CudaVocabulary().canonical(
            *(g.to(device) for g in grams), there, scaling.to(device), 0.1, 2.0**-11
        )
        known = {x: getattr(got, x).cpu() for x in KNOWN}
    assert [call.name for call in calls] == ["canonical_kernel", "votes_kernel"]
    want = CpuVocabulary().canonical(*grams, here, scaling, 0.1, 2.0**-11)
    for name, value in known.items():
        assert torch.allclose(value, getattr(want, name), rtol=1e-9, atol=1e-12), name
    assert ((known["hard"] > 0) != (known["sigma"] > 0)).any()
    for x, y in ((got.t_u, want.t_u), (got.t_v, want.t_v)):
        assert torch.allclose(x.cpu().abs(), y.abs(), rtol=1e-6, atol=1e-6)
    crossed = [here.pad(x.cpu()) @ here.pad(y.cpu()).mT for x, y in (got.t, want.t)]
    assert torch.allclose(*crossed, rtol=1e-6, atol=1e-6)  # U and V turn together


def test_too_wide_is_refused() -> None:
    wide = torch.zeros(1, 1, MAX_RANK + 1, MAX_RANK + 1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"rank: got 65, expected at most 64"):
        launch_canonical_solve(wide, wide, torch.tensor([MAX_RANK + 1], device=DEVICE))
