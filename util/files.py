"""Files that are either wholly there or not at all: write beside the target, flush to disk, rename over it."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from util.errors import UserError


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill `path` by `write(binary stream)`; a crash, a full disk or a kill leaves the old file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write itself does not know it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomic(path, lambda stream: stream.write(text.encode()))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save_torch(path: str | Path, value: Any) -> None:
    """`torch.save`, atomically; by way of memory, since torch hides what the disk says."""
    content = io.BytesIO()
    torch.save(value, content)
    write_atomic(path, lambda stream: stream.write(content.getbuffer()))


def append_json_line(path: str | Path, value: Any) -> None:
    """Append `value` as one line of JSON and flush it to disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(value) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def move_aside(path: str | Path) -> Path | None:
    """Rename an existing `a.txt` to the first free one of `a.1.txt`, `a.2.txt`, ...; returns that, None without one."""
    path = Path(path)
    if not path.exists():
        return None
    number = 1
    while (older := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(older)


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
        # Permissions do not tell all, so the missing folders are made once: under a name of this process alone.
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=nearest) as probe:
            Path(probe, *missing).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output_dir {path}: found no way to write there ({reason}), expected a folder") from None
    return path
