"""Building the sampling operator: for which GPUs, and what happens where its CUDA part cannot be built."""

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from models.dn_dab_deformable_detr.ops import sampling
from tests.soak import rest_in_soak

OPS = Path(sampling.__file__).parent
ROOT = OPS.parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# Group sizes times vector widths of float, half, bfloat16 and double.
KERNELS = {"forward.cu": 4 * (2 * (3 + 3 + 3) + 2), "backward.cu": 4 * (3 + 3 + 3 + 2)}


def _setup_script():
    """The module in setup.py, which builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("ops_setup", OPS / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _setup_script()


def _kernels_in_ptx(source, capability, folder):
    """Compile a source for one compute capability; returns the number of kernels, or the errors.

    PTX shows every mistake that a compiler finds, and needs no GPU. Debugging code is the quickest to make.
    """
    ptx = folder / f"{source.stem}_{capability}.ptx"
    command = [NVCC, "--ptx", "--device-debug", "--expt-relaxed-constexpr", "-std=c++20", "-Werror", "all-warnings"]
    command += [f"-arch=compute_{capability.replace('.', '')}", f"-I{Path(torch.__file__).parent / 'include'}"]
    done = subprocess.run([*command, "-o", ptx, source], capture_output=True, text=True, timeout=600)
    return ptx.read_text().count(".entry ") if done.returncode == 0 else done.stderr[-3000:]


@pytest.mark.skipif(NVCC is None, reason="no CUDA compiler")
@pytest.mark.parametrize("choice", rest_in_soak(["the oldest GPU", "all GPUs"], ["the oldest GPU"]))
def test_the_cuda_sources_compile(tmp_path, choice):
    """The kernels for each compute capability that setup.py builds for by default; what has no such code for one."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    capabilities = setup.architectures(listed).removesuffix("+PTX").split(";")
    capabilities = capabilities if choice == "all GPUs" else capabilities[:1]
    kernels = (OPS / "src/forward.cu", OPS / "src/backward.cu")
    expected = {(source, capability): KERNELS[source.name] for source in kernels for capability in capabilities}
    expected |= {(OPS / "src/cuda.cu", capabilities[0]): 0, (ROOT / "bench/original_sampling.cu", capabilities[0]): 2}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(expected, pool.map(lambda job: _kernels_in_ptx(*job, tmp_path), expected), strict=True))
    assert found == expected


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("compute_75\ncompute_80\ncompute_86\ncompute_87\ncompute_89\ncompute_90\n", "7.5;8.0;8.6;8.9;9.0+PTX"),
        ("compute_90\ncompute_90a\ncompute_100\ncompute_103\ncompute_120\ncompute_121\n", "9.0;10.0;12.0+PTX"),
        ("compute_120\ncompute_130\n", "12.0+PTX"),
    ],
)
def test_the_default_is_all_gpus_that_nvcc_knows(listed, expected):
    assert setup.architectures(listed) == expected


def test_an_nvcc_that_knows_none_of_the_gpus_is_refused():
    with pytest.raises(setup.CannotBuildError, match="nvcc supports none of the compute capabilities 7"):
        setup.architectures("compute_30\ncompute_990\ncompute_75a\n")


# Stand-ins for the compilers: they write empty files, and to a log how they were called. What has to link without
# anything compiled is left to the real compiler, which looks for the libraries.
CXX = """#!/bin/sh
case " $* " in
  *" -c "*|*".o "*) ;;
  *) exec {cxx} "$@" ;;
esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.0"; exit 0 ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_121\\n'; exit 0 ;;
esac
echo "$@" >> {folder}/nvcc.log
{compile}
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
MISSING_HEADER = "echo 'CUDAStream.h:5:10: fatal error: cuda_runtime_api.h: No such file or directory' >&2; exit 1"
COMPILE_ERROR = """echo 'src/backward.cu(29): error: no instance of "atomicAdd" matches' >&2; exit 2"""


@pytest.fixture
def toolkit(tmp_path):
    """A function that makes a CUDA toolkit of such stand-ins, and one that runs setup.py with it."""
    cxx = shutil.which("g++")
    if cxx is None or not sys.platform.startswith("linux"):
        pytest.skip("no g++")
    if torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA")

    def script(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def make(version=torch.version.cuda, compile_command="", libraries=True, ninja=True):
        text = FAKE_NVCC.format(version=version, folder=tmp_path, compile=compile_command)
        script(tmp_path / "cuda/bin/nvcc", text)
        (tmp_path / "cuda/lib64").mkdir()
        if libraries:
            library = tmp_path / "cuda/lib64/libcudart.so"
            subprocess.run([cxx, "-shared", "-o", library, "-x", "c++", "/dev/null"], check=True)
        for name in ("g++", "gcc", "c++", "cc"):
            script(tmp_path / "bin" / name, CXX.format(cxx=cxx))
        if not ninja:
            script(tmp_path / "bin/ninja", "#!/bin/sh\nexit 1\n")

    def run(**environment):
        removed = ("TORCH_CUDA_ARCH_LIST", "FORCE_CUDA", "FORCE_CPU", "CC", "CXX", "CUDA_PATH")
        inherited = {name: value for name, value in os.environ.items() if name not in removed}
        folders = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path / "cuda")}
        command = [sys.executable, "setup.py", "build", "--build-base", tmp_path / "b", "--build-lib", tmp_path / "lib"]
        command = list(map(str, command))
        environment = {**inherited, **folders, "CUDA_VISIBLE_DEVICES": "", "CC": "gcc", "CXX": "g++", **environment}
        return subprocess.run(command, cwd=OPS, env=environment, capture_output=True, text=True, timeout=300)

    run.folder = tmp_path
    return make, run


def compiled(run):
    """Names of the sources that were compiled, and the options of nvcc's calls."""
    objects = {path.stem for path in (run.folder / "b").rglob("*.o")}
    log = run.folder / "nvcc.log"
    return objects, log.read_text() if log.exists() else ""


