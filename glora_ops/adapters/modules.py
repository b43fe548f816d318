"""From tensor names and shapes to adapted modules: strict where PEFT only warns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import Refusal, Refusals
from .adapter_config import NAME_IN_FULL, LoraSettings
from .experts import MAX_EXPERTS, ORDER, owners
from .patterns import PatternError
from .safetensors_header import TensorInfo

__all__ = ["PREFIX", "DenseTensor", "Module", "Tensors", "factor_keys", "saved_by", "sort_tensors"]

PREFIX = "base_model.model."

# Tensor name of A and of B after the module's path, by family of kinds.
_SUFFIXES = {
    "lora": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}

#: What a factor may be stored in.
FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Modules whose base rows PEFT saves where the vocabulary was extended.
_EMBEDDINGS = [
    [name]
    for name in (
        "embed_tokens", "lm_head", "shared", "wte", "word_embeddings", "embed_in", "embed_out",
        "output",
    )
]  # fmt: skip

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
    kind : {"linear", "conv2d", "embedding", "parameter", "expert"}
        For "conv2d" B A is the kernel flattened to (d_out, in·kh·kw); for "embedding" it is the
        transpose of the table's update, so d_in is the vocabulary and d_out the width; the last
        two belong to ``target_parameters`` (`experts`).
    rank, d_out, d_in : int
    a_shape, b_shape : tuple of int
    a_dtype, b_dtype : torch.dtype
    a_key, b_key : str
        Names of the tensors, all as stored.
    scaling : float
        alpha/r, or alpha/√r for rsLoRA.
    fan_in_fan_out : bool
        The configuration's flag, for whoever adds ΔW to a base weight; B A is (d_out, d_in)
        either way.
    expert : (int, int)
        Its place in the stack that the tensors hold, and how many there are.
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
    a_key: str
    b_key: str
    scaling: float
    fan_in_fan_out: bool = False
    expert: tuple[int, int] = (0, 1)

    @property
    def kernel(self) -> tuple[int, ...]:
        """(kh, kw) of a convolution, () otherwise."""
        return self.a_shape[2:]

    @property
    def parameter(self) -> str:
        """Path of what it adapts, which experts share."""
        return self.name.rpartition(".")[0] if self.kind == "expert" else self.name


@dataclass(frozen=True)
class DenseTensor:
    """A weight that is stored in full under `key`, `name` being its path in the base model."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Tensors:
    """The tensors of one adapter file, by what they are for.

    `base_copies` are frozen base weights that PEFT saves beside an adapted embedding or output
    layer, or because the vocabulary was extended; they are compared, never aggregated. `tied` are
    modules and weights that ``ensure_weight_tying`` makes copies of another, by that other's name.
    """

    modules: dict[str, Module]
    dense: dict[str, DenseTensor]
    base_copies: dict[str, DenseTensor]
    tied: dict[str, str]


