"""Weights that adapters save in full (classifier heads, modules_to_save): averaged, or refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from .adapters.modules import PREFIX
from .adapters.read import TENSORS_NAME, Adapter
from .errors import Refusal, Refusals, listing, require
from .state import State

__all__ = ["dense_holders", "dense_means", "heeded", "with_dense", "without_mean"]


def with_dense(adapters: Sequence[Adapter]) -> list[tuple[int, Refusal]]:
    """Refusals of the adapters that hold such weights, by place."""
    return [
        (
            i,
            Refusal(
                "the adapter holds weights saved in full",
                adapter.name,
                TENSORS_NAME,
                PREFIX + next(iter(adapter.dense)),
                f"{len(adapter.dense)} such tensors",
                "factor pairs only, because dense='refuse' (--dense refuse)",
                "average them with dense='mean' (--dense mean)",
            ),
        )
        for i, adapter in enumerate(adapters)
        if adapter.dense
    ]


def without_mean(adapters: Sequence[Adapter], voices: Sequence[float]) -> list[Refusal]:
    """Weights saved in full whose holders' weights allow no mean."""
    refusals = Refusals()
    for name, having in dense_holders(adapters).items():
        held = [voices[i] for i in having]
        with listing(refusals):
            require(sum(held) > 0 and min(held) >= 0, *_no_mean(name, held))
    return refusals


def _no_mean(name: str, voices: Sequence[float]) -> tuple[str, str, str, str]:
    return (
        f"weights of the clients with {name}",
        str(voices),
        "none negative, not all zero",
        "weights saved in full can only be averaged, over clients that no robust rule left out",
    )


def dense_holders(adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    """By tensor, the places of the adapters that hold it."""
    holders: dict[str, list[int]] = defaultdict(list)
    for i, adapter in enumerate(adapters):
        for name in adapter.dense:
            holders[name].append(i)
    return dict(sorted(holders.items()))


def heeded(state: State, voices: Sequence[float]) -> list[float]:
    """Each client's voice as the verdict in a state's settings leaves it.

    Full tensors are weights and no updates: what shortens an update lessens the voice here.
    """
    if "robust" not in state.settings:
        return list(voices)
    verdicts = state.settings["robust"]["clients"]
    return [v * x["trust"] * x["scale"] for v, x in zip(voices, verdicts, strict=True)]


def dense_means(
    adapters: Sequence[Adapter],
    holders: Mapping[str, Sequence[int]],
    weights: Sequence[float],
    tell: Callable[[str, int, int], None],
) -> dict[str, Tensor]:
    """Weighted means in float64, over the clients that have the tensor, in its stored dtype."""
    means = {}
    for done, (name, having) in enumerate(holders.items(), start=1):
        voices = [weights[i] for i in having]
        total = math.fsum(voices)
        require(total > 0, *_no_mean(name, voices))
        infos = [adapters[i].dense[name] for i in having]
        mean = torch.zeros(infos[0].shape, dtype=torch.float64)
        for i, voice in zip(having, voices, strict=True):
            mean += adapters[i].dense_tensor(name).double() * (voice / total)
        means[name] = mean.to(reduce(torch.promote_types, (info.dtype for info in infos)))
        tell("dense", done, len(holders))
    return means
