"""Kills glora at arbitrary moments and looks at what is left: ``make crash``.

Each kill is a process of its own that aggregates, renews a state, reads out, plans, works on or
joins a job, or runs federated rounds, and that gets SIGKILL or SIGTERM: at a random moment, or
right before a random one of its calls that change files. Afterwards the output must be the old one
or the new one, whole. SIGTERM leaves nothing else behind. The command given again must end well,
give the bits of a run that was never killed, and leave nothing behind either.

Processes are forked from this one, which has imported everything: a kill takes a fraction of a
second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file

from glora_ops.cli import app

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod"}
CONFIG = """
name = "tiny"
[clients]
count = 2
ranks = [2]
[training]
rounds = 2
steps = 1
batch = 4
[evaluation]
by_rank = "never"
spectra = false
agreement = "never"
[methods.glora]
kind = "glora"
"""
Tree = dict[str, Any]


@dataclass
class Job:
    """A command, and what is to be found at its output."""

    name: str
    command: str
    output: str
    look: Callable[[Path], Tree]
    old: Tree
    new: Tree
    points: int = 0  # calls that change files
    seconds: float = 0.0


def files(folder: Path) -> Tree:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rounds(folder: Path) -> Tree:
    """A federated run: everything but how long it took; its files must be whole."""
    run = folder / "tiny" / "glora" / "seed0"
    found: Tree = {}
    if (run / "checkpoint.safetensors").exists():
        found["checkpoint"] = {
            k: x.tolist() for k, x in load_file(run / "checkpoint.safetensors").items()
        }
    if (run / "run.json").exists():
        found["run"] = json.loads((run / "run.json").read_text())
    if (run / "done").exists():
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found["lines"] = [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]
    return found


def parts(folder: Path) -> Tree:
    """A job: its parts, each whole; a receipt says also how long one took."""
    found = folder.glob("parts/*.safetensors")
    return {p.name: p.read_bytes() for p in found if p.with_suffix(".json").exists()}


def client(folder: Path, rank: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for module, (d_out, d_in) in {"a.q": (6, 5), "a.v": (7, 6)}.items():
        key = f"base_model.model.{module}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(rank, d_in, generator=draw)
        tensors[f"{key}B.weight"] = torch.randn(d_out, rank, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q", "v"],
              "base_model_name_or_path": "tiny", "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def forked(root: Path, command: str, point: int = 0, number: int = 0, limit: float = 0.0) -> int:
    """Run a command in a process of its own, killed at a point or after a while: its status."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.chdir(root)
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if number and not limit:
                sys.addaudithook(killer(point, number))
            app(command.split(), prog_name="glora")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 71
        finally:
            os._exit(code)
    if limit:
        time.sleep(limit)
        os.kill(pid, number)
    return os.waitpid(pid, 0)[1]


