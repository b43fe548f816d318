"""What Flower's messages hold: one checked form as JSON, and named tensors.

Tensors travel as raw little-endian bytes, float32 or bfloat16: Flower's own conversion goes through
NumPy, which has no bfloat16. Type, shape and length are checked before a tensor is made, its values
afterwards; forms are validated field by field. Nothing is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from ...errors import GloraError, require
from ..messages import WIRES

__all__ = ["Ask", "Facts", "Trained", "Unable", "Work", "content_of", "form_of", "tensors_of"]

STYPE = "glora.raw"
MAX_DIMENSIONS = 8  # why: factors and heads have two, a convolution's kernel four
Digest = Annotated[str, Field(pattern="^[0-9a-f]{0,32}$")]  # of a client's state; none is empty
Measure = Annotated[str, Field(max_length=100)]


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ask(Form):
    """To a node before it takes part: who are you?"""

    plan: str


class Facts(Form):
    """Who a node is: its client, the rank it trains, the examples it holds."""

    client: int = Field(ge=0)
    rank: int = Field(ge=1, lt=2**31)
    examples: int = Field(ge=1)


class Work(Form):
    """To a node in a round. `tensors` names all of the message by digest; only some come along."""

    plan: str
    client: int
    rank: int
    round: int
    state: str
    sent: dict[str, Any]
    tensors: dict[str, str]


class Trained(Form):
    """What came of it; the tensors beside it are the reply. `state` names what the node keeps."""

    examples: int = Field(ge=1)
    metrics: dict[Measure, FiniteFloat] = Field(max_length=100)
    state: Digest
    process: int = Field(ge=0, lt=2**31)


class Unable(Form):
    """Nothing came of it. A node that forgot what the server counts on must be sent everything."""

    reason: str
    forgot: bool = False


F = TypeVar("F")


def content_of(
    form: Form, tensors: Mapping[str, Tensor] | None = None, wire: str = "float32"
) -> RecordDict:
    """A message's content."""
    arrays = ArrayRecord({name: _array(x, wire) for name, x in (tensors or {}).items()})
    about = ConfigRecord({"json": form.model_dump_json()})
    return RecordDict({"about": about, "tensors": arrays})


def form_of(content: RecordDict, kind: type[F]) -> F:
    """The form of a message.

    Raises
    ------
    GloraError
        If it is none.
    """
    record = content.config_records.get("about", ConfigRecord())
    try:
        return TypeAdapter(kind).validate_json(str(record.get("json")))
    except ValidationError as error:
        raise GloraError(
            f"message: got {len(error.errors())} fields that do not fit, expected {kind}; "
            "the same version of glora on every node"
        ) from None


def tensors_of(content: RecordDict, wire: str) -> dict[str, Tensor]:
    """The tensors of a message, in float32.

    Raises
    ------
    GloraError
        If one is not of type `wire`, not as long as its shape says, or not finite.
    """
    arrays = content.array_records.get("tensors", ArrayRecord())
    return {name: _tensor(name, array, wire) for name, array in arrays.items()}


def _array(x: Tensor, wire: str) -> Array:
    flat = x.detach().cpu().to(WIRES[wire]).contiguous().view(-1).view(torch.uint8)
    return Array(wire, tuple(x.shape), STYPE, flat.numpy().tobytes())


def _tensor(name: str, array: Array, wire: str) -> Tensor:
    kind, dtype = (array.stype, array.dtype), WIRES[wire]
    require(kind == (STYPE, wire), f"tensor {name!r}", kind, f"{(STYPE, wire)}",
            "the same version of glora on every node")  # fmt: skip
    shape = tuple(array.shape)
    require(
        len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n > 0 for n in shape),
        f"tensor {name!r}",
        f"the shape {shape!s:.80}",
        f"at most {MAX_DIMENSIONS} integers above zero",
    )
    right = len(array.data) == math.prod(shape) * dtype.itemsize
    require(right, f"tensor {name!r}", f"{len(array.data)} bytes", f"shape {shape} of {wire}")
    x = torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(shape).float()
    require(bool(x.isfinite().all()), f"tensor {name!r}", "NaN or infinity", "finite values")
    return x
