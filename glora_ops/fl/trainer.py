"""A client: one PEFT model that trains whatever it is sent. It knows nothing of methods.

`Trainer.train` is a pure function of the message, the client's rows, the round and the client's
own state; everything random is drawn from streams named after round and client.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import GloraError, require, unfit
from .gauge import regauge, turned
from .messages import Client, Pairs, Sent, digest
from .seeds import numpy_stream, stream_seed
from .tasks import Task
from .tasks.base import Judged

__all__ = ["ClientState", "Learnt", "LocalTraining", "Trainer"]

#: What a client keeps between rounds: optimiser moments by parameter and, under `START`, the
#: factors they began at; empty when they are reset.
ClientState = dict[str, Tensor]
START = "start"


@dataclass(frozen=True)
class LocalTraining:
    """How every client trains; see `glora_ops.fl.config.Training` for the fields."""

    steps: int
    batch: int
    lr: float
    head_lr: float | None = None
    optimiser: Literal["adamw", "sgd"] = "adamw"
    optimiser_state: Literal["reset", "keep"] = "reset"
    weight_decay: float = 0.0
    clip: float = 1.0
    dropout: float = 0.0
    gauge: float = 1.0
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Learnt:
    """What came out of local training."""

    factors: Pairs
    dense: dict[str, Tensor]
    examples: int
    metrics: dict[str, float]
    state: ClientState


class Trainer:
    """The task's base model under PEFT, with one LoRA adapter per rank that was asked for.

    One trainer serves any number of clients one after the other; nothing of a message remains in it
    but cached sums of merged pairs.
    """

    def __init__(self, task: Task, how: LocalTraining) -> None:
        self.task, self.how = task, how
        try:
            base = task.model().to(how.device)
        except (AssertionError, RuntimeError) as error:  # torch names what it lacks
            why = str(error).splitlines()[0]
            raise unfit("model.device", f"{how.device!r} ({why})", "a device torch has here",
                        "cpu always works") from None  # fmt: skip
        # Parameters by name, before PEFT renames them.
        self._dense = {
            name: p
            for name, p in base.named_parameters()
            if any(name == h or name.startswith(f"{h}.") for h in task.heads)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._model: PeftModel = get_peft_model(base, self._config(1, 1.0), "r1")
            except ValueError as error:
                raise GloraError(
                    f"model.targets: got {list(task.targets)}, expected names of linear modules of "
                    f"the {type(base).__name__} ({error})"
                ) from None
        self._scaling = {1: 1.0}
        self._layers: dict[str, Any] = {
            name.removeprefix("base_model.model."): layer
            for name, layer in self._model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        for name, layer in self._layers.items():
            require(
                "r1" in layer.lora_A and isinstance(layer.lora_A["r1"], nn.Linear),
                "targets",
                f"{name}, a {type(layer.get_base_layer()).__name__}",
                "linear modules",
                "name other modules in model.targets",
            )
        self._merged: tuple[Pairs, ...] = ()
        self._frozen: dict[str, Tensor] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Adapted modules: (d_out, d_in)."""
        return {
            name: (layer.lora_B["r1"].weight.shape[0], layer.lora_A["r1"].weight.shape[1])
            for name, layer in self._layers.items()
        }

    @property
    def dense(self) -> dict[str, Tensor]:
        """The heads as they are now, copied."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self._dense.items()}

    @cached_property
    def weights(self) -> str:
        """Digest of the base model's weights and names as they are now, adapters left out."""
        found = hashlib.blake2b(digest_size=16)
        for name, p in self._model.state_dict().items():
            if ".lora_" not in name:
                found.update(f"{name}={digest(p.cpu())};".encode())
        return found.hexdigest()

    @property
    def parameters(self) -> int:
        """Number of parameters of the base model."""
        lora = sum(p.numel() for n, p in self._model.named_parameters() if ".lora_" in n)
        return sum(p.numel() for p in self._model.parameters()) - lora

    def train(
        self, sent: Sent, client: Client, rows: np.ndarray, round: int, state: ClientState
    ) -> Learnt:
        """Train from `sent` on the examples `rows`; the client's next state comes with it.

        Raises
        ------
        GloraError
            If a loss or what was learnt is not finite.
        """
        how = self.how
        if how.optimiser_state == "keep":
            sent, state = _continued(sent, state)
        name = self._load(sent)
        learning = self._learning(name, sent.train)
        optimiser = _optimiser(learning, how)
        if how.optimiser_state == "keep":
            _restore(optimiser, learning, state)
        torch.manual_seed(stream_seed(how.seed, "dropout", round, client.index))
        draw = numpy_stream(how.seed, "batches", round, client.index)
        losses = []
        self._model.train()
        for _ in range(how.steps):
            batch = draw.choice(rows, size=min(how.batch, len(rows)), replace=False)
            optimiser.zero_grad(set_to_none=True)
            loss = self.task.loss(self._model, batch)
            losses.append(float(loss.detach()))
            if sent.tail is not None:
                loss = loss + sent.tail.strength * self._tail(name, sent.tail.keep)
            loss.backward()
            if how.clip > 0:
                torch.nn.utils.clip_grad_norm_(list(learning.values()), how.clip)
            optimiser.step()
        if not np.isfinite(losses).all():
            raise GloraError(
                f"loss: got {losses[-1]} after {how.steps} steps, expected a finite number; "
                "a smaller training.lr, or training.clip above 0"
            )
        factors = self._factors(name, sent)
        if how.gauge > 1 and sent.train == "both":  # a frozen factor fixes the gauge
            factors = regauge(
                factors, how.gauge, stream_seed(how.seed, "gauge", round, client.index)
            )
        if not all(x.isfinite().all() for pair in factors.values() for x in pair) or not all(
            x.isfinite().all() for x in self.dense.values()
        ):
            raise GloraError(
                f"factors: got values that are not finite after {how.steps} steps, expected finite "
                "ones; a smaller training.lr"
            )
        kept: ClientState = {}
        if how.optimiser_state == "keep":
            kept = _moments(optimiser, learning) | _started(sent)
        metrics = {"loss_first": losses[0], "loss_last": losses[-1]}
        return Learnt(factors, self.dense, len(rows), metrics, kept)

    def evaluate(self, sent: Sent) -> Judged:
        """The task's metrics and answers of the model that `sent` describes."""
        self._load(sent)
        self._model.eval()
        return self.task.evaluate(self._model)

    # --- the model ---------------------------------------------------------------------------

    def _config(self, rank: int, scaling: float) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,  # type: ignore[arg-type]  # PEFT takes floats
            target_modules=list(self.task.targets) or None,
            lora_dropout=self.how.dropout,
        )

    @torch.no_grad()
    def _load(self, sent: Sent) -> str:
        """Put the message into the model; the name of the adapter that now is active."""
        self._merge(sent.merged)
        rank = sent.rank
        name = f"r{rank}"
        if self._scaling.get(rank) != sent.scaling:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if rank in self._scaling:
                    self._model.delete_adapter(name)
                self._model.add_adapter(name, self._config(rank, sent.scaling))
            self._scaling[rank] = sent.scaling
        for layer in self._layers.values():  # PEFT's own walks through every module of the model
            layer.set_adapter(name)
        for module, (b, a) in sent.factors.items():
            layer = self._layers[module]
            missing = rank - a.shape[0]
            layer.lora_B[name].weight.copy_(torch.nn.functional.pad(b, (0, missing)))
            layer.lora_A[name].weight.copy_(torch.nn.functional.pad(a, (0, 0, 0, missing)))
        for key, value in sent.dense.items():
            self._dense[key].copy_(value)
        return name

    def _merge(self, merged: tuple[Pairs, ...]) -> None:
        """Frozen weights + merged pairs, always added in one order: history changes no bit."""
        known = len(self._merged)
        if any(new is not old for new, old in zip(merged, self._merged, strict=False)) or (
            len(merged) < known
        ):
            for name, weight in self._frozen.items():
                self._layers[name].get_base_layer().weight.copy_(weight)
            self._merged, known = (), 0
        for pairs in merged[known:]:
            for name, (b, a) in pairs.items():
                weight = self._layers[name].get_base_layer().weight
                self._frozen.setdefault(name, weight.clone())
                update = (b @ a).to(weight)
                weight += update.mT if self._layers[name].fan_in_fan_out else update
        self._merged = merged

    def _learning(self, name: str, train: str) -> dict[str, nn.Parameter]:
        """What is trained, by name; everything else is frozen."""
        chosen: dict[str, nn.Parameter] = {}
        for module, layer in self._layers.items():
            for side, part in (("B", layer.lora_B[name]), ("A", layer.lora_A[name])):
                part.weight.requires_grad_(train in ("both", side))
                if train in ("both", side):
                    chosen[f"{module}/{side}"] = part.weight
        for key, parameter in self._dense.items():
            parameter.requires_grad_(True)
            chosen[f"dense/{key}"] = parameter
        return chosen

    def _tail(self, name: str, keep: int) -> Tensor:
        norm = torch.linalg.matrix_norm
        return torch.stack(
            [
                norm(layer.lora_B[name].weight[:, keep:]) * norm(layer.lora_A[name].weight[keep:])
                for layer in self._layers.values()
            ]
        ).sum()

    def _factors(self, name: str, sent: Sent) -> Pairs:
        return {
            m: (
                self._layers[m].lora_B[name].weight.detach().to("cpu", copy=True),
                self._layers[m].lora_A[name].weight.detach().to("cpu", copy=True),
            )
            for m in sent.factors
        }


