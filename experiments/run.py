"""The experiments of docs/experiments.md, one after the other: resumable, most wanted first.

OMP_NUM_THREADS=1 python experiments/run.py RUNS [--only digits] [--seeds 5]
Text needs --data-dir (GLUE as JSONL) and --model (a folder: a small encoder with --only text_sst2,
a small Llama with --only text_cola).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

from glora_ops.fl.config import Config
from glora_ops.fl.engine_local import Answers
from glora_ops.fl.messages import Client, Sent
from glora_ops.fl.run import Plan, local_engine, run
from glora_ops.fl.tasks.base import HeldOut

GLORA = {
    "consensus": {"kind": "glora", "mode": "adapter", "anchor": 1.0},
    "consensus-delta": {"kind": "glora", "anchor": 1.0, "mode": "delta"},
    "projector": {"kind": "glora", "mode": "adapter", "basis": "projector"},
    "update": {"kind": "glora", "mode": "adapter", "basis": "update"},
}
MOMENTUM = {"consensus-momentum": GLORA["consensus"] | {"momentum": 0.5}}
MIXED = GLORA | {kind: {"kind": kind} for kind in ("fedit", "flora", "flexlora", "hetlora")}
EQUAL = MIXED | {kind: {"kind": kind} for kind in ("ffa", "rolora", "fedex", "fedrot")}
MEASURED = ("fedit", "consensus")  # arms whose clients are compared in every round
DIGIT_RATES = [0.0025, 0.005, 0.01, 0.02, 0.04]
COMMON_RATE = 0.005
TEXT_TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "task": {"max_train": 2000, "max_eval": 300}, "targets": ["query", "value"],
        "training": {"steps": 8, "batch": 8}, "every": 100, "lrs": [0.001, 0.003, 0.01],
        "swept": 2, "alpha": 1.0,
    },
    "cola": {  # of a decoder: the encoder of SST-2 learns it too slowly
        "task": {},
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "training": {"rounds": 10, "steps": 8, "batch": 8, "optimiser_state": "keep"},
        "every": 5, "lrs": [0.0005, 0.001], "swept": 1, "alpha": 5.0,
    },
}  # fmt: skip
PEERS = ("flora", "fedit")  # the best two in the digits sweep of mixed ranks, all clients
# R = 8 keeps a quarter of the 30 directions that four clients send: the bases can differ.
TEXT = {m: MIXED[m] | {"rank": 8} for m in ("consensus", "projector", "update")}
TEXT |= {m: MIXED[m] for m in PEERS}
SWEEP_SEED = 1000

FULL = {"count": 6, "participation": 1.0}
SPARSE = {"count": 20, "participation": 0.2, "at_least": 10}
RANKS = {"equal": [8], "mixed": [1, 2, 4, 8]}
DATA = {"iid": {"partition": "iid"}, "dirichlet": {"partition": "dirichlet", "alpha": 0.1}}


@dataclass(frozen=True)
class Setting:
    """One configuration without learning rates, and what is done to a client of it."""

    content: dict[str, Any]
    loudness: float = 1.0  # client 0 sends this many times its update
    wrong: bool = False  # client 0 calls every digit the next one


def digits(name: str, methods: Mapping[str, Any], *, about: str = "", rounds: int = 5,
           loudness: float = 1.0, wrong: bool = False, **clients: Any) -> Setting:  # fmt: skip
    content = {
        "name": name, "about": about, "clients": clients, "methods": dict(methods),
        "evaluation": {"agreement": "never"},
        "training": {"rounds": rounds, "steps": 6, "batch": 16},
    }  # fmt: skip
    return Setting(content, loudness, wrong)


def grid() -> dict[str, Setting]:
    """All methods × data × ranks × participation; about as many steps in all of them."""
    out = {}
    for data in ("dirichlet", "iid"):
        for turnout, who in (("full", FULL), ("sparse", SPARSE)):
            for ranks in ("mixed", "equal"):
                name = f"digits_{data}_{ranks}_{turnout}"
                arms = (EQUAL if ranks == "equal" else MIXED) | (
                    MOMENTUM if turnout == "sparse" else {}
                )
                out[name] = digits(
                    name, arms,
                    rounds=5 if turnout == "full" else 8,
                    ranks=RANKS[ranks], **who, **DATA[data],
                )  # fmt: skip
    return out


def common() -> dict[str, Setting]:
    """Skewed clients of mixed ranks with every arm at one rate."""
    out = {}
    for turnout in ("full", "sparse"):
        content = dict(grid()[f"digits_dirichlet_mixed_{turnout}"].content)
        content["name"] = f"digits_one_rate_{turnout}"
        out[content["name"]] = Setting(content)
    return out


def questions() -> dict[str, Setting]:
    """One question each, on digits."""
    some = {m: EQUAL[m] for m in ("consensus", "projector", "update", "fedit", "fedrot")}
    robust = {m: MIXED[m] for m in ("consensus", "projector", "update", "fedit", "hetlora")}
    consensus, projector, update = (GLORA[m] for m in ("consensus", "projector", "update"))
    ablation: dict[str, Any] = {
        f"{name}-R{rank}": method | {"rank": rank}
        for rank in (8, 32)
        for name, method in (
            ("consensus", consensus),
            ("projector", projector),
            ("update", update),
        )
    }
    low = consensus | {"rank": 8}
    ablation |= {f"eta{x:g}".replace(".", "_"): low | {"anchor": x} for x in (0.0, 0.5, 2.0)}
    ablation |= {f"tau{x:g}".replace(".", "_"): low | {"tau_rel": x} for x in (0.01, 0.3, 1.0)}
    skew, mixed, iid = DATA["dirichlet"], RANKS["mixed"], DATA["iid"]
    equal = RANKS["equal"]
    made = [
        digits("digits_ablation", ablation, about="R, eta and tau_rel.",
               ranks=mixed, **FULL, **skew),
        digits("digits_loud", robust, about="Client 0 sends 8 times its update.",
               loudness=8.0, ranks=equal, **FULL, **iid),
        digits("digits_loud2", robust, about="Client 0 sends twice its update.",
               loudness=2.0, ranks=equal, **FULL, **iid),
        digits("digits_skewed", robust, about="Client 0 holds wrong labels and sends 8 times.",
               loudness=8.0, wrong=True, ranks=equal, **FULL, **iid),
        digits("digits_independent", some, about="Every client draws its own first A.",
               start="independent", ranks=equal, **FULL, **skew),
        digits("digits_gauge10", some, about="A random gauge of condition 10 on every reply.",
               gauge=10.0, ranks=equal, **FULL, **skew),
    ]  # fmt: skip
    return {setting.content["name"]: setting for setting in made}


def text(model: str) -> dict[str, Setting]:
    """Real sentences, skewed labels, ranks 2, 4, 8, 16."""
    out = {}
    for task, how in TEXT_TASKS.items():
        for turnout, who in (
            ("full", {"count": 4}),
            ("sparse", {"count": 20, "participation": 0.2}),
        ):
            content = {
                "name": f"text_{task}_{turnout}",
                "task": {"kind": "glue", "name": task, "max_length": 24, **how["task"]},
                "model": {"name": model, "targets": how["targets"]},
                "clients": who
                | {"ranks": [2, 4, 8, 16], "partition": "dirichlet", "alpha": how["alpha"]},
                "training": {"rounds": 5, **how["training"]},
                "evaluation": {"every": how["every"], "by_rank": "never", "agreement": "never"},
                "sweep": {"lrs": how["lrs"]},  # half of the held-out sentences are for it alone
                "methods": TEXT,
            }
            out[content["name"]] = Setting(content)
    return out


class Loud:
    """An engine in which client 0 sends `loudness` times its update."""

    def __init__(self, plan: Plan, loudness: float) -> None:
        self.inner, self.loudness = local_engine(plan), loudness
        self.save, self.load = self.inner.save, self.inner.load

    def train(self, round: int, work: Sequence[tuple[Client, Sent]]) -> Answers:
        answers = self.inner.train(round, work)
        replies = [
            replace(r, factors={m: (self.loudness * b, a) for m, (b, a) in r.factors.items()})
            if r.client.index == 0
            else r
            for r in answers.replies
        ]
        return replace(answers, replies=replies)


def one(setting: Setting, label: str, seed: int, lr: float, folder: Path, data_dir: Path | None,
        held_out: HeldOut = "test") -> tuple[float, float]:  # fmt: skip
    """The headline metric of one run after its last round, and its mean over the second half.

    A run that is finished is not repeated.
    """
    content = dict(setting.content)
    content["methods"] = {m: {**x, "lr": lr} for m, x in content["methods"].items()}
    if label in MEASURED:
        content["evaluation"] = content["evaluation"] | {"agreement": "every"}
    plan = Plan(Config.model_validate(content), label, seed, lr, data_dir, held_out)
    if setting.wrong:
        rows, train = torch.from_numpy(plan.parts[0]), plan.task.train
        train.y[rows] = (train.y[rows] + 1) % 10
    lines = run(plan, folder, engine=partial(Loud, loudness=setting.loudness), resume=True)
    late = [x for x in lines if "metrics" in x and 2 * x["round"] > lines[-1]["round"]]
    scores = [float(x["metrics"][plan.task.metric]) for x in late]
    return scores[-1], fmean(scores)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("runs", type=Path)
    p.add_argument("--only", default="", help="settings whose name holds this")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--until", type=datetime.fromisoformat, help="start no run after this time")
    p.add_argument("--data-dir", type=Path)
    p.add_argument("--model", default="")
    args = p.parse_args()
    settings = grid() | common() | questions() | (text(args.model) if args.model else {})
    for setting, label, seed, rates in work(settings, args):
        lr = rates(label)
        if args.until and datetime.now() > args.until:
            break
        folder = args.runs / setting.content["name"] / label / f"seed{seed}"
        if (folder / "done").exists():
            continue
        begun = perf_counter()
        last, _ = one(setting, label, seed, lr, folder, args.data_dir)
        took = f"{perf_counter() - begun:.1f} s"
        print(f"{datetime.now():%H:%M:%S} {folder} lr {lr:g} {last:.4f} in {took}", flush=True)


def work(
    settings: dict[str, Setting], args: argparse.Namespace
) -> Iterator[tuple[Setting, str, int, Callable[[str], float]]]:
    """Every run there is: grid, questions, one rate, text; all of a group's seed 0 first."""
    swept = {
        turnout: Rates(f"digits_{turnout}", args, [
            settings[f"digits_{which}_{turnout}"]
            for which in ("dirichlet_mixed", "dirichlet_equal", "iid_equal")
        ], DIGIT_RATES)
        for turnout in ("full", "sparse")
    }  # fmt: skip
    groups: list[dict[str, Callable[[str], float]]] = [
        {name: swept[name.rpartition("_")[2]] for name in grid()},
        dict.fromkeys(questions(), swept["full"]),
        dict.fromkeys(common(), lambda label: COMMON_RATE),
    ]
    for task, how in TEXT_TASKS.items():
        cells = [settings[name] for name in settings if name.startswith(f"text_{task}")]
        rates = Rates(f"text_{task}", args, cells[: how["swept"]], how["lrs"])
        groups += [{cell.content["name"]: rates} for cell in cells]
    for group in groups:
        for seed in range(args.seeds):
            for name, rate in group.items():
                if args.only in name:
                    for label in settings[name].content["methods"]:
                        yield settings[name], label, seed, rate


