"""Searches by measured latency, from the options to the output files."""

import dataclasses
import functools
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from models.detector import Detector
from models.widths import Widths
from pruning.latency import ROUNDS
from tests.pruning.test_end_to_end import ROOT, folder  # noqa: F401
from tests.pruning.test_resume import assert_same_file, lines_of, search_with, wait_for_lines, words_of
from tests.tiny_run import RUN_SCRIPT
from util.errors import UserError

UNITS = "--attention_unit 4 --ffn_unit 16 --cost latency --search_split val2017"
NOISE = random.Random(0)


def noisy(steps, device, amp, *, repeats, warm_up=1, graphs=False):
    """Times that differ from call to call by more than from one width to the next."""
    exact = by_width(steps, device, amp, repeats=repeats)
    return {name: [time * (1 + NOISE.random()) for time in times] for name, times in exact.items()}


def by_width(steps, device, amp, *, repeats, warm_up=1, graphs=False):
    """A millisecond for each channel of a module and for other steps, without noise."""
    owners = [getattr(getattr(run, "func", None), "__self__", None) for _, run in steps]
    modules = next((owner.prunable_modules("detector") for owner in owners if isinstance(owner, Detector)), {})
    return {name: [float(modules[name].width) if name in modules else 1.0] * repeats for name, _ in steps}


def run(root, out, options, times=by_width):
    with mock.patch("pruning.latency.time_steps", times), mock.patch("pruning.latency.SECONDS", 0.0):
        return search_with(words_of(root, out, f"{UNITS} {with_scope(options)}"))


def with_scope(options):
    """Options with the scope of the detector, where they have none."""
    return options if "--scope" in options else f"--scope detector --block_unit 4 {options}"


def measuring(line):
    return json.loads(line)["event"] == "latency"


def time_of(widths):
    """The time of a detector by `by_width`; front, heads and the positions of queries take a millisecond each."""
    return 2 + positions_of(widths) + sum(width for _, width in widths.items())


def positions_of(widths):
    """The number of decoder layers with an attention, which needs positions."""
    return sum(any(layer[:2]) for layer in widths.decoder)


@pytest.fixture(scope="module")
def searched(folder, tmp_path_factory):  # noqa: F811
    """What a search finds, run once."""
    return functools.cache(lambda options, times=by_width: run(folder, tmp_path_factory.mktemp("out"), options, times))


@pytest.mark.parametrize("scope", ["transformer", "detector"])
def test_the_predicted_time_of_what_is_found_is_within_the_budget(folder, tmp_path, scope):  # noqa: F811
    result = run(folder, tmp_path, f"--scope {scope} --keep 0.7")
    lines = [json.loads(line) for line in lines_of(result)]
    before = Widths.parse(lines[0]["full_widths"])
    outside = 0 if scope == "transformer" else 2  # front and heads
    total, kept = (time_of(widths) - 2 + outside for widths in (before, result.widths))
    best = max((line for line in lines if line["event"] == "trial"), key=lambda trial: trial["full_ap"])
    assert kept / total == pytest.approx(best["kept_fraction"]) and 0.5 < kept / total <= 0.7
    assert lines[0]["args"]["cost"] == "latency" and lines[0]["latency"]["batch_size"] == 2
    turns = [*filter(measuring, lines_of(result))]
    in_round = max(len({json.loads(t)["widths"][name] for t in turns}) for name in best["widths"])
    assert len(turns) % in_round == 0 and len(turns) >= ROUNDS[0] * in_round
    table = json.loads((tmp_path / "latency.json").read_text())
    assert table["scope"] == scope and table["environment"]["torch"] and table["threads"] >= 1
    assert {name for kind in table["kinds"] for name in kind["modules"]} == {*best["widths"]}


def test_a_budget_in_milliseconds_is_that_of_the_whole_detector(folder, searched, tmp_path):  # noqa: F811
    full = Widths.parse(json.loads(lines_of(searched("--keep 0.7"))[0])["full_widths"])
    result = run(folder, tmp_path, f"--target_ms {0.7 * time_of(full)}")
    assert result.widths == searched("--keep 0.7").widths
    # Front and heads are outside this scope, but count in the time of the detector.
    whole = time_of(dataclasses.replace(full, backbone=None))
    result = run(folder, tmp_path / "transformer", f"--scope transformer --target_ms {0.7 * whole}")
    assert 0.6 * whole < time_of(result.widths) <= 0.7 * whole


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--keep 0.01", r"--keep 0\.01: found less than the smallest widths cost, expected at least 0\.\d+$"),
        ("--target_ms 3", r"--target_ms 3: found less than the smallest widths take, expected at least \d+(\.\d+)?$"),
    ],
)
def test_a_target_that_cannot_be_met_names_the_least_that_can(folder, tmp_path, option, message):  # noqa: F811
    with pytest.raises(UserError, match=message) as refused:
        run(folder, tmp_path, option)
    assert not (tmp_path / "pruned.pth").exists()
    name, least = option.split()[0], str(refused.value).rsplit(" ", 1)[1]
    table = tmp_path / "latency.json"  # what was measured is not lost
    assert run(folder, tmp_path / "again", f"{name} {least} --latency_table {table}")


