"""Searches of every kind on a tiny detector: what they write, and that an interrupted one ends as it would have."""

import argparse
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from datasets.coco import build_dataset
from main import get_args_parser, main
from pruning.cost import cost_of
from pruning.schedule import GP, MGP, Schedule
from reports import plots
from runs.search_command import get_pruning_parser, search
from runs.search_facts import NOT_DECIDING
from runs.search_results import SearchResults
from tests.pruning.test_end_to_end import ROOT, SMALL, ap_of, folder, write_folder  # noqa: F401
from tests.pruning.tiny import VARIANTS, tiny_args, tiny_detector
from tests.soak import rest_in_soak
from tests.tiny_run import RUN_SCRIPT, built, run_script, settled
from tests.trust.forked import job, run_jobs
from util.cli import parse
from util.errors import UserError, run_cli
from weights.checkpoint_file import plain_arguments, read_checkpoint

UNITS = "--attention_unit 2 --ffn_unit 8"
KINDS = {
    "fast": "--map_tol 0.1 --search_split val2017",
    "keep": "--keep 0.7",
    "keep macs": "--keep 0.7 --cost macs --reconstruct output --ranking first_order --selection once",
    "visit": "--search visit --map_tol 0.02 --skip_eval_converge 0.01",
    "visit output": "--search visit --map_tol 0.3 --reconstruct output --ranking fisher --selection once",
    "paper": "--search paper --map_tol 0.1 --num_candidates_attention 8 --num_candidates_ffn 9",
    "random": "--keep 0.7 --reconstruct none --ranking random --index_sets shared",
    "magnitude": "--keep 0.7 --reconstruct none --ranking magnitude --index_sets own --selection forward",
    "exact": "--search visit --map_tol 0.3 --reconstruct output --ranking exact --selection once",
    "paper fisher": "--search paper --map_tol 0.3 --ranking fisher --attention_unit 4 --ffn_unit 16",
}
GLOBAL = ("fast", "keep", "keep macs", "random", "magnitude")
SEARCHES = [
    *(("dense", kind) for kind in KINDS),
    *(("deformable", kind) for kind in ("fast", "keep macs", "visit", "visit output", "magnitude", "random")),
]
# Each differs from another search only by a ranking that tests/pruning/test_scores.py checks on both variants.
RARE = [("dense", "random"), ("dense", "paper fisher"), ("deformable", "visit output"), ("deformable", "random")]


def words_of(root, out, options):
    """The command line of a search with these options."""
    return f"{SMALL} --coco_path {root} --resume {root}/dense.pth --output_dir {out} {options}"


def search_with(words, schedule=MGP):
    """A search in this process."""
    return search(schedule, *parse(get_pruning_parser(schedule, "a test"), words.split()))


def words(root, out, kind, more=""):
    return words_of(root, out, f"{UNITS} {KINDS[kind]} {more}")


def run(root, out, kind, more="", schedule=MGP):
    return search_with(words(root, out, kind, more), schedule)


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):  # noqa: F811
    """A folder with a checkpoint and images for each variant."""
    return {"dense": folder, "deformable": write_folder(tmp_path_factory.mktemp("deformable"), VARIANTS["deformable"])}


@pytest.fixture(scope="module")
def searched(folders, tmp_path_factory):
    """What the search of a kind finds, run once; its files are beside `path` and not to be changed."""
    return functools.cache(lambda kind, variant="dense": run(folders[variant], tmp_path_factory.mktemp("whole"), kind))


def lines_of(result):
    """The lines of a search's journal, with their ends."""
    return result.path.with_name("search.jsonl").read_bytes().splitlines(keepends=True)


def assert_same_file(one, other):
    first, second = read_checkpoint(one / "pruned.pth"), read_checkpoint(other / "pruned.pth")
    assert first.widths == second.widths
    for name, sets in first.kept.items():
        assert all(torch.equal(indices, second.kept[name][part]) for part, indices in sets.items())
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(value, second.state_dict[key]) for key, value in first.state_dict.items())


