"""AP against milliseconds: every search runs once with its own budgets, and the rows are those of its files."""

import json
import os
import subprocess
from unittest import mock

import pytest

from bench import latency_curve as bench
from bench.tables import latency_curve as docs_table
from prune_greedy_ad import __doc__ as doc
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.pruning.test_latency_search import by_width
from tests.tiny_run import write_self_annotated
from util.cli import parse
from util.errors import UserError

SEARCHES = (bench.REMOVING, bench.LATENCY, bench.MACS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_self_annotated(tmp_path_factory.mktemp("curve"))


@pytest.fixture
def commands(monkeypatch):
    """Run searches in this process, where a channel takes a millisecond; the words of each."""
    found = []

    def call(words, **_):
        found.append(words)
        # A block of 32 channels that could have every width would take a turn for each.
        with mock.patch("pruning.latency.time_steps", by_width):
            search(MGP, *parse(get_pruning_parser(MGP, doc), [*words[2:], "--block_unit", "32", "--ffn_unit", "32"]))
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    return found


def test_each_search_runs_once_and_its_files_become_rows(folder, tmp_path, monkeypatch, commands, capsys):
    words = ["bench", "tiny", "--coco_path", str(folder), "--checkpoint", str(folder / "dense.pth")]
    words += ["--output", str(tmp_path), "--work", str(tmp_path / "work"), "--search_images", "2", "--searches"]
    keeps = ["--keep", "0.995", "0.985", "--keep_time", "0.98", "--keep_time_removing", "0.99", "0.98"]
    monkeypatch.setattr("sys.argv", [*words, *SEARCHES, *keeps])
    bench.main()
    assert [(word in command) for command in commands for word in ("--min_units", "--latency_table", "macs")] == [
        True, False, False, False, True, False, False, False, True,
    ]  # fmt: skip
    found = json.loads((tmp_path / "latency_curve_tiny.json").read_text())
    rows = found["rows"]
    assert [(row["name"], row["file"]) for row in rows] == [
        ("dense", "dense.pth"), (bench.REMOVING, "pruned_0.99.pth"), (bench.REMOVING, "pruned_0.98.pth"),
        (bench.LATENCY, "pruned.pth"), (bench.MACS, "pruned_0.995.pth"), (bench.MACS, "pruned_0.985.pth"),
    ]  # fmt: skip
    shares = [row["detector_gmacs"] / rows[0]["detector_gmacs"] for row in rows]
    assert 0.985 < shares[4] <= 0.995
    assert shares[5] <= 0.985
    assert all(row["milliseconds"] > 0 for row in rows)
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "work").glob("*latency*/summary.json"))]
    predicted = [
        {name: found["predicted"] for name, found in summary["latency"]["detectors"].items()} for summary in summaries
    ]
    (only,) = (value for name, value in predicted[0].items() if name != "before")
    times = [predicted[1]["before"] / predicted[1][name] for name in ("0.99", "0.98")]
    assert [row["predicted_times"] for row in rows] == [None, *times, predicted[0]["before"] / only, None, None]
    assert 1 < times[0] <= times[1]
    assert (tmp_path / "latency_curve_tiny.png").stat().st_size > 1000
    assert bench.LATENCY in capsys.readouterr().out

    (tmp_path / "latency_curve_demo.json").write_text(json.dumps(found))
    lines = docs_table(tmp_path).splitlines()[2:]
    assert len(lines) == len(rows)
    assert lines[0].startswith("| demo, dense |")
    assert lines[0].endswith("| 1.00 |  |") and lines[1].endswith(f"| {times[0]:.2f} |")

    commands.clear()
    bench.main()
    assert not commands
    monkeypatch.setattr("sys.argv", [*words, bench.MACS, "--keep", "0.99"])
    bench.main()
    assert len(commands) == 1
    assert [row["file"] for row in json.loads((tmp_path / "latency_curve_tiny.json").read_text())["rows"]] == [
        "dense.pth", "pruned.pth",
    ]  # fmt: skip


def test_a_failed_search_ends_the_benchmark(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 2)
    words = ["--checkpoint", "x", "--coco_path", str(folder), "--work", str(tmp_path)]
    args = bench.get_parser().parse_args(["tiny", *words])
    with pytest.raises(UserError, match=f"{bench.MACS} ended with exit code 2"):
        bench.run_search(args, bench.MACS, [0.5])


def test_threads_reach_the_search(folder, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(subprocess, "call", lambda words, env, **_: seen.update(env) or 1)
    words = ["--checkpoint", "x", "--coco_path", str(folder), "--work", str(tmp_path), "--threads", "2"]
    with pytest.raises(UserError):
        bench.run_search(bench.get_parser().parse_args(["tiny", *words]), bench.MACS, [0.5])
    assert seen["OMP_NUM_THREADS"] == "2"
    assert seen["PATH"] == os.environ["PATH"]
