"""Bytes, occupancy and stalls of single kernels, as `ncu` counts them: one 4096² step, K = 100."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gpu.headline import SINGLE, glora
from gpu.step import Step, main

KERNELS = "product|sketch|triangular|eigh|svd|canonical|core"
LAUNCHES = 80  # the anchor and its eigenproblem
TARGET = "--target"


def server_step(step: Step) -> None:
    """What is looked at."""
    glora(step, SINGLE, SINGLE.stacks(step))()


def body(step: Step) -> None:
    if step.rehearse:
        server_step(step)
        return
    with step.row(tool="ncu") as r:
        ncu = shutil.which("ncu")
        if ncu is None:
            raise FileNotFoundError("no ncu on PATH")
        # The card's clocks are left as they are.
        r["status"] = subprocess.run(
            [ncu, "--clock-control", "none", "--set", "basic", "--csv", "--page", "raw",
             "--log-file", str(step.out / "ncu.csv"), "-k", f"regex:{KERNELS}",
             "-c", str(LAUNCHES), sys.executable, "-m", "gpu.counters", TARGET],
            stdin=subprocess.DEVNULL, check=False,
        ).returncode  # fmt: skip
        r["ok"] = r["status"] == 0


if __name__ == "__main__":
    server_step(Step("counters", Path(), False)) if TARGET in sys.argv else main(body)
