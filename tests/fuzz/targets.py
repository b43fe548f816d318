"""What is fuzzed: for each parser how an input is drawn, and what is done with it.

An input is a handful of files, by name. A target says "done" or raises; glora's own errors are
refusals, whatever else is raised is a finding.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mutations import as_json, damaged, mutated, mutated_toml, parted, safetensors
from safetensors.torch import save, save_file

from glora_ops import State, aggregate_adapters, job
from glora_ops.adapters import check_values, inspect_adapter
from glora_ops.adapters.patterns import PatternError, Patterns
from glora_ops.adapters.safetensors_header import read_header
from glora_ops.errors import GloraError, Refused
from glora_ops.fl.config import Config, load_config, shipped
from glora_ops.fl.load import by_config, load_runs
from glora_ops.fl.records import Run
from glora_ops.fl.report_folder import markdown
from glora_ops.fl.summary import summarise
from glora_ops.job.folder import sealed

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """`share` of the inputs go to it; `draw` makes one; `judge` is given the folder it lies in."""

    share: float
    draw: Callable[[random.Random], Files]
    judge: Callable[[Path], str]


# --- sound inputs, which are then made odd ---------------------------------------------------

CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "bias": "none",
    "rank_pattern": {"b": 1}, "alpha_pattern": {r"^layers\.\d+\.a$": 3}, "use_rslora": False,
    "target_modules": ["a", "b"], "modules_to_save": ["head"], "task_type": "CAUSAL_LM",
    "lora_dropout": 0.1, "init_lora_weights": True, "revision": None, "fan_in_fan_out": False,
}  # fmt: skip


def client(folder: Path, seed: int) -> Path:
    """A small adapter of two modules and a head."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        "base_model.model.layers.0.a.lora_A.weight": torch.randn(2, 5, generator=generator),
        "base_model.model.layers.0.a.lora_B.weight": torch.randn(4, 2, generator=generator),
        "base_model.model.b.lora_A.weight": torch.randn(1, 3, generator=generator).half(),
        "base_model.model.b.lora_B.weight": torch.randn(3, 1, generator=generator).half(),
        "base_model.model.head.weight": torch.randn(2, 3, generator=generator),
    }
    folder.mkdir(parents=True)
    save_file(made, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "glora.json").write_text(json.dumps({"num_examples": 10 + seed}))
    return folder


@cache
def sound() -> dict[str, Files]:
    """A client's folder, a state and a run, as glora and PEFT write them."""
    from glora_ops.fl.run import Plan, run

    with TemporaryDirectory() as where, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = Path(where)
        folders = [client(home / name, seed) for seed, name in enumerate(("ann", "bob"))]
        aggregate_adapters(folders, rank=3).save(home / "server.safetensors")
        made = Config.model_validate(
            {"name": "small", "methods": {"it": {"kind": "fedit"}},
             "clients": {"count": 2, "ranks": [2], "alpha": 0.5},
             "training": {"rounds": 1, "steps": 1, "batch": 4, "lr": 0.005}}
        )  # fmt: skip
        run(Plan(made, "it", 0, 0.005), home / "small" / "it" / "seed0")
        job.plan(FOLDERS, home / "job", rank=3)
        job.work(home / "job", 0, 1)
        names = ["run.json", "metrics.jsonl", "checkpoint.safetensors", "done"]
        return {
            "client": read(folders[0]),
            "state": {"server.safetensors": (home / "server.safetensors").read_bytes()},
            "job": {name.replace("/", "-"): x for name, x in read(home / "job").items()},
            "run": {name: (home / "small/it/seed0" / name).read_bytes() for name in names},
        }


CLIENTS = TemporaryDirectory()  # which the plan of a job names
FOLDERS = [client(Path(CLIENTS.name) / name, seed) for seed, name in enumerate(("ann", "bob"))]