def _optimiser(learning: Mapping[str, nn.Parameter], how: LocalTraining) -> torch.optim.Optimizer:
    """Adapters at `lr`, heads at `head_lr` if it is given."""
    heads = [p for key, p in learning.items() if key.startswith("dense/")]
    groups: list[dict[str, Any]] = [
        {"params": [p for key, p in learning.items() if not key.startswith("dense/")]}
    ]
    if heads:
        groups.append({"params": heads, "lr": how.lr if how.head_lr is None else how.head_lr})
    if how.optimiser == "sgd":
        return torch.optim.SGD(groups, how.lr, weight_decay=how.weight_decay)
    # foreach: the same bits with fewer calls, which is what a small adapter's step costs.
    return torch.optim.AdamW(groups, how.lr, weight_decay=how.weight_decay, foreach=True)


def _moments(optimiser: torch.optim.Optimizer, learning: Mapping[str, Tensor]) -> ClientState:
    return {
        f"{key}:{what}": torch.as_tensor(value).to("cpu", copy=True)
        for key, parameter in learning.items()
        for what, value in optimiser.state[parameter].items()
        if value is not None
    }


def _started(sent: Sent) -> ClientState:
    """What a client began at, where that fixes the gauge of its moments."""
    if not sent.turn:
        return {}
    return {
        f"{m}/{side}:{START}": x.clone()
        for m, pair in sent.factors.items()
        for side, x in zip("BA", pair, strict=True)
    }


