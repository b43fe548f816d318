"""The pictures of `glora inspect` and `glora compare`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from commands import CLIENTS, everything, glora, glora_json


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_pictures(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--plot")
    assert facts["plot"] == "out/spectra.png"
    assert is_png(work / "out/spectra.png")
    glora("aggregate", *CLIENTS, "-o", "out", "--plot", "--basis", "update", "--overwrite")
    for arguments in (["inspect", "out"], ["inspect", "ann"], ["compare", *CLIENTS]):
        said = glora(*arguments, "--plot", "picture.png").stdout
        assert "written: picture.png" in said
        assert is_png(work / "picture.png")
        (work / "picture.png").unlink()


def test_many_modules_and_many_clients_fit_a_picture(work: Path) -> None:
    from glora_ops.analysis.plots import plot_adapter, plot_alignment

    plot_adapter("many", {f"layer {i}": torch.rand(4) for i in range(30)}, "many.png")
    cosines = torch.rand(40, 40)
    cosines[0, 1] = float("nan")
    names = [f"client {i}" for i in range(40)]
    plot_alignment(names, cosines, cosines, 1 - 2 * cosines, "clients.pdf")
    assert is_png(work / "many.png")
    assert (work / "clients.pdf").exists()


HOSTILE = ["$\\frac{$", "$$", r"\$x$", "_hidden", "\udcff\x07", "{\\bf", "é" * 300, "^_{}"]


def test_names_are_drawn_as_they_stand_whatever_they_spell(work: Path) -> None:
    """Mathematics, control characters, halves of characters, legends' private names, long ones."""
    from glora_ops.analysis.plots import plain, plot_adapter, plot_alignment
    from glora_ops.fl.pictures import draw_partition

    cosines = torch.rand(len(HOSTILE), len(HOSTILE))
    for name in HOSTILE:
        plot_adapter(name, {name: torch.rand(4), name + "x": torch.rand(3)}, "one.svg")
        plot_adapter(name, {f"{name}{i}": torch.rand(4) for i in range(20)}, "many.png")
    plot_alignment(HOSTILE, cosines, cosines, cosines, "clients.png")
    draw_partition(torch.ones(3, len(HOSTILE)).int().numpy(), HOSTILE, "$\\frac{$", Path("p.png"))
    assert is_png(work / "clients.png")
    assert is_png(work / "p.png")
    assert all(len(plain(name)) <= 81 for name in HOSTILE)


def test_clients_whose_names_are_mathematics(work: Path) -> None:
    odd = "$\\frac{$"
    (work / "ann").rename(work / odd)
    glora("compare", odd, "bob", "--plot", "picture.png")
    glora("inspect", odd, "--plot", "picture.png")
    glora("aggregate", odd, "bob", "-o", "out", "--plot")
    assert is_png(work / "out/spectra.png")


def test_a_picture_needs_matplotlib(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(work)
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (
        ["aggregate", *CLIENTS, "-o", "out", "--plot"],
        ["inspect", "ann", "--plot", "p.png"],
        ["compare", *CLIENTS, "--plot", "p.png"],
    ):
        assert "pip install 'glora[plot]'" in glora(*arguments, code=1).stderr
    assert everything(work) == before


def test_pictures_have_a_known_format(work: Path) -> None:
    assert ".png" in glora("inspect", "ann", "--plot", "p.bmp", code=1).stderr
