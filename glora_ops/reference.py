"""The mathematics of glora, line by line, in NumPy float64: the judge of the fast code.

Everything here is dense, slow and deterministic on purpose: d_out × d_in updates and d × d
projectors are formed, canonical forms come from Householder QR of both factors (never from Gram
matrices), bases from a full ``eigh`` or ``svd``, and nothing is random except the seeded padding of
:func:`readout`. None of the fast route's shortcuts is shared, so that agreement means something.

    ΔW_i = s_i B_i A_i                        one client's update        B (d_out, r), A (r, d_in)
    ΔW_i = Q_i Σ_i Z_iᵀ                       its canonical form         :func:`canonical`
    W̄  = Σ w_i ΔW_i                           the mean update            :func:`mean_update`
    P̄  = Σ p_i Q_i f(Σ_i) Q_iᵀ, R̄ with Z_i    the mean projectors        :func:`mean_projectors`
    P̄′ = P̄ + η Σ g_k x_k x_kᵀ, R̄′ with y_k    … with the anchor's vote   :func:`anchored`
    U, V = leading R eigenvectors             the consensus bases        :func:`bases`
    C  = Σ w_i s_i (UᵀB_i)(A_iV) = X S Yᵀ     the core                   :func:`core`
    Ŵ  = (UX) S (VY)ᵀ                         the server's update        :func:`aggregate`

with votes p_i = w_i / Σw. Two bars on a letter are written out in code: ``w_bar`` is W̄, ``w_hat``
is Ŵ, ``w_tilde`` is the anchor's equal-voice mean W̃. "Client" means a pair ``(B, A)`` of float64
arrays that hold the stored numbers exactly; ``unit_roundoff`` is that of the dtype they were
*stored* in, see :data:`UNIT_ROUNDOFF`. The derivations are in ``docs/mathematics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

Array: TypeAlias = NDArray[np.float64]
Client: TypeAlias = tuple[Array, Array]
Basis: TypeAlias = Literal["consensus", "projector", "update"]

UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Half the spacing of the numbers above 1: u = 2⁻ᵗ for t significand bits, the hidden one counted.

A format with t bits has neighbours 1 and 1 + 2¹⁻ᵗ (its "epsilon"), and rounding to nearest errs by
at most half of that. binary64 t = 53, binary32 t = 24, binary16 t = 11, bfloat16 t = 8.
"""

TAU_REL = 0.1
"""Soft weight: directions below this fraction of a client's largest count for little."""

ANCHOR = 1.0
"""η, the anchor's vote beside the clients' (which sum to at most 1 in any direction)."""

EPSILON = 0.02
"""ε of W̃: how much of the plain mean rides along, so that exact cancellation is not a trap."""

U32 = 2.0**-24
"""The working precision that the certificates and the effective rank are stated for."""

_U64 = 2.0**-53


def _rounding(unit_roundoff: float, size: float) -> float:
    """8·u·S: a singular value of a mean at or below this may be made of rounding alone."""
    return 8 * unit_roundoff * size


class Canonical(NamedTuple):
    """ΔW = Q diag(sigma) Zᵀ of one client, and how loudly each direction speaks."""

    q: Array
    sigma: Array
    z: Array
    f: Array
    tau: float
    rho: float


