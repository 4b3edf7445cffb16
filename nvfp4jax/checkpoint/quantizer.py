"""Float weights into a live model's NVFP4 weights: from memory, or from an Orbax folder some layers at a time."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nvfp4jax import arguments, models
from nvfp4jax.checkpoint import orbax, saved_model
from nvfp4jax.checkpoint.digest import unhealthy
from nvfp4jax.checkpoint.errors import CheckpointError
from nvfp4jax.layers import WEIGHTS, InputAmax
from nvfp4jax.requantize import check_leaf, is_random, quantize_params
from nvfp4jax.swap import path_string, quantized_layers, shared_places

PIECE_BYTES = 2**29  # of float weights that are in memory at once on their way from disk


def shapes_of(state: nnx.State) -> nnx.State:
    """The state without its values, with its shardings."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


class Quantizer:
    """bfloat16 (or float32) weights in memory -> the live model's NVFP4 weights, layer by layer.

    The bits are those of the offline route. Weights may lie in any sharding over the live model's devices. Each shape of weight is
    compiled once in a process, so a deep model costs no more than a shallow one.
    """

    def __init__(self, model: nnx.Module):
        """model: the live model, quantized in whole, in part or not at all; only its structure, shardings and static input scales are kept."""
        arguments.module("Quantizer: model", model)
        graphdef, state, seen = nnx.split(model, WEIGHTS, ...)
        self._abstract = shapes_of(state)
        self._model = nnx.merge(graphdef, self._abstract, shapes_of(seen))
        self._lengths = saved_model.stack_lengths(model)
        self._single = models.unstack_layers(self._model) if self._lengths else None
        self._input_scales = {path: leaf for path, leaf in nnx.to_flat_state(state) if str(path[-1]).endswith("input_scale")}

    def __call__(self, state: nnx.State | nnx.Module, *, donate: bool = False) -> nnx.State:
        """state: that of the float model, its layers stacked as the live model's or single.

        donate: its arrays are given up, each as soon as its layer is done; otherwise the result shares no memory with them.
        CheckpointError that names the leaf where one is missing or misshapen, or the result is not finite.
        """
        arguments.flag("donate", donate)
        given = {path: v for path, v in _flat(state).items() if not isinstance(v, nnx.RngState | InputAmax)}
        single = self._lengths is not None and len({path[1] for path in given if path[0] == "layers"}) != len(self._lengths)
        where = "weights in memory"
        taken: set[tuple] = set()

        def read(paths: Sequence[tuple]) -> dict[tuple, nnx.Variable]:
            taken.update(paths)
            return {path: _take(given, path, where) for path in paths}

        result = self._made(read, given, single, donate, where)
        if surplus := [path for path in given if path not in taken]:
            others = f" (and {len(surplus) - 1} more leaves)" if len(surplus) > 1 else ""
            raise CheckpointError(f"{where}: {path_string(surplus[0])} has no place in the live model{others}; merge or drop it")
        return result

    def check_float_model(self, float_model: nnx.Module) -> None:
        """A ValueError where the live model's layers are made of something that `float_model` has not."""
        given = saved_model.single_layers(float_model)
        for path, layer in quantized_layers(self._model if self._single is None else self._single).items():
            for source in _sources(path, layer, given).values():
                if source not in given:
                    raise ValueError(f"float_model: {type(float_model).__name__} has no {path_string(source)}, which the live model is made from")

    def load(self, folder: orbax.Folder, float_model: nnx.Module) -> nnx.State:
        """The weights of a float model's Orbax folder, each loaded in the sharding that it has in `float_model`, some layers at a time.

        CheckpointError that names the leaf.
        """
        wanted = saved_model.single_layers(float_model)
        shapes = {path_string(path): variable.get_value() for path, variable in wanted.items()}
        lines = orbax.differences({name: leaf for name, leaf in folder.shapes.items() if name != orbax.EXTRAS}, shapes)
        if lines:
            raise CheckpointError(f"{folder.path}: {lines[0]}" + (f" (and {len(lines) - 1} more differences)" if len(lines) > 1 else ""))

        def read(paths: Sequence[tuple]) -> dict[tuple, nnx.Variable]:
            for path in paths:
                _take(wanted, path, str(folder.path))
            leaves = orbax.restore_leaves(folder, {path_string(path): shapes[path_string(path)] for path in paths}, subset=True)
            return {path: wanted[path].replace(leaves[path_string(path)]) for path in paths}

        return self._made(read, wanted, True, True, str(folder.path))

    def _made(
        self, read: Callable[[Sequence[tuple]], dict[tuple, Any]], given: Collection[tuple], single: bool, donate: bool, where: str
    ) -> nnx.State:
        """The live model's weights out of those that `read` gives by path, asked for in the order of the layers; given: the paths."""
        model = self._single if single and self._single is not None else self._model
        layers = quantized_layers(model)
        sources = {path: _sources(path, layer, given) for path, layer in layers.items()}
        packed = {(*path, *p) for path, layer in layers.items() for p, _ in nnx.to_flat_state(nnx.state(layer, WEIGHTS))}
        rest = {path: variable for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS)) if path not in packed}
        shared = shared_places(model)
        homes = {path: path if path in given else shared.get(path, path) for path in rest}
        readers = Counter([*homes.values(), *(p for names in sources.values() for p in names.values())])  # layers may share a Param
        made: dict[tuple, Any] = {}
        for group in _pieces(layers):
            floats = read([p for path in group for p in sources[path].values()])
            for path in group:
                own = {name: floats[p] for name, p in sources[path].items()}
                made |= {(*path, *name): variable for name, variable in _quantized(layers[path], own, donate, where).items()}
                if donate:
                    results = jax.block_until_ready([made[p].get_value() for p in made if p[: len(path)] == path])
                    for p in sources[path].values():
                        readers[p] -= 1
                        value = floats[p].get_value()
                        if not readers[p] and not any(value is result for result in results):  # a bias is passed on as it is
                            value.delete()
                del own
            del floats
        given_up = read([*dict.fromkeys(homes.values())])
        for path, target in rest.items():
            value = given_up[homes[path]].get_value()
            if value.shape != target.shape:
                raise CheckpointError(f"{where}: {path_string(path)} has shape {value.shape}, expected {target.shape}")
            if jnp.issubdtype(target.dtype, jnp.floating):
                _named(where, check_leaf, path, value)
            elif value.dtype != target.dtype:
                raise CheckpointError(f"{where}: {path_string(path)}: {value.dtype} in the state, {target.dtype} in the model")
            value = value.astype(target.dtype)
            made[path] = target.replace(value if donate else jnp.copy(value))
            del value
        if model is self._single:
            result = saved_model.like_live(made, self._model, self._input_scales)
        else:
            made |= self._input_scales
            targets = nnx.to_flat_state(self._abstract)
            placed = {path: jax.device_put(made.pop(path).get_value(), old.get_value().sharding) for path, old in targets}
            result = nnx.from_flat_state({path: old.replace(placed[path]) for path, old in targets})
        if complaints := unhealthy(orbax.flatten(result)):
            raise CheckpointError(f"{where}: {complaints[0]}")
        return result


