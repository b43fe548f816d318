"""results/tables.md and docs' pictures, from results/rounds.csv, sweeps.json and one_round.csv.

python experiments/tables.py [PICTURES]
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import spearmanr

from glora_ops.fl.report_folder import table
from glora_ops.fl.summary import bootstrap

RESULTS = Path(__file__).parent / "results"
GRIDS = ("digits_dirichlet_", "digits_iid_", "digits_one_rate_", "text_")
REFERENCE = {"digits_ablation": "consensus-R8"}

Row = dict[str, str]
Runs = dict[str, dict[str, dict[int, list[Row]]]]  # config, method, seed: rounds


def load() -> Runs:
    out: Runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with (RESULTS / "rounds.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            out[row["config"]][row["method"]][int(row["seed"])].append(row)
    return out


def last(runs: dict[int, list[Row]], column: str) -> dict[int, float]:
    """The last round's value of each seed that has one."""
    return {s: float(rows[-1][column]) for s, rows in runs.items() if rows[-1].get(column)}


def late(runs: dict[int, list[Row]]) -> dict[int, float]:
    """Mean score over the second half of the rounds, where a draw of clients weighs less."""
    return {
        s: fmean(
            float(r["score"])
            for r in rows
            if r["score"] and 2 * int(r["round"]) > int(rows[-1]["round"])
        )
        for s, rows in runs.items()
    }


def pm(values: Iterable[float]) -> str:
    x = list(values)
    return "–" if not x else f"{fmean(x):.3f}" + (f" ± {stdev(x):.3f}" if len(x) > 1 else "")


def difference(one: dict[int, float], other: dict[int, float]) -> tuple[str, str, str]:
    """Paired by seed: mean, bootstrap interval, seeds won."""
    gains = [one[s] - other[s] for s in sorted(set(one) & set(other))]
    low, high = bootstrap(gains)
    interval = "–" if low is None else f"{low:+.3f} … {high:+.3f}"
    won = f"{sum(g > 0 for g in gains)} of {len(gains)}"
    return (f"{fmean(gains):+.3f}", interval, won) if gains else ("–", "–", "–")


def setting(name: str, methods: dict[str, dict[int, list[Row]]]) -> str:
    """Scores of one configuration, best server model first, and paired differences."""
    reference = REFERENCE.get(name, "consensus")
    reference = reference if reference in methods else next(iter(methods))
    best, reference_late = last(methods[reference], "score"), late(methods[reference])
    losses = last(methods[reference], "loss")
    body = []
    for label, runs in sorted(
        methods.items(), key=lambda kv: -fmean(last(kv[1], "score").values())
    ):
        score = last(runs, "score")
        size = fmean(sum(float(r["megabytes"]) for r in rows) for rows in runs.values())
        lr = next(iter(runs.values()))[0]["lr"]
        body.append((
            label, str(len(runs)), f"{float(lr):g}", pm(score.values()),
            pm(last(runs, "received").values()),
            *(("", "", "") if label == reference else difference(best, score)),
            pm([fmean(last(runs, "captured").values())]),
            f"{size:.2f}", pm(late(runs).values()),
            *(("", "") if label == reference else difference(reference_late, late(runs))[:2]),
            *((pm(last(runs, "loss").values()), *(("", "", "") if label == reference
               else difference(losses, last(runs, "loss")))) if losses else ()),
        ))  # fmt: skip
    header = ("method", "seeds", "lr", "server model", "received", f"{reference} minus it",
              "95 % interval", "seeds won", "captured", "MB", "last half", f"{reference} minus it",
              "95 % interval",
              *(("loss", f"{reference} minus it", "95 % interval", "seeds higher")
                if losses else ()))  # fmt: skip
    return f"### {name}\n\n{table(header, body)}\n"


