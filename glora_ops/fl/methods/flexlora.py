"""FlexLoRA: the SVD of the dense mean update, and to each client as much as its rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..messages import Client, Pairs, Reply, Sent
from ..server import Server
from .base import Method, next_state, shares, stack, truncated

__all__ = ["FlexLoRA"]


@dataclass(frozen=True)
class FlexLoRA(Method):
    """W = Σ w_i s B_i A_i = U Σ Vᵀ formed densely; client i gets B = U_r Σ_r / s and A = V_rᵀ.

    Source: Bai et al., "Federated fine-tuning of large language models under heterogeneous tasks
    and client resources" (NeurIPS 2024), arXiv 2402.11505. The singular vectors beyond the rank of
    W that a client of larger rank would get are kept in A, with B = 0.
    """

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.svd:
            return replace(self.opening(server, client), turn=True)
        factors = self._slice(server, client.rank)
        return Sent(factors, server.dense, server.setup.scaling, turn=True)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        s = server.setup.scaling
        stacked = stack([r.factors for r in replies], [s * w for w in shares(replies)])
        most = server.setup.max_rank
        svd = {m: truncated(b @ a, max(a.shape[0], most)) for m, (b, a) in stacked.items()}
        return next_state(server, replies, svd=svd)

    def model(self, server: Server) -> Sent:
        """The whole mean, before any truncation."""
        if not server.svd:
            return super().model(server)
        rank = max(x.s.numel() for x in server.svd.values())
        return Sent(self._slice(server, rank), server.dense, server.setup.scaling)

    def _slice(self, server: Server, rank: int) -> Pairs:
        s = server.setup.scaling
        return {
            m: ((x.u * (x.s / s).to(x.u.dtype))[:, :rank].contiguous(), x.v.mT[:rank].contiguous())
            for m, x in server.svd.items()
        }
