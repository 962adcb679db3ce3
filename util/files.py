"""Atomic file writes: write a temporary file beside the target, flush it to disk, rename it over the target."""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from util.errors import UserError

# The process that owns a temporary file; files of older versions have no host name.
OWNER = r"(?P<pid>\d+)(?:@(?P<host>[A-Za-z0-9-]+))?"
TEMPORARY = re.compile(rf"\.(?P<name>.+)\.{OWNER}\.tmp")
PROBE_SECONDS = 600  # a probe exists for a millisecond; older ones belong to killed processes
PROBE = re.compile(rf"\.probe-{OWNER}-.*")
ABANDONED_SECONDS = 24 * 3600  # longer than any write and than the clocks of two hosts differ


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add `path` to an `OSError` raised inside that has no file name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def temporary_of(path: Path) -> Path:
    """Return the name beside `path` that this process writes to before renaming it."""
    return path.with_name(f".{path.name}.{_owner()}.tmp")


def _owner() -> str:
    """Return the name of this process, unique among all hosts that share a file system."""
    return f"{os.getpid()}@{_host()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "-"


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove temporary files of killed processes from `folder` (only those of the file `name`, if given).

    Call it before writing. Processes of other hosts cannot be checked: their files are removed after a day.
    """
    for path in Path(folder).iterdir():
        match = TEMPORARY.fullmatch(path.name) or PROBE.fullmatch(path.name)
        if match is None or (name is not None and match.groupdict().get("name") != name):
            continue
        is_elsewhere = match["host"] not in (None, _host())
        if not (_is_old(path, ABANDONED_SECONDS) if is_elsewhere else _has_ended(match["pid"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _has_ended(pid: str) -> bool:
    """Return whether no other process of this host has the id `pid`."""
    if int(pid) == os.getpid():
        return True
    if sys.platform == "win32":  # signal 0 is Ctrl-C there
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def _is_old(path: Path, seconds: float) -> bool:
    """Return whether `path` was last written more than `seconds` ago; False if it does not exist."""
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:  # removed by another process
        return False


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill `path` by `write(binary stream)`; after a crash, a full disk or a kill the old file is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with naming(path):
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; file name bytes that are not UTF-8 are escaped."""
    write_atomic(path, lambda stream: stream.write(text.encode(errors="backslashreplace")))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save_torch(path: str | Path, value: Any) -> None:
    """Call `torch.save` atomically; it saves to memory first because torch hides errors of the disk."""
    content = io.BytesIO()
    torch.save(value, content)
    write_atomic(path, lambda stream: stream.write(content.getbuffer()))


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file's bytes, atomically."""
    write_atomic(target, lambda stream: stream.write(Path(source).read_bytes()))


def append_json_line(path: str | Path, value: Any) -> None:
    """Append `value` as one line of JSON and flush it to disk; on failure the file is unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(value) + "\n").encode()
    with naming(path), path.open("ab", buffering=0) as stream:
        length = stream.seek(0, os.SEEK_END)
        try:
            while line:  # a nearly full disk may accept only a part
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(length)
            raise


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_name(path: str | Path) -> Path:
    """Return the first of `a.1.txt`, `a.2.txt`, ... that does not exist, for the path `a.txt`."""
    path, number = Path(path), 1
    while (older := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return older


def move_aside(path: str | Path) -> Path | None:
    """Rename an existing file to its `free_name` and return that; return None if there is no file."""
    path = Path(path)
    return path.rename(free_name(path)) if path.exists() else None


def check_output_dir(path: str | Path) -> Path:
    """Return `path` if it is a writable folder or can be created as one, without creating it.

    Raises:
        UserError: a parent is a file, or the folder is not writable.
    """
    path = Path(path)
    nearest, missing = path.absolute(), []
    try:
        while not nearest.exists():
            missing.insert(0, nearest.name)
            nearest = nearest.parent
        if not nearest.is_dir():
            raise UserError(f"--output_dir {path}: {nearest} is a file, expected a folder")
        _remove_old_probes(nearest)
        # Permissions alone do not show what is possible, so create the missing folders in a folder of this process.
        with tempfile.TemporaryDirectory(prefix=f".probe-{_owner()}-", dir=nearest) as probe:
            Path(probe, *missing).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output_dir {path}: cannot be written ({reason}), expected a folder") from None
    return path


def _remove_old_probes(folder: Path) -> None:
    for path in folder.iterdir():
        if PROBE.fullmatch(path.name) and _is_old(path, PROBE_SECONDS):
            shutil.rmtree(path, ignore_errors=True)


def free_disk(folder: Path) -> int:
    """Return the free bytes of the file system that a folder is on, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
