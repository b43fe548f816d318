"""`aggregate` against the float64 reference: the accuracy contract, per dtype and basis."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

import bounds
import numpy as np
import pytest
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from hypothesis import currently_in_test_context, event, example, given
from strategies import (
    BASES,
    DTYPES,
    TALLY,
    Answer,
    Problem,
    Recipe,
    aggregate,
    build,
    count,
    distance,
    norm,
    problems,
)
from torch.utils._python_dispatch import TorchDispatchMode

from glora_ops import CLIENT_STATS, STATS, pack, pack_modules, reference
from glora_ops.linalg import ragged, random_signs

U32 = bounds.U32


def judge(problem: Problem, basis: str) -> reference.Aggregate:
    return reference.aggregate(
        problem.arrays(),
        problem.weights,
        problem.scaling,
        problem.rank,
        basis,
        unit_roundoff=problem.unit,
    )


def check_against_reference(problem: Problem, basis: str, tally: Counter) -> None:
    """Contract (a): flagged draws assert the flag, all others the bound."""
    answer, want = aggregate(problem, basis), judge(problem, basis)
    count(problem, answer, "reference")
    check_form(problem, answer)
    size = bounds.storage_scale(problem.arrays(), problem.weights, problem.scaling)
    whole = True
    if basis == "projector":
        _, whole, undecided = hard_ranks(problem)
        if undecided or barely_there(answer):
            TALLY["numerical rank undecided"] += 1
            return
    if problem.exact and whole:
        truth, limit = want.w_bar, bounds.exact_bound(size)
    else:
        if want.flagged or answer.flagged:
            note("flagged")
            tally["flagged"] += 1
            assert answer.flagged == want.flagged or near_the_threshold(answer, want, basis)
            return
        truth = want.w_hat
        limit = bounds.cut_bound(size, want.kappa_p, want.kappa_w)
    note("exact" if problem.exact else "cut")
    tally["judged"] += 1
    for name, value, same in bounds.wrong_answers(
        problem.arrays(), problem.weights, problem.scaling, problem.rank, truth
    ):
        far = norm(value - truth)
        tally[f"{name} rejected"] += far > limit
        TALLY[f"{name}: rejected"] += far > limit
        TALLY[f"{name}: true there, or below the bound"] += far <= limit
        tally[f"{name} vacuous"] += same < far <= limit
    error = norm(answer.w_hat - truth)
    assert error <= limit, f"{error / limit:.3g} × the bound, {error / size / bounds.U32:.3g}·u32·S"


def note(what: str) -> None:
    if currently_in_test_context():
        event(what)


class HardRanks(NamedTuple):
    """The clients' numerical ranks of ``projector``: a step, and who stands on its edge."""

    ranks: list[int]
    whole: bool
    undecided: bool


def hard_ranks(problem: Problem) -> HardRanks:
    """σ > 4·u_in·‖B‖‖A‖, or what fp64 Gram matrices resolve where that is coarser."""
    ranks, whole, undecided = [], True, False
    width = max(b.shape[1] for b, _ in problem.clients)
    for (b, a), s in zip(problem.arrays(), problem.scaling, strict=True):
        size = reference.storage_norm(b, a, s)
        sigma = np.linalg.svd(reference.update(b, a, s))[1]
        stored, gram = 4 * problem.unit * size, (16 * width * 2.0**-53) ** 0.5 * size
        ranks.append(int((sigma > max(stored, gram)).sum()))
        whole &= bool(((sigma > stored) | (sigma <= 2.0**-53 * size)).all())
        undecided |= bool((abs(sigma - stored) <= 1e-2 * stored).any()) and stored > gram / 10
        undecided |= bool(((0.1 * gram < sigma) & (sigma < 1.05 * gram)).any()) and stored < gram
    return HardRanks(ranks, whole, undecided)


def barely_there(answer: Answer) -> bool:
    """Whether some eigenvalue of a sum of hard projectors is as small as rounding makes them.

    Gram matrices turn a direction of size σ by u64·(‖B‖‖A‖/σ)², up to 1e-4 near the rank cut; two
    clients that share it then seem to differ by the square of that.
    """
    eig = torch.stack([answer.eig_u, answer.eig_v])
    return bool(((eig > 1e-14 * eig[:, :1]) & (eig < 1e-8 * eig[:, :1])).any())


