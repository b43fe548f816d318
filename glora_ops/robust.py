"""Verdicts on clients that may be bad: clip, gate, geometric median (docs/reliability.md).

Every rule is a function of the K × K inner products ⟨ΔW_i, ΔW_j⟩ over the whole adapter and of the
weights, so that no gauge, rank or module is seen. Numbered formulae: docs/mathematics.md, 15.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CLIP",
    "RULES",
    "TELLING",
    "Verdict",
    "cosine_limit",
    "cosines",
    "judge",
    "median",
    "median_cosines",
    "say",
]

RULES = ("clip", "gate", "geometric-median")
#: How many times the median norm an update may be long.
CLIP = 2.0
#: Part of the median client's cosine below which a client is left out.
ODD = 0.5
#: Below this median cosine honest clients' own differ by as much as what would be left out.
TELLING = 0.1
#: Fewer clients than this cannot outvote one.
FEWEST = 3
# Of Weiszfeld's iteration: relative smoothing, stop, and the most steps.
SMOOTH, STILL, STEPS = 1e-4, 1e-9, 1000


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of K clients, with every number that decided it.

    Attributes
    ----------
    rule, applied : str
        Asked for, and used: one of `RULES`, or "none" where nothing can be told.
    reason : str
        Why another rule than asked for is used; empty where none is.
    norm_limit : float or None
        c · median norm; None where nothing is clipped.
    cosine_limit : float or None
        Half of the median client's cosine; None where nobody is left out.
    norms : tuple of float
        ‖ΔW_i‖_F over all modules.
    cosines : tuple of (float or None)
        Median signed cosine with the others; None of a client without update or weight.
    distances : tuple of (float or None)
        ‖ΔW_i − geometric median‖_F where that rule is used.
    scale : tuple of float
        What ΔW_i is multiplied with, ≤ 1.
    trust : tuple of float
        What the weight is multiplied with; 0 leaves the client out. Σ w_i·trust_i = Σ w_i.
    """

    rule: str
    applied: str
    reason: str
    norm_limit: float | None
    cosine_limit: float | None
    norms: tuple[float, ...]
    cosines: tuple[float | None, ...]
    distances: tuple[float | None, ...]
    scale: tuple[float, ...]
    trust: tuple[float, ...]

    @property
    def left_out(self) -> tuple[int, ...]:
        """Places of the clients that are left out."""
        return tuple(i for i, trust in enumerate(self.trust) if trust == 0)

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """The verdict as JSON: a row per client, in their order."""
        rows = zip(self.norms, self.cosines, self.distances, self.scale, self.trust, strict=True)
        columns = ("norm", "cosine", "distance", "scale", "trust")
        return {
            "rule": self.rule,
            "applied": self.applied,
            "reason": self.reason,
            "norm_limit": self.norm_limit,
            "cosine_limit": self.cosine_limit,
            "left_out": [names[i] for i in self.left_out],
            "clients": [dict(zip(columns, row, strict=True)) for row in rows],
        }


