"""Hostile numbers on the command line: right, or refused by name before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import CLIENTS, UNION, assert_mean, edit_tensors, everything, glora, glora_json
from peft_models import gpt2


def test_a_client_of_subnormal_numbers_is_aggregated_like_any_other(work: Path) -> None:
    """Alone among others, and all alone: both factors near the end of what fp32 holds."""
    edit_tensors(work / "ann", lambda key, tensor: tensor * 1e-39)
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", UNION)
    assert_mean(work / f"out/r{UNION}", [work / c for c in CLIENTS], [1, 1, 1], gpt2)
    facts = glora_json("aggregate", "ann", "-o", "one", "--rank", 4)
    assert facts["captured"] > 1 - 1e-5
    glora("compare", *CLIENTS)
    glora("inspect", "ann")


def test_a_client_beyond_every_range_is_named_and_can_be_skipped(work: Path) -> None:
    edit_tensors(work / "ann", lambda key, tensor: tensor.double() * 1e-60)
    said = glora("aggregate", *CLIENTS, "-o", "out", code=1).stderr
    assert "client   ann" in said
    assert "too large or too small" in said
    assert not (work / "out").exists()
    left = ["bob", "cyd"]
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", UNION,
          "--on-bad-client", "skip", code=3)  # fmt: skip
    assert_mean(work / f"out/r{UNION}", [work / c for c in left], [1, 1], gpt2)


@pytest.mark.parametrize(
    ("options", "name"),
    [(["--rank", 2_000_000], "rank"), (["--rank", 4, "--readout", "8,999999999"], "readout"),
     (["--readout", 999_999_999], "readout"),
     (["--rank", "auto", "--readout", 999_999_999], "readout")],
)  # fmt: skip
def test_absurd_ranks_are_refused_before_any_factor_is_read(
    work: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], name: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a factor was read")

    monkeypatch.setattr("glora_ops.adapters.read.Adapter.factors", never)
    monkeypatch.setattr("glora_ops.merging.aggregate.check_values", never)
    before = everything(work)
    said = glora("aggregate", *CLIENTS, "-o", "out", *options, code=1).stderr
    assert f"{name}: got" in said or f"{name} cannot be used" in said
    assert "at most" in said
    assert everything(work) == before


def test_an_absurd_readout_of_a_state_is_refused(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", 4)
    before = everything(work)
    for pad in ("zero", "trainable"):
        said = glora("readout", "out", "-r", 999_999_999, "-o", "x", "--pad", pad, code=1).stderr
        assert "999999999" in said
        assert "at most 1024" in said
    said = glora("update", "out", "--remove", "bob", "--readout", 99_999, code=1)
    assert "99999" in said.stderr
    assert everything(work) == before


def test_directions_without_a_vote_are_noted(work: Path) -> None:
    def steep(key: str, tensor: torch.Tensor) -> torch.Tensor:
        fall = 16.0 ** -torch.arange(3)
        return (tensor.float() * fall if "lora_B" in key else tensor).bfloat16()

    edit_tensors(work / "cyd", steep)
    facts = glora_json("aggregate", "cyd", "-o", "out", "--rank", 6, "--basis", "projector")
    assert any("have no vote" in note["text"] for note in facts["notes"])
    assert "have no vote" in glora("inspect", "out").stdout.replace("\n", " ")
    facts = glora_json("aggregate", "cyd", "-o", "two", "--rank", 6)
    assert not any("have no vote" in note["text"] for note in facts["notes"])
