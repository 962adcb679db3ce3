"""Build the sampling operator: `python setup.py build install`, or `pip install --no-build-isolation .`

The CUDA sources are compiled where a CUDA compiler is found; FORCE_CPU=1 leaves them out. Which GPUs they are compiled
for is PyTorch's TORCH_CUDA_ARCH_LIST; without it, the ones that are there.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

SOURCES = Path("src")
OLDEST_ARCHITECTURE = "7.5"


def with_cuda() -> bool:
    """Whether to compile the CUDA sources: a compiler is found, and nobody said otherwise."""
    if os.environ.get("FORCE_CPU") == "1" or CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return False
    import torch

    if torch.version.cuda is None:
        return False
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{OLDEST_ARCHITECTURE}+PTX")
    return True


def extension() -> Extension:
    """The one extension, of the CPU sources or of all."""
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    # at::parallel_for is parallel only in sources that are compiled with OpenMP.
    flags = ["-O3", "-std=c++20", "-Wno-psabi", *(["-fopenmp"] if sys.platform.startswith("linux") else [])]
    compile_args = {"cxx": flags}
    build = CppExtension
    if with_cuda():
        build = CUDAExtension
        sources += sorted(map(str, SOURCES.glob("*.cu")))
        compile_args["nvcc"] = ["-O3", "-std=c++20"]
    return build("deformable_sampling", sources, extra_compile_args=compile_args)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension}, packages=[], py_modules=[])
