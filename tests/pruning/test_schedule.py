"""The schedules' order, targets and thresholds, by hand."""

import pytest

from models.widths import Widths
from pruning.schedule import GP, MGP, role_of

NAMES = Widths.dense(2, 2, 16, 32).names()


def test_gp_visits_in_network_order():
    assert GP.order(NAMES) == NAMES


def test_mgp_visits_attentions_by_kind_and_then_ffns():
    assert MGP.order(NAMES) == (
        "encoder.0.attention",
        "encoder.1.attention",
        "decoder.0.self_attention",
        "decoder.1.self_attention",
        "decoder.0.cross_attention",
        "decoder.1.cross_attention",
        "encoder.0.ffn",
        "encoder.1.ffn",
        "decoder.0.ffn",
        "decoder.1.ffn",
    )


def test_an_order_that_leaves_a_module_out_is_an_error():
    with pytest.raises(ValueError, match="expected each of them once"):
        GP.order([*NAMES, "decoder.2.unheard_of"])


def test_role_drops_the_layer():
    assert role_of("decoder.11.cross_attention") == "decoder.cross_attention"


def test_gp_targets_fall_by_half_an_ap_point():
    assert GP.target_ap(0.446, 0) == pytest.approx(0.446)
    assert GP.target_ap(0.446, 1) == pytest.approx(0.441)
    assert GP.target_ap(0.446, 29) == pytest.approx(0.446 - 0.145)


def test_gp_thresholds_are_relative_to_the_target():
    assert GP.subset_threshold_ap(0.446, 2) == pytest.approx(0.436)
    assert GP.full_threshold_ap(0.446, 2) == pytest.approx(0.98 * 0.436)


def test_gp_targets_of_a_weak_detector_fall_below_zero():
    assert GP.target_ap(0.01, 2) == pytest.approx(0)
    assert GP.target_ap(0.01, 29) == pytest.approx(-0.135)


@pytest.mark.parametrize(("schedule", "expected"), [(GP, 0.98 * 0.446), (MGP, 0.9 * 0.446)], ids=["gp", "mgp"])
def test_a_fast_search_is_held_to_the_map_before_it_less_the_tolerance(schedule, expected):
    assert schedule.fast_threshold_ap(0.446) == pytest.approx(expected)


def test_mgp_targets_fall_by_the_fraction_skip():
    assert MGP.target_ap(0.5, 0) == pytest.approx(0.5)
    assert MGP.target_ap(0.5, 3) == pytest.approx(0.5 * 0.98**3)


def test_mgp_thresholds_are_relative_to_target_and_base():
    assert MGP.subset_threshold_ap(0.5, 3) == pytest.approx(0.5 * 0.98**4)
    assert MGP.full_threshold_ap(0.5, 3) == pytest.approx(0.45)


def test_the_papers_defaults():
    assert (GP.map_tol, GP.skip, GP.points_per_module) == (0.02, 0.0, 0.5)
    assert (MGP.map_tol, MGP.skip) == (0.10, 0.02)
