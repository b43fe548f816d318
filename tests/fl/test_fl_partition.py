"""Partitions: disjoint, complete, seeded, and as skewed as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glora_ops.errors import GloraError
from glora_ops.fl.partition import PARTITIONS, counts, split
from glora_ops.fl.pictures import draw_partition

LABELS = np.repeat(np.arange(10), 60)


def skew(labels: np.ndarray, kind: str, clients: int = 10, **settings: float) -> float:
    """Mean total variation distance of a client's labels from everybody's, 0 to 0.9 here."""
    held = counts(split(labels, kind, clients, 0, **settings), labels, 10)
    return float(np.abs(held / held.sum(1, keepdims=True) - 0.1).sum(1).mean() / 2)


@pytest.mark.parametrize("kind", PARTITIONS)
@given(
    seed=st.integers(0, 2**32), clients=st.integers(1, 12), classes=st.integers(1, 6),
    n=st.integers(120, 300), alpha=st.sampled_from([0.01, 0.1, 1.0, 100.0]),
)  # fmt: skip
def test_disjoint_complete_and_seeded(
    kind: str, seed: int, clients: int, classes: int, n: int, alpha: float
) -> None:
    labels = np.random.default_rng(seed).integers(classes, size=n)
    if kind == "task":
        clients = max(clients, len(np.unique(labels)))
    parts = split(labels, kind, clients, seed, alpha=alpha)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert len(parts) == clients
    again = split(labels, kind, clients, seed, alpha=alpha)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if kind == "dirichlet":
        assert min(map(len, parts)) >= 8
    if clients > 1 and kind != "task":
        other = split(labels, kind, clients, seed + 1, alpha=alpha)
        assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_skew_grows_as_alpha_falls() -> None:
    found = [skew(LABELS, "dirichlet", alpha=a) for a in (100.0, 1.0, 0.1, 0.01)]
    assert found == sorted(found)
    assert found[0] < 0.1
    assert found[-1] > 0.7
    assert skew(LABELS, "iid") < 0.2


def test_shards_and_tasks_hold_few_labels() -> None:
    by_shard = counts(split(LABELS, "shard", 10, 0, shards_per_client=2), LABELS, 10)
    assert ((by_shard > 0).sum(1) <= 4).all()
    by_task = counts(split(LABELS, "task", 10, 0), LABELS, 10)
    assert ((by_task > 0).sum(1) == 1).all()
    assert len(set(by_task.argmax(1))) == 10
    shared = counts(split(LABELS, "task", 20, 0), LABELS, 10)
    assert ((shared > 0).sum(0) == 2).all()
    assert (shared.sum(1) == 30).all()


@pytest.mark.parametrize(
    ("kind", "clients", "expected"),
    [("task", 9, "one client per task"), ("dirichlet", 100, "at_least"), ("other", 4, "one of")],
)
def test_impossible_partitions_are_refused(kind: str, clients: int, expected: str) -> None:
    with pytest.raises(GloraError, match=expected):
        split(LABELS, kind, clients, 0)


def test_picture(tmp_path) -> None:  # type: ignore[no-untyped-def]
    held = counts(split(LABELS, "dirichlet", 6, 0, alpha=0.1), LABELS, 10)
    draw_partition(held, tuple("0123456789"), "six clients", tmp_path / "who.png")
    assert (tmp_path / "who.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("kind", "clients"), [("task", 8), ("shard", 600)])
def test_a_client_without_an_example_is_refused(kind: str, clients: int) -> None:
    labels = np.r_[np.zeros(700, int), np.ones(2, int)]
    with pytest.raises(GloraError, match=r"without an example, expected an example for each of"):
        split(labels, kind, clients, 0, at_least=1)
