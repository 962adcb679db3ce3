"""`--keep_params`: searches with two budgets, from the options to the output files."""

import json
from unittest import mock

import pytest
import torch

from datasets.coco import build_dataset
from pruning.cost import cost_of
from reports.samples import Samples
from reports.search_page import search_page
from tests.pruning.test_end_to_end import SMALL, folder  # noqa: F401
from tests.pruning.test_latency_search import by_width, time_of
from tests.pruning.test_resume import assert_same_file, lines_of, search_with, words_of
from tests.pruning.tiny import tiny_args
from tests.tiny_run import built, settled
from util.errors import UserError, run_cli
from weights.checkpoint_file import read_checkpoint

TRANSFORMER = "--attention_unit 4 --ffn_unit 8 --search_split val2017"
DETECTOR = f"{TRANSFORMER} --scope detector --block_unit 4"
BOTH = "--cost macs --keep 0.85 --keep_params 0.8"
SCOPES = {
    "transformer": (f"{TRANSFORMER} {BOTH}", 0.85, 0.8),
    "detector": (f"{DETECTOR} --keep 0.93 --keep_params 0.6", 0.93, 0.6),
    "detector, width 0": (f"{DETECTOR} --min_units 0 --keep 0.83 --keep_params 0.25", 0.83, 0.25),
}


def uneven(steps, device, amp, **options):
    """Times of which every other width is slow, so that no widths are both the fastest and the smallest."""
    exact = by_width(steps, device, amp, **options)
    return {
        name: [time if time % 16 == 0 or name.endswith(".positions") else 3 * time for time in times]
        for name, times in exact.items()
    }


def run(root, out, options, times=by_width):
    with mock.patch("pruning.latency.time_steps", times):
        return search_with(words_of(root, out, options))


def built_of(root, path):
    args = tiny_args(f"{SMALL} --coco_path {root} --resume {path} --eval")
    return built(*settled(args)[:2])[0], build_dataset("val2017", args)[0][0].shape[-2:]


@pytest.fixture(scope="module")
def searched(folder, tmp_path_factory):  # noqa: F811
    """A search with two budgets, run once."""
    return run(folder, tmp_path_factory.mktemp("both"), f"{TRANSFORMER} {BOTH}")


@pytest.mark.parametrize("name", SCOPES)
def test_the_cut_detector_keeps_both_fractions(folder, searched, tmp_path, name):  # noqa: F811
    options, keep, keep_params = SCOPES[name]
    result = searched if name == "transformer" else run(folder, tmp_path, options)
    slim, size_hw = built_of(folder, result.path)
    dense, _ = built_of(folder, folder / "dense.pth")
    before, after = (cost_of(model, tuple(size_hw)) for model in (dense, slim))
    params = "params" if "--scope detector" in options else "transformer_params"
    cost = "detector_gmacs" if "--scope detector" in options else "gmacs"
    (found,) = json.loads(result.path.with_name("summary.json").read_text())["budgets"]
    assert getattr(after, params) / getattr(before, params) == pytest.approx(found["kept_params"], abs=1e-12)
    kept = getattr(after, cost) / getattr(before, cost)
    if "width 0" in name:  # what several modules share is gone with the last of them
        assert kept <= found["kept_fraction"] + 1e-9
    else:
        assert kept == pytest.approx(found["kept_fraction"], abs=1e-9)
    assert found["kept_params"] <= keep_params and found["kept_fraction"] <= keep
    assert (found["keep"], found["keep_params"]) == (keep, keep_params)
    assert min(keep_params - found["kept_params"], keep - found["kept_fraction"]) < 0.05  # one of them is used up
    assert any(not width for _, width in slim.widths_in("detector").items()) == ("width 0" in name)


def test_both_fractions_are_in_the_files_of_the_search(searched):
    lines = [json.loads(line) for line in lines_of(searched)]
    (found,) = lines[-1]["budgets"]
    assert lines[0]["args"]["keep_params"] == 0.8
    for line in lines[1:-1]:
        assert line["keep_params"] == 0.8 and line["kept_params"] <= 0.8 and line["kept_fraction"] <= line["keep"]
    kept = (
        f"{100 * found['kept_fraction']:.1f} % of at most 85 %, parameters {100 * found['kept_params']:.1f} % of at "
        "most 80 %"
    )
    log = searched.path.with_name("run.log").read_text()
    assert f"cost kept: {kept}, power" in log and f"*      {kept}" in log
    report = search_page(searched.path.parent, Samples(torch.device("cpu")))
    assert f"Kept: {kept}." in report and f"<td>{kept}</td>" in report
    assert "kept 85 % of its cost (macs) and 80 % of its parameters" in report


def test_several_budgets_each_keep_the_parameters(folder, tmp_path):  # noqa: F811
    run(folder, tmp_path, f"{TRANSFORMER} --cost macs --keep 0.9 0.82 --keep_params 0.85")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [budgets["keep"] for budgets in summary["budgets"]] == [0.82, 0.9]
    whole = cost_of(built_of(folder, folder / "dense.pth")[0]).transformer_params
    for point in summary["points"][1:]:
        slim, _ = built_of(folder, tmp_path / point["file"])
        assert cost_of(slim).transformer_params / whole == pytest.approx(point["kept_params"], abs=1e-12)
        assert point["kept_params"] <= point["keep_params"] == 0.85 and point["kept_fraction"] <= point["keep"]