@dataclass(frozen=True)
class Aggregate:
    """The server's step and its certificates. Shapes: m = d_out, n = d_in, R = rank, K clients."""

    u: Array
    """(m, R) left singular vectors of Ŵ; zero columns where s is zero."""
    s: Array
    """(R,) singular values of Ŵ, descending."""
    v: Array
    """(n, R) right singular vectors of Ŵ."""
    eig_u: Array
    """(m,) eigenvalues of P̄′ or P̄, descending; for ``update`` (min(m, n),) singular values of W̄."""
    eig_v: Array
    """(n,) eigenvalues of R̄′ or R̄; for ``update`` as ``eig_u``."""
    captured: float
    """‖C‖²/‖W̄‖²."""
    attainable: float
    """What the best matrix of rank R captures; ``captured`` never exceeds it."""
    gap_u: float
    """(λ_R − λ_{R+1})/λ_R on the left; 1 where nothing is cut."""
    gap_v: float
    """The same on the right."""
    kappa_p: float
    """How much of Ŵ turns with the mean projectors' eigenvectors, the larger of the two sides."""
    kappa_w: float
    """The same for the singular vectors that are cut: W̃'s for the anchor, W̄'s for ``update``."""
    flagged: bool
    """The cut is ambiguous at working precision."""
    rho_max: float
    """max_i ‖B_i‖_F‖A_i‖_F / σ₁(B_iA_i): how badly the worst client is factored."""
    tau_active: int
    """Clients whose τ is set by the stored precision rather than by their spectrum."""
    effective_rank: int
    """Directions with S above 8·u32·‖S‖_F."""
    norm: Array
    """(K,) ‖ΔW_i‖_F."""
    align_left: Array
    """(K,) ‖UᵀQ_i‖²_F/k_i over the client's numerically non-zero directions."""
    align_right: Array
    """(K,) ‖VᵀZ_i‖²_F/k_i."""
    share: Array
    """(K,) ⟨C_i, C⟩/‖C‖², which sums to 1; negative where a client pulls against the mean."""
    w_bar: Array
    """(m, n) the mean update."""
    w_hat: Array
    """(m, n) the server's update u·diag(s)·vᵀ."""


# ---- one client ---------------------------------------------------------------------------------


def balanced(b: ArrayLike, a: ArrayLike) -> Client:
    """Drop dead pairs and balance the rest by powers of two; BA does not change by a bit.

    A pair with b_j = 0 or a_j = 0 contributes nothing and is dropped before any norm is taken. The
    others become b_j 2ᵏ, a_j 2⁻ᵏ with k = ⌊(e + 1)/4⌋, where ‖a_j‖²/‖b_j‖² = μ·2ᵉ, ½ ≤ μ < 1: the
    k that brings the two norms within a factor of two of each other. Equal norms sit in the middle
    of the bracket (e = 0 or 1 both give k = 0), and a gauge of powers of two moves e by multiples
    of four, hence k by whole steps: the balanced pair is the same, bit for bit.

    Parameters
    ----------
    b : (m, r) array_like
    a : (r, n) array_like

    Returns
    -------
    b : (m, r′) ndarray
    a : (r′, n) ndarray
        r′ ≤ r pairs, in the order given.
    """
    left, right = np.asarray(b, np.float64), np.asarray(a, np.float64)
    alive = (left != 0).any(axis=0) & (right != 0).any(axis=1)
    left, right = left[:, alive], right[alive]
    k = (_ratio_exponent(right, left.T) + 1) // 4
    return np.ldexp(left, k), np.ldexp(right, -k[:, None])


def _ratio_exponent(x: Array, y: Array) -> NDArray[np.int64]:
    """e of ‖x_j‖²/‖y_j‖² = μ·2ᵉ, ½ ≤ μ < 1, for non-zero rows of any magnitude."""
    e_x = np.frexp(np.abs(x).max(axis=1, initial=0.0))[1].astype(np.int64)
    e_y = np.frexp(np.abs(y).max(axis=1, initial=0.0))[1].astype(np.int64)
    x, y = np.ldexp(x, -e_x[:, None]), np.ldexp(y, -e_y[:, None])
    ratio = (x**2).sum(axis=1) / (y**2).sum(axis=1)
    return np.frexp(ratio)[1] + 2 * (e_x - e_y)


def storage_norm(b: ArrayLike, a: ArrayLike, s: float) -> float:
    """|s|·Σ_j ‖b_j‖‖a_j‖, exactly balanced ‖B‖_F‖A‖_F: what rounding the factors does to s·BA."""
    b, a = balanced(b, a)
    return float(abs(s) * (np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)).sum())


def update(b: ArrayLike, a: ArrayLike, s: float) -> Array:
    """ΔW = s·BA, (m, n), from the balanced factors."""
    b, a = balanced(b, a)
    return s * (b @ a)


