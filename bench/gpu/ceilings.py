"""What this card and these versions are: copies and products at their best."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu.device import timed
from gpu.step import Step, main

PACKAGES = ("glora", "triton", "numpy", "scipy", "pytest", "hypothesis", "pytest-xdist")
PRODUCTS = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def card() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"device": None}
    p = torch.cuda.get_device_properties(0)
    return {
        "device": p.name, "capability": [p.major, p.minor], "processors": p.multi_processor_count,
        "memory_gb": p.total_memory / 1e9, "l2_mb": getattr(p, "L2_cache_size", 0) / 1e6,
    }  # fmt: skip


def body(step: Step) -> None:
    with step.row(what="versions") as r:
        r |= card()
        r |= {"python": sys.version.split()[0], "machine": platform.machine()}
        r |= {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
        r |= {name: installed(name) for name in PACKAGES}
    with step.row(what="copy") as r:
        x = torch.empty(2**10 if step.rehearse else 2**28, device=step.device)
        y = torch.empty_like(x)
        r |= timed(lambda: y.copy_(x), step.device, 10)
        r["gb_s"] = 2 * x.nbytes / r["ms"] / 1e6
    for name, dtype in PRODUCTS.items():
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            with step.row(what="product", of="tf32" if tf32 else name) as r:
                n = 32 if step.rehearse else 4096 if dtype.itemsize > 2 else 8192
                a, b = (torch.randn(n, n, device=step.device).to(dtype) for _ in range(2))
                torch.backends.cuda.matmul.allow_tf32 = tf32
                for _ in range(3):
                    a @ b
                r |= timed(lambda a=a, b=b: a @ b, step.device, 10)
                r["n"], r["tflop_s"] = n, 2 * n**3 / r["ms"] / 1e9


if __name__ == "__main__":
    main(body)
