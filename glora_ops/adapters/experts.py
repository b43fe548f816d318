"""Factors of ``target_parameters``: weights that are parameters of a module, stacks of experts.

PEFT wraps the module once for each of its parameters, so that the factors of the parameter
registered first lie innermost, behind as many ``.base_layer`` as there are others. A stack of E
experts of rank r is one pair: A (E·r, d_in) holds the experts one after the other, B (d_out, r·E)
has column k·E + e for direction k of expert e, and ΔW_e = s B_e A_e. Here every expert is a module
of its own, named after its parameter and its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from .adapter_config import LoraSettings
from .patterns import PatternError
from .targets import ends_with

__all__ = [
    "MAX_EXPERTS",
    "ORDER",
    "PARAMETER_KINDS",
    "innermost_first",
    "nested",
    "owners",
    "parameter_pairs",
]

Pair = tuple[Tensor, Tensor]

PARAMETER_KINDS = ("parameter", "expert")

#: The parameters that experts have, in the order in which transformers registers them.
ORDER = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias",
)  # fmt: skip
MAX_EXPERTS = 4096  # why: each becomes a module of its own; models have some hundreds
MAX_CANDIDATES = 64  # parameters that one pair could belong to
_WRAPPED = ".base_layer"


def _unwrapped(path: str) -> tuple[str, int]:
    """The module that `path` wraps, and behind how many other wrappers."""
    depth = 0
    while path.endswith(_WRAPPED):
        path, depth = path.removesuffix(_WRAPPED), depth + 1
    return path, depth


def innermost_first(parameters: Collection[str]) -> list[str] | None:
    """Parameters of one module as PEFT nests them; None where their order is not known."""
    if len(parameters) > 1 and not set(parameters) <= set(ORDER):
        return None
    return sorted(parameters, key=ORDER.index) if len(parameters) > 1 else list(parameters)


def owners(
    rows: Mapping[str, int], settings: LoraSettings
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Which factor pairs belong to parameters.

    Parameters
    ----------
    rows : mapping of str to int
        By the path of each pair, its rows of A.
    settings : LoraSettings

    Returns
    -------
    parameters : dict of str to str
        Path of the parameter, by the pair's; other pairs belong to modules.
    unclear : dict of str to tuple of str
        By the pair's path, the parameters it could belong to, none or several.
    """
    levels: dict[str, dict[int, str]] = defaultdict(dict)
    for path in rows:
        holder, depth = _unwrapped(path)
        levels[holder][depth] = path
    parameters: dict[str, str] = {}
    unclear: dict[str, tuple[str, ...]] = {}
    heads: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for target in settings.target_parameters:
        head, _, parameter = target.rpartition(".")
        heads[head.rpartition(".")[2]].append((head, parameter))
    bare = sorted({parameter for _, parameter in heads.pop("", [])})[: MAX_CANDIDATES + 1]
    for holder, found in levels.items():
        told = heads.get(holder.rpartition(".")[2], ())
        named = sorted({parameter for head, parameter in told if ends_with(holder, head)})
        only_bare = len(found) == 1 and not named
        if only_bare and (not bare or _is_module(holder, rows[found[max(found)]], settings)):
            if max(found):
                unclear[found[max(found)]] = ()
            continue
        candidates = named if len(named) >= len(found) else sorted({*named, *bare})
        short = candidates if len(candidates) <= MAX_CANDIDATES else []
        outermost_first = [found[depth] for depth in sorted(found)]
        fitting = _fitting(holder, short, [rows[p] for p in reversed(outermost_first)], settings)
        if len(fitting) == 1 and max(found) == len(found) - 1:
            for path, parameter in zip(reversed(outermost_first), fitting[0], strict=True):
                parameters[path] = f"{holder}.{parameter}"
        else:
            unclear |= dict.fromkeys(outermost_first, tuple(short))
    return parameters, unclear


def _rank(settings: LoraSettings, path: str) -> float:
    """The declared rank, 0 where looking it up could take long."""
    try:
        return settings.ranks[path]
    except PatternError:
        return 0.0


def _is_module(holder: str, rank: int, settings: LoraSettings) -> bool:
    """Whether the only pair of `holder` is rather that of a module."""
    selected = settings.targets.selects(holder)
    return rank == _rank(settings, holder) if selected is None else selected


def _fitting(
    holder: str, short: Sequence[str], rows: Sequence[int], settings: LoraSettings
) -> list[tuple[str, ...]]:
    """Ways to give pairs, innermost first, to parameters, in the order PEFT nests them."""
    ordered = innermost_first(short)
    if ordered is None:
        ordered = list(short) if len(rows) == 1 else []
    return [
        chosen
        for chosen in combinations(ordered, len(rows))
        if all(
            rank >= 1 and n % rank == 0
            for n, name in zip(rows, chosen, strict=True)
            for rank in [_rank(settings, f"{holder}.{name}")]
        )
    ]


def parameter_pairs(factors: Mapping[str, Pair], kinds: Mapping[str, str]) -> dict[str, Pair]:
    """By parameter, B (d_out, r·E) and A (E·r, d_in) of all its experts."""
    stacks: dict[str, dict[int, Pair]] = defaultdict(dict)
    for name, pair in factors.items():
        path, _, place = name.rpartition(".") if kinds[name] == "expert" else (name, "", "0")
        stacks[path][int(place)] = pair
    pairs = {}
    for path, experts in stacks.items():
        in_order = [experts[e] for e in sorted(experts)]
        b = torch.stack([b for b, _ in in_order], -1)  # [d_out, r, E]
        pairs[path] = b.flatten(1), torch.cat([a for _, a in in_order])
    return pairs


def nested(parameters: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs by the path under which PEFT stores them."""
    holders: dict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        holder, _, short = parameter.rpartition(".")
        holders[holder].append(short)
    return {
        holder + _WRAPPED * depth: parameters[f"{holder}.{short}"]
        for holder, short_names in holders.items()
        for depth, short in enumerate(reversed(innermost_first(short_names) or []))
    }