def test_without_a_gpu_it_is_compiled_for_all_that_nvcc_knows(toolkit):
    make, run = toolkit
    make()
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith("built deformable_sampling for the CPU and for CUDA, compute capabilities 8.0;9.0+PTX")
    objects, options = compiled(run)
    assert objects == {"autograd", "operator", "cpu", "cuda", "forward", "backward"}
    calls = options.splitlines()
    assert len(calls) == 3
    for call in calls:
        targets = {word for word in call.split() if word.startswith("-gencode")}
        codes = ("80,code=sm_80", "90,code=sm_90", "90,code=compute_90")
        assert targets == {f"-gencode=arch=compute_{code}" for code in codes}
    assert list((run.folder / "lib").glob("deformable_sampling*.so"))


def test_a_list_of_ones_own_wins(toolkit):
    make, run = toolkit
    make()
    done = run(TORCH_CUDA_ARCH_LIST="8.6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all("compute_86" in call and "compute_90" not in call for call in compiled(run)[1].splitlines())


OBSTACLES = {
    "a missing header": ({"compile_command": MISSING_HEADER}, "cuda_runtime_api.h: No such file"),
    "a compile error": ({"compile_command": COMPILE_ERROR}, 'error: no instance of "atomicAdd" matches'),
    "a compile error without ninja": ({"compile_command": COMPILE_ERROR, "ninja": False}, "error: no instance"),
    "a script in another folder": ({"libraries": False}, "cannot find -lcudart"),
    "another version of CUDA": ({"version": "7.0"}, "has CUDA version 7.0, expected that of PyTorch"),
}


@pytest.mark.parametrize("obstacle", rest_in_soak([*OBSTACLES], ["a compile error", "another version of CUDA"]))
def test_where_cuda_cannot_be_built_the_cpu_part_is(obstacle, toolkit):
    """One sentence gives the reason and how to make it an error; that error is one sentence, too."""
    make, run = toolkit
    given, reason = OBSTACLES[obstacle]
    make(**given)
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    start = "built deformable_sampling for the CPU only, because the CUDA part"
    assert last.startswith(start), done.stdout + done.stderr
    assert reason in last and last.endswith("; FORCE_CUDA=1 makes this an error")
    assert "Traceback" not in done.stdout + done.stderr
    assert {"operator", "cpu"} <= compiled(run)[0]
    shutil.rmtree(run.folder / "lib")
    done = run(FORCE_CUDA="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the CUDA part of deformable_sampling cannot be built: ")
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(run.folder.glob("lib/*.so"))


def test_without_nvcc_the_cpu_part_is_built(toolkit):
    make, run = toolkit
    make()
    done = run(CUDA_HOME=str(run.folder / "nowhere"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nowhere/bin/nvcc does not run: No such file or directory" in done.stdout.splitlines()[-1]


def test_a_cpu_part_that_cannot_be_built_is_a_one_line_error(toolkit):
    make, run = toolkit
    make()
    compiler = run.folder / "bin/g++"
    compiler.write_text("#!/bin/sh\necho 'src/cpu.cpp:1:1: error: expected a better compiler' >&2\nexit 1\n")
    done = run(FORCE_CPU="1", TORCH_DONT_CHECK_COMPILER_ABI="1")
    assert done.returncode == 1
    assert "error: expected a better compiler" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr
