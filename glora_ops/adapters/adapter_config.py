"""What `adapter_config.json` says, and which of it glora can aggregate truthfully.

Judged against PEFT 0.21's `LoraConfig`. A key unknown to this table is harmless while it is null,
false or empty; set, it may change what B and A mean, and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import Refusal, Refusals
from .files import parse_object
from .patterns import GRAMMAR, PatternError, Patterns
from .targets import Targets

__all__ = [
    "CONFIG_NAME",
    "NAME_IN_FULL",
    "LoraSettings",
    "PatternTable",
    "StoredTable",
    "is_alpha",
    "judge_settings",
    "parse_settings",
]

CONFIG_NAME = "adapter_config.json"

# Read below, or without influence on the update that B and A stand for.
_KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "fan_in_fan_out", "modules_to_save", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "target_parameters",
    "ensure_weight_tying",
    # Of other trainers.
    "lora_dtype", "unsloth_fixed", "_from_model_config", "_commit_hash",
}  # fmt: skip
# A learning rate decides how B and A were found, not what they mean (LoRA+, ms-swift's lorap_…).
_LEARNING_RATE = re.compile(r"(^|_)(lr|learning_rate)(_|$)|^lorap(lus)?_")

_REFUSED = {
    "use_dora": "DoRA's update is not linear in B·A",
    "lora_bias": "a bias is trained beside B and A",
    "trainable_token_indices": "trained token rows are no factor pair",
    "layer_replication": "the adapted model has other layers than the base",
    "alora_invocation_tokens": "aLoRA applies its update to some tokens only",
    "arrow_config": "Arrow routes between adapters at run time",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "kasa_config": "KaSA changes the base and puts a diagonal between B and A",
    "velora_config": "VeLoRA adapters have not been verified",
    "monteclora_config": "MonteCLoRA perturbs its factors at random",
    "megatron_config": "Megatron adapters are stored in shards",
}

# Of saved modules and of parameters; why: each is looked for in every tensor's name.
MAX_NAMES = 4096
NAME_IN_FULL = "name the modules in full instead of by a pattern"
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "a client with PiSSA, OLoRA, CorDA or LoRA-GA can turn its adapter into plain LoRA by "
    "save_pretrained(path_initial_model_for_weight_conversion=…); leave others out"
)


class PatternTable:
    """Values that differ from a default for some modules, found as PEFT's `get_pattern_key` does.

    The first pattern that speaks of the module decides, or a key that is the module's name.
    """

    def __init__(self, patterns: Mapping[str, float], default: float) -> None:
        self._values = patterns
        self._keys = list(patterns)
        self._patterns = Patterns(self._keys)
        self._default = default

    def __getitem__(self, module: str) -> float:
        """Raises `PatternError` when all look-ups together have cost too much."""
        place = self._patterns.first(module)
        return self._values.get(module if place is None else self._keys[place], self._default)


@dataclass(frozen=True)
class StoredTable:
    """A value for every module, as found beside its factors."""

    values: Mapping[str, float]

    def __getitem__(self, module: str) -> float:
        return self.values[module]


@dataclass(frozen=True)
class LoraSettings:
    """The part of a LoRA configuration that decides what its tensors mean."""

    ranks: PatternTable | StoredTable
    alphas: PatternTable | StoredTable
    targets: Targets
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    raw: dict[str, Any] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """alpha/r, or alpha/√r for rsLoRA, with the alpha that holds for `module`."""
        return self.alphas[module] / (math.sqrt(rank) if self.use_rslora else rank)


def parse_settings(text: bytes, client: str) -> tuple[LoraSettings | None, list[Refusal]]:
    """What an `adapter_config.json` says.

    Returns
    -------
    settings : LoraSettings, or None where a value that is needed is malformed
    refusals : list of Refusal
        Everything in the configuration that glora refuses; may be non-empty beside settings.
    """
    raw, problems = parse_object(text, CONFIG_NAME, client)
    return (None, problems) if raw is None else judge_settings(raw, client, CONFIG_NAME)


def judge_settings(
    raw: dict[str, Any], client: str | None, file: str
) -> tuple[LoraSettings | None, list[Refusal]]:
    """`parse_settings` of a configuration that was found in `file`."""
    problems = Refusals()

    def refuse(key: str, why: str, expected: str, remedy: str, found: str = "") -> None:
        name = key if key.isprintable() else repr(key)
        found = f"{name:.80} = {found or repr(raw.get(key))[:80]}"
        problems.append(Refusal(why, client, file, None, found, expected, remedy))

    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        refuse("peft_type", "not a LoRA adapter", "'LORA'", "leave this client out")
        return None, problems
    for key, why in _REFUSED.items():
        if raw.get(key) not in (None, False, []):  # PEFT takes {} for a variant's defaults
            refuse(key, why, "not set", "train plain LoRA or leave this client out")
    if raw.get("bias", "none") != "none":
        refuse(
            "bias",
            "biases of the base were trained",
            "'none'",
            "train with bias='none' or leave this client out",
        )
    init = raw.get("init_lora_weights", True)
    if not any(
        init is plain or init == plain for plain in _PLAIN_INITS if type(init) is type(plain)
    ):
        refuse(
            "init_lora_weights",
            "the initialisation changes the base or is unknown, so B·A is no update of that base",
            ", ".join(repr(plain) for plain in _PLAIN_INITS),
            _CONVERT,
        )
    for key in sorted(raw.keys() - _KNOWN - _REFUSED.keys()):
        if raw[key] and not _LEARNING_RATE.search(key[:80]):
            refuse(
                key,
                "the key is unknown to glora and may change what the factors mean",
                "null, false or empty",
                "remove the key if it does not matter, or leave this client out",
            )

    faults = len(problems)
    for key, expected, holds in _VALUES:
        if not holds(raw.get(key)):
            refuse(key, "the value is malformed", expected, "save the adapter again with PEFT")
    if len(problems) > faults:
        return None, problems
    tables = []
    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        try:
            tables.append(PatternTable(raw.get(key) or {}, raw[default]))
        except PatternError as error:
            refuse(key, "a pattern cannot be followed", GRAMMAR, NAME_IN_FULL, str(error))
    if len(tables) < 2:
        return None, problems
    return (
        LoraSettings(
            ranks=tables[0],
            alphas=tables[1],
            use_rslora=bool(raw.get("use_rslora")),
            fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
            lora_dropout=float(raw.get("lora_dropout") or 0.0),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            base_model=raw.get("base_model_name_or_path"),
            revision=raw.get("revision"),
            task_type=raw.get("task_type"),
            targets=Targets.of(raw),
            target_parameters=tuple(raw.get("target_parameters") or ()),
            ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
            raw=raw,
        ),
        problems,
    )


def _finite(value: Any) -> bool:
    # An integer beyond the largest float is as unusable as an infinity.
    return type(value) in (int, float) and abs(value) <= 1.7e308


def _alpha(value: float) -> bool:
    """Beyond these, squares of the update leave fp64's range."""
    return value == 0 or 1e-20 <= abs(value) <= 1e20


