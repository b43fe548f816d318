"""The house: what is installed, what imports what, and what importing costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import glora_ops

ROOT = Path(__file__).parents[1]

# Imports point down this list, never up; modules on one line do not know each other.
LAYERS = [
    {"errors", "kernels", "version"},
    {"runtime"},
    {"linalg", "packing", "robust", "values"},
    {"solvers"},
    {"certificates"},
    {"algorithm"},
    {"bindings"},
    {"ops"},
    {"adapters", "arguments", "inner_products", "state_report"},
    {"analysis", "state_checks", "state_clients", "state_schema"},
    {"state_file"},
    {"state"},
    {"sources"},
    {"batches"},
    {"api", "distributed_schema"},
    {"distributed", "merging"},
    {"job"},
    {"fl"},
    {"cli"},
]

# Lines that a statement kept from the formatter saves at least. why: below, its form costs nothing
SAVED = 3


def run(code: str, cwd: Path = ROOT, **env: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(*patterns: str) -> list[Path]:
    """Files of the working tree, those that Git ignores left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [path for path in (ROOT / name for name in filter(None, listed)) if path.is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of a clean clone, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("glora-*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {n for n in archive.namelist() if ".dist-info/" not in n}
    sources = {
        f"glora_ops/{p.relative_to(ROOT / folder).as_posix()}"
        if folder == "glora_ops"
        else f"glora_ops/{folder}/{p.relative_to(ROOT / folder).as_posix()}"
        for folder in ("glora_ops", "bindings", "kernels")
        for p in (ROOT / folder).rglob("*.py")
    }
    configs = {f"glora_ops/fl/configs/{p.name}" for p in (ROOT / "glora_ops/fl/configs").iterdir()}
    assert files == sources | configs | {"glora_ops/py.typed", "glora_command.py"}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_an_index_would_take_and_show_what_is_built(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_source_distribution_holds_what_a_clone_has(built: Path) -> None:
    with tarfile.open(next(built.glob("glora-*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    here = {name for name in tracked if not name.startswith((".ci", ".github", ".gitignore"))}
    assert here - held == set()


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    """The wheel has the module's; only the citation, which is read as it stands, repeats it."""
    assert wheel.name.split("-")[1] == glora_ops.__version__
    assert f"version: {glora_ops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'version = "' not in (ROOT / "pyproject.toml").read_text().partition("[tool.")[0]


def test_pre_commit_runs_the_pinned_ruff() -> None:
    pin = re.search(r"^ruff==[0-9.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    used = re.findall(r"ruff==[0-9.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert pin is not None
    assert used == 2 * [pin[0]]


def test_syntax_is_that_of_the_oldest_python_that_is_promised() -> None:
    promised = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert promised is not None
    for _, path in modules():
        ast.parse(path.read_text(), path.name, feature_version=(3, int(promised[1])))


def test_an_uninstalled_clone_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "glora_ops", tmp_path / "glora_ops")
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "try:\n    import glora_ops\nexcept ImportError as e:\n    print(e)"
    )
    assert "pip install -e ." in run(code, tmp_path)


def test_dir_is_the_public_api_alone() -> None:
    assert dir(glora_ops) == sorted(glora_ops.__all__)
    assert {"aggregate_adapters", "apply_adapter", "ops", "State"} <= set(dir(glora_ops))
    assert all(hasattr(glora_ops, name) for name in dir(glora_ops))


def test_wheel_works_from_elsewhere_and_brings_no_foreign_name(
    unpacked: Path, tmp_path: Path
) -> None:
    names = {p.name for p in unpacked.iterdir() if "dist-info" not in p.name}
    assert names == {"glora_ops", "glora_command.py"}
    code = (
        "import glora_ops, torch; b = torch.eye(4, 2);"
        "print(glora_ops.__file__, glora_ops.aggregate([(b, b.T)], rank=2).captured)"
    )
    where, captured = run(code, tmp_path, PYTHONPATH=str(unpacked)).split()
    assert where.startswith(str(unpacked))
    assert float(captured) > 0.999


def test_types_of_the_wheel_from_outside_the_tree(unpacked: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"),
         "--cache-dir", str(tmp_path / "cache"), "-p", "glora_ops", "-m", "glora_command"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_import_needs_only_torch_and_safetensors() -> None:
    """No Triton, SciPy, PEFT, transformers, matplotlib, pydantic or fsspec: blocked; it runs."""
    code = """
import sys

class Block:
    names = {"triton", "scipy", "peft", "transformers", "matplotlib", "typer", "rich",
             "pydantic", "fsspec", "aiohttp", "s3fs"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
import glora_ops

pairs = [(torch.randn(6, r), torch.randn(r, 5)) for r in (1, 2)]
state = glora_ops.aggregate(pairs, rank=3)
later = ("triton", "glora_ops.reference", "glora_ops.distributed", "glora_ops.job")
print(state.captured > 0.999, *(name in sys.modules for name in later))
print(callable(glora_ops.distributed.aggregate))
"""
    assert run(code).split() == ["True", *4 * ["False"], "True"]


def test_works_beside_the_other_project_called_kernels(tmp_path: Path) -> None:
    """Hugging Face's `kernels` owns that import name; from the repository root both work."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'someone else'\n")
    code = (
        "import sys; sys.path.remove(''); import kernels, glora_ops, torch;"
        "print(kernels.owner, '|', torch.ops.glora.aggregate)"
    )
    assert run(code, PYTHONPATH=str(tmp_path)).startswith("someone else | glora.aggregate")


def test_every_named_number_says_why_or_of_what() -> None:
    """A comment beside or above it; the reference has a docstring below."""
    silent = []
    for name, path in modules():
        lines = path.read_text().splitlines()
        for node in ast.parse(path.read_text()).body if name != "reference" else ():
            if not isinstance(node, ast.Assign) or not ast.unparse(node.targets[0]).isupper():
                continue
            kinds = {type(x.value) for x in ast.walk(node.value) if isinstance(x, ast.Constant)}
            if kinds <= {int, float} and kinds:
                above, beside = lines[node.lineno - 2], lines[node.lineno - 1]
                if not above.startswith("#") and "  # " not in beside:
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not silent, "\n".join(silent)


def test_what_tests_share_lies_apart_from_them() -> None:
    """In tests/support; crash/ and fuzz/ are commands, each with its parts beside it."""
    commands = {"support", "crash", "fuzz"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if not path.name.startswith(("test_", "conftest"))
        and path.relative_to(ROOT / "tests").parts[0] not in commands
    ]
    assert not wrong


def held_lines(node: ast.stmt) -> range:
    """Lines of a statement without the statements in it, its decorators with it."""
    decorators = getattr(node, "decorator_list", [])
    body = getattr(node, "body", None) or getattr(node, "cases", None)
    first = min([node.lineno, *(d.lineno for d in decorators)])
    if not body:
        return range(first, (node.end_lineno or first) + 1)
    inner = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
    return range(first, max(inner, node.lineno + 1))


def test_a_statement_is_kept_from_the_formatter_only_where_that_saves_lines(
    tmp_path: Path,
) -> None:
    """`# fmt: skip`: tables, and what reads in rows, which it would give `SAVED` more lines."""
    marked = [path for path in tracked("*.py") if "# fmt: skip" in path.read_text()]
    for path in marked:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text().replace("  # fmt: skip\n", "\n"))
    ruff = [sys.executable, "-m", "ruff", "format", "-q", "--config", ROOT / "pyproject.toml"]
    subprocess.run([*ruff, tmp_path], check=True)
    needless = []
    for path in marked:
        lines = path.read_text().splitlines()
        skips = {n for n, line in enumerate(lines, 1) if line.endswith("  # fmt: skip")}
        trees = (ast.parse(file.read_text()) for file in (path, tmp_path / path.relative_to(ROOT)))
        ours, theirs = ([n for n in ast.walk(t) if isinstance(n, ast.stmt)] for t in trees)
        for one, other in zip(ours, theirs, strict=True):
            held = held_lines(one)
            if skips & set(held) and len(held_lines(other)) - len(held) < SAVED:
                needless.append(f"{path.relative_to(ROOT)}:{max(skips & set(held))}")
    assert not needless, "# fmt: skip is not needed:\n" + "\n".join(needless)


def test_no_two_files_of_the_package_have_one_name() -> None:
    """But a command's, which is called like the function it is for, and what a folder is built on.

    `bindings/ops.py` declares the ops that `glora_ops/ops.py` documents as functions.
    """
    shared = {"__init__", "base", "ops"}
    names = Counter(
        path.stem
        for _, path in modules()
        if path.stem not in shared and not path.read_text().startswith('"""`glora ')
    )
    assert not [name for name, times in names.items() if times > 1]


# --- arrows ----------------------------------------------------------------------------------


def modules() -> Iterator[tuple[str, Path]]:
    """(top-level name inside the package, file) of every module."""
    for path in sorted((ROOT / "glora_ops").rglob("*.py")):
        yield path.relative_to(ROOT / "glora_ops").parts[0].removesuffix(".py"), path
    for folder in ("bindings", "kernels"):
        yield from ((folder, path) for path in sorted((ROOT / folder).rglob("*.py")))


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Dotted names imported anywhere in a file, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    inside = path.relative_to(ROOT).parts[:-1]
    package = inside if inside[0] == "glora_ops" else ("glora_ops", *inside)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def test_imports_point_one_way() -> None:
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    wrong = []
    for name, path in modules():
        if name in ("__init__", "__main__", "reference"):
            continue
        for target in imports(path):
            if target[0] != "glora_ops" or len(target) == 1 or target[1] not in height:
                continue
            if target[1] != name and height[target[1]] >= height[name]:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(target)}")
    assert not wrong


def test_every_module_has_its_place() -> None:
    known = set().union(*LAYERS) | {"__init__", "__main__", "reference"}
    assert {name for name, _ in modules()} == known


def test_only_the_command_line_prints() -> None:
    """The rest warns, raises or logs: what a library prints cannot be turned off."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for name, path in modules()
        if name != "cli"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    ]
    assert not wrong


def test_small_decompositions_go_where_their_fallback_is() -> None:
    """LAPACK gives up now and then: `linalg.eigen` knows what then, `torch.linalg` does not."""
    calls = {"svd", "svdvals", "eigh", "eigvalsh", "cholesky", "cholesky_ex"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for name, path in modules()
        if name != "reference" and path.name != "eigen.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in calls
        and ast.unparse(node.value) == "torch.linalg"
    ]
    assert not wrong


def test_kernels_know_torch_and_triton_only() -> None:
    standard = {"__future__", "collections", "contextlib", "dataclasses", "functools", "inspect",
                "itertools", "math", "typing"}  # fmt: skip
    for name, path in modules():
        for target in imports(path):
            if name == "kernels":
                assert target[0] in {"torch", "triton"} | standard or target[:2] == (
                    "glora_ops",
                    "kernels",
                ), f"{path} imports {'.'.join(target)}"
            elif name != "bindings":
                assert target[:2] != ("glora_ops", "kernels"), f"{path} reaches a kernel"


def test_reference_stands_alone() -> None:
    for name, path in modules():
        for target in imports(path):
            if name == "reference":
                assert target[0] in {"numpy", "scipy", "__future__", "collections", "dataclasses",
                                     "typing"}, target  # fmt: skip
            else:
                assert "reference" not in target, f"{path} reaches the reference"
