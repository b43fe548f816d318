"""The command answers without torch, and ends cleanly while it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import glora_ops

START = "import sys, glora_command; sys.argv[1:] = {arguments}\n"
WATCHED = START + (
    "import atexit, json\n"
    "heavy = ('torch', 'numpy', 'pydantic', 'safetensors', 'matplotlib')\n"
    "atexit.register(lambda: print(json.dumps([m for m in heavy if m in sys.modules])))\n"
    "glora_command.main()\n"
)


def started(code: str, arguments: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code.format(arguments=arguments)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--version"], 0, f"glora {glora_ops.__version__}"),
        (["--help"], 0, "Usage: glora"),
        (["aggregate", "--help"], 0, "--readout"),
        (["fl", "run", "--help"], 0, "--seeds"),
        ([], 2, "Usage: glora"),
        (["aggregatte"], 2, "Did you mean 'aggregate'?"),
        (["aggregate", "ann"], 2, "--out"),
        (["readout", "out", "-r", "0", "-o", "x"], 2, "0"),
    ],
)
def test_help_version_and_usage_errors_load_no_torch(
    arguments: list[str], code: int, says: str
) -> None:
    done = started(WATCHED, arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert (done.stdout + done.stderr).count("Did you mean") <= 1


def test_completion_loads_no_torch_either() -> None:
    env = {"_GLORA_COMPLETE": "complete_bash", "COMP_WORDS": "glora re", "COMP_CWORD": "1"}
    done = started(WATCHED, [], **env)
    *words, loaded = done.stdout.splitlines()
    assert words == ["readout"]
    assert json.loads(loaded) == []


def test_work_runs_the_whole_package(tmp_path: Path) -> None:
    code = WATCHED.replace("heavy = (", "heavy = ('glora_ops.api', 'glora_ops.bindings', ")
    done = started(code, ["inspect", str(tmp_path)])
    assert done.returncode == 1
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert {"glora_ops.api", "glora_ops.bindings", "torch"} <= set(loaded)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_importing_ends_at_once_whatever_the_import_makes_of_it(
    tmp_path: Path, name: str, code: int
) -> None:
    """Here torch's import is interrupted, and drops the exception."""
    (tmp_path / "torch.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{name})\n"
        "except BaseException:\n    pass\nraise ImportError('a broken torch')\n"
    )
    done = started(START + "glora_command.main()\n", ["inspect", "x"], PYTHONPATH=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert done.stderr == {130: "interrupted\n", 143: "terminated\n"}[code]


def test_python_m_is_the_command() -> None:
    command = [sys.executable, "-m", "glora_ops", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"glora {glora_ops.__version__}\n"
