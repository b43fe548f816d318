"""The pages: links lead somewhere, what they show to type runs, first pages stay short."""

from __future__ import annotations

import glob
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import typer.main
from glora_ops.bindings.library import OPS
from markdown_it import MarkdownIt
from markdown_it.token import Token
from safetensors.torch import save_file
from typer.testing import CliRunner

import glora_ops
from glora_ops.cli import app

ROOT = Path(__file__).parents[1]
LISTED = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
PAGES = sorted(
    name
    for name in subprocess.run(
        LISTED, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    if name and (ROOT / name).is_file()
)


@lru_cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub and the site make them."""
    found: list[str] = []
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(t.content for t in inline.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield unquote(str(target))


def code(page: str, language: str) -> list[str]:
    found = tokens(ROOT / page)
    return [t.content for t in found if t.type == "fence" and t.info.strip() == language]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_an_anchor_of_it(name: str) -> None:
    page = ROOT / name
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{name}: {broken}"


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    index, site = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/README.md", "mkdocs.yml")
    )
    for page in (Path(name).name for name in PAGES if name.startswith("docs/")):
        assert page == "README.md" or (f"({page})" in index and f": {page}" in site), page


def test_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|bench|bindings|kernels|docs|glora_ops)/[\w./*-]*)`", text))
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert named
    assert not missing


def test_tests_that_the_page_of_gpu_risks_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/gpu.md").read_text(encoding="utf-8")))
    there = set()
    for path in ROOT.glob("tests/test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))
    assert len(named) > 20
    assert not named - there


def plain(argument: str) -> str:
    """0.001 for 1e-3."""
    name, _, default = argument.partition("=")
    return f"{name}={float(default)}" if re.match(r"-?\d", default) else argument


def test_the_signatures_of_the_ops_page_are_those_of_the_schemas() -> None:
    shown = re.findall(
        r"^\| `([\w.]+)\((.*?)\)` \|", (ROOT / "docs/ops.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in shown} == OPS.keys()
    for name, signature in shown:
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.glora, packet), overload or "default")._schema
        arguments = [
            x.name + (f"={x.default_value!r}".replace("'", '"') if x.has_default_value() else "")
            for x in schema.arguments
        ]
        given = [plain(x) for x in signature.split(", ")]
        expected = [plain(x) for x in arguments]
        if given[-1] == "…":
            given, expected = given[:-1], expected[: len(given) - 1]
        assert given == expected, name


def commands(page: str) -> list[list[str]]:
    """Lines of its code that call glora, as words."""
    lines = "\n".join(code(page, "") + code(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("glora ")]


@pytest.mark.parametrize("name", [page for page in PAGES if commands(page)])
def test_every_command_line_of_a_page_is_one_that_glora_takes(name: str) -> None:
    for words in commands(name):
        command = typer.main.get_command(app)
        words = words[: words.index(">")] if ">" in words else words
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context("glora", list(words))  # parses, and runs nothing


def client(folder: Path, rank: int) -> None:
    """As PEFT writes one."""
    folder.mkdir(parents=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(rank, 24), key.format("B"): torch.randn(16, rank)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "base_model_name_or_path": "base", "r": {rank}, '
        '"lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}'
    )


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rank in (("clients/a", 4), ("clients/b", 2), ("new/c", 3)):
        client(Path(name), rank)
    Path("MODEL").mkdir()
    base = {"model.layers.0.self_attn.q_proj.weight": torch.randn(16, 24)}
    save_file(base, "MODEL/model.safetensors", metadata={"format": "pt"})
    Path("MODEL/config.json").write_text("{}")


@pytest.mark.usefixtures("clients")
@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_the_python_of_the_first_page_runs() -> None:
    (example,) = code("README.md", "python")
    exec(example, {})
    assert Path("server.safetensors").is_file()
    assert Path("out/r8/adapter_config.json").is_file()


def test_the_check_of_a_state_that_reliability_shows_finds_a_changed_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (check,) = code("docs/reliability.md", "python")
    glora_ops.aggregate([(torch.randn(8, 2), torch.randn(2, 6))]).save("server.safetensors")
    exec(check, {})
    saved = bytearray(Path("server.safetensors").read_bytes())
    saved[-1] ^= 1
    Path("server.safetensors").write_bytes(saved)
    with pytest.raises(AssertionError):
        exec(check, {})


@pytest.mark.usefixtures("clients")
def test_the_command_lines_of_the_first_page_run() -> None:
    asked = [words for words in commands("README.md") if words[0] != "fl"]
    ways = ["aggregate", "readout", "update", "apply", "inspect", "compare"]
    assert [words[0] for words in asked] == ways
    for words in asked:
        expanded = [
            x for word in words for x in (sorted(glob.glob(word)) if "*" in word else [word])
        ]
        result = CliRunner().invoke(app, expanded)
        assert result.exit_code == 0, result.output
    for made in ("merged/r8", "merged-r2", "merged-model", "spectra.png", "alignment.png"):
        assert Path(made).exists(), made


@pytest.mark.filterwarnings("ignore::glora_ops.GloraWarning")
def test_the_python_of_the_page_on_scale_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the only rank, which torchrun would tell it."""
    monkeypatch.chdir(tmp_path)
    told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    (example,) = code("docs/scale.md", "python")
    exec(example, {})
    assert glora_ops.State.load("server.safetensors").weights[0] == 600 / 850


@pytest.mark.usefixtures("clients")
def test_the_job_of_the_nightly_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_ops.job.torchrun", lambda *_, **__: None)  # the command works itself
    Path("clients").rename("adapters")
    Path("jobs").mkdir()
    asked = [words for words in commands("docs/merging_nightly.md") if words[0] == "job"]
    assert [words[1] for words in asked] == ["plan", "work", "status", "join"]
    for words in asked:
        expanded = [
            x for word in words for x in (sorted(glob.glob(word)) if "*" in word else [word])
        ]
        result = CliRunner().invoke(app, expanded)
        assert result.exit_code == 0, result.output
    assert Path("merged/2026-11-22/r16").exists()


def test_every_equation_that_code_cites_has_its_number() -> None:
    pages = [
        (ROOT / "docs" / x).read_text(encoding="utf-8") for x in ("mathematics.md", "solvers.md")
    ]
    numbered = set(re.findall(r"(?:\\tag\{|\*\*\()(\d+\.\d+)", "".join(pages)))
    cited = {
        (number, str(file.relative_to(ROOT)))
        for part in ("glora_ops", "bindings", "kernels")
        for file in (ROOT / part).rglob("*.py")
        for number in re.findall(r"(?<!\w)\((\d+\.\d+)\)", file.read_text(encoding="utf-8"))
    }
    assert {number for number, _ in cited} >= {"3.2", "4.1", "5.1", "6.1", "7.1", "12.1"}
    assert not {(number, file) for number, file in cited if number not in numbered}


@pytest.mark.parametrize(
    ("name", "lines"), [("README.md", 130), ("docs/ops.md", 110), ("docs/performance.md", 100)]
)
def test_pages_that_are_read_first_stay_short(name: str, lines: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= lines
