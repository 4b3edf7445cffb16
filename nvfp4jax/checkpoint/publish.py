"""The trainer's side of a directory of steps: publishing, and removing old ones.

A directory holds steps under their numbers, one kind of model, written by `publish` alone; several processes may. What else lies
there is left alone. A step is written under another name and appears by one rename; who publishes holds the directory's lock.
"""

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from nvfp4jax import arguments
from nvfp4jax.checkpoint import orbax, saved_model
from nvfp4jax.checkpoint.errors import CheckpointError, failure
from nvfp4jax.checkpoint.locks import held
from nvfp4jax.checkpoint.safetensors import open_regular, read_json

_log = logging.getLogger(__name__)

LARGEST_STEP = 10**18 - 1
_NAME = re.compile(r"0|[1-9][0-9]{0,17}")  # no other spelling of a number is a step: '07' and '7' would be the same one
_LOCK, _WORKING, _REMOVED, _GENERATION = ".publish.lock", ".publishing", ".removed-", ".generation"
_WAIT_SECONDS = 600.0  # for another writer


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, a folder that is out of reach
        return False


def steps(directory: str | Path) -> list[int]:
    """The published steps of a directory, ascending; empty where there is no such directory. Unfinished ones have other names.

    OSError where the directory cannot be listed.
    """
    directory = arguments.path("steps: directory", directory)
    try:
        with os.scandir(directory) as entries:
            return sorted(int(entry.name) for entry in entries if _NAME.fullmatch(entry.name) and _is_folder(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []


def generation(path: Path) -> int:
    """How often the trainer had gone back before it published the step at `path`, as a number that only grows; 0 for never.

    CheckpointError where the step does not tell.
    """
    custom = read_json(path / orbax.METADATA_FILE).get("custom_metadata")
    found = custom.get("generation", 0) if isinstance(custom, dict) else 0
    if type(found) is not int or found < 0:
        raise CheckpointError(f"{path}: the metadata's generation is {str(found)[:80]!r}, which is no count")
    return found


def _newest_generation(directory: Path, present: Sequence[int]) -> int:
    """That of the directory: kept in a file from the first time that the trainer goes back, because a step may be damaged."""
    found = [0]
    try:
        opened, _ = open_regular(directory / _GENERATION)
        with opened:
            found.append(int(opened.read(20)))
    except ValueError:  # no such file, or not of ours: the steps tell
        pass
    for step in present[-8:]:
        try:
            found.append(generation(directory / str(step)))
        except CheckpointError:
            continue
    return max(found)


def _write_generation(directory: Path, era: int) -> None:
    temporary = directory / f"{_WORKING}{_GENERATION}"  # what a killed writer leaves of it goes with its other leftovers
    try:
        temporary.write_text(str(era))
        os.replace(temporary, directory / _GENERATION)
    except OSError as error:
        raise failure(f"{directory}: not published: {_GENERATION} cannot be written", error) from error


def _present(directory: Path) -> list[int]:
    try:
        return steps(directory)
    except OSError as error:
        raise failure(f"{directory}: cannot be listed", error) from error


def publish(
    directory: str | Path,
    step: int,
    model: nnx.Module,
    config: Mapping[str, Any] | None = None,
    *,
    keep: int = 5,
    rewind: bool = False,
    **metadata: Any,
) -> Path:
    """Saves a model (float or quantized) as the next step of a directory, and removes all but the newest `keep` steps.

    config: the Hugging Face config.json, which must describe this model; None for a model of your own. Further `metadata` must be JSON. A reader sees the step
    once it is complete. Several writers take turns; each has the time of the others' saves to wait.
    rewind: the trainer goes back, to this step: it may be any, and those that are not before it are removed. Readers take it though
        its number is lower than that of the weights that they serve.

    When it returns, the step is there. CheckpointError, with the directory as it was, where the step is not after the newest one,
    the config is another model's, a weight is not finite, or the step cannot be written. Old steps that cannot be removed are
    named in the log; the next `publish` tries again.
    """
    step, keep = arguments.whole("publish: step", step, 0, LARGEST_STEP), arguments.whole("publish: keep", keep, 1, LARGEST_STEP)
    directory = arguments.path("publish: directory", directory).absolute()
    arguments.module("publish: model", model)
    if config is not None:
        arguments.config("publish: config", config)
    arguments.flag("publish: rewind", rewind)
    if taken := sorted({"step", "generation", *saved_model.OWN_ENTRIES} & metadata.keys()):
        raise ValueError(f"publish: {taken[0]!r} is an entry of the step's own metadata; give yours another name")
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        what = "not a folder" if directory.exists() else "a link to what is not there"
        raise CheckpointError(f"{directory}: {what}, so nothing can be published there")
    if (difference := saved_model.other_function(model, config)) is not None:
        raise CheckpointError(f"{directory}: step {step} is not published: {difference}")
    _refuse_old(directory, step, _present(directory), rewind)
    path = directory / str(step)
    orbax.make_parent(path)
    with held(directory / _LOCK, _WAIT_SECONDS, f"{directory}: step {step} is not published"):
        present = _present(directory)
        # A later step may have come while this one waited for its turn: then nobody needs this one, but it is no mistake.
        if step in present and not rewind:
            raise CheckpointError(f"{path}: step {step} is not after step {step}, which is published already; publish a larger one")
        if step not in present:
            orbax.refuse_existing(path)
        era = _newest_generation(directory, present)
        if rewind:
            era = max(era + 1, int(time.time()))  # above all before it, even where a user has emptied the directory
        state, described = saved_model.described(model, config, step=step, generation=era, **metadata)
        _remove_leftovers(directory, step, present)
        working = directory / _WORKING
        later = [old for old in present if old >= step] if rewind else []
        hidden: list[tuple[Path, Path]] = []
        try:
            orbax.write(working, state, described, str(path))
            if rewind:
                _write_generation(directory, era)
            for old in later:
                hidden.append((_hide(directory, old), directory / str(old)))
            orbax.appear(working, path)
        except BaseException:
            for out_of_sight, place in hidden:
                os.rename(out_of_sight, place)
            raise
        finally:
            orbax.remove_unfinished(working)
        for old in sorted({*present, step} - set(later))[:-keep]:
            if old != step:
                _remove(directory, old)
        _remove_leftovers(directory, step, present)
    return path


def _refuse_old(directory: Path, step: int, present: Sequence[int], rewind: bool) -> None:
    if present and step <= present[-1] and not rewind:
        way_out = "; publish a larger one" if step == present[-1] else "; a trainer that goes back says so: rewind=True"
        raise CheckpointError(f"{directory}: step {step} is not after step {present[-1]}, which is published already{way_out}")


def _hide(directory: Path, step: int) -> Path:
    """Out of sight at once: no reader may start on half a step. Its name from then on."""
    hidden = directory / f"{_REMOVED}{step}-{secrets.token_hex(4)}"
    try:
        os.rename(directory / str(step), hidden)
    except OSError as error:
        raise failure(f"{directory / str(step)}: cannot be removed", error) from error
    return hidden


def _remove(directory: Path, step: int) -> None:
    try:
        _hide(directory, step)
    except CheckpointError as error:
        _log.warning("an old step stays for now: %s", error)


def _remove_leftovers(directory: Path, step: int, present: Sequence[int]) -> None:
    """What killed writers, and removals that did not come to their end, have left. Only the holder of the lock calls this.

    Orbax' own unfinished saves count where no other writer can be at work on them: of this step, and of those before the newest.
    """
    newest = max([step, *present])
    try:
        names = os.listdir(directory)
    except OSError as error:
        _log.warning("%s: cannot be listed for what is to be removed (%s)", directory, error.strerror)
        return
    for name in names:
        unfinished = re.fullmatch(r"([0-9]{1,18})\.orbax-checkpoint-tmp.*", name)
        if not (name.startswith((_REMOVED, _WORKING)) or (unfinished and int(unfinished[1]) <= newest)):
            continue
        path = directory / name
        failures: list[BaseException] = []
        if path.is_symlink() or not path.is_dir():  # a step that was a link: what it points to is not ours
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                failures.append(error)
        else:
            shutil.rmtree(path, onexc=lambda function, where, error: failures.append(error))
        if failures:
            _log.warning("%s: an old step's files cannot be removed yet (%s)", path, failures[0])