def changes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audited call is about to change a file or folder."""
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES or (event == "ctypes.dlsym" and "renameat2" in arguments)


def killer(point: int, number: int) -> Callable[[str, tuple[Any, ...]], None]:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if changes(event, arguments):
            count += 1
            if count == point:
                os.kill(os.getpid(), number)

    return hook


def measured(root: Path, command: str) -> tuple[int, float]:
    """How many calls of a command change files, and its seconds."""
    told, tell = os.pipe()
    pid, began = os.fork(), time.perf_counter()
    if not pid:
        try:
            os.chdir(root)
            count = Counter[bool]()
            sys.addaudithook(lambda event, arguments: count.update([changes(event, arguments)]))
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            app(command.split(), prog_name="glora")
        except SystemExit:
            os.write(tell, str(count[True]).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with os.fdopen(told) as file:
        points = int(file.read())
    os.waitpid(pid, 0)
    return points, time.perf_counter() - began


def hidden(root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in root.rglob(".*")]


def jobs(template: Path, only: str | None) -> list[Job]:
    """The commands, on a template of the folder they start in; each run once unkilled."""
    for seed, name in enumerate(("ann", "bob", "cyd"), start=1):
        client(template / "clients" / name, seed, seed)
    (template / "tiny.toml").write_text(CONFIG)
    both = "aggregate clients/ann clients/bob --readout 2,3"
    planned = f"job plan {template}/clients/ann {template}/clients/bob"
    for command in (
        f"{both} -o m", f"{both} -o again", "readout m -r 1 -o single",
        f"{planned} -o planned", f"{planned} -o worked", "job work worked",
    ):  # fmt: skip
        assert forked(template, command) == 0, command
    commands = {
        "aggregate": (f"{both} -o deep/out", "deep/out", files),
        "aggregate --overwrite": (
            "aggregate clients/cyd clients/bob --readout 2 -o again --overwrite",
            "again",
            files,
        ),
        "update": ("update m --add clients/cyd --remove bob", "m", files),
        "readout": ("readout m -r 2 -o single2", "single2", files),
        "readout --overwrite": ("readout m -r 3 -o single --overwrite", "single", files),
        "job plan": (f"{planned} -o deep/job", "deep/job", files),
        "job work": ("job work planned", "planned", parts),
        "job join": ("job join worked -o deep/joined --readout 2", "deep/joined", files),
        "fl run": ("fl run tiny.toml --seeds 1 -o runs --resume", "runs", rounds),
    }
    made = []
    for name in commands if only is None else [only]:
        command, output, look = commands[name]
        with tempfile.TemporaryDirectory() as folder:
            root = shutil.copytree(template, Path(folder) / "root")
            old = look(root / output)
            points, seconds = measured(root, command)
            job = Job(name, command, output, look, old, look(root / output), points, seconds)
            assert job.new != job.old, name
            assert not hidden(root), hidden(root)
        made.append(job)
    return made


def killed(job: Job, template: Path, draw: random.Random) -> tuple[str, str, int]:
    """One kill and what follows: the signal, what was found, and how much was left behind."""
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(template, Path(folder) / "root")
        number = draw.choice(SIGNALS)
        if draw.random() < 0.7:
            how: dict[str, Any] = {"point": draw.randint(1, job.points)}
        else:
            how = {"limit": draw.uniform(0, job.seconds)}
        status = forked(root, job.command, number=number, **how)
        case = f"{job.name}, {number.name}, {how}, status {status}"
        found, left = job.look(root / job.output), hidden(root)
        if found == job.new:
            what = "new"
        elif job.look is rounds or found == job.old:
            what = "old"
        elif job.look is parts and found.items() <= job.new.items():
            what = "some"
        else:
            raise AssertionError(f"{case}: neither old nor new")
        if number == signal.SIGTERM:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, 143, -signal.SIGTERM), case
            assert not left, f"{case}: {left}"
        code = os.waitstatus_to_exitcode(forked(root, job.command))
        assert code == 0 or (what == "new" and code == 1), f"{case}: again {code}"
        assert job.look(root / job.output) == job.new, f"{case}: again other bits"
        assert not hidden(root), f"{case}: again {hidden(root)}"
        return number.name, what, len(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="COMMAND", help="such as 'job join'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    leftovers: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        from glora_ops.fl import experiment  # noqa: F401  # imported once, for all that are forked
        from glora_ops.fl.tasks.digits import base_weights

        base_weights()
        template = Path(folder) / "template"
        made = jobs(template, options.only)
        for i in range(options.kills):
            job = made[i % len(made)]
            number, what, left = killed(job, template, draw)
            counts[job.name, number, what] += 1
            leftovers[job.name] += left > 0
    for (job_name, number, what), count in sorted(counts.items()):
        print(f"{job_name:22} {number:8} {what:4} {count:4}")
    print(
        f"{options.kills} kills: old or new whole each time, the same bits again; "
        f"{sum(leftovers.values())} left something behind, which the next run removed"
    )


if __name__ == "__main__":
    main()
