"""Where the time of one recorded call goes: device milliseconds by kernel, 7B, K = 100."""

from __future__ import annotations

import torch

from gpu.headline import LARGE, glora
from gpu.step import Step, main

ROWS = 40


def body(step: Step) -> None:
    call = glora(step, LARGE, LARGE.stacks(step))
    call()  # compiles
    kinds = torch.profiler.ProfilerActivity
    activity = kinds.CPU if step.rehearse else kinds.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if not step.rehearse:
            torch.cuda.synchronize()
    table = profile.key_averages()
    by = "self_cpu_time_total" if step.rehearse else "self_device_time_total"
    (step.out / "profile.txt").write_text(table.table(sort_by=by, row_limit=ROWS))
    for event in sorted(table, key=lambda e: -getattr(e, by))[:ROWS]:
        step.lines.add(
            "row", case=LARGE.name, kernel=event.key[:120], calls=event.count,
            ms=getattr(event, by) / 1e3,
        )  # fmt: skip


if __name__ == "__main__":
    main(body)
