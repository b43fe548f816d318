"""`glora aggregate`: clients in, a state and adapters out, complete or not at all."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CLIENTS, UNION, assert_mean, edit_config, everything, glora, glora_json
from peft_models import gpt2, mixed, save_client

from glora_ops import State
from glora_ops.adapters import read_adapter
from glora_ops.analysis.compare import compare_clients

# --- aggregate -----------------------------------------------------------------------------------


def test_mixed_clients_come_back_as_their_mean(work: Path) -> None:
    result = glora(
        "aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", f"{UNION},4",
        "--weights", "3,1,2",
    )  # fmt: skip
    clients = [work / name for name in CLIENTS]
    assert_mean(work / "out" / f"r{UNION}", clients, [3, 1, 2], gpt2)
    for wrong, weights in ((f"r{UNION}", [3, 1.01, 2]), ("r4", [3, 1, 2])):
        with pytest.raises(AssertionError):
            assert_mean(work / "out" / wrong, clients, weights, gpt2)
    assert sorted(p.name for p in (work / "out").iterdir()) == ["r4", "r9", "server.safetensors"]
    said = " ".join(result.stdout.split())
    assert "3 clients → rank 9, basis consensus, 6 modules" in said
    assert "ann 0.5000 4 2 " in said
    assert "bob 0.1667 2 5.657 " in said
    assert "weights: as given" in said
    assert "captured 1.0000 of the mean update's energy" in said
    assert "out/server.safetensors" in said
    assert "PEFT adapter of rank 4" in said
    assert result.stderr == ""


def test_every_kind_of_layer_and_a_head(work: Path) -> None:
    layers = ["embed_tokens", "conv", "first", "last"]
    for seed, (name, config) in enumerate(CLIENTS.items(), start=1):
        config = {k: v for k, v in config.items() if k != "dtype"}
        save_client(work / f"{name}2", mixed, seed=seed, target_modules=layers,
                    modules_to_save=["head"], **config)  # fmt: skip
    names = [f"{name}2" for name in CLIENTS]
    said = glora("aggregate", *names, "-o", "out", "--rank", UNION, "--readout", UNION).stdout
    assert "weighted means of full weights: head.bias, head.weight" in said
    assert "vLLM refuses such adapters" in said
    assert_mean(work / "out" / f"r{UNION}", [work / n for n in names], [1, 1, 1], mixed)
    refused = glora("aggregate", *names, "-o", "no", "--dense", "refuse", code=1).stderr
    assert refused.count("the adapter holds weights saved in full") == 3


def test_json_says_everything(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--rank", 5, "--readout", "2,5")
    state = State.load("out/server.safetensors")
    assert facts["captured"] == state.captured
    assert facts["attainable"] == state.attainable
    assert (facts["rank"], facts["basis"], facts["weights_from"]) == (5, "consensus", "equal")
    assert list(facts["weights"]) == list(CLIENTS)
    assert sum(facts["weights"].values()) == pytest.approx(1)
    assert facts["skipped"] == []
    assert facts["readouts"] == {"2": "out/r2", "5": "out/r5"}
    assert facts["state"] == "out/server.safetensors"
    assert set(facts["certificates"]) == set(state.modules)
    assert facts["rank_to_captured"] is None
    ann, bob, cyd = facts["clients"]
    assert (ann["ranks"], ann["scalings"]) == ([4], [2.0])
    assert bob["scalings"] == [pytest.approx(8 / math.sqrt(2))]
    assert sum(client["share"] for client in (ann, bob, cyd)) == pytest.approx(1, abs=1e-6)
    norms = [float(compare_clients([read_adapter(c)]).norms) for c in CLIENTS]
    assert [client["norm"] for client in facts["clients"]] == pytest.approx(norms, rel=1e-5)


def test_default_rank_is_twice_the_largest(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out")
    assert facts["rank"] == 8
    assert facts["readouts"] == {}


def test_auto_rank_prints_its_table(work: Path) -> None:
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--rank", "auto", "--captured", 0.8)
    ranks = {int(rank): captured for rank, captured in facts["rank_to_captured"].items()}
    assert facts["captured"] >= 0.8
    assert ranks[facts["rank"]] == facts["captured"]
    assert all(captured < 0.8 for rank, captured in ranks.items() if rank < facts["rank"])
    said = glora("aggregate", *CLIENTS, "-o", "out2", "--rank", "auto", "--captured", 0.8).stdout
    for rank, captured in ranks.items():
        assert re.search(rf"^ *{rank} +{captured:.4f}", said, re.MULTILINE)


def test_weights_from_num_examples(work: Path) -> None:
    for name, n in zip(CLIENTS, (600, 100, 100), strict=True):
        (work / name / "glora.json").write_text(json.dumps({"num_examples": n}))
    result = glora("aggregate", *CLIENTS, "-o", "out", "--rank", UNION, "--readout", UNION)
    assert "weights: num_examples of the clients' glora.json" in result.stdout
    assert "ann has 75% of the weight" in result.stdout
    assert_mean(work / "out/r9", [work / c for c in CLIENTS], [600, 100, 100], gpt2)
    (work / "cyd" / "glora.json").unlink()
    assert glora_json("aggregate", *CLIENTS, "-o", "out2")["weights_from"] == "equal"


def test_weights_from_a_file(work: Path) -> None:
    (work / "w.json").write_text('{"cyd": 2, "ann": 3, "bob": 1}')
    facts = glora_json("aggregate", *CLIENTS, "-o", "out", "--weights", "w.json")
    assert facts["weights"] == pytest.approx({"ann": 3 / 6, "bob": 1 / 6, "cyd": 2 / 6})
    assert facts["weights_from"] == "given"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ('{"ann": 1, "bobby": 1, "dan": "much", "cyd": true}', ["bob", "'bobby'", "'dan'", "True"]),
        ('{"ann": 1, "ann": 2}', ["stands twice"]),
        ("[1, 2, 3]", ["a JSON list"]),
    ],
)
def test_weights_file_refused(work: Path, content: str, problems: list[str]) -> None:
    (work / "w.json").write_text(content)
    before = everything(work)
    said = glora("aggregate", *CLIENTS, "-o", "out", "--weights", "w.json", code=1).stderr
    assert all(problem in said for problem in problems), said
    assert "w.json" in said
    assert everything(work) == before


def test_missing_weights_file(work: Path) -> None:
    said = glora("aggregate", *CLIENTS, "-o", "out", "--weights", "none.json", code=1).stderr
    assert "none.json" in said


# --- the same state for other clients ------------------------------------------------------------


def test_updating_in_place_and_elsewhere(work: Path) -> None:
    both = ["--basis", "update", "--seed", 5, "--readout", "2,4", "--pad", "trainable"]
    glora("aggregate", "ann", "bob", "-o", "out", *both)
    glora("aggregate", "ann", "bob", "cyd", "-o", "three", *both)
    glora("aggregate", "ann", "cyd", "-o", "two", *both)
    before = everything(work / "out")
    said = glora("update", "out", "--add", "cyd", "-o", "new", *both[4:]).stdout
    assert "3 clients" in said
    assert everything(work / "out") == before
    assert everything(work / "new") == everything(work / "three")
    glora("update", "out/server.safetensors", "--add", "cyd")
    assert everything(work / "out") == everything(work / "three")
    facts = glora_json("update", "out", "--remove", "bob")
    assert everything(work / "out") == everything(work / "two")
    assert [client["name"] for client in facts["clients"]] == ["ann", "cyd"]
    assert sorted(facts["readouts"]) == ["2", "4"]
    # Whatever else lies in the folder is not thrown away.
    (work / "out" / "notes.txt").write_text("precious")
    before = everything(work)
    said = glora("update", "out", "--add", "bob", code=1).stderr
    assert "notes.txt" in said
    assert "-o" in said
    assert everything(work) == before


def test_weights_of_added_clients(work: Path) -> None:
    glora("aggregate", "ann", "bob", "-o", "out", "--weights", "3,1")
    glora("aggregate", "ann", "bob", "cyd", "-o", "want", "--weights", "3,1,2")
    (work / "w.json").write_text('{"cyd": 2}')
    for i, weights in enumerate(("2", "w.json")):
        glora("update", "out", "--add", "cyd", "--weights", weights, "-o", i)
        assert everything(work / str(i)) == everything(work / "want")
    said = glora("update", "out", "--add", "cyd", code=1).stderr
    assert "the state's weights were given" in said


def test_updates_refused(work: Path) -> None:
    glora("aggregate", *CLIENTS, "-o", "out")
    edit_config(work / "ann", lora_alpha=9)
    shutil.rmtree(work / "bob")
    before = everything(work)
    refused = glora_json("update", "out", "--remove", "cyd", code=1)["refused"]
    named = {(r["client"], r["problem"]) for r in refused}
    assert ("bob", "no such folder") in named
    assert all("--remove NAME" in r["remedy"] for r in refused if r["client"] == "bob")
    refused = glora_json("update", "out", "--remove", "bob", code=1)["refused"]
    assert [(r["client"], r["file"]) for r in refused] == [("ann", "adapter_config.json")]
    refused = glora_json("update", "out", "--remove", "dan", code=1)["refused"]
    assert "ann, bob, cyd" in refused[0]["expected"]
    glora("update", "ann", "--remove", "bob", code=1)
    assert everything(work) == before


# --- OUT appears complete or not at all ----------------------------------------------------------


def test_overwriting(work: Path) -> None:
    glora("aggregate", "ann", "bob", "-o", "out", "--readout", 2)
    before = everything(work)
    assert "overwrite" in glora("aggregate", *CLIENTS, "-o", "out", code=1).stderr
    assert everything(work) == before
    glora("aggregate", *CLIENTS, "-o", "out", "--readout", 4, "--overwrite")
    assert State.load("out/server.safetensors").clients == tuple(CLIENTS)
    assert sorted(p.name for p in (work / "out").iterdir()) == ["r4", "server.safetensors"]


def test_a_folder_of_another_kind_is_never_overwritten(work: Path) -> None:
    before = everything(work)
    glora("aggregate", *CLIENTS, "-o", "ann", "--overwrite", code=1)
    (work / "file").write_text("precious")
    glora("aggregate", *CLIENTS, "-o", "file", "--overwrite", code=1)
    glora("aggregate", *CLIENTS, "-o", "file/below", code=1)
    assert everything(work) == before | {"file": b"precious"}


@pytest.mark.parametrize(("error", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("old", [False, True])
def test_failing_in_the_middle(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, old: bool
) -> None:
    if old:
        glora("aggregate", "ann", "-o", "new/out")
    before = everything(work)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(State, "write_adapter", fail)
    arguments = ["aggregate", *CLIENTS, "-o", "new/out", "--readout", 4, "--overwrite"]
    said = glora(*arguments, code=code).stderr
    assert ("disk full" if code == 1 else "interrupted") in said
    assert everything(work) == before


def test_killed_in_the_middle(work: Path) -> None:
    """A process that dies after the state is written, before the readout is: the old stays."""
    glora("aggregate", "ann", "-o", "out")
    before = everything(work / "out")
    code = (
        "import os, glora_ops.cli; from glora_ops import State;"
        "State.write_adapter = lambda *_, **__: os._exit(9);"
        "glora_ops.cli.app('aggregate ann bob -o out --readout 4 --overwrite'.split())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert everything(work / "out") == before


def test_what_is_suggested_exists_and_what_is_written_says_what_it_holds(work: Path) -> None:
    said = glora("aggregate", *CLIENTS, "-o", "low", "--rank", 3).output
    assert "next: glora readout low -r 3 -o ADAPTER_DIR" in said
    facts = glora_json(
        "aggregate", *CLIENTS, "-o", "whole", "--rank", UNION, "--readout", f"1,{UNION}"
    )
    assert facts["energy"][str(UNION)] == 1
    assert 0 < facts["energy"]["1"] < 1
    again = glora_json("readout", "whole", "-r", 1, "-o", "one")
    assert again["energy"] == facts["energy"]["1"]
