"""Tiny models of the architectures people adapt, and what a readout of their adapters must be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import Base, _seeded, peft_update
from torch import Tensor, nn

TEXT = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def llama(tied: bool = False, vocabulary: int = 48) -> nn.Module:
    config = hf.LlamaConfig(**TEXT | {"vocab_size": vocabulary}, tie_word_embeddings=tied)
    return _seeded(lambda: hf.LlamaForCausalLM(config))


def mixtral() -> nn.Module:
    return _seeded(lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4)))


def qwen_moe() -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **TEXT, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2
    )
    return _seeded(lambda: hf.Qwen3MoeForCausalLM(config))


def gpt_oss() -> nn.Module:
    return _seeded(lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, num_local_experts=4)))


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _seeded(lambda: hf.T5ForConditionalGeneration(config))


def vision_language() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = hf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "eos_token_id": 1},
        vision_config=vision | {"out_hidden_size": 32},
    )
    return _seeded(lambda: hf.Qwen2_5_VLForConditionalGeneration(config))


class UNet(nn.Module):
    """Convolutions down and up with attention between, and a normalisation that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (1, 3))])
        self.up_blocks = nn.ModuleList([nn.Conv2d(8, 4, 1)])
        self.norm = nn.BatchNorm2d(8)
        self.to_q = nn.Linear(8, 8)


def unet() -> nn.Module:
    return _seeded(UNet)


class Towers(nn.Module):
    """Layers whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(24))
        self.tower = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(24))}
        )
        self.single_layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)})])


def towers() -> nn.Module:
    return _seeded(Towers)


def numbered() -> nn.Module:
    """Two encoders side by side."""
    return _seeded(
        lambda: nn.ModuleDict(
            {
                f"encoder_{i}": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
                for i in (1, 2)
            }
        )
    )


def adapt(folder: Path, base: Base, seed: int, **config: Any) -> Path:
    """A client of `base`: every trainable number moved by seeded noise, saved by PEFT."""
    saved = config.pop("saved", {})
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = base()
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(**config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(str(folder), **saved)
    path = folder / "adapter_config.json"
    named = json.loads(path.read_text()) | {"base_model_name_or_path": "tiny/base"}
    path.write_text(json.dumps(named))
    return folder


def opened(base: Base, folder: Path) -> tuple[set[str], set[str]]:
    """What PEFT would train on, and what it warns of, when it loads `folder`."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(), str(folder), is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return trained, {str(w.message).partition("\n")[0] for w in seen}


def assert_mean(
    base: Base, readout: Path, clients: Sequence[Path], weights: Sequence[float] = ()
) -> None:
    """PEFT's merged weights of `readout` are the mean of its clients', to 1e-5."""
    found = peft_update(base, readout)
    updates = [peft_update(base, client) for client in clients]
    assert set(found) == {name for update in updates for name in update}
    for name, update in found.items():
        mean = torch.zeros_like(update, dtype=torch.float64)
        for weight, one in zip(weights or [1.0] * len(clients), updates, strict=True):
            mean += weight / (sum(weights) or len(clients)) * one.get(name, Tensor([0.0]))
        assert (update - mean).norm() <= 1e-5 * mean.norm(), name


def assert_served(base: Base, readout: Path, clients: Sequence[Path]) -> None:
    """`assert_mean`; and PEFT loads `readout` as silently as its clients, and trains the same."""
    assert_mean(base, readout, clients)
    trained, said = opened(base, readout)
    loaded = [opened(base, client) for client in clients]
    assert trained == set().union(*(names for names, _ in loaded))
    assert said <= set().union(*(warned for _, warned in loaded))
