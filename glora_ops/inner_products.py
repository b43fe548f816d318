"""Signed inner products of clients' updates, ⟨ΔW_i, ΔW_j⟩ = s_i s_j tr((B_iᵀB_j)(A_jA_iᵀ))."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .errors import require
from .packing import pack

__all__ = ["MOST_PAIRS", "check_pairs", "inner_products", "of_pairs"]

#: Most pairs of clients that are compared: K ≤ 2048, 32 MiB of inner products.
MOST_PAIRS = 2**21
#: Rows of two blocks of stacked factors whose Gram matrices exist at a time.
ROWS = 256


def check_pairs(clients: int) -> None:
    """Raise `GloraError` where all pairs of so many clients are too many."""
    pairs = clients * (clients - 1) // 2
    require(
        pairs <= MOST_PAIRS,
        "clients",
        f"{clients}, {pairs} pairs to compare",
        f"at most {MOST_PAIRS} pairs (2048 clients)",
        "aggregate groups of clients, then what is read out of the groups' states",
    )


def of_pairs(pairs: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float]) -> Tensor:
    """(K, K) fp64: `inner_products` of one module's factor pairs."""
    packed = pack([(b.detach(), a.detach()) for b, a in pairs])
    scaling = torch.tensor(scalings, dtype=torch.float64)
    return inner_products(packed.b, packed.a, packed.offsets, scaling)


def inner_products(b: Tensor, a: Tensor, offsets: Tensor, scaling: Tensor) -> Tensor:
    """(K, K) fp64 on the CPU: ⟨ΔW_i, ΔW_j⟩ of one module.

    Gauge-free, since G_i and G_j cancel under the trace. An update that is zero up to rounding, as
    when its pairs cancel, has products zero.

    Parameters
    ----------
    b : Tensor (N, d_out)
    a : Tensor (N, d_in)
        Stacked as in `pack`, any float dtype; products are formed and summed in fp64.
    offsets : Tensor (K + 1,) int64 on the CPU
    scaling : Tensor (K,) fp64

    Notes
    -----
    N²(d_out + d_in) multiply-adds, N = Σ r_i; memory beside the stack: two blocks of 256 rows in
    fp64 and their Gram matrices.
    """
    starts = offsets.tolist()
    owner = torch.repeat_interleave(torch.arange(len(starts) - 1), offsets.diff())
    out = torch.zeros(len(starts) - 1, len(starts) - 1, dtype=torch.float64)
    blocks = [(lo, min(lo + ROWS, starts[-1])) for lo in range(0, starts[-1], ROWS)]
    reach = torch.zeros(starts[-1], dtype=torch.float64)
    for k, (lo, hi) in enumerate(blocks):
        left_b, left_a = b[lo:hi].double(), a[lo:hi].double()
        reach[lo:hi] = (left_b.norm(dim=1) * left_a.norm(dim=1)).cpu()
        rows, here = _holders(owner[lo:hi], b.device)
        for start, end in blocks[k:]:
            columns, there = _holders(owner[start:end], b.device)
            traces = (left_b @ b[start:end].double().mT) * (left_a @ a[start:end].double().mT)
            sums = (here @ traces @ there.mT).cpu()
            out[rows, columns] += sums
            if start > lo:
                out[columns, rows] += sums.mT
    # What is below it is rounding: the limit of `canonical_forms`, with Σ‖b_j‖‖a_j‖ for the size.
    for i, (lo, hi) in enumerate(pairwise(starts)):
        if out[i, i] <= 16 * (hi - lo) * 2.0**-53 * reach[lo:hi].sum() ** 2:
            out[i] = out[:, i] = 0
    return (out + out.mT) / 2 * scaling * scaling[:, None]


def _holders(owner: Tensor, device: torch.device) -> tuple[slice, Tensor]:
    """The clients that a block of rows belongs to, and (clients, rows) which row is whose."""
    first, last = int(owner[0]), int(owner[-1])
    mine = owner == torch.arange(first, last + 1)[:, None]
    return slice(first, last + 1), mine.to(device, torch.float64)
