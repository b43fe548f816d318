"""`glora compare`: which clients agree, which are loud, which are odd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import typer
from rich.text import Text

from ..errors import Refused
from .options import Base, Clients, Json, Plot, Quiet, Threads
from .show import (
    answering,
    clean,
    console,
    figures,
    labelled,
    print_json,
    print_notes,
    progress,
    span,
    table,
)

__all__ = ["EXAMPLE", "compare"]

EXAMPLE = "Example: glora compare clients/ann clients/bob clients/cyd --plot alignment.png"

#: A client is loud whose update is longer than this many median clients'.
LOUD = 3  # why: half as much again as --robust clip shortens to
#: A client is odd whose mean alignment is below this part of the median client's …
ODD = 0.5
#: … provided that the median client agrees with the others at least this much.
AGREED = 0.1  # why: among strangers everybody is odd
#: More clients than this do not fit a terminal as a matrix.
MATRIX_CLIENTS = 12  # why: a cell takes six columns of eighty


def compare(
    clients: Clients,
    plot: Plot = None,
    base: Base = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show which clients learnt alike, which are loud or odd.

    By principal angles and signed cosines. Alignment 1 means the same directions (or one client's
    within the other's), 0 means orthogonal ones: left of the column spaces (what the update
    writes), right of the row spaces (what it reads). It has no sign. The cosine of two updates has:
    1 the same up to size, 0 nothing in common, −1 opposite. Both depend on the updates only, not on
    how they are factored, scaled or how loud they are.
    """
    if len(clients) < 2:
        raise typer.BadParameter("needs at least two folders", param_hint="CLIENT_DIR")
    with answering(as_json, writes=plot is not None, quiet=quiet, threads=threads) as outcome:
        from ..adapters import (
            Adapter,
            align_names,
            check_compatible,
            check_values,
            inspect_adapter,
        )
        from ..adapters.places import find_places
        from ..analysis.compare import compare_clients

        places = find_places(clients)
        if plot is not None:
            from ..analysis.plots import check_picture

            check_picture(plot, [place.path for place in places])
        inspected = [inspect_adapter(place) for place in places]
        adapters, doubts = align_names([a for a, _ in inspected if a is not None], base)
        problems = [problem for _, found in inspected for problem in found]
        problems += [problem for _, problem in doubts]
        problems += check_compatible(adapters, base) if adapters else []
        if not problems:
            with progress() as report:
                for done, adapter in enumerate(adapters, start=1):
                    problems += check_values(adapter)
                    report("values", done, len(adapters))
        if problems:
            raise Refused(problems)

        found = compare_clients(adapters)
        names = [adapter.name for adapter in adapters]

        def about(i: int, adapter: Adapter) -> dict[str, Any]:
            return {
                "name": adapter.name,
                "ranks": sorted({m.rank for m in adapter.modules.values()}),
                "scalings": sorted({m.scaling for m in adapter.modules.values()}),
                "norm": float(found.norms[i]),
                "alignment": float(found.with_others[i]),
                "cosine": float(found.median_cosines[i]),
            }

        described = [about(i, adapter) for i, adapter in enumerate(adapters)]
        facts = {
            "clients": described,
            "columns": found.columns.tolist(),
            "rows": found.rows.tolist(),
            "cosines": found.cosines.tolist(),
            "notes": [
                *_loud(described),
                *_odd(described),
                *(
                    {"text": f"{a.name}: {remark}", "warning": False}
                    for a in adapters
                    for remark in a.remarks
                ),
            ],
            "plot": None if plot is None else str(plot),
        }
        if plot is not None:
            from ..analysis.plots import plot_alignment

            plot_alignment(names, found.columns, found.rows, found.cosines, plot)
            outcome.wrote(plot)
        if as_json:
            print_json(facts)
        else:
            _print(facts)


def _loud(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    usual = median(client["norm"] for client in clients)
    return [
        {
            "text": f"{client['name']} is loud: its update is {client['norm'] / usual:.3g} times "
            "the median client's; look at its scaling, or aggregate with --robust clip",
            "warning": True,
        }
        for client in clients
        if len(clients) >= 3 and usual > 0 and client["norm"] > LOUD * usual
    ]


def _odd(clients: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Who points elsewhere than the others, by signed cosines; then by unsigned alignment."""
    out: dict[str, str] = {}
    for measure, what, remedy in (
        ("cosine", "median cosine", "; --robust gate would leave it out"),
        ("alignment", "mean alignment", ""),
    ):
        known = [c for c in clients if not math.isnan(c[measure])]
        usual = median(c[measure] for c in known) if len(known) >= 3 else 0.0
        for c in known if usual >= AGREED else ():
            if c[measure] < ODD * usual:
                out.setdefault(
                    c["name"],
                    f"{c['name']} is odd: its {what} with the others is {c[measure]:.2f} where "
                    f"the median client's is {usual:.2f}; it may have learnt another task, from "
                    f"another base, noise, or the opposite{remedy}",
                )
    return [{"text": text, "warning": True} for text in out.values()]


def _print(facts: Mapping[str, Any]) -> None:
    to = console()
    clients = facts["clients"]
    rows = table(
        "", "client", "rank", "scaling", "‖ΔW‖", "alignment with the others", "cosine", left=2
    )
    for i, client in enumerate(clients, start=1):
        rows.add_row(
            str(i),
            clean(client["name"]),
            span(client["ranks"]),
            span(client["scalings"]),
            figures(client["norm"]),
            _share(client["alignment"]),
            _share(client["cosine"]),
        )
    to.print(rows)
    if len(clients) <= MATRIX_CLIENTS:
        _print_matrix("left: column spaces", facts["columns"])
        _print_matrix("right: row spaces", facts["rows"])
        _print_matrix("signed cosines of the updates", facts["cosines"])
    elif facts["plot"] is None:
        to.print(f"\n{len(clients)} × {len(clients)} alignments: --plot FILE.png draws them")
    if facts["notes"]:
        to.print()
    print_notes(facts["notes"])
    if facts["plot"] is not None:
        to.print(labelled("\nwritten: ", "bold green", clean(facts["plot"])), soft_wrap=True)


def _print_matrix(title: str, matrix: Sequence[Sequence[float]]) -> None:
    rows = table("", *(str(i + 1) for i in range(len(matrix))))
    rows.title, rows.title_justify, rows.title_style = title, "left", "bold"
    rows.padding = 0
    to = console()
    shaded = to.color_system in ("256", "truecolor")  # sixteen colours have no shades
    for i, line in enumerate(matrix, start=1):
        rows.add_row(f"{i} ", *(_cell(alignment, shaded) for alignment in line))
    to.print()
    to.print(rows)


def _cell(alignment: float, shaded: bool) -> Text:
    """Blue from 0 to 1, red from 0 to −1."""
    if math.isnan(alignment):
        return Text("   –  ", "dim")
    shade = round(255 - 190 * abs(alignment))
    ink = "white" if abs(alignment) > 0.5 else "black"
    colour = (shade, min(255, shade + 40), 255) if alignment >= 0 else (255, shade, shade)
    style = f"{ink} on rgb{colour}".replace(" (", "(") if shaded else ""
    return Text(f"{alignment:5.2f} ", style)


def _share(alignment: float) -> str:
    return "–" if math.isnan(alignment) else f"{alignment:.2f}"
