"""What glora is measured against, each as an expert would write it today in plain torch.

Rules of the house, so that no peer is weak by accident:
- inputs are those of glora; bf16 ones are converted to fp32 on the peer's clock, as torch's QR and
  SVD take nothing narrower; peers (0) and (1) start from what glora starts from, row stacks in
  memory (`stacks`) or the clients' own tensors (`lists`), (3) and (4) from row stacks, (2) and (5)
  from the clients' own tensors, as they must;
- test matrices Ω are drawn before the clock starts (glora keeps its own between calls too);
- LAPACK gets one thread or all of them, whichever is faster for that peer on that machine: the
  bench tries both; products always use all;
- peer (0) is raced with Householder QR (`Lapack`) and with CholeskyQR (`Cholesky`); glora is
  compared with the faster of the two;
- nothing beyond the answer is computed: no certificates, no per-client statistics, no checks.

Every peer returns (u (d_out, R), s (R,), v (d_in, R)) with answer u·diag(s)·vᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from populations import Population
from torch import Tensor

__all__ = [
    "FORMS",
    "OVERSAMPLE",
    "Cholesky",
    "Factors",
    "Lapack",
    "Peft",
    "by_lapack",
    "dense_lowrank",
    "dense_svd",
    "lists",
    "naive_loop",
    "omega",
    "randomized_svd",
    "stacked_qr",
    "stacks",
]

Factors = tuple[Tensor, Tensor, Tensor]
Start = Callable[[Population], tuple[Tensor, Tensor]]
OVERSAMPLE = 16  # p, as glora's default


def omega(d: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(d, columns, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Lapack:
    """Householder QR and SVD on a given number of threads; threads = 0 leaves the setting alone."""

    threads: int = 0

    @contextmanager
    def _limited(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def qr(self, y: Tensor) -> tuple[Tensor, Tensor]:
        with self._limited():
            return torch.linalg.qr(y)

    def orthonormal(self, y: Tensor) -> Tensor:
        return self.qr(y)[0]

    def span(self, y: Tensor) -> Tensor:
        """Columns kept apart, of the same span: between power steps no more is needed."""
        return self.orthonormal(y)

    def svd(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self._limited():
            return torch.linalg.svd(x, full_matrices=False)

    def geqrf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._limited():
            return torch.geqrf(x)

    def ormqr(self, x: Tensor, tau: Tensor, c: Tensor) -> Tensor:
        with self._limited():
            return torch.ormqr(x, tau, c)


class Cholesky(Lapack):
    """Shifted CholeskyQR (Fukaya et al. 2020) and the SVD by a Gram matrix, for tall blocks.

    Gram matrices in fp32 between power steps and in fp64 where the result is used; what is k × k
    is fp64, and its inverse is multiplied, which is faster than a triangular solve of the block.
    """

    def span(self, y: Tensor) -> Tensor:
        return self._apart(y, (y.mT @ y).double(), 1e-6)

    def orthonormal(self, y: Tensor) -> Tensor:
        wide = y.double()
        return self._apart(y, wide.mT @ wide, 1e-14)

    def _apart(self, y: Tensor, gram: Tensor, shift: float) -> Tensor:
        gram.diagonal().add_(shift * gram.trace())
        one = torch.eye(len(gram), dtype=torch.float64)
        with self._limited():
            inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), one, upper=False)
        return y @ inverse.mT.float()

    def svd(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.double()
        gram = wide.mT @ wide
        with self._limited():
            squares, vectors = torch.linalg.eigh(gram)
        s = squares.flip(0).clamp_min(0).sqrt().float()
        vectors = vectors.flip(1).float()
        return x @ (vectors / s), s, vectors.mT


FORMS: dict[str, type[Lapack]] = {"Householder": Lapack, "CholeskyQR": Cholesky}


def by_lapack(
    call: Callable[[Lapack], Any], form: type[Lapack] = Lapack
) -> dict[str, Callable[[], Any]]:
    """The same peer with LAPACK on all threads and on one."""
    return {
        "LAPACK on all threads": lambda: call(form()),
        "LAPACK on one thread": lambda: call(form(1)),
    }


def stacks(p: Population) -> tuple[Tensor, Tensor]:
    """Row stacks b (N, d_out) and a (N, d_in), in memory before the clock starts."""
    return p.b.float(), p.a.float()


def lists(p: Population) -> tuple[Tensor, Tensor]:
    """The same, stacked on the peer's clock from the clients' own lora_B and lora_A."""
    return torch.cat(p.lora_b, 1).float().mT, torch.cat(p.lora_a).float()


def randomized_svd(
    p: Population, rank: int, steps: int, om: Tensor, lapack: Lapack, start: Start = stacks
) -> Factors:
    """(0) Implicit randomized SVD of the stacks, Y = L(AΩ). Answer: best rank R of the mean.

    Halko, Martinsson, Tropp 2011, algorithms 4.3 and 5.1; `steps` power iterations.
    """
    (b, a), coef = start(p), p.coef
    y = b.mT @ (coef * (a @ om))
    for _ in range(steps):  # one QR a step: fp32 bears W̄W̄ᵀ of an orthonormal block
        y = b.mT @ (coef * (a @ (a.mT @ (coef * (b @ lapack.span(y))))))
    q = lapack.orthonormal(y)
    v, s, xh = lapack.svd(a.mT @ (coef * (b @ q)))  # W̄ᵀq, tall
    return q @ xh[:rank].mT, s[:rank], v[:, :rank]


def stacked_qr(p: Population, rank: int, lapack: Lapack, start: Start = stacks) -> Factors:
    """(1) Thin QR of both stacks and one N × N SVD. Answer: best rank R of the mean, exactly.

    Q stays in reflectors: only the R columns wanted are ever multiplied out.
    """
    b, a = start(p)
    left, tau_l = lapack.geqrf(b.mT * p.coef.mT)
    right, tau_r = lapack.geqrf(a.mT)
    x, s, yh = lapack.svd(left[: min(b.shape)].triu() @ right[: min(a.shape)].triu().mT)
    u, v = b.new_zeros(b.shape[1], rank), a.new_zeros(a.shape[1], rank)
    u[: x.shape[0]], v[: yh.shape[1]] = x[:, :rank], yh[:rank].mT
    return lapack.ormqr(left, tau_l, u), s[:rank], lapack.ormqr(right, tau_r, v)


def dense_mean(p: Population) -> Tensor:
    """(d_out, d_in): one product of the stacks, not K of them."""
    return p.b.float().mT @ (p.coef * p.a.float())


def dense_lowrank(p: Population, rank: int) -> Factors:
    """(3) Dense mean, then torch.svd_lowrank. Answer: best rank R of the mean, nearly."""
    u, s, v = torch.svd_lowrank(dense_mean(p), q=rank + OVERSAMPLE, niter=2)
    return u[:, :rank], s[:rank], v[:, :rank]


def dense_svd(p: Population, rank: int) -> Factors:
    """(4) Dense mean, then a full SVD (FlexLoRA, FedEx-LoRA). Answer: best rank R, exactly."""
    u, s, vh = torch.linalg.svd(dense_mean(p), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].mT


class Peft:
    """(2) PEFT's add_weighted_adapter(combination_type="svd") on a model of one linear layer.

    Answer: best rank R of the mean, by a dense sum and a thin SVD. Adapters are in the model
    before the clock starts; removing the last answer is not timed either.
    """

    def __init__(self, p: Population, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        case, self.rank = p.case, rank
        base = torch.nn.Sequential()
        base.add_module("linear", torch.nn.Linear(case.d_in, case.d_out, bias=False))
        self.names = [f"client{i}" for i in range(case.clients)]
        self.model: Any = None
        for i, name in enumerate(self.names):
            r, scaling = case.rank_of(i), float(p.scaling[i])
            config = LoraConfig(
                r=r, lora_alpha=int(scaling * r), target_modules=["linear"], lora_dropout=0.0
            )
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
            layer = self.model.base_model.model.linear
            layer.lora_A[name].weight.data.copy_(p.lora_a[i])
            layer.lora_B[name].weight.data.copy_(p.lora_b[i])
        self.layer = layer
        self.weights = p.weights.tolist()

    def reset(self) -> None:
        if "mean" in self.model.peft_config:
            self.model.delete_adapter("mean")

    def __call__(self) -> Factors:
        with torch.no_grad():
            self.model.add_weighted_adapter(
                self.names, self.weights, "mean", combination_type="svd",
                svd_rank=self.rank, svd_full_matrices=False,
            )  # fmt: skip
        b, a = self.layer.lora_B["mean"].weight.data, self.layer.lora_A["mean"].weight.data
        return b, torch.full((self.rank,), self.layer.scaling["mean"]), a.mT


def naive_loop(p: Population, rank: int, om_u: Tensor, om_v: Tensor, lapack: Lapack) -> Factors:
    """(5) Projector averaging client by client with linalg.qr, one step of subspace iteration.

    Answer: the plain consensus (hard projectors, no anchor, no rank decision): U, V from
    Σ w_i Q_iQ_iᵀ, then the core Σ w_i s_i (UᵀB_i)(A_iV).
    """
    weights = p.weights.tolist()

    def top(factors: Sequence[Tensor], om: Tensor) -> Tensor:
        bases = [lapack.orthonormal(x) for x in factors]

        def mean_projector(z: Tensor) -> Tensor:
            y = torch.zeros_like(z)
            for w, q in zip(weights, bases, strict=True):
                y.addmm_(q, q.mT @ z, alpha=w)
            return y

        y = mean_projector(lapack.orthonormal(mean_projector(om)))
        return lapack.svd(y)[0][:, :rank]

    lora_b, lora_a = ([x.float() for x in side] for side in (p.lora_b, p.lora_a))
    u = top(lora_b, om_u)
    v = top([a.mT for a in lora_a], om_v)
    core = u.new_zeros(rank, rank)
    for c, b, a in zip((p.weights * p.scaling).tolist(), lora_b, lora_a, strict=True):
        core.addmm_(u.mT @ b, a @ v, alpha=c)
    x, s, yh = lapack.svd(core)
    return u @ x, s, v @ yh.mT
