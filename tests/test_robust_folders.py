"""Robust rules on adapter folders: the same verdict, heads with it, kept by updates, said aloud."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import layout_models
import peft_models as models
import pytest
import torch
from adapter_folders import TARGETS, edit_tensors
from torch import Tensor

import glora_ops as glora
from glora_ops.adapters import read_adapter
from glora_ops.adapters.stored import Stored
from glora_ops.robust import RULES

HEAD = "base_model.model.head.weight"


def moved(seed: int, factor: float) -> Callable[[dict[str, Tensor]], None]:
    """Each factor a little elsewhere, every B times `factor`, and a head of the client's own."""

    def change(tensors: dict[str, Tensor]) -> None:
        rng = torch.Generator().manual_seed(seed)
        for key, x in tensors.items():
            if "lora" in key:
                x += 0.1 * x.std() * torch.randn(x.shape, generator=rng)
                x *= factor if "lora_B" in key or "embedding_B" in key else 1.0
        tensors[HEAD].fill_(seed)

    return change


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six folders that agree, but for `flip` and `loud`."""
    root = tmp_path_factory.mktemp("six")
    made = models.save_client(
        root / "first", models.mixed, seed=1, r=3, target_modules=TARGETS, modules_to_save=["head"]
    )
    folders = []
    for seed, (name, factor) in enumerate(
        {"ann": 1.0, "flip": -1.0, "bob": 1.0, "loud": 30.0, "cyd": 1.0, "dan": 1.0}.items(), 1
    ):
        folders.append(Path(shutil.copytree(made, root / name)))
        edit_tensors(folders[-1], moved(seed, factor))
    return folders


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
@pytest.mark.parametrize("rule", RULES)
def test_folders_and_factors_in_memory_get_one_verdict(rule: str, six: list[Path]) -> None:
    weights = [1.0, 2.0, 1.0, 1.0, 3.0, 2.0]
    state = glora.aggregate_adapters(six, weights, rank=6, robust=rule)
    adapters = [read_adapter(folder) for folder in six]
    names = [adapter.name for adapter in adapters]
    held = [{m: adapter.factors(m) for m in adapter.modules} for adapter in adapters]
    scalings = [{n: m.scaling for n, m in adapter.modules.items()} for adapter in adapters]
    again = glora.aggregate(held, weights, scalings, 6, names=names, robust=rule)
    assert state.settings["robust"] == again.settings["robust"]
    assert state.weights == again.weights
    for name, m in state.modules.items():
        assert torch.equal(m.u, again.modules[name].u)
    # A full tensor is a weight and no update: its client's voice is what the verdict lessens.
    verdicts = state.settings["robust"]["clients"]
    voices = [w * c["trust"] * c["scale"] for w, c in zip(weights, verdicts, strict=True)]
    head = sum(v * seed for seed, v in enumerate(voices, 1)) / sum(voices)
    assert state.dense["head.weight"].unique().tolist() == pytest.approx([head])
    assert verdicts[3]["scale" if rule != "geometric-median" else "trust"] < 0.2
    assert state.settings["robust"]["left_out"] == (["flip"] if rule == "gate" else [])


def test_what_was_left_out_is_said_by_name(six: list[Path], tmp_path: Path) -> None:
    with pytest.warns(glora.GloraWarning, match="left flip out: its median cosine"):
        state = glora.aggregate_adapters(six, rank=6, robust="gate", clip=3.0)
    assert "robust gate clipped loud" in state.report()
    state.save(tmp_path / "s.safetensors")
    again = glora.State.load(tmp_path / "s.safetensors")
    assert again.settings["robust"] == state.settings["robust"]
    assert again.settings["robust"]["clip"] == 3
    assert again.report() == state.report()


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_experts_and_counters_are_judged_with_the_rest(tmp_path: Path) -> None:
    """A stack is a batch of modules; of a counter the largest of the clients that are heard."""
    made = layout_models.adapt(
        tmp_path / "made", layout_models.mixtral, 1, r=2, target_modules="all-linear",
        modules_to_save=["lm_head"],
    )  # fmt: skip

    def change(tensors: dict[str, Tensor], seed: int, factor: float) -> None:
        rng = torch.Generator().manual_seed(seed)
        for key, x in tensors.items():
            if "lora" in key:
                x += 0.1 * x.std() * torch.randn(x.shape, generator=rng)
            # Elsewhere than in the experts the odd one is as the others are.
            x *= factor if "lora_B" in key and "experts" in key else 1.0
        tensors["base_model.model.lm_head.num_batches_tracked"] = torch.tensor(seed)

    folders = []
    for seed, name in enumerate(("ann", "bob", "cyd", "dan", "flip")):
        folders.append(Path(shutil.copytree(made, tmp_path / name)))
        factor = -1.0 if name == "flip" else 1.0
        edit_tensors(folders[-1], lambda t, s=seed, f=factor: change(t, s, f))
    state = glora.aggregate_adapters(folders, rank=16, robust="gate", clip=100.0)
    assert state.settings["robust"]["left_out"] == ["flip"]
    assert state.dense["lm_head.num_batches_tracked"].item() == 3
    plain = glora.aggregate_adapters(folders, rank=4)
    assert plain.dense["lm_head.num_batches_tracked"].item() == 4
    assert any(name.endswith("experts.down_proj.3") for name in state.modules)
    state.write_adapter(tmp_path / "r16", 16)
    edit_tensors(tmp_path / "r16", lambda t: [t.pop(k) for k in list(t) if "tracked" in k])
    for folder in folders:
        edit_tensors(folder, lambda t: [t.pop(k) for k in list(t) if "tracked" in k])
    layout_models.assert_mean(layout_models.mixtral, tmp_path / "r16", folders[:4])


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_an_update_keeps_the_recorded_rule(six: list[Path]) -> None:
    state = glora.aggregate_adapters(six[:5], rank=6, robust="gate", clip=1.5)
    later = glora.update_adapters(state, add=[six[5]], remove=["ann"])
    fresh = glora.aggregate_adapters(six[1:], rank=6, robust="gate", clip=1.5)
    assert later.settings["robust"] == fresh.settings["robust"]
    assert later.settings["robust"]["left_out"] == ["flip"]
    for name, m in later.modules.items():
        assert torch.equal(m.u, fresh.modules[name].u)
        assert torch.equal(m.s, fresh.modules[name].s)
    # The rule judges who is there: with its judges gone the odd one may stay.
    few = glora.update_adapters(state, remove=["ann", "bob", "cyd"])
    assert few.settings["robust"]["applied"] == "none"


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_a_rule_reads_the_factors_once_more_and_one_module_at_a_time(
    six: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    plain = Stored.read_into

    def read_into(self: Stored, columns: str, rows: str, b: Tensor, a: Tensor) -> None:
        reads.extend([columns, rows])
        plain(self, columns, rows, b, a)

    monkeypatch.setattr(Stored, "read_into", read_into)
    counts = {}
    for rule in (None, "gate"):
        reads.clear()
        glora.aggregate_adapters(six, rank=6, robust=rule)
        counts[rule] = {key: reads.count(key) for key in reads if "lora" in key}
    assert set(counts[None].values()) == {6}  # beside the check of values
    assert set(counts["gate"].values()) == {12}


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_a_head_whose_clients_were_left_out_is_refused_by_name(
    six: list[Path], tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in six]
    for folder in folders:
        if folder.name != "flip":
            edit_tensors(
                folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if "head" in k]
            )
    with pytest.raises(glora.GloraError, match=r"head.*no robust rule left out"):
        glora.aggregate_adapters(folders, rank=6, robust="gate")
