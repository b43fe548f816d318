"""The same layers under other names are one; what is apart stays apart; doubt is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layout_models as models
import peft_models
import pytest
from adapter_folders import edit_tensors
from peft_models import Base

from glora_ops import State, aggregate_adapters
from glora_ops.errors import Refused

OLD = {"model.language_model.layers": "model.layers", "model.visual.": "visual."}
LISTED = {"r": 2, "target_modules": ["q_proj", "v_proj", "qkv"]}
EVERYTHING = {"r": 2, "target_modules": "all-linear"}


def client(folder: Path, base: Base, seed: int, renamed: dict[str, str], **config: Any) -> Path:
    """A client whose tensors bear other names than PEFT gave them."""
    models.adapt(folder, base, seed, **config)

    def change(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            new = key
            for old, put in renamed.items():
                new = new.replace(old, put)
            tensors[new] = tensors.pop(key)

    edit_tensors(folder, change)
    return folder


def readout(clients: list[Path], folder: Path, **options: Any) -> State:
    state = aggregate_adapters(clients, rank=8, **options)
    state.write_adapter(folder / "r8", 8)
    return state


@pytest.mark.parametrize(
    "renamed",
    [
        OLD,
        {"model.language_model.": "model.text_model.", "model.visual.": "model.vision_tower."},
        {"model.language_model.": "language_model.model."},
        {"base_model.model.": "base_model.model.module._orig_mod."},
    ],
    ids=["removed", "renamed", "moved", "wrapped"],
)
@pytest.mark.parametrize("config", [LISTED, EVERYTHING], ids=["listed", "all-linear"])
def test_layers_under_another_name_are_the_same_layers(
    renamed: dict[str, str], config: dict[str, Any], tmp_path: Path
) -> None:
    base = models.vision_language
    plain = [models.adapt(tmp_path / f"p{i}", base, i, **config) for i in range(3)]
    odd = [*plain[:2], client(tmp_path / "odd", base, 2, renamed, **config)]
    state = readout(odd, tmp_path)
    models.assert_mean(base, tmp_path / "r8", plain)
    said = [remark for remark in state.settings["remarks"] if " is taken for " in remark]
    assert said
    assert all(remark.startswith("odd: ") for remark in said)
    assert any("taken for model.language_model.layers.…, the name in p0" in s for s in said)
    assert state.settings["remarks"][0] in state.report()


def test_the_name_of_most_clients_is_written(tmp_path: Path) -> None:
    base = models.vision_language
    old = client(tmp_path / "old", base, 0, OLD, **LISTED)
    new = [models.adapt(tmp_path / f"n{i}", base, i + 1, **LISTED) for i in range(2)]
    first = models.adapt(tmp_path / "first", base, 0, **LISTED)
    readout([old, *new], tmp_path)
    models.assert_mean(base, tmp_path / "r8", [first, *new])
    readout([old, new[0]], tmp_path / "two")  # as many: the one that names parts of the model
    models.assert_mean(base, tmp_path / "two/r8", [first, new[0]])


@pytest.mark.parametrize(
    ("wrapper", "count"), [("module", 2), ("base_model.model", 2), ("unknown", 1)]
)
def test_a_wrapper_is_never_the_name_that_is_written(
    wrapper: str, count: int, tmp_path: Path
) -> None:
    """Known ones not even where most clients have them."""
    base, renamed = models.llama, {"base_model.model.": f"base_model.model.{wrapper}."}
    plain = [models.adapt(tmp_path / f"p{i}", base, i, **LISTED) for i in range(count + 1)]
    wrapped = [client(tmp_path / f"w{i}", base, i, renamed, **LISTED) for i in range(count)]
    readout([*wrapped, plain[-1]], tmp_path)
    models.assert_served(base, tmp_path / "r8", plain)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("base", "target", "root", "put"),
    [
        (models.llama, "q_proj", "model.layers", "layers"),
        (peft_models.gpt2, "c_attn", "transformer.h", "h"),
        (peft_models.bert, "query", "bert.encoder", "encoder"),
        (models.vision_language, "q_proj", "model.language_model.", "language_model.model."),
    ],
    ids=["llama", "gpt2", "bert", "vision-language"],
)
def test_of_two_clients_the_one_whose_model_has_a_head_names_the_layers(
    base: Base, target: str, root: str, put: str, odd: int, tmp_path: Path
) -> None:
    config = {"r": 2, "target_modules": [target]}
    plain = [models.adapt(tmp_path / f"p{i}", base, i, **config) for i in range(2)]
    given = [*plain]
    given[odd] = client(tmp_path / "odd", base, odd, {f"model.{root}": f"model.{put}"}, **config)
    readout(given, tmp_path)
    models.assert_mean(base, tmp_path / "r8", plain)


def test_full_weights_and_embeddings_move_along(tmp_path: Path) -> None:
    base = models.vision_language
    config = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    renamed = {"model.language_model.": "model.", "model.lm_head": "model.language_model.lm_head"}
    plain = [models.adapt(tmp_path / f"p{i}", base, i, **config) for i in range(2)]
    odd = [plain[0], client(tmp_path / "odd", base, 1, renamed, **config)]
    state = readout(odd, tmp_path)
    models.assert_served(base, tmp_path / "r8", plain)
    assert len(state.dense) == 2


APART: dict[str, tuple[Base, list[dict[str, Any]]]] = {
    "encoder and decoder": (
        models.t5,
        [{"target_modules": rf"{part}\..*SelfAttention\.q"} for part in ("encoder", "decoder")],
    ),
    "modules": (models.llama, [{"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}]),
    "layers": (
        models.llama,
        [{"target_modules": ["q_proj"], "layers_to_transform": [layer]} for layer in (0, 1)],
    ),
    "single and double": (
        models.towers,
        [{"target_modules": r"layers\.0\.fc"}, {"target_modules": r"single_layers\.0\.fc"}],
    ),
    "numbered": (
        models.numbered,
        [{"target_modules": rf"encoder_{i}\.layers\.0"} for i in (1, 2)],
    ),
    "down and up": (
        models.unet,
        [{"target_modules": ["down_blocks.0"]}, {"target_modules": ["up_blocks.0"]}],
    ),
}


@pytest.mark.filterwarnings("ignore:.* shares no module")
@pytest.mark.parametrize("case", APART)
def test_clients_that_are_apart_on_purpose_stay_apart(case: str, tmp_path: Path) -> None:
    base, configs = APART[case]
    clients = [
        models.adapt(tmp_path / f"c{i}", base, i, r=2, **config) for i, config in enumerate(configs)
    ]
    state = readout(clients, tmp_path)
    models.assert_served(base, tmp_path / "r8", clients)
    assert all(not bool(m.present.all()) for m in state.modules.values())
    assert "c0 shares no module with the other clients" in state.report()


@pytest.mark.filterwarnings("ignore:.* shares no module")
def test_an_excluded_tower_is_not_the_module_without_it(tmp_path: Path) -> None:
    towers = models.towers
    tower = [f"tower.layers.{i}.fc" for i in range(24)]
    left = {"target_modules": ["fc"], "exclude_modules": tower}
    one = models.adapt(tmp_path / "one", towers, 1, r=2, **left)
    other = models.adapt(tmp_path / "other", towers, 2, r=2, target_modules=["tower.layers.0.fc"])
    readout([one, other], tmp_path)
    models.assert_served(towers, tmp_path / "r8", [one, other])


@pytest.mark.filterwarnings("ignore:.* shares no module")
def test_a_layer_without_an_index_is_another_under_another_name(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["to_q"]}
    clients = [
        client(tmp_path / name, models.unet, seed, {"model.to_q": f"model.{name}.to_q"}, **config)
        for seed, name in enumerate(("embed", "head"))
    ]
    assert aggregate_adapters(clients, rank=4).modules.keys() == {"embed.to_q", "head.to_q"}


def test_layers_that_could_be_either_of_two_are_refused(tmp_path: Path) -> None:
    plain = models.adapt(tmp_path / "plain", models.llama, 1, **LISTED)
    renamed = {"model.model.layers": "model.model.one.layers"}
    twice = client(tmp_path / "twice", models.llama, 2, renamed, **LISTED)
    edit_tensors(
        twice, lambda t: t.update({k.replace(".one.", ".other."): 2 * x for k, x in t.items()})
    )
    with pytest.raises(Refused, match="the same layers may stand under two names") as caught:
        aggregate_adapters([plain, twice], rank=8)
    assert len(caught.value.refusals) == 2


@pytest.mark.filterwarnings("ignore:.* shares no module")
def test_names_that_may_be_the_same_are_refused_with_both(tmp_path: Path) -> None:
    base = models.vision_language
    config = {"r": 2, "target_modules": r".*\.q_proj"}
    one = models.adapt(tmp_path / "one", base, 1, **config)
    other = client(tmp_path / "other", base, 2, OLD, **config)
    with pytest.raises(Refused) as caught:
        readout([one, other], tmp_path)
    (refusal,) = caught.value.refusals
    assert refusal.client == "other"
    assert refusal.found == "model.layers.…"
    assert refusal.expected.startswith("model.language_model.layers.… as in client 'one'")
    assert "--base NAME" in refusal.remedy
    state = readout([one, other], tmp_path, base="vouched")
    assert len(state.modules) == 4
