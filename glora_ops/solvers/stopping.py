"""Subspace iteration with a Rayleigh–Ritz problem in every step, and when it stops.

docs/solvers.md derives and numbers the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..linalg.canonical import positive
from ..linalg.eigen import cholesky_ex
from ..linalg.vocabulary import Vocabulary
from .base import Settings
from .operators import Images, Operator

__all__ = ["ANCHORED", "MOST", "SETTLED", "Ritz", "StopRule", "subspace_iteration"]

# Share of the contract that an adaptive run uses up: what is still to be gained is an estimate.
SAFE = 0.8
# Whole steps of an adaptive run at most.
MOST = 12
# The slowest that gains are taken to fall.
SLOWEST = 0.9
# Squared sines, in units of tol², at which vectors have come to rest: those of a mean projector,
# and those of the anchor, which votes with half a voice (2/η²).
SETTLED, ANCHORED = 2.0, 8.0
# Ritz values of fp32 products move by this many roundoffs of the largest for no reason.
JITTER = 4.0
# A Ritz value, a square, below this fraction of the top is the rounding of fp32 blocks.
EMPTY = 1e-13
# Squared length, over the longest, of coordinates below which they hold no vector; of images, below
# which rounding of the long ones would show in their axes.
DROP = 1e-5
TINY = 1e-300  # why: never divided by zero; smaller than any square that counts


@dataclass(frozen=True)
class Ritz:
    """Ritz approximation of an operator in the span of a block x.

    Attributes
    ----------
    x : Tensor (L, n, k)
    images : Images
    theta, vectors : Tensor (L, k), (L, k, k) fp64
        Ritz values, and the coefficients in x of vectors of unit length.
    total : Tensor (L,) fp64
        Trace of the operator, as far as it is known.
    blocks, steps : int
        Blocks after the first; whole power steps taken.
    """

    x: Tensor
    images: Images
    theta: Tensor
    vectors: Tensor
    total: Tensor
    blocks: int
    steps: int


class StopRule:
    """Whether an iteration has come far enough; asked once for every block of images.

    Parameters
    ----------
    settings : Settings
        `power_iters` ≥ 0 fixes the number of steps.
    half : bool
        Whether it is asked every half-step.
    settled : float, optional
        For vectors that something else is made of: they must have come to rest, to a mean squared
        sine of settled · tol². What U and V capture together is of first order in the sine.
    weigh : callable (X, vectors) → (L, k), optional
        The energies by which that mean weighs the vectors; by default their own.
    most : int
        Whole steps at most, of an adaptive run.
    patience : float
        Fraction of what is found that may be still to come after a whole step; with more, the
        spectrum is `flat`, and the run ends there.
    """

    def __init__(
        self,
        settings: Settings,
        half: bool,
        roundoff: float,
        settled: float | None = None,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
        most: int = MOST,
        patience: float = math.inf,
    ) -> None:
        self.rank, self.tol = settings.rank, settings.tol
        self.settled, self.weigh, self.half = settled, weigh, half
        self.patience, self.flat = patience, False
        self.drawn = True  # a first block of random columns alone
        self.adaptive = settings.power_iters < 0
        self.limit = (1 + half) * (most if self.adaptive else settings.power_iters)
        self.power = 1.0 if half else 2.0
        self.jitter = JITTER * roundoff
        self.asked = -1
        self.before: np.ndarray | None = None

    def __call__(self, x: Tensor, theta: Tensor, vectors: Tensor, total: Tensor) -> bool:
        self.asked += 1
        enough = self.adaptive and self._enough(x, theta, vectors, total)
        return enough or self.flat or self.asked == self.limit

    def _enough(self, x: Tensor, theta: Tensor, vectors: Tensor, total: Tensor) -> bool:
        values, all_there_is = _numbers(theta), _numbers(total)
        lead, spare = values[..., : self.rank], values[..., self.rank :].sum(-1)
        found = lead.sum(-1)
        outside = np.maximum(all_there_is - found - spare, 0)
        if self.settled is None and self.drawn:  # (12.6)
            share = self.rank / max(values.shape[-1] - 1, self.rank)
            outside = np.minimum(outside, spare + share * outside)
        if self._little(outside, found, all_there_is):
            return True
        before, self.before = self.before, lead
        if before is None:
            return False
        gains = lead - before
        gains = gains * (gains > self.jitter * values[..., :1])  # (12.4)
        bulk = spare[..., None] / max(values.shape[-1] - self.rank, 1)
        shift = 0.0 if self.half else values[..., -1:] / 2
        apart = np.maximum(lead - shift, TINY)
        rate = ((bulk - shift) / apart).clip(0, SLOWEST) ** self.power
        ahead = gains * rate / (1 - rate)  # (12.5)
        to_come = np.minimum(ahead.sum(-1), outside)
        if not self._little(to_come, found, all_there_is):
            self.flat = bool((to_come > self.patience * found).any())
            return False
        if self.settled is None:
            return True
        energy = lead if self.weigh is None else _numbers(self.weigh(x, vectors))[..., : self.rank]
        turn = (energy * ahead / np.maximum(lead - bulk / 2, TINY)).sum(-1)  # (12.7)
        return bool((turn < self.settled * self.tol**2 * np.maximum(energy.sum(-1), TINY)).all())

    def _little(self, gain: np.ndarray, found: np.ndarray, total: np.ndarray) -> bool:
        """Whether a gain in energy is too small to matter, in captured and in error (12.8)."""
        error, left = (
            np.sqrt(np.maximum(1 - x / np.maximum(total, TINY), 0)) for x in (found, found + gain)
        )
        allowed = SAFE * (self.tol + 0.01 * error)
        return bool(((gain <= SAFE * self.tol * found) & (error - left <= allowed)).all())


def _numbers(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def subspace_iteration(
    v: Vocabulary,
    operator: Operator,
    start: Tensor,
    rule: StopRule,
    total: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Ritz:
    """Leading eigenspace of an operator by X ← orth(O X) (Halko, Martinsson, Tropp 2011, 4.4).

    Only the span matters: a next block is the images along the Ritz vectors, which are nearly
    orthogonal, and orthonormal after a half-step, whose Gram matrix is the problem just solved
    (Stathopoulos and Wu 2002, SVQB). Where that would round, a Householder QR of the coordinates
    keeps them apart, and what the metric says is left to the Ritz problem.

    Parameters
    ----------
    start : Tensor (L, n, k)
        O times something intrinsic, so that iterates depend on O alone.
    total : callable (X, images, seen) → (L,)
        The operator's trace; called once, with the first block, its images and the trace in its
        span.
    """
    x, _ = v.qr(start)
    trace = None
    while True:
        images = operator.images(x)
        theta, vectors, apart = _ritz(v, images)
        if trace is None:
            trace = total(x, images.block, theta.sum(-1))
        if rule(x, theta, vectors, trace) or _holds_all(images, theta):
            break
        block, length = images.block, theta.sqrt()
        if not operator.half:  # what is left out lies in [0, θ_k], now around zero (12.3)
            shift = theta[..., -1:] / 2
            block, length = block - shift[..., None].to(x.dtype) * x, theta - shift
        if apart and (operator.half or images.gram is not None):
            x = v.combine(block, vectors / length[..., None, :])
        else:
            x, _ = v.qr(block)
        operator = operator.next
    steps = -(-rule.asked // (1 + operator.half))
    return Ritz(x, images, theta, vectors, trace, rule.asked, steps)


def _holds_all(images: Images, theta: Tensor) -> bool:
    """Whether an orthonormal block is wider than the operator's range: no step finds more."""
    return images.gram is None and not _is_resolved(theta, EMPTY)


def _ritz(v: Vocabulary, images: Images) -> tuple[Tensor, Tensor, bool]:
    """Eigenpairs of energy s = θ gram s, and whether both problems are far from singular.

    Columns of s without length in gram are zero (12.1).
    """
    if images.gram is None:
        theta, vectors = v.eigh(images.energy)
        return theta, vectors, _is_resolved(theta)
    lower, failed = cholesky_ex(images.gram)
    pivots, lengths2 = (_numbers(x.diagonal(0, -2, -1)) for x in (lower, images.gram))
    apart = not failed.any() and pivots.min() ** 2 > DROP * lengths2.max()
    if apart:
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        basis = torch.linalg.solve_triangular(lower, one, upper=False).mT
    else:
        length2, basis = v.eigh(images.gram)
        kept = length2 > DROP * length2[..., :1]
        basis = basis * (kept / positive(length2).sqrt())[..., None, :]
    theta, turn = v.eigh(basis.mT @ images.energy @ basis)
    return theta, basis @ turn, apart and _is_resolved(theta)


def _is_resolved(theta: Tensor, least: float = DROP) -> bool:
    values = _numbers(theta)
    return bool((values[..., -1] > least * values[..., 0]).all())
