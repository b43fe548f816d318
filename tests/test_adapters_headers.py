"""Headers of safetensors files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import FIRST_A, TENSORS, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glora_ops.adapters import check_values, inspect_adapter, read_adapter


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / TENSORS).read_bytes()
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def write_header(folder: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_header_rewritten_unchanged_is_accepted(client: Path) -> None:
    write_header(client, *header_of(client))
    assert check_values(read_adapter(client)) == []


@pytest.mark.parametrize(
    ("field", "value", "needles"),
    [
        ("dtype", "F128", ["dtype", "'F128'", "F64, F32"]),
        ("dtype", ["F32"], ["dtype", "['F32']"]),
        ("dtype", "F64", ["192 bytes", "384 bytes for F64 [4, 12]"]),
        ("shape", [4, 13], ["192 bytes", "208 bytes"]),
        ("shape", [4, -12], ["shape", "[4, -12]"]),
        ("shape", [2**62, 2**62], ["192 bytes", f"{2**126}"]),
        ("shape", [4, 12.0], ["shape", "[4, 12.0]"]),
        ("shape", [True, 48], ["shape", "[True, 48]"]),
        ("shape", "4x12", ["shape", "'4x12'"]),
        ("shape", [48] + [1] * 8, ["shape is malformed"]),
        ("data_offsets", [192, 0], ["[192, 0]", "begin ≤ end"]),
        ("data_offsets", [0], ["[0]"]),
        ("data_offsets", [-192, 0], ["[-192, 0]"]),
        ("data_offsets", [2**40, 2**40 + 192], ["hole", f"{2**40}"]),
        ("data_offsets", None, ["None"]),
        ("extra", 1, ["entry", "dtype, shape and data_offsets"]),
    ],
)
def test_header_entries_that_lie(client: Path, field: str, value: Any, needles: list[str]) -> None:
    header, data = header_of(client)
    header[FIRST_A][field] = value
    write_header(client, header, data)
    refused(client, TENSORS, FIRST_A, *needles)


def test_overlaps_and_holes(client: Path) -> None:
    header, data = header_of(client)
    names = sorted(
        (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    for shift, word in ((-4, "overlaps"), (4, "hole")):
        lying = json.loads(json.dumps(header))
        lying[names[2]]["data_offsets"] = [
            offset + shift for offset in lying[names[2]]["data_offsets"]
        ]
        write_header(client, lying, data)
        refused(client, TENSORS, names[2], word, "start at")


@pytest.mark.parametrize("cut", [-1, 1])
def test_files_too_short_or_too_long(client: Path, cut: int) -> None:
    header, data = header_of(client)
    write_header(client, header, data[:cut] if cut < 0 else data + b"\0")
    size = (client / TENSORS).stat().st_size
    refused(client, TENSORS, "length", f"{size} bytes", f"{size - cut} bytes")


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"", "does not fit"),
        (b"\0\0", "does not fit"),
        (b"\xff" * 8 + b"{}", str(2**64 - 1)),
        ((9).to_bytes(8, "little") + b"{}", "9 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "a JSON list"),
        ((0).to_bytes(8, "little"), "not valid JSON"),
        ((1).to_bytes(8, "little") + b"{", "not valid JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "utf-8"),
        ((40_000).to_bytes(8, "little") + b'{"a":' + b"[" * 39_995, "deeply"),
    ],
)
def test_files_that_are_no_safetensors(client: Path, content: bytes, needle: str) -> None:
    (client / TENSORS).write_bytes(content)
    refused(client, TENSORS, needle, "send it again")


def test_duplicate_keys_bad_names_and_metadata(client: Path) -> None:
    header, data = header_of(client)
    text = json.dumps(header)
    entry = json.dumps(header[FIRST_A])
    write_header(client, (text[:-1] + f', "{FIRST_A}": {entry}}}').encode(), data)
    refused(client, TENSORS, FIRST_A, "stands twice")
    for name in ("\x1b[2J", "\ud800", "x" * 513, ""):
        renamed = {name if key == FIRST_A else key: value for key, value in header.items()}
        write_header(client, renamed, data)
        refused(client, TENSORS, "not a name").pop().__str__().encode()  # printable as UTF-8
    write_header(client, {**header, "__metadata__": {"format": 1}}, data)
    refused(client, TENSORS, "metadata", "strings only")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 1), st.binary(max_size=3)), min_size=1, max_size=4
    )
)
def test_damage_never_surprises(
    edits: list[tuple[float, int, bytes]], client: Path, saved: Callable[[str], Path]
) -> None:
    """Any damage to a file is refused, or leaves a file that safetensors itself reads."""
    sound = (saved("alpha") / TENSORS).read_bytes()
    content = bytearray(sound)
    header = 8 + int.from_bytes(sound[:8], "little")
    for place, removed, inserted in edits:
        at = int(place * header)
        content[at : at + removed] = inserted
    (client / TENSORS).write_bytes(content)
    adapter, refusals = inspect_adapter(client)
    assert (adapter is None) == bool(refusals)
    if adapter is not None:
        check_values(adapter)


def test_the_limit_on_bytes(client: Path) -> None:
    size = (client / TENSORS).stat().st_size
    assert inspect_adapter(client, max_bytes=size)[0]
    refused(
        client, TENSORS, f"{size} bytes", f"at most {size - 1}", "max_bytes", max_bytes=size - 1
    )
