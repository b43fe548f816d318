"""Configurations: the shipped ones, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from glora_ops.errors import GloraError, Refused
from glora_ops.fl.config import Config, describe_fields, load_config, shipped
from glora_ops.fl.methods import METHODS
from glora_ops.fl.server import Setup

DOCS = Path(__file__).parents[2] / "docs" / "federated.md"
EXPECTED = {
    "glue_dirichlet", "glue_hetero_rank", "glue_sparse", "superni_tasks", "backbone_large",
    "efficiency", "digits_dirichlet", "digits_hetero_rank", "digits_sparse", "digits_tasks",
    "digits_efficiency", "text_small_sst2", "text_small_cola", "text_small_sparse",
}  # fmt: skip


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_config(path)


METHOD = '\n[methods.glora]\nkind = "glora"\n'


def test_the_named_configurations_ship() -> None:
    assert set(shipped()) >= EXPECTED


def test_ranks_that_would_be_nothing_but_padding_are_refused_before_the_first_round() -> None:
    shapes = {"layer": (6, 5)}
    with pytest.raises(GloraError, match="ranks: got 999999999, expected at most 1024"):
        Setup(shapes, (4, 999_999_999), 2.0, {}, True, 0)
    method = METHODS["glora"](rank=2_000_000)
    with pytest.raises(GloraError, match="rank: got 2000000, expected at most 1024"):
        method.start(Setup(shapes, (4,), 2.0, {}, True, 0))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_configurations_are_valid_and_say_what_they_take(name: str) -> None:
    loaded = load_config(name)
    assert loaded.name == name
    assert loaded.about.endswith((".", "?"))
    assert loaded.hours
    assert loaded.sweep.lrs, "no method is judged at another's learning rate"
    for label in loaded.methods:
        shapes = {"m": (128, 128)}
        loaded.method(label).start(Setup(shapes, loaded.ranks, 2.0, {}, True, 0))


def test_the_publications_settings() -> None:
    assert set(load_config("glue_hetero_rank").ranks) == {4, 8, 16, 32}
    sparse = load_config("glue_sparse").clients
    assert sparse.count >= 20
    assert 0.1 <= sparse.participation <= 0.3
    assert load_config("superni_tasks").clients.partition == "task"
    assert set(METHODS) == {s.kind for s in load_config("glue_dirichlet").methods.values()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('nam = "x"' + METHOD, ["nam: unknown key", "name"]),
        ('name = "x"\n[clients]\nrank = 4' + METHOD, ["clients.rank: unknown key"]),
        ('name = "x"\n[clients]\nranks = [4, 0]' + METHOD, ["clients.ranks.1", "or equal to 1"]),
        ('name = "x"\n[sweep]\nlrs = [0.1, inf]' + METHOD, ["sweep.lrs.1", "inf", "finite"]),
        ('name = "x"\n[task]\nkind = "glue"' + METHOD, ["task.name", "sst2"]),
        ('name = "x"\n[clients]\nalpha = -1' + METHOD, ["clients.alpha", "greater than 0", "-1"]),
        ('name = "x"\n[training]\nrounds = "many"' + METHOD, ["training.rounds", "integer"]),
        ('name = "../x"' + METHOD, ["name"]),
        ('name = ".."' + METHOD, ["name", "'..'"]),
        ('name = "x"\n[methods."a.b"]\nkind = "ffa"', ["methods.a.b", "pattern"]),
        ('name = "x"', ["methods", "required"]),
        ('name = "x"\n[methods.a]\nkind = "fedavg"', ["methods.a.kind", "'fedavg'", "fedit"]),
        (
            'name = "x"\n[methods.a]\nkind = "glora"\nbases = "x"',
            ["methods.a.bases: unknown key", "basis"],
        ),
        ('name = "x"\n[methods.a]\nkind = "glora"\nbasis = "x"', ["methods.a.basis", "consensus"]),
        (
            'name = "x"\n[methods.a]\nkind = "glora"\nmomentum = 2.0',
            ["methods.a.momentum", "[0, 1)"],
        ),
        ("name = ", ["no TOML"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(GloraError) as refused:
        load(tmp_path, text)
    for word in words:
        assert word in str(refused.value)


MISTAKES = """
nam = 2
[task]
kind = "glue"
[clients]
count = 0
ranks = [0, 4, "a"]
[training]
lr = nan
[sweep]
lrs = [0.1, -1]
[methods.b]
kind = "fedavg"
lr = -1
[methods.c]
lr = 1
[methods.d]
kind = "glora"
bases = "x"
basis = "y"
momentum = 2.0
rank = 0
[methods.e]
kind = "hetlora"
gamma = 3
penalty = -2
"""


def test_all_mistakes_are_listed_at_once_each_with_key_value_and_expectation(
    tmp_path: Path,
) -> None:
    with pytest.raises(Refused) as refused:
        load(tmp_path, MISTAKES)
    wanted = {
        "name": "", "nam": "2", "task.name": "''", "clients.count": "0", "clients.ranks.0": "0",
        "clients.ranks.2": "'a'", "training.lr": "nan", "sweep.lrs.1": "-1",
        "methods.b.kind": "'fedavg'", "methods.b.lr": "-1", "methods.c.kind": "",
        "methods.d.bases": "'x'", "methods.d.basis": "'y'", "methods.d.momentum": "2.0",
        "methods.d.rank": "0", "methods.e.gamma": "3", "methods.e.penalty": "-2",
    }  # fmt: skip
    found = {r.problem.split(":")[0].split(" ")[0]: r for r in refused.value.refusals}
    assert found.keys() == wanted.keys()
    for key, refusal in found.items():
        assert refusal.found.removesuffix(".0") == wanted[key].removesuffix(".0")
        assert refusal.file == str(tmp_path / "mine.toml")
        assert refusal.expected or ": " in refusal.problem


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(GloraError, match="digits_dirichlet"):
        load_config("nowhere.toml")


def test_model_on_the_command_line_replaces_the_configurations(tmp_path: Path) -> None:
    assert load_config("glue_dirichlet", model="/some/folder").model.name == "/some/folder"


def test_every_field_is_documented() -> None:
    page = DOCS.read_text()
    for section, name, _, meaning in describe_fields():
        assert meaning, f"{section}.{name} has no description"
        assert f"`{name}`" in page, f"{section}.{name} is not in docs/federated.md"