def read(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def odd_file(name: str, content: bytes, rng: random.Random) -> bytes:
    """One file made odd as its kind allows."""
    if name.endswith(".safetensors"):
        header, data = parted(content)
        about = header.get("__metadata__", {})
        for key, text in about.items():  # JSON within
            if text.startswith("{") and rng.random() < 0.7:
                about[key] = as_json(mutated(json.loads(text), rng), rng).decode("utf-8", "replace")
        return safetensors(mutated(header, rng) if rng.random() < 0.6 else header, data, rng)
    if name.endswith(".json"):
        return as_json(mutated(json.loads(content), rng), rng)
    if name.endswith(".jsonl"):
        lines = [as_json(mutated(json.loads(line), rng), rng) for line in content.splitlines()]
        if rng.random() < 0.1:
            rng.shuffle(lines)
        return b"\n".join(lines) + b"\n" * (rng.random() < 0.8)
    return damaged(content, rng, 1)


def odd(kind: str) -> Callable[[random.Random], Files]:
    """The files of a kind, one or more of them odd or missing."""

    def draw(rng: random.Random) -> Files:
        files = dict(sound()[kind])
        for name in rng.sample(sorted(files), rng.randint(1, min(2, len(files)))):
            if rng.random() < 0.05:
                del files[name]
            else:
                files[name] = odd_file(name, files[name], rng)
        return files

    return draw


# --- targets ---------------------------------------------------------------------------------


def header(folder: Path) -> str:
    path = folder / "adapter_model.safetensors"
    _, refusals = read_header(path, "c", max_bytes=2**30)
    return judged(refusals)


def adapter(folder: Path) -> str:
    found, refusals = inspect_adapter(folder)
    return judged(refusals if found is None else check_values(found))


def judged(refusals: Any) -> str:
    if refusals:
        raise Refused(refusals)
    return "done"


def draw_patterns(rng: random.Random) -> Files:
    pieces = ["a", "b", ".", ".*", "(", ")", "(?:", "|", "*", "+", "?", "{2}", "{1,3}", "[a-c]",
              "[^a]", "\\d", "\\.", "^", "$", "{1000}", "\\", "[", "(a|a)*", "layers", "é", "(?=",
              "0"]  # fmt: skip
    table = [
        "".join(rng.choices(pieces, k=rng.randint(0, rng.choice((4, 12, 200)))))
        for _ in range(rng.randint(1, 4))
    ]
    return {"patterns.json": json.dumps(table).encode()}


def patterns(folder: Path) -> str:
    try:
        made = Patterns(json.loads((folder / "patterns.json").read_bytes()))
        for name in ("a", "layers.0.a", "a" * 500, "a." * 250, "b.layers.11.aab"):
            made.first(name)
    except PatternError as error:
        raise GloraError(str(error)) from None
    return "done"


def draw_weights(rng: random.Random) -> Files:
    return {"weights.json": as_json(mutated({"ann": 3, "bob": 1.5, "cyd": 0}, rng), rng)}


def weights(folder: Path) -> str:
    from glora_ops.cli.weights import weights_file

    weights_file(folder / "weights.json", ["ann", "bob", "cyd"], {})
    return "done"


def draw_list(rng: random.Random) -> Files:
    entry = {"path": "ann", "name": "a", "weight": 2}
    lines = [
        rng.choice([
            b"# who", b"", b"ann", b"bob\tb\t3", b"ann\ta b\t1", b"bob\t\tnan", b"x=ann",
            as_json(entry, rng), as_json(mutated(entry, rng), rng),
        ])
        for _ in range(rng.randint(0, 4))
    ]  # fmt: skip
    return {"clients.tsv": damaged(b"\n".join(lines), rng, rng.choice((0, 0, 1)))}


def client_list(folder: Path) -> str:
    from glora_ops.cli.client_list import read_client_list

    read_client_list(folder / "clients.tsv")
    return "done"


def draw_one_file(rng: random.Random) -> Files:
    """A file of diffusers, of several models or of one, or of kohya's trainers."""
    kind = rng.choice(("diffusers", "one model", "kohya"))
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    about = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    if kind == "kohya":
        parts = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.ones(())}
        tensors = {
            f"{name}.{part}": value.clone()
            for name in ("lora_unet_mid_block_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1")
            for part, value in parts.items()
        }
        metadata = {"ss_network_dim": "2"}
    else:
        part = "" if kind == "one model" else "unet."
        names = {"A": a, "B": b}
        tensors = {f"{part}mid_block.to_q.lora_{side}.weight": x for side, x in names.items()}
        config = json.dumps({part + key: value for key, value in about.items()})
        metadata = {"lora_adapter_metadata": config}
    content = save(tensors, metadata)
    sound_or_odd = content if rng.random() < 0.1 else odd_file("x.safetensors", content, rng)
    return {"lora.safetensors": sound_or_odd}


