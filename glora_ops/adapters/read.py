"""PEFT LoRA folders: inspected by their headers, read tensor by tensor."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Refusal, Refused
from ..values import extent, out_of_range
from .config import read_settings
from .files import find_file, read_json_object
from .modules import PREFIX, DenseTensor, Module, factor_keys, sort_tensors
from .safetensors_header import read_header
from .stored import Stored, signature

__all__ = [
    "EXAMPLES_NAME",
    "MAX_BYTES",
    "TENSORS_NAME",
    "Adapter",
    "check_values",
    "inspect_adapter",
    "read_adapter",
]

TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
EXAMPLES_NAME = "glora.json"
MAX_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; its tensors are read when asked for, every time, and not kept.

    Attributes
    ----------
    name : str
        The folder's name, by which every message calls this client.
    path : Path
        The folder, absolute.
    stored : Stored
        Its tensors.
    modules : mapping of str to Module
    dense : mapping of str to DenseTensor
        Modules saved in full (``modules_to_save``, classifier heads).
    base_copies : mapping of str to DenseTensor
        Frozen base weights PEFT saved beside adapted embeddings; not part of the update.
    num_examples : int or None
        From ``glora.json``.
    base_model, revision, task_type : str or None
    lora_dropout : float
    modules_to_save : tuple of str
        As the configuration names them.
    config : mapping
        ``adapter_config.json`` as it stands.
    """

    name: str
    path: Path
    stored: Stored
    modules: Mapping[str, Module]
    dense: Mapping[str, DenseTensor]
    base_copies: Mapping[str, DenseTensor]
    num_examples: int | None
    base_model: str | None
    revision: str | None
    task_type: str | None
    lora_dropout: float
    modules_to_save: tuple[str, ...]
    config: Mapping[str, Any]

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
        a_key, b_key = factor_keys(module, m.kind)
        b, a = self.stored.read(b_key, a_key)
        return b.flatten(1), a.flatten(1)

    @property
    def file(self) -> Path:
        """Its safetensors file, links followed."""
        return self.stored.path

    def dense_tensor(self, name: str) -> Tensor:
        """A tensor of `dense` or `base_copies`, as stored."""
        (tensor,) = self.stored.read(PREFIX + name)
        return tensor


def inspect_adapter(
    folder: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES
) -> tuple[Adapter | None, list[Refusal]]:
    """Check a PEFT LoRA folder by its headers and configuration; no tensor is read.

    Parameters
    ----------
    folder : path
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``, optionally ``glora.json``
        with ``{"num_examples": n}``.
    max_bytes : int
        Largest tensor file that is accepted.

    Returns
    -------
    adapter : Adapter, or None if anything was refused
    refusals : list of Refusal
        All problems that can be seen without reading tensors.
    """
    path = Path(os.path.abspath(folder))
    client = path.name
    if not path.is_dir():
        return None, [
            Refusal(
                "no such folder",
                client,
                found=f"nothing at {str(path)!r}",
                expected="a folder written by PeftModel.save_pretrained",
                remedy="check the path",
            )
        ]
    try:
        return _inspect(path, client, max_bytes)
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


def _inspect(path: Path, client: str, max_bytes: int) -> tuple[Adapter | None, list[Refusal]]:
    settings, problems = read_settings(path, client)
    num_examples, more = _read_num_examples(path, client)
    problems += more
    file, more = _find_tensors(path, client)
    problems += more
    if file is None:
        return None, problems
    found = signature(file.stat())
    header, more = read_header(file, client, max_bytes=max_bytes)
    problems += more
    if header is None or settings is None:
        return None, problems
    sorted_tensors, more = sort_tensors(header.tensors, settings, client, TENSORS_NAME)
    problems += more
    if problems:
        return None, problems
    return (
        Adapter(
            name=client,
            path=path,
            stored=Stored(file, client, header.tensors, found),
            modules=sorted_tensors.modules,
            dense=sorted_tensors.dense,
            base_copies=sorted_tensors.base_copies,
            num_examples=num_examples,
            base_model=settings.base_model,
            revision=settings.revision,
            task_type=settings.task_type,
            lora_dropout=settings.lora_dropout,
            modules_to_save=settings.modules_to_save,
            config=settings.raw,
        ),
        [],
    )


def read_adapter(folder: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Adapter:
    """`inspect_adapter`, raising `Refused` with every problem if there is one."""
    adapter, problems = inspect_adapter(folder, max_bytes=max_bytes)
    if adapter is None:
        raise Refused(problems)
    return adapter


def check_values(adapter: Adapter, digest: Any = None) -> list[Refusal]:
    """Find values that cannot be computed with, reading the file once, piece by piece.

    Parameters
    ----------
    adapter : Adapter
    digest : object of `hashlib`, optional
        Updated with every byte of the tensor file on the way.

    Returns
    -------
    list of Refusal
        One per tensor: values that are not finite, their number and the place of the first; fp64
        factors whose squares leave fp64's range.
    """
    extents: dict[str, list[Tensor]] = defaultdict(list)
    copies = {PREFIX + name for name in adapter.base_copies}
    for key, piece in adapter.stored.scan(digest):
        if key not in copies:
            extents[key].append(extent(piece))
    dense = {PREFIX + name for name in adapter.dense}
    problems: list[Refusal] = []

    def refuse(key: str, *why: str) -> None:
        problems.append(Refusal(why[0], adapter.name, TENSORS_NAME, key, *why[1:]))

    for key, pieces in extents.items():
        overall = extent(torch.stack(pieces))
        beyond = None if key in dense else out_of_range(overall)
        if not bool(overall.isfinite().all()):
            (tensor,) = adapter.stored.read(key)
            wrong = ~torch.isfinite(tensor)
            first = tuple(wrong.nonzero()[0].tolist())
            refuse(
                key,
                "values are not finite",
                f"{int(wrong.sum())} of {tensor.numel()}, the first {tensor[first].item()} "
                f"at {first}",
                "finite numbers",
                "the training diverged: leave this client out",
            )
        elif beyond is not None:
            refuse(key, *beyond, "the training diverged: leave this client out")
    return problems


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
    content, problems = read_json_object(path, EXAMPLES_NAME, client)
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
