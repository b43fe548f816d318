"""What a run is, as TOML: every field with its meaning, unknown keys refused by name."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..errors import GloraError, Refusal, Refusals, Refused, listing, require
from ..robust import CLIP
from ..runtime.reading import MAX_DEPTH, read_bytes, too_deep
from .judging import Rule
from .methods import METHODS, Method
from .registry import find_method, find_task
from .server_optimiser import ServerOptimiser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "Training", "load_config", "parse_override", "shipped"]


RuleName = Literal["clip", "gate", "geometric-median"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _of_a_size(self) -> Section:
        for name, value in self:
            fits = not isinstance(value, int) or abs(value) < 2**31
            require(fits, name, value, f"an integer up to {2**31 - 1}")
        return self


class TaskSection(Section):
    """What is learnt."""

    kind: str = Field(
        default="digits",
        description="digits needs no download; glue and superni need data; or a registered one.",
    )
    name: str = Field(default="", description="GLUE task: sst2, cola, mrpc, rte, qnli, stsb, ….")
    max_train: int = Field(
        default=0,
        ge=0,
        description="Use at most this many training examples (per task for superni); 0: all.",
    )
    max_eval: int = Field(
        default=0,
        ge=0,
        description="Evaluate on at most this many held-out examples (per task for "
        "superni); 0: all.",
    )
    max_tasks: int = Field(
        default=0, ge=0, description="superni: a seeded sample of the training tasks; 0: all."
    )
    max_length: int = Field(default=128, ge=8, description="Tokens an input is cut to.")
    max_new_tokens: int = Field(
        default=32, ge=1, description="superni: tokens generated for an answer."
    )
    seen_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="superni: fraction of each training task's instances held back to evaluate.",
    )

    @model_validator(mode="after")
    def _known(self) -> TaskSection:
        find_task(self.kind)
        named = self.kind != "glue" or bool(self.name)
        require(named, "name", "''", "a GLUE task such as sst2 or cola")
        return self


class ModelSection(Section):
    """The frozen base; digits brings its own."""

    name: str = Field(default="", description="Any transformers model: a name, or a local folder.")
    targets: list[str] = Field(
        default=[],
        description="Linear modules to adapt, as PEFT's target_modules; empty: the task's own "
        "(digits) or PEFT's default for the architecture.",
    )
    device: str = Field(
        default="cpu",
        description="Where clients train, as torch names it; the server uses the CPU.",
    )
    random_weights: bool = Field(
        default=False,
        description="Draw the weights instead of loading them: a test of the path, no experiment.",
    )


class ClientsSection(Section):
    """Who takes part, with what, and how they differ."""

    count: int = Field(default=8, ge=1, le=100_000, description="Number of clients.")
    ranks: list[Annotated[int, Field(ge=1, le=100_000)]] = Field(
        default=[8], min_length=1, description="LoRA ranks, dealt to the clients in turn."
    )
    scaling: float = Field(
        default=2.0, gt=0, description="lora_alpha / r of every adapter, the same for all clients."
    )
    partition: Literal["iid", "dirichlet", "shard", "task"] = Field(
        default="dirichlet", description="How labels are spread; task: one task per client."
    )
    alpha: float = Field(default=0.3, gt=0, description="Concentration of the Dirichlet partition.")
    shards_per_client: int = Field(default=2, ge=1, description="Of the shard partition.")
    at_least: int = Field(
        default=8, ge=1, description="Fewest examples of a client (Dirichlet), on average (others)."
    )
    participation: float = Field(
        default=1.0, gt=0, le=1, description="Fraction of the clients that is asked in a round."
    )
    start: Literal["shared", "independent"] = Field(
        default="shared", description="First A: nested rows of one draw, or each client its own."
    )
    lost: float = Field(
        default=0.0, ge=0, lt=1, description="Probability that a client's reply never arrives."
    )
    gauge: float = Field(
        default=1.0,
        ge=1,
        description="Condition of a random gauge (B G, G⁻¹A) on every reply; 1: none. "
        "An instrument: it changes no update.",
    )
    wire: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of tensors between server and clients."
    )


class Training(Section):
    """Local training; the same for every client."""

    rounds: int = Field(default=10, ge=1, description="Communication rounds.")
    steps: int = Field(default=10, ge=1, description="Optimiser steps of a client in a round.")
    batch: int = Field(default=16, ge=1, description="Examples per step.")
    lr: float = Field(
        default=1e-3,
        gt=0,
        le=1e30,
        description="Learning rate where neither the method nor a sweep sets one.",
    )
    head_lr: float | None = Field(
        default=None, gt=0, le=1e30, description="Learning rate of heads; None: that of adapters."
    )
    optimiser: Literal["adamw", "sgd"] = Field(default="adamw", description="AdamW or plain SGD.")
    optimiser_state: Literal["reset", "keep"] = Field(
        default="reset", description="A client's moments between its rounds: forgotten, or kept."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    clip: float = Field(
        default=1.0, ge=0, description="Gradient norm is clipped to this; 0: never."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout.")


class Evaluation(Section):
    """What is measured on the server."""

    every: int = Field(
        default=1, ge=1, description="Rounds between evaluations; the last one always is."
    )
    by_rank: Literal["last", "every", "never"] = Field(
        default="last", description="When to evaluate also what clients of each rank are sent."
    )
    spectra: bool = Field(
        default=True, description="Record spectrum, effective rank and captured energy every round."
    )
    agreement: Literal["last", "every", "never"] = Field(
        default="last",
        description="When to record client-by-client alignment and how far factors are turned.",
    )


class Sweep(Section):
    """Learning rates tried for every method that sets none, before the seeds are run."""

    lrs: list[Annotated[float, Field(gt=0)]] = Field(
        default=[], description="Rates to try; empty: no sweep, training.lr for all."
    )
    seed: int = Field(default=1000, description="Seed of the sweep, not one of the reported ones.")
    rounds: int = Field(default=0, ge=0, description="Rounds of a trial; 0: as many as a run.")


class ServerSection(Section):
    """A server optimiser on what the method's server holds: [methods.LABEL.server]."""

    kind: Literal["fedavgm", "fedadam"] = Field(description="Momentum, or Adam.")
    lr: float = Field(gt=0, description="The server's learning rate.")
    beta: float = Field(default=0.9, ge=0, lt=1, description="Of the mean of steps.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Of their squares (fedadam).")
    tau: float = Field(default=1e-3, gt=0, description="What keeps fedadam's steps bounded.")


