"""`glora compare`: how far clients agree."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import CLIENTS, edit_config, edit_tensors, glora, glora_json, louder
from peft_models import mixed, save_client
from torch import Tensor

from glora_ops.analysis.compare import align


def test_alignment_is_the_mean_squared_cosine() -> None:
    torch.manual_seed(0)
    q = torch.zeros(3, 4, 20, dtype=torch.float64)
    wide = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64))[0].T
    q[0], q[1, :2] = wide, wide[[3, 1]]  # the second within the first
    q[2, :3] = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))[0].T
    f = torch.tensor([[1.0] * 4, [1.0] * 2 + [0.0] * 2, [1.0] * 3 + [0.0]], dtype=torch.float64)
    found = align(q, f)
    cosines = torch.linalg.svdvals(q[0] @ q[2, :3].T)
    assert found[0, 2].item() == pytest.approx(float(cosines.square().mean()))
    assert found[0, 1].item() == pytest.approx(1)
    torch.testing.assert_close(found.diag(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found, found.T)
    soft = align(q, f * torch.tensor([[0.9], [0.2], [0.5]], dtype=torch.float64))
    torch.testing.assert_close(soft, found)
    assert align(q * 0, f * 0).abs().max() == 0


def test_comparison_is_gauge_invariant(work: Path) -> None:
    before = glora_json("compare", *CLIENTS)
    torch.manual_seed(0)
    gauge = torch.linalg.qr(torch.randn(4, 4))[0] * torch.tensor([5.0, 1.0, 0.5, 2.0])

    def regauge(key: str, tensor: Tensor) -> Tensor:
        return torch.linalg.inv(gauge) @ tensor if "lora_A" in key else tensor @ gauge

    edit_tensors(work / "ann", regauge)
    after = glora_json("compare", *CLIENTS)
    for side in ("columns", "rows"):
        torch.testing.assert_close(
            torch.tensor(after[side]), torch.tensor(before[side]), atol=1e-4, rtol=0
        )
    assert after["clients"][0]["norm"] == pytest.approx(before["clients"][0]["norm"], rel=1e-5)


def test_loud_and_odd_clients_are_pointed_out(work: Path) -> None:
    def jitter(seed: int) -> Callable[[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        return lambda key, tensor: tensor + 0.01 * torch.randn_like(tensor)

    for seed, name in enumerate(("eve", "fay", "gus")):
        shutil.copytree("ann", name)
        edit_tensors(work / name, jitter(seed))
    edit_tensors(work / "gus", louder(1e5))
    names = ["ann", "eve", "fay", "gus", "bob"]
    facts = glora_json("compare", *names)
    loud, odd = (note["text"] for note in facts["notes"])
    assert loud.startswith("gus is loud")
    assert odd.startswith("bob is odd")
    said = glora("compare", *names).stdout
    assert "warning: gus is loud" in said
    assert "left: column spaces" in said
    alignment = {client["name"]: client["alignment"] for client in facts["clients"]}
    assert alignment["gus"] > 0.7  # how loud it is changes nothing
    assert alignment["bob"] < 0.4
    quiet = glora_json("compare", *CLIENTS)
    assert quiet["notes"] == []


def test_clients_without_a_common_module(work: Path) -> None:
    save_client(work / "dan", mixed, seed=4, r=2, lora_alpha=2, target_modules=["first", "last"])
    for name in ("ann", "dan"):
        edit_config(work / name, base_model_name_or_path=None)
    assert "share no module" in glora("compare", "ann", "dan", code=1).stderr
    facts = glora_json("compare", "ann", "dan", "--base", "mixed")
    assert facts["columns"][0][1] is None
    assert facts["clients"][0]["alignment"] is None
    assert "–" in glora("compare", "ann", "dan", "--base", "mixed").stdout
