"""``--json`` of every command is what docs/cli.schema.json says, no more and no less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import CLIENTS, glora_json
from jsonschema import Draft202012Validator, ValidationError
from peft_models import gpt2

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/cli.schema.json").read_text())


def check(name: str, facts: dict[str, Any]) -> None:
    Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}).validate(facts)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    named = {reference["$ref"].rpartition("/")[2] for reference in SCHEMA["anyOf"]}
    assert named == SCHEMA["$defs"].keys() - {"note", "client", "certificates"}


def test_what_commands_print(work: Path) -> None:
    gpt2().save_pretrained(work / "base")
    runs = {
        "plan": ["aggregate", *CLIENTS, "-o", "out", "--dry-run"],
        "aggregate": ["aggregate", *CLIENTS, "-o", "out", "--readout", 4, "--rank", "auto",
                      "--robust", "clip"],
        "update": ["update", "out", "--remove", "cyd"],
        "inspected_state": ["inspect", "out"],
        "adapter": ["inspect", "ann"],
        "comparison": ["compare", *CLIENTS],
        "readout": ["readout", "out", "-r", 2, "-o", "r2"],
        "apply": ["apply", "out/r4", "--base", "base", "-o", "model"],
        "job_plan": ["job", "plan", *CLIENTS, "-o", "job"],
        "job_work": ["job", "work", "job"],
        "job_status": ["job", "status", "job"],
    }  # fmt: skip
    for name, arguments in runs.items():
        check(name, glora_json(*arguments))
    check("job_join_plan", glora_json("job", "join", "job", "-o", "joined", "--dry-run"))
    check("aggregate", glora_json("job", "join", "job", "-o", "joined", "--readout", 4))
    check("refused", glora_json("inspect", "nobody", code=1))
    facts = glora_json("inspect", "out")
    for wrong in (facts | {"more": 1}, {k: v for k, v in facts.items() if k != "captured"}):
        with pytest.raises(ValidationError):
            check("inspected_state", wrong)


def test_what_federated_commands_print() -> None:
    check("fl_configs", glora_json("fl", "configs"))
    check("fl_partition", glora_json("fl", "partition", "digits_iid", "--set", "clients.count=4"))
