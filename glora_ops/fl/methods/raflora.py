"""raFLoRA: each slice of ranks is averaged over those clients that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..messages import Client, Pairs, Reply, Sent
from ..server import Server
from .base import Method, next_state, shares, stack, truncated

__all__ = ["RaFLoRA"]


@dataclass(frozen=True)
class RaFLoRA(Method):
    """W = Σ_h Σ_{i: r_i ≥ h} (n_i/N_h) s B_i[:, l:h] A_i[l:h], N_h = Σ_{i: r_i ≥ h} n_i; SVD, cut.

    l:h are the slices between the ranks that clients of the run have. W is cut to the largest of
    them; client i gets B = U_r √Σ_r and A = √Σ_r V_rᵀ (W = s B A).

    Source: Wu et al., "Preventing rank collapse in federated low-rank adaptation with client
    heterogeneity", arXiv 2602.13486. Read: the abstract, and the partition, the weights, the cut
    and the √Σ on both sides in a public transcription of its algorithm 1 and equation 8. Inferred:
    a slice that no reply of a round holds adds nothing, as in that transcription. A pair of
    singular value 0 is zero on both sides and stays so.
    """

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.svd:
            return self.opening(server, client)
        r, s = client.rank, server.setup.scaling
        factors: Pairs = {}
        for m, x in server.svd.items():
            root = (x.s / s).sqrt().to(x.u.dtype)[:r]
            factors[m] = (x.u[:, :r] * root, root[:, None] * x.v.mT[:r])
        return Sent(factors, server.dense, s)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        s, largest = server.setup.scaling, server.setup.max_rank
        slices: list[Pairs] = []
        weights: list[float] = []
        for low, high in pairwise([0, *sorted(set(server.setup.ranks))]):
            holders = [r for r in replies if r.sent.rank >= high]
            slices += [
                {m: (b[:, low:high], a[low:high]) for m, (b, a) in r.factors.items()}
                for r in holders
            ]
            weights += [s * w for w in shares(holders)] if holders else []
        whole = stack(slices, weights)
        svd = {m: truncated(b @ a, largest) for m, (b, a) in whole.items()}
        return next_state(server, replies, svd=svd)
