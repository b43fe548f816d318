"""Every kernel once, small, in the algorithm's words, and the ops: values against float64.

A word's first call compiles its kernels; its seconds say for how long. Bounds are those of the
tests: n·u times the same product of absolute values for a product of n terms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules

import glora_ops.kernels
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.kernels.launching import Call, observed
from torch import Tensor

from glora_ops import STATS
from glora_ops.linalg.ragged import Ragged
from gpu.device import server_step
from gpu.step import Step, main

U32, U64 = 2.0**-24, 2.0**-53
# Of `Clients`; their T are unique up to signs.
FORMS = ("sigma", "soft", "hard", "size", "noise", "tau", "norm", "loudest")
FP64 = {(8, 0), (9, 0), (10, 0)}


class Words:
    """Small operands in float64, on the CPU, and each word's value of them there."""

    def __init__(self, dtype: torch.dtype, step: Step) -> None:
        self.v, self.device, self.dtype = CudaVocabulary(), step.device, dtype
        ranks, k = ([2, 3, 1], 8) if step.rehearse else ([5, 16, 1, 9], 24)
        offsets = torch.tensor([0, *ranks]).cumsum(0)
        n, d = int(offsets[-1]), 70
        self.here = Ragged.of(offsets, n, torch.device("cpu"))
        self.there = Ragged.of(offsets, n, torch.device(step.device))
        self.x, self.y = self.drawn(2, n, d, dtype=dtype), self.drawn(2, n, d, dtype=dtype, seed=1)
        self.omega = self.drawn(1, d, k, seed=2).sign()
        self.z, self.tall = self.drawn(2, n, k, seed=3), self.drawn(2, k, d, seed=4).mT
        self.t = self.drawn(2, n, max(ranks), seed=5)
        self.small = self.drawn(2, k, k, seed=6)
        # Where a card has hardly any fp64 units, sums over long dimensions are fp32 ones.
        few = step.device == "cuda" and torch.cuda.get_device_capability() not in FP64
        self.unit = U32 if few else U64
        self.psd = self.small @ self.small.mT

    def drawn(self, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).double()

    def on(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the device; tall blocks stay views of (L, k, d) memory."""
        return x.to(self.device, dtype or x.dtype)

    def __iter__(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """(word, error over its bound)."""
        for name in ("gram", "times", "sketch", "lift", "combine", "inner", "fold", "core",
                     "readout", "canonical", "inverse_cholesky", "eigh", "svd", "overlaps",
                     "whitened", "metric"):  # fmt: skip
            yield name, getattr(self, name)

    def gram(self) -> float:
        got = self.v.gram(self.on(self.x, self.dtype), self.there)
        blocks = self.here.pad(self.x)
        return product_error(got, blocks, blocks.mT, self.unit)

    def times(self) -> float:
        w = self.tall.float()
        got = self.v.times(self.on(self.x, self.dtype), self.on(w))
        return product_error(got, self.x, w.double())

    def sketch(self) -> float:
        rows = [self.on(x, self.dtype) for x in (self.x, self.y)]
        _, got = self.v.sketch(rows, self.there, 2 * [self.on(self.omega, self.dtype)])
        return max(
            product_error(g, x, self.omega) for g, x in zip(got, (self.x, self.y), strict=True)
        )

    def lift(self) -> float:
        z = self.z.float()
        got = self.v.lift(self.on(self.x, self.dtype), self.on(z))
        return product_error(got, self.x.mT, z.double())

    def combine(self) -> float:
        y, c = self.tall.float(), self.small.float().double()
        return product_error(self.v.combine(self.on(y), self.on(c)), y.double(), c)

    def inner(self) -> float:
        y = self.tall.float()
        return product_error(
            self.v.inner(self.on(y), self.on(y)), y.double().mT, y.double(), self.unit
        )

    def fold(self) -> float:
        one = torch.ones(self.t.shape[:-1], dtype=torch.float64)
        worst = 0.0
        for name in ("fold", "unfold"):
            got = getattr(self.v, name)(self.on(self.t), self.on(one), self.there, self.on(self.z))
            want = getattr(CpuVocabulary(), name)(self.t, one, self.here, self.z)
            worst = max(worst, relative(got, want) / 1e-6)
        return worst

    def core(self) -> float:
        u, coef = self.tall[..., :8].float(), torch.ones(self.x.shape[:2], dtype=torch.float64)
        rows = [self.on(x, self.dtype) for x in (self.x, self.y)]
        got = self.v.core(*rows, self.on(u), self.on(u), self.on(coef))[0]
        x, y = self.x @ u.double(), self.y @ u.double()
        return relative(got, x.mT @ y) / 1e-5

    def readout(self) -> float:
        u, root = self.tall.float(), torch.ones(2, self.tall.shape[-1])
        b, a = self.v.readout(self.on(u), self.on(u), self.on(root), 8)
        return float(not (b.cpu().equal(u[..., :8]) and a.cpu().equal(u[..., :8].mT)))

    def canonical(self) -> float:
        grams = [CpuVocabulary().gram(x, self.here) for x in (self.x, self.y)]
        scaling = torch.linspace(-2, 1, self.here.clients).double().expand(2, -1)
        given = scaling, 0.1, 2.0**-24
        got = self.v.canonical(*map(self.on, grams), self.there, self.on(scaling), *given[1:])
        want = CpuVocabulary().canonical(*grams, self.here, *given)
        return max(relative(getattr(got, x), getattr(want, x)) for x in FORMS) / 1e-12

    def inverse_cholesky(self) -> float:
        w = self.v.inverse_cholesky(self.on(self.psd), 1e-14).cpu()
        return relative(w.mT @ self.psd @ w, torch.eye(w.shape[-1]).expand_as(w)) / 1e-11

    def eigh(self) -> float:
        lam, x = (o.cpu() for o in self.v.eigh(self.on(self.psd)))
        return relative((x * lam[..., None, :]) @ x.mT, self.psd) / 1e-12

    def svd(self) -> float:
        x, s, y = (o.cpu() for o in self.v.svd(self.on(self.small)))
        return relative((x * s[..., None, :]) @ y.mT, self.small) / 1e-12

    def overlaps(self) -> float:
        got = self.v.overlaps(self.on(self.x, self.dtype))
        return product_error(got, self.x, self.x.mT)

    def whitened(self) -> float:
        grams, turns = [x.float() @ x.float().mT for x in (self.x, self.y)], 2 * [self.t / 100]
        want = CpuVocabulary().whitened(grams, self.here, turns)
        got = self.v.whitened([*map(self.on, grams)], self.there, [*map(self.on, turns)])
        return relative(got[0], want[0].double()) / 1e-3

    def metric(self) -> float:
        gram = self.x.float() @ self.x.float().mT
        gamma = CpuVocabulary().whitened([gram, gram], self.here, 2 * [self.t / 100])
        z, d = self.z.float(), self.z[..., 0].float()
        z, d = torch.cat([z, z]), torch.cat([d, d])
        worst = 0.0
        for precise in (False, True):
            got = self.v.metric_product(self.on(gamma), self.on(z), precise)
            want = CpuVocabulary().metric_product(gamma, z, precise)
            worst = max(worst, relative(got, want.double()) / 1e-6)
        got = self.v.metric_energy(self.on(gamma), self.on(gamma), self.on(d))
        want = CpuVocabulary().metric_energy(gamma, gamma, d)
        return max(worst, relative(got, want) / 1e-5)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


def product_error(got: Tensor, x: Tensor, y: Tensor, unit: float = U32) -> float:
    """|got − x y| over (n + 2)·unit·|x||y|, the worst entry."""
    limit = (x.shape[-1] + 2) * unit * (x.abs() @ y.abs()) + 1e-300
    return float(((got.cpu().double() - x @ y).abs() / limit).max())


def ops(step: Step) -> None:
    """Nothing cut: every basis is the mean update itself, within 64·u32·S of the CPU's."""
    rng = torch.Generator().manual_seed(0)
    for dtype in (
        (torch.bfloat16,) if step.rehearse else (torch.bfloat16, torch.float16, torch.float32)
    ):
        ranks = [2, 1] if step.rehearse else [3, 16, 5]
        n = sum(ranks)
        b, a = (torch.randn(2, n, d, generator=rng).to(dtype) for d in (96, 64))
        offsets = torch.tensor([0, *ranks]).cumsum(0)
        one = torch.ones(len(ranks))
        for basis in ("update", "consensus", "projector")[: 1 if step.rehearse else 3]:
            with step.row(what="aggregate", basis=basis, dtype=str(dtype)[6:]) as r:
                began = time.monotonic()
                there = server_step(step.device)(
                    b.to(step.device), a.to(step.device), offsets, one.to(step.device),
                    one.to(step.device), n, basis, power_iters=1,
                )  # fmt: skip
                r["seconds"] = round(time.monotonic() - began, 2)
                here = torch.ops.glora.aggregate(b, a, offsets, one, one, n, basis, power_iters=1)
                size = here[5][:, STATS.index("storage_scale")].double()
                x, y = (
                    (o[0].double() * o[1][:, None]).cpu() @ o[2].double().mT.cpu()
                    for o in (there, here)
                )
                r["over_bound"] = float(((x - y).norm(dim=(-2, -1)) / (64 * U32 * size)).max())
                r["ok"] = r["over_bound"] <= 1


def every_kernel() -> set[str]:
    """The names of all that `launching.launch` can be given."""
    names = set()
    for module in iter_modules(glora_ops.kernels.__path__):
        loaded = import_module(f"glora_ops.kernels.{module.name}")
        names |= {name for name in vars(loaded) if name.endswith("_kernel")}
    return names


def body(step: Step) -> None:
    seen: set[str] = set()

    def record(call: Call) -> bool:
        seen.add(call.name)
        return True

    with observed(record):
        for dtype in (torch.bfloat16, torch.float32)[: 1 if step.rehearse else 2]:
            for word, error in Words(dtype, step):
                with step.row(what="word", word=word, dtype=str(dtype)[6:]) as r:
                    began = time.monotonic()
                    r["over_bound"] = error()
                    r["seconds"] = round(time.monotonic() - began, 2)
                    r["ok"] = r["over_bound"] <= 1
        ops(step)
    with step.row(what="kernels") as r:
        r["tried"], r["untried"] = len(seen), sorted(every_kernel() - seen)


if __name__ == "__main__":
    main(body)