def near_the_threshold(answer: Answer, want: reference.Aggregate, basis: str) -> bool:
    """Whether rounding could put the certificates on either side of a flag.

    A gauge of condition ρ moves a projector made from fp64 Gram matrices by u64·ρ²; nearly equal
    hard projectors then differ in eigenvalues that are not worth more than an order of magnitude.
    """
    gap = min(want.gap_u, want.gap_v, 1 / max(want.kappa_w, 1.0))
    kappa, least, most = max(want.kappa_p, want.kappa_w) * U32, 0.5e-2, 2e-2
    if basis == "projector" and answer.stat("rho_max") > 1e3:
        kappa = max(kappa, answer.stat("kappa_p") * U32, answer.stat("kappa_w") * U32)
        least, most = 1e-3, 1
    return 0.5e-3 < gap < 2e-3 or least < kappa < most


def check_form(problem: Problem, answer: Answer) -> None:
    """An SVD: descending, orthonormal or zero, signs fixed, certificates in range, all finite."""
    for x in (answer.u, answer.s, answer.v, answer.eig_u, answer.eig_v, answer.client_stats):
        assert bool(x.isfinite().all())
    assert answer.flagged or bool(answer.stats.isfinite().all())
    alive = (answer.s > 0).double()
    for x in (answer.u, answer.v):
        assert norm((x.double().mT @ x.double() - torch.diag(alive)).numpy()) <= 1e-5
    assert bool((answer.s.diff() <= 0).all())
    peak = answer.u.gather(0, answer.u.abs().argmax(0, keepdim=True))
    assert bool((peak >= 0).all())
    assert 0 <= answer.stat("captured") <= answer.stat("attainable") <= 1
    assert answer.stat("effective_rank") == int(alive.sum())
    assert problem.rank == len(answer.s)


REGRESSIONS = (
    # A quiet client in a bad gauge beside a loud one: fp32 lifts spoiled the loud one's direction.
    Recipe(seed=1874, m=6, n=30, ranks=(1, 4, 4), weights="uneven", condition=1e4, widen=1,
           loud=1e6, spectrum="flat", cut="N"),
    Recipe(seed=17539, m=18, n=18, ranks=(1, 2), spectrum="steep", gap=1e-3, condition=1e4,
           widen=4, dead=True, loud=1e6, cut="dim"),
    Recipe(seed=48659, m=13, n=24, ranks=(1, 3, 1), kind="pool", spectrum="steep", gap=1e-4,
           weights="nearly", scaling="mixed", condition=1e4, widen=4, loud=1e6, cut="N"),
    # More columns than dimensions, one of them noise.
    Recipe(seed=10855, m=18, n=18, ranks=(3,) * 5, spectrum="deficient", gap=1e-4,
           weights="uneven", scaling="mixed", condition=1e4, widen=4, loud=1e6, cut=">d",
           dtype="bfloat16"),
    # A mean that cancels to rounding has no cut that could be ambiguous.
    Recipe(seed=10932, m=9, n=9, ranks=(5, 2, 5, 5), kind="cancelling", spectrum="deficient",
           gap=1e-6, weights="nearly", scaling="mixed", condition=1e4, cut="1"),
    # Ties of directions that fp64 Gram matrices do not see.
    Recipe(seed=0, ranks=(2, 2), kind="pool", spectrum="steep", cut="dim-1", dtype="float64"),
    # Weak directions with a full vote that held what is left of strong ones.
    Recipe(seed=3, m=9, n=9, ranks=(3,) * 5, kind="pool", spectrum="steep", cut="1",
           dtype="float64"),
)  # fmt: skip


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("recipe", REGRESSIONS, ids=lambda r: f"{r.dtype}-{r.seed}")
def test_hard_cases_that_once_failed(recipe, basis):
    check_against_reference(build(recipe), basis, Counter())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_within_the_bound_of_the_reference(basis, dtype):
    """The contract over everything that is drawn; wrong answers must miss the same bounds."""
    tally = Counter()

    @given(problem=problems((dtype,)))
    @example(problem=build(Recipe(seed=0, ranks=(1,), cut="1", dtype=dtype)))
    @example(
        problem=build(Recipe(seed=0, ranks=(2, 3), mute=True, weights="one silent", dtype=dtype))
    )
    @example(problem=build(Recipe(seed=0, kind="cancelling", ranks=(3, 3), gap=0.0, dtype=dtype)))
    @example(problem=build(Recipe(seed=0, kind="frozen", ranks=(4, 4, 4), cut="r", dtype=dtype)))
    def check(problem):
        check_against_reference(problem, basis, tally)

    check()
    for name in ("zero", "factor mean", "best rank R-1"):
        assert tally[f"{name} rejected"] > 0.3 * (tally["judged"]), tally
        assert tally[f"{name} vacuous"] < 0.25 * tally["judged"], tally


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("cut", ["r", "N"])
def test_the_bound_rejects_every_wrong_answer_on_healthy_clients(basis, dtype, cut):
    problem = build(Recipe(seed=3, ranks=(3, 3, 3), cut=cut, weights="uneven", dtype=dtype))
    answer, want = aggregate(problem, basis), judge(problem, basis)
    assert not answer.flagged
    args = problem.arrays(), problem.weights, problem.scaling
    size = bounds.storage_scale(*args)
    truth = want.w_bar if cut == "N" else want.w_hat
    limit = bounds.cut_bound(size, want.kappa_p, want.kappa_w)
    if cut == "N":
        limit = bounds.exact_bound(size)
    verdict = bounds.assert_within(
        answer.w_hat, truth, limit, bounds.wrong_answers(*args, problem.rank, truth)
    )
    assert set(verdict.rejected) == {"zero", "factor mean", "best rank R-1"}
    # The wrong answers through the same pipe: basis, one direction less, equal weights.
    one_less = (answer.u[:, : problem.rank - 1].double() * answer.s[: problem.rank - 1]) @ (
        answer.v[:, : problem.rank - 1].double().mT
    )
    if cut == "r":
        assert norm(one_less.numpy() - truth) > limit
    equal = Problem(
        problem.recipe, problem.clients, np.full(3, 1 / 3), problem.scaling, problem.rank
    )
    assert norm(aggregate(equal, basis).w_hat - truth) > limit
    for other in set(BASES) - {basis} if cut == "r" else ():
        assert norm(aggregate(problem, other).w_hat - truth) > limit


