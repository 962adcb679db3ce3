"""The CUDA kernels on the CPU: an emulation runs the threads of a block in random order (tests/cuda_emulation)."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.cuda_emulation import cases, emulated_build
from tests.cuda_emulation.emulated_build import OPERATOR, OPS

ROOT = OPS.parents[2]
FOLDER = OPS / "build/cuda_emulation"  # kept, like the build of test_ops.py: what is up to date is not compiled again
MISTAKES = Path(cases.__file__).parent / "mistakes.cu"
# Each type with each number of channels, so that each kernel runs.
QUICK = len(cases.TOLERANCE) * len(cases.CHANNELS)
MODULE = "deformable_sampling.so"

LACKS = emulated_build.missing()
pytestmark = pytest.mark.skipif(LACKS is not None, reason=f"the CUDA emulation cannot be compiled: {LACKS}")


def run_cases(library, first, last, **variables):
    """Run the cases of some seeds in a process; return its exit code and output."""
    path = f"{library.parent}:{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-m", "tests.cuda_emulation.cases", str(first), str(last)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr[-3000:]


def test_the_kernels_agree_with_pytorch():
    code, output = run_cases(emulated_build.build(FOLDER, OPERATOR, MODULE), 0, QUICK)
    assert code == 0, output
    assert f"{QUICK} cases agree" in output


def test_the_quick_cases_have_every_kind():
    drawn = [cases.drawn(seed) for seed in range(QUICK)]
    assert {(case.dtype, case.channels) for case in drawn} == {(t, c) for t in cases.TOLERANCE for c in cases.CHANNELS}
    for name, expected in (("places", cases.PLACES), ("layout", cases.LAYOUTS), ("nan_values", (False, True))):
        assert {getattr(case, name) for case in drawn} == set(expected)
    assert {case.queries for case in drawn} >= {0, 1} and {case.batch for case in drawn} >= {0, 1, 3}
    assert {len(case.sizes) // 2 for case in drawn} >= {1, 4, 16}
    encoders = [case for case in drawn if case.queries == cases.pixels_of(case.sizes)]
    assert len(encoders) > 10 and max(max(case.sizes[::2]) for case in encoders) > 8  # more than one strip of pixels
    assert len(encoders) < len(drawn) / 2
    assert max(case.points for case in drawn) > 64  # the points of a row that a group of 32 lanes places at once


def launched(name, seed=0):
    """Launch a kernel of mistakes.cu; return its 64 numbers, or its error."""
    library = ctypes.CDLL(str(emulated_build.build(FOLDER, [MISTAKES], "mistakes.so")))
    library.run.restype = ctypes.c_char_p
    numbers = (ctypes.c_float * 64)()
    with mock.patch.dict(os.environ, CUDA_EMULATION_SEED=str(seed)):
        return library.run(name.encode(), numbers).decode() or list(numbers)


def test_barriers_and_exchanges_between_lanes():
    for seed in range(20):
        assert launched("right", seed) == list(range(63, -1, -1))
        assert launched("exchanged", seed) == [496.0] * 32 + [16.0] * 32


def test_shared_memory_is_nan_until_it_is_written():
    """Without a barrier a thread reads what another has not written; which one is that of the seed."""
    found = [tuple(number != number for number in launched("no barrier", seed)) for seed in range(20)]
    assert all(any(missing) for missing in found)
    assert len(set(found)) > 10
    assert found[3] == tuple(number != number for number in launched("no barrier", 3))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("two barriers", r"threads wait for others that do not come: 40 at mistakes.cu:\d+, 24 at mistakes.cu:\d+$"),
        ("absent lane", "a shuffle reads lane 20"),
        ("mask without itself", "the mask lacks the lane itself"),
        ("unaligned vector", "an atomicAdd that is not aligned"),
        ("much shared memory", "49160 bytes of shared memory, expected at most 49152"),
        ("many threads", "a launch outside of CUDA's limits"),
        ("no threads", "a launch outside of CUDA's limits"),
        ("dynamic shared memory", "dynamic shared memory is not emulated"),
        ("another stream", "a launch on another stream than PyTorch's"),
        ("no guard", "a launch without a device guard"),
        ("no check", "the launch before has no check for errors"),
    ],
)
def test_what_a_gpu_refuses_or_leaves_undefined_is_an_error(mistake, message):
    found = launched(mistake)
    assert isinstance(found, str) and re.search(message, found), found
    assert launched("right") == list(range(63, -1, -1))  # it leaves nothing behind


RUN_ONE = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).run(sys.argv[2].encode(), (ctypes.c_float * 64)())"


@pytest.mark.parametrize(
    ("kernel", "error"),
    [("right", None), ("behind an array", "heap-buffer-overflow|out of bounds")],
)
def test_the_sanitizers_see_shared_memory(kernel, error):
    library = emulated_build.build(FOLDER, [MISTAKES], "mistakes.so", sanitize=True)
    environment = {**os.environ, **emulated_build.preloaded()}
    command = [sys.executable, "-c", RUN_ONE, str(library), kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (error is None), done.stderr
    assert error is None or any(words in done.stderr for words in error.split("|")), done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("capability", [75, 86, 90])
def test_many_random_cases(capability):
    library = emulated_build.build(FOLDER, OPERATOR, MODULE, capability=capability)
    code, output = run_cases(library, QUICK, QUICK + 600)
    assert code == 0, output


@pytest.mark.soak
@pytest.mark.parametrize("capability", [75, 90])
def test_the_sanitizers_find_nothing(capability):
    library = emulated_build.build(FOLDER, OPERATOR, MODULE, sanitize=True, capability=capability)
    code, output = run_cases(library, 0, 2 * QUICK, **emulated_build.preloaded())
    assert code == 0, output


WRONG = {
    "forward, places not awaited": ("forward.cu", "      __syncwarp();\n", ""),
    "forward, places overwritten": ("forward.cu", "__syncwarp();  // all lanes have", "// all lanes have"),
    "backward, places not awaited": ("backward.cu", "      __syncwarp();\n      const int count", "const int count"),
    "backward, sums not awaited": ("backward.cu", "      __syncwarp();\n#pragma unroll\n      for", "for"),
    "strips beyond a level": ("cuda_common.cuh", "min(kStrip, problem.height[level] - top)", "kStrip"),
    "too few blocks": ("forward.cu", "blocks_of(problem, Group, Threads)", "blocks_of(problem, Group, 512)"),
    "rows behind the last": ("cuda_common.cuh", "min(group_of_grid, problem.rows - 1)", "group_of_grid"),
    "unaligned vectors": ("cuda_common.cuh", "addresses % (vec * sizeof(T)) == 0", "addresses != 1"),
    "one point too many": ("forward.cu", "if (k < samples)", "if (k <= samples)"),
}
SEEN_BY_SANITIZERS = {"rows behind the last", "unaligned vectors", "one point too many"}


@pytest.mark.soak
@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_in_the_kernels_are_found(mistake, tmp_path):
    file, old, new = WRONG[mistake]
    shutil.copytree(OPS / "src", tmp_path / "src")
    changed = tmp_path / "src" / file
    text = changed.read_text()
    assert text.count(old) == 1, file
    changed.write_text(text.replace(old, new))
    sources = [tmp_path / "src" / path.name for path in OPERATOR]
    sanitize = mistake in SEEN_BY_SANITIZERS
    library = emulated_build.build(tmp_path / "build", sources, MODULE, sanitize=sanitize)
    code, output = run_cases(library, 0, 2 * QUICK, **(emulated_build.preloaded() if sanitize else {}))
    assert code != 0, output
