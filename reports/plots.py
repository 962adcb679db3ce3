"""Plots of a search: module widths before and after, and AP against parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.widths import BACKBONE, Widths
from pruning.schedule import role_of
from util.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "encoder.attention": "#1f77b4",
    "encoder.ffn": "#1f77b4",
    "decoder.self_attention": "#ff7f0e",
    "decoder.cross_attention": "#d62728",
    "decoder.ffn": "#ff7f0e",
}
BLOCK_COLOUR = "#2ca02c"
WHOLE = "#dddddd"


def plot_widths(path: str | Path, before: Widths, after: Widths) -> None:
    """Write a PNG with the width of each module before (grey) and after, attentions above FFNs above blocks."""
    groups = by_kind(before)
    figure = new_figure(10, 3 * len(groups))
    for axes, (kind, names) in zip(figure.subplots(len(groups), 1), groups.items(), strict=True):
        draw_widths(axes, names, before, after)
        axes.set_title(f"{kind} channels", loc="left", fontsize=10)
    save_figure(figure, path)


def by_kind(widths: Widths) -> dict[str, list[str]]:
    """Return module names by kind: attentions, FFNs and, if the widths list them, residual blocks."""
    blocks = [name for name in widths.names() if name.startswith(f"{BACKBONE}.")]
    kinds = {
        "attention": [name for name in widths.names() if name.endswith("attention")],
        "FFN": [name for name in widths.names() if name.endswith("ffn")],
    }
    return kinds | {"residual block": blocks} if blocks else kinds


def draw_widths(axes: Axes, names: Sequence[str], before: Widths, after: Widths, *, horizontal: bool = False) -> None:
    """Draw bars of the modules' widths before (grey) and after; `horizontal` ones from the top down."""
    draw = axes.barh if horizontal else axes.bar
    draw(names, [before.of(name) for name in names], color=WHOLE, label="before")
    colours = [COLOURS.get(role_of(name), BLOCK_COLOUR) for name in names]
    bars = draw(names, [after.of(name) for name in names], color=colours)
    if horizontal:
        axes.bar_label(bars, padding=3)
        axes.margins(x=0.12, y=0.01)
        axes.invert_yaxis()
        return
    axes.bar_label(bars, fontsize=7)
    axes.margins(y=0.12)
    axes.tick_params(axis="x", labelrotation=35, labelsize=7)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")


def plot_ap_against_parameters(
    path: str | Path, points: Sequence[tuple[int, float, bool]], base_ap: float, base_params: int, caption: str
) -> None:
    """Write a PNG of mAP on the whole split against transformer parameters, for widths tried and accepted.

    Args:
        points: transformer parameters, mAP in [0, 1], and whether they were accepted.
        base_ap: mAP in [0, 1] before the search, with `base_params` transformer parameters.
        caption: title, such as schedule and split.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    draw_ap_against_parameters(axes, points, base_ap, base_params)
    axes.set_title(caption, fontsize=10)
    save_figure(figure, path)


def draw_ap_against_parameters(
    axes: Axes, points: Sequence[tuple[int, float, bool]], base_ap: float, base_params: int
) -> None:
    """Draw the plot of `plot_ap_against_parameters` without its title."""
    tried = [point for point in points if not point[2]]
    accepted = [(base_params, base_ap), *(point[:2] for point in points if point[2])]
    axes.plot([params / 1e6 for params, _ in accepted], [100 * ap for _, ap in accepted], "o-", label="accepted")
    if tried:
        axes.plot([p / 1e6 for p, *_ in tried], [100 * ap for _, ap, _ in tried], "x", label="tried")
    axes.axhline(100 * base_ap, color=WHOLE, zorder=0)
    axes.set_xlabel("transformer parameters (millions)")
    axes.set_ylabel("AP (points)")
    axes.invert_xaxis()
    axes.legend()


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=120))
