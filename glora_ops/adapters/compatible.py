"""Whether a set of adapters can be averaged, and the layout they then share."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch

from ..errors import Refusal
from ..runtime.overlap import overlapped
from ..runtime.urls import Url
from .adapter_config import CONFIG_NAME
from .experts import ORDER, PARAMETER_KINDS, innermost_first
from .modules import PREFIX
from .read import TENSORS_NAME, Adapter

__all__ = ["adapter_layout", "check_base_copies", "check_compatible", "incompatible"]

END = 2**14  # bytes: of the last module's factor B, which starts as zeros and is trained
MAX_MAPPED = 16  # entries of auto_mapping; PEFT writes two

#: By name, the clients that have each kind and shape of it.
Shapes = dict[str, list[tuple[list[int], Hashable]]]


def check_compatible(adapters: Sequence[Adapter], base: str | None = None) -> list[Refusal]:
    """Find what keeps `adapters` from being averaged; nothing but headers and duplicates is read.

    Where clients disagree, the value that most of them have is taken for right (the first, if no
    value has more).

    Parameters
    ----------
    adapters : sequence of Adapter
    base : str, optional
        Vouches that the base models are the same although their names or revisions differ, or
        are not given.

    Returns
    -------
    list of Refusal
        Differing bases, or none named and no module in common; differing task types, module kinds
        or shapes, dense shapes; clients that occur twice; no clients at all. `fan_in_fan_out` is
        not compared: PEFT itself sets it by the type of the layer it adapted last, and B A is
        (d_out, d_in) either way.
    """
    if not adapters:
        return [
            Refusal(
                "there is nothing to aggregate",
                found="no usable client",
                expected="at least one adapter folder",
                remedy="name the clients' folders",
            )
        ]
    return [refusal for _, refusal in incompatible(adapters, base)]


def incompatible(adapters: Sequence[Adapter], base: str | None) -> list[tuple[int, Refusal]]:
    """`check_compatible` of at least one adapter, each refusal with the index it speaks of."""
    problems = [
        *([] if base is not None else [*_other_bases(adapters), *_strangers(adapters)]),
        *_other_tasks(adapters),
        *_other_modules(adapters),
        *_other_dense(adapters),
        *_other_stacks(adapters),
        *_other_experts(adapters),
        *_saved_and_adapted(adapters),
        *_tied_elsewhere(adapters),
    ]
    # A client that is refused anyway must not make a sound one its duplicate.
    odd = {i for i, _ in problems}
    return problems + list(_duplicates(adapters, [i for i in range(len(adapters)) if i not in odd]))


def check_base_copies(adapters: Sequence[Adapter]) -> list[tuple[int, Refusal]]:
    """Compare the base weights that PEFT saved beside adapted embeddings, value by value.

    A client whose copy differs trained on another base, or changed it; its update does not apply.
    """
    problems = []
    holders = defaultdict(list)
    for i, adapter in enumerate(adapters):
        for name in adapter.base_copies:
            holders[name].append(i)
    for name, indices in holders.items():
        expected = adapters[indices[0]].dense_tensor(name)
        for i in indices[1:]:
            if not torch.equal(adapters[i].dense_tensor(name), expected):
                problems.append(
                    (
                        i,
                        Refusal(
                            "the copy of the base weight differs between clients",
                            adapters[i].name,
                            TENSORS_NAME,
                            PREFIX + name,
                            "other values",
                            f"the values of client {adapters[indices[0]].name!r}",
                            "all clients must start from the same base; a weight that was "
                            "trained belongs into modules_to_save of their configurations",
                        ),
                    )
                )
    return problems


def adapter_layout(adapters: Sequence[Adapter], base: str | None = None) -> dict[str, Any]:
    """What a PEFT folder of the aggregate needs beside its numbers, as a JSON-able dict.

    Parameters
    ----------
    adapters : sequence of Adapter
        At least one, compatible (`check_compatible`).
    base : str, optional
        Name of the base model to be written instead of the clients'.

    Returns
    -------
    dict
        ``base_model``, ``revision``, ``task_type``, ``auto_mapping`` (the clients' if they agree,
        otherwise None), ``lora_dropout`` (the same, or 0), ``modules_to_save``; ``exact`` (whether
        some client adapts less than all modules whose names end as its own do), ``base_copies``
        (names of base weights to be saved as well), ``tied`` (names of copies, by that of which);
        and ``modules``: for each its ``kind``, ``kernel`` ([kh, kw] or []) and ``fan_in_fan_out``.
    """
    first = adapters[0]
    modules: dict[str, dict[str, Any]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            entry = modules.setdefault(
                name,
                {"kind": module.kind, "kernel": list(module.kernel), "fan_in_fan_out": False},
            )
            entry["fan_in_fan_out"] |= module.fan_in_fan_out
    dropouts = {adapter.lora_dropout for adapter in adapters}
    return {
        "base_model": first.base_model if base is None else base,
        "revision": first.revision if base in (None, first.base_model) else None,
        "task_type": next((a.task_type for a in adapters if a.task_type is not None), None),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "auto_mapping": _agreed([a.config.get("auto_mapping") for a in adapters]),
        "modules_to_save": sorted({name for a in adapters for name in a.modules_to_save}),
        "exact": not all(a.targets.plain for a in adapters),
        "base_copies": sorted({name for a in adapters for name in a.base_copies}),
        "tied": {copy: one for a in adapters for copy, one in a.tied.items()},
        "modules": dict(sorted(modules.items())),
    }


def _agreed(mappings: Sequence[Any]) -> dict[str, str] | None:
    """What names the base's class for AutoPeftModel, where all clients say the same."""
    first = mappings[0]
    if not isinstance(first, dict) or any(mapping != first for mapping in mappings):
        return None
    words = (*first, *first.values())
    sound = all(isinstance(v, str) and v.isprintable() and len(v) <= 1000 for v in words)
    return dict(first) if sound and len(first) <= MAX_MAPPED else None


