"""PEFT folders out: what PEFT merges and hot-swaps is what was written, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from adapter_folders import (
    CLIENTS,
    CONFIG,
    TENSORS,
    assert_same_update,
    edit_config,
    edit_tensors,
    updates,
    weight_name,
)
from torch import Tensor

from glora_ops.adapters import Adapter, adapter_layout, read_adapter, write_adapter
from glora_ops.errors import GloraError
from glora_ops.runtime import rename as rename_module


def as_written(adapter: Adapter, rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors of one rank for every module of `adapter`."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(m.d_out, rank, generator=g, dtype=torch.float64),
            torch.randn(rank, m.d_in, generator=g, dtype=torch.float64),
        )
        for name, m in adapter.modules.items()
    }


def written(
    saved: Callable[[str], Path], name: str, folder: Path, rank: int, seed: int = 0
) -> Adapter:
    adapter = read_adapter(saved(name))
    write_adapter(
        folder,
        as_written(adapter, rank, seed),
        layout=json.loads(json.dumps(adapter_layout([adapter]))),
        dense={n: 2 * adapter.dense_tensor(n) for n in adapter.dense},
    )
    return read_adapter(folder)


@pytest.mark.parametrize("name", ["plain", "saved-head", "gpt2", "bert-head"])
def test_written_folder_is_what_peft_merges(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    result = written(saved, name, tmp_path / "r3", rank=3)
    truth = models.peft_update(CLIENTS[name][0], tmp_path / "r3")
    assert_same_update(result, truth)
    factors = as_written(read_adapter(saved(name)), 3)
    for module, (b, a) in factors.items():
        got = updates(result)[module]
        assert torch.linalg.norm(got - b @ a) <= 1e-6 * torch.linalg.norm(b @ a)
    for n in result.dense:
        assert torch.equal(result.dense_tensor(n), 2 * read_adapter(saved(name)).dense_tensor(n))
    config = result.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["inference_mode"] is True
    assert {p.name for p in (tmp_path / "r3").iterdir()} == {TENSORS, CONFIG, "README.md"}
    assert "rank 3" in (tmp_path / "r3" / "README.md").read_text()


@pytest.mark.parametrize("name", ["gpt2", "bert-head", "conv"])
@pytest.mark.parametrize("ranks", [(8, 2), (2, 8)])
def test_hotswap(
    name: str, ranks: tuple[int, int], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft.utils.hotswap import hotswap_adapter

    base = CLIENTS[name][0]
    for seed, rank in enumerate(ranks):
        written(saved, name, tmp_path / f"r{rank}", rank, seed)
    model = models.load(base, tmp_path / f"r{ranks[0]}")
    # PEFT refuses to swap a saved head: it would stay that of the first adapter.
    swapped_in = tmp_path / f"r{ranks[1]}"
    lora_only = shutil.copytree(swapped_in, tmp_path / "lora-only")
    edit_tensors(lora_only, lambda t: [t.pop(k) for k in list(t) if "lora_" not in k])
    hotswap_adapter(model, str(lora_only), adapter_name="default", torch_device="cpu")
    got = models.merged_update(base, model.double())
    truth = models.peft_update(base, swapped_in)
    for module in read_adapter(swapped_in).modules:
        expected = truth[weight_name(module)]
        difference = got[weight_name(module)] - expected
        assert torch.linalg.norm(difference) <= 1e-6 * torch.linalg.norm(expected)


def test_dropout_survives_where_clients_agree(saved: Callable[[str], Path], tmp_path: Path) -> None:
    a, b = (shutil.copytree(saved(n), tmp_path / n) for n in ("plain", "rslora"))
    edit_config(a, lora_dropout=0.1)
    edit_config(b, lora_dropout=0.1)
    assert adapter_layout([read_adapter(a), read_adapter(b)])["lora_dropout"] == 0.1
    edit_config(b, lora_dropout=0.2)
    assert adapter_layout([read_adapter(a), read_adapter(b)])["lora_dropout"] == 0.0


def test_layout_names_the_vouched_base(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("plain"), tmp_path / "a")
    edit_config(folder, base_model_name_or_path="org/base", revision="v1")
    adapter = read_adapter(folder)
    for base, expected in (
        (None, ("org/base", "v1")),
        ("org/base", ("org/base", "v1")),
        ("mine", ("mine", None)),
    ):
        layout = adapter_layout([adapter], base)
        assert (layout["base_model"], layout["revision"]) == expected
    write_adapter(tmp_path / "out", as_written(adapter, 2), layout=adapter_layout([adapter]))
    assert 'base_model: "org/base"' in (tmp_path / "out" / "README.md").read_text()


def test_views_and_shared_tensors_are_written(saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(saved("plain"))
    flat = torch.randn(60)
    factors = {
        n: (flat[: m.d_out * 3].reshape(m.d_out, 3), flat[: m.d_in * 3].reshape(m.d_in, 3).mT)
        for n, m in adapter.modules.items()
    }
    write_adapter(tmp_path / "out", factors, layout=adapter_layout([adapter]))
    b, a = read_adapter(tmp_path / "out").factors("first")
    assert torch.equal(b, flat[:30].reshape(10, 3))
    assert torch.equal(a, flat[:36].reshape(12, 3).mT)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f, d: f.update(first=(torch.ones(10, 2), torch.ones(2, 12))), r"ranks \[2, 3\]"),
        (lambda f, d: f.clear(), "ranks"),
        (lambda f, d: f.update(other=f["first"]), "other.*layout"),
        (lambda f, d: f.update(conv=(torch.ones(6, 3), torch.ones(3, 17))), "conv.*multiple of 6"),
        (lambda f, d: d.update({"norm.weight": torch.ones(2)}), r"norm.weight.*modules_to_save"),
        (
            lambda f, d: f.update(
                first=(torch.full((10, 3), 1e39, dtype=torch.float64), torch.ones(3, 12))
            ),
            "lora_B.*not finite",
        ),
        (lambda f, d: d.update({"head.bias": torch.tensor([math.nan])}), "head.bias.*not finite"),
    ],
)
def test_nothing_is_written_when_refused(
    spoil: Callable[..., None], match: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = read_adapter(saved("plain"))
    layout = adapter_layout([adapter]) | {"modules_to_save": ["head"]}
    factors, dense = as_written(adapter, 3), {}
    spoil(factors, dense)
    with pytest.raises(GloraError, match=match):
        write_adapter(tmp_path / "new" / "out", factors, layout=layout, dense=dense)
    assert not list(tmp_path.iterdir())


def test_overwriting(saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(saved("plain"))
    layout = adapter_layout([adapter])
    write_adapter(tmp_path / "out", as_written(adapter, 2), layout=layout)
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(GloraError, match=r"existing.*overwrite"):
        write_adapter(tmp_path / "out", as_written(adapter, 3), layout=layout)
    with pytest.raises(GloraError, match="did not write: old"):
        write_adapter(tmp_path / "out", as_written(adapter, 3), layout=layout, overwrite=True)
    (tmp_path / "out" / "old").unlink()
    write_adapter(tmp_path / "out", as_written(adapter, 3), layout=layout, overwrite=True)
    assert read_adapter(tmp_path / "out").config["r"] == 3
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(GloraError, match="did not write: thesis"):
        write_adapter(tmp_path / "precious", as_written(adapter, 3), layout=layout, overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "precious"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_failures_while_writing(
    exchange: bool,
    overwrite: bool,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever call fails, the old folder stands, or none, and nothing is left beside it."""
    adapter = read_adapter(saved("plain"))
    layout = adapter_layout([adapter])
    out = tmp_path / "out"
    if not exchange:
        monkeypatch.setattr(rename_module, "_renameat2", lambda *_: False)
    if overwrite:
        write_adapter(out, as_written(adapter, 2), layout=layout)

    failures = 0
    for step in range(30):
        calls = iter(range(100))

        def failing(real: Callable[..., Any], calls: Any = calls, step: int = step) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == step:
                    raise OSError("no space left on device")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            m.setattr(os, "fsync", failing(os.fsync))
            m.setattr(os, "rename", failing(os.rename))
            m.setattr(rename_module, "_renameat2", failing(rename_module._renameat2))
            m.setattr(Path, "write_bytes", failing(Path.write_bytes))
            try:
                write_adapter(out, as_written(adapter, 3), layout=layout, overwrite=overwrite)
            except OSError:
                failures += 1
                if next(calls) > 40:
                    pytest.fail("the step was never reached")
        left = {p.name for p in tmp_path.iterdir()}
        if out.exists() and read_adapter(out).config["r"] == 3:
            break  # far enough that the new folder stands
        assert left == ({"out"} if overwrite else set())
        if overwrite:
            assert read_adapter(out).config["r"] == 2
    else:
        pytest.fail("never written")
    assert failures >= 5
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


