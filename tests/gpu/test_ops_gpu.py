"""The sampling operator on CUDA: built from its sources, held to the pure PyTorch form by its own test script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.dn_dab_deformable_detr.ops import sample, sample_in_pytorch, sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPS = Path(sampling.__file__).parent
ROOT = OPS.parents[2]


@pytest.fixture(scope="module")
def built():
    """Folder with the compiled operator of these sources, CUDA kernels included; `bench/gpu.sh` has built it."""
    if "SAMPLING_LIBRARY" in os.environ:
        return Path(os.environ["SAMPLING_LIBRARY"])
    command = [sys.executable, "setup.py", "build", "--build-base", "build/gpu", "--build-lib", "build/gpu/lib"]
    environment = {**os.environ, "FORCE_CUDA": "1"}
    done = subprocess.run(command, cwd=OPS, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return OPS / "build/gpu/lib"


def run(built, *words, cwd):
    path = os.pathsep.join(filter(None, (str(built), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_line_of_the_test_script_is_true_on_both_devices(built):
    lines = run(built, "test.py", cwd=OPS).splitlines()
    assert all(line.endswith("True") for line in lines)
    assert {line.split(":")[0] for line in lines} == {"cpu", "cuda"}


def test_the_baseline_of_the_benchmark_computes_the_same(built, tmp_path):
    run(built, "-m", "bench.ops", "--device", "cuda", "--rounds", "1", "--output", tmp_path / "ops.json", cwd=ROOT)
    assert (tmp_path / "ops.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_at_most_twice_as_far_off_as_pytorch(built, dtype, monkeypatch):
    """Sums in float: only the values and the result are rounded."""
    monkeypatch.syspath_prepend(built)
    monkeypatch.setattr(sampling, "_compiled_for", None)
    assert "cuda" in sampling.load_operator()
    value = torch.randn(2, 500, 8, 32, device="cuda").to(dtype)
    locations, weights = torch.rand(2, 300, 8, 1, 4, 2, device="cuda"), torch.rand(2, 300, 8, 1, 4, device="cuda")
    exact = sample_in_pytorch(value.double(), [20, 25], locations.double(), weights.double())
    found, reference = (form(value, [20, 25], locations, weights) for form in (sample, sample_in_pytorch))
    assert float((found - exact).abs().max()) <= 2 * float((reference - exact).abs().max())
