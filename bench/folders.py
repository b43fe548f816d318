"""Client folders as PEFT writes them, for models of real shapes, without the models.

python bench/folders.py ROOT --model llama-2-7b --clients 8 --rank 16 --dtype bfloat16
python bench/folders.py ROOT --measure    # aggregate what is there: seconds and peak memory
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
    """Write `clients` folders below `root`; half of every client's directions are common to all."""
    layers, shapes = MODELS[model]
    draw = torch.Generator().manual_seed(0)
    names = {
        f"model.layers.{l}.{name}": shape for l in range(layers) for name, shape in shapes.items()
    }
    sizes = torch.logspace(0, -1, rank)
    drawn = {
        name: (
            (torch.randn(d_out, rank, generator=draw) / d_out**0.5 * sizes).to(dtype),
            (torch.randn(rank, d_in, generator=draw) / d_in**0.5).to(dtype),
        )
        for name, (d_out, d_in) in names.items()
    }
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
        for name, (common_b, common_a) in drawn.items():
            # A client's own directions are the common ones shifted along the long dimension.
            b, a = common_b.roll(17 * i + 1, 0), common_a.roll(17 * i + 1, 1)
            b[:, ::2], a[::2] = common_b[:, ::2], common_a[::2]
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
        folder = root / f"client-{i:03}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "glora.json").write_text(json.dumps({"num_examples": 100 + i}))
        folders.append(folder)
    return folders


def resident(field: str) -> float:
    """MB of this process's memory, now (VmRSS) or at its worst (VmHWM); Linux only."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024 / 1e6


def measure(root: Path, rank: int, threads: int) -> dict[str, float]:
    """Aggregate the folders below `root` and save the state, in this process."""
    import tempfile
    import time
    import warnings

    import glora_ops

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", glora_ops.GloraWarning)
    before = resident("VmRSS")
    start = time.perf_counter()
    state = glora_ops.aggregate_adapters(sorted(root.iterdir()), rank=rank)
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "server.safetensors")
    return {
        "process_s": time.perf_counter() - start,
        "import_mb": before,
        "peak_mb": resident("VmHWM"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--server-rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.root, given.server_rank, given.threads)))
        raise SystemExit
    for path in write_clients(
        given.root, given.model, given.clients, given.rank, getattr(torch, given.dtype)
    ):
        print(path)
