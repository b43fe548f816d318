"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["PICTURE_NAME", "Base", "Clients", "Json", "Overwrite", "Pad", "Plot", "Seed"]

PICTURE_NAME = "spectra.png"

Clients = Annotated[
    list[str],
    typer.Argument(
        metavar="CLIENT_DIR...",
        help="One folder per client, as PeftModel.save_pretrained writes it; NAME=DIR names it.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Vouch that all clients adapt this one base model although they name it differently.",
    ),
]
Pad = Annotated[
    Literal["zero", "trainable"],
    typer.Option(
        help="Pairs beyond what the state holds: zero for use, trainable to train on "
        "(the update is the same; zero pairs never learn)."
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random. Equal seeds, equal bits.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the folder if glora wrote all that is in it.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object instead; null stands for a number without limit."
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.png",
        help="Draw the picture into this file; one that glora drew before is replaced.",
    ),
]
