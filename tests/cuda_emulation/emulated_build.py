"""Compile CUDA sources with g++ for the CPU, against the headers of `include/`."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from models.dn_dab_deformable_detr.ops import sampling

INCLUDE = Path(__file__).parent / "include"
OPS = Path(sampling.__file__).parent
# All but src/cpu.cpp, which registers kernels for the same tensors.
OPERATOR = [OPS / "src" / name for name in ("autograd.cpp", "operator.cpp", "cuda.cu", "forward.cu", "backward.cu")]
SANITIZERS = "address,undefined,float-cast-overflow"
REWRITES = (
    # A launch: kernel<T><<<grid, block, bytes, stream>>>(arguments).
    (r"\b(\w+(?:<[\w\s,]*>)?)<<<(.*?)>>>\s*\(", r"cuda_emulation::configured(\1, \2)("),
    (
        r"__shared__\s+([^;,\[=]+(?:<[^;\[=]*>)?)\s(\w+)((?:\[[^\]]+\])*);",
        r"auto& \2 = cuda_emulation::shared<\1\3>();",
    ),
    (r"\b__CUDA_ARCH__\b", "EMULATED_CUDA_ARCH"),
    (r"(TORCH_LIBRARY_IMPL\(\w+), CUDA,", r"\1, CPU,"),
)


def missing() -> str | None:
    """What this machine lacks to compile the sources, or None."""
    if not sys.platform.startswith("linux"):
        return "the CUDA emulation needs Linux"
    if shutil.which("g++") is None:
        return "no g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no headers of Python"
    return None


def rewritten(source: Path) -> str:
    """The text of a CUDA source in C++."""
    text = source.read_text(encoding="utf-8")
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return f'#line 1 "{source}"\n{text}'


def build(folder: Path, sources: Sequence[Path], name: str, *, sanitize: bool = False, capability: int = 90) -> Path:
    """Compile `sources` to `name` in a folder below `folder`, unless it is there; return the library's path.

    Args:
        capability: compute capability in tenths.
    """
    headers = sorted({header for source in sources for header in source.parent.glob("*.cuh")})
    texts = {path.name: rewritten(path) for path in (*headers, *sources) if path.suffix in (".cu", ".cuh")}
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wno-unknown-pragmas", f"-DEMULATED_CUDA_ARCH={10 * capability}"]
    flags += [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-g1"] if sanitize else []
    contents = [*texts.values(), *flags, name, torch.__version__, sys.version]
    read = [
        Path(__file__),
        *INCLUDE.rglob("*.h"),
        *sources,
        *(header for source in sources for header in source.parent.glob("*.h")),
    ]
    contents += [path.read_text(encoding="utf-8") for path in sorted(read)]
    folder = folder / hashlib.sha256("\0".join(contents).encode()).hexdigest()[:16]
    library = folder / name
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        _compile(folder, sources, flags, library)
    return library


def _compile(folder: Path, sources: Sequence[Path], flags: list[str], library: Path) -> None:
    """Compile and link; raise a `RuntimeError` with the compiler's errors."""
    includes = [folder, INCLUDE, *{source.parent for source in sources}, sysconfig.get_path("include")]
    includes = [f"-I{path}" for path in includes] + [f"-isystem{path}" for path in include_paths()]

    def compile_one(source: Path) -> str:
        target = f"{folder / source.name}.o"
        given = ["-include", "cuda_emulation/runtime.h", "-x", "c++", folder / source.name]
        given = given if source.suffix == ".cu" else [source]
        _run(["g++", "-c", *flags, *includes, "-o", target, *map(str, given)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    paths = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    partial = library.with_suffix(".partial")
    _run(["g++", "-shared", *flags, *objects, *paths, "-ltorch_cpu", "-lc10", "-o", str(partial)])
    partial.rename(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")


def preloaded() -> dict[str, str]:
    """Environment variables of a process that loads a library with sanitizers."""
    names = ("libasan.so", "libubsan.so")
    paths = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in names]  # fmt: skip
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
