"""From tensor names and shapes to adapted modules: strict where PEFT only warns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import Refusal, Refusals
from .config import NAME_IN_FULL, LoraSettings
from .patterns import PatternError
from .safetensors_header import TensorInfo

__all__ = ["PREFIX", "DenseTensor", "Module", "Tensors", "factor_keys", "saved_by", "sort_tensors"]

PREFIX = "base_model.model."

# Tensor name of A and of B after the module's path, by family of kinds.
_SUFFIXES = {
    "lora": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}

_GATHER = "save the adapter again; with DeepSpeed or FSDP gather the shards first"


def factor_keys(module: str, kind: str) -> tuple[str, str]:
    """Names under which a PEFT file stores A and B of `module`."""
    a, b = _SUFFIXES["embedding" if kind == "embedding" else "lora"]
    return PREFIX + module + a, PREFIX + module + b


@dataclass(frozen=True)
class Module:
    """One adapted module of an adapter; its update is ΔW = scaling · B A.

    Attributes
    ----------
    name : str
        Path in the base model, e.g. ``"encoder.layer.0.attention.self.query"``.
    kind : {"linear", "conv2d", "embedding"}
        For "conv2d" B A is the kernel flattened to (d_out, in·kh·kw); for "embedding" it is the
        transpose of the table's update, so d_in is the vocabulary and d_out the width.
    rank, d_out, d_in : int
    a_shape, b_shape : tuple of int
    a_dtype, b_dtype : torch.dtype
        As stored.
    scaling : float
        alpha/r, or alpha/√r for rsLoRA.
    fan_in_fan_out : bool
        The configuration's flag, for whoever adds ΔW to a base weight; B A is (d_out, d_in)
        either way.
    """

    name: str
    kind: str
    rank: int
    d_out: int
    d_in: int
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    scaling: float
    fan_in_fan_out: bool

    @property
    def kernel(self) -> tuple[int, ...]:
        """(kh, kw) of a convolution, () otherwise."""
        return self.a_shape[2:]


@dataclass(frozen=True)
class DenseTensor:
    """A weight that is stored in full, `name` being its path in the base model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Tensors:
    """The tensors of one adapter file, by what they are for.

    `base_copies` are frozen base weights that PEFT saves beside an adapted embedding or output
    layer; they are compared, never aggregated.
    """

    modules: dict[str, Module]
    dense: dict[str, DenseTensor]
    base_copies: dict[str, DenseTensor]


def sort_tensors(
    tensors: Mapping[str, TensorInfo], settings: LoraSettings, client: str, file: str
) -> tuple[Tensors, list[Refusal]]:
    """Sort the tensors of an adapter file into modules and dense weights.

    Every tensor has to belong somewhere: what has no place is refused, one refusal per reason.
    """
    found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    rest = []
    for key in sorted(tensors):
        place = _factor_place(key)
        if place is None:
            rest.append(key)
        else:
            path, family, side = place
            found[path, family][side] = key

    def refuse(problem: str, key: str | None, found: str, expected: str, remedy: str) -> None:
        problems.append(Refusal(problem, client, file, key, found, expected, remedy))

    problems = Refusals()
    modules: dict[str, Module] = {}
    for (path, family), keys in found.items():
        if ".base_layer." in path:
            refuse(
                "the module lies inside another adapted module",
                next(iter(keys.values())),
                "a layer of a MultiheadAttention, whose update PEFT applies once or twice "
                "depending on its version (huggingface/peft#3774), or stacked parameters",
                "modules adapted by themselves",
                "adapt separate linear layers instead",
            )
        elif len(keys) < 2:
            side, key = next(iter(keys.items()))
            other = PREFIX + path + _SUFFIXES[family][1 - side]
            refuse("half of a factor pair is missing", key, f"no {other!r}", "both", _GATHER)
        elif path in modules:
            refuse("the module has two factor pairs", keys[0], family, "one pair", _GATHER)
        else:
            module = _module(path, family, tensors[keys[0]], tensors[keys[1]], settings)
            if isinstance(module, Module):
                modules[path] = module
            else:
                side, problem, value, expected, remedy = module
                refuse(problem, keys[side], value, expected, remedy)
    if not found:
        refuse(
            "the file holds no LoRA factors",
            None,
            f"{len(tensors)} tensors",
            f"names {PREFIX}<module>.lora_A.weight and .lora_B.weight",
            "save the adapter with PeftModel.save_pretrained",
        )

    dense: dict[str, DenseTensor] = {}
    base_copies: dict[str, DenseTensor] = {}
    homeless: dict[tuple[str, str], list[str]] = defaultdict(list)
    adapted = {path for path, _ in found}
    for key in rest:
        name = key.removeprefix(PREFIX)
        owner, _, copied = name.rpartition(".base_layer.")
        tensor = DenseTensor(name, tensors[key].shape, tensors[key].dtype)
        if key.startswith(PREFIX) and copied in ("weight", "bias") and owner in adapted:
            base_copies[name] = tensor
        elif key.startswith(PREFIX) and saved_by(name, settings.modules_to_save):
            dense[name] = tensor
        else:
            homeless[_why_homeless(key)].append(key)
    for (problem, remedy), names in homeless.items():
        refuse(
            problem,
            names[0],
            f"{len(names)} such tensors",
            "factor pairs and modules_to_save only",
            remedy,
        )
    return Tensors(modules, dense, base_copies), problems


