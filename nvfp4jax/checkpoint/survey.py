"""What lies in a folder, found out before anything in it is opened: a pipe would block, a device would never end."""

import os
import stat
from pathlib import Path

from nvfp4jax.checkpoint.errors import CheckpointError, failure, may_pass
from nvfp4jax.checkpoint.safetensors import is_inside

MAX_ENTRIES = 100_000
MAX_DEPTH = 16

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
                        if not is_inside(Path(entry.path), Path(root)) or not stat.S_ISREG(os.stat(entry.path).st_mode):
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


def require_folder(directory: Path) -> None:
    """CheckpointError where there is no folder."""
    try:
        mode = os.stat(directory).st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"{directory}: no such folder") from None
        raise failure(f"{directory}: cannot be looked at", error) from None
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{directory}: a file; the folder that holds a checkpoint is needed")
