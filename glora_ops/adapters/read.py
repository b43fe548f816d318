"""LoRA adapters on disk: inspected by their headers, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import Refusal, Refused
from ..runtime.overlap import overlapped
from ..runtime.urls import Url
from .adapter_config import CONFIG_NAME, LoraSettings, parse_settings
from .files import (
    find_file,
    only_adapter,
    parse_object,
    read_text,
    unread_weights,
    what_else,
)
from .modules import DenseTensor, Module, Tensors, saved_by, sort_tensors
from .one_file import read_one_file
from .places import Place, find_places
from .remote import Remote, find_remote, read_remote_text
from .safetensors_header import Header, read_header
from .stored import Stored, signature
from .targets import Targets

__all__ = [
    "EXAMPLES_NAME",
    "MAX_BYTES",
    "TENSORS_NAME",
    "Adapter",
    "Layouts",
    "inspect_adapter",
    "inspect_adapters",
    "read_adapter",
]

TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
EXAMPLES_NAME = "glora.json"
MAX_BYTES = 16 * 2**30  # why: LoRA of rank 64 on all of a 70B model is a tenth of it in bf16


@dataclass(frozen=True)
class Layout:
    """What a configuration makes of a header, and the configuration's SHA-256 (`config_digest`)."""

    settings: LoraSettings
    tensors: Tensors
    config_sha256: str


class Layouts:
    """What many clients have in common, kept once: headers, and what they and configurations say.

    Clients of one training script differ in numbers only; without this each costs a kilobyte and
    the time of a look for every tensor. Threads may share it.
    """

    def __init__(self) -> None:
        self.headers: dict[bytes, Header] = {}
        self._said: dict[tuple[int, str], Layout] = {}
        self._written: dict[tuple[int, bytes], Layout] = {}

    def find(
        self, header: Header | None, config: bytes, client: str
    ) -> tuple[Layout | None, list[Refusal]]:
        """The layout of one of `headers` under the text of a configuration, or what is refused."""
        text = hashlib.sha256(config).digest()
        if header is not None and (id(header), text) in self._written:
            return self._written[id(header), text], []
        settings, problems = parse_settings(config, client)
        if header is None or settings is None:
            return None, problems
        digest = config_digest(settings.raw)
        layout = self._said.get((id(header), digest))
        if layout is None:
            found, more = sort_tensors(header.tensors, settings, client, TENSORS_NAME)
            problems += more
            layout = Layout(settings, found, digest)
        if problems:
            return None, problems
        layout = self._said.setdefault((id(header), digest), layout)
        self._written[id(header), text] = layout
        return layout, []


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, whatever the order and spacing it was written in."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; its tensors are read when asked for, every time, and not kept.

    Attributes
    ----------
    name : str
        By which every message calls this client: given, or the end of the path (`find_places`).
    path : Path or Url
        The folder or file, absolute.
    stored : Stored
        Its tensors.
    modules : mapping of str to Module
    dense : mapping of str to DenseTensor
        Modules saved in full (``modules_to_save``, classifier heads).
    base_copies : mapping of str to DenseTensor
        Frozen base weights PEFT saved beside adapted or extended embeddings; not part of the
        update.
    tied : mapping of str to str
        Modules and full weights that are another one once more, by that one's name.
    num_examples : int or None
        From ``glora.json``.
    base_model, revision, task_type : str or None
    targets : Targets
        Which modules the configuration selects.
    lora_dropout : float
    modules_to_save : tuple of str
        As the configuration names them.
    config : mapping
        ``adapter_config.json`` as it stands, or what a file says of itself instead.
    config_sha256 : str
        Of its canonical JSON.
    remarks : tuple of str
        What whoever merges it should know.
    """

    name: str
    path: Path | Url
    stored: Stored
    modules: Mapping[str, Module]
    dense: Mapping[str, DenseTensor]
    base_copies: Mapping[str, DenseTensor]
    tied: Mapping[str, str]
    num_examples: int | None
    base_model: str | None
    revision: str | None
    task_type: str | None
    targets: Targets
    lora_dropout: float
    modules_to_save: tuple[str, ...]
    config: Mapping[str, Any]
    config_sha256: str
    remarks: tuple[str, ...] = ()

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B and A of one module, as stored.

        Parameters
        ----------
        module : str
            A key of `modules`.

        Returns
        -------
        B : Tensor, (d_out, r)
        A : Tensor, (r, d_in)
            In the stored dtypes; convolutions flattened from the second dimension on.

        Raises
        ------
        Refused
            If the file is no longer the one that was inspected.
        """
        m = self.modules[module]
        place, experts = m.expert
        if experts > 1:
            a = self.stored.read_rows(m.a_key, place * m.rank, m.rank)
            return self.stored.read_kept(m.b_key)[:, place::experts], a
        b, a = self.stored.read(m.b_key, m.a_key)
        return b.flatten(1), a.flatten(1)

    def read_into(self, module: str, b: Tensor, a: Tensor) -> None:
        """`factors`, written into rows: Bᵀ into b (r, d_out), A into a (r, d_in).

        Parameters
        ----------
        module : str
        b, a : Tensor
            Contiguous, in any dtype that the stored values can be converted to.

        Raises
        ------
        Refused
            As `factors` does.
        """
        m = self.modules[module]
        if m.expert[1] > 1:
            left, right = self.factors(module)
            b.copy_(left.mT)
            a.copy_(right)
        else:
            self.stored.read_into(m.b_key, m.a_key, b, a)

    @property
    def saved(self) -> list[str]:
        """The entries of `modules_to_save` of which something is stored."""
        used = {entry for name in self.dense for entry in saved_by(name, self.modules_to_save)}
        return sorted(used)

    @property
    def waits(self) -> bool:
        """Whether reading is waiting for a server: then several are read at a time."""
        return isinstance(self.stored, Remote)

    def dense_tensor(self, name: str) -> Tensor:
        """A tensor of `dense` or `base_copies`, as stored."""
        (tensor,) = self.stored.read((self.dense.get(name) or self.base_copies[name]).key)
        return tensor


