"""Where the time of one server step goes, by word of the vocabulary.

python bench/shares.py [update|consensus] [4096x4096,32,16,32] [partly] [--statistics]
    [--modules 8] [--threads 2]    # d_out x d_in, K, r, R; partly, shared or disjoint clients

Words that are products have their flops; what is left without all words is Python and small calls.
"""

from __future__ import annotations

import argparse
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
from glora_ops.solvers import tall

WORDS = (
    "pair", "lengths", "gram", "canonical", "turned", "overlaps", "product", "times", "lift",
    "combine", "qr", "inner", "precise", "fold", "unfold", "core", "eigh", "eigenvalues", "svd",
)  # fmt: skip
#: Flops of the words that are products, from what they are given.
FLOPS: dict[str, Callable[..., int]] = {
    "gram": lambda rows, ragged: 2 * rows.numel() * ragged.max_rank,
    "turned": lambda rows, ragged, t: 2 * rows.numel() * ragged.max_rank,
    "overlaps": lambda q: q.numel() * q.shape[-2],
    **dict.fromkeys(("product", "times", "inner"), lambda x, y, *_: 2 * x.numel() * y.shape[-1]),
    "combine": lambda y, c, *_: 2 * y.numel() * c.shape[-1],
    "lift": lambda rows, z: 2 * rows.numel() * z.shape[-1],
}
ROUNDS = 15


class Timed(CpuVocabulary):
    """The CPU's vocabulary with a clock; a word inside another is on the inner one's account."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.flops: defaultdict[str, int] = defaultdict(int)
        self._inner = [0.0]
        for word in WORDS:
            setattr(self, word, self.timed(word, getattr(self, word)))

    def timed(self, word: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = perf_counter()
            result = call(*args, **kwargs)
            spent = perf_counter() - start
            self.seconds[word] += spent - self._inner.pop()
            self._inner[-1] += spent
            self.calls[word] += 1
            self.flops[word] += FLOPS[word](*args) if word in FLOPS else 0
            return result

        return run


def main(given: argparse.Namespace) -> None:
    d_out, d_in, clients, rank, server = map(int, given.shape.replace("x", ",").split(","))
    torch.set_num_threads(given.threads)
    p = population(Case(d_out, d_in, clients, (rank,), server, given.kind))
    b, a = (x.float().expand(given.modules, -1, -1).clone() for x in (p.b, p.a))
    v = Timed()
    tall.count_sketch = v.timed("count_sketch", tall.count_sketch)
    offsets = torch.arange(clients + 1) * rank
    ops, total = Ops(v), 0.0
    for turn in range(ROUNDS + 3):
        if turn == 3:  # warm
            for count in (v.seconds, v.calls, v.flops):
                count.clear()
            total = 0.0
        start = perf_counter()
        with exact_products(), one_thread():  # as the registered op does
            out = ops.aggregate(
                b, a, offsets, p.weights, p.scaling, server, given.basis,
                client_statistics=given.statistics,
            )  # fmt: skip
        total += perf_counter() - start
    told = ", statistics of clients" if given.statistics else ""
    each = ROUNDS * given.modules
    print(
        f"{given.basis}, {given.kind}{told}, {d_out} × {d_in}, K = {clients}, r = {rank}, "
        f"R = {server}, {given.modules} together, {given.threads} threads: "
        f"{1e3 * total / each:.2f} ms each"
    )
    captured, attainable, steps = (
        float(out[5][0, STATS.index(x)]) for x in ("captured", "attainable", "power_iters")
    )
    print(f"captured / attainable {captured / attainable:.5f}, {steps:g} power steps")
    print("\n| word | calls | ms | share | Gflop |\n| :-- | --: | --: | --: | --: |")
    for word, seconds in sorted(v.seconds.items(), key=lambda item: -item[1]):
        calls, ms, flops = v.calls[word] / each, 1e3 * seconds / each, v.flops[word] / each / 1e9
        print(f"| {word} | {calls:.1f} | {ms:.2f} | {seconds / total:.0%} | {flops:.3f} |")
    rest, flops = total - sum(v.seconds.values()), sum(v.flops.values()) / each / 1e9
    print(
        f"| everything else | | {1e3 * rest / each:.2f} | {rest / total:.0%} | {flops:.3f} in all |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("basis", nargs="?", default="update")
    parser.add_argument("shape", nargs="?", default="4096x4096,32,16,32")
    parser.add_argument("kind", nargs="?", default="partly")
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--modules", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    main(parser.parse_args())