def at_the_floor(result: Answer | reference.Aggregate) -> bool:
    """An eigenvalue is about 1e-12 of the top, where rounding decides whether κ_P counts it."""
    relative = np.concatenate([np.asarray(x) / float(x[0]) for x in (result.eig_u, result.eig_v)])
    return bool(((relative > 1e-13) & (relative < 1e-11)).any())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("basis", BASES)
def test_certificates_are_those_of_the_reference(basis, dtype):
    @given(problem=problems((dtype,), loud=1.0, condition=1.0, widen=0))
    @example(problem=build(Recipe(seed=1, m=9, n=9, ranks=(1, 1), kind="partly", gap=1e-6,
                                  spectrum="flat", weights="nearly", scaling="negative", cut="1",
                                  dtype=dtype)))  # fmt: skip
    @example(problem=build(Recipe(seed=0, ranks=(1, 1), kind="cancelling", spectrum="flat",
                                  gap=1e-3, cut="1", dtype=dtype)))  # fmt: skip
    @example(problem=build(Recipe(seed=1, m=20, n=16, ranks=(1, 2, 1, 2), kind="aligned", cut="1",
                                  spectrum="flat", scaling="negative", dtype=dtype)))  # fmt: skip
    def check(problem):
        answer, want = aggregate(problem, basis), judge(problem, basis)
        count(problem, answer, "certificates")
        if basis == "projector" and (hard_ranks(problem).undecided or barely_there(answer)):
            return
        size = bounds.storage_scale(problem.arrays(), problem.weights, problem.scaling)
        # Norms at the edge of a power of two may be balanced either way.
        assert answer.stat("storage_scale") == pytest.approx(size, rel=0.3)
        spectrum = np.linalg.norm(want.w_bar)
        assert abs(answer.stat("norm") - spectrum) <= 32 * U32 * size
        norms = answer.client_stats[:, CLIENT_STATS.index("norm")].numpy()
        assert np.allclose(norms, want.norm, rtol=1e-6, atol=32 * U32 * size)
        assert answer.stat("rho_max") == pytest.approx(want.rho_max, rel=0.5)
        if spectrum <= 1e3 * U32 * size or answer.flagged or want.flagged:
            return
        kappa = 1 + want.kappa_p + want.kappa_w
        slack = 64 * U32 * size / spectrum * kappa + 1e-9
        assert abs(answer.stat("captured") - want.captured) <= 2 * slack
        assert abs(answer.stat("attainable") - want.attainable) <= 2 * slack
        share = answer.client_stats[:, CLIENT_STATS.index("share")].numpy()
        assert share.sum() == pytest.approx(1, abs=(1e-3 + slack) * max(1, abs(share).max()))
        if kappa < 1e4:
            if not (at_the_floor(want) or at_the_floor(answer)):
                assert answer.stat("kappa_p") == pytest.approx(want.kappa_p, rel=0.05, abs=0.05)
            assert answer.stat("kappa_w") == pytest.approx(want.kappa_w, rel=0.05, abs=0.05)
            # Shares are fractions of a core; much smaller than its terms, it makes them noise.
            # Where the bases hold nothing of the mean, what rounding leaves is their core.
            largest = max(1, np.abs(want.share).max())
            core = np.sqrt(want.captured) * spectrum
            if largest < 1e3 and core > 1e3 * U32 * size:
                assert np.abs(share - want.share).max() <= (1e-3 + 10 * slack) * largest

    check()


