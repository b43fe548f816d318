"""`glora inspect`: what an adapter or a state holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import CLIENTS, UNION, edit_config, glora, glora_json

from glora_ops import STATS, aggregate, aggregate_adapters
from glora_ops.adapters import read_adapter


def test_inspect_an_adapter(work: Path) -> None:
    facts = glora_json("inspect", "ann")
    adapter = read_adapter("ann")
    assert set(facts["modules"]) == set(adapter.modules)
    for name, m in facts["modules"].items():
        b, a = (x.double() for x in adapter.factors(name))
        dense = m["scaling"] * b @ a
        assert (m["rank"], m["scaling"]) == (4, 2.0)
        assert [m["d_out"], m["d_in"]] == list(dense.shape)
        assert m["norm"] == pytest.approx(float(dense.norm()), rel=1e-6)
        expected = torch.linalg.svdvals(dense)[:4].tolist()
        assert m["singular_values"] == pytest.approx(expected, rel=1e-5)
    assert re.search(r"examples +not counted", glora("inspect", "ann").stdout)
    (work / "ann" / "glora.json").write_text('{"num_examples": 0}')
    said = glora("inspect", "ann").stdout
    assert re.search(r"examples +0", said)
    assert "transformer.h.0.attn.c_attn" in said
    assert "█" in said


def test_inspect_a_state_file_or_its_folder(work: Path) -> None:
    written = glora_json("aggregate", *CLIENTS, "-o", "out", "--rank", 5)
    for path in ("out", "out/server.safetensors"):
        facts = glora_json("inspect", path)
        for name in ("captured", "attainable", "rank", "weights", "certificates", "notes"):
            assert facts[name] == written[name]
    said = glora("inspect", "out").stdout
    assert "transformer.h.1.mlp.c_proj" in said
    assert "attainable" in said
    assert "weights: equal" in said


def test_inspect_says_what_was_skipped(work: Path) -> None:
    edit_config(work / "bob", use_dora=True)
    glora("aggregate", *CLIENTS, "-o", "out", "--on-bad-client", "skip", code=3)
    assert "skipped: client 'bob'" in glora("inspect", "out").stdout


def test_inspect_a_state_of_bare_pairs_and_a_zero_one(work: Path) -> None:
    zero = [(torch.zeros(6, 2), torch.zeros(2, 5))] * 2
    aggregate(zero, rank=2).save(work / "zero.safetensors")
    assert "(unnamed)" in glora("inspect", "zero.safetensors", "--plot", "zero.png").stdout
    assert glora_json("inspect", "zero.safetensors")["captured"] == 1.0


def test_inspect_refuses(work: Path) -> None:
    assert "no such folder" in glora("inspect", "nobody", code=1).stderr
    (work / "note.txt").write_text("hello")
    assert "note.txt" in glora("inspect", "note.txt", code=1).stderr


def test_infinite_certificates_are_null(work: Path) -> None:
    state = aggregate_adapters(list(CLIENTS), rank=UNION)
    next(iter(state.modules.values())).stats[STATS.index("kappa_w")] = float("inf")
    state.save(work / "state.safetensors")
    certificates = glora_json("inspect", "state.safetensors")["certificates"]
    assert next(iter(certificates.values()))["kappa_w"] is None


def test_names_cannot_drive_the_terminal(work: Path) -> None:
    evil = "\x1b[31m[bold]evil\x07"
    (work / "ann").rename(work / evil)
    for arguments in (
        ["aggregate", evil, "bob", "-o", "out"],
        ["inspect", "out"],
        ["inspect", evil],
        ["compare", evil, "bob"],
    ):
        said = glora(*arguments).stdout
        assert "\x1b" not in said
        assert "\\x1b[31m[bold]evil\\x07" in said