class Rates:
    """Learning rates by method: the best mean over up to two settings on a seed and held-out
    examples of their own, by the second half of the rounds (one draw of clients weighs less)."""

    def __init__(
        self, name: str, args: argparse.Namespace, settings: list[Setting], rates: list[float]
    ) -> None:
        self.folder, self.data_dir = args.runs / "sweep" / name, args.data_dir
        self.settings, self.rates = settings, rates
        self.chosen: dict[str, float] = {}

    def __call__(self, label: str) -> float:
        where = [s for s in self.settings if label in s.content["methods"]][:2]
        if not where:  # ablations learn at one rate, that of consensus
            return self("consensus")
        if len(self.rates) == 1:
            return self.rates[0]
        outcome = self.folder / f"{label}.json"
        if label not in self.chosen:  # `one` repeats no finished trial and refuses another's
            scores: dict[str, dict[str, float]] = {}
            best = self.rates[0]
            for lr in self.rates:  # upwards, until it gets worse
                scores[f"{lr:g}"] = {
                    s.content["name"]: one(
                        s, label, SWEEP_SEED, lr,
                        self.folder / label / s.content["name"] / f"lr{lr:g}", self.data_dir,
                        "validation",
                    )[1]
                    for s in where
                }  # fmt: skip
                if sum(scores[f"{lr:g}"].values()) < sum(scores[f"{best:g}"].values()):
                    break
                best = lr
            self.chosen[label] = best
            outcome.parent.mkdir(parents=True, exist_ok=True)
            outcome.write_text(json.dumps({"scores": scores, "chosen": best}, indent=1) + "\n")
            print(f"{datetime.now():%H:%M:%S} sweep {outcome} {best:g} {scores}", flush=True)
        return self.chosen[label]


if __name__ == "__main__":
    main()
