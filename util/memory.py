"""Measure memory: free RAM within container limits, free GPU memory, and the peak usage of a computation."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
USABLE_SHARE = 0.8  # of free memory; the rest is for workspaces inside kernels, which are not counted, and for others


def free_bytes(device: torch.device) -> float:
    """Return the bytes of a device's memory that this process can still use; infinity if unknown.

    The processes on a machine share its RAM evenly; a GPU is used by one process.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved but does not use is free, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_ram() / processes_here()


def processes_here() -> int:
    """Return the number of this run's processes on this machine; all of them if torchrun does not set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def available_ram() -> float:
    """Return the bytes of RAM that can be used without swapping or reaching a container's limit, or infinity."""
    return min([_machine_bytes(), *_cgroup_bytes()])


def _machine_bytes() -> float:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:  # not Linux: the RAM in use is unknown, so assume that half is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (AttributeError, OSError, ValueError):
        return math.inf


def _cgroup_bytes() -> Iterator[float]:
    """Yield the free bytes of each control group of this process; a group's limit includes its subgroups."""
    for version, folder in control_groups("memory"):
        if version == 2:
            yield from _room_of_group(folder, ("memory.max", "memory.high"), "memory.current", "")
        else:
            yield from _room_of_group(folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def control_groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Yield the version (1 or 2) and the folder of each control group that may limit this process.

    Args:
        controller: of version 1, such as `memory` or `cpu`.
    """
    try:
        lines = CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, root = 2, CGROUP_ROOT
        elif controller in controllers.split(","):
            version, root = 1, CGROUP_ROOT / controller
        else:
            continue
        parts = [part for part in path.split("/") if part]
        # In a container the path may be the host's, and the container's own group is at the root.
        for depth in range(len(parts) + 1):
            yield version, root.joinpath(*parts[:depth])


def _room_of_group(folder: Path, limit_names: tuple[str, ...], usage_name: str, prefix: str) -> Iterator[float]:
    limit = min(_number(folder / name) for name in limit_names)
    if math.isfinite(limit):
        # The usage includes cached file pages, which are freed when memory is needed.
        cached = _entry(folder / "memory.stat", f"{prefix}inactive_file")
        usage = _number(folder / usage_name)
        yield max(0.0, limit - (usage - cached if math.isfinite(usage) else 0))


def _number(path: Path) -> float:
    """Return the number in a file; infinity if there is no number or it is "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return math.inf


def _entry(path: Path, name: str) -> int:
    """Return the number of `name` in a file of names and numbers; 0 if it is missing."""
    try:
        return int(dict(line.split(maxsplit=1) for line in path.read_text().splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages; shared storages count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class PeakMemory(TorchDispatchMode):
    """Count the bytes of tensors created inside the context, on any device; workspaces inside kernels do not count.

    Attributes:
        peak_bytes: maximum number of bytes that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation. Inputs seen for the first time were created outside and do not count."""
        kwargs = kwargs or {}
        self._watch((args, kwargs), counted=False)
        results = func(*args, **kwargs)
        self._watch(results, counted=True)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        return results

    def _watch(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                nbytes = storage.nbytes() if counted else 0
                self._bytes += nbytes
                weakref.finalize(storage, self._forget, key, nbytes).atexit = False

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._bytes -= nbytes
