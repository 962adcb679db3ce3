"""The plan of a search: its counts are those of the search, it writes nothing and changes nothing."""

import json
import types
from itertools import count
from unittest import mock

import pytest
import torch

from pruning import budget
from pruning.schedule import GP, MGP, Schedule
from reports import plots
from runs import search_command, search_results
from runs.plan import AT_MOST
from runs.search_command import get_pruning_parser, search
from tests.pruning.test_end_to_end import IMAGES, SMALL, write_folder
from tests.pruning.tiny import VARIANTS
from tests.soak import rest_in_soak
from tests.tiny_run import run_script
from tests.trust.forked import job, run_jobs
from util import distributed, phases
from util.cli import parse
from util.errors import RunFailedError, UserError
from util.lock import hold_folder

FAST = "--calibration_images 3 --attention_unit 2 --ffn_unit 8"
VISIT = f"{FAST} --search visit --subset_batches_attention 2 --subset_batches_ffn 1"
PAPER = (
    "--search paper --subset_batches_attention 2 --subset_batches_ffn 1 --num_candidates_attention 8 "
    "--num_candidates_ffn 4 --attention_unit 2 --ffn_unit 8"
)
KINDS = {
    "fast": f"{FAST} --map_tol 0.1 --search_split val2017",
    "budgets": f"{FAST} --keep 0.5 0.7 --reconstruct output",
    "layers": f"{FAST} --keep 0.5 --min_dec_layers 1",
    "layers by tolerance": f"{FAST} --map_tol 0.3 --min_dec_layers 1 --search_split val2017",
    "removal": f"{FAST} --keep 0.45 --min_units 0",
    "latency": f"{FAST} --map_tol 0.5 --search_split val2017 --cost latency",
    "magnitude": "--keep 0.7 --reconstruct none --ranking magnitude --selection once --ffn_unit 8",
    "visit": f"{VISIT} --map_tol 0.02",
    "first_order": f"{FAST} --keep 0.5 --ranking first_order --reconstruct output --selection once",
    "exact": f"{VISIT} --map_tol 0.3 --reconstruct output --ranking exact --selection once",
    "paper": PAPER,
    "detector": f"{FAST} --keep 0.95 --scope detector --block_unit 4",
    "uncached": f"{FAST} --keep 0.5 --cache_gb 0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and images annotated with the detections of that very detector."""
    return write_folder(tmp_path_factory.mktemp("plan"), VARIANTS["dense"])


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    """Phases are timed by a clock that moves by one second whenever it is read."""
    ticks = count(1)
    monkeypatch.setattr(phases, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing takes a third of the time."""
    for name in ("plot_widths", "plot_ap_against_cost", "plot_curve"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    monkeypatch.setattr(search_results, "write_report", lambda *arguments: None)


@pytest.fixture
def narrow(monkeypatch):
    """Other widths for each power of the damages, none of them whole."""

    def allocate(damages, costs, limit, power):
        return {name: sorted(widths)[budget.POWERS.index(power)] for name, widths in costs.items()}

    monkeypatch.setattr(budget, "allocate", allocate)


def words_of(folder, out, more):
    return f"{SMALL} --coco_path {folder} --resume {folder}/dense.pth --output_dir {out} {more}"


def run(folder, out, more, schedule=MGP, is_long=True):
    """A search that takes itself for a long one."""
    with mock.patch.object(search_command, "is_long_search", lambda setup: is_long):
        return search(schedule, *parse(get_pruning_parser(schedule, "a test"), words_of(folder, out, more).split()))


def lines_of(out):
    return [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]


def phases_of(out):
    """The phases at the end of a journal, by name."""
    return {entry["phase"]: entry for entry in lines_of(out)[-1]["phases"]}


def tree(root):
    """Times of the files in a folder; checking that it can be written changes those of folders."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def test_all_counts_are_exact_where_no_module_stays_whole(folder, tmp_path, narrow):
    run(folder, tmp_path, f"{FAST} --keep 0.9")
    trials = [line["widths"] for line in lines_of(tmp_path) if line["event"] == "trial"]
    assert len({str(widths) for widths in trials}) == 3 and all(width < 32 for w in trials for width in w.values())
    found = phases_of(tmp_path)
    assert {*found} == {"waiting for images", "backbone", "transformer", "gradients", "moments", "fits", "mAP"}
    for name, entry in found.items():
        assert entry["done"] == pytest.approx(entry["planned"], abs=2e-3), name
        assert min(entry["done"], entry["seconds"], entry["estimated_seconds"]) > 0, name
    assert found["backbone"]["done"] == 7 and found["gradients"]["done"] == 4 and found["mAP"]["done"] == 7 * 4
    log = (tmp_path / "run.log").read_text()
    assert log.index("plan of --search fast on 7 images") < log.index("mAP 0.") < log.index("the rest,")


@pytest.mark.parametrize("kind", rest_in_soak(KINDS, ("visit", "detector")))
def test_no_search_does_more_than_its_plan(folder, tmp_path, kind):
    run(folder, tmp_path, KINDS[kind])
    found = phases_of(tmp_path)
    for name, entry in found.items():
        if entry["bound"] == "exactly":
            assert entry["done"] == pytest.approx(entry["planned"], abs=2e-3), name
        elif entry["bound"] == AT_MOST:
            assert 0 < entry["done"] <= entry["planned"] + 2e-3, name
        assert entry["planned"] > 0, name
    assert found["backbone"]["done"] > 7 or kind != "uncached"
    assert ("gradients" in found) == (kind != "paper")
    assert ("latencies" in found) == (kind == "latency") and ("scores of channels" in found) == (
        kind in ("paper", "exact")
    )


def test_a_resumed_search_plans_what_is_left(folder, tmp_path, narrow):
    run(folder, tmp_path / "whole", f"{FAST} --keep 0.9")
    start, *trials, _ = lines_of(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (start, trials[0])))
    before = tree(tmp_path)
    run(folder, tmp_path / "part", f"{FAST} --keep 0.9 --resume_search --plan")
    assert tree(tmp_path) == before
    run(folder, tmp_path / "part", f"{FAST} --keep 0.9 --resume_search")
    found = phases_of(tmp_path / "part")
    assert found["mAP"]["done"] == found["mAP"]["planned"] == 7 * 3
    assert found["fits"]["done"] <= found["fits"]["planned"]


@pytest.mark.parametrize("kind", rest_in_soak(["fast", "visit", "paper", "detector"], ["fast"]))
def test_a_search_finds_the_same_bits_with_and_without_a_plan(folder, tmp_path, kind):
    states = []
    for is_long in (True, False):
        torch.manual_seed(3)
        out = tmp_path / str(is_long)
        model = run(folder, out, KINDS[kind], is_long=is_long).model
        lines = [
            {k: v for k, v in line.items() if k not in ("seconds", "passes_since_resume", "phases")}
            for line in lines_of(out)
        ]
        states.append((model.state_dict(), lines, torch.get_rng_state()))
    (first, lines, generator), (second, others, other_generator) = states
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert lines == others and torch.equal(generator, other_generator)


@pytest.mark.parametrize("schedule", [GP, MGP], ids=["gp", "mgp"])
def test_plan_prints_and_writes_nothing(folder, tmp_path, capsys, schedule):
    before = tree(folder)
    script = "prune_greedy.py" if schedule is GP else "prune_greedy_ad.py"
    code, message = run_script(script, words_of(folder, tmp_path / "a" / "b", f"{FAST} --plan"))
    assert (code, message) == (0, "")
    assert not (tmp_path / "a").exists() and tree(folder) == before
    text = capsys.readouterr().out
    for part in ("backbone", "mAP", "total", "cached: features", "of RAM", "at most"):
        assert part in text


def test_fewer_images_than_the_sample_are_planned(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", f"{FAST} --keep 0.5 --search_images 1 --plan")
    assert "on 1 images" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_plan_refuses_what_the_search_would(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out, f"{FAST} --keep 0.5")
    before = tree(tmp_path)
    for more, expected in (
        ("--keep 0.001", "--keep"),
        ("--keep 0.5 --decay_points 1", "--decay_points"),
        ("--keep 0.6 --resume_search", "expected"),
        ("--keep 0.5 --resume_search", "has ended"),
        ("--coco_path nowhere", "nowhere"),
    ):
        code, message = run_script("prune_greedy_ad.py", words_of(folder, out, f"{FAST} {more} --plan"))
        assert code == 2 and expected in message, more
    assert tree(tmp_path) == before
    with hold_folder(out), pytest.raises(UserError, match="writing there"):
        run(folder, out, f"{FAST} --keep 0.5 --plan")


def test_two_processes_plan_alike(folder, tmp_path):
    """Also where the second process has no image to calibrate on, and in a training."""
    searching = words_of(folder, tmp_path / "out", "--calibration_images 2 --keep 0.5 --plan")
    training = f"{SMALL} --coco_path {folder} --resume {folder}/dense.pth --output_dir {tmp_path / 'tuned'} --epochs 2"
    run_jobs(tmp_path / "jobs.json", [job(2, "mgp", searching), job(2, "main", f"{training} --plan")])
    assert not (tmp_path / "out").exists() and not (tmp_path / "tuned").exists()


def test_the_report_of_several_budgets_is_planned_and_written_after_the_other_processes_left(
    folder, tmp_path, monkeypatch
):
    order = []
    monkeypatch.setattr(distributed, "stop", lambda: order.append("left"))

    def write_report(*given):
        order.append("report")
        assert lines_of(tmp_path / "two")[-1]["event"] == "end"

    monkeypatch.setattr(search_results, "write_report", write_report)
    run(folder, tmp_path / "two", f"{FAST} --keep 0.9 0.8")
    assert order[:2] == ["left", "report"] and order.count("report") == 1
    log = (tmp_path / "two" / "run.log").read_text()
    assert f"compares 3 detectors on the first {IMAGES} images of val2017 for the report: about " in log
    run(folder, tmp_path / "one", f"{FAST} --keep 0.9")
    assert "for the report" not in (tmp_path / "one" / "run.log").read_text()


def test_an_interrupted_report_says_that_the_search_has_ended(folder, tmp_path, monkeypatch):
    def write_report(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_results, "write_report", write_report)
    with pytest.raises(KeyboardInterrupt, match=r"the search has ended; python -m reports .*out writes its report"):
        run(folder, tmp_path / "out", f"{FAST} --keep 0.9", is_long=False)
    assert lines_of(tmp_path / "out")[-1]["event"] == "end" and (tmp_path / "out" / "pruned.pth").exists()


def test_a_search_without_a_result_writes_its_report_before_the_other_processes_fail(folder, tmp_path, monkeypatch):
    """When one process fails, torchrun ends the others."""
    order = []
    monkeypatch.setattr(distributed, "stop", lambda: order.append("left"))
    monkeypatch.setattr(search_results, "write_report", lambda *given: order.append("report"))
    monkeypatch.setattr(Schedule, "fast_threshold_ap", lambda *given: 1.1)
    with pytest.raises(RunFailedError, match="no trial passed"):
        run(folder, tmp_path / "out", f"{FAST} --map_tol 0.1 --search_split val2017")
    assert order == ["report", "left"]
