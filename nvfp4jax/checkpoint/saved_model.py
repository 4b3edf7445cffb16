"""Whole models in Orbax folders: what rebuilds them, and live models in the place of the built ones.

On disk a model's layers are always single ones, however they run: stacking happens after loading.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nvfp4jax import arguments, models, scaling
from nvfp4jax.checkpoint import formats, huggingface
from nvfp4jax.checkpoint.digest import unhealthy
from nvfp4jax.checkpoint.errors import CheckpointError
from nvfp4jax.checkpoint.orbax import EXTRAS, Folder, flatten, read_folder, restore_leaves, save
from nvfp4jax.checkpoint.quantization_config import safe_pattern
from nvfp4jax.layers import WEIGHTS, InputAmax, is_abstract
from nvfp4jax.scaling import Name, Scaling, parse
from nvfp4jax.swap import Rule, path_string, quantize_model, quantized_layers

_MOST_RULES = 10_000  # one a layer, in what `save_model` writes
# What a folder's metadata say of it: a caller's own of that name would make it another folder, or one that cannot be read.
OWN_ENTRIES = frozenset({"format_version", "digests", "leaves", "recipe", "config", "rules", "dtype", "kv_cache", EXTRAS})
_DTYPES = ("bfloat16", "float32", "float16")


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
        safe_pattern(value["module_path"])
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


def _unstacked(model: nnx.Module) -> nnx.Module:
    return model if stack_lengths(model) is None else models.unstack_layers(model)


def dtype_of(model: nnx.Module) -> jnp.dtype:
    """The dtype that a model computes in: as it says, or, of a model that is not ours, that of most of its float leaves."""
    if (dtype := getattr(getattr(model, "dtypes", None), "dtype", None)) is not None:
        return jnp.dtype(dtype)
    dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, WEIGHTS)) if str(leaf.dtype) in _DTYPES]
    return jnp.dtype(max(sorted(set(dtypes)), key=dtypes.count, default="bfloat16"))


def described(
    model: nnx.Module, config: Mapping[str, Any] | None, rules: Sequence[Rule] | None = None, **metadata: Any
) -> tuple[nnx.State, dict[str, Any]]:
    """(the state, the metadata) that `save_model` saves: layers one by one, and what rebuilds the model."""
    model = _unstacked(model)
    rules = rules_of(model) if rules is None else rules
    config = None if config is None else dict(config)
    described = {"recipe": recipe_id(rules), "config": config, "rules": rules_to_json(rules), "dtype": str(dtype_of(model))}
    return nnx.state(model, WEIGHTS), described | metadata


def save_model(
    path: str | Path, model: nnx.Module, config: Mapping[str, Any] | None = None, *, rules: Sequence[Rule] | None = None, **metadata: Any
) -> None:
    """Saves a model, float or quantized, under a new folder.

    config: its Hugging Face config.json; then `load_model(path)` needs nothing else. None for a model of your own, which no family
        builds: `load_model(path, like=model)` takes its weights up again.
    rules: those it was swapped with; taken from the model's layers where None. Any further `metadata` must be JSON, under names of their own. Scanned
    layers are stored one by one. CheckpointError where the folder exists or cannot be written, or a leaf is NaN or infinite.
    """
    if rules is not None:
        rules = arguments.items("save_model: rules", rules, Rule, "Rule")
    arguments.module("save_model: model", model)
    if config is not None:
        arguments.config("save_model: config", config)
    if taken := sorted(OWN_ENTRIES & metadata.keys()):
        raise ValueError(f"save_model: {taken[0]!r} is an entry of the folder's own metadata; give yours another name")
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


def abstract_model(
    path: Path,
    metadata: Mapping[str, Any],
    dtype: DTypeLike | None = None,
    mode: Name | Scaling | None = None,
    way_out: str = "load it with load_model(folder, like=model), where model is built by your own code",
) -> nnx.Module:
    """The unrolled, abstract model that a folder's metadata describe. CheckpointError, with the way out, where no family builds it."""
    config, stored = metadata.get("config"), metadata.get("dtype")
    if not isinstance(config, dict) or stored not in _DTYPES:
        raise CheckpointError(f"{path}: saved without a config from which the model could be built; {way_out}")
    formats.check_config(config, None, str(path))
    try:
        models.family_of(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: its config builds no model ({error}); {way_out}") from None
    rules = rules_from_json(metadata.get("rules", []), str(path))
    if mode is not None:
        rules = [dataclasses.replace(rule, scaling=mode) for rule in rules]
    model = models.build(config, dtype or stored)
    return huggingface.with_input_scales(quantize_model(model, rules)) if rules else model


def load_model(
    path: str | Path, dtype: DTypeLike | None = None, *, scaling: Name | Scaling | None = None, scan_layers: bool = False
) -> nnx.Module:
    """The model in a folder of ours, on the default device; no other input is needed. See `load_like` for a model of your own.

    dtype: of activations and float weights, as stored where None. scaling: for all NVFP4 layers, as stored where None.
    """
    dtype = None if dtype is None else arguments.dtype("load_model: dtype", dtype, _DTYPES)
    arguments.flag("load_model: scan_layers", scan_layers)
    scaling = parse(scaling, "load_model")
    arguments.device()
    folder = read_folder(path)
    path = folder.path
    stored = abstract_model(path, folder.metadata)
    model = abstract_model(path, folder.metadata, dtype, scaling)
    leaves = restore_leaves(folder, flatten(nnx.state(stored, WEIGHTS)))
    wanted = flatten(nnx.state(model, WEIGHTS))
    flat = nnx.to_flat_state(nnx.state(model, WEIGHTS))
    given = {path: variable.get_value() for path, variable in flat if not is_abstract(variable.get_value())}  # a Static(scale)'s own
    if extra := [name for name in wanted if name not in leaves and name not in map(path_string, given)]:
        raise CheckpointError(f"{path}: {extra[0]} is not in the folder, which scaling={scaling!r} needs; use an online mode")
    values = {path: leaves[path_string(path)].astype(variable.dtype) for path, variable in flat if path not in given}
    cast = {path_string(p): value for p, value in values.items() if value.dtype != leaves[path_string(p)].dtype}
    if complaints := unhealthy(cast):
        raise CheckpointError(f"{path}: in {dtype} {complaints[0]}; load it as it is stored")
    model = huggingface.fill(model, values | given)
    return models.stack_layers(model) if scan_layers else model


def _single_layer(leaf, stacked: bool) -> jax.ShapeDtypeStruct:
    """The abstract leaf of one layer of a stack, sharded as the stack is."""
    sharding = leaf.sharding
    if not stacked:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _is_stackable(layer: Any) -> bool:
    """Whether a module follows the stacking protocol of `models.protocol`; a module of a user's may have a `depth` of another kind."""
    if not isinstance(layer, nnx.Module) or not hasattr(layer, "depth"):
        return False
    return layer.depth is None or all(leaf.shape[:1] == (layer.depth,) for leaf in jax.tree.leaves(nnx.state(layer, WEIGHTS)))


def stack_lengths(model: nnx.Module) -> list[int] | None:
    """The number of layers in each entry of `model.layers`; None for a model whose layers are single ones, or not ours."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nnx.List) or not all(map(_is_stackable, layers)) or all(layer.depth is None for layer in layers):
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
    single = single_layers(arguments.module("restore_state: model", model))
    leaves = restore_leaves(path, {path_string(name): variable.get_value() for name, variable in single.items()})
    for name, variable in single.items():
        single[name] = variable.replace(leaves.pop(path_string(name)))
    return like_live(single, model)


def load_like[M: nnx.Module](path: str | Path, like: M) -> M:
    """A copy of `like` with the weights of a folder of ours, for models of your own: see `checkpoint.load_model`."""
    arguments.module("load_model: like", like)
    folder = read_folder(path)
    if folder.metadata.get("recipe") == "float" and quantized_layers(like):
        raise CheckpointError(f"{folder.path}: its weights are in floating point, and like's layers are NVFP4; load it like the float model, "
                              "and swap the result with quantize_model")  # fmt: skip
    copy = lambda state: jax.tree.map(lambda leaf: leaf, state)  # with Variables of its own  # noqa: E731
    graphdef, state, noted, rest = nnx.split(like, WEIGHTS, InputAmax, ...)
    if abstract := [p for p, v in nnx.to_flat_state(rest) if isinstance(jax.tree.leaves(v)[0], jax.ShapeDtypeStruct)]:
        raise ValueError(f"load_model: like has an abstract {path_string(abstract[0])}, which no folder of weights holds; build like with arrays")
    noted = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), noted)
    model = nnx.merge(graphdef, copy(state), noted, copy(rest))
    if any(name.endswith("input_scale") for name in folder.shapes):
        huggingface.with_input_scales(model)
    nnx.update(model, restore_state(folder, model))
    return model
