"""Plots as inline SVG, with text as text, in the page's colours and readable on phones."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from models.widths import Widths
from reports.plots import WHOLE, CostAxis, by_kind, draw_ap_against_cost, draw_curve, draw_widths, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.4  # inches of 72 points: phones show it unscaled, so the text keeps its size
HEIGHT = 3.0
BAR_HEIGHT = 0.22
# Matplotlib's colours of text and lines -> the page's colours, light or dark.
INK = "#010203"
THEME = {INK: "currentColor", WHOLE: "var(--whole)"}
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # equal plots give equal SVG
    "font.size": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def widths_plots(before: Widths, after: Widths) -> list[tuple[str, str]]:
    """Return captions and plots of kept and original channels, for attentions, FFNs and blocks."""
    found = []
    for kind, names in by_kind(before).items():
        draw = functools.partial(draw_widths, names=names, before=before, after=after, horizontal=True)
        caption = f"{kind[0].upper()}{kind[1:]} channels kept (grey: unpruned)"
        found.append((caption, svg(draw, caption, 0.5 + BAR_HEIGHT * len(names))))
    return found


def ap_plot(axis: CostAxis, base_ap: float) -> str:
    """Return a plot of AP against cost; see `reports.plots.plot_ap_against_cost`."""

    def draw(axes: Axes) -> None:
        draw_ap_against_cost(axes, axis, base_ap)
        axes.locator_params(axis="x", nbins=6)  # more do not fit a phone

    return svg(draw, f"AP against {axis.label}")


def curve(points: Sequence[tuple[float, float]], axis: str) -> str:
    """Return a plot of AP against a cost; see `reports.plots.plot_curve`."""
    return svg(lambda axes: draw_curve(axes, points, axis), f"AP against {axis}")


def curves(
    epochs: Mapping[str, Sequence[tuple[int, float]]], label: str, *, log: bool = False, best: int | None = None
) -> str:
    """Return a plot of lines over epochs, from 0.

    Args:
        epochs: for each line, pairs of epoch and value.
        label: axis label of the values, with their unit.
        log: use a logarithmic axis if all values are above 0.
        best: epoch of the first line to mark.
    """

    def draw(axes: Axes) -> None:
        for name, points in epochs.items():
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
        if best is not None:
            value = dict(next(iter(epochs.values())))[best]
            axes.plot([best], [value], "*", markersize=14, color="#d62728", label=f"best: epoch {best}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if log and all(value > 0 for points in epochs.values() for _, value in points):
            axes.set_yscale("log")
        axes.legend()

    return svg(draw, f"{label} by epoch")


def svg(draw: Callable[[Axes], Any], label: str, height: float = HEIGHT) -> str:
    """Return what `draw` draws on an axes as SVG to put inline in a page; `label` is for screen readers."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, height)
        draw(figure.subplots())
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in THEME.items():
        text = text.replace(colour, name)
    # Make ids unique in the page, and drop namespaces and sizes: inline SVG needs none, and the page sets sizes.
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    head, _, body = text.partition(">")
    head = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(label)}">{body}'
