"""`glora` as its users meet it: files in, files and words out, exit codes."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import Base, gpt2, mixed, peft_update, save_client
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from glora_ops import STATS, State, aggregate
from glora_ops.adapters import read_adapter
from glora_ops.cli import app
from glora_ops.cli.measure import align, compare_clients
from glora_ops.merge import aggregate_adapters

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


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    for seed, (name, config) in enumerate(CLIENTS.items(), start=1):
        save_client(root / name, gpt2, seed=seed, target_modules=ATTENTION, **config)
    return root


@pytest.fixture
def work(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the clients."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


# --- aggregate -----------------------------------------------------------------------------------


def test_mixed_clients_come_back_as_their_mean(work: Path) -> None:
    result = glora(
        "aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", f"{UNION},4",
        "--weights", "3,1,2",
    )  # fmt: skip
    clients = [work / name for name in CLIENTS]
    assert_mean(work / "out" / f"r{UNION}", clients, [3, 1, 2], gpt2)
    for wrong, weights in ((f"r{UNION}", [3, 1.01, 2]), ("r4", [3, 1, 2])):
        with pytest.raises(AssertionError):
            assert_mean(work / "out" / wrong, clients, weights, gpt2)
    assert sorted(p.name for p in (work / "out").iterdir()) == ["r4", "r9", "server.safetensors"]
    said = " ".join(result.stdout.split())
    assert "3 clients → rank 9, basis consensus, 6 modules" in said
    assert "ann 0.5 4 2 " in said
    assert "bob 0.1667 2 5.657 " in said
    assert "weights: as given" in said
    assert "captured 1.0000 fraction of the mean update's energy" in said
    assert "out/server.safetensors" in said
    assert "PEFT adapter of rank 4" in said
    assert result.stderr == ""


def test_every_kind_of_layer_and_a_head(work: Path) -> None:
    layers = ["embed_tokens", "conv", "first", "last"]
    for seed, (name, config) in enumerate(CLIENTS.items(), start=1):
        config = {k: v for k, v in config.items() if k != "dtype"}
        save_client(work / f"{name}2", mixed, seed=seed, target_modules=layers,
                    modules_to_save=["head"], **config)  # fmt: skip
    names = [f"{name}2" for name in CLIENTS]
    said = glora("aggregate", *names, "-o", "out", "--rank", UNION, "--readout", UNION).stdout
    assert "weighted means of full weights: head.bias, head.weight" in said
    assert_mean(work / "out" / f"r{UNION}", [work / n for n in names], [1, 1, 1], mixed)
    refused = glora("aggregate", *names, "-o", "no", "--dense", "refuse", code=1).stderr
    assert refused.count("the adapter holds weights saved in full") == 3


def test_json_says_everything(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--rank", 5, "--readout", "2,5")
    state = State.load("out/server.safetensors")
    assert facts["captured"] == state.captured
    assert facts["attainable"] == state.attainable
    assert (facts["rank"], facts["basis"], facts["weights_from"]) == (5, "consensus", "equal")
    assert list(facts["weights"]) == list(CLIENTS)
    assert sum(facts["weights"].values()) == pytest.approx(1)
    assert facts["skipped"] == []
    assert facts["readouts"] == {"2": "out/r2", "5": "out/r5"}
    assert facts["state"] == "out/server.safetensors"
    assert set(facts["certificates"]) == set(state.modules)
    assert facts["rank_to_captured"] is None
    ann, bob, cyd = facts["clients"]
    assert (ann["ranks"], ann["scalings"]) == ([4], [2.0])
    assert bob["scalings"] == [pytest.approx(8 / math.sqrt(2))]
    assert sum(client["share"] for client in (ann, bob, cyd)) == pytest.approx(1, abs=1e-6)
    norms = [float(compare_clients([read_adapter(c)]).norms) for c in CLIENTS]
    assert [client["norm"] for client in facts["clients"]] == pytest.approx(norms, rel=1e-5)


def test_default_rank_is_twice_the_largest(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out")
    assert facts["rank"] == 8
    assert facts["readouts"] == {}


def test_auto_rank_prints_its_table(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--rank", "auto", "--captured", 0.8)
    ranks = {int(rank): captured for rank, captured in facts["rank_to_captured"].items()}
    assert facts["captured"] >= 0.8
    assert ranks[facts["rank"]] == facts["captured"]
    assert all(captured < 0.8 for rank, captured in ranks.items() if rank < facts["rank"])
    said = glora("aggregate", *CLIENTS, "-o", "out2", "--rank", "auto", "--captured", 0.8).stdout
    for rank, captured in ranks.items():
        assert re.search(rf"^ *{rank} +{captured:.4f}", said, re.MULTILINE)


def test_weights_from_num_examples(work: Path) -> None:
    for name, n in zip(CLIENTS, (600, 100, 100), strict=True):
        (work / name / "glora.json").write_text(json.dumps({"num_examples": n}))
    result = glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", UNION)
    assert "weights: num_examples of the clients' glora.json" in result.stdout
    assert "ann has 75% of the weight" in result.stdout
    assert_mean(work / "out/r9", [work / c for c in CLIENTS], [600, 100, 100], gpt2)
    (work / "cyd" / "glora.json").unlink()
    assert glora_json("aggregate", *CLIENTS, "-o", "out2")["weights_from"] == "equal"


def test_weights_from_a_file(work: Path) -> None:
    (work / "w.json").write_text('{"cyd": 2, "ann": 3, "bob": 1}')
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--weights", "w.json")
    assert facts["weights"] == pytest.approx({"ann": 3 / 6, "bob": 1 / 6, "cyd": 2 / 6})
    assert facts["weights_from"] == "given"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ('{"ann": 1, "bobby": 1, "dan": "much", "cyd": true}', ["bob", "'bobby'", "'dan'", "True"]),
        ('{"ann": 1, "ann": 2}', ["stands twice"]),
        ("[1, 2, 3]", ["a JSON list"]),
    ],
)
def test_weights_file_refused(work: Path, content: str, problems: list[str]) -> None:
    (work / "w.json").write_text(content)
    before = everything(work)
    said = glora("aggregate", *CLIENTS, "-o", "out", "--weights", "w.json", code=1).stderr
    assert all(problem in said for problem in problems), said
    assert "w.json" in said
    assert everything(work) == before


def test_missing_weights_file(work: Path) -> None:
    said = glora("aggregate", *CLIENTS, "-o", "out", "--weights", "none.json", code=1).stderr
    assert "none.json" in said


# --- refusals and exit codes ---------------------------------------------------------------------


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

    monkeypatch.setattr("glora_ops.merge.check_values", read)
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
    refused = glora_json("aggregate", *CLIENTS, "-o", "ann/x/../../ann", "--weights", "w.json",
                         code=1)["refused"]  # fmt: skip
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

    monkeypatch.setattr("glora_ops.merge.check_values", read)
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
    fields = {"problem", "client", "file", "tensor", "found", "expected", "remedy"}
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
        assert len(refused) == 12
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
        ["aggregate", "--update", "out"],
        ["aggregate", "--update", "out", "--add", "bob", "--rank", "4"],
        ["aggregate", "--update", "out", "--add", "bob", "--seed", "0"],
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
    rest = glora_json("aggregate", "ann", "dan", "-o", "rest", "--rank", 6, "--missing",
                      "renormalise")  # fmt: skip
    name = "transformer.h.0.mlp.c_proj"
    norms = [facts["certificates"][name]["norm"] for facts in (zero, rest)]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


# --- the same state for other clients ------------------------------------------------------------


def test_updating_in_place_and_elsewhere(work: Path) -> None:
    both = ["--basis", "update", "--seed", 5, "--readout", "2,4", "--pad", "trainable"]
    glora("aggregate", "ann", "bob", "-o", "out", *both)
    glora("aggregate", "ann", "bob", "cyd", "-o", "three", *both)
    glora("aggregate", "ann", "cyd", "-o", "two", *both)
    before = everything(work / "out")
    said = glora("aggregate", "--update", "out", "--add", "cyd", "-o", "new", *both[4:]).stdout
    assert "3 clients" in said
    assert everything(work / "out") == before
    assert everything(work / "new") == everything(work / "three")
    glora("aggregate", "--update", "out/server.safetensors", "--add", "cyd")
    assert everything(work / "out") == everything(work / "three")
    facts = glora_json("aggregate", "--update", "out", "--remove", "bob")
    assert everything(work / "out") == everything(work / "two")
    assert [client["name"] for client in facts["clients"]] == ["ann", "cyd"]
    assert sorted(facts["readouts"]) == ["2", "4"]
    # Whatever else lies in the folder is not thrown away.
    (work / "out" / "notes.txt").write_text("precious")
    before = everything(work)
    said = glora("aggregate", "--update", "out", "--add", "bob", code=1).stderr
    assert "notes.txt" in said
    assert "-o" in said
    assert everything(work) == before


def test_weights_of_added_clients(work: Path) -> None:
    glora("aggregate", "ann", "bob", "-o", "out", "--weights", "3,1")
    glora("aggregate", "ann", "bob", "cyd", "-o", "want", "--weights", "3,1,2")
    (work / "w.json").write_text('{"cyd": 2}')
    for i, weights in enumerate(("2", "w.json")):
        glora("aggregate", "--update", "out", "--add", "cyd", "--weights", weights, "-o", i)
        assert everything(work / str(i)) == everything(work / "want")
    said = glora("aggregate", "--update", "out", "--add", "cyd", code=1).stderr
    assert "the state's weights were given" in said


def test_updates_refused(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out")
    edit_config(work / "ann", lora_alpha=9)
    shutil.rmtree(work / "bob")
    before = everything(work)
    refused = glora_json("aggregate", "--update", "out", "--remove", "cyd", code=1)["refused"]
    named = {(r["client"], r["problem"]) for r in refused}
    assert ("bob", "no such folder") in named
    assert all("--remove NAME" in r["remedy"] for r in refused if r["client"] == "bob")
    refused = glora_json("aggregate", "--update", "out", "--remove", "bob", code=1)["refused"]
    assert [(r["client"], r["file"]) for r in refused] == [("ann", "adapter_config.json")]
    refused = glora_json("aggregate", "--update", "out", "--remove", "dan", code=1)["refused"]
    assert "ann, bob, cyd" in refused[0]["expected"]
    glora("aggregate", "--update", "ann", "--remove", "bob", code=1)
    assert everything(work) == before


# --- OUT appears complete or not at all ----------------------------------------------------------


def test_overwriting(work: Path) -> None:
    glora("aggregate", "ann", "bob", "-o", "out", "--readout", 2)
    before = everything(work)
    assert "overwrite" in glora("aggregate", *CLIENTS, "-o", "out", code=1).stderr
    assert everything(work) == before
    glora("aggregate", *CLIENTS, "-o", "out", "--readout", 4, "--overwrite")
    assert State.load("out/server.safetensors").clients == tuple(CLIENTS)
    assert sorted(p.name for p in (work / "out").iterdir()) == ["r4", "server.safetensors"]


def test_a_folder_of_another_kind_is_never_overwritten(work: Path) -> None:
    before = everything(work)
    glora("aggregate", *CLIENTS, "-o", "ann", "--overwrite", code=1)
    (work / "file").write_text("precious")
    glora("aggregate", *CLIENTS, "-o", "file", "--overwrite", code=1)
    glora("aggregate", *CLIENTS, "-o", "file/below", code=1)
    assert everything(work) == before | {"file": b"precious"}


@pytest.mark.parametrize(("error", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("old", [False, True])
def test_failing_in_the_middle(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, old: bool
) -> None:
    if old:
        glora("aggregate", "ann", "-o", "new/out")
    before = everything(work)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(State, "write_adapter", fail)
    arguments = ["aggregate", *CLIENTS, "-o", "new/out", "--readout", 4, "--overwrite"]
    said = glora(*arguments, code=code).stderr
    assert ("disk full" if code == 1 else "interrupted") in said
    assert everything(work) == before


def test_killed_in_the_middle(work: Path) -> None:
    """A process that dies after the state is written, before the readout is: the old stays."""
    glora("aggregate", "ann", "-o", "out")
    before = everything(work / "out")
    code = (
        "import os, glora_ops.cli; from glora_ops import State;"
        "State.write_adapter = lambda *_, **__: os._exit(9);"
        "glora_ops.cli.app('aggregate ann bob -o out --readout 4 --overwrite'.split())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert everything(work / "out") == before


# --- readout -------------------------------------------------------------------------------------


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


def test_padding(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION)
    assert "--pad trainable" in glora("readout", "out", "-r", 16, "-o", "zero").stdout
    facts = glora_json("readout", "out", "-r", 16, "-o", "one", "--pad", "trainable", "--seed", 1)
    assert facts["notes"] == []
    glora("readout", "out", "-r", 16, "-o", "two", "--pad", "trainable", "--seed", 2)
    zero, one, two = (load_file(Path(f) / "adapter_model.safetensors") for f in
                      ("zero", "one", "two"))  # fmt: skip
    for key, tensor in zero.items():
        beyond = (slice(UNION, None),) if "lora_A" in key else (slice(None), slice(UNION, None))
        assert not tensor[beyond].any()
        assert one[key][beyond].any() == ("lora_A" in key)
        assert torch.equal(one[key], two[key]) == ("lora_B" in key)
    assert_mean(work / "one", [work / c for c in CLIENTS], [1, 1, 1], gpt2)
    said = glora("aggregate", *CLIENTS, "-o", "out2", "--rank", UNION, "--readout", "4,16").stdout
    assert "note: rank 16 is more than the 9 directions" in said


def test_states_that_cannot_be_read_out(work: Path) -> None:
    assert "server.safetensors" in glora("readout", "ann", "-r", 2, "-o", "x", code=1).stderr
    pairs = [(torch.randn(6, 2), torch.randn(2, 5))]
    aggregate(pairs, rank=2).save(work / "bare.safetensors")
    said = glora("readout", "bare.safetensors", "-r", 2, "-o", "x", code=1).stderr
    assert "PEFT folders" in said
    foreign = "ann/adapter_model.safetensors"
    assert "glora metadata" in glora("readout", foreign, "-r", 2, "-o", "x", code=1).stderr
    assert not (work / "x").exists()


# --- inspect -------------------------------------------------------------------------------------


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
        ["aggregate", evil, "bob", "-o", "out"], ["inspect", "out"], ["inspect", evil],
        ["compare", evil, "bob"],
    ):  # fmt: skip
        said = glora(*arguments).stdout
        assert "\x1b" not in said
        assert "\\x1b[31m[bold]evil\\x07" in said


# --- compare -------------------------------------------------------------------------------------


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


# --- pictures ------------------------------------------------------------------------------------


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_pictures(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--plot")
    assert facts["plot"] == "out/spectra.png"
    assert is_png(work / "out/spectra.png")
    glora("aggregate", *CLIENTS, "-o", "out", "--plot", "--basis", "update", "--overwrite")
    for arguments in (["inspect", "out"], ["inspect", "ann"], ["compare", *CLIENTS]):
        said = glora(*arguments, "--plot", "picture.png").stdout
        assert "written: picture.png" in said
        assert is_png(work / "picture.png")
        (work / "picture.png").unlink()


def test_many_modules_and_many_clients_fit_a_picture(work: Path) -> None:
    from glora_ops.plots import plot_adapter, plot_alignment

    plot_adapter("many", {f"layer {i}": torch.rand(4) for i in range(30)}, "many.png")
    cosines = torch.rand(40, 40)
    cosines[0, 1] = float("nan")
    plot_alignment([f"client {i}" for i in range(40)], cosines, cosines, "clients.pdf")
    assert is_png(work / "many.png")
    assert (work / "clients.pdf").exists()


def test_a_picture_needs_matplotlib(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(work)
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (
        ["aggregate", *CLIENTS, "-o", "out", "--plot"], ["inspect", "ann", "--plot", "p.png"],
        ["compare", *CLIENTS, "--plot", "p.png"],
    ):  # fmt: skip
        assert "pip install 'glora[plot]'" in glora(*arguments, code=1).stderr
    assert everything(work) == before


def test_pictures_have_a_known_format(work: Path) -> None:
    assert ".png" in glora("inspect", "ann", "--plot", "p.bmp", code=1).stderr


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[], ["aggregate"], ["readout"], ["inspect"], ["compare"], ["fl", "run"], ["fl", "report"],
     ["fl", "partition"], ["fl", "configs"]],
)  # fmt: skip
def test_help_starts_with_a_sentence_and_ends_with_an_example(command: list[str]) -> None:
    said = glora(*command, "--help").stdout
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", said) if p.strip()]
    assert paragraphs[0].startswith("Usage: glora")
    assert paragraphs[1].endswith(".")
    assert paragraphs[-1].startswith(f"Example: glora {' '.join(command)}".strip())


def test_help_explains_the_three_steps() -> None:
    said = glora("--help").stdout
    assert all(step in said for step in ("Look.", "Aggregate.", "Read out.", "Exit codes"))
    assert "Usage: glora" in glora(code=2).output


def test_examples_of_the_help_parse(work: Path) -> None:
    """Every example of a help text is a command line that works."""
    (work / "clients").mkdir()
    for name in CLIENTS:
        (work / name).rename(work / "clients" / name)
    said = "".join(
        glora(c, "--help").stdout for c in ("aggregate", "readout", "inspect", "compare")
    )
    examples = re.findall(r"Example: glora (.*)", said)
    assert len(examples) == 4
    for example in examples:
        glora(*example.split())
    assert sorted(p.name for p in work.iterdir()) == [
        "adapters", "alignment.png", "clients", "out", "spectra.png",
    ]  # fmt: skip


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, glora_ops.cli; "
        "print([m for m in ('peft', 'transformers', 'matplotlib', 'scipy', 'glora_ops.merge', "
        "'glora_ops.plots') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_installed_command(work: Path) -> None:
    command = shutil.which("glora", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("glora is not installed beside this interpreter")
    edit_config(work / "bob", use_dora=True)
    arguments = [*CLIENTS, "-o", "out", "--on-bad-client", "skip", "--readout", "4", "--json"]
    done = subprocess.run(
        [command, "aggregate", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["rank"] == 8
    assert done.stderr == ""
