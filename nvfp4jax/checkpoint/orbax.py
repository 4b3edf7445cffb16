"""Orbax, in one file: save, restore into a given sharding, restore into live weights.

A folder holds the tree of a model's parameters under their paths, and metadata with which it restores without any other input:

    format_version  of this layout
    recipe          the quantizer's contract and the activation mode, e.g. "te-exact/token"
    config, rules   the Hugging Face config and the swap rules that rebuild the model
    digests         one for each leaf, checked after each load (Orbax itself notices no flipped byte)
    leaves          dtype and shape of each leaf: asking Orbax for them opens every array, and leaks memory in TensorStore 0.1.86

Orbax casts dtypes in silence on loading, and its storage raises bare exceptions on damage; here tree, shapes and dtypes are compared
before a byte is read, and every failure is a CheckpointError that names the folder.
"""

import dataclasses
import gc
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from nvfp4jax import models, scaling
from nvfp4jax.checkpoint import formats, huggingface
from nvfp4jax.checkpoint.digest import check
from nvfp4jax.checkpoint.errors import CheckpointError, failure
from nvfp4jax.checkpoint.locks import held
from nvfp4jax.checkpoint.safetensors import read_json
from nvfp4jax.checkpoint.survey import require_folder, require_plain
from nvfp4jax.layers import WEIGHTS
from nvfp4jax.scaling import Name, Scaling
from nvfp4jax.swap import Rule, path_string, quantize_model, quantized_layers

FORMAT_VERSION = 1
# A leaf beside the model's: scales that it does not hold but an export needs; the metadata's entry of this name has their names.
EXTRAS = "extras"
_MOST_RULES = 10_000  # one a layer, in what `save_model` writes
METADATA_FILE = "_CHECKPOINT_METADATA"
_DTYPES = ("bfloat16", "float32", "float16")
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


def _attempt(message: str, call: Callable, *arguments: Any, **options: Any) -> Any:
    """What the call returns, or one CheckpointError with `message`: storage and parser raise what they like, bare Exception included."""
    try:
        with _one_at_a_time:
            return call(*arguments, **options)
    except Exception as error:
        told = failure(message, error)
    # Orbax abandons its other reads when one fails; asyncio would report each at length whenever it is collected.
    logger = logging.getLogger("asyncio")
    disabled, logger.disabled = logger.disabled, True
    gc.collect()
    logger.disabled = disabled
    raise told


def exists(path: str | Path) -> bool:
    """Whether `path` is an Orbax folder (of ours or not)."""
    path = Path(path)
    return path.is_dir() and (path / METADATA_FILE).is_file()


def refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; give a new save-dir, or remove this one")


def save(path: str | Path, state: Any, metadata: Mapping[str, Any]) -> None:
    """Saves a state (any pytree of arrays) under a new folder: there is all of it, or nothing.

    metadata: JSON values, with "recipe", "config" and "rules" at least where a model is to be rebuilt from the folder;
    "format_version" and "digests" are added. CheckpointError where the folder exists, another save into it is at work, a leaf is
    NaN or infinite, or it cannot be written.
    """
    path = Path(path).absolute()
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
    full = {"format_version": FORMAT_VERSION, **metadata, "digests": _digests(name, leaves), "leaves": _told(leaves)}
    try:
        json.dumps(full)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not saved: the metadata are no JSON ({error})") from None
    with _writing():
        _attempt(f"{name}: not saved", ocp.save, path, _nested(leaves), custom_metadata=full)


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
        with _writing():
            _attempt(f"{self.path}: not saved", ocp.partial.save, self.path, _nested(leaves))

    def finish(self, leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Adds the last leaves (at least one) and the metadata; the folder appears."""
        self._digests |= _digests(self.path, leaves)
        self._leaves |= _told(leaves)
        full = {"format_version": FORMAT_VERSION, **metadata, "digests": self._digests, "leaves": self._leaves}
        with _writing():
            _attempt(f"{self.path}: not saved", ocp.partial.save, self.path, _nested(leaves), custom_metadata=full)
            _attempt(f"{self.path}: not saved", ocp.partial.finalize, self.path)


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
    path = Path(path).absolute()
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
    leaves = restore_leaves(path, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])


# Whole models. On disk a model's layers are always single ones, however they run: stacking happens after loading.


def rules_of(model: nnx.Module) -> list[Rule]:
    """Rules that make `model`'s NVFP4 layers out of its float model, one a layer."""
    names = [field.name for field in dataclasses.fields(Rule) if field.name not in ("module_path", "skip")]
    return [
        Rule(re.escape(path_string(path)), **{name: getattr(layer, name, None) for name in names})
        for path, layer in quantized_layers(model).items()
    ]


def rules_to_json(rules: Sequence[Rule]) -> list[dict]:
    """What differs from a Rule's defaults, as JSON values."""
    defaults = Rule("")
    changed = [
        {f.name: getattr(rule, f.name) for f in dataclasses.fields(Rule) if getattr(rule, f.name) != getattr(defaults, f.name)}
        for rule in rules
    ]
    return [rule | ({"scaling": scaling.to_json(rule["scaling"])} if "scaling" in rule else {}) for rule in changed]


def rules_from_json(values: Any, where: str) -> list[Rule]:
    """The inverse of `rules_to_json`, for values that need not be trusted."""
    kinds = {f.name: str | None for f in dataclasses.fields(Rule)} | {"module_path": str, "skip": bool, "scaling": str | dict | None}
    rules = []
    if isinstance(values, list) and len(values) > _MOST_RULES:
        raise CheckpointError(f"{where}: {len(values)} rules; at most {_MOST_RULES} are read")
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, dict) and isinstance(value.get("implementation"), list):
            value = value | {"implementation": tuple(value["implementation"])}
            kinds["implementation"] = tuple | str | None
        if not isinstance(value, dict) or not value.get("module_path") or not value.keys() <= kinds.keys():
            raise CheckpointError(f"{where}: a rule cannot be read: {str(value)[:80]}")
        if wrong := [name for name, v in value.items() if not isinstance(v, kinds[name])]:
            raise CheckpointError(f"{where}: a rule's {wrong[0]!r} has the wrong type: {str(value)[:80]}")
        formats.safe_pattern(value["module_path"])
        try:
            mode = {"scaling": scaling.from_json(value["scaling"])} if "scaling" in value else {}
            rules.append(Rule(**value | mode))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: a rule cannot be read: {error}") from error
    return rules