def test_milliseconds_and_parameters_both_hold_where_slow_widths_are_smaller(folder, tmp_path):  # noqa: F811
    full = read_checkpoint(folder / "dense.pth").widths
    options = f"{TRANSFORMER} --target_ms {0.8 * time_of(full):g} --keep_params"
    result = run(folder, tmp_path / "found", f"{options} 0.75", uneven)
    (found,) = json.loads(result.path.with_name("summary.json").read_text())["budgets"]
    latency = json.loads(result.path.with_name("summary.json").read_text())["latency"]["detectors"]["after"]
    assert latency["predicted"] <= 0.8 * time_of(full) and found["kept_params"] <= 0.75
    trial = json.loads(lines_of(result)[-2])
    slim, dense = (cost_of(built_of(folder, path)[0]) for path in (result.path, folder / "dense.pth"))
    assert slim.transformer_params / dense.transformer_params == pytest.approx(found["kept_params"], abs=1e-12)
    table = {
        kind["modules"][0]: kind["widths"]
        for kind in json.loads((tmp_path / "found/latency.json").read_text())["kinds"]
    }
    assert trial["event"] == "trial" and all(len(widths) > 1 for widths in table.values())


def test_what_cannot_be_met_together_is_one_sentence_with_the_least_that_can(folder, tmp_path, capsys):  # noqa: F811
    full = read_checkpoint(folder / "dense.pth").widths
    target = f"{0.53 * time_of(full):g}"
    options = f"{TRANSFORMER} --target_ms {target} --keep_params"
    message = rf"^--keep_params 0\.59: found less than is possible with --target_ms {target}, expected at least 0\.\d+$"
    with pytest.raises(UserError, match=message) as refused:
        run(folder, tmp_path, f"{options} 0.59", uneven)
    least = str(refused.value).rsplit(" ", 1)[1]
    table = f"--latency_table {tmp_path / 'latency.json'}"
    assert not (tmp_path / "pruned.pth").exists()
    found = run(folder, tmp_path / "least", f"{options} {least} {table}", uneven)
    (budgets,) = json.loads(found.path.with_name("summary.json").read_text())["budgets"]
    assert budgets["kept_params"] <= float(least) < budgets["kept_params"] + 0.01
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: run(folder, tmp_path / "again", f"{options} 0.59 {table}", uneven))
    assert ended.value.code == 2 and capsys.readouterr().err.count("--keep_params 0.59: found less than") == 1


def test_a_killed_search_ends_as_it_would_have(folder, searched, tmp_path):  # noqa: F811
    lines = lines_of(searched)
    for count in range(1, len(lines)):
        out = tmp_path / str(count)
        out.mkdir()
        (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        run(folder, out, f"{TRANSFORMER} {BOTH} --resume_search")
        assert_same_file(searched.path.parent, out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"kept_params": 0.5},
            r"found a trial that keeps 0\.5 of the parameters, expected 0\.\d+, the parameters of its",
        ),
        ({"kept_fraction": 0.5}, r"found a trial that keeps 0\.5 of the cost, expected 0\.\d+, the cost of its"),
        (
            {"keep_params": None},
            r"found a trial with keep_params None and kept_params 0\.\d+, expected keep_params 0\.8",
        ),
        ({"kept_params": None}, r"found a trial with keep_params 0\.8 and kept_params None, expected keep_params 0\.8"),
        ({"keep_params": "x"}, "found a damaged trial"),
    ],
)
def test_a_journal_with_other_parameters_is_refused(folder, searched, tmp_path, changed, message):  # noqa: F811
    first, trial, *_ = lines_of(searched)
    trial = json.dumps({**json.loads(trial), **changed}).encode() + b"\n"
    (tmp_path / "search.jsonl").write_bytes(first + trial)
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, f"{TRANSFORMER} {BOTH} --resume_search")


def test_a_replayed_trial_with_too_many_parameters_is_refused(folder, searched, tmp_path):  # noqa: F811
    """As if an allocation had exceeded its second budget."""
    first, trial, *_ = lines_of(searched)
    start, trial = json.loads(first), json.loads(trial)
    start["args"]["keep_params"] = trial["keep_params"] = 0.7
    (tmp_path / "search.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(trial)}\n")
    with pytest.raises(UserError, match=r"of the parameters, expected 0\.\d+, .* and at most 0\.7$"):
        run(folder, tmp_path, f"{TRANSFORMER} {BOTH} --keep_params 0.7 --resume_search")


def test_a_search_is_resumed_with_the_same_fraction_alone(folder, searched, tmp_path):  # noqa: F811
    first, trial, *_ = lines_of(searched)
    (tmp_path / "search.jsonl").write_bytes(first + trial)
    with pytest.raises(UserError, match=r"found a search with args\.keep_params 0\.8, expected 0\.7"):
        run(folder, tmp_path, f"{TRANSFORMER} {BOTH} --keep_params 0.7 --resume_search")
    with pytest.raises(UserError, match=r"found a search with args\.keep_params 0\.8, expected None"):
        run(folder, tmp_path, f"{TRANSFORMER} --cost macs --keep 0.85 --resume_search")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep_params 0.5", "--keep_params: found neither --keep nor --target_ms, expected one of them as well"),
        ("--keep_params 0.5 --search visit", "--keep_params: --search visit does not use it, expected --search fast"),
        ("--keep 0.5 --keep_params 0", r"argument --keep_params: 0: expected a number in \[0\.001, 1\]"),
        ("--keep 0.5 --keep_params 1.1", r"argument --keep_params: 1\.1: expected a number in \[0\.001, 1\]"),
        (
            "--cost macs --keep 0.9 --keep_params 0.01",
            r"^--keep_params 0\.01: .* smallest widths cost, expected at least 0\.\d+$",
        ),
        (
            "--cost macs --keep 0.01 --keep_params 0.9",
            r"^--keep 0\.01: .* smallest widths cost, expected at least 0\.\d+$",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, f"--attention_unit 4 --ffn_unit 8 {options}")
    assert not [*tmp_path.iterdir()]
