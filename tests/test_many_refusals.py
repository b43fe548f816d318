"""Thousands of problems at once: the first few of a kind are listed, the others counted."""

from __future__ import annotations

import json
import struct
from collections.abc import ItemsView, Iterator, ValuesView
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glora_ops.adapters import check_values, inspect_adapter, read_adapter
from glora_ops.adapters.safetensors_header import TensorInfo
from glora_ops.adapters.stored import Stored
from glora_ops.cli import app
from glora_ops.errors import Refusal, Refusals, Refused

MANY = 20_000


def entry(place: int, *shape: int, start: int | None = None) -> dict[str, Any]:
    at = 16 * place if start is None else start
    return {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 16]}


def pairs(count: int, rank: int = 2) -> dict[str, Any]:
    """Rank-2 pairs of 2 × 2 modules."""
    return {
        f"base_model.model.l{i // 2}.lora_{'AB'[i % 2]}.weight": entry(i, rank, 2)
        for i in range(2 * count)
    }


def write(folder: Path, header: dict[str, Any], data: bytes = b"", **config: Any) -> Path:
    folder.mkdir()
    text = json.dumps(header).encode()
    size = max((e.get("data_offsets", [0, 0])[1] for e in header.values()), default=0)
    data = data or b"\0" * size
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    return folder


MANY_OF_A_KIND: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "malformed": ({f"t{i}": {"dtype": "X"} for i in range(MANY)}, {}, MANY),
    "names": ({f"t\n{i}": entry(i, 2, 2) for i in range(MANY)}, {}, MANY),
    "overlapping": ({f"t{i}": entry(i, 2, 2, start=0) for i in range(MANY)}, {}, MANY - 1),
    "halves": ({k: entry(i, 2, 2) for i, k in enumerate(k for k in pairs(MANY) if "_A" in k)},
               {}, MANY),
    "ranks": (pairs(MANY // 2), {"r": 1}, MANY // 2),
    "keys": (pairs(1), {f"key{i}": "v" * 50 for i in range(MANY)}, MANY),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANY_OF_A_KIND)
def test_the_first_few_of_a_kind_and_how_many_more(kind: str, tmp_path: Path) -> None:
    header, config, count = MANY_OF_A_KIND[kind]
    folder = write(tmp_path / "bad", header, **config)
    adapter, refusals = inspect_adapter(folder)
    assert adapter is None
    assert len(refusals) == Refusals.SHOWN
    assert sum(1 + refusal.more for refusal in refusals) == count
    more = f"and {count - Refusals.SHOWN:,} more".replace(",", " ")
    assert str(refusals[-1]).endswith(more)

    arguments = ["aggregate", str(folder), "-o", str(tmp_path / "out")]
    text = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert more in text.output
    assert len(text.output) < 5000
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["refused"]
    assert [r["more"] for r in listed if r["client"] == "bad"] == [0, 0, 0, 0, count - 5]
    assert text.exit_code == 1


def test_values_of_many_tensors_are_refused_at_the_cost_of_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their places are looked up once, and no more of them is read again than is told."""
    walks, reads = 0, 0

    class Counted(dict[str, TensorInfo]):
        def values(self) -> ValuesView[TensorInfo]:
            nonlocal walks
            walks += 1
            return super().values()

        def items(self) -> ItemsView[str, TensorInfo]:
            nonlocal walks
            walks += 1
            return super().items()

    read = Stored.read

    def counted(self: Stored, *names: str) -> Any:
        nonlocal reads
        reads += len(names)
        return read(self, *names)

    nan = struct.pack("<4f", float("nan"), 1, 1, 1)
    adapter = read_adapter(write(tmp_path / "nan", pairs(500), 1000 * nan))
    object.__setattr__(adapter.stored, "tensors", Counted(adapter.stored.tensors))
    monkeypatch.setattr(Stored, "read", counted)
    refusals = check_values(adapter)
    assert sum(1 + refusal.more for refusal in refusals) == 1000
    assert walks <= 3
    assert reads == Refusals.SHOWN


def test_thousands_of_bad_clients_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    good = write(tmp_path / "good", pairs(1), struct.pack("<8f", *range(1, 9)))
    missing = [str(tmp_path / f"no{i}") for i in range(5000)]
    out = ["-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, ["aggregate", str(good), *missing, *out, "--json"])
    listed = json.loads(refused.stdout)["refused"]
    assert len(listed) == Refusals.LISTED + 1
    assert sum(1 + r["more"] for r in listed) == 5000
    skip = ["aggregate", str(good), *missing, *out, "--on-bad-client", "skip"]
    went_on = CliRunner().invoke(app, skip, env={"COLUMNS": "200", "TERM": "dumb"})
    assert went_on.exit_code == 3
    assert went_on.output.count("skipped: ") == Refusals.LISTED
    assert "and 4900 more" in went_on.output


def test_counts_add_up_when_lists_are_joined() -> None:
    def of(client: str, count: int) -> Iterator[Refusal]:
        return (Refusal("odd", client, found=str(i)) for i in range(count))

    joined = Refusals([*Refusals(of("a", 30)), *Refusals(of("b", 7)), Refusal("even", "a")])
    assert [r.more for r in joined] == [0, 0, 0, 0, 25, 0, 0, 0, 0, 2, 0]
    assert sum(1 + r.more for r in Refused([*joined, *joined]).refusals) == 2 * 38
    assert len(Refusals(r for i in range(300) for r in of(str(i), 3))) == Refusals.LISTED + 1


def test_no_field_of_a_refusal_is_longer_than_can_be_read() -> None:
    refusal = Refusal("odd", found="x" * 10**6, remedy="y" * 10**6)
    assert len(str(refusal)) < 1200
