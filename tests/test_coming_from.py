"""docs/coming_from.md: the code for both tools runs, and results stand to each other as it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_docs import code, commands
from torch import Tensor, nn
from typer.testing import CliRunner

import glora_ops as glora
from glora_ops.adapters import read_adapter
from glora_ops.cli import app

PAGE = "docs/coming_from.md"
RANKS = {"a": 4, "b": 8, "c": 4}
CLOSE = 1e-5  # of float32 sums and singular values


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model of two layers; in the working directory its folder and three clients'."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 20))
        Path("BASE").mkdir()
        save_file(model.state_dict(), "BASE/model.safetensors", metadata={"format": "pt"})
        Path("BASE/config.json").write_text("{}")
        for name, rank in RANKS.items():
            config = LoraConfig(
                r=rank, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=False
            )
            get_peft_model(copy.deepcopy(model), config).save_pretrained(f"clients/{name}")
    return model


def updates(folder: str) -> dict[str, Tensor]:
    """ΔW of every module."""
    adapter = read_adapter(folder)
    found = {}
    for name, module in adapter.modules.items():
        b, a = (x.double() for x in adapter.factors(name))
        found[name] = module.scaling * b @ a
    return found


def mean(weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ w ΔW, densely."""
    parts = [(w, updates(f"clients/{name}")) for name, w in weights.items()]
    return {name: sum(w * update[name] for w, update in parts) for name in parts[0][1]}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((x - other[name]).norm() / x.norm()) for name, x in one.items())


def regauge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B G, G⁻¹ A) with G = 3 in every module: the same updates."""
    return {key: x * 3 if ".lora_B." in key else x / 3 for key, x in tensors.items()}


def peft_merge(base: nn.Module, names: str, weights: list[float], kind: str, **how: Any) -> str:
    """Folder of what PEFT makes of these clients."""
    first, *others = names
    model = PeftModel.from_pretrained(copy.deepcopy(base), f"clients/{first}", adapter_name=first)
    for name in others:
        model.load_adapter(f"clients/{name}", adapter_name=name)
    model.add_weighted_adapter(list(names), weights, kind, combination_type=kind, **how)
    model.save_pretrained("peft", selected_adapters=[kind])
    return f"peft/{kind}"


def test_svd_there_is_the_update_basis_here(base: nn.Module) -> None:
    there, here, *_ = code(PAGE, "python")
    exec(there, {"base": base})
    exec(here, {})
    exact = mean({"a": 0.75, "b": 0.25})
    assert distance(updates("there/svd"), updates("here")) < CLOSE
    assert distance(exact, updates("here")) > 0.01  # R cuts something off


@pytest.mark.parametrize("basis", ["consensus", "update", "projector"])
def test_cat_there_is_any_basis_of_full_rank_here(base: nn.Module, basis: str) -> None:
    state = glora.aggregate_adapters(["clients/a", "clients/b"], [0.75, 0.25], rank=12, basis=basis)
    state.write_adapter("here", rank=12)
    there = peft_merge(base, "ab", [0.75, 0.25], "cat")
    assert distance(updates(there), updates("here")) < CLOSE
    assert read_adapter(there).modules["0"].rank == 12


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_weights_are_taken_as_they_are_there_and_divided_by_their_sum_here(base: nn.Module) -> None:
    there = updates(peft_merge(base, "ab", [1.0, 1.0], "cat"))
    for normalise, share in ((True, 0.5), (False, 1.0)):
        folders = ["clients/a", "clients/b"]
        how = {"rank": 12, "basis": "update", "normalise": normalise}
        glora.aggregate_adapters(folders, [1, 1], **how).write_adapter(f"r{share}", rank=12)
        scaled = {name: share * update for name, update in there.items()}
        assert distance(scaled, updates(f"r{share}")) < CLOSE


def test_linear_there_needs_equal_ranks_and_is_moved_by_a_gauge(base: nn.Module) -> None:
    with pytest.raises(ValueError, match="same r"):
        peft_merge(base, "ab", [0.75, 0.25], "linear")
    before = updates(peft_merge(base, "ac", [0.75, 0.25], "linear"))
    glora.aggregate_adapters(["clients/a", "clients/c"], [0.75, 0.25]).write_adapter("one", 8)
    file = Path("clients/c/adapter_model.safetensors")
    save_file(regauge(load_file(file)), file, metadata={"format": "pt"})
    after = updates(peft_merge(base, "ac", [0.75, 0.25], "linear"))
    glora.aggregate_adapters(["clients/a", "clients/c"], [0.75, 0.25]).write_adapter("two", 8)
    assert distance(mean({"a": 0.75, "c": 0.25}), before) > 0.1
    assert distance(before, after) > 0.1
    assert distance(updates("one"), updates("two")) < CLOSE


def test_what_the_command_lines_make_is_the_mean_of_the_whole_models(base: nn.Module) -> None:
    for words in commands(PAGE)[:2]:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    wanted = {f"{name}.weight": x for name, x in mean({"a": 0.75, "b": 0.25}).items()}
    whole = {name: x.double() for name, x in base.state_dict().items()}
    made = {name: x.double() for name, x in load_file("out/model.safetensors").items()}
    merged = {name: x + wanted.get(name, 0) for name, x in whole.items()}
    assert distance(merged, made) < CLOSE
    assert distance(whole, made) > 0.1


@pytest.fixture
def strategies() -> dict[str, Any]:
    """FedAvg and Glora as the page makes them, by name."""
    pytest.importorskip("flwr", reason="Flower needs Python 3.11")
    *_, there, here = code(PAGE, "python")
    found: dict[str, Any] = {}
    exec(there, found)
    exec(here, found)
    return found


def federate(strategy: Any, clients: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """Products B A, by module, of what the strategy makes of these tensors and examples."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    replies = []
    for tensors, n in clients:
        arrays, metrics = ArrayRecord(tensors), MetricRecord({"num-examples": n, "loss": 1.0})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics["loss"] == pytest.approx(1.0)
    return products(arrays.to_torch_state_dict())


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: x.double() @ tensors[key.replace("lora_B", "lora_A")].double()
        for key, x in tensors.items()
        if "lora_B" in key
    }


