"""A trainer's float state into the state of a model already swapped: every leaf accounted for, in both directions."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nvfp4jax import arguments, layers
from nvfp4jax.numerics import LARGEST_WEIGHT_GLOBAL_SCALE
from nvfp4jax.scaling import is_tracing
from nvfp4jax.swap import Path, path_string, quantized_layers, shared_places

# What adapters are called beside a kernel: by nnx.LoRALinear, by nnx.LoRA wrappers, by qwix and tunix.
_ADAPTERS = (("lora", "lora_{}"), ("lora_{}",), ("kernel_lora_{}",), ("w_lora_{}",))


@jax.custom_jvp
def _undifferentiated(x: jax.Array) -> jax.Array:
    return x


@_undifferentiated.defjvp
def _(primals, tangents):
    raise ValueError("quantize_params passes no gradient: its results are codes. Inside a function that is differentiated, run "
                     "nvfp4jax.straight_through(qmodel, state), the same forward, whose gradients reach the float state")


def quantize_params(state: nnx.State | nnx.Module | Mapping, qmodel: nnx.Module, *, merge_lora: bool | float = False) -> nnx.State:
    """The weights of `qmodel` made from the float state of the model it was swapped from. Pure: jit and donate at will.

    state: `nnx.state(float_model)`, the model itself, or a nested dict of arrays with the same paths; any float dtype, weights
        are rounded to bfloat16 before they are quantized, so that every source gives the bits of the offline route. A state
        that `qmodel` has already (its own NVFP4 leaves) is taken as it is, layer by layer.
    qmodel: what `quantize_model` made, with arrays or abstract; only its structure and static input scales are read.
    merge_lora: what to do with low-rank adapters beside a linear layer's kernel: False refuses them, True adds lora_a lora_b to the
        kernel, a number adds that (alpha / rank) times it.

    Returns an nnx.State for `nnx.update(qmodel, ...)`. ValueError that names the leaf: missing, surplus (an adapter, a bias that the
    model has not), of another shape or kind.
    """
    if not quantized_layers(arguments.module("quantize_params: qmodel", qmodel)):
        raise ValueError(f"quantize_params: qmodel: {type(qmodel).__name__} has no NVFP4 layer; give what quantize_model made")
    if not isinstance(merge_lora, bool):
        merge_lora = arguments.number("quantize_params: merge_lora", merge_lora)
        if merge_lora == 0:  # alpha // rank, most likely
            raise ValueError("quantize_params: merge_lora=0 would leave the adapters out; alpha / rank is needed, or False to refuse them")
    given = _flatten(state)
    target = dict(nnx.to_flat_state(nnx.state(qmodel, layers.WEIGHTS)))
    taken: set[Path] = set()
    made: dict[Path, jax.Array] = {}
    for path, layer in quantized_layers(qmodel).items():
        own = [p for p in target if p[: len(path)] == path and isinstance(target[p], layers.NVFP4Param)]
        if all(p in given for p in own):
            continue  # quantized already
        floats, read = _floats(given, path, layer, merge_lora)
        taken |= read
        floats = {name: _undifferentiated(value) for name, value in floats.items()}
        for name, value in layer.quantize_params(floats).items():
            made[(*path, *name)] = value
    shared = shared_places(qmodel)
    out = {path: _leaf(path, variable, made, given, taken, shared) for path, variable in target.items()}
    surplus = [path for path in given if path not in taken]
    if surplus:
        raise ValueError(_surplus(surplus[0], len(surplus)))
    _check_values({path: variable for path, variable in out.items() if path not in made})
    return nnx.from_flat_state(out)


@functools.partial(jax.jit, static_argnums=1)
def _fit(x: jax.Array, kind: str) -> jax.Array:
    x = x.astype(jnp.float32)
    if kind == "global_scale":
        return ((x > 0) & (x < LARGEST_WEIGHT_GLOBAL_SCALE)).all()
    return (jnp.isfinite(x) & ~jnp.signbit(x) if kind == "scale" else jnp.isfinite(x)).all()


_COMPLAINTS = {
    "float": "NaN or infinity in {dtype}",
    "scale": "NaN or infinity or a negative scale",
    "global_scale": "a global scale that is not finite, not positive, or the inverse of one (it multiplies: amax / 2688)",
}


def _kind(path: Path, variable: nnx.Variable) -> str:
    if not isinstance(variable, layers.NVFP4Param):
        return "float"
    return "global_scale" if str(path[-1]).endswith("global_scale") else "scale"


def _check_values(taken: Mapping[Path, nnx.Variable]) -> None:
    """Leaves that are taken as they are hold no NaN and no infinity, scales are not negative, and global scales multiply; traced ones are not looked at, and inside
    jit none: a look at one that is not would be traced, too."""
    if is_tracing():
        return
    leaves = {p: v for p, v in taken.items() if isinstance(v.get_value(), jax.Array | np.ndarray) and not isinstance(v.get_value(), jax.core.Tracer)}
    floats = {p: v for p, v in leaves.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    fit = {p: _fit(v.get_value(), _kind(p, v)) for p, v in floats.items()}  # all are started before the first is waited for
    for path, good in zip(fit, jax.device_get([*fit.values()]), strict=True):
        if not good:
            complaint = _COMPLAINTS[_kind(path, floats[path])].format(dtype=floats[path].dtype)
            raise ValueError(f"{path_string(path)}: {complaint}")


def straight_through[M: nnx.Module](qmodel: M, state: nnx.State | nnx.Module | Mapping, *, merge_lora: bool | float = False) -> M:
    """The rollout's own forward over a trainer's float state, for use inside a function that is differentiated.

    A copy of `qmodel` with the weights that `quantize_params(state, qmodel)` makes, to the bit, whose gradients reach `state` as if
    the weights had not been rounded (straight through). Arguments and errors as there.

        def loss(model, batch):
            return cross_entropy(nvfp4jax.straight_through(qmodel, model)(batch))
        grads = nnx.grad(loss)(float_model, batch)
    """
    given = _flatten(state)
    values: dict = {}
    for path, value in given.items():
        node = values
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jax.lax.stop_gradient(value)
    made = dict(nnx.to_flat_state(quantize_params(values, qmodel, merge_lora=merge_lora)))
    shared = shared_places(qmodel)
    for path, variable in made.items():
        source = path if path in given else shared.get(path)
        if source in given and not isinstance(variable, layers.NVFP4Param | layers.InputScale):
            made[path] = variable.replace(given[source].astype(variable.dtype))
    graphdef, _, *rest = nnx.split(qmodel, layers.WEIGHTS, ...)
    result: Any = nnx.merge(graphdef, nnx.from_flat_state(made), *jax.tree.map(lambda x: x, rest))
    for path, layer in quantized_layers(result).items():
        if hasattr(layer, "set_sources") and not all((*path, *name) in given for name in _packed_names(layer)):
            layer.set_sources(_floats(given, path, layer, merge_lora)[0])
    return result


def _packed_names(layer: nnx.Module) -> list[tuple[str]]:
    return [(name,) for name, value in vars(layer).items() if isinstance(value, layers.NVFP4Param)]


def _floats(given: Mapping[Path, Any], path: Path, layer: Any, merge_lora: bool | float) -> tuple[dict, set[Path]]:
    """(what `layer` is made of, by name; the paths in the state that were read)."""
    homes = dict(getattr(layer, "float_paths", ()))
    shapes = layer.float_shapes() if hasattr(layer, "float_shapes") else {}
    floats, read = {}, set()
    for name in layer.float_names():
        home = homes.get(name, (*path, *name))
        home = home if home in given else (*path, *name)
        if home not in given and (*path, "base_module", *name) in given:  # nnx.LoRA(base_module=the layer)
            home = (*path, "base_module", *name)
        value = given.get(home)
        if value is None:
            raise ValueError(f"{path_string(path)}: the state has no {path_string(home)}, which this NVFP4 layer is made from")
        check_leaf(home, value)
        if name in shapes and tuple(value.shape) != tuple(shapes[name]):
            raise ValueError(f"{path_string(home)}: shape {tuple(value.shape)} in the state; the float layer had {tuple(shapes[name])}")
        floats[name] = value
        read.add(home)
    adapters = _adapters(given, path)
    if adapters:
        a, b = adapters
        if merge_lora is False or not isinstance(layer, layers.NVFP4Linear):
            raise ValueError(f"{path_string(a)}: the state has a low-rank adapter, which this NVFP4 layer has no place for; merge it into the "
                             "kernel, or, beside a linear layer, pass merge_lora=True (or alpha / rank)")
        for adapter in adapters:
            check_leaf(adapter, given[adapter])
        floats[("kernel",)] = layer.merged(floats[("kernel",)], given[a], given[b], float(merge_lora))
        read |= {a, b}
    return floats, read


def _adapters(given: Mapping[Path, Any], path: Path) -> tuple[Path, Path] | None:
    for form in _ADAPTERS:
        a, b = ((*path, *(part.format(which) for part in form)) for which in "ab")
        if a in given and b in given:
            return a, b
    return None


def _leaf(path: Path, variable: nnx.Variable, made: Mapping, given: Mapping, taken: set[Path], shared: Mapping[Path, Path]) -> nnx.Variable:
    value = made.get(path)
    if value is None:
        value = given.get(path, given.get(shared.get(path)))
        taken.add(path)
        if value is None:
            if isinstance(variable, layers.InputScale):
                return variable  # calibrated, not trained: it stays
            raise ValueError(f"the state has no {path_string(path)}, which the model needs")
        if jnp.issubdtype(variable.dtype, jnp.floating) and not isinstance(variable, layers.NVFP4Param):
            check_leaf(path, value)
        elif value.dtype != variable.dtype:
            raise ValueError(f"{path_string(path)}: {value.dtype} in the state, {variable.dtype} in the model")
    if tuple(value.shape) != tuple(variable.shape):
        raise ValueError(f"{path_string(path)}: shape {tuple(value.shape)} in the state, {tuple(variable.shape)} in the model")
    return variable.replace(value if value.dtype == variable.dtype else value.astype(variable.dtype))


def is_random(path: Path, value: Any) -> bool:
    """Whether an array in a plain dict is a random key or count, which is no weight."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or ("rngs" in path and dtype == jnp.uint32))


