"""What fixed steps move, multiply and wait for on a GPU, counted on tensors without values.

    python bench/gpu_counts.py     # bench/results/gpu/counts.json; needs no GPU

The op runs on meta tensors; every kernel launch and every torch operation between them is seen.
A launch takes the longest of

    memory         each operand once: views of one memory count once
    L2             what its tiles read again, at the rate of L2
    products       a three-term product as the three dots it is, of whole tiles: columns and rows
                   that pad them are multiplied as well
    instructions   of small problems: those that its loops issue, four a cycle and processor, so
                   many programs at a time as its registers allow

and launches add up, none overlaps. Replayed, a call takes that; called eagerly no less than the
host needs to start everything. A lower bound and a ranking: nothing was run. What stood there as
the former design stays beside this one (counted when padding was not).
"""

from __future__ import annotations

import json
from collections import Counter
from math import ceil, prod
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
# An H200: memory as a copy was measured there to move it; L2, products with few columns and square
# ones as assumed, below any datasheet; fp64 by the datasheet. Bytes and flops a second.
RATES = {
    "bytes": 4.3e12, "l2": 5.5e12, "bf16": 400e12, "square": 550e12, "tf32": 200e12, "fp64": 67e12
}  # fmt: skip
PROCESSORS, CLOCK, ISSUED = 132, 1.9e9, 4
# Seconds the host needs for a launch and for a torch operation.
HOST = {"kernel": 30e-6, "torch": 6e-6}
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
# Instructions of the loops of small problems by kernel and block, + the rows of a second block,
# "single" where sweeps are in fp32: per column, and per round of Jacobi; warps of a program, and
# programs that fit in a processor. Read off sm_90's machine code (Triton 3.8.0). `triangular` by
# panels has a 16th of a panel's in every column.
LOOPS = {
    ("eigh_kernel", "32 single"): (205 + 35 + 51, 102, 4, 5),
    ("eigh_kernel", "64 single"): (242 + 60 + 91, 143, 8, 1),
    ("eigh_kernel", "128 + 16 single"): (547 + 229 + 369, 398, 8, 1),
    ("eigh_kernel", "64"): (238, 268, 8, 1), ("eigh_kernel", "128 + 16"): (603, 749, 8, 1),
    ("svd_kernel", "16"): (222, 191, 1, 20), ("svd_kernel", "64"): (413, 273, 8, 1),
    ("svd_kernel", "128 + 64"): (831, 674, 16, 1), ("canonical_kernel", "16"): (1114, 193, 1, 12),
    ("triangular_kernel", "16"): (261 + 88, 0, 1, 14),
    ("triangular_kernel", "32"): (174 + 27, 0, 2, 6),
    ("triangular_kernel", "64"): (97 + 24, 0, 8, 2),
    ("triangular_kernel", "128"): (99 + 65, 0, 8, 1),
}  # fmt: skip
# Sweeps of Jacobi until nothing turns: 7 to 20 by the spectrum in fp64, 6 to 9 in fp32.
SWEEPS = 9


