"""What a node keeps between two messages, in one file per run and client.

Tensors lie under the digest of their bits, optimiser moments under the digest of them all. The file
holds what the last message left the client with and the moments before and after it: whatever the
server knows of when it starts again, the node still has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...runtime.hidden import sweep
from ...runtime.outputs import new_file, ours
from ..messages import digest
from ..trainer import ClientState

__all__ = ["Shelf", "clear", "name_of"]


def name_of(state: ClientState) -> str:
    """A client state's name; the empty one has none."""
    if not state:
        return ""
    text = "".join(f"{key}={digest(x)};" for key, x in sorted(state.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Shelf:
    """Reads the file when made; an unreadable one counts as empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, Tensor] = {}
        if path.is_file():
            try:
                self._held = load_file(path)
            except SafetensorError:
                self._held = {}

    def tensors(self) -> dict[str, Tensor]:
        """Those of the last message, by digest."""
        return {name: x for name, x in self._held.items() if "/" not in name}

    def state(self, name: str) -> ClientState | None:
        """The client state of that name; None where it is not here."""
        found = {k.partition("/")[2]: x for k, x in self._held.items() if k.startswith(f"{name}/")}
        return {} if not name else found or None

    def keep(self, tensors: Iterable[Tensor], states: Mapping[str, ClientState]) -> None:
        """Put these in the file, and nothing else, in one step."""
        held = {digest(x): x for x in tensors}
        held |= {f"{name}/{key}": x for name, s in states.items() for key, x in s.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path, ours) as partial:
            save_file({name: x.detach().cpu().contiguous() for name, x in held.items()}, partial)
        self._held = held


def clear(folder: Path) -> None:
    """Remove what the nodes of a run kept, and the folder if nothing else is in it."""
    if folder.is_dir():
        sweep(folder, ours)
        for path in folder.glob("client*.safetensors"):
            path.unlink()
        with suppress(OSError):
            folder.rmdir()
