"""The plots show the given figures."""

from dataclasses import replace

import pytest

from models.widths import Widths
from reports import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("with_backbone", [False, True])
def test_bars_are_as_high_as_the_widths(drawn, with_backbone):
    before = replace(Widths.dense(1, 2, 16, 32), backbone=((8, 8), (16,)) if with_backbone else None)
    after = before.replace("encoder.0.attention", 8).replace("decoder.1.ffn", 5)
    if with_backbone:
        after = after.replace("backbone.layer1.1", 3)
    plots.plot_widths("a.png", before, after)
    groups = plots.by_kind(before)
    assert list(groups) == ["attention", "FFN", "residual block"][: 2 + with_backbone]
    assert sorted(name for names in groups.values() for name in names) == sorted(before.names())
    for axes, names in zip(drawn[0].axes, groups.values(), strict=True):
        assert [label.get_text() for label in axes.get_xticklabels()] == names
        grey, coloured = axes.containers
        assert [bar.get_height() for bar in grey] == [before.of(name) for name in names]
        assert [bar.get_height() for bar in coloured] == [after.of(name) for name in names]
        assert [text.get_text() for text in axes.texts] == [str(after.of(name)) for name in names]


def test_points_are_the_accepted_and_the_tried_widths(drawn):
    points = [(2_000_000, 0.2, False), (3_000_000, 0.4, True), (1_500_000, 0.375, True)]
    plots.plot_ap_against_parameters("a.png", points, 0.5, 4_000_000, "MGP searching on train2017")
    axes = drawn[0].axes[0]
    accepted, tried = axes.lines[:2]
    assert accepted.get_xdata() == pytest.approx([4, 3, 1.5]) and accepted.get_ydata() == pytest.approx([50, 40, 37.5])
    assert tried.get_xdata() == pytest.approx([2]) and tried.get_ydata() == pytest.approx([20])
    assert axes.get_title() == "MGP searching on train2017"
    assert axes.xaxis_inverted()
