"""Where clients lie and what they are called; what else a path can be; LoRA in one file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import layout_models as models
import pytest
import torch
from adapter_folders import CONFIG, TENSORS, edit_config, refused
from commands import everything, glora, glora_json
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_ops import State, aggregate_adapters
from glora_ops.adapters import read_adapter
from glora_ops.adapters.places import find_places
from glora_ops.errors import Refused
from glora_ops.merging.update import update_adapters

PLAIN = {"r": 2, "target_modules": ["q_proj"]}


def llama(folder: Path, seed: int) -> Path:
    return models.adapt(folder, models.llama, seed, **PLAIN)


def names(*clients: object, known: tuple[str, ...] = ()) -> list[str]:
    return [place.name for place in find_places([str(c) for c in clients], known)]


def test_clients_are_called_by_their_folders_and_what_tells_them_apart() -> None:
    assert names("x/ann", "y/bob") == ["ann", "bob"]
    assert names("x/last", "y/last", "z/bob") == ["x/last", "y/last", "bob"]
    assert names("x/a/last", "y/a/last") == ["x/a/last", "y/a/last"]
    assert names("x/last", "x/last") == ["last", "last"]  # one folder twice is refused by that
    assert names("ann=x/last", "y/last") == ["ann", "last"]
    assert names("z/x/last", known=("x/last", "last")) == ["x/last"]


def test_what_exists_and_urls_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    (found,) = find_places(["lr=3"])
    assert (found.name, found.path) == ("lr=3", tmp_path / "lr=3")
    ours, named = find_places(["s3://bucket/lr=3/", "ann=s3://bucket/lr=3"])
    assert (ours.name, str(ours.path), ours.named) == ("lr=3", "s3://bucket/lr=3", False)
    assert (named.name, str(named.path), named.named) == ("ann", "s3://bucket/lr=3", True)


def test_checkpoints_of_one_name_are_merged_updated_and_weighed(tmp_path: Path) -> None:
    clients = [llama(tmp_path / f"run{i}/checkpoint-5", i) for i in range(3)]
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"run0/checkpoint-5": 3, "run1/checkpoint-5": 1}))
    out = tmp_path / "out"
    said = glora_json("aggregate", *clients[:2], "-o", out, "--weights", weights, "--readout", 4)
    assert [c["name"] for c in said["clients"]] == ["run0/checkpoint-5", "run1/checkpoint-5"]
    models.assert_mean(models.llama, out / "r4", clients[:2], [3, 1])
    new = tmp_path / "new"
    glora("update", out, "--add", f"cyd={clients[2]}", "--weights", 2,
          "--remove", "run1/checkpoint-5", "-o", new)  # fmt: skip
    models.assert_mean(models.llama, new / "r4", [clients[0], clients[2]], [3, 2])
    compared = glora_json("compare", *clients)["clients"]
    assert [c["name"] for c in compared] == [f"run{i}/checkpoint-5" for i in range(3)]
    again = update_adapters(aggregate_adapters(clients[:2], rank=4), add=[clients[1]])
    assert again.clients == ("run0/checkpoint-5", "run1/checkpoint-5")


def test_recorded_clients_are_read_by_name_path_or_given_name_only(tmp_path: Path) -> None:
    """What a state records bears the client's name, or the user gave the name; digests hold."""
    clients = [llama(tmp_path / name, i) for i, name in enumerate(("run/checkpoint-5", "x", "y"))]
    out = tmp_path / "out"
    glora("aggregate", tmp_path / "run", f"bob={clients[1]}", clients[2], "-o", out, "--readout", 4)
    said = glora("update", out, "--remove", "y").stderr
    assert said.splitlines() == [
        f"reads: in {tmp_path / 'run'}: checkpoint-5 (recorded in STATE)",
        f"reads: in {tmp_path}: x (recorded in STATE)",
    ]
    models.assert_mean(models.llama, out / "r4", clients[:2])
    state = State.load(out / "server.safetensors")
    assert state.record is not None
    assert [entry["named"] for entry in state.record["clients"]] == [False, True]
    bob = state.record["clients"][1]
    shutil.copytree(clients[2], tmp_path / "z")
    bob["path"] = str(tmp_path / "z")
    with pytest.raises(Refused, match="not what it was when the state was made"):
        update_adapters(state, remove=["run"])
    bob["named"] = False
    with pytest.raises(Refused, match="a folder that is not the client's"):
        update_adapters(state, remove=["run"])
    bob |= {"named": True, "name": "b/b"}  # no name that could have been given
    with pytest.raises(Refused, match="a folder that is not the client's"):
        update_adapters(state, remove=["run"])