def inspect_adapter(
    folder: str | os.PathLike[str] | Place,
    *,
    max_bytes: int = MAX_BYTES,
    layouts: Layouts | None = None,
) -> tuple[Adapter | None, list[Refusal]]:
    """Check a LoRA adapter by its headers and configuration; no factor is read.

    Parameters
    ----------
    folder : path or Place
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``, optionally ``glora.json``
        with ``{"num_examples": n}``; or one folder that does. Or a LoRA file of another trainer
        that says all that is needed (`one_file`). Or the URL of such a folder, on any protocol for
        which fsspec finds a package.
    max_bytes : int
        Largest tensor file that is accepted.
    layouts : Layouts, optional
        Of the clients before this one.

    Returns
    -------
    adapter : Adapter, or None if anything was refused
    refusals : list of Refusal
        All problems that can be seen without reading factors.
    """
    (place,) = find_places([folder])
    path, client = place.path, place.name
    layouts = Layouts() if layouts is None else layouts
    if isinstance(path, Url):
        return _inspect_url(path, client, max_bytes, layouts)
    try:
        if path.is_dir() and os.path.lexists(path / CONFIG_NAME):
            return _inspect(path, client, max_bytes, layouts)
        if path.is_file():
            return _inspect_file(path, client, max_bytes)
        if path.is_dir():
            path = only_adapter(path)
        problem = what_else(path)
        if problem is not None:
            return None, [replace(problem, client=client)]
        return _inspect(path, client, max_bytes, layouts)
    except OSError as error:
        return None, [
            Refusal(
                "a file cannot be read",
                client,
                found=str(error),
                expected="readable files",
                remedy="check the permissions",
            )
        ]


def _inspect_file(path: Path, client: str, max_bytes: int) -> tuple[Adapter | None, list[Refusal]]:
    other = what_else(path)
    if other is not None:
        return None, [replace(other, client=client)]
    found = signature(path.stat())
    header, problems = read_header(path, client, max_bytes=max_bytes)
    if header is None:
        return None, problems
    stored = Stored(path, client, header.tensors, found)
    read = read_one_file(stored, header.metadata)
    if read.problems:
        return None, read.problems
    return (
        Adapter(
            name=client,
            path=path,
            stored=stored,
            modules=read.modules,
            dense={},
            base_copies={},
            tied={},
            num_examples=None,
            base_model=None,
            revision=None,
            task_type=None,
            targets=Targets((), (), True),
            lora_dropout=0.0,
            modules_to_save=(),
            config=read.config,
            config_sha256=config_digest(read.config),
            remarks=(read.remark,),
        ),
        [],
    )


