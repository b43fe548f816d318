"""Pictures of runs: learning curves, score against bytes, spectra, ranks, alignment, partition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.plots import (
    FAINT,
    INK,
    label_axes,
    line_colours,
    new_figure,
    plain,
    plot_alignment,
    save_figure,
)
from .load import RunData

__all__ = ["draw", "draw_partition"]

MOST_DRAWN = 1e30  # why: axes square what they draw; a run that diverged goes beyond


def draw(runs: Sequence[RunData], reference: str, folder: Path, stem: str) -> list[str]:
    """All pictures of one configuration's finished runs; the names of the files.

    Parameters
    ----------
    runs : sequence of RunData
    reference : str
        The method whose clients' alignment is drawn.
    folder : path
    stem : str
        First part of the file names.
    """
    finished = [run for run in runs if run.done]
    labels = list(dict.fromkeys(run.method for run in finished))
    made = {
        "curves": lambda path: _curves(finished, labels, path),
        "updates": lambda path: _updates(finished, labels, path),
        "alignment": lambda path: _alignment(finished, reference, path),
    }
    names = []
    for name, make in made.items():
        path = folder / f"{stem}-{name}.png"
        if make(path):
            names.append(path.name)
    return names


def _curves(runs: Sequence[RunData], labels: Sequence[str], path: Path) -> bool:
    """Score by round, and by cumulative bytes."""
    figure = new_figure(11, 4.6)
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for label, colour in zip(labels, line_colours(len(labels)), strict=True):
        mine = [run for run in runs if run.method == label]
        rounds = [line["round"] for line in mine[0].evaluated]
        scores = np.array([[x["metrics"][r.metric] for x in r.evaluated] for r in mine])
        sent = np.array([_cumulated(r) for r in mine]).mean(0) / 1e6
        for axes, x in ((by_round, rounds), (by_bytes, sent)):
            _band(axes, x, scores, plain(label), colour)
    metric = plain(runs[0].metric)
    label_axes(by_round, "round", metric, f"{metric} of the server's model")
    label_axes(by_bytes, "megabytes, down and up", "", f"{metric} against bytes")
    _legend(figure, by_round)
    save_figure(figure, path)
    return True


def _cumulated(run: RunData) -> list[float]:
    """Bytes down and up until each evaluated round."""
    total, out = 0.0, []
    for line in run.lines:
        total += line["bytes_down"] + line["bytes_up"]
        if "metrics" in line:
            out.append(total)
    return out


def _updates(runs: Sequence[RunData], labels: Sequence[str], path: Path) -> bool:
    """Spectrum of the last update; effective rank and captured energy by round."""
    if not any("update" in line for run in runs for line in run.lines):
        return False
    figure = new_figure(14, 4.6)
    spectra, ranks, captured = figure.subplots(1, 3)
    for label, colour in zip(labels, line_colours(len(labels)), strict=True):
        mine = [run for run in runs if run.method == label]
        updates = [[line for line in run.lines if "update" in line] for run in mine]
        shortest = min(map(len, updates))
        if not shortest:
            continue
        spectrum = updates[0][-1]["update"]["spectrum"]
        spectra.plot(
            range(1, len(spectrum) + 1), _drawable(spectrum), color=colour, label=plain(label)
        )
        rounds = [line["round"] for line in updates[0][:shortest]]
        for axes, name in ((ranks, "effective_rank"), (captured, "captured")):
            values = np.array([[x["update"][name] for x in u[:shortest]] for u in updates])
            _band(axes, rounds, values, plain(label), colour)
    spectra.set_yscale("log")
    label_axes(spectra, "direction j", "σⱼ over all modules", "spectrum of the server's update")
    label_axes(ranks, "round", "effective rank", "effective rank, mean over modules")
    label_axes(captured, "round", "captured", "share of the exact mean's energy")
    _legend(figure, spectra)
    save_figure(figure, path)
    return True


def _alignment(runs: Sequence[RunData], reference: str, path: Path) -> bool:
    """Client-by-client heat map of the reference's first seed, last round that has one."""
    run = next((r for r in runs if r.method == reference), None)
    lines = [line for line in (run.lines if run else ()) if "alignment" in line]
    if not lines or len(lines[-1]["alignment"]["clients"]) < 2:
        return False
    found = lines[-1]["alignment"]
    unknown = [[None] * len(row) for row in found["rows"]]
    columns, rows, cosines = (
        torch.tensor([[np.nan if v is None else v for v in row] for row in side])
        for side in (found["columns"], found["rows"], found.get("cosines") or unknown)
    )
    ranks = {c["client"]: c["rank"] for c in lines[-1]["clients"]}
    names = [f"client {i}, r {ranks[i]}" for i in found["clients"]]
    plot_alignment(names, columns, rows, cosines, path)
    return True


def draw_partition(counts: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Who holds how many examples of which label: one bar per client.

    Parameters
    ----------
    counts : ndarray (clients, labels)
    names : sequence of str
    title : str
    path : path
    """
    figure = new_figure(7.5, max(2.5, 0.3 * len(counts) + 1.6))
    axes = figure.subplots()
    left = np.zeros(len(counts))
    for column, name, colour in zip(counts.T, names, line_colours(len(names)), strict=True):
        axes.barh(
            range(len(counts)), column, left=left, color=colour, label=plain(name, 40), height=0.8
        )
        left += column
    label_axes(axes, "examples", "client", plain(title))
    axes.set_yticks(range(len(counts)))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if len(names) <= 20:
        axes.legend(
            frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
    save_figure(figure, path)


def _band(axes: Any, x: Any, values: np.ndarray, label: str, colour: Any) -> None:
    """Mean over seeds as a line, one standard deviation as a band."""
    values = _drawable(values)
    mean = values.mean(0)
    axes.plot(x, mean, color=colour, label=label, linewidth=1.6)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _drawable(values: Any) -> np.ndarray:
    """Numbers of a diverged run, as far as axes can hold them; the rest are gaps."""
    found = np.asarray(values, dtype=float)
    return np.where(np.abs(found) <= MOST_DRAWN, found, np.nan)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)),
                  frameon=False, fontsize=8.5, labelcolor=INK)  # fmt: skip
    axes.set_facecolor("white")
    axes.grid(color=FAINT)
