"""Layouts as the trade writes them: merged by glora, the mean of what PEFT merges itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layout_models as models
import peft_models
import pytest
from adapter_folders import assert_names_everything, edit_config, refused
from peft_models import Base

from glora_ops import State
from glora_ops.adapters import inspect_adapter
from glora_ops.errors import Refused
from glora_ops.merge import aggregate_adapters

ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

#: Two clients of each architecture: ranks, scalings, patterns, and what they adapt differ.
FAMILIES: dict[str, tuple[Base, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        models.llama,
        {"r": 3, "target_modules": [*ATTENTION, "embed_tokens"], "alpha_pattern": {"v_proj": 2}},
        {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": [*ATTENTION, "lm_head"],
         "rank_pattern": {"layers.1.self_attn.q_proj": 4}},
    ),
    "bert": (
        peft_models.bert,
        {"r": 3, "target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"r": 2, "target_modules": ["query", "word_embeddings"], "modules_to_save": ["classifier"]},
    ),
    "gpt2": (
        peft_models.gpt2,
        {"r": 3, "target_modules": ["c_attn", "wte"], "rank_pattern": {"h.0.attn.c_attn": 2}},
        {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "t5": (
        models.t5,
        {"r": 3, "target_modules": ["q", "v"]},
        {"r": 2, "target_modules": r"decoder.*\.(q|wo)", "use_rslora": True},
    ),
    "mixtral": (
        models.mixtral,
        {"r": 2, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"],
         "target_parameters": EXPERTS, "rank_pattern": {"layers.1.mlp.experts.down_proj": 4},
         "alpha_pattern": {"gate_up_proj": 7}},
    ),
    "qwen-moe": (
        models.qwen_moe,
        {"r": 2, "target_modules": ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]},
        {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "gpt-oss": (
        models.gpt_oss,
        {"r": 2, "target_modules": "all-linear", "target_parameters": EXPERTS},
        {"r": 3, "lora_dropout": 0.0, "target_modules": r".*\.(q_proj|o_proj)",
         "target_parameters": ["router.weight", "experts.down_proj"]},
    ),
    "vision-language": (
        models.vision_language,
        {"r": 2, "target_modules": "all-linear", "modules_to_save": ["merger"]},
        {"r": 3, "target_modules": ATTENTION, "modules_to_save": ["merger"]},
    ),
    "unet": (
        models.unet,
        {"r": 2, "target_modules": ["down_blocks.0", "down_blocks.1", "to_q"]},
        {"r": 3, "use_rslora": True, "target_modules": ["down_blocks.0", "up_blocks.0"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_readout_is_the_mean_of_what_peft_merges(family: str, tmp_path: Path) -> None:
    base, *configs = FAMILIES[family]
    clients = [
        models.adapt(tmp_path / f"c{i}", base, i, **config) for i, config in enumerate(configs)
    ]
    merged(clients, tmp_path)
    models.assert_served(base, tmp_path / "r16", clients)


def test_experts_are_refused_where_nothing_tells_what_their_factors_mean(tmp_path: Path) -> None:
    both = {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    client = models.adapt(tmp_path / "both", models.mixtral, 1, **both)
    edit_config(client, target_parameters=["mlp.experts.up", "mlp.experts.down"])
    refused(client, "which parameter the factors adapt cannot be told", "experts.base_layer")
    edit_config(client, target_parameters=None)
    assert_names_everything(inspect_adapter(client)[1], "which parameter the factors adapt")
    edit_config(client, target_parameters=EXPERTS, r=3)
    refused(client, "which parameter the factors adapt cannot be told", "rank_pattern declare")


def test_a_module_that_some_adapt_and_others_save_is_refused(tmp_path: Path) -> None:
    adapted = models.adapt(tmp_path / "a", models.llama, 1, target_modules=["q_proj", "lm_head"])
    saving = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    saved = models.adapt(tmp_path / "s", models.llama, 2, **saving)
    with pytest.raises(Refused, match="adapted here and saved in full by another client"):
        aggregate_adapters([adapted, saved], rank=16)


def merged(clients: list[Path], folder: Path, rank: int = 16, **options: Any) -> State:
    """The state of `clients`, through a file, and its readout beside them."""
    aggregate_adapters(clients, rank=rank, **options).save(folder / "server.safetensors")
    state = State.load(folder / "server.safetensors")
    state.write_adapter(folder / f"r{rank}", rank)
    return state