def _resolution(pairs: int) -> float:
    """√(16 r u64): a Gram matrix in float64 sees no singular value below this times ‖B‖_F‖A‖_F.

    The reference could resolve further but must not: what the fast route cannot see is noise to
    both, or an over-parametrised client would get directions here that do not exist there.
    """
    return float(np.sqrt(16 * pairs * _U64))


def canonical(
    b: ArrayLike,
    a: ArrayLike,
    s: float,
    tau_rel: float = TAU_REL,
    unit_roundoff: float = _U64,
    *,
    hard: bool = False,
) -> Canonical:
    """The canonical form ΔW = Q diag(σ) Zᵀ of one client and the soft weights of its directions.

    With B = Q_B R_B and Aᵀ = Q_A R_A (Householder QR of the balanced factors) and the small SVD
    R_B R_Aᵀ = X σ Yᵀ,

        Q = Q_B X,   Z = sign(s) Q_A Y,   σ ← |s|σ,
        f(σ) = σ²/(σ² + τ²),   τ = max(τ_rel·σ₁, ½·u_in·|s|·‖B‖_F‖A‖_F),   ρ = |s|‖B‖_F‖A‖_F/σ₁.

    Only ΔW enters: no gauge, no order of pairs and no dead or redundant pair changes the result,
    except through the second term of τ, which says how much of ΔW its stored numbers can carry.

    Parameters
    ----------
    b, a : (m, r) and (r, n) array_like
        The stored factors.
    s : float
        The client's scaling (α/r or α/√r).
    tau_rel, unit_roundoff : float
        Of τ; ``unit_roundoff`` is that of the dtype the factors were stored in.
    hard : bool
        False (``consensus``): f as above, and only what float64 Gram matrices cannot resolve is
        dropped, σ ≤ √(16 r u64)·|s|‖B‖_F‖A‖_F. True (``projector``): f = 1 above numerical rank,
        and σ ≤ max(4·u_in, √(16 r u64))·|s|‖B‖_F‖A‖_F is dropped. r counts the pairs alive.

    Returns
    -------
    Canonical
        q (m, k), sigma (k,) descending, z (n, k), f (k,), tau, rho. k = 0 and rho = 0 for a client
        without an update.
    """
    b, a = balanced(b, a)
    size = storage_norm(b, a, s)
    if size == 0:
        return Canonical(np.zeros((len(b), 0)), np.zeros(0), np.zeros((a.shape[1], 0)), *_SILENT)
    q_b, r_b = linalg.qr(b, mode="economic")
    q_a, r_a = linalg.qr(a.T, mode="economic")
    x, sigma, yt = linalg.svd(r_b @ r_a.T, full_matrices=False)
    sigma = abs(s) * sigma
    cut = _resolution(b.shape[1])
    k = int((sigma > (max(4 * unit_roundoff, cut) if hard else cut) * size).sum())
    if k == 0:
        return Canonical(np.zeros((len(b), 0)), np.zeros(0), np.zeros((a.shape[1], 0)), *_SILENT)
    tau = max(tau_rel * sigma[0], 0.5 * unit_roundoff * size)
    f = np.ones(k) if hard else _soft(sigma[:k], tau)
    q, z = q_b @ x[:, :k], np.sign(s) * (q_a @ yt[:k].T)
    return Canonical(q, sigma[:k], z, f, float(tau), float(size / sigma[0]))


_SILENT = (np.zeros(0), 0.0, 0.0)


def _soft(sigma: Array, tau: float) -> Array:
    """f(σ) = σ²/(σ² + τ²), f(0) = 0 also at τ = 0; in ratios, lest a square under- or overflow."""
    top = np.maximum(sigma, tau)
    unit = np.where(top > 0, top, 1.0)
    return (sigma / unit) ** 2 / np.where(top > 0, (sigma / unit) ** 2 + (tau / unit) ** 2, 1.0)


# ---- all clients --------------------------------------------------------------------------------


def votes(weights: ArrayLike) -> Array:
    """p_i = w_i/Σw: bases do not depend on whether weights were normalised. (K,)"""
    w = np.asarray(weights, np.float64)
    if (w < 0).any():
        raise ValueError(
            f"weights: got {w.min():g}; a vote is ≥ 0 (signed weights: basis='update')"
        )
    return w / w.sum() if w.sum() > 0 else w


