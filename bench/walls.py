"""What many clients and large models cost in one process, and in two workers.

python bench/walls.py                     # all cases: twelve minutes, 7 GB in a temporary folder
python bench/walls.py --case 4000 --case headers

Each case runs in a process of its own, on one thread, `command-2` on two. Its results go into
results/walls.json, one entry a case: processor and wall seconds, peak of resident memory, what the
process had before it read anything. docs/scale.md shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folders import resident, write_clients

ROOT = Path(__file__).resolve().parent
STORED = ROOT / "results" / "walls.json"
SMALL = (8, 128, 4)  # modules, d_out = d_in, rank
SHAPED = (224, 8, 2)  # as many modules as Llama 2 7B adapts; the header does not tell their size


def write_alike(root: Path, clients: int, modules: int, width: int, rank: int) -> None:
    """Clients in fp32 whose values differ, without the cost of serialising each."""
    import torch
    from safetensors.torch import save

    draw = torch.Generator().manual_seed(0)
    names = [f"model.layers.{l}.self_attn.q_proj" for l in range(modules)]
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape, generator=draw)
        for name in names
        for side, shape in (("A", (rank, width)), ("B", (width, rank)))
    }
    whole = save(tensors, metadata={"format": "pt"})
    length = 8 + int.from_bytes(whole[:8], "little")
    values = torch.frombuffer(bytearray(whole[length:]), dtype=torch.float32)
    config = json.dumps(
        {
            "peft_type": "LORA",
            "base_model_name_or_path": "base",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj"],
        }
    )
    for i in range(clients):
        folder = root / f"client-{i:05}"
        folder.mkdir(parents=True)
        own = values + 0.5 * torch.randn(values.shape, generator=draw)
        content = whole[:length] + own.numpy().tobytes()
        (folder / "adapter_model.safetensors").write_bytes(content)
        (folder / "adapter_config.json").write_text(config)
        (folder / "glora.json").write_text(json.dumps({"num_examples": 100 + i % 900}))


# --- what a case does, in its own process ----------------------------------------------------


def _folders(root: Path) -> list[str]:
    return sorted(str(path) for path in root.iterdir() if path.name.startswith("client-"))


def aggregate_and_save(root: Path) -> None:
    import glora_ops

    state = glora_ops.aggregate_adapters(_folders(root), rank=16)
    state.save(root / "server.safetensors")


def run_command(root: Path, threads: int) -> None:
    """What a user types, as a process of its own."""
    clients, out = root / "clients.txt", root / "out"
    clients.write_text("".join(f"{folder}\n" for folder in _folders(root)))
    glora = [sys.executable, "-m", "glora_ops", "aggregate", "--clients", clients, "-o", out]
    how = ["--rank", "16", "--readout", "8", "--json", "-q", "--threads", str(threads)]
    subprocess.run([*glora, *how], check=True, stdout=subprocess.DEVNULL)


def inspect_headers(root: Path) -> Any:
    from glora_ops.merging.aggregate import inspect

    return inspect(_folders(root), None)


def plan_work_join(root: Path, workers: int) -> None:
    """Workers are processes of one thread each."""
    glora = [sys.executable, "-m", "glora_ops", "job"]
    job, out = root / "job", root / "out"
    clients = _folders(root)
    subprocess.run([*glora, "plan", *clients, "-o", job, "--rank", "32", "-q"], check=True)
    of = ["--of", str(workers), "--threads", "1", "-q"]
    running = [
        subprocess.Popen([*glora, "work", job, "--index", str(i), *of]) for i in range(workers)
    ]
    codes = [process.wait() for process in running]
    assert not any(codes)
    subprocess.run([*glora, "join", job, "-o", out, "-q"], check=True)


#: Name, clients, how they are written, what is measured.
CASES: dict[str, tuple[int, Callable[[Path, int], Any], Callable[[Path], Any]]] = {
    **{
        str(k): (k, lambda root, k: write_alike(root, k, *SMALL), aggregate_and_save)
        for k in (100, 1_000, 4_000, 20_000)
    },
    **{
        f"command-{n}": (
            20_000,
            lambda root, k: write_alike(root, k, *SMALL),
            lambda root, n=n: run_command(root, n),
        )
        for n in (1, 2)
    },
    "headers": (1_000, lambda root, k: write_alike(root, k, *SHAPED), inspect_headers),
    **{
        f"1b-{n}": (
            32,
            lambda root, k: write_clients(root, "llama-3.2-1b", k, 16),
            lambda root, n=n: plan_work_join(root, n),
        )
        for n in (1, 2)
    },
}


def measure(case: str, root: Path) -> None:
    """Run a case here, and print what it took as JSON."""
    import warnings

    import torch

    import glora_ops

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", glora_ops.GloraWarning)
    import glora_ops.merging.aggregate
    import glora_ops.state_schema  # which a first state imports

    before, began, used = resident("VmRSS"), time.perf_counter(), time.process_time()
    kept = CASES[case][2](root)
    wall, here = time.perf_counter() - began, time.process_time() - used
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "cpu_s": round(here + children.ru_utime + children.ru_stime, 2),
                "wall_s": round(wall, 2),
                "peak_mb": round(max(resident("VmHWM"), children.ru_maxrss * 1024 / 1e6)),
                "import_mb": round(before),
                "kept_mb": round(resident("VmRSS") - before),
            }
        )
    )
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="only these; repeatable")
    parser.add_argument("--measure", metavar="ROOT", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(*given.case, given.measure)

    from measure import conditions

    found = json.loads(STORED.read_text()) if STORED.exists() else {}
    for case in given.case or CASES:
        count, write, _ = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), count)
            command = [sys.executable, __file__, "--case", case, "--measure", folder]
            one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            run = subprocess.run(command, stdout=-1, check=True, env=os.environ | one)
        found[case] = json.loads(run.stdout) | {"clients": count, "conditions": conditions()}
        print(case, run.stdout.decode().strip(), flush=True)
        STORED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
