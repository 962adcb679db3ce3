"""Run metadata for JSON files: date, versions, machine, the program's commit and the command line."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

from util import distributed
from util.files import move_aside, write_json

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS_NAME = "args.json"
GIT_SECONDS = 10  # so that a hanging file system does not block a run


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return date, versions and machine as JSON values."""
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def program_commit(root: Path = ROOT) -> str | None:
    """Return the commit of the clone at `root`, with `+changes` if tracked files differ; None if it is not a clone."""
    if not (root / ".git").exists():  # a repository in a parent folder is another project
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=GIT_SECONDS,
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def typed_command() -> str:
    """Return the command line, quoted for a shell; under torchrun with the number of processes on this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["python"] if processes is None else ["torchrun", "--nproc_per_node", processes]
    return shlex.join([*launcher, *sys.argv])


def record_run(
    output_dir: Path, options: Mapping[str, Any], device: torch.device, evaluator: str, *, continuing: bool
) -> None:
    """Write args.json: the options, and under `runs` an entry for each start of the run.

    A resumed search is not compared with these entries, so another machine or command may continue it.
    """
    path = output_dir / ARGUMENTS_NAME
    if not continuing:
        move_aside(path)
    earlier = _earlier_runs(path) if continuing else []
    run = {
        "command": typed_command(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "resume": options["resume"],
        "commit": program_commit(),
        "processes": distributed.world_size(),
        "environment": environment(device),
        "evaluator": evaluator,
    }
    write_json(path, {**options, "runs": [*earlier, run]})


def _earlier_runs(path: Path) -> list[dict[str, Any]]:
    """Return the entries that `record_run` wrote before; none if the file is missing or unreadable."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    runs = found.get("runs") if isinstance(found, dict) else None
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def _processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
