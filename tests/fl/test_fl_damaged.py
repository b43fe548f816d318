"""A run's folder, damaged in every way: report and resume refuse it by the file's name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fl_runs import config, run_small
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glora_ops.cli import app
from glora_ops.errors import GloraError
from glora_ops.fl.run import Plan, run

TRAINING = {"rounds": 1, "steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    run_small(home / "small/it/seed0", {"kind": "glora"}, training=TRAINING)
    (home / "small/sweep").mkdir()
    outcome = {"metric": "accuracy", "scores": {"0.1": 0.5}, "chosen": 0.1, "seed": 1}
    (home / "small/sweep/it.json").write_text(json.dumps(outcome))
    return home


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Edit the JSON of a file, or of the last line of one."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    value = json.loads(lines[-1])
    edit(value)
    path.write_text("\n".join([*lines[:-1], json.dumps(value)]) + "\n")


def become(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DEEP = b"[" * 3000 + b"]" * 3000
DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: write(path, path.read_bytes()[:40]),
    "empty": lambda path: write(path, b""),
    "not UTF-8": lambda path: write(path, b"\xff\xfe" + path.read_bytes()),
    "deep": lambda path: write(path, DEEP),
    "deep inside": lambda path: write(path, b'{"round": ' + DEEP + b"}\n" + path.read_bytes()),
    "another type": lambda path: write(path, b"[1, 2]\n"),
    "a key twice": lambda path: write(
        path, b'{"seed": 1, "round": 0, ' + path.read_bytes().lstrip()[1:]
    ),
    "a pipe": lambda path: become(path, os.mkfifo),
    "a folder": lambda path: become(path, Path.mkdir),
    "a loop": lambda path: become(path, lambda p: p.symlink_to(p)),
}
FIELDS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a name that leads elsewhere": ("run.json", lambda x: x["config"].update(name="../../x")),
    "a method that is not there": ("run.json", lambda x: x.update(method="else")),
    "no configuration": ("run.json", lambda x: x.pop("config")),
    "a rate of text": ("run.json", lambda x: x.update(lr="fast")),
    "a huge seed": ("run.json", lambda x: x.update(seed=10**30)),
    "a metric of text": ("metrics.jsonl", lambda x: x["metrics"].update(accuracy="good")),
    "a metric less": ("metrics.jsonl", lambda x: x["metrics"].pop("accuracy")),
    "bytes below zero": ("metrics.jsonl", lambda x: x.update(bytes_up=-1)),
    "true for a number": ("metrics.jsonl", lambda x: x.update(bytes_up=True)),
    "a round twice": ("metrics.jsonl", lambda x: x.update(round=0)),
    "no metrics at the end": ("metrics.jsonl", lambda x: x.pop("metrics")),
    "a matrix that is none": ("metrics.jsonl", lambda x: x["alignment"].update(rows=[[1.0], []])),
    "cosines that are no matrix": ("metrics.jsonl", lambda x: x["alignment"].update(cosines=[[]])),
    "a verdict that is none": ("metrics.jsonl", lambda x: x.update(robust={"left_out": 3})),
    "a rank of nobody": ("metrics.jsonl", lambda x: x.update(sent_ranks=[99])),
    "null for an update": ("metrics.jsonl", lambda x: x.update(update=None)),
    "a rate that is a list": ("../../sweep/it.json", lambda x: x.update(chosen=[1])),
    "scores of text": ("../../sweep/it.json", lambda x: x.update(scores={"0.1": "x"})),
}


def refused(home: Path, name: str) -> None:
    report = ["fl", "report", str(home), "-o", str(home / "out")]
    result = CliRunner().invoke(app, report, env={"COLUMNS": "200", "TERM": "dumb"})
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    assert name in result.output
    assert not (home / "out").exists()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "sweep/it.json"])
def test_report_names_the_file_that_is_damaged(
    damage: str, name: str, finished: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(finished, tmp_path / "runs")
    path = home / "small" / name if "/" in name else home / "small/it/seed0" / name
    DAMAGE[damage](path)
    refused(home, path.name)


@pytest.mark.parametrize("field", FIELDS)
def test_report_names_the_file_whose_fields_do_not_fit(
    field: str, finished: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(finished, tmp_path / "runs")
    name, edit = FIELDS[field]
    path = (home / "small/it/seed0" / name).resolve()
    change(path, edit)
    refused(home, path.name)


def test_a_diverged_run_is_reported_with_what_is_not_a_number(
    finished: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(finished, tmp_path / "runs")
    shutil.copytree(home / "small/it/seed0", home / "small/it/seed1")
    change(home / "small/it/seed1/run.json", lambda x: x.update(seed=1))
    change(
        home / "small/it/seed1/metrics.jsonl",
        lambda x: x["metrics"].update(accuracy=float("nan"), loss=float("inf")),
    )
    change(
        home / "small/it/seed1/metrics.jsonl",
        lambda x: x["update"].update(effective_rank=1e308, captured=-1e308),
    )
    report = ["fl", "report", str(home), "-o", str(home / "out"), "--json"]
    result = CliRunner().invoke(app, report)
    assert result.exit_code == 0, result.exception
    (summary,) = json.loads((home / "out/report.json").read_text())
    assert summary["methods"]["it"]["score"] == {"mean": None, "spread": None}


def resumed(folder: Path) -> list[dict[str, Any]]:
    made = config({"it": {"kind": "glora"}}, training=TRAINING)
    return run(Plan(made, "it", 0, made.training.lr), folder, resume=True)


def unfinished(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished / "small/it/seed0", folder)
    (folder / "done").unlink()
    return folder


def halved(path: Path) -> None:
    tensors = load_file(path)
    tensors["server/svd/x/u"] = next(iter(tensors.values())).clone()
    save_file(tensors, path, {"glora_fl": "{}"})


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


CHECKPOINTS = {
    name: DAMAGE[name] for name in ("truncated", "empty", "a pipe", "a folder", "a loop")
}
CHECKPOINTS |= {"other tensors": halved, "one bit": flipped, "missing": Path.unlink}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_resume_refuses_a_damaged_checkpoint(damage: str, finished: Path, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    CHECKPOINTS[damage](folder / "checkpoint.safetensors")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises((GloraError, OSError), match=r"checkpoint|symbolic"):
        resumed(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_names_the_file_that_is_damaged(
    damage: str, name: str, finished: Path, tmp_path: Path
) -> None:
    folder = unfinished(finished, tmp_path)
    DAMAGE[damage](folder / name)
    with pytest.raises(GloraError, match=r"run\.json|metrics"):
        resumed(folder)


def test_a_run_that_lost_its_beginning_is_not_left_out_silently(
    finished: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(finished, tmp_path / "runs")
    shutil.copytree(home / "small/it/seed0", home / "small/it/seed1")
    (home / "small/it/seed1/run.json").unlink()
    refused(home, "seed1/run.json")


def test_what_a_run_left_without_its_beginning_is_no_new_run(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "small/it/seed0", tmp_path / "run")
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(GloraError, match=r"metrics\.jsonl, predictions\.jsonl but no"):
        resumed(tmp_path / "run")
