"""The header of a safetensors file, checked before any tensor is read.

Layout of the file: 8 bytes, the length n of the header, little-endian; n bytes of JSON mapping each
tensor's name to its dtype, shape and the half-open range of its bytes; the bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import Refusal, Refusals
from ..runtime.reading import open_regular, parse_json_object

__all__ = ["DTYPES", "Header", "TensorInfo", "check_header", "read_header"]

MAX_HEADER_BYTES = 32 * 2**20  # why: a tensor takes some hundred bytes, and all of it is parsed
MAX_NAME = 512  # characters; why: names of deep models have a hundred
MAX_TENSORS = 250_000  # why: two a module, and every expert may be one

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    # Of weights saved in full only: counters, masks, quantised layers.
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    **{f"I{8 * n}": getattr(torch, f"int{8 * n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": getattr(torch, f"uint{8 * n}") for n in (1, 2, 4, 8)},
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says about one tensor; `begin` and `end` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that told no untruth: its tensors by name, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @cached_property
    def end(self) -> int:
        """Bytes of all tensors."""
        return max((info.end for info in self.tensors.values()), default=0)


def read_header(
    path: Path,
    client: str | None,
    *,
    max_bytes: int,
    max_header_bytes: int = MAX_HEADER_BYTES,
    max_tensors: int = MAX_TENSORS,
    known: dict[bytes, Header] | None = None,
) -> tuple[Header | None, list[Refusal]]:
    """`check_header` of the safetensors file at `path`."""
    return check_header(
        partial(open_regular, path), path.stat().st_size, path.name, client, max_bytes=max_bytes,
        max_header_bytes=max_header_bytes, max_tensors=max_tensors, known=known,
    )  # fmt: skip


def check_header(
    opened: Callable[[], BinaryIO],
    size: int,
    called: str,
    client: str | None,
    *,
    max_bytes: int,
    max_header_bytes: int = MAX_HEADER_BYTES,
    max_tensors: int = MAX_TENSORS,
    known: dict[bytes, Header] | None = None,
) -> tuple[Header | None, list[Refusal]]:
    """Read and check the header of a safetensors file; no tensor is read.

    Parameters
    ----------
    opened : callable
        Opens the file.
    size : int
        Its bytes.
    called : str
        The file, in the refusals.
    client : str or None
        Named in the refusals.
    max_bytes : int
        Largest file that is accepted.
    max_header_bytes, max_tensors : int
        Largest header, and the most tensors in it, that are accepted.
    known : dict, optional
        Headers that were checked, by the SHA-256 of their text: one that is there is given again,
        and a new one that is in order is added.

    Returns
    -------
    header : Header, or None if anything was refused
    refusals : list of Refusal
        Every untruth found, not only the first.
    """

    def refusal(
        problem: str, found: str, expected: str, remedy: str, tensor: str | None = None
    ) -> Refusal:
        return Refusal(problem, client, called, tensor, found, expected, remedy)

    again = "the file is damaged or forged: have the client save and send it again"
    if size > max_bytes:
        return None, [
            refusal(
                "the file is too large",
                f"{size} bytes",
                f"at most {max_bytes} bytes",
                "have the client send less, or raise max_bytes (max_file_bytes) in Python",
            )
        ]
    if size < 8:  # not opened: an empty one may be no file on a disk, and block
        found, expected = f"a file of {size} bytes", "at least the 8 of the header's length"
        return None, [refusal("the header does not fit", found, expected, again)]
    with opened() as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, max_header_bytes):
            return None, [
                refusal(
                    "the header does not fit",
                    f"a header of {length} bytes in a file of {size}",
                    f"at most {min(size - 8, max_header_bytes)} bytes",
                    again,
                )
            ]
        text = file.read(length)
    key = hashlib.sha256(text).digest()
    same = None if known is None else known.get(key)
    if same is not None and size == 8 + length + same.end:
        return same, []
    try:
        header = parse_json_object(text)
    except ValueError as error:
        return None, [
            refusal(
                "the header is not valid JSON",
                str(error),
                "one JSON object with distinct keys",
                again,
            )
        ]

    metadata = header.pop("__metadata__", {})
    problems = Refusals()
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(
            refusal("the metadata are malformed", repr(metadata)[:80], "strings only", again)
        )
    if len(header) > max_tensors:
        return None, [
            refusal(
                "the header names too many tensors",
                str(len(header)),
                f"at most {max_tensors}",
                again,
            )
        ]
    tensors = {}
    for name, entry in header.items():
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            problems.append(
                refusal(
                    "a tensor's name is not a name",
                    repr(name[:80]),
                    f"1 to {MAX_NAME} printable characters",
                    again,
                )
            )
            continue
        info = _tensor_info(entry)
        if isinstance(info, TensorInfo):
            tensors[name] = info
        else:
            problems.append(refusal(*info, again, tensor=name))
    if problems:
        return None, problems

    # Exactly one byte range after the other: an overlap lets two names share bytes, a hole hides
    # bytes nobody has looked at.
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            fault = "overlaps the one before" if info.begin < end else "leaves a hole before it"
            problems.append(
                refusal(
                    f"the tensor's byte range {fault}",
                    f"a start at {info.begin}",
                    f"a start at {end}",
                    again,
                    tensor=name,
                )
            )
        end = info.end
    if not problems and size != 8 + length + end:
        problems.append(
            refusal(
                "the file's length is not what its header says",
                f"{size} bytes",
                f"{8 + length + end} bytes",
                again,
            )
        )
    if problems:
        return None, problems
    checked = Header(tensors, metadata)
    return checked if known is None else known.setdefault(key, checked), []


def _tensor_info(entry: Any) -> TensorInfo | tuple[str, str, str]:
    """One entry of the header, or (problem, found, expected)."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return (
            "the tensor's entry is malformed",
            repr(entry)[:80],
            "dtype, shape and data_offsets",
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return "the dtype is not supported", repr(dtype)[:80], ", ".join(DTYPES)
    if not _sizes(shape):
        return "the shape is malformed", repr(shape)[:80], "a list of integers ≥ 0"
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "the byte range is malformed", repr(offsets)[:80], "[begin, end], begin ≤ end"
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        return (
            "the byte range does not hold the shape",
            f"{offsets[1] - offsets[0]} bytes",
            f"{needed} bytes for {dtype} {shape}",
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    """Whether `value` is a list of sizes; bounded, so that products stay small numbers."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )
