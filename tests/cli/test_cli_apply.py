"""`glora apply` gives PEFT's merged weights, file by file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import CLIENTS, everything, glora, glora_json
from peft_models import bert, gpt2, load, mixed, save_client
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from glora_ops import apply_adapter


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def merged(base, adapter: Path) -> dict[str, Tensor]:  # of peft_models
    return load(base, adapter).merge_and_unload().state_dict()


@pytest.fixture
def base(work: Path) -> Path:
    gpt2().save_pretrained(work / "base")
    return work / "base"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_transposed_base_as_peft_merges_it(work: Path, base: Path, client: str) -> None:
    done = apply_adapter(work / client, base, work / "model")
    want, before = merged(gpt2, work / client), weights(base)
    for name, weight in weights(work / "model").items():
        assert (weight - want[name]).norm() <= 1e-6 * want[name].norm(), name
        assert torch.equal(weight, before[name]) == (name not in done.changed)
    assert len(done.changed) == 6
    loaded = AutoModelForCausalLM.from_pretrained(work / "model").state_dict()
    assert all((loaded[name] - w).norm() <= 1e-6 * w.norm() for name, w in want.items())


def test_shards_keep_their_index_and_heads_are_replaced(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    save_client(tmp_path / "ann", bert, r=4, lora_alpha=8, task_type="SEQ_CLS",
                target_modules=["query", "word_embeddings", "dense"])  # fmt: skip
    facts = glora_json(
        "apply", tmp_path / "ann", "--base", tmp_path / "base", "-o", tmp_path / "model"
    )
    assert json.loads((tmp_path / "model/model.safetensors.index.json").read_text()) == index
    want = merged(bert, tmp_path / "ann")
    for name, weight in weights(tmp_path / "model").items():
        assert (weight - want[name]).norm() <= 1e-6 * want[name].norm(), name
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= set(facts["changed"])
    (note,) = facts["notes"]
    assert note["text"].startswith("bert.embeddings.word_embeddings.weight changed: an output")


def test_a_layer_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(dict(mixed().state_dict()), tmp_path / "base/model.safetensors")
    layers = ["embed_tokens", "conv", "first", "last"]
    save_client(
        tmp_path / "ann", mixed, r=3, lora_alpha=6, target_modules=layers, modules_to_save=["head"]
    )
    done = apply_adapter(tmp_path / "ann", tmp_path / "base", tmp_path / "model")
    want = merged(mixed, tmp_path / "ann")
    for name, weight in weights(tmp_path / "model").items():
        assert (weight - want[name]).norm() <= 1e-6 * want[name].norm(), name
    assert {"conv.weight", "head.bias"} <= set(done.changed)


def test_dtype_of_what_is_written(work: Path, base: Path) -> None:
    glora("apply", "ann", "--base", "base", "-o", "plain")
    glora("apply", "ann", "--base", "base", "-o", "half", "--dtype", "bf16")
    plain = weights(work / "plain")
    assert all(torch.equal(w, plain[k].bfloat16()) for k, w in weights(work / "half").items())
    config = json.loads((work / "half/config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"bfloat16"}


def test_what_does_not_fit_is_listed_and_nothing_is_written(work: Path, base: Path) -> None:
    save_client(work / "other", bert, r=2, target_modules=["query"])
    before = everything(work)
    problems = glora_json("apply", "other", "--base", "base", "-o", "m", code=1)["refused"]
    assert len(problems) == 2  # one for each layer's query
    assert {r["problem"] for r in problems} == {"the base has no such weight"}
    assert "missing" in glora("apply", "ann", "--base", "bob", "-o", "m", code=1).stderr
    glora("apply", "ann", "--base", "base", "-o", "base/m", code=1)
    assert everything(work) == before


def test_only_its_own_folder_is_overwritten(work: Path, base: Path) -> None:
    command = ["apply", "ann", "--base", "base", "-o", "model"]
    glora(*command)
    assert "overwrite" in glora(*command, code=1).stderr
    glora(*command, "--overwrite", "--dtype", "fp16")
    for spoil in ("notes.txt", "config.json"):
        shutil.copytree(work / "model", work / "spoilt")
        (work / "spoilt" / spoil).write_text("{}")
        said = glora(*command[:-1], "spoilt", "--overwrite", code=1).stderr
        assert spoil in said
        shutil.rmtree(work / "spoilt")
    shutil.copytree(base, work / "foreign")
    glora(*command[:-1], "foreign", "--overwrite", code=1)


def test_a_dry_run_compares_and_writes_nothing(work: Path, base: Path) -> None:
    before = everything(work)
    command = ["apply", "ann", "--base", "base", "-o", "model"]
    planned = glora_json(*command, "--dry-run")
    said = glora(*command, "--dry-run").stdout
    assert said.startswith("would write: model  merged model, 6 of ")
    assert "nothing was read but headers, and nothing was written" in said
    glora("apply", "ann", "--base", "bob", "-o", "model", "--dry-run", code=1)
    assert everything(work) == before
    done = glora_json(*command)
    assert planned == done | {"dry_run": True, "seconds": planned["seconds"]}
    glora(*command, "--dry-run", code=1)  # taken since
