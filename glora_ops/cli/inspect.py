"""`glora inspect`: what an adapter folder or a server state holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .options import Json, Plot, Quiet, Verbose
from .show import (
    answering,
    clean,
    console,
    figures,
    labelled,
    number,
    print_json,
    print_notes,
    span,
    table,
)

__all__ = ["EXAMPLE", "inspect"]

EXAMPLE = "Example: glora inspect out --plot spectra.png"
_BARS = "▁▂▃▄▅▆▇█"
MODULE_WIDTH = 24  # why: narrower columns break paths into fragments that cannot be read


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|STATE",
            help="A PEFT adapter folder, a server.safetensors, or the folder that holds it.",
        ),
    ],
    plot: Plot = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what an adapter or a server state holds.

    Ranks, scalings, norms, spectra and certificates. Norms and spectra are those of the update
    s·B·A, whatever the factors look like.
    """
    with answering(as_json, writes=plot is not None, quiet=quiet) as outcome:
        from .state_facts import find_state

        if plot is not None:
            from ..analysis.plots import check_picture

            check_picture(plot, [path])
        facts = _state(path, plot) if find_state(path) else _adapter(path, plot)
        outcome.wrote(plot)
        facts["plot"] = None if plot is None else str(plot)
        if as_json:
            print_json(facts)
            return
        if "certificates" in facts:
            from .state_facts import print_state

            print_state(facts, verbose)
            _print_state_modules(facts["certificates"], verbose)
            if facts["sha256"] is not None:
                said = f"\nchecksums: all verified, sha256 {facts['sha256']}"
                console().print(said, style="dim", soft_wrap=True)
        else:
            _print_adapter(facts)
        if plot is not None:
            console().print(labelled("\nwritten: ", "bold green", clean(plot)), soft_wrap=True)


def _state(path: Path, plot: Path | None) -> dict[str, Any]:
    from .state_facts import file_notes, load_state, state_facts

    state, file = load_state(path)
    if plot is not None:
        from ..analysis.plots import plot_state

        plot_state(state, plot)
    facts = state_facts(state)
    facts["notes"] += file_notes(file)
    return {"state": str(path), "format_version": file.version, "sha256": file.sha256, **facts}


def _adapter(path: Path, plot: Path | None) -> dict[str, Any]:
    from ..adapters import check_values, read_adapter
    from ..analysis.compare import spectra
    from ..errors import Refused

    adapter = read_adapter(path)
    problems = check_values(adapter)
    if problems:
        raise Refused(problems)
    found = spectra(adapter)
    if plot is not None:
        from ..analysis.plots import plot_adapter

        plot_adapter(adapter.name, found, plot)
    return {
        "adapter": str(path),
        "base_model": adapter.base_model,
        "task_type": adapter.task_type,
        "num_examples": adapter.num_examples,
        "norm": sum(float(s.square().sum()) for s in found.values()) ** 0.5,
        "modules": {
            name: {
                "kind": m.kind,
                "d_out": m.d_out,
                "d_in": m.d_in,
                "rank": m.rank,
                "scaling": m.scaling,
                "norm": float(found[name].norm()),
                "singular_values": found[name].tolist(),
            }
            for name, m in adapter.modules.items()
        },
        "dense": {name: list(tensor.shape) for name, tensor in adapter.dense.items()},
        "notes": [{"text": remark, "warning": False} for remark in adapter.remarks],
    }


def _print_adapter(facts: Mapping[str, Any]) -> None:
    to = console()
    modules = facts["modules"].values()
    to.print(Text(clean(facts["adapter"]), "bold"))
    about = table("", "", left=2)
    about.show_header = False
    about.add_row("base", clean(facts["base_model"] or "not named"))
    about.add_row("task", clean(facts["task_type"] or "not named"))
    examples = facts["num_examples"]
    about.add_row("examples", "not counted" if examples is None else str(examples))
    about.add_row("modules", str(len(modules)))
    about.add_row("ranks", span([m["rank"] for m in modules]))
    about.add_row("scalings", span([m["scaling"] for m in modules]))
    about.add_row("‖ΔW‖", number(facts["norm"]))
    to.print(about)
    to.print()
    rows = table(
        "module", "kind", "d_out × d_in", "rank", "scaling", "‖s·BA‖", "σ₁", "spectrum", left=2
    )
    rows.columns[-1].justify = "left"
    for name, m in facts["modules"].items():
        rows.add_row(
            clean(name),
            m["kind"],
            f"{m['d_out']} × {m['d_in']}",
            str(m["rank"]),
            number(m["scaling"]),
            figures(m["norm"]),
            figures(m["singular_values"][0]),
            _bars(m["singular_values"]),
        )
    to.print(rows)
    for name, shape in facts["dense"].items():
        to.print(f"saved in full: {clean(name)} {tuple(shape)}")
    print_notes(facts["notes"])


def _print_state_modules(certificates: Mapping[str, Mapping[str, Any]], verbose: bool) -> None:
    """A row per module; the certificates of its cut where they are wanted, or one is in a tie."""
    rows = table("module", "d_out × d_in", "‖W̄‖", "captured", "rank", "spectrum")
    cuts = table("module", "attainable", "gap", "cut")
    rows.columns[-1].justify = "left"
    for name, m in certificates.items():
        named = clean(name) or "(unnamed)"
        rows.add_row(
            named,
            f"{m['d_out']} × {m['d_in']}",
            figures(m["norm"]),
            f"{m['captured']:.4f}",
            str(int(m["effective_rank"])),
            _bars(m["singular_values"]),
        )
        gap = f"{min(m['gap_u'], m['gap_v'], m['gap_w']):.1e}"
        tie = Text("in a tie", "bold yellow") if m["ambiguous"] else "clear"
        cuts.add_row(named, f"{m['attainable']:.4f}", gap, tie)
    to = console()
    tied = any(m["ambiguous"] for m in certificates.values())
    for shown in [rows, cuts] if verbose or tied else [rows]:
        shown.columns[0].min_width = MODULE_WIDTH
        to.print()
        to.print(shown)


def _bars(values: Sequence[float]) -> str:
    """The leading singular values relative to the first, as a row of bars."""
    if values[0] == 0:
        return ""
    shown = "".join(
        _BARS[round(v / values[0] * (len(_BARS) - 1))] if v > 0 else " " for v in values[:16]
    )
    return shown.rstrip() + ("…" if len(values) > 16 and values[16] > 0 else "")
