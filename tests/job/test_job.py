"""An aggregation in parts gives the files of one process, whoever makes the parts, how often."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from job_clients import save_client, save_clients
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glora_ops import aggregate_adapters, batches, job
from glora_ops.cli import app
from glora_ops.errors import GloraError, GloraWarning, Refused
from glora_ops.job.parts import device_of
from glora_ops.state import State

LIMIT = 20_000  # bytes: the twelve modules are then four parts and more
pytestmark = pytest.mark.filterwarnings("ignore::glora_ops.errors.GloraWarning")


def glora(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def saved(state: State, path: Path) -> bytes:
    """The bytes of a state's file, at one and the same place."""
    state.save(path)
    return path.read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def clients(tmp_path: Path) -> list[Path]:
    return save_clients(tmp_path / "clients")


SETTINGS: list[dict[str, Any]] = [
    {},
    {"basis": "update", "rank": 5, "seed": 3},
    {"basis": "update", "normalise": False, "weights": [1.0, 0.5, 2.0, 0.25]},
    {"include": ["q_proj", "v_proj"], "exclude": ["*.layers.0.*"], "max_bytes": 4_000},
    {"missing": "renormalise", "tau_rel": 0.2, "oversample": 4, "client_statistics": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_job_gives_the_bytes_of_one_process(
    clients: list[Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Files of the state, with full weights of some clients, and a module that one lacks."""
    lacking = clients[1] / "adapter_model.safetensors"
    left = {k: v for k, v in load_file(lacking).items() if "layers.2.q_proj" not in k}
    save_file(left, lacking)
    how = {"max_bytes": LIMIT} | settings
    expected = saved(aggregate_adapters(clients, **how), tmp_path / "state.safetensors")
    weights = how.pop("weights", None)
    planned = job.plan(clients, tmp_path / "job", weights, **how)
    assert len(planned.about["parts"]) > 1
    for index in (2, 0, 1):
        job.work(tmp_path / "job", index, 3)
    assert saved(job.join(tmp_path / "job"), tmp_path / "state.safetensors") == expected


def test_any_number_of_workers_in_any_order_makes_the_same_parts(
    clients: list[Path], tmp_path: Path
) -> None:
    seen = set()
    for of in (1, 2, 3, 7):
        for order in random.Random(of).sample([*permutations(range(of))], min(of, 2)):
            folder = tmp_path / f"job{of}-{order[0]}"
            job.plan(clients, folder, max_bytes=LIMIT)
            for index in order:
                job.work(folder, index, of)
            parts = files(folder / "parts")
            parts = {name: x for name, x in parts.items() if name.endswith(".safetensors")}
            seen.add(tuple(sorted(parts.items())))
    assert len(seen) == 1


def test_commands_say_who_is_left_out_and_what_is_missing(
    clients: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "job"
    plan = ["job", "plan", *clients, tmp_path / "nix", "-o", place, "--on-bad-client", "skip"]
    said = glora(*plan, code=3)
    assert said.startswith("skipped: client 'nix': no such folder")
    assert f"next: glora job work {place}" in said
    assert "next:" not in glora(*plan, "-q", code=3)
    parts = len(job.read_job(place).about["parts"])
    missing = ", ".join(map(str, range(parts)))
    assert f"parts made: 0 of {parts}; missing: {missing}\n" in glora("job", "status", place)
    assert glora("job", "work", place, "-q") == ""
    assert f"0 parts made, {parts} there already\n" in glora("job", "work", place)
    assert glora("job", "join", place, "-o", tmp_path / "out", "-q", code=3).startswith("skipped:")


def test_a_folder_without_a_plan_is_refused_with_the_clients(
    clients: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    command = ["job", "plan", *clients, tmp_path / "nix", "-o", tmp_path / "taken", "--json"]
    first, second = json.loads(glora(*command, code=1))["refused"]
    assert first["found"] == f"the existing {str(tmp_path / 'taken')!r}"
    assert "overwrite" not in first["remedy"]  # which a plan does not take
    assert second["client"] == "nix"


def test_workers_compute_on_the_threads_that_are_asked_for(
    clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glora("job", "plan", *clients, "-o", tmp_path / "job")
    seen: list[int] = []
    plain = job.work

    def watched(*args: object, **kwargs: object) -> object:
        seen.append(torch.get_num_threads())
        return plain(*args, **kwargs)

    def launched(command: list[str], env: dict[str, str], **_: object) -> object:
        seen.append(int(env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(job, "work", watched)
    monkeypatch.setattr(subprocess, "run", launched)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    glora("job", "work", tmp_path / "job", "--threads", 3)
    glora("job", "work", tmp_path / "job", "--workers", 2, "--threads", 5)
    glora("job", "work", tmp_path / "job", "--workers", 2)
    before = torch.get_num_threads()
    assert seen == [3, 5, 5, 2, before]


def test_the_commands_give_the_folder_of_aggregate(clients: list[Path], tmp_path: Path) -> None:
    settings = ["--rank", "6", "--weights", "3,1,2,1", "--seed", "5"]
    glora("aggregate", *clients, "-o", tmp_path / "out", "--readout", "2,6", *settings)
    expected = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    glora("job", "plan", *clients, "-o", tmp_path / "job", *settings)
    told = json.loads(glora("job", "status", tmp_path / "job", "--json"))
    assert len(told["missing"]) == told["parts"] > 1
    assert told["left"] is None
    glora("job", "work", tmp_path / "job", "--index", "0", "--of", "2")
    glora("job", "join", tmp_path / "job", "-o", tmp_path / "out", code=1)
    glora("job", "work", tmp_path / "job", "--index", "1", "--of", "2")
    told = json.loads(glora("job", "status", tmp_path / "job", "--json"))
    assert (told["missing"], told["unchecked"], told["left"]) == ([], [], 0)
    glora("job", "join", tmp_path / "job", "-o", tmp_path / "out", "--readout", "2,6")
    assert files(tmp_path / "out") == expected


def test_skipped_clients_are_those_of_one_process(clients: list[Path], tmp_path: Path) -> None:
    """One whose header is damaged, one whose values are: with what is said of them."""
    (clients[1] / "adapter_model.safetensors").write_bytes(b"nothing")
    bad = clients[2] / "adapter_model.safetensors"
    save_file({k: x * float("nan") if "v_proj" in k else x for k, x in load_file(bad).items()}, bad)
    how: dict[str, Any] = {"on_bad_client": "skip", "max_bytes": LIMIT}
    expected = saved(aggregate_adapters(clients, **how), tmp_path / "state.safetensors")
    planned = job.plan(clients, tmp_path / "job", **how)
    assert [entry["kept"] for entry in planned.about["clients"]] == [True, False, False, True]
    job.work(tmp_path / "job", 0, 1)
    state = job.join(tmp_path / "job")
    assert len(state.settings["skipped"]) == 6  # five of one kind are listed
    assert saved(state, tmp_path / "state.safetensors") == expected


def test_values_that_cannot_be_computed_with_are_refused_by_whoever_reads_them(
    clients: list[Path], tmp_path: Path
) -> None:
    bad = clients[3] / "adapter_model.safetensors"
    save_file({k: x * float("inf") for k, x in load_file(bad).items()}, bad)
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    for index in (0, 1):  # only the first checks clients; the second meets them in its modules
        with pytest.raises(Refused, match="c3"):
            job.work(tmp_path / "job", index, 2)
    assert files(tmp_path / "job").keys() == {"plan.json"}


def test_what_is_done_is_not_done_again(
    clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    first = job.work(tmp_path / "job", 0, 2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "job").rglob("*") if p.is_file()}
    every = job.work(tmp_path / "job", 0, 1)
    assert every.found == first.made
    assert sorted(every.made + every.found) == [*range(len(planned.about["parts"]))]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert job.plan(clients, tmp_path / "job", max_bytes=LIMIT) == planned  # kept, parts and all
    worker = sys.modules["glora_ops.job.work"]
    monkeypatch.setattr(worker, "look_again", None)  # nothing is even looked at
    assert job.work(tmp_path / "job", 0, 1).made == []


def test_another_plan_takes_nobodys_folder(clients: list[Path], tmp_path: Path) -> None:
    job.plan(clients, tmp_path / "job")
    job.work(tmp_path / "job", 0, 1)
    before = files(tmp_path / "job")
    with pytest.raises(GloraError, match="another plan"):
        job.plan(clients, tmp_path / "job", rank=3)
    assert files(tmp_path / "job") == before


def test_a_plan_given_again_clears_away_what_a_killed_one_left(
    clients: list[Path], tmp_path: Path
) -> None:
    job.plan(clients, tmp_path / "job")
    left = tmp_path / ".job.deadbeef.new"
    left.mkdir()
    job.plan(clients, tmp_path / "job")
    assert not left.exists()


CHANGES = {
    "adapter_model.safetensors": "size|mtime_ns|inode",
    "adapter_config.json": "config_sha256",
    "glora.json": "num_examples",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_client_that_changes_after_the_plan_is_refused_by_name(
    clients: list[Path], tmp_path: Path, name: str
) -> None:
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    job.work(tmp_path / "job", 0, 2)
    save_client(tmp_path / "new", 77, 4, head=True, alpha=3)
    shutil.copy(tmp_path / "new" / name, clients[2] / name)
    for of in (2, 1):
        with pytest.raises(Refused) as refused:
            job.work(tmp_path / "job", of - 1, of)
        (refusal,) = refused.value.refusals
        assert (refusal.client, refusal.file) == ("c2", name)
        assert refusal.found.split()[0] in CHANGES[name].split("|")


def test_a_client_that_is_gone_is_refused_by_name(clients: list[Path], tmp_path: Path) -> None:
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    job.work(tmp_path / "job", 0, 1)
    shutil.rmtree(clients[1])
    with pytest.raises(Refused, match="client 'c1'"):
        job.join(tmp_path / "job")


DAMAGES = {
    "a bit of a tensor": lambda made: flip(made.with_suffix(".safetensors")),
    "a bit of the header": lambda made: flip(made.with_suffix(".safetensors"), 300),
    "half of it": lambda made: os.truncate(made.with_suffix(".safetensors"), 900),
    "a receipt's digit": lambda made: flip(made, made.read_bytes().index(b'"seconds": 0') + 11),
    "an empty receipt": lambda made: made.write_bytes(b""),
    "a receipt that is a list": lambda made: made.write_text("[1]"),
    "another part": lambda made: shutil.copy(
        made.with_name("00000.safetensors"), made.with_suffix(".safetensors")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_by_name_and_made_again(
    clients: list[Path], tmp_path: Path, damage: str
) -> None:
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    job.work(tmp_path / "job", 0, 1)
    part = tmp_path / "job" / "parts" / "00001.safetensors"
    whole = part.read_bytes()
    DAMAGES[damage](part.with_suffix(".json"))
    with pytest.raises(Refused) as refused:
        job.join(tmp_path / "job")
    assert all("00001" in (refusal.file or "") for refusal in refused.value.refusals)
    with pytest.warns(GloraWarning, match="part 1 is made again"):
        assert job.work(tmp_path / "job", 0, 1).again == [1]
    assert part.read_bytes() == whole
    job.join(tmp_path / "job")


def test_a_damaged_check_is_made_again(clients: list[Path], tmp_path: Path) -> None:
    job.plan(clients, tmp_path / "job")
    job.work(tmp_path / "job", 0, 1)
    check = tmp_path / "job" / "checked" / "00000.json"
    whole = check.read_bytes()
    flip(check, whole.index(b'"files": ["') + 12)
    with pytest.raises(Refused, match="check"):
        job.join(tmp_path / "job")
    job.work(tmp_path / "job", 0, 1)
    assert check.read_bytes() == whole


@pytest.mark.parametrize("name", ["parts/00001.safetensors", "parts/00001.json", "parts"])
def test_a_link_in_a_job_leads_no_worker_elsewhere(
    clients: list[Path], tmp_path: Path, name: str
) -> None:
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    elsewhere = tmp_path / "elsewhere"
    if name == "parts":
        elsewhere.mkdir()
        (tmp_path / "job" / name).rmdir()
    else:
        elsewhere.write_text("precious")
    (tmp_path / "job" / name).symlink_to(elsewhere)
    with pytest.raises(GloraError, match="remove the link"):
        job.work(tmp_path / "job", 0, 1)
    assert files(elsewhere) == {} if name == "parts" else elsewhere.read_text() == "precious"


def test_parts_of_another_plan_are_not_taken(clients: list[Path], tmp_path: Path) -> None:
    for name, rank in (("job", 4), ("other", 5)):
        job.plan(clients, tmp_path / name, rank=rank, max_bytes=LIMIT)
        job.work(tmp_path / name, 0, 1)
    for suffix in (".safetensors", ".json"):
        name = f"parts/00002{suffix}"
        shutil.copy(tmp_path / "other" / name, tmp_path / "job" / name)
    with pytest.raises(Refused, match="of another plan"):
        job.join(tmp_path / "job")
    assert job.work(tmp_path / "job", 0, 1).again == [2]


def test_parts_of_different_processors_are_not_mixed(
    clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    job.work(tmp_path / "job", 0, 2)
    monkeypatch.setattr("glora_ops.job.parts.processor", lambda device: "abacus")
    job.work(tmp_path / "job", 1, 2)
    with pytest.raises(Refused, match="abacus"):
        job.join(tmp_path / "job")


def test_a_damaged_plan_is_refused(clients: list[Path], tmp_path: Path) -> None:
    job.plan(clients, tmp_path / "job")
    path = tmp_path / "job" / "plan.json"
    about = json.loads(path.read_text())
    for change in (
        {"rank": 7}, {"rank": "7"}, {"more": 1}, {"parts": []}, {"sha256": "0" * 64},
        {"clients": about["clients"] * 2},
    ):  # fmt: skip
        path.write_text(json.dumps(about | change))
        with pytest.raises(GloraError, match="plan the job anew"):
            job.work(tmp_path / "job", 0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "auto"}, "rank.*every module once"),
        ({"robust": "gate"}, "robust.*every module once"),
        ({"scratch": "/tmp"}, "scratch.*every module once"),
        ({"basics": "update"}, r"arguments\.basics"),
    ],
)
def test_what_no_job_has_is_refused_by_name(
    clients: list[Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(GloraError, match=message):
        job.plan(clients, tmp_path / "job", **settings)
    assert not (tmp_path / "job").exists()


LAUNCHED: list[tuple[dict[str, str], dict[str, int], tuple[int, int]]] = [
    ({}, {}, (0, 1)),
    ({}, {"index": 2, "of": 3}, (2, 3)),
    ({"RANK": "1", "WORLD_SIZE": "4"}, {}, (1, 4)),
    ({"RANK": "1", "WORLD_SIZE": "4"}, {"index": 3, "of": 5}, (3, 5)),
    (
        {
            "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5",
            "SLURM_PROCID": "0", "SLURM_NTASKS": "1",
        },
        {}, (2, 4),
    ),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, {}, (3, 8)),
    ({"JOB_COMPLETION_INDEX": "5"}, {"of": 6}, (5, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "given", "expected"), LAUNCHED)
def test_launchers_say_which_worker_it_is(
    environment: dict[str, str], given: dict[str, int], expected: tuple[int, int]
) -> None:
    assert job.share(**given, environment=environment) == job.Share(*expected)


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        ({"JOB_COMPLETION_INDEX": "5"}, {}), ({}, {"index": 1}), ({}, {"of": 2}),
        ({}, {"index": 2, "of": 2}), ({}, {"index": -1, "of": 2}), ({"RANK": "x"}, {}),
    ],
)  # fmt: skip
def test_a_worker_that_is_none_is_refused(
    environment: dict[str, str], given: dict[str, int]
) -> None:
    with pytest.raises(GloraError, match=r"--of|index"):
        job.share(**given, environment=environment)


def test_a_status_tells_what_is_missing_and_estimates_by_bytes(
    clients: list[Path], tmp_path: Path
) -> None:
    planned = job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    assert job.status(tmp_path / "job").left is None
    job.work(tmp_path / "job", 0, 2)
    found = job.status(tmp_path / "job")
    sizes = [part["bytes"] for part in planned.about["parts"]]
    done = [number for number in range(len(sizes)) if number % 2 == 0]
    assert found.missing == [number for number in range(len(sizes)) if number % 2]
    assert (found.unchecked, found.checks) == ([], 1)
    assert found.left == pytest.approx(
        found.seconds * sum(sizes[n] for n in found.missing) / sum(sizes[n] for n in done)
    )
    job.work(tmp_path / "job", 1, 2)
    assert job.status(tmp_path / "job").left == 0


def test_an_executor_does_the_work_and_raises_what_a_worker_refuses(
    clients: list[Path], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"max_bytes": LIMIT, "weights": [1, 2, 3, 4]}
    expected = saved(aggregate_adapters(clients, **how), tmp_path / "state.safetensors")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        state = aggregate_adapters(clients, executor=pool, workers=3, **how)
        assert saved(state, tmp_path / "state.safetensors") == expected
        bad = clients[3] / "adapter_model.safetensors"
        save_file({k: x * float("inf") for k, x in load_file(bad).items()}, bad)
        with pytest.raises(Refused) as refused:
            aggregate_adapters(clients, executor=pool, job=tmp_path / "again", workers=2, **how)
    assert {refusal.client for refusal in refused.value.refusals} == {"c3"}


def test_no_worker_holds_more_factors_than_of_a_part_for_each_of_its_threads(
    clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = job.plan(clients, tmp_path / "job", max_bytes=LIMIT)
    most = held = 0
    stack = batches._stack

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def counted(*arguments: Any) -> list[torch.Tensor]:
        nonlocal held, most
        made = stack(*arguments)
        size = sum(x.numel() * x.element_size() for x in made[:2])
        held += size
        weakref.finalize(made[0], release, size)
        most = max(most, held)
        return made

    monkeypatch.setattr(batches, "_stack", counted)
    job.work(tmp_path / "job", 0, 1)
    largest = max(part["bytes"] for part in planned.about["parts"])
    assert largest <= most <= torch.get_num_threads() * largest


@pytest.mark.parametrize(
    ("environment", "place"),
    [({}, "cuda:0"), ({"LOCAL_RANK": "3"}, "cuda:3"), ({"SLURM_LOCALID": "1"}, "cuda:1")],
)
def test_of_several_gpus_each_worker_takes_that_of_its_local_rank(
    clients: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    place: str,
) -> None:
    monkeypatch.setattr("glora_ops.job.parts.available", torch.device)
    planned = job.plan(clients, tmp_path / "job", device="cuda")
    assert device_of(planned, environment) == torch.device(place)


def test_parts_for_a_gpu_are_its_batches(
    clients: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["glora_ops.job.plan"], "BATCH_BYTES", 1)
    cpu, gpu = (job.plan(clients, tmp_path / name, device=name).about for name in ("cpu", "cuda"))
    assert (len(cpu["parts"]), len(gpu["parts"])) == (12, 4)  # a module each; one for each shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name(clients: list[Path], tmp_path: Path) -> None:
    job.plan(clients, tmp_path / "job", device="cuda")
    with pytest.raises(GloraError, match=r"'cuda:0'.*that torch has here"):
        job.work(tmp_path / "job", 0, 1)
    with pytest.raises(Refused, match="local rank"):
        job.plan(clients, tmp_path / "other", device="cuda:1")
