"""Natural Instructions: follow a definition, answer in text; seen and unseen tasks.

The prompt is upstream's (Tk-Instruct, definition only): the definition, then "Now complete the
following example -", input, and "Output: ". The score is the largest Rouge-L over the references.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import require
from ..config import Config
from .base import Answer, HeldOut, Judged, half
from .glue import sample
from .jsonl import from_hub, is_text, read_jsonl
from .metrics import exact_match, rouge_l
from .pretrained import batches_by_length, device_of, from_pretrained, pad, tokenizer_of

__all__ = ["SuperNI", "prompt"]

HUB = "Muennighoff/natural-instructions"
EVALUATION_BATCH = 16  # prompts at a time; why: memory, they are long
IGNORED = -100  # why: the label that PyTorch's cross entropy leaves out
HALVES: tuple[HeldOut, ...] = ("validation", "test")
Instance = dict[str, Any]  # task, definition, input, outputs


def prompt(definition: str, text: str) -> tuple[str, str, str]:
    """Head, input and tail of an instruction; only the input is shortened to fit."""
    return (
        f"Definition: {_ended(definition.strip())}\n\n"
        "Now complete the following example -\nInput: ",
        _ended(text.strip()),
        "\nOutput: ",
    )


def _ended(text: str) -> str:
    return text if text[-1:] in string.punctuation and text else text + "."


class SuperNI:
    """Training tasks (a task is a client's label) and held-out ones, on any causal or
    encoder-decoder language model.

    Evaluated: ``rouge_l_unseen`` (headline) and ``exact_match_unseen`` on held-out tasks,
    ``rouge_l_seen`` on instances of the training tasks that are kept out of training; means over
    tasks, and each held-out task by its name.
    """

    def __init__(
        self, config: Config, seed: int, data_dir: Path | None, held_out: HeldOut = "test"
    ) -> None:
        self.config, self._seed = config, seed
        train, unseen = (_read(part, data_dir) for part in ("train", "heldout"))
        self._tokenizer = tokenizer_of(config.model.name)
        t = config.task
        chosen_tasks = sample(list(train), t.max_tasks, seed, "tasks")
        train = {name: train[name] for name in chosen_tasks}
        self.label_names = tuple(train)
        self._train: list[Instance] = []
        self._seen: list[Instance] = []
        labels = []
        for k, (name, instances) in enumerate(train.items()):
            seen, rest = self._split(name, instances, held_out)
            mine = sample(rest, t.max_train, seed, "train", name)
            self._seen += sample(seen, t.max_eval, seed, "seen-eval", name)
            self._train += mine
            labels += [k] * len(mine)
        if config.sweep.lrs:
            unseen = {name: half(xs, held_out, name) for name, xs in unseen.items()}
        self._unseen = [
            x for name, xs in unseen.items() for x in sample(xs, t.max_eval, seed, "eval", name)
        ]
        self.labels = np.array(labels)
        self.metric = "rouge_l_unseen" if self._unseen else "rouge_l_seen"
        self.targets = tuple(config.model.targets)
        self.heads: tuple[str, ...] = ()
        self._encoder_decoder = bool(getattr(self.model().config, "is_encoder_decoder", False))
        self._x = [self._source(x) for x in self._train]
        self._y = [self._target(x["outputs"][0]) for x in self._train]

    def _split(
        self, name: str, instances: list[Instance], held_out: HeldOut
    ) -> tuple[list[Instance], list[Instance]]:
        """What is judged on, and what may be trained on.

        With a sweep as many are held back for it as for the runs, and neither are ever trained on:
        what a client holds does not depend on what the server judges.
        """
        fraction = self.config.task.seen_fraction
        if not fraction:
            return [], instances
        sweeps = bool(self.config.sweep.lrs)
        pools = {p: half(instances, p, name) for p in HALVES} if sweeps else {held_out: instances}
        size = max(1, round(fraction * len(instances) / len(pools)))
        seen = {p: sample(pool, size, self._seed, "seen", name) for p, pool in pools.items()}
        chosen = {id(x) for xs in seen.values() for x in xs}
        rest = [x for x in instances if id(x) not in chosen]
        require(bool(rest), f"instances of {name}", len(instances),
                "more than are held back to evaluate", "a smaller task.seen_fraction")  # fmt: skip
        return seen[held_out], rest

    def model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        name = self.config.model.name
        encoder_decoder = AutoConfig.from_pretrained(name).is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        return from_pretrained(
            auto, name, self._seed, random_weights=self.config.model.random_weights
        )

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        sources, targets = [self._x[i] for i in rows], [self._y[i] for i in rows]
        if not self._encoder_decoder:  # only the answer counts
            labels = [[IGNORED] * len(x) + y for x, y in zip(sources, targets, strict=True)]
            sources = [x + y for x, y in zip(sources, targets, strict=True)]
        else:
            labels = targets
        device = device_of(model)
        return model(
            input_ids=pad(sources, self._tokenizer.pad_token_id).to(device),
            attention_mask=pad([[1] * len(x) for x in sources], 0).to(device),
            labels=pad(labels, IGNORED).to(device),
        ).loss

    def evaluate(self, model: nn.Module) -> Judged:
        out: dict[str, float] = {}
        all_answers: list[Answer] = []
        known = {name: k for k, name in enumerate(self.label_names)}
        for part, instances in (("seen", self._seen), ("unseen", self._unseen)):
            if not instances:
                continue
            answers = self._answers(model, instances)
            scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for x, answer in zip(instances, answers, strict=True):
                score = rouge_l(answer, x["outputs"]), exact_match(answer, x["outputs"])
                scores[x["task"]].append(score)
                label = known.get(x["task"]) if part == "seen" else None
                all_answers.append(Answer(x["id"], answer, x["outputs"], score[0], label))
            means = {name: np.mean(values, axis=0) for name, values in scores.items()}
            both = np.mean(list(means.values()), axis=0)
            out |= {f"rouge_l_{part}": float(both[0]), f"exact_match_{part}": float(both[1])}
            if part == "unseen":
                out |= {f"rouge_l_unseen/{name}": float(m[0]) for name, m in means.items()}
        return Judged(out, all_answers)

    def _answers(self, model: nn.Module, instances: Sequence[Instance]) -> list[str]:
        """Greedy answers, up to the end token or `max_new_tokens`."""
        sources = [self._source(x) for x in instances]
        answers = [""] * len(instances)
        tokenizer = self._tokenizer
        for rows in batches_by_length(list(map(len, sources)), EVALUATION_BATCH):
            tokens = [sources[i] for i in rows]
            ids = pad(tokens, tokenizer.pad_token_id, left=not self._encoder_decoder)
            mask = pad([[1] * len(t) for t in tokens], 0, left=not self._encoder_decoder)
            with torch.no_grad():
                made = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device_of(model)),
                    attention_mask=mask.to(device_of(model)),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.config.task.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
            if not self._encoder_decoder:
                made = made[:, ids.shape[1] :]
            for i, text in zip(
                rows, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True
            ):
                answers[i] = text.strip()
        return answers

    def _source(self, x: Instance) -> list[int]:
        """Tokens of the instruction, at most max_length; first the input is cut, then the head."""
        head, middle, tail = (
            self._tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in prompt(x["definition"], x["input"])
        )
        end = [self._tokenizer.eos_token_id] if self._encoder_decoder else []
        room = self.config.task.max_length - len(tail) - len(end)
        head = head[: max(room * 3 // 4, room - len(middle))]
        return head + middle[: max(0, room - len(head))] + tail + end

    def _target(self, output: str) -> list[int]:
        tokens = self._tokenizer(output, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        kept = tokens[: self.config.task.max_length]
        return kept if end is None else [*kept, end]


def _read(part: str, data_dir: Path | None) -> dict[str, list[Instance]]:
    """Instances by task, tasks in the order of their names."""
    by_task: dict[str, list[Instance]] = defaultdict(list)
    if data_dir is None:
        whole: dict[str, Instance] = {}
        for row in from_hub(HUB, split="train" if part == "train" else "test"):
            key = row["id"]
            if key not in whole:
                whole[key] = {"id": key, "task": row["task_name"], "definition": row["definition"],
                              "input": row["inputs"], "outputs": []}  # fmt: skip
            whole[key]["outputs"].append(row["targets"])
        rows: list[Instance] = list(whole.values())
    else:
        folder = data_dir / "superni" / part
        files = sorted(folder.glob("*.jsonl"))
        require(
            bool(files) or part != "train", "data", f"{folder} without a .jsonl file",
            "one file per task", "give --data-dir DIR with superni/train/*.jsonl",
        )  # fmt: skip
        rows = [row for path in files for row in read_jsonl(path, _problem)]
    for row in rows:
        mine = by_task[row["task"]]
        mine.append({"id": f"{row['task']}:{len(mine)}", **row})
    return dict(sorted(by_task.items()))


def _problem(row: Mapping[str, Any]) -> str:
    for key in ("task", "definition", "input"):
        if not is_text(row.get(key)):
            return f"{key} must be text"
    outputs = row.get("outputs")
    if not isinstance(outputs, list) or not outputs or not all(map(is_text, outputs)):
        return "outputs must be a list of at least one text"
    return ""
