"""Where the server's side runs: Flower's simulation here, or a SuperLink's `ServerApp`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ...errors import require, unfit
from ...runtime.signals import Terminated
from ..config import load_config
from ..experiment import run_experiment
from ..run import EngineFactory, Plan
from .engine import FlowerEngine
from .node import client_app, plan_text, run_name
from .shelf import clear

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
        After Ctrl-C and SIGTERM (`Terminated`), as soon as the clients at work have ended; a second
        one does not wait.
    """
    require(find_spec("ray") is not None, "Flower's simulation", "no Ray", "the package ray",
            "pip install 'flwr[simulation]', or --engine local")  # fmt: skip
    from flwr.simulation import run_simulation
    from ray._private import utils as ray_utils

    over, stopped, app, results = threading.Event(), list[int](), ServerApp(), list[T]()
    begun: list[str] = []

    @app.main()
    def server(grid: Grid, context: Context) -> None:
        def engine(plan: Plan) -> FlowerEngine:
            begun.append(run_name(plan_text(plan)))
            made = FlowerEngine(grid, plan, patience=DAY, timeout=DAY, over=over)
            if in_main:
                set_handler(signal.SIGTERM, pythons)
            return made

        results.append(main(engine))

    def stop(number: int, frame: FrameType | None) -> None:
        # An exception in Flower's main thread ends Ray below its workers, which then hang or abort.
        signal.signal(number, before[number])
        stopped.append(number)
        over.set()

    def interruption() -> KeyboardInterrupt:
        return Terminated() if signal.SIGTERM in stopped else KeyboardInterrupt()

    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails is in the records
    cores = min(nodes, os.cpu_count() or 1)
    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    in_main = threading.current_thread() is threading.main_thread()  # where signals arrive
    theirs, pythons = ray_utils.set_sigterm_handler, None
    get_handler, set_handler = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get_handler.restype = set_handler.restype = ctypes.c_void_p
    set_handler.argtypes = (ctypes.c_int, ctypes.c_void_p)
    if in_main:
        for number in before:
            signal.signal(number, stop)
        # Ray's handlers end the process at once: one in Python, which it is not let set, one in C,
        # which Python's replaces again once the nodes have answered (any thread may do that in C).
        ray_utils.set_sigterm_handler = lambda handler: None
        pythons = get_handler(signal.SIGTERM)
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
        if stopped:
            raise interruption() from error
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
        logger.setLevel(level)
        if in_main:
            ray_utils.set_sigterm_handler = theirs
            for number, handler in before.items():
                signal.signal(number, handler)
    if stopped and not results:
        raise interruption()
    for name in begun:
        clear(state_dir / name)
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
            progress=lambda what, done, total: logging.getLogger("flwr").info(
                "%s: round %d of %d", what, done, total
            ),
        )

    return app
