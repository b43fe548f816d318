"""`glora_ops.ops`: one documented, typed function for every op, and its examples."""

from __future__ import annotations

import doctest
import inspect
from typing import get_type_hints

import pytest
import torch
from glora_ops.bindings.library import OPS

import glora_ops
from glora_ops import ops


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, form = name.partition(".")
    return getattr(getattr(torch.ops.glora, packet), form or "default")


def test_every_op_has_its_function() -> None:
    assert sorted(name.replace(".", "_") for name in OPS) == sorted(ops.__all__)


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_function_takes_what_the_op_takes_and_says_so(name: str) -> None:
    function = getattr(ops, name.replace(".", "_"))
    schema = overload(name)._schema
    taken = inspect.signature(function).parameters
    assert list(taken) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = taken[argument.name].default
        has = argument.has_default_value()
        assert (default is inspect.Parameter.empty) == (not has), argument.name
        assert not has or default == argument.default_value, argument.name
    assert "return" in get_type_hints(function)
    said = function.__doc__
    assert all(part in said for part in ("Parameters", "Returns", "Examples"))


def test_examples_hold() -> None:
    torch.manual_seed(0)
    done = doctest.testmod(ops)
    assert done.attempted > 30
    assert done.failed == 0


def test_functions_are_the_ops_bit_for_bit() -> None:
    torch.manual_seed(0)
    b, a = [torch.randn(6, r) for r in (2, 3)], [torch.randn(r, 5) for r in (2, 3)]
    w, s = torch.tensor([0.7, 0.3]), torch.ones(2)
    plain = torch.ops.glora.aggregate.list(b, a, w, s, 3, basis="update", seed=4)
    ours = glora_ops.ops.aggregate_list(b, a, w, s, 3, basis="update", seed=4)
    assert all(torch.equal(x, y) for x, y in zip(plain, ours, strict=True))