@pytest.mark.parametrize(("variant", "kind"), rest_in_soak(SEARCHES, set(SEARCHES) - set(RARE)))
def test_the_map_of_a_search_is_that_of_the_cut_detector(folders, searched, variant, kind):
    result = searched(kind, variant)
    args = tiny_args(f"{SMALL} --coco_path {folders[variant]} --resume {result.path} --eval")
    slim, _, postprocessors = built(*settled(args)[:2])
    assert slim.widths == result.widths
    split = read_checkpoint(result.path).arguments["search_split"]
    assert split == ("train2017" if kind in GLOBAL and kind != "fast" else "val2017")  # the default, but where typed
    assert ap_of(slim, postprocessors["bbox"], args, split) == pytest.approx(result.ap, abs=1e-3)
    lines = [json.loads(line) for line in lines_of(result)]
    step = "trial" if kind in GLOBAL else "decision"
    assert [line["event"] for line in lines] == ["start", *[step] * (len(lines) - 2), "end"]
    assert lines[-1]["ap"] == result.ap and lines[-1]["widths"] == result.widths.to_list()


@pytest.mark.parametrize(("variant", "kind"), [("dense", "keep"), ("dense", "keep macs"), ("deformable", "keep macs")])
def test_a_fraction_of_the_cost_is_kept_but_no_more(folders, searched, variant, kind):
    result = searched(kind, variant)
    args = tiny_args(f"{SMALL} --coco_path {folders[variant]} --resume {result.path} --eval")
    slim = built(*settled(args)[:2])[0]
    height, width = build_dataset("val2017", args)[0][0].shape[-2:]
    before, after = (cost_of(model, (height, width)) for model in (tiny_detector(VARIANTS[variant])[0], slim))
    name = "gmacs" if kind == "keep macs" else "transformer_params"
    trials = [json.loads(line) for line in lines_of(result)[1:-1]]
    best = max(trials, key=lambda trial: trial["full_ap"])
    assert getattr(after, name) / getattr(before, name) == pytest.approx(best["kept_fraction"], abs=1e-9)
    assert 0.6 < best["kept_fraction"] <= 0.7


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_search_found_learns_from_the_detector_it_was_cut_from(folders, searched, tmp_path, variant):
    result, teacher = searched("fast", variant), folders[variant] / "dense.pth"
    text = f"--coco_path {folders[variant]} --output_dir {tmp_path} --resume {result.path} --distill {teacher} "
    text += "--distill_memory_coef 3 --epochs 1 --batch_size 2 --num_workers 0 --device cpu"
    main(*parse(argparse.ArgumentParser(parents=[get_args_parser()]), text.split()))
    line = json.loads((tmp_path / "log.txt").read_text())
    for name in ("memory", "logits", "logits_0", "bbox", "giou_0"):
        assert line[f"train_loss_distill_{name}"] > 0
    assert read_checkpoint(tmp_path / "checkpoint.pth").widths == result.widths


def test_a_global_search_draws_what_it_tried(folder, tmp_path):  # noqa: F811
    text = words(folder, tmp_path, "keep", "--attention_unit 4 --ffn_unit 16 --keep 0.8")
    with mock.patch("runs.search_results.plots", plots):
        search(MGP, *parse(get_pruning_parser(MGP, "a test"), text.split()))
    for name in ("widths.png", "ap_params.png"):
        assert Image.open(tmp_path / name).size > (500, 400)


RESUMED = [
    *(("dense", kind) for kind in ("fast", "keep", "visit", "paper")),
    ("deformable", "fast"),
    ("deformable", "visit"),
]


@pytest.mark.parametrize(
    ("variant", "kind"), rest_in_soak(RESUMED, [("dense", "fast"), ("dense", "paper"), ("deformable", "visit")])
)
def test_a_resumed_search_ends_as_an_uninterrupted_one(folders, searched, tmp_path, variant, kind):
    lines = lines_of(searched(kind, variant))
    for count in {1, len(lines) // 2, len(lines) - 1}:
        out = tmp_path / str(count)
        out.mkdir()
        # The last line is one that a crash cut short.
        (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        run(folders[variant], out, kind, "--resume_search")
        assert_same_file(searched(kind, variant).path.parent, out)
        again = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
        assert [line["event"] for line in again] == [json.loads(line)["event"] for line in lines]


def start_search(folder, out, kind, *launcher, more="--resume_search"):  # noqa: F811
    line = [sys.executable, *launcher, RUN_SCRIPT, "prune_greedy_ad.py", *words(folder, out, kind, more).split()]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, journal, count):
    """Wait until a journal has that many lines, or the search has ended."""
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= count):
        time.sleep(0.01)


