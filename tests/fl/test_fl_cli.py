"""`glora fl` from the command line: runs, resume, reports, refusals."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from typer.testing import Result as Said

from glora_ops.cli import app
from glora_ops.errors import GloraError
from glora_ops.fl.config import load_config, shipped
from glora_ops.fl.experiment import Result
from glora_ops.fl.load import load_runs
from glora_ops.fl.report_folder import markdown
from glora_ops.fl.summary import bootstrap, summarise

CONFIG = """
name = "tiny"
about = "Two methods, mixed ranks."
[clients]
count = 4
ranks = [2, 4]
[training]
rounds = 2
steps = 2
batch = 8
[sweep]
lrs = [0.001, 0.01]
rounds = 1
[methods.glora]
kind = "glora"
[methods.fedit]
kind = "fedit"
lr = 0.004
"""


def call(*arguments: object, code: int = 0) -> Said:
    done = CliRunner().invoke(app, ["fl", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    (root / "tiny.toml").write_text(CONFIG)
    said = call("run", root / "tiny.toml", "--seeds", 2, "-o", root / "runs").output
    assert "glora fl report" in said
    return root / "runs"


def test_run_writes_every_method_and_seed_and_the_sweep(runs: Path) -> None:
    for method in ("glora", "fedit"):
        for seed in (0, 1):
            folder = runs / "tiny" / method / f"seed{seed}"
            assert (folder / "done").exists()
            assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    swept = json.loads((runs / "tiny" / "sweep" / "glora.json").read_text())
    best = max(swept["scores"], key=swept["scores"].get)
    assert swept["chosen"] == float(best)
    assert not (runs / "tiny" / "sweep" / "fedit.json").exists()  # its own rate is given
    rates = [
        json.loads((runs / "tiny" / m / "seed1" / "run.json").read_text())["lr"]
        for m in ("glora", "fedit")
    ]
    assert rates == [swept["chosen"], 0.004]


def test_a_log_gets_a_line_of_progress_now_and_then(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "run", runs.parent / "tiny.toml", "--seeds", 1, "--methods", "fedit", "-o"
    assert "2 of 2" not in call(*arguments, tmp_path / "quick").stderr
    monkeypatch.setattr("glora_ops.cli.show.LOG_EVERY", 0.0)
    assert "tiny fedit seed 0 lr 0.004: 2 of 2\n" in call(*arguments, tmp_path / "long").stderr


def test_scores_of_single_tasks_do_not_crowd_the_table(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {f"{m}_{w}": 0.25 for m in ("exact_match", "rouge_l") for w in ("seen", "unseen")}
    scores |= {f"rouge_l_unseen/task{i}_of_some_length": 0.5 for i in range(9)}
    found = [Result("consensus-momentum", 0, tmp_path, scores)]
    monkeypatch.setattr("glora_ops.fl.experiment.run_experiment", lambda *a, **k: found)
    said = call("run", runs.parent / "tiny.toml", "-o", tmp_path).stdout
    above, header, row = said.splitlines()[:3]
    assert above.split() == ["exact_match", "exact_match", "rouge_l", "rouge_l"]
    assert header.split() == ["method", "seed", *["seen", "unseen"] * 2]
    assert row.split() == ["consensus-momentum", "0", *["0.2500"] * 4]


def test_how_often_is_judged_may_be_said_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(CONFIG.replace("rounds = 2", "rounds = 3"))
    call("run", tmp_path / "tiny.toml", "--methods", "fedit", "--seeds", 1, "--evaluate-every", 2,
         "-o", tmp_path)  # fmt: skip
    lines = (tmp_path / "tiny" / "fedit" / "seed0" / "metrics.jsonl").read_text().splitlines()
    assert ["metrics" in json.loads(line) for line in lines] == [True, False, True, True]


def test_shipped_configurations_judge_every_round() -> None:
    assert all(load_config(name).evaluation.every == 1 for name in shipped())


def test_run_again_needs_resume_and_then_changes_nothing(runs: Path) -> None:
    config = runs.parent / "tiny.toml"
    refused = call("run", config, "--seeds", 1, "-o", runs, code=1)
    assert "--resume" in refused.output
    before = (runs / "tiny" / "glora" / "seed0" / "metrics.jsonl").read_bytes()
    shown = call(
        "run", config, "--seeds", 1, "-o", runs, "--resume", "--methods", "glora", "--json"
    )
    assert [r["method"] for r in json.loads(shown.output)["results"]] == ["glora"]
    assert (runs / "tiny" / "glora" / "seed0" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (CONFIG.replace("[0.001, 0.01]", "[0.001, 0.02]"), "sweep.lrs"),
        (CONFIG.replace("rounds = 1", "rounds = 2"), "sweep.rounds 2 instead of 1"),
        (CONFIG.replace("count = 4", "count = 5"), "clients.count 5 instead of 4"),
        (CONFIG.replace("batch = 8", "batch = 9"), "training.batch 9 instead of 8"),
        (CONFIG.replace('"glora"', '"glora"\nrank = 3'), "methods.glora.rank 3 instead of None"),
    ],
)
def test_a_sweep_of_another_configuration_is_refused(
    now: str, words: str, runs: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(runs / "tiny" / "sweep", tmp_path / "runs" / "tiny" / "sweep")
    (tmp_path / "tiny.toml").write_text(now)
    said = call(
        "run", tmp_path / "tiny.toml", "-o", tmp_path / "runs", "--methods", "glora", code=1
    ).output
    assert words in said
    assert "lr0.001" in said
    assert not (tmp_path / "runs" / "tiny" / "glora").exists()


def test_a_run_in_which_nobody_replied_is_no_result(tmp_path: Path) -> None:
    """Neither printed, nor reported, nor chosen by a sweep."""
    diverging = CONFIG.replace("[0.001, 0.01]", "[1e30, 0.01]").replace("lr = 0.004", "lr = 1e30")
    (tmp_path / "tiny.toml").write_text(diverging)
    where = tmp_path / "tiny.toml", "--seeds", 1, "-o", tmp_path / "runs"
    said = call("run", *where, code=1).output
    assert "fedit seed 0: nobody replied in any round, nothing was learnt; 8 replies failed" in said
    assert [line.split()[0] for line in said.splitlines() if " 0  " in line] == ["glora"]
    sweep = json.loads((tmp_path / "runs/tiny/sweep/glora.json").read_text())
    assert (sweep["chosen"], list(sweep["scores"])) == (0.01, ["0.01"])
    told = json.loads(call("run", *where, "--resume", "--json", code=1).stdout)["results"]
    assert [r["status"] for r in told] == ["done", "nobody replied"]
    assert ["accuracy" in r for r in told] == [True, False]
    call("report", tmp_path / "runs", "-o", tmp_path / "report")
    (summary,) = json.loads((tmp_path / "report/report.json").read_text())
    assert list(summary["methods"]) == ["glora"]
    page = (tmp_path / "report/report.md").read_text()
    assert "Nobody replied, so that nothing was learnt, and left out: " in page
    assert "tiny/fedit/seed0" in page
    said = call("report", tmp_path / "runs/tiny/fedit", code=1).output
    assert "nobody replied in" in " ".join(said.split())


def test_a_finished_sweep_is_not_repeated(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "tiny" / "sweep", tmp_path / "runs" / "tiny" / "sweep")
    trial = tmp_path / "runs" / "tiny" / "sweep" / "glora" / "lr0.01" / "metrics.jsonl"
    before = trial.stat().st_mtime_ns
    call("run", runs.parent / "tiny.toml", "-o", tmp_path / "runs", "--methods", "glora",
         "--seeds", 1)  # fmt: skip
    assert trial.stat().st_mtime_ns == before
    done = tmp_path / "runs" / "tiny" / "glora" / "seed0"
    assert (done / "run.json").read_text() == (
        runs / "tiny" / "glora" / "seed0" / "run.json"
    ).read_text()


def test_report_has_tables_differences_sweeps_and_pictures(runs: Path, tmp_path: Path) -> None:
    said = call("report", runs, "-o", tmp_path / "out").output
    assert "fedit (zero-padded)" in said
    page = (tmp_path / "out" / "report.md").read_text()
    for wanted in ("glora minus the other", "95 % bootstrap interval", "Learning rates", "±",
                   "ranks 2, 4", "digits, 700 training examples", "All metrics",
                   "| loss | "):  # fmt: skip
        assert wanted in page
    for name in ("curves", "updates", "alignment"):
        assert (tmp_path / "out" / f"tiny-{name}.png").stat().st_size > 10_000
        assert f"(tiny-{name}.png)" in page
    (summary,) = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(summary["methods"]) == {"glora", "fedit"}


def test_the_reports_numbers_are_those_of_the_runs(runs: Path) -> None:
    found, sweeps = load_runs([runs])
    assert len(found) == 4
    summary = summarise(found, sweeps)
    lines = {
        (m, s): [json.loads(x) for x in
                 (runs / "tiny" / m / f"seed{s}" / "metrics.jsonl").read_text().splitlines()]
        for m in ("glora", "fedit") for s in (0, 1)
    }  # fmt: skip
    last = {key: x[-1]["metrics"]["accuracy"] for key, x in lines.items()}
    for m in ("glora", "fedit"):
        both = [last[m, 0], last[m, 1]]
        row = summary["methods"][m]
        assert row["score"]["mean"] == pytest.approx(np.mean(both))
        assert row["score"]["spread"] == pytest.approx(np.std(both, ddof=1))
        by_rank = [
            np.mean([lines[m, s][-1]["by_rank"][r]["accuracy"] for r in ("2", "4")]) for s in (0, 1)
        ]
        assert row["received"]["mean"] == pytest.approx(np.mean(by_rank))
        losses = [lines[m, s][-1]["metrics"]["loss"] for s in (0, 1)]
        assert row["metrics"]["loss"]["mean"] == pytest.approx(np.mean(losses))
        sent = [sum(x["bytes_up"] for x in lines[m, s]) for s in (0, 1)]
        assert row["megabytes_up"] == pytest.approx(np.mean(sent) / 1e6)
    gains = [last["glora", s] - last["fedit", s] for s in (0, 1)]
    difference = summary["differences"]["fedit"]
    assert difference["gains"] == pytest.approx(gains)
    assert difference["low"] == pytest.approx(min(gains))
    assert difference["high"] == pytest.approx(max(gains))
    assert difference["rough"]


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        low, high = bootstrap(rng.normal(0.3, 1.0, size=25).tolist())
        assert low is not None
        assert high is not None
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 300 <= 0.98
    assert bootstrap([1.0]) == (None, None)


def test_unfinished_runs_are_left_out_and_named(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "fedit" / "seed1" / "done").unlink()
    found, sweeps = load_runs([tmp_path / "runs"])
    summary = summarise(found, sweeps)
    assert summary["methods"]["fedit"]["seeds"] == [0]
    assert len(summary["unfinished"]) == 1
    assert summary["differences"]["fedit"]["low"] is None
    row = summary["methods"]["fedit"]
    assert f"| {row['score']['mean']:.4f} |" in markdown(summary)  # one seed has no spread


def test_a_configuration_without_a_finished_run_does_not_stop_the_report_of_others(
    runs: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    for path in (tmp_path / "runs" / "tiny").rglob("seed0/run.json"):
        to = tmp_path / "runs" / "queued" / path.parent.parent.name / "seed0"
        shutil.copytree(path.parent, to)
        (to / "done").unlink()
        about = json.loads(path.read_text())
        about["config"]["name"] = "queued"
        (to / "run.json").write_text(json.dumps(about))
    shown = call("report", tmp_path / "runs", "-o", tmp_path / "report")
    assert shown.exit_code == 0
    page = (tmp_path / "report" / "report.md").read_text()
    for text in (page, shown.output):
        assert "left out" in text
        assert "queued/glora/seed0" in text.replace("\n", "")
    assert "## tiny" in page
    told = json.loads(call("report", tmp_path / "runs", "-o", tmp_path / "r", "--json").output)
    assert [Path(x).parts[-3:] for x in told["unfinished"] if "glora" in x] == [
        ("queued", "glora", "seed0")
    ]
    shutil.rmtree(tmp_path / "runs" / "tiny")
    assert "finished" in call("report", tmp_path / "runs", code=1).output


def test_report_from_inside_a_folder_and_not_of_two_experiments_at_once(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.chdir(runs / "tiny")
    found, sweeps = load_runs([Path(".")])
    assert len(found) == 4
    assert summarise(found, sweeps)["sweeps"].keys() == {"glora"}
    shutil.copytree(runs / "tiny", tmp_path / "other" / "tiny")
    found, sweeps = load_runs([runs, tmp_path / "other"])
    with pytest.raises(GloraError, match="one run of a method and seed"):
        summarise(found, sweeps)
    for path in (tmp_path / "other").rglob("run.json"):
        about = json.loads(path.read_text())
        about["config"]["training"]["steps"] = 5
        path.write_text(json.dumps(about))
    found, sweeps = load_runs([runs, tmp_path / "other"])
    with pytest.raises(GloraError, match="differ in training"):
        summarise(found, sweeps)


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"rank": 3}])
def test_seeds_of_another_rate_or_setting_are_not_averaged(
    change: dict[str, float], runs: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "tiny" / "glora" / "seed1" / "run.json"
    about = json.loads(path.read_text())
    (about if "lr" in change else about["config"]["methods"]["glora"]).update(change)
    path.write_text(json.dumps(about))
    with pytest.raises(GloraError, match="one setting of 'glora'"):
        summarise(*load_runs([tmp_path / "runs"]))


def test_partition_and_configs(runs: Path, tmp_path: Path) -> None:
    shown = call("partition", runs.parent / "tiny.toml", "--plot", tmp_path / "p.png", "--json")
    counts = np.array(json.loads(shown.output)["counts"])
    assert counts.shape == (4, 10)
    assert counts.sum() == 700
    assert (tmp_path / "p.png").exists()
    assert "digits_dirichlet" in call("configs").output
    copied = call("configs", "digits_iid").output
    assert copied == shipped()["digits_iid"].read_text()
    assert "digits_iid" in call("configs", "nowhere", code=1).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.toml"], ["nowhere.toml", "digits_dirichlet"]),
        (["run", "digits_dirichlet", "--methods", "best"], ["'best'", "fedit"]),
        (["run", "glue_dirichlet", "--data-dir", "/nowhere"], ["/nowhere/glue/sst2.train"]),
        (["run", "utf16.toml"], ["utf16.toml", "UTF-8"]),
        (["run", "keys.toml"], ["clients.colour", "'red'", "participation"]),
        (["run", "device.toml"], ["model.device", "'gpu'", "cpu always works"]),
        (["report", "/nowhere"], ["glora fl run"]),
    ],
)
def test_refusals(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("utf16.toml").write_text(CONFIG, encoding="utf-16")
    Path("keys.toml").write_text(CONFIG.replace("count = 4", 'count = 4\ncolour = "red"'))
    Path("device.toml").write_text(CONFIG + '[model]\ndevice = "gpu"\n')
    said = call(*arguments, code=1).output
    for word in words:
        assert word in said


@pytest.mark.parametrize("option", ["run --out", "run --tensorboard", "report --out"])
def test_a_file_where_a_folder_is_to_be_is_refused(option: str, runs: Path, tmp_path: Path) -> None:
    command, name = option.split()
    what = runs.parent / "tiny.toml" if command == "run" else runs
    (tmp_path / "file").write_text("mine")
    said = call(command, what, name, tmp_path / "file", code=2).output
    assert name in said
    assert "is a file" in " ".join(said.replace("│", " ").split())
    call(command, what, "-o", tmp_path / "file" / "below", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_one_rank_methods_with_mixed_ranks_are_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG + '[methods.ffa]\nkind = "ffa"\n[methods.ro]\nkind = "rolora"\n')
    said = call("run", path, "-o", tmp_path / "runs", code=1).output
    assert "FFALoRA" in said
    assert "RoLoRA" in said
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


# --- TensorBoard -------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show of a run, by name and step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(folder)).Reload()
    return {
        name: {event.step: event.value for event in shown.Scalars(name)}
        for name in shown.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_metrics_say_also_after_a_restart(
    runs: Path, tmp_path: Path
) -> None:
    """The run has lost its last round, and TensorBoard's folder holds a step that never was."""
    import shutil

    from glora_ops.fl.tensorboard import mirror

    shutil.copytree(runs / "tiny" / "fedit" / "seed0", tmp_path / "tiny" / "fedit" / "seed0")
    folder, board = tmp_path / "tiny" / "fedit" / "seed0", tmp_path / "board"
    with mirror(board / "tiny" / "fedit" / "seed0") as write:
        write({"round": 9, "failures": [], "metrics": {"accuracy": 2.0}})
    again = ("run", runs.parent / "tiny.toml", "--methods", "fedit", "--seeds", 1,
             "-o", tmp_path, "--resume", "--tensorboard", board)  # fmt: skip
    call(*again)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = events(board / "tiny" / "fedit" / "seed0")
    for name in ("accuracy", "loss"):
        wanted = {x["round"]: pytest.approx(x["metrics"][name]) for x in lines}
        assert shown[f"metrics/{name}"] == wanted
    assert shown["bytes_up"] == {x["round"]: x["bytes_up"] for x in lines}
    assert shown["update/captured"].keys() == {1, 2}
    assert shown["by_rank/4/accuracy"] == {2: pytest.approx(lines[-1]["by_rank"]["4"]["accuracy"])}