def mean_update(clients: Sequence[Client], weights: ArrayLike, scaling: ArrayLike) -> Array:
    """W̄ = Σ w_i s_i B_i A_i with the weights as given. (m, n)"""
    w, s = np.asarray(weights, np.float64), np.asarray(scaling, np.float64)
    return sum(
        (w_i * update(b, a, s_i) for (b, a), w_i, s_i in zip(clients, w, s, strict=True)),
        np.zeros((np.shape(clients[0][0])[0], np.shape(clients[0][1])[1])),
    )


def storage_scale(clients: Sequence[Client], weights: ArrayLike, scaling: ArrayLike) -> float:
    """S = Σ |w_i||s_i|‖B_i‖_F‖A_i‖_F after balancing, the unit of every accuracy statement."""
    w, s = np.asarray(weights, np.float64), np.asarray(scaling, np.float64)
    return float(
        sum(
            abs(w_i) * storage_norm(b, a, s_i)
            for (b, a), w_i, s_i in zip(clients, w, s, strict=True)
        )
    )


def anchor_weights(clients: Sequence[Client], weights: ArrayLike, scaling: ArrayLike) -> Array:
    """The coefficients p_i (1/‖ΔW_i‖_F + ε/ρ̄), ρ̄ = Σ p_i‖ΔW_i‖_F, of W̃. (K,)

    ‖ΔW_i‖_F is that of the canonical form, so a client whose factors cancel to rounding has norm
    zero; it gets no voice instead of a normalised piece of noise.
    """
    p, s = votes(weights), np.asarray(scaling, np.float64)
    norm = _norms(clients, s)
    rho_bar = float(p @ norm)
    heard = (p > 0) & (norm > 0)
    coefficient = np.zeros(len(p))
    if heard.any():
        coefficient[heard] = p[heard] * (1 / norm[heard] + EPSILON / rho_bar)
    return coefficient


def _norms(clients: Sequence[Client], scaling: Array) -> Array:
    return np.array(
        [
            np.linalg.norm(canonical(b, a, s_i).sigma)
            for (b, a), s_i in zip(clients, scaling, strict=True)
        ]
    )


def mean_projectors(
    clients: Sequence[Client],
    weights: ArrayLike,
    scaling: ArrayLike,
    *,
    basis: Basis = "consensus",
    tau_rel: float = TAU_REL,
    unit_roundoff: float = _U64,
) -> tuple[Array, Array]:
    """P̄ = Σ p_i Q_i f(Σ_i) Q_iᵀ (m, m) and R̄ = Σ p_i Z_i f(Σ_i) Z_iᵀ (n, n).

    ``basis="projector"`` takes f = 1 above numerical rank: the plain means of the orthogonal
    projectors on the clients' column and row spaces.
    """
    p, s = votes(weights), np.asarray(scaling, np.float64)
    m, n = np.shape(clients[0][0])[0], np.shape(clients[0][1])[1]
    p_bar, r_bar = np.zeros((m, m)), np.zeros((n, n))
    for (b, a), p_i, s_i in zip(clients, p, s, strict=True):
        form = canonical(b, a, s_i, tau_rel, unit_roundoff, hard=basis == "projector")
        p_bar += p_i * (form.q * form.f) @ form.q.T
        r_bar += p_i * (form.z * form.f) @ form.z.T
    return p_bar, r_bar


