"""Kernels compiled for GPUs that are not here, and what their machine code must look like.

A subprocess a target (compiling.py); each case says what is expected of whom.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parent / "support"
KERNELS = Path(__file__).parents[1] / "kernels"
# Bytes of shared memory a program may have.
SHARED = {
    "sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}  # fmt: skip
TMEM_COLUMNS = 512
THREADS = 1024

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton on this platform")


def compiled(target: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "compiling.py"), target],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def expectations() -> dict[str, dict[str, Any]]:
    """The cases' expectations, read in a process that may import Triton."""
    code = (
        "import json, compile_passes, compile_small, compile_case as c;"
        "print(json.dumps({x.name: {k: v for k, v in vars(x).items() if k != 'run'}"
        " for x in c.CASES}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SUPPORT, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def faults(row: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is wrong with one compiled kernel."""
    target = row["target"]
    if target in expected["exceptions"]:
        return [] if "error" in row else ["compiles now: take it off the exceptions"]
    if "error" in row:
        return [row["error"]]
    wrong = []
    if row["shared"] > SHARED[target]:
        wrong.append(f"{row['shared']} bytes of shared memory")
    if row["num_warps"] * (64 if target == "gfx942" else 32) > THREADS:
        wrong.append(f"{row['num_warps']} warps")
    if target == "gfx942":
        return wrong
    # On sm_100 tensor memory is allocated under guards that trap; a *bare* trap is all there is.
    if row["trap"] and (target != "sm_100" or row["instructions"] < 100):
        wrong.append("a trap")
    if row["tmem"] > TMEM_COLUMNS:
        wrong.append(f"{row['tmem']} columns of tensor memory")
    if not expected["tf32"] and (row["tf32"] or row["ptx_tf32"]):
        wrong.append("tf32 where fp32 is meant")
    if row["barriers"] < expected["barriers"]:
        wrong.append(f"{row['barriers']} barriers, expected {expected['barriers']}")
    if target == "sm_100":
        return wrong
    if row["stack"] > expected["stack"].get(target, 0):
        wrong.append(f"{row['stack']} bytes of stack: registers spill")
    narrow = target == "sm_89"  # sm_89's blocks are narrower, its loads 8 bytes wide here and there
    if expected["wide_loads"] and (row["loads_16"] or not (narrow or row["loads_128"])):
        wrong.append(f"{row['loads_128']} loads of 16 bytes, {row['loads_16']} of 2")
    families = [k for k in ("HGMMA", "HMMA", "DMMA") if row[k]]
    wanted = expected["without_doubles" if narrow else "tensor_cores"]
    if expected["tensor_cores"] and not any(re.fullmatch(wanted, f) for f in families or [""]):
        wrong.append(f"tensor cores {families}, expected {wanted}")
    return wrong


@pytest.mark.parametrize("target", SHARED)
def test_machine_code(target: str) -> None:
    expected = expectations()
    rows = compiled(target)
    assert {row["case"] for row in rows} == set(expected)
    wrong = {
        f"{row['case']}: {row['kernel']}": found
        for row in rows
        if (found := faults(row, expected[row["case"]]))
    }
    assert not wrong


def test_the_gate_can_fail() -> None:
    """A kernel that spills, traps, loads two bytes at a time or computes in tf32 is refused."""
    good = dict.fromkeys(["shared", "trap", "tmem", "tf32", "ptx_tf32", "stack", "loads_16"], 0)
    good["barriers"] = 6
    good |= {"target": "sm_90", "loads_128": 4, "HGMMA": 1, "HMMA": 0, "DMMA": 0, "num_warps": 4}
    expected = {"exceptions": {}, "tf32": False, "stack": {}, "wide_loads": True, "barriers": 6,
                "tensor_cores": "HGMMA", "without_doubles": "HMMA"}  # fmt: skip
    assert not faults(good, expected)
    for bad in ({"shared": 2**20}, {"trap": 1}, {"tmem": 640}, {"ptx_tf32": 1}, {"stack": 8},
                {"loads_128": 0}, {"loads_16": 2}, {"HGMMA": 0}, {"num_warps": 64}, {"barriers": 5},
                {"error": "no"}):  # fmt: skip
        assert faults(good | bad, expected), bad


def unstated(code: str) -> list[int]:
    """Lines with a product of blocks that leaves its precision to Triton's default."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1].startswith("dot"):
            given = [ast.unparse(k.value) for k in node.keywords if k.arg == "input_precision"]
            if not {"'ieee'", "MODE"}.issuperset(given or [""]):
                found.append(node.lineno)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found.append(node.lineno)
    return found


def test_every_product_states_its_precision() -> None:
    """ "ieee", or the MODE that `precision.product_mode` chose, which has a row in its table."""
    assert unstated("b = tl.dot(x, y)") == [1]
    assert unstated('b = tl.dot(x, y, input_precision="tf32")') == [1]
    assert unstated("b = language.dot(x, y, out_dtype=tl.float64)") == [1]
    assert unstated("b = x @ y") == [1]
    files = {path.name: path.read_text() for path in KERNELS.glob("*.py")}
    assert sum(code.count("tl.dot(") for code in files.values()) >= 9
    assert {name: lines for name, code in files.items() if (lines := unstated(code))} == {}
