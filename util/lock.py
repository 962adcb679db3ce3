"""Locks, so that only one run writes to a folder at a time."""

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

from filelock import FileLock, Timeout

from util import distributed
from util.errors import UserError, one_line
from util.files import naming, remove_leftovers
from util.logging import get_logger

LOCK_NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
LONGEST_SHOWN = 160  # characters of another run's command
WRITING_TAKES = 1.0  # most seconds from locking a file to writing the owner into it


@contextmanager
def hold_folder(folder: str | Path, shown: str = "--output_dir") -> Iterator[None]:
    """Lock `folder` against other runs, and remove temporary files that killed runs left in it.

    The system releases the lock when its process ends in any way. Of several processes, the first one locks. Releasing
    the lock removes its file and any folders that were created for it and are still empty.

    Args:
        folder: created if missing.
        shown: the option that sets it, for errors.

    Raises:
        UserError: another run uses the folder; raised in every process.
    """
    with ExitStack() as held:

        def take() -> None:
            held.callback(_Lock(Path(folder) / LOCK_NAME, f"{shown} {folder}").release)
            remove_leftovers(folder)

        distributed.on_main(take)
        yield


def check_unlocked(folder: str | Path, shown: str = "--output_dir") -> None:
    """Raise a `UserError` in every process if another run uses `folder`, like `hold_folder`, but write nothing."""

    def check() -> None:
        path = Path(folder) / LOCK_NAME
        if not path.exists():
            return
        lock = FileLock(path, blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise _other_run(f"{shown} {folder}", _read_owner(path) or {}) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        else:
            lock.release()

    distributed.on_main(check)


@contextmanager
def hold_name(path: str | Path, shown: str) -> Iterator[None]:
    """Lock a `path` that will be created by renaming, like `hold_folder`, with a lock file beside it."""
    path = Path(path)
    lock = _Lock(path.with_name(f".{path.name}{LOCK_NAME}"), f"{shown} {path}")
    try:
        remove_leftovers(path.parent, path.name)
        yield
    finally:
        lock.release()


class _Lock:
    """A locked file that names its owner."""

    def __init__(self, path: Path, shown: str) -> None:
        """Lock the file; raise a `UserError` that begins with `shown` if another process holds it."""
        self.path = path
        self.made = [parent for parent in path.absolute().parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(path, blocking=False, fallback_to_soft=False)
        if self._acquire(shown):
            try:
                # On Windows a lock keeps its owner from opening the file a second time.
                with naming(path), suppress(PermissionError):
                    path.write_text(json.dumps(_describe_owner()))
            except OSError:
                self.release()
                raise

    def _acquire(self, shown: str) -> bool:
        """Lock the file; warn and return False if the file system has no locks."""
        while True:
            try:
                self.lock.acquire()
                return True
            except Timeout:
                if (owner := _read_owner(self.path)) is not None:
                    raise _other_run(shown, owner) from None  # else it was just released
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.path.unlink(missing_ok=True)
                get_logger().warning(
                    "%s: its file system cannot lock files, so a second run there would not be noticed", shown
                )
                return False

    def release(self) -> None:
        """Release the lock and remove the empty folders that were created for it."""
        if self.lock.is_locked:
            with suppress(OSError):
                self.path.unlink()
            self.lock.release()
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def _other_run(shown: str, owner: dict[str, Any]) -> UserError:
    return UserError(f"{shown}: found {_name_owner(owner)} writing there, expected a folder that no other run uses")


def _describe_owner() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": sys.orig_argv, "started": started}


def _read_owner(path: Path) -> dict[str, Any] | None:
    """Return the owner in a lock file, {} if it is not written in time, or None if the file is gone."""
    until = time.monotonic() + WRITING_TAKES
    while True:
        try:
            owner = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            owner = None
        if isinstance(owner, dict):
            return owner
        if time.monotonic() > until:
            return {}
        time.sleep(0.01)


def _name_owner(owner: dict[str, Any]) -> str:
    """Return a description of a process for an error."""
    if not owner:
        return "another process"
    command = owner.get("command")
    line = one_line(shlex.join(map(str, command)) if isinstance(command, list) else str(command), LONGEST_SHOWN)
    return one_line(f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('started')} ({line})")
