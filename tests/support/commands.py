"""The command line called in this process, clients for it, and what spoils or judges a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft_models import Base, peft_update
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from glora_ops.cli import app

ATTENTION = ["c_attn", "c_proj"]
CLIENTS: dict[str, dict[str, Any]] = {
    "ann": {"r": 4, "lora_alpha": 8},
    "bob": {"r": 2, "lora_alpha": 8, "use_rslora": True},
    "cyd": {"r": 3, "lora_alpha": 3, "dtype": torch.bfloat16},
}
UNION = 9  # rank at which nothing of them is lost


def glora(*arguments: object, code: int = 0, width: int = 200) -> Result:
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": str(width), "TERM": "dumb"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def glora_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    facts = json.loads(glora(*arguments, "--json", code=code).stdout, parse_constant=no_constant)
    assert isinstance(facts, dict)
    return facts


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder`, hidden ones included, with what is in it."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: change(k, v).contiguous() for k, v in load_file(path).items()}, path)


def louder(factor: float) -> Callable[[str, Tensor], Tensor]:
    return lambda key, tensor: tensor * factor if "lora_B" in key else tensor


def assert_mean(folder: Path, clients: list[Path], weights: Sequence[float], base: Base) -> None:
    """PEFT's merged weights of `folder` are the weighted mean of those of `clients`, to 1e-5."""
    found = peft_update(base, folder)
    updates = [peft_update(base, client) for client in clients]
    assert set(found) == {name for update in updates for name in update}
    for name, update in found.items():
        mean = torch.zeros_like(update)
        for weight, one in zip(weights, updates, strict=True):
            mean += weight / sum(weights) * one.get(name, torch.zeros_like(mean))
        assert (update - mean).norm() <= 1e-5 * mean.norm(), name
