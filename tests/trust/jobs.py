"""Runs that tests start as processes of their own, to kill them: what they do, and what must be whole afterwards.

The processes are forked from a server that has imported everything, so that one takes a second and not six.
In `make soak` their detector has a resnet18, so that more kills fall into the middle of writing a file.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import main
from datasets import demo
from pruning.schedule import MGP
from runs.search_command import get_pruning_parser, search
from tests.tiny_run import options, tiny_options
from util.cli import parse
from util.errors import run_cli

ROOT = Path(main.__file__).parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.trust.jobs"])
WRITING = os.O_WRONLY | os.O_RDWR
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
SOAK = bool(os.environ.get("SOAK"))
BACKBONE = f"--backbone {'resnet18' if SOAK else 'resnet_tiny'}"
SEARCH = (
    f"{BACKBONE} --enc_layers 1 --dec_layers 2 --hidden_dim 32 --nheads 4 --dim_feedforward 32 "
    "--num_queries 5 --image_size 64 --batch_size 2 --num_workers 0 --device cpu --attention_unit 4 --ffn_unit 8 "
    "--search visit --map_tol 0.1 --skip_eval_converge 0.01 --resume_search"
)
SET = {"images": 4, "val_images": 2, "seed": 3, "size": 64}


def train(data: Path, out: Path) -> None:
    """Two epochs; goes on with what is there."""
    if (out / "checkpoint.pth").exists():
        files = ("--coco_path", data, "--output_dir", out, "--resume", out / "checkpoint.pth")
        main.main(*options(*files, "--epochs 2 --num_workers 0 --device cpu"))
    else:
        main.main(*tiny_options("--coco_path", data, "--output_dir", out, BACKBONE, "--epochs 2 --ema_decay 0.9"))


def prune(data: Path, out: Path) -> None:
    """A search, module after module; goes on with what is there."""
    words = f"{SEARCH} --coco_path {data} --resume {data}/dense.pth --output_dir {out}"
    search(MGP, *parse(get_pruning_parser(MGP, "a test"), words.split()))


def draw(data: Path, out: Path) -> None:
    """A demo set of 6 pictures."""
    demo.draw_set(out, **SET)


@dataclass(frozen=True)
class Kill:
    """When a process is killed: `after` seconds, or as it is about to touch its folder's files for the nth time.

    With `temporary`, as soon as the nth temporary file shows up there (they are counted from 0), and `after` seconds.
    """

    nth: int | None = None
    after: float = 0.0
    temporary: bool = False


class Job:
    """One process that does one of the things above to a folder."""

    def __init__(
        self,
        what: Callable,
        data: Path,
        out: Path,
        kill: Kill | None = None,
        *,
        largest_file: int | None = None,
        said: Path | None = None,
    ) -> None:
        self.out, self.kill, self.said = out, kill or Kill(), said or out.parent / f"{out.name}.said.txt"
        self.touched = SERVER.Value("i", 0)
        at = self.kill.nth if kill is not None and not self.kill.temporary else None
        arguments = (what, data, out, self.said, self.touched, at, largest_file)
        self.process = SERVER.Process(target=_work, args=arguments)
        self.process.start()

    def finish(self) -> int:
        """Wait, or kill it when it is time; returns the exit code, -9 where it was killed."""
        if self.kill.temporary:
            self._await_temporary()
        if self.kill.nth is None or self.kill.temporary:
            self.process.join(self.kill.after or None)
            self.process.kill() if self.kill.after or self.kill.temporary else None
        self.process.join()
        return self.process.exitcode

    def _await_temporary(self) -> None:
        seen: set[str] = set()
        while self.process.is_alive() and len(seen) <= self.kill.nth:
            for folder in (self.out, self.out.parent):
                with contextlib.suppress(OSError):
                    seen |= {entry.name for entry in os.scandir(folder) if entry.name.endswith(".tmp")}


def _work(
    what: Callable, data: Path, out: Path, said: Path, touched: Any, at: int | None, largest_file: int | None
) -> None:
    torch.set_num_threads(1)
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    places = (str(out), str(out.parent / f".{out.name}."))

    def count(event: str, arguments: tuple) -> None:
        if event not in EVENTS and not (event == "open" and (arguments[2] or 0) & WRITING):
            return
        if not isinstance(arguments[0], str | Path) or not str(arguments[0]).startswith(places):
            return
        if str(arguments[0]) == str(said):
            return
        if touched.value == at:
            os.kill(os.getpid(), signal.SIGKILL)
        touched.value += 1

    sys.addaudithook(count)
    run_cli(lambda: what(data, out))


def assert_whole(folder: Path) -> None:
    """Every file that has its final name can be read to its end; of a journal or a log all lines but the last."""
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_dir() or path.suffix == ".tmp" or ".tmp/" in str(path) or path.name.startswith(".lock"):
            continue
        if path.suffix == ".pth":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".jsonl" or path.match("log*.txt"):
            for line in path.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert path.name == "run.log", f"a kind of file that this test cannot read: {path}"
