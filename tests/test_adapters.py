"""PEFT folders in and out: PEFT's own merged dense weights are the truth for every scaling."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_ops.adapters import (
    Adapter,
    adapter_layout,
    check_base_copies,
    check_compatible,
    check_values,
    inspect_adapter,
    read_adapter,
    write_adapter,
)
from glora_ops.adapters import folders as folders_module
from glora_ops.adapters.config import PatternTable
from glora_ops.errors import GloraError, GloraWarning, Refusal, Refused
from glora_ops.merge import aggregate_adapters
from glora_ops.state import State

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TARGETS = ["embed_tokens", "conv", "first", "last"]

CLIENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (models.mixed, {"r": 4, "target_modules": TARGETS}),
    "alpha": (models.mixed, {"r": 4, "lora_alpha": 11, "target_modules": TARGETS}),
    "negative-alpha": (models.mixed, {"r": 2, "lora_alpha": -3, "target_modules": ["first"]}),
    "rslora": (
        models.mixed,
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": TARGETS},
    ),
    "patterns": (
        models.mixed,
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": TARGETS,
            # The first pattern that matches decides, and "first" matches "block.first" too.
            "rank_pattern": {r"block\..*": 2, "first": 5, "^conv$": 1},
            "alpha_pattern": {"first": 7, r"block\.(first|last)": 9, "embed_tokens": 2},
        },
    ),
    "rslora-patterns": (
        models.mixed,
        {
            "r": 3,
            "use_rslora": True,
            "target_modules": TARGETS,
            "rank_pattern": {"conv": 2},
            "alpha_pattern": {"last": 1.5},
        },
    ),
    "conv": (models.mixed, {"r": 3, "lora_alpha": 5, "target_modules": ["conv", "last"]}),
    "saved-head": (
        models.mixed,
        {"r": 2, "target_modules": ["first"], "modules_to_save": ["head"]},
    ),
    "bf16": (
        models.mixed,
        {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "dtype": torch.bfloat16},
    ),
    "gpt2": (
        models.gpt2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"},
    ),
    "gpt2-embedding": (
        models.gpt2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "wte"], "task_type": "CAUSAL_LM"},
    ),
    "bert-head": (
        models.bert,
        {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "orthogonal": (
        models.mixed,
        {"r": 2, "target_modules": ["first"], "init_lora_weights": "orthogonal"},
    ),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the client `name` of CLIENTS, saved once by PEFT; not to be changed."""
    root = tmp_path_factory.mktemp("clients")

    def get(name: str) -> Path:
        if not (root / name).exists():
            base, config = CLIENTS[name]
            models.save_client(root / name, base, **config)
        return root / name

    return get


