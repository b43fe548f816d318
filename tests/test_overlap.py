"""Headers that wait are read at the same time, and nothing but the time depends on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_clients import save_client

from glora_ops.adapters import safetensors_header
from glora_ops.errors import Refused
from glora_ops.merging.aggregate import inspect
from glora_ops.runtime.overlap import READERS, TRIED, overlapped

COUNT = 80


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Files that open after five milliseconds; how many were being opened at each opening."""
    opening: set[int] = set()
    seen: list[int] = []
    opened = safetensors_header.open_regular

    def late(path: Any) -> Any:
        opening.add(threading.get_ident())
        seen.append(len(opening))
        time.sleep(0.005)
        opening.discard(threading.get_ident())
        return opened(path)

    monkeypatch.setattr(safetensors_header, "open_regular", late)
    return seen


def test_headers_that_wait_are_read_together_and_are_the_same(
    tmp_path: Path, slow: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2 + i % 2, layers=1) for i in range(COUNT)]
    found = inspect(folders, None).clients
    assert 1 < max(slow) <= READERS
    assert max(slow[:TRIED]) == 1
    monkeypatch.undo()
    assert found == {i: inspect([folder], None).clients[0] for i, folder in enumerate(folders)}


def test_the_same_clients_are_refused_in_their_order(tmp_path: Path, slow: list[int]) -> None:
    folders = [save_client(tmp_path / f"c{i}", i, 2, layers=1) for i in range(COUNT)]
    for i in (70, 20, 45):
        (folders[i] / "adapter_config.json").unlink()
    with pytest.raises(Refused) as refused:
        inspect(folders, None)
    assert [reason.client for reason in refused.value.refusals] == ["c20", "c45", "c70"]
    assert max(slow) > 1


def test_what_is_raised_first_in_order_is_raised_and_the_rest_is_not_begun() -> None:
    begun = []

    def read(item: int) -> int:
        begun.append(item)
        time.sleep(0.005 + 0.02 * (item == TRIED + 1))
        if item in (TRIED + 1, TRIED + 2):
            raise KeyboardInterrupt(item)
        return item

    with pytest.raises(KeyboardInterrupt, match=str(TRIED + 1)):
        list(overlapped(read, range(10_000)))
    assert len(begun) < 1_000
