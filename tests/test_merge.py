"""Client folders in, one state out: the mean of the merged models, and every refusal at once."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO

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
from state_files import as_format
from torch import Tensor

from glora_ops import aggregate, aggregate_adapters, batches
from glora_ops.adapters import read_adapter
from glora_ops.adapters.safetensors_header import TensorInfo
from glora_ops.adapters.stored import Stored
from glora_ops.batches import plan
from glora_ops.errors import GloraError, GloraWarning, Refused
from glora_ops.merging.update import update_adapters
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

    monkeypatch.setattr("glora_ops.merging.aggregate.check_values", read)
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
        "modules",
        "dense",
    ]
    for step in ("headers", "values", "modules", "dense"):
        assert [c for c in calls if c[0] == step][-1][1:] in {(2, 2), (4, 4)}


# --- folder by folder, module by module ----------------------------------------------------------


def assert_same_bits(one: State, two: State) -> None:
    assert list(one.modules) == list(two.modules)
    for name, m in one.modules.items():
        for part, x in vars(m).items():
            assert torch.equal(x, getattr(two.modules[name], part)), (name, part)
    assert one.clients == two.clients
    assert one.weights == two.weights
    assert one.dense.keys() == two.dense.keys()
    for name, tensor in one.dense.items():
        assert torch.equal(tensor, two.dense[name])


@pytest.mark.parametrize("name", MERGED)
def test_folders_give_the_bits_of_the_same_factors_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = save_merged(name, tmp_path)
    adapters = [read_adapter(folder) for folder in folders]
    weights = [5, 2, 3][: len(folders)]
    for size in (1, 2**22):
        monkeypatch.setattr("glora_ops.batches.BATCH_BYTES", size)
        held = aggregate(
            [{m: adapter.factors(m) for m in adapter.modules} for adapter in adapters],
            weights,
            [{m: found.scaling for m, found in a.modules.items()} for a in adapters],
            names=[adapter.name for adapter in adapters],
            rank=4,
        )
        merged = aggregate_adapters(folders, weights, rank=4)
        assert_same_bits(merged, replace(held, dense=merged.dense))


class Reads:
    """Counts what is opened and read of the clients' tensor files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: Counter[tuple[str, str]] = Counter()
        self.bytes, self.open, self.most_open = 0, 0, 0
        plain_read, plain_open, plain_fill = Stored.read, Stored._open, Stored._fill
        plain_into = Stored.read_into

        def read_into(stored: Stored, columns: str, rows: str, b: Tensor, a: Tensor) -> None:
            self.read.update([(stored.client, columns), (stored.client, rows)])
            plain_into(stored, columns, rows, b, a)

        def read(stored: Stored, *names: str) -> list[Tensor]:
            self.read.update((stored.client, name) for name in names)
            return plain_read(stored, *names)

        def opened(stored: Stored, *wanted: TensorInfo) -> BinaryIO:
            file = plain_open(stored, *wanted)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            weakref.finalize(file, self.closed)
            return file

        def fill(stored: Stored, file: BinaryIO, target: Tensor) -> None:
            self.bytes += target.nbytes
            plain_fill(stored, file, target)

        monkeypatch.setattr(Stored, "read", read)
        monkeypatch.setattr(Stored, "read_into", read_into)
        monkeypatch.setattr(Stored, "_open", opened)
        monkeypatch.setattr(Stored, "_fill", fill)

    def closed(self) -> None:
        self.open -= 1


def test_every_tensor_is_read_twice_and_no_file_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for its values, once for the computation; with two threads three files at most.

    A base weight is compared instead, and what all have in common read once more to be carried.
    """
    folders = save_merged("gpt2", tmp_path)
    sizes = [(folder / TENSORS).stat().st_size for folder in folders]
    reads = Reads(monkeypatch)
    monkeypatch.setattr("glora_ops.batches.BATCH_BYTES", 1)
    aggregate_adapters(folders, rank=4)
    assert {client for client, _ in reads.read} == {"client-0", "client-1"}
    adapters = [read_adapter(folder) for folder in folders]
    tensors = [(a, key, info) for a in adapters for key, info in a.stored.tensors.items()]
    carried = {t.key: a for a in reversed(adapters) for t in a.base_copies.values()}
    times = {(a.name, key): 1 + (carried.get(key) is a) for a, key, _ in tensors}
    assert reads.read == times
    again = sum((info.end - info.begin) * times[a.name, key] for a, key, info in tensors)
    assert reads.bytes == sum(sizes) + again
    assert reads.most_open <= torch.get_num_threads() + 1
    assert reads.open == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_factors_are_read_into_the_stack_with_one_piece_beside_it(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's own log; a client in another dtype than the stack's is converted on the way.

    Pieces of a few rows give the bits of whole tensors.
    """
    monkeypatch.setattr("glora_ops.adapters.stored.PIECE", 40)
    config = {"r": 3, "target_modules": TARGETS}
    adapters = [
        read_adapter(models.save_client(tmp_path / str(i), models.mixed, seed=i, dtype=d, **config))
        for i, d in enumerate([torch.float32, stored])
    ]
    batch, *_ = plan(adapters, ["first"], 1)
    batches._stack(adapters, batch, torch.device("cpu"), None)  # this thread's piece is kept
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        b, a, _ = batches._stack(adapters, batch, torch.device("cpu"), None)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    offsets = 8 * 8  # what `cumsum` takes for three numbers, and its like
    assert sum(max(e.nbytes(), 0) for e in events) <= batch.bytes + 4 * offsets
    pairs = [adapter.factors("first") for adapter in adapters]
    assert torch.equal(b[0], torch.cat([left.mT.to(b.dtype) for left, _ in pairs]))
    assert torch.equal(a[0], torch.cat([right.to(a.dtype) for _, right in pairs]))


