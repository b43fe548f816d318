"""A state's certificates in words: what each number means for the reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import robust
from .errors import (
    GloraWarning,
    LowEnergyWarning,
    RobustWarning,
    StrangerWarning,
    TieWarning,
    UnheardWarning,
    clean,
)

if TYPE_CHECKING:
    from .state import State

__all__ = ["Line", "Note", "describe", "lines", "notes"]

LOW_RATIO = 0.9  # why: a tenth of the energy is worth a second look; a judgement, not measured
OPPOSED = 1e-3  # why: shares are sums in fp32 whose rounding stays well below
LOUD = 1e3  # why: a mistaken alpha is off by powers of ten, honest clients are not


@dataclass(frozen=True)
class Line:
    """One certificate: its name, its value as text, and one sentence on what it means."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Note:
    """Something the reader should know; a `category` where the result itself is in question."""

    text: str
    category: type[GloraWarning] | None = None

    @property
    def warning(self) -> bool:
        return self.category is not None


def lines(state: State) -> list[Line]:
    """The certificates of a state, over all its modules."""
    modules = state.modules.values()
    effective = [int(m.stat("effective_rank")) for m in modules]
    gap = min(min(m.stat("gap_u"), m.stat("gap_v"), m.stat("gap_w")) for m in modules)
    kappa = max(max(m.stat("kappa_p"), m.stat("kappa_w")) for m in modules)
    out = [
        Line(
            "captured",
            f"{state.captured:.4f}",
            "fraction of the mean update's energy that the state holds; 1 is all of it",
        ),
        Line(
            "attainable",
            f"{state.attainable:.4f}",
            f"what the best possible rank-{state.rank} state would hold; a larger rank raises it",
        ),
        Line(
            "effective rank",
            str(min(effective)) + (f"…{max(effective)}" if max(effective) > min(effective) else ""),
            "directions above rounding; an adapter of that rank loses nothing of the state",
        ),
        Line(
            "gap at the cut",
            f"{gap:.2e}",
            "smallest relative distance between the last direction kept and the first one dropped; "
            "near 0 the choice between them is a coin toss, 1 means nothing was dropped",
        ),
        Line(
            "sensitivity",
            f"{kappa:.1e}",
            "by how much rounding errors are magnified at the cut; times 6e-8 it is the part of "
            "the update that rounding could move",
        ),
    ]
    if not any(m.stats.isnan().any() for m in modules):
        limited = max(int(m.stat("info_limited")) for m in modules)
        out.append(
            Line(
                "storage limit",
                _count(limited, "client"),
                "clients whose weak directions are below the precision they were stored in, so "
                "that "
                + (
                    "these have no vote"
                    if state.settings["basis"] == "projector"
                    else "their vote is softened further"
                ),
            )
        )
    return out


