"""What a state says about itself, as one JSON-able dictionary; and the same in tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..adapters.safetensors_header import read_header
from ..certificates import CLIENT_STATS, STATS
from ..errors import require
from ..state import State
from ..state_file import MARK, MAX_BYTES, StateFile, read
from ..state_report import lines, notes
from .show import (
    clean,
    console,
    counted,
    figures,
    labelled,
    print_notes,
    print_skipped,
    span,
    table,
)

__all__ = [
    "STATE_NAME",
    "file_notes",
    "find_state",
    "held_energy",
    "load_state",
    "padding_note",
    "print_state",
    "state_facts",
]

STATE_NAME = "server.safetensors"
#: Clients that are shown unless all are asked for.
CLIENTS = 1_000  # why: more are read by programs, and a table of 20 000 takes ten seconds


def find_state(path: Path) -> Path | None:
    """The state file that `path` is or holds; None where it can only be an adapter."""
    if path.is_file():
        return None if _is_other_safetensors(path) else path
    return path / STATE_NAME if (path / STATE_NAME).is_file() else None


def _is_other_safetensors(path: Path) -> bool:
    """Whether a file is a sound one of safetensors, but no state."""
    header, _ = read_header(path, None, max_bytes=MAX_BYTES)
    return header is not None and MARK not in header.metadata


def state_facts(state: State) -> dict[str, Any]:
    """Certificates of the state, of its modules and of its clients."""
    settings = state.settings
    return {
        "rank": state.rank,
        "basis": settings["basis"],
        "missing": settings["missing"],
        "captured": state.captured,
        "attainable": state.attainable,
        "weights": dict(zip(state.clients, state.weights, strict=True)),
        "weights_from": settings.get("weights_from"),
        "base_model": (state.layout or {}).get("base_model"),
        "clients": _clients(state),
        "skipped": settings.get("skipped", []),
        "robust": settings.get("robust"),
        "summary": [asdict(line) for line in lines(state)],
        "certificates": {
            name: {
                "d_out": m.u.shape[0],
                "d_in": m.v.shape[0],
                **dict(zip(STATS, map(_known, m.stats.tolist()), strict=True)),
                "singular_values": m.s.tolist(),
                "clients": [c for c, there in zip(state.clients, m.present, strict=True) if there],
            }
            for name, m in state.modules.items()
        },
        "dense": sorted(state.dense.keys() - (state.layout or {}).get("base_copies", [])),
        "rank_to_captured": settings.get("rank_to_captured"),
        "notes": [
            *({"text": note.text, "warning": note.warning} for note in notes(state)),
            *_partial_means(state),
            *_unserved(state),
        ],
    }


def _clients(state: State) -> list[dict[str, Any]]:
    """Per client over all modules: energies add up, alignments are weighted by them."""
    modules = state.modules.values()
    unknown = torch.full((len(state.clients), len(CLIENT_STATS)), torch.nan, dtype=torch.float64)
    told = [m.client_stats if m.tells_of_clients else unknown for m in modules]
    stats = torch.stack(told, -1)  # [K, 4, L]
    norm, align_u, align_v, share = stats.unbind(1)
    energy = norm.square()
    total = energy.sum(-1).clamp(min=torch.finfo(energy.dtype).tiny)
    held = torch.tensor([m.stat("captured") * m.stat("norm") ** 2 for m in modules])
    held = held.to(energy.dtype) / max(float(held.sum()), torch.finfo(energy.dtype).tiny)
    columns = (
        energy.sum(-1).sqrt(),
        (energy * align_u).sum(-1) / total,
        (energy * align_v).sum(-1) / total,
        share @ held,
    )
    record = state.record or {"clients": [{} for _ in state.clients]}
    judged = state.settings.get("robust") or {"clients": [{} for _ in state.clients]}
    return [
        {"name": name, "weight": weight, **dict(zip(CLIENT_STATS, map(_known, row), strict=True))}
        | {what: entry[what] for what in ("ranks", "scalings") if what in entry}
        | ({"cosine": verdict["cosine"]} if verdict else {})
        for name, weight, row, entry, verdict in zip(
            state.clients,
            state.weights,
            zip(*columns, strict=True),
            record["clients"],
            judged["clients"],
            strict=True,
        )
    ]


def _known(x: float | torch.Tensor) -> float | None:
    """A number, or None for one that was not computed."""
    return None if math.isnan(x) else float(x)


def _partial_means(state: State) -> list[dict[str, Any]]:
    return [
        {"text": f"{name} is the mean over {', '.join(having)} only", "warning": False}
        for name, having in state.settings.get("dense_from", {}).items()
    ]


def _unserved(state: State) -> list[dict[str, Any]]:
    layout = state.layout or {}
    full = sorted(state.dense.keys() - layout.get("base_copies", []))
    if not full:
        return []
    return [
        {
            "text": f"adapters read out hold weights in full ({', '.join(full[:3])}"
            f"{', …' if len(full) > 3 else ''}): PEFT loads them, vLLM refuses such adapters "
            "(modules_to_save); serve them merged into the base",
            "warning": False,
        }
    ]


def held_energy(state: State, rank: int) -> float:
    """Fraction of ‖Ŵ‖² over all modules in the leading `rank` directions of each."""
    total = sum(float(m.s.square().sum()) for m in state.modules.values())
    kept = sum(float(m.s[:rank].square().sum()) for m in state.modules.values())
    return kept / total if total else 1.0


def padding_note(state: State, rank: int, pad: str) -> list[dict[str, Any]]:
    """Tells whoever reads out more than the state holds that zero pairs never learn."""
    effective = [int(m.stat("effective_rank")) for m in state.modules.values()]
    padded = sum(rank > r for r in effective)
    if pad != "zero" or not padded:
        return []
    return [
        {
            "text": f"rank {rank} is more than the {span(effective)} directions that {padded} of "
            f"{len(effective)} modules hold: the pairs beyond are zero, which is right for use, "
            "but they never learn; to train on, read out with --pad trainable",
            "warning": False,
        }
    ]


def print_state(facts: Mapping[str, Any], verbose: bool = False) -> None:
    """What was merged, what the certificates say, what deserves a second look.

    Certificates take a line while nothing is in question; all of them with `verbose`.
    """
    to = console()
    clients, modules = len(facts["weights"]), len(facts["certificates"])
    base = f", base {clean(facts['base_model'])}" if facts["base_model"] else ""
    to.print(
        labelled(
            f"{counted(clients, 'client')} → rank {facts['rank']}",
            "bold",
            f", basis {facts['basis']}, {counted(modules, 'module')}{base}\n",
        )
    )
    _print_clients(facts, verbose)
    if facts["rank_to_captured"]:
        ranks = table("rank", "captured", left=0)
        for rank, captured in facts["rank_to_captured"].items():
            chosen = "bold green" if int(rank) == facts["rank"] else ""
            ranks.add_row(rank, f"{captured:.4f}", style=chosen)
        to.print(ranks)
        to.print()
    if verbose or any(note["warning"] for note in facts["notes"]):
        _print_certificates(facts["summary"])
    else:
        held = f"captured {facts['captured']:.4f} of the mean update's energy"
        best = f"attainable at this rank {facts['attainable']:.4f}"
        to.print(f"{held}, {best}; all certificates fine (-v shows them)", soft_wrap=True)
    if facts["dense"]:
        to.print(f"\nweighted means of full weights: {', '.join(map(clean, facts['dense']))}")
    if facts["notes"] or facts["skipped"]:
        to.print()
    print_notes(facts["notes"])
    print_skipped(facts["skipped"])


def _print_certificates(summary: Sequence[Mapping[str, str]]) -> None:
    certificates = table("certificate", "value", "what it means")
    certificates.columns[2].justify = "left"
    certificates.columns[2].no_wrap = False
    for line in summary:
        certificates.add_row(line["name"], line["value"], line["meaning"])
    console().print(certificates)


def _print_clients(facts: Mapping[str, Any], verbose: bool) -> None:
    """One row per client; of many the first."""
    stored = any("ranks" in client for client in facts["clients"])
    judged = any("cosine" in client for client in facts["clients"])
    rows = table(
        "client", "weight", *(["rank", "scaling"] if stored else []), "‖ΔW‖", "align left",
        "align right", "share", *(["cosine"] if judged else []),
    )  # fmt: skip
    shown = facts["clients"] if verbose else facts["clients"][:CLIENTS]
    for client in shown:
        held = [span(client["ranks"]), span(client["scalings"])] if stored else []
        rows.add_row(
            clean(client["name"]),
            figures(client["weight"]),
            *held,
            *(
                "–" if client[name] is None else form(client[name])
                for name, form in zip(CLIENT_STATS, (figures, *3 * ("{:.2f}".format,)), strict=True)
            ),
            *([_cosine(client["cosine"])] if judged else []),
        )
    to = console()
    to.print(rows)
    if len(shown) < len(facts["clients"]):
        more = len(facts["clients"]) - len(shown)
        to.print(f"and {more:,} more: --verbose shows all".replace(",", " "), style="dim")
    meaning = "align: how much of the update lies in the state's spaces; share: of its energy"
    to.print(meaning, style="dim")
    origin = {
        "num_examples": "weights: num_examples of the clients' glora.json",
        "equal": "weights: equal, because not every client has a glora.json with num_examples",
        "given": "weights: as given",
    }.get(facts["weights_from"], "")
    if origin:
        to.print(origin, style="dim")
    to.print()


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def load_state(path: Path) -> tuple[State, StateFile]:
    """The state in a file, or in a folder as `glora aggregate` writes it, and the file."""
    found = path if path.is_file() else find_state(path)
    require(
        found is not None,
        "state",
        repr(str(path)),
        f"a {STATE_NAME} or a folder that holds one",
        "glora aggregate writes one",
    )
    file = read(found or path)
    return State.of(file), file


def file_notes(file: StateFile) -> list[dict[str, Any]]:
    """Tells whoever uses a file without checksums what it cannot tell them."""
    return [] if file.note is None else [{"text": file.note, "warning": False}]
