"""`glora fl`: federated runs from a configuration, and reports of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .command import Command
from .options import Json, Plot, Quiet, Threads, option
from .show import answering, clean, console, finite, labelled, print_json, progress, table

if TYPE_CHECKING:
    from ..fl.experiment import Result

__all__ = ["app"]

SHORT = ("method", "server model", "received", "MB down", "MB up")  # what fits a terminal

app = typer.Typer(
    name="fl",
    no_args_is_help=True,
    help="Run and report federated LoRA experiments.",
    rich_markup_mode=None,
)

DataDir = Annotated[
    Path | None,
    option(
        "--data-dir",
        metavar="DIR",
        default="the datasets package, by name",
        example="--data-dir data",
        help="Local JSONL files: glue/TASK.{train,dev}.jsonl, superni/{train,heldout}/*.jsonl.",
    ),
]
Model = Annotated[
    str | None,
    option(
        "--model", metavar="NAME|DIR", default="the configuration's", example="--model models/tiny",
        help="Base model.",
    ),
]  # fmt: skip
Set = Annotated[
    list[str] | None,
    option(
        "--set",
        metavar="KEY=VALUE",
        default="what the configuration says",
        example="--set clients.count=4 --set methods.glora.step=0.5",
        help="A field of the configuration by its dotted key, the value as TOML; may be repeated.",
    ),
]


@app.command(
    cls=Command,
    epilog="Example: glora fl run digits_dirichlet --methods glora,fedit --seeds 3 -o runs",
)
def run(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A .toml file, or a shipped one by name.")
    ],
    methods: Annotated[
        str,
        option("--methods", metavar="a,b,…", default="all", example="--methods glora,fedit",
               help="Only these methods of the configuration."),
    ] = "",
    seeds: Annotated[
        int,
        option("--seeds", metavar="N", min=1, default="3", example="--seeds 10",
               help="How many seeds: 0, 1, …."),
    ] = 3,
    engine: Annotated[
        Literal["local", "flower"],
        option("--engine", default="local", example="--engine flower",
               help="In this process, or Flower's simulation with one node per client."),
    ] = "local",
    data_dir: DataDir = None,
    model: Model = None,
    every: Annotated[
        int | None,
        option("--evaluate-every", min=1, metavar="N", default="the configuration's",
               example="--evaluate-every 5",
               help="Rounds between evaluations; after the last one there always is one."),
    ] = None,
    settings: Set = None,
    resume: Annotated[
        bool,
        option("--resume", example="--resume", help="Go on with runs that are in RUNS already."),
    ] = False,
    out: Annotated[
        Path,
        option("--out", "-o", metavar="RUNS", file_okay=False, default="runs", example="-o runs",
               help="Folder of all runs."),
    ] = Path("runs"),
    tensorboard: Annotated[
        Path | None,
        option("--tensorboard", metavar="DIR", file_okay=False, default="none",
               example="--tensorboard logs", help="Metrics as TensorBoard events as well, "
               "into this folder; needs the extra tensorboard."),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run a federated experiment: every method with every seed.

    Each run commits its state after every round; killed at any moment, it goes on with --resume to
    the same result. Metrics: RUNS/CONFIG/METHOD/seed0/metrics.jsonl. glora fl report makes
    tables and pictures of them.
    """
    kept = "every finished round is kept: go on with --resume"
    with answering(as_json, writes=False, kept=kept, quiet=quiet, threads=threads) as outcome:
        from ..fl.config import load_config, parse_override
        from ..fl.experiment import run_experiment
        from ..fl.run import EngineFactory, local_engine
        from ..runtime.outputs import apart

        overrides = dict(map(parse_override, settings or []))
        loaded = load_config(config, model=model, every=every, overrides=overrides)
        read = [data_dir / "glue", data_dir / "superni"] if data_dir is not None else []
        read += [Path(loaded.model.name)] if loaded.model.name else []
        apart(out / loaded.name, [path for path in read if path.exists()])
        wanted = [m.strip() for m in methods.split(",") if m.strip()]
        with progress() as report:

            def experiment(carrier: EngineFactory) -> list[Result]:
                return run_experiment(
                    loaded, out, methods=wanted, seeds=range(seeds), engine=carrier,
                    data_dir=data_dir, resume=resume, progress=report, tensorboard=tensorboard,
                )  # fmt: skip

            if engine == "flower":
                from ..fl.flower import simulate

                nodes, state = loaded.clients.count, out / loaded.name / "nodes"
                results = simulate(nodes, experiment, state_dir=state, data_dir=data_dir)
            else:
                results = experiment(local_engine)
        outcome.wrote(*(result.folder for result in results))
        silent = [r for r in results if not r.metrics]
        if as_json:
            print_json({"runs": [str(r.folder) for r in results], "results": [
                {"method": r.method, "seed": r.seed,
                 "status": "done" if r.metrics else "nobody replied",
                 "failures": list(r.failures), **r.metrics} for r in results]})  # fmt: skip
        else:
            _print_results(results)
            if len(silent) < len(results):
                next_step = f"next: glora fl report {clean(out / loaded.name)}"
                console().print(next_step, soft_wrap=True)
        if silent:
            raise typer.Exit(1)


def _print_results(results: Sequence[Result]) -> None:
    """The last metrics of the runs that learnt something, and whose replies failed."""
    learnt = [r for r in results if r.metrics]
    if learnt:
        names = [name for name in learnt[0].metrics if "/" not in name]  # no single tasks
        _print_table(
            ("method", "seed", *("\n".join(name.rsplit("_", 1)) for name in names)),
            [
                (r.method, str(r.seed), *(f"{r.metrics[name]:.4f}" for name in names))
                for r in learnt
            ],
        )
    for r in results:
        if r.failures:
            count = f"{len(r.failures)} replies failed, the first: {clean(r.failures[0])}"
            nobody = "" if r.metrics else "nobody replied in any round, nothing was learnt; "
            label = ("note: ", "bold") if r.metrics else ("failed: ", "bold red")
            text = f"{clean(r.method)} seed {r.seed}: {nobody}{count}"
            console(stderr=not r.metrics).print(labelled(*label, text), soft_wrap=True)


