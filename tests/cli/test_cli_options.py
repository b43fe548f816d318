"""What every command's options promise: help, -v, -q, colours, and what is left out or rounded."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer
from commands import CLIENTS, everything, glora, glora_json
from peft_models import gpt2, peft_update, save_client
from safetensors.torch import load_file
from typer.testing import CliRunner

from glora_ops import State, aggregate_adapters
from glora_ops.cli import app
from glora_ops.cli.show import duration, figures

COMPLETION = {"install_completion", "show_completion"}  # typer's


def commands() -> Iterator[tuple[str, click.Command]]:
    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        for inner, one in getattr(command, "commands", {}).items():
            yield from below(f"{name} {inner}", one)

    return below("glora", typer.main.get_command(app))


OPTIONS = [
    pytest.param(name, command, option, id=f"{name} {option.opts[0]}")
    for name, command in commands()
    for option in command.params
    if isinstance(option, click.Option) and not option.hidden and option.name not in COMPLETION
]


@pytest.mark.parametrize(("name", "command", "option"), OPTIONS)
def test_help_says_the_default_and_an_example_that_parses(
    name: str, command: click.Command, option: click.Option
) -> None:
    said = re.fullmatch(
        r"(.+?\.)(?: Default: (.+?)\.)? Example: (.+)", option.help or "", re.DOTALL
    )
    assert said is not None, option.help
    assert (said[2] is None) == option.required
    if option.is_flag:
        assert said[2] == ("on" if option.default else "off")
    elif option.default not in (None, "", False) and not option.multiple:
        assert said[2] == str(option.default)
    if name != "glora":  # of which --version is the only one
        others = []
        for one in command.params:
            if one.required and one is not option:
                others += [one.opts[0], "1"] if isinstance(one, click.Option) else ["1"]
        example = shlex.split(said[3])
        assert set(example) & {*option.opts, *option.secondary_opts}
        command.make_context(name, [*others, *example], resilient_parsing=False)


def test_help_says_what_arguments_are_once() -> None:
    for name, command in commands():
        for argument in (p for p in command.params if isinstance(p, click.Argument)):
            said = " ".join(command.get_help(click.Context(command, info_name=name)).split())
            assert argument.help, f"{name} {argument.name}"
            assert said.count(" ".join(argument.help.split())) == 1


@pytest.fixture
def merged(work: Path) -> Path:
    glora("aggregate", *CLIENTS, "-o", "out", "--rank", 9)
    return work / "out"


def test_sound_certificates_take_a_line_and_v_shows_them(merged: Path) -> None:
    short, long = glora("inspect", "out").stdout, glora("inspect", "out", "-v").stdout
    assert "all certificates fine (-v shows them)" in short
    assert "sensitivity" not in short
    for name in ("captured", "attainable", "effective rank", "gap at the cut", "sensitivity"):
        assert re.search(rf"^{name} ", long, re.MULTILINE)


def test_certificates_are_shown_where_one_is_in_question(work: Path) -> None:
    arguments = ["aggregate", *CLIENTS, "-o", "out", "--rank", 1, "--basis", "projector"]
    said = glora(*arguments).stdout
    assert "warning: " in said
    assert "sensitivity" in said
    assert "all certificates fine" not in said


def test_quiet_prints_warnings_only(work: Path) -> None:
    done = glora("aggregate", *CLIENTS, "-o", "out", "-q")
    assert (done.stdout, done.stderr) == ("", "")
    done = glora("aggregate", *CLIENTS, "-o", "low", "--rank", 1, "--basis", "projector", "-q")
    assert done.stdout == ""
    assert done.stderr.startswith("warning: ")
    shutil.rmtree(work / "bob")
    done = glora("aggregate", *CLIENTS, "-o", "two", "--on-bad-client", "skip", "-q", code=3)
    assert done.stdout == ""
    assert done.stderr.startswith("skipped: client 'bob'")
    assert glora("inspect", "out", "-q").stdout == ""
    assert glora_json("inspect", "out", "-q")["rank"] == 8
    assert "no such folder" in glora("inspect", "none", "-q", code=1).stderr
    assert "3 clients" in glora("inspect", "out").stdout  # the next command speaks again


def test_no_color_is_heeded(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
        return CliRunner().invoke(app, ["inspect", "none"], env=terminal).stderr

    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert coloured.search(said())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(said())


def test_numbers_of_a_column_have_one_length() -> None:
    assert [figures(x) for x in (1 / 6, 0.5, 15, 76.163, 1234.0)] == [
        "0.1667", "0.5000", "15.00", "76.16", "1234",
    ]  # fmt: skip
    assert [duration(s) for s in (0.04, 59.94, 59.96, 61, 3840)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "1 min 1 s", "1 h 4 min",
    ]  # fmt: skip


def test_json_takes_a_line_for_a_module(merged: Path) -> None:
    lines = glora("inspect", "out", "--json").stdout.splitlines()
    assert sum('"singular_values"' in line for line in lines) == 6
    assert len(lines) < 60
    assert '  "rank": 9,' in lines


def test_a_dry_run_checks_and_tells_and_writes_nothing(work: Path) -> None:
    before = everything(work)
    arguments = ["aggregate", *CLIENTS, "-o", "new/out", "--readout", "2,4", "--dry-run"]
    plan = glora_json(*arguments)
    assert [client["name"] for client in plan["clients"]] == list(CLIENTS)
    assert plan["writes"] == ["new/out/server.safetensors", "new/out/r2", "new/out/r4"]
    assert "would write: new/out/r4" in glora(*arguments).stdout
    glora(*arguments, "--rank", 99_999, code=1)
    glora("aggregate", *CLIENTS, "nobody", "-o", "new/out", "--dry-run", code=1)
    assert everything(work) == before
    glora("aggregate", *CLIENTS, "-o", "out")
    before = everything(work)
    plan = glora_json("update", "out", "--remove", "bob", "--dry-run")
    assert [client["name"] for client in plan["clients"]] == ["ann", "cyd"]
    assert everything(work) == before


def test_only_chosen_modules_are_aggregated_now_and_by_an_update(work: Path) -> None:
    chosen = ["--include", "c_attn", "--exclude", "*.h.0.*"]
    glora("aggregate", "ann", "bob", "-o", "out", "--readout", 4, "--rank", 6, *chosen)
    name = "transformer.h.1.attn.c_attn"
    assert list(State.load("out/server.safetensors")) == [name]
    assert set(peft_update(gpt2, work / "out/r4")) == {f"{name}.weight"}  # PEFT adapts no other
    glora("update", "out", "--add", "cyd")
    glora("aggregate", *CLIENTS, "-o", "fresh", "--readout", 4, "--rank", 6, *chosen)
    assert everything(work / "out") == everything(work / "fresh")
    said = glora("aggregate", *CLIENTS, "-o", "no", "--include", "k_proj", code=1).stderr
    assert "no module of the client is included" in said
    assert aggregate_adapters(list(CLIENTS), exclude=["c_proj"]).modules.keys() == {
        f"transformer.h.{i}.attn.c_attn" for i in range(2)
    }


@pytest.mark.parametrize("command", ["aggregate", "readout"])
def test_adapters_are_rounded_as_asked(work: Path, command: str) -> None:
    glora("aggregate", *CLIENTS, "-o", "plain", "--readout", 4)
    if command == "aggregate":
        glora("aggregate", *CLIENTS, "-o", "out", "--readout", 4, "--dtype", "bf16")
        glora("update", "out", "--remove", "cyd")
        glora("update", "out", "--add", "cyd", "-q")  # at the end of the list it was at
    else:
        glora("readout", "plain", "-r", 4, "-o", "out/r4", "--dtype", "bf16")
    exact = load_file(work / "plain/r4/adapter_model.safetensors")
    for key, tensor in load_file(work / "out/r4/adapter_model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[key].bfloat16())
    assert peft_update(gpt2, work / "out/r4")


def test_device_and_threads_reach_torch(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = glora_json("aggregate", *CLIENTS, "-o", "out", "--device", "warp", code=1)["refused"]
    assert refused[0]["problem"] == "device cannot be used"
    import glora_ops.api

    seen: list[tuple[torch.device, int]] = []
    plain = glora_ops.api.solve

    def watching(*args: object, **kwargs: object) -> object:
        seen.append((args[9], torch.get_num_threads()))
        return plain(*args, **kwargs)

    monkeypatch.setattr(glora_ops.api, "solve", watching)
    before = torch.get_num_threads()
    glora("aggregate", *CLIENTS, "-o", "out", "--device", "cpu:0", "--threads", before + 1)
    assert seen == [(torch.device("cpu:0"), before + 1)]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("former", "successor"),
    [
        (["--update", "old", "--add", "x=my dir", "-o", "out"], "old --add 'x=my dir' -o out"),
        (["--add=bob", "--update=old", "--dry-run"], "old --add=bob --dry-run"),
        (["--update", "--remove", "bob"], "STATE --remove bob"),
        (["ann", "--remove", "bob"], "STATE ann --remove bob"),
    ],
)
def test_aggregate_update_names_its_successor(former: list[str], successor: str) -> None:
    said = glora("aggregate", *former, code=2).stderr
    assert f"glora update {successor}" in " ".join(said.split())
    assert "--update" not in glora("aggregate", "--help").stdout


def test_written_files_are_told_with_size_and_share(work: Path) -> None:
    save_client(work / "dan", gpt2, seed=4, r=2, lora_alpha=2, target_modules=["c_attn"])
    said = glora("aggregate", "dan", "-o", "out", "--readout", "1,2").stdout
    assert re.search(r"written: out/server.safetensors +the state, rank 4, [\d.]+ kB\n", said)
    assert re.search(r"written: out/r1 .* rank 1, [\d.]+% of the state's energy, [\d.]+ kB", said)
    assert re.search(r"^in [\d.]+ s$", said, re.MULTILINE)


def test_an_option_of_two_commands_is_worded_once() -> None:
    """Of what glora aggregate does in one go, glora job in parts; only folders and ranks differ."""
    of = dict(commands())

    def options(name: str) -> dict[str, tuple[object, ...]]:
        return {o.opts[0]: (o.opts, o.metavar, o.help, o.type.name) for o in of[name].params
                if isinstance(o, click.Option) and not o.hidden}  # fmt: skip

    whole = options("glora aggregate")
    parts = options("glora job plan") | options("glora job work") | options("glora job join")
    own = {"--captured", "--clip", "--plot", "--robust", "--engine", "--job"}
    assert whole.keys() - parts.keys() == own
    for name in (parts.keys() & whole.keys()) - {"--out", "--rank", "--workers"}:
        assert parts[name] == whole[name]


def test_a_plan_shows_no_option_that_it_refuses(work: Path) -> None:
    shown = glora("job", "plan", "--help").stdout.partition("Options:")[2]
    assert "--rank N " in shown
    assert "auto" not in shown
    assert "--robust" not in shown
    for refused in (["--rank", "auto"], ["--robust", "clip"]):
        said = glora("job", "plan", *CLIENTS, "-o", "job", *refused, code=1).stderr
        assert "a job computes every module once" in said


@pytest.mark.parametrize("group", [[], ["fl"], ["job"]])
def test_no_summary_of_a_command_is_cut(group: list[str]) -> None:
    _, _, listed = glora(*group, "--help", width=80).stdout.partition("Commands:\n")
    assert listed
    assert "..." not in listed


@pytest.mark.parametrize("width", [None, 80])
def test_no_column_is_lost_in_a_pipe_or_a_narrow_terminal(work: Path, width: int | None) -> None:
    glora("aggregate", *CLIENTS, "-o", "out")
    env = {"COLUMNS": width and str(width)}
    said = CliRunner().invoke(app, ["inspect", "out", "-v"], env=env).stdout
    header, cuts = (line for line in said.splitlines() if line.startswith("module "))
    assert header.split()[-4:] == ["‖W̄‖", "captured", "rank", "spectrum"]
    assert cuts.split()[-3:] == ["attainable", "gap", "cut"]


def test_a_client_added_twice_is_told_by_its_folder(work: Path) -> None:
    glora("aggregate", "ann", "bob", "-o", "out")
    twice = ["update", "out", "--add", "cyd", "--add", "cyd"]
    (refused,) = glora_json(*twice, code=1)["refused"]
    assert refused["found"] == str([str(work / "cyd")] * 2)
    assert "NAME=DIR" in refused["remedy"]