def test_without_tensorboard_the_option_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glora_ops.fl.tensorboard.find_spec", lambda name: None)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    said = call("run", tmp_path / "tiny.toml", "-o", tmp_path / "runs",
                "--tensorboard", tmp_path / "board", code=1).output  # fmt: skip
    assert "glora[tensorboard]" in said
    assert not (tmp_path / "runs").exists()


# --- whose files -------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_report_replaces_gloras_own_only(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("report", runs, "-o", out)
    before = contents(out)
    call("report", runs, "-o", out)
    assert contents(out) == before
    for name, content in (
        ("notes.md", b"mine"),
        ("report.md", before["report.md"].replace(b"# Federated runs", b"# What we learnt")),
        ("report.json", b"[]"),
        ("tiny-curves.png", b"holiday"),
    ):
        (out / name).write_bytes(content)
        said = call("report", runs, "-o", out, code=1).output
        assert name in said
        assert "nothing was written" in said
        assert contents(out) == before | {name: content}
        (out / name).unlink()
        if name in before:
            (out / name).write_bytes(before[name])
    call("report", runs, "-o", out)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_report_and_its_runs_lie_apart(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    before = contents(tmp_path)
    for out in ("runs", "runs/tiny", "runs/tiny/glora/seed0", "runs/tiny/glora/seed0/report"):
        said = call("report", tmp_path / "runs", "-o", tmp_path / out, code=1).output
        assert "lie in one another" in said
        assert contents(tmp_path) == before
    call("report", tmp_path / "runs")
    assert (tmp_path / "runs" / "report" / "report.md").exists()


def test_a_run_writes_over_nobodys_file(runs: Path, tmp_path: Path) -> None:
    """A sweep's outcome and a run's metrics that are somebody's."""
    home = tmp_path / "runs" / "tiny"
    for path in (home / "sweep" / "glora.json", home / "fedit" / "seed0" / "metrics.jsonl"):
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    for method, name in (("glora", "glora.json"), ("fedit", "metrics.jsonl")):
        arguments = ["--seeds", 1, "--methods", method, "-o", tmp_path / "runs"]
        assert name in call("run", runs.parent / "tiny.toml", *arguments, code=1).output
    assert set(contents(home).values()) == {b"mine"}


def test_a_partitions_picture_is_drawn_over_gloras_own_only(runs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    for _ in range(2):
        call("partition", runs.parent / "tiny.toml", "--plot", picture)
    picture.write_bytes(b"holiday")
    said = call("partition", runs.parent / "tiny.toml", "--plot", picture, code=1).output
    assert "glora did not write" in said
    assert picture.read_bytes() == b"holiday"


def test_runs_and_data_lie_apart(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "glue" / "tiny").mkdir(parents=True)
    said = call("run", runs.parent / "tiny.toml", "--data-dir", tmp_path / "data",
                "-o", tmp_path / "data" / "glue", code=1).output  # fmt: skip
    assert "lie in one another" in said


def test_sigterm_keeps_every_finished_round(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys.modules["glora_ops.fl.run"], "run_round", stop)
    arguments = ["run", runs.parent / "tiny.toml", "--seeds", 1, "--methods", "fedit", "-o",
                 tmp_path / "runs"]  # fmt: skip
    said = call(*arguments, code=143).stderr
    assert said == "terminated: every finished round is kept: go on with --resume\n"
    monkeypatch.undo()
    call(*arguments, "--resume")
    folder = tmp_path / "runs" / "tiny" / "fedit" / "seed0"
    assert not list(folder.glob(".*"))
    mine, whole = (
        [{**json.loads(x), "seconds": 0} for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (folder, runs / "tiny" / "fedit" / "seed0")
    )
    assert mine == whole
