"""Where the time of one server step goes, by word of the vocabulary.

python bench/shares.py [update|consensus] [4096x4096,32,16,32]    # d_out x d_in, K, r, R

Clients are partly shared.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from populations import Case, population

from glora_ops import STATS
from glora_ops.runtime.threads import exact_products, one_thread

WORDS = (
    "pair", "gram", "canonical", "turned", "overlaps", "product", "times", "lift", "combine",
    "qr", "inner", "fold", "unfold", "core", "eigh", "svd",
)  # fmt: skip
ROUNDS = 15


class Timed(CpuVocabulary):
    """The CPU's vocabulary with a clock; a word inside another is on the inner one's account."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._inner = [0.0]
        for word in WORDS:
            setattr(self, word, self._timed(word, getattr(self, word)))

    def _timed(self, word: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = perf_counter()
            result = call(*args, **kwargs)
            spent = perf_counter() - start
            self.seconds[word] += spent - self._inner.pop()
            self._inner[-1] += spent
            self.calls[word] += 1
            return result

        return run


def main(basis: str, d_out: int, d_in: int, clients: int, rank: int, server: int) -> None:
    p = population(Case(d_out, d_in, clients, (rank,), server))
    v = Timed()
    offsets = torch.arange(clients + 1) * rank
    ops, total = Ops(v), 0.0
    for turn in range(ROUNDS + 3):
        if turn == 3:  # warm
            v.seconds.clear()
            v.calls.clear()
            total = 0.0
        start = perf_counter()
        with exact_products(), one_thread():  # as the registered op does
            out = ops.aggregate(p.b, p.a, offsets, p.weights, p.scaling, server, basis)
        total += perf_counter() - start
    print(
        f"{basis}, {d_out} × {d_in}, K = {clients}, r = {rank}, R = {server}: "
        f"{1e3 * total / ROUNDS:.1f} ms"
    )
    captured, attainable, steps = (
        float(out[5][..., STATS.index(x)]) for x in ("captured", "attainable", "power_iters")
    )
    print(f"captured / attainable {captured / attainable:.5f}, {steps:g} power steps")
    print("\n| word | calls | ms | share |\n| :-- | --: | --: | --: |")
    for word, seconds in sorted(v.seconds.items(), key=lambda item: -item[1]):
        ms = 1e3 * seconds / ROUNDS
        print(f"| {word} | {v.calls[word] // ROUNDS} | {ms:.2f} | {seconds / total:.0%} |")
    rest = total - sum(v.seconds.values())
    print(f"| everything else | | {1e3 * rest / ROUNDS:.2f} | {rest / total:.0%} |")


if __name__ == "__main__":
    basis = sys.argv[1] if len(sys.argv) > 1 else "update"
    shape = sys.argv[2] if len(sys.argv) > 2 else "4096x4096,32,16,32"
    main(basis, *(int(x) for x in shape.replace("x", ",").split(",")))
