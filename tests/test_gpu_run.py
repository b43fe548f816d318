"""bench/gpu_run.py without a device: rehearsed whole, killed half-way, with steps that go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from gpu.lines import NAME, Lines, attempts, read  # noqa: E402
from gpu.parent import Step, run  # noqa: E402
from gpu.run_report import section  # noqa: E402

SCRIPT = [sys.executable, str(BENCH / "gpu_run.py")]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton on this platform")


def step(name: str, code: str, seconds: float = 600) -> Step:
    return Step(name, seconds, "", command=(sys.executable, "-c", code))


def ends(out: Path) -> dict[str, Any]:
    """How each step ended: its outcome, or `skipped`."""
    last = {name: lines[-1] for name, lines in attempts(read(out / NAME)).items()}
    return {name: line.get("outcome", line["kind"]) for name, line in last.items()}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run, without a device."""
    out = tmp_path_factory.mktemp("rehearsed")
    done = subprocess.run([*SCRIPT, out, "--rehearse"], capture_output=True, check=False)
    assert done.returncode == 0, (out / "log.txt").read_text()
    return out


@needs_triton
def test_the_whole_run_is_rehearsed_without_a_device(rehearsed: Path) -> None:
    lines, found = read(rehearsed / NAME), ends(rehearsed)
    assert found.pop("run") == "start"
    assert set(found.values()) == {"done"}
    assert list(found) == lines[0]["steps"]
    (kernels,) = [x for x in lines if x.get("what") == "kernels"]
    assert kernels["untried"] == []
    assert len(list(rehearsed.iterdir())) <= 6


@needs_triton
def test_a_kill_leaves_whole_lines_and_no_process(tmp_path: Path) -> None:
    parent = subprocess.Popen([*SCRIPT, tmp_path, "--rehearse", "--only", "smoke"])
    try:
        while not any(x["kind"] == "row" for x in read(tmp_path / NAME)):
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    (child,) = [x["process"] for x in read(tmp_path / NAME) if x["kind"] == "process"]
    while running(child):
        time.sleep(0.05)
    before = read(tmp_path / NAME)
    assert any(x["kind"] == "row" and x["step"] == "smoke" for x in before)
    assert "end" not in {x["kind"] for x in before}


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_step_that_hangs_or_dies_is_named_and_stops_nothing(tmp_path: Path) -> None:
    steps = [
        step("hangs", "import time; time.sleep(1e6)", seconds=0.5),
        step("crashes", "raise ValueError"),
        step("dies", "import os; os.abort()"),
        step("works", "print('seen')"),
    ]
    assert run(steps, tmp_path, 600) == ["hangs", "crashes", "dies"]
    assert ends(tmp_path) == {
        "hangs": "cut", "crashes": "failed", "dies": "failed", "works": "done"
    }  # fmt: skip
    assert "seen" in (tmp_path / "log.txt").read_text()


def test_a_cut_step_takes_its_children_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e6)']);"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(1e6)"
    )
    seconds = 0.5
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        seconds *= 2
        run([step("hangs", code, seconds)], tmp_path, 1e6)
    child = int((tmp_path / "child").read_text())
    while running(child):
        time.sleep(0.05)


def test_what_no_time_is_left_for_is_skipped_by_name(tmp_path: Path) -> None:
    steps = [step("first", "", 1000), step("second", "", 10)]
    assert run(steps, tmp_path, 300) == ["first"]
    assert ends(tmp_path) == {"first": "skipped", "second": "done"}


def test_a_repeated_step_replaces_what_it_found(tmp_path: Path) -> None:
    for code in ("raise ValueError", ""):
        run([step("again", code)], tmp_path, 600)
    assert ends(tmp_path) == {"again": "done"}
    assert len(read(tmp_path / NAME)) == 4


def test_an_unknown_step_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SCRIPT, tmp_path, "--only", "headlines"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "headline" in done.stderr


def test_one_line_is_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, x: calls.append(x) or write(file, x))
    Lines(tmp_path / NAME, step="s").add("row", value=1.5, name="Γ")
    assert [json.loads(x)["name"] for x in calls] == ["Γ"]
    assert read(tmp_path / NAME)[0]["value"] == 1.5


def told(folder: Path, rehearsal: bool, ms: float) -> None:
    folder.mkdir(exist_ok=True)
    Lines(folder / NAME, step="run").add("start", rehearsal=rehearsal)
    lines = Lines(folder / NAME, step="headline")
    lines.add("start", limit_s=120)
    row = {
        "case": "4096², K = 100", "way": "core", "dtype": "torch.bfloat16", "event_ms_cold": ms,
        "event_ms_warm": ms, "peak_bytes": 1e9, "share_of_copy": 0.61,
    }  # fmt: skip
    (folder / "rows.json").write_text(json.dumps({"benchmarks": [{"extra_info": row}]}))
    lines.add(
        "row", case="7B, K = 10", way="glora, replayed", dtype="bfloat16", q=1, rank=64, ms=ms,
        ms_quartiles=[ms, ms], rounds=5, captured=0.5, optimum=0.5,
    )  # fmt: skip


def test_figures_come_from_stored_runs_and_never_from_rehearsals(tmp_path: Path) -> None:
    told(tmp_path / "rehearsed", True, 77.7)
    assert section(tmp_path).startswith("## GPU: not measured yet")
    told(tmp_path / "real", False, 11.1)
    told(tmp_path / "real", False, 22.2)  # repeated by --only, and then cut off
    shown = section(tmp_path)
    assert "77.7" not in shown
    assert "11.1" not in shown
    assert "22.2 (22.2–22.2), 5 rounds" in shown
    assert "| headline | cut off |" in shown
    assert "| 4096², K = 100, bfloat16 | core | 22.2 | 22.2 | 1 | 61 % |" in shown


@needs_triton
def test_a_whole_rehearsal_can_be_rendered(tmp_path: Path, rehearsed: Path) -> None:
    lines = (rehearsed / NAME).read_text().replace('"rehearsal": true', '"rehearsal": false')
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / NAME).write_text(lines)
    shown = section(tmp_path)
    for part in ("copies", "glora, replayed", "sums of 64", "Tests: 2 passed", "Γ z"):
        assert part in shown
