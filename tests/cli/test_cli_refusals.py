"""What the command line refuses, in what words and with which exit code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from commands import (
    CLIENTS,
    UNION,
    assert_mean,
    edit_config,
    edit_tensors,
    everything,
    glora,
    glora_json,
)
from peft_models import gpt2, mixed, peft_update, save_client
from torch import Tensor


def spoil(work: Path) -> None:
    edit_config(work / "ann", use_dora=True)
    (work / "bob" / "adapter_model.safetensors").rename(work / "bob" / "adapter_model.bin")
    edit_config(work / "bob", bias="all")


SPOILT = [
    ("ann", "DoRA's update is not linear in B·A"),
    ("bob", "biases of the base were trained"),
    ("bob", "the tensors are pickled, and unpickling runs whatever code the file contains"),
    ("dan", "no such folder"),
]


def test_all_refusals_at_once_and_nothing_left_behind(work: Path) -> None:
    spoil(work)
    before = everything(work)
    result = glora("aggregate", *CLIENTS, "dan", "-o", "new/deep/out", code=1)
    assert result.stdout == ""
    said = result.stderr
    for needle in ("DoRA", "adapter_model.bin", "bias = 'all'", "no such folder", "4 problems"):
        assert needle in said
    for heading in ("client", "file", "found", "expected", "remedy"):
        assert re.search(rf"^  {heading}", said, re.MULTILINE)
    assert everything(work) == before


def test_one_list_of_everything_that_headers_and_arguments_tell(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT that exists, a bad weights file, bad folders, no matplotlib: together, nothing read."""

    def read(*_: object) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr("glora_ops.merging.aggregate.check_values", read)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spoil(work)
    (work / "out").mkdir()
    (work / "w.json").write_text('{"ann": -1, "bob": NaN, "eve": 1, "cyd": "3"}')
    before = everything(work)
    arguments = ["aggregate", *CLIENTS, "dan", "-o", "out", "--weights", "w.json", "--plot"]
    refused = glora_json(*arguments, code=1)["refused"]
    found = [(r["client"], r["problem"]) for r in refused]
    assert found == [
        (None, "plot cannot be used"),
        (None, "folder cannot be used"),
        ("dan", "the client has no weight"),
        (None, "the weight is for no client"),
        ("cyd", "the weight is no number"),
        ("ann", "weight cannot be used"),
        ("bob", "weight cannot be used"),
        *SPOILT,
    ]
    assert all(r["found"] and r["expected"] for r in refused)
    said = glora(*arguments, code=1).stderr
    assert "11 problems; nothing was written" in said
    assert "--overwrite" in said
    assert everything(work) == before


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_weights_file_that_cannot_be_read_is_listed_with_the_rest(
    work: Path, content: str | None
) -> None:
    if content is not None:
        (work / "w.json").write_text(content)
    edit_config(work / "ann", use_dora=True)
    refused = glora_json(
        "aggregate", *CLIENTS, "-o", "ann/x/../../ann", "--weights", "w.json", code=1
    )["refused"]
    assert len(refused) == 3
    folder, file, client = refused
    assert "ann" in folder["found"]
    assert "overwrite" in folder["remedy"]
    assert file["file"] == "w.json"
    assert all(file[name] for name in ("problem", "found", "expected", "remedy"))
    assert client["client"] == "ann"


def test_a_place_that_cannot_hold_a_folder_is_listed_with_the_rest(work: Path) -> None:
    (work / "file").write_text("precious")
    edit_config(work / "ann", use_dora=True)
    folder, client = glora_json("aggregate", *CLIENTS, "-o", "file/out", code=1)["refused"]
    assert folder["file"] == str(work / "file")
    assert client["client"] == "ann"


