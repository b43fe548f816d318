"""The table, and sentences computed from its numbers."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import chain, combinations
from pathlib import Path
from statistics import fmean, stdev

import torch
from digits_compare import ALONE, BASES, FACTORS, GLORA, MEAN, PEFT_SVD, SERVERS, Arm
from rich import box
from rich.table import Table
from scipy import stats

Seeds = list[dict]  # what one_seed returned, seed by seed

# ── the numbers ──────────────────────────────────────────────────────────────────────────────────


def numbers(seeds: Seeds, arm: Arm, name: str, regauged: bool = False) -> list[float]:
    """`name` is "accuracy" or "captured"; one number per seed."""
    arms = [seed["arms"][arm.key] for seed in seeds]
    return [(arm["regauged"] if regauged else arm)[name] for arm in arms]


def change(seeds: Seeds, *arms: Arm) -> float:
    return max(seed["arms"][arm.key]["regauged"]["change"] for seed in seeds for arm in arms)


def alone(seeds: Seeds, regauged: bool = False) -> list[list[float]]:
    """Per seed, the accuracy of every client alone."""
    by_client = [numbers(seeds, arm, "accuracy", regauged) for arm in ALONE]
    return [list(seed) for seed in zip(*by_client, strict=True)]


def best(by_seed: list[list[float]]) -> list[float]:
    return [max(seed) for seed in by_seed]


def sections() -> Iterator[tuple[str, list[Arm]]]:
    """The merged arms, by the rank they hand out and by the server state behind glora's."""
    for server, ranks in SERVERS:
        for rank in ranks:
            others = [arm for arm in (FACTORS, *PEFT_SVD) if arm.rank == rank]
            ours = [arm for arm in GLORA if (arm.server, arm.rank) == (server, rank)]
            yield f"rank {rank}, server rank {server}", others + ours


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def percent(values: Iterable[float]) -> str:
    values = [100 * value for value in values]
    return f"{fmean(values):.1f}±{spread(values):.1f}"


def machine() -> dict[str, str | int]:
    """Where the numbers come from."""
    packages = ("glora", "torch", "peft", "transformers", "scikit-learn", "numpy")
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ── the table ────────────────────────────────────────────────────────────────────────────────────

LEGEND = """\
±         standard deviation over seeds; of "each client alone", over clients
captured  1 − ‖Ŵ − W̄‖²/‖W̄‖² of the adapter; W̄ is the exact weighted mean
server    energy held by glora's state, as a share of what its rank could hold
regauged  merged again after a random gauge of condition 10 on every client
change    of the update between the gauges: the largest of any weight, relative
          to its module's largest entry, in the worst seed
differ    paired t-test over the seeds, 5 %"""


def table(seeds: Seeds) -> Table:
    out = Table(
        title=f"Held-out digits on their side, %; seeds: {len(seeds)}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    out.add_column("", no_wrap=True)
    for heading in (" \naccuracy", " \ncaptured", " \nserver", "regauged\naccuracy", " \nchange"):
        out.add_column(heading, justify="right", no_wrap=True)

    before, after = alone(seeds), alone(seeds, regauged=True)
    moved = f"{change(seeds, *ALONE):.0e}"
    out.add_row("base, before fine-tuning", percent(seed["base_accuracy"] for seed in seeds))
    for label, over in (
        ("each client alone", chain.from_iterable),
        ("best client of each seed", best),
    ):
        out.add_row(label, percent(over(before)), "", "", percent(over(after)), moved)
    add_arm(out, seeds, MEAN)
    for title, arms in sections():
        out.add_section()
        out.add_row(f"[bold]{title}[/]")
        for arm in arms:
            add_arm(out, seeds, arm)
    return out


def add_arm(out: Table, seeds: Seeds, arm: Arm) -> None:
    server = ""
    if arm.server is not None:
        said = [seed["glora"]["clients"][f"{arm.basis}-R{arm.server}"] for seed in seeds]
        server = f"{100 * fmean(x['captured'] / x['attainable'] for x in said):.1f}"
    out.add_row(
        arm.label,
        percent(numbers(seeds, arm, "accuracy")),
        percent(numbers(seeds, arm, "captured")),
        server,
        percent(numbers(seeds, arm, "accuracy", regauged=True)),
        f"{change(seeds, arm):.0e}",
    )


# ── the sentences ────────────────────────────────────────────────────────────────────────────────


def sentences(seeds: Seeds) -> list[str]:
    """What the numbers of this run allow to say; nothing here is written beforehand."""
    ours, before = GLORA[0], alone(seeds)
    (svd,) = (arm for arm in PEFT_SVD if arm.rank == ours.rank)
    said = [
        f"A client alone reads {percent(chain(*before))} % of the held-out digits, the best of "
        f"each seed {percent(best(before))} %, {ours.label} at rank {ours.rank} "
        f"{percent(numbers(seeds, ours, 'accuracy'))} %.",
        f"At rank {ours.rank}: {compare(seeds, [(ours, FACTORS), (ours, svd)])}.",
    ]
    said += [
        f"The three bases at {title}: {compare(seeds, list(combinations(arms[-len(BASES) :], 2)))}."
        for title, arms in sections()
    ]
    said.append(
        f"In another gauge {FACTORS.label} goes from {percent(numbers(seeds, FACTORS, 'accuracy'))}"
        f" to {percent(numbers(seeds, FACTORS, 'accuracy', True))} %; of glora no accuracy moves by"
        f" more than {100 * largest_move(seeds):.1f} points in any seed, no update by more than "
        f"{change(seeds, *GLORA):.0e} of its largest entry."
    )
    return said


def compare(seeds: Seeds, pairs: list[tuple[Arm, Arm]]) -> str:
    """Which pairs differ in accuracy beyond the spread of the seeds, in words."""
    if len(seeds) < 3:
        return "too few seeds to say whether they differ"
    found, alike = [], []
    for pair in pairs:
        less, more = sorted(pair, key=lambda arm: fmean(numbers(seeds, arm, "accuracy")))
        gain = paired_gain(seeds, more, less)
        if beyond_spread(gain):
            found.append(f"{more.label} reads {percent(gain)} points more than {less.label}")
        else:
            alike.append((pair, fmean(gain)))
    if alike:
        who = ", ".join(f"{x.label} and {y.label}" for (x, y), _ in alike)
        largest = 100 * max(gain for _, gain in alike)
        found.append(
            f"{who if found else 'they'} do not differ beyond the spread of the seeds "
            f"(largest mean difference {largest:.1f} points)"
        )
    return "; ".join(found)


def paired_gain(seeds: Seeds, more: Arm, less: Arm) -> list[float]:
    both = zip(numbers(seeds, more, "accuracy"), numbers(seeds, less, "accuracy"), strict=True)
    return [x - y for x, y in both]


def beyond_spread(gain: list[float]) -> bool:
    """Paired t-test over the seeds at 5 %."""
    if spread(gain) == 0:
        return gain[0] != 0
    return stats.ttest_1samp(gain, 0).pvalue < 0.05


def largest_move(seeds: Seeds) -> float:
    arms = [seed["arms"][arm.key] for seed in seeds for arm in GLORA]
    return max(abs(arm["accuracy"] - arm["regauged"]["accuracy"]) for arm in arms)
