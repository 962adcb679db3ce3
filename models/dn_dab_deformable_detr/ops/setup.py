"""Build the sampling operator: `python setup.py build install`, or `pip install --no-build-isolation .`

If the CUDA part cannot be built, only the CPU part is built, and the last line of output gives the reason.
Environment variables:

CUDA_HOME: folder of the CUDA toolkit; by default that of the `nvcc` in PATH.
TORCH_CUDA_ARCH_LIST: compute capabilities to compile for, such as "8.0;9.0+PTX"; by default those of the visible GPUs
    or, without one, `COMPUTE_CAPABILITIES`.
FORCE_CUDA=1: fail if the CUDA part cannot be built.
FORCE_CPU=1: build only the CPU part; overrides FORCE_CUDA.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

NAME = "deformable_sampling"
SOURCES = Path("src")
# Compiled for if no GPU is visible, where nvcc supports them: T4, A100, RTX 30, RTX 40, H100, B200, RTX 50.
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ERROR_LINE = re.compile(r"error:|fatal\s*:|cannot find|not found|denied", re.IGNORECASE)
LONGEST_REASON = 300


class CannotBuildError(Exception):
    """A part of the operator cannot be built; the message is the reason."""


def nvcc_output(option: str) -> str:
    """Return the output of nvcc with one option; raise `CannotBuildError` if there is no working nvcc."""
    if CUDA_HOME is None:
        raise CannotBuildError("found no nvcc in CUDA_HOME or PATH")
    nvcc = Path(CUDA_HOME) / "bin/nvcc"
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CannotBuildError(f"{nvcc} does not run: {error.strerror}") from error
    if done.returncode != 0:
        raise CannotBuildError(f"`{nvcc} {option}` fails: {first_error(done.stdout + done.stderr, 'no message')}")
    return done.stdout


def check_versions() -> None:
    """Raise `CannotBuildError` unless PyTorch and nvcc have the same major CUDA version."""
    if torch.version.cuda is None:
        raise CannotBuildError(f"this PyTorch, {torch.__version__}, was built without CUDA")
    release = re.search(r"release (\d+)\.\d+", nvcc_output("--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0].split()[1] if release else "unknown"
        raise CannotBuildError(
            f"{CUDA_HOME}/bin/nvcc has CUDA version {found}, expected that of PyTorch, {torch.version.cuda}"
        )


def architectures(listed: str) -> str:
    """Return the `COMPUTE_CAPABILITIES` that nvcc supports as a TORCH_CUDA_ARCH_LIST, with PTX for newer GPUs.

    Args:
        listed: output of `nvcc --list-gpu-arch`, lines such as `compute_90`.
    """
    known = {int(number) for number in re.findall(r"compute_(\d+)\s*$", listed, re.MULTILINE)}
    found = [capability for capability in COMPUTE_CAPABILITIES if int(capability.replace(".", "")) in known]
    if not found:
        raise CannotBuildError(f"nvcc supports none of the compute capabilities {', '.join(COMPUTE_CAPABILITIES)}")
    return ";".join(found) + "+PTX"


def first_error(output: str, otherwise: str) -> str:
    """Return the first line of a compiler's output that reports an error, cut to `LONGEST_REASON` characters."""
    lines = [line for line in output.splitlines() if ERROR_LINE.search(line)]
    return " ".join((lines[0] if lines else otherwise).split())[:LONGEST_REASON]


def extension(*, with_cuda: bool) -> Extension:
    """Return the extension with the CPU's sources or with all sources."""
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    # at::parallel_for is parallel only in sources that are compiled with OpenMP.
    flags = ["-O3", "-std=c++20", "-Wno-psabi", *(["-fopenmp"] if sys.platform.startswith("linux") else [])]
    compile_args = {"cxx": flags}
    if with_cuda:
        sources += sorted(map(str, SOURCES.glob("*.cu")))
        compile_args["nvcc"] = ["-O3", "-std=c++20"]
    make = CUDAExtension if with_cuda else CppExtension
    headers = sorted(map(str, SOURCES.glob("*.*h")))
    return make(NAME, sources, depends=headers, extra_compile_args=compile_args)


@contextlib.contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Redirect the output of this process and of the compilers that it starts to `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    before = [os.dup(number) for number in (1, 2)]
    with file.open("wb") as log:
        for number, stream in enumerate(streams, 1):
            stream.flush()
            os.dup2(log.fileno(), number)
        try:
            yield
        finally:
            for number, stream in enumerate(streams, 1):
                stream.flush()
                os.dup2(before[number - 1], number)
                os.close(before[number - 1])


class Build(BuildExtension):
    """Build both parts or, if the CUDA part cannot be built, only the CPU part."""

    outcome = ""  # one sentence
    compiler: Any  # set by setuptools

    def build_extensions(self) -> None:
        reason = "because FORCE_CPU=1 is set"
        if os.environ.get("FORCE_CPU") != "1":
            try:
                capabilities = self._build_with_cuda()
                Build.outcome = f"built {NAME} for the CPU and for CUDA, compute capabilities {capabilities}"
                return
            except CannotBuildError as error:
                why = f"the CUDA part of {NAME} cannot be built: {error}"
            if os.environ.get("FORCE_CUDA") == "1":
                sys.exit(f"error: {why}")
            reason = f"because {why}; FORCE_CUDA=1 makes this an error"
        try:
            self._build(with_cuda=False)
        except CannotBuildError as error:
            sys.exit(f"error: {NAME} cannot be built: {error}")
        Build.outcome = f"built {NAME} for the CPU only, {reason}"

    def _build_with_cuda(self) -> str:
        """Build both parts and return the compute capabilities; may raise `CannotBuildError`."""
        check_versions()
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(nvcc_output("--list-gpu-arch"))
        print(f"compiling {NAME} for the CPU and for CUDA with {CUDA_HOME}/bin/nvcc; this takes a few minutes")
        self._build(with_cuda=True)
        return os.environ.get("TORCH_CUDA_ARCH_LIST") or "of the visible GPUs"

    def _build(self, *, with_cuda: bool) -> None:
        """Compile and link with the compilers' output in a log; raise `CannotBuildError` with the first error."""
        self.force = True  # an up-to-date library may contain the CPU part only
        (found,) = self.extensions
        vars(found).update(vars(extension(with_cuda=with_cuda)))
        log = Path(self.build_temp) / ("build_cuda.log" if with_cuda else "build_cpu.log")
        compiler, self.compiler = self.compiler, copy.copy(self.compiler)  # PyTorch modifies the compiler
        try:
            with output_to(log):
                if with_cuda:
                    self._link_nothing(found)
                super().build_extensions()
        except Exception as error:
            reason = first_error(log.read_text(errors="replace"), str(error))
            where = f"CUDA_HOME is {CUDA_HOME}, " if with_cuda else ""
            raise CannotBuildError(f"{reason} ({where}full output: {log})") from error
        finally:
            self.compiler = compiler

    def _link_nothing(self, found: Extension) -> None:
        """Link an empty library, to fail at once if a dependency is missing instead of after minutes of compiling."""
        trial = str(Path(self.build_temp) / f"libraries{self.get_ext_filename('')}")
        self.compiler.link_shared_object([], trial, libraries=found.libraries, library_dirs=found.library_dirs)


if __name__ == "__main__":
    setup(ext_modules=[extension(with_cuda=False)], cmdclass={"build_ext": Build}, packages=[], py_modules=[])
    if Build.outcome:
        print(Build.outcome)