def _inspect(
    path: Path, client: str, max_bytes: int, layouts: Layouts
) -> tuple[Adapter | None, list[Refusal]]:
    config, problems = read_text(path, CONFIG_NAME, client)
    num_examples, more = _read_num_examples(path, client)
    problems += more
    file, more = _find_tensors(path, client)
    problems += more
    header, stored = None, None
    if file is not None:
        found = signature(file.stat())
        header, more = read_header(file, client, max_bytes=max_bytes, known=layouts.headers)
        problems += more
        stored = None if header is None else Stored(file, client, header.tensors, found)
    layout = None
    if config is not None:
        layout, more = layouts.find(header, config, client)
        problems[:0] = more
    if problems or stored is None or layout is None:
        return None, problems
    return _adapter(path, stored, layout, num_examples, unread_weights(path)), []


def _inspect_url(
    url: Url, client: str, max_bytes: int, layouts: Layouts
) -> tuple[Adapter | None, list[Refusal]]:
    """As `_inspect`; what lies beside the client's files is not looked for."""
    if url.fault:
        problem = Refusal(
            "the URL holds what may be a secret, or is none",
            client,
            found=f"{url} with {url.fault}, which is shown and kept nowhere",
            expected="protocol://place/of/the/folder",
            remedy="give credentials as fsspec's package takes them: environment, profile or role",
        )
        return None, [problem]
    config, problems = read_remote_text(url, CONFIG_NAME, client)
    text, more = read_remote_text(url, EXAMPLES_NAME, client, needed=False)
    num_examples = None
    problems += more
    if text is not None:
        num_examples, more = _num_examples(text, client)
        problems += more
    stored, header, more = find_remote(url, TENSORS_NAME, client, max_bytes, layouts.headers)
    problems += more
    layout = None
    if config is not None:
        layout, more = layouts.find(header, config, client)
        problems[:0] = more
    if problems or stored is None or layout is None:
        return None, problems
    return _adapter(url, stored, layout, num_examples), []


def _adapter(
    path: Path | Url,
    stored: Stored,
    layout: Layout,
    num_examples: int | None,
    remarks: tuple[str, ...] = (),
) -> Adapter:
    settings, tensors = layout.settings, layout.tensors
    assert stored.client is not None
    return Adapter(
        name=stored.client,
        path=path,
        stored=stored,
        modules=tensors.modules,
        dense=tensors.dense,
        base_copies=tensors.base_copies,
        tied=tensors.tied,
        num_examples=num_examples,
        base_model=settings.base_model,
        revision=settings.revision,
        task_type=settings.task_type,
        targets=settings.targets,
        lora_dropout=settings.lora_dropout,
        modules_to_save=settings.modules_to_save,
        config=settings.raw,
        config_sha256=layout.config_sha256,
        remarks=remarks,
    )


def inspect_adapters(
    places: Sequence[Place], *, max_bytes: int, layouts: Layouts
) -> Iterator[tuple[Adapter | None, list[Refusal]]]:
    """`inspect_adapter` of each, in order; several at a time where reading waits."""
    look = partial(inspect_adapter, max_bytes=max_bytes, layouts=layouts)
    yield from overlapped(look, places, any(isinstance(x.path, Url) for x in places) or None)


def read_adapter(folder: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Adapter:
    """`inspect_adapter`, raising `Refused` with every problem if there is one."""
    adapter, problems = inspect_adapter(folder, max_bytes=max_bytes)
    if adapter is None:
        raise Refused(problems)
    return adapter


def _find_tensors(path: Path, client: str) -> tuple[Path | None, list[Refusal]]:
    if not os.path.lexists(path / TENSORS_NAME) and os.path.lexists(path / PICKLE_NAME):
        return None, [
            Refusal(
                "the tensors are pickled, and unpickling runs whatever code the file contains",
                client,
                PICKLE_NAME,
                found=PICKLE_NAME,
                expected=TENSORS_NAME,
                remedy="have the client save with safe_serialization=True (safetensors)",
            )
        ]
    return find_file(path, TENSORS_NAME, client)


def _read_num_examples(path: Path, client: str) -> tuple[int | None, list[Refusal]]:
    if not os.path.lexists(path / EXAMPLES_NAME):
        return None, []
    text, problems = read_text(path, EXAMPLES_NAME, client)
    return (None, problems) if text is None else _num_examples(text, client)


def _num_examples(text: bytes, client: str) -> tuple[int | None, list[Refusal]]:
    content, problems = parse_object(text, EXAMPLES_NAME, client)
    if content is None:
        return None, problems
    n = content.get("num_examples")
    if n is None or (type(n) is int and 0 <= n < 2**53):
        return n, []
    return None, [
        Refusal(
            "the number of examples is malformed",
            client,
            EXAMPLES_NAME,
            found=f"num_examples = {n!r:.80}",
            expected="an integer ≥ 0",
            remedy='write {"num_examples": n} or remove the file',
        )
    ]
