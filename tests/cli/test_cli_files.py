"""Nothing that stands at an output is lost, whoever puts it there, and whenever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import CLIENTS, everything, glora
from peft_models import gpt2, load, save_client
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glora_ops import State
from glora_ops.adapters.write import strangers as strangers_in_adapter
from glora_ops.cli.strangers import strangers
from glora_ops.merging import aggregate, update
from glora_ops.runtime import hidden, outputs, rename

TENSORS = "adapter_model.safetensors"


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something while `glora aggregate` computes."""
    assert update.merge is aggregate.merge  # imported before, or it would keep what is put here
    plain = aggregate.merge

    def busy(*args: Any, **kwargs: Any) -> State:
        state = plain(*args, **kwargs)
        act()
        return state

    monkeypatch.setattr(aggregate, "merge", busy)


def remark(path: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Write a tensor file again with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = change(file.metadata() or {})
    save_file(load_file(path), path, metadata)


def as_before(out: Path) -> None:
    """What the version before marks would have left there."""
    for path in out.glob(f"r*/{TENSORS}"):
        remark(path, lambda metadata: {"format": "pt"})

    def older(metadata: dict[str, str]) -> dict[str, str]:
        about = json.loads(metadata["glora"]) | {"format_version": 2}
        return {"glora": json.dumps({k: about[k] for k in about if k not in ("tensors", "sha256")})}

    remark(out / "server.safetensors", older)


# --- while a run is at work ----------------------------------------------------------------------

APPEARING: dict[str, Callable[[Path], object]] = {
    "folder": lambda out: (out.mkdir(), (out / "thesis.txt").write_text("mine")),
    "empty folder": lambda out: out.mkdir(),
    "file": lambda out: out.write_text("mine"),
    "link": lambda out: out.symlink_to("ann"),
}


@pytest.mark.parametrize("what", APPEARING)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_stand_at_out_during_a_run_is_kept(
    what: str, overwrite: bool, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, lambda: APPEARING[what](work / "out"))
    flag, empty = ["--overwrite"] * overwrite, overwrite and what == "empty folder"
    said = glora("aggregate", *CLIENTS, "-o", "out", *flag, code=0 if empty else 1).stderr
    if empty:
        return
    assert "refused" in said
    assert "out" in said
    if what != "empty folder":
        found = work / "out" / "thesis.txt" if what == "folder" else work / "out"
        assert found.is_symlink() if what == "link" else found.read_text() == "mine"
    assert {p.name for p in work.iterdir()} == {*CLIENTS, "out"}
    assert everything(work / "ann")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("late", [False, True])
def test_what_is_put_into_out_before_it_is_replaced_is_kept(
    late: bool, exchange: bool, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run computes, or between the last look and the exchange of names."""
    glora("aggregate", "ann", "-o", "out", "--readout", 2)
    before = everything(work)
    if not exchange:
        monkeypatch.setattr(rename, "_renameat2", lambda *_: False)
    moments = iter([lambda: (work / "out" / "r2" / "thesis.txt").write_text("mine")])

    def put() -> None:
        for moment in moments:
            moment()
            break

    if late:
        plain = outputs.exchange
        monkeypatch.setattr(outputs, "exchange", lambda a, b: (put(), plain(a, b))[1])
    else:
        meanwhile(monkeypatch, put)
    said = glora("aggregate", *CLIENTS, "-o", "out", "--overwrite", code=1).stderr
    assert "r2/thesis.txt" in said
    assert "nothing was written" in said
    assert everything(work) == before | {"out/r2/thesis.txt": b"mine"}


def test_a_second_writer_is_refused_by_name(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str] = []
    meanwhile(
        monkeypatch,
        lambda: others.append(glora("readout", "m", "-r", 2, "-o", "out", code=1).stderr),
    )
    glora("aggregate", "ann", "bob", "-o", "m")
    others.clear()
    glora("aggregate", *CLIENTS, "-o", "out")
    (said,) = others
    assert f"another process ({os.getpid()} on" in said
    assert State.load("out/server.safetensors").clients == tuple(CLIENTS)
    assert {p.name for p in work.iterdir()} == {*CLIENTS, "m", "out"}


def test_leftovers_go_with_the_next_run_and_what_looks_like_one_stays(work: Path) -> None:
    code = (
        "import os, glora_ops.cli; from glora_ops import State;"
        "State.write_adapter = lambda *_, **__: os._exit(9);"
        "glora_ops.cli.app('aggregate ann bob -o out --readout 4'.split())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    left = {p.name for p in work.iterdir()} - set(CLIENTS)
    assert any(name.endswith(".new") for name in left)
    alike = work / ".out.deadbeef.new"
    alike.mkdir()
    (alike / "thesis.txt").write_text("mine")
    with outputs.new_folder(work / "out", strangers) as other:  # at work: not left over
        glora("aggregate", "ann", "bob", "-o", "out2")
        glora("aggregate", "ann", "bob", "-o", "out", "--readout", 4)
        assert other.is_dir()
        shutil.rmtree(work / "out")
    assert {p.name for p in work.iterdir()} == {*CLIENTS, "out", "out2", alike.name}
    assert (alike / "thesis.txt").read_text() == "mine"


def test_a_lock_that_is_not_gloras_is_kept(work: Path) -> None:
    (work / ".out.lock").write_text("the key to my diary")
    assert ".out.lock" in glora("aggregate", *CLIENTS, "-o", "out", code=1).stderr
    assert (work / ".out.lock").read_text() == "the key to my diary"


@pytest.mark.parametrize(
    ("number", "again", "code", "says"),
    [
        (signal.SIGTERM, 0, 143, "terminated"),
        (signal.SIGTERM, 9, 143, "terminated"),
        (signal.SIGINT, 0, 130, "interrupted"),
        (signal.SIGINT, 1, 130, "interrupted"),  # that somebody presses Ctrl-C twice
    ],
)
def test_signals_clear_away_whole_also_where_more_come_meanwhile(
    number: int, again: int, code: int, says: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glora("aggregate", "ann", "-o", "deep/out")
    before = everything(work)
    plain = hidden._clear_unlocked
    more: list[int] = []

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    def clear(*arguments: Any) -> None:
        if more:
            os.kill(os.getpid(), more.pop())
        plain(*arguments)

    monkeypatch.setattr(State, "write_adapter", stop)
    monkeypatch.setattr(hidden, "_clear_unlocked", clear)
    for arguments in (
        ["aggregate", *CLIENTS, "-o", "deep/out", "--overwrite", "--readout", 2],
        ["aggregate", *CLIENTS, "-o", "other/deep/out", "--readout", 2],
        ["readout", "deep/out", "-r", 2, "-o", "x"],
    ):
        more[:] = [number] * again
        said = glora(*arguments, code=code).stderr
        assert said == f"{says}: nothing is half written\n"
        assert everything(work) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- what may be replaced ------------------------------------------------------------------------


def test_overwrite_replaces_a_whole_output_and_nothing_else(work: Path) -> None:
    """The clients lie in OUT, beside a state: neither as inputs nor as others do they go."""
    (work / "all").mkdir()
    for name in CLIENTS:
        shutil.move(work / name, work / "all" / name)
    glora("aggregate", "all/ann", "all/bob", "-o", "m")
    shutil.copy(work / "m" / "server.safetensors", work / "all")
    before = everything(work)
    for clients in (["all/ann", "all/bob"], ["all/ann"]):
        said = glora("aggregate", *clients, "-o", "all", "--overwrite", code=1).stderr
        assert "ann, bob, cyd" in said
        assert everything(work) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["aggregate", "ann", "bob", "-o", "ann/out"],
        ["aggregate", "box/ann", "bob", "-o", "box", "--overwrite"],
        ["aggregate", "ann", "--weights", "new/w.json", "-o", "new", "--overwrite"],
        ["update", "m", "--add", "cyd", "-o", "m/new"],
        ["update", "m", "--add", "cyd", "-o", "m", "--overwrite"],
        ["update", "m", "--add", "cyd", "-o", "bob/new"],
        ["readout", "m", "-r", 2, "-o", "m/r2"],
        ["readout", "m/server.safetensors", "-r", 2, "-o", "m", "--overwrite"],
        ["inspect", "m", "--plot", "m/p.png"],
        ["inspect", "ann", "--plot", "ann/p.png"],
        ["compare", "ann", "bob", "--plot", "bob/p.png"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_inputs_and_outputs_lie_apart(arguments: list[Any], work: Path) -> None:
    glora("aggregate", "ann", "bob", "-o", "m")
    (work / "new").mkdir()
    (work / "new" / "w.json").write_text('{"ann": 1}')
    (work / "box").mkdir()
    (work / "box" / "ann").symlink_to(work / "ann")
    shutil.copytree(work / "ann", work / "box" / "real")
    if arguments[1] == "box/ann":
        arguments = [arguments[0], "box/real", *arguments[2:]]
    before = everything(work)
    said = glora(*arguments, code=1).stderr
    assert "nothing was written" in said
    assert any(words in said for words in ("lie in one another", "did not write"))
    assert everything(work) == before


def test_a_trained_adapter_is_never_overwritten(work: Path) -> None:
    """Not PEFT's, and not one that PEFT saved over a readout, with what else lies beside it."""
    glora("aggregate", *CLIENTS, "-o", "m", "--readout", 4)
    save_client(work / "victim", gpt2, seed=9, r=2, target_modules=["c_attn"])
    (work / "victim" / "optimizer.pt").write_bytes(b"moments")
    glora("readout", "m", "-r", 2, "-o", "trained")
    load(gpt2, work / "trained").save_pretrained(work / "trained")
    glora("readout", "m", "-r", 2, "-o", "card")
    (work / "card" / "README.md").write_text("What we learnt")
    load(gpt2, work / "m" / "r4").save_pretrained(work / "m" / "r4")
    before = everything(work)
    for victim, named in (("victim", "optimizer.pt"), ("trained", TENSORS), ("card", "README.md")):
        said = glora("readout", "m", "-r", 2, "-o", victim, "--overwrite", code=1).stderr
        assert named in said
    for arguments in (
        ["aggregate", *CLIENTS, "-o", "m", "--overwrite"],
        ["update", "m", "--remove", "bob"],
    ):
        assert f"r4/{TENSORS}" in glora(*arguments, code=1).stderr
    assert everything(work) == before


def test_readouts_carry_a_mark_and_equal_bytes(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "m", "--readout", 2)
    for again in range(8):  # the library orders metadata by chance
        glora("readout", "m", "-r", 2, "-o", f"again{again}")
        assert everything(work / f"again{again}") == everything(work / "m" / "r2")
    assert strangers_in_adapter(work / "m" / "r2") == []
    assert strangers_in_adapter(work / "ann")
    load(gpt2, work / "m" / "r2")
    assert (work / "m" / "r2" / TENSORS).stat().st_mode & 0o777 == 0o644


def test_outputs_of_the_version_before_marks_are_known_by_their_record(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "m", "--readout", "2,4")
    as_before(work / "m")
    assert strangers(work / "m") == []
    shutil.copytree(work / "m", work / "other")
    shutil.copytree(work / "m" / "r2", work / "m" / "r3")  # not in the record
    assert f"r3/{TENSORS}" in glora("aggregate", *CLIENTS, "-o", "m", "--overwrite", code=1).stderr
    shutil.rmtree(work / "m" / "r3")
    glora("aggregate", *CLIENTS, "-o", "m", "--readout", "2,4", "--overwrite")
    as_before(work / "m")
    glora("update", "m", "--remove", "bob")
    assert strangers(work / "m") == []
    load(gpt2, work / "other" / "r2").save_pretrained(work / "other" / "r2")
    assert (
        f"r2/{TENSORS}" in glora("aggregate", *CLIENTS, "-o", "other", "--overwrite", code=1).stderr
    )


def test_a_picture_is_drawn_over_gloras_own_only(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "m", "--plot")
    assert strangers(work / "m") == []
    for suffix in ("png", "pdf", "svg"):
        picture = work / f"p.{suffix}"
        for command in (["inspect", "m"], ["inspect", "ann"], ["compare", *CLIENTS]):
            glora(*command, "--plot", picture)
        picture.write_bytes(b"holiday")
        for command in (["inspect", "m"], ["inspect", "ann"], ["compare", *CLIENTS]):
            said = glora(*command, "--plot", picture, code=1).stderr
            assert "glora did not write" in said
        assert picture.read_bytes() == b"holiday"
    (work / "m" / "spectra.png").write_bytes(b"holiday")
    said = glora("aggregate", *CLIENTS, "-o", "m", "--overwrite", code=1).stderr
    assert "spectra.png" in said


def test_a_picture_on_a_full_disk_is_whole_or_not_there(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    glora("inspect", "ann", "--plot", "p.png")
    before = everything(work)

    def full(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"\x89PNG half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    for name in ("p.png", "q.png"):
        said = glora("inspect", "ann", "--plot", name, code=1).stderr
        assert "No space left" in said
        assert "nothing was written" in said
    assert everything(work) == before


# --- what is printed -----------------------------------------------------------------------------


def shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`glora` in a shell, as a process of its own."""
    code = f"glora() {{ '{sys.executable}' -c 'from glora_ops.cli import main; main()' \"$@\"; }}"
    return subprocess.run(
        ["bash", "-c", f"{code}; {command}"],
        capture_output=True, text=True, check=False, env=os.environ | env,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_cannot_be_printed_does_not_undo_what_was_written(work: Path) -> None:
    done = shell("glora aggregate ann bob -o full --json > /dev/full")
    assert done.returncode == 0
    assert done.stderr == "the output could not be shown: No space left on device; written: full\n"
    (work / "dan").mkdir()
    done = shell(
        "glora aggregate ann bob dan -o pipe --on-bad-client skip | true; exit ${PIPESTATUS[0]}"
    )
    assert done.returncode == 3
    assert done.stderr == "the output could not be shown: Broken pipe; written: pipe\n"
    done = shell("glora aggregate ann bob -o ascii", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 clients ? rank 8" in done.stdout
    assert everything(work / "ascii") == everything(work / "full")
    assert (work / "pipe" / "server.safetensors").exists()
    assert {p.name for p in work.iterdir()} == {*CLIENTS, "dan", "full", "pipe", "ascii"}
    done = shell("glora inspect full > /dev/full")  # all that it does is print
    assert done.returncode == 1
    assert done.stderr == "the output could not be shown: No space left on device\n"
