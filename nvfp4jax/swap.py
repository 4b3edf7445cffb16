"""Swapping a model's layers for NVFP4 ones, and quantizing a new state for a model already swapped.

Plain module surgery: no sample input, no forward pass, no interception. The model given is left as it is.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from nvfp4jax import layers

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers whose path matches.

    module_path: a regular expression for `re.fullmatch` on the path joined by '/', e.g. r"layers/\\d+/mlp/.*"; the first
        rule that matches a layer decides.
    scaling: None (weights only), "static", "delayed", "tensor", "tensor_pow2", "token"; for experts also "expert".
    four_over_six, weight_four_over_six: None, "mae" or "mse", for activations and for weights.
    skip: leave the layers in floating point.
    implementation: passed to the layer's operations.

    A raw Param of 3 axes [E, K, N] in a module that nobody registered is taken by a rule with scaling=None that matches
    the Param's own path: its weights only, decoded where they are read.
    """

    module_path: str
    scaling: str | None = "token"
    four_over_six: str | None = None
    weight_four_over_six: str | None = None
    skip: bool = False
    implementation: str | tuple[str, ...] | None = None

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("module_path", "skip")}


_converters: dict[type, Callable[..., nnx.Module]] = {
    nnx.Linear: layers.NVFP4Linear.from_float,
    nnx.LinearGeneral: layers.NVFP4LinearGeneral.from_float,
    nnx.Einsum: layers.NVFP4Einsum.from_float,
    layers.Experts: layers.NVFP4Experts.from_float,
}