def test_a_search_killed_at_any_step_ends_as_it_would_have(folder, searched, tmp_path):  # noqa: F811
    result = searched("--keep 0.75", noisy)
    lines = lines_of(result)
    turns = len([*filter(measuring, lines)])
    assert turns > 3 and [measuring(line) for line in lines] == [
        False,
        *[True] * turns,
        *[False] * (len(lines) - turns - 1),
    ]
    for count in (1, 2, turns // 2, turns, turns + 1, turns + 2, len(lines) - 1):
        out = tmp_path / str(count)
        out.mkdir()
        (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        resumed = run(folder, out, "--keep 0.75 --resume_search", noisy)
        again = lines_of(resumed)
        assert again[:count] == lines[:count] and len([*filter(measuring, again)]) == turns
        if count > turns:  # the same noise, so the same widths
            assert_same_file(result.path.parent, out)
            assert (out / "latency.json").read_text() == result.path.with_name("latency.json").read_text()


def test_a_process_killed_while_it_measures_leaves_turns_that_are_used(folder, tmp_path):  # noqa: F811
    words = words_of(folder, tmp_path, f"{UNITS} --scope transformer --keep 0.75")
    line = [sys.executable, RUN_SCRIPT, "prune_greedy_ad.py", *words.split()]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as in this process, which resumes
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ | threads, stdout=subprocess.DEVNULL)
    journal = tmp_path / "search.jsonl"
    wait_for_lines(process, journal, 3)
    process.kill()
    process.communicate()
    before = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert len(before) >= 3 and [*map(measuring, before)] == [False, *[True] * (len(before) - 1)]
    resumed = run(folder, tmp_path, "--scope transformer --keep 0.75 --resume_search")
    after = lines_of(resumed)
    assert after[: len(before)] == before and json.loads(after[-1])["event"] == "end"
    turns = [json.loads(line)["widths"] for line in after if measuring(line)]
    in_round = max(len({turn[name] for turn in turns}) for name in turns[0])
    assert len(turns) > len(before) and len(turns) % in_round == 0


def test_a_table_is_used_again_without_measuring(folder, searched, tmp_path):  # noqa: F811
    first = searched("--keep 0.75", noisy)
    table = first.path.with_name("latency.json")

    def end_alone(steps, *args, **options):
        assert [name for name, _ in steps] == ["detector"]
        return noisy(steps, *args, **options)

    again = run(folder, tmp_path, f"--keep 0.75 --latency_table {table}", end_alone)
    assert_same_file(first.path.parent, tmp_path)
    assert not any(map(measuring, lines_of(again)))
    assert json.loads((tmp_path / "latency.json").read_text())["kinds"] == json.loads(table.read_text())["kinds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch_size 1", "found batch_size 2, expected 1"),
        ("--image_size 96", r"found image_size_hw \[64, 80\], expected \[96, 120\]"),
        ("--amp", "found amp 'off', expected 'bf16'"),
        ("--scope transformer", "found scope 'detector', expected 'transformer'"),
        ("--ffn_unit 8", "found no width 8 of encoder.0.ffn"),
    ],
)
def test_a_table_of_another_run_is_refused_before_the_search(folder, searched, tmp_path, options, message):  # noqa: F811
    table = searched("--keep 0.75", noisy).path.with_name("latency.json")
    with pytest.raises(UserError, match=f"--latency_table .*latency.json: {message}"):
        run(folder, tmp_path, f"--keep 0.75 --latency_table {table} {options}")
    assert not [*Path(tmp_path).iterdir()]


def test_a_journal_of_other_latencies_is_not_continued(folder, searched, tmp_path):  # noqa: F811
    first, *rest = lines_of(searched("--keep 0.75", noisy))
    start = json.loads(first)
    start["latency"]["device"] = "another processor"
    (tmp_path / "search.jsonl").write_bytes(json.dumps(start).encode() + b"\n" + b"".join(rest[:4]))
    with pytest.raises(UserError, match=r"found a search with latency\.device 'another processor', expected '"):
        run(folder, tmp_path, "--keep 0.75 --resume_search", noisy)


