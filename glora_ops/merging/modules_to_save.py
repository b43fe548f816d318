"""Weights that adapters save in full (classifier heads, modules_to_save): averaged, or refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..adapters.modules import DenseTensor
from ..adapters.read import TENSORS_NAME, Adapter
from ..errors import Refusal, Refusals, listing, require
from ..state import State

__all__ = [
    "base_copies",
    "dense_holders",
    "dense_means",
    "heeded",
    "unequal",
    "with_dense",
    "without_mean",
]

SHOWN = 5  # copies of base weights, each with a sentence


def with_dense(adapters: Sequence[Adapter]) -> list[tuple[int, Refusal]]:
    """Refusals of the adapters that hold such weights, by place."""
    return [
        (
            i,
            Refusal(
                "the adapter holds weights saved in full",
                adapter.name,
                TENSORS_NAME,
                next(iter(adapter.dense.values())).key,
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
    """Weighted means in float64, over the clients that have the tensor, in its stored dtype.

    Of a counter the largest of those that are heard, of other tensors that are no numbers the
    common one (`unequal`).
    """
    means = {}
    for done, (name, having) in enumerate(holders.items(), start=1):
        voices = [weights[i] for i in having]
        total = math.fsum(voices)
        require(total > 0, *_no_mean(name, voices))
        infos = [adapters[i].dense[name] for i in having]
        if not infos[0].dtype.is_floating_point:
            heard = (i for i, voice in zip(having, voices, strict=True) if voice > 0)
            values = (adapters[i].dense_tensor(name) for i in heard)
            means[name] = max(values) if _counts(infos[0]) else next(values)
            tell("dense", done, len(holders))
            continue
        mean = torch.zeros(infos[0].shape, dtype=torch.float64)
        for i, voice in zip(having, voices, strict=True):
            mean += adapters[i].dense_tensor(name).double() * (voice / total)
        means[name] = mean.to(_common(info.dtype for info in infos))
        tell("dense", done, len(holders))
    return means


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    # Nothing is promoted from float8.
    return reduce(torch.promote_types, (d if d.itemsize > 1 else torch.float32 for d in different))


def _counts(info: DenseTensor) -> bool:
    """Whether a tensor is one integer, such as BatchNorm's number of batches."""
    integer = not (info.dtype.is_floating_point or info.dtype.is_complex)
    return integer and info.dtype != torch.bool and math.prod(info.shape) == 1


def unequal(adapters: Sequence[Adapter]) -> list[tuple[int, Refusal]]:
    """Tensors that can be neither averaged nor counted, where clients have different ones."""
    refusals = []
    for name, having in dense_holders(adapters).items():
        info = adapters[having[0]].dense[name]
        if info.dtype.is_floating_point or _counts(info):
            continue
        first = adapters[having[0]].dense_tensor(name)
        refusals += [
            (
                i,
                Refusal(
                    "the saved tensor cannot be averaged",
                    adapters[i].name,
                    TENSORS_NAME,
                    info.key,
                    f"{info.dtype}, other values than client {adapters[having[0]].name!r}'s",
                    "floating-point numbers, one integer, or the same in all clients",
                    "leave its module out of modules_to_save",
                ),
            )
            for i in having[1:]
            if not torch.equal(adapters[i].dense_tensor(name), first)
        ]
    return refusals


def base_copies(adapters: Sequence[Adapter]) -> tuple[dict[str, Tensor], list[str]]:
    """The base weights that clients saved and agree on (`check_base_copies`), the first copy.

    With a sentence on each of the first that not all clients saved.
    """
    holders: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        for name in adapter.base_copies:
            holders[name].append(adapter)
    copies = {name: having[0].dense_tensor(name) for name, having in sorted(holders.items())}
    partial = [name for name in copies if len(holders[name]) < len(adapters)]
    remarks = [
        f"{name}: {len(holders[name])} of {len(adapters)} clients saved a copy of the base weight "
        f"({', '.join(a.name for a in holders[name][:3])}), which is written; whether the others' "
        "base is the same cannot be told"
        for name in partial[:SHOWN]
    ]
    if len(partial) > SHOWN:
        remarks.append(f"so it is with {len(partial) - SHOWN} more copies of base weights")
    return copies, remarks
