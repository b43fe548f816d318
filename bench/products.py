"""What bf16 products on the CPU would bring to bf16 factors, beside fp32 ones of a converted stack.

python bench/products.py [--threads 2]

For a bf16 stack X (N, d) and an fp32 block of k = 48 columns: X·W ("times", W is d × k) and Xᵀ·Z
("lift", Z is N × k). The block is split into 1, 2 or 3 bf16 terms, side by side in one product.
Relative errors are against float64. torch's CPU products of bf16 come out in bf16, too late for a
sum over terms to help; the last column is the error of the same terms multiplied in fp32, as if
a product came out in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measure import conditions
from torch import Tensor

from glora_ops.runtime.threads import exact_products

K = 48
SHAPES = [(n, d) for d in (1024, 4096) for n in (64, 512, 1024)]


def linear(x: Tensor, w: Tensor) -> Tensor:
    """X (n, d), W (k, d) → X Wᵀ in the dtype of both, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def split(x: Tensor, terms: int) -> list[Tensor]:
    """bf16 terms whose sum is x to 8, 16 or 24 bits."""
    out: list[Tensor] = []
    for _ in range(terms):
        out.append(x.bfloat16())
        x = x - out[-1].float()
    return out


def in_terms(x: Tensor, w: Tensor, terms: int) -> Tensor:
    """X Wᵀ with W in bf16 terms, one product, summed in fp32."""
    product = linear(x, torch.cat(split(w, terms))).float()
    return product.unflatten(1, (terms, -1)).sum(1)


def milliseconds(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def rows(n: int, d: int, rounds: int) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    stack = torch.randn(n, d, generator=draw).bfloat16()
    fp32 = stack.float()
    out = []
    for word, x, full, w in (
        ("times", stack, fp32, torch.randn(K, d, generator=draw)),
        ("lift", stack.mT, fp32.mT, torch.randn(K, n, generator=draw)),
    ):
        left = word == "lift"
        exact = full.double() @ w.double().mT

        def product(a: Tensor, b: Tensor, left: bool = left) -> Tensor:
            return linear(b, a).mT if left else linear(a, b)

        def bf16(terms: int, a: Tensor = x, b: Tensor = w, left: bool = left) -> Tensor:
            if not left:
                return in_terms(a, b, terms)
            flat = linear(torch.cat(split(b, terms)), a).float()
            return flat.unflatten(0, (terms, -1)).sum(0).mT

        def error(y: Tensor, exact: Tensor = exact) -> str:
            return f"{float((y.double() - exact).norm() / exact.norm()):.1e}"

        calls = {
            "convert": lambda: stack.float(),
            "fp32": lambda f=full, b=w: product(f, b),
            **{str(t): (lambda t=t, f=bf16: f(t)) for t in (1, 2, 3)},
        }
        ms = milliseconds(calls, rounds)
        reach = [error(sum(product(full, p.float()) for p in split(w, t))) for t in (1, 2, 3)]
        out.append(
            f"| {n} × {d} | {word} | {ms['convert']:.2f} | {ms['fp32']:.2f} | "
            f"{ms['1']:.2f} / {ms['2']:.2f} / {ms['3']:.2f} | {error(calls['fp32']())} | "
            f"{error(bf16(1))} / {error(bf16(2))} / {error(bf16(3))} | {' / '.join(reach)} |"
        )
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about = conditions()
    print(f"{about['cpu']}, {given.threads} threads, torch {about['torch']}, {about['blas']}\n")
    print(
        "| N × d | product | stack to fp32, ms | fp32, ms | bf16 in 1 / 2 / 3 terms, ms "
        "| error, fp32 | error, bf16 terms | were the product not rounded to bf16 |"
    )
    print("| --: | :-- | --: | --: | --: | --: | --: | --: |")
    with exact_products():
        for n, d in SHAPES:
            print("\n".join(rows(n, d, given.rounds)))
