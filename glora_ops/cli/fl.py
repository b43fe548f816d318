"""`glora fl`: federated runs from a configuration, and reports of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Json
from .show import answering, clean, console, print_json, progress, table

__all__ = ["app"]

app = typer.Typer(
    name="fl",
    no_args_is_help=True,
    help="Federated LoRA experiments: many methods, one configuration, resumable runs.",
    rich_markup_mode="markdown",
)

DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Local JSONL files: glue/TASK.{train,dev}.jsonl, superni/{train,heldout}/*.jsonl. "
        "Otherwise data comes through the datasets package, by name.",
    ),
]


@app.command(
    epilog="Example: **glora fl run digits_dirichlet --methods glora,fedit --seeds 3 -o runs**"
)
def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A .toml file, or a shipped one by name.")
    ],
    methods: Annotated[
        str, typer.Option(metavar="a,b,…", help="Only these methods of the configuration.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ….")] = 3,
    engine: Annotated[
        Literal["local", "flower"],
        typer.Option(help="In this process, or Flower's simulation with one node per client."),
    ] = "local",
    data_dir: DataDir = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="Base model instead of the configuration's."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with runs that are in RUNS already.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="RUNS", help="Folder of all runs.")
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Run a federated experiment: every method with every seed.

    Each run commits its state after every round; killed at any moment, it goes on with --resume to
    the same result. Metrics: RUNS/CONFIG/METHOD/seed0/metrics.jsonl. **glora fl report** makes
    tables and pictures of them.
    """
    with answering(as_json):
        from ..fl.config import load_config
        from ..fl.experiment import run_experiment

        loaded = load_config(config, model=model)
        wanted = [m.strip() for m in methods.split(",") if m.strip()]
        with progress() as report:
            results = run_experiment(
                loaded, out, methods=wanted, seeds=range(seeds), engine=engine,
                data_dir=data_dir, resume=resume, progress=report,
            )  # fmt: skip
        if as_json:
            print_json({"runs": [str(r.folder) for r in results], "results": [
                {"method": r.method, "seed": r.seed, **r.metrics} for r in results]})  # fmt: skip
            return
        shown = table("method", "seed", *results[0].metrics)
        for r in results:
            shown.add_row(clean(r.method), str(r.seed), *(f"{v:.4f}" for v in r.metrics.values()))
        console().print(shown)
        console().print(f"next: glora fl report {clean(out / loaded.name)}", soft_wrap=True)
