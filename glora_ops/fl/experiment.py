"""All methods and seeds of a configuration, learning rates swept first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GloraError, Refusal, Refused, listing, require
from ..runtime.outputs import check_free, write_text
from .config import Config, load_config
from .forms import read_sweep
from .records import replied
from .run import EngineFactory, Plan, local_engine, run
from .tensorboard import mirror, require_tensorboard

__all__ = ["Result", "run_experiment"]

Progress = Callable[[str, int, int], None]
SWEEP = "sweep"


@dataclass(frozen=True)
class Result:
    """The last metrics of one run; none where no client ever replied and nothing was learnt.

    `failures` are the reasons of the replies that failed, in order.
    """

    method: str
    seed: int
    folder: Path
    metrics: dict[str, float]
    failures: tuple[str, ...] = ()


def run_experiment(
    config: Config | str | Path,
    out: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    methods: Sequence[str] = (),
    seeds: Iterable[int] = range(3),
    engine: EngineFactory = local_engine,
    data_dir: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    tensorboard: Path | None = None,
) -> list[Result]:
    """Run a federated experiment: every method with every seed, into ``out/<config name>``.

    Parameters
    ----------
    config : Config, str or path
        A configuration, a TOML file, or a shipped one by its name.
    out : path
        Folder of all runs.
    overrides : mapping, optional
        Values for a file's fields by dotted keys (`load_config`): ``{"clients.count": 4}``.
    methods : sequence of str
        Labels of the configuration's; all by default.
    seeds : iterable of int
    engine : callable
        How messages travel: `glora_ops.fl.run.local_engine`, or what
        `glora_ops.fl.flower.simulate` hands out.
    data_dir : path, optional
        Local data, as ``glora fl run --data-dir``.
    resume : bool
        Go on with runs that are there.
    progress : callable (what, done, total), optional
    tensorboard : path, optional
        A folder for the metrics as events for TensorBoard as well.

    Returns
    -------
    list of Result
        In the order of `methods`, seed by seed.

    Examples
    --------
    >>> from glora_ops.fl import run_experiment
    >>> run_experiment("digits_iid", "runs", methods=["glora"], seeds=[0])  # doctest: +SKIP

    Raises
    ------
    GloraError
        For a method that the configuration does not have or that cannot do what it asks for, before
        anything is trained.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides=overrides)
    out = Path(out)
    if tensorboard is not None:
        require_tensorboard()
    labels = list(methods) or list(config.methods)
    refusals: list[Refusal] = []
    for label in labels:
        with listing(refusals):
            config.method(label).check(config.ranks, config.clients.start == "shared")
    if refusals:
        raise Refused(refusals)
    home = out / config.name
    results = []
    for label in labels:
        lr = learning_rate(config, label, home, data_dir, engine, progress)
        for seed in seeds:
            folder = home / label / f"seed{seed}"
            plan = Plan(config, label, seed, lr, data_dir)
            with mirror(tensorboard and tensorboard / folder.relative_to(out)) as watch:
                lines = run(
                    plan, folder, engine=engine, resume=resume, progress=progress, watch=watch
                )
            failures = tuple(f["reason"] for line in lines for f in line["failures"])
            metrics = lines[-1]["metrics"] if replied(lines) else {}
            results.append(Result(label, seed, folder, metrics, failures))
    return results


def learning_rate(
    config: Config,
    label: str,
    home: Path,
    data_dir: Path | None,
    engine: EngineFactory,
    progress: Progress | None,
) -> float:
    """The method's own rate, or the best of the sweep by the last round's headline metric.

    The sweep has a seed and held-out examples of its own; its trials stay in ``sweep/<label>`` and
    its outcome in ``sweep/<label>.json``.
    """
    own = config.methods[label].lr
    if own is not None or not config.sweep.lrs:
        return config.training.lr if own is None else own
    outcome = home / SWEEP / f"{label}.json"
    check_free(outcome.resolve(), _no_sweep, what="file")
    scores = {}
    for lr in config.sweep.lrs:  # a finished trial is not repeated, one of another setting refused
        plan = Plan(config, label, config.sweep.seed, lr, data_dir, "validation")
        lines = run(
            plan, home / SWEEP / label / f"lr{lr:g}", engine=engine, resume=True,
            rounds=config.sweep.rounds or None, progress=progress,
        )  # fmt: skip
        if replied(lines):
            scores[f"{lr:g}"] = lines[-1]["metrics"][plan.task.metric]
    require(
        bool(scores), "sweep.lrs", f"{list(config.sweep.lrs)}, at none of which a client replied",
        "a rate at which training does not diverge", f"see {home / SWEEP / label}",
    )  # fmt: skip
    heard = [lr for lr in config.sweep.lrs if f"{lr:g}" in scores]
    best = max(heard, key=lambda lr: scores[f"{lr:g}"])
    described = {"metric": plan.task.metric, "scores": scores, "chosen": best,
                 "seed": config.sweep.seed}  # fmt: skip
    write_text(outcome, json.dumps(described, indent=1) + "\n", _no_sweep)
    return best


def _no_sweep(path: Path) -> list[str]:
    """The name of a file that is no sweep's outcome."""
    try:
        read_sweep(path)
    except (GloraError, OSError):
        return [path.name]
    return []
