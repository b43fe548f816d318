"""Small clients for jobs, as PEFT saves them: no model is made."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"q_proj": (24, 20), "v_proj": (12, 20), "o_proj": (20, 24), "down_proj": (20, 40)}


def save_client(
    folder: Path, seed: int, rank: int, layers: int = 3, head: bool = False, alpha: int = 8,
    times: int = 1,
) -> Path:  # fmt: skip
    """One whose modules are so many times as large as `SHAPES`."""
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            d_out, d_in = (times * d for d in shape)
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, d_in, generator=made)
            tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, rank, generator=made)
    if head:
        tensors["base_model.model.score.weight"] = torch.randn(3, 20 * times, generator=made)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [*SHAPES],
        "base_model_name_or_path": "org/model", "task_type": "SEQ_CLS",
        "modules_to_save": ["score"] if head else None, "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "glora.json").write_text(json.dumps({"num_examples": 10 + seed}))
    return folder


def save_clients(
    root: Path, count: int = 4, layers: int = 3, head: bool = True, times: int = 1
) -> list[Path]:
    """Clients of different ranks, every second with a head if there are any.

    Modules have `times` the dimensions of `SHAPES`.
    """
    return [
        save_client(root / f"c{i}", i, 2 + i % 3, layers, head=head and i % 2 == 0, times=times)
        for i in range(count)
    ]
