"""`glora aggregate --robust`, and what `glora compare` sees of bad clients."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import edit_tensors, glora, glora_json, louder
from torch import Tensor

NAMES = ["ann", "eve", "fay", "gus", "hal"]


@pytest.fixture
def five(work: Path) -> Path:
    """Five clients that learnt alike; nothing is spoilt yet."""

    def jitter(key: str, tensor: Tensor) -> Tensor:
        return tensor + 0.01 * torch.randn(tensor.shape, generator=rng)

    rng = torch.Generator().manual_seed(0)
    for name in NAMES[1:]:
        shutil.copytree("ann", name)
        edit_tensors(work / name, jitter)
    return work


def test_a_sign_flip_is_seen(five: Path) -> None:
    assert glora_json("compare", *NAMES)["notes"] == []
    edit_tensors(five / "fay", louder(-1.0))
    facts = glora_json("compare", *NAMES)
    (odd,) = (note["text"] for note in facts["notes"])
    assert odd.startswith("fay is odd: its median cosine with the others is -1.00")
    assert facts["clients"][2]["cosine"] < -0.9 < 0.9 < facts["clients"][1]["cosine"]
    assert facts["clients"][2]["alignment"] > 0.9  # unsigned: it looks perfect
    assert facts["cosines"][2][0] < -0.9 < 0.9 < facts["cosines"][1][0]
    said = glora("compare", *NAMES).stdout
    assert "signed cosines of the updates" in said
    assert "-1.00" in said


@pytest.mark.parametrize(("factor", "warned"), [(2.9, False), (3.1, True)])
def test_three_times_the_median_norm_is_loud(factor: float, warned: bool, five: Path) -> None:
    edit_tensors(five / "gus", louder(factor))
    notes = [note["text"] for note in glora_json("compare", *NAMES)["notes"]]
    assert len(notes) == warned
    assert not notes or notes[0].startswith("gus is loud: its update is 3.0")


def test_the_gate_leaves_out_by_name_and_says_why(five: Path) -> None:
    edit_tensors(five / "fay", louder(-1.0))
    edit_tensors(five / "gus", louder(40.0))
    facts = glora_json("aggregate", *NAMES, "-o", "out", "--robust", "gate", "--readout", "4")
    record = facts["robust"]
    assert (record["rule"], record["applied"], record["clip"]) == ("gate", "gate", 2.0)
    assert record["left_out"] == ["fay"]
    assert facts["weights"]["fay"] == 0
    assert sum(facts["weights"].values()) == pytest.approx(1)
    assert record["clients"][3]["scale"] < 0.06
    said = glora("inspect", "out").stdout
    assert "warning: robust gate left fay out: its median cosine with the others is -1.00" in said
    assert "note: robust gate clipped gus" in said
    assert glora_json("inspect", "out")["robust"] == record
    assert facts["clients"][2]["cosine"] == record["clients"][2]["cosine"] < -0.9
    assert "cosine" in said


def test_an_update_keeps_the_rule(five: Path) -> None:
    edit_tensors(five / "fay", louder(-1.0))
    glora("aggregate", *NAMES[:4], "-o", "out", "--robust", "gate", "--clip", "3")
    facts = glora_json("update", "out", "--add", "hal")
    assert facts["robust"]["left_out"] == ["fay"]
    assert facts["robust"]["clip"] == 3
    glora("update", "out", "--remove", "hal", "--robust", "clip", code=2)


def test_usage_and_signed_weights(five: Path) -> None:
    assert (
        "--robust clip or gate"
        in glora("aggregate", *NAMES, "-o", "out", "--clip", "3", code=2).output
    )
    glora("aggregate", *NAMES, "-o", "out", "--robust", "krum", code=2)
    refused = glora("aggregate", *NAMES, "-o", "out", "--robust", "gate", "--basis", "update",
                    "--no-normalise", "--weights", "1,1,-1,1,1", code=1).stderr  # fmt: skip
    assert "fay" in refused
    assert "robust" in refused
    assert not (five / "out").exists()
