"""An adapter added to its base model's weights, file by file: the merged model as a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.modules import Module
from ..adapters.read import Adapter, read_adapter
from ..adapters.safetensors_header import read_header
from ..adapters.stored import Stored, signature
from ..adapters.value_checks import check_values
from ..errors import Refusal, Refusals, Refused, require
from ..packing import FLOATS
from ..runtime.marks import digests, unchanged
from ..runtime.outputs import apart, check_free, claimed, new_folder
from ..runtime.reading import read_json_object
from ..runtime.tensors import read_mark, save_tensors

__all__ = ["Applied", "apply_adapter"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
#: Key in the metadata of the weights: digests of the files beside them.
MARK = "glora_applied"
#: Endings of files that hold weights in another form: not copied, for they would be the old ones.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
MAX_BYTES = 2**40  # of a base model's file; why: hubs split long before


@dataclass(frozen=True)
class Applied:
    """What was written: the folder, the base's tensors that are others now, and what to know."""

    folder: Path
    changed: tuple[str, ...]
    tensors: int
    notes: tuple[str, ...]


def apply_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Applied:
    """Add an adapter's ΔW = s·B·A to the weights of its base model, and write the whole model.

    Parameters
    ----------
    adapter : path
        A PEFT LoRA folder. Modules saved in full take the place of the base's.
    base : path
        A folder as ``save_pretrained`` of transformers writes it: ``model.safetensors``, or several
        files and ``model.safetensors.index.json``.
    folder : path
        Of the merged model: weights in files of the base's names, its index, configuration and
        tokenizer. It appears in one step.
    dtype : torch.dtype, optional
        Of all floating weights as they are written; by default each keeps the base's.
    overwrite : bool
        Replace an existing folder that this function wrote and nobody changed.
    dry_run : bool
        Compare names and shapes, and stop there: nothing is read but headers, nothing is written.

    Returns
    -------
    Applied
        With `dry_run` what would be.

    Raises
    ------
    Refused
        Everything in which adapter and base do not fit, at once, before any weight is read.
    GloraError
        Files that cannot be used, weights that are not finite in their dtype.

    Notes
    -----
    Memory is one file of the base. Sums are computed in fp32 (fp64 for fp64) and rounded once. A
    square weight is taken as (d_out, d_in) unless the adapter's ``fan_in_fan_out`` is set.
    """
    source = Path(base)
    apart(folder, [source, adapter])
    final = Path(folder).resolve()
    check_free(final, strangers, overwrite=overwrite)
    found = read_adapter(adapter)
    files = _files(source)
    plan = _plan(found, files, source)
    count = sum(len(stored.tensors) for stored in files.values())
    applied = Applied(Path(folder), tuple(sorted(plan)), count, tuple(_notes(plan)))
    if dry_run:
        return applied
    problems = check_values(found)
    if problems:
        raise Refused(problems)

    texts = _texts(source, dtype)
    mark = json.dumps(digests(texts))
    with ExitStack() as held:
        held.enter_context(claimed(final, strangers))
        building = held.enter_context(new_folder(final, strangers, overwrite=overwrite))
        for name, stored in files.items():
            tensors = dict(zip(stored.tensors, stored.read(*stored.tensors), strict=True))
            for key in tensors.keys() & plan.keys():
                tensors[key] = _merged(tensors[key], found, plan[key])
            for key, tensor in tensors.items():
                if dtype is not None and tensor.dtype in FLOATS:
                    tensors[key] = tensor.to(dtype)
                finite = key not in plan or bool(torch.isfinite(tensors[key]).all())
                require(finite, key, f"values beyond {tensors[key].dtype}", "finite ones",
                        "another dtype (--dtype)")  # fmt: skip
            save_tensors(tensors, building / name, {"format": "pt", MARK: mark})
        for name, content in texts.items():
            (building / name).write_bytes(content)
    return applied


def _notes(plan: Mapping[str, Module | str]) -> Iterator[str]:
    for key, change in sorted(plan.items()):
        if isinstance(change, Module) and change.kind == "embedding":
            yield (
                f"{key} changed: an output layer that the base ties to it changes with it, as "
                "when PEFT merges, but not when it adapts"
            )


def strangers(folder: Path) -> list[str]:
    """What in a folder `apply_adapter` did not write, or somebody has changed since, by name."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    entries = sorted(folder.iterdir())
    weights = {e.name: read_mark(e, MARK) for e in entries if e.suffix == ".safetensors"}
    mark = next((found for found in weights.values() if found is not None), {})

    def is_own(entry: Path) -> bool:
        if entry.name in weights:
            return weights[entry.name] is not None
        return unchanged(entry, mark)

    return [entry.name for entry in entries if not is_own(entry)]


def _files(base: Path) -> dict[str, Stored]:
    """The files with the base's weights, by name, their headers checked."""
    names = [WEIGHTS_NAME]
    if (base / INDEX_NAME).is_file():
        index = read_json_object(base / INDEX_NAME, "base")
        places = index.get("weight_map")
        listed = isinstance(places, dict) and all(isinstance(v, str) for v in places.values())
        require(bool(places) and listed, "base", INDEX_NAME, "a weight_map of file names",
                file=str(base / INDEX_NAME))  # fmt: skip
        names = sorted(set(places.values()))  # type: ignore[union-attr]  # `require` has seen to it
    refusals = Refusals()
    files: dict[str, Stored] = {}
    for name in names:
        place = base / name
        if Path(name).name != name or not place.is_file():
            refusals.append(
                Refusal(
                    "a file of the base model is missing",
                    file=str(place),
                    found="no such file",
                    expected=f"{WEIGHTS_NAME}, or the files that {INDEX_NAME} names",
                    remedy="give the folder that save_pretrained wrote; an adapter's is not it",
                )
            )
            continue
        seen = signature(place.stat())
        header, problems = read_header(place, None, max_bytes=MAX_BYTES)
        refusals += problems
        if header is not None:
            files[name] = Stored(place, None, header.tensors, seen)
    if refusals:
        raise Refused(refusals)
    return files


