"""rank_pattern and alpha_pattern: PEFT's choices, at a cost that no client can raise."""

from __future__ import annotations

import json
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from adapter_folders import CONFIG, TENSORS, refused
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from glora_ops.adapters import read_adapter
from glora_ops.adapters.patterns import MAX_STEPS, PatternError, Patterns

WITHIN = [*"ab01.-_é]}", r"\d", r"\w", r"\s", r"\D", r"\W", r"\.", r"\-", "^", "$", r"\A", r"\Z"]
MEMBERS = ["a", "b", "0-9", "a-c", "]", "-", r"\d", r"\.", "^", "_", "é"]
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "{0}", "*?", "+?", "??", "{1,3}?"]
BROKEN = ["(", ")", "[", "{", "**", "{2,1}", "*+", "{}", r"\b", r"\1", "(?i)", "(?!a)", "(?P<n>a)"]


def drawn_choice(rng: random.Random, depth: int = 0) -> str:
    return "|".join(drawn_row(rng, depth) for _ in range(rng.choice([1, 1, 1, 2, 3])))


def drawn_row(rng: random.Random, depth: int) -> str:
    return "".join(drawn_piece(rng, depth) for _ in range(rng.randint(0, 3)))


def drawn_piece(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(BROKEN)
    if kind < 0.55:
        piece = rng.choice(WITHIN)
    elif kind < 0.75 or depth == 4:
        inner = "".join(rng.choice(MEMBERS) for _ in range(rng.randint(1, 3)))
        piece = f"[{rng.choice(['', '^'])}{inner}]"
    else:
        piece = rng.choice(["(", "(?:"]) + drawn_choice(rng, depth + 1) + ")"
    return piece + (rng.choice(REPEATS) if rng.random() < 0.35 else "")


def drawn_name(rng: random.Random) -> str:
    return "".join(rng.choice("aab01..-_éc]}") for _ in range(rng.randint(0, 9)))


def test_what_is_accepted_speaks_of_the_modules_that_peft_says() -> None:
    """Tables of drawn patterns against PEFT's own look-up; short names, so that `re` ends."""
    rng, accepted = random.Random(5), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, on -- or && in a class
        for _ in range(1800):
            table = list(dict.fromkeys(drawn_choice(rng) for _ in range(rng.randint(1, 3))))
            try:
                patterns = Patterns(table)
            except PatternError:
                continue
            accepted += 1
            for name in (drawn_name(rng) for _ in range(8)):
                first = patterns.first(name)
                theirs = next(
                    (i for i, p in enumerate(table) if re.match(rf"(.*\.)?({p})$", name)), None
                )
                assert first == theirs, (table, name)
                if first is not None:
                    assert get_pattern_key(table, name) == table[first]
    assert accepted > 1000


@pytest.mark.parametrize("pattern", BROKEN)
def test_patterns_outside_the_grammar_are_named(pattern: str) -> None:
    with pytest.raises(PatternError, match=re.escape(repr("a" + pattern))):
        Patterns(["q", "a" + pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "(" * 10 + "a" + ")*" * 10,
        "|".join(["(a|a)*"] * 150) + "b",
        "(a|aa)+" * 40,
        ".*" * 300 + "!",
    ],
    ids=["nested", "choices", "overlapping", "stars"],
)
def test_a_name_costs_its_length_times_the_pattern(pattern: str) -> None:
    patterns = Patterns([pattern])
    assert patterns._count <= 3 * len(pattern)
    built = patterns._steps
    patterns.first("a" * 500)
    assert patterns._steps - built <= 500 * 4 * patterns._count


@pytest.mark.parametrize(
    "pattern",
    ["((a{1000}){1000}){1000}", "(" + "|" * 100_000 + "){999}", "a" * 10**6, "(" * 10**5],
    ids=["counts", "empty", "long", "deep"],
)
def test_what_would_be_too_large_is_refused_while_it_is_built(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glora_ops.adapters.patterns.MAX_STEPS", 10**6)
    with pytest.raises(PatternError, match=r"states|steps|groups") as caught:
        Patterns([pattern])
    assert len(str(caught.value)) < 200


def test_full_names_of_a_large_model_fit() -> None:
    names = [f"model.layers.{l}.mlp.experts.{e}.{side}_proj"
             for l in range(60) for e in range(64) for side in ("gate", "up", "down")]  # fmt: skip
    patterns = Patterns(names)
    assert [patterns.first(name) for name in names] == list(range(len(names)))
    assert patterns._steps < MAX_STEPS / 3


def test_folders_with_patterns_that_would_never_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is a page long is read at once; many of them that all names have to walk are not."""
    monkeypatch.setattr("glora_ops.adapters.patterns.MAX_STEPS", 2 * 10**6)
    long = "a." * 200 + "b"
    pair = {"lora_A": torch.ones(1, 8), "lora_B": torch.ones(8, 1)}
    save_file({f"base_model.model.{long}{i}.{k}.weight": x.clone() for i in range(2)
               for k, x in pair.items()}, tmp_path / TENSORS)  # fmt: skip

    def configured(patterns: list[str]) -> None:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1,
                  "alpha_pattern": dict.fromkeys(patterns, 2.0)}  # fmt: skip
        (tmp_path / CONFIG).write_text(json.dumps(config))

    page = "(a|a.|.a)*" * 130 + "!"
    configured([page, r".*b\d"])
    assert {m.scaling for m in read_adapter(tmp_path).modules.values()} == {2.0}
    configured([f"{page}{i}" for i in range(40)])
    refused(tmp_path, TENSORS, "take too long to follow", "limit of", "in full")
    configured(["x", "(?=a)a"])
    refused(tmp_path, CONFIG, "alpha_pattern = '(?=a)a': a (? that is no (?:", "in full")
