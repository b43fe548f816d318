"""Client folders in, one state out: the mean of the merged models, and every refusal at once."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from adapter_folders import (
    CONFIG,
    FIRST_A,
    TARGETS,
    TENSORS,
    assert_names_everything,
    edit_config,
    edit_tensors,
    tree,
)

from glora_ops.adapters import read_adapter
from glora_ops.errors import GloraError, GloraWarning, Refused
from glora_ops.merge import aggregate_adapters
from glora_ops.state import State

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


def test_heads_without_a_mean_are_refused_by_the_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr("glora_ops.merge.check_values", read)
    folders = save_merged("bert", tmp_path)
    with pytest.raises(Refused, match=r"classifier\.bias.*none negative"):
        aggregate_adapters(folders, [2, -1], basis="update", normalise=False)


def test_arguments_are_refused_with_the_folders(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        aggregate_adapters([tmp_path / "a", tmp_path / "b"], "31", tol=0, dense="drop")
    problems = [refusal.problem for refusal in caught.value.refusals]
    assert problems == ["dense cannot be used", "tol cannot be used", "weights cannot be used",
                        "no such folder", "no such folder",
                        "there is nothing to aggregate"]  # fmt: skip


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
