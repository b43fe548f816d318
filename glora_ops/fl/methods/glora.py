"""glora: aggregate what clients learnt as updates, whatever their ranks and gauges."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

import torch

from ...api import aggregate
from ...bindings.ops import Aggregate
from ...errors import GloraWarning, require_all
from ..messages import Client, Pairs, Reply, Sent
from ..seeds import stream_seed
from ..server import SVD, Server, Setup, untrained
from .base import Method, next_state, shares, stack

__all__ = ["Glora"]


@dataclass(frozen=True)
class Glora(Method):
    """The mean update in consensus coordinates at rank R; clients get trainable readouts of it.

    mode "adapter": the clients' updates ΔW_i are aggregated, and with `momentum` μ the server's
    W_t takes part as one more low-rank client of weight μ. In the other two modes what clients
    *learnt*, D_i, is added to what the server keeps: W_{t+1} = trunc_R(W_t + γ Σ w_i D_i), so that
    a client of low rank never erases directions it was not sent.

    mode "delta": D_i = ΔW_i − (what it was sent), a pair of rank ≤ 2r_i; with `context` the rest of
    W_t is frozen beside the readout. mode "restart": all of W_t is frozen and the client trains a
    fresh adapter, A drawn anew each round, B = 0: D_i = s B_i A_i; only A's seed travels.

    Source: arXiv 2605.06733 for the aggregation; the rest is ours (docs/federated.md).

    Attributes
    ----------
    basis : {"consensus", "projector", "update"}
    mode : {"restart", "adapter", "delta"}
    rank : int, optional
        Server rank R; twice the largest client rank by default.
    context : bool
        Delta mode only.
    context_rank : int, optional
        Rank q at which W_t travels with `context` and in restart mode; R by default.
    step : float
        γ > 0, the server's step in delta and restart mode.
    momentum : float
        Weight μ of W_t among the clients, in [0, 1); adapter mode only.
    server_vote : float
        In delta and restart mode: share of the votes for the bases that W_t has, in (0, 1).
    tau_rel, anchor : float
        As in `glora_ops.aggregate`.
    """

    basis: Literal["consensus", "projector", "update"] = "consensus"
    mode: Literal["restart", "adapter", "delta"] = "restart"
    rank: int | None = None
    context: bool = False
    context_rank: int | None = None
    step: float = 1.0
    momentum: float = 0.0
    server_vote: float = 0.5
    tau_rel: float = Aggregate.tau_rel
    anchor: float = Aggregate.anchor

    def __post_init__(self) -> None:
        alone = 'mode = "adapter": in the other modes the server keeps all of W_t anyway'
        adding = 'mode = "delta" or "restart": in adapter mode nothing is added to W_t'
        frozen = self.context or self.mode == "restart"
        q = self.context_rank
        require_all(
            (self.rank is None or self.rank >= 1, "rank", self.rank, "an integer ≥ 1"),
            (0 <= self.momentum < 1, "momentum", self.momentum, "a weight in [0, 1)"),
            (0 < self.server_vote < 1, "server_vote", self.server_vote, "a share in (0, 1)"),
            (0 <= self.tau_rel < inf, "tau_rel", self.tau_rel, "a finite fraction ≥ 0"),
            (0 <= self.anchor < inf, "anchor", self.anchor, "a finite weight ≥ 0"),
            (0 < self.step < inf, "step", self.step, "a finite number above 0"),
            (q is None or q >= 1, "context_rank", q, "an integer ≥ 1"),
            (self.mode == "adapter" or self.momentum == 0, "momentum", self.momentum, alone),
            (self.mode != "adapter" or self.step == 1, "step", self.step, adding),
            (self.mode == "delta" or not self.context, "context", self.context, 'mode = "delta"'),
            (frozen or q is None, "context_rank", q, 'context = true, or mode = "restart"'),
        )

    def start(self, setup: Setup) -> Server:
        setup.check_rank("rank", self._server_rank(setup))
        return super().start(setup)

    def broadcast(self, server: Server, client: Client) -> Sent:
        s = server.setup.scaling
        if self.mode == "restart":
            fresh, seed = untrained(server.setup, client, server.round)
            return Sent(fresh, server.dense, s, merged=self._context(server, 0), drawn=seed)
        if not server.svd:
            return replace(self.opening(server, client), turn=True)
        context = self._context(server, client.rank) if self.context else ()
        readout = self._readout(server, client.rank)
        return Sent(readout, server.dense, s, merged=context, turn=True)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        updates, weights, scalings = self._terms(server, replies)
        with warnings.catch_warnings():  # what they say is in the notes
            warnings.simplefilter("ignore", GloraWarning)
            state = aggregate(
                updates, weights, scalings, self._server_rank(server.setup), basis=self.basis,
                tau_rel=self.tau_rel, anchor=self.anchor, seed=server.setup.seed,
            )  # fmt: skip
        svd = {m: SVD(x.u, x.s, x.v) for m, x in state.modules.items()}
        notes: dict[str, Any] = {
            "attainable": state.attainable,
            "held": state.captured,
            "ambiguous": len(state.ambiguous),
        }
        return replace(next_state(server, replies, svd=svd), notes=notes)

    def exact(self, server: Server, replies: Sequence[Reply]) -> Pairs:
        updates, weights, scalings = self._terms(server, replies)
        return stack(updates, [w * s for w, s in zip(weights, scalings, strict=True)])

    def update(self, reply: Reply) -> tuple[Pairs, float]:
        learnt = reply.factors
        if self.mode == "delta":
            learnt = _difference(learnt, reply.sent.factors)
        return learnt, reply.sent.scaling

    def scaled(self, reply: Reply, factor: float) -> Pairs:
        if self.mode != "delta":
            return super().scaled(reply, factor)
        sent = reply.sent.factors
        return {
            m: (torch.cat([factor * b, (1 - factor) * sent[m][0]], 1), torch.cat([a, sent[m][1]]))
            for m, (b, a) in reply.factors.items()
        }

    def model(self, server: Server) -> Sent:
        """The whole state, of rank R."""
        if not server.svd:
            return super().model(server)
        rank = self._server_rank(server.setup)
        return Sent(self._readout(server, rank), server.dense, server.setup.scaling)

    def _server_rank(self, setup: Setup) -> int:
        return self.rank or 2 * setup.max_rank

    def _terms(
        self, server: Server, replies: Sequence[Reply]
    ) -> tuple[list[Pairs], list[float], list[float]]:
        """Updates, votes and scalings whose weighted sum is W_{t+1} before truncation."""
        s, w = server.setup.scaling, shares(replies)
        before: Pairs = {m: x.pair for m, x in server.svd.items()}
        if self.mode == "adapter":
            updates, scalings = [r.factors for r in replies], [s] * len(replies)
            if self.momentum == 0 or not before:
                return updates, w, scalings
            keep = self.momentum
            return [before, *updates], [keep, *((1 - keep) * x for x in w)], [1.0, *scalings]
        learnt, s = [self.update(r)[0] for r in replies], self.step * s
        if not before:
            return learnt, w, [s] * len(replies)
        # Votes p and scalings 1/p: each term enters the sum with weight one, and the bases by vote.
        vote = self.server_vote
        return (
            [before, *learnt],
            [vote, *((1 - vote) * x for x in w)],
            [1 / vote, *([s / (1 - vote)] * len(replies))],
        )

    def _context(self, server: Server, first: int) -> tuple[Pairs, ...]:
        """W_t of rank q without its `first` leading directions: what is frozen at a client."""
        rank = self._server_rank(server.setup)
        part = slice(first, rank if self.context_rank is None else min(self.context_rank, rank))
        whole = {m: x.pair for m, x in server.svd.items()}
        kept = {m: (b[:, part].contiguous(), a[part].contiguous()) for m, (b, a) in whole.items()}
        kept = {m: pair for m, pair in kept.items() if pair[1].shape[0]}
        return (kept,) if kept else ()

    def _readout(self, server: Server, rank: int) -> Pairs:
        s, seed = server.setup.scaling, stream_seed(server.setup.seed, "pad", server.round) % 2**31
        return {
            m: torch.ops.glora.readout(x.u, x.s, x.v, rank, s, "trainable", seed)
            for m, x in server.svd.items()
        }


def _difference(learnt: Pairs, sent: Pairs) -> Pairs:
    """Pairs of B A − B₀ A₀, of rank 2r."""
    return {
        m: (torch.cat([b, -sent[m][0]], 1), torch.cat([a, sent[m][1]]))
        for m, (b, a) in learnt.items()
    }
