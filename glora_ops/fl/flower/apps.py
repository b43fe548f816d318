"""Where the server's side runs: Flower's simulation here, or a SuperLink's `ServerApp`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TypeVar

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ...errors import require, unfit
from ..config import load_config
from ..experiment import run_experiment
from ..run import EngineFactory, Plan
from .engine import FlowerEngine
from .node import client_app, plan_text, run_name

__all__ = ["server_app", "simulate"]

T = TypeVar("T")
DAY = 86400.0  # simulated nodes do not get lost


def simulate(
    nodes: int,
    main: Callable[[EngineFactory], T],
    *,
    state_dir: Path,
    data_dir: Path | None = None,
) -> T:
    """Run `main` on the server of a simulated federation.

    Parameters
    ----------
    nodes : int
        Simulated nodes; one per client.
    main : callable
        Gets the engine for `run` or `run_experiment`. Runs in a thread of its own.
    state_dir : path
        What the nodes keep between messages, for runs that are not finished.
    data_dir : path, optional

    Raises
    ------
    GloraError
        Without Ray, and if it does not come up.
    KeyboardInterrupt
        After Ctrl-C, as soon as the clients at work have ended; a second one does not wait.
    """
    require(find_spec("ray") is not None, "Flower's simulation", "no Ray", "the package ray",
            "pip install 'flwr[simulation]', or --engine local")  # fmt: skip
    from flwr.simulation import run_simulation

    over, stopped, app, results = threading.Event(), threading.Event(), ServerApp(), list[T]()
    begun: list[str] = []

    @app.main()
    def server(grid: Grid, context: Context) -> None:
        def engine(plan: Plan) -> FlowerEngine:
            begun.append(run_name(plan_text(plan)))
            return FlowerEngine(grid, plan, patience=DAY, timeout=DAY, over=over)

        results.append(main(engine))

    def stop(number: int, frame: FrameType | None) -> None:
        # An exception in Flower's main thread ends Ray below its workers, which then hang or abort.
        signal.signal(signal.SIGINT, interrupt)
        stopped.set()
        over.set()

    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails is in the records
    cores = min(nodes, os.cpu_count() or 1)
    interrupt = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()  # where signals arrive
    if in_main:
        signal.signal(signal.SIGINT, stop)
    try:
        run_simulation(
            app,
            client_app(data_dir and data_dir.absolute(), state_dir.absolute()),
            nodes,
            backend_config={
                "init_args": {"num_cpus": cores, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    except Exception as error:
        if stopped.is_set():
            raise KeyboardInterrupt from error
        if "timed out during startup" in str(_root(error)):  # Ray's own limit is fixed
            raise unfit(
                "Flower's simulation",
                "no Ray within 30 s",
                "a machine with time for it",
                "try again with fewer other processes, or --engine local",
            ) from error
        raise
    finally:
        over.set()
        logger.setLevel(before)
        if in_main:
            signal.signal(signal.SIGINT, interrupt)
    if stopped.is_set() and not results:
        raise KeyboardInterrupt
    for name in begun:
        shutil.rmtree(state_dir / name, ignore_errors=True)
    if state_dir.is_dir() and not any(state_dir.iterdir()):
        state_dir.rmdir()
    return results[0]


def _root(error: BaseException) -> BaseException:
    """What an error was raised from, all the way."""
    return error if error.__cause__ is None else _root(error.__cause__)


def server_app(folder: Path) -> ServerApp:
    """The app a SuperLink starts; its run configuration is that of ``glora fl run``.

    Parameters
    ----------
    folder : path
        Where a configuration named without a folder is looked for first.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        given = context.run_config
        name = str(given["config"])
        config = load_config(folder / name if (folder / name).is_file() else name)
        run_experiment(
            config,
            Path(str(given["out"])),
            methods=[m for m in str(given["methods"]).split(",") if m],
            seeds=range(int(given["seeds"])),
            data_dir=Path(str(given["data-dir"])) if given["data-dir"] else None,
            resume=bool(given["resume"]),
            engine=lambda plan: FlowerEngine(
                grid, plan, patience=float(given["patience"]), timeout=float(given["timeout"])
            ),
            progress=lambda what, done, total: print(f"{what}: round {done} of {total}"),
        )

    return app
