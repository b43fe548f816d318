"""Layouts as the trade writes them: merged by glora, the mean of what PEFT merges itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layout_models as models
import peft_models
import pytest
import torch
from adapter_folders import assert_names_everything, edit_config, edit_tensors, refused
from peft_models import Base
from safetensors.torch import save_file
from torch import nn

from glora_ops import State, aggregate_adapters
from glora_ops.adapters import inspect_adapter, read_adapter
from glora_ops.errors import Refused

ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

TRAINED_HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}

#: Two clients of each architecture: ranks, scalings, patterns, and what they adapt differ.
FAMILIES: dict[str, tuple[Base, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        models.llama,
        {"r": 3, "target_modules": [*ATTENTION, "embed_tokens"], "alpha_pattern": {"v_proj": 2}},
        {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": [*ATTENTION, "lm_head"],
         "rank_pattern": {"layers.1.self_attn.q_proj": 4}},
    ),
    "bert": (
        peft_models.bert,
        {"r": 3, "target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"r": 2, "target_modules": ["query", "word_embeddings"], "modules_to_save": ["classifier"]},
    ),
    "gpt2": (
        peft_models.gpt2,
        {"r": 3, "target_modules": ["c_attn", "wte"], "rank_pattern": {"h.0.attn.c_attn": 2}},
        {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "t5": (
        models.t5,
        {"r": 3, "target_modules": ["q", "v"]},
        {"r": 2, "target_modules": r"decoder.*\.(q|wo)", "use_rslora": True},
    ),
    "mixtral": (
        models.mixtral,
        {"r": 2, "target_modules": "all-linear"},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"],
         "target_parameters": EXPERTS, "rank_pattern": {"layers.1.mlp.experts.down_proj": 4},
         "alpha_pattern": {"gate_up_proj": 7}},
    ),
    "qwen-moe": (
        models.qwen_moe,
        {"r": 2, "target_modules": ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]},
        {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "gpt-oss": (
        models.gpt_oss,
        {"r": 2, "target_modules": "all-linear", "target_parameters": EXPERTS},
        {"r": 3, "lora_dropout": 0.0, "target_modules": r".*\.(q_proj|o_proj)",
         "target_parameters": ["router.weight", "experts.down_proj"]},
    ),
    "vision-language": (
        models.vision_language,
        {"r": 2, "target_modules": "all-linear", "modules_to_save": ["merger"]},
        {"r": 3, "target_modules": ATTENTION, "modules_to_save": ["merger"]},
    ),
    "unet": (
        models.unet,
        {"r": 2, "target_modules": ["down_blocks.0", "down_blocks.1", "to_q"]},
        {"r": 3, "use_rslora": True, "target_modules": ["down_blocks.0", "up_blocks.0"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_readout_is_the_mean_of_what_peft_merges(family: str, tmp_path: Path) -> None:
    base, *configs = FAMILIES[family]
    clients = [
        models.adapt(tmp_path / f"c{i}", base, i, **config) for i, config in enumerate(configs)
    ]
    merged(clients, tmp_path)
    models.assert_served(base, tmp_path / "r16", clients)


def test_experts_are_refused_where_nothing_tells_what_their_factors_mean(tmp_path: Path) -> None:
    both = {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    client = models.adapt(tmp_path / "both", models.mixtral, 1, **both)
    edit_config(client, target_parameters=["mlp.experts.up", "mlp.experts.down"])
    refused(client, "which parameter the factors adapt cannot be told", "experts.base_layer")
    edit_config(client, target_parameters=None)
    assert_names_everything(inspect_adapter(client)[1], "which parameter the factors adapt")
    edit_config(client, target_parameters=EXPERTS, r=3)
    refused(client, "which parameter the factors adapt cannot be told", "rank_pattern declare")


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    one = models.adapt(tmp_path / "one", models.mixtral, 1, **config)
    other = models.adapt(tmp_path / "other", models.mixtral, 2, **config | {"r": 4})
    edit_config(other, r=2)
    with pytest.raises(Refused, match=r"another number of experts; found experts = 8"):
        aggregate_adapters([one, other], rank=8)


def one_by_one(folder: Path, seed: int) -> Path:
    """A Mixtral client as transformers 4 names its modules; loading it, PEFT makes stacks."""
    experts = [f"experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")]
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module in ("gate", *experts):
            path = f"base_model.model.model.layers.{layer}.block_sparse_moe.{module}"
            d_out, d_in = (4, 32) if module == "gate" else (32, 24) if "w2" in module else (24, 32)
            tensors[path + ".lora_A.weight"] = torch.randn(2, d_in, generator=g)
            tensors[path + ".lora_B.weight"] = torch.randn(d_out, 2, generator=g)
    models.adapt(folder, models.mixtral, seed, r=2, target_modules=["q_proj"])
    edit_config(folder, target_modules=["gate", "w1", "w2", "w3"])
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_experts_one_by_one_are_modules_and_no_stacks(tmp_path: Path) -> None:
    clients = [one_by_one(tmp_path / f"c{i}", i) for i in range(2)]
    merged(clients, tmp_path)
    models.assert_served(models.mixtral, tmp_path / "r16", clients)
    stack = models.adapt(tmp_path / "s", models.mixtral, 3, r=2, target_modules="all-linear")
    with pytest.raises(Refused, match="the experts are stored in another form; found a stack"):
        aggregate_adapters([*clients, stack], rank=4)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.base_layer.weight"])
def test_full_weights_that_were_not_gathered_are_refused(name: str, tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}
    client = models.adapt(tmp_path / "zero3", models.llama, 1, **config)
    key = f"base_model.model.{name}"
    edit_tensors(client, lambda t: t.update({key: torch.empty(0)}))
    refused(client, key, "a weight saved in full is empty", "DeepSpeed or FSDP gather")


def extended(seed: int) -> Base:
    """A base with new tokens, whose rows are others in every process."""

    def build() -> nn.Module:
        model = models.llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(52, mean_resizing=False)
        return model

    return build


@pytest.mark.parametrize("adapted", [["embed_tokens"], ["embed_tokens", "lm_head"], []])
def test_an_extended_vocabulary_is_written_out(adapted: list[str], tmp_path: Path) -> None:
    config = {
        "r": 2,
        "target_modules": ["q_proj", *adapted],
        "saved": {"save_embedding_layers": True},
    }
    clients = [models.adapt(tmp_path / f"c{i}", extended(7), i, **config) for i in range(2)]
    state = merged(clients, tmp_path)
    assert state.dense.keys() == read_adapter(clients[0]).base_copies.keys() != set()
    models.assert_served(extended(7), tmp_path / "r16", clients)
    ours, theirs = (
        peft_models.load(extended(seed), folder).base_model.model.get_input_embeddings()
        for seed, folder in ((8, tmp_path / "r16"), (9, clients[0]))
    )
    ours, theirs = (getattr(x, "base_layer", x).weight for x in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert state.settings["remarks"] == []
    plain = models.adapt(tmp_path / "plain", extended(7), 3, r=2, target_modules=["q_proj"])
    (remark,) = merged([clients[0], plain], tmp_path, 8).settings["remarks"][:1]
    assert "1 of 2 clients saved a copy of the base weight (c0), which is written" in remark


def test_extended_rows_that_differ_are_refused(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "saved": {"save_embedding_layers": True}}
    clients = [models.adapt(tmp_path / f"c{i}", extended(i), i, **config) for i in range(2)]
    with pytest.raises(Refused, match="the copy of the base weight differs between clients"):
        aggregate_adapters(clients, rank=16)
    trained = models.adapt(tmp_path / "t", models.llama, 1, **TRAINED_HEAD)
    with pytest.raises(Refused, match="adapted or frozen here and saved in full by another"):
        aggregate_adapters([clients[0], trained], rank=16)


def test_auto_mapping_is_carried_where_all_clients_agree(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"]}
    clients = [models.adapt(tmp_path / f"c{i}", models.llama, i, **config) for i in range(2)]
    merged(clients, tmp_path)
    assert written(tmp_path)["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    edit_config(clients[1], auto_mapping={"base_model_class": "Other", "parent_library": "os"})
    merged(clients, tmp_path, rank=8)
    assert written(tmp_path, 8)["auto_mapping"] is None


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["fc"], "exclude_modules": [f"tower.layers.{i}.fc" for i in range(24)]},
        {"target_modules": ["fc"], "exclude_modules": r"tower\..*|layers\.3\.fc"},
        {"target_modules": r"layers\.\d+\.fc"},
        {"target_modules": ["fc"], "layers_to_transform": [1, 2], "layers_pattern": "tower.layers"},
    ],
    ids=["excluded", "excluded by a pattern", "pattern", "layers"],
)
def test_a_readout_adapts_no_module_that_its_clients_left_out(
    config: dict[str, Any], tmp_path: Path
) -> None:
    clients = [models.adapt(tmp_path / f"c{i}", models.towers, i, r=2, **config) for i in range(2)]
    merged(clients, tmp_path, rank=4)
    models.assert_served(models.towers, tmp_path / "r4", clients)


def test_weights_beside_an_adapter_are_named(tmp_path: Path) -> None:
    client = models.adapt(tmp_path / "c", models.llama, 1, target_modules=["q_proj"])
    (client / "2_Dense").mkdir()
    (client / "checkpoint-5").mkdir()
    for name in ("non_lora_trainables.bin", "2_Dense/model.safetensors", "optimizer.pt",
                 "adapter_model.bin", "checkpoint-5/model.safetensors"):  # fmt: skip
        (client / name).write_bytes(b"x")
    (remark,) = merged([client], tmp_path).settings["remarks"]
    assert remark.startswith("c: weights beside the adapter are not read")
    assert remark.endswith("result: 2_Dense/model.safetensors, non_lora_trainables.bin")


def test_counters_and_masks_saved_in_full(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["to_q"], "modules_to_save": ["norm"]}
    clients = [models.adapt(tmp_path / f"c{i}", models.unet, i, **config) for i in range(2)]
    extra = {
        "num_batches_tracked": [torch.tensor(3), torch.tensor(5)],
        "mask": [torch.tensor([True, False])] * 2,
        "positions": [torch.arange(4)] * 2,
        "scales": [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0])],
    }
    extra["scales"] = [x.to(torch.float8_e4m3fn) for x in extra["scales"]]
    for i, client in enumerate(clients):
        put = {f"base_model.model.norm.{name}": x[i] for name, x in extra.items()}
        edit_tensors(client, lambda t, put=put: t.update(put))
    dense = merged(clients, tmp_path).dense
    assert dense["norm.num_batches_tracked"].equal(torch.tensor(5))
    assert dense["norm.mask"].equal(extra["mask"][0])
    assert dense["norm.positions"].equal(extra["positions"][0])
    assert dense["norm.scales"].float().equal(torch.tensor([2.5, 2.5]))
    edit_tensors(clients[1], lambda t: t.update({"base_model.model.norm.mask": torch.ones(2) > 0}))
    with pytest.raises(Refused) as caught:
        aggregate_adapters(clients, rank=4)
    assert_names_everything(
        list(caught.value.refusals), "norm.mask", "cannot be averaged", "leave its module out"
    )


def tied() -> nn.Module:
    return models.llama(tied=True)


TIED = {"r": 2, "ensure_weight_tying": True}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["embeddings", "head", "saved"],
)
def test_tied_weights_are_merged_and_stay_tied(config: dict[str, Any], tmp_path: Path) -> None:
    clients = [models.adapt(tmp_path / f"c{i}", tied, i, **TIED, **config) for i in range(2)]
    merged(clients, tmp_path)
    models.assert_served(tied, tmp_path / "r16", clients)
    merged(clients, tmp_path, rank=1)
    model = peft_models.load(tied, tmp_path / "r1").merge_and_unload()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_weights_tied_in_some_clients_only_are_refused(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "embed_tokens"]}
    one = models.adapt(tmp_path / "one", tied, 1, **TIED, **config)
    other = models.adapt(tmp_path / "other", tied, 2, r=2, **config)
    with pytest.raises(Refused, match="ensure_weight_tying ties two modules in another client"):
        aggregate_adapters([one, other], rank=8)
    key = "base_model.model.lm_head.lora_A.weight"
    edit_tensors(one, lambda t: t.update({key: 2 * t[key]}))
    with pytest.raises(Refused, match="ensure_weight_tying is set, but the pair is not tied"):
        aggregate_adapters([one], rank=8)


def test_a_module_that_some_adapt_and_others_save_is_refused(tmp_path: Path) -> None:
    adapted = models.adapt(tmp_path / "a", models.llama, 1, target_modules=["q_proj", "lm_head"])
    saved = models.adapt(tmp_path / "s", models.llama, 2, **TRAINED_HEAD)
    with pytest.raises(Refused, match="adapted or frozen here and saved in full by another client"):
        aggregate_adapters([adapted, saved], rank=16)


def merged(clients: list[Path], folder: Path, rank: int = 16, **options: Any) -> State:
    """The state of `clients`, through a file, and its readout beside them."""
    aggregate_adapters(clients, rank=rank, **options).save(folder / "server.safetensors")
    state = State.load(folder / "server.safetensors")
    state.write_adapter(folder / f"r{rank}", rank)
    return state


def written(folder: Path, rank: int = 16) -> dict[str, Any]:
    """The configuration of the readout that `merged` put into `folder`."""
    config: dict[str, Any] = json.loads((folder / f"r{rank}" / "adapter_config.json").read_text())
    return config
