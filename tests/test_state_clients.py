"""States of many clients, who are kept beside the state: the same state, whole or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from job_clients import save_clients
from safetensors.torch import load_file, save_file
from state_files import canonical, digest, taken_apart
from typer.testing import CliRunner

import glora_ops as glora
from glora_ops import GloraError, State, aggregate_adapters, state_clients, state_file
from glora_ops.cli import app

LINES, TENSORS = "clients.jsonl", "clients.safetensors"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients are not many, three are."""
    monkeypatch.setattr(state_file, "BESIDE", 2)


def run(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stdout


def beside(folder: Path) -> Path:
    (found,) = folder.glob("clients-*")
    return found


def same(a: State, b: State) -> bool:
    tensors = all(
        torch.equal(x, vars(b[name])[part]) for name in a for part, x in vars(a[name]).items()
    )
    dense = all(torch.equal(x, b.dense[name]) for name, x in a.dense.items())
    rest = ("clients", "weights", "settings", "layout", "record")
    return tensors and dense and all(getattr(a, part) == getattr(b, part) for part in rest)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return aggregate_adapters(save_clients(tmp_path / "in", 4), rank=3)


def test_a_state_of_many_clients_is_the_same_state(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    state.save(tmp_path / "a" / "server.safetensors")
    monkeypatch.setattr(state_file, "BESIDE", 3)
    state.save(tmp_path / "b" / "server.safetensors")
    assert not list((tmp_path / "a").glob("clients-*"))
    assert sorted(x.name for x in beside(tmp_path / "b").iterdir()) == [LINES, TENSORS]
    assert len((beside(tmp_path / "b") / LINES).read_text().splitlines()) == 4
    held = load_file(tmp_path / "b" / "server.safetensors")
    assert not [name for name in held if name.endswith(("present", "client_stats"))]
    shutil.move(tmp_path / "b", tmp_path / "moved")
    again = State.load(tmp_path / "moved" / "server.safetensors")
    assert same(State.load(tmp_path / "a" / "server.safetensors"), state)
    assert same(again, state)
    (tmp_path / "again").mkdir()
    again.save(tmp_path / "again" / "server.safetensors")
    for file in ("server.safetensors", f"{beside(tmp_path / 'moved').name}/{LINES}"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "moved" / file).read_bytes()


def test_commands_make_of_it_what_they_make_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = save_clients(tmp_path / "in", 5)
    answers = []
    for name, most in (("few", 10), ("many", 2)):
        monkeypatch.setattr(state_file, "BESIDE", most)
        out = tmp_path / name / "out"
        run("aggregate", *clients[:4], "-o", out, "--rank", 3, "--readout", 2)
        assert len(list(out.glob("clients-*"))) == (name == "many")
        run("update", out, "--add", clients[4], "--remove", "c0", "-o", tmp_path / name / "new")
        run("update", out, "--remove", "c1")  # in its own place
        run("readout", tmp_path / name / "new", "-r", 2, "-o", tmp_path / name / "r2")
        told = [json.loads(run("inspect", tmp_path / name / x, "--json")) for x in ("out", "new")]
        for facts in told:
            facts.pop("state"), facts.pop("sha256"), facts.pop("format_version")
        read = load_file(tmp_path / name / "r2" / "adapter_model.safetensors")
        answers.append((told, {key: x.tolist() for key, x in read.items()}))
        run("aggregate", *clients[1:4], "-o", out, "--rank", 3, "--overwrite")
        assert len(list(out.glob("clients-*"))) == (name == "many")
    assert answers[0] == answers[1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def another(path: Path) -> None:
    """A statistic of another state, in a file that is whole."""
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("client_stats"))
    save_file(tensors | {name: tensors[name] + 1}, path, {})


def less(path: Path) -> None:
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path, {})


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [
        ("", shutil.rmtree, "no file .*; copy it to beside the state, whole, or aggregate again"),
        (LINES, Path.unlink, "no file .*; copy it to beside the state, whole, or aggregate again"),
        (TENSORS, Path.unlink, "no file .*; copy it"),
        (LINES, link, "no file .*; copy it"),
        (LINES, flip, "another SHA-256"),
        (LINES, lambda path: path.write_bytes(path.read_bytes()[:-9]), "another SHA-256"),
        (LINES, lambda path: path.write_bytes(path.read_bytes() * 2), "of more than"),
        (TENSORS, flip, "is not what was written"),
        (TENSORS, another, "is not what was written"),
        (TENSORS, less, "a tensor or its checksum is missing"),
        (TENSORS, lambda path: path.write_bytes(path.read_bytes()[:-9]), "header says|fit"),
        (TENSORS, lambda path: save_file(load_file(path), path, {"more": "x"}), "metadata"),
    ],
)
def test_clients_that_are_missing_or_others_are_refused(
    file: str, spoil: Callable[[Path], object], said: str,
    state: State, few: None, tmp_path: Path,
) -> None:  # fmt: skip
    state.save(tmp_path / "server.safetensors")
    spoil(beside(tmp_path) / file)
    with pytest.raises(GloraError, match=said):
        State.load(tmp_path / "server.safetensors")


