"""Which clients can be averaged, and which are one client twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import peft_models as models
import pytest
import torch
from adapter_folders import (
    FIRST_A,
    FIRST_B,
    TENSORS,
    assert_names_everything,
    edit_config,
    edit_tensors,
)
from torch import Tensor

from glora_ops.adapters import adapter_layout, check_base_copies, check_compatible, read_adapter


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


def with_modules(root: Path, *kinds: list[str], base: str | None = None) -> list[Path]:
    """Clients of the mixed model, one per list of layers, that name this base or none."""
    folders = [
        models.save_client(root / f"c{i}", models.mixed, seed=i, r=2, target_modules=layers)
        for i, layers in enumerate(kinds)
    ]
    for folder in folders:
        edit_config(folder, base_model_name_or_path=base)
    return folders


def test_strangers_need_a_voucher(tmp_path: Path) -> None:
    """Clients that name no base and share no module: nothing says that they adapt one model."""
    folders = with_modules(tmp_path, ["conv"], ["first", "last"], ["last"])
    needles = ["name no base", "found modules conv", "'c1', block.first, block.last, first",
               "base=NAME (--base NAME)"]  # fmt: skip
    incompatible(*folders, client="c0", needles=needles)
    adapters = [read_adapter(folder) for folder in folders]
    assert check_compatible(adapters, base="vouched") == []
    assert check_compatible(adapters[1:]) == []
    for folder in folders:
        edit_config(folder, base_model_name_or_path="one")
    assert check_compatible([read_adapter(folder) for folder in folders]) == []


def test_modules_shared_through_others_are_enough(tmp_path: Path) -> None:
    folders = with_modules(tmp_path, ["conv"], ["last"], ["conv", "last"], ["embed_tokens"])
    incompatible(*folders, client="c3", needles=["'c0', conv"])
    assert check_compatible([read_adapter(folder) for folder in folders[:3]]) == []


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
    incompatible(a, named_alike, client="a", needles=["same name", "NAME=PATH"])
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