class Counts(TorchDispatchMode):
    """Launches, bytes, flops by unit and seconds by kernel; torch's own as ``torch``."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.bound: Counter[str] = Counter()

    def add(
        self, name: str, moved: int, flops: list[tuple[str, int]], again: int = 0, issue: float = 0
    ) -> None:
        self.launches[name] += 1
        self.bytes[name] += moved
        for unit, number in flops:
            self.flops[unit] += number
        floors = {
            "memory": moved / RATES["bytes"],
            "L2": (moved + again) / RATES["l2"] if again else 0.0,
            "products": sum(number / RATES[unit] for unit, number in flops),
            "instructions": issue,
        }
        longest = max(floors, key=floors.__getitem__)
        self.seconds[name] += floors[longest]
        self.bound[longest] += floors[longest]

    def launched(self, call: Call) -> bool:
        tensors = {name: x for name, x in call.arguments.items() if isinstance(x, Tensor)}
        if call.name == "metric_product_kernel":
            tensors["Y"] = tensors["Y"][..., ::2, :]  # below z, which is there
            if not call.arguments["PRECISE"]:
                tensors["GAMMA"] = tensors["GAMMA"][0]  # the first of two terms
        moves = moved(list(tensors.values()))
        self.add(call.name, moves, products(call), reread(call), instructions(call))
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_meta]
        mutable = func._schema.is_mutable
        view = any(r.alias_info for r in func._schema.returns) and not mutable
        if made and not view and not func.__name__.startswith(("empty", "new_empty", "_unsafe")):
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            # a result is written even where it is written in place
            self.add("torch", moved(read) + (0 if mutable else moved(made)), [])
        return out


def size(x: Tensor) -> int:
    """Bytes of memory that a view covers: an expanded dimension counts once."""
    held = [n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0]
    return torch.Size(held).numel() * x.itemsize


def moved(tensors: list[Tensor]) -> int:
    """Bytes of some tensors; a memory seen twice, as in yᵀy, is read once."""
    found = {}
    for x in tensors:
        found[x.untyped_storage()._cdata, x.storage_offset(), size(x)] = size(x)
    return sum(found.values())


def whole(n: int, tile: int) -> int:
    """Rows or columns of the tiles that hold n."""
    return ceil(n / tile) * tile


def sides(call: Call) -> int:
    """Of an aggregation, in one launch."""
    return 2 if call.arguments["BOTH"] else 1


def products(call: Call) -> list[tuple[str, int]]:
    """(unit, flops) of a launch's long products, tiles whole; r × r and k × k ones are left out."""
    a = call.arguments
    terms, unit = ARITHMETIC.get(a.get("MODE", ""), (0, "bf16"))
    if call.name == "product_kernel":
        sizes = [
            whole(a[f"M{i}"], a["BM"])
            * whole(a[f"N{i}"], a["BN"] + a["BR"])
            * a[f"C{i}"]
            * len(a[f"X{i}"])
            for i in range(sides(call))
        ]
        return [(unit, terms * 2 * sum(sizes))]
    if call.name == "sketch_kernel":
        found = []
        for side in range(2):
            modules, rows, d = a[f"X{side}"].shape
            gram = ceil(a["clients"] / a["CLIENTS"]) * a["CLIENTS"] * a["R"] ** 2
            slots = ceil(a["clients"] / a["CLIENTS"]) * a["CLIENTS"] * a["R"]
            found.append((unit, terms * 2 * slots * a["BN"] * d * modules))
            found.append(("fp64", 2 * gram * d * modules))
        return found
    if call.name == "core_kernel":
        rows = whole(a["rows"], a["BM"]) * len(a["B"])
        return [
            (unit, terms * 2 * rows * (a["d_out"] + a["d_in"]) * a["BN"]),
            ("fp64", 2 * rows * a["BN"] ** 2),
        ]
    if call.name == "overlaps_kernel":
        tiles = a["places"] * len(a["X"])
        unit = "square" if unit == "bf16" else unit
        return [(unit, terms * 2 * tiles * a["B"] ** 2 * a["d"])]
    if call.name == "metric_product_kernel":
        _, modules, k, rows = a["TERMS"].shape
        tiles = whole(rows, a["BM"]) * whole(k, a["BN"] + a["BR"])
        return [(unit, (3 if a["PRECISE"] else 1) * 2 * modules * rows * tiles)]
    if call.name == "whitened_kernel":
        return [("fp64", 4 * call.grid[0] * call.grid[1] * a["R"] ** 2 * a["BN"])]
    return []