def anchor_triplets(
    clients: Sequence[Client],
    weights: ArrayLike,
    scaling: ArrayLike,
    rank: int,
    unit_roundoff: float = _U64,
) -> tuple[Array, Array, Array, Array]:
    """The leading R singular triplets (x_k, σ̃_k, y_k) of W̃ and their weights g_k.

        g_k = σ̃_k²/(σ̃_k² + c²),   c = max(σ̃_R, 0.01·σ̃_1, ½·u_in·√Σ S̃_i²)
        S̃_i = p_i (1/‖ΔW_i‖ + ε/ρ̄)|s_i|‖B_i‖_F‖A_i‖_F

    Without the lower limits on c a σ̃_R at the noise of the stored numbers would turn that noise
    into half a vote. g_k = 0 where σ̃_k ≤ 8·u32·ΣS̃_i: those are zero but for the rounding
    of the arithmetic, and where eigenvalues of P̄ tie, even a vote of 1e-3 for a random direction
    would decide.

    Returns
    -------
    x : (m, t), sigma : (t,), y : (n, t), g : (t,)
        t = min(R, m, n).
    """
    coefficient = anchor_weights(clients, weights, scaling)
    x, sigma, yt = linalg.svd(mean_update(clients, coefficient, scaling), full_matrices=False)
    size = storage_scale(clients, coefficient, scaling)
    at_cut = sigma[rank - 1] if rank <= len(sigma) else 0.0
    sizes = [
        c * storage_norm(b, a, float(s))
        for (b, a), c, s in zip(clients, coefficient, np.asarray(scaling), strict=True)
    ]
    noise = 0.5 * unit_roundoff * np.linalg.norm(sizes)
    t = min(rank, len(sigma))
    g = _soft(sigma[:t], max(at_cut, 0.01 * sigma[0], noise))
    g[sigma[:t] <= _rounding(U32, size)] = 0.0
    return x[:, :t], sigma[:t], yt[:t].T, g


def anchored(
    clients: Sequence[Client],
    weights: ArrayLike,
    scaling: ArrayLike,
    rank: int,
    *,
    anchor: float = ANCHOR,
    tau_rel: float = TAU_REL,
    unit_roundoff: float = _U64,
) -> tuple[Array, Array]:
    """P̄′ = P̄ + η Σ_{k≤R} g_k x_k x_kᵀ (m, m) and R̄′ = R̄ + η Σ_{k≤R} g_k y_k y_kᵀ (n, n)."""
    p_bar, r_bar = mean_projectors(
        clients, weights, scaling, tau_rel=tau_rel, unit_roundoff=unit_roundoff
    )
    x, _, y, g = anchor_triplets(clients, weights, scaling, rank, unit_roundoff)
    return p_bar + anchor * (x * g) @ x.T, r_bar + anchor * (y * g) @ y.T


def bases(
    clients: Sequence[Client],
    weights: ArrayLike,
    scaling: ArrayLike,
    rank: int,
    basis: Basis = "consensus",
    *,
    tau_rel: float = TAU_REL,
    anchor: float = ANCHOR,
    unit_roundoff: float = _U64,
) -> tuple[Array, Array, Array, Array]:
    """U (m, R), V (n, R) and the eigenvalues they come from, descending, all of them.

    consensus   leading eigenvectors of P̄′ and R̄′ (soft f, anchor)
    projector   leading eigenvectors of P̄ and R̄ (f = 1 above numerical rank, no anchor)
    update      leading singular vectors of W̄, with its singular values as both "eigenvalues"

    Where R goes beyond what exists (λ_k ≤ 1e-13·λ₁ in float64; for ``update``
    σ_k ≤ 8·u64·S) the columns are zero.
    """
    left, right = _sides(clients, weights, scaling, rank, basis, tau_rel, anchor, unit_roundoff)
    return left.leading(rank), right.leading(rank), left.values, right.values


class _Side(NamedTuple):
    """What may enter U (or V), best first: vectors (d, t), what ranks them (t,), what is noise."""

    vectors: Array
    values: Array
    noise: float

    def leading(self, rank: int) -> Array:
        k = int((self.values[:rank] > self.noise).sum())
        return _widen(self.vectors[:, :k], rank)


def _sides(
    clients: Sequence[Client],
    weights: ArrayLike,
    scaling: ArrayLike,
    rank: int,
    basis: Basis,
    tau_rel: float,
    anchor: float,
    unit_roundoff: float,
) -> tuple[_Side, _Side]:
    """Both sides, all of them and not only the leading R."""
    shared: dict[str, Any] = {"tau_rel": tau_rel, "unit_roundoff": unit_roundoff}
    if basis == "update":
        x, sigma, yt = linalg.svd(mean_update(clients, weights, scaling), full_matrices=False)
        noise = _rounding(_U64, storage_scale(clients, weights, scaling))
        return _Side(x, sigma, noise), _Side(yt.T, sigma, noise)
    if basis == "consensus":
        left, right = anchored(clients, weights, scaling, rank, anchor=anchor, **shared)
    elif basis == "projector":
        left, right = mean_projectors(clients, weights, scaling, basis=basis, **shared)
    else:
        raise ValueError(f"basis: got {basis!r}; expected 'consensus', 'projector' or 'update'")
    return _eigh_descending(left), _eigh_descending(right)


