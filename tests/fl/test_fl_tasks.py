"""GLUE and Natural Instructions on tiny models and files of our own; metrics against others'."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from shutil import copytree
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fl_runs import config
from scipy import stats
from sklearn import metrics as sk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from glora_ops.errors import GloraError, GloraWarning, Refused
from glora_ops.fl.config import Config, Sweep
from glora_ops.fl.messages import Client
from glora_ops.fl.run import Plan, run
from glora_ops.fl.tasks.base import HeldOut
from glora_ops.fl.tasks.digits import VALIDATION, Digits
from glora_ops.fl.tasks.glue import Glue
from glora_ops.fl.tasks.metrics import classification, correlation, exact_match, rouge_l
from glora_ops.fl.tasks.superni import SuperNI, prompt

WORDS = ["good", "bad", "fine", "poor", "film", "plot", "a", "the", "was", "and", "yes", "no",
         ".", ":", "-", "Definition", "Now", "complete", "following", "example", "Input", "Output",
         "Say", "if", "it", "great", "awful"]  # fmt: skip
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random BERT, GPT-2, Llama, T5 of width 32 with one word-level tokenizer, as local folders."""
    root = tmp_path_factory.mktemp("models")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    size = len(vocabulary)
    torch.manual_seed(0)
    built = {
        "bert": BertForSequenceClassification(BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32)),
        "gpt2": GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=128, bos_token_id=2,
            eos_token_id=2, pad_token_id=0)),
        "llama": LlamaForCausalLM(LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=2, eos_token_id=2)),
        "t5": T5ForConditionalGeneration(T5Config(
            vocab_size=size, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)),
    }  # fmt: skip
    for name, model in built.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in built}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reviews(n: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = int(rng.integers(2))
        said = rng.choice((BAD, GOOD)[label], 2)
        rows.append(
            {"sentence1": f"the film was {said[0]} and {said[1]}", "label": label, "idx": i}
        )
    return rows


def glue(tiny: dict[str, str], name: str = "sst2", **clients: Any) -> Config:
    return config(
        {"it": {"kind": "glora", "mode": "adapter"}},
        task={"kind": "glue", "name": name, "max_length": 16},
        model={"name": tiny["bert"], "targets": ["query", "value"]},
        training={"rounds": 4, "steps": 10, "batch": 16, "lr": 0.02},
        clients={"count": 3, "ranks": [1, 2, 4]} | clients,
    )


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    write(tmp_path / "glue" / "sst2.train.jsonl", reviews(120, 0))
    write(tmp_path / "glue" / "sst2.dev.jsonl", reviews(60, 1))
    return tmp_path


# --- GLUE --------------------------------------------------------------------------------------


def test_glue_learns_from_local_files_with_federated_heads(
    tiny: dict[str, str], sst2: Path
) -> None:
    plan = Plan(glue(tiny), "it", 0, 0.02, sst2)
    assert plan.task.heads == ("classifier",)
    assert set(plan.setup.dense) == {"classifier.weight", "classifier.bias"}
    lines = run(plan, sst2 / "run")
    assert lines[-1]["metrics"]["accuracy"] > 0.9
    assert set(lines[-1]["by_rank"]) == {"1", "2", "4"}


def graded(n: int, seed: int) -> list[dict[str, Any]]:
    """Reviews of 0 to 2 good words, graded 2.2, 3.7 or 5.2."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        good = rng.integers(2, size=2)
        said = [rng.choice((BAD, GOOD)[x]) for x in good]
        text = f"the film was {said[0]} and {said[1]}"
        rows.append({"sentence1": text, "label": 2.2 + 1.5 * float(good.sum())})
    return rows


def test_a_regression_starts_at_its_labels_and_learns(tiny: dict[str, str], tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("dev", 1)):
        write(tmp_path / "glue" / f"grades.{split}.jsonl", graded(120, seed))
    plan = Plan(glue(tiny, "grades"), "it", 0, 0.02, tmp_path)
    mean = np.mean([row["label"] for row in graded(120, 0)])
    assert float(plan.setup.dense["classifier.bias"]) == pytest.approx(mean)
    assert mean == pytest.approx(
        np.average(
            [plan.task._y[rows].mean() for rows in plan.parts],
            weights=[len(rows) for rows in plan.parts],
        )
    )
    lines = run(plan, tmp_path / "run")
    assert lines[1]["clients"][0]["loss_first"] < 3  # from zero it would be the mean's square
    assert lines[-1]["metrics"]["pearson"] > 0.5
    record = [json.loads(x) for x in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    told = stats.pearsonr([x["prediction"] for x in record], [x["truth"] for x in record])[0]
    assert told == pytest.approx(lines[-1]["metrics"]["pearson"], abs=1e-6)
    assert [x["id"] for x in record] == list(range(1, 121))


def test_heads_learn_at_their_own_rate(tiny: dict[str, str], sst2: Path) -> None:
    moved = {}
    for rate in (None, 1e-12):
        plain = glue(tiny)
        training = plain.training.model_copy(update={"head_lr": rate})
        plan = Plan(plain.model_copy(update={"training": training}), "it", 0, 0.02, sst2)
        client = Client(0, 2)
        sent = plan.method.broadcast(plan.method.start(plan.setup), client)
        learnt = plan.trainer.train(sent, client, plan.parts[0], 0, {})
        head = learnt.dense["classifier.weight"] - sent.dense["classifier.weight"]
        adapter = max(float(b.abs().max()) for b, _ in learnt.factors.values())
        moved[rate] = float(head.abs().max()), adapter
    assert moved[None][0] > 1e-2
    assert moved[1e-12][0] < 1e-9
    assert moved[1e-12][1] > 1e-2


def test_run_json_names_a_model_without_saying_where_it_lies(
    tiny: dict[str, str], sst2: Path
) -> None:
    plan = Plan(glue(tiny), "it", 0, 0.02, sst2)
    run(plan, sst2 / "run", rounds=1)
    text = (sst2 / "run" / "run.json").read_text()
    assert json.loads(text)["config"]["model"]["name"] == "bert"
    assert str(Path(tiny["bert"]).parent) not in text
    moved = sst2 / "elsewhere" / "bert"
    copytree(tiny["bert"], moved)
    again = Plan(glue(tiny | {"bert": str(moved)}), "it", 0, 0.02, sst2)
    assert len(run(again, sst2 / "run", rounds=1, resume=True)) == 2  # the same weights elsewhere


@pytest.mark.parametrize(
    ("kind", "targets"), [("gpt2", ["c_attn"]), ("llama", ["q_proj", "v_proj"])]
)
def test_a_decoder_without_a_pad_token_learns_and_padding_changes_no_answer(
    kind: str, targets: list[str], tiny: dict[str, str], sst2: Path
) -> None:
    folder = copytree(tiny[kind], sst2 / kind)
    for file, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {key: None}))
    decoder = Config.model_validate(
        glue(tiny).model_dump() | {"model": {"name": str(folder), "targets": targets}}
    )
    plan = Plan(decoder, "it", 0, 0.02, sst2)
    assert plan.task.heads == ("score",)
    assert run(plan, sst2 / "run")[-1]["metrics"]["accuracy"] > 0.9

    rows = [{"sentence1": "good film " * n, "label": n % 2} for n in (1, 2, 3, 4)]
    for split in ("train", "dev"):
        write(sst2 / "glue" / f"mine.{split}.jsonl", rows)
    task = Glue(decoder.model_copy(update={"task": glue(tiny, "mine").task}), 0, sst2)
    model = task.model().eval()
    together = task._logits(model, task._x, np.arange(4))
    alone = torch.cat([task._logits(model, task._x, np.array([i])) for i in range(4)])
    torch.testing.assert_close(together, alone)
    assert torch.unique(alone, dim=0).shape[0] == 4


def test_any_other_task_in_the_layout_runs_and_pairs_have_two_segments(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        {"sentence1": a, "sentence2": b, "label": k % 3}
        for k, (a, b) in enumerate(
            [("good film", "bad plot"), ("a", "the was"), ("yes", "no")] * 20
        )
    ]
    for split in ("train", "dev"):
        write(tmp_path / "glue" / f"mine.{split}.jsonl", rows)
    task = Glue(glue(tiny, "mine"), 0, tmp_path)
    assert task.metric == "accuracy"
    assert len(task.label_names) == 3
    assert task._x["input_ids"][1] != task._x["input_ids"][0]
    assert set(task.evaluate(task.model()).metrics) == {"accuracy", "mcc", "loss"}


def test_mrpc_and_qqp_are_judged_by_accuracy_and_f1_of_class_1(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    for name in ("mrpc", "qqp"):
        for split, seed in (("train", 0), ("dev", 1)):
            rows = [{**row, "sentence2": "good film"} for row in reviews(60, seed)]
            write(tmp_path / "glue" / f"{name}.{split}.jsonl", rows)
        task = Glue(glue(tiny, name), 0, tmp_path)
        assert task.metric == "accuracy"
        model = task.model()
        model.classifier.bias.data = torch.tensor([0.0, 9.0])  # everything is a paraphrase
        share = np.mean([row["label"] for row in rows])
        found = task.evaluate(model).metrics
        assert found["accuracy"] == pytest.approx(share)
        assert found["f1"] == pytest.approx(2 * share / (1 + share))  # precision: share, recall: 1


@pytest.mark.parametrize(
    ("name", "train", "dev", "regression"),
    [
        ("stsb", [5, 3.8, 0, 4.25, 1], [3, 2], True),
        ("stsb", [5.0, 3.0, 0.0, 1.0, 2.0], [3.0, 2.0], True),
        ("stsb", [5, 3, 0, 1, 2], [3, 2], True),
        ("mine", [5, 3.8, 0, -4, 1], [3, 2], True),
        ("mine", [5, 3, 0, 1, 2], [3.5, 2], True),
        ("mine", [1, 0, 2, 0, 1], [2, 0], False),
        ("mine", [1.0, 0.0, 2.0, 0.0, 1.0], [2.0, 0.0], False),
        ("mine", [1, 0.0, 2, 0, 1], [2.0, 0], False),
    ],
)
def test_labels_with_a_fraction_and_stsb_are_a_regression(
    name: str, train: list[float], dev: list[float], regression: bool, tiny: dict[str, str],
    tmp_path: Path, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    for split, labels in (("train", train * 8), ("dev", dev)):
        rows = [row | {"label": y} for row, y in zip(reviews(len(labels), 0), labels, strict=True)]
        write(tmp_path / "glue" / f"{name}.{split}.jsonl", rows)
    few = glue(tiny, name)
    few = few.model_copy(update={"task": few.task.model_copy(update={"max_train": 7})})
    for seed in range(3):  # whatever is drawn
        task = Glue(few, seed, tmp_path)
        assert task.regression is regression
        assert task.model().config.num_labels == (1 if regression else 3)
        assert len(task.label_names) > task.labels.max()
        assert task._dev_y.dtype == (float if regression else int)
        expected = {"pearson", "spearman", "correlation"} if regression else {"accuracy", "mcc"}
        assert task.evaluate(task.model()).metrics.keys() - {"loss"} == expected
    said = [str(w.message) for w in recwarn if issubclass(w.category, GloraWarning)]
    decimals = not regression and any(isinstance(x, float) for x in train)
    assert [("3 classes" in text) for text in said] == [True] * len(said)
    assert bool(said) is decimals


@pytest.mark.parametrize(
    ("train", "dev", "words"),
    [
        ([0, 1, -1], [0], "classes 0, 1, …"),
        ([0, 1, 9_000_000_000], [0], "fewer than"),
        ([0, 1, 1], [2], "0…1"),
        ([0, 1, 0.5], [1], "correlation"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    train: list[int], dev: list[int], words: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    for split, labels in (("train", train * 8), ("dev", dev)):
        rows = [row | {"label": y} for row, y in zip(reviews(len(labels), 0), labels, strict=True)]
        write(tmp_path / "glue" / f"mine.{split}.jsonl", rows)
    with pytest.raises(GloraError, match=words):
        Glue(glue(tiny, "mine"), 0, tmp_path)


def test_cola_is_judged_by_mcc_and_float_labels_by_correlation(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    for split, seed in (("train", 0), ("dev", 1)):
        write(tmp_path / "glue" / f"cola.{split}.jsonl", reviews(60, seed))
        scored = [row | {"label": 2.5 * row["label"] + 0.1} for row in reviews(60, seed)]
        write(tmp_path / "glue" / f"stsb.{split}.jsonl", scored)
    assert Glue(glue(tiny, "cola"), 0, tmp_path).metric == "mcc"
    plan = Plan(glue(tiny, "stsb"), "it", 0, 0.02, tmp_path)
    assert plan.task.metric == "correlation"
    lines = run(plan, tmp_path / "run")
    assert lines[-1]["metrics"]["pearson"] > 0.6  # an untrained one: 0 ± 0.13


def test_samples_are_seeded_and_bounded(tiny: dict[str, str], sst2: Path) -> None:
    small = glue(tiny).model_copy(
        update={"task": glue(tiny).task.model_copy(update={"max_train": 30, "max_eval": 10})}
    )
    one, same, other = (Glue(small, seed, sst2)._x["input_ids"] for seed in (0, 0, 1))
    assert len(one) == 30
    assert one == same
    assert one != other


def test_a_sweep_is_judged_on_other_examples_than_any_run(
    tiny: dict[str, str], sst2: Path, instructions: Path
) -> None:
    def digits(seed: int, held_out: HeldOut) -> set[bytes]:
        return {x.numpy().tobytes() for x in Digits(seed, held_out).held_out.x}

    def sentences(seed: int, held_out: HeldOut, lrs: list[float]) -> Counter[tuple[int, ...]]:
        swept = glue(tiny).model_copy(update={"sweep": Sweep(lrs=lrs)})
        return Counter(map(tuple, Glue(swept, seed, sst2, held_out)._dev_x["input_ids"]))

    def instances(seed: int, held_out: HeldOut) -> set[tuple[str, str]]:
        swept = superni(tiny["gpt2"], ["c_attn"]).model_copy(update={"sweep": Sweep(lrs=[0.1])})
        task = SuperNI(swept, seed, instructions, held_out)
        trained.setdefault(seed, [x["id"] for x in task._train])
        assert trained[seed] == [x["id"] for x in task._train]  # whatever is judged on
        assert not {x["id"] for x in task._seen} & set(trained[seed])
        return {(x["task"], x["id"]) for x in task._seen + task._unseen}

    trained: dict[int, list[str]] = {}

    assert digits(1000, "validation") == digits(3, "validation")
    assert len(digits(1000, "validation")) == VALIDATION
    chosen_on, all_of_it = sentences(1000, "validation", [0.1]), sentences(0, "test", [])
    assert sentences(7, "validation", [0.1]) == chosen_on
    for seed in range(3):
        assert not digits(seed, "test") & digits(1000, "validation")
        assert sentences(seed, "test", [0.1]) + chosen_on == all_of_it
        assert not instances(seed, "test") & instances(1000, "validation")
        assert not instances(seed, "test") & instances(seed, "validation")
        assert len(instances(seed, "test")) == len(instances(1000, "validation")) > 0
    path = instructions / "superni" / "heldout" / "task9_unseen.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(GloraError, match="held-out examples task9_unseen: got 1, expected two or"):
        instances(0, "test")


def test_glue_through_datasets_by_name(
    tiny: dict[str, str], sst2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        rows = reviews(120 if split == "train" else 60, 0 if split == "train" else 1)
        return datasets.Dataset.from_list(
            [{"sentence": r["sentence1"], "label": r["label"], "idx": r["idx"]} for r in rows]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    by_name, local = Glue(glue(tiny), 0, None), Glue(glue(tiny), 0, sst2)
    assert asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    assert by_name._x["input_ids"] == local._x["input_ids"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"sentence1": 3, "label": 0}', "must be text"),
        ('{"sentence1": "a", "label": "x"}', "must be a number"),
        ('{"sentence1": "a", "label": NaN}', "must be a number"),
        ('{"sentence1": "a", "label": 1' + "0" * 400 + "}", "must be a number"),
        ('{"sentence1": "half a pair: \\ud800", "label": 0}', "must be text"),
        ('{"sentence1": "caf\udce9", "label": 0}', "not UTF-8"),
    ],
)
def test_bad_lines_are_named(tiny: dict[str, str], sst2: Path, line: str, problem: str) -> None:
    with (sst2 / "glue" / "sst2.train.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(Refused, match="121") as refused:
        Glue(glue(tiny), 0, sst2)
    assert problem in str(refused.value)


def test_a_byte_order_mark_is_no_text_and_one_class_no_task(
    tiny: dict[str, str], sst2: Path
) -> None:
    path = sst2 / "glue" / "sst2.train.jsonl"
    plain = Glue(glue(tiny), 0, sst2)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Glue(glue(tiny), 0, sst2)._x["input_ids"] == plain._x["input_ids"]
    write(path, [row | {"label": 0} for row in reviews(120, 0)])
    with pytest.raises(GloraError, match="labels of sst2: got only 0, expected at least two"):
        Glue(glue(tiny), 0, sst2)


def test_missing_files_models_and_targets_are_explained(tiny: dict[str, str], sst2: Path) -> None:
    with pytest.raises(GloraError, match=r"cola\.train\.jsonl"):
        Glue(glue(tiny, "cola"), 0, sst2)
    with pytest.raises(GloraError, match=r"model\.name"):
        Glue(glue({"bert": "/nowhere/at/all"}), 0, sst2)
    wrong = glue(tiny).model_copy(
        update={"model": glue(tiny).model.model_copy(update={"targets": ["nope"]})}
    )
    with pytest.raises(GloraError, match=r"model\.targets"):
        Plan(wrong, "it", 0, 0.02, sst2)


# --- Natural Instructions ----------------------------------------------------------------------


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    for k, (task, answer) in enumerate({"task1_yes": "yes", "task2_no": "no"}.items()):
        rows = [
            {"task": task, "id": f"{task}-{i}", "definition": f"Say {answer}",
             "input": row["sentence1"], "outputs": [answer]}
            for i, row in enumerate(reviews(40, k))
        ]  # fmt: skip
        write(tmp_path / "superni" / "train" / f"{task}.jsonl", rows)
    unseen = [row | {"task": "task9_unseen"} for row in rows[:12]]
    write(tmp_path / "superni" / "heldout" / "task9_unseen.jsonl", unseen)
    return tmp_path


def superni(model: str, targets: list[str]) -> Config:
    return config(
        {"it": {"kind": "glora"}},
        task={"kind": "superni", "max_length": 48, "max_new_tokens": 3, "max_eval": 8},
        model={"name": model, "targets": targets},
        clients={"count": 2, "ranks": [2, 4], "partition": "task"},
        training={"rounds": 3, "steps": 20, "batch": 8, "lr": 0.05},
    )


@pytest.mark.parametrize(("kind", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("t5", ["q", "v"])])
def test_superni_runs_one_task_per_client_and_scores_unseen_tasks(
    kind: str, targets: list[str], tiny: dict[str, str], instructions: Path
) -> None:
    plan = Plan(superni(tiny[kind], targets), "it", 0, 0.05, instructions)
    assert plan.task.label_names == ("task1_yes", "task2_no")
    assert [set(plan.task.labels[rows]) for rows in plan.parts] in ([{0}, {1}], [{1}, {0}])
    lines = run(plan, instructions / "run")
    found = lines[-1]["metrics"]
    assert set(found) == {
        "rouge_l_seen", "exact_match_seen", "rouge_l_unseen", "exact_match_unseen",
        "rouge_l_unseen/task9_unseen",
    }  # fmt: skip
    if kind == "gpt2":  # T5's 32 units with few adapted modules learn too little to say
        assert found["rouge_l_seen"] > lines[0]["metrics"]["rouge_l_seen"] + 0.2


def test_seen_instances_are_not_trained_on(tiny: dict[str, str], instructions: Path) -> None:
    task = SuperNI(superni(tiny["gpt2"], ["c_attn"]), 0, instructions)
    held = {x["id"] for x in task._seen}
    assert len(held) == 8
    assert not held & {x["id"] for x in task._train}
    assert len(task._train) == 72


def test_only_the_answer_counts_for_a_causal_model(
    tiny: dict[str, str], instructions: Path
) -> None:
    task = SuperNI(superni(tiny["gpt2"], ["c_attn"]), 0, instructions)
    seen: dict[str, torch.Tensor] = {}

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(()))

        def forward(self, **batch: torch.Tensor) -> Any:
            seen.update(batch)
            return type("Out", (), {"loss": self.p})

    task.loss(Spy(), np.array([0, 40]))
    for ids, labels in zip(seen["input_ids"], seen["labels"], strict=True):
        counted = labels != -100
        assert torch.equal(ids[counted], labels[counted])
        assert counted.sum() == 2  # one word and the end


def test_prompt_is_upstreams_and_long_inputs_keep_the_end(
    tiny: dict[str, str], instructions: Path
) -> None:
    assert "".join(prompt("Say yes", " a film ")) == (
        "Definition: Say yes.\n\nNow complete the following example -\nInput: a film.\nOutput: "
    )
    task = SuperNI(superni(tiny["gpt2"], ["c_attn"]), 0, instructions)
    for text in ("good " * 500, ""):
        tokens = task._source({"definition": "Say yes", "input": text})
        assert len(tokens) <= 48
        assert task._tokenizer.decode(tokens).endswith("Output :")
    huge = task._source({"definition": "Say " * 500, "input": "good " * 500})
    assert len(huge) == 48


def test_superni_through_datasets_collects_references(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"task_name": t, "id": f"{t}-{i}", "definition": "Say yes", "inputs": "a film",
         "targets": answer}
        for t in ("task1", "task2") for i in range(20) for answer in ("yes", "no")
    ]  # fmt: skip
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list(rows)
    )
    task = SuperNI(superni(tiny["gpt2"], ["c_attn"]), 0, None)
    assert task._unseen[0]["outputs"] == ["yes", "no"]
    assert task.label_names == ("task1", "task2")


# --- metrics -----------------------------------------------------------------------------------


def test_classification_against_confusion_counts() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(2, size=50), rng.integers(2, size=50)
    found = classification(truth, guess, 2)
    tp, tn = np.sum(truth & guess), np.sum((1 - truth) & (1 - guess))
    fp, fn = np.sum((1 - truth) & guess), np.sum(truth & (1 - guess))
    mcc = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert found["mcc"] == pytest.approx(mcc)
    assert found["accuracy"] == pytest.approx((tp + tn) / 50)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found["f1"] == pytest.approx(sk.f1_score(truth, guess))
    assert classification(truth, np.ones(50, dtype=int), 2)["mcc"] == 0.0
    assert classification(truth, np.zeros(50, dtype=int), 2)["f1"] == 0.0
    assert "f1" not in classification(truth, guess, 3)


def test_correlation_against_scipy_and_by_hand() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=40), rng.normal(size=40)
    found = correlation(x, y)
    by_hand = np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())
    assert found["pearson"] == pytest.approx(by_hand)
    assert found["spearman"] == pytest.approx(
        stats.pearsonr(stats.rankdata(x), stats.rankdata(y))[0]
    )
    assert correlation(x, np.zeros(40))["correlation"] == 0.0


def test_rouge_l_by_longest_common_subsequence() -> None:
    # common subsequence "the cat mat": 3 of 4 and 3 of 5 words
    assert rouge_l("the cat a mat", ["the cat on the mat"]) == pytest.approx(2 / (4 / 3 + 5 / 3))
    assert rouge_l("dogs", ["a cat", "dog"]) == 1.0  # stemmed, best reference
    assert rouge_l("", ["yes"]) == 0.0
    assert exact_match(" Yes! ", ["no", "yes"]) == 1.0
    assert exact_match("yes no", ["yes"]) == 0.0
