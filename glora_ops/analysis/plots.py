"""Pictures of adapters, states and comparisons. matplotlib is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import require, unfit
from ..runtime.outputs import apart, check_free, new_file
from ..runtime.urls import Url

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..state import State

__all__ = [
    "FAINT",
    "INK",
    "check_picture",
    "label_axes",
    "line_colours",
    "new_figure",
    "no_picture",
    "plain",
    "plot_adapter",
    "plot_alignment",
    "plot_state",
    "require_matplotlib",
    "save_figure",
]

INK, FAINT, CUT = "#333333", "#e6e6e6", "#c2556b"
COLOURS = "viridis"  # of many lines, in order
#: Of few lines: each tells from the others, also for most who see colours otherwise (Okabe, Ito).
CATEGORIES = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#e69f00", "#882255",
)  # fmt: skip
HEAT = "Blues"
MARK = "glora: drawn by glora_ops.plots"  # in every picture's metadata
SIGNED = "RdBu"
SUFFIXES = (".png", ".pdf", ".svg")

#: Above this many modules lines are told apart by a colour bar instead of a legend.
NAMED_LINES = len(CATEGORIES)
#: Above this many clients a heat map's cells carry no numbers.
NUMBERED_CELLS = 16  # why: at the largest picture a number has four letters' room
FLOOR = 1e-7  # why: relative to the largest value, what lies below is fp32 rounding


def require_matplotlib() -> None:
    """Raise `GloraError` with the remedy where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401  # is it there?
    except ImportError as error:
        raise unfit(
            "plot",
            f"no matplotlib ({error})",
            "matplotlib for a picture",
            "pip install 'glora[plot]'",
        ) from error


def plot_adapter(name: str, spectra: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Draw the singular values of each module's update s·B·A.

    Parameters
    ----------
    name : str
        Of the adapter, for the title.
    spectra : mapping of str to Tensor (r,)
    path : path
        .png, .pdf or .svg.
    """
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    _lines(axes, list(spectra.values()))
    label_axes(
        axes, "singular value j", "σⱼ of s·B·A", f"{plain(name)}: spectra of {len(spectra)} modules"
    )
    _key(figure, axes, list(map(plain, spectra)))
    save_figure(figure, path)


def plot_state(state: State, path: str | os.PathLike[str]) -> None:
    """Draw a state: singular values per module, and consensus eigenvalues with the cut marked.

    Parameters
    ----------
    state : State
    path : path
        .png, .pdf or .svg.
    """
    names = [plain(name) or "update" for name in state.modules]
    modules = list(state.modules.values())
    if state.settings["basis"] == "update":  # both sides are cut at the same singular values
        panels = [("mean update", "σⱼ of W̄", [m.eig_u for m in modules])]
    else:
        panels = [
            (
                "consensus of the column spaces",
                "eigenvalue: votes for direction j",
                [m.eig_u for m in modules],
            ),
            (
                "consensus of the row spaces",
                "eigenvalue: votes for direction j",
                [m.eig_v for m in modules],
            ),
        ]
    figure = new_figure(4.2 * (1 + len(panels)), 4.8)
    update, *sides = figure.subplots(1, 1 + len(panels))
    _lines(update, [m.s for m in modules])
    label_axes(update, "singular value j", "σⱼ of the update", f"server update, rank {state.rank}")
    for axes, (title, what, values) in zip(sides, panels, strict=True):
        _lines(axes, values, logarithmic=len(panels) == 1)
        axes.set_xlim(right=max(axes.get_xlim()[1], state.rank + 0.9))
        axes.axvline(state.rank + 0.5, color=CUT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"cut at {state.rank} ",
            (state.rank + 0.5, 0.02),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="bottom",
            color=CUT,
            size=9,
        )
        label_axes(axes, "direction j", what, title)
    clients = "1 client" if len(state.clients) == 1 else f"{len(state.clients)} clients"
    figure.suptitle(
        f"{clients}, basis {state.settings['basis']}: captured {state.captured:.4f}, "
        f"attainable {state.attainable:.4f}",
        size=12,
        color=INK,
    )
    _key(figure, update, names)
    save_figure(figure, path)


def plot_alignment(
    names: Sequence[str], columns: Tensor, rows: Tensor, cosines: Tensor,
    path: str | os.PathLike[str],
) -> None:  # fmt: skip
    """Draw three client-by-client heat maps: of column spaces, of row spaces, of the updates.

    Parameters
    ----------
    names : sequence of str
    columns, rows : Tensor (K, K)
        Alignments from 0 to 1; NaN cells are left grey.
    cosines : Tensor (K, K)
        Signed, from −1 to 1.
    path : path
        .png, .pdf or .svg.
    """
    count = len(names)
    size = min(max(3.2, 0.55 * count), 10.0)
    figure = new_figure(3 * size + 3.5, size + 1.2)
    panels = figure.subplots(1, 3, sharey=True)
    images = []
    for axes, values, title, colours, least in zip(
        panels,
        (columns, rows, cosines),
        ("column spaces: what the updates write", "row spaces: what they read", "signed cosines"),
        (HEAT, HEAT, SIGNED),
        (0, 0, -1),
        strict=True,
    ):
        images.append(axes.imshow(values.numpy(), cmap=colours, vmin=least, vmax=1))
        axes.set_facecolor(FAINT)
        axes.set_title(title, size=11, color=INK)
        short = [plain(name, 20) for name in names]
        font = max(4.0, min(9.0, 300 / count))
        axes.set_xticks(range(count), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), short)
        axes.tick_params(length=0, labelsize=font, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_xticks([i + 0.5 for i in range(count - 1)], minor=True)
        axes.set_yticks([i + 0.5 for i in range(count - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=min(2.0, 30 / count))
        axes.tick_params(which="minor", length=0)
        if count <= NUMBERED_CELLS:
            for (i, j), value in _cells(values):
                ink = "white" if abs(value) > 0.6 else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", size=8, color=ink)
    for image, beside, label in (
        (images[0], panels[:2], "alignment (mean squared cosine)"),
        (images[2], panels[2:], "cosine of the updates"),
    ):
        bar = figure.colorbar(image, ax=beside, shrink=0.85, pad=0.02)
        bar.set_label(label, color=INK, size=9)
        bar.ax.tick_params(length=0, labelsize=8, colors=INK)
        bar.outline.set_visible(False)
    save_figure(figure, path)


def _cells(values: Tensor) -> list[tuple[tuple[int, int], float]]:
    known = (~values.isnan()).nonzero().tolist()
    return [((i, j), float(values[i, j])) for i, j in known]


def plain(name: object, most: int = 80) -> str:
    """A name as text for a picture: no mathematics, nothing that cannot be drawn, not too long."""
    text = "".join(c if c.isprintable() else "·" for c in str(name))
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("$", r"\$").replace("_", " _", text.startswith("_"))  # legends skip _…


def new_figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= NAMED_LINES:
        return list(CATEGORIES[:count])
    return list(colormaps[COLOURS](torch.linspace(0, 0.9, count).numpy()))


def _lines(axes: Axes, spectra: Sequence[Tensor], *, logarithmic: bool = True) -> None:
    """One line per module; what is below rounding is not drawn."""
    top = max(float(values.max()) for values in spectra)
    drawn = [values[values > FLOOR * top] for values in spectra]
    for shown, colour in zip(drawn, line_colours(len(spectra)), strict=True):
        axes.plot(
            range(1, len(shown) + 1), shown.tolist(), "o-", color=colour, linewidth=1.3,
            markersize=3.5 if len(spectra) <= NAMED_LINES else 2, alpha=0.9,
        )  # fmt: skip
    if logarithmic and top > 0:
        axes.set_yscale("log")
        _plain_numbers(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0.5, max(map(len, drawn)) + 0.9)


def _plain_numbers(axes: Axes) -> None:
    """0.5 instead of 5 × 10⁻¹, and minor ticks named where there are few decades."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
            return f"{x:g}"

    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.4)))


