"""docs/DISTRIBUTED.md: its commands are ones that the scripts take, and its SLURM job does what it says."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import main
from pruning.arguments import get_pruning_parser
from pruning.schedule import MGP

ROOT = Path(main.__file__).parent
PAGE = (ROOT / "docs" / "DISTRIBUTED.md").read_text()
PARSERS = {
    "main.py": argparse.ArgumentParser(parents=[main.get_args_parser()]),
    "prune_greedy_ad.py": get_pruning_parser(MGP, ""),
}
JOB = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "1234567", "SLURM_CPUS_PER_TASK": "32", "SLURM_NNODES": "2",
       "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip


def script_and_options(command: str) -> tuple[str, argparse.Namespace]:
    """Which script a torchrun command starts, and the options it gets."""
    words = shlex.split(command)
    place = next(place for place, word in enumerate(words) if word in PARSERS)
    return words[place], PARSERS[words[place]].parse_args(words[place + 1 :])


def test_its_commands_are_taken():
    commands = re.findall(r"^    (torchrun (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    scripts = [script_and_options(command.replace("\\\n", ""))[0] for command in commands]
    assert sorted(set(scripts)) == ["main.py", "prune_greedy_ad.py"] and len(commands) == 4


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize("preempted", [False, True])
def test_its_slurm_job_starts_processes_on_all_machines_and_goes_on_after_a_requeue(tmp_path, preempted):
    (tmp_path / "job").write_text(re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1])
    for name, says in (("scontrol", "printf 'node1\\nnode2\\n'"), ("srun", 'printf "%s\\n" "$*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    if preempted:
        (tmp_path / "out" / "checkpoint.pth").write_text("")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "OUT": "out",
                 "START": "first.pth"}  # fmt: skip
    run = subprocess.run(["bash", "job"], cwd=tmp_path, env=JOB | variables, capture_output=True, text=True, check=True)
    start, _, _ = run.stdout.partition("main.py")
    assert start.split() == ["torchrun", "--nnodes", "2", "--nproc_per_node", "8", "--rdzv_id", "1234567",
                             "--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:34567"]  # fmt: skip
    script, args = script_and_options(run.stdout)
    assert script == "main.py" and args.resume == ("out/checkpoint.pth" if preempted else "first.pth")
    assert args.output_dir == "out" and args.amp == "bf16"