KILLED = """
import os, signal, sys, json
from pathlib import Path
import torch
from glora_ops.adapters import adapter_layout, read_adapter, write_adapter
from glora_ops.adapters.write import strangers
from glora_ops.runtime import rename
from glora_ops.runtime.outputs import claimed
source, out = sys.argv[1:3]
if sys.argv[3] == "False":
    rename._renameat2 = lambda *_: False
adapter = read_adapter(source)
factors = {n: (torch.ones(m.d_out, 3), torch.ones(3, m.d_in)) for n, m in adapter.modules.items()}
layout = adapter_layout([adapter])

def child(step):
    calls = iter(range(1000))
    def killing(real):
        def call(*args, **kwargs):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"),
                         (os, "unlink"), (rename, "_renameat2"), (Path, "write_bytes")):
        setattr(module, name, killing(getattr(module, name)))
    write_adapter(out, factors, layout=layout, overwrite=True)
    os._exit(0)

ranks = []
for step in range(100):
    pid = os.fork()
    if not pid:
        child(step)
    _, status = os.waitpid(pid, 0)
    if not os.path.exists(out):  # in two steps: whoever comes next puts the old one back
        with claimed(Path(out), strangers):
            pass
    ranks.append(read_adapter(out).config["r"])
    if not status:
        break
print(json.dumps(ranks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and folders change places on Linux")
@pytest.mark.parametrize("exchange", [True, False])
def test_kill_at_any_moment(exchange: bool, saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(saved("plain"))
    out = tmp_path / "out"
    write_adapter(out, as_written(adapter, 2), layout=adapter_layout([adapter]))
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(saved("plain")), str(out), str(exchange)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = json.loads(run.stdout)
    assert ranks == sorted(ranks)  # the old one up to some moment, the new one from then on
    assert (ranks[0], ranks[-1]) == (2, 3)
    assert ranks.count(2) >= 5
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_importing_needs_neither_peft_nor_transformers() -> None:
    code = "import sys, glora_ops.adapters; print({'peft', 'transformers'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_peft_hotswap_misscales_rank_patterns(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Why one rank is written for all modules; if this fails, PEFT has been repaired."""
    from peft.utils.hotswap import hotswap_adapter

    config = {"r": 2, "lora_alpha": 8, "target_modules": ["first", "last"]}
    plain = models.save_client(tmp_path / "plain", models.mixed, **config)
    pattern = models.save_client(
        tmp_path / "pattern", models.mixed, seed=2, rank_pattern={"last": 4}, **config
    )
    model = models.load(models.mixed, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hotswap_adapter(model, str(pattern), adapter_name="default", torch_device="cpu")
    got = models.merged_update(models.mixed, model)["block.last.weight"]
    truth = models.peft_update(models.mixed, pattern)["block.last.weight"]
    assert torch.allclose(got, 2 * truth)
