"""The unfinished work of a long run: one run at a time, known by the content of what it reads, gone on with, kept while it is right."""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nvfp4jax.checkpoint import orbax
from nvfp4jax.checkpoint.errors import CheckpointError, TransientError, failure
from nvfp4jax.checkpoint.locks import held
from nvfp4jax.checkpoint.safetensors import open_regular, read_json

_log = logging.getLogger(__name__)
_PLAN = "plan.json"


def _stats(files: Iterable[Path]) -> list[tuple]:
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in (file.stat() for file in files)]


def _digest(file: Path) -> str:
    opened, _ = open_regular(file)
    with opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Sources:
    """The files that a run reads, by content: names, sizes and times are the same in copies that hold something else."""

    def __init__(self, files: Iterable[Path]):
        self.files = sorted(set(files))
        self._stats = _stats(self.files)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            self.digests = list(pool.map(_digest, self.files))

    def check(self) -> None:
        """CheckpointError where a file was replaced or written to since: what was read of it may be of both."""
        for file, then, now in zip(self.files, self._stats, _stats(self.files), strict=True):
            if then != now:
                raise CheckpointError(f"{file}: changed while it was read; start again")


def fingerprint(sources: Sources, plan: Any) -> str:
    """Of the work: what is read, and what is to be made of it (JSON values)."""
    read = [(file.name, digest) for file, digest in zip(sources.files, sources.digests, strict=True)]
    return hashlib.sha256(json.dumps([read, plan], sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def only_run(save_dir: Path) -> Iterator[None]:
    """Holds the lock of a save_dir; CheckpointError where another run has it, or the folder is there (made while this one waited)."""
    orbax.make_parent(save_dir)
    with held(save_dir.with_name(f".{save_dir.name}.lock"), 0, str(save_dir)):
        orbax.refuse_existing(save_dir)
        yield


def _plan_of(working: Path) -> str | None:
    try:
        return str(read_json(working / _PLAN).get("fingerprint"))
    except CheckpointError:  # a run that was killed at its very beginning
        return None


def _parked(working: Path, mark: str) -> Path:
    return working.with_name(f"{working.name}-{mark[:12]}")


def working_folder(working: Path, mark: str) -> Path:
    """The folder of an interrupted run of the same work, or a fresh one; other work is put aside, and named in the log."""
    other = _plan_of(working) if working.exists() else None
    if other is not None and other != mark:
        with contextlib.suppress(OSError):
            shutil.rmtree(_parked(working, other))
        os.rename(working, _parked(working, other))
        _log.warning("%s: an interrupted run had another source or other options; its work is in %s now, remove it if nobody goes on with it",
                     working, _parked(working, other))  # fmt: skip
    if working.exists() and other is None:
        shutil.rmtree(working)
    if not working.exists() and _plan_of(_parked(working, mark)) == mark:
        os.rename(_parked(working, mark), working)
    working.mkdir(parents=True, exist_ok=True)
    for leftover in working.iterdir():
        if leftover.name.startswith("orbax"):
            shutil.rmtree(leftover)
        elif leftover.name.endswith(".tmp"):
            leftover.unlink()
    write_json(working / _PLAN, {"fingerprint": mark})
    return working


@contextlib.contextmanager
def kept_unless_bad(working: Path) -> Iterator[None]:
    """Bad input leaves nothing behind; a full disk, a missing permission or an interruption leave the work, and one line."""
    try:
        yield
    except (OSError, TransientError) as error:
        told = failure(f"{working}: the run cannot go on; what is done is kept there, and started again it goes on from it", error)
        raise TransientError(str(told)) from error
    except (ValueError, NotImplementedError):
        shutil.rmtree(working, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def appear(working: Path, finished: Path, save_dir: Path) -> None:
    """The finished folder, `working` or one in it, becomes save_dir; what only a resumed run needs goes."""
    try:
        orbax.appear(finished, save_dir)
    except CheckpointError as error:
        raise TransientError(str(error)) from None  # the work is right, its name is the trouble
    rest = save_dir if finished == working else working
    for leftover in [*rest.glob("*.report.json"), rest / _PLAN]:
        with contextlib.suppress(OSError):
            leftover.unlink(missing_ok=True)
    if finished != working:
        shutil.rmtree(working, ignore_errors=True)