@pytest.mark.soak  # in `make test`, tests/trust/test_crash.py kills searches that are started more quickly
def test_a_search_that_was_killed_twice_resumes(folder, searched, tmp_path):  # noqa: F811
    journal, last = tmp_path / "search.jsonl", len(lines_of(searched("visit")))
    draw = random.Random(5)
    for lines in sorted(draw.sample(range(1, last - 1), 2)):
        process = start_search(folder, tmp_path, "visit")
        wait_for_lines(process, journal, lines)
        time.sleep(draw.random() / 10)
        process.kill()
        process.communicate()
        assert journal.read_bytes().count(b"\n") >= lines
    if b'"end"' not in journal.read_bytes():
        run(folder, tmp_path, "visit", "--resume_search")
    assert_same_file(searched("visit").path.parent, tmp_path)


def test_ctrl_c_stops_after_the_current_step_and_prints_how_to_resume(folder, searched, tmp_path):  # noqa: F811
    journal = tmp_path / "search.jsonl"
    process = start_search(folder, tmp_path, "visit")
    wait_for_lines(process, journal, 3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert f"stopped; continue with the same command and --resume_search, from {journal}" in said
    assert "Traceback" not in said
    assert journal.read_bytes().endswith(b"\n") and b'"end"' not in journal.read_bytes()
    run(folder, tmp_path, "visit", "--resume_search")
    assert_same_file(searched("visit").path.parent, tmp_path)


def test_a_full_disk_is_a_one_line_error_and_the_journal_resumes(folder, searched, tmp_path, monkeypatch):  # noqa: F811
    """A limit on the size of files stands for the full disk."""
    journal = tmp_path / "search.jsonl"
    lines, arguments = lines_of(searched("fast")), searched("fast").path.with_name("args.json").stat().st_size
    fitting = next(n for n in range(1, len(lines)) if len(b"".join(lines[:n])) > arguments + 500)
    assert b'"trial"' in lines[fitting]  # the journal is what first outgrows the limit
    most = len(b"".join(lines[:fitting])) + 10
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        code, said = run_script("prune_greedy_ad.py", words(folder, tmp_path, "fast", "--resume_search"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert f"error: {journal}: File too large" in said
    assert "Traceback" not in said
    run(folder, tmp_path, "fast", "--resume_search")
    assert_same_file(searched("fast").path.parent, tmp_path)


def test_one_process_dying_ends_the_others_and_another_number_resumes(folder, searched, tmp_path):  # noqa: F811
    journal = tmp_path / "search.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start_search(folder, tmp_path, "visit", *launcher)
    wait_for_lines(process, journal, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    run(folder, tmp_path, "visit", "--resume_search")
    assert read_checkpoint(tmp_path / "pruned.pth").widths == read_checkpoint(searched("visit").path).widths


def test_a_journal_of_another_search_is_refused(folder, searched, tmp_path):  # noqa: F811
    journal = tmp_path / "search.jsonl"
    lines = lines_of(searched("fast"))
    journal.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"search\.jsonl: found a search that has ended"):
        run(folder, tmp_path, "fast", "--resume_search")

    journal.write_bytes(lines[0] + b'{"event": "trial", "keep": 0.5}\n')
    with pytest.raises(UserError, match=r"search\.jsonl: found a damaged trial"):
        run(folder, tmp_path, "fast", "--resume_search")

    journal.write_bytes(b"".join(lines[:2]))
    before = journal.read_bytes()
    other = torch.load(folder / "dense.pth")
    other["model"]["class_embed.bias"] += 1e-4
    torch.save(other, tmp_path / "other.pth")
    for more, said in (
        ("--map_tol 0.2", r"args\.map_tol 0\.1, expected 0\.2"),
        ("--ranking random", r"args\.ranking None, expected 'random'"),
        ("--search_split train2017", r"args\.search_split"),
        ("--batch_size 3", r"args\.batch_size 2, expected 3"),
        (f"--resume {tmp_path}/other.pth", "weights"),
    ):
        with pytest.raises(UserError, match=rf"search\.jsonl: found a search with {said}"):
            run(folder, tmp_path, "fast", f"{more} --resume_search")
    assert journal.read_bytes() == before


def test_where_things_lie_and_how_fast_they_go_may_change(folder, searched, tmp_path):  # noqa: F811
    out = tmp_path / "moved"
    out.mkdir()
    (out / "search.jsonl").write_bytes(b"".join(lines_of(searched("exact"))[:3]))
    shutil.copytree(folder, tmp_path / "data")
    shutil.copytree(out, tmp_path / "fewer")
    run(tmp_path / "data", out, "exact", "--cache_device cpu --no-use_dn --resume_search")
    assert_same_file(searched("exact").path.parent, out)
    # Fewer images at once are rounded differently, which may decide between equally good channels.
    found = run(tmp_path / "data", tmp_path / "fewer", "exact", "--images_at_once 2 --resume_search")
    assert found.widths == searched("exact").widths


def test_a_journal_of_an_older_version_is_continued(folder, searched, tmp_path):  # noqa: F811
    """Older versions wrote the options of main.py, too, with their defaults."""
    start, *others = lines_of(searched("exact"))[:3]
    start = json.loads(start)
    older = plain_arguments(vars(get_args_parser().parse_args(["--no-pretrained_backbone"])))
    start["args"] = {name: value for name, value in older.items() if name not in NOT_DECIDING} | start["args"]
    (tmp_path / "search.jsonl").write_bytes(json.dumps(start).encode() + b"\n" + b"".join(others))
    run(folder, tmp_path, "exact", "--resume_search")
    assert_same_file(searched("exact").path.parent, tmp_path)


def test_two_processes_find_the_widths_of_one(folder, tmp_path):  # noqa: F811
    """Also where the second process has no image to calibrate on."""
    more = {"shared": "--calibration_images 512", "first_alone": "--calibration_images 2"}
    run_jobs(
        tmp_path / "jobs.json",
        [job(2, "mgp", words(folder, tmp_path / "two" / name, "keep", text)) for name, text in more.items()],
    )
    for name, text in more.items():
        alone = run(folder, tmp_path / "one" / name, "keep", text)
        assert read_checkpoint(tmp_path / "two" / name / "pruned.pth").widths == alone.widths, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fast_search_meets_the_schedules_last_target_with_few_measurements(searched, variant):
    result = searched("fast", variant)
    assert result.ap >= 0.9 * result.base_ap
    assert 1 + len(lines_of(result)[1:-1]) <= 10


@pytest.mark.parametrize("schedule", [GP, MGP], ids=["gp", "mgp"])
def test_a_fast_search_holds_the_map_of_before_less_the_tolerance(folder, tmp_path, schedule):  # noqa: F811
    result = run(folder, tmp_path, "fast", "--skip_eval_converge 0.2", schedule)
    log = (tmp_path / "run.log").read_text()
    assert f"mAP to keep: {0.9 * result.base_ap:.4f}" in log
    assert "--skip_eval_converge: not used by --search fast" in log
    assert result.ap >= 0.9 * result.base_ap


@pytest.mark.parametrize("kind", ["fast", "visit", "paper"])
def test_a_search_in_which_nothing_passes_leaves_no_output_and_ends_with_code_1(folder, tmp_path, kind):  # noqa: F811
    (tmp_path / "pruned.pth").write_text("older")
    never = lambda *arguments: 1.1  # noqa: E731
    coarse = "--attention_unit 8 --ffn_unit 16"
    with (
        mock.patch.multiple(Schedule, fast_threshold_ap=never, full_threshold_ap=never),
        mock.patch.object(SearchResults, "save", side_effect=AssertionError("nothing was removed")),
        pytest.raises(SystemExit) as end,
    ):
        run_cli(lambda: run(folder, tmp_path, kind, coarse if kind == "paper" else ""))
    # What sys.exit prints for a message is that, with exit code 1.
    assert re.fullmatch(rf"error: no trial passed: .* {tmp_path}/search\.jsonl lists the trials.*", end.value.code)
    assert (tmp_path / "pruned.1.pth").read_text() == "older"
    assert not (tmp_path / "pruned.pth").exists() and not (tmp_path / "widths.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert len(lines) > 2 and (lines[-1]["event"], lines[-1]["passed"]) == ("end", False)
    assert lines[-1]["ap"] == lines[0]["base_ap"] and lines[-1]["widths"] == lines[0]["full_widths"]
    assert (tmp_path / "run.log").stat().st_size > 0


@pytest.mark.parametrize("kind", ["visit", "paper"])
def test_targets_that_fall_to_nothing_are_refused_before_anything_is_written(folder, tmp_path, kind):  # noqa: F811
    with pytest.raises(UserError, match=r"--decay_points 10: found a target of mAP -0\.\d+ for the last of 8 modules"):
        run(folder, tmp_path / "out", kind, "--decay_points 10", GP)
    assert not (tmp_path / "out").exists()