# --- the documented composition ----------------------------------------------------------------


def composed(problem: Problem, basis: str) -> np.ndarray:
    """Ŵ by hand from the other ops, as the documentation describes `aggregate`."""
    p = problem.packed()
    w, s = torch.from_numpy(problem.weights), torch.from_numpy(problem.scaling)
    rank, ops = problem.rank, torch.ops.glora
    owner = torch.repeat_interleave(p.offsets.diff())
    t_u, t_v, sigma, f = ops.canonicalize(p.b, p.a, p.offsets, s)
    size = torch.tensor(
        [reference.storage_norm(*c, s_i) for c, s_i in zip(problem.arrays(), s, strict=True)],
        dtype=torch.float64,
    )
    votes = w / w.sum()
    extra_u = extra_v = None
    if basis == "projector":
        f = (sigma > 4 * problem.unit * size[owner]).double()
    else:
        loudness = torch.zeros_like(votes).index_add(0, owner, sigma.square()).sqrt()
        mean = (votes * loudness).sum()
        voice = torch.where(loudness > 0, 1 / loudness + 0.02 / mean, 0.0)
        x, lead, y, *_ = ops.aggregate(p.b, p.a, p.offsets, votes * voice, s, rank, "update")
        share = votes * voice * size
        noise = 0.5 * problem.unit * share.norm()
        at_cut = torch.stack([lead[-1], 0.01 * lead[0], noise]).amax()
        heard = lead > 8 * min(problem.unit, U32) * share.sum()
        g = torch.where(heard, lead**2 / (lead**2 + at_cut**2), 0.0)
        extra_u, extra_v = (g.sqrt().to(x.dtype) * z for z in (x, y))
    row_votes = votes[owner] * f
    u, _, _ = ops.projector_svd(p.b, p.offsets, t_u, row_votes, rank, extra=extra_u)
    v, _, _ = ops.projector_svd(p.a, p.offsets, t_v, row_votes, rank, extra=extra_v)
    c = ops.core(u, v, p.b, p.a, p.offsets, w, s)
    x, sigma, yh = torch.linalg.svd(c)
    return ((u.double() @ x * sigma) @ (v.double() @ yh.mT).mT).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", ["consensus", "projector"])
def test_is_the_documented_composition_of_the_other_ops(basis, dtype):
    @given(problem=problems((dtype,), condition=1.0, loud=1.0))
    def check(problem):
        answer, want = aggregate(problem, basis), judge(problem, basis)
        if answer.flagged or want.flagged:
            return
        if basis == "projector" and (hard_ranks(problem).undecided or barely_there(answer)):
            return
        size = bounds.storage_scale(problem.arrays(), problem.weights, problem.scaling)
        limit = bounds.cut_bound(size, want.kappa_p, want.kappa_w)
        assert norm(composed(problem, basis) - answer.w_hat) <= limit

    check()