def recipe_id(rules: Sequence[Rule]) -> str:
    """The arithmetic that rules ask for, e.g. 'te-exact/token+46-mse-256': the weights' contract, the activations' modes."""
    taken = [rule for rule in rules if not rule.skip]
    if not taken:
        return "float"
    modes = sorted({str(scaling.name_of(rule.scaling)).lower() for rule in taken})
    sides = [(side, kind) for rule in taken for side, kind in (("w", rule.weight_four_over_six), ("a", getattr(rule.scaling, "four_over_six", None)))]
    extras = sorted({f"+{side}46-{kind}-256" for side, kind in sides if kind})
    return f"te-exact/{','.join(modes)}{''.join(extras)}"


def has_layers(model: nnx.Module) -> bool:
    """Whether a model is built as ours are, so that its layers may be stacked."""
    return hasattr(model, "layers") and all(hasattr(layer, "depth") for layer in model.layers)


def _unstacked(model: nnx.Module) -> nnx.Module:
    stacked = has_layers(model) and any(depth is not None for depth in models.depths(model))
    return models.unstack_layers(model) if stacked else model


def described(
    model: nnx.Module, config: Mapping[str, Any], rules: Sequence[Rule] | None = None, **metadata: Any
) -> tuple[nnx.State, dict[str, Any]]:
    """(the state, the metadata) that `save_model` saves: layers one by one, and what rebuilds the model."""
    model = _unstacked(model)
    rules = rules_of(model) if rules is None else rules
    state = nnx.state(model, WEIGHTS)
    if (dtype := getattr(getattr(model, "dtypes", None), "dtype", None)) is None:  # a model that is not ours
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if str(leaf.dtype) in _DTYPES]
        dtype = max(set(dtypes), key=dtypes.count, default=jnp.bfloat16)
    return state, {"recipe": recipe_id(rules), "config": dict(config), "rules": rules_to_json(rules), "dtype": str(jnp.dtype(dtype)), **metadata}


def save_model(path: str | Path, model: nnx.Module, config: Mapping[str, Any], *, rules: Sequence[Rule] | None = None, **metadata: Any) -> None:
    """Saves one of our models so that `load_model(path)` needs nothing else.

    config: its Hugging Face config.json. rules: those it was swapped with; taken from the model's layers where None. Any further
    `metadata` must be JSON. Scanned layers are stored one by one.
    """
    save(path, *described(model, config, rules, **metadata))


def other_function(model: nnx.Module, config: Any) -> str | None:
    """How the function that a Hugging Face config describes differs from the one that a live model computes; None where it does not.

    A model of no registered family cannot be compared: None.
    """
    families = [models.family_of({"architectures": [name]}) for name in models.architectures()]
    live = getattr(model, "config", None)
    if not dataclasses.is_dataclass(live) or not any(family.model is type(model) for family in families):
        return None
    if not isinstance(config, Mapping):
        return "it carries no config"
    try:
        formats.check_config(config, None, "config")
        family = models.family_of(config)
        told = family.read_config(config)
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        return f"its config cannot be read: {error}"
    if family.model is not type(model):
        return f"its config describes another model than the live {type(model).__name__}: {', '.join(family.architectures)}"
    for field in dataclasses.fields(live):
        ours, theirs = getattr(live, field.name), getattr(told, field.name)
        if ours != theirs:
            return f"its config describes another function than the live model's: {field.name} is {theirs!r}, not {ours!r}"
    return None


