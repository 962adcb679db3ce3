"""The plots show the given figures."""

from dataclasses import replace

import pytest

from models.prunable import SCOPES
from models.widths import Widths
from pruning.cost import cost_of
from pruning.journal import Decision, Trial
from reports import plots
from tests.pruning.tiny import VARIANTS, tiny_detector


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
    points = [(2, 0.2, False), (1.5, 0.375, True), (3, 0.4, True)]  # a search by budgets finds the least first
    axis = plots.CostAxis("GMACs", 4, points)
    plots.plot_ap_against_cost("a.png", axis, 0.5, "MGP searching on train2017")
    axes = drawn[0].axes[0]
    accepted, tried = axes.lines[:2]
    assert accepted.get_xdata() == pytest.approx([4, 3, 1.5]) and accepted.get_ydata() == pytest.approx([50, 40, 37.5])
    assert tried.get_xdata() == pytest.approx([2]) and tried.get_ydata() == pytest.approx([20])
    assert axes.get_title() == "MGP searching on train2017"
    assert axes.xaxis_inverted() and axes.get_xlabel() == "GMACs"


SIZE_HW = (64, 96)


@pytest.mark.parametrize("network", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_cost_of_each_step_is_that_of_the_detector_cut_to_its_widths(network, scope):
    model = tiny_detector(network)[0]
    before = model.widths_in(scope)
    names = [name for name, _ in before.items()]
    changed = {names[0]: 4, names[-1]: 8}
    trial = Trial(0.5, 1.0, {name: changed.get(name, width) for name, width in before.items()}, 0.3, 0.5)
    decisions = [Decision(visit, name, before.of(name), 0, width, {}, 0.1, None, 0.4, True, 0, 0, 0.0, 0.0)
                 for visit, (name, width) in enumerate(changed.items())]  # fmt: skip

    def cost(widths):
        found = cost_of(tiny_detector(network, widths)[0], SIZE_HW)
        return found.detector_gmacs if scope == "detector" else found.transformer_params / 1e6

    one = before.replace(names[0], 4)
    both = one.replace(names[-1], 8)
    by_trial = plots.cost_axis(model, SIZE_HW, before, [], [trial], [trial])
    assert by_trial.points == [(pytest.approx(cost(both)), 0.3, True)]
    by_decision = plots.cost_axis(model, SIZE_HW, before, decisions, [], [])
    assert by_decision.points == [(pytest.approx(cost(widths)), 0.4, True) for widths in (one, both)]
    for axis in (by_trial, by_decision):
        assert axis.base == pytest.approx(cost(before))
        assert axis.label == {"detector": "GMACs of the whole detector"}.get(scope, "transformer parameters (millions)")
