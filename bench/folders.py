"""Client folders as PEFT writes them, for models of real shapes, without the models.

python bench/folders.py ROOT --model llama-2-7b --clients 8 --rank 16 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["MODELS", "write_clients"]

#: layers and, for each module of a layer, (d_out, d_in).
MODELS: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "llama-2-7b": (
        32,
        {
            **dict.fromkeys([f"self_attn.{x}_proj" for x in ("q", "k", "v", "o")], (4096, 4096)),
            "mlp.gate_proj": (11008, 4096),
            "mlp.up_proj": (11008, 4096),
            "mlp.down_proj": (4096, 11008),
        },
    ),
    "llama-3.2-1b": (
        16,
        {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (512, 2048),
            "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (8192, 2048),
            "mlp.up_proj": (8192, 2048),
            "mlp.down_proj": (2048, 8192),
        },
    ),
}


def write_clients(
    root: Path, model: str, clients: int, rank: int, dtype: torch.dtype = torch.bfloat16
) -> list[Path]:
    """Write `clients` folders below `root`; half of every update's energy is common to all."""
    layers, shapes = MODELS[model]
    draw = torch.Generator().manual_seed(0)

    def pair(d_out: int, d_in: int) -> tuple[torch.Tensor, torch.Tensor]:
        b = torch.randn(d_out, rank, generator=draw) / d_out**0.5
        a = torch.randn(rank, d_in, generator=draw) / d_in**0.5
        return b * torch.logspace(0, -1, rank), a

    names = {
        f"model.layers.{l}.{name}": shape for l in range(layers) for name, shape in shapes.items()
    }
    half = rank // 2
    common = {name: pair(*shape) for name, shape in names.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(names),
        "task_type": "CAUSAL_LM",
    }
    folders = []
    for i in range(clients):
        tensors = {}
        for name, shape in names.items():
            b, a = pair(*shape)
            shared_b, shared_a = common[name]
            b[:, :half], a[:half] = shared_b[:, :half], shared_a[:half]
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        folder = root / f"client-{i:03}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "glora.json").write_text(json.dumps({"num_examples": 100 + i}))
        folders.append(folder)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    given = parser.parse_args()
    for path in write_clients(
        given.root, given.model, given.clients, given.rank, getattr(torch, given.dtype)
    ):
        print(path)
