"""The script of all that needs a GPU, rehearsed on the CPU with small sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import latency

SCRIPT = Path(latency.__file__).with_name("gpu.sh")


def run(*words, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "QUICK": "1", **variables}
    return subprocess.run(["sh", SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=1200)


def test_an_unknown_step_is_an_error(tmp_path):
    done = run(tmp_path, "operater")
    assert done.returncode == 2
    assert done.stderr.startswith("operater: no such step, expected some of: environment operator tests")


@pytest.mark.soak
def test_steps_leave_their_figures_and_a_failed_one_does_not_stop_the_next(tmp_path):
    done = run(tmp_path, "environment", "ops", "latency", "search", "training", SAMPLING_LIBRARY="")
    lines = done.stdout.splitlines()
    assert done.returncode == 1  # no operator was built
    assert [line.split()[0] for line in lines if " exit code " in line] == [
        "environment", "ops", "latency", "search", "training"
    ]  # fmt: skip
    codes = {line.split()[0]: int(line.split()[3].rstrip(",")) for line in lines if " exit code " in line}
    assert {name for name, code in codes.items() if code} == {"ops"}
    files = {path.name for path in tmp_path.iterdir()}
    assert {"steps.txt", "latency_cpu.json", "dense_eval.json", "pruned_eval.json", "training_log.txt"} <= files