def test_arguments_refused_before_tensors_are_read(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr("glora_ops.merging.aggregate.check_values", read)
    (work / "ann" / "glora.json").write_text('{"num_examples": 0}')
    for arguments, needle in (
        (["--rank", "auto", "--captured", 0], "captured cannot be used"),
        (["--seed", 2**70], "seed cannot be used"),
        (["--weights", "0,0,0"], "weights cannot be used"),
        (["--weights", "1,-1,nan"], "2 problems"),
        (["--weights", "1,-1,1", "--basis", "update"], "--no-normalise"),
        (
            ["--weights", "1,-1,1", "--basis", "update", "--no-normalise", "--missing",
             "renormalise"],
            "missing cannot be used",
        ),
    ):  # fmt: skip
        assert needle in glora("aggregate", *CLIENTS, "-o", "out", *arguments, code=1).stderr
    for name in CLIENTS:
        (work / name / "glora.json").write_text('{"num_examples": 0}')
    said = glora("aggregate", *CLIENTS, "-o", "out", code=1).stderr
    assert "weights cannot be used" in said


def test_every_field_of_a_single_refusal_is_filled_in_json(work: Path) -> None:
    (work / "out").mkdir()
    glora("aggregate", *CLIENTS, "-o", "whole")
    (work / "bad.safetensors").write_bytes(b"nothing of the kind")
    foreign = "ann/adapter_model.safetensors"
    for arguments, file in (
        (["aggregate", "ann", "-o", "out"], "out"),
        (["readout", "whole", "-r", 2, "-o", "out"], "out"),
        (["readout", foreign, "-r", 2, "-o", "x"], foreign),
        (["readout", "bad.safetensors", "-r", 2, "-o", "x"], "bad.safetensors"),
        (["inspect", "bad.safetensors"], "bad.safetensors"),
        (["inspect", foreign], foreign),
    ):
        (refusal,) = glora_json(*arguments, code=1)["refused"]
        assert refusal["file"].endswith(file)
        for name in ("problem", "found", "expected", "remedy"):
            assert refusal[name], (arguments, name)


def test_only_commands_that_write_say_that_nothing_was_written(work: Path) -> None:
    edit_config(work / "ann", use_dora=True)
    for arguments, writes in (
        (["inspect", "ann"], False),
        (["inspect", "ann", "--plot", "p.png"], True),
        (["compare", *CLIENTS], False),
        (["compare", *CLIENTS, "--plot", "p.png"], True),
        (["aggregate", *CLIENTS, "-o", "out"], True),
        (["readout", "ann", "-r", 2, "-o", "out"], True),
    ):
        said = glora(*arguments, code=1).stderr
        assert "1 problem" in said
        assert ("nothing was written" in said) == writes


def test_unrelated_models_need_a_voucher(work: Path) -> None:
    save_client(work / "dan", mixed, seed=4, r=2, lora_alpha=2, target_modules=["first", "last"])
    for name in ("ann", "bob", "dan"):
        edit_config(work / name, base_model_name_or_path=None)
    (refusal,) = glora_json("aggregate", "ann", "bob", "dan", "-o", "out", code=1)["refused"]
    assert refusal["client"] == "dan"
    assert "block.first, block.last, first" in refusal["found"]
    assert "'ann'" in refusal["expected"]
    assert "transformer.h.0.attn.c_attn" in refusal["expected"]
    assert "--base NAME" in refusal["remedy"]
    facts = glora_json("aggregate", "ann", "bob", "dan", "-o", "out", "--base", "both")
    assert len(facts["certificates"]) == 6 + 3


def test_task_arithmetic(work: Path) -> None:
    """Signed weights, not normalised, on the update basis: ann + ½ bob − cyd."""
    weights = [1, 0.5, -1]
    arguments = ["--weights", "1,0.5,-1", "--basis", "update", "--no-normalise", "--rank", UNION]
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", *arguments, "--readout", UNION)
    assert list(facts["weights"].values()) == weights
    merged = peft_update(gpt2, work / "out/r9")
    clients = [peft_update(gpt2, work / name) for name in CLIENTS]
    for name, update in merged.items():
        total = sum(w * client[name] for w, client in zip(weights, clients, strict=True))
        assert (update - total).norm() <= 1e-5 * total.norm()
    (work / "w.json").write_text('{"ann": 1, "bob": 0.5, "cyd": -1}')
    again = glora_json("aggregate", *CLIENTS, "-o", "out2", "--weights", "w.json", *arguments[2:])
    assert again["weights"] == facts["weights"]
    for refused in (arguments[:2], [*arguments[:2], "--no-normalise"]):
        said = glora("aggregate", *CLIENTS, "-o", "no", *refused, code=1).stderr
        assert "--basis update --no-normalise" in said


def test_refusals_as_json(work: Path) -> None:
    spoil(work)
    facts = glora_json("aggregate", *CLIENTS, "dan", "-o", "out", code=1)
    assert [r["client"] for r in facts["refused"]] == ["ann", "bob", "bob", "dan"]
    fields = {"problem", "client", "file", "tensor", "found", "expected", "remedy", "more"}
    assert all(set(r) == fields for r in facts["refused"])


def test_values_are_refused_by_tensor(work: Path) -> None:
    def first_nan(key: str, tensor: Tensor) -> Tensor:
        tensor[0, 0] = float("nan")
        return tensor

    edit_tensors(work / "bob", first_nan)
    for command in (
        ["aggregate", *CLIENTS, "-o", "out"],
        ["compare", *CLIENTS],
        ["inspect", "bob"],
    ):
        refused = glora_json(*command, code=1)["refused"]
        assert sum(1 + r["more"] for r in refused) == 12
        assert {r["client"] for r in refused} == {"bob"}
        assert "lora_A" in refused[0]["tensor"]
        assert "nan" in refused[0]["found"]
    assert not (work / "out").exists()


def test_skipping_bad_clients(work: Path) -> None:
    edit_config(work / "bob", use_dora=True)
    arguments = ["aggregate", *CLIENTS, "--on-bad-client", "skip", "--rank", 7, "--readout", 7]
    result = glora(*arguments, "-o", "out", "--weights", "3,1,2", code=3)
    assert "skipped: client 'bob'" in result.stdout
    assert "DoRA" in result.stdout
    assert_mean(work / "out/r7", [work / "ann", work / "cyd"], [3, 2], gpt2)
    facts = glora_json(*arguments, "-o", "out2", code=3)
    assert [client["name"] for client in facts["clients"]] == ["ann", "cyd"]
    assert len(facts["skipped"]) == 1
    assert "bob" in facts["skipped"][0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["aggregate", "-o", "out"],
        ["aggregate", "ann"],
        ["aggregate", "ann", "-o", "out", "--rank", "many"],
        ["aggregate", "ann", "-o", "out", "--rank", "0"],
        ["aggregate", "ann", "-o", "out", "--readout", "4,x"],
        ["aggregate", "ann", "-o", "out", "--readout", "0"],
        ["aggregate", "ann", "-o", "out", "--captured", "0.9"],
        ["aggregate", "ann", "-o", "out", "--rank", "auto", "--captured", "1.5"],
        ["aggregate", "ann", "-o", "out", "--weights", "1,2"],
        ["aggregate", "ann", "-o", "out", "--weights", "heavy"],
        ["aggregate", "ann", "-o", "out", "--basis", "best"],
        ["aggregate", "ann", "-o", "out", "--add", "bob"],
        ["aggregate", "ann", "--update", "out", "--add", "bob"],
        ["update", "out"],
        ["update", "out", "--add", "bob", "--rank", "4"],
        ["update", "out", "--add", "bob", "--seed", "0"],
        ["readout", "out", "-o", "x"],
        ["readout", "out", "-r", "0", "-o", "x"],
        ["compare", "ann"],
        ["inspect"],
        ["fly"],
    ],
)
def test_usage(work: Path, arguments: list[str]) -> None:
    result = glora(*arguments, code=2)
    assert "Usage: glora" in result.stderr
    assert result.stdout == ""
    assert not (work / "out").exists()


def test_other_bases_need_a_voucher(work: Path) -> None:
    for name in CLIENTS:
        edit_config(work / name, base_model_name_or_path=f"mirror/{name}")
    for command in (["aggregate", *CLIENTS, "-o", "out"], ["compare", *CLIENTS]):
        assert "another base model" in glora(*command, code=1).stderr
        glora(*command, "--base", "tiny/gpt2")
    assert "base tiny/gpt2" in glora("inspect", "out").stdout


def test_missing_modules(work: Path) -> None:
    save_client(work / "dan", gpt2, seed=4, r=2, lora_alpha=2, target_modules=["c_attn"])
    zero = glora_json("aggregate", "ann", "dan", "-o", "zero", "--rank", 6, "--readout", 6)
    assert_mean(work / "zero/r6", [work / "ann", work / "dan"], [1, 1], gpt2)
    assert any("counts as zero" in note["text"] for note in zero["notes"])
    rest = glora_json(
        "aggregate", "ann", "dan", "-o", "rest", "--rank", 6, "--missing", "renormalise"
    )
    name = "transformer.h.0.mlp.c_proj"
    norms = [facts["certificates"][name]["norm"] for facts in (zero, rest)]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)
