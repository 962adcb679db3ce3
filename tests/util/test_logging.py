"""The log: colours on terminals only, none in files, and the lines within an epoch."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
from runs.batch_log import BatchLog
from util import logging
from util.colour import paint

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
ROOT = Path(engine.__file__).parent
TALK = """
from util.errors import UserError, run_cli
from util.logging import get_logger, log_to_file, table
import sys
log_to_file(sys.argv[1])
log = get_logger()
log.info("%s", table(["module", "width"], [("encoder", 8), ("decoder", 16)]))
log.warning("careful")
log.error("broken")
log.info("plain words\\n-- and a dash\\n")
def main(): raise UserError("a mistake")
run_cli(main)
"""
PLAIN = (
    "module   width\n-------  -----\nencoder      8\ndecoder     16\ncareful\nbroken\nplain words\n-- and a dash\n\n"
)


def test_terminals_show_colours_and_files_do_not(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", TALK, str(tmp_path / "run.log")], cwd=ROOT, stdout=theirs,
                          stderr=theirs, env=variables | {"TERM": "xterm"}):  # fmt: skip
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # Linux raises it when nobody writes any more
            while part := os.read(ours, 4096):
                text += part
    os.close(ours)
    shown = text.decode().replace("\r\n", "\n")
    assert ESCAPE.sub("", shown) == PLAIN + "error: a mistake\n"
    lines = shown.splitlines()
    coloured = [ESCAPE.sub("", line) for line in lines if ESCAPE.search(line)]
    assert coloured == ["module   width", "careful", "broken", "error: a mistake"]
    assert "\x1b[33m" in lines[4] and "\x1b[31m" in lines[5] and lines[-1].endswith("\x1b[0m a mistake")
    written = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", (tmp_path / "run.log").read_text())
    assert written == PLAIN


class Terminal(io.StringIO):
    """A stream whose `isatty()` is True."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (Terminal, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (io.StringIO, {}, False),
        (io.StringIO, {"FORCE_COLOR": "1"}, True),
    ],
)
def test_colours_are_used_on_terminals_or_on_request(monkeypatch, stream, environment, coloured):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    text = paint("a warning", "yellow", stream())
    assert text == ("\x1b[33ma warning\x1b[0m" if coloured else "a warning")
    # What runs log goes to standard output.
    monkeypatch.setattr(sys, "stdout", stream())
    logging.get_logger().warning("careful")
    assert bool(ESCAPE.search(sys.stdout.getvalue())) == coloured and "careful" in sys.stdout.getvalue()


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """The lines of the log."""
    message: list[str] = []
    monkeypatch.setattr(logging.get_logger(), "info", lambda text, *values: message.append(text % values))
    return message


def losses(value: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(value), "loss_ce": torch.tensor(value / 2), "loss_xy": torch.tensor(9.0)}


def test_a_line_has_the_means_since_the_last_line_and_the_time_left(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("runs.batch_log.time.perf_counter", lambda: now[0])
    shown = []
    log = BatchLog(2, epoch=1, epochs=3, batches=5, show=lambda values, done: shown.append((done, dict(values))))
    for value in range(5):
        now[0] += 10
        log(losses(float(value)), images=4, lr=1e-4)
    assert lines[0] == ("epoch 1 [2/5]  loss 0.5000  loss_ce 0.2500  lr 1.00e-04  0.4 images/s  "
                        "0:00:30 left, of all epochs 0:01:20")  # fmt: skip
    assert [line[:13] for line in lines] == ["epoch 1 [2/5]", "epoch 1 [4/5]", "epoch 1 [5/5]"]
    assert lines[2].endswith("0:00:00 left, of all epochs 0:00:50") and "loss 4.0000" in lines[2]
    assert shown[1] == (4, {"loss": 2.5, "loss_ce": 1.25, "loss_xy": 9.0, "lr": 1e-4, "images_per_second": 0.4})


def test_a_frequency_of_0_logs_nothing(lines):
    log = BatchLog(0, epoch=0, epochs=1, batches=1, show=None)
    log(losses(1.0), images=1, lr=1.0)
    assert lines == []