def one_file(folder: Path) -> str:
    found, refusals = inspect_adapter(folder / "lora.safetensors")
    return judged(refusals if found is None else check_values(found))


def state(folder: Path) -> str:
    from glora_ops.cli.state_facts import state_facts

    loaded = State.load(folder / "server.safetensors")
    json.dumps(state_facts(loaded))
    loaded.report()
    loaded.readout(2)
    return "done"


def draw_job(rng: random.Random) -> Files:
    """Odd files of a job, most of them sealed as if they were sound."""
    files = odd("job")(rng)
    plan = None
    for name in sorted(files, key=lambda name: name != "plan.json"):
        try:
            about = json.loads(files[name])
        except (ValueError, RecursionError):
            continue
        if isinstance(about, dict) and rng.random() < 0.8:
            about = {key: value for key, value in about.items() if key != "sha256"}
            about |= {"plan": plan} if plan and "plan" in about else {}
            with suppress(ValueError):  # not finite
                about = sealed(about)
            files[name] = json.dumps(about).encode("utf-8", "surrogatepass")
            plan = about.get("sha256") if name == "plan.json" else plan
    return files


def a_job(folder: Path) -> str:
    for path in list(folder.iterdir()):
        place = folder / "job" / path.name.replace("-", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    for name in ("parts", "checked"):
        (folder / "job" / name).mkdir(parents=True, exist_ok=True)
    job.status(folder / "job")
    try:
        job.join(folder / "job")
    except GloraError:
        job.work(folder / "job", 0, 1)
        job.join(folder / "job")
    return "done"


def draw_config(rng: random.Random) -> Files:
    text = rng.choice(list(shipped().values())).read_text()
    return {"config.toml": mutated_toml(text, rng)}


def config(folder: Path) -> str:
    loaded = load_config(folder / "config.toml")
    for label in loaded.methods:
        loaded.method(label).check(loaded.ranks, loaded.clients.start == "shared")
    return "done"


def as_run(folder: Path) -> Path:
    """The files as a run's folder below a home."""
    inner = folder / "home" / "small" / "it" / "seed0"
    inner.mkdir(parents=True)
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(inner / path.name)
    return inner


def report(folder: Path) -> str:
    as_run(folder)
    runs, sweeps = load_runs([folder / "home"])
    for mine in by_config(runs).values():
        markdown(summarise(mine, sweeps))
    return "done"


def resume(folder: Path) -> str:
    from glora_ops.fl.methods import METHODS
    from glora_ops.fl.server import Setup

    inner = as_run(folder)
    (inner / "done").unlink(missing_ok=True)
    about = json.loads(sound()["run"]["run.json"])
    setup = Setup({"m": (4, 4)}, (2, 2), 2.0, {}, True, 0)
    fresh = METHODS["fedit"]().start(setup)
    record = Run(inner)
    if record.begin(about, resume=True):
        record.restore(fresh)
    return "done"


def draw_reply(rng: random.Random) -> Files:
    form = {"examples": 3, "metrics": {"loss": 0.5}, "state": "ab" * 16, "process": 4}
    arrays = [
        ["factors/m/B", "bfloat16", [2, 3], "glora.raw", 12],
        ["dense/h", "bfloat16", [4], "glora.raw", 8],
    ]
    files = {"about": json.dumps(form).encode(), "arrays": json.dumps(arrays).encode()}
    if rng.random() < 0.5:
        return files | {"about": as_json(mutated(form, rng), rng)}
    return files | {"arrays": json.dumps(mutated(arrays, rng)).encode()}


def reply(folder: Path) -> str:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from glora_ops.fl.flower.codec import Trained, form_of, tensors_of

    content = RecordDict()
    text = (folder / "about").read_bytes().decode("utf-8", "replace")
    try:
        content["about"] = ConfigRecord({"json": text})
        made = {}
        for name, dtype, shape, stype, size in json.loads((folder / "arrays").read_bytes()):
            made[name] = Array(dtype, tuple(shape), stype, bytes(min(size, 10**6)))
        content["tensors"] = ArrayRecord(made)
    except (TypeError, ValueError, OverflowError, KeyError):
        return "not a message"
    form_of(content, Trained)
    tensors_of(content, "bfloat16")
    return "done"


ARGUMENTS = [
    "ann", "bob", "nowhere", "out", "server.safetensors", "w.json", "c.toml", "--rank", "--readout",
    "-r", "-o", "--out", "--weights", "--basis", "--missing", "--captured", "--seed", "--json",
    "--plot", "--overwrite", "--update", "--dry-run", "--include", "--dtype", "bf16", "-v", "-q",
    "--device", "--threads", "--set", "--add", "--remove", "--base", "--no-normalise", "--pad",
    "--on-bad-client", "--dense", "--help", "--version", "consensus", "projector", "update", "zero",
    "trainable", "skip", "auto", "2", "0", "-1", "3,1", "nan", "1e999", "", "p.png", "9" * 30, "é",
    "--methods", "--seeds", "--resume", "--", "\udcff", "$x$", "x=ann", "x=bob", "--clients",
]  # fmt: skip
COMMANDS = [
    ["aggregate", "ann", "bob", "-o", "out"],
    ["update", "server.safetensors", "--add", "bob", "-o", "out"],
    ["readout", "server.safetensors", "-r", "2", "-o", "out"],
    ["aggregate", "c.toml", "-o", "out"],
    ["apply", "ann", "--base", "bob", "-o", "out"],
    ["inspect", "ann"],
    ["inspect", "server.safetensors"],
    ["compare", "ann", "bob"],
    ["fl", "report", "ann", "-o", "out"],
    ["fl", "run", "c.toml", "-o", "out"],
    ["fl", "configs"],
    [],
]


def draw_command(rng: random.Random) -> Files:
    arguments = list(rng.choice(COMMANDS))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randint(0, len(arguments))
        if rng.random() < 0.2 and arguments:
            del arguments[min(at, len(arguments) - 1)]
        else:
            arguments.insert(at, rng.choice(ARGUMENTS))
    files: Files = {"arguments": json.dumps(arguments).encode()}
    for name in ("ann", "bob"):
        made = odd("client")(rng) if rng.random() < 0.2 else sound()["client"]
        files |= {f"{name}/{inner}": content for inner, content in made.items()}
    files |= odd("state")(rng) if rng.random() < 0.2 else sound()["state"]
    files["w.json"] = as_json(mutated({"ann": 1, "bob": 2}, rng), rng)
    files["c.toml"] = b'name = "x"\n[methods.a]\nkind = "nothing"\n'  # so that nothing is trained
    return files


def command(folder: Path) -> str:
    from contextlib import chdir  # type: ignore[attr-defined,unused-ignore]  # from 3.11 on

    from typer.testing import CliRunner

    from glora_ops.cli import app

    arguments = json.loads((folder / "arguments").read_bytes())
    with chdir(folder):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2, 3), result.output
    return {0: "done", 1: "refused", 2: "usage", 3: "done"}[result.exit_code]


def draw_header(rng: random.Random) -> Files:
    content = sound()["client"]["adapter_model.safetensors"]
    return {"adapter_model.safetensors": odd_file("x.safetensors", content, rng)}


TARGETS = {
    "header": Target(20, draw_header, header),
    "adapter": Target(20, odd("client"), adapter),
    "patterns": Target(10, draw_patterns, patterns),
    "weights": Target(8, draw_weights, weights),
    "list": Target(5, draw_list, client_list),
    "one file": Target(8, draw_one_file, one_file),
    "state": Target(10, odd("state"), state),
    "config": Target(10, draw_config, config),
    "report": Target(8, odd("run"), report),
    "resume": Target(6, odd("run"), resume),
    "job": Target(4, draw_job, a_job),
}
if sys.version_info >= (3, 11):  # Flower, and a change of folder for a while
    TARGETS |= {"reply": Target(6, draw_reply, reply), "command": Target(2, draw_command, command)}


def outcome(target: str, files: Files, folder: Path) -> str:
    """What comes of an input: "done", "refused", "usage"; whatever else is raised is a finding."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return TARGETS[target].judge(folder)
        except GloraError as error:
            refusal = error
    assert refusal.refusals
    assert len(str(refusal)) < 200_000
    return "refused"