def _continued(sent: Sent, state: ClientState) -> tuple[Sent, ClientState]:
    """The message in the gauge of the moments; moments that mean nothing now are left out.

    A fresh adapter has none: a first moment of another A points nowhere in it.
    """
    if sent.drawn is not None:
        return sent, {key: x for key, x in state.items() if key.startswith("dense/")}
    if not sent.turn:
        return sent, state
    last = {
        m: (state[f"{m}/B:{START}"], state[f"{m}/A:{START}"])
        for m in sent.factors
        if f"{m}/B:{START}" in state
    }
    if any(m not in last or last[m][1].shape != a.shape for m, (_, a) in sent.factors.items()):
        return sent, state
    return replace(sent, factors=turned(sent.factors, last)), state


def _restore(
    optimiser: torch.optim.Optimizer, learning: Mapping[str, Tensor], state: ClientState
) -> None:
    """Last round's moments, for parameters whose shape is still the same."""
    for key, parameter in learning.items():
        parts = ((*k.rpartition(":")[::2], v) for k, v in state.items())
        own = {what: v for owner, what, v in parts if owner == key and what != START}
        shapes = {v.shape for v in own.values() if v.dim()}
        if own and shapes <= {parameter.shape}:
            optimiser.state[parameter] = {
                what: v.to(parameter.device if v.dim() else "cpu", copy=True)
                for what, v in own.items()
            }


@contextmanager
def single_thread() -> Iterator[None]:
    """torch on one thread: sums are taken in one order, and runs side by side do not fight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
