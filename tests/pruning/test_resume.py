"""Searches of every kind on a tiny detector: what they write, and that an interrupted one ends as it would have."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from pruning.arguments import get_pruning_parser
from pruning.cli import search
from pruning.schedule import GP, MGP
from tests.pruning.test_end_to_end import ROOT, SMALL, ap_of, command, folder  # noqa: F401
from tests.pruning.tiny import tiny_args
from util.checkpoint import read_checkpoint
from util.errors import UserError
from util.options import parse

UNITS = "--attention_unit 2 --ffn_unit 8"
KINDS = {
    "fast": "--map_tol 0.3",
    "keep": "--keep 0.7",
    "keep macs": "--keep 0.7 --cost macs --reconstruct output --ranking first_order",
    "visit": "--search visit --map_tol 0.3 --skip_eval_converge 0.1",
    "visit output": "--search visit --map_tol 0.3 --reconstruct output --ranking fisher --selection once",
    "paper": "--search paper --map_tol 0.3 --num_candidates_attention 8 --num_candidates_ffn 9",
    "random": "--keep 0.7 --reconstruct none --ranking random --index_sets shared",
    "magnitude": "--keep 0.7 --reconstruct none --ranking magnitude --index_sets own --selection forward",
    "exact": "--search visit --map_tol 0.3 --reconstruct output --ranking exact --selection once",
    "paper fisher": "--search paper --map_tol 0.3 --ranking fisher --attention_unit 4 --ffn_unit 16",
}


def words(root, out, kind, more=""):
    files = f"--coco_path {root} --resume {root}/dense.pth --output_dir {out}"
    return f"{SMALL} {UNITS} {files} {KINDS[kind]} {more}"


def run(root, out, kind, more=""):
    return search(MGP, *parse(get_pruning_parser(MGP, "a test"), words(root, out, kind, more).split()))


def assert_same_file(one, other):
    first, second = read_checkpoint(one / "pruned.pth"), read_checkpoint(other / "pruned.pth")
    assert first.widths == second.widths
    for name, sets in first.kept.items():
        assert all(torch.equal(indices, second.kept[name][part]) for part, indices in sets.items())
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(value, second.state_dict[key]) for key, value in first.state_dict.items())


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_mAP_that_a_search_tells_is_that_of_the_cut_detector(folder, tmp_path, kind):  # noqa: F811
    from main import build_detector, settle_arguments

    result = run(folder, tmp_path, kind)
    args = tiny_args(f"{SMALL} --coco_path {folder} --resume {result.path} --eval")
    slim, _, postprocessors = build_detector(args, settle_arguments(args)[0])
    assert slim.widths == result.widths
    assert ap_of(slim, postprocessors["bbox"], args) == pytest.approx(result.ap, abs=1e-3)
    assert {"search.jsonl", "widths.png", "ap_params.png", "run.log"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kind", ["fast", "keep", "visit", "paper"])
def test_a_search_that_goes_on_ends_as_it_would_have(folder, tmp_path, kind):  # noqa: F811
    run(folder, tmp_path / "whole", kind)
    lines = (tmp_path / "whole" / "search.jsonl").read_bytes().splitlines(keepends=True)
    for number, count in enumerate({1, 2, len(lines) // 2, len(lines) - 1}):
        out = tmp_path / str(number)
        out.mkdir()
        # The last line is one that a crash cut short.
        (out / "search.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        run(folder, out, kind, "--resume_search")
        assert_same_file(tmp_path / "whole", out)
        again = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
        assert [line["event"] for line in again] == [json.loads(line)["event"] for line in lines]


@pytest.mark.parametrize("kind", ["visit"])
def test_a_search_that_was_killed_goes_on(folder, tmp_path, kind):  # noqa: F811
    run(folder, tmp_path / "whole", kind)
    out = tmp_path / "killed"
    line = [sys.executable, "prune_greedy_ad.py", *words(folder, out, kind, "--resume_search").split()]
    for wanted in (2, 9):
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = out / "search.jsonl"
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > wanted):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if journal.read_bytes().count(b'"end"') == 0:
        run(folder, out, kind, "--resume_search")
    assert_same_file(tmp_path / "whole", out)


def test_a_journal_of_another_search_is_refused(folder, tmp_path):  # noqa: F811
    run(folder, tmp_path, "fast")
    journal = tmp_path / "search.jsonl"
    with pytest.raises(UserError, match=r"search\.jsonl: found a search that has ended"):
        run(folder, tmp_path, "fast", "--resume_search")

    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    before = journal.read_bytes()
    other = torch.load(folder / "dense.pth")
    other["model"]["class_embed.bias"] += 1e-4
    torch.save(other, tmp_path / "other.pth")
    for more, said in (
        ("--map_tol 0.2", r"args\.map_tol 0\.3, expected 0\.2"),
        ("--ranking random", r"args\.ranking None, expected random"),
        ("--search_split train2017", r"args\.search_split"),
        ("--batch_size 3", r"args\.batch_size 2, expected 3"),
        (f"--resume {tmp_path}/other.pth", "weights"),
    ):
        with pytest.raises(UserError, match=rf"search\.jsonl: found a search with {said}"):
            run(folder, tmp_path, "fast", f"{more} --resume_search")
    assert journal.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "line"), [("fast", {"event": "trial", "keep": 0.5}), ("visit", {"event": "decision"})]
)
def test_a_damaged_line_of_a_journal_is_a_users_mistake(folder, tmp_path, kind, line):  # noqa: F811
    run(folder, tmp_path, kind, "--attention_unit 8 --ffn_unit 32")
    journal = tmp_path / "search.jsonl"
    start = journal.read_text().splitlines()[0]
    journal.write_text(f"{start}\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=r"search\.jsonl: found a damaged"):
        run(folder, tmp_path, kind, "--attention_unit 8 --ffn_unit 32 --resume_search")


@pytest.mark.parametrize("kind", ["fast", "visit"])
def test_where_things_lie_and_how_fast_they_go_may_change(folder, tmp_path, kind):  # noqa: F811
    run(folder, tmp_path / "whole", kind)
    out = tmp_path / "moved"
    out.mkdir()
    lines = (tmp_path / "whole" / "search.jsonl").read_text().splitlines(keepends=True)
    (out / "search.jsonl").write_text("".join(lines[:3]))
    shutil.copytree(folder, tmp_path / "data")
    run(tmp_path / "data", out, kind, "--images_at_once 2 --cache_device cpu --no-use_dn --resume_search")
    assert_same_file(tmp_path / "whole", out)


def test_two_processes_find_the_widths_of_one(folder, tmp_path):  # noqa: F811
    alone = run(folder, tmp_path / "one", "keep")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = command("prune_greedy_ad.py", *launcher, words(folder, tmp_path / "two", "keep"))
    assert done.returncode == 0, done.stderr
    together = read_checkpoint(tmp_path / "two" / "pruned.pth")
    assert together.widths == alone.widths


def test_the_fast_search_meets_the_schedules_last_target_with_few_measurements(folder, tmp_path):  # noqa: F811
    result = run(folder, tmp_path, "fast")
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert result.ap >= 0.7 * result.base_ap
    assert 1 + sum(line["event"] == "trial" for line in lines) <= 10


def test_gp_holds_a_fast_search_to_its_last_module(folder, tmp_path):  # noqa: F811
    text = words(folder, tmp_path, "fast", "--decay_points 0")
    result = search(GP, *parse(get_pruning_parser(GP, "a test"), text.split()))
    assert result.ap >= 0.7 * result.base_ap