# --- the same state for other clients ------------------------------------------------------------


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    folders = save_merged("mixed", tmp_path)
    base, configs = MERGED["mixed"]
    return [*folders, models.save_client(tmp_path / "client-3", base, seed=9, **configs[1])]


def clients_with_examples(folders: list[Path]) -> None:
    for i, folder in enumerate(folders):
        (folder / "glora.json").write_text(json.dumps({"num_examples": 100 + 10 * i}))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("weighed", ["equal", "num_examples", "given"])
def test_an_updated_state_is_a_fresh_one_bit_for_bit(
    four: list[Path], tmp_path: Path, weighed: str, saved: bool
) -> None:
    if weighed == "num_examples":
        clients_with_examples(four)

    def given(*numbers: float) -> list[float] | None:
        return list(numbers) if weighed == "given" else None

    settings = {"seed": 3, "missing": "renormalise", "tau_rel": 0.2, "normalise": 1}
    a, b, c, d = four
    state = aggregate_adapters([a, b, c], given(3, 1, 2), **settings)
    if saved:
        (tmp_path / "out").mkdir()
        state.save(tmp_path / "out/server.safetensors")
        text = (tmp_path / "out/server.safetensors").read_bytes()
        assert str(tmp_path).encode() not in text  # places are relative
        state = State.load(tmp_path / "out/server.safetensors")

    added = update_adapters(state, add=[d], weights=given(4))
    assert_same_bits(added, aggregate_adapters([a, b, c, d], given(3, 1, 2, 4), **settings))
    fewer = update_adapters(added, remove=["client-1", "client-3"])
    assert_same_bits(fewer, aggregate_adapters([a, c], given(3, 2), **settings))
    assert fewer.rank < added.rank  # twice the largest rank of who is there

    other = models.save_client(
        tmp_path / "elsewhere/client-0", models.mixed, seed=33, r=4, target_modules=TARGETS
    )
    if weighed == "num_examples":
        (other / "glora.json").write_text('{"num_examples": 7}')
    swapped = update_adapters(state, add=[other, d], remove=["client-2"], weights=given(9, 4))
    assert_same_bits(swapped, aggregate_adapters([other, b, d], given(9, 1, 4), **settings))
    if weighed == "given":
        kept = update_adapters(state, add=[other])
        assert_same_bits(kept, aggregate_adapters([other, b, c], given(3, 1, 2), **settings))
    # There and back.
    assert_same_bits(update_adapters(added, remove=["client-3"]), state)


def test_every_setting_is_saved_and_heeded_by_an_update(four: list[Path], tmp_path: Path) -> None:
    settings = {
        "rank": 4, "captured": 0.8, "basis": "projector", "missing": "renormalise",
        "normalise": False, "robust": "clip", "clip": 3.0, "tau_rel": 0.2, "anchor": 0.5,
        "oversample": 8, "power_iters": 2, "tol": 1e-4, "seed": 3, "max_bytes": 10**6,
        "client_statistics": False,
    }  # fmt: skip
    of_clients = {"clients", "weights", "scalings", "names"}
    not_kept = {"progress", "warm", "scratch", "device"}
    assert settings.keys() == signature(aggregate).parameters.keys() - of_clients - not_kept
    aggregate_adapters(four[:3], **settings).save(tmp_path / "s.safetensors")
    updated = update_adapters(State.load(tmp_path / "s.safetensors"), add=four[3:])
    fresh = aggregate_adapters(four, **settings)
    assert_same_bits(updated, fresh)
    assert updated.record == fresh.record


def test_auto_rank_is_found_anew(four: list[Path]) -> None:
    state = aggregate_adapters(four[:2], rank="auto", captured=0.8)
    updated = update_adapters(state, add=four[2:])
    fresh = aggregate_adapters(four, rank="auto", captured=0.8)
    assert_same_bits(updated, fresh)
    assert updated.settings == fresh.settings
    assert updated.record == fresh.record


