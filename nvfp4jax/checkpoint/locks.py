"""One holder at a time, across threads, processes and, where the file system takes part, machines."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from nvfp4jax.checkpoint.errors import CheckpointError

_log = logging.getLogger(__name__)


def _open(path: Path) -> int:
    # A link or a pipe under this name is nobody's lock, and opening a pipe could wait for ever.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointError(f"{path}: not a regular file, so it cannot serve as a lock; remove it")
    return file


def _is_still_there(file: int, path: Path) -> bool:
    """Whether the file that was locked is the one that others find: its last holder may have removed it since it was opened."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), found)


@contextlib.contextmanager
def held(path: Path, wait_seconds: float, what: str) -> Iterator[None]:
    """Holds the lock file `path`, which is there for as long as it is held; a holder that is killed lets go.

    CheckpointError, "`what`: <who> is at work there", where another holds it and does not let go within `wait_seconds`.
    """
    end = time.monotonic() + wait_seconds
    while True:
        try:
            file = _open(path)
        except OSError as error:
            raise CheckpointError(f"{path}: the lock cannot be taken ({error.strerror}); is the folder writable?") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            if time.monotonic() >= end:
                raise CheckpointError(f"{what}: {holder} is at work there") from None
            time.sleep(0.01)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                os.close(file)
                raise CheckpointError(f"{path}: the lock cannot be taken ({error.strerror})") from error
            _log.warning("%s: this file system has no locks (%s); let one writer alone use the folder", path, error.strerror)
        if _is_still_there(file, path):
            break
        os.close(file)
    try:
        with contextlib.suppress(OSError):  # a full disk: the name is only told to others
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # also for children that were forked meanwhile and have the file still open
        os.close(file)
