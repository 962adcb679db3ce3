"""Threads for work of the main process, while the other processes of the run wait for it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from util import distributed
from util.memory import CGROUP_ROOT, CGROUPS, processes_here

MOST_THREADS = 16  # matrices of 2,048 rows are not factorised faster by more


@contextlib.contextmanager
def idle_cores() -> Iterator[None]:
    """Let this process compute with the machine's idle cores, then with as many threads as before.

    `torchrun` gives each process one thread. The others wait meanwhile; on GPUs (NCCL) each keeps a core busy. A single
    process keeps its threads, and so does a run whose OMP_NUM_THREADS is not 1, the value that `torchrun` sets.
    """
    before = torch.get_num_threads()
    others = processes_here() - 1
    busy = others if distributed.is_distributed() and dist.get_backend() == "nccl" else 0
    is_free = others > 0 and os.environ.get("OMP_NUM_THREADS", "1") == "1"
    wanted = min(MOST_THREADS, usable_cores() - busy) if is_free else before
    if wanted <= before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Return the cores that this process may use, by its affinity and the limits of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([cores, *_cgroup_cores()])))


def _cgroup_cores() -> Iterator[float]:
    """Yield the CPU limit of each control group (version 2) of this process; in a container its own is at the root."""
    try:
        lines = CGROUPS.read_text().splitlines()
    except OSError:
        return
    for path in (line.removeprefix("0::") for line in lines if line.startswith("0::")):
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield _cores_of(CGROUP_ROOT.joinpath(*parts[:depth], "cpu.max"))


def _cores_of(path: Path) -> float:
    """Return the quota divided by the period; infinity if there is none."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
