"""Layers of equal structure stacked in a leading axis and run by one `lax.scan`: compile time does not grow with depth.

A stacked entry of `model.layers` is one layer whose Params hold an extra leading axis L, and whose `depth` is L. NVFP4
weights stay whole inside the scan and their modules get a `layer_index` instead, so that a kernel reads its layer in
place; every other Param is sliced. What a call notes of a layer's input is put together again behind the scan.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nvfp4jax.layers import InputAmax, NVFP4Param
from nvfp4jax.models.cache import LayerCache


def depths(model: nnx.Module) -> tuple[int | None, ...]:
    """For each entry of `model.layers`: the number of layers stacked in it, None for a single layer."""
    return tuple(layer.depth for layer in model.layers)


def stack_of(layer: nnx.Module) -> Callable[..., tuple]:
    """The `layer.depth` layers stacked in `layer` as one: called as a layer is, with a leading axis on its experts.

    A layer is any module with `depth` and the call `(x, part, inputs) -> (x, part, experts or None)` of `models.protocol`: part is None
    or its `LayerCache`, inputs a pytree that all layers share, and x comes out in the shape it went in.
    """

    def run(x: jax.Array, part: LayerCache | None, inputs: Any) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        selecting = {tuple(path) for path, module in nnx.iter_modules(layer) if hasattr(module, "layer_index")}
        graphdef, whole, sliced = nnx.split(
            layer, nnx.All(NVFP4Param, lambda path, _: tuple(path[:-1]) in selecting), ...
        )

        def body(carry: tuple, params: Any) -> tuple[tuple, tuple]:
            x, part, index = carry
            block = nnx.merge(graphdef, whole, params)
            for _, module in nnx.iter_modules(block):
                if hasattr(module, "layer_index"):
                    module.layer_index = nnx.data(index)
            x, part, experts = block(x, part if part is None else part._replace(layer=index), inputs)
            part = part if part is None else part._replace(layer=None)
            return (x, part, index + jnp.int32(1)), (experts, nnx.state(block, InputAmax))

        # The index is carried: out of an array it would be copied in each turn.
        (x, part, _), (experts, seen) = lax.scan(body, (x, part, jnp.int32(0)), sliced, length=layer.depth)
        if jax.tree.leaves(seen):
            nnx.update(layer, seen)
        return x, part, experts

    return run


def stack_layers(model: nnx.Module) -> nnx.Module:
    """A model whose runs of consecutive layers with equal structure are stacked; arrays or ShapeDtypeStructs.

    The structure is everything but the values: shapes, dtypes, and how each module is set up, so layers quantized in
    different ways end up in different stacks. A run of one stays a single layer.
    """
    if not isinstance(getattr(model, "layers", None), nnx.List) or not all(hasattr(layer, "depth") for layer in model.layers):
        raise ValueError(f"stack_layers: {type(model).__name__} has no nnx.List `layers` of modules with a `depth`; see nvfp4jax.models.protocol")
    if any(d is not None for d in depths(model)):
        raise ValueError("stack_layers: the model's layers are stacked already")
    structures = [_structure(layer) for layer in model.layers]
    lengths: list[int] = []
    for i, structure in enumerate(structures):
        if i and structure == structures[i - 1]:
            lengths[-1] += 1
        else:
            lengths.append(1)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    skeleton = nnx.clone(model)
    skeleton.layers = nnx.List([skeleton.layers[i] for i in starts])
    for layer, start, length in zip(skeleton.layers, starts, lengths, strict=True):
        layer.depth = length if length > 1 else None
        _name_modules(layer, f"{start}" if length == 1 else f"{start}-{start + length - 1}")
    return nnx.merge(nnx.graphdef(skeleton), stack_state(nnx.state(model), lengths))


def unstack_layers(model: nnx.Module) -> nnx.Module:
    """The inverse of `stack_layers`: a model with one module a layer."""
    lengths = [d or 1 for d in depths(model)]
    skeleton = nnx.clone(model)
    skeleton.layers = nnx.List(
        [nnx.clone(layer) for layer, n in zip(skeleton.layers, lengths, strict=True) for _ in range(n)]
    )
    for i, layer in enumerate(skeleton.layers):
        layer.depth = None
        _name_modules(layer, str(i))
    return nnx.merge(nnx.graphdef(skeleton), unstack_state(nnx.state(model), lengths))


def stack_state(state: Mapping, lengths: Sequence[int]) -> Mapping:
    """The nnx.State of an unrolled model -> that of the model with `lengths` layers in its entries. Pure, jittable."""
    flat = dict(nnx.to_flat_state(state))
    place = [(group, i) for group, length in enumerate(lengths) for i in range(length)]
    members: dict[tuple, list] = {}
    for path, value in sorted(
        flat.items(), key=lambda item: (item[0][0] == "layers", item[0][1] if item[0][0] == "layers" else 0)
    ):
        if path[0] != "layers":
            members[path] = [value]
            continue
        if path[1] >= len(place):
            raise ValueError(
                f"stack_state: the state has a layer {path[1]}, but lengths {tuple(lengths)} make {len(place)}"
            )
        members.setdefault(("layers", place[path[1]][0], *path[2:]), []).append(value)
    out = {}
    for path, values in members.items():
        length = lengths[path[1]] if path[0] == "layers" else 1
        if len(values) != length:
            raise ValueError(
                f"stack_state: {'/'.join(map(str, path))} exists in {len(values)} of the {length} layers of its stack"
            )
        out[path] = values[0] if length == 1 else jax.tree.map(_stack, *values)
    return nnx.from_flat_state(out)


def unstack_state(state: Mapping, lengths: Sequence[int]) -> Mapping:
    """The inverse of `stack_state`."""
    out = {}
    for path, value in nnx.to_flat_state(state):
        if path[0] != "layers" or lengths[path[1]] == 1:
            start = sum(lengths[: path[1]]) if path[0] == "layers" else None
            out[path if start is None else ("layers", start, *path[2:])] = value
            continue
        for i in range(lengths[path[1]]):
            out["layers", sum(lengths[: path[1]]) + i, *path[2:]] = jax.tree.map(lambda x, i=i: _select(x, i), value)
    return nnx.from_flat_state(out)


def _stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _select(leaf: Any, index: int) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[index]


def _structure(layer: nnx.Module) -> tuple:
    layer = nnx.clone(layer)
    _name_modules(layer, "*")
    graphdef, state = nnx.split(layer)
    leaves, treedef = jax.tree.flatten(state)
    return graphdef, treedef, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves)


def _name_modules(layer: nnx.Module, label: str) -> None:
    """NVFP4 modules know their path, for errors: layers/<label>/..."""
    for _, module in nnx.iter_modules(layer):
        if isinstance(getattr(module, "name", None), str):
            module.name = re.sub(r"layers/[^/]+/", f"layers/{label}/", module.name, count=1)
