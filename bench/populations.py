"""Synthetic clients for the benches: factor pairs whose update spaces agree more or less.

Every population is a function of its `Case` alone (seed included), so peers and glora, and two
runs a month apart, see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

import glora_ops

__all__ = ["KINDS", "Case", "Population", "population"]

#: Fraction of a client's directions that every client has; the others are its own.
KINDS = {"shared": 1.0, "partly": 0.5, "disjoint": 0.0, "frozen": 0.5}
SCALING = 2.0  # alpha/r


@dataclass(frozen=True)
class Case:
    """What a bench row runs on.

    Attributes
    ----------
    d_out, d_in : int
    clients : int
        K.
    ranks : tuple of int
        r_i in turn, repeated as often as needed: (16,) is uniform, (4, 8, 16) is ragged.
    rank : int
        Server rank R.
    kind : str
        Of `KINDS`. In "frozen", every client has the same lora_A.
    noise : float
        Norm of the noise in each factor over the factor's own norm.
    """

    d_out: int
    d_in: int
    clients: int
    ranks: tuple[int, ...]
    rank: int
    kind: str = "partly"
    noise: float = 0.05
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        r = "-".join(map(str, self.ranks))
        dtype = "" if self.dtype == torch.float32 else f"-{self.dtype}".replace("torch.", "")
        return f"{self.d_out}x{self.d_in}-K{self.clients}-r{r}-R{self.rank}-{self.kind}{dtype}"

    @property
    def rows(self) -> int:
        """N = Σ r_i."""
        return sum(self.rank_of(i) for i in range(self.clients))

    def rank_of(self, client: int) -> int:
        return self.ranks[client % len(self.ranks)]


@dataclass(frozen=True, eq=False)
class Population:
    """Clients in PEFT's layouts and, stacked before any clock runs, in glora's.

    Attributes
    ----------
    lora_b, lora_a : list of Tensor (d_out, r_i), (r_i, d_in)
    weights, scaling : Tensor (K,) fp64
        Weights sum to 1.
    """

    case: Case
    lora_b: list[Tensor]
    lora_a: list[Tensor]
    weights: Tensor
    scaling: Tensor

    @cached_property
    def packed(self) -> glora_ops.Packed:
        return glora_ops.pack(list(zip(self.lora_b, self.lora_a, strict=True)))

    @property
    def b(self) -> Tensor:
        """(N, d_out)."""
        return self.packed.b

    @property
    def a(self) -> Tensor:
        """(N, d_in)."""
        return self.packed.a

    @cached_property
    def coef(self) -> Tensor:
        """(N, 1) fp32: w_i s_i at each row of client i, so that the mean is bᵀ(coef·a)."""
        ranks = torch.tensor([x.shape[0] for x in self.lora_a])
        return (self.weights * self.scaling).repeat_interleave(ranks)[:, None].float()


@lru_cache(maxsize=2)
def population(case: Case) -> Population:
    """Draw the clients of a case.

    ΔW_i = X_i M_i Y_iᵀ: X_i and Y_i hold the shared directions and the client's own, M_i is a
    decaying diagonal (1 … 0.1) with client-specific mixing, stored in a gauge of condition 10.
    """
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def orthonormal(d: int, k: int) -> Tensor:
        return torch.linalg.qr(normal(d, k)).Q

    widest = max(case.ranks)
    common_x, common_y = orthonormal(case.d_out, widest), orthonormal(case.d_in, widest)
    sizes = torch.logspace(0, -1, widest, dtype=torch.float64)
    lora_b, lora_a = [], []
    for i in range(case.clients):
        r = case.rank_of(i)
        m = round(KINDS[case.kind] * r)
        own = torch.arange(r) >= m  # every other size is left to each half
        x = torch.where(own, normal(case.d_out, r) / case.d_out**0.5, common_x[:, :r])
        y = torch.where(own, normal(case.d_in, r) / case.d_in**0.5, common_y[:, :r])
        order = torch.cat([torch.arange(0, r, 2), torch.arange(1, r, 2)])
        sigma = sizes[:r][order]
        mix = torch.diag(sigma.sqrt()) @ (torch.eye(r) + 0.2 * normal(r, r) / r**0.5)
        left, right = orthonormal(r, r), orthonormal(r, r)
        stretch = torch.logspace(0.5, -0.5, r, dtype=torch.float64)
        gauge, inverse = (left * stretch) @ right.mT, (right / stretch) @ left.mT
        b = x @ mix @ gauge
        a = common_y[:, :r].mT if case.kind == "frozen" else inverse @ (sigma.sqrt() * y).mT
        b = b + case.noise * b.norm() * normal(*b.shape) / b.numel() ** 0.5
        if case.kind != "frozen":
            a = a + case.noise * a.norm() * normal(*a.shape) / a.numel() ** 0.5
        lora_b.append(b.to(case.dtype).contiguous())
        lora_a.append(a.to(case.dtype).contiguous())
    examples = torch.randint(100, 1000, (case.clients,), generator=draw).double()
    scaling = torch.full((case.clients,), SCALING, dtype=torch.float64)
    return Population(case, lora_b, lora_a, examples / examples.sum(), scaling)
