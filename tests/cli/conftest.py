"""Three saved clients, and a working directory that holds them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import ATTENTION, CLIENTS
from peft_models import gpt2, save_client


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    for seed, (name, config) in enumerate(CLIENTS.items(), start=1):
        save_client(root / name, gpt2, seed=seed, target_modules=ATTENTION, **config)
    return root


@pytest.fixture
def work(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the clients."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