def _flat(state: Any) -> dict[tuple, nnx.Variable]:
    """A state's Variables by path; arrays in nested dicts are taken for Params."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state, WEIGHTS)
    if not isinstance(state, Mapping | nnx.State):
        raise CheckpointError(f"weights in memory: state: an nnx.Module, its state or a nested dict is needed, not {arguments.shown(state)}")
    flat: dict[tuple, nnx.Variable] = {}

    def visit(node: Any, path: tuple) -> None:
        if isinstance(node, Mapping | nnx.State):
            for key in node:
                visit(node[key], (*path, key))
        else:
            flat[path] = node if isinstance(node, nnx.Variable) else nnx.Param(arguments.array(f"weights in memory: {path_string(path)}", node, None))

    visit(state, ())
    flat = {path: v for path, v in flat.items() if not is_random(path, v)}
    for path, variable in flat.items():
        _named("weights in memory", arguments.held, path_string(path), variable.get_value())
    return flat


def _named(where: str, check: Callable[[Any, Any], Any], *given: Any) -> None:
    try:
        check(*given)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _sources(path: tuple, layer: nnx.Module, given: Collection[tuple]) -> dict[tuple, tuple]:
    """What a layer is made of, by its own names: where a float state has it (a shared Param stands at the first of its places)."""
    homes = dict(getattr(layer, "float_paths", ()))
    return {name: homes[name] if homes.get(name) in given else (*path, *name) for name in layer.float_names()}


def _quantized(layer: nnx.Module, floats: dict[tuple, nnx.Variable], donate: bool, where: str) -> dict[tuple, nnx.Variable]:
    """One layer's weights by name, out of its float ones."""
    state = floats[()] if () in floats else nnx.from_flat_state(floats)
    try:
        quantized = dict(nnx.to_flat_state(quantize_params(state, layer)))
    except ValueError as error:  # NaN, or another shape; it names the layer
        name = getattr(layer, "name", "")
        raise CheckpointError(f"{where}: {error}" if name in str(error) else f"{where}: {name}: {error}") from error
    quantized = {name: v for name, v in quantized.items() if not isinstance(v.get_value(), jax.ShapeDtypeStruct)}  # input scales
    if donate:
        return quantized
    # A bias is passed on as it is, and a trainer may donate its own to the next step.
    return {name: v.replace(jnp.copy(v.get_value())) if name in floats else v for name, v in quantized.items()}


def _pieces(layers: Mapping[tuple, nnx.Module]) -> list[list[tuple]]:
    """The layers' paths in groups of about `PIECE_BYTES` of float weights."""
    groups: list[list[tuple]] = []
    size = PIECE_BYTES
    for path, layer in layers.items():
        leaves = jax.tree.leaves(nnx.state(layer, WEIGHTS))
        nbytes = 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)  # bfloat16 takes 3.6 times what is packed
        if size + nbytes > PIECE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += nbytes
    return groups


def _take(given: dict[tuple, Any], path: tuple, what: str):
    if path not in given:
        raise CheckpointError(f"{what}: {path_string(path)} is missing")
    return given[path]
