"""Renames that take nobody's place, on file systems with and without the flags for it."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from glora_ops.errors import GloraError, GloraWarning
from glora_ops.runtime import hidden, outputs, rename
from glora_ops.runtime.streams import output_trouble, steady

WAYS = ["flags", "no flags", "no links"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with all there is, one that answers EINVAL, one without hard links too."""
    if request.param == "flags" and sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    if request.param != "flags":

        class Libc:
            @staticmethod
            def renameat2(*_: Any) -> int:
                ctypes.set_errno(errno.EINVAL)
                return -1

        monkeypatch.setattr(rename.ctypes, "CDLL", lambda *_, **__: Libc)
    if request.param == "no links":

        def link(*_: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    return str(request.param)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("source", ["file", "folder"])
@pytest.mark.parametrize("target", ["nothing", "file", "empty folder", "folder", "dangling link"])
def test_a_rename_takes_nobodys_place(way: str, source: str, target: str, tmp_path: Path) -> None:
    new, there = tmp_path / "new", tmp_path / "there"
    if source == "file":
        new.write_text("new")
    else:
        new.mkdir()
        (new / "x").write_text("new")
    if target == "file":
        there.write_text("mine")
    elif target == "dangling link":
        there.symlink_to("nowhere")
    elif target != "nothing":
        there.mkdir()
        if target == "folder":
            (there / "thesis.txt").write_text("mine")
    if target == "nothing" or (
        # a plain rename puts a folder in the place of an empty one, in which nothing is lost
        target == "empty folder" and source == "folder" and way != "flags"
    ):
        rename.rename_new(new, there)
        assert names(tmp_path) == {"there"}
        return
    with pytest.raises(rename.Taken):
        rename.rename_new(new, there)
    assert names(tmp_path) == {"new", "there"}
    if target == "file":
        assert there.read_text() == "mine"
    if target == "folder":
        assert (there / "thesis.txt").read_text() == "mine"
    assert there.is_symlink() == (target == "dangling link")


def thesis(path: Path) -> list[str]:
    """All is glora's own but a thesis."""
    return [p.name for p in path.iterdir() if p.name == "thesis.txt"] if path.is_dir() else []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_may_go_is_replaced_and_what_may_not_comes_back(
    way: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, make = tmp_path / "out", outputs.new_file if kind == "file" else outputs.new_folder
    for text in ("one", "two"):
        with make(target, lambda path: []) as path:
            (path if kind == "file" else path / "x").write_text(text)
        assert names(tmp_path) == {"out"}
        assert (target if kind == "file" else target / "x").read_text() == text
    looks = iter([[], [], ["thesis.txt"]])  # before the block, before the exchange, after it
    with (
        pytest.raises(GloraError, match="did not write"),
        make(target, lambda path: next(looks, [])) as path,
    ):
        (path if kind == "file" else path / "x").write_text("three")
    assert (target if kind == "file" else target / "x").read_text() == "two"
    assert names(tmp_path) == {"out"}


def test_what_comes_during_the_block_is_replaced_on_request_only(way: str, tmp_path: Path) -> None:
    """Even where it is glora's own: whoever did not ask for it replaces nothing."""
    target = tmp_path / "out"
    for overwrite, kept in ((False, "theirs"), (True, "mine")):
        refused = nullcontext() if overwrite else pytest.raises(GloraError, match="meanwhile")
        with refused, outputs.new_folder(target, lambda path: [], overwrite=overwrite) as path:
            (path / "x").write_text("mine")
            target.mkdir(exist_ok=True)
            (target / "x").write_text("theirs")
        assert names(tmp_path) == {"out"}
        assert (target / "x").read_text() == kept


def test_what_cannot_come_back_is_kept_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails in the wrong moment: the old one stays hidden rather than be lost."""
    (tmp_path / "out").mkdir()
    plain, calls = outputs.exchange, iter(range(9))

    def failing(a: Path, b: Path) -> bool:
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        (b / "thesis.txt").write_text("mine")
        return plain(a, b)

    monkeypatch.setattr(outputs, "exchange", failing)
    with (
        pytest.warns(GloraWarning, match=r"thesis.txt; it is kept"),
        pytest.raises(OSError, match="Input/output"),
        outputs.new_folder(tmp_path / "out", thesis),
    ):
        pass
    (kept,) = tmp_path.glob(".out.*.new/out/thesis.txt")
    with pytest.warns(GloraWarning, match="it is kept"):
        hidden.sweep(tmp_path, thesis)
    assert kept.read_text() == "mine"


def test_one_process_writes_at_a_time_and_lets_go(tmp_path: Path) -> None:
    target, inside, done = tmp_path / "new" / "deep" / "out", threading.Event(), threading.Event()

    def hold() -> None:
        with outputs.claimed(target, thesis):
            inside.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    with (
        pytest.raises(GloraError, match=rf"another process \({os.getpid()} on .*\) is at work"),
        outputs.claimed(target, thesis),
    ):
        pass
    done.set()
    holder.join()
    with pytest.raises(KeyError), outputs.claimed(tmp_path / "x" / "y" / "out", thesis):
        raise KeyError
    assert not list((tmp_path / "new" / "deep").iterdir())
    assert names(tmp_path) == {"new"}


def test_a_place_inside_a_hidden_folder_is_told_where_it_will_stand(tmp_path: Path) -> None:
    with outputs.new_folder(tmp_path / "out", thesis) as path:
        assert path != tmp_path / "out"
        assert hidden.destination(path / "r2" / "x") == tmp_path / "out" / "r2" / "x"
    assert hidden.destination(tmp_path / "a") == tmp_path / "a"


def test_steady_streams_replace_what_the_terminal_lacks_and_remember_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "said").open("wb") as file:
        ascii_only = io.TextIOWrapper(os.fdopen(os.dup(file.fileno()), "wb"), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", ascii_only)
        steady()
        print("σ → 1")
        assert output_trouble() is None
    assert (tmp_path / "said").read_text() == "? ? 1\n"
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            steady()
            print("x" * 100_000)
            trouble = output_trouble()
            assert trouble is not None
            assert trouble.errno == errno.ENOSPC
            print("more", flush=True)
