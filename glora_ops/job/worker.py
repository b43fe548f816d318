"""``python -m glora_ops.job.worker JOB``: one worker of a launcher that runs Python modules."""

from __future__ import annotations

import sys

from ..errors import GloraError
from .work import work

if __name__ == "__main__":
    try:
        work(sys.argv[1])
    except GloraError as error:
        sys.exit(f"refused: {error}")
