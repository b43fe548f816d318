"""A robust rule on the replies of a round: one verdict per client, before any method combines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..inner_products import check_pairs, of_pairs
from ..robust import judge, say
from .messages import Pairs, Reply
from .methods import Method

__all__ = ["Rule", "heed", "inner"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """A rule of `glora_ops.robust` and how long an update may be, in median norms."""

    name: str
    clip: float


def inner(updates: Sequence[tuple[Pairs, float]]) -> Tensor:
    """(K, K) fp64: inner products of updates s·B·A over all modules, from (pairs, s) of each."""
    check_pairs(len(updates))
    scalings = [s for _, s in updates]
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for m in updates[0][0]:
        total += of_pairs([pairs[m] for pairs, _ in updates], scalings)
    return total


def heed(
    method: Method, rule: Rule | None, replies: Sequence[Reply]
) -> tuple[list[Reply], dict[str, Any] | None]:
    """The replies that `method` combines, trusted and scaled by the rule, and the verdict as JSON.

    What is judged is ``method.update`` of each reply, with ``method.weights``. Clients that are
    left out are logged by name.
    """
    if rule is None:
        return list(replies), None
    names = [f"client {r.client.index}" for r in replies]
    products = inner([method.update(r) for r in replies])
    verdict = judge(rule.name, products, method.weights(replies), rule.clip)
    record = verdict.record(names)
    for text, warning in say(record, names):
        log.log(logging.WARNING if warning else logging.INFO, text)
    heard = [
        replace(
            r,
            factors=r.factors if scale == 1 else method.scaled(r, scale),
            trust=trust,
            scale=scale,
        )
        for r, trust, scale in zip(replies, verdict.trust, verdict.scale, strict=True)
        if trust > 0
    ]
    return heard, record
