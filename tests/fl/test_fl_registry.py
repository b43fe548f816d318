"""Methods and tasks of one's own, and fields of a configuration, without an edit of glora."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fl_runs import config, run_small

from glora_ops.errors import GloraError
from glora_ops.fl import (
    METHODS,
    load_config,
    register_method,
    register_task,
    registry,
    run_experiment,
)
from glora_ops.fl.config import parse_override
from glora_ops.fl.methods.fedit import FedIT


@dataclass(frozen=True)
class Named(FedIT):
    """Another's, under a name of its own, with a field of its own."""

    wish: float = 1.0


@pytest.fixture(autouse=True)
def nobody_else() -> Iterator[None]:
    yield
    registry._methods.clear()
    registry._tasks.clear()


def test_a_registered_method_runs_as_ours_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of glora, "):
        config({"it": {"kind": "named"}})
    register_method("named", Named)
    register_method("named", Named)  # once more does no harm
    made = config({"it": {"kind": "named", "wish": 2.0}})
    assert made.method("it") == Named(wish=2.0)
    with pytest.raises(ValueError, match="wash: unknown key"):
        config({"it": {"kind": "named", "wash": 2.0}})
    assert run_small(tmp_path / "run", {"kind": "named"}, training={"rounds": 1}).lines()


def test_only_methods_are_registered_and_ours_stay() -> None:
    for name, method in (("fedit", Named), ("x", dict), ("x", 3)):
        with pytest.raises(GloraError):
            register_method(name, method)  # type: ignore[arg-type]  # that is what is tried
    register_method("x", Named)
    with pytest.raises(GloraError, match="not taken"):
        register_method("x", FedIT)
    with pytest.raises(GloraError, match="not taken"):
        register_task("digits", print)  # type: ignore[arg-type]
    assert METHODS.keys().isdisjoint({"x"})


def test_an_installed_package_declares_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its entry point, and imported only when it is asked for."""
    about = tmp_path / "plug-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[glora.methods]\nplugged = plug:Plugged\nbroken = nowhere:Gone\n"
        "[glora.tasks]\nplugged = plug:task\n"
    )
    (tmp_path / "plug.py").write_text(
        "from dataclasses import dataclass\n"
        "from glora_ops.fl.methods.fedit import FedIT\n"
        "from glora_ops.fl.tasks.digits import Digits\n"
        "@dataclass(frozen=True)\nclass Plugged(FedIT):\n    pass\n"
        "def task(config, seed, data_dir, held_out):\n    return Digits(seed, held_out)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="broken, plugged"):
        config({"it": {"kind": "nobody"}})
    assert "plug" not in sys.modules
    made = config({"it": {"kind": "plugged"}}, task={"kind": "plugged"})
    assert type(made.method("it")).__name__ == "Plugged"
    from glora_ops.fl.tasks.build import build_task

    assert type(build_task(made, 0)).__name__ == "Digits"


def test_one_call_is_a_federated_run(tmp_path: Path) -> None:
    small = {"clients.count": 2, "training.rounds": 1, "training.steps": 1, "sweep.lrs": []}
    (result,) = run_experiment(
        "digits_iid", str(tmp_path), overrides=small, methods=["glora"], seeds=[0]
    )
    assert result.folder == tmp_path / "digits_iid" / "glora" / "seed0"
    assert 0 <= result.metrics["accuracy"] <= 1


def test_ones_own_method_runs_in_one_call_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "federated.md").read_text()
    page = page.partition("### Adding one")[2]
    class_of_it, run = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    small = '"clients.count": 2, "training.rounds": 1, "training.steps": 1, "sweep.lrs": []'
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "written_in_the_documentation"}
    exec(class_of_it, names)
    exec(run.replace('"equal"}', f'"equal", {small}}}').replace("range(3)", "[0]"), names)
    assert names["results"][0].folder == Path("runs/digits_iid/equal/seed0")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("clients.count=4", "clients.count", 4),
        ("clients.ranks=[2, 4]", "clients.ranks", [2, 4]),
        ("model.name=models/tiny", "model.name", "models/tiny"),
        ("about=a = b", "about", "a = b"),
        ("model.random_weights=true", "model.random_weights", True),
    ],
)
def test_values_are_read_as_toml_or_else_as_text(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


def test_overrides_are_checked_like_the_rest() -> None:
    made = load_config("digits_iid", overrides={"clients.count": 4, "methods.glora.step": 0.5})
    assert made.clients.count == 4
    assert made.method("glora").step == 0.5  # type: ignore[attr-defined]  # of Glora
    for wrong in ({"clients.cuont": 4}, {"clients.count": "many"}, {"name.x": 1}):
        with pytest.raises(GloraError):
            load_config("digits_iid", overrides=wrong)
    for wrong in ("clients.count", "=4"):
        with pytest.raises(GloraError, match="KEY=VALUE"):
            parse_override(wrong)
