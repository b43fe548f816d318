"""Many clients: what they have in common is kept once, and what cannot be saved is not computed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from job_clients import save_client
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glora_ops import aggregate_adapters, api, state_file
from glora_ops.adapters import read, safetensors_header
from glora_ops.cli import app, state_facts
from glora_ops.cli.client_list import read_client_list
from glora_ops.errors import GloraError, Refusal, Refused
from glora_ops.job import plan
from glora_ops.merging.aggregate import inspect


def test_clients_of_one_layout_share_headers_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layouts among six clients: the tensors' entries are looked at twice, not six times."""
    folders = [save_client(tmp_path / f"c{i}", i, 2 + i % 2) for i in range(6)]
    expected = [inspect([folder], None).clients[0] for folder in folders]
    looked = []
    look = safetensors_header._tensor_info
    monkeypatch.setattr(
        safetensors_header, "_tensor_info", lambda entry: looked.append(entry) or look(entry)
    )
    clients = inspect(folders, None).clients
    assert len(looked) == 2 * 24
    assert {id(clients[i].modules) for i in range(6)} == {id(clients[i].modules) for i in (0, 1)}
    assert {id(clients[i].stored.tensors) for i in range(6)} == {
        id(clients[i].stored.tensors) for i in (0, 1)
    }
    assert len({id(clients[i].config) for i in range(6)}) == 2
    for i, alone in enumerate(expected):
        assert clients[i] == alone


def test_a_configuration_that_was_read_with_a_header_is_not_parsed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layouts among six clients: two configurations are parsed; a new one is, and refused."""
    folders = [save_client(tmp_path / f"c{i}", i, 2 + i % 2) for i in range(6)]
    parsed, parse = [], read.parse_settings
    monkeypatch.setattr(
        read, "parse_settings", lambda *config: parsed.append(config) or parse(*config)
    )
    inspect(folders, None)
    assert len(parsed) == 2
    config = folders[5] / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"DORA"'))
    with pytest.raises(Refused, match="client 'c5'"):
        inspect(folders, None)


def test_a_bad_value_among_tensors_that_are_read_together_is_named(tmp_path: Path) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2) for i in range(2)]
    file = folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[7]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(Refused) as refused:
        aggregate_adapters(folders, rank=2)
    assert [name in str(reason) for reason in refused.value.refusals] == [True]


def test_a_layout_is_not_shared_by_clients_whose_configurations_say_otherwise(
    tmp_path: Path,
) -> None:
    """The same tensors mean another update under another alpha."""
    folders = [save_client(tmp_path / f"c{i}", i, 2, alpha=i + 1) for i in range(3)]
    clients = inspect(folders, None).clients
    assert [{m.scaling for m in clients[i].modules.values()} for i in range(3)] == [
        {0.5},
        {1.0},
        {1.5},
    ]


def test_a_header_that_is_known_does_not_vouch_for_a_file_of_another_length(tmp_path: Path) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2) for i in range(2)]
    with (folders[1] / "adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        Refused, match=r"client 'c1'.*the file's length is not what its header says"
    ):
        inspect(folders, None)


@pytest.mark.parametrize(("limit", "value"), [("MAX_HEADER_BYTES", 700), ("FEW", 1)])
def test_what_could_not_be_saved_is_refused_before_any_value_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2) for i in range(3)]
    monkeypatch.setattr(state_file, "FEW", 2)
    monkeypatch.setattr(state_file, limit, value)
    monkeypatch.setattr("glora_ops.state_schema.MAX_CLIENTS", 3 if limit != "FEW" else 2)
    steps = []
    with pytest.raises(GloraError, match="which a state holds"):
        aggregate_adapters(folders, progress=lambda step, done, total: steps.append(step))
    assert set(steps) == {"headers"}


def test_a_plan_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2) for i in range(3)]
    monkeypatch.setattr(sys.modules[plan.__module__], "PLAN_BYTES", 1_000)
    with pytest.raises(GloraError, match="plan groups of them"):
        plan(folders, tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_clients_of_one_layout_share_their_scalings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2 + i % 2) for i in range(6)]
    seen = []
    solve = api.solve

    def spy(sources: Any, modules: Any, weights: Any, scale: Any, *rest: Any, **how: Any) -> Any:
        seen.extend(scale)
        return solve(sources, modules, weights, scale, *rest, **how)

    monkeypatch.setattr(api, "solve", spy)
    aggregate_adapters(folders, rank=2)
    assert [set(x.values()) for x in seen] == [{4.0}, {8 / 3}] * 3
    assert len({id(x) for x in seen}) == 2


def test_of_many_clients_the_first_are_shown_unless_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_facts, "CLIENTS", 2)
    folders = [str(save_client(tmp_path / f"c{i}", i, 2)) for i in range(4)]
    for extra, shown in (([], "and 2 more"), (["-v"], "c3")):
        words = ["aggregate", *folders, "-o", str(tmp_path / f"out{len(extra)}"), *extra]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0
        assert shown in done.stdout
        assert ("c3" in done.stdout) == bool(extra)


def test_twenty_thousand_clients_are_named_by_a_list(tmp_path: Path) -> None:
    """As many paths are more than a command line takes; here each names one of three folders."""
    folders = [save_client(tmp_path / f"c{i}", i, 2, layers=1) for i in range(3)]
    listed = tmp_path / "clients.tsv"
    listed.write_text("".join(f"{folders[i % 3]}\tclient-{i}\n" for i in range(20_000)))
    places, weights = read_client_list(listed)
    assert (len(places), weights) == (20_000, None)
    assert (places[-1].name, places[-1].path) == ("client-19999", folders[1])


@pytest.mark.parametrize(
    "error",
    [
        GloraError("rank: got 0", Refusal("rank cannot be used", found="0")),
        Refused([Refusal("one", "ann", more=3), Refusal("two", "bob", "file")]),
    ],
)
def test_errors_reach_other_processes_whole(error: GloraError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.refusals == error.refusals