def is_alpha(value: Any) -> bool:
    """Whether `value` can be an alpha."""
    return _finite(value) and _alpha(value)


def _text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isprintable())


def _names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) <= MAX_NAMES
        and all(isinstance(n, str) and n for n in value)
    )


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _numbers(value: Any) -> bool:
    """Whether `value` maps patterns to ranks or alphas."""
    return value is None or (isinstance(value, dict) and all(map(is_alpha, value.values())))


_PATTERNS = "patterns mapped to finite numbers, 0 or of modulus 1e-20 to 1e20"
_LIST = f"null or a list of at most {MAX_NAMES} names"
_VALUES = (
    ("r", "an integer ≥ 1", lambda v: type(v) is int and 1 <= v < 2**31),
    (
        "lora_alpha",
        "a finite number, 0 or of modulus 1e-20 to 1e20",
        is_alpha,
    ),
    ("rank_pattern", _PATTERNS, _numbers),
    ("alpha_pattern", _PATTERNS, _numbers),
    ("use_rslora", "true or false", _flag),
    ("fan_in_fan_out", "true or false", _flag),
    ("ensure_weight_tying", "true or false", _flag),
    ("lora_dropout", "a number from 0 to 1", lambda v: v is None or (_finite(v) and 0 <= v <= 1)),
    ("modules_to_save", _LIST, _names),
    ("target_parameters", _LIST, _names),
    ("base_model_name_or_path", "null or a name", _text),
    ("revision", "null or a name", _text),
    ("task_type", "null or a name", _text),
)
