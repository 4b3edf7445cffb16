"""Orbax, in one file: arrays saved, checked, and restored into a given sharding. `saved_model` makes models of them.

A folder holds the tree of a model's parameters under their paths, and metadata with which it restores without any other input:

    format_version  of this layout
    recipe          the quantizer's contract and the activation mode, e.g. "te-exact/token"
    config, rules   the Hugging Face config (null for a model of a user's own) and the swap rules that rebuild the model
    digests         one for each leaf, checked after each load (Orbax itself notices no flipped byte)
    leaves          dtype and shape of each leaf: asking Orbax for them opens every array, and leaks memory in TensorStore 0.1.86

Orbax casts dtypes in silence on loading, and its storage raises bare exceptions on damage; here tree, shapes and dtypes are compared
before a byte is read, and every failure is a CheckpointError that names the folder.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.futures.future import AwaitableSignalsContract
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.experimental import v1 as ocp

from nvfp4jax import arguments
from nvfp4jax.checkpoint.digest import check
from nvfp4jax.checkpoint.errors import CheckpointError, failure
from nvfp4jax.checkpoint.locks import held
from nvfp4jax.checkpoint.safetensors import read_json
from nvfp4jax.checkpoint.survey import require_folder, require_plain

FORMAT_VERSION = 1
# A leaf beside the model's: scales that it does not hold but an export needs; the metadata's entry of this name has their names.
EXTRAS = "extras"
METADATA_FILE = "_CHECKPOINT_METADATA"
_WATCH_SECONDS = 1.0
# What the JSON beside the arrays may have: a hundred thousand leaves take a third of it.
MAX_JSON_BYTES = 50_000_000


def flatten(state: Any) -> dict[str, Any]:
    """Leaves of a pytree (an nnx.State, an nnx.Module, nested dicts) by path, e.g. 'layers/0/mlp/up_proj/kernel'."""

    def part(key) -> str:
        return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))

    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":  # inside an nnx.Variable
            path = path[:-1]
        leaves["/".join(map(part, path))] = leaf
    return leaves


def _nested(leaves: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


# Orbax numbers its operations by one counter of the process: a load that begins while a save runs has made the save fail.
_one_at_a_time = threading.RLock()


_uvloop = getattr(asyncio_utils, "uvloop", None)  # None where Orbax runs without it


async def _ended() -> None:
    """Ends the other tasks of this loop and takes what they raise."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # what has failed already is handed over now


class _Ending:
    """Orbax closes its event loop when one read fails, and leaves the tasks of the others as they are: each complains when it is collected,
    of what it raised, or of a loop that is closed. Here a loop ends its tasks first; what threads tell it afterwards is wanted by nobody."""

    def close(self: Any) -> None:
        if not self.is_closed():
            self.run_until_complete(_ended())
        super().close()

    def call_soon_threadsafe(self: Any, callback: Callable, *arguments: Any, **options: Any) -> Any:
        try:
            return super().call_soon_threadsafe(callback, *arguments, **options)
        except RuntimeError:
            if not self.is_closed():
                raise


class _Loop(_Ending, asyncio.SelectorEventLoop):
    pass


class _UvLoop(_Ending, _uvloop.Loop if _uvloop else asyncio.SelectorEventLoop):
    pass


warnings.filterwarnings("ignore", r"coroutine 'Store\._get_array_metadatas' was never awaited", RuntimeWarning)  # begun by nobody


@functools.lru_cache(8)
def _file_spec(path: str) -> Any:
    """The spec of a folder of files, which answers what Orbax asks without asking TensorStore again."""
    made = tensorstore.KvStore.Spec({"driver": "file", "path": path}).to_json()
    return types.SimpleNamespace(to_json=lambda: dict(made))


def _kvstore_spec(spec: Any) -> Any:
    is_file = isinstance(spec, Mapping) and set(spec) == {"driver", "path"} and spec["driver"] == "file"
    return _file_spec(spec["path"]) if is_file else tensorstore.KvStore.Spec(spec)


