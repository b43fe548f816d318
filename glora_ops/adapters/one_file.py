"""LoRA in one file: diffusers' with a LoraConfig in its metadata, kohya's with alpha beside B, A.

Read where the file itself says what its tensors are: diffusers stores the whole LoraConfig of each
model of a pipeline since 0.34; kohya's trainers store alpha per module. Neither names modules as
PEFT does: diffusers puts the pipeline's part before them (``unet.``), kohya writes underscores for
dots, which are told apart where all words are known.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Refusal, Refusals
from ..runtime.reading import parse_json_object
from .adapter_config import LoraSettings, StoredTable, is_alpha, judge_settings
from .modules import PREFIX, Module, sort_tensors
from .safetensors_header import TensorInfo
from .stored import Stored
from .targets import Targets

__all__ = ["OneFile", "read_one_file"]

METADATA = "lora_adapter_metadata"
#: Parts of a pipeline whose modules are called by their own names; others keep the part's.
DENOISERS = ("unet", "transformer", "")  # the last: a file of one model, saved by itself
_KOHYA = {
    "lora_unet": "unet", "lora_transformer": "transformer", "lora_te": "text_encoder",
    "lora_te1": "text_encoder", "lora_te2": "text_encoder_2",
}  # fmt: skip
_SIDES = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}
#: Names with an underscore in the models that kohya's trainers adapt; words without one follow.
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks",
    "input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks",
    "joint_blocks", "to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj",
    "add_v_proj", "proj_in", "proj_out", "proj_mlp", "conv_in", "conv_out", "conv_shortcut",
    "time_emb_proj", "time_embedding", "time_embed", "label_emb", "linear_1", "linear_2",
    "in_layers", "out_layers", "emb_layers", "skip_connection", "img_attn", "txt_attn", "img_mlp",
    "txt_mlp", "img_mod", "txt_mod", "ff_context", "norm_out", "text_model", "self_attn", "q_proj",
    "k_proj", "v_proj", "out_proj", "context_embedder", "x_embedder", "time_text_embed",
    "attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "attn", "ff", "net",
    "proj", "conv1", "conv2", "conv", "encoder", "layers", "mlp", "fc1", "fc2", "op", "qkv",
    "linear1", "linear2", "modulation", "lin", "norm1",
)  # fmt: skip
_TOKEN = re.compile("|".join((*sorted(_WORDS, key=len, reverse=True), "[0-9]+")))


@dataclass(frozen=True)
class OneFile:
    """What a file holds; `problems` where it cannot be read truthfully."""

    modules: dict[str, Module]
    config: dict[str, Any]
    remark: str
    problems: list[Refusal]


def read_one_file(stored: Stored, metadata: Mapping[str, str]) -> OneFile:
    """The modules of a LoRA file with these metadata; alphas are read, factors are not."""
    if METADATA in metadata:
        return _diffusers(stored, metadata[METADATA])
    if any(key.endswith(tuple(_SIDES)) for key in stored.tensors):
        return _kohya(stored)
    problem = Refusal(
        "the file does not say what its tensors mean",
        stored.client,
        stored.path.name,
        next(iter(stored.tensors), None),
        f"{len(stored.tensors)} tensors and no LoraConfig: the scaling alpha/r is not in the file",
        f"a PEFT folder, a diffusers file with {METADATA} in its metadata, or a kohya file",
        "save it with diffusers 0.34 or newer (save_lora_weights with the adapters' metadata), or "
        "as a PEFT folder",
    )
    return OneFile({}, {}, "", [problem])


def _diffusers(stored: Stored, text: str) -> OneFile:
    try:
        config = parse_json_object(text.encode())
    except ValueError as error:
        problem = Refusal(
            "the metadata are malformed",
            stored.client,
            stored.path.name,
            None,
            str(error),
            f"one JSON object under {METADATA}",
            "save the file again",
        )
        return OneFile({}, {}, "", [problem])
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for key in stored.tensors:
        part, _, rest = ("", "", key) if "r" in config else key.partition(".")
        parts[part][PREFIX + rest] = key
    modules: dict[str, Module] = {}
    problems = Refusals()
    for part, keys in sorted(parts.items()):
        before = part + "." if part else ""
        inside = {k.removeprefix(before): v for k, v in config.items() if k.startswith(before)}
        settings, found = judge_settings({"peft_type": "LORA"} | inside, stored.client, METADATA)
        problems += found
        if settings is not None and not found:
            problems += _add(modules, part, keys, settings, stored)
    return OneFile(modules, config, _remark("a diffusers file", sorted(parts)), problems)


def _kohya(stored: Stored) -> OneFile:
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    alphas: dict[str, dict[str, float]] = defaultdict(dict)
    problems = Refusals()

    def refuse(problem: str, key: str, found: str, expected: str) -> None:
        remedy = "convert the file to a PEFT folder or diffusers file with its own trainer's script"
        problems.append(
            Refusal(problem, stored.client, stored.path.name, key, found, expected, remedy)
        )

    for key in stored.tensors:
        flat, dot, last = key.partition(".")
        prefix = next(
            (p for p in sorted(_KOHYA, key=len, reverse=True) if flat.startswith(p + "_")), ""
        )
        name = _dotted(flat.removeprefix(prefix + "_")) if prefix else None
        if name is None:
            refuse("the module's name cannot be told from its parts", key, flat,
                   f"{', '.join(_KOHYA)} before words of models that are known")  # fmt: skip
        elif dot + last in _SIDES:
            parts[_KOHYA[prefix]][PREFIX + name + _SIDES[dot + last]] = key
        elif last == "alpha" and math.prod(stored.tensors[key].shape) == 1:
            alphas[_KOHYA[prefix]][name] = float(stored.read(key)[0])
        else:
            refuse("the tensor is no part of plain LoRA", key, last,
                   "lora_down.weight, lora_up.weight and alpha")  # fmt: skip
    modules: dict[str, Module] = {}
    for part, keys in sorted(parts.items()):
        ranks: dict[str, float] = {}
        for peft_key, key in keys.items():
            name = peft_key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            if peft_key.endswith(".lora_A.weight"):
                ranks[name] = next(iter(stored.tensors[key].shape), 0)
                if not is_alpha(alphas[part].get(name)):
                    refuse("the module has no usable alpha", key, str(alphas[part].get(name)),
                           "a finite number beside its factors")  # fmt: skip
        settings = LoraSettings(
            StoredTable(ranks), StoredTable(alphas[part]), Targets((), (), True)
        )
        if not problems:
            problems += _add(modules, part, keys, settings, stored)
    return OneFile(modules, {"format": "kohya"}, _remark("a kohya file", sorted(parts)), problems)


def _dotted(flat: str) -> str | None:
    """The path that kohya flattened to `flat`; None where a word is not known."""
    words = []
    at = 0
    while at < len(flat):
        token = _TOKEN.match(flat, at)
        if token is None or (token.end() < len(flat) and flat[token.end()] != "_"):
            return None
        words.append(token[0])
        at = token.end() + 1
    return ".".join(words)


def _add(
    modules: dict[str, Module],
    part: str,
    keys: Mapping[str, str],
    settings: LoraSettings,
    stored: Stored,
) -> list[Refusal]:
    """Sort one part's tensors, under their PEFT names, into `modules`."""
    tensors: dict[str, TensorInfo] = {key: stored.tensors[own] for key, own in keys.items()}
    found, problems = sort_tensors(tensors, settings, stored.client, stored.path.name)
    before = "" if part in DENOISERS else part + "."
    for name, m in found.modules.items():
        own = replace(m, name=before + name, a_key=keys[m.a_key], b_key=keys[m.b_key])
        modules[own.name] = own
    return problems


def _remark(what: str, parts: list[str]) -> str:
    called = [
        f"{part or 'one model'} by the names of its own modules"
        if part in DENOISERS
        else f"{part} behind {part}."
        for part in parts
    ]
    return f"read as {what}, not a PEFT folder: {', '.join(called)}"