_VOUCH = "vouch for it with base=NAME (--base NAME)"


def _usual(values: Sequence[Hashable]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _other_bases(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    bases = [(a.base_model, a.revision or "main") for a in adapters]
    usual = _usual(bases)
    for i, found in enumerate(bases):
        if found != usual:
            yield (
                i,
                Refusal(
                    "the adapter belongs to another base model",
                    adapters[i].name,
                    CONFIG_NAME,
                    found=f"base_model_name_or_path, revision = {found}",
                    expected=f"{usual} like the other clients",
                    remedy="if these are names of one model, " + _VOUCH,
                ),
            )


def _strangers(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    """Clients that name no base and share no module, directly or through others, with most.

    Nothing says then that they adapt one model, and the mean would be of unrelated updates.
    """
    circles: list[list[int]] = []
    for having in _layouts(adapters):
        here = [i for i in having if adapters[i].base_model is None]
        if here:
            held = adapters[here[0]].modules.keys()
            kin = [circle for circle in circles if any(held & adapters[j].modules for j in circle)]
            joined = sorted([*here, *(j for circle in kin for j in circle)])
            circles = [*(circle for circle in circles if circle not in kin), joined]
    usual = max(circles, key=lambda circle: (len(circle), -circle[0]), default=[])
    for i in sorted(i for circle in circles if circle is not usual for i in circle):
        other = adapters[usual[0]]
        yield (
            i,
            Refusal(
                "nothing says that the clients adapt one model: they name no base and share no "
                "module",
                adapters[i].name,
                CONFIG_NAME,
                found=f"modules {_some(adapters[i].modules)}",
                expected=f"a module of client {other.name!r}, {_some(other.modules)}, or the name "
                "of the base in both",
                remedy="if they do, " + _VOUCH,
            ),
        )


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _other_tasks(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    tasks = [a.task_type for a in adapters]
    usual = _usual([task for task in tasks if task is not None] or [None])
    for i, found in enumerate(tasks):
        if found not in (None, usual):
            yield (
                i,
                Refusal(
                    "the adapter was trained for another task type",
                    adapters[i].name,
                    CONFIG_NAME,
                    found=f"task_type = {found!r}",
                    expected=f"{usual!r} like the other clients",
                    remedy="aggregate the task types separately",
                ),
            )


def _layouts(adapters: Sequence[Adapter]) -> list[list[int]]:
    """Clients by their modules, which those of one layout share (`Layouts`)."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, adapter in enumerate(adapters):
        alike[id(adapter.modules)].append(i)
    return list(alike.values())


def _other_modules(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    shapes: Shapes = defaultdict(list)
    for having in _layouts(adapters):
        for name, m in adapters[having[0]].modules.items():
            shapes[name].append((having, (m.kind, m.d_out, m.d_in, *m.kernel)))
    return _unequal(
        adapters, shapes, "the module has another kind or shape", "kind, d_out, d_in (kernel) ="
    )


def _other_dense(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    shapes: Shapes = defaultdict(list)
    for i, adapter in enumerate(adapters):
        for name, tensor in adapter.dense.items():
            averaged = "numbers" if tensor.dtype.is_floating_point else str(tensor.dtype)
            shapes[name].append(([i], (tensor.shape, averaged)))
    return _unequal(adapters, shapes, "the saved weight has another shape or kind", "")


def _other_stacks(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    """Stacks of another number of experts; parameters of one module that PEFT nests unknown how."""
    sizes: Shapes = defaultdict(list)
    short: dict[str, dict[str, int]] = defaultdict(dict)
    for having in _layouts(adapters):
        for m in adapters[having[0]].modules.values():
            if m.kind in PARAMETER_KINDS and m.expert[0] == 0:
                path = m.parameter
                sizes[path].append((having, m.expert[1]))
                holder, _, name = path.rpartition(".")
                short[holder].setdefault(name, having[0])
    yield from _unequal(adapters, sizes, "the stack has another number of experts", "experts =")
    for holder, names in short.items():
        if innermost_first(names) is None:
            i = max(names.values())
            yield (
                i,
                Refusal(
                    "in which order PEFT nests the parameters of a module is not known",
                    adapters[i].name,
                    TENSORS_NAME,
                    PREFIX + holder,
                    ", ".join(sorted(names)),
                    f"one parameter in all clients, or several of {', '.join(ORDER)}",
                    "aggregate the clients that adapt one of them separately",
                ),
            )


def _other_experts(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    """Experts as modules of their own, as transformers 4 has them, beside stacks of experts."""
    forms: list[tuple[int, str, str]] = []
    for having in _layouts(adapters):
        for name, m in adapters[having[0]].modules.items():
            if m.kind == "expert" or re.search(r"(^|\.)experts\.[0-9]+\.", name):
                form = "a stack" if m.kind == "expert" else "modules one by one"
                forms += [(i, form, name) for i in having]
                break
    forms.sort()
    usual = _usual([form for _, form, _ in forms] or [None])
    for i, form, name in forms:
        if form != usual:
            yield (
                i,
                Refusal(
                    "the experts are stored in another form",
                    adapters[i].name,
                    TENSORS_NAME,
                    PREFIX + name,
                    form,
                    f"{usual} like the other clients",
                    "save all clients with one version of transformers: load this one with PEFT "
                    "under the version of the others and save it again",
                ),
            )


def _saved_and_adapted(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    """Modules that one client adapts and another saves in full: PEFT can do only one of them."""
    saving = {entry: i for i, a in reversed(list(enumerate(adapters))) for entry in a.saved}
    for i, adapter in enumerate(adapters):
        for entry, by in saving.items():
            here = (*adapter.modules, *adapter.base_copies)
            name = next((n for n in here if f".{entry}." in f".{n}."), None)
            if name is not None:
                yield (
                    i,
                    Refusal(
                        "the module is adapted or frozen here and saved in full by another client",
                        adapter.name,
                        TENSORS_NAME,
                        PREFIX + name,
                        "factors or a copy of the base, where client "
                        f"{adapters[by].name!r} has {entry!r} in modules_to_save",
                        "one of the two in all clients",
                        "aggregate the clients that save it separately",
                    ),
                )


def _tied_elsewhere(adapters: Sequence[Adapter]) -> Iterator[tuple[int, Refusal]]:
    """Pairs that some clients tie and others adapt one by one: their mean is not tied."""
    pairs = {pair: i for i, a in reversed(list(enumerate(adapters))) for pair in a.tied.items()}
    for (copy, one), by in pairs.items():
        for i, adapter in enumerate(adapters):
            held = {copy, one} & {*adapter.modules, *adapter.dense}
            if held and adapter.tied.get(copy) != one:
                yield (
                    i,
                    Refusal(
                        "ensure_weight_tying ties two modules in another client, not in this one",
                        adapter.name,
                        CONFIG_NAME,
                        None,
                        f"{', '.join(sorted(held))} by itself, where client "
                        f"{adapters[by].name!r} ties {copy} to {one}",
                        "tied in all clients that have them, or in none",
                        "train all of them with the same ensure_weight_tying",
                    ),
                )


def _unequal(
    adapters: Sequence[Adapter],
    shapes: Shapes,
    problem: str,
    what: str,
) -> Iterator[tuple[int, Refusal]]:
    for name, owners in shapes.items():
        usual = _usual([shape for having, shape in owners for _ in having])
        others = ((i, found) for having, found in owners if found != usual for i in having)
        for i, found in others:
            yield (
                i,
                Refusal(
                    problem,
                    adapters[i].name,
                    TENSORS_NAME,
                    PREFIX + name,
                    f"{what} {found}",
                    f"{usual} like the other clients",
                    "all clients must adapt the same base model",
                ),
            )


def _duplicates(
    adapters: Sequence[Adapter], everyone: Sequence[int]
) -> Iterator[tuple[int, Refusal]]:
    """Later adapters that are an earlier one again: by folder, by name, by bytes."""
    reported: set[int] = set()

    def again(
        key: Callable[[Adapter], Hashable], among: Sequence[int], problem: str, remedy: str
    ) -> Iterator[tuple[int, Refusal]]:
        first: dict[Hashable, int] = {}
        for i in among:
            earlier = first.setdefault(key(adapters[i]), i)
            if earlier != i and i not in reported:
                reported.add(i)
                yield (
                    i,
                    Refusal(
                        problem,
                        adapters[i].name,
                        found=f"{str(adapters[i].path)!r} after {str(adapters[earlier].path)!r}",
                        expected="each client once",
                        remedy=remedy,
                    ),
                )

    def among_alike(glance: Callable[[Adapter], Hashable]) -> Iterator[list[int]]:
        """Those that a cheap glance cannot tell apart."""
        alike = defaultdict(list)
        looked = [adapters[i] for i in everyone]
        seen = overlapped(glance, looked, any(adapter.waits for adapter in looked))
        for i, found in zip(everyone, seen, strict=True):
            alike[found].append(i)
        return (among for among in alike.values() if len(among) > 1)

    weigh = "name it once and give it a larger weight"
    for among in among_alike(_identity):
        yield from again(_resolved, among, "the folder is given twice", weigh)
    yield from again(
        lambda a: a.name,
        everyone,
        "two clients have the same name",
        "give each its own, NAME=PATH: results and messages call clients by it",
    )
    # Whole files are read only where size and end of the file agree already.
    for among in among_alike(_end):
        yield from again(_digest, among, "two clients sent the same bytes", weigh)


def _resolved(adapter: Adapter) -> Hashable:
    return adapter.path if isinstance(adapter.path, Url) else adapter.path.resolve()


def _identity(adapter: Adapter) -> Hashable:
    if isinstance(adapter.path, Url):
        return adapter.path
    status = os.stat(adapter.path)
    return status.st_dev, status.st_ino


def _end(adapter: Adapter) -> Hashable:
    size = adapter.stored.signature[0]
    with adapter.stored.whole() as file:
        file.seek(max(0, size - END))
        return size, hashlib.sha256(file.read(END)).digest()


def _digest(adapter: Adapter) -> bytes:
    digest = hashlib.sha256()
    with adapter.stored.whole() as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.digest()
