"""What lies in a folder, found out before anything in it is opened: a pipe would block, a device would never end."""

import errno
import os
import stat
from pathlib import Path

from nvfp4jax.checkpoint.safetensors import CheckpointError, TransientError

MAX_ENTRIES = 100_000
MAX_DEPTH = 16
# Errors of a file system that say something about what lies there; all others may pass (a stale mount, a full table of files, ...).
_FINAL = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST, errno.ENOTEMPTY)
# What TensorStore, XLA and operating systems call errors that may pass.
_PASSING = (
    "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "PERMISSION_DENIED", "out of memory", "cannot allocate",
    "timed out", "too many open files", "input/output error", "stale file handle", "no space left", "disk quota", "device or resource busy",
    "permission denied", "resource temporarily unavailable", "interrupted system call",
)  # fmt: skip
_DAMAGE = (ValueError, LookupError, TypeError, EOFError, AssertionError, RecursionError, AttributeError, ArithmeticError)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed, as far as the error tells; an error of an unknown kind may."""
    if isinstance(error, CheckpointError):
        return isinstance(error, TransientError)
    text = str(error).lower()
    if any(word.lower() in text for word in _PASSING):
        return True
    if isinstance(error, OSError):
        return error.errno not in _FINAL
    return not isinstance(error, _DAMAGE) and not any(word in text for word in ("data_loss", "not_found", "invalid_argument", "failed_precondition"))


def failure(message: str, error: BaseException) -> CheckpointError:
    """A CheckpointError of one line, `message` (what went wrong); transient where the error may pass."""
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, CheckpointError):
        reason = str(error)
    return (TransientError if may_pass(error) else CheckpointError)(f"{message} ({reason})")


def signature(folder: Path) -> tuple[tuple, str | None]:
    """(what tells this content from another, without reading it; what no reader should open, or None).

    The first is the names, sizes, inodes and times of all files below `folder`, empty where it cannot be listed. Only regular
    files and folders may lie there, and links to regular files inside `folder`.
    """
    found: list[tuple] = []
    problem = None
    try:
        root = os.path.realpath(folder, strict=True)
        pending = [(root, 0)]
        while pending:
            directory, depth = pending.pop()
            with os.scandir(directory) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    relative = os.path.relpath(entry.path, root)
                    found.append((relative, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode))
                    if stat.S_ISDIR(status.st_mode):
                        pending.append((entry.path, depth + 1))
                    elif stat.S_ISLNK(status.st_mode):
                        target = os.path.realpath(entry.path)
                        if os.path.commonpath([root, target]) != root or not stat.S_ISREG(os.stat(target).st_mode):
                            problem = f"{relative} is a link to something else than a file of this folder"
                    elif not stat.S_ISREG(status.st_mode):
                        problem = f"{relative} is neither a file nor a folder"
            if len(found) > MAX_ENTRIES or depth > MAX_DEPTH:
                return tuple(sorted(found)), f"more than {MAX_ENTRIES} entries, or folders more than {MAX_DEPTH} deep"
    except OSError as error:
        if may_pass(error):
            raise failure(f"{folder}: cannot be listed", error) from error
        problem = problem or f"{os.fsdecode(error.filename or folder)}: {error.strerror}"
    return tuple(sorted(found)), problem


def require_plain(folder: Path) -> None:
    """CheckpointError where something lies in a folder that no reader should open; TransientError where it cannot be listed now."""
    if (problem := signature(folder)[1]) is not None:
        raise CheckpointError(f"{folder}: {problem}")