@app.command(cls=Command, epilog="Example: glora fl report runs -o report")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Folders with runs, searched all through.")
    ],
    reference: Annotated[
        str | None,
        option("--reference", metavar="METHOD", default="the first of kind glora",
               example="--reference fedit", help="Compare the others with this one."),
    ] = None,
    out: Annotated[
        Path | None,
        option("--out", "-o", metavar="DIR", file_okay=False, default="RUNS/report",
               example="-o report", help="Folder for report.md, report.json and pictures; one "
               "that this command wrote is replaced."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show and draw what finished runs came to.

    Tables, paired differences and pictures, configuration by configuration.
    """
    with answering(as_json, writes=True, quiet=quiet) as outcome:
        from ..fl.load import load_runs, with_finished
        from ..fl.pictures import draw
        from ..fl.report_folder import (
            COLUMNS,
            difference_rows,
            markdown,
            rows_of,
            strangers,
            unfinished,
            write_report,
        )
        from ..fl.summary import summarise
        from ..runtime.outputs import apart, claimed, new_folder

        found, sweeps = load_runs(runs)
        ready, left_out = with_finished(found)
        folder = runs[0] / "report" if out is None else out
        apart(folder, [run.folder for run in found])
        summaries, pages = [], []
        place = folder.resolve()
        rest = [unfinished(left_out)] if left_out else []
        with claimed(place, strangers), new_folder(place, strangers) as building:
            for name, mine in ready.items():
                summary = summarise(mine, sweeps, reference)
                names = draw(mine, summary["reference"], building, name)
                summaries.append(summary)
                pages.append(markdown(summary, names))
            write_report(building, finite(summaries), [*pages, *rest])
        outcome.wrote(folder)
        if as_json:
            print_json({"out": str(folder), "configs": summaries, "unfinished": left_out})
            return
        for summary in summaries:
            to, rounds = console(), f"{summary['rounds']} rounds, {summary['metric']}"
            to.print(f"\n{clean(summary['config'])}: {clean(summary['clients'])}", soft_wrap=True)
            chosen = [COLUMNS.index(name) for name in SHORT]
            rows = [[row[i] for i in chosen] for row in rows_of(summary)]
            _print_table((rounds, *SHORT[1:]), rows)
            if summary["differences"]:
                other = f"{clean(summary['reference'])} minus"
                _print_table((other, "mean", "95 % interval", "won"), difference_rows(summary))
        named = [name for s in summaries for name in s["unfinished"]] + left_out
        if named:
            console().print(clean(unfinished(named)), soft_wrap=True)
        page = clean(folder / "report.md")
        console().print(labelled("written: ", "bold green", page), soft_wrap=True)


@app.command(
    cls=Command, epilog="Example: glora fl partition digits_dirichlet --plot partition.png"
)
def partition(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="As for glora fl run.")],
    seed: Annotated[
        int,
        option("--seed", metavar="N", default="0", example="--seed 1", help="Whose partition."),
    ] = 0,
    data_dir: DataDir = None,
    model: Model = None,
    settings: Set = None,
    plot: Plot = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show which client holds how many examples of which label."""
    with answering(as_json, writes=plot is not None, quiet=quiet) as outcome:
        from ..fl.config import load_config, parse_override
        from ..fl.partition import counts
        from ..fl.pictures import draw_partition
        from ..fl.run import partition_of
        from ..fl.tasks.build import build_task

        overrides = dict(map(parse_override, settings or []))
        loaded = load_config(config, model=model, overrides=overrides)
        task = build_task(loaded, seed, data_dir)
        held = counts(partition_of(loaded, task, seed), task.labels, len(task.label_names))
        if plot is not None:
            title = f"{loaded.name}, seed {seed}: {loaded.clients.partition} partition"
            draw_partition(held, task.label_names, title, plot)
            outcome.wrote(plot)
        if as_json:
            print_json({"labels": task.label_names, "ranks": loaded.ranks, "counts": held.tolist()})
            return
        rows = [
            (str(i), str(r), str(row.sum()), *map(str, row))
            for i, (r, row) in enumerate(zip(loaded.ranks, held, strict=True))
        ]
        _print_table(("client", "rank", "examples", *task.label_names), rows)
        console().print("right of the examples: how many of each label", style="dim")
        if plot is not None:
            console().print(labelled("written: ", "bold green", clean(plot)), soft_wrap=True)


@app.command(cls=Command, epilog="Example: glora fl configs text_small_sst2 > mine.toml")
def configs(
    name: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="Print this one, to copy and edit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the configurations that come with the package."""
    with answering(as_json, writes=False):
        from ..errors import require
        from ..fl.config import load_config, shipped

        there = shipped()
        if name is not None:
            require(name in there, "config", repr(name), f"one of {', '.join(there)}")
            if not as_json:
                typer.echo(there[name].read_text(encoding="utf-8"), nl=False)
                return
            there = {name: there[name]}
        loaded = {label: load_config(label) for label in there}
        if as_json:
            print_json({name: c.model_dump(mode="json") for name, c in loaded.items()})
            return
        shown = table("config", "asks", "takes, in hours", left=3)
        for name, c in loaded.items():
            shown.add_row(name, c.about, c.hours)
        console().print(shown)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = table(*header)
    for row in rows:
        shown.add_row(*map(clean, row))
    console().print(shown)
