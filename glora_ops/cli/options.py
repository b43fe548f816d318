"""Options that several commands share, and how every option's help is worded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = [
    "PICTURE_NAME",
    "Base",
    "Clients",
    "Device",
    "DryRun",
    "Dtype",
    "Json",
    "Overwrite",
    "Pad",
    "Plot",
    "Quiet",
    "Readouts",
    "Seed",
    "Spectra",
    "Stored",
    "Threads",
    "Verbose",
    "option",
]

PICTURE_NAME = "spectra.png"


def option(
    *names: str,
    help: str,
    example: str,
    default: str | None = "off",
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
    file_okay: bool = True,
    callback: Callable[..., Any] | None = None,
    is_eager: bool = False,
) -> Any:
    """An option whose help ends with its default and an example.

    Parameters
    ----------
    default : str or None
        In words; None for what has to be given.
    example : str
        As it is typed.
    """
    said = "" if default is None else f" Default: {default}."
    return typer.Option(
        *names, help=f"{help}{said} Example: {example}", metavar=metavar, min=min, max=max,
        file_okay=file_okay, callback=callback, is_eager=is_eager, show_default=False,
    )  # fmt: skip


Clients = Annotated[
    list[str],
    typer.Argument(
        metavar="CLIENT_DIR...",
        help="One folder per client, as PeftModel.save_pretrained writes it, or its URL "
        "(s3://bucket/ann); NAME=DIR names it.",
    ),
]
Stored = Annotated[
    Path,
    typer.Argument(
        metavar="STATE", help="A server.safetensors, or the folder glora aggregate wrote."
    ),
]
Base = Annotated[
    str | None,
    option(
        "--base", metavar="NAME", example="--base org/model", default="what the clients name",
        help="Vouch that all clients adapt this one base model although they name it differently.",
    ),
]  # fmt: skip
Readouts = Annotated[
    str,
    option(
        "--readout", metavar="4,8,…", default="none", example="--readout 8,16",
        help="Also write adapters of these ranks, as folders r4, r8, … in OUT.",
    ),
]  # fmt: skip
Pad = Annotated[
    Literal["zero", "trainable"],
    option(
        "--pad",
        default="zero",
        example="--pad trainable",
        help="Pairs beyond what the state holds: zero for use, trainable to train on "
        "(the update is the same; zero pairs never learn).",
    ),
]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16"],
    option(
        "--dtype",
        default="fp32",
        example="--dtype bf16",
        help="Numbers of the adapters that are written; the state keeps its own.",
    ),
]
Seed = Annotated[
    int,
    option(
        "--seed", metavar="N", default="0", example="--seed 7",
        help="Of everything random. Equal seeds, equal bits.",
    ),
]  # fmt: skip
Device = Annotated[
    str,
    option(
        "--device", metavar="NAME", default="cpu", example="--device cuda",
        help="Where to compute.",
    ),
]  # fmt: skip
Overwrite = Annotated[
    bool,
    option(
        "--overwrite",
        example="--overwrite",
        help="Replace the folder if glora wrote all that is in it.",
    ),
]
DryRun = Annotated[
    bool,
    option(
        "--dry-run",
        example="--dry-run",
        help="Check what can be checked before, say what would be written, and stop there.",
    ),
]
Threads = Annotated[
    int | None,
    option(
        "--threads", metavar="N", min=1, max=4096, default="as torch finds", example="--threads 4",
        help="Threads to compute on.",
    ),
]  # fmt: skip
Json = Annotated[
    bool,
    option(
        "--json",
        example="--json",
        help="Print one JSON object instead, as docs/cli.schema.json describes; null stands for a "
        "number without limit.",
    ),
]
Verbose = Annotated[
    bool,
    option(
        "--verbose",
        "-v",
        example="-v",
        help="All certificates, with what each means, and all clients.",
    ),
]
Quiet = Annotated[
    bool, option("--quiet", "-q", example="-q", help="Print warnings and refusals only.")
]
Spectra = Annotated[
    bool,
    option("--plot", example="--plot", help=f"Draw the spectra into OUT/{PICTURE_NAME}."),
]
Plot = Annotated[
    Path | None,
    option(
        "--plot", metavar="FILE.png", default="no picture", example="--plot picture.png",
        help="Draw the picture into this file; one that glora drew before is replaced.",
    ),
]  # fmt: skip