def abstract_model(path: Path, metadata: Mapping[str, Any], dtype: jnp.dtype | None = None, mode: Name | Scaling | None = None) -> nnx.Module:
    """The unrolled, abstract model that a folder's metadata describe."""
    config, stored = metadata.get("config"), metadata.get("dtype")
    if not isinstance(config, dict) or stored not in _DTYPES:
        raise CheckpointError(f"{path}: the metadata have no model config and dtype; restore it into a state of your own")
    formats.check_config(config, None, str(path))
    rules = rules_from_json(metadata.get("rules", []), str(path))
    if mode is not None:
        rules = [dataclasses.replace(rule, scaling=mode) for rule in rules]
    model = models.build(config, dtype or stored)
    return huggingface.with_input_scales(quantize_model(model, rules)) if rules else model


def load_model(path: str | Path, dtype: jnp.dtype | None = None, *, scaling: Name | Scaling | None = None, scan_layers: bool = False) -> nnx.Module:
    """The model in a folder of ours, on the default device; no other input is needed.

    dtype: of activations and float weights, as stored where None. scaling: for all NVFP4 layers, as stored where None.
    """
    folder = read_folder(path)
    path = folder.path
    stored = abstract_model(path, folder.metadata)
    model = abstract_model(path, folder.metadata, dtype, scaling)
    leaves = restore_leaves(folder, flatten(nnx.state(stored, WEIGHTS)))
    wanted = flatten(nnx.state(model, WEIGHTS))
    if extra := [name for name in wanted if name not in leaves]:
        raise CheckpointError(f"{path}: {extra[0]} is not in the folder, which scaling={scaling!r} needs; use an online mode")
    values = {path: leaves[path_string(path)].astype(variable.dtype) for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS))}
    model = huggingface.fill(model, values)
    return models.stack_layers(model) if scan_layers else model


def _single_layer(leaf, stacked: bool) -> jax.ShapeDtypeStruct:
    """The abstract leaf of one layer of a stack, sharded as the stack is."""
    sharding = leaf.sharding
    if not stacked:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def stack_lengths(model: nnx.Module) -> list[int] | None:
    """The number of layers in each entry of `model.layers`; None for a model whose layers are single ones, or not ours."""
    if not has_layers(model) or all(depth is None for depth in models.depths(model)):
        return None
    return [depth or 1 for depth in models.depths(model)]


def single_layers(model: nnx.Module) -> dict[tuple, nnx.Variable]:
    """A model's weights by path as a folder holds them, with one entry a layer: abstract, sharded as the model's."""
    lengths = stack_lengths(model)
    wanted = {}
    for leaf_path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS)):
        stacked = lengths is not None and leaf_path[0] == "layers" and lengths[leaf_path[1]] > 1
        if lengths is None or leaf_path[0] != "layers":
            starts = [leaf_path]
        else:
            start = sum(lengths[: leaf_path[1]])
            starts = [("layers", start + i, *leaf_path[2:]) for i in range(lengths[leaf_path[1]])]
        for one in starts:
            wanted[one] = variable.replace(_single_layer(variable.get_value(), stacked))
    return wanted


def like_live(single: dict[tuple, nnx.Variable], model: nnx.Module, kept: Mapping[tuple, nnx.Variable] | None = None) -> nnx.State:
    """Weights by `single_layers`' paths -> the state of the model, stacked and sharded as its own. `single` is emptied.

    kept: leaves of the model, by its own paths, that are taken as they are. Leaf by leaf, so that no more than one leaf's copy is
    held beside the result.
    """
    lengths = stack_lengths(model)
    out: dict[tuple, nnx.Variable] = {}
    for leaf_path, old in nnx.to_flat_state(nnx.state(model, WEIGHTS)):
        if kept and leaf_path in kept:
            out[leaf_path] = kept[leaf_path]
            continue
        if lengths is None or leaf_path[0] != "layers":
            new = single.pop(leaf_path).get_value()
        else:
            start = sum(lengths[: leaf_path[1]])
            parts = [single.pop(("layers", start + i, *leaf_path[2:])).get_value() for i in range(lengths[leaf_path[1]])]
            new = parts[0] if len(parts) == 1 else jnp.stack(parts)
            del parts
        target = old.get_value()
        sharding = getattr(target, "sharding", None)
        out[leaf_path] = old.replace(new if sharding is None else jax.device_put(new, sharding))
        if lengths is not None:
            jax.block_until_ready(out[leaf_path].get_value())  # before the next leaf takes memory
    return nnx.from_flat_state(out)


def restore_state(path: str | Path | Folder, model: nnx.Module) -> nnx.State:
    """The folder's weights in the tree, shapes, dtypes and shardings of a live model (stacked layers too); the model is not touched.

    Use it as `nnx.update(model, state)`, or pass it to a jitted rollout, which does not retrace.
    """
    single = single_layers(model)
    leaves = restore_leaves(path, {path_string(name): variable.get_value() for name, variable in single.items()})
    for name, variable in single.items():
        single[name] = variable.replace(leaves.pop(path_string(name)))
    return like_live(single, model)
