"""States on the command line: damaged ones, older ones, and ones that lead elsewhere."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CLIENTS, everything, glora, glora_json
from state_files import as_format, put_together, taken_apart

from glora_ops import GloraError, GloraWarning, State, aggregate

STATE = "out/server.safetensors"


@pytest.fixture
def merged(work: Path) -> Path:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", 4, "--readout", "2", "--weights", "3,1,2")
    return work / STATE


def test_inspect_shows_the_checksum_it_verified(merged: Path) -> None:
    facts = glora_json("inspect", "out")
    text = merged.read_bytes().decode(errors="replace")
    assert facts["format_version"] == 3
    assert f'sha256\\": \\"{facts["sha256"]}' in text
    assert f"all verified, sha256 {facts['sha256']}" in glora("inspect", "out").stdout


def test_damage_is_refused_by_every_command_and_nothing_is_written(
    merged: Path, work: Path
) -> None:
    content = bytearray(merged.read_bytes())
    content[-100] ^= 4
    merged.write_bytes(content)
    before = everything(work)
    for command in (
        ["inspect", "out"],
        ["inspect", STATE, "--plot", "x.png"],
        ["readout", "out", "-r", 2, "-o", "x"],
        ["update", "out", "--remove", "ann"],
        ["update", "out", "--remove", "ann", "-o", "x"],
    ):
        said = glora(*command, code=1).stderr
        assert "the tensor is not what was written" in said
        assert "modules/" in said
        assert STATE in said
        (refusal,) = glora_json(*command, code=1)["refused"]
        assert refusal["tensor"].startswith("modules/")
    assert everything(work) == before


@pytest.mark.parametrize("version", [1, 2])
def test_older_states_are_used_with_a_note(merged: Path, version: int) -> None:
    as_format(merged, version)
    facts = glora_json("inspect", "out")
    assert (facts["format_version"], facts["sha256"]) == (version, None)
    note = f"has format {version}, which carries no checksum"
    for command in (["inspect", "out"], ["readout", "out", "-r", 1, "-o", "r1"]):
        result = glora(*command)
        assert note in " ".join(result.stdout.split())
        assert result.stderr == ""
    if version == 2:
        assert note in " ".join(glora("update", "out", "--remove", "ann").stdout.split())
        assert glora_json("inspect", "out")["format_version"] == 3


def test_an_update_says_what_it_reads_before_it_does(
    merged: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "new").mkdir()
    os.rename("cyd", "new/cyd")
    command = ["update", "out", "--remove", "ann", "--add", "new/cyd", "-o", "x"]
    lines = [
        f"reads: in {work}: bob (recorded in STATE)",
        f"reads: in {work / 'new'}: cyd (added)",
    ]
    assert glora(*command).stderr.splitlines() == lines
    facts = glora_json(*command, "--overwrite")
    assert facts["reads"] == [str(work / "bob"), str(work / "new/cyd")]

    def look(*_: object, **__: object) -> None:
        raise OSError("looked at")

    monkeypatch.setattr("glora_ops.adapters.read.inspect_adapter", look)
    said = glora(*command, "--overwrite", code=1).stderr
    assert said.startswith("\n".join(lines))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("../secret", "a folder that is not the client's"),
        ("../../../../../../../../etc", "a folder that is not the client's"),
        ("../pipe/ann", "no such folder"),
        ("../queue/ann", "not a regular file"),
        ("../link/ann", "lies outside its folder"),
        ("/dev/zero/../ann", "no such folder"),
        ("/proc/self/ann", "no such folder"),
    ],
)
def test_records_that_lead_elsewhere_are_refused_unopened(
    merged: Path, work: Path, path: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a pipe would wait for ever; a folder of another name is not the client."""
    os.rename("ann", "secret")
    (work / "pipe").mkdir()
    os.mkfifo(work / "pipe/ann")
    for folder in ("queue/ann", "link/ann"):
        (work / folder).mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "glora.json"):
            if folder.startswith("queue"):
                os.mkfifo(work / folder / name)
            else:
                (work / folder / name).symlink_to("/proc/self/environ")
    tensors, about = taken_apart(merged)
    about["record"]["clients"][0]["path"] = path
    put_together(merged, tensors, about)
    plain = Path.open

    def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
        assert self.resolve().is_relative_to(work), self
        assert self.is_file(), self
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    before = sorted(everything_but_pipes(work))
    said = glora("update", "out", "--remove", "bob", code=1).stderr
    assert says in said
    assert "ann" in said
    assert sorted(everything_but_pipes(work)) == before


def everything_but_pipes(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def test_reports_warnings_and_errors_cannot_drive_the_terminal(work: Path) -> None:
    """Names of clients and modules come from others; Python prints them as well."""
    evil = "\x1b[31mevil\x07"
    torch.manual_seed(0)
    pairs = [{evil: (torch.randn(6, 2), torch.randn(2, 5))} for _ in range(2)]
    # A cut in a tie: the warning names the module.
    eye = [{evil: (torch.eye(6)[:, i : i + 1], torch.eye(5)[i : i + 1])} for i in range(2)]
    with pytest.warns(GloraWarning) as caught:
        state = aggregate(eye, rank=1, names=[evil, "bob"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GloraWarning)
        heavy = aggregate(pairs, [9, 1], rank=1, names=[evil, "bob"])
    with pytest.raises(GloraError) as refused:
        state.save(work / "s.safetensors")
    shown = [str(w.message) for w in caught] + [state.report(), heavy.report(), str(refused.value)]
    for text in shown:
        assert "\x1b" not in text
        assert "evil" in text


def test_a_state_with_hostile_names_is_shown_clean(merged: Path, work: Path) -> None:
    tensors, about = taken_apart(merged)
    evil = "\x1b[2J\x9b31m\u202e"
    about["clients"][1] = about["record"]["clients"][1]["name"] = evil
    about["record"]["clients"][1]["path"] = f"../{evil}"
    about["layout"]["base_model"] = evil
    about["settings"]["skipped"] = [evil]
    about["settings"]["dense_from"] = {evil: [evil]}
    put_together(merged, tensors, about)
    assert State.load(merged).clients[1] == evil
    commands = (
        ["inspect", "out"],
        ["inspect", "out", "--plot", "x.png"],
        ["readout", "out", "-r", 2, "-o", "x"],
        ["update", "out", "--remove", "ann"],
        ["update", "out", "--remove", "nobody"],
    )
    for command in commands:
        result = glora(*command, code=int(command[0] == "update"))
        assert not set("\x1b\x9b\u202e") & set(result.stdout + result.stderr)
    names = [client["name"] for client in glora_json("inspect", "out")["clients"]]
    assert names == ["ann", evil, "cyd"]
    assert json.loads(json.dumps(names)) == names
