"""How an op is declared: one class, from which torch gets its schema, its fake and its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from glora_ops.errors import GloraError
from glora_ops.linalg.vocabulary import Vocabulary
from glora_ops.runtime.threads import exact_products, one_thread

from . import checks

__all__ = ["OPS", "Op", "Ops", "Outputs", "Tensors", "register", "schema"]

LIBRARY = torch.library.Library("glora", "DEF")
#: Every op, by the name torch knows it by.
OPS: dict[str, type[Op]] = {}

Tensors = tuple[Tensor, ...]
#: (shape without the module dimension, dtype) of every output.
Outputs = tuple[tuple[tuple[int | torch.SymInt, ...], torch.dtype], ...]


class Op(ABC):
    """A call of an op, its arguments bound by name and checked.

    `schema` makes an op of a subclass, which says how its metadata are checked, what comes out,
    and how it is computed in any vocabulary. Arguments that have a default have it as a class
    attribute too.
    """

    name: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]

    # The arguments of all ops: a name means the same in each of them (docs/ops.md).
    b: Tensor
    a: Tensor
    x: Tensor
    lora_B: list[Tensor]
    lora_A: list[Tensor]
    offsets: Tensor
    weights: Tensor
    scaling: Any  # a Tensor, one per client; of `readout` a float
    t: Tensor
    row_weights: Tensor
    omega: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    rank: int
    max_rank: int
    basis: str
    tau_rel: float
    anchor: float
    oversample: int
    power_iters: int
    tol: float
    extra: Tensor | None
    warm: Tensor | None
    warm_u: Tensor | None
    warm_v: Tensor | None
    pad: str
    seed: int
    client_statistics: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The dispatcher has checked names and types, and leaves out what equals its default.
        vars(self).update(zip(self.arguments, args, strict=False), **kwargs)
        self.check()
        checks.numbers(self)

    @abstractmethod
    def check(self) -> None:
        """Raise `GloraError` for what does not fit; values of tensors are not looked at."""

    @abstractmethod
    def outputs(self) -> Outputs:
        """What comes out, from metadata alone."""

    @abstractmethod
    def body(self, device: Ops) -> Tensors:
        """Every output, with a module dimension, where the caller left it out too."""

    @property
    def leading(self) -> Tensor:
        """The first tensor: it has a module dimension if the call has one."""
        first = getattr(self, self.arguments[0])
        return first if isinstance(first, Tensor) else first[0]

    @classmethod
    def run(cls, device: Ops, *args: Any, **kwargs: Any) -> Tensor | Tensors:
        """Check and compute."""
        call = cls(*args, **kwargs)
        out = call.body(device)
        return _returned(out if call.leading.dim() == 3 else [x[0] for x in out])

    @classmethod
    def refuse_gradients(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `GloraError` where a gradient would be expected."""
        if torch.is_grad_enabled() and any(map(_requires_grad, (*args, *kwargs.values()))):
            raise GloraError(
                f"torch.ops.glora.{cls.name}: got an input that requires grad, expected none; "
                "aggregation is not differentiable, so detach the factors first "
                "(glora_ops.aggregate does)"
            )

    @classmethod
    def fake(cls, *args: Any, **kwargs: Any) -> Tensor | Tensors:
        """Check and describe."""
        cls.refuse_gradients(args, kwargs)
        call = cls(*args, **kwargs)
        empty, modules = call.leading.new_empty, call.leading.shape[:-2]
        return _returned([empty((*modules, *shape), dtype=x) for shape, x in call.outputs()])


def _returned(out: Sequence[Tensor]) -> Tensor | Tensors:
    return out[0] if len(out) == 1 else tuple(out)


def _requires_grad(x: Any) -> bool:
    if isinstance(x, list):
        return any(map(_requires_grad, x))
    return isinstance(x, Tensor) and x.requires_grad


class Ops:
    """A device: every op over its vocabulary, as ``Ops(v).projector_matmul_factors(…)``.

    Parameters
    ----------
    fixed_steps : bool
        Whether `aggregate` with a fixed number of power steps looks at no value.
    """

    def __init__(self, v: Vocabulary, fixed_steps: bool = False) -> None:
        self.v = v
        self.fixed_steps = fixed_steps
        for name, op in OPS.items():
            setattr(self, name.replace(".", "_"), partial(op.run, self))


AnyOp = TypeVar("AnyOp", bound=Op)


def schema(text: str) -> Callable[[type[AnyOp]], type[AnyOp]]:
    """Define the op of this schema and its fake, as the class says."""

    def define(op: type[AnyOp]) -> type[AnyOp]:
        LIBRARY.define(text)
        op.name = text.partition("(")[0]
        packet, _, form = op.name.partition(".")
        overload = getattr(getattr(torch.ops.glora, packet), form or "default")
        op.arguments = tuple(x.name for x in overload._schema.arguments)
        for x in overload._schema.arguments:
            if x.has_default_value():
                setattr(op, x.name, x.default_value)
        torch.library.register_fake(f"glora::{op.name}", op.fake, lib=LIBRARY)
        LIBRARY.impl(op.name, torch.library.fallthrough_kernel, "Autograd")
        OPS[op.name] = op
        return op

    return define


def register(device: Callable[[], Ops], key: str) -> None:
    """Bind every op to a dispatch key, run in isolation, outputs contiguous.

    `device` is called when an op is: its imports wait for its first tensor.
    """
    for op in OPS.values():
        LIBRARY.impl(op.name, _isolated(op, device), key)


def _isolated(op: type[Op], device: Callable[[], Ops]) -> Callable[..., Tensor | Tensors]:
    def run(*args: Any, **kwargs: Any) -> Tensor | Tensors:
        op.refuse_gradients(args, kwargs)
        with exact_products(), one_thread():
            out = op.run(device(), *args, **kwargs)
        return out.contiguous() if isinstance(out, Tensor) else tuple(x.contiguous() for x in out)

    return run
