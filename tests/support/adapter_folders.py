"""Adapter folders for the tests: saved by PEFT, spoilt on purpose, refused in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_ops.adapters import Adapter, inspect_adapter, read_adapter
from glora_ops.errors import Refusal, Refused

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TARGETS = ["embed_tokens", "conv", "first", "last"]

CLIENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (models.mixed, {"r": 4, "target_modules": TARGETS}),
    "alpha": (models.mixed, {"r": 4, "lora_alpha": 11, "target_modules": TARGETS}),
    "negative-alpha": (models.mixed, {"r": 2, "lora_alpha": -3, "target_modules": ["first"]}),
    "rslora": (
        models.mixed,
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": TARGETS},
    ),
    "patterns": (
        models.mixed,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": TARGETS,
            # The first pattern that matches decides, and "first" matches "block.first" too.
            "rank_pattern": {r"block\..*": 2, "first": 5, "^conv$": 1},
            "alpha_pattern": {"first": 7, r"block\.(first|last)": 9, "embed_tokens": 2},
        },
    ),
    "rslora-patterns": (
        models.mixed,
        {
            "r": 3,
            "use_rslora": True,
            "target_modules": TARGETS,
            "rank_pattern": {"conv": 2},
            "alpha_pattern": {"last": 1.5},
        },
    ),
    "conv": (models.mixed, {"r": 3, "lora_alpha": 5, "target_modules": ["conv", "last"]}),
    "saved-head": (
        models.mixed,
        {"r": 2, "target_modules": ["first"], "modules_to_save": ["head"]},
    ),
    "bf16": (
        models.mixed,
        {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "dtype": torch.bfloat16},
    ),
    "gpt2": (
        models.gpt2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"},
    ),
    "gpt2-embedding": (
        models.gpt2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "wte"], "task_type": "CAUSAL_LM"},
    ),
    "bert-head": (
        models.bert,
        {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "orthogonal": (
        models.mixed,
        {"r": 2, "target_modules": ["first"], "init_lora_weights": "orthogonal"},
    ),
}


def in_base_form(adapter: Adapter, name: str, update: Tensor, like: Tensor) -> Tensor:
    """ΔW (d_out, d_in) as PEFT adds it to a base weight shaped as `like`."""
    transposed = adapter.modules[name].kind == "embedding" or adapter.modules[name].fan_in_fan_out
    return (update.mT if transposed else update).reshape(like.shape)


def weight_name(module: str) -> str:
    return module + ".weight"


def updates(adapter: Adapter) -> dict[str, Tensor]:
    result = {}
    for name, module in adapter.modules.items():
        b, a = adapter.factors(name)
        result[name] = module.scaling * (b.double() @ a.double())
    return result


def assert_same_update(adapter: Adapter, truth: dict[str, Tensor]) -> None:
    ours = updates(adapter)
    seen = set()
    for name, update in ours.items():
        expected = truth[weight_name(name)]
        seen.add(weight_name(name))
        got = in_base_form(adapter, name, update, expected)
        assert torch.linalg.norm(got - expected) <= 1e-12 * torch.linalg.norm(expected), name
    dense = {name for name in truth if name not in seen}
    assert dense == adapter.dense.keys()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    save_file(tensors, folder / TENSORS)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def assert_names_everything(refusals: list[Refusal], *needles: str) -> None:
    """One of the refusals says all of `needles`, and each has a value, expectation and remedy."""
    for refusal in refusals:
        assert refusal.found, refusal
        assert refusal.expected, refusal
        assert refusal.remedy, refusal
    texts = [str(refusal) for refusal in refusals]
    assert any(all(needle in text for needle in needles) for text in texts), texts


def refused(folder: Path, *needles: str, **options: Any) -> list[Refusal]:
    before = tree(folder.parent)
    adapter, refusals = inspect_adapter(folder, **options)
    assert adapter is None
    assert_names_everything(refusals, *needles)
    assert all(refusal.client == folder.name for refusal in refusals)
    with pytest.raises(Refused) as caught:
        read_adapter(folder, **options)
    assert list(caught.value.refusals) == refusals
    assert tree(folder.parent) == before
    return refusals


FIRST_A = "base_model.model.first.lora_A.weight"
FIRST_B = "base_model.model.first.lora_B.weight"
