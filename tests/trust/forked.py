"""Runs of the entry points in one or several gloo processes that share one import: forked, where torchrun starts anew.

    python -m tests.trust.forked JOBS.json

`JOBS.json` is a list of `{"processes": N, "script": one of SCRIPTS, "words": [options, ...]}`, done in order.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

import main
import tests.tiny_backbone  # noqa: F401
from models.layers import GatedLayer
from pruning import reconstruction, workbench
from pruning.budget import BudgetSearch
from pruning.least_squares import Surgeon
from pruning.schedule import GP, MGP, Schedule
from pruning.scores import Magnitude
from reports import plots
from runs.search_command import get_pruning_parser, search
from runs.search_run import SearchRun
from util import distributed
from util.cli import parse
from util.errors import run_cli


def train(words: Sequence[str]) -> None:
    """`main.py` with these options."""
    main.main(*parse(argparse.ArgumentParser(parents=[main.get_args_parser()]), list(words)))


def prune(schedule: Schedule, words: Sequence[str]) -> None:
    """A search with these options, without its pictures: drawing them takes a third of the time."""
    plots.plot_widths = plots.plot_ap_against_cost = plots.plot_curve = lambda *arguments: None
    search(schedule, *parse(get_pruning_parser(schedule, "a test"), list(words)))


def prune_askew(error: float, words: Sequence[str], *, in_own_fits: bool = False) -> None:
    """`prune` where every process but the first rounds as if on another machine, off by the relative `error`.

    With `in_own_fits` it is also off in those fits that it computes for all, where it ranks channels upside down. Each
    process leaves its weights and kept sets in --output_dir, as `rankN.pth`, and how many FFNs it has priced.
    """
    is_own, priced = [], []

    def skewed(value):
        if is_own and not in_own_fits:
            return value
        if isinstance(value, torch.Tensor):
            signs = 1 - 2 * (torch.arange(value.numel()) % 2).view(value.shape)
            return value * (1 + error * signs)
        if isinstance(value, tuple):
            return type(value)([skewed(item) for item in value])  # a named one too
        return (1 + error) * value

    def skew(owner, name):
        function = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *args, **options: skewed(function(*args, **options)))

    def on_each(jobs):
        is_own.append(True)
        try:
            return on_each_as_is(jobs)
        finally:
            is_own.clear()

    def price(*args):
        priced.append(True)
        return price_as_is(*args)

    def evaluate_askew(*args, **options):
        found = evaluate(*args, **options)
        return dataclasses.replace(found, stats={name: skewed(value) for name, value in found.stats.items()})

    def search_and_save(self, base_ap):
        result = search_as_is(self, base_ap)
        saved = {"model": self.model.state_dict(), "kept": dict(result.kept), "ap": result.ap, "priced": len(priced)}
        torch.save(saved, self.output_dir / f"rank{os.environ['RANK']}.pth")
        return result

    evaluate, search_as_is = workbench.evaluate, SearchRun.search
    on_each_as_is, price_as_is, scores_as_is = distributed.on_each, reconstruction.errors_of_prefixes, Surgeon.scores
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(SearchRun, "search", search_and_save))
        patches.enter_context(mock.patch.object(distributed, "on_each", on_each))
        patches.enter_context(mock.patch.object(reconstruction, "errors_of_prefixes", price))
        if os.environ["RANK"] != "0":
            patches.enter_context(mock.patch.object(workbench, "evaluate", evaluate_askew))
            for name in ("solve", "svd", "eigh", "inv", "qr"):
                patches.enter_context(skew(torch.linalg, name))
            for name in ("target_ap", "subset_threshold_ap", "full_threshold_ap"):
                patches.enter_context(skew(Schedule, name))
            patches.enter_context(skew(BudgetSearch, "_guess"))
            patches.enter_context(skew(Magnitude, "_scores"))
            if in_own_fits:
                patches.enter_context(mock.patch.object(Surgeon, "scores", lambda surgeon: -scores_as_is(surgeon)))
        prune(MGP, words)


def prune_spoiled(where: str, words: Sequence[str]) -> None:
    """`prune` as a command, where a fit fails in one process, or activations are NaN in the second alone."""

    def observe_nan(self, block, **activations):
        if "hidden" in activations:
            activations["hidden"] = activations["hidden"] * float("nan")
        observe(self, block, **activations)

    refused = torch.linalg.LinAlgError("the algorithm failed to converge")
    observe = GatedLayer.observe
    with ExitStack() as patches:
        if where == "fit" and os.environ["RANK"] == "0":
            patches.enter_context(mock.patch("torch.linalg.svd", side_effect=refused))
        if where == "own fit" and os.environ["RANK"] == "1":
            patches.enter_context(mock.patch("torch.linalg.solve_triangular", side_effect=refused))
        if where == "activations" and os.environ["RANK"] == "1":
            patches.enter_context(mock.patch.object(GatedLayer, "observe", observe_nan))
        run_cli(functools.partial(prune, MGP, words))


SCRIPTS: dict[str, Callable[[Sequence[str]], None]] = {
    "main": train,
    "gp": functools.partial(prune, GP),
    "mgp": functools.partial(prune, MGP),
    "mgp alike": functools.partial(prune_askew, 0.0),
    "mgp askew": functools.partial(prune_askew, 1e-7),
    "mgp far askew": functools.partial(prune_askew, 0.05),
    "mgp all askew": functools.partial(prune_askew, 0.05, in_own_fits=True),
    "mgp, a fit fails": functools.partial(prune_spoiled, "fit"),
    "mgp, a fit of the second process fails": functools.partial(prune_spoiled, "own fit"),
    "mgp, activations are NaN": functools.partial(prune_spoiled, "activations"),
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


def start_jobs(path: Path, jobs: list[dict]) -> subprocess.CompletedProcess:
    """Do jobs in one new process and its forks; returns that process, finished."""
    path.write_text(json.dumps(jobs))
    return subprocess.run(
        [sys.executable, "-m", "tests.trust.forked", path],
        cwd=Path(main.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_jobs(path: Path, jobs: list[dict]) -> None:
    """Do jobs, none of which may fail."""
    done = start_jobs(path, jobs)
    assert done.returncode == 0, done.stderr


def job(processes: int, script: str, words: str) -> dict:
    """One of `run_jobs`."""
    return {"processes": processes, "script": script, "words": words.split()}


if __name__ == "__main__":
    for given in json.loads(Path(sys.argv[1]).read_text()):
        run(**given)
