"""The file of a state: safetensors with JSON in its metadata, checksums, and checks of both.

Format 3. The metadata have one key, ``glora``, whose text is a JSON object: what `state_schema`
describes; ``tensors``, the digest of each tensor by its name; and ``sha256``, the digest of all
other entries. The digest of a tensor is the SHA-256 of the canonical JSON of [dtype, shape], as
the file's header has them, followed by the tensor's bytes; that of the entries is the SHA-256 of
their canonical JSON: sorted keys, no spaces, ASCII. Formats 1 (no record either) and 2 have no
digests.

Format 4 is that of states with many clients, who are kept beside it (`state_clients`): ``beside``
takes the place of ``clients`` and ``weights``, the record names none, and the digests of all
tensors are here, wherever these are.

Files are read like adapters: plain reads of a regular file, which is refused where it is no longer
the one whose header was checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters.safetensors_header import DTYPES, MAX_NAME, Header, TensorInfo, read_header
from .adapters.stored import Stored, signature
from .errors import Refusal, Refusals, Refused, require, unfit
from .runtime.reading import parse_json_object
from .state_checks import misplaced, tensor_names, wrong_values
from .state_clients import BESIDE, MAX_LINES, Apart, about_clients, read_apart

__all__ = ["FORMAT_VERSION", "MARK", "MAX_BYTES", "StateFile", "check_saveable", "encode", "read"]

MARK = "glora"  # key of a state's JSON in the metadata of its file
FORMAT_VERSION = 4  # 3 holds its clients itself, 2 had no digests, 1 no record
MAX_BYTES = 2**40  # why: of rank 256 a dense model of 400B parameters has some 40 GiB
MAX_HEADER_BYTES = 100_000_000  # which the safetensors library accepts
MAX_TENSORS = 2**20  # eight a module, and every expert is a module
FEW = 10_000  # clients of whom nobody need count whether a file holds them
ENTRY = 100  # characters of a tensor's entry in the header beside its name and shape, at most
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_STATE_FILE = "a server.safetensors"
_WRITES = "glora aggregate writes one, and State.save"
_DAMAGED = "the file is damaged or was edited: write it again, or fetch a copy"


@dataclass(frozen=True)
class StateFile:
    """What was read and found to be in order.

    Attributes
    ----------
    path : Path
    version : int
        Of the format.
    sha256 : str or None
        Digest of the metadata, which hold those of all tensors; None before format 3.
    about : dict
        ``modules``, ``clients``, ``weights``, ``settings``, ``layout`` and ``record``.
    modules : dict of str to (dict of str to Tensor)
        The parts of each module, as `ModuleState` names them.
    dense : dict of str to Tensor
    """

    path: Path
    version: int
    sha256: str | None
    about: dict[str, Any]
    modules: dict[str, dict[str, Tensor]]
    dense: dict[str, Tensor]

    @property
    def note(self) -> str | None:
        """What a reader should know of a file without checksums."""
        if self.sha256 is not None:
            return None
        return (
            f"{self.path} has format {self.version}, which carries no checksum: damage that leaves "
            "its numbers plausible cannot be seen; a state that is saved now carries them"
        )


def encode(
    about: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Tensor]],
    dense: Mapping[str, Tensor],
    *,
    apart: bool = False,
) -> tuple[dict[str, Tensor], dict[str, str], Apart | None]:
    """Tensors and metadata for safetensors, the same bytes for the same state.

    And what belongs beside the file: the clients, if `apart` and there are more than `BESIDE`.

    Raises
    ------
    Refused
        If the file could not be read again.
    """
    named = {
        key: m[part] for name, m in modules.items() for part, key in tensor_names(name).items()
    }
    named |= {f"dense/{name}": x for name, x in dense.items()}
    tensors = {key: x.detach().cpu().contiguous() for key, x in named.items()}
    try:
        text = json.dumps({"format_version": 3} | dict(about), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise unfit("state", error, "settings and a record that JSON can hold") from None
    written = json.loads(text)
    remedy = "look at how the state was made: its file could not be read again"
    _refuse(_unreadable(tensors), None, remedy)
    written["tensors"] = {key: _digest(x) for key, x in tensors.items()}
    written["sha256"] = _digest_of(written)
    _check(written, tensors, None, None, remedy)
    _refuse(wrong_values(written["modules"], tensors), None, remedy)
    beside = None
    if apart and len(written["clients"]) > BESIDE:
        beside = Apart.of(written, tensors)
        written["format_version"] = FORMAT_VERSION
        written["sha256"] = _digest_of(written)
    text = json.dumps(written)
    entries = (len(json.dumps(key)) + len(str(x.shape)) for key, x in tensors.items())
    size = len(json.dumps(text)) + sum(entry + ENTRY for entry in entries)
    require(size <= MAX_HEADER_BYTES, "state", f"metadata of {size} bytes",
            f"at most {MAX_HEADER_BYTES}", "fewer clients, or shorter names")  # fmt: skip
    return tensors, {MARK: text}, beside


def check_saveable(count: int, clients: Iterable[Mapping[str, Any]]) -> None:
    """Raise `GloraError` where a state of so many clients could certainly not be saved.

    Parameters
    ----------
    count : int
    clients : iterable of mapping
        What a record says of each; of a path the last part only, which stands in any file.
    """
    if count <= FEW:
        return
    from .state_schema import MAX_CLIENTS

    most_bytes = MAX_LINES if count > BESIDE else MAX_HEADER_BYTES
    size = sum(len(json.dumps(json.dumps(client))) for client in clients)
    for found, most, what in (
        (count, MAX_CLIENTS, "clients"),
        (size, most_bytes, "bytes of their record"),
    ):
        require(found <= most, "clients", f"{found} {what}", f"at most {most}, which a state holds",
                "aggregate in groups, or take shorter names")  # fmt: skip


def read(path: Path) -> StateFile:
    """The state in a file, every checksum and value of it checked.

    Raises
    ------
    GloraError
        Not a safetensors file, not a state, of a format this version cannot read, damaged, or
        changed while it was read.
    """
    require(path.is_file(), "state", path, "an existing file", _WRITES, file=str(path))
    found = signature(path.stat())
    header, problems = read_header(
        path, None, max_bytes=MAX_BYTES,
        max_header_bytes=MAX_HEADER_BYTES, max_tensors=MAX_TENSORS,
    )  # fmt: skip
    if header is None:
        problems = [replace(p, problem=f"no safetensors file: {p.problem}") for p in problems]
        raise _refused(problems, path, f"{_STATE_FILE} is wanted: {_WRITES}")
    about = written = _metadata(path, header)
    stores = [Stored(path, None, header.tensors, found)]
    if "beside" in about:
        _check_seal(about, path)
        about = about_clients(path, about)
        stores.append(read_apart(path, written, MAX_BYTES))
    infos = {name: info for stored in stores for name, info in stored.tensors.items()}
    _check(about, infos, path, written)
    tensors = {
        name: x
        for stored in stores
        for name, x in zip(stored.tensors, stored.read(*stored.tensors), strict=True)
    }
    digests = about.pop("tensors", {}).items()
    found_now = ((key, _digest(tensors[key]), digest) for key, digest in digests)
    _refuse((_other(*one) for one in found_now if one[1] != one[2]), path)
    _refuse(wrong_values(about["modules"], tensors), path)
    return StateFile(
        path,
        about.pop("format_version"),
        about.pop("sha256", None),
        about,
        {
            name: {part: tensors[key] for part, key in tensor_names(name).items()}
            for name in about["modules"]
        },
        {
            key.removeprefix("dense/"): tensors[key]
            for key in sorted(tensors)
            if key.startswith("dense/")
        },
    )


def _metadata(path: Path, header: Header) -> dict[str, Any]:
    """The JSON of the metadata, of a format that is known."""
    try:
        ((key, text),) = header.metadata.items()  # another beside it would go unchecked
        about = parse_json_object(text.encode()) if key == MARK else {}
        version = about["format_version"]
        newest = FORMAT_VERSION if "beside" in about else FORMAT_VERSION - 1
    except (KeyError, ValueError) as error:
        found = f"{path}, which carries no glora metadata, or others beside them ({error})"
        raise unfit("state", found, _STATE_FILE, _WRITES, file=str(path)) from None
    require(
        type(version) is int and 1 <= version <= newest,
        "format_version",
        f"{version!r:.20} in {path}",
        f"1 to {newest}",
        "read it with the glora that wrote it",
        file=str(path),
    )
    return about


def _check(
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor | TensorInfo],
    path: Path | None,
    written: Mapping[str, Any] | None = None,
    remedy: str = _DAMAGED,
) -> None:
    """Raise `Refused` where metadata or tensors, by dtype and shape, are not those of a state.

    `written` are the metadata as they stand in the file, where clients are beside it.
    """
    _check_seal(about, path, written, remedy)
    if "sha256" in about:
        odd = sorted(about["tensors"].keys() ^ tensors.keys())
        missing = (Refusal("a tensor or its checksum is missing", tensor=key) for key in odd)
        _refuse(missing, path, remedy)
    rank, clients = about["settings"]["rank"], len(about["clients"])
    _refuse(misplaced(about["modules"], clients, rank, tensors), path, remedy)


def _check_seal(
    about: Mapping[str, Any],
    path: Path | None,
    written: Mapping[str, Any] | None = None,
    remedy: str = _DAMAGED,
) -> None:
    """Raise `Refused` where metadata do not fit the schema, or their digest."""
    from .state_schema import faults  # pydantic takes longer to import than the package

    _refuse(faults(about), path, remedy)
    if "sha256" in about and (now := _digest_of(written or about)) != about["sha256"]:
        _refuse([_other(None, now, about["sha256"])], path, remedy)


def _other(tensor: str | None, found: str, expected: str) -> Refusal:
    """The refusal of a tensor, or of the metadata, with another digest than was written."""
    return Refusal(
        "the metadata are not what was written"
        if tensor is None
        else "the tensor is not what was written",
        tensor=tensor,
        found=f"sha256 {found:.16}…",
        expected=f"{expected:.16}…",
    )


def _refuse(refusals: Iterable[Refusal], path: Path | None, remedy: str = _DAMAGED) -> None:
    """Raise `_refused` if there is anything to refuse."""
    found = Refusals(refusals)
    if found:
        raise _refused(found, path, remedy)


def _refused(refusals: list[Refusal], path: Path | None, remedy: str) -> Refused:
    file = None if path is None else str(path)
    return Refused(replace(refusal, file=file, remedy=remedy) for refusal in refusals)


def _unreadable(tensors: Mapping[str, Tensor]) -> Iterator[Refusal]:
    for key, x in tensors.items():
        if not key.isprintable() or len(key) > MAX_NAME:
            expected = f"at most {MAX_NAME} printable characters"
            yield Refusal("the name cannot be read again", None, None, key, "", expected)
        if x.dtype not in STORED_NAMES:
            expected = ", ".join(map(str, STORED_NAMES))
            yield Refusal("the dtype cannot be read again", None, None, key, str(x.dtype), expected)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(x: Tensor) -> str:
    digest = hashlib.sha256(_canonical([STORED_NAMES[x.dtype], list(x.shape)]))
    digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in about.items() if k != "sha256"})).hexdigest()