def overview(runs: Runs, prefix: str) -> str:
    """All settings of a grid side by side: scores, then consensus minus each method."""
    names = [name for name in runs if name.startswith(prefix)]
    labels = sorted({label for name in names for label in runs[name]})
    header = ("method", *(name.removeprefix(prefix) for name in names))
    parts = []
    for title, measure in (
        ("Server model after the last round", lambda x: last(x, "score")),
        ("Server model, mean over the second half of the rounds", late),
    ):
        parts.append(f"**{title}** (mean ± standard deviation over seeds)")
        parts.append(table(header, [
            (label, *(pm(measure(runs[n].get(label, {})).values()) for n in names))
            for label in labels
        ]))  # fmt: skip
        parts.append("consensus minus each, paired by seed: mean, 95 % interval, seeds won")
        parts.append(table(header, [
            (label, *(", ".join(difference(measure(runs[n]["consensus"]), measure(runs[n][label])))
                      if label in runs[n] else "–" for n in names))
            for label in labels if label != "consensus"
        ]))  # fmt: skip
    return f"### {prefix}…\n\n" + "\n\n".join(parts) + "\n"


def sweeps() -> str:
    found = json.loads((RESULTS / "sweeps.json").read_text())
    rows = []
    for key, sweep in found.items():
        tried = "; ".join(
            f"{lr}: " + ", ".join(f"{x:.3f}" for x in by.values())
            for lr, by in sweep["scores"].items()
        )
        rows.append((key, tried, f"{sweep['chosen']:g}"))
    return "### Learning rates\n\n" + table(("method", "score at each rate", "chosen"), rows) + "\n"


def misalignment(runs: Runs) -> str:
    """Clients after local training, where all started from what fedit sent them."""
    rows, pairs = [], []
    for name, methods in runs.items():
        if "one_rate" in name:
            continue
        for label in ("fedit", "consensus"):
            lines = [r for rows in methods.get(label, {}).values() for r in rows if r["turn"]]
            if not lines:
                continue
            for when, chosen in (
                ("first", [r for r in lines if r["round"] == "1"]),
                ("last", [rows[-1] for rows in methods[label].values()]),
            ):
                keys = ("turn", "apart", "apart_turned", "columns", "rows", "captured")
                means = (pm(float(r[k]) for r in chosen if r[k]) for k in keys)
                rows.append((f"{name}, {label}, {when}", *means))
            if label == "fedit" and "gauge" not in name:
                pairs += [(r["turn"], r["apart"], r["captured"]) for r in lines]
    turn, apart, captured = (list(map(float, x)) for x in zip(*pairs or [(0, 0, 0)], strict=True))
    said = [
        f"Spearman of {what} with 1 − captured (fedit, {len(captured)} rounds): "
        f"{spearmanr(x, [1 - c for c in captured]).statistic:+.2f}."
        for what, x in (("turn", turn), ("apart", apart))
    ]
    header = ("where, after round", "turn", "apart", "apart, turned", "columns", "rows", "captured")
    return "### Misalignment\n\n" + table(header, rows) + "\n\n" + "\n".join(said) + "\n"


Merges = dict[tuple[str, str, int, int], list[Row]]  # data, arm, R, loudness: seeds