def notes(state: State) -> list[Note]:
    """What deserves a second look; empty when nothing does."""
    out = []
    modules, clients = _count(len(state.modules), "module"), _count(len(state.clients), "client")
    tied = state.ambiguous
    if tied:
        out.append(
            Note(
                f"the cut at rank {state.rank} falls into a tie in {_part(tied, modules)}: "
                "rounding decides which of several equally good directions are kept; another "
                'rank, or the basis "update", avoids it',
                category=TieWarning,
            )
        )
    captured, attainable = state.captured, state.attainable
    if attainable > 0 and captured < LOW_RATIO * attainable:
        out.append(
            Note(
                f"the state holds {captured:.3f} of the mean update's energy where rank "
                f"{state.rank} could hold {attainable:.3f}: the {state.settings['basis']} "
                "basis serves directions that cancel or carry little; a larger rank or "
                'basis "update" holds more',
                category=LowEnergyWarning,
            )
        )
    hard = state.settings["basis"] == "projector"
    unheard = [name for name, m in state.modules.items() if hard and m.stat("info_limited")]
    if unheard:
        out.append(
            Note(
                f"in {_part(unheard, modules)} clients have directions below the precision they "
                "were stored in, which have no vote: the state does not hold them at any rank; the "
                'basis "consensus" or "update" does',
                category=UnheardWarning,
            )
        )
    heaviest = max(range(len(state.clients)), key=lambda i: abs(state.weights[i]))
    total = sum(abs(w) for w in state.weights)
    if len(state.clients) > 1 and abs(state.weights[heaviest]) > total / 2:
        out.append(
            Note(
                f"{state.clients[heaviest]} has {state.weights[heaviest] / total:.0%} of the weight"
            )
        )
    if "robust" in state.settings:
        out += [
            Note(text, RobustWarning if warns else None)
            for text, warns in robust.say(state.settings["robust"], state.clients)
        ]
    told = all(m.tells_of_clients for m in state.modules.values())
    silent = _silent_clients(state) if told else []
    if silent:
        out.append(
            Note(f"{_part(silent, clients)} sent an update of zero: untrained, or alpha is 0")
        )
    for name in _strangers(state):
        out.append(
            Note(
                f"{name} shares no module with the other clients: if they adapt the same layers, "
                "under other names, the mean has lost most of every update",
                category=StrangerWarning,
            )
        )
    for name, ratio in _loud_clients(state) if told else []:
        out.append(
            Note(f"{name} has an update {ratio:.0e} times the median client's: look at its scaling")
        )
    opposed = _opposed_clients(state) if told else []
    if opposed:
        out.append(
            Note(
                f"{_part(opposed, clients)} pull against the mean: their updates have a negative "
                "inner product with the server's; glora compare shows signed cosines"
            )
        )
    if not told:
        out.append(Note("made without client_statistics: nothing is known of single clients"))
    partial = [name for name, m in state.modules.items() if not bool(m.present.all())]
    if partial:
        how = "counts as zero there" if state.settings["missing"] == "zero" else "is left out there"
        out.append(
            Note(f"{_part(partial, modules)} are not in every client; a client without one {how}")
        )
    return [*out, *map(Note, state.settings.get("remarks", []))]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _part(names: Sequence[str], whole: str) -> str:
    """How many of the whole, and the first of their names; the module of bare pairs has none."""
    shown = ", ".join(n for n in names[:3] if n) + ", …" * (len(names) > 3)
    return f"{len(names)} of {whole}" + (f" ({shown})" if shown else "")


def _silent_clients(state: State) -> list[str]:
    norms = torch.stack([m.client_stat("norm") for m in state.modules.values()]).sum(0)
    return [name for name, n in zip(state.clients, norms, strict=True) if n == 0]


def _strangers(state: State) -> list[str]:
    """Clients none of whose modules is another's too."""
    present = torch.stack([m.present for m in state.modules.values()]).to(torch.int64)  # [L, K]
    shared = (present * (present.sum(1, keepdim=True) > 1)).sum(0)
    several = len(state.clients) > 1
    return [n for n, s in zip(state.clients, shared.tolist(), strict=True) if several and s == 0]


def _loud_clients(state: State) -> list[tuple[str, float]]:
    norms = torch.stack([m.client_stat("norm") for m in state.modules.values()])
    overall = norms.square().sum(0).sqrt()
    heard = overall[overall > 0]
    if heard.numel() < 3:
        return []
    median = float(heard.median())
    return [
        (name, float(n) / median)
        for name, n in zip(state.clients, overall, strict=True)
        if n > LOUD * median
    ]


def _opposed_clients(state: State) -> list[str]:
    """Of positive weight, with a negative share of the energy, more than rounding."""
    modules = state.modules.values()
    held = [m.stat("captured") * m.stat("norm") ** 2 for m in modules]
    shares = torch.stack([m.client_stat("share") for m in modules], 1)
    energy = shares @ torch.tensor(held, dtype=shares.dtype)
    return [
        name
        for name, w, mine in zip(state.clients, state.weights, energy.tolist(), strict=True)
        if w > 0 and mine < -OPPOSED * sum(held)
    ]


def describe(state: State) -> str:
    """All lines and notes as text."""
    header = (
        f"{_count(len(state.clients), 'client')} → rank {state.rank}, "
        f"basis {state.settings['basis']}, {_count(len(state.modules), 'module')}"
    )
    table = lines(state)
    width = max(len(l.name) for l in table)
    body = [f"  {l.name:<{width}}  {l.value:>10}  {l.meaning}" for l in table]
    return clean("\n".join([header, *body, *(f"  note: {n.text}" for n in notes(state))]))
