"""Ray's tasks as an executor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from ..errors import unfit

__all__ = ["RayExecutor"]

T = TypeVar("T")


class RayExecutor(Executor):
    """Runs calls as Ray tasks, which Ray repeats elsewhere when their worker is killed.

    Parameters
    ----------
    address : str, optional
        Of a running cluster; without one and without Ray initialised, Ray starts on this machine.
    retries : int
        How often a call is repeated that was lost with its worker; what it raises is raised here.
    cpus, gpus : float
        That a call asks for.

    Raises
    ------
    GloraError
        Ray is not installed.
    """

    def __init__(
        self, address: str | None = None, retries: int = 3, cpus: float = 1, gpus: float = 0
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise unfit(
                "Ray", "nothing of that name", "an installed Ray", "pip install 'glora[ray]'"
            ) from None
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        from ray.exceptions import RayTaskError

        answer: Future[T] = Future()

        def hand_over(done: Future[T]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(error.cause if isinstance(error, RayTaskError) else error)

        self._remote(fn).remote(*args, **kwargs).future().add_done_callback(hand_over)
        return answer
