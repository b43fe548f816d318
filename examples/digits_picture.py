"""The picture: accuracy, captured energy and change under the gauge, over the rows of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean

from digits_compare import ALONE, FACTORS, GLORA, MEAN
from digits_report import Seeds, alone, best, change, numbers, sections, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#333333", "#8a8a8a"
PEFT_COLOUR, FACTOR_COLOUR, GLORA_COLOUR = "#d9a441", "#c2556b", "#2f6f9f"


@dataclass
class Row:
    label: str
    colour: str
    accuracy: tuple[list[float], list[float]]  # as trained, in another gauge
    captured: tuple[list[float], list[float]] | None = None
    change: float | None = None
    y: float = field(default=0.0)


def rows_of(seeds: Seeds) -> tuple[list[Row], list[tuple[float, str]]]:
    """All rows with their places from the top down, and the headings between them."""
    before, after = alone(seeds), alone(seeds, regauged=True)
    base = [seed["base_accuracy"] for seed in seeds]
    moved = change(seeds, *ALONE)
    groups = [
        (
            "nothing merged",
            [
                Row("base model", FAINT, (base, [])),
                Row(
                    "each client alone",
                    FAINT,
                    (list(chain(*before)), list(chain(*after))),
                    change=moved,
                ),
                Row("best client of each seed", FAINT, (best(before), best(after)), change=moved),
            ],
        )
    ]
    for title, arms in sections():
        rows = []
        for arm in arms:
            colour = GLORA_COLOUR if arm in GLORA else PEFT_COLOUR
            accuracy, captured = (
                (numbers(seeds, arm, name), numbers(seeds, arm, name, regauged=True))
                for name in ("accuracy", "captured")
            )
            colour = FACTOR_COLOUR if arm == FACTORS else colour
            rows.append(Row(arm.label, colour, accuracy, captured, change(seeds, arm)))
        groups.append((title, rows))
    y, placed, headings = 0.0, [], []
    for title, rows in groups:
        headings.append((y, title))
        for row in rows:
            y += 1.0
            row.y = y
            placed.append(row)
        y += 1.5
    return placed, headings


def picture(seeds: Seeds, path: Path) -> None:
    rows, headings = rows_of(seeds)
    figure = Figure(figsize=(12, 0.42 * (rows[-1].y + 3)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[5, 3, 2.4])
    for row in rows:
        pair(left, row, row.accuracy)
        if row.captured:
            pair(middle, row, row.captured)
        if row.change is not None:
            right.hlines(row.y, 1e-8, row.change, color=row.colour, linewidth=1.5)
            right.plot(row.change, row.y, "o", color=row.colour, markersize=6)

    mean = 100 * fmean(numbers(seeds, MEAN, "accuracy"))
    left.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    left.text(mean + 1, -0.7, f"exact mean {mean:.1f} %", ha="left", color=INK, size=9)
    left.set(xlim=(0, 100), xlabel="held-out digits read correctly, %")
    middle.set_xlim(right=105)
    middle.set(xlabel="energy of the exact mean captured, %")
    middle.axvline(0, color=FAINT, linewidth=0.8)
    right.set(
        xscale="log", xlim=(1e-8, 30), xlabel="change of the update\nin the other gauge, relative"
    )

    left.set_yticks([row.y for row in rows], [row.label for row in rows])
    left.set_ylim(rows[-1].y + 0.8, -1.2)
    for y, title in headings:
        place = {"transform": left.get_yaxis_transform(), "ha": "right", "va": "center"}
        left.text(-0.012, y, title, weight="bold", size=9, color=INK, **place)
    for axes in (left, middle, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9, colors=INK)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"Eight LoRA clients merged, seeds: {len(seeds)}. Full bars as the clients sent them, "
        "pale bars after a random gauge on every client",
        size=12,
        color=INK,
    )
    figure.savefig(path, dpi=160)


def pair(axes: Axes, row: Row, values: tuple[list[float], list[float]]) -> None:
    """Two thin bars, whiskers of one standard deviation, and a dot for each seed."""
    for offset, alpha, part in ((-0.2, 0.95, values[0]), (0.2, 0.4, values[1])):
        if not part:
            continue
        percent = [100 * value for value in part]
        y = row.y + offset * all(map(len, values))  # one bar alone sits in the middle
        axes.barh(y, fmean(percent), height=0.36, color=row.colour, alpha=alpha, linewidth=0)
        axes.plot(percent, [y] * len(percent), "o", color=INK, markersize=2, alpha=0.45, mew=0)
        axes.errorbar(fmean(percent), y, xerr=spread(percent), color=INK, elinewidth=1, capsize=2)
