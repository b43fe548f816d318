"""What was aimed at on two quiet threads, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from page_parts import table
from stored_json import Row

__all__ = ["allowed", "goals"]

LARGE = {"d_out": 4096, "d_in": 4096, "clients": 32, "ranks": [16], "rank": 32, "dtype": "float32"}
SMALL = {"d_out": 1024, "d_in": 1024, "clients": 8, "ranks": [8], "dtype": "float32"}
MANY = SMALL | {"clients": 32}
EQUAL = (0, 1, 2, 3)  # power steps of both; the worst counts


@dataclass(frozen=True)
class Race:
    """At least `least` times as fast as a peer, in the slowest of the rows with these facts.

    Attributes
    ----------
    peer : str
        Number of one, or "" for the fastest that took part.
    """

    peer: str
    least: float
    facts: dict[str, Any]

    def ratio(self, rows: list[Row]) -> float | None:
        return min((self._of(r) for r in rows if r.is_step and r.has(**self.facts)), default=None)

    def _of(self, row: Row) -> float:
        if not self.peer:
            return min(a["ratio"] for a in row.arms.values() if a["peer"])
        arm = row.matched if self.peer == "0" else row.peer(self.peer)
        assert arm is not None, f"peer ({self.peer}) did not race in {row.case}"
        return arm["ratio"]


def _kinds(bounds: tuple[float, float, float], **facts: Any) -> list[Race]:
    kinds = zip(("partly", "shared", "disjoint"), bounds, strict=True)
    case = LARGE | {"op": "aggregate.list", "basis": "update"} | facts
    return [Race("0", least, case | {"population": kind}) for kind, least in kinds]


def _both(case: dict[str, Any], peer: str, mean: float, consensus: float) -> list[Race]:
    case = case | {"population": "partly", "client_statistics": True}
    return [
        Race(peer, mean, case | {"basis": "update"}),
        Race(peer, consensus, case | {"basis": "consensus"}),
    ]


def _goals() -> list[tuple[str, list[Race]]]:
    """What is compared, and the races of each goal in the order it names them."""
    stack, model = {"op": "aggregate"}, {"op": "glora_ops.aggregate"}
    partly = stack | {"population": "partly"}
    kinds = "partly / shared / disjoint, against (0)"
    lean, told = {"client_statistics": False}, {"client_statistics": True}
    equal = _kinds((1.0, 1.0, 1.0), power_iters=EQUAL, **lean)
    return [
        (f"`update`, no client statistics, as many power steps: {kinds}", equal),
        (f"`update`, no client statistics, stop rule: {kinds}",
         _kinds((0.7, 0.7, 1.2), power_iters=None, **lean)),
        (f"`update` with them, stop rule: {kinds}",
         _kinds((0.5, 0.5, 0.9), power_iters=None, **told)),
        ("`consensus` (a hope): against (0), q = 1 / (1)",
         [Race(peer, least, LARGE | partly | {"basis": "consensus"})
          for peer, least in (("0", 0.6), ("1", 2.5))]),
        ("1024², K = 8: `update` / `consensus` against (1)", _both(SMALL | stack, "1", 0.5, 0.3)),
        ("1024², K = 32: `update` against (0) / (1)",
         [Race(peer, least, MANY | partly | {"basis": "update"})
          for peer, least in (("0", 0.6), ("1", 3))]),
        ("112 modules of 1024²: `update` / `consensus` against the best peer's loop",
         _both(model | {"modules": 112}, "", 1.3, 0.7)),
        ("16 modules of 2048², K = 32: the same", _both(model | {"modules": 16}, "", 1.5, 0.35)),
    ]  # fmt: skip


def allowed(i: dict[str, Any]) -> float:
    """MB: the state, twice the factors of the largest module, and 300."""
    return i["state_mb"] + 2 * i["largest_mb"] + 300


def goals(rows: list[Row], files: list[dict[str, Any]]) -> str:
    body = []
    for text, races in _goals():
        found = [race.ratio(rows) for race in races]
        if None not in found:
            least = [race.least for race in races]
            body.append([
                text, "≥ " + " / ".join(f"{x:g}" for x in least),
                "×" + " / ".join(f"{x:.2f}" for x in found),
                " / ".join(met(x >= y) for x, y in zip(found, least, strict=True)),
            ])  # fmt: skip
    for i in files:
        rate = i["rate_of_memory"]
        body += [
            [f"{i['clients']} folders: rate of in memory", "≥ 85 %", f"{100 * rate:.0f} %",
             met(rate >= 0.85)],
            ["their peak: state + 2 × largest module + 300 MB", f"≤ {allowed(i):.0f} MB",
             f"{i['peak_mb']:.0f} MB", met(i["peak_mb"] <= allowed(i))],
        ]  # fmt: skip
    return table(["what", "goal", "measured", "met"], body)


def met(yes: bool) -> str:
    return "yes" if yes else "**no**"