def test_inputs_of_every_form_lie_apart_from_the_output(tmp_path: Path) -> None:
    client = llama(tmp_path / "work/x", 1)
    listed = tmp_path / "work/clients.txt"
    listed.write_text(f"{client}\tann\n")
    before = everything(tmp_path)
    for given in ([f"ann={client}"], ["--clients", listed]):
        for out, says in (
            ("work", "holds what glora did not write"),
            ("work/x/out", "the output and an input lie in one another"),
        ):
            command = ["aggregate", *given, "-o", tmp_path / out, "--overwrite"]
            assert says in " ".join(glora(*command, code=1).output.split())
    glora("aggregate", f"ann={client}", "-o", tmp_path / "made")
    nested = shutil.copytree(client, tmp_path / "made/r2")
    says = "holds what glora did not write: r2/"
    command = ["aggregate", f"ann={nested}", "-o", tmp_path / "made", "--overwrite"]
    assert says in " ".join(glora(*command, code=1).output.split())
    shutil.rmtree(tmp_path / "made")
    assert everything(tmp_path) == before


def test_a_list_of_clients_is_a_regular_file_of_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    (tmp_path / "long").write_bytes(b"a\n" * (2**21 + 1))
    for name, says in (
        ("pipe", "a regular file"),
        ("none", "cannot be read"),
        ("bytes", "cannot be read"),
        ("long", "at most 4194304 bytes"),
    ):
        command = ["aggregate", "--clients", tmp_path / name, "-o", tmp_path / "out"]
        assert says in " ".join(glora(*command, code=1).output.split())
    (tmp_path / "many").write_text("a\tb\tc\td\n" * 20_000)
    refusals = glora_json(
        "aggregate", "--clients", tmp_path / "many", "-o", tmp_path / "out", code=1
    )["refused"]
    assert len(refusals) == 5
    assert refusals[-1]["more"] == 19_995


@pytest.mark.parametrize("form", ["tabs", "json"])
def test_clients_listed_in_a_file(form: str, tmp_path: Path) -> None:
    clients = [llama(tmp_path / f"c{i}", i) for i in range(2)]
    listed = tmp_path / "clients.txt"
    lines = [f"{clients[0]}\tann\t3", "", "# and", f"{clients[1]}\t\t1"]
    if form == "json":
        objects = [
            {"path": str(clients[0]), "name": "ann", "weight": 3},
            {"path": str(clients[1]), "weight": 1},
        ]
        lines = [json.dumps(entry) for entry in objects]
    listed.write_text("\n".join(lines))
    said = glora_json("aggregate", "--clients", listed, "-o", tmp_path / "o", "--readout", 4)
    assert said["weights"] == {"ann": 0.75, "c1": 0.25}
    models.assert_mean(models.llama, tmp_path / "o/r4", clients, [3, 1])


def test_lists_that_do_not_fit_are_refused_line_by_line(tmp_path: Path) -> None:
    listed = tmp_path / "clients.txt"
    listed.write_text('a\tb\tc\td\na b\tx y\na\tb\tmany\n{"path": "a", "wait": 1}\n{"name": "a"}\n')
    before = everything(tmp_path)
    text = glora("aggregate", "--clients", listed, "-o", tmp_path / "o", code=1).output
    for said in ("line 1, ", "4 fields", "line 2", "'x y' is not of letters", "line 3",
                 "'many' is no number", "unknown wait", "no path"):  # fmt: skip
        assert said in text, said
    listed.write_text("a\t\t1\nb\n")
    assert "1 of 2" in glora("aggregate", "--clients", listed, "-o", tmp_path / "o", code=1).output
    assert everything(tmp_path) == before | {"clients.txt": listed.read_bytes()}
    glora("aggregate", "a", "--clients", listed, "-o", tmp_path / "o", code=2)


def test_a_folder_of_adapters_is_taken_where_it_holds_one_and_pointed_into_else(
    tmp_path: Path,
) -> None:
    one = llama(tmp_path / "run/checkpoint-5", 1)
    assert read_adapter(tmp_path / "run").path == one
    assert read_adapter(tmp_path / "run").name == "run"
    llama(tmp_path / "run/checkpoint-9", 2)
    refused(tmp_path / "run", "several adapters", "checkpoint-5, checkpoint-9", "/checkpoint-9'")


def test_what_else_lies_at_a_path_is_said(tmp_path: Path) -> None:
    client = llama(tmp_path / "c", 1)
    refused(client / TENSORS, "a file of an adapter folder", f"name its folder, {str(client)!r}")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "a file, not an adapter folder", "no safetensors")
    base = tmp_path / "base"
    models.llama().save_pretrained(base)
    refused(base, "a base model, not an adapter")
    refused(tmp_path / "none", "no such folder", "nothing at")


