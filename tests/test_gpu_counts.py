"""bench/gpu_counts.py: what is counted of a launch, against numbers made by hand."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton on this platform")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))


def calls(run):
    from glora_ops.kernels.launching import observed

    found = []
    with observed(lambda call: found.append(call) or False):
        run()
    return found


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("columns", "multiplied"), [(64, 64), (80, 80), (90, 96), (100, 128)])
def test_products_are_counted_as_whole_tiles(columns, multiplied):
    """1600 rows in tiles of 128 are 1664; 80 columns are 64 and 16, of a tile that reads x once."""
    from glora_ops.kernels.product import launch_times
    from gpu_counts import products, reread

    x = meta(2, 1600, 4096, dtype=torch.bfloat16)
    (call,) = calls(lambda: launch_times(x, meta(2, columns, 4096).mT))
    height = call.arguments["BM"]
    rows = -(-1600 // height) * height
    assert call.arguments["MODE"] == "split w"
    assert products(call) == [("bf16", 3 * 2 * 2 * rows * multiplied * 4096)]
    again = (-(-1600 // height) - 1) * columns * 4096 * 2 * 4
    assert reread(call) == again + (x.nbytes if columns > 96 else 0)


def test_a_small_problem_whose_loops_nobody_has_read_is_not_free():
    from glora_ops.kernels.eigh import launch_eigh
    from gpu_counts import instructions

    known, single, unknown = (
        calls(lambda n=n, p=p: launch_eigh(meta(3, n, n, dtype=torch.float64), p))[0]
        for n, p in ((80, True), (80, False), (120, True))
    )
    assert 0 < instructions(single) < instructions(known)
    with pytest.raises(KeyError):
        instructions(unknown)