def reread(call: Call) -> int:
    """Bytes that tiles read more than once, from L2."""
    a = call.arguments
    if call.name == "product_kernel":
        again = 0
        for i in range(sides(call)):
            m, n, c = a[f"M{i}"], a[f"N{i}"], a[f"C{i}"] * len(a[f"X{i}"])
            down, across = ceil(m / a["BM"]), ceil(n / (a["BN"] + a["BR"]))
            again += (across - 1) * m * c * a[f"X{i}"].itemsize
            again += (down - 1) * n * c * a[f"W{i}"].itemsize
        return again
    if call.name == "sketch_kernel":
        programs = ceil(a["clients"] / a["CLIENTS"]) * len(a["X0"])
        return (programs - 1) * sum(size(a[f"W{side}"]) for side in range(2))
    if call.name == "overlaps_kernel":
        tiles = a["places"] * len(a["X"])
        return 2 * tiles * a["B"] * a["d"] * a["X"].itemsize - size(a["X"])
    if call.name == "metric_product_kernel":
        down, across = ceil(a["rows"] / a["BM"]), ceil(a["k"] / (a["BN"] + a["BR"]))
        gamma = (1 + a["PRECISE"]) * size(a["GAMMA"][0])
        return (across - 1) * gamma + (down - 1) * size(a["TERMS"])
    if call.name == "metric_round_kernel":
        return size(a["Z"])
    if call.name == "core_kernel":
        return (ceil(a["rows"] / a["BM"]) - 1) * (size(a["U"]) + size(a["V"]))
    return 0


def instructions(call: Call) -> float:
    """Seconds in which a small problem's loops can issue their instructions."""
    a = call.arguments
    if call.name not in {name for name, _ in LOOPS}:
        return 0.0
    block = a["BN" if call.name == "triangular_kernel" else "N"]
    tail = f" + {a['TAIL']}" if a.get("TAIL") else ""
    single = " single" if a.get("SINGLE") else ""
    column, turn, warps, resident = LOOPS[call.name, f"{block}{tail}{single}"]
    if call.name == "canonical_kernel":
        n, programs = block, len(a["RANKS"]) * a["G_B"].shape[0]
    else:
        n = a["n"]
        programs = prod(call.grid)
    issued = column * n + turn * SWEEPS * (2 * ceil(n / 2) - 1)
    together = min(resident, ceil(programs / PROCESSORS))
    cycles = issued * max(1.0, together * warps / ISSUED)  # a warp issues one a cycle
    return ceil(programs / (PROCESSORS * together)) * cycles / CLOCK


def count(name: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """A consensus by fixed steps of every shape of a case, clients of rank 16."""
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
    kernels = sum(n for k, n in counts.launches.items() if k != "torch")
    operations = counts.launches["torch"]
    return {
        "case": name, "dtype": str(dtype).removeprefix("torch."), "steps": steps,
        "kernels": kernels, "operations": operations, "shapes": len(shapes),
        "stack_gb": stacks / 1e9, "read_ms": 1e3 * stacks / RATES["bytes"],
        "moved_gb": {k: n / 1e9 for k, n in counts.bytes.most_common()},
        "floor_ms": {k: 1e3 * n for k, n in counts.seconds.most_common()},
        "bound_ms": {k: 1e3 * n for k, n in counts.bound.most_common()},
        "product_ms": {k: 1e3 * n / RATES[k] for k, n in counts.flops.most_common()},
        "host_ms": 1e3 * (kernels * HOST["kernel"] + operations * HOST["torch"]),
    }  # fmt: skip


def shown(former: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """The former design and this one, side by side."""
    lines = [f"{'':32}{'former':>44}{'now':>44}"]
    told = f"{'launches':>14}{'GB':>8}{'device ms':>11}{'host ms':>11}"
    lines.append(f"{'':32}{told}{told}")
    before = {(r["case"], r["dtype"], r["steps"]): r for r in former}
    for row in rows:
        key = row["case"], row["dtype"], row["steps"]
        line = f"{key[0]}, {key[1]}, q = {key[2]}".ljust(32)
        for r in (before.get(key), row):
            if r is None:
                line += "–".rjust(44)
                continue
            launches = f"{r['kernels']} + {r['operations']}"
            gb, ms = sum(r["moved_gb"].values()), sum(r["floor_ms"].values())
            line += f"{launches:>14}{gb:8.3g}{ms:11.3g}{r['host_ms']:11.3g}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    found = [
        count(name, steps, dtype)
        for name in CASES
        for dtype in (torch.bfloat16, torch.float32)
        for steps in (1, 2)
    ]
    former = json.loads(OUT.read_text())["former"] if OUT.exists() else []
    OUT.parent.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    told = {"versions": versions, "rates": RATES, "former": former, "rows": found}
    OUT.write_text(json.dumps(told, indent=1) + "\n")
    print(shown(former, found))
    print(f"written: {OUT}")