def test_state_and_clients_may_move_together(four: list[Path], tmp_path: Path) -> None:
    aggregate_adapters(four[:3], rank=4).save(tmp_path / "server.safetensors")
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    state = State.load(moved / "server.safetensors")
    moved_folders = [moved / folder.name for folder in four]
    assert_same_bits(
        update_adapters(state, add=moved_folders[3:]), aggregate_adapters(moved_folders, rank=4)
    )


def test_links_to_states_and_clients(four: list[Path], tmp_path: Path) -> None:
    """A state found through a link elsewhere, of a client that is a link and goes by its name."""
    (tmp_path / "merged/2026").mkdir(parents=True)
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "ann").symlink_to(four[0])
    (tmp_path / "deep/er/latest").symlink_to(tmp_path / "merged/2026")
    state = aggregate_adapters([tmp_path / "ann", four[1]], rank=4)
    state.save(tmp_path / "merged/2026/s.safetensors")
    found = State.load(tmp_path / "deep/er/latest/s.safetensors")
    assert found.record == state.record
    assert update_adapters(found, remove=["client-1"]).clients == ("ann",)


def test_what_was_recorded(four: list[Path]) -> None:
    state = aggregate_adapters(four[:2], [3, 1], rank=4, base="tiny/mixed")
    record = state.record
    assert json.loads(json.dumps(record)) == record
    assert record["arguments"]["rank"] == 4
    assert record["arguments"]["base"] == "tiny/mixed"
    for entry, folder, weight in zip(record["clients"], four, (3.0, 1.0), strict=False):
        content = (folder / TENSORS).read_bytes()
        assert entry["name"] == folder.name
        assert entry["path"] == str(folder)
        assert entry["weight"] == weight
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["clients"][0]["ranks"] == [2]
    assert record["clients"][0]["scalings"] == [2.5]


def test_clients_that_changed_or_vanished_are_refused_by_name(four: list[Path]) -> None:
    clients_with_examples(four)
    state = aggregate_adapters(four, rank=4)
    edit_tensors(four[0], lambda t: t[FIRST_A].add_(1e-3))
    edit_config(four[1], lora_alpha=7)
    (four[2] / "glora.json").write_text('{"num_examples": 1}')
    with pytest.raises(Refused) as caught:
        update_adapters(state, remove=["client-3"])
    assert_names_everything(list(caught.value.refusals), "client-0", TENSORS, "--add", "--remove")
    found = [(r.client, r.file) for r in caught.value.refusals]
    assert found[:3] == [("client-0", TENSORS), ("client-1", CONFIG), ("client-2", "glora.json")]
    shutil.rmtree(four[3])
    with pytest.raises(Refused, match=r"client-3.*no such folder.*--add DIR.*--remove NAME"):
        update_adapters(state, remove=["client-0"])
    # A client that is replaced or withdrawn may be whatever it is now.
    state = aggregate_adapters(four[:3], rank=4)
    edit_tensors(four[0], lambda t: t[FIRST_A].add_(1e-3))
    edit_config(four[1], lora_alpha=8)
    fresh = update_adapters(state, add=[four[0]], remove=["client-1"])
    assert_same_bits(fresh, aggregate_adapters([four[0], four[2]], rank=4))


def test_updates_that_cannot_be_made(four: list[Path], tmp_path: Path) -> None:
    state = aggregate_adapters(four[:3], rank=4)
    with pytest.raises(Refused) as caught:
        update_adapters(state, add=[four[1]], remove=["client-1", "bob"], weights=[1])
    assert_names_everything(list(caught.value.refusals), "bob", "client-0, client-1, client-2")
    assert len(caught.value.refusals) == 3
    with pytest.raises(Refused, match="nothing to aggregate"):
        update_adapters(state, remove=["client-0", "client-1", "client-2"])
    with pytest.raises(GloraError, match="add: got"):
        update_adapters(state, add=str(four[3]))
    given = aggregate_adapters(four[:3], [1, 2, 3], rank=4)
    with pytest.raises(GloraError, match=r"weights.*found None.*client-3.*were given"):
        update_adapters(given, add=[four[3]])
    with pytest.raises(GloraError, match=r"weights.*found 2.*one per added"):
        update_adapters(given, add=[four[3]], weights=[1, 2])
    # A state of the first format, or of bare pairs, can be read but says nothing of clients.
    state.save(tmp_path / "s.safetensors")
    as_format(tmp_path / "s.safetensors", 1)
    with pytest.warns(GloraWarning, match="no checksum"):
        old = State.load(tmp_path / "s.safetensors")
    assert_same_bits(old, state)
    with pytest.raises(GloraError, match=r"without a record.*aggregate the folders once more"):
        update_adapters(old, add=[four[3]])