# --- LoRA in one file ----------------------------------------------------------------------------


DENOISER: dict[str, Any] = {
    "r": 2, "lora_alpha": 6, "target_modules": ["to_q", "0", "1"], "rank_pattern": {"to_q": 3},
}  # fmt: skip


class Pipeline:
    """Factors of a denoiser and a text encoder as PEFT makes them, and their truth."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = models.adapt(folder, models.unet, seed, **DENOISER)
        self.raw = json.loads((self.folder / CONFIG).read_text())

    def tensors(self) -> dict[str, Tensor]:
        return {
            key.removeprefix("base_model.model."): x
            for key, x in load_file(self.folder / TENSORS).items()
        }


def diffusers_file(pipeline: Pipeline, path: Path) -> Path:
    metadata = {f"unet.{key}": value for key, value in pipeline.raw.items()}
    tensors = {f"unet.{key}": x for key, x in pipeline.tensors().items()}
    tensors["text_encoder.fc.lora_A.weight"] = torch.ones(2, 5)
    tensors["text_encoder.fc.lora_B.weight"] = torch.ones(4, 2)
    metadata |= {"text_encoder.r": 2, "text_encoder.lora_alpha": 4}
    described = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, path, metadata=described)
    return path


def kohya_file(pipeline: Pipeline, path: Path) -> Path:
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    tensors = {}
    for key, x in pipeline.tensors().items():
        module, side, _ = key.rsplit(".", 2)
        flat = "lora_unet_" + module.replace(".", "_")
        tensors[f"{flat}.{sides[side]}.weight"] = x
        tensors[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(tensors, path)
    return path


def model_file(pipeline: Pipeline, path: Path) -> Path:
    """As diffusers saves the adapter of one model: no part's name before the keys."""
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(pipeline.raw)}
    save_file(pipeline.tensors(), path, metadata=metadata)
    return path


@pytest.mark.parametrize("form", [diffusers_file, model_file, kohya_file])
def test_lora_in_one_file_is_what_it_was_in_a_folder(form: Any, tmp_path: Path) -> None:
    pipelines = [Pipeline(tmp_path / f"p{i}", i) for i in range(2)]
    files = [form(p, tmp_path / f"{i}.safetensors") for i, p in enumerate(pipelines)]
    state = aggregate_adapters([files[0], pipelines[1].folder], base="one", rank=8)
    unet = {name for name in state.modules if not name.startswith("text_encoder.")}
    assert unet == read_adapter(pipelines[0].folder).modules.keys()
    assert state.settings["remarks"][0].startswith("0.safetensors: read as a ")
    plain = aggregate_adapters([p.folder for p in pipelines], base="one", rank=8)
    for name in unet:
        for ours, theirs in zip(
            state.modules[name].update, plain.modules[name].update, strict=True
        ):
            assert torch.equal(ours, theirs)
    said = glora("inspect", files[0]).output
    assert "conv2d" in said
    assert "note: read as a " in said
    if form is diffusers_file:
        stored = state.modules["text_encoder.fc"].update
        torch.testing.assert_close(stored[0] @ stored[1], 2 * torch.ones(4, 5))  # 4/2 · 2 · ½


def test_files_that_leave_something_to_guess_are_refused(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path / "p", 1)
    path = tmp_path / "x.safetensors"
    save_file({f"unet.{key}": x for key, x in pipeline.tensors().items()}, path)
    refused(path, "the file does not say what its tensors mean", "lora_adapter_metadata")
    tensors = load_file(kohya_file(pipeline, path))
    save_file({k: x for k, x in tensors.items() if not k.endswith("to_q.alpha")}, path)
    refused(path, "to_q", "the module has no usable alpha")
    save_file({k.replace("to_q", "my_q"): x for k, x in tensors.items()}, path)
    refused(path, "my_q", "cannot be told from its parts")
    save_file(tensors | {"lora_unet_to_q.dora_scale": torch.ones(2)}, path)
    refused(path, "dora_scale", "no part of plain LoRA")
    diffusers_file(pipeline, path)
    pipeline.raw["use_dora"] = True
    refused(diffusers_file(pipeline, path), "DoRA")


def test_an_adapter_beside_others_is_read_and_they_are_named(tmp_path: Path) -> None:
    model = get_peft_model(models.llama(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("reference", LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "c"))
    edit_config(tmp_path / "c", base_model_name_or_path="tiny/base")
    (remark,) = read_adapter(tmp_path / "c").remarks
    assert remark.endswith("reference/ (an adapter by itself)")