def test_update_is_the_composition_of_nothing_but_the_mean():
    """With U, V the singular vectors of W̄ the core is diagonal, and Ŵ is the truncated SVD."""
    problem = build(Recipe(seed=1, cut="r"))
    answer = aggregate(problem, "update")
    p = problem.packed()
    w, s = torch.from_numpy(problem.weights), torch.from_numpy(problem.scaling)
    c = torch.ops.glora.core(answer.u, answer.v, p.b, p.a, p.offsets, w, s)
    assert torch.allclose(c, torch.diag(answer.s), atol=1e-6 * float(answer.s[0]))
    best = reference.optimum(judge(problem, "update").w_bar, problem.rank)
    assert distance(answer.w_hat, best) < 1e-6


def test_settings_reach_where_they_should():
    problem = build(Recipe(seed=1, ranks=(4, 4, 4), cut="r"))
    plain = aggregate(problem, "consensus").w_hat
    for settings in ({"tau_rel": 0.5}, {"anchor": 5.0}, {"anchor": 0.0}):
        want = reference.aggregate(
            problem.arrays(), problem.weights, problem.scaling, problem.rank,
            unit_roundoff=problem.unit, **settings,
        )  # fmt: skip
        got = aggregate(problem, "consensus", **settings).w_hat
        assert distance(got, want.w_hat) < 1e-4
        assert distance(got, plain) > 1e-3
    wide = aggregate(problem, "consensus", oversample=3)
    assert wide.eig_u.shape == (problem.rank + 3,)
    assert distance(wide.w_hat, plain) < 1e-12


def test_unnormalised_weights_scale_the_update_and_not_the_bases():
    problem = build(Recipe(seed=2, weights="uneven", cut="r"))
    many = Problem(
        problem.recipe, problem.clients, 800 * problem.weights, problem.scaling, problem.rank
    )
    for basis in BASES:
        one, two = aggregate(problem, basis), aggregate(many, basis)
        assert distance(two.w_hat, 800 * one.w_hat) < 1e-6
        assert torch.allclose(one.u, two.u, atol=1e-5)


def test_signed_weights_for_update():
    """Task arithmetic: W₁ − ½W₂, exact at R = N."""
    problem = build(Recipe(seed=3, ranks=(2, 3), cut="N"))
    signed = Problem(problem.recipe, problem.clients, np.array([1.0, -0.5]), problem.scaling, 5)
    size = bounds.storage_scale(signed.arrays(), signed.weights, signed.scaling)
    want = reference.mean_update(signed.arrays(), signed.weights, signed.scaling)
    assert norm(aggregate(signed, "update").w_hat - want) <= bounds.exact_bound(size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_batched_modules_are_bit_equal_to_single_ones(basis, dtype):
    many = [build(Recipe(seed=s, ranks=(3, 1, 4), dtype=dtype)).clients for s in range(3)]
    batch = pack_modules(many)
    w, s = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([1.0, -2.0, 0.5])
    together = torch.ops.glora.aggregate(batch.b, batch.a, batch.offsets, w, s, 4, basis)
    for l in range(3):
        alone = torch.ops.glora.aggregate(batch.b[l], batch.a[l], batch.offsets, w, s, 4, basis)
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x, y[l])


@pytest.mark.parametrize("basis", BASES)
def test_batched_modules_are_bit_equal_to_single_ones_on_the_iterative_solvers(basis):
    rng = torch.Generator().manual_seed(0)
    b, a = torch.randn(2, 300, 24, generator=rng), torch.randn(2, 300, 20, generator=rng)
    offsets, w = torch.arange(0, 301, 3), torch.full((100,), 0.01)
    together = torch.ops.glora.aggregate(b, a, offsets, w, torch.ones(100), 4, basis)
    for l in range(2):
        alone = torch.ops.glora.aggregate(b[l], a[l], offsets, w, torch.ones(100), 4, basis)
        assert alone[5][STATS.index("iterative")] == 1
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x, y[l])