def _eigh_descending(symmetric: Array) -> _Side:
    eigenvalues, vectors = linalg.eigh((symmetric + symmetric.T) / 2)
    return _Side(vectors[:, ::-1], eigenvalues[::-1], 1e-13 * float(eigenvalues[-1]))


def _widen(x: Array, columns: int) -> Array:
    return np.pad(x, ((0, 0), (0, columns - x.shape[1])))


# ---- the server's step --------------------------------------------------------------------------


def core(
    u: Array, v: Array, clients: Sequence[Client], weights: ArrayLike, scaling: ArrayLike
) -> Array:
    """C = Σ w_i s_i (UᵀB_i)(A_iV) from the original factors. (R, R)"""
    return sum(_cores(u, v, clients, weights, scaling), np.zeros((u.shape[1], v.shape[1])))


def _cores(
    u: Array, v: Array, clients: Sequence[Client], weights: ArrayLike, scaling: ArrayLike
) -> list[Array]:
    w, s = np.asarray(weights, np.float64), np.asarray(scaling, np.float64)
    pairs = [balanced(b, a) for b, a in clients]
    return [w_i * s_i * (u.T @ b) @ (a @ v) for (b, a), w_i, s_i in zip(pairs, w, s, strict=True)]


def aggregate(
    clients: Sequence[Client],
    weights: ArrayLike,
    scaling: ArrayLike,
    rank: int,
    basis: Basis = "consensus",
    *,
    tau_rel: float = TAU_REL,
    anchor: float = ANCHOR,
    unit_roundoff: float = _U64,
) -> Aggregate:
    """One server step: bases, core, Ŵ = (UX) S (VY)ᵀ, and everything that certifies it.

    Parameters
    ----------
    clients : sequence of K pairs (B_i (m, r_i), A_i (r_i, n))
        The stored factors, converted to float64 without further rounding.
    weights, scaling : (K,) array_like
        w_i ≥ 0 (any sign for ``update``), used as given in W̄, normalised in votes; s_i.
    rank : int
        R.
    basis, tau_rel, anchor, unit_roundoff
        See :func:`bases` and :func:`canonical`.

    Notes
    -----
    Certificates. Eigenvalues at or below λ_floor = max(1e-12·λ₁, 4·max_i p_i f_i(½·u_in·|s_i|
    ‖B_i‖_F‖A_i‖_F)), the weight that pure storage noise could earn, count as zero; where λ_R or
    λ_{R+1} does, the gap is 1. Over the eigenpairs that exist

        κ_P² = Σ_{j≤R<k} (‖u_jᵀW̄‖² + ‖u_kᵀW̄‖²)/((λ_j − λ_k)²‖W̄‖²)   (and right; the larger)
        κ_W  = σ_R/(σ_R − σ_{R+1})   of W̃ (consensus) or W̄ (update); 0 where σ_R is rounding,
               at most 8·u32·S

    ``flagged``: max(κ_P, κ_W)·u32 > 1e-2, or a relative gap below 1e-3, of λ on either side or of
    the σ that is cut.
    """
    w, s = np.asarray(weights, np.float64), np.asarray(scaling, np.float64)
    left_side, right_side = _sides(clients, w, s, rank, basis, tau_rel, anchor, unit_roundoff)
    u, v = left_side.leading(rank), right_side.leading(rank)
    cores = _cores(u, v, clients, w, s)
    c = sum(cores, np.zeros((rank, rank)))
    x, sigma, yt = linalg.svd(c)

    # The server's update, signs fixed, directions that are rounding only set to zero.
    size = storage_scale(clients, w, s)
    real = sigma > _rounding(_U64, size)
    sigma = np.where(real, sigma, 0.0)
    left, right = _fix_signs(u @ (x * real), v @ (yt.T * real))
    w_hat = (left * sigma) @ right.T

    # Certificates of the whole.
    w_bar = mean_update(clients, w, s)
    spectrum = linalg.svdvals(w_bar)
    energy = float((spectrum**2).sum())
    nothing = np.sqrt(energy) <= _rounding(U32, size)
    captured = 1.0 if nothing else float((c**2).sum() / energy)
    attainable = 1.0 if nothing else float((spectrum[:rank] ** 2).sum() / energy)
    gap_u, gap_v, kappa_p = 1.0, 1.0, 0.0
    if basis != "update":
        floor = _information_floor(clients, w, s, basis, tau_rel, unit_roundoff)
        gap_u, kappa_u = _cut(left_side, w_bar, rank, floor)
        gap_v, kappa_v = _cut(right_side, w_bar.T, rank, floor)
        kappa_p = 0.0 if nothing else max(kappa_u, kappa_v)
    gap_w, kappa_w = 1.0, 0.0
    if basis == "update":
        gap_w, kappa_w = _cut_of_singular_values(spectrum, rank, _rounding(U32, size))
        gap_u = gap_v = gap_w
    elif basis == "consensus" and anchor > 0:
        coefficient = anchor_weights(clients, w, s)
        gap_w, kappa_w = _cut_of_singular_values(
            linalg.svdvals(mean_update(clients, coefficient, s)),
            rank,
            _rounding(U32, storage_scale(clients, coefficient, s)),
        )
    flagged = max(kappa_p, kappa_w) * U32 > 1e-2 or min(gap_u, gap_v, gap_w) < 1e-3

    # What each client had to say.
    forms = [
        canonical(b, a, s_i, tau_rel, unit_roundoff) for (b, a), s_i in zip(clients, s, strict=True)
    ]
    firm = [
        canonical(b, a, s_i, tau_rel, unit_roundoff, hard=True)
        for (b, a), s_i in zip(clients, s, strict=True)
    ]
    heard = [form for form, w_i in zip(forms, w, strict=True) if w_i != 0 and len(form.sigma)]
    core_energy = float((c**2).sum())
    return Aggregate(
        u=left,
        s=sigma,
        v=right,
        eig_u=left_side.values,
        eig_v=right_side.values,
        captured=captured,
        attainable=attainable,
        gap_u=gap_u,
        gap_v=gap_v,
        kappa_p=kappa_p,
        kappa_w=kappa_w,
        flagged=bool(flagged),
        rho_max=max((form.rho for form in heard), default=0.0),
        tau_active=sum(bool(form.tau > tau_rel * form.sigma[0]) for form in heard),
        effective_rank=effective_rank(sigma),
        norm=np.array([np.linalg.norm(form.sigma) for form in forms]),
        align_left=np.array([_alignment(u, form.q) for form in firm]),
        align_right=np.array([_alignment(v, form.z) for form in firm]),
        share=np.array([(c_i * c).sum() / core_energy if core_energy else 0.0 for c_i in cores]),
        w_bar=w_bar,
        w_hat=w_hat,
    )


