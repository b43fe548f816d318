"""PEFT folders in: PEFT's own merged dense weights are the truth for every scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import peft_models as models
import pytest
import torch
from adapter_folders import CLIENTS, TENSORS, assert_same_update, edit_config
from safetensors.torch import load_file

from glora_ops.adapters import check_values, read_adapter
from glora_ops.adapters.adapter_config import PatternTable


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


@pytest.mark.parametrize(
    "key", ["lorap_emb_lr", "loraplus_lr_ratio", "learning_rate", "lora_dtype"]
)
def test_keys_of_trainers_that_cannot_matter_are_harmless(client: Path, key: str) -> None:
    edit_config(client, **{key: 1e-6})
    assert read_adapter(client).modules


def test_every_peft_default_is_accepted(client: Path) -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    defaults.update(peft_type="LORA", r=4, lora_alpha=11)
    edit_config(client, **defaults)
    assert read_adapter(client).modules["first"].scaling == 11 / 4
