"""Run a script in a process of its own and measure it from outside: seconds, CPU seconds and memory of each stage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROC = Path("/proc")
EVERY = 0.05  # seconds between two looks
# Bytes in a unit of ru_maxrss.
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        name: what the run does in it.
        seconds: by the clock.
        cpu_seconds: of all processes of the run.
        peak_bytes: most resident memory of all processes together, as seen every `EVERY` seconds; pages that they share
            count for each. 0 if unknown.
    """

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class WatchedRun:
    """A run that was watched.

    Attributes:
        command: the words after `python`.
        code: exit code; None while it runs.
        stages: in the order of the run.
        peak_bytes: most resident memory of the largest process, by the operating system; 0 while it runs.
        busiest_cpu_seconds: of the process that used most CPU time, without its children, as last seen.
    """

    command: list[str]
    code: int | None = None
    stages: list[Stage] = field(default_factory=list)
    peak_bytes: int = 0
    busiest_cpu_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all stages."""
        return sum(stage.cpu_seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def watch(
    words: Sequence[str],
    log: Path,
    stage: Callable[[], str],
    on_stage: Callable[[WatchedRun], None] = lambda run: None,
    variables: Mapping[str, str] | None = None,
) -> WatchedRun:
    """Run `python WORDS` in the repository's folder and return what it took.

    Args:
        log: file for its output.
        stage: returns the name of the stage that the run is in.
        on_stage: called at the end of each stage but the last.
        variables: of the environment, besides those of this process.
    """
    run = WatchedRun(list(words))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, **(variables or {})}, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _follow(run, process.pid, stage, on_stage)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        process.returncode = run.code  # waited for in `_follow`
    return run


def _follow(run: WatchedRun, pid: int, stage: Callable[[], str], on_stage: Callable[[WatchedRun], None]) -> None:
    began, cpu_before = time.perf_counter(), 0.0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        now, name = time.perf_counter(), stage()
        by_process = {} if done else _usage(pid)
        if not run.stages or name != run.stages[-1].name:
            if run.stages:
                on_stage(run)
            run.stages.append(Stage(name))
        last = run.stages[-1]
        last.seconds += now - began
        began = now
        if done:
            last.cpu_seconds += max(0.0, usage.ru_utime + usage.ru_stime - cpu_before)
            run.code, run.peak_bytes = os.waitstatus_to_exitcode(status), usage.ru_maxrss * MAXRSS_UNIT
            return
        cpu = sum(own + ended for own, ended, _ in by_process.values())
        last.cpu_seconds += max(0.0, cpu - cpu_before)
        cpu_before = max(cpu, cpu_before)
        last.peak_bytes = max(last.peak_bytes, sum(nbytes for *_, nbytes in by_process.values()))
        run.busiest_cpu_seconds = max([run.busiest_cpu_seconds, *(own for own, *_ in by_process.values())])
        time.sleep(EVERY)


def _usage(pid: int) -> dict[int, tuple[float, float, int]]:
    """Return CPU seconds, those of ended children, and resident bytes of a process and of each below it.

    It is empty where /proc is missing.
    """
    found: dict[int, tuple[float, float, int]] = {}
    try:
        # The name may contain spaces; it ends with the last parenthesis.
        values = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        user, system, ended_user, ended_system = (int(value) / os.sysconf("SC_CLK_TCK") for value in values[11:15])
        found[pid] = user + system, ended_user + ended_system, int(values[21]) * os.sysconf("SC_PAGE_SIZE")
        for children in (PROC / str(pid) / "task").glob("*/children"):
            for child in children.read_text().split():
                found |= _usage(int(child))
    except (OSError, ValueError, IndexError):
        pass  # it has ended
    return found