def _fix_signs(u: Array, v: Array) -> tuple[Array, Array]:
    """Turn each pair of vectors so that the left one's entry of largest modulus is positive."""
    sign = np.sign(np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0))
    sign[sign == 0] = 1.0
    return u * sign, v * sign


def _alignment(basis: Array, directions: Array) -> float:
    k = directions.shape[1]
    return float(((basis.T @ directions) ** 2).sum() / k) if k else 0.0


def _information_floor(
    clients: Sequence[Client],
    weights: Array,
    scaling: Array,
    basis: Basis,
    tau_rel: float,
    unit_roundoff: float,
) -> float:
    """4·max_i p_i f_i(½·u_in·|s_i|‖B_i‖_F‖A_i‖_F); zero for f = 1 above numerical rank."""
    if basis == "projector":
        return 0.0
    floor = 0.0
    for (b, a), p_i, s_i in zip(clients, votes(weights), scaling, strict=True):
        form = canonical(b, a, s_i, tau_rel, unit_roundoff)
        if p_i != 0 and len(form.sigma):
            noise = np.array([0.5 * unit_roundoff * storage_norm(b, a, s_i)])
            floor = max(floor, 4 * p_i * float(_soft(noise, form.tau)[0]))
    return floor


def _cut(side: _Side, w: Array, rank: int, floor: float) -> tuple[float, float]:
    """(relative gap, κ_P) of one side at the cut."""
    exists = int((side.values > 1e-12 * side.values[0]).sum())
    if rank >= exists:
        return 1.0, 0.0
    lam = side.values[:exists]
    carried = ((side.vectors[:, :exists].T @ w) ** 2).sum(axis=1)
    distance = np.maximum(lam[:rank, None] - lam[None, rank:], 32 * U32)
    gap = (lam[rank - 1] - lam[rank]) / lam[rank - 1] if lam[rank] > floor else 1.0
    terms = (carried[:rank, None] + carried[None, rank:]) / distance**2
    total = (w**2).sum()
    return float(gap), float(np.sqrt(terms.sum() / total)) if total > 0 else 0.0


