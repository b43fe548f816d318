"""Tiny models adapted, trained for a few steps and saved by PEFT itself: the truth for adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    logging,
)

logging.set_verbosity_error()

Base = Callable[[], nn.Module]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


class Mixed(nn.Module):
    """A layer of every kind: an embedding, a convolution, two linear layers under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 12)
        self.conv = nn.Conv2d(3, 6, (3, 2))
        self.first = nn.Linear(12, 10)
        self.block = nn.ModuleDict({"first": nn.Linear(10, 7), "last": nn.Linear(7, 5)})
        self.head = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embed_tokens(tokens))  # [b, 8, 10]
        image = x.flatten(1)[:, :60].reshape(-1, 3, 5, 4)
        x = x.mean(1) + self.conv(image).mean((1, 2, 3))[:, None]
        return self.head(self.block["last"](self.block["first"](x).relu()))


def mixed() -> nn.Module:
    return _seeded(Mixed)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.mha(x, x, x)[0]


def attention() -> nn.Module:
    return _seeded(Attention)


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=13, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=13,
        max_position_embeddings=8,
    )
    return _seeded(lambda: BertForSequenceClassification(config))


def save_client(
    folder: Path,
    base: Base,
    *,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> Path:
    """Adapt `base` as `config` says, take a few optimiser steps, save with PEFT."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(), LoraConfig(**config))
        trained = [p for p in model.parameters() if p.requires_grad]
        # B or A starts at zero; a large random start makes every factor matter.
        for parameter in trained:
            parameter.data += 0.3 * torch.randn_like(parameter)
        optimiser = torch.optim.Adam(trained, lr=0.02)
        for _ in range(3):
            out = model(torch.randint(0, 13, (4, 8)))
            loss = (out if isinstance(out, Tensor) else out.logits).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(str(folder))
    return folder


def load(base: Base, folder: Path) -> PeftModel:
    """The saved adapter on its base, in float64, by PEFT, which only warns of missing keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing")
        return PeftModel.from_pretrained(base(), str(folder)).double()


def merged_update(base: Base, model: PeftModel) -> dict[str, Tensor]:
    """PEFT's merged weights minus the base's, for every weight that moved. Consumes `model`."""
    before = base().double().state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with .tie_word_embeddings")
        after = model.merge_and_unload().state_dict()
    return {
        name: after[name] - before[name]
        for name in before
        if not torch.equal(after[name], before[name])
    }


def peft_update(base: Base, folder: Path) -> dict[str, Tensor]:
    return merged_update(base, load(base, folder))