def saved_by(tensor: str, modules_to_save: Iterable[str]) -> list[str]:
    """The entries of modules_to_save that cover `tensor`; PEFT compares ends of module paths."""
    path = tensor.split(".")
    owners = [".".join(path[:i]) for i in range(1, len(path))]
    return [m for m in modules_to_save if any(owner.endswith(m) for owner in owners)]


def _factor_place(key: str) -> tuple[str, str, int] | None:
    """(module, family, 0 for A or 1 for B) of a factor's tensor name, None for any other name."""
    if key.startswith(PREFIX):
        for family, suffixes in _SUFFIXES.items():
            for side, suffix in enumerate(suffixes):
                module = key[len(PREFIX) :].removesuffix(suffix)
                if key.endswith(suffix) and module:
                    return module, family, side
    return None


def _module(
    name: str, family: str, a: TensorInfo, b: TensorInfo, settings: LoraSettings
) -> Module | tuple[int, str, str, str, str]:
    """The module, or (side, problem, found, expected, remedy)."""
    conv = family == "lora" and len(a.shape) == 4
    form = (
        "(r, in, kh, kw)" if conv else "(r, vocabulary)" if family == "embedding" else "(r, d_in)"
    )
    if (len(a.shape) != 2 and not conv) or 0 in a.shape:
        remedy = _GATHER if len(a.shape) < 3 else "adapt linear, Conv2d and embedding layers only"
        return 0, "A is misshapen", str(a.shape), f"{form}, none of them 0", remedy
    rank = a.shape[0]
    b_form = f"(d_out, {rank}, 1, 1)" if conv else f"(d_out, {rank})"
    if len(b.shape) != len(a.shape) or 0 in b.shape or b.shape[1:] != (rank,) + (1,) * 2 * conv:
        remedy = "leave grouped convolutions out of target_modules" if conv else _GATHER
        return 1, "B does not fit A", str(b.shape), b_form, remedy
    if rank > b.shape[0] + math.prod(a.shape[1:]):
        return (
            0,
            "the rank is larger than the layer",
            f"{rank} for {b.shape[0]} × {math.prod(a.shape[1:])}",
            "at most the sum of both sides",
            "a smaller r: no update of this layer needs more than its smaller side",
        )
    try:
        declared, scaling = settings.ranks[name], settings.scaling(name, rank)
    except PatternError as error:
        return (
            0,
            "rank_pattern and alpha_pattern take too long to follow",
            str(error),
            "fewer or simpler patterns, or shorter names",
            NAME_IN_FULL,
        )
    if rank != declared:
        return (
            0,
            "the rank is not the one declared",
            f"{rank}",
            f"{declared} by r and rank_pattern in adapter_config.json",
            "send the configuration that belongs to these tensors",
        )
    return Module(
        name=name,
        kind="conv2d" if conv else "embedding" if family == "embedding" else "linear",
        rank=rank,
        d_out=b.shape[0],
        d_in=math.prod(a.shape[1:]),
        a_shape=a.shape,
        b_shape=b.shape,
        a_dtype=a.dtype,
        b_dtype=b.dtype,
        scaling=scaling,
        fan_in_fan_out=settings.fan_in_fan_out and family == "lora" and not conv,
    )


def _why_homeless(key: str) -> tuple[str, str]:
    """(problem, remedy) for a tensor that is neither a factor nor a saved module's."""
    leave = "train plain LoRA or leave this client out"
    if "lora_magnitude_vector" in key:
        return "DoRA's magnitude vector: the update is not linear in B·A", leave
    if key.endswith(".lora_B.bias"):
        return "a trained lora_bias", leave
    if ".lora_" in key:
        return "no PEFT name of a LoRA factor", "save the adapter with PeftModel.save_pretrained"
    return (
        "the tensor belongs to no adapted module and to none of modules_to_save",
        "save with save_embedding_layers=False, or name its module in modules_to_save",
    )
