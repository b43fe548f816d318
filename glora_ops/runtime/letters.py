"""A message from rank to rank: safetensors, of which one tensor is the JSON of what is no tensor.

Nothing of it is run. Imported when one is written or read, because of pydantic.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter
from safetensors.torch import load, save
from torch import Tensor

from ..errors import Refusal

__all__ = ["packed", "unpacked"]

#: The tensor of bytes that is JSON; the others are called by their numbers.
PLAIN = "plain"


class Plain(BaseModel):
    """What is no tensor: an error, or what the caller's form is to fit."""

    model_config = ConfigDict(strict=True, extra="forbid", revalidate_instances="always")
    verdict: list[Annotated[Refusal, BeforeValidator(lambda fields: Refusal(**fields))]] | None
    content: Any


def packed(verdict: Sequence[Refusal] | None, content: Any, tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of a message.

    Memory: one copy of the tensors; while it is made a second of those that overlap or are strided.
    """
    text = json.dumps({"verdict": verdict, "content": content}, default=_plain).encode()
    named = {_name(i): x for i, x in enumerate(_apart(tensors))}
    named[PLAIN] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes cannot be written to: they are only sent
        return torch.frombuffer(save(named), dtype=torch.uint8)


def unpacked(message: bytes, form: Any) -> tuple[list[Refusal] | None, Any, list[Tensor]]:
    """What was packed, the content as a `form`; an exception of any kind where it is anything else.

    Memory: one copy of the tensors.
    """
    named = load(message)
    plain = Plain.model_validate(json.loads(named.pop(PLAIN).numpy().tobytes()))
    fits = TypeAdapter(form if plain.verdict is None else None)
    content = fits.validate_python(plain.content, strict=True)
    return plain.verdict, content, [named[_name(i)] for i in range(len(named))]


def _name(number: int) -> str:
    return f"{number:08d}"


def _plain(x: Any) -> Any:
    return str(x) if isinstance(x, torch.dtype) else vars(x)


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, on the CPU, and no two in the same memory, which safetensors refuses."""
    out = [x.detach().cpu().contiguous() for x in tensors]
    end = 0
    for i in sorted(range(len(out)), key=lambda i: out[i].data_ptr()):
        begin, length = out[i].data_ptr(), out[i].nbytes
        if begin < end:
            out[i] = out[i].clone()
        end = max(end, begin + length)
    return out
