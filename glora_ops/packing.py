"""Clients' factor pairs ↔ row stacks: `pack` and `Packed.unpack`. No numerics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import require

__all__ = ["FLOATS", "Packed", "check_pair", "pack", "pack_modules", "shown"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Packed:
    """K clients' factors of one module, or of L modules of one shape, as row stacks.

    Attributes
    ----------
    b : Tensor (N, d_out) or (L, N, d_out)
        Row j is a column of some client's ``lora_B``.
    a : Tensor (N, d_in) or (L, N, d_in)
        Row j is the matching row of its ``lora_A``.
    offsets : Tensor (K + 1,) int64 on the CPU
        Client i owns rows ``offsets[i]:offsets[i + 1]``.
    ranks : tuple of tuple of int
        ``ranks[l][i]``: rows client i really has in module l; the rest of its rows are zero.
    """

    b: Tensor
    a: Tensor
    offsets: Tensor
    ranks: tuple[tuple[int, ...], ...]

    @property
    def clients(self) -> int:
        return self.offsets.numel() - 1

    def unpack(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The factor pairs again: ``[module][client] = (B (d_out, r_i), A (r_i, d_in))``, views."""
        b, a = (x if x.dim() == 3 else x[None] for x in (self.b, self.a))
        starts = self.offsets.tolist()
        return [
            [
                (b[l, lo : lo + r].mT, a[l, lo : lo + r])
                for lo, r in zip(starts, ranks, strict=False)
            ]
            for l, ranks in enumerate(self.ranks)
        ]


def pack(clients: Sequence[tuple[Tensor, Tensor]]) -> Packed:
    """Stack one module's clients: (B_i (d_out, r_i), A_i (r_i, d_in)) → `Packed`.

    Raises
    ------
    GloraError
        No client, a factor that is not a float matrix, ranks or dimensions that do not fit.
    """
    packed = pack_modules([clients])
    return Packed(packed.b[0], packed.a[0], packed.offsets, packed.ranks)


def pack_modules(modules: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Packed:
    """Stack L modules of one shape; ``modules[l][i]`` is client i's pair in module l.

    A client whose rank differs between modules gets its largest rank everywhere, zero rows
    filling the others.

    Raises
    ------
    GloraError
        As `pack`; also modules with different numbers of clients or different shapes.
    """
    require(len(modules) >= 1, "modules", len(modules), "at least one module")
    clients = len(modules[0])
    require(clients >= 1, "clients", clients, "at least one client")
    first = modules[0][0]
    for l, pairs in enumerate(modules):
        require(
            len(pairs) == clients,
            f"module {l}",
            f"{len(pairs)} clients",
            f"{clients}, as in module 0",
            "give an absent client a pair of zeros",
        )
        for i, (b, a) in enumerate(pairs):
            check_pair(f"module {l}, client {i}", b, a, *first)
    d_out, d_in = first[0].shape[0], first[1].shape[1]
    ranks = tuple(tuple(b.shape[1] for b, _ in pairs) for pairs in modules)
    rows = [max(per_module) for per_module in zip(*ranks, strict=True)]
    offsets = torch.tensor([0, *rows]).cumsum(0)
    pairs0 = [pair for pairs in modules for pair in pairs]
    dtype_b, dtype_a = pairs0[0][0].dtype, pairs0[0][1].dtype
    for b, a in pairs0:
        dtype_b = torch.promote_types(dtype_b, b.dtype)
        dtype_a = torch.promote_types(dtype_a, a.dtype)
    if len(modules) == 1:
        (pairs,) = modules
        stack_b = torch.cat([b.detach().to(dtype_b).mT for b, _ in pairs])[None]
        stack_a = torch.cat([a.detach().to(dtype_a) for _, a in pairs])[None]
        return Packed(stack_b, stack_a, offsets, ranks)
    device = modules[0][0][0].device
    stack_b = torch.zeros(len(modules), sum(rows), d_out, dtype=dtype_b, device=device)
    stack_a = torch.zeros(len(modules), sum(rows), d_in, dtype=dtype_a, device=device)
    for l, pairs in enumerate(modules):
        for lo, (b, a) in zip(offsets.tolist(), pairs, strict=False):
            stack_b[l, lo : lo + b.shape[1]] = b.detach().mT
            stack_a[l, lo : lo + a.shape[0]] = a.detach()
    return Packed(stack_b, stack_a, offsets, ranks)


def check_pair(where: str, b: Tensor, a: Tensor, first_b: Tensor, first_a: Tensor) -> None:
    """Raise `GloraError` unless b and a are factors, of the dimensions that the first ones have."""
    found = f"lora_B {shown(b)} and lora_A {shown(a)}"
    require(
        b.dtype in FLOATS
        and a.dtype in FLOATS
        and b.dim() == a.dim() == 2
        and b.shape[1] == a.shape[0]
        and min(*b.shape, *a.shape) >= 1,
        where,
        found,
        "PEFT's layouts (d_out, r) and (r, d_in) with one r ≥ 1, in fp32, bf16, fp16 or fp64",
    )
    d_out, d_in = first_b.shape[0], first_a.shape[-1]
    require(
        b.shape[0] == d_out and a.shape[1] == d_in,
        where,
        found,
        f"d_out = {d_out} and d_in = {d_in}, as the first client's",
    )


def shown(x: Tensor) -> str:
    """A tensor, for a message."""
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
