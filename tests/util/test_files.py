"""Files are written completely or not at all."""

import hashlib
import json
import logging
import resource
from pathlib import Path

import pytest
import torch

from util.distributed import choose_device
from util.errors import UserError
from util.files import (
    append_json_line,
    check_output_dir,
    file_digest,
    move_aside,
    save_torch,
    write_atomic,
    write_json,
    write_text,
)
from util.logging import get_logger, log_to_file, stop_logging_to_file, table


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})

    def fail(stream):
        stream.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_lines_are_appended(tmp_path):
    for number in range(2):
        append_json_line(tmp_path / "log.txt", {"epoch": number})
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


def test_a_digest_depends_on_the_bytes_of_files_of_any_size(tmp_path):
    for content in (b"", b"abc", bytes(range(256)) * 5000):
        (tmp_path / "a").write_bytes(content)
        assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_an_output_folder_is_checked_but_not_created(tmp_path):
    assert check_output_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        check_output_dir(tmp_path / "file" / "out")
    for name in ("/proc/nope", tmp_path / "a" / ("b" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            check_output_dir(name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_process_may_remove_the_probe(tmp_path, monkeypatch):
    listed = [tmp_path / ".probe-1-abc", tmp_path / "other"]
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed) if path == tmp_path else iterdir(path))
    assert check_output_dir(tmp_path / "run") == tmp_path / "run"


def test_an_older_file_is_moved_to_the_first_free_name(tmp_path):
    assert move_aside(tmp_path / "log.txt") is None
    for number in (1, 2):
        (tmp_path / "log.txt").write_text(f"run {number}")
        assert move_aside(tmp_path / "log.txt") == tmp_path / f"log.{number}.txt"
    assert (tmp_path / "log.1.txt").read_text() == "run 1" and not (tmp_path / "log.txt").exists()


def test_the_log_goes_to_the_screen_and_to_a_file_while_it_is_open(tmp_path, capsys):
    handler = log_to_file(tmp_path / "run.log")
    get_logger().info("one line")
    stop_logging_to_file(handler)
    get_logger().info("another")
    assert capsys.readouterr().out == "one line\nanother\n"
    assert "one line" in (tmp_path / "run.log").read_text() and "another" not in (tmp_path / "run.log").read_text()
    assert handler not in logging.getLogger(get_logger().name).handlers


def test_a_table_aligns_its_columns():
    assert (
        table(["name", "AP"], [("dense", 0.5), ("x", 12)])
        == "name       AP\n-----  ------\ndense  0.5000\nx          12"
    )


def test_a_row_of_a_table_is_always_one_line():
    lines = table(["name\n", "AP"], [("a\nb", 0.5), ("\x1b[2J", "1\r\n")]).split("\n")
    assert lines == ["name         AP", "-------  ------", "a b      0.5000", r"\x1b[2J       1"]


def test_text_that_cannot_be_encoded_is_escaped(tmp_path):
    write_text(tmp_path / "a.html", "a\udcffb")
    assert (tmp_path / "a.html").read_text() == r"a\udcffb"


def test_one_gpu_is_not_shared_by_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:0: found one GPU for 2 processes"):
        choose_device("cuda:0")


def test_saving_tensors_to_a_full_disk_is_an_error_and_keeps_the_old_file(tmp_path):
    """A limit on the file size simulates a full disk."""
    path = tmp_path / "a.pth"
    save_torch(path, {"a": torch.zeros(10)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_torch(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
