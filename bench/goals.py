"""What was aimed at on two quiet threads, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stored import Row
from tables import table

__all__ = ["allowed", "goals"]

LARGE = {"d_out": 4096, "d_in": 4096, "clients": 32, "ranks": [16], "rank": 32, "dtype": "float32"}
SMALL = {"d_out": 1024, "d_in": 1024, "clients": 8, "ranks": [8], "dtype": "float32"}
MANY = SMALL | {"clients": 32}
LISTS = {"op": "aggregate.list", "power_iters": None}
STACKS = {"op": "aggregate", "client_statistics": True}


@dataclass(frozen=True)
class Goal:
    """At least `least` times as fast as a peer, in the worst of the races with these facts.

    Attributes
    ----------
    peer : str
        Number of one, or "" for the fastest that took part.
    """

    text: str
    peer: str
    least: float
    facts: dict[str, Any]

    def ratio(self, row: Row) -> float:
        if not self.peer:
            return min(a["ratio"] for a in row.arms.values() if a["peer"])
        arm = row.matched if self.peer == "0" else row.peer(self.peer)
        assert arm is not None, f"peer ({self.peer}) did not race in {row.case}"
        return arm["ratio"]


def _goals() -> list[Goal]:
    out = []
    for kind in ("partly", "shared", "disjoint"):
        case = LARGE | {"population": kind, "basis": "update"}
        equal = [case | {"op": "aggregate.list", "power_iters": q} for q in range(4)]
        out += [
            Goal(f"`update`, no client statistics, {kind}: (0), q = {q} for both", "0", 1.0, facts)
            for q, facts in enumerate(equal)
        ]
    for told, least in ((False, (0.7, 0.7, 1.2)), (True, (0.5, 0.5, 0.9))):
        for kind, bound in zip(("partly", "shared", "disjoint"), least, strict=True):
            facts = LARGE | LISTS | {"population": kind, "client_statistics": told}
            how = "with" if told else "no"
            out.append(Goal(f"`update`, {how} client statistics, {kind}: (0)", "0", bound, facts))
    partly = {"population": "partly"}
    mean, consensus = partly | {"basis": "update"}, partly | {"basis": "consensus"}
    model = {"op": "glora_ops.aggregate", "client_statistics": True}
    return [
        *out,
        Goal("`consensus` (hope): (0), q = 1", "0", 0.6, LARGE | STACKS | consensus),
        Goal("`consensus` (hope): (1)", "1", 2.5, LARGE | STACKS | consensus),
        Goal("1024², K = 8, `update`: (1)", "1", 0.5, SMALL | STACKS | mean),
        Goal("1024², K = 8, `consensus`: (1)", "1", 0.3, SMALL | STACKS | consensus),
        Goal("1024², K = 32, `update`: (0)", "0", 0.6, MANY | STACKS | mean),
        Goal("1024², K = 32, `update`: (1)", "1", 3, MANY | STACKS | mean),
        Goal("112 × 1024², `update`: best loop", "", 1.3, model | mean | {"modules": 112}),
        Goal("112 × 1024², `consensus`: best loop", "", 0.7, model | consensus | {"modules": 112}),
        Goal("16 × 2048², `update`: best loop", "", 1.5, model | mean | {"modules": 16}),
        Goal("16 × 2048², `consensus`: best loop", "", 0.35, model | consensus | {"modules": 16}),
    ]


def allowed(i: dict[str, Any]) -> float:
    """MB: the state, twice the factors of the largest module, and 300."""
    return i["state_mb"] + 2 * i["largest_mb"] + 300


def goals(rows: list[Row], files: list[dict[str, Any]]) -> str:
    body = []
    for goal in _goals():
        found = [goal.ratio(row) for row in rows if row.is_step and row.has(**goal.facts)]
        if found:
            body.append([goal.text, f"≥ {goal.least:g}", f"×{min(found):.2f}",
                         met(min(found) >= goal.least)])  # fmt: skip
    for i in files:
        what, rate = f"folders, {i['clients']} clients", i["rate_of_memory"]
        body += [
            [f"{what}: rate of in memory", "≥ 85 %", f"{100 * rate:.0f} %", met(rate >= 0.85)],
            [f"{what}: peak, state + 2 × largest module + 300 MB", f"≤ {allowed(i):.0f} MB",
             f"{i['peak_mb']:.0f} MB", met(i["peak_mb"] <= allowed(i))],
        ]  # fmt: skip
    return table(["against", "goal", "measured", "met"], body)


def met(yes: bool) -> str:
    return "yes" if yes else "**no**"
