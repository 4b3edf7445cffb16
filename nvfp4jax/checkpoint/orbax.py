"""Orbax, in one file: save, restore into a given sharding, restore into live weights.

A folder holds the tree of a model's parameters under their paths, and metadata with which it restores without any other input:

    format_version  of this layout
    recipe          the quantizer's contract and the activation mode, e.g. "te-exact/token"
    config, rules   the Hugging Face config and the swap rules that rebuild the model
    digests         one for each leaf, checked after each load (Orbax itself notices no flipped byte)

Orbax casts dtypes in silence on loading, and its storage raises bare exceptions on damage; here tree, shapes and dtypes are compared
before a byte is read, and every failure is a CheckpointError that names the folder.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from nvfp4jax.checkpoint.digest import digests, unhealthy
from nvfp4jax.checkpoint.safetensors import CheckpointError

FORMAT_VERSION = 1
_log = logging.getLogger(__name__)


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


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def exists(path: str | Path) -> bool:
    """Whether `path` is an Orbax folder (of ours or not)."""
    path = Path(path)
    return path.is_dir() and (path / "_CHECKPOINT_METADATA").is_file()


def refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; give a new save-dir, or remove this one")


def save(path: str | Path, state: Any, metadata: Mapping[str, Any]) -> None:
    """Saves a state (any pytree of arrays) under a new folder: there is all of it, or nothing.

    metadata: JSON values, with "recipe", "config" and "rules" at least where a model is to be rebuilt from the folder;
    "format_version" and "digests" are added. CheckpointError where the folder exists or a leaf is NaN or infinite.
    """
    path = Path(path).absolute()
    refuse_existing(path)
    leaves = flatten(state)
    complaints = unhealthy(leaves)
    if complaints:
        raise CheckpointError(f"{path}: not saved: {complaints[0]}")
    full = {"format_version": FORMAT_VERSION, **metadata, "digests": digests(leaves)}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        ocp.save(path, _nested(leaves), custom_metadata=full)
    except BaseException:
        for leftover in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        raise


class PartialSave:
    """A folder saved piece by piece, so that a large model needs the memory of one piece.

    add(leaves) any number of times, each leaf once; finish(metadata) makes the folder appear. Nothing is at `path` before.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        refuse_existing(self.path)
        self._digests: dict[str, str] = {}
        self.discard()

    def discard(self) -> None:
        """Removes what an unfinished save has left beside `path`."""
        for leftover in self.path.parent.glob(f"{self.path.name}.partial_save*"):
            shutil.rmtree(leftover)

    def add(self, leaves: Mapping[str, Any]) -> None:
        complaints = unhealthy(dict(leaves))
        if complaints:
            raise CheckpointError(f"{self.path}: not saved: {complaints[0]}")
        ocp.partial.save(self.path, _nested(leaves))
        self._digests |= digests(dict(leaves))

    def finish(self, leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Adds the last leaves (at least one) and the metadata; the folder appears."""
        self._digests |= digests(dict(leaves))
        full = {"format_version": FORMAT_VERSION, **metadata, "digests": self._digests}
        ocp.partial.save(self.path, _nested(leaves), custom_metadata=full)
        ocp.partial.finalize(self.path)


def _metadata(path: Path):
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    try:
        return ocp.metadata(path)
    except Exception as error:  # storage and parser raise what they like, bare Exception included
        raise CheckpointError(f"{path}: not a readable Orbax checkpoint ({_one_line(error)})") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of `save`. CheckpointError for a folder that is damaged, not ours, or of a later format."""
    return _checked_metadata(Path(path).absolute(), _metadata(Path(path).absolute()))


def _checked_metadata(path: Path, found) -> dict[str, Any]:
    metadata = found.custom_metadata
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise CheckpointError(f"{path}: an Orbax checkpoint without nvfp4jax's metadata (format_version, recipe, digests)")
    version = metadata["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r}; this release reads {FORMAT_VERSION}")
    return metadata


def read_shapes(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaf path -> shape and dtype as stored."""
    path = Path(path).absolute()
    return _shapes(path, _metadata(path))


def _shapes(path: Path, found) -> dict[str, jax.ShapeDtypeStruct]:
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


def restore_leaves(path: str | Path, wanted: Mapping[str, Any], *, subset: bool = False) -> dict[str, jax.Array]:
    """Leaves by path, each in the shape, dtype and sharding of `wanted`'s (arrays or ShapeDtypeStructs), all checked.

    Compared before any array's bytes are read: tree, shapes, dtypes. Checked afterwards, on the device: each leaf's digest, that
    weights and scales are finite and global scales positive and not inverted. `subset`: the folder may hold more than is wanted.
    CheckpointError names the folder and the leaf.
    """
    path = Path(path).absolute()
    found = _metadata(path)
    metadata = _checked_metadata(path, found)
    stored = _shapes(path, found)
    skipped = {name: ocp.PLACEHOLDER for name in stored if subset and name not in wanted}
    lines = differences({name: leaf for name, leaf in stored.items() if name not in skipped}, wanted)
    if lines:
        raise CheckpointError(f"{path}: {lines[0]}" + (f" (and {len(lines) - 1} more differences)" if len(lines) > 1 else ""))
    expected = metadata.get("digests")
    if not isinstance(expected, dict) or set(expected) != set(stored):
        raise CheckpointError(f"{path}: the metadata's digests do not cover the leaves")
    try:
        loaded = flatten(ocp.load(path, _nested({name: _abstract(leaf) for name, leaf in wanted.items()} | skipped)))
    except Exception as error:  # storage raises what it likes, bare Exception included
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)})") from error
    leaves = {name: loaded[name] for name in wanted}
    for name, value in digests(leaves).items():
        if value != expected[name]:
            raise CheckpointError(f"{path}: {name}: its bytes do not match the digest in the metadata: the file is damaged")
    complaints = unhealthy(leaves)
    if complaints:
        raise CheckpointError(f"{path}: {complaints[0]}")
    return leaves


def restore(path: str | Path, abstract: Any) -> Any:
    """The folder's state in `abstract`'s tree: a pytree of arrays or of ShapeDtypeStructs with a `sharding` each.

    With no sharding a leaf goes to the first device. See `restore_leaves` for what is checked.
    """
    wanted = flatten(abstract)
    leaves = restore_leaves(path, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])
