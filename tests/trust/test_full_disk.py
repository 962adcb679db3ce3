"""A disk that is full: one sentence, exit code 2, the last good files whole, no temporary left, and a way to go on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.pruning.test_end_to_end import write_folder
from tests.trust.jobs import BACKBONE, Job, assert_whole, draw, prune, train

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def data(coco, tmp_path_factory):
    """What each job reads."""
    return {train: coco, prune: write_folder(tmp_path_factory.mktemp("data"), BACKBONE), draw: coco}


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes, or gives that size to the one it mounted."""
    disk, mounted = tmp_path / "disk", []
    disk.mkdir()

    def resize(size: int) -> Path:
        again = "remount," if mounted else ""
        line = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(line, capture_output=True).returncode:
            pytest.skip("mounting a file system of a certain size is not permitted here")
        mounted.append(disk)
        return disk

    yield resize
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def assert_refused(job, said_of):
    """It ended with exit code 2 and one sentence on an error, beside warnings about the log."""
    assert job.finish() == 2, job.said.read_text()
    said = job.said.read_text()
    assert said.count("error: ") == 1 and "Traceback" not in said and said_of in said
    assert_whole(job.out)
    assert not [path for path in (*job.out.parent.rglob(".*"), *job.out.rglob("*.tmp")) if path != job.said]


@pytest.mark.parametrize("what", [train, draw])
def test_a_limit_on_the_size_of_files_is_a_one_line_error(data, tmp_path, what):
    """Journals under such a limit: tests/pruning/test_resume.py."""
    largest = {train: MEGABYTE // 8, draw: 1000}[what]
    assert_refused(Job(what, data[what], tmp_path / "out", largest_file=largest), "File too large")
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.jpg"))


def test_training_on_a_full_disk_keeps_the_last_epoch_and_resumes_when_there_is_space(data, small_disk, tmp_path):
    whole = Job(train, data[train], tmp_path / "whole")
    assert whole.finish() == 0, whole.said.read_text()
    sizes = {path.name: path.stat().st_size for path in whole.out.iterdir()}
    room = sum(sizes.values()) + sizes["checkpoint.pth"] // 2
    disk = small_disk(room)
    job = Job(train, data[train], disk / "out", said=tmp_path / "said.txt")
    assert_refused(job, "checkpoint")
    assert "No space left on device" in job.said.read_text()
    assert torch.load(disk / "out" / "checkpoint.pth", weights_only=True)["epoch"] == 1
    small_disk(3 * room)
    job = Job(train, data[train], disk / "out", said=tmp_path / "said.txt")
    assert job.finish() == 0, job.said.read_text()
    assert (disk / "out" / "log.txt").read_bytes().count(b"\n") == 2
    one, other = (torch.load(out / "checkpoint.pth", weights_only=True)["model"] for out in (disk / "out", whole.out))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_search_on_a_full_disk_keeps_its_journal_and_resumes_when_there_is_space(data, small_disk, tmp_path):
    whole = Job(prune, data[prune], tmp_path / "whole")
    assert whole.finish() == 0, whole.said.read_text()
    disk = small_disk(64 * os.sysconf("SC_PAGESIZE"))  # for the journal, not for pruned.pth
    assert_refused(Job(prune, data[prune], disk / "out", said=tmp_path / "said.txt"), "No space left on device")
    assert (disk / "out" / "search.jsonl").read_bytes().endswith(b"\n") and not list(disk.rglob("*.pth"))
    small_disk(200 * MEGABYTE)
    job = Job(prune, data[prune], disk / "out", said=tmp_path / "said.txt")
    assert job.finish() == 0, job.said.read_text()
    one, other = (torch.load(out / "pruned.pth", weights_only=True)["kept"] for out in (disk / "out", whole.out))
    assert {name: {part: i.tolist() for part, i in sets.items()} for name, sets in one.items()} == {
        name: {part: i.tolist() for part, i in sets.items()} for name, sets in other.items()
    }


def test_a_demo_set_on_a_full_disk_is_not_there_at_all(data, small_disk, tmp_path):
    disk = small_disk(6 * os.sysconf("SC_PAGESIZE"))
    assert_refused(Job(draw, data[draw], disk / "out", said=tmp_path / "said.txt"), f"{disk / 'out'}")
    assert list(disk.iterdir()) == []
    small_disk(MEGABYTE)
    job = Job(draw, data[draw], disk / "out", said=tmp_path / "said.txt")
    assert job.finish() == 0 and len(list((disk / "out").rglob("*.jpg"))) == 6