@pytest.mark.parametrize("damage", ["widths", "milliseconds"])
def test_a_damaged_turn_is_refused(folder, searched, tmp_path, damage):  # noqa: F811
    first, turn, *_ = lines_of(searched("--keep 0.75", noisy))
    changed = json.loads(turn)
    changed[damage]["encoder.0.ffn"] = [-1.0] if damage == "milliseconds" else "wide"
    (tmp_path / "search.jsonl").write_bytes(first + json.dumps(changed).encode() + b"\n")
    with pytest.raises(UserError, match="found a damaged latency"):
        run(folder, tmp_path, "--keep 0.75 --resume_search", noisy)


def test_the_end_compares_what_was_predicted_with_what_is_measured(folder, tmp_path, caplog):  # noqa: F811
    calls = itertools.count()

    def times(steps, *args, repeats, **options):
        if [name for name, _ in steps] != ["detector"]:
            return by_width(steps, *args, repeats=repeats, **options)
        return {"detector": [200.0 if next(calls) % 2 == 0 else 100.0] * repeats}

    result = run(folder, tmp_path, "--keep 0.7", times)
    found = json.loads(lines_of(result)[-1])["latency"]
    predicted = time_of(result.widths)
    before, after = found["detectors"].values()
    assert before["milliseconds"] == 200 and after["milliseconds"] == 100
    assert after["predicted"] == predicted and after["ratio"] == predicted / 100
    assert json.loads((tmp_path / "summary.json").read_text())["latency"] == found
    assert "2.00 x" in (tmp_path / "run.log").read_text()


def test_a_search_whose_end_cannot_be_timed_keeps_its_result(folder, tmp_path, caplog):  # noqa: F811
    def times(steps, *args, **options):
        if [name for name, _ in steps] == ["detector"]:
            raise torch.OutOfMemoryError("out of memory")
        return by_width(steps, *args, **options)

    result = run(folder, tmp_path, "--keep 0.9 0.7", times)
    end = json.loads(lines_of(result)[-1])
    assert end["event"] == "end" and end["passed"] and "latency" not in end
    assert [point["name"] for point in end["points"]] == ["before", "0.90", "0.70"]
    assert json.loads((tmp_path / "summary.json").read_text())["points"] == end["points"]
    assert "before and after could not be timed: out of memory" in (tmp_path / "run.log").read_text()


def test_a_detector_with_removed_modules_is_searched_again(folder, tmp_path):  # noqa: F811
    first = run(folder, tmp_path / "first", "--keep 0.35 --min_units 0")
    assert 0 in dict(first.widths.items()).values()
    words = words_of(folder, tmp_path / "again", f"{UNITS} {with_scope('--keep 0.9')}")
    with mock.patch("pruning.latency.time_steps", by_width):
        again = search_with(words.replace(f"{folder}/dense.pth", str(first.path)))
    rest = json.loads((tmp_path / "again" / "latency.json").read_text())["rest"]
    assert {*rest} == {"front", "heads", *(name for name, width in first.widths.items() if not width)}
    assert sum(width for _, width in again.widths.items()) < sum(width for _, width in first.widths.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target_ms 9 --cost macs", "--target_ms: found --cost macs, expected --cost latency"),
        ("--latency_table a.json --cost params", "--latency_table: found --cost params, expected --cost latency"),
        ("--target_ms 9 --keep 0.5", "--keep and --target_ms: found both, expected one of them"),
        ("--target_ms 9 --map_tol 0.1", "--map_tol: found --target_ms as well, which ignores mAP"),
        ("--search visit --target_ms 9", "--search visit does not use it, expected --search fast"),
        ("--latency_table none.json", "--latency_table none.json: cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, message):  # noqa: F811
    words = UNITS.replace("--cost latency", "") if "--target_ms" in options or "--cost" in options else UNITS
    with pytest.raises(UserError, match=message):
        search_with(words_of(folder, tmp_path, f"{words} {with_scope(options)}"))
    assert not [*Path(tmp_path).iterdir()]


def test_milliseconds_mean_latency(folder, tmp_path):  # noqa: F811
    words = f"{UNITS.replace('--cost latency', '')} --target_ms 300 --scope detector"
    with mock.patch("pruning.latency.time_steps", by_width):
        result = search_with(words_of(folder, tmp_path, words))
    assert json.loads(lines_of(result)[0])["args"]["cost"] == "latency"


def test_a_real_clock_measures_every_width(folder, tmp_path):  # noqa: F811
    result = search_with(words_of(folder, tmp_path, f"{UNITS} --scope detector --keep 1"))
    table = json.loads((tmp_path / "latency.json").read_text())
    times = [entry["milliseconds"] for kind in table["kinds"] for entry in kind["widths"].values()]
    assert all(0 < value < 1e4 for value in times)
    assert json.loads(lines_of(result)[-1])["latency"]["detectors"]["after"]["ratio"] > 0
