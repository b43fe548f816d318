"""Compile kernels for targets that are not here, and read what came out.

    python tests/support/compiling.py TARGET [CASE …]  TARGET: sm_80, sm_89, sm_90, sm_100 or gfx942

runs the launchers of the cases on meta tensors, compiles what they would have launched and
prints one JSON line per kernel. A process of its own: Triton's interpreter and its compiler cannot
share one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import compile_passes  # noqa: F401  (registers its cases)
import compile_small  # noqa: F401  (registers its cases)
import torch
import triton
from compile_case import CASES, Case
from glora_ops.kernels.launching import Call, observed
from glora_ops.kernels.precision import assumed_target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What SASS calls the things asserted on.
SASS = {
    "loads_128": r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128|UTMALDG",
    "loads_16": r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*U?16\b",
    "HGMMA": r"\bHGMMA",
    "HMMA": r"\bHMMA",
    "DMMA": r"\bDMMA",
    "UTCHMMA": r"\bUTC\w*MMA",
    "tf32": r"MMA\S*TF32",
    "local": r"\b(?:LDL|STL)\b",
    "trap": r"\bBPT\.TRAP",
    "barriers": r"\bBAR\.SYNC",
    "FFMA": r"\bFFMA",
    "instructions": r"^\s+/\*[0-9a-f]{4,}\*/\s+\S",
}


def source(call: Call) -> ASTSource:
    """What the just-in-time compiler would be given for this call, alignment facts included."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(call.kernel.params):
        name, value = parameter.name, call.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            if value == 1:
                signature[name], constants[(i,)] = "constexpr", 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{call.name}: argument {name} is a {type(value).__name__}")
    return ASTSource(call.kernel, signature, constants, attributes)


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def facts(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction families of one compiled kernel."""
    found: dict[str, Any] = {"shared": compiled.metadata.shared}
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        for key, name in (("registers", "vgpr_count"), ("spills", "vgpr_spill_count")):
            found[key] = int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
        found["mfma"] = len(re.findall(r"\bv_mfma", text))
        return found
    found["tmem"] = getattr(compiled.metadata, "tmem_size", 0) or 0
    found["ptx_tf32"] = compiled.asm["ptx"].count("tf32")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    found["registers"], found["stack"] = map(
        int,
        re.search(r"REG:(\d+) STACK:(\d+)", usage).groups(),  # type: ignore[union-attr]
    )
    counts = Counter({k: len(re.findall(v, sass, re.MULTILINE)) for k, v in SASS.items()})
    return found | dict(counts)


def compile_case(case: Case, target: str) -> list[dict[str, Any]]:
    calls: list[Call] = []

    def record(call: Call) -> bool:
        calls.append(call)
        return False

    with assumed_target(target), observed(record):
        case.run()
    rows = []
    for call in calls:
        row: dict[str, Any] = {"case": case.name, "kernel": call.name, "target": target}
        try:
            compiled = triton.compile(source(call), TARGETS[target], dict(call.options))
            rows.append(row | call.options | facts(compiled, target))
        except Exception as error:  # every failure is a finding
            rows.append(row | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
    return rows


if __name__ == "__main__":
    wanted = sys.argv[2:]
    for case in CASES:
        if not wanted or any(case.name.startswith(name) for name in wanted):
            for row in compile_case(case, sys.argv[1]):
                print(json.dumps(row), flush=True)