OWN = ("lr", "robust", "server")  # of an arm, whatever its kind


class MethodSection(BaseModel):
    """One arm: its kind, its learning rate, and the fields of the method's dataclass."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    kind: str = Field(description="One of " + ", ".join(METHODS) + ", or registered.")
    lr: float | None = Field(
        default=None, gt=0, le=1e30, description="Its learning rate; None: swept, or training.lr."
    )
    robust: RuleName | None = Field(
        default=None, description="Its rule; None: the configuration's."
    )
    server: ServerSection | None = Field(
        default=None, description="Its server optimiser; None: the method's own result stands."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _all_of_it(cls, given: Any, validate: ModelWrapValidatorHandler[MethodSection]) -> Any:
        """What is wrong with kind and lr and what is wrong for the kind, in one list."""
        refusals = Refusals()
        section = None
        try:
            section = validate(given)
        except ValidationError as error:
            refusals += _refusals(error)
        fields = dict(given) if isinstance(given, Mapping) else {}
        kind = fields.pop("kind", None)
        for own in OWN:
            fields.pop(own, None)
        if isinstance(kind, str):
            with listing(refusals):
                _method(kind, fields)
        if refusals:
            raise Refused(refusals)
        return section

    def build(self) -> Method:
        return _method(self.kind, self.model_extra or {})


def _method(kind: str, given: Mapping[str, Any]) -> Method:
    """The method of that kind with these fields.

    Raises
    ------
    Refused
        Listing every field that does not fit.
    """
    cls = find_method(kind)
    known = [f.name for f in dataclasses.fields(cls)]
    refusals = [
        _unknown(key, value, ("kind", *OWN, *known))
        for key, value in given.items()
        if key not in known
    ]
    fields = {key: value for key, value in given.items() if key in known}
    try:
        method = TypeAdapter(cls).validate_python(fields)
    except ValidationError as error:
        refusals += _refusals(error)
        wrong = {e["loc"][0] for e in error.errors() if e["loc"]}
        if wrong:  # then the method itself has not looked at the others yet
            with listing(refusals):
                _method(kind, {key: value for key, value in fields.items() if key not in wrong})
    if refusals:
        raise Refused(refusals)
    return method


Label = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=100)]


class Config(Section):
    """A federated experiment: one task, one population of clients, several methods."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        max_length=100,
        description="Folder name of its runs.",
    )
    about: str = Field(default="", description="One sentence: what the experiment asks.")
    hours: str = Field(default="", description="How long it takes, where.")
    robust: RuleName | None = Field(
        default=None,
        description="Rule against bad clients, for every method: clip, gate or geometric-median "
        "(docs/reliability.md); None: none.",
    )
    robust_clip: float | None = Field(
        default=None,
        gt=0,
        description=f"Longest update a rule lets through, in median norms; None: {CLIP:g}.",
    )
    task: TaskSection = TaskSection()
    model: ModelSection = ModelSection()
    clients: ClientsSection = ClientsSection()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    sweep: Sweep = Sweep()
    methods: dict[Label, MethodSection] = Field(
        min_length=1, description="Arms by label; [methods.LABEL] with kind = … and its fields."
    )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each client's rank."""
        given = self.clients.ranks
        return tuple(given[i % len(given)] for i in range(self.clients.count))

    def method(self, label: str) -> Method:
        require(label in self.methods, "methods", repr(label), f"one of {list(self.methods)}")
        return self.methods[label].build()

    def rule(self, label: str) -> Rule | None:
        """What is done against bad clients in an arm."""
        name = self.methods[label].robust or self.robust
        return None if name is None else Rule(name, self.robust_clip or CLIP)

    def server_optimiser(self, label: str) -> ServerOptimiser | None:
        """What the server steps with in an arm."""
        own = self.methods[label].server
        return None if own is None else ServerOptimiser(**own.model_dump())