def _cut_of_singular_values(sigma: Array, rank: int, rounding: float) -> tuple[float, float]:
    """(relative gap, κ_W) where a spectrum is cut after R; (1, 0) where σ_R is rounding."""
    at = sigma[rank - 1] if rank <= len(sigma) else 0.0
    if at <= rounding:
        return 1.0, 0.0
    beyond = sigma[rank] if rank < len(sigma) and sigma[rank] > rounding else 0.0
    gap = (at - beyond) / at
    return float(gap), float(1 / gap) if gap > 0 else np.inf


# ---- from the server's update to an adapter ------------------------------------------------------


def effective_rank(s: Array) -> int:
    """Directions with S above 8·u32·‖S‖_F; the others count as zero."""
    return int((s > 8 * U32 * np.linalg.norm(s)).sum())


def readout(
    u: Array,
    s: Array,
    v: Array,
    rank: int,
    scaling: float,
    pad: Literal["zero", "trainable"] = "zero",
    seed: int = 0,
) -> Client:
    """A rank-r adapter: B = u_{:r} √(s_{:r}/s_out) (m, r), A = √(s_{:r}/s_out) v_{:r}ᵀ (r, n).

    Slices of one SVD, hence nested: the first columns of a larger readout are a smaller one. Beyond
    the effective rank ``pad="zero"`` leaves zero pairs (which no gradient ever moves) and
    ``pad="trainable"`` sets B_j = 0 and A_j to seeded unit rows, orthogonal to the other rows as
    far as d_in has room. ΔW is the same either way.

    ``scaling`` is s_out > 0 of the adapter that receives: s_out·BA is the best rank-r
    approximation of Ŵ.
    """
    if not scaling > 0:
        raise ValueError(f"scaling: got {scaling}; expected the receiving adapter's, > 0")
    if pad not in ("zero", "trainable"):
        raise ValueError(f"pad: got {pad!r}; expected 'zero' or 'trainable'")
    k = min(rank, effective_rank(s))
    root = np.sqrt(s[:k] / scaling)
    b, a = _widen(u[:, :k] * root, rank), _widen(v[:, :k] * root, rank).T.copy()
    if pad == "trainable":
        taken = v[:, :k]
        noise = np.random.Generator(np.random.Philox(seed)).standard_normal((rank - k, len(v)))
        for j, row in enumerate(noise, start=k):
            free = row / np.linalg.norm(row)
            if taken.shape[1] < len(v):
                for _ in range(2):  # once more, for orthogonality to the last digit
                    free = free - taken @ (taken.T @ free)
                    free = free / np.linalg.norm(free)
                taken = np.column_stack([taken, free])
            a[j] = free
    return b, a


def optimum(w: Array, rank: int) -> Array:
    """The best approximation of rank r in the Frobenius norm: the truncated SVD. (m, n)"""
    x, sigma, yt = linalg.svd(w, full_matrices=False)
    return (x[:, :rank] * sigma[:rank]) @ yt[:rank]