def check_leaf(path: Path, value: Any) -> None:
    """A ValueError unless it is a float weight."""
    if value.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"{path_string(path)}: {value.dtype} in the state; float weights are needed (bfloat16, float16, float32)")


def _surplus(path: Path, count: int) -> str:
    others = f" (and {count - 1} more leaves)" if count > 1 else ""
    way_out = "drop it from the state"
    if any("lora" in str(part) for part in path):
        way_out = "an adapter is merged only where it stands beside the kernel of an NVFP4 linear layer (merge_lora); merge it before"
    return f"{path_string(path)}: the state has it{others}, the model does not, so the rollout would run without it; {way_out}"


def _flatten(state: nnx.State | nnx.Module | Mapping) -> dict[Path, jax.Array]:
    """Leaves by path; random states and what only a call notes are no weights."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    if not isinstance(state, Mapping | nnx.State | nnx.Variable) and not hasattr(state, "dtype"):
        raise ValueError(f"quantize_params: state: an nnx.Module, its state or a nested dict is needed, not {arguments.shown(state)}")
    flat: dict[Path, jax.Array] = {}

    def visit(node, path):
        if isinstance(node, nnx.Variable):
            if not isinstance(node, nnx.RngState | layers.InputAmax | layers.NVFP4Source):
                flat[path] = node.get_value()
        elif isinstance(node, Mapping | nnx.State):
            for key in node:
                visit(node[key], (*path, key))
        elif not (hasattr(node, "dtype") and hasattr(node, "shape")):
            raise ValueError(f"{path_string(path)}: {type(node).__name__} in the state, where an array is needed")
        elif not is_random(path, node):
            flat[path] = node

    visit(state, ())
    for path, value in flat.items():
        arguments.held(path_string(path), value)
    return flat
