"""Eight clients: who holds which digits, what each one trains, and a random gauge on what it sends.

A client's folder is what PEFT writes (`adapter_model.safetensors`, `adapter_config.json`) and a
`glora.json` with the number of its examples.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_ops.fl.tasks.digits import DigitTransformer, Part, fit


@dataclass(frozen=True)
class Client:
    name: str
    rank: int
    alpha: int


# Ranks 2 … 16, and two habits of setting alpha: the scaling alpha/r is 2 or 1.
CLIENTS = tuple(
    Client(f"client{i}-r{rank}", rank, alpha)
    for i, (rank, alpha) in enumerate(
        [(2, 4), (2, 2), (4, 8), (4, 4), (8, 16), (8, 8), (16, 32), (16, 16)]
    )
)
MAX_RANK = max(client.rank for client in CLIENTS)
TARGETS = ["q", "k", "v", "o", "up", "down"]


def skewed_split(part: Part, seed: int, concentration: float = 0.3) -> list[Part]:
    """Dirichlet label skew: each class is dealt to the clients by its own random shares.

    Dealt again until everybody holds at least 30 digits.
    """
    rng = np.random.default_rng(seed)
    while True:
        owner = np.empty(len(part), dtype=int)
        for digit in range(10):
            rows = np.flatnonzero(part.y.numpy() == digit)
            shares = rng.dirichlet(np.full(len(CLIENTS), concentration))
            owner[rows] = rng.choice(len(CLIENTS), size=len(rows), p=shares)
        if np.bincount(owner, minlength=len(CLIENTS)).min() >= 30:
            return [part[np.flatnonzero(owner == i)] for i in range(len(CLIENTS))]


def fine_tune(base: DigitTransformer, client: Client, part: Part, folder: Path, seed: int) -> None:
    """Train a LoRA adapter with PEFT on `part` and write the client's folder.

    All clients start from the first r rows of one A per module, as if a server had sent it: the
    kindest setting for averaging factors.
    """
    config = LoraConfig(r=client.rank, lora_alpha=client.alpha, target_modules=TARGETS)
    model = get_peft_model(copy.deepcopy(base), config)
    sent = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            d_in = parameter.shape[1]
            a = torch.randn(MAX_RANK, d_in, generator=sent) / d_in**0.5
            parameter.data.copy_(a[: client.rank])
    fit(model, part, steps=80, batch=32, lr=5e-3, seed=seed)
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the Hub
    (folder / "glora.json").write_text(json.dumps({"num_examples": len(part)}) + "\n")


def regauge(folder: Path, out: Path, seed: int, condition: float = 10.0) -> None:
    """The same client in another gauge: (B G, G⁻¹ A) in every module, cond G = `condition`.

    B G · G⁻¹ A is the same update, up to the rounding of the float32 factors that are stored.
    """
    rng = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key_a in [key for key in tensors if ".lora_A." in key]:
        key_b = key_a.replace(".lora_A.", ".lora_B.")
        a, b = tensors[key_a].double(), tensors[key_b].double()
        r = a.shape[0]
        left, right = random_orthogonal(r, rng), random_orthogonal(r, rng)
        d = torch.logspace(-0.5, 0.5, r, base=condition, dtype=torch.float64)
        tensors[key_b] = (b @ (left * d) @ right).float()  # G = left · diag(d) · right
        tensors[key_a] = (right.T / d @ left.T @ a).float()
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    for name in ("adapter_config.json", "glora.json"):
        shutil.copy(folder / name, out / name)


def random_orthogonal(r: int, rng: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(r, r, generator=rng, dtype=torch.float64)).Q


def load(base: DigitTransformer, folder: Path) -> PeftModel:
    """The base with the adapter of this folder on it, as PEFT loads it."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
