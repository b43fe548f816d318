"""Server optimisers, for every method on the same terms: on what its server holds.

A method's own result is the proposal x̂; Δ = x̂ − x_t is what the optimiser steps along. x is each
averaged factor where a method keeps factors, the update itself (dense, truncated again to the
method's rank) where it keeps a decomposition, what is newly merged where it merges, and each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from ..errors import require_all
from ..state import Factors
from .messages import Client, Pairs
from .methods import Method
from .methods.base import pad_rank, truncated
from .server import SVD, Server

__all__ = ["ServerOptimiser"]

NOTHING = 1e-6  # relative singular value below which a merged direction is rounding


@dataclass(frozen=True)
class ServerOptimiser:
    """x_{t+1} = x_t + η·(direction of Δ_t), moments in fp64, kept in the server's state.

    "fedavgm": m_t = β m_{t−1} + Δ_t, direction m_t (Hsu et al., "Measuring the effects of
    non-identical data distribution for federated visual classification", arXiv 1909.06335).
    "fedadam": m_t = β m_{t−1} + (1 − β) Δ_t, v_t = β₂ v_{t−1} + (1 − β₂) Δ_t², v_{−1} = τ²,
    direction m_t/(√v_t + τ), no bias correction (Reddi et al., "Adaptive federated optimization",
    ICLR 2021, arXiv 2003.00295, algorithm 2). Both act on weights there; on LoRA's factors or
    updates is our reading. Cost where the update is kept: a dense SVD a module and round, and dense
    moments.

    Attributes
    ----------
    kind : {"fedavgm", "fedadam"}
    lr : float
        η.
    beta, beta2 : float
        In [0, 1).
    tau : float
        τ > 0, of fedadam.
    """

    kind: Literal["fedavgm", "fedadam"]
    lr: float
    beta: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        require_all(
            (0 < self.lr < inf, "lr", self.lr, "a finite number above 0"),
            (0 <= self.beta < 1, "beta", self.beta, "a weight in [0, 1)"),
            (0 <= self.beta2 < 1, "beta2", self.beta2, "a weight in [0, 1)"),
            (0 < self.tau < inf, "tau", self.tau, "a finite number above 0"),
        )

    def step(self, method: Method, before: Server, after: Server) -> Server:
        """`after`, the method's own result, stepped to from `before`."""
        moments: dict[str, Tensor] = {}

        def move(name: str, x: Tensor, proposal: Tensor) -> Tensor:
            delta = proposal.double() - x.double()
            return x.double() + self.lr * self._direction(name, delta, before.moments, moments)

        rank = after.setup.max_rank
        start = _start(method, before, after) if after.factors else {}
        factors = {
            m: (
                move(f"factors/{m}/B", start[m][0], pair[0]).to(pair[0].dtype),
                move(f"factors/{m}/A", start[m][1], pair[1]).to(pair[1].dtype),
            )
            for m, pair in _padded(after.factors, rank).items()
        }
        svd = {}
        for m, x in after.svd.items():
            proposal = _dense(x)
            held = _dense(before.svd[m]) if before.svd else torch.zeros_like(proposal)
            svd[m] = _truncated(move(f"update/{m}", held, proposal), x.s.numel(), x.u.dtype)
        new: list[Pairs] = [{} for _ in after.merged[len(before.merged) :]]
        for to, pairs in zip(new, after.merged[len(before.merged) :], strict=True):
            for m, (b, a) in pairs.items():
                proposal = b.double() @ a.double()
                stepped = move(f"merged/{m}", torch.zeros_like(proposal), proposal)
                to[m] = _pair(stepped, b.dtype)
        dense = {
            n: move(f"dense/{n}", before.dense[n], x).to(x.dtype) for n, x in after.dense.items()
        }
        return replace(
            after, factors=factors, svd=svd, merged=(*before.merged, *new), dense=dense,
            moments=moments,
        )  # fmt: skip

    def _direction(
        self, name: str, delta: Tensor, old: Mapping[str, Tensor], new: dict[str, Tensor]
    ) -> Tensor:
        m, v = old.get(f"m/{name}"), old.get(f"v/{name}")
        past = torch.zeros_like(delta) if m is None else m
        if self.kind == "fedavgm":
            new[f"m/{name}"] = self.beta * past + delta
            return new[f"m/{name}"]
        square = torch.full_like(delta, self.tau**2) if v is None else v
        new[f"m/{name}"] = self.beta * past + (1 - self.beta) * delta
        new[f"v/{name}"] = self.beta2 * square + (1 - self.beta2) * delta.square()
        return new[f"m/{name}"] / (new[f"v/{name}"].sqrt() + self.tau)


def _start(method: Method, before: Server, after: Server) -> Pairs:
    """The factors before the round; before the first B = 0 and the A that clients drew."""
    rank = after.setup.max_rank
    if before.factors:
        return _padded(before.factors, rank)
    if after.setup.shared_start:
        return method.opening(before, Client(-1, rank)).factors
    return {m: (torch.zeros_like(b), a) for m, (b, a) in _padded(after.factors, rank).items()}


def _padded(factors: Pairs, rank: int) -> Pairs:
    return {m: pad_rank(pair, rank) for m, pair in factors.items()}


def _dense(x: SVD) -> Tensor:
    return (x.u.double() * x.s) @ x.v.double().mT


def _truncated(w: Tensor, rank: int, dtype: torch.dtype) -> SVD:
    u, s, v = truncated(w, rank)
    return SVD(u.to(dtype), s, v.to(dtype))


def _pair(w: Tensor, dtype: torch.dtype) -> Factors:
    """Factors of w at its numerical rank, at least one."""
    x = _truncated(w, min(w.shape), dtype)
    rank = max(1, int((x.s > NOTHING * x.s[0]).sum()))
    b, a = x.pair
    return b[:, :rank].contiguous(), a[:rank].contiguous()