def sort_tensors(
    tensors: Mapping[str, TensorInfo], settings: LoraSettings, client: str | None, file: str
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
    parameters, unclear = owners(
        {
            path: (tensors[keys[0]].shape or (0,))[0]
            for (path, family), keys in found.items()
            if family == "lora" and len(keys) == 2
        },
        settings,
    )
    for (path, family), keys in found.items():
        if ".base_layer." in path:
            refuse(
                "the module lies inside another adapted module",
                next(iter(keys.values())),
                "a layer of a MultiheadAttention, whose update PEFT applies once or twice "
                "depending on its version (huggingface/peft#3774)",
                "modules adapted by themselves",
                "adapt separate linear layers instead",
            )
        elif path in unclear:
            refuse(
                "which parameter the factors adapt cannot be told",
                keys[0],
                f"target_parameters with {', '.join(unclear[path]) or 'none of this module'}",
                f"one order in which PEFT nests them, of {', '.join(ORDER)} where there are "
                "several, with ranks as r and rank_pattern declare",
                "name each with its module in target_parameters (mlp.experts.down_proj), or send "
                "the configuration that belongs to these tensors",
            )
        elif len(keys) < 2:
            side, key = next(iter(keys.items()))
            other = PREFIX + path + _SUFFIXES[family][1 - side]
            refuse("half of a factor pair is missing", key, f"no {other!r}", "both", _GATHER)
        elif path in modules:
            refuse("the module has two factor pairs", keys[0], family, "one pair", _GATHER)
        else:
            pair = {side: (key, tensors[key]) for side, key in keys.items()}
            read = _module(path, family, pair, parameters.get(path), settings)
            if isinstance(read, list):
                modules |= {module.name: module for module in read}
            else:
                side, problem, value, expected, remedy = read
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
    others: list[DenseTensor] = []
    homeless: dict[tuple[str, str], list[str]] = defaultdict(list)
    adapted = {path for path, _ in found}
    for key in rest:
        name = key.removeprefix(PREFIX)
        owner, _, copied = name.rpartition(".base_layer.")
        tensor = DenseTensor(name, key, tensors[key].shape, tensors[key].dtype)
        if key.startswith(PREFIX) and copied in ("weight", "bias") and owner in adapted:
            base_copies[name] = tensor
        elif key.startswith(PREFIX) and saved_by(name, settings.modules_to_save):
            dense[name] = tensor
        else:
            others.append(tensor)
    tied = _tied(modules, dense, others, settings)
    for tensor in others:
        if tensor.name in tied:
            dense[tensor.name] = tensor
        elif tensor.key.startswith(PREFIX) and tensor.name.split(".")[-2:-1] in _EMBEDDINGS:
            base_copies[tensor.name] = tensor
        else:
            homeless[_why_homeless(tensor.key)].append(tensor.key)
    empty = [t for t in (*dense.values(), *base_copies.values()) if 0 in t.shape]
    if empty:
        refuse(
            "a weight saved in full is empty",
            empty[0].key,
            f"{len(empty)} such tensors, this one of shape {empty[0].shape}",
            "sizes above 0",
            _GATHER,
        )
    for (problem, remedy), names in homeless.items():
        refuse(
            problem,
            names[0],
            f"{len(names)} such tensors",
            "factor pairs and modules_to_save only",
            remedy,
        )
    return Tensors(modules, dense, base_copies, tied), problems


def _tied(
    modules: Mapping[str, Module],
    dense: Mapping[str, DenseTensor],
    others: Iterable[DenseTensor],
    settings: LoraSettings,
) -> dict[str, str]:
    """What ``ensure_weight_tying`` makes PEFT store once more without naming it, by shapes."""
    if not settings.ensure_weight_tying:
        return {}
    embeddings = {
        (m.d_in, m.d_out, m.rank): m.name for m in modules.values() if m.kind == "embedding"
    }
    tied = {
        copy.name: embeddings[copy.d_out, copy.d_in, copy.rank]
        for copy in modules.values()
        if copy.kind == "linear"
        and (copy.d_out, copy.d_in, copy.rank) in embeddings
        and settings.targets.selects(copy.name) is not True
    }
    saved = {tensor.shape: tensor.name for tensor in dense.values()}
    return tied | {copy.name: saved[copy.shape] for copy in others if copy.shape in saved}


def saved_by(tensor: str, modules_to_save: Iterable[str]) -> list[str]:
    """The entries of modules_to_save that cover `tensor`; PEFT compares ends of module paths."""
    return [m for m in modules_to_save if m + "." in tensor]


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
    name: str,
    family: str,
    pair: Mapping[int, tuple[str, TensorInfo]],
    parameter: str | None,
    settings: LoraSettings,
) -> list[Module] | tuple[int, str, str, str, str]:
    """The module, or the experts of `parameter`; or (side, problem, found, expected, remedy)."""
    (a_key, a), (b_key, b) = pair[0], pair[1]
    conv = family == "lora" and len(a.shape) == 4
    form = (
        "(r, in, kh, kw)" if conv else "(r, vocabulary)" if family == "embedding" else "(r, d_in)"
    )
    if (len(a.shape) != 2 and not conv) or 0 in a.shape:
        ungathered = 0 in a.shape or len(a.shape) < 3
        remedy = _GATHER if ungathered else "adapt linear, Conv2d and embedding layers only"
        return 0, "A is misshapen", str(a.shape), f"{form}, none of them 0", remedy
    rows = a.shape[0]
    b_form = f"(d_out, {rows}, 1, 1)" if conv else f"(d_out, {rows})"
    if len(b.shape) != len(a.shape) or 0 in b.shape or b.shape[1:] != (rows,) + (1,) * 2 * conv:
        whole = conv and len(b.shape) == 4 and 0 not in b.shape
        remedy = "leave grouped convolutions out of target_modules" if whole else _GATHER
        return 1, "B does not fit A", str(b.shape), b_form, remedy
    for side, info in ((0, a), (1, b)):
        if info.dtype not in FACTOR_DTYPES:
            return (
                side,
                "factors of this dtype are not computed with",
                str(info.dtype),
                ", ".join(map(str, FACTOR_DTYPES)),
                "save the adapter in bfloat16 or float32",
            )
    path = parameter or name
    try:
        declared = settings.ranks[path]
        experts = int(rows // declared) if parameter else 1  # `owners` saw that it divides
        rank = rows // experts
        scaling = settings.scaling(path, rank)
    except PatternError as error:
        return (
            0,
            "rank_pattern and alpha_pattern take too long to follow",
            str(error),
            "fewer or simpler patterns, or shorter names",
            NAME_IN_FULL,
        )
    if rank > b.shape[0] + math.prod(a.shape[1:]):
        return (
            0,
            "the rank is larger than the layer",
            f"{rank} for {b.shape[0]} × {math.prod(a.shape[1:])}",
            "at most the sum of both sides",
            "a smaller r: no update of this layer needs more than its smaller side",
        )
    if rank != declared:
        return (
            0,
            "the rank is not the one declared",
            f"{rank}",
            f"{declared} by r and rank_pattern in adapter_config.json",
            "send the configuration that belongs to these tensors",
        )
    if experts > MAX_EXPERTS:
        return (
            0,
            "the stack holds too many experts",
            f"{experts}, {rows} rows at rank {rank}",
            f"at most {MAX_EXPERTS}",
            "send the configuration that belongs to these tensors",
        )
    kind = "conv2d" if conv else "embedding" if family == "embedding" else "linear"
    module = Module(
        name=path,
        kind=kind if parameter is None else "parameter" if experts == 1 else "expert",
        rank=rank,
        d_out=b.shape[0],
        d_in=math.prod(a.shape[1:]),
        a_shape=(rank, *a.shape[1:]),
        b_shape=(b.shape[0], rank, *b.shape[2:]),
        a_dtype=a.dtype,
        b_dtype=b.dtype,
        a_key=a_key,
        b_key=b_key,
        scaling=scaling,
        fan_in_fan_out=settings.fan_in_fan_out and kind == "linear",
    )
    if experts == 1:
        return [module]
    return [replace(module, name=f"{path}.{e}", expert=(e, experts)) for e in range(experts)]


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
