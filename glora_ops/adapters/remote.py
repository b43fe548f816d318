"""A client behind a URL: its files fetched, its tensors read by ranges of bytes."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

from ..errors import GloraError, Refusal, Refused, require
from ..runtime.objects import REQUEST, fetch, look
from ..runtime.reading import MAX_BYTES
from ..runtime.urls import Url
from .files import missing
from .safetensors_header import Header, TensorInfo, check_header
from .stored import Stored

__all__ = ["Remote", "find_remote", "read_remote_text"]

HEAD = 2**16  # bytes that are fetched for a header; why: that of 224 modules has 50 000
#: Bytes of whole files that this process keeps: files of one request, which cost what a slice does.
KEPT = 2**27

_kept = 0
_keeping = threading.RLock()  # a finaliser may run inside it


class RemoteFile(io.RawIOBase):
    """An object as a file that was opened for reading.

    What lies in one of `spans` is fetched with the rest of it, as far as one request goes; what
    lies in none, as it is asked for.
    """

    def __init__(
        self,
        url: Url,
        client: str | None,
        size: int,
        spans: Sequence[tuple[int, int]],
        whole: bytes | None = None,
    ) -> None:
        super().__init__()
        self.url, self.client, self.size, self.spans = url, client, size, spans
        self.asked = False  # whether anything was fetched
        self._at, self._block, self._begin = 0, whole or b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer, as far as the file goes."""
        target = memoryview(buffer).cast("B")[: max(0, self.size - self._at)]
        done = 0
        while done < len(target):
            at = self._at - self._begin
            if not 0 <= at < len(self._block):
                self._fetch(len(target) - done)
                at = self._at - self._begin
            piece = self._block[at : at + len(target) - done]
            target[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)
        return done

    def _fetch(self, wanted: int) -> None:
        begin, end = self._at, self._at + wanted
        for first, last in self.spans:
            if first <= begin < last:
                end = last
                begin = first if last - first <= REQUEST else begin
        with naming(self.client):
            self._block = fetch(self.url, begin, min(end, begin + REQUEST, self.size))
        self._begin, self.asked = begin, True


@dataclass(frozen=True)
class Remote(Stored):
    """Tensors of an object behind a URL; its signature is its size and its server's mark."""

    path: Url
    signature: tuple[int, str]
    _whole: list[bytes] = field(default_factory=list, repr=False, compare=False)
    _reading: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def _open(self, *wanted: TensorInfo) -> BinaryIO:
        with naming(self.client):
            whole = self._read_whole()
        size = self.signature[0]
        spans = [(self.start + info.begin, self.start + info.end) for info in wanted]
        first, last = min(spans, default=(0, size))[0], max((end for _, end in spans), default=size)
        if last - first <= min(REQUEST, sum(end - begin for begin, end in spans)):
            spans = [(first, last)]  # side by side: one request for all
        file = RemoteFile(self.path, self.client, size, spans or [(0, size)], whole)
        return cast(BinaryIO, file)

    def _check(self, file: BinaryIO) -> None:
        if cast(RemoteFile, file).asked:
            self._check_mark()

    def _check_mark(self) -> None:
        """Raise `Refused` unless the object is still the one whose header was read.

        Asked for after its bytes: they were those of the object, or it is another one now.
        """
        with naming(self.client):
            found = look(self.path)
        if found is None:
            raise self._changed("no such file any more")
        if (found.size, found.mark) != self.signature:
            raise self._changed(f"{found.size} bytes, marked {found.mark}")

    def _read_whole(self) -> bytes | None:
        """All of it, where it is one request and there is room to keep it."""
        size = self.signature[0]
        with self._reading:
            if not self._whole and 0 < size <= REQUEST and _take(self, size):
                content = fetch(self.path, 0, size)
                self._check_mark()
                self._whole.append(content)
        return self._whole[0] if self._whole else None


def _take(holder: Remote, size: int) -> bool:
    """Whether `size` bytes may be kept for as long as `holder` is there."""
    global _kept
    with _keeping:
        if _kept + size > KEPT:
            return False
        _kept += size
    weakref.finalize(holder, _give_back, size)
    return True


def _give_back(size: int) -> None:
    global _kept
    with _keeping:
        _kept -= size


@contextmanager
def naming(client: str | None) -> Iterator[None]:
    """What is refused in the block, as the client's."""
    try:
        yield
    except GloraError as error:
        raise Refused(replace(refusal, client=client) for refusal in error.refusals) from None


def read_remote_text(
    folder: Url, name: str, client: str, needed: bool = True
) -> tuple[bytes | None, list[Refusal]]:
    """What stands in the file `name` of `folder`, or why it cannot be had."""
    try:
        with naming(client):
            found = look(folder / name)
            if found is None:
                return None, [missing(name, client, f"nothing at {folder / name}")] * needed
            require(found.size <= MAX_BYTES, "file", f"{folder / name} of {found.size} bytes",
                    f"at most {MAX_BYTES}", "it is no such file", file=name)  # fmt: skip
            return fetch(folder / name, 0, found.size), []
    except GloraError as error:
        return None, list(error.refusals)


def find_remote(
    folder: Url, name: str, client: str, max_bytes: int, known: dict[bytes, Header]
) -> tuple[Remote | None, Header | None, list[Refusal]]:
    """The tensor file `name` of `folder` by its header, or why it cannot be used."""
    url = folder / name
    try:
        with naming(client):
            found = look(url)
            if found is None:
                return None, None, [missing(name, client, f"nothing at {url}")]
            file = RemoteFile(url, client, found.size, [(0, min(HEAD, found.size))])
            header, problems = check_header(
                lambda: cast(BinaryIO, file), found.size, name, client, max_bytes=max_bytes,
                known=known,
            )  # fmt: skip
    except GloraError as error:
        return None, None, list(error.refusals)
    if header is None:
        return None, None, problems
    return Remote(url, client, header.tensors, (found.size, found.mark)), header, []
