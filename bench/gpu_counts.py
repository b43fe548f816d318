"""What a captured `aggregate` moves and multiplies on a GPU, counted on tensors without values.

    python bench/gpu_counts.py        # bench/results/gpu/counts.json; needs no GPU, half a minute

The op runs on meta tensors; every kernel launch and every torch operation between them is seen.
Bytes: each operand once, read or written, as if nothing stayed in a cache and nothing was read
twice. Flops: a three-term product as the three dots it is. The floor of a launch is the larger of
its bytes and its products at the datasheet's rates of one H100; floors add up, launches do not
overlap. An order of magnitude and a ranking, not a prediction: nothing was run.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.bindings.ops import Ops
from glora_ops.kernels.launching import Call, observed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUT = Path(__file__).resolve().parent / "results" / "gpu" / "counts.json"
# NVIDIA's datasheet of the H100 SXM, dense: bytes and flops a second.
H100 = {"bytes": 3.35e12, "bf16": 989e12, "tf32": 494e12, "fp64": 67e12}
LLAMA_7B = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
CASES = {
    "7B, K = 10": (LLAMA_7B, 10, 64),
    "7B, K = 100": (LLAMA_7B, 100, 64),
    "4096², K = 100": ({(4096, 4096): 1}, 100, 64),
    "1024², K = 8": ({(1024, 1024): 1}, 8, 16),
}
# Terms and unit of a MODE of `blocks.product` on NVIDIA.
ARITHMETIC = {
    "half": (1, "bf16"),
    "split w": (3, "bf16"),
    "tf32x3": (3, "tf32"),
    "double": (1, "fp64"),
}


class Counts(TorchDispatchMode):
    """Launches, bytes, flops by unit and floors in seconds by kernel; torch's own as ``torch``."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def add(self, name: str, tensors: list[Tensor], flops: list[tuple[str, int]]) -> None:
        moved = sum(size(x) for x in {id(x): x for x in tensors}.values())
        self.launches[name] += 1
        self.bytes[name] += moved
        for unit, number in flops:
            self.flops[unit] += number
        products = sum(number / H100[unit] for unit, number in flops)
        self.seconds[name] += max(moved / H100["bytes"], products)

    def launched(self, call: Call) -> bool:
        tensors = [x for x in call.arguments.values() if isinstance(x, Tensor)]
        self.add(call.name, tensors, products(call))
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_meta]
        mutable = func._schema.is_mutable
        view = any(r.alias_info for r in func._schema.returns) and not mutable
        if made and not view and not func.__name__.startswith(("empty", "new_empty", "_unsafe")):
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.add("torch", read if mutable else read + made, [])
        return out


def size(x: Tensor) -> int:
    """Bytes of memory that a view covers: an expanded dimension counts once."""
    held = [n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0]
    return torch.Size(held).numel() * x.itemsize


def products(call: Call) -> list[tuple[str, int]]:
    """(unit, flops) of a launch's long products; r × r and k × k ones are left out."""
    a = call.arguments
    terms, unit = ARITHMETIC.get(a.get("MODE", ""), (0, "bf16"))
    if call.name == "product_kernel":
        return [(unit, terms * 2 * a["M"] * a["N"] * a["C"] * call.grid[2])]
    if call.name == "sketch_kernel":
        found = []
        for side in range(call.grid[2]):
            modules, rows, d = a[f"X{side}"].shape
            gram = call.grid[0] * a["CLIENTS"] * a["R"] ** 2
            found.append((unit, terms * 2 * rows * a[f"k{side}"] * d * modules))
            found.append(("fp64", 2 * gram * d * modules))
        return found
    if call.name == "core_kernel":
        long = a["d_out"] * a["k_u"] + a["d_in"] * a["k_v"]
        modules = call.grid[1]
        return [
            (unit, terms * 2 * a["rows"] * long * modules),
            ("fp64", 2 * a["rows"] * a["k_u"] * a["k_v"] * modules),
        ]
    return []


def count(name: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """A captured consensus of every shape of a case, clients of rank 16."""
    shapes, clients, rank = CASES[name]
    counts, stacks = Counts(), 0
    op = Ops(CudaVocabulary(), fixed_steps=True).aggregate
    offsets, one = 16 * torch.arange(clients + 1), torch.ones(clients, device="meta")
    for (d_out, d_in), modules in shapes.items():
        b, a = (
            torch.empty(modules, clients * 16, d, dtype=dtype, device="meta") for d in (d_out, d_in)
        )
        stacks += b.nbytes + a.nbytes
        with torch.no_grad(), observed(lambda call: False):
            op(b, a, offsets, one, one, rank, power_iters=steps)  # plans are made once
        with torch.no_grad(), counts, observed(counts.launched):
            op(b, a, offsets, one, one, rank, power_iters=steps)
    return {
        "case": name, "dtype": str(dtype).removeprefix("torch."), "steps": steps,
        "kernels": sum(n for k, n in counts.launches.items() if k != "torch"),
        "operations": counts.launches["torch"], "shapes": len(shapes),
        "stack_gb": stacks / 1e9, "read_ms": 1e3 * stacks / H100["bytes"],
        "moved_gb": {k: n / 1e9 for k, n in counts.bytes.most_common()},
        "floor_ms": {k: 1e3 * n for k, n in counts.seconds.most_common()},
        "product_ms": {k: 1e3 * n / H100[k] for k, n in counts.flops.most_common()},
    }  # fmt: skip


if __name__ == "__main__":
    rows = [
        count(name, steps, dtype)
        for name in CASES
        for dtype in (torch.bfloat16, torch.float32)
        for steps in (1, 2)
    ]
    OUT.parent.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    OUT.write_text(json.dumps({"versions": versions, "rates": H100, "rows": rows}, indent=1) + "\n")
    print(f"written: {OUT}")
