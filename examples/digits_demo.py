"""Eight clients, one small transformer, scikit-learn's digits: what merging does to the adapters.

Run `python examples/digits_demo.py --help`. The story is `one_seed`, top to bottom.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

ABOUT = """\
A small transformer (width 128) is pretrained on one part of scikit-learn's digits. Eight clients
with LoRA ranks 2 … 16, skewed labels and different amounts of data fine-tune PEFT adapters on
another part, whose digits lie on their side. `glora aggregate` merges their folders, and so do
PEFT's svd and zero-padded factor averaging. A table and a picture compare them on held-out digits.

Then every client sends the same update in another gauge, (B G, G⁻¹ A) with a random G of condition
10, and all of it is merged again: a merge that depends on more than the updates gives itself away.
"""
LEFT_BEHIND = """\
left behind in OUT:
  table.txt            the table and the sentences under it
  digits.png           the picture
  results.json         every number of every seed, with versions and machine
  runs/seed0/clients/  the clients' PEFT folders; try `glora inspect` and `glora compare` on them
  runs/seed0/merged/   what was made of them; every adapter loads with PeftModel
Everything below OUT/runs is replaced. Nothing is downloaded.
"""


def one_seed(seed: int, out: Path, step: Callable[[str], None]) -> dict:
    """Pretrain, let the clients learn, merge in every way, change the gauge, merge again."""
    from digits_clients import CLIENTS, fine_tune, regauge, skewed_split
    from digits_compare import merge_in_every_way, score

    from glora_ops.fl.tasks.digits import accuracy, pretrain, split_digits

    step("the base learns to read")
    pretraining, client_data, held_out = split_digits(seed)
    base = pretrain(pretraining, seed)
    held_out = held_out.on_their_side()

    parts = skewed_split(client_data.on_their_side(), seed)
    for client, part in zip(CLIENTS, parts, strict=True):
        step(f"{client.name} learns from {len(part)} digits")
        fine_tune(base, client, part, out / "clients" / client.name, seed)
    for i, client in enumerate(CLIENTS):
        regauge(out / "clients" / client.name, out / "regauged" / client.name, seed=100 * seed + i)

    outcomes, said = {}, {}
    for gauge, merged in (("clients", "merged"), ("regauged", "merged-regauged")):
        folders = [out / gauge / client.name for client in CLIENTS]
        step(f"merging, {gauge}")
        spawn = seed == 0 and gauge == "clients"
        made, said[gauge] = merge_in_every_way(base, folders, out / merged, spawn=spawn)
        step(f"scoring, {gauge}")
        outcomes[gauge] = {arm: score(base, folder, held_out) for arm, folder in made.items()}

    mean = outcomes["clients"]["mean"].update
    return {
        "seed": seed,
        "examples": [len(part) for part in parts],
        "labels": [len(part.y.unique()) for part in parts],
        "base_accuracy": accuracy(base, held_out),
        "arms": {
            arm: {
                "accuracy": before.accuracy,
                "captured": before.captured(mean),
                "regauged": {
                    "accuracy": after.accuracy,
                    "captured": after.captured(mean),
                    "change": after.change(before),
                },
            }
            for (arm, before), after in zip(
                outcomes["clients"].items(), outcomes["regauged"].values(), strict=True
            )
        },
        "glora": said,
    }


STEPS_PER_SEED = 13  # the calls of `step` above


def main() -> None:
    parser = argparse.ArgumentParser(
        description=ABOUT, epilog=LEFT_BEHIND, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder (%(default)s)")
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        help="repetitions of everything, from the split of the digits on (%(default)s); each takes "
        "about a quarter of a minute",
    )
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}, expected at least 1")

    # After --help, because torch and PEFT take seconds to import.
    started = time.perf_counter()
    import torch
    from digits_picture import picture
    from digits_report import LEGEND, machine, sentences, table
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    torch.set_num_threads(1)  # a second one gains a fifth, and loses more when shared
    out: Path = options.out
    own = out / ".digits-demo"  # whose the folder is: what an earlier demo left is done anew
    if out.exists() and any(out.iterdir()) and not own.exists():
        parser.error(f"--out: {out} holds other things; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    own.touch()
    shutil.rmtree(out / "runs", ignore_errors=True)

    seeds = []
    columns = (BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=STEPS_PER_SEED * options.seeds)
        for seed in range(options.seeds):
            which = f"seed {seed + 1} of {options.seeds}"

            def step(what: str, which: str = which) -> None:
                progress.update(task, advance=1, description=f"{which}: {what}")

            seeds.append(one_seed(seed, out / "runs" / f"seed{seed}", step))
            progress.console.print(f"{which} done after {time.perf_counter() - started:.0f} s")

    picture(seeds, out / "digits.png")
    results = {"machine": machine(), "seeds": seeds}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with (out / "table.txt").open("w") as file:
        for console in (Console(), Console(file=file, width=100)):
            console.print(table(seeds), f"\n{LEGEND}\n", highlight=False)
            for sentence in sentences(seeds):
                console.print(f"• {sentence}", highlight=False)
    merged = out / "runs" / "seed0"
    print(
        "\nSeed 0 as the clients sent it was merged by six commands such as\n"
        f"  glora aggregate {merged}/clients/* -o {merged}/merged/glora/consensus-R32 "
        "--rank 32 --readout 16,4 --basis consensus\n"
        "and the rest by the same command line inside this process, which saves its start-up.\n"
        f"{time.perf_counter() - started:.0f} s. Table, picture and every number are in {out}/"
    )


if __name__ == "__main__":
    main()