_kvstore = types.SimpleNamespace(Spec=_kvstore_spec, open=tensorstore.KvStore.open)
_tensorstore = types.SimpleNamespace(**vars(tensorstore) | {"KvStore": _kvstore})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Orbax without some of its habits: tracebacks on stderr after a failed read, and two leaks. Its own functions are back afterwards.

    TensorStore (0.1.86) leaks whatever it makes in JSON. Orbax asks for its metrics in each load and save, how many bytes went, to log a
    rate; and for the form of the folder's spec, for each array.
    """
    changes = {
        "asyncio": (asyncio_utils, types.SimpleNamespace(**vars(asyncio) | {"new_event_loop": _Loop})),
        "uvloop": (asyncio_utils, types.SimpleNamespace(new_event_loop=_UvLoop)),
        "get_tensorstore_raw_bytes": (tensorstore_utils, lambda *a, **k: 0),
        "ts": (tensorstore_utils, _tensorstore),
    }
    usual = {name: getattr(module, name) for name, (module, _) in changes.items() if getattr(module, name, None) is not None}
    for name in usual:
        setattr(changes[name][0], name, changes[name][1])
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(changes[name][0], name, value)


@contextlib.contextmanager
def _unblocked(path: Path) -> Iterator[None]:
    """A pipe that takes a file's place after the folder was looked at would block the load for ever, and every other load and save of
    the process behind it. Who opens it for writing, and closes it, lets the load go on, to its error."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_SECONDS):
            for file in path.rglob("*"):
                with contextlib.suppress(OSError):
                    if file.is_fifo():
                        os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))

    watcher = threading.Thread(target=watch, name="nvfp4jax-pipes", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _attempt(message: str, call: Callable, *arguments: Any, **options: Any) -> Any:
    """What the call returns, or one CheckpointError with `message`: storage and parser raise what they like, bare Exception included."""
    try:
        with _one_at_a_time, _quietly():
            return call(*arguments, **options)
    except Exception as error:
        told = failure(message, error)
    raise told


def exists(path: str | Path) -> bool:
    """Whether `path` is an Orbax folder (of ours or not)."""
    path = arguments.path("directory", path)
    return path.is_dir() and (path / METADATA_FILE).is_file()


def refuse_existing(path: Path) -> None:
    try:
        there = path.exists() or path.is_symlink()
    except OSError as error:  # a name that is too long
        raise failure(f"{path}: cannot be looked at", error) from None
    if there:
        raise CheckpointError(f"{path}: exists already; give the name of a new folder, or remove this one")


def save(path: str | Path, state: Any, metadata: Mapping[str, Any]) -> None:
    """Saves a state (any pytree of arrays) under a new folder: there is all of it, or nothing.

    metadata: JSON values, with "recipe", "config" and "rules" at least where a model is to be rebuilt from the folder;
    "format_version" and "digests" are added. CheckpointError where the folder exists, another save into it is at work, a leaf is
    NaN or infinite, or it cannot be written.
    """
    path = arguments.path("save: path", path).absolute()
    leaves = flatten(state)
    if not leaves or any(not hasattr(leaf, "dtype") for leaf in leaves.values()):
        raise CheckpointError(f"{path}: not saved: state: {arguments.shown(state)} is no tree of arrays")
    if not isinstance(metadata, Mapping):
        raise CheckpointError(f"{path}: not saved: metadata: a dict of JSON values is needed, not {arguments.shown(metadata)}")
    refuse_existing(path)
    make_parent(path)
    with held(path.with_name(f".{path.name}.lock"), 0, str(path)):
        refuse_existing(path)
        working = path.with_name(f".{path.name}.saving")
        remove_unfinished(working)
        try:
            write(working, state, metadata, str(path))
            appear(working, path)
        finally:
            remove_unfinished(working)


def make_parent(path: Path) -> None:
    """Makes the folder that `path` is to lie in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failure(f"{path.parent}: the folder cannot be made", error) from error


def appear(working: Path, path: Path) -> None:
    """A finished folder gets its name, at once and whole; CheckpointError where something has that name already."""
    try:
        os.rename(working, path)
    except OSError as error:
        refuse_existing(path)
        raise failure(f"{path}: cannot be given its name", error) from error


def remove_unfinished(path: Path) -> None:
    """Removes what a save to `path` has left that did not come to its end, under its own names and Orbax's."""
    names = re.compile(re.escape(path.name) + r"(\.orbax-checkpoint-tmp.*|\.partial_save.*)?", re.DOTALL)
    if not path.parent.is_dir():
        return
    for name in os.listdir(path.parent):
        if names.fullmatch(name):
            shutil.rmtree(path.parent / name, ignore_errors=True)


def write(path: Path, state: Any, metadata: Mapping[str, Any], name: str) -> None:
    """`save` without its guard against other writers, for who has one; `name` is what errors call the folder."""
    leaves = flatten(state)
    try:
        for place, leaf in leaves.items():
            arguments.held(place, leaf)
    except ValueError as error:
        raise CheckpointError(f"{name}: not saved: {error}") from None
    full = {"format_version": FORMAT_VERSION, **metadata, "digests": _digests(name, leaves), "leaves": _told(leaves)}
    try:
        json.dumps(full)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not saved: the metadata are no JSON ({error})") from None
    _save(f"{name}: not saved", ocp.save, path, _nested(leaves), custom_metadata=full)


def _digests(path: Path | str, leaves: Mapping[str, Any]) -> dict[str, str]:
    digests, complaints = check(dict(leaves))
    if complaints:
        raise CheckpointError(f"{path}: not saved: {complaints[0]}")
    return digests


def _told(leaves: Mapping[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def _writing() -> ocp.Context:
    """Packed codes do not compress: without zstd a save takes half the time, and a load is one copy."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.asynchronous.create_directories_asynchronously = False  # else a save fails when a load begins beside it
    return context


def _save(message: str, call: Callable, *arguments: Any, **options: Any) -> None:
    """`_attempt` of a save. Orbax notes in each one that its folders are made, for whoever waits for them, and keeps
    the notes of all saves for ever where it does not make folders asynchronously."""

    def saved() -> None:
        try:
            call(*arguments, **options)
        finally:
            AwaitableSignalsContract.remove_all_awaitable_signals()  # of this save; the next one has another number

    with _writing():
        _attempt(message, saved)


class PartialSave:
    """A folder saved piece by piece, so that a large model needs the memory of one piece.

    add(leaves) any number of times, each leaf once; finish(metadata) makes the folder appear. Nothing is at `path` before.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        refuse_existing(self.path)
        self._digests: dict[str, str] = {}
        self._leaves: dict[str, list] = {}
        self.discard()

    def discard(self) -> None:
        """Removes what an unfinished save has left beside `path`."""
        remove_unfinished(self.path)

    def add(self, leaves: Mapping[str, Any]) -> None:
        self._digests |= _digests(self.path, leaves)
        self._leaves |= _told(leaves)
        _save(f"{self.path}: not saved", ocp.partial.save, self.path, _nested(leaves))

    def finish(self, leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Adds the last leaves (at least one) and the metadata; the folder appears."""
        self._digests |= _digests(self.path, leaves)
        self._leaves |= _told(leaves)
        full = {"format_version": FORMAT_VERSION, **metadata, "digests": self._digests, "leaves": self._leaves}
        _save(f"{self.path}: not saved", ocp.partial.save, self.path, _nested(leaves), custom_metadata=full)
        _save(f"{self.path}: not saved", ocp.partial.finalize, self.path)


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder says of itself. Reading that takes half a millisecond a leaf: functions that read on take it for the path."""

    path: Path
    metadata: dict[str, Any]  # as given to `save`, with "format_version" and "digests"
    shapes: dict[str, jax.ShapeDtypeStruct]  # by leaf path, as stored


def read_folder(path: str | Path | Folder) -> Folder:
    """CheckpointError for a folder that is damaged, not ours, or of a later format."""
    if isinstance(path, Folder):
        return path
    path = arguments.path("path", path).absolute()
    require_folder(path)
    require_plain(path)
    for file in path.rglob("*"):
        if (file.name.startswith("_") or file.parent.name == "array_metadatas") and file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
    if not (path / METADATA_FILE).exists():
        raise CheckpointError(f"{path}: not a readable Orbax checkpoint (no {METADATA_FILE})")
    metadata = read_json(path / METADATA_FILE).get("custom_metadata")
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise CheckpointError(f"{path}: an Orbax checkpoint without nvfp4jax's metadata (format_version, recipe, digests)")
    version = metadata["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r}; this release reads {FORMAT_VERSION}")
    leaves = metadata.pop("leaves", None)
    return Folder(path, metadata, _shapes_on_disk(path) if leaves is None else _shapes_told(path, leaves))


def _shapes_told(path: Path, leaves: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What the metadata say of the leaves. If it is not so, loading them fails: by their shape, or by their digest."""
    shapes = {}
    for name, entry in leaves.items() if isinstance(leaves, dict) else [("leaves", leaves)]:
        try:
            dtype, shape = entry
            dtype = jnp.dtype(dtype)
        except (TypeError, ValueError):
            raise CheckpointError(f"{path}: the metadata's dtype and shape of {name[:80]!r} cannot be read: {str(entry)[:80]}") from None
        if not isinstance(shape, list) or len(shape) > 32 or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise CheckpointError(f"{path}: the metadata's shape of {name[:80]!r} is none: {str(shape)[:80]}")
        shapes[name] = jax.ShapeDtypeStruct(tuple(shape), dtype)
    return shapes


def _shapes_on_disk(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """What Orbax finds on disk; for folders that do not tell themselves."""
    found = _attempt(f"{path}: not a readable Orbax checkpoint", ocp.metadata, path)
    shapes = {}
    for name, leaf in flatten(found.metadata).items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(f"{path}: {name} is no array")
        shapes[name] = jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
    return shapes


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps `stored` leaves from serving as `wanted`: missing, extra, another shape or dtype; one line a leaf."""
    lines = [f"{path} is missing" for path in wanted if path not in stored]
    lines += [f"{path} is not expected" for path in stored if path not in wanted]
    for path in wanted:
        if path in stored:
            have, want = stored[path], wanted[path]
            if tuple(have.shape) != tuple(want.shape):
                lines.append(f"{path} has shape {tuple(have.shape)}, expected {tuple(want.shape)}")
            elif np.dtype(have.dtype) != np.dtype(want.dtype):
                lines.append(f"{path} has dtype {have.dtype}, expected {want.dtype}")
    return lines


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    """Always with a sharding: without one Orbax would use the saved topology's."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore_leaves(path: str | Path | Folder, wanted: Mapping[str, Any], *, subset: bool = False) -> dict[str, jax.Array]:
    """Leaves by path, each in the shape, dtype and sharding of `wanted`'s (arrays or ShapeDtypeStructs), all checked.

    Compared before any array's bytes are read: tree, shapes, dtypes. Checked afterwards, on the device: each leaf's digest, that
    weights and scales are finite and global scales positive and not inverted. `subset`: the folder may hold more than is wanted.
    CheckpointError names the folder and the leaf.
    """
    folder = read_folder(path)
    path, stored = folder.path, folder.shapes
    skipped = {name: ocp.PLACEHOLDER for name in stored if name not in wanted and (subset or name == EXTRAS)}
    lines = differences({name: leaf for name, leaf in stored.items() if name not in skipped}, wanted)
    if lines:
        raise CheckpointError(f"{path}: {lines[0]}" + (f" (and {len(lines) - 1} more differences)" if len(lines) > 1 else ""))
    expected = folder.metadata.get("digests")
    if not isinstance(expected, dict) or set(expected) != set(stored):
        raise CheckpointError(f"{path}: the metadata's digests do not cover the leaves")
    abstract = _nested({name: _abstract(leaf) for name, leaf in wanted.items()} | skipped)
    with _unblocked(path):
        tree = _attempt(f"{path}: cannot be read", ocp.load, path, abstract)
    loaded = flatten(tree)
    leaves = {name: loaded[name] for name in wanted}
    digests, complaints = check(leaves)
    for name, value in digests.items():
        if value != expected[name]:
            raise CheckpointError(f"{path}: {name}: its bytes do not match the digest in the metadata: the file is damaged")
    if complaints:
        raise CheckpointError(f"{path}: {complaints[0]}")
    return leaves


def restore_extras(path: str | Path | Folder) -> dict[str, np.ndarray]:
    """Scales kept beside the model, f32 [] by the tensor names of ModelOpt; empty where there are none."""
    folder = read_folder(path)
    if EXTRAS not in folder.shapes:
        return {}
    names = folder.metadata.get(EXTRAS)
    values = np.asarray(restore_leaves(folder, {EXTRAS: folder.shapes[EXTRAS]}, subset=True)[EXTRAS])
    if not isinstance(names, list) or values.shape != (len(names),) or values.dtype != np.float32:
        raise CheckpointError(f"{folder.path}: the names of {EXTRAS} in the metadata do not fit")
    return {str(name): np.asarray(value) for name, value in zip(names, values, strict=True)}


def restore(path: str | Path | Folder, abstract: Any) -> Any:
    """The folder's state in `abstract`'s tree: a pytree of arrays or of ShapeDtypeStructs with a `sharding` each.

    With no sharding a leaf goes to the first device. See `restore_leaves` for what is checked.
    """
    wanted = flatten(abstract)
    if not wanted or any(not hasattr(leaf, "dtype") for leaf in wanted.values()):
        raise ValueError(f"restore: abstract: {arguments.shown(abstract)} is no tree of arrays or of their shapes")
    leaves = restore_leaves(path, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])
