"""Several budgets in one search: `--keep 0.8 0.65`, or several `--target_ms`."""

import json
from unittest import mock

import pytest
import torch

from pruning.budget import POWERS
from pruning.config import SearchConfig
from pruning.cost import cost_of
from reports.samples import Samples
from reports.search_page import read_search, search_page
from tests.pruning.test_end_to_end import SMALL, folder  # noqa: F401
from tests.pruning.test_latency_search import by_width, time_of
from tests.pruning.test_resume import lines_of, search_with, words_of
from tests.pruning.tiny import tiny_args
from tests.tiny_run import built, settled
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint

UNITS = "--attention_unit 4 --ffn_unit 8 --cost macs --search_split val2017"
KEEPS = {"0.90": 0.9, "0.85": 0.85, "0.805": 0.805}


def run(root, out, options):
    with mock.patch("pruning.latency.time_steps", by_width):
        return search_with(words_of(root, out, f"{UNITS} {options}"))


@pytest.fixture(scope="module")
def searched(folder, tmp_path_factory):  # noqa: F811
    """A search with three budgets, the order of which does not matter."""
    return run(folder, tmp_path_factory.mktemp("curve"), "--keep 0.85 0.9 0.805")


def test_each_budget_gives_a_detector_within_it(folder, searched):  # noqa: F811
    out = searched.path.parent
    assert {path.name for path in out.glob("*.pth")} == {f"pruned_{name}.pth" for name in KEEPS}
    assert searched.path.name == "pruned_0.805.pth"
    points = json.loads((out / "summary.json").read_text())["points"]
    assert [point["name"] for point in points] == ["before", *KEEPS]
    dense = built(*settled(tiny_args(f"{SMALL} --coco_path {folder} --resume {folder}/dense.pth --eval"))[:2])[0]
    for point, keep in zip(points[1:], KEEPS.values(), strict=True):
        path = out / point["file"]
        slim = built(*settled(tiny_args(f"{SMALL} --coco_path {folder} --resume {path} --eval"))[:2])[0]
        assert slim.widths.to_list() == point["widths"] == read_checkpoint(path).widths.to_list()
        before, after = (cost_of(model, (64, 80)) for model in (dense, slim))
        assert after.gmacs / before.gmacs == pytest.approx(point["kept_fraction"]) and point["kept_fraction"] <= keep
        assert point["params"] == after.params
    assert [point["kept_fraction"] for point in points] == sorted((p["kept_fraction"] for p in points), reverse=True)
    assert points[0]["kept_fraction"] == 1 and "milliseconds" not in points[0]


def test_a_further_budget_costs_one_cut(searched):
    trials = [json.loads(line) for line in lines_of(searched) if json.loads(line)["event"] == "trial"]
    assert [trial["keep"] for trial in trials] == [0.805] * len(POWERS) + [0.85, 0.9]
    best = max(trials[: len(POWERS)], key=lambda trial: trial["full_ap"])
    assert {trial["power"] for trial in trials[len(POWERS) :]} == {best["power"]}
    points = json.loads(lines_of(searched)[-1])["points"]
    assert [point["ap"] for point in points[1:]] == [trials[-1]["full_ap"], trials[-2]["full_ap"], best["full_ap"]]


