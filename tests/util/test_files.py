"""Files are written wholly or not at all."""

import json
import logging

import pytest

from util.errors import UserError
from util.files import append_json_line, check_output_dir, write_atomic, write_json
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


def test_an_output_folder_is_checked_but_not_made(tmp_path):
    assert check_output_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        check_output_dir(tmp_path / "file" / "out")


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
