"""GLUE, or any classification or regression of sentences and pairs in the same JSONL layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TaskWarning, require
from ..config import Config
from ..seeds import numpy_stream
from .base import Answer, HeldOut, Judged, half
from .jsonl import from_hub, is_text, read_jsonl
from .metrics import classification, correlation
from .pretrained import batches_by_length, device_of, from_pretrained, quiet, tokenizer_of

__all__ = ["Glue"]

#: Columns of the Hub's data set where they are not sentence1, sentence2.
COLUMNS = {
    "sst2": ("sentence",),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
}
HUB = "nyu-mll/glue"
EVALUATION_BATCH = 64  # examples at a time; why: memory, no result depends on it
LARGEST = 1e15  # a label beyond it is a mistake
BINS = 5  # of a regression's labels, for partitions


class Glue:
    """One GLUE task on a sequence classifier; its head is trained and averaged in full.

    Labels that are whole numbers, 1 or 1.0, are classes (as many as the training data have); with a
    fraction among them, and for stsb, it is a regression, which starts at the labels' mean. The
    headline metric is accuracy, for cola mcc, for a regression the mean of Pearson's and Spearman's
    correlation.
    """

    def __init__(
        self, config: Config, seed: int, data_dir: Path | None, held_out: HeldOut = "test"
    ) -> None:
        self.config, self._seed = config, seed
        name = config.task.name
        train, dev = (_read(name, split, data_dir) for split in ("train", "dev"))
        dev = [{**row, "line": n} for n, row in enumerate(dev, 1)]
        labels = [
            row["label"] for row in train + dev
        ]  # those of a sample may all happen to be whole
        self.regression = name == "stsb" or any(label % 1 for label in labels)
        self._outputs = 1 if self.regression else _classes(name, train, dev)
        if config.sweep.lrs:
            dev = half(dev, held_out)
        train = sample(train, config.task.max_train, seed, "train")
        dev = sample(dev, config.task.max_eval, seed, "dev")
        require(not self.regression or len(dev) > 1, f"{name}.dev", f"{len(dev)} example",
                "two or more, for a correlation")  # fmt: skip
        self._tokenizer = tokenizer_of(config.model.name)
        kind = float if self.regression else int
        self._x, self._y = self._tokens(train), np.array([kind(row["label"]) for row in train])
        self._dev_x, self._dev_y = self._tokens(dev), np.array([kind(row["label"]) for row in dev])
        self._dev_ids = [row["line"] for row in dev]
        if self.regression:
            edges = np.unique(np.quantile(self._y, np.linspace(0, 1, BINS + 1)[1:-1]))
            self.labels = np.searchsorted(edges, self._y)
            self._dev_labels = np.searchsorted(edges, self._dev_y)
            self.label_names = (*(f"≤ {edge:g}" for edge in edges), f"> {edges[-1]:g}")
        else:
            self.labels, self._dev_labels = self._y, self._dev_y
            self.label_names = tuple(map(str, range(self._outputs)))
        self.metric = "correlation" if self.regression else "mcc" if name == "cola" else "accuracy"
        self.targets = tuple(config.model.targets)
        model = self.model()
        stem = getattr(model, "base_model_prefix", "")
        self.heads = tuple(
            name
            for name, child in model.named_children()
            if name != stem and next(child.parameters(), None) is not None
        )

    def model(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model = from_pretrained(
            AutoModelForSequenceClassification,
            self.config.model.name,
            self._seed,
            random_weights=self.config.model.random_weights,
            num_labels=self._outputs,
            ignore_mismatched_sizes=True,  # a head for other labels is drawn anew
        )
        model.config.pad_token_id = self._tokenizer.pad_token_id  # type: ignore[union-attr]
        if self.regression:
            self._start_at_the_mean(model)
        return model

    def _start_at_the_mean(self, model: nn.Module) -> None:
        """The last bias begins at the labels' mean, which is one number from each client.

        An architecture whose last layer has no bias begins where it is.
        """
        last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if last and last[-1].bias is not None:
            last[-1].bias.data.fill_(float(self._y.mean()))

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        logits = self._logits(model, self._x, rows)
        y = torch.as_tensor(self._y[rows], device=logits.device)
        if self.regression:
            return torch.nn.functional.mse_loss(logits[:, 0], y.to(logits.dtype))
        return torch.nn.functional.cross_entropy(logits, y)

    def evaluate(self, model: nn.Module) -> Judged:
        logits = torch.empty(len(self._dev_y), self._outputs)
        lengths = [len(tokens) for tokens in self._dev_x["input_ids"]]
        with torch.no_grad():
            for rows in batches_by_length(lengths, EVALUATION_BATCH):
                logits[rows] = self._logits(model, self._dev_x, rows).cpu()
        if self.regression:
            found = logits[:, 0].numpy()
            metrics, scores = correlation(self._dev_y, found), -((found - self._dev_y) ** 2)
        else:
            truth, found = torch.as_tensor(self._dev_y), logits.argmax(1).numpy()
            metrics = classification(self._dev_y, found, self._outputs)
            metrics["loss"] = float(torch.nn.functional.cross_entropy(logits, truth))
            scores = (found == self._dev_y).astype(float)
        columns = (found, self._dev_y, scores, self._dev_labels)
        rows_of = zip(self._dev_ids, *(x.tolist() for x in columns), strict=True)
        return Judged(metrics, [Answer(*x) for x in rows_of])

    def _logits(self, model: nn.Module, x: Mapping[str, Any], rows: np.ndarray) -> Tensor:
        batch = {key: [values[i] for i in rows] for key, values in x.items()}
        with quiet():
            padded = self._tokenizer.pad(batch, return_tensors="pt")
        return model(**padded.to(device_of(model))).logits

    def _tokens(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        first = [row["sentence1"] for row in rows]
        pairs = sum("sentence2" in row for row in rows)
        require(pairs in (0, len(rows)), "sentence2", f"{pairs} of {len(rows)} lines with one",
                "all lines, or none")  # fmt: skip
        second = [row["sentence2"] for row in rows] if pairs else None
        length = self.config.task.max_length
        return dict(self._tokenizer(first, second, truncation=True, max_length=length))


def sample(rows: list[Any], size: int, seed: int, *name: object) -> list[Any]:
    """At most `size` rows, drawn without replacement and kept in order; all where size is 0."""
    if size == 0 or size >= len(rows):
        return rows
    chosen = numpy_stream(seed, "sample", *name).choice(len(rows), size=size, replace=False)
    return [rows[i] for i in sorted(chosen)]


def _classes(
    name: str, train: Sequence[Mapping[str, Any]], dev: Sequence[Mapping[str, Any]]
) -> int:
    """How many classes there are, by the training data."""
    own, others = ([row["label"] for row in rows] for rows in (train, dev))
    count = int(max(own)) + 1
    least = min(own + others)
    require(least >= 0, f"labels of {name}", least, "classes 0, 1, …, or a fraction among them")
    require(count > 1, f"labels of {name}", "only 0", "at least two classes")
    require(count <= len(own), f"{name}.train", f"label {count - 1} and {len(own)} examples",
            "classes 0, 1, …, fewer than there are examples")  # fmt: skip
    require(max(others) < count, f"{name}.dev", f"label {max(others)}",
            f"labels of the training data, 0…{count - 1}")  # fmt: skip
    if any(isinstance(label, float) for label in own):
        warnings.warn(f"labels of {name} are whole numbers written as decimals: taken as {count} "
                      "classes, not as a regression", TaskWarning, stacklevel=2)  # fmt: skip
    return count


def _read(name: str, split: str, data_dir: Path | None) -> list[dict[str, Any]]:
    if data_dir is not None:
        return read_jsonl(data_dir / "glue" / f"{name}.{split}.jsonl", _problem)
    part = "train" if split == "train" else "validation_matched" if name == "mnli" else "validation"
    columns = COLUMNS.get(name, ("sentence1", "sentence2"))
    return [
        {f"sentence{k}": row[c] for k, c in enumerate(columns, 1)} | {"label": row["label"]}
        for row in from_hub(HUB, name, split=part)
    ]


def _problem(row: Mapping[str, Any]) -> str:
    label = row.get("label")
    if not is_text(row.get("sentence1")) or not is_text(row.get("sentence2", "")):
        return "sentence1 (and sentence2, if there is one) must be text"
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not abs(label) < LARGEST:
        return f"label must be a number below {LARGEST:g}"
    return ""
