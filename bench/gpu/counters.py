"""Bytes, occupancy and stalls of single kernels, as `ncu` counts them: one 4096² step, K = 100."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gpu.step import Step, main

KERNELS = "product|sketch|triangular|eigh|svd|canonical|core"
LAUNCHES = 25
TARGET = "--target"


def target() -> None:
    """What is looked at: a process of its own."""
    from gpu.headline import SINGLE, glora

    rehearse = "--rehearse" in sys.argv
    step = Step("counters", Path(), rehearse)
    glora(step, SINGLE, SINGLE.stacks(step))()


def body(step: Step) -> None:
    ncu = shutil.which("ncu")
    command = [sys.executable, "-m", "gpu.counters", TARGET]
    with step.row(tool="ncu", found=ncu is not None) as r:
        if ncu is None:
            command += ["--rehearse"] if step.rehearse else []
        else:
            # The card's clocks are left as they are.
            command = [
                ncu, "--clock-control", "none", "--set", "basic", "--csv", "--page", "raw",
                "--log-file", str(step.out / "ncu.csv"), "-k", f"regex:{KERNELS}",
                "-c", str(LAUNCHES), *command,
            ]  # fmt: skip
        r["status"] = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        r["ok"] = r["status"] == 0


if __name__ == "__main__":
    target() if TARGET in sys.argv else main(body)
