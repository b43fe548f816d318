"""`glora apply`: an adapter and its base model in, the merged model out."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

import typer

from .options import DryRun, Json, Overwrite, Quiet, Threads, option
from .show import (
    answering,
    clean,
    console,
    counted,
    duration,
    labelled,
    print_json,
    print_notes,
    print_untouched,
    size,
)

__all__ = ["EXAMPLE", "apply"]

EXAMPLE = "Example: glora apply out/r8 --base models/base -o models/merged"


def apply(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A PEFT LoRA folder, such as a readout.")
    ],
    base: Annotated[
        Path,
        option(
            "--base", metavar="MODEL", default=None, example="--base models/base",
            help="Folder of the base model, with its weights as safetensors.",
        ),
    ],
    out: Annotated[
        Path,
        option(
            "--out", "-o", metavar="DIR", default=None, example="-o models/merged",
            help="New folder of the merged model.",
        ),
    ],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        option(
            "--dtype", default="the base's", example="--dtype bf16",
            help="Numbers of the weights that are written.",
        ),
    ] = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Add an adapter to the weights of its base model.

    What is written is a model that needs no PEFT. Names and shapes are compared before any weight
    is read. Files of weights are read and written one by one, so that memory is the largest of
    them; the folder appears complete or not at all.
    """
    began = monotonic()
    with answering(as_json, writes=True, quiet=quiet, threads=threads) as outcome:
        from ..merging.apply import apply_adapter
        from ..state import WRITTEN

        to = None if dtype is None else WRITTEN[dtype]
        done = apply_adapter(adapter, base, out, dtype=to, overwrite=overwrite, dry_run=dry_run)
        if not dry_run:
            outcome.wrote(out)
        facts: dict[str, Any] = {
            "dry_run": dry_run,
            "adapter": str(adapter),
            "base": str(base),
            "out": str(out),
            "dtype": dtype,
            "changed": list(done.changed),
            "tensors": done.tensors,
            "notes": [{"text": text, "warning": False} for text in done.notes],
            "seconds": monotonic() - began,
        }
        if as_json:
            print_json(facts)
            return
        changed = f"{len(done.changed)} of {counted(done.tensors, 'tensor')} changed"
        line = f"{clean(out)}  merged model, {changed}"
        if dry_run:
            console().print(labelled("would write: ", "bold", line), soft_wrap=True)
        else:
            line += f", {size(out)}, {duration(facts['seconds'])}"
            console().print(labelled("written: ", "bold green", line), soft_wrap=True)
        print_notes(facts["notes"])
        if dry_run:
            print_untouched()
