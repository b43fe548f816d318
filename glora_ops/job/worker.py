"""``python -m glora_ops.job.worker JOB``: one worker of a launcher that runs Python modules."""

from __future__ import annotations

import os
import sys
from threading import Thread

from ..errors import GloraError
from .launch import ATTENDED
from .work import work


def end_with_input() -> None:
    """End this process when its standard input does."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)  # as if all was done: torchrun would start another


if __name__ == "__main__":
    if ATTENDED in sys.argv[2:]:
        Thread(target=end_with_input, daemon=True).start()
    try:
        work(sys.argv[1])
    except GloraError as error:
        sys.exit(f"refused: {error}")