def test_zero_rows_of_a_smaller_rank_change_nothing():
    """A client whose rank is smaller in some module is filled with zero rows."""
    problem = build(Recipe(seed=5, ranks=(3, 2), cut="r"))
    filled = [
        (torch.cat([b, torch.zeros(20, 2)], 1), torch.cat([a, torch.zeros(2, 16)]))
        for b, a in problem.clients
    ]
    for basis in BASES:
        one = aggregate(problem, basis)
        p = pack(filled)
        w, s = torch.from_numpy(problem.weights), torch.from_numpy(problem.scaling)
        two = torch.ops.glora.aggregate(p.b, p.a, p.offsets, w, s, problem.rank, basis)
        again = (two[0].double() * two[1]) @ two[2].double().mT
        assert distance(again.numpy(), one.w_hat) < 1e-6


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("scale", [(1e-30, 1e-8), (1e30, 1e8), (1e-38, 1e30), (1e-22, 1e-22)])
def test_magnitudes_do_not_matter(basis, scale):
    """Tiny, huge and subnormal-adjacent factors: the same answer, scaled."""
    problem = build(Recipe(seed=6, ranks=(3, 2, 4), cut="r", spectrum="linear"))
    want = aggregate(problem, basis)
    clients = [(b * torch.tensor(scale[0]), a * torch.tensor(scale[1])) for b, a in problem.clients]
    got = aggregate(
        Problem(problem.recipe, clients, problem.weights, problem.scaling, problem.rank), basis
    )
    factor = float(np.float32(scale[0])) * float(np.float32(scale[1]))
    assert distance(got.w_hat / factor, want.w_hat) < 1e-5


# --- nothing large, and no loop over clients ---------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts aten calls, and the numbers held by tensors alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.largest = 0
        self.alive: dict[int, list[int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                held = x.untyped_storage()
                entry = self.alive.setdefault(held.data_ptr(), [0, 0])
                entry[0] += 1
                entry[1] = held.nbytes() // x.element_size()
                weakref.finalize(x, self.release, held.data_ptr())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    def release(self, pointer: int) -> None:
        entry = self.alive.get(pointer)
        if entry is not None:
            entry[0] -= 1
            if entry[0] == 0:
                del self.alive[pointer]


def forget_plans() -> None:
    """What a repeated call finds ready would otherwise be missing from its count."""
    ragged._kept.cache_clear()
    random_signs.sign_matrix.cache_clear()


def watched(
    ranks: list[int], d_out: int, d_in: int, rank: int, basis: str, **settings: object
) -> Watch:
    rng = torch.Generator().manual_seed(0)
    b, a = (torch.randn(sum(ranks), d, generator=rng) for d in (d_out, d_in))
    offsets = torch.tensor([0, *ranks]).cumsum(0)
    w = torch.full((len(ranks),), 1 / len(ranks))
    ops = Ops(CpuVocabulary())
    forget_plans()
    with torch.no_grad(), Watch() as watch:
        ops.aggregate(b, a, offsets, w, torch.ones(len(ranks)), rank, basis, **settings)
    return watch


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("ranks", [[8] * 6, [4, 16, 8, 2] * 3, [8] * 40])
def test_nothing_of_the_size_of_the_update_is_allocated(basis, ranks):
    d_out, d_in, rank = 3000, 2500, 8
    watch = watched(ranks, d_out, d_in, rank, basis)
    budget = 3 * (sum(ranks) + rank + 16) * (d_out + d_in)
    assert watch.largest < d_out * d_in / 4
    assert watch.largest < budget
    assert watch.peak <= budget + 2**20  # and one buffer for fp64 accumulation


@pytest.mark.parametrize("basis", BASES)
def test_no_loop_over_clients(basis):
    """As many torch calls for 32 clients as for 4, uniform and ragged, on either route.

    Of rows that do not depend on each other; those that do are made orthonormal, once a side.
    """
    uniform = {watched([4] * k, 160, 144, 4, basis).calls for k in (4, 16, 32)}
    assert len(uniform) == 1
    ragged = {watched([1, 4, 2] * k, 160, 144, 4, basis).calls for k in (2, 8, 18)}
    assert len(ragged) == 1
    # Repairs of ill-conditioned blocks depend on the data: a few calls more or less.
    iterative = [watched([4] * k, 64, 48, 4, basis, power_iters=2).calls for k in (80, 300)]
    assert max(iterative) <= 1.05 * min(iterative)


@pytest.mark.parametrize("basis", BASES)
def test_modules_run_together(basis):
    """As many torch calls for 9 modules as for 2."""
    calls = set()
    for modules in (2, 9):
        rng = torch.Generator().manual_seed(0)
        b, a = (torch.randn(modules, 12, d, generator=rng) for d in (40, 30))
        forget_plans()
        with torch.no_grad(), Watch() as watch:
            Ops(CpuVocabulary()).aggregate(
                b, a, torch.tensor([0, 4, 8, 12]), torch.ones(3) / 3, torch.ones(3), 4, basis
            )
        calls.add(watch.calls)
    assert len(calls) == 1