@pytest.fixture
def client(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A sound adapter of the mixed model, to be spoilt."""
    return shutil.copytree(saved("alpha"), tmp_path / "client-7")


def in_base_form(adapter: Adapter, name: str, update: Tensor, like: Tensor) -> Tensor:
    """ΔW (d_out, d_in) as PEFT adds it to a base weight shaped as `like`."""
    transposed = adapter.modules[name].kind == "embedding" or adapter.modules[name].fan_in_fan_out
    return (update.mT if transposed else update).reshape(like.shape)


def weight_name(module: str) -> str:
    return module + ".weight"


def updates(adapter: Adapter) -> dict[str, Tensor]:
    result = {}
    for name, module in adapter.modules.items():
        b, a = adapter.factors(name)
        result[name] = module.scaling * (b.double() @ a.double())
    return result


def assert_same_update(adapter: Adapter, truth: dict[str, Tensor]) -> None:
    ours = updates(adapter)
    seen = set()
    for name, update in ours.items():
        expected = truth[weight_name(name)]
        seen.add(weight_name(name))
        got = in_base_form(adapter, name, update, expected)
        assert torch.linalg.norm(got - expected) <= 1e-12 * torch.linalg.norm(expected), name
    dense = {name for name in truth if name not in seen}
    assert dense == adapter.dense.keys()


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", CLIENTS)
def test_update_is_what_peft_merges(name: str, saved: Callable[[str], Path]) -> None:
    adapter = read_adapter(saved(name))
    assert adapter.name == name
    assert check_values(adapter) == []
    truth = models.peft_update(CLIENTS[name][0], saved(name))
    if name == "gpt2-embedding":
        del truth["lm_head.weight"]  # tied to the embedding, so it moves along
    assert_same_update(adapter, truth)


def test_the_truth_rejects_wrong_scalings(saved: Callable[[str], Path]) -> None:
    truth = models.peft_update(models.mixed, saved("rslora"))
    adapter = read_adapter(saved("rslora"))
    b, a = adapter.factors("first")
    for wrong in (1.0, 5 / 3, 5.0, (5 / math.sqrt(3)) ** 2):
        off = torch.linalg.norm(wrong * (b.double() @ a.double()) - truth["first.weight"])
        assert off > 0.1 * torch.linalg.norm(truth["first.weight"])


PATTERNS = [
    "first",
    r"block\.first",
    ".*first",
    "^block",
    r"block\.\d+",
    "a|first",
    "(a|b)lock.*",
    "st",
    "a+b",
]


@pytest.mark.parametrize("module", ["first", "block.first", "xfirst", "block.1", "a.first", "a+b"])
@pytest.mark.parametrize("skip", range(len(PATTERNS)))
def test_patterns_match_as_in_peft(module: str, skip: int) -> None:
    from peft.utils.other import get_pattern_key

    patterns = {pattern: float(i) for i, pattern in enumerate(PATTERNS[skip:])}
    expected = patterns.get(get_pattern_key(patterns.keys(), module), -1.0)
    assert PatternTable(patterns, -1.0)[module] == expected


def test_kinds_shapes_and_dtypes(saved: Callable[[str], Path]) -> None:
    adapter = read_adapter(saved("bf16"))
    conv, embedding = adapter.modules["conv"], adapter.modules["embed_tokens"]
    assert (conv.kind, conv.rank, conv.d_out, conv.d_in, conv.kernel) == (
        "conv2d",
        4,
        6,
        3 * 3 * 2,
        (3, 2),
    )
    assert (embedding.kind, embedding.d_out, embedding.d_in) == ("embedding", 12, 13)
    assert conv.a_shape == (4, 3, 3, 2)
    b, a = adapter.factors("conv")
    assert (b.dtype, a.dtype, b.shape, a.shape) == (torch.bfloat16, torch.bfloat16, (6, 4), (4, 18))


def test_dense_and_base_copies(saved: Callable[[str], Path], tmp_path: Path) -> None:
    head = read_adapter(saved("bert-head"))
    assert head.dense.keys() == {"classifier.weight", "classifier.bias"}
    assert head.task_type == "SEQ_CLS"
    stored = load_file(saved("bert-head") / TENSORS)
    key = "base_model.model.classifier.weight"
    assert torch.equal(head.dense_tensor("classifier.weight"), stored[key])

    folder = models.save_client(
        tmp_path / "c", models.gpt2, r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"
    )
    with_copy = read_adapter(folder)
    assert with_copy.base_copies.keys() == {"lm_head.base_layer.weight"}
    assert not with_copy.dense


def test_num_examples(client: Path) -> None:
    assert read_adapter(client).num_examples is None
    (client / "glora.json").write_text('{"num_examples": 600}')
    assert read_adapter(client).num_examples == 600


def test_future_keys_without_a_value_are_harmless(client: Path) -> None:
    edit_config(client, future_a=None, future_b=False, future_c={}, future_d=[], future_e="")
    assert read_adapter(client).modules


def test_every_peft_default_is_accepted(client: Path) -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    defaults.update(peft_type="LORA", r=4, lora_alpha=11)
    edit_config(client, **defaults)
    assert read_adapter(client).modules["first"].scaling == 11 / 4


# ------------------------------------------------------------------------------------ refusals


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    save_file(tensors, folder / TENSORS)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def assert_names_everything(refusals: list[Refusal], *needles: str) -> None:
    """One of the refusals says all of `needles`, and each has a value, expectation and remedy."""
    for refusal in refusals:
        assert refusal.found, refusal
        assert refusal.expected, refusal
        assert refusal.remedy, refusal
    texts = [str(refusal) for refusal in refusals]
    assert any(all(needle in text for needle in needles) for text in texts), texts


def refused(folder: Path, *needles: str, **options: Any) -> list[Refusal]:
    before = tree(folder.parent)
    adapter, refusals = inspect_adapter(folder, **options)
    assert adapter is None
    assert_names_everything(refusals, *needles)
    assert all(refusal.client == folder.name for refusal in refusals)
    with pytest.raises(Refused) as caught:
        read_adapter(folder, **options)
    assert list(caught.value.refusals) == refusals
    assert tree(folder.parent) == before
    return refusals


FIRST_A = "base_model.model.first.lora_A.weight"
FIRST_B = "base_model.model.first.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        ({"use_dora": True}, ["use_dora = True", "DoRA", "not linear"]),
        ({"lora_bias": True}, ["lora_bias = True", "bias"]),
        ({"bias": "all"}, ["bias = 'all'", "'none'"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'"]),
        ({"target_parameters": ["experts.w"]}, ["target_parameters", "experts"]),
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
        ({"ensure_weight_tying": True}, ["ensure_weight_tying"]),
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
        ({"base_model_name_or_path": "a\nb"}, ["base_model_name_or_path"]),
        ({"alpha_pattern": {"first": None}}, ["alpha_pattern", "finite numbers"]),
        ({"alpha_pattern": {"(": 3}}, ["alpha_pattern", "not valid"]),
        ({"alpha_pattern": {"(a+)+x": 3}}, ["alpha_pattern", "for ever", "in full"]),
        ({"rank_pattern": [1]}, ["rank_pattern", "malformed"]),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_config_refused(client: Path, change: dict[str, Any], needles: list[str]) -> None:
    edit_config(client, **change)
    refused(client, CONFIG, *needles)


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
            lambda t: t.update({"base_model.model.conv.lora_B.weight": torch.ones(6, 2, 1, 1)}),
            ["conv.lora_B.weight", "(6, 2, 1, 1)", "grouped"],
        ),
        (lambda t: t.clear(), ["no LoRA factors"]),
        (
            lambda t: t.update({FIRST_A: torch.ones(4, 12, dtype=torch.int64)}),
            [FIRST_A, "'I64'", "F64, F32, BF16, F16"],
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
        ({"target_parameters": ["block.last.weight"]}, ["target_parameters"]),
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
    edit_tensors(client, lambda t: t.update({FIRST_A: torch.ones(5, 12)}))
    with pytest.raises(Refused, match=r"changed.*\(5, 12\).*\(4, 12\)"):
        adapter.factors("first")


# -------------------------------------------------------------------------- safetensors headers


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / TENSORS).read_bytes()
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def write_header(folder: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_header_rewritten_unchanged_is_accepted(client: Path) -> None:
    write_header(client, *header_of(client))
    assert check_values(read_adapter(client)) == []


@pytest.mark.parametrize(
    ("field", "value", "needles"),
    [
        ("dtype", "F128", ["dtype", "'F128'", "F64, F32"]),
        ("dtype", ["F32"], ["dtype", "['F32']"]),
        ("dtype", "F64", ["192 bytes", "384 bytes for F64 [4, 12]"]),
        ("shape", [4, 13], ["192 bytes", "208 bytes"]),
        ("shape", [4, -12], ["shape", "[4, -12]"]),
        ("shape", [2**62, 2**62], ["192 bytes", f"{2**126}"]),
        ("shape", [4, 12.0], ["shape", "[4, 12.0]"]),
        ("shape", [True, 48], ["shape", "[True, 48]"]),
        ("shape", "4x12", ["shape", "'4x12'"]),
        ("shape", [48] + [1] * 8, ["shape is malformed"]),
        ("data_offsets", [192, 0], ["[192, 0]", "begin ≤ end"]),
        ("data_offsets", [0], ["[0]"]),
        ("data_offsets", [-192, 0], ["[-192, 0]"]),
        ("data_offsets", [2**40, 2**40 + 192], ["hole", f"{2**40}"]),
        ("data_offsets", None, ["None"]),
        ("extra", 1, ["entry", "dtype, shape and data_offsets"]),
    ],
)
def test_header_entries_that_lie(client: Path, field: str, value: Any, needles: list[str]) -> None:
    header, data = header_of(client)
    header[FIRST_A][field] = value
    write_header(client, header, data)
    refused(client, TENSORS, FIRST_A, *needles)


def test_overlaps_and_holes(client: Path) -> None:
    header, data = header_of(client)
    names = sorted(
        (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    for shift, word in ((-4, "overlaps"), (4, "hole")):
        lying = json.loads(json.dumps(header))
        lying[names[2]]["data_offsets"] = [
            offset + shift for offset in lying[names[2]]["data_offsets"]
        ]
        write_header(client, lying, data)
        refused(client, TENSORS, names[2], word, "start at")


@pytest.mark.parametrize("cut", [-1, 1])
def test_files_too_short_or_too_long(client: Path, cut: int) -> None:
    header, data = header_of(client)
    write_header(client, header, data[:cut] if cut < 0 else data + b"\0")
    size = (client / TENSORS).stat().st_size
    refused(client, TENSORS, "length", f"{size} bytes", f"{size - cut} bytes")


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"", "does not fit"),
        (b"\0\0", "does not fit"),
        (b"\xff" * 8 + b"{}", str(2**64 - 1)),
        ((9).to_bytes(8, "little") + b"{}", "9 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "a JSON list"),
        ((0).to_bytes(8, "little"), "not valid JSON"),
        ((1).to_bytes(8, "little") + b"{", "not valid JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "utf-8"),
        ((40_000).to_bytes(8, "little") + b'{"a":' + b"[" * 39_995, "deeply"),
    ],
)
def test_files_that_are_no_safetensors(client: Path, content: bytes, needle: str) -> None:
    (client / TENSORS).write_bytes(content)
    refused(client, TENSORS, needle, "send it again")


def test_duplicate_keys_bad_names_and_metadata(client: Path) -> None:
    header, data = header_of(client)
    text = json.dumps(header)
    entry = json.dumps(header[FIRST_A])
    write_header(client, (text[:-1] + f', "{FIRST_A}": {entry}}}').encode(), data)
    refused(client, TENSORS, FIRST_A, "stands twice")
    for name in ("\x1b[2J", "\ud800", "x" * 513, ""):
        renamed = {name if key == FIRST_A else key: value for key, value in header.items()}
        write_header(client, renamed, data)
        refused(client, TENSORS, "not a name").pop().__str__().encode()  # printable as UTF-8
    write_header(client, {**header, "__metadata__": {"format": 1}}, data)
    refused(client, TENSORS, "metadata", "strings only")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 1), st.binary(max_size=3)), min_size=1, max_size=4
    )
)
def test_damage_never_surprises(
    edits: list[tuple[float, int, bytes]], client: Path, saved: Callable[[str], Path]
) -> None:
    """Any damage to a file is refused, or leaves a file that safetensors itself reads."""
    sound = (saved("alpha") / TENSORS).read_bytes()
    content = bytearray(sound)
    header = 8 + int.from_bytes(sound[:8], "little")
    for place, removed, inserted in edits:
        at = int(place * header)
        content[at : at + removed] = inserted
    (client / TENSORS).write_bytes(content)
    adapter, refusals = inspect_adapter(client)
    assert (adapter is None) == bool(refusals)
    if adapter is not None:
        check_values(adapter)


def test_the_limit_on_bytes(client: Path) -> None:
    size = (client / TENSORS).stat().st_size
    assert inspect_adapter(client, max_bytes=size)[0]
    refused(
        client, TENSORS, f"{size} bytes", f"at most {size - 1}", "max_bytes", max_bytes=size - 1
    )


# ------------------------------------------------------------------------------ compatibility


@pytest.fixture
def pair(saved: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """Two sound, different adapters of the mixed model."""
    return (
        shutil.copytree(saved("plain"), tmp_path / "a"),
        shutil.copytree(saved("rslora"), tmp_path / "b"),
    )


def incompatible(*folders: Path, base: str | None = None, client: str, needles: list[str]) -> None:
    refusals = check_compatible([read_adapter(folder) for folder in folders], base)
    assert_names_everything(refusals, *needles)
    assert [refusal.client for refusal in refusals] == [client]


def test_compatible(pair: tuple[Path, Path]) -> None:
    assert check_compatible([read_adapter(folder) for folder in pair]) == []


def test_no_clients() -> None:
    assert_names_everything(check_compatible([]), "nothing to aggregate")


@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision"])
def test_other_bases(pair: tuple[Path, Path], field: str) -> None:
    edit_config(pair[1], **{field: "other"})
    incompatible(*pair, client="b", needles=["another base", "'other'", "base=NAME"])
    assert check_compatible([read_adapter(folder) for folder in pair], base="vouched") == []


def test_the_minority_is_refused(pair: tuple[Path, Path], saved: Callable[[str], Path]) -> None:
    edit_config(pair[0], base_model_name_or_path="odd")
    incompatible(*pair, saved("alpha"), client="a", needles=["'odd'", "(None, 'main')"])


def test_revision_main_is_the_default(pair: tuple[Path, Path]) -> None:
    edit_config(pair[1], revision="main")
    assert check_compatible([read_adapter(folder) for folder in pair]) == []


def test_other_task_types(pair: tuple[Path, Path]) -> None:
    edit_config(pair[0], task_type="CAUSAL_LM")
    assert check_compatible([read_adapter(folder) for folder in pair]) == []
    edit_config(pair[1], task_type="SEQ_CLS")
    incompatible(*pair, client="b", needles=["task_type = 'SEQ_CLS'", "'CAUSAL_LM'"])


def test_other_shapes(pair: tuple[Path, Path]) -> None:
    edit_tensors(pair[1], lambda t: t.update({FIRST_B: torch.ones(9, 3)}))
    incompatible(
        *pair, client="b", needles=["base_model.model.first", "('linear', 9, 12)", "10, 12"]
    )


def test_other_kinds(pair: tuple[Path, Path]) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.first.lora_embedding_A"] = tensors.pop(FIRST_A)
        tensors["base_model.model.first.lora_embedding_B"] = tensors.pop(FIRST_B)

    edit_tensors(pair[1], swap)
    incompatible(*pair, client="b", needles=["first", "'embedding'", "'linear'"])


def test_other_convolution_kernels(pair: tuple[Path, Path]) -> None:
    key = "base_model.model.conv.lora_A.weight"
    edit_tensors(pair[1], lambda t: t.update({key: torch.ones(3, 3, 2, 3)}))
    incompatible(*pair, client="b", needles=["conv", "('conv2d', 6, 18, 2, 3)", "18, 3, 2"])


def test_other_dense_shapes(pair: tuple[Path, Path]) -> None:
    for folder, rows in zip(pair, (2, 3), strict=True):
        edit_config(folder, modules_to_save=["head"])
        name = "base_model.model.head.weight"
        edit_tensors(folder, lambda t, n=rows, name=name: t.update({name: torch.ones(n, 5)}))
    incompatible(*pair, client="b", needles=["head.weight", "(3, 5)", "(2, 5)"])


def test_duplicates(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    link = tmp_path / "link"
    link.symlink_to(a)
    incompatible(a, b, a, client="a", needles=["given twice", "weight"])
    incompatible(a, b, link, client="link", needles=["given twice", "weight"])
    named_alike = shutil.copytree(b, tmp_path / "deep" / "a")
    incompatible(a, named_alike, client="a", needles=["same name", "rename"])
    copy = shutil.copytree(a, tmp_path / "copy")
    incompatible(a, b, copy, client="copy", needles=["same bytes", "weight"])
    edit_tensors(copy, lambda t: t[FIRST_B].mul_(2))
    assert check_compatible([read_adapter(folder) for folder in (a, b, copy)]) == []


def test_duplicates_are_compared_to_the_last_byte(client: Path, tmp_path: Path) -> None:
    edit_config(client, modules_to_save=["head"])
    big = {"base_model.model.head.weight": torch.zeros(2, 50_000)}
    edit_tensors(client, lambda t: t.update(big))
    other = shutil.copytree(client, tmp_path / "other")
    incompatible(client, other, client="other", needles=["same bytes"])
    content = bytearray((other / TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (other / TENSORS).write_bytes(content)
    assert check_compatible([read_adapter(client), read_adapter(other)]) == []


def test_conv1d_flags_do_not_matter(tmp_path: Path) -> None:
    """PEFT's flag follows the layer adapted last, so clients of one base differ in it."""
    settings = {"r": 2, "task_type": "CAUSAL_LM"}
    adapters = [
        read_adapter(models.save_client(tmp_path / name, models.gpt2, target_modules=t, **settings))
        for name, t in (("a", ["c_attn"]), ("b", ["c_attn", "lm_head"]))
    ]
    assert [a.config["fan_in_fan_out"] for a in adapters] == [True, False]
    assert check_compatible(adapters) == []
    flags = {n: m["fan_in_fan_out"] for n, m in adapter_layout(adapters)["modules"].items()}
    assert flags == {
        "lm_head": False,
        "transformer.h.0.attn.c_attn": True,
        "transformer.h.1.attn.c_attn": True,
    }


def test_base_copies_must_agree(tmp_path: Path) -> None:
    folders = [
        models.save_client(tmp_path / n, models.gpt2, seed=s, r=2, target_modules=["lm_head"])
        for s, n in enumerate("ab")
    ]
    assert check_base_copies([read_adapter(folder) for folder in folders]) == []
    key = "base_model.model.lm_head.base_layer.weight"
    edit_tensors(folders[1], lambda t: t[key][0, 0].add_(1e-3))
    ((index, refusal),) = check_base_copies([read_adapter(folder) for folder in folders])
    assert index == 1
    assert_names_everything([refusal], "'b'", key, "'a'", "same base")


# ------------------------------------------------------------------------------------- writing


def as_written(adapter: Adapter, rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors of one rank for every module of `adapter`."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(m.d_out, rank, generator=g, dtype=torch.float64),
            torch.randn(rank, m.d_in, generator=g, dtype=torch.float64),
        )
        for name, m in adapter.modules.items()
    }