def one_round() -> Merges:
    out: Merges = defaultdict(list)
    with (RESULTS / "one_round.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            out[row["data"], row["arm"], int(row["rank"]), int(row["loudness"])].append(row)
    return out


def merges(found: Merges) -> str:
    """Accuracy and distance from the mean, by basis, R and loudness."""
    rows = []
    for (data, arm, rank, loudness), seeds in sorted(found.items()):
        numbers = (pm(float(x[k]) for x in seeds) for k in ("error", "accuracy", "captured"))
        rows.append((f"{data}, {arm}", str(rank), str(loudness), *numbers))
    header = ("clients, arm", "R", "loudness", "distance", "accuracy", "captured")
    gains = []
    for (data, arm, rank, loudness), seeds in sorted(found.items()):
        if arm in ("update", "projector"):
            by_seed = (
                {int(x["seed"]): float(x["accuracy"]) for x in group}
                for group in (found[data, "consensus", rank, loudness], seeds)
            )
            gains.append((f"{data}, R {rank}, loudness {loudness}, {arm}", *difference(*by_seed)))
    return (
        "### One round\n\n" + table(header, rows) + "\n\n"
        + table(("accuracy, consensus minus", "mean", "95 % interval", "seeds won"), gains) + "\n"
    )  # fmt: skip


def curves(found: Merges, folder: Path) -> None:
    """Distance and accuracy of the three bases by R, and by the loudness of one client."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 6), sharex="col")
    views = [("iid", None), ("dirichlet", None), ("iid", 8), ("dirichlet", 8)]
    for column, (data, rank) in zip(axes.T, views, strict=True):
        for arm in ("consensus", "update", "projector"):
            keys = [k for k in found if k[:2] == (data, arm)]
            keys = [k for k in keys if (k[3] == 1 if rank is None else k[2] == rank)]
            keys.sort()
            x = [k[2] if rank is None else k[3] for k in keys]
            for ax, what in zip(column, ("error", "accuracy"), strict=True):
                values = [[float(row[what]) for row in found[k]] for k in keys]
                ax.errorbar(x, list(map(fmean, values)), list(map(stdev, values)), label=arm,
                            capsize=2, marker="o", ms=3)  # fmt: skip
                ax.set_xscale("log", base=2)
        column[0].set_title(f"{data}" + ("" if rank is None else f", R = {rank}"), fontsize=9)
        column[1].set_xlabel("R" if rank is None else "one client's update, times")
    axes[0, 0].set_ylabel("distance from the honest mean")
    axes[0, 2].set_yscale("log"), axes[0, 3].set_yscale("log")
    axes[1, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "when_consensus.png", dpi=110)


def collapse(runs: Runs) -> str:
    rows = []
    for name in ("digits_dirichlet_mixed_full", "digits_dirichlet_mixed_sparse"):
        for label, seeds in runs.get(name, {}).items():
            by_round: dict[int, list[float]] = defaultdict(list)
            for r in (r for rows in seeds.values() for r in rows if r["effective_rank"]):
                by_round[int(r["round"])].append(float(r["effective_rank"]))
            rows.append((f"{name}, {label}", " ".join(
                f"{fmean(x):.1f}" for _, x in sorted(by_round.items()))))  # fmt: skip
    return "### Effective rank by round\n\n" + table(("where", "rounds 1, 2, …"), rows) + "\n"


def pictures(runs: Runs, folder: Path) -> None:
    """Learning curves of the three main settings, and loss of factor averaging by misalignment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [n for n in runs if n.startswith("digits_dirichlet")]
    colours = dict(
        zip(sorted({m for n in names for m in runs[n]}), plt.cm.tab20.colors, strict=False)
    )
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for label, seeds in runs[name].items():
            points: dict[int, list[float]] = defaultdict(list)
            for r in (r for rows in seeds.values() for r in rows if r["score"]):
                points[int(r["round"])].append(float(r["score"]))
            ours = label in ("consensus", "update", "projector", "consensus-delta")
            x, y = zip(*((k, fmean(v)) for k, v in sorted(points.items())), strict=True)
            ax.plot(
                x,
                y,
                label=label,
                color=colours[label],
                lw=2 if ours else 1,
                ls="-" if ours else "--",
            )
        ax.set(title=name, xlabel="round", ylabel="server model")
        ax.title.set_fontsize(9)
        ax.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / "experiments_curves.png", dpi=110)

    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = [n for n, methods in runs.items() if "fedit" in methods]
    names = [n for n in names if "one_rate" not in n and "gauge" not in n]
    for name, colour in zip(names, plt.cm.tab20.colors, strict=False):
        lines = [r for rows in runs[name]["fedit"].values() for r in rows if r["turn"]]
        apart, kept = ([float(r[k]) for r in lines] for k in ("apart", "captured"))
        ax.scatter(apart, [1 - c for c in kept], s=9, label=name, color=colour)
    ax.set(xlabel="clients' factors apart (0: the same)",
           ylabel="‖Ŵ − W̄‖² / ‖W̄‖² of fedit", yscale="log")  # fmt: skip
    figure.legend(fontsize=6, loc="outside right center")
    figure.savefig(folder / "experiments_misalignment.png", dpi=110)


def main() -> None:
    runs = load()
    parts = [overview(runs, x) for x in GRIDS if any(name.startswith(x) for name in runs)]
    parts += [setting(name, methods) for name, methods in runs.items()]
    parts += [misalignment(runs), collapse(runs), sweeps(), merges(one_round())]
    (RESULTS / "tables.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    if len(sys.argv) > 1:
        pictures(runs, Path(sys.argv[1]))
        curves(one_round(), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
