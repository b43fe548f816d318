"""Inputs made odd: values of a structure, lines of a text, bytes of a file."""

from __future__ import annotations

import json
import random
import struct
from copy import deepcopy
from typing import Any

DEEP = "\x00deep\x00"  # stands for lists in each other, which no JSON library would write
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), 2**31,
    2**63, 10**30, 10**400, "", "x", "x" * 3000, "$\\frac{$", "\ud800", "a\nb", "\x1b[2J",
    "../../x", "/dev/zero", [], {}, [[]], {"": {}}, [1, 2, 3], [0] * 70, [True, 2], {"a": 1}, DEEP,
]  # fmt: skip
LITERALS = [
    "", "1", "-1", "0", "1e999", "nan", "inf", "true", '""', '"x"', "[]", "{}", "[1, [2]]",
    "1979-05-27", '"$\\\\frac{$"', "{a.b.c = 1}", "[" * 500, "9" * 5000, "99999999999",
    '"' + "x" * 500 + '"',
    ".".join("a" * 60) + " = 1", "\x00", "'\ud800'",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a structure."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        at = todo.pop()
        keys: Any = at.keys() if isinstance(at, dict) else range(len(at))
        for key in list(keys):
            found.append((at, key))
            if isinstance(at[key], (dict, list)):
                todo.append(at[key])
    return found


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of JSON `value` with up to three changes."""
    value = deepcopy(value)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.02:
            return deepcopy(rng.choice(ODD))
        at, key = rng.choice(places(value))
        kind = rng.random()
        if kind < 0.55:
            at[key] = deepcopy(rng.choice(ODD))
        elif kind < 0.7:
            del at[key]
        elif kind < 0.8 and isinstance(at, dict):
            at[str(rng.choice(ODD))[:600]] = at[key]
        elif kind < 0.9:
            other, its = rng.choice(places(value))
            at[key] = deepcopy(other[its])
        elif isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
            at[key] = rng.choice((at[key] + 1, -at[key], at[key] * 10**6, str(at[key])))
        else:
            at[key] = [at[key]]
    return value


def as_json(value: Any, rng: random.Random) -> bytes:
    """A structure as text, now and then damaged."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    depth = rng.choice((20, 33, 500, 5000))
    text = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    return damaged(text.encode("utf-8", "surrogatepass"), rng, 0.15)


def damaged(content: bytes, rng: random.Random, probability: float) -> bytes:
    """Bytes cut off, changed, put in, repeated; with this probability."""
    if rng.random() >= probability:
        return content
    at = rng.randrange(len(content) + 1)
    return rng.choice((
        content[:at],
        content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        content[:at] + rng.choice((b"\xff", b"\x00", b"[" * 3000, b'{"a":' * 3000, b'"', b"NaN,"))
        + content[at:],
        content[:at] + content[at // 2 :],
        b"",
    ))  # fmt: skip


def safetensors(header: Any, data: bytes, rng: random.Random) -> bytes:
    """A safetensors file of this header, whose length is now and then a lie."""
    text = as_json(header, rng)
    length = (
        len(text) if rng.random() < 0.95 else rng.choice((0, 1, len(text) + 7, 2**63, 2**64 - 1))
    )
    return struct.pack("<Q", length) + text + damaged(data, rng, 0.15)


def parted(content: bytes) -> tuple[Any, bytes]:
    """Header and data of a sound safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def mutated_toml(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key, sign, _ = lines[at].partition("=")
        kind = rng.random()
        if kind < 0.6 and sign:
            lines[at] = f"{key}= {rng.choice(LITERALS)}"
        elif kind < 0.7:
            del lines[at : at + 1]
        elif kind < 0.8:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind < 0.9:
            lines[at] = rng.choice(("[methods.x]", "[clients]", "[a.b]", "[[methods]]", "odd = 1"))
        else:
            lines[at] = rng.choice(LITERALS)
        lines = lines or [""]
    return damaged("\n".join(lines).encode("utf-8", "surrogatepass"), rng, 0.1)
