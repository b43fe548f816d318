"""The arms: every way of merging the clients' folders ends in a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from digits_clients import CLIENTS, MAX_RANK, load
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from glora_ops.cli import app
from glora_ops.fl.tasks.digits import DigitTransformer, Part, accuracy

Update = dict[str, Tensor]  # module → ΔW

BASES = ("consensus", "projector", "update")
SERVERS = ((2 * MAX_RANK, (MAX_RANK, 4)), (4, (4,)))  # server rank, readout ranks


@dataclass(frozen=True)
class Arm:
    key: str
    label: str
    rank: int | None = None  # of the adapter
    server: int | None = None  # rank of glora's server state behind it
    basis: str | None = None


ALONE = tuple(Arm(client.name, f"{client.name} alone", client.rank) for client in CLIENTS)
MEAN = Arm("mean", "exact mean (PEFT cat)", sum(client.rank for client in CLIENTS))
FACTORS = Arm("factors", "zero-padded factor averaging", MAX_RANK)
PEFT_SVD = tuple(Arm(f"svd-r{r}", "PEFT svd", r) for r in (MAX_RANK, 4))
GLORA = tuple(
    Arm(f"{basis}-R{server}-r{rank}", f"glora {basis}", rank, server, basis)
    for server, ranks in SERVERS
    for rank in ranks
    for basis in BASES
)


def weights_of(folders: list[Path]) -> list[float]:
    """Shares of the examples, as `glora aggregate` takes them from the same files."""
    n = [json.loads((folder / "glora.json").read_text())["num_examples"] for folder in folders]
    return [n_i / sum(n) for n_i in n]


def average_factors(folders: list[Path], weights: list[float], out: Path) -> None:
    """Σ w_i A_i and Σ w_i s_i B_i, short factors padded with zeros to the largest rank.

    The scaling s_i = alpha/r goes into B_i, so one client alone would come out exact.
    """
    merged: dict[str, Tensor] = {}
    for folder, w in zip(folders, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        s = config["lora_alpha"] / config["r"]
        for key, x in load_file(folder / "adapter_model.safetensors").items():
            missing = MAX_RANK - config["r"]
            if ".lora_A." in key:
                term = w * torch.nn.functional.pad(x, (0, 0, 0, missing))
            else:
                term = w * s * torch.nn.functional.pad(x, (0, missing))
            merged[key] = merged[key] + term if key in merged else term
    out.mkdir(parents=True)
    save_file(merged, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {"r": MAX_RANK, "lora_alpha": MAX_RANK}
    (out / "adapter_config.json").write_text(json.dumps(config))


def merge_with_peft(
    base: DigitTransformer, folders: list[Path], weights: list[float], out: Path
) -> dict[str, Path]:
    """PEFT's own `add_weighted_adapter`: "cat" is the exact mean, "svd" truncates it."""
    model = load(base, folders[0])
    names = ["default"] + [folder.name for folder in folders[1:]]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, MEAN.key, combination_type="cat")
    for arm in PEFT_SVD:
        model.add_weighted_adapter(
            names, weights, arm.key, combination_type="svd", svd_rank=arm.rank
        )
    made = [arm.key for arm in (MEAN, *PEFT_SVD)]
    model.save_pretrained(out, selected_adapters=made, save_embedding_layers=False)
    return {key: out / key for key in made}


def merge_with_glora(
    folders: list[Path], out: Path, *, spawn: bool
) -> tuple[dict[str, Path], dict[str, dict]]:
    """`glora aggregate` for each server rank and basis: folders by arm, and what it said."""
    made, said = {}, {}
    for server, ranks in SERVERS:
        for basis in BASES:
            target = out / f"{basis}-R{server}"
            said[target.name] = glora_aggregate(folders, target, server, ranks, basis, spawn=spawn)
            made |= {f"{target.name}-r{rank}": target / f"r{rank}" for rank in ranks}
    return made, said


def glora_aggregate(
    folders: list[Path], out: Path, server: int, ranks: tuple[int, ...], basis: str, *, spawn: bool
) -> dict:
    """The command line, in a process of its own or, without its start-up time, in this one."""
    arguments = ["aggregate", *map(str, folders), "--out", str(out), "--rank", str(server)]
    arguments += ["--readout", ",".join(map(str, ranks)), "--basis", basis, "--json"]
    if spawn:
        glora = Path(sys.executable).with_name("glora")
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            [glora, *arguments], capture_output=True, text=True, env=os.environ | threads
        )
        code, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        result = CliRunner().invoke(app, arguments)
        code, printed, errors = result.exit_code, result.stdout, result.stderr
    if code != 0:
        raise SystemExit(f"glora {' '.join(arguments)}\nended with {code}: {printed}{errors}")
    said = json.loads(printed)
    return {
        "command": " ".join(["glora", *arguments]),
        "own_process": spawn,
        **{name: said[name] for name in ("rank", "basis", "captured", "attainable")},
    }


def merge_in_every_way(
    base: DigitTransformer, folders: list[Path], out: Path, *, spawn: bool
) -> tuple[dict[str, Path], dict[str, dict]]:
    """Every arm's folder by its key, the clients' own included; and what glora said."""
    weights = weights_of(folders)
    made = {arm.key: folder for arm, folder in zip(ALONE, folders, strict=True)}
    made |= merge_with_peft(base, folders, weights, out / "peft")
    average_factors(folders, weights, out / FACTORS.key)
    made[FACTORS.key] = out / FACTORS.key
    by_glora, said = merge_with_glora(folders, out / "glora", spawn=spawn)
    return made | by_glora, said


@dataclass(frozen=True)
class Outcome:
    accuracy: float
    update: Update

    def captured(self, mean: Update) -> float:
        """1 − ‖Ŵ − W̄‖² / ‖W̄‖² over all modules: the share of the exact mean's energy."""
        lost = sum((self.update[m] - w).square().sum() for m, w in mean.items())
        return 1 - float(lost / sum(w.square().sum() for w in mean.values()))

    def change(self, before: Outcome) -> float:
        """The largest change of any weight, in units of the largest entry of that module."""
        return max(
            float((self.update[m] - w).abs().max() / w.abs().max())
            for m, w in before.update.items()
        )


def score(base: DigitTransformer, folder: Path, held_out: Part) -> Outcome:
    """Load the folder with PEFT, read the held-out digits, keep ΔW of every module."""
    model = load(base, folder)
    update = {
        name: module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return Outcome(accuracy(model, held_out), update)
