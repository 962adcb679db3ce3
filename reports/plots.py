"""Plots of a search: module widths before and after, and AP against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.detector import Detector
from models.widths import BACKBONE, Widths
from pruning.cost import detector_gmacs_by_widths, params_by_widths
from pruning.journal import Decision, Trial
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
    after = after.padded_to(before)
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


@dataclass(frozen=True)
class CostAxis:
    """The cost that a search's plot shows, of its steps and of the detector before the search.

    Attributes:
        label: what is counted, with its unit.
        base: before the search, in that unit.
        points: for widths that were tried: cost, mAP in [0, 1] of the whole split, and whether they were accepted.
    """

    label: str
    base: float
    points: Sequence[tuple[float, float, bool]]


def cost_axis(
    model: Detector,
    image_size_hw: tuple[int, int],
    before: Widths,
    decisions: Sequence[Decision],
    trials: Sequence[Trial],
    chosen: Sequence[Trial],
) -> CostAxis:
    """Return the costs of a search's steps: parameters of the transformer, or GMACs of a detector cut as a whole.

    Args:
        model: the detector before the search, on any device.
        before: its widths; they list the backbone's if its blocks were searched, too.
        decisions, trials: of the search, one of them empty.
        chosen: the chosen trial, or that of each budget.
    """
    steps: list[tuple[Widths, float | None, bool]] = []
    widths = before
    for decision in decisions:
        widths = widths.replace(decision.module, decision.width)
        steps.append((widths, decision.full_ap, decision.accepted))
    steps += [(trial.widths_after(before), trial.full_ap, trial in chosen) for trial in trials]
    if before.backbone is None:
        label, unit, cost_of = "transformer parameters (millions)", 1e6, params_by_widths(model)
    else:
        label, unit, cost_of = "GMACs of the whole detector", 1.0, detector_gmacs_by_widths(model, image_size_hw)
    points = [(cost_of(widths) / unit, ap, is_accepted) for widths, ap, is_accepted in steps if ap is not None]
    return CostAxis(label, cost_of(before) / unit, points)


def plot_ap_against_cost(path: str | Path, axis: CostAxis, base_ap: float, caption: str) -> None:
    """Write a PNG of mAP on the whole split against cost, for widths tried and accepted.

    Args:
        base_ap: mAP in [0, 1] before the search.
        caption: title, such as schedule and split.
    """
    _save_plot(path, lambda axes: draw_ap_against_cost(axes, axis, base_ap), caption)


def draw_ap_against_cost(axes: Axes, axis: CostAxis, base_ap: float) -> None:
    """Draw the plot of `plot_ap_against_cost` without its title."""
    tried = [point for point in axis.points if not point[2]]
    accepted = sorted([(axis.base, base_ap), *(point[:2] for point in axis.points if point[2])], reverse=True)
    axes.plot([cost for cost, _ in accepted], [100 * ap for _, ap in accepted], "o-", label="accepted")
    if tried:
        axes.plot([cost for cost, *_ in tried], [100 * ap for _, ap, _ in tried], "x", label="tried")
    axes.axhline(100 * base_ap, color=WHOLE, zorder=0)
    axes.set_xlabel(axis.label)
    axes.set_ylabel("AP (points)")
    axes.invert_xaxis()
    axes.legend()


def plot_curve(path: str | Path, points: Sequence[tuple[float, float]], axis: str, caption: str) -> None:
    """Write a PNG of mAP against a cost, for the detector before a search (the first point) and of each budget.

    Args:
        points: cost and mAP in [0, 1].
        axis: name and unit of the cost.
        caption: title, such as schedule and split.
    """
    _save_plot(path, lambda axes: draw_curve(axes, points, axis), caption)


def draw_curve(axes: Axes, points: Sequence[tuple[float, float]], axis: str) -> None:
    """Draw the plot of `plot_curve` without its title."""
    costs, aps = [cost for cost, _ in points], [100 * ap for _, ap in points]
    axes.plot(costs, aps, "o-", label="pruned")
    axes.plot(costs[:1], aps[:1], "s", color="black", label="before")
    axes.axhline(aps[0], color=WHOLE, zorder=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(axis)
    axes.set_ylabel("AP (points)")
    axes.legend()


def _save_plot(path: str | Path, draw: Callable[[Axes], None], caption: str) -> None:
    """Write a PNG of what `draw` draws, with the caption as its title."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    draw(axes)
    axes.set_title(caption, fontsize=10)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=120))