def written(
    saved: Callable[[str], Path], name: str, folder: Path, rank: int, seed: int = 0
) -> Adapter:
    adapter = read_adapter(saved(name))
    write_adapter(
        folder,
        as_written(adapter, rank, seed),
        layout=json.loads(json.dumps(adapter_layout([adapter]))),
        dense={n: 2 * adapter.dense_tensor(n) for n in adapter.dense},
    )
    return read_adapter(folder)


@pytest.mark.parametrize("name", ["plain", "saved-head", "gpt2", "bert-head"])
def test_written_folder_is_what_peft_merges(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    result = written(saved, name, tmp_path / "r3", rank=3)
    truth = models.peft_update(CLIENTS[name][0], tmp_path / "r3")
    assert_same_update(result, truth)
    factors = as_written(read_adapter(saved(name)), 3)
    for module, (b, a) in factors.items():
        got = updates(result)[module]
        assert torch.linalg.norm(got - b @ a) <= 1e-6 * torch.linalg.norm(b @ a)
    for n in result.dense:
        assert torch.equal(result.dense_tensor(n), 2 * read_adapter(saved(name)).dense_tensor(n))
    config = result.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["inference_mode"] is True
    assert {p.name for p in (tmp_path / "r3").iterdir()} == {TENSORS, CONFIG, "README.md"}
    assert "rank 3" in (tmp_path / "r3" / "README.md").read_text()


@pytest.mark.parametrize("name", ["gpt2", "bert-head", "conv"])
@pytest.mark.parametrize("ranks", [(8, 2), (2, 8)])
def test_hotswap(
    name: str, ranks: tuple[int, int], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft.utils.hotswap import hotswap_adapter

    base = CLIENTS[name][0]
    for seed, rank in enumerate(ranks):
        written(saved, name, tmp_path / f"r{rank}", rank, seed)
    model = models.load(base, tmp_path / f"r{ranks[0]}")
    # PEFT refuses to swap a saved head: it would stay that of the first adapter.
    swapped_in = tmp_path / f"r{ranks[1]}"
    lora_only = shutil.copytree(swapped_in, tmp_path / "lora-only")
    edit_tensors(lora_only, lambda t: [t.pop(k) for k in list(t) if "lora_" not in k])
    hotswap_adapter(model, str(lora_only), adapter_name="default", torch_device="cpu")
    got = models.merged_update(base, model.double())
    truth = models.peft_update(base, swapped_in)
    for module in read_adapter(swapped_in).modules:
        expected = truth[weight_name(module)]
        difference = got[weight_name(module)] - expected
        assert torch.linalg.norm(difference) <= 1e-6 * torch.linalg.norm(expected)


def test_dropout_survives_where_clients_agree(saved: Callable[[str], Path], tmp_path: Path) -> None:
    a, b = (shutil.copytree(saved(n), tmp_path / n) for n in ("plain", "rslora"))
    edit_config(a, lora_dropout=0.1)
    edit_config(b, lora_dropout=0.1)
    assert adapter_layout([read_adapter(a), read_adapter(b)])["lora_dropout"] == 0.1
    edit_config(b, lora_dropout=0.2)
    assert adapter_layout([read_adapter(a), read_adapter(b)])["lora_dropout"] == 0.0


def test_layout_names_the_vouched_base(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("plain"), tmp_path / "a")
    edit_config(folder, base_model_name_or_path="org/base", revision="v1")
    adapter = read_adapter(folder)
    for base, expected in (
        (None, ("org/base", "v1")),
        ("org/base", ("org/base", "v1")),
        ("mine", ("mine", None)),
    ):
        layout = adapter_layout([adapter], base)
        assert (layout["base_model"], layout["revision"]) == expected
    write_adapter(tmp_path / "out", as_written(adapter, 2), layout=adapter_layout([adapter]))
    assert 'base_model: "org/base"' in (tmp_path / "out" / "README.md").read_text()


def test_views_and_shared_tensors_are_written(saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(saved("plain"))
    flat = torch.randn(60)
    factors = {
        n: (flat[: m.d_out * 3].reshape(m.d_out, 3), flat[: m.d_in * 3].reshape(m.d_in, 3).mT)
        for n, m in adapter.modules.items()
    }
    write_adapter(tmp_path / "out", factors, layout=adapter_layout([adapter]))
    b, a = read_adapter(tmp_path / "out").factors("first")
    assert torch.equal(b, flat[:30].reshape(10, 3))
    assert torch.equal(a, flat[:36].reshape(12, 3).mT)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f, d: f.update(first=(torch.ones(10, 2), torch.ones(2, 12))), r"ranks \[2, 3\]"),
        (lambda f, d: f.clear(), "ranks"),
        (lambda f, d: f.update(other=f["first"]), "other.*layout"),
        (lambda f, d: f.update(conv=(torch.ones(6, 3), torch.ones(3, 17))), "conv.*multiple of 6"),
        (lambda f, d: d.update({"norm.weight": torch.ones(2)}), r"norm.weight.*modules_to_save"),
        (
            lambda f, d: f.update(
                first=(torch.full((10, 3), 1e39, dtype=torch.float64), torch.ones(3, 12))
            ),
            "lora_B.*not finite",
        ),
        (lambda f, d: d.update({"head.bias": torch.tensor([math.nan])}), "head.bias.*not finite"),
    ],
)
def test_nothing_is_written_when_refused(
    spoil: Callable[..., None], match: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = read_adapter(saved("plain"))
    layout = adapter_layout([adapter]) | {"modules_to_save": ["head"]}
    factors, dense = as_written(adapter, 3), {}
    spoil(factors, dense)
    with pytest.raises(GloraError, match=match):
        write_adapter(tmp_path / "new" / "out", factors, layout=layout, dense=dense)
    assert not list(tmp_path.iterdir())


def test_overwriting(saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(saved("plain"))
    layout = adapter_layout([adapter])
    write_adapter(tmp_path / "out", as_written(adapter, 2), layout=layout)
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(GloraError, match=r"existing.*overwrite"):
        write_adapter(tmp_path / "out", as_written(adapter, 3), layout=layout)
    write_adapter(tmp_path / "out", as_written(adapter, 3), layout=layout, overwrite=True)
    assert read_adapter(tmp_path / "out").config["r"] == 3
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(GloraError, match="other things"):
        write_adapter(tmp_path / "precious", as_written(adapter, 3), layout=layout, overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "precious"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_failures_while_writing(
    exchange: bool,
    overwrite: bool,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever call fails, the old folder stands, or none, and nothing is left beside it."""
    adapter = read_adapter(saved("plain"))
    layout = adapter_layout([adapter])
    out = tmp_path / "out"
    if not exchange:
        monkeypatch.setattr(folders_module, "_exchange", lambda a, b: False)
    if overwrite:
        write_adapter(out, as_written(adapter, 2), layout=layout)

    failures = 0
    for step in range(30):
        calls = iter(range(100))

        def failing(real: Callable[..., Any], calls: Any = calls, step: int = step) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == step:
                    raise OSError("no space left on device")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            m.setattr(os, "fsync", failing(os.fsync))
            m.setattr(os, "replace", failing(os.replace))
            m.setattr(folders_module, "_exchange", failing(folders_module._exchange))
            m.setattr(Path, "write_text", failing(Path.write_text))
            try:
                write_adapter(out, as_written(adapter, 3), layout=layout, overwrite=overwrite)
            except OSError:
                failures += 1
                if next(calls) > 40:
                    pytest.fail("the step was never reached")
        left = {p.name for p in tmp_path.iterdir()}
        if out.exists() and read_adapter(out).config["r"] == 3:
            break  # far enough that the new folder stands
        assert left == ({"out"} if overwrite else set())
        if overwrite:
            assert read_adapter(out).config["r"] == 2
    else:
        pytest.fail("never written")
    assert failures >= 5
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


KILLED = """
import os, signal, sys, json
from pathlib import Path
import torch
from glora_ops.adapters import adapter_layout, folders, read_adapter, write_adapter
source, out = sys.argv[1:3]
adapter = read_adapter(source)
factors = {n: (torch.ones(m.d_out, 3), torch.ones(3, m.d_in)) for n, m in adapter.modules.items()}
layout = adapter_layout([adapter])

def child(step):
    calls = iter(range(1000))
    def killing(real):
        def call(*args, **kwargs):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for module, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rmdir"),
                         (os, "unlink"), (folders, "_exchange"), (Path, "write_text")):
        setattr(module, name, killing(getattr(module, name)))
    write_adapter(out, factors, layout=layout, overwrite=True)
    os._exit(0)

ranks = []
for step in range(100):
    pid = os.fork()
    if not pid:
        child(step)
    _, status = os.waitpid(pid, 0)
    ranks.append(read_adapter(out).config["r"])
    if not status:
        break
print(json.dumps(ranks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux")
def test_kill_at_any_moment(saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(saved("plain"))
    out = tmp_path / "out"
    write_adapter(out, as_written(adapter, 2), layout=adapter_layout([adapter]))
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(saved("plain")), str(out)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = json.loads(run.stdout)
    assert ranks == sorted(ranks)  # the old one up to some moment, the new one from then on
    assert (ranks[0], ranks[-1]) == (2, 3)
    assert ranks.count(2) >= 5


def test_importing_needs_neither_peft_nor_transformers() -> None:
    code = "import sys, glora_ops.adapters; print({'peft', 'transformers'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------ merging


MERGED: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "mixed": (
        models.mixed,
        [
            {"r": 2, "lora_alpha": 5, "target_modules": TARGETS},
            {"r": 3, "use_rslora": True, "target_modules": TARGETS, "modules_to_save": ["head"]},
            {
                "r": 2,
                "target_modules": ["conv", "first", "last"],
                "rank_pattern": {r"block\..*": 1},
                "alpha_pattern": {"conv": -3},
                "modules_to_save": ["head"],
            },
        ],
    ),
    "gpt2": (
        models.gpt2,
        [
            {"r": 2, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"},
            {"r": 1, "lora_alpha": 3, "target_modules": ["c_attn", "lm_head"]},
        ],
    ),
    "bert": (
        models.bert,
        [
            {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
            {"r": 3, "lora_alpha": 9, "target_modules": ["query"], "task_type": "SEQ_CLS"},
        ],
    ),
}


def save_merged(name: str, root: Path) -> list[Path]:
    base, configs = MERGED[name]
    return [
        models.save_client(root / f"client-{i}", base, seed=i, **config)
        for i, config in enumerate(configs)
    ]


@pytest.mark.parametrize("basis", ["consensus", "update"])
@pytest.mark.parametrize("name", MERGED)
def test_merged_adapter_is_the_mean_of_the_merged_models(
    name: str, basis: str, tmp_path: Path
) -> None:
    base, folders = MERGED[name][0], save_merged(name, tmp_path)
    shares = [0.5, 0.2, 0.3][: len(folders)]
    shares = [share / sum(shares) for share in shares]
    state = aggregate_adapters(folders, [10 * share for share in shares], rank=10, basis=basis)
    state.write_adapter(tmp_path / "out", rank=10)
    truths = [models.peft_update(base, folder) for folder in folders]
    got = models.peft_update(base, tmp_path / "out")
    assert got.keys() == {key for truth in truths for key in truth}
    for key, update in got.items():
        # A head that a client did not train is no vote for the base's head.
        voters = [i for i, truth in enumerate(truths) if key in truth]
        total = sum(shares[i] for i in voters) if key.startswith("head") else 1.0
        mean = sum(shares[i] / total * truths[i][key] for i in voters)
        assert torch.linalg.norm(update - mean) <= 2e-6 * torch.linalg.norm(mean), key
        assert torch.linalg.norm(mean) > 0.05


def test_missing_modules_renormalised(tmp_path: Path) -> None:
    base, folders = MERGED["mixed"][0], save_merged("mixed", tmp_path)
    state = aggregate_adapters(folders, [5, 2, 3], rank=10, missing="renormalise")
    state.write_adapter(tmp_path / "out", rank=10)
    truths = [models.peft_update(base, folder)["embed_tokens.weight"] for folder in folders[:2]]
    mean = (5 * truths[0] + 2 * truths[1]) / 7
    got = models.peft_update(base, tmp_path / "out")["embed_tokens.weight"]
    assert torch.linalg.norm(got - mean) <= 2e-6 * torch.linalg.norm(mean)
    assert state.settings["dense_from"] == {
        name: ["client-1", "client-2"] for name in ("head.bias", "head.weight")
    }


def test_saved_states_still_write_adapters(tmp_path: Path) -> None:
    state = aggregate_adapters(save_merged("bert", tmp_path), rank=4)
    state.save(tmp_path / "server.safetensors")
    state.write_adapter(tmp_path / "now", rank=4)
    State.load(tmp_path / "server.safetensors").write_adapter(tmp_path / "later", rank=4)
    for file in (TENSORS, CONFIG, "README.md"):
        assert (tmp_path / "now" / file).read_bytes() == (tmp_path / "later" / file).read_bytes()


def test_where_weights_come_from(tmp_path: Path) -> None:
    folders = save_merged("bert", tmp_path)

    def weights(*given: Any) -> tuple[str, tuple[float, ...]]:
        state = aggregate_adapters(folders, *given, rank=2)
        return state.settings["weights_from"], state.weights

    (folders[0] / "glora.json").write_text('{"num_examples": 600}')
    assert weights() == ("equal", (0.5, 0.5))
    (folders[1] / "glora.json").write_text('{"num_examples": 200}')
    assert weights() == ("num_examples", (0.75, 0.25))
    assert weights([1, 4]) == ("given", (0.2, 0.8))


def test_refusing_lists_every_client(tmp_path: Path) -> None:
    folders = save_merged("mixed", tmp_path)
    edit_config(folders[0], use_dora=True)
    edit_tensors(folders[2], lambda t: t.update(stray=torch.ones(1)))
    before = tree(tmp_path)
    with pytest.raises(Refused) as caught:
        aggregate_adapters([*folders, tmp_path / "nobody"])
    assert {r.client for r in caught.value.refusals} == {"client-0", "client-2", "nobody"}
    assert_names_everything(list(caught.value.refusals), "client-0", "use_dora")
    assert tree(tmp_path) == before


def test_headers_are_checked_before_values(tmp_path: Path) -> None:
    folders = save_merged("mixed", tmp_path)
    edit_tensors(folders[0], lambda t: t[FIRST_A].fill_(math.nan))
    edit_config(folders[1], bias="all")
    with pytest.raises(Refused) as caught:
        aggregate_adapters(folders)
    assert {r.client for r in caught.value.refusals} == {"client-1"}
    edit_config(folders[1], bias="none")
    with pytest.raises(Refused, match=r"client-0.*first.lora_A.*not finite.*48 of 48|24 of 24"):
        aggregate_adapters(folders)


def test_bad_clients_are_skipped(tmp_path: Path) -> None:
    folders = save_merged("mixed", tmp_path)
    edit_tensors(folders[1], lambda t: t[FIRST_A].fill_(math.nan))
    odd = shutil.copytree(folders[0], tmp_path / "odd")
    edit_config(odd, base_model_name_or_path="other")
    everyone = [tmp_path / "nobody", odd, *folders]
    with pytest.warns(GloraWarning, match=r"left out:\n.*nobody"):
        state = aggregate_adapters(everyone, [9, 9, 1, 9, 3], rank=4, on_bad_client="skip")
    assert state.clients == ("client-0", "client-2")
    assert state.weights == (0.25, 0.75)
    text = "\n".join(state.settings["skipped"])
    for needle in ("nobody", "'odd'", "another base", "client-1", "not finite"):
        assert needle in text
    with pytest.raises(Refused, match=r"(?s)nobody.*nothing to aggregate"):
        aggregate_adapters(everyone[:1], on_bad_client="skip")
    with pytest.raises(Refused, match="nothing to aggregate"):
        aggregate_adapters([])


def test_clients_of_different_dtypes(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    folders = [
        models.save_client(
            tmp_path / str(dtype), models.mixed, seed=i, dtype=dtype, r=2, target_modules=["first"]
        )
        for i, dtype in enumerate(dtypes)
    ]
    state = aggregate_adapters(folders, rank=8, basis="update")
    state.write_adapter(tmp_path / "out", rank=8)
    mean = sum(models.peft_update(models.mixed, folder)["first.weight"] for folder in folders) / 4
    got = models.peft_update(models.mixed, tmp_path / "out")["first.weight"]
    assert torch.linalg.norm(got - mean) <= 2e-6 * torch.linalg.norm(mean)


def test_dense_refused(tmp_path: Path) -> None:
    folders = save_merged("bert", tmp_path)
    with pytest.raises(Refused, match=r"client-0.*classifier.*2 such tensors.*dense='mean'"):
        aggregate_adapters(folders, dense="refuse")


def test_vouching_for_the_base(tmp_path: Path) -> None:
    folders = save_merged("bert", tmp_path)
    edit_config(folders[0], base_model_name_or_path="/local/bert", revision="v1")
    with pytest.raises(Refused, match="another base"):
        aggregate_adapters(folders)
    state = aggregate_adapters(folders, base="org/bert", rank=2)
    state.write_adapter(tmp_path / "out", rank=2)
    assert read_adapter(tmp_path / "out").base_model == "org/bert"


@pytest.mark.parametrize(
    "options",
    [{"dense": "drop"}, {"on_bad_client": "ignore"}, {"weights": [1]}, {"weights": [1, -1]}],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], tmp_path: Path) -> None:
    folders = save_merged("bert", tmp_path)
    with pytest.raises(GloraError, match=next(iter(options)).removesuffix("s")):
        aggregate_adapters(folders, **options)
    with pytest.raises(GloraError, match="list of folders"):
        aggregate_adapters(str(folders[0]))


def test_progress(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    aggregate_adapters(
        save_merged("bert", tmp_path), rank=2, progress=lambda *call: calls.append(call)
    )
    assert list(dict.fromkeys(step for step, _, _ in calls)) == [
        "headers",
        "values",
        "dense",
        "modules",
    ]
    for step in ("headers", "values", "dense", "modules"):
        assert [c for c in calls if c[0] == step][-1][1:] in {(2, 2), (4, 4)}


# ------------------------------------------------------------------ facts about PEFT we rely on


def test_peft_hotswap_misscales_rank_patterns(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Why one rank is written for all modules; if this fails, PEFT has been repaired."""
    from peft.utils.hotswap import hotswap_adapter

    config = {"r": 2, "lora_alpha": 8, "target_modules": ["first", "last"]}
    plain = models.save_client(tmp_path / "plain", models.mixed, **config)
    pattern = models.save_client(
        tmp_path / "pattern", models.mixed, seed=2, rank_pattern={"last": 4}, **config
    )
    model = models.load(models.mixed, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hotswap_adapter(model, str(pattern), adapter_name="default", torch_device="cpu")
    got = models.merged_update(models.mixed, model)["block.last.weight"]
    truth = models.peft_update(models.mixed, pattern)["block.last.weight"]
    assert torch.allclose(got, 2 * truth)
