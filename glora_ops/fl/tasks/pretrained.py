"""transformers models and tokenizers, by name or from a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import GloraError, require
from ..seeds import stream_seed

__all__ = ["batches_by_length", "device_of", "from_pretrained", "pad", "quiet", "tokenizer_of"]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' advice on newly initialised heads, which are meant."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    require(bool(name), "model.name", "''", "a transformers model: a name or a local folder",
            "set it in the configuration or give --model")  # fmt: skip
    with quiet(), _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    require(
        tokenizer.pad_token_id is not None, "model.name", repr(name), "a tokenizer with a pad token"
    )
    return tokenizer


def from_pretrained(
    auto: Any, name: str, seed: int, *, random_weights: bool = False, **settings: Any
) -> nn.Module:
    """``auto.from_pretrained`` in float32; what is drawn (heads, random weights) from `seed`."""
    with quiet(), _explained(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "model"))
        if random_weights:
            from transformers import AutoConfig

            settings.pop("ignore_mismatched_sizes", None)
            config = AutoConfig.from_pretrained(name, **settings)
            return auto.from_config(config).float()
        return auto.from_pretrained(name, dtype=torch.float32, **settings)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise GloraError(
            f"model.name: cannot load {name!r} ({str(error).splitlines()[0]}); expected a model on "
            "the Hub that can be reached, or a local folder with config.json and weights"
        ) from error


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Token lists as one (n, longest) tensor."""
    longest = max(map(len, sequences))
    out = torch.full((len(sequences), longest), value)
    for row, tokens in zip(out, sequences, strict=True):
        if tokens:
            where = slice(longest - len(tokens), None) if left else slice(len(tokens))
            row[where] = torch.tensor(tokens)
    return out


def batches_by_length(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """All rows in batches of like length, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    return [order[k : k + size] for k in range(0, len(order), size)]
