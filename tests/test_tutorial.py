"""examples/tutorial.py: it runs, what it tells comes true, and its cells are short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from glora_ops.cli import app

TUTORIAL = Path(__file__).parents[1] / "examples" / "tutorial.py"


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")  # the tutorial speaks of them
def test_the_tutorial_runs_and_what_it_tells_comes_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(TUTORIAL.parent))
    monkeypatch.setattr(sys, "argv", [str(TUTORIAL), "--out", str(tmp_path)])
    told = runpy.run_path(str(TUTORIAL))

    assert told["factor_change"] > 0.1 > 1e-5 > told["update_change"]
    assert told["averaged_moved"] > 0.1 > 1e-5 > told["merged_moved"]
    captured = told["captured"]
    for rank in (2, 6):
        assert captured["update", rank] > captured["consensus", rank] > captured["projector", rank]
    assert all(captured[basis, 12] > 1 - 1e-6 for basis in ("consensus", "update", "projector"))
    assert told["same_bits"]
    assert told["all_three"].clients == ("ann", "bob", "cyd")
    assert told["apart"] < 1e-4
    assert told["reads"](tmp_path / "merged/r6") > told["accuracy"](told["base"], told["held_out"])
    for picture in ("alignment.png", "state.png"):
        assert (tmp_path / picture).stat().st_size > 1000

    (tmp_path / "merged").rename(tmp_path / "by-python")
    (tmp_path / "model").rename(tmp_path / "model-by-python")
    (tmp_path / "state.png").unlink()
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"(?m)^# glora (.*)", TUTORIAL.read_text(encoding="utf-8")):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, result.output
    by_python, by_command = (
        load_file(tmp_path / folder / "model.safetensors")
        for folder in ("model-by-python", "model")
    )
    torch.testing.assert_close(by_command, by_python)


def test_links_of_the_tutorial_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)", TUTORIAL.read_text(encoding="utf-8"))
    assert links
    assert all((TUTORIAL.parent / link).is_file() for link in links)


def test_the_cells_of_the_tutorial_are_short_and_each_is_introduced() -> None:
    first, *cells = re.split(r"(?m)^# %%", TUTORIAL.read_text(encoding="utf-8"))
    texts = [cell for cell in cells if cell.startswith(" [markdown]\n")]
    assert not first
    assert len(cells) - len(texts) <= len(texts) + 1
    assert max(len(cell.strip().splitlines()) for cell in cells) <= 25
