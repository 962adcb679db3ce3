"""Searches that may drop the last decoder layers, with two budgets and with a tolerance of mAP."""

import contextlib
import json
from unittest import mock

import pytest
import torch

from models.widths import Widths
from pruning.cost import cost_of
from pruning.journal import Trial
from reports.samples import Samples
from reports.search_page import search_page
from tests.pruning.test_keep_params import uneven
from tests.pruning.test_latency_search import by_width
from tests.pruning.tiny import VARIANTS, tiny_detector
from tests.runs.test_depth_search import (  # noqa: F401
    assert_same_weights,
    detector_at,
    evaluate,
    journal_begun,
    lines_of,
    needs_all,
    prune,
    write_deep,
)
from tests.soak import rest_in_soak
from util.errors import RunFailedError, UserError

BOTH = "--cost macs --keep 0.8 --keep_params 0.75 --min_dec_layers 1"
TOLERANCE = "--map_tol 0.1 --min_dec_layers 1"


@pytest.fixture(scope="module", params=rest_in_soak(list(VARIANTS), ["dense"]))
def root(request, tmp_path_factory):
    """Images of which the first of deep.pth's three decoder layers finds most."""
    return write_deep(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


def trials_of(out):
    return [
        Trial.from_dict({key: value for key, value in line.items() if key != "event"})
        for line in lines_of(out, "trial")
    ]


def cut_to(root, out, trial):
    """A detector of a trial's widths, without its weights."""
    network = next(words for name, words in VARIANTS.items() if name in root.name)
    (start,) = lines_of(out, "start")
    widths = trial.widths_after(Widths.parse(start["full_widths"]))
    return tiny_detector(f"{network} --dec_layers {trial.decoder_layers}", widths)[0]


def assert_both_hold(root, out, keep, keep_params, cost, params):
    """Both fractions of each trial are those of a detector of its widths, and within the budgets."""
    (end,) = lines_of(out, "end")
    dense = cost_of(detector_at(root / "deep.pth"), tuple(end["image_size_hw"]))
    for trial in trials_of(out):
        slim = cost_of(cut_to(root, out, trial), tuple(end["image_size_hw"]))
        assert trial.kept_fraction <= keep + 1e-9 and trial.kept_params <= keep_params + 1e-9
        assert trial.kept_fraction == pytest.approx(getattr(slim, cost) / getattr(dense, cost), abs=1e-9)
        assert trial.kept_params == pytest.approx(getattr(slim, params) / getattr(dense, params), abs=1e-9)


def test_both_budgets_hold_with_every_number_of_layers(root, tmp_path):
    result = prune(root, tmp_path, BOTH)
    trials = trials_of(tmp_path)
    assert {3, 1} <= {trial.decoder_layers for trial in trials}
    assert_both_hold(root, tmp_path, 0.8, 0.75, "gmacs", "transformer_params")
    assert result.ap == max(trial.full_ap for trial in trials)
    assert evaluate(root, tmp_path / "eval", result.path) == pytest.approx(result.ap, abs=1e-6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["decoder_layers"] == {"before": 3, "after": len(result.widths.decoder)}
    (budgets,) = summary["budgets"]
    assert budgets["kept_params"] <= 0.75 and budgets["kept_fraction"] <= 0.8


@pytest.mark.soak
def test_both_budgets_of_the_whole_detector_hold_and_fewer_layers_may_be_the_only_ones_that_fit(root, tmp_path):
    options = "--scope detector --block_unit 4 --cost macs --keep 0.97 --min_dec_layers 1 --keep_params"
    prune(root, tmp_path / "loose", f"{options} 0.7")
    assert_both_hold(root, tmp_path / "loose", 0.97, 0.7, "detector_gmacs", "params")
    assert {trial.decoder_layers for trial in trials_of(tmp_path / "loose")} >= {3, 1}
    least = {}
    for layers in (1, 3):
        with pytest.raises(UserError, match="expected at least") as refused:
            prune(root, tmp_path / "least", f"{options} 0.001 --min_dec_layers {layers}")
        least[layers] = float(str(refused.value).rsplit(" ", 1)[1])
    tight = round(sum(least.values()) / 2, 3)
    prune(root, tmp_path / "tight", f"{options} {tight}")
    assert_both_hold(root, tmp_path / "tight", 0.97, tight, "detector_gmacs", "params")
    assert 3 not in {trial.decoder_layers for trial in trials_of(tmp_path / "tight")}


@pytest.mark.soak
def test_milliseconds_and_parameters_both_hold_where_slow_widths_are_smaller(root, tmp_path):
    options = "--reconstruct none --ranking magnitude --cost latency --keep 0.6 --keep_params 0.7 --min_dec_layers 1"
    prune(root, tmp_path, options, times=uneven)
    dense = cost_of(detector_at(root / "deep.pth")).transformer_params
    table = {
        name: {int(width): entry["milliseconds"] for width, entry in kind["widths"].items()}
        for kind in json.loads((tmp_path / "latency.json").read_text())["kinds"]
        for name in kind["modules"]
    }
    positions = {
        name: kind["used_by"]["self_attention and cross_attention"]["milliseconds"]
        for kind in json.loads((tmp_path / "latency.json").read_text())["positions"]
        for name in kind["steps"]
    }
    whole = sum(times[max(times)] for times in table.values()) + sum(positions.values())
    assert {trial.decoder_layers for trial in trials_of(tmp_path)} >= {3, 1}
    for trial in trials_of(tmp_path):
        milliseconds = sum(table[name][width] for name, width in trial.widths.items())
        milliseconds += sum(positions[f"decoder.{layer}.positions"] for layer in range(trial.decoder_layers))
        assert trial.kept_fraction == pytest.approx(milliseconds / whole) and trial.kept_fraction <= 0.6
        params = cost_of(cut_to(root, tmp_path, trial)).transformer_params
        assert trial.kept_params == pytest.approx(params / dense) and trial.kept_params <= 0.7


ALONE, TOGETHER = "found less than the smallest widths cost", r"found less than is possible with --keep 0\.24"
FASTEST = "--reconstruct none --ranking magnitude --cost latency --keep 0.24"


@pytest.mark.parametrize(
    ("options", "times", "messages"),
    rest_in_soak(
        [("--cost macs --keep 0.9", by_width, (ALONE,)), (FASTEST, uneven, (ALONE, TOGETHER))],
        [("--cost macs --keep 0.9", by_width, (ALONE,))],
    ),
)
def test_what_no_number_of_layers_can_meet_is_one_sentence_with_the_least(root, tmp_path, options, times, messages):
    words, least = f"{options} --min_dec_layers 1 --keep_params", "0.01"
    for message in messages:
        with pytest.raises(
            UserError, match=rf"^--keep_params {least}: {message}, expected at least 0\.\d+$"
        ) as refused:
            prune(root, tmp_path / least, f"{words} {least}", times=times)
        assert not (tmp_path / least / "pruned.pth").exists()
        least = f"{float(str(refused.value).rsplit(' ', 1)[1]):g}"
    result = prune(root, tmp_path / least, f"{words} {least}", times=times)
    assert len(result.widths.decoder) == 1
    assert all(trial.kept_params <= float(least) for trial in trials_of(tmp_path / least))


def test_an_interrupted_search_with_two_budgets_ends_as_it_would_have(root, tmp_path):
    result = prune(root, tmp_path / "whole", BOTH)
    last = len((tmp_path / "whole" / "search.jsonl").read_text().splitlines()) - 1
    for count in (4, last):
        journal_begun(tmp_path / str(count), tmp_path / "whole", count)
        again = prune(root, tmp_path / str(count), f"{BOTH} --resume_search")
        assert again.ap == result.ap
        assert_same_weights(result.path, again.path)


def kept_of(out):
    """The least fraction of the cost that a trial of a search by tolerance kept with enough mAP."""
    (start,) = lines_of(out, "start")
    return min(t.kept_fraction for t in trials_of(out) if t.full_ap >= 0.9 * start["base_ap"])


COSTS = (
    "--cost params",
    "--scope detector --block_unit 4",
    "--cost latency --reconstruct none --ranking magnitude",
)


@pytest.mark.parametrize("cost", rest_in_soak(COSTS, COSTS[:1]))
def test_a_tolerance_is_met_at_no_more_cost_than_with_all_layers(root, tmp_path, cost):
    least = 1.0
    with contextlib.suppress(RunFailedError):
        assert len(prune(root, tmp_path / "plain", f"{cost} --map_tol 0.1").widths.decoder) == 3
        least = kept_of(tmp_path / "plain")
    result = prune(root, tmp_path / "found", f"{cost} {TOLERANCE}")
    kept = kept_of(tmp_path / "found")
    assert kept < least and len(result.widths.decoder) < 3
    assert result.ap >= 0.9 * result.base_ap
    assert evaluate(root, tmp_path / "eval", result.path) == pytest.approx(result.ap, abs=1e-6)
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert summary["decoder_layers"] == {"before": 3, "after": len(result.widths.decoder)}
    (end,) = lines_of(tmp_path / "found", "end")
    (chosen,) = [trial for trial in trials_of(tmp_path / "found") if trial.name in end["chosen"]]
    assert chosen.kept_fraction == kept and chosen.full_ap == result.ap
    assert chosen.widths_after(Widths.parse(lines_of(tmp_path / "found", "start")[0]["full_widths"])) == result.widths


def test_the_kept_fraction_of_a_tolerance_is_that_of_the_file(root, tmp_path):
    result = prune(root, tmp_path, TOLERANCE)
    slim, dense = (cost_of(detector_at(path)).transformer_params for path in (result.path, root / "deep.pth"))
    assert slim / dense == pytest.approx(kept_of(tmp_path), abs=1e-9)
    log = (tmp_path / "run.log").read_text()
    assert f"{len(result.widths.decoder)} of 3 decoder layers are left" in log and "decoder layers: 1" in log
    page = search_page(tmp_path, Samples(torch.device("cpu")))
    assert "decoder layers" in page and "--min_dec_layers 1" in page


def test_an_interrupted_search_by_tolerance_ends_as_it_would_have(root, tmp_path):
    result = prune(root, tmp_path / "whole", TOLERANCE)
    lines = (tmp_path / "whole" / "search.jsonl").read_text().splitlines()
    for count in (2, len(lines) // 2, len(lines) - 1):
        journal_begun(tmp_path / str(count), tmp_path / "whole", count)
        again = prune(root, tmp_path / str(count), f"{TOLERANCE} --resume_search")
        assert again.ap == result.ap
        assert_same_weights(result.path, again.path)


@pytest.mark.parametrize("target", rest_in_soak(["--keep 0.7", "--map_tol 0.1"], ["--map_tol 0.1"]))
def test_a_single_decoder_layer_is_never_dropped(root, tmp_path, target):
    single = root / "dense.pth"
    found = prune(root, tmp_path / "found", f"{target} --min_dec_layers 1", single)
    plain = prune(root, tmp_path / "plain", target, single)
    assert found.widths == plain.widths and found.ap == plain.ap and not lines_of(tmp_path / "found", "layers")
    assert_same_weights(found.path, plain.path)
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert summary["decoder_layers"] == {"before": 1, "after": 1}


def test_layers_without_enough_map_of_their_own_are_not_tried(needs_all, tmp_path):  # noqa: F811
    path = needs_all / "dense.pth"
    result = prune(needs_all, tmp_path / "found", TOLERANCE, path)
    plain = prune(needs_all, tmp_path / "plain", "--map_tol 0.1", path)
    assert result.widths == plain.widths
    (layers,) = lines_of(tmp_path / "found", "layers")
    enough = {n for n, ap in enumerate(layers["ap_by_layer"], 1) if ap >= 0.9 * result.base_ap}
    assert {trial.decoder_layers for trial in trials_of(tmp_path / "found")} == enough == {3}
    assert_same_weights(result.path, plain.path)


def test_the_first_layers_are_the_result_where_nothing_else_can_be_removed(root, tmp_path):
    """Any cut channel loses all mAP; dropping layers alone does not."""
    with mock.patch("pruning.workbench.DetectorBench.full_ap", _nothing_once_cut):
        result = prune(root, tmp_path / "found", TOLERANCE)
        with pytest.raises(RunFailedError, match="no trial passed"):
            prune(root, tmp_path / "plain", "--map_tol 0.1 --min_dec_layers 3")
    deep = detector_at(root / "deep.pth")
    assert result.widths == deep.widths.first_layers(1)
    found = detector_at(result.path).state_dict()
    assert all((value == deep.state_dict()[key]).all() for key, value in found.items())
    assert evaluate(root, tmp_path / "eval", result.path) == pytest.approx(result.ap, abs=1e-6)
    kept = {n: t.kept_fraction for t in trials_of(tmp_path / "found") if t.full_ap for n in [t.decoder_layers]}
    assert kept[1] == min(kept.values()) == kept_of(tmp_path / "found")


def _nothing_once_cut(bench):
    is_cut = any(gate is not None and not gate.all() for module in bench.modules.values()
                 for gate in module.layer.gates.get(module.block, (None, None)))  # fmt: skip
    return 0.0 if is_cut else bench._ap()
