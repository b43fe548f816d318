"""Stored benchmark JSON: races, points of growth curves, runs from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Row", "load", "ms", "name_of", "threads"]

PEERS = {
    "0": "(0) randomized SVD",
    "1": "(1) thin QR of stacks + SVD",
    "2": "(2) PEFT svd",
    "3": "(3) dense mean + svd_lowrank",
    "4": "(4) dense mean + full SVD",
    "5": "(5) QR loop over clients",
}
OTHERS = {
    "glora_projector": "glora, projector",
    "one_module": "glora, one module alone",
    "glora_op": "the op alone",
    "formed": "formed bases, plain products",
    "loop_qr": "QR loop over clients",
    "plain": "plain torch",
}


def name_of(name: str, arm: dict[str, Any]) -> str:
    if not arm["peer"]:
        return OTHERS.get(name, name)
    steps = "" if arm["steps"] is None else f", q = {arm['steps']}"
    return PEERS[arm["peer"]] + steps + (f", {arm['form']}" if arm["form"] else "")


def threads(info: dict[str, Any]) -> str:
    return f"{info['threads']} thread" + ("s" if info["threads"] != 1 else "")


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


class Row:
    """One race of a JSON file."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.info: dict[str, Any] = entry["extra_info"]
        stats = entry["stats"]
        self.ms, self.low, self.high = (1e3 * stats[k] for k in ("median", "q1", "q3"))
        self.arms: dict[str, dict[str, Any]] = self.info["arms"]
        self.is_step = "basis" in self.info

    def has(self, **facts: Any) -> bool:
        """Whether the stored facts are these, or among these; None: not there."""
        return all(
            self.info.get(name) in (value if isinstance(value, tuple) else (value,))
            for name, value in facts.items()
        )

    def peer(self, number: str, steps: int | None = None) -> dict[str, Any] | None:
        """The fastest form of a peer, if it took part."""
        forms = [a for a in self.arms.values() if (a["peer"], a["steps"]) == (number, steps)]
        return min(forms, key=lambda a: a["median_ms"], default=None)

    @property
    def matched(self) -> dict[str, Any] | None:
        """Peer (0) with the fewest power steps that captured what glora did."""
        return self.peer("0", self.info.get("matched"))

    @property
    def case(self) -> str:
        i = self.info
        ranks = "/".join(map(str, i["ranks"]))
        size = f"{i['d_out']}²" if i["d_out"] == i["d_in"] else f"{i['d_out']}×{i['d_in']}"
        many = f"{i['modules']} × " if i["modules"] > 1 else ""
        shape = f"{many}{size}, K = {i['clients']}, r = {ranks}, R = {i['rank']}"
        dtype = "" if i["dtype"] == "float32" else f", {i['dtype']}"
        return f"{shape}, {i['population']}{dtype}"

    @property
    def call(self) -> str:
        if not self.is_step:
            return self.info["op"]
        steps = self.info.get("power_iters")
        lean = "" if self.info["client_statistics"] else ", no client statistics"
        return f'{self.info["op"]}, "{self.info["basis"]}"{lean}' + (
            "" if steps is None else f", power_iters={steps}"
        )

    @property
    def time(self) -> str:
        return f"{ms(self.ms)} ({ms(self.low)}–{ms(self.high)})"

    @property
    def memory(self) -> str:
        mb = self.info["memory_mb"]
        return f"{mb:.1f} MB ({100 * mb / self.info['dense_mb']:.0f} %)"


def load(files: list[Path]) -> tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]:
    """Races, points of growth curves, and runs from files."""
    rows, growth, runs = [], [], []
    for entry in (e for file in files for e in json.loads(file.read_text())["benchmarks"]):
        info = entry["extra_info"]
        if "growth" in info:
            growth.append(info)
        elif "files" in info:
            runs.append(info | {"files_ms": 1e3 * entry["stats"]["median"]})
        else:
            rows.append(Row(entry))
    return rows, growth, runs