def judge(rule: str, inner: Tensor, weights: Sequence[float], clip: float = CLIP) -> Verdict:
    """The verdict of a rule on K clients.

    Medians count every client of positive weight and non-zero update once, whatever its weight:
    weights are often what clients say of themselves.

    Parameters
    ----------
    rule : {"clip", "gate", "geometric-median"}
    inner : Tensor (K, K) fp64
        ⟨ΔW_i, ΔW_j⟩, symmetric.
    weights : sequence of float
        ≥ 0, one above zero.
    clip : float
        c > 0: an update longer than c times the median is shortened to that.

    Notes
    -----
    Cost O(K² log K), and O(K²) a step of at most 1000 for the geometric median.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    norms = inner.diagonal().clamp(min=0).sqrt()
    heard = (norms > 0) & (w > 0)
    agreement = median_cosines(cosines(inner), heard)
    trust, scale = torch.ones_like(w), torch.ones_like(w)
    distances: list[float | None] = [None] * len(weights)
    applied, reason = rule, ""
    norm_limit = least = None

    if int(heard.sum()) < FEWEST:
        applied = "none"
        reason = f"fewer than {FEWEST} clients with an update: none can be told from the others"
    if applied == "gate":
        usual = median(agreement[heard])
        least = cosine_limit(agreement[heard])
        if least is None:
            applied = "geometric-median"
            reason = (
                f"the median client's cosine with the others is {usual:.3g}, below {TELLING:g}: "
                "too small to tell who is odd"
            )
        else:
            kept = ~heard | (agreement >= least)
            trust = kept * (w.sum() / w[kept].sum())
            heard = heard & kept
    if applied in ("clip", "gate"):
        norm_limit = clip * median(norms[heard])
        scale = (norm_limit / norms.where(norms > 0, norm_limit)).clamp(max=1.0)
    if applied == "geometric-median":
        unit = median(norms[heard])
        apart = _weiszfeld(inner / unit**2, w / w.sum())
        trust = w.sum() / (w / apart).sum() / apart
        distances = (apart * unit).tolist()
    return Verdict(
        rule, applied, reason, norm_limit, least, tuple(norms.tolist()),
        tuple(x if x == x else None for x in agreement.tolist()), tuple(distances),
        tuple(scale.tolist()), tuple(trust.tolist()),
    )  # fmt: skip


def cosines(inner: Tensor) -> Tensor:
    """(K, K): signed cosines of the inner products, from −1 to 1; NaN beside a zero update."""
    norms = inner.diagonal().clamp(min=0).sqrt()
    norms = norms.where(norms > 0, float("nan"))
    return (inner / norms / norms[:, None]).clamp(-1, 1)


def median_cosines(cosine: Tensor, among: Tensor) -> Tensor:
    """(K,): each client's median cosine with the others, both among `among`; otherwise NaN."""
    out = torch.full((len(cosine),), float("nan"), dtype=cosine.dtype)
    places = among.nonzero().flatten().tolist()
    for i in places if len(places) > 1 else ():
        others = among.clone()
        others[i] = False
        out[i] = median(cosine[i, others])
    return out


def cosine_limit(agreement: Tensor) -> float | None:
    """Half of the median client's cosine; None where that is too small to tell."""
    usual = median(agreement)
    return ODD * usual if usual >= TELLING else None


def median(x: Tensor) -> float:
    """The middle value, or the mean of the middle two: no order of the clients decides."""
    ordered = x.sort().values
    half = len(x) // 2
    return float((ordered[half] + ordered[~half]) / 2)


def _weiszfeld(inner: Tensor, w: Tensor) -> Tensor:
    """(K,): smoothed distances √(‖ΔW_i − X‖² + ν²) at the geometric median X = Σ λ_j ΔW_j.

    Weiszfeld 1937, smoothed as in Pillutla et al., "Robust aggregation for federated learning"
    (arXiv 1912.13445): λ_i ∝ w_i / distance_i, from λ = w, until no λ moves by 1e-9.
    """
    own = inner.diagonal()
    share = w
    for _ in range(STEPS):
        mixed = inner @ share
        square = own - 2 * mixed + share @ mixed
        apart = (square.clamp(min=0) + SMOOTH**2).sqrt()
        after = w / apart
        after = after / after.sum()
        moved = float((after - share).abs().max())
        share = after
        if moved <= STILL:
            break
    return apart


def say(record: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, bool]]:
    """A recorded verdict in sentences, and whether each is a warning."""
    rule, applied, clients = record["rule"], record["applied"], record["clients"]
    out = []
    if applied != rule:
        instead = "nobody was judged" if applied == "none" else f"{applied} was used instead"
        out.append((f"robust {rule}: {record['reason']}; {instead}", True))
    out += [
        (
            f"robust {rule} left {name} out: its median cosine with the others is "
            f"{client['cosine']:.2f}, below {record['cosine_limit']:.2f}, half of the median "
            "client's",
            True,
        )
        for name, client in zip(names, clients, strict=True)
        if client["trust"] == 0
    ]
    out += [
        (
            f"robust {rule} clipped {name}: its update of norm {client['norm']:.3g} counts as one "
            f"of {record['norm_limit']:.3g}",
            False,
        )
        for name, client in zip(names, clients, strict=True)
        if client["scale"] < 1 and client["trust"] > 0
    ]
    if applied == "geometric-median":
        least = min(range(len(names)), key=lambda i: clients[i]["trust"])
        out.append(
            (
                f"robust {rule}: weights follow the distance from the geometric median; "
                f"{names[least]} is farthest and has {clients[least]['trust']:.2g} times its own",
                False,
            )
        )
    if len(out) == 0:
        out.append((f"robust {rule}: nobody was clipped or left out", False))
    return out
