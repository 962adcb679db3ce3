"""Runs of the entry points in one or several gloo processes that share one import: forked, where torchrun starts anew.

    python -m tests.trust.forked JOBS.json

`JOBS.json` is a list of `{"processes": N, "script": "main", "gp" or "mgp", "words": [options, ...]}`, done in order.
"""

import argparse
import functools
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import main
from pruning import plots
from pruning.arguments import get_pruning_parser
from pruning.cli import search
from pruning.schedule import GP, MGP, Schedule
from util.options import parse


def train(words: Sequence[str]) -> None:
    """`main.py` with these options."""
    main.main(*parse(argparse.ArgumentParser(parents=[main.get_args_parser()]), list(words)))


def prune(schedule: Schedule, words: Sequence[str]) -> None:
    """A search with these options, without its pictures: drawing them takes a third of the time."""
    plots.plot_widths = plots.plot_ap_against_parameters = lambda *arguments: None
    search(schedule, *parse(get_pruning_parser(schedule, "a test"), list(words)))


SCRIPTS: dict[str, Callable[[Sequence[str]], None]] = {
    "main": train,
    "gp": functools.partial(prune, GP),
    "mgp": functools.partial(prune, MGP),
}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(processes: int, script: str, words: Sequence[str]) -> None:
    """One job; raises where a process of it fails."""
    port = free_port()

    def work(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        SCRIPTS[script](words)

    # Nothing has been computed in this process, so that no thread of it is lost in a fork.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    codes = [worker.exitcode for worker in workers]
    if any(codes):
        raise RuntimeError(f"{processes} processes of {script} ended with {codes}")


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
