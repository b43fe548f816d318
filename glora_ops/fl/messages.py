"""What travels between server and clients, and how many bytes that is.

Both messages are flat dictionaries of named tensors with a little JSON beside them, so that every
engine (in process, Flower) and the checkpoint carry the same thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..state import Factors
from .seeds import torch_stream

__all__ = [
    "Client",
    "Failure",
    "Pairs",
    "Reply",
    "Sent",
    "Tail",
    "digest",
    "draw_factors",
    "held_tensors",
    "on_the_wire",
    "reply_from",
    "reply_tensors",
    "rounded",
    "sent_from",
    "sent_tensors",
    "wire_bytes",
]

Pairs = dict[str, Factors]  # module → (lora_B (d_out, r), lora_A (r, d_in))
Shapes = Mapping[str, tuple[int, int]]  # module → (d_out, d_in)

WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Client:
    """Who is spoken to: its place in the partition and the rank it can train."""

    index: int
    rank: int


@dataclass(frozen=True)
class Tail:
    """A penalty on the last pairs of an adapter: strength · Σ_modules ‖B[:, keep:]‖·‖A[keep:]‖."""

    keep: int
    strength: float


@dataclass(frozen=True, eq=False)
class Sent:
    """What a client starts a round from.

    Attributes
    ----------
    factors : dict of str to (B (d_out, r), A (r, d_in))
        The adapter it trains; its update is ΔW = scaling · B A.
    dense : dict of str to Tensor
        Full parameters that are trained beside it (classifier heads).
    scaling : float
    train : {"both", "A", "B"}
        Which factor learns; the other is frozen and not sent back.
    merged : tuple of dict
        Low-rank pairs (scaling included) that are added to the frozen weights before training,
        the whole history, oldest first. Engines carry only what a client does not hold.
    drawn : int, optional
        The client draws `factors` itself (`draw_factors`) from this seed: they do not travel.
    tail : Tail, optional
    """

    factors: Pairs
    dense: dict[str, Tensor]
    scaling: float
    train: Literal["both", "A", "B"] = "both"
    merged: tuple[Pairs, ...] = ()
    drawn: int | None = None
    tail: Tail | None = None

    @property
    def rank(self) -> int:
        """r of the adapter that is trained."""
        return max(a.shape[0] for _, a in self.factors.values())

    @property
    def about(self) -> dict[str, Any]:
        """What is no tensor, JSON-able."""
        tail = None if self.tail is None else [self.tail.keep, self.tail.strength]
        return {"rank": self.rank, "scaling": self.scaling, "train": self.train,
                "drawn": self.drawn, "tail": tail, "merged": len(self.merged)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reply:
    """What a client learnt: `sent`, trained on `examples` of its own.

    `trust` is what a robust rule multiplies the reply's weight with, `scale` what it has multiplied
    the update in `factors` with (`robust.heed`).
    """

    client: Client
    sent: Sent
    factors: Pairs
    dense: dict[str, Tensor]
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    trust: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, and why as far as it is known."""

    client: Client
    reason: str


def draw_factors(shapes: Shapes, rank: int, seed: int) -> Pairs:
    """Untrained adapters as PEFT starts them: A uniform in ±1/√d_in, B = 0.

    The first r rows of a larger rank are those of rank r: clients of different ranks that draw from
    one seed start from nested adapters.
    """
    out = {}
    for module, (d_out, d_in) in shapes.items():
        a = torch.rand(rank, d_in, generator=torch_stream(seed, "lora_A", module))
        out[module] = (torch.zeros(d_out, rank), (2 * a - 1) / d_in**0.5)
    return out


# --- tensors by name -------------------------------------------------------------------------


def _flat(prefix: str, pairs: Pairs, which: str = "BA") -> dict[str, Tensor]:
    return {
        f"{prefix}/{module}/{side}": x
        for module, pair in pairs.items()
        for side, x in zip("BA", pair, strict=True)
        if side in which
    }


def _pairs(prefix: str, tensors: Mapping[str, Tensor]) -> Pairs:
    start = f"{prefix}/"
    modules = dict.fromkeys(k[len(start) : -2] for k in tensors if k.startswith(start))
    return {m: (tensors[f"{start}{m}/B"], tensors[f"{start}{m}/A"]) for m in modules}


def sent_tensors(sent: Sent) -> dict[str, Tensor]:
    """All tensors of a message to a client by name, those it draws itself left out."""
    out = {} if sent.drawn is not None else _flat("factors", sent.factors)
    out |= {f"dense/{name}": x for name, x in sent.dense.items()}
    for k, pairs in enumerate(sent.merged):
        out |= _flat(f"merged{k}", pairs)
    return out


def held_tensors(sent: Sent) -> dict[str, Tensor]:
    """All tensors a client has after a message, those it drew itself included."""
    return sent_tensors(replace(sent, drawn=None))


def sent_from(tensors: Mapping[str, Tensor], about: Mapping[str, Any], shapes: Shapes) -> Sent:
    """The message again, from `sent_tensors` and ``Sent.about``."""
    drawn = about["drawn"]
    return Sent(
        _pairs("factors", tensors) if drawn is None else draw_factors(shapes, about["rank"], drawn),
        {k.removeprefix("dense/"): x for k, x in tensors.items() if k.startswith("dense/")},
        about["scaling"],
        about["train"],
        tuple(_pairs(f"merged{k}", tensors) for k in range(about["merged"])),
        drawn,
        None if about["tail"] is None else Tail(*about["tail"]),
    )


def reply_tensors(factors: Pairs, dense: Mapping[str, Tensor], train: str) -> dict[str, Tensor]:
    """What a client sends back: the factors it trained and its dense parameters."""
    which = "BA" if train == "both" else train
    return _flat("factors", factors, which) | {f"dense/{name}": x for name, x in dense.items()}


def reply_from(tensors: Mapping[str, Tensor], sent: Sent) -> tuple[Pairs, dict[str, Tensor]]:
    """Factors and dense parameters of a reply; a frozen factor is the one that was sent."""
    factors = _pairs("factors", _flat("factors", sent.factors) | dict(tensors))
    return factors, {k.removeprefix("dense/"): x for k, x in tensors.items() if k[:6] == "dense/"}


# --- precision and bytes on the wire ---------------------------------------------------------


def on_the_wire(sent: Sent, wire: str) -> Sent:
    """The message as it arrives when floats travel as `wire`."""
    if wire == "float32":
        return sent

    def pairs(of: Pairs) -> Pairs:
        return {m: (rounded(b, wire), rounded(a, wire)) for m, (b, a) in of.items()}

    return replace(
        sent,
        factors=sent.factors if sent.drawn is not None else pairs(sent.factors),
        dense={name: rounded(x, wire) for name, x in sent.dense.items()},
        merged=tuple(pairs(p) for p in sent.merged),
    )


def rounded(x: Tensor, wire: str) -> Tensor:
    return x.to(WIRES[wire]).to(x.dtype)


def wire_bytes(tensors: Mapping[str, Tensor], wire: str) -> int:
    """Payload bytes of these tensors on the wire."""
    return sum(x.numel() for x in tensors.values()) * WIRES[wire].itemsize


_digests = WeakTensorKeyDictionary()


def digest(x: Tensor) -> str:
    """Name of a tensor's shape and bits. What a client holds under that name is not sent again."""
    if x not in _digests:
        data = x.detach().contiguous().numpy().tobytes()
        shape = str(tuple(x.shape)).encode()
        _digests[x] = hashlib.blake2b(shape + data, digest_size=16).hexdigest()
    return _digests[x]