def sent(name: str) -> dict[str, Tensor]:
    return load_file(f"clients/{name}/adapter_model.safetensors")


@pytest.mark.usefixtures("base")
def test_fedavg_is_the_mean_of_updates_where_clients_share_a_factor(
    strategies: dict[str, Any],
) -> None:
    frozen = {key: x for key, x in sent("a").items() if "lora_A" in key}
    clients = [(sent("a"), 600), (sent("c") | frozen, 200)]
    fedavg, here = (federate(strategies[name](), clients) for name in ("FedAvg", "Glora"))
    assert distance(fedavg, here) < CLOSE


@pytest.mark.usefixtures("base")
def test_fedavg_moves_with_a_gauge_and_the_strategy_of_the_page_does_not(
    strategies: dict[str, Any],
) -> None:
    before = [(sent("a"), 600), (sent("c"), 200)]
    after = [(sent("a"), 600), (regauge(sent("c")), 200)]
    moved = {
        name: distance(*(federate(strategies[name](), clients) for clients in (before, after)))
        for name in ("FedAvg", "Glora")
    }
    assert moved["FedAvg"] > 0.1
    assert moved["Glora"] < CLOSE
    a, c = (products(tensors) for tensors, _ in before)
    exact = {key: 0.75 * a[key] + 0.25 * c[key] for key in a}
    assert distance(exact, federate(strategies["Glora"](), before)) < CLOSE


@pytest.mark.usefixtures("base")
@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_fedavg_needs_equal_ranks_and_the_strategy_of_the_page_does_not(
    strategies: dict[str, Any],
) -> None:
    clients = [(sent("a"), 600), (sent("b"), 200)]
    with pytest.raises(ValueError, match="broadcast"):
        federate(strategies["FedAvg"](), clients)
    assert federate(strategies["Glora"](), clients)
    assert strategies["Glora"]().aggregate_train(1, []) == (None, None)
