"""`glora readout`: adapters of other ranks from a state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import CLIENTS, UNION, assert_mean, everything, glora, glora_json
from peft_models import gpt2
from safetensors.torch import load_file

from glora_ops import aggregate
from glora_ops.adapters import read_adapter


def test_readout_from_a_state(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", 4)
    glora("readout", "out", "-r", 4, "-o", "a")
    glora("readout", "out/server.safetensors", "-r", UNION, "-o", "b")
    name = "adapter_model.safetensors"
    assert (work / "a" / name).read_bytes() == (work / "out/r4" / name).read_bytes()
    assert_mean(work / "b", [work / c for c in CLIENTS], [1, 1, 1], gpt2)
    assert "overwrite" in glora("readout", "out", "-r", 2, "-o", "a", code=1).stderr
    facts = glora_json("readout", "out", "-r", 2, "-o", "a", "--overwrite")
    assert (facts["rank"], facts["notes"]) == (2, [])
    assert read_adapter("a").config["r"] == 2
    assert 0 < facts["energy"] < 1


def test_a_dry_run_refuses_what_the_run_would_and_writes_nothing(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION)
    glora("job", "plan", *CLIENTS, "-o", "job", "--rank", UNION)
    taken = ["readout", "out", "-r", 4, "-o", "out", "--dry-run"]
    absurd = ["readout", "out", "-r", 10**6, "-o", "x", "--dry-run"]
    unmade = ["job", "join", "job", "-o", "x", "--dry-run"]
    before = everything(work)
    for arguments in (taken, absurd, unmade):
        glora(*arguments, code=1)
    said = glora("readout", "out", "-r", 4, "-o", "x", "--dry-run").stdout
    assert "would write: x  PEFT adapter of rank 4" in said
    assert everything(work) == before

    glora("job", "work", "job")
    before = everything(work)
    said = glora("job", "join", "job", "-o", "x", "--readout", "2,4", "--dry-run").stdout
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("would write")] == [
        "x/server.safetensors",
        "x/r2",
        "x/r4",
    ]
    assert "nothing was written" in said
    assert everything(work) == before


def test_padding(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION)
    assert "--pad trainable" in glora("readout", "out", "-r", 16, "-o", "zero").stdout
    facts = glora_json("readout", "out", "-r", 16, "-o", "one", "--pad", "trainable", "--seed", 1)
    assert facts["notes"] == []
    glora("readout", "out", "-r", 16, "-o", "two", "--pad", "trainable", "--seed", 2)
    zero, one, two = (
        load_file(Path(f) / "adapter_model.safetensors") for f in ("zero", "one", "two")
    )
    for key, tensor in zero.items():
        beyond = (slice(UNION, None),) if "lora_A" in key else (slice(None), slice(UNION, None))
        assert not tensor[beyond].any()
        assert one[key][beyond].any() == ("lora_A" in key)
        assert torch.equal(one[key], two[key]) == ("lora_B" in key)
    assert_mean(work / "one", [work / c for c in CLIENTS], [1, 1, 1], gpt2)
    said = glora("aggregate", *CLIENTS, "-o", "out2", "--rank", UNION, "--readout", "4,16").stdout
    assert "note: rank 16 is more than the 9 directions" in said


def test_what_does_not_fit_into_memory_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", 4)

    def full(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("glora_ops.state.State.write_adapter", full)
    said = glora("readout", "out", "-r", 2, "-o", "x", code=1).stderr
    assert "refused: not enough memory" in said
    assert "a smaller rank" in said


def test_states_that_cannot_be_read_out(work: Path) -> None:
    assert "server.safetensors" in glora("readout", "ann", "-r", 2, "-o", "x", code=1).stderr
    pairs = [(torch.randn(6, 2), torch.randn(2, 5))]
    aggregate(pairs, rank=2).save(work / "bare.safetensors")
    said = glora("readout", "bare.safetensors", "-r", 2, "-o", "x", code=1).stderr
    assert "PEFT folders" in said
    foreign = "ann/adapter_model.safetensors"
    assert "glora metadata" in glora("readout", foreign, "-r", 2, "-o", "x", code=1).stderr
    assert not (work / "x").exists()
