"""Accesses beyond a buffer: the kernels' tests under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from gpu.step import Step, main
from gpu.tests import TESTS

FILES = ("passes", "canonical_solve", "eigh", "svd")
# Some tests need more memory than is left with every tensor in an allocation of its own.
LEFT_OUT = "not beyond_two_to_the_31 and not long_contractions"


def body(step: Step) -> None:
    with step.row(tool="compute-sanitizer") as r:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            raise FileNotFoundError("no compute-sanitizer on PATH")
        # Every tensor its own allocation, or an access beyond one falls into its neighbour unseen.
        environment = os.environ | {"GLORA_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        files = [str(TESTS / f"test_kernel_{name}.py") for name in FILES]
        r["status"] = subprocess.run(
            [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "pytest",
             "-x", "-k", LEFT_OUT, *files],
            env=environment, stdin=subprocess.DEVNULL, check=False,
        ).returncode  # fmt: skip
        r["ok"] = r["status"] == 0


if __name__ == "__main__":
    main(body)
