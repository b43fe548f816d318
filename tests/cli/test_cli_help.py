"""`--help` teaches, and the installed command starts fast."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CLIENTS, edit_config, glora
from peft_models import gpt2


@pytest.mark.parametrize(
    "command",
    [[], ["aggregate"], ["readout"], ["inspect"], ["compare"], ["update"], ["apply"],
     ["fl", "run"], ["fl", "report"], ["fl", "partition"], ["fl", "configs"],
     ["job"], ["job", "plan"], ["job", "work"], ["job", "status"], ["job", "join"]],
)  # fmt: skip
def test_help_starts_with_a_sentence_and_ends_with_an_example(command: list[str]) -> None:
    said = glora(*command, "--help").stdout
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", said) if p.strip()]
    assert paragraphs[0].startswith("Usage: glora")
    assert paragraphs[1].endswith(".")
    assert paragraphs[-1].startswith(f"Example: glora {' '.join(command)}".strip())


def test_help_explains_the_three_steps() -> None:
    said = glora("--help").stdout
    assert all(step in said for step in ("Look.", "Aggregate.", "Read out.", "Exit codes"))
    assert "Usage: glora" in glora(code=2).output


def test_examples_of_the_help_parse(work: Path) -> None:
    """Every example of a help text is a command line that works."""
    (work / "clients").mkdir()
    for name in CLIENTS:
        (work / name).rename(work / "clients" / name)
    gpt2().save_pretrained(work / "models/base")
    for command in ("aggregate", "readout", "inspect", "compare", "apply", "update"):
        said = glora(command, "--help").stdout
        _, _, example = said.rpartition("Example: glora ")
        glora(*example.split())
    assert sorted(p.name for p in work.iterdir()) == [
        "adapters", "alignment.png", "clients", "models", "out", "spectra.png",
    ]  # fmt: skip


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, glora_ops.cli; "
        "print([m for m in ('peft', 'transformers', 'matplotlib', 'scipy', 'glora_ops.merging', "
        "'glora_ops.analysis.plots') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_installed_command(work: Path) -> None:
    command = shutil.which("glora", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("glora is not installed beside this interpreter")
    edit_config(work / "bob", use_dora=True)
    arguments = [*CLIENTS, "-o", "out", "--on-bad-client", "skip", "--readout", "4", "--json"]
    done = subprocess.run(
        [command, "aggregate", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["rank"] == 8
    assert done.stderr == ""
