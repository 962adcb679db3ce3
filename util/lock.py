"""One run writes to a folder at a time."""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from util import distributed
from util.errors import UserError
from util.files import naming, remove_leftovers
from util.logging import get_logger

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

LOCK_NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LONGEST_SHOWN = 160  # characters of another run's command
WRITING_TAKES = 1.0  # seconds at most, from the moment a lock is held to the moment its file says by whom

_held: set[int] = set()  # file descriptors of the locks of this process


def _close_in_child() -> None:
    # A lock lasts as long as any process has its file open: workers must not keep that of a run that was killed.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold_folder(folder: str | Path, shown: str = "--output_dir") -> Iterator[None]:
    """Inside, no other run gets hold of `folder`; temporary files that killed runs left in it are removed.

    The system gives a lock back when its process ends, however it ends. With several processes the first one locks.
    The lock's file goes when the lock does, and with it the folders that were made for it and are still empty.

    Args:
        folder: made if it is not there.
        shown: the option that named it.

    Raises:
        UserError: in every process: another run has the folder.
    """
    with ExitStack() as held:

        def take() -> None:
            held.callback(_Lock(Path(folder) / LOCK_NAME, f"{shown} {folder}").release)
            remove_leftovers(folder)

        distributed.on_main(take)
        yield


@contextmanager
def hold_name(path: str | Path, shown: str) -> Iterator[None]:
    """As `hold_folder` for a `path` that is to appear at once, by renaming: the lock lies beside it."""
    path = Path(path)
    lock = _Lock(path.with_name(f".{path.name}{LOCK_NAME}"), f"{shown} {path}")
    try:
        remove_leftovers(path.parent, path.name)
        yield
    finally:
        lock.release()


class _Lock:
    """A locked file that says who has it."""

    def __init__(self, path: Path, shown: str) -> None:
        """Raises a `UserError` that begins with `shown` where another process has it."""
        self.path = path
        self.made = [parent for parent in path.absolute().parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = self._open(shown)
        if self.descriptor is not None:
            _held.add(self.descriptor)
            try:
                with naming(path):
                    os.ftruncate(self.descriptor, 0)
                    os.pwrite(self.descriptor, json.dumps(_who_we_are()).encode(), 0)
            except OSError:
                self.release()
                raise

    def _open(self, shown: str) -> int | None:
        """The descriptor of the locked file; None, and a warning, where the file system has no locks."""
        if fcntl is None:
            return _warn(shown, "this system")
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before removes the file while it has the lock: what was waited for may be gone.
                if _is_same_file(descriptor, self.path):
                    return descriptor
            except OSError as error:
                os.close(descriptor)
                if error.errno in UNSUPPORTED:
                    self.path.unlink(missing_ok=True)
                    return _warn(shown, "its file system")
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                if (holder := _read_holder(self.path)) is not None:
                    raise UserError(
                        f"{shown}: found {_told(holder)} writing there, expected a folder that no other run uses"
                    ) from None
                continue  # it has just been given back
            os.close(descriptor)

    def release(self) -> None:
        """Give it back, with the folders that were made for it and are empty."""
        if self.descriptor is not None:
            with suppress(OSError):
                self.path.unlink()
            _held.discard(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def _warn(shown: str, what: str) -> None:
    get_logger().warning("%s: %s cannot lock files, so a second run there would not be noticed", shown, what)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _who_we_are() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": sys.orig_argv, "started": started}


def _read_holder(path: Path) -> dict[str, Any] | None:
    """What the file of a lock says, {} where it says nothing in time; None where it is gone."""
    until = time.monotonic() + WRITING_TAKES
    while True:
        try:
            holder = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            holder = None
        if isinstance(holder, dict):
            return holder
        if time.monotonic() > until:
            return {}
        time.sleep(0.01)


def _told(holder: dict[str, Any]) -> str:
    """A process as a sentence names it."""
    if not holder:
        return "another process"
    command = holder.get("command")
    line = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    line = line if len(line) <= LONGEST_SHOWN else f"{line[:LONGEST_SHOWN]}..."
    told = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('started')} ({line})"
    return " ".join(told.split())
