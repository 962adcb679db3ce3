"""How much memory there is: RAM within the limits of containers, a GPU's, and what a computation takes at its peak."""

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
USABLE_SHARE = 0.8  # of what is free: kernels take some within themselves, which no estimate here sees, and others too


def free_bytes(device: torch.device) -> float:
    """Bytes of a device's memory that this process can still take; infinity where nobody knows.

    The processes on one machine share its RAM evenly; a GPU serves one process.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has set aside for itself and does not use is free, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_ram() / processes_here()


def processes_here() -> int:
    """Processes of this run on this machine, as torchrun has it; without it all are taken to be here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def available_ram() -> float:
    """Bytes of RAM that can be taken without swapping or reaching the limit of a container; infinity if unknown."""
    return min([_machine_bytes(), *_cgroup_bytes()])


def _machine_bytes() -> float:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:  # no Linux: how much is in use is not known, so half counts as free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (AttributeError, OSError, ValueError):
        return math.inf


def _cgroup_bytes() -> Iterator[float]:
    """What each control group around this process leaves free; a group's limit holds for all groups within it."""
    try:
        lines = CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            yield from _room_of_groups(CGROUP_ROOT, path, ("memory.max", "memory.high"), "memory.current", "")
        elif "memory" in controllers.split(","):
            limits, usage = ("memory.limit_in_bytes",), "memory.usage_in_bytes"
            yield from _room_of_groups(CGROUP_ROOT / "memory", path, limits, usage, "total_")


def _room_of_groups(
    root: Path, path: str, limit_names: tuple[str, ...], usage_name: str, prefix: str
) -> Iterator[float]:
    parts = [part for part in path.split("/") if part]
    # In a container the path may be that of the host, and the container's own group stands at the root.
    for depth in range(len(parts) + 1):
        folder = root.joinpath(*parts[:depth])
        limit = min(_number(folder / name) for name in limit_names)
        if math.isfinite(limit):
            # Cached pages of files are part of the usage, and given up when memory is needed.
            cached = _entry(folder / "memory.stat", f"{prefix}inactive_file")
            usage = _number(folder / usage_name)
            yield max(0.0, limit - (usage - cached if math.isfinite(usage) else 0))


def _number(path: Path) -> float:
    """The number in a file; infinity without one, or where it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return math.inf


def _entry(path: Path, name: str) -> int:
    """A number of a file of names and numbers, 0 if it is not there."""
    try:
        return int(dict(line.split(maxsplit=1) for line in path.read_text().splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold, those of a storage that several share once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made inside it, on any device; what a kernel takes within itself is not seen.

    Attributes:
        peak_bytes: of the tensors that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; tensors that it is the first to show were there before."""
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
