"""The fixed steps' error beside the reference's, for docs/solvers.md: a table, no clock.

python bench/fixed_steps_quality.py
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from populations import KINDS, Case, population

from glora_ops import algorithm, reference

STEPS = (0, 1, 2, 4)


def errors(kind: str, basis: str) -> list[float]:
    """‖Ŵ − W̄‖/‖W̄‖ of the reference, in N-space, then on tall blocks after each of `STEPS`."""
    p = population(Case(512, 384, 32, (8,), 16, kind))
    offsets = 8 * torch.arange(33)
    mean = p.b.double().mT @ (p.coef * p.a.double())
    clients = [
        (b.double().numpy(), a.double().numpy()) for b, a in zip(p.lora_b, p.lora_a, strict=True)
    ]
    exact = reference.aggregate(
        clients, p.weights.numpy(), p.scaling.numpy(), 16, basis, unit_roundoff=2.0**-24
    )
    out = [float((torch.from_numpy(exact.w_hat) - mean).norm() / mean.norm())]
    ops = Ops(CpuVocabulary(), fixed_steps=True)
    for nspace, steps in ((True, 1), *((False, steps) for steps in STEPS)):
        chosen = patch.object(algorithm, "fixed_in_nspace", lambda *_, here=nspace: here)
        with torch.no_grad(), chosen:
            u, s, v, *_ = ops.aggregate(
                p.b, p.a, offsets, p.weights, p.scaling, 16, basis, power_iters=steps
            )
        out.append(float(((u.double() * s) @ v.double().mT - mean).norm() / mean.norm()))
    return out


if __name__ == "__main__":
    for kind in KINDS:
        for basis in ("consensus", "projector", "update"):
            print(f"| {kind} | {basis} |", " | ".join(f"{x:.4f}" for x in errors(kind, basis)), "|")