def forged(path: Path, lines: list[object]) -> None:
    """A state whose lines are these, with true checksums everywhere."""
    tensors, about = taken_apart(path)
    side = load_file(beside(path.parent) / TENSORS)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    sha256 = hashlib.sha256(text).hexdigest()
    about |= {"tensors": {name: digest(x) for name, x in (tensors | side).items()}}
    about["beside"] = {"clients": len(lines), "bytes": len(text), "sha256": sha256}
    about["sha256"] = hashlib.sha256(canonical(about)).hexdigest()
    save_file(tensors, path, metadata={"glora": json.dumps(about)})
    folder = path.parent / state_clients.folder_name(about)
    beside(path.parent).rename(folder)
    (folder / LINES).write_bytes(text)


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda rows: rows, ""),
        (lambda rows: [{**rows[0], "weight": 1.0}], "does not fit"),  # statistics of four
        (lambda rows: [*rows[:-1], rows[0]], "each name once"),
        (lambda rows: [{**rows[0], "more": 1}, *rows[1:]], "other entries"),
        (lambda rows: [7, *rows[1:]], "clients as glora writes them"),
        (lambda rows: [{**rows[0], "weight": "1"}, *rows[1:]], r"weights\.0"),
        (lambda rows: [{**rows[0], "record": None}, *rows[1:]], "other entries"),
        (
            lambda rows: [{**rows[0], "record": {**rows[0]["record"], "path": "\0"}}, *rows[1:]],
            "a path",
        ),
        (
            lambda rows: [{**rows[0], "record": {**rows[0]["record"], "x": [[[[]]]]}}, *rows[1:]],
            "x: ",
        ),
    ],
)
def test_forged_clients_are_refused_with_true_checksums(
    forge: Callable[[list[object]], list[object]], said: str,
    state: State, few: None, tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "server.safetensors"
    state.save(path)
    rows = [json.loads(line) for line in (beside(tmp_path) / LINES).read_text().splitlines()]
    forged(path, forge(rows))
    if not said:
        assert same(State.load(path), state)
        return
    with pytest.raises(GloraError, match=said):
        State.load(path)


def test_a_state_that_is_replaced_takes_its_clients_with_it_and_no_other_states(
    state: State, few: None, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    other = replace(state, weights=tuple(reversed(state.weights)))
    state.save(a)
    first = beside(tmp_path)
    other.save(a)
    assert not first.exists()
    second = beside(tmp_path)
    other.save(b)
    state.save(a)
    assert sorted(tmp_path.glob("clients-*")) == sorted([first, second])
    (second / "notes.txt").write_text("mine")
    state.save(b)
    assert (second / "notes.txt").exists()  # what glora did not write stays
    assert same(State.load(a), state)


def test_what_is_put_among_the_clients_is_named_before_it_is_replaced(
    few: None, tmp_path: Path
) -> None:
    clients = save_clients(tmp_path / "in", 3)
    run("aggregate", *clients, "-o", tmp_path / "out")
    (beside(tmp_path / "out") / "notes.txt").write_text("mine")
    words = ["aggregate", *map(str, clients), "-o", str(tmp_path / "out"), "--overwrite"]
    again = CliRunner().invoke(app, words)
    assert again.exit_code != 0
    assert "notes.txt" in again.output


def test_seventy_thousand_clients_are_saved_and_read(tmp_path: Path) -> None:
    """Beyond the true threshold, with no file of any of them."""
    count = state_clients.BESIDE + 1
    drawn = torch.Generator().manual_seed(0)
    pair = torch.randn(5, 2, generator=drawn), torch.randn(2, 6, generator=drawn)
    small = glora.aggregate([pair], rank=2)
    module = replace(
        small[""],
        client_stats=torch.rand(count, 4, dtype=torch.float64, generator=drawn),
        present=torch.ones(count, dtype=torch.bool),
    )
    names = tuple(f"client-{i}" for i in range(count))
    state = replace(small, modules={"m": module}, clients=names, weights=(1 / count,) * count)
    state.save(tmp_path / "server.safetensors")
    assert (tmp_path / "server.safetensors").stat().st_size < 10_000
    assert same(State.load(tmp_path / "server.safetensors"), state)
