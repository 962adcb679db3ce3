"""Files that are either wholly there or not at all: write beside the target, flush to disk, rename over it."""

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

# Which process a temporary file belongs to; files of an older version name no host.
OWNER = r"(?P<pid>\d+)(?:@(?P<host>[A-Za-z0-9-]+))?"
TEMPORARY = re.compile(rf"\.(?P<name>.+)\.{OWNER}\.tmp")
PROBE_SECONDS = 600  # older ones are of processes that were killed: one is there for a millisecond
PROBE = re.compile(rf"\.probe-{OWNER}-.*")
ABANDONED_SECONDS = 24 * 3600  # no file takes so long to write, and no two clocks differ by so much


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an `OSError` of reading or writing name `path`, where the system does not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def temporary_of(path: Path) -> Path:
    """The name beside `path` under which this process makes what is then renamed to it."""
    return path.with_name(f".{path.name}.{_owner()}.tmp")


def _owner() -> str:
    """This process among those of all hosts that share a file system."""
    return f"{os.getpid()}@{_host()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "-"


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove what killed processes were writing in `folder` (of the file `name` alone); call it before writing.

    A process of another host cannot be looked up from here: what it wrote last more than a day ago is removed.
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
    """Whether this host has no other process of that number."""
    if int(pid) == os.getpid():
        return True
    if sys.platform == "win32":  # where signal 0 is Ctrl-C
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def _is_old(path: Path, seconds: float) -> bool:
    """Whether nothing was written there for so long; False where it is gone."""
    try:
        return time.time() - path.stat().st_mtime > seconds
    except FileNotFoundError:  # another process has just removed it
        return False


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill `path` by `write(binary stream)`; a crash, a full disk or a kill leaves the old file as it was."""
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
    """Write `text` as UTF-8, atomically; bytes of file names that are no UTF-8 are escaped."""
    write_atomic(path, lambda stream: stream.write(text.encode(errors="backslashreplace")))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save_torch(path: str | Path, value: Any) -> None:
    """`torch.save`, atomically; by way of memory, since torch hides what the disk says."""
    content = io.BytesIO()
    torch.save(value, content)
    write_atomic(path, lambda stream: stream.write(content.getbuffer()))


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file's bytes, atomically."""
    write_atomic(target, lambda stream: stream.write(Path(source).read_bytes()))


def append_json_line(path: str | Path, value: Any) -> None:
    """Append `value` as one line of JSON and flush it to disk; where that fails the file is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(value) + "\n").encode()
    with naming(path), path.open("ab", buffering=0) as stream:
        length = stream.seek(0, os.SEEK_END)
        try:
            while line:  # a full disk may take a part
                line = line[stream.write(line) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(length)
            raise


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_name(path: str | Path) -> Path:
    """The first of `a.1.txt`, `a.2.txt`, ... that is not there, for `a.txt`."""
    path, number = Path(path), 1
    while (older := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return older


def move_aside(path: str | Path) -> Path | None:
    """Rename an existing file to its `free_name`; returns that, None without one."""
    path = Path(path)
    return path.rename(free_name(path)) if path.exists() else None


def check_output_dir(path: str | Path) -> Path:
    """Return `path` if it is a folder or can become one, without making it.

    Raises:
        UserError: a file is in the way, or nothing can be written there.
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
        # Permissions do not tell all, so the missing folders are made once: under a name of this process alone.
        with tempfile.TemporaryDirectory(prefix=f".probe-{_owner()}-", dir=nearest) as probe:
            Path(probe, *missing).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output_dir {path}: found no way to write there ({reason}), expected a folder") from None
    return path


def _remove_old_probes(folder: Path) -> None:
    for path in folder.iterdir():
        if PROBE.fullmatch(path.name) and _is_old(path, PROBE_SECONDS):
            shutil.rmtree(path, ignore_errors=True)
