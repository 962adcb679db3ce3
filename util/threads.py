"""Threads for work beside which other processes of the run wait, or do as much."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from util import distributed
from util.memory import control_groups, processes_here

MOST_THREADS = 16  # matrices of 2,048 rows are not factorised faster by more


@contextlib.contextmanager
def idle_cores(*, everywhere: bool = False) -> Iterator[None]:
    """Let this process compute with the machine's idle cores, then with as many threads as before.

    `torchrun` gives each process one thread. The others wait meanwhile; on GPUs (NCCL) each keeps a core busy. A single
    process keeps its threads, and so does a run whose number of threads was chosen: OMP_NUM_THREADS is not 1, the value
    that `torchrun` sets, or MKL_NUM_THREADS is set.

    Args:
        everywhere: all processes compute at the same time, each with its share of the cores.
    """
    before = torch.get_num_threads()
    others = processes_here() - 1
    if everywhere:
        free = usable_cores() // (others + 1)
    else:
        is_busy = distributed.is_distributed() and dist.get_backend() == "nccl"
        free = usable_cores() - (others if is_busy else 0)
    is_chosen = os.environ.get("OMP_NUM_THREADS", "1") != "1" or "MKL_NUM_THREADS" in os.environ
    wanted = min(MOST_THREADS, free) if others > 0 and not is_chosen else before
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
    limits = (_limit_of(version, folder) for version, folder in control_groups("cpu"))
    return max(1, math.floor(min([cores, *limits])))


def _limit_of(version: int, folder: Path) -> float:
    """Return a control group's CPU time in cores: quota divided by period; infinity if there is no limit."""
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        return quota / period if quota > 0 else math.inf  # -1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