def register(module_type: type[nnx.Module]) -> Callable[[Callable[..., nnx.Module]], Callable[..., nnx.Module]]:
    """Teaches `quantize_model` a layer of yours: decorate `convert(layer, *, name, scaling, four_over_six,
    weight_four_over_six, implementation) -> nnx.Module`.

    The result may be one of this package's layers, or hold some. If `quantize_params` is to requantize it, it has their
    `float_names()` and `quantize_params(params)`.
    """

    def decorate(convert):
        _converters[module_type] = convert
        return convert

    return decorate


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """The modules, containers and Params that a module or container holds, by name or index."""
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, list | tuple | nnx.List):
        items = enumerate(node)
    else:
        items = [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__") and k != "_object__state"]
    for key, value in items:
        if isinstance(value, nnx.Module | nnx.Variable | Mapping | list | tuple):
            yield key, value


def set_child(parent: Any, key: Any, value: Any) -> None:
    if isinstance(parent, tuple):
        raise ValueError(f"a layer at index {key} sits in a tuple, which cannot be changed in place; hold your layers in an nnx.List")
    if isinstance(parent, Mapping | list | nnx.List):
        parent[key] = value
    else:
        setattr(parent, key, value)


def path_string(path: Path) -> str:
    return "/".join(map(str, path))


def quantize_model(model: nnx.Module, rules: Sequence[Rule]) -> nnx.Module:
    """A copy of `model` whose layers are swapped for NVFP4 ones as the first matching rule says.

    Works on a model of arrays and on an abstract one (`nnx.eval_shape`); layers that two parents share stay shared.
    ValueError for a rule that matches nothing, and for a layer that cannot be quantized, naming its path and shape.
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    patterns = []
    for rule in rules:
        try:
            patterns.append(re.compile(rule.module_path))
        except re.error as error:
            raise ValueError(f"rule {rule.module_path!r} is no regular expression: {error}") from error
    used = [False] * len(rules)
    done: dict[int, nnx.Module] = {}
    seen_layers: list[str] = []

    def decide(path: str, wanted: Callable[[Rule], bool]) -> Rule | None:
        for i, (rule, pattern) in enumerate(zip(rules, patterns, strict=True)):
            if pattern.fullmatch(path) and (rule.skip or wanted(rule)):
                used[i] = True
                return rule
        return None

    def visit(node: Any, path: Path) -> Any:
        name = path_string(path)
        if id(node) in done:
            return done[id(node)]
        new = node
        if isinstance(node, nnx.Variable):
            if len(node.shape) == 3 and isinstance(node, nnx.Param):
                rule = decide(name, lambda rule: rule.scaling is None)
                if rule is not None and not rule.skip:
                    new = layers.NVFP4Weight(node, name=name, weight_four_over_six=rule.weight_four_over_six)
            done[id(node)] = new
            return new
        convert = _converters.get(type(node))
        if convert is not None:
            seen_layers.append(name)
            rule = decide(name, lambda rule: True)
            if rule is not None and not rule.skip:
                new = convert(node, name=name or type(node).__name__, **rule.options())
            done[id(node)] = new
            return new
        if isinstance(node, nnx.Module) and decide(name, lambda rule: False) is not None:
            # A skip rule that names a container keeps all below it.
            done[id(node)] = node
            return node
        done[id(node)] = node
        for key, child in list(children(node)):
            replaced = visit(child, (*path, key))
            if replaced is not child:
                set_child(node, key, replaced)
        return node

    result = visit(nnx.clone(model), ())
    unused = [rule.module_path for rule, u in zip(rules, used, strict=True) if not u]
    if unused:
        some = ", ".join(seen_layers[:6]) + (", ..." if len(seen_layers) > 6 else "")
        raise ValueError(f"rule {unused[0]!r} matches no layer that an earlier rule has not taken; the layers are: {some}")
    return result


def with_scaling(qmodel: nnx.Module, scaling: str | None) -> nnx.Module:
    """A model with the weights of `qmodel`, shared, whose NVFP4 layers treat their input in another mode.

    "static" keeps the input scales that there are and leaves the others to `nvfp4jax.calibrate`; "delayed" starts with an empty
    history, unless the layer has one. ValueError, naming the layer, for a mode that it does not know.
    """
    result = nnx.merge(*nnx.split(qmodel))
    for layer in scaled_layers(result).values():
        if layer.scaling != scaling:
            layers.set_scaling(layer, scaling)
    return result


def scaled_layers(model: nnx.Module) -> dict[Path, layers.NVFP4Linear | layers.NVFP4Experts]:
    """The NVFP4 layers that scale their input, by path."""
    return {tuple(path): m for path, m in nnx.iter_modules(model) if isinstance(m, layers.NVFP4Linear | layers.NVFP4Experts)}


def quantized_layers(model: nnx.Module) -> dict[Path, nnx.Module]:
    """The NVFP4 layers of a swapped model by path, registered ones with `quantize_params` among them."""
    return {tuple(path): m for path, m in nnx.iter_modules(model) if hasattr(m, "quantize_params") and hasattr(m, "float_names")}


def quantize_params(state: nnx.State | nnx.Module | Mapping, qmodel: nnx.Module) -> nnx.State:
    """The Params of `qmodel` made from the float state of the model it was swapped from. Pure: jit and donate at will.

    state: `nnx.state(float_model)`, the model itself, or a nested dict of arrays with the same paths; any float dtype, weights
        are rounded to bfloat16 before they are quantized, so that every source gives the bits of the offline route. A state
        that `qmodel` has already (its own NVFP4 leaves) is taken as it is, layer by layer.
    qmodel: what `quantize_model` made, with arrays or abstract; only its structure and static input scales are read.

    Returns an nnx.State for `nnx.update(qmodel, ...)`. ValueError that names the path for a missing leaf or another shape.
    """
    given = _flatten(state)
    target = dict(nnx.to_flat_state(nnx.state(qmodel, nnx.Param)))
    made: dict[Path, jax.Array] = {}
    for path, layer in quantized_layers(qmodel).items():
        own = [p for p in target if p[: len(path)] == path]
        sources = {name: (*path, *name) for name in layer.float_names()}
        floats = {name: given.get(source) for name, source in sources.items()}
        if all((*p,) in given and given[p].dtype == target[p].dtype for p in own):
            continue  # quantized already
        missing = [path_string(sources[name]) for name, value in floats.items() if value is None]
        if missing:
            raise ValueError(f"{path_string(path)}: the state has no {missing[0]}, which this NVFP4 layer is made from")
        for name, value in layer.quantize_params(floats).items():
            made[(*path, *name)] = value
    out = {}
    for path, variable in target.items():
        value = made.get(path, given.get(path))
        if value is None:
            if path[-1].endswith("input_scale"):
                value = variable.get_value()  # calibrated, not trained: it stays
            else:
                raise ValueError(f"the state has no {path_string(path)}, which the model needs")
        if value.shape != variable.shape:
            raise ValueError(f"{path_string(path)}: shape {tuple(value.shape)} in the state, {tuple(variable.shape)} in the model")
        out[path] = variable.replace(value if value.dtype == variable.dtype else value.astype(variable.dtype))
    return nnx.from_flat_state(out)


def _flatten(state: nnx.State | nnx.Module | Mapping) -> dict[Path, jax.Array]:
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    flat: dict[Path, jax.Array] = {}

    def visit(node, path):
        if isinstance(node, nnx.Variable):
            flat[path] = node.get_value()
        elif isinstance(node, Mapping | nnx.State):
            for key in node:
                visit(node[key], (*path, key))
        else:
            flat[path] = node

    visit(state, ())
    return flat
