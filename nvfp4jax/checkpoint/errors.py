"""What goes wrong with a checkpoint, in one line: for good, or for this time."""

import errno

# Errors of a file system that say something about what lies there; all others may pass (a stale mount, a full table of files, ...).
_FINAL = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST, errno.ENOTEMPTY)
# What TensorStore, XLA and operating systems call errors that may pass.
_PASSING = (
    "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "PERMISSION_DENIED", "out of memory", "cannot allocate",
    "timed out", "too many open files", "input/output error", "stale file handle", "no space left", "disk quota", "device or resource busy",
    "permission denied", "resource temporarily unavailable", "interrupted system call",
)  # fmt: skip
_DAMAGE = (ValueError, LookupError, TypeError, EOFError, AssertionError, RecursionError, AttributeError, ArithmeticError)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message is one printable line that names the file or tensor."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:1500]))


class TransientError(CheckpointError):
    """What could not be read or written this time: the next attempt may succeed, nothing says that the checkpoint is damaged."""


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