def test_a_killed_search_keeps_the_budgets_that_it_has_and_finds_the_others(folder, searched, tmp_path):  # noqa: F811
    lines = lines_of(searched)
    for count in range(1, len(lines)):
        out = tmp_path / str(count)
        out.mkdir()
        (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        run(folder, out, "--keep 0.85 0.9 0.805 --resume_search")
        for name in KEEPS:
            first, second = (read_checkpoint(path / f"pruned_{name}.pth") for path in (searched.path.parent, out))
            assert first.widths == second.widths
            assert all((value == second.state_dict[key]).all() for key, value in first.state_dict.items())


def test_one_budget_is_as_before(folder, searched, tmp_path):  # noqa: F811
    result = run(folder, tmp_path, "--keep 0.805")
    assert result.path.name == "pruned.pth" and result.widths == searched.widths
    assert json.loads(lines_of(result)[0])["args"]["keep"] == 0.805  # journals of older versions have a number
    assert not (tmp_path / "summary.json").exists() and "points" not in json.loads(lines_of(result)[-1])


def test_older_results_are_moved_aside(folder, searched, tmp_path):  # noqa: F811
    run(folder, tmp_path, "--keep 0.9 0.85")
    run(folder, tmp_path, "--keep 0.9")
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {"pruned.pth", "pruned_0.90.1.pth", "pruned_0.85.1.pth"}
    run(folder, tmp_path, "--keep 0.9")
    assert {path.name for path in tmp_path.glob("pruned_*.pth")} == names - {"pruned.pth"}


def test_the_report_has_each_budget(searched):
    text = search_page(searched.path.parent, Samples(torch.device("cpu")))
    assert all(f"pruned_{name}.pth" in text for name in KEEPS) and "AP against GMACs of the detector" in text
    assert "kept 85 % and 90 % and 80.5 %" in text


def test_trials_of_equal_widths_are_chosen_once_for_each_budget(folder, tmp_path):  # noqa: F811
    """All powers and both budgets lead to the same widths."""
    narrow = {}

    def allocate(damages, costs, budget, power):
        narrow.update({name: min(table) for name, table in costs.items()})
        return dict(narrow)

    with mock.patch("pruning.budget.allocate", allocate):
        run(folder, tmp_path, "--keep 0.9 0.85")
    trials = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()[1:-1]]
    assert [trial["widths"] for trial in trials] == [narrow] * (len(POWERS) + 1)
    expected = [(0.85, POWERS[0]), (0.9, POWERS[0])]
    assert [(trial.keep, trial.power) for trial in read_search(tmp_path).chosen] == expected
    assert search_page(tmp_path, Samples(torch.device("cpu"))).count("<td>*</td>") == 2
    *others, end = (tmp_path / "search.jsonl").read_text().splitlines()
    older = {key: value for key, value in json.loads(end).items() if key != "chosen"}
    (tmp_path / "search.jsonl").write_text("\n".join([*others, json.dumps(older)]) + "\n")
    assert len(read_search(tmp_path).chosen) == len(trials)
    damaged = {**older, "chosen": [[0.85, 3.0, None]]}
    (tmp_path / "search.jsonl").write_text("\n".join([*others, json.dumps(damaged)]) + "\n")
    with pytest.raises(UserError, match="found a damaged journal"):
        read_search(tmp_path)


def test_budgets_in_milliseconds_are_drawn_against_the_measured_ones(folder, tmp_path):  # noqa: F811
    full = read_checkpoint(folder / "dense.pth").widths
    targets = [round(fraction * time_of(full)) for fraction in (0.9, 0.7)]
    out = run(folder, tmp_path, f"--cost latency --target_ms {targets[0]} {targets[1]}").path.parent
    summary = json.loads((out / "summary.json").read_text())
    assert [point["name"] for point in summary["points"]] == ["before", *(f"{target}ms" for target in targets)]
    detectors = summary["latency"]["detectors"]
    for point, target in zip(summary["points"][1:], targets, strict=True):
        assert (out / f"pruned_{target}ms.pth").exists()
        assert detectors[point["name"]]["predicted"] <= target and "milliseconds" in point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep 0.8 0.8", r"--keep: found 0\.8 and 0\.8, expected values that differ more"),
        ("--keep 0.7000001 0.7000002", r"--keep: found 0\.7000001 and 0\.7000002, expected values that differ more"),
        ("--cost latency --target_ms 33.33331 9 33.33332", r"--target_ms: found 33\.33331 and 33\.33332, expected"),
        ("--keep 0.9 0.01", r"--keep 0\.01: found less than the smallest widths cost, expected at least 0\."),
        ("--keep 0.9 2", r"argument --keep: 2: expected a number in \[0\.001, 1\]"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(folder, tmp_path, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, options)
    assert not [*tmp_path.iterdir()]


def test_stored_budgets_are_one_number_or_several():
    assert SearchConfig.from_values({"keep": 0.5}).keep == [0.5]
    assert SearchConfig.from_values({"keep": [0.8, 0.5]}).budgets == {"0.50": 0.5, "0.80": 0.8}
    assert not SearchConfig().has_budget
    for wrong in ("x", [0.5, "y"], True, [2.0], {"a": 1}):
        with pytest.raises(UserError, match=r"under `args\.keep`, expected a number"):
            SearchConfig.from_values({"keep": wrong})