def label_axes(axes: Axes, x: str, y: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, size=11, color=INK)
    axes.set_xlabel(x, size=10, color=INK)
    axes.set_ylabel(y, size=10, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b5b5")
    axes.tick_params(length=0, which="both", labelsize=9, colors=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _key(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Which line is which module: a legend below, or a colour bar from the first to the last."""
    if len(names) <= NAMED_LINES:
        columns = max(1, min(4, int(figure.get_figwidth() * 11 / max(map(len, names)))))
        figure.legend(
            axes.lines[: len(names)], names, loc="outside lower center", ncols=columns,
            frameon=False, fontsize=8.5, labelcolor=INK,
        )  # fmt: skip
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    colours = ScalarMappable(cmap=ListedColormap(line_colours(256)))
    bar = figure.colorbar(colours, ax=figure.axes, shrink=0.85, pad=0.02)
    bar.set_ticks([0, 1], labels=["first", "last"])
    bar.set_label(f"{len(names)} modules in the model's order", color=INK, size=9)
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    bar.outline.set_visible(False)


def check_picture(
    path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str] | Url]
) -> None:
    """Raise `GloraError` where no picture could be drawn to `path`; before anything is read."""
    require_matplotlib()
    path = Path(path)
    require(
        path.suffix in SUFFIXES,
        "plot",
        repr(str(path)),
        f"a file ending in {' or '.join(SUFFIXES)}",
    )
    apart(path, inputs)
    check_free(path.resolve(), no_picture, what="file")


def no_picture(path: Path) -> list[str]:
    """The name of a file that glora did not draw, and does not draw over."""
    try:
        own = not path.is_symlink() and path.is_file() and MARK.encode() in path.read_bytes()
    except OSError:
        own = False
    return [] if own else [path.name]


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture in one step; one that glora drew before is drawn anew.

    Raises
    ------
    GloraError
        For another ending than .png, .pdf or .svg, and where another file stands.
    """
    path = Path(path)
    check_picture(path, ())
    key = "Software" if path.suffix == ".png" else "Creator"
    with new_file(path, no_picture) as partial:
        figure.savefig(partial, dpi=160, metadata={key: MARK})
