"""What no adapter folder may hold, each with its reason and its remedy."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from adapter_folders import (
    CONFIG,
    FIRST_A,
    FIRST_B,
    TENSORS,
    assert_names_everything,
    assert_same_update,
    edit_config,
    edit_tensors,
    refused,
    updates,
)
from safetensors.torch import save_file
from torch import Tensor

from glora_ops.adapters import check_values, read_adapter
from glora_ops.errors import Refused

CONV_A = "base_model.model.conv.lora_A.weight"
CONV_B = "base_model.model.conv.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        ({"use_dora": True}, ["use_dora = True", "DoRA", "not linear"]),
        ({"lora_bias": True}, ["lora_bias = True", "bias"]),
        ({"bias": "all"}, ["bias = 'all'", "'none'"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'"]),
        ({"target_parameters": "experts.w"}, ["target_parameters", "malformed"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"alora_invocation_tokens": [5]}, ["alora_invocation_tokens"]),
        ({"arrow_config": {"top_k": 3}}, ["arrow_config"]),
        ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"kasa_config": {"beta": 1}}, ["kasa_config"]),
        ({"kasa_config": {}}, ["kasa_config = {}"]),
        ({"velora_config": {"scale": 1}}, ["velora_config"]),
        ({"monteclora_config": {"num_samples": 8}}, ["monteclora_config"]),
        ({"megatron_config": {"tp": 2}}, ["megatron_config"]),
        ({"ensure_weight_tying": 1}, ["ensure_weight_tying", "true or false"]),
        ({"shiny_new_variant": {"on": 1}}, ["shiny_new_variant", "unknown to glora"]),
        ({"\x1b[2J": 1}, [r"'\x1b[2J' = 1"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'", "base", "save_pretrained"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4"]),
        ({"init_lora_weights": "olora"}, ["olora"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({"init_lora_weights": "loftq"}, ["loftq"]),
        ({"init_lora_weights": "lora_ga"}, ["lora_ga"]),
        ({"init_lora_weights": 1}, ["init_lora_weights = 1"]),
        ({"peft_type": "LOHA"}, ["peft_type = 'LOHA'", "'LORA'"]),
        ({"r": 0}, ["r = 0", "integer ≥ 1"]),
        ({"r": None}, ["r = None"]),
        ({"r": True}, ["r = True"]),
        ({"lora_alpha": None}, ["lora_alpha = None", "finite"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha = nan", "finite"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha = inf", "finite"]),
        ({"lora_alpha": 10**400}, ["lora_alpha = 1000", "finite"]),
        ({"use_rslora": "yes"}, ["use_rslora = 'yes'"]),
        ({"modules_to_save": "head"}, ["modules_to_save = 'head'"]),
        ({"modules_to_save": [""]}, ["modules_to_save = ['']"]),
        ({"modules_to_save": ["n"] * 4097}, ["modules_to_save", "at most 4096 names"]),
        ({"target_parameters": ["a.b"] * 4097}, ["target_parameters", "at most 4096 names"]),
        ({"base_model_name_or_path": "a\nb"}, ["base_model_name_or_path"]),
        ({"alpha_pattern": {"first": None}}, ["alpha_pattern", "finite numbers"]),
        ({"alpha_pattern": {"(": 3}}, ["alpha_pattern", "'('", "a ( without its )"]),
        ({"rank_pattern": [1]}, ["rank_pattern", "malformed"]),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_config_refused(client: Path, change: dict[str, Any], needles: list[str]) -> None:
    edit_config(client, **change)
    refused(client, CONFIG, *needles)


def test_ranks_beyond_the_layer(tmp_path: Path) -> None:
    pair = {"lora_A": torch.ones(30, 8), "lora_B": torch.ones(8, 30)}
    save_file({f"base_model.model.x.{k}.weight": x for k, x in pair.items()}, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 30, "lora_alpha": 1}))
    refused(tmp_path, TENSORS, "the rank is larger than the layer")


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        (b"{", "Expecting"),
        (b"[1]", "a JSON list"),
        (b'{"r": 1, "r": 2}', "'r' stands twice"),
        (b"\xff{}", "utf-8"),
        (b"[" * 100_000, "deeply"),
        (b" " * (4 * 2**20 + 1), "bytes"),
    ],
)
def test_config_that_is_no_json(client: Path, text: bytes, needle: str) -> None:
    (client / CONFIG).write_bytes(text)
    refused(client, CONFIG, "not readable JSON", needle, "save the adapter again")


def test_missing_files(client: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nobody", "nobody", "no such folder")
    (client / CONFIG).unlink()
    (client / TENSORS).unlink()
    refusals = refused(client, TENSORS, "missing", "save_pretrained")
    assert_names_everything(refusals, CONFIG, "missing")


def test_pickle_is_never_opened(client: Path) -> None:
    os.replace(client / TENSORS, client / "adapter_model.bin")
    refused(client, "adapter_model.bin", "pickle", "safe_serialization=True")


def test_links_that_lead_outside(client: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    os.replace(client / TENSORS, outside)
    (client / TENSORS).symlink_to(outside)
    refused(client, TENSORS, "outside", "elsewhere", "cp -rL")
    (client / TENSORS).unlink()
    (client / "blobs").mkdir()
    os.replace(outside, client / "blobs" / "x")
    (client / TENSORS).symlink_to("blobs/x")
    assert check_values(read_adapter(client)) == []


def test_pipes_and_folders_are_no_files(client: Path) -> None:
    (client / TENSORS).unlink()
    os.mkfifo(client / TENSORS)
    refused(client, TENSORS, "not a regular file")


@pytest.mark.parametrize("content", ['{"num_examples": -1}', '{"num_examples": "6"}', "[6]"])
def test_num_examples_refused(client: Path, content: str) -> None:
    (client / "glora.json").write_text(content)
    refused(client, "glora.json")


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (lambda t: t.pop(FIRST_B), [FIRST_A, "half", FIRST_B]),
        (lambda t: t.pop(FIRST_A), [FIRST_B, "half", FIRST_A]),
        (
            lambda t: t.update({FIRST_A.replace("A.w", "A.default.w"): t.pop(FIRST_A)}),
            ["lora_A.default.weight", "no PEFT name"],
        ),
        (
            lambda t: t.update({"base_model.model.first.lora_magnitude_vector": torch.ones(10)}),
            ["lora_magnitude_vector", "DoRA", "1 such"],
        ),
        (
            lambda t: t.update({"base_model.model.first.lora_B.bias": torch.ones(10)}),
            ["lora_B.bias", "lora_bias"],
        ),
        (
            lambda t: t.update({"base_model.model.norm.weight": torch.ones(10)}),
            ["base_model.model.norm.weight", "none of modules_to_save"],
        ),
        (lambda t: t.update({"stray": torch.ones(1)}), ["'stray'"]),
        (
            lambda t: t.update({FIRST_A: torch.ones(3, 12), FIRST_B: torch.ones(10, 3)}),
            [FIRST_A, "found 3", "expected 4"],
        ),
        (lambda t: t.update({FIRST_B: torch.ones(10, 3)}), [FIRST_B, "(10, 3)", "(d_out, 4)"]),
        (lambda t: t.update({FIRST_B: torch.ones(4, 10)}), [FIRST_B, "(4, 10)", "(d_out, 4)"]),
        (lambda t: t.update({FIRST_A: torch.ones(0)}), [FIRST_A, "(0,)", "DeepSpeed"]),
        (lambda t: t.update({FIRST_B: torch.ones(0, 4)}), [FIRST_B, "(0, 4)", "DeepSpeed"]),
        (
            lambda t: t.update({FIRST_A: torch.ones(0, 12), FIRST_B: torch.ones(10, 0)}),
            [FIRST_A, "(0, 12)"],
        ),
        (lambda t: t.update({FIRST_A: torch.ones(4, 3, 3)}), [FIRST_A, "(4, 3, 3)", "Conv2d"]),
        (
            lambda t: t.update({CONV_B: torch.ones(6, 2, 1, 1)}),
            [CONV_B, "(6, 2, 1, 1)", "grouped"],
        ),
        (lambda t: t.update({CONV_B: torch.ones(0)}), [CONV_B, "(0,)", "DeepSpeed"]),
        (lambda t: t.update({CONV_B: torch.ones(6, 4, 0, 1)}), ["(6, 4, 0, 1)", "DeepSpeed"]),
        (lambda t: t.update({CONV_A: torch.ones(4, 3, 0, 2)}), [CONV_A, "DeepSpeed"]),
        (lambda t: t.clear(), ["no LoRA factors"]),
        (
            lambda t: t.update({FIRST_A: torch.ones(4, 12, dtype=torch.int64)}),
            [FIRST_A, "torch.int64", "torch.float16", "save the adapter in bfloat16"],
        ),
    ],
)
def test_tensors_refused(
    client: Path, change: Callable[[dict[str, Tensor]], object], needles: list[str]
) -> None:
    edit_tensors(client, change)
    refused(client, TENSORS, *needles)


def test_all_problems_are_listed_at_once(client: Path) -> None:
    edit_config(client, use_dora=True, bias="all")
    edit_tensors(client, lambda t: (t.pop(FIRST_B), t.update(stray=torch.ones(1))))
    (client / "glora.json").write_text('{"num_examples": -1}')
    text = "\n".join(map(str, refused(client)))
    for needle in ("use_dora", "bias", "half", "stray", "num_examples"):
        assert needle in text


@pytest.mark.parametrize(
    ("config", "needles"),
    [
        ({"use_dora": True}, ["use_dora", "lora_magnitude_vector"]),
        ({"lora_bias": True}, ["lora_bias", "lora_B.bias"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'"]),
        ({"init_lora_weights": "olora"}, ["'olora'"]),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, ["trainable_token", "token"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variants_saved_by_peft_are_refused(
    config: dict[str, Any], needles: list[str], tmp_path: Path
) -> None:
    folder = models.save_client(
        tmp_path / "c", models.mixed, r=2, target_modules=["first"], **config
    )
    refusals = refused(folder)
    for needle in needles:
        assert_names_everything(refusals, needle)


def test_mica_is_plain_lora_once_trained(tmp_path: Path) -> None:
    folder = models.save_client(
        tmp_path / "c", models.mixed, r=2, target_modules=["first"], init_lora_weights="mica"
    )
    assert_same_update(read_adapter(folder), models.peft_update(models.mixed, folder))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base")
def test_pissa_converted_by_peft_is_accepted(tmp_path: Path) -> None:
    """The remedy that the refusal names works: afterwards the update is one of the plain base."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")
    model = get_peft_model(models.mixed(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    trained = dict(model.named_parameters())["base_model.model.first.lora_A.default.weight"]
    trained.data += 0.1
    expected = model.double().base_model.model.first.get_delta_weight("default").detach()
    residual = model.base_model.model.first.base_layer.weight.detach()
    expected = residual + expected - models.mixed().first.weight.double()
    model.float().save_pretrained(
        str(tmp_path / "c"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter = read_adapter(tmp_path / "c")
    assert adapter.modules["first"].rank == 4
    assert torch.allclose(updates(adapter)["first"], expected, atol=1e-5)


def test_multihead_attention(tmp_path: Path) -> None:
    folder = models.save_client(tmp_path / "c", models.attention, r=2, target_modules=["mha"])
    key = "base_model.model.mha.base_layer.out_proj.lora_A.weight"
    refused(folder, TENSORS, key, "MultiheadAttention", "separate linear layers")


def test_values_that_are_not_finite(client: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST_A][1, 2] = math.nan
        tensors[FIRST_A][3, 0] = math.inf
        tensors["base_model.model.embed_tokens.lora_embedding_B"][0, 1] = -math.inf

    edit_tensors(client, spoil)
    refusals = check_values(read_adapter(client))
    assert len(refusals) == 2
    assert_names_everything(
        refusals, "client-7", TENSORS, FIRST_A, "2 of 48", "nan at (1, 2)", "finite", "leave"
    )
    assert_names_everything(refusals, "lora_embedding_B", "1 of 48", "-inf at (0, 1)")


def test_dense_values_that_are_not_finite(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("bert-head"), tmp_path / "c")
    key = "base_model.model.classifier.bias"
    edit_tensors(folder, lambda t: t[key].fill_(math.inf))
    assert_names_everything(check_values(read_adapter(folder)), key, "2 of 2", "inf at (0,)")


def test_a_file_that_changes_is_noticed(client: Path) -> None:
    adapter = read_adapter(client)
    edit_tensors(client, lambda t: t[FIRST_A].add_(1))
    for read in (lambda: adapter.factors("first"), lambda: check_values(adapter)):
        with pytest.raises(Refused, match=r"client-7.*changed.*written at another time.*checked"):
            read()
    (client / TENSORS).unlink()
    with pytest.raises(Refused, match=r"client-7.*changed.*no such file any more"):
        adapter.factors("first")


def test_a_file_cut_short_while_it_is_read_is_noticed(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mapping this would be a bus error, and the end of the process."""
    monkeypatch.setattr("glora_ops.adapters.stored.PIECE", 64)
    adapter = read_adapter(client)
    pieces = adapter.stored.scan()
    next(pieces)
    with (client / TENSORS).open("rb+") as file:
        file.truncate(adapter.stored.start + 100)
    with pytest.raises(Refused, match=r"client-7.*changed.*end of the file"):
        list(pieces)


def test_a_file_rewritten_while_it_is_read_is_noticed(client: Path) -> None:
    """Of the same size: what has been read may be half of the old and half of the new."""
    adapter = read_adapter(client)
    pieces = adapter.stored.scan()
    next(pieces)
    (client / TENSORS).write_bytes((client / TENSORS).read_bytes())
    with pytest.raises(Refused, match=r"client-7.*changed.*written at another time"):
        list(pieces)


def test_fp64_factors_whose_squares_are_lost_are_refused(client: Path) -> None:
    edit_tensors(client, lambda t: t.update({FIRST_A: t[FIRST_A].double() * 1e60}))
    (refusal,) = check_values(read_adapter(client))
    assert_names_everything([refusal], FIRST_A, "too large", "1e-40 to 1e40")


def test_the_digest_is_that_of_the_file(client: Path) -> None:
    digest = hashlib.sha256()
    assert check_values(read_adapter(client), digest) == []
    assert digest.hexdigest() == hashlib.sha256((client / TENSORS).read_bytes()).hexdigest()
