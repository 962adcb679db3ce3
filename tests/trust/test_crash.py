"""`kill -9` at any moment: no file is half written, nothing is lost but the step in flight, and a run goes on.

`make test` kills ten times, `make soak` (SOAK=1) more than a hundred times.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from runs.training_log import continue_log
from tests.pruning.test_end_to_end import write_folder
from tests.test_main import differing
from tests.trust.jobs import BACKBONE, SOAK, Job, Kill, assert_whole, draw, prune, train

JOBS = {"training": train, "search": prune, "demo set": draw}
KILLS = {"training": 42, "search": 42, "demo set": 24} if SOAK else {"training": 4, "search": 3, "demo set": 3}
KILLS_IN_A_ROW = 3
OF_THE_MOMENT = ("seconds", "image_passes", "whole_passes", "train_seconds", "test_seconds", "passes_since_resume",
                "phases")  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """The server of the processes must not start threads, and it finds the tests wherever pytest was started."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def data(coco, tmp_path_factory) -> dict[str, Path]:
    """What each job reads."""
    return {
        "training": coco,
        "search": write_folder(tmp_path_factory.mktemp("data"), BACKBONE),
        "demo set": coco,
    }


@pytest.fixture(scope="module")
def references(data, tmp_path_factory):
    """The folder that each job leaves if nothing disturbs it, and how often it touched files."""
    found = {}

    def reference(name):
        if name not in found:
            out = tmp_path_factory.mktemp("reference") / "out"
            job = Job(JOBS[name], data[name], out)
            assert job.finish() == 0, job.said.read_text()
            found[name] = out, job.touched.value
        return found[name]

    return reference


def content_of(path):
    """What a file says, without what is of the moment: seconds, folders, and passes that were made again."""
    if path.suffix == ".pth":
        content = torch.load(path, weights_only=True)
        content.pop("args")
        content["trace"] = [strip(step) for step in content.get("trace", [])]
        return content
    if path.suffix == ".jsonl" or path.name == "log.txt":
        return [strip(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in ("run.log", "args.json", "report.html"):
        return None
    return path.read_bytes()


def strip(line):
    """A line without what is of the moment."""
    return {key: value for key, value in line.items() if key not in OF_THE_MOMENT}


def assert_same(out, reference, ended=False):
    """Two folders hold the same files, of the same content bit by bit; one that `ended` may lack the report."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, reference)]
    names[0] -= {name for name in names[0] if Path(name).stem.endswith(".1")}  # begun again before the first checkpoint
    if ended:
        names = [{name for name in found if name != "report.html" and not name.startswith(".")} for found in names]
    assert names[0] == names[1]
    for name in names[1]:
        if (reference / name).is_file() and not name.endswith(".png"):
            one, other = content_of(out / name), content_of(reference / name)
            assert differing(one, other) == [], name


def progress_of(out):
    """How far a run has come that left these files: epochs, or journal lines."""
    if (out / "checkpoint.pth").exists():
        return torch.load(out / "checkpoint.pth", weights_only=True)["epoch"]
    if (out / "search.jsonl").exists():
        return (out / "search.jsonl").read_bytes().count(b"\n")
    return 0


def has_ended(out):
    """Whether nothing is left to go on with: it was killed as it wrote its report or released its lock."""
    if (out / "search.jsonl").exists():
        return b'"event": "end"' in (out / "search.jsonl").read_bytes()
    return progress_of(out) == 2


def moments(generator, touches, seconds):
    """Moments to be killed at, without end: at a file operation, in the middle of writing one, or at any time."""
    while True:
        yield Kill(nth=generator.randrange(touches))
        yield Kill(nth=generator.randrange(max(1, touches // 6)), after=generator.random() / 20, temporary=True)
        yield Kill(after=generator.random() * seconds + 0.05)


@pytest.mark.parametrize("name", JOBS)
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_bits(name, data, references, tmp_path):
    reference, touches = references(name)
    generator, left, round_number = random.Random(7), KILLS[name], 0
    when = moments(generator, touches, 0.3 if name == "demo set" else 2.0 if SOAK else 1.0)
    while left:
        round_number += 1
        out, before, in_a_row = tmp_path / str(round_number), 0, 0
        while in_a_row < KILLS_IN_A_ROW and left:
            job = Job(JOBS[name], data[name], out, next(when))
            code = job.finish()
            if code != -9:
                assert code == 0, job.said.read_text()
                break  # it had ended before its time came
            in_a_row, left = in_a_row + 1, left - 1
            assert_whole(out)
            assert progress_of(out) >= before
            before = progress_of(out)
            if (out / "log.txt").exists() and (out / "checkpoint.pth").exists():
                assert (out / "log.txt").read_bytes().count(b"\n") - before in (0, 1)
            if has_ended(out):
                break
        if code == -9 and has_ended(out):
            assert_same(out, reference, ended=True)
            continue
        if code == -9:
            job = Job(JOBS[name], data[name], out)
            assert job.finish() == 0, job.said.read_text()
        assert_same(out, reference)
        # A probe of the folder above may be another run's: it goes when it is old.
        hidden = {path.name for path in (*out.glob(".*"), *tmp_path.glob(".*")) if not path.name.startswith(".probe-")}
        assert hidden == set()


@pytest.mark.parametrize(
    ("lines", "epoch", "left", "is_kept_aside"),
    [
        ([0, 1, 2], 3, [0, 1, 2], False),
        ([0, 1, 2], 2, [0, 1], False),
        ([0, 1, 2], 1, [0], True),
        ([0, 1, 2, 3, 4], 0, [], True),
        ([], 0, [], False),
        ([2, 2], 2, [], True),
        ([0, 5, 1], 2, [0, 1], True),
    ],
)
def test_a_log_is_taken_up_where_its_checkpoint_stands(lines, epoch, left, is_kept_aside, tmp_path):
    path, rows = tmp_path / "log.txt", [json.dumps({"epoch": number}).encode() + b"\n" for number in lines]
    for half in (b"", b'{"epoch": 9, "tra'):
        path.write_bytes(b"".join(rows) + half)
        continue_log(path, epoch)
        assert [json.loads(line)["epoch"] for line in path.read_bytes().splitlines()] == left
        assert [other.name for other in tmp_path.glob("log.1.txt")] == ["log.1.txt"] * is_kept_aside
        (tmp_path / "log.1.txt").unlink(missing_ok=True)
    path.unlink()
    continue_log(path, epoch)
    assert not path.exists()


@pytest.mark.parametrize("line", [b"no JSON", b"[]", b"{}", b'{"epoch": null}', b"[" * 100_000, b"\xff", b"1e999"])
def test_a_log_line_without_an_epoch_stays(line, tmp_path):
    (tmp_path / "log.txt").write_bytes(line + b"\n")
    continue_log(tmp_path / "log.txt", 0)
    assert (tmp_path / "log.txt").read_bytes() == line + b"\n"
