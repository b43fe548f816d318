"""A short slice of ``make crash``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_at_arbitrary_moments_old_or_new_is_whole_and_nothing_stays_behind() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "18"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 kills: old or new whole each time" in done.stdout
