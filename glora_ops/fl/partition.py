"""Who holds which training examples. Every partition is a function of labels and a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import require
from .seeds import numpy_stream

__all__ = ["PARTITIONS", "counts", "dirichlet", "iid", "shards", "split", "tasks"]

Rows = list[np.ndarray]


def iid(labels: np.ndarray, clients: int, rng: np.random.Generator) -> Rows:
    """Equal parts of a shuffle."""
    return list(np.array_split(rng.permutation(len(labels)), clients))


def dirichlet(
    labels: np.ndarray, clients: int, rng: np.random.Generator, alpha: float, at_least: int
) -> Rows:
    """Label skew: each class is dealt to the clients in shares drawn from Dirichlet(alpha).

    Hsu et al., "Measuring the effects of non-identical data distribution", arXiv 1909.06335. Small
    alpha: few classes per client. A client below `at_least` examples takes single ones from the
    largest client until it has them, which always succeeds; drawing again (the usual remedy) fails
    for small alpha.
    """
    owner = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).round().astype(int)
        for i, part in enumerate(np.split(rows, cuts)):
            owner[part] = i
    held = np.bincount(owner, minlength=clients)
    while held.min() < at_least:
        poor, rich = int(held.argmin()), int(held.argmax())
        owner[rng.choice(np.flatnonzero(owner == rich))] = poor
        held = np.bincount(owner, minlength=clients)
    return [np.flatnonzero(owner == i) for i in range(clients)]


def shards(labels: np.ndarray, clients: int, rng: np.random.Generator, per_client: int) -> Rows:
    """Examples sorted by label, cut into clients × per_client shards, dealt at random.

    McMahan et al., "Communication-efficient learning of deep networks", arXiv 1602.05629.
    """
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[k] for k in own])) for own in dealt]


def tasks(labels: np.ndarray, clients: int, rng: np.random.Generator) -> Rows:
    """One label (task) per client; with more clients than labels, a label is shared evenly."""
    present = rng.permutation(np.unique(labels))
    require(
        clients >= len(present),
        "clients.count",
        clients,
        f"at least one client per task, {len(present)}",
    )
    mine = [present[i % len(present)] for i in range(clients)]
    out = []
    for i, label in enumerate(mine):
        rows = np.flatnonzero(labels == label)
        share = [k for k, other in enumerate(mine) if other == label]
        out.append(np.array_split(rows, len(share))[share.index(i)])
    return out


def split(
    labels: np.ndarray,
    kind: str,
    clients: int,
    seed: int,
    *,
    alpha: float = 0.3,
    at_least: int = 8,
    shards_per_client: int = 2,
) -> Rows:
    """Rows of each client, disjoint and together all of them.

    Parameters
    ----------
    labels : ndarray (n,) of int
    kind : {"iid", "dirichlet", "shard", "task"}
    clients, seed : int
    alpha, at_least, shards_per_client
        Of the kinds that use them.

    Raises
    ------
    GloraError
        If there are too few examples, or fewer clients than tasks.
    """
    require(
        len(labels) >= clients * at_least,
        "clients",
        f"{clients} for {len(labels)} examples",
        f"at least {at_least} examples for each",
        "fewer clients, or a smaller clients.at_least",
    )
    rng = numpy_stream(seed, "partition", kind)
    choose: dict[str, Callable[[], Rows]] = {
        "iid": lambda: iid(labels, clients, rng),
        "dirichlet": lambda: dirichlet(labels, clients, rng, alpha, at_least),
        "shard": lambda: shards(labels, clients, rng, shards_per_client),
        "task": lambda: tasks(labels, clients, rng),
    }
    require(kind in choose, "clients.partition", repr(kind), f"one of {PARTITIONS}")
    parts = choose[kind]()
    least = min(map(len, parts))
    require(least > 0, "clients", f"{sum(len(rows) == 0 for rows in parts)} without an example",
            f"an example for each of {clients}",
            "fewer clients, or fewer clients.shards_per_client")  # fmt: skip
    return parts


PARTITIONS = ("iid", "dirichlet", "shard", "task")


def counts(parts: Rows, labels: np.ndarray, classes: int) -> np.ndarray:
    """(clients, classes): how many examples of each label a client holds."""
    return np.stack([np.bincount(labels[rows], minlength=classes) for rows in parts])