def shipped() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    folder = Path(str(resources.files("glora_ops.fl") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_config(
    which: str | Path,
    *,
    model: str | None = None,
    every: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Read a TOML file, or a shipped configuration by its name.

    Parameters
    ----------
    which : str or path
    model : str, optional
        In the place of its model.name.
    every : int, optional
        In the place of its evaluation.every.
    overrides : mapping, optional
        Values by dotted keys, such as ``{"clients.count": 4, "methods.glora.step": 0.5}``.

    Raises
    ------
    Refused
        Listing every field that does not fit.
    """
    path = shipped().get(str(which), Path(which))
    require(
        path.is_file(),
        "config",
        repr(str(which)),
        f"a .toml file or one of {', '.join(shipped())}",
    )
    try:
        content = _parse_toml(read_bytes(path).decode("utf-8"))
        given = {"model.name": model, "evaluation.every": every}
        given = {key: value for key, value in given.items() if value is not None}
        for key, value in (given | dict(overrides or {})).items():
            _put(content, key, value)
        return Config.model_validate(content)
    except ValidationError as error:
        raise Refused(replace(r, file=str(path)) for r in _refusals(error)) from None
    except GloraError:
        raise
    except ValueError as error:  # tomllib's own, of decoding, of a huge integer
        raise GloraError(f"config: {path} is no TOML in UTF-8 ({error})") from None


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set what stands under a dotted key."""
    *sections, last = key.split(".")
    for name in sections:
        inner = content.setdefault(name, {})
        require(isinstance(inner, dict), key, repr(value), f"a field: {name} is no section")
        content = inner
    content[last] = value


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``; VALUE as TOML has it, or else as text."""
    key, equals, value = text.partition("=")
    require(bool(equals and key.strip(". ")), "--set", repr(text), "KEY=VALUE: clients.count=4")
    try:
        return key.strip(), _parse_toml(f"value = {value}")["value"]
    except (ValueError, KeyError):
        return key.strip(), value


# A key of many parts, which tomllib reads at the cost of its square.
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![\w-])({_PART}[ \t]*\.[ \t]*){{{MAX_DEPTH}}}")


def _parse_toml(text: str) -> dict[str, Any]:
    """What tomllib reads; `ValueError` for no TOML, and for tables too deep in each other."""
    try:
        content = {} if _LONG_KEY.search(text) else tomllib.loads(text)
    except RecursionError:
        content = {}
    if not content or too_deep(content):
        raise ValueError(f"empty, or more than {MAX_DEPTH} tables or lists in each other")
    return content


def _refusals(error: ValidationError) -> list[Refusal]:
    """Each mistake with its key, its value and what was expected."""
    out = []
    for e in error.errors(include_url=False):
        own = e.get("ctx", {}).get("error")
        if isinstance(own, GloraError):
            out += [replace(r, problem=_key(*e["loc"], r.problem)) for r in own.refusals]
        elif e["type"] == "extra_forbidden":
            out.append(_unknown(_key(*e["loc"]), e["input"], _fields(e["loc"][:-1])))
        else:
            found = "" if e["type"] == "missing" else repr(e["input"])[:80]
            out.append(Refusal(f"{_key(*e['loc']) or 'config'}: {e['msg']}", found=found))
    return out


def _key(*parts: int | str) -> str:
    return ".".join(str(part) for part in parts if part != "[key]")


def _unknown(key: str, value: Any, known: Iterable[str]) -> Refusal:
    return Refusal(f"{key}: unknown key", found=repr(value)[:80],
                   expected=f"one of {', '.join(known)}",
                   remedy="docs/federated.md lists every field")  # fmt: skip


def _fields(section: Sequence[Any]) -> Iterable[str]:
    """Keys of the configuration's section, or of its top."""
    if section == ("server",):  # of an arm
        return ServerSection.model_fields
    kind = Config.model_fields[section[0]].annotation if section else Config
    return kind.model_fields  # type: ignore[union-attr]  # a section's annotation is its model


def describe_fields() -> list[tuple[str, str, Any, str]]:
    """(section, field, default, meaning) of every field, in order."""
    rows = []
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            rows += [
                (name, n, f.default, f.description or "") for n, f in kind.model_fields.items()
            ]
        else:
            rows.append(("", name, field.default, field.description or ""))
    return rows