def _plan(adapter: Adapter, files: Mapping[str, Stored], base: Path) -> dict[str, Module | str]:
    """By tensor of the base what changes it: a module, or a weight saved in full by its name."""
    there = {key: info for stored in files.values() for key, info in stored.tensors.items()}
    plan: dict[str, Module | str] = {}
    refusals = Refusals()

    def refuse(problem: str, tensor: str, found: str, expected: str, remedy: str) -> None:
        refusals.append(Refusal(problem, adapter.name, str(base), tensor, found, expected, remedy))

    for name, module in adapter.modules.items():
        key = _called(f"{name}.weight", there)
        if module.kind in ("parameter", "expert"):
            refuse(
                "parameters such as experts are not applied",
                name,
                module.kind,
                "linear layers, convolutions and embeddings",
                "merge it with PEFT",
            )
        elif key is None and name in adapter.tied:
            continue  # stored once, and changed there
        elif key is None:
            refuse(
                "the base has no such weight",
                name,
                "none, or several that end alike",
                f"{name}.weight",
                "give the adapter's own base; of tied weights only one is stored",
            )
        elif _turned(module, there[key].shape) is None or there[key].dtype not in FLOATS:
            refuse(
                "the base's weight has another form",
                key,
                f"{there[key].dtype} {there[key].shape}",
                f"floats of {module.d_out} × {module.d_in}",
                "give the adapter's own base",
            )
        else:
            plan[key] = module
    for name, dense in adapter.dense.items():
        key = _called(name, there)
        if key is None or there[key].shape != dense.shape:
            refuse("a weight saved in full has no place in the base", name,
                   "none" if key is None else str(there[key].shape), str(dense.shape),
                   "give a base with this head, or merge it with PEFT")  # fmt: skip
        else:
            plan[key] = name
    if refusals:
        raise Refused(refusals)
    return plan


def _called(name: str, there: Mapping[str, Any]) -> str | None:
    """The base's name for a weight: with or without the model's own prefix."""
    if name in there:
        return name
    short = name.partition(".")[2]
    if short in there:
        return short
    longer = [key for key in there if key.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _turned(module: Module, shape: tuple[int, ...]) -> bool | None:
    """Whether the base's weight is (d_in, d_out); None where it is neither that nor the other."""
    plain, turned = (module.d_out, module.d_in), (module.d_in, module.d_out)
    if module.kind == "conv2d":
        fits = len(shape) == 4 and (shape[0], shape[1] * shape[2] * shape[3]) == plain
        return False if fits else None
    if module.kind == "embedding":
        return True if shape == turned else None
    if shape == plain == turned:
        return module.fan_in_fan_out
    return False if shape == plain else True if shape == turned else None


def _merged(weight: Tensor, adapter: Adapter, change: Module | str) -> Tensor:
    """A weight of the base with what changes it, in its own dtype."""
    if isinstance(change, str):
        return adapter.dense_tensor(change).to(weight.dtype)
    b, a = adapter.factors(change.name)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, right = b.to(dtype), a.to(dtype)
    if _turned(change, tuple(weight.shape)):
        left, right = right.mT, left.mT
    flat = weight.to(dtype).reshape(left.shape[0], right.shape[1])
    return flat.addmm_(left, right, alpha=change.scaling).view(weight.shape).to(weight.dtype)


def _texts(base: Path, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The files that belong to the model beside its weights, as they are to be written."""
    texts = {entry.name: entry.read_bytes() for entry in _beside(base)}
    if dtype is not None and CONFIG_NAME in texts:
        config = read_json_object(base / CONFIG_NAME, "base")
        named = {key: str(dtype).removeprefix("torch.") for key in ("torch_dtype", "dtype")}
        config |= {key: name for key, name in named.items() if key in config}
        texts[CONFIG_NAME] = json.dumps(config, indent=2).encode()
    return texts


def _beside(base: Path) -> Iterator[Path]:
    for entry in sorted(base.iterdir()):
        other = entry.suffix in OTHER_WEIGHTS or entry.name.endswith(".index.json")
        if (
            entry.is_file()
            and not entry.name.startswith(".")
            and (not other or entry.name == INDEX_NAME)
        ):
            yield entry
