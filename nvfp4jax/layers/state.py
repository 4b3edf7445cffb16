"""What a layer keeps: its variables, its mode, and the making of its weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nvfp4jax import arguments, ops
from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as modes
from nvfp4jax.array import NVFP4Array
from nvfp4jax.scaling import Calibrate, Delayed, Name, Observed, Scaling, Static


class NVFP4Param(nnx.Variable):
    """Part of an NVFP4 weight: a scan over stacked layers leaves it whole and sets `layer_index`."""


class NVFP4Source(nnx.Variable):
    """The float weight that an NVFP4 one was made of, in a call that is differentiated; see `nvfp4jax.straight_through`."""


class InputScale(nnx.Variable):
    """A static layer's global scale of its input."""


class InputAmax(nnx.Variable):
    """What a layer has seen of its input (its amaxes), brought up to date by each call: no weight, and in no checkpoint of weights."""


class AmaxHistory(InputAmax):
    """f32 [16]: the amax of the last calls, newest first; 0 where there was none (mode "delayed")."""


class LargestAmax(InputAmax):
    """f32 []: the largest amax of all calls; in place only while `nvfp4jax.calibrate` runs."""


# An nnx filter: what a checkpoint of weights holds, and a trainer's next step replaces.
WEIGHTS = nnx.Not(nnx.Any(nnx.RngState, InputAmax, NVFP4Source))


class InputCounts(InputAmax):
    """A `counting.Counts` of a layer's input; in place only in a model that `telemetry.observed` made."""


UNCHANGED = object()


def set_scaling(layer: nnx.Module, scaling: Name | Scaling | None, scales: Mapping[str, Array | None] | None = None) -> None:
    """Puts an NVFP4 layer into a mode, with what the mode needs for each of the layer's inputs.

    scales: by the names in `layer.inputs`, for static scaling; one that is missing or None is the mode's own, or to come (a
        checkpoint's, `nvfp4jax.calibrate`).
    """
    scaling = modes.parse(scaling, layer.name, experts=hasattr(layer, "num_experts"))
    scale_given = history_given = None
    if isinstance(scaling, Static) and scaling.scale is not None:
        of_experts = [(layer.num_experts,)] if hasattr(layer, "num_experts") else []
        scale_given = _given(layer, "Static: scale", scaling.scale, [*of_experts, ()])
        if not isinstance(scale_given, jax.core.Tracer) and not bool(((scale_given > 0) & jnp.isfinite(scale_given)).all()):
            raise ValueError(f"{layer.name}: Static: scale of shape {scale_given.shape} holds a value that is not finite and positive; take "
                             "what nvfp4jax.calibrate finds, or an online mode")
    if isinstance(scaling, Delayed) and scaling.history is not None:
        history_given = _given(layer, "Delayed: history", scaling.history, [(modes.HISTORY,)])
    for name in layer.inputs:
        scale = (scales or {}).get(name, scale_given) if isinstance(scaling, Static) else None
        setattr(layer, f"{name}_scale", nnx.data(None) if scale is None else InputScale(jnp.asarray(scale, jnp.float32)))
        seen = nnx.data(None)
        if isinstance(scaling, Delayed):
            seen = AmaxHistory(jnp.zeros((*layer.lead, modes.HISTORY), jnp.float32) if history_given is None else history_given)
        if isinstance(scaling, Calibrate):
            seen = LargestAmax(jnp.zeros(layer.lead, jnp.float32))
        setattr(layer, f"{name}_amax", seen)
    field = modes.CARRIED.get(type(scaling))
    layer.scaling = scaling if field is None else dataclasses.replace(scaling, **{field: None})


def _given(layer: nnx.Module, what: str, value: Array, shapes: Sequence[tuple[int, ...]]) -> Array:
    """An array that a mode brings, f32, for each layer of a stack: of one of `shapes`, or with the stack's axes in front."""
    for shape in shapes:
        if value.shape in (shape, (*layer.lead, *shape)):
            return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (*layer.lead, *shape))
    needed = " or ".join(str([*shape]) for shape in shapes)
    raise ValueError(f"{layer.name}: {what} of shape {tuple(value.shape)}; {needed} is needed" + (f", or that behind {[*layer.lead]}" if layer.lead else ""))


def scaling_of(layer: nnx.Module, name: str, scale: Array | None = None) -> Scaling | None:
    """The scaling of one of a layer's inputs, with the array that its mode carries, and what telemetry has counted, where it does.

    scale: of a static layer, in place of its own.
    """
    mode = layer.scaling
    field = modes.CARRIED.get(type(mode))
    if field is not None and scale is None:
        variable = getattr(layer, f"{name}_scale" if isinstance(mode, Static) else f"{name}_amax")
        scale = None if variable is None else variable.get_value()
    mode = mode if field is None else dataclasses.replace(mode, **{field: scale})
    counts = counts_of(layer, name)
    return mode if counts is None else Observed(mode, counts.get_value())


def counts_of(layer: nnx.Module, name: str) -> InputCounts | None:
    """Where telemetry counts one of a layer's inputs; None where it is off."""
    return getattr(layer, f"{name}_counts", None)


def note(layer: nnx.Module, name: str, carried: Any) -> None:
    """Keeps what a mode hands on to the next call, and what telemetry has counted."""
    if isinstance(carried, tuple):
        carried, counts = carried
        getattr(layer, f"{name}_counts").set_value(counts)
    if carried is not None:
        getattr(layer, f"{name}_amax").set_value(carried)


def valid_of(layer: nnx.Module, x: Array, valid: Array | None) -> Array | None:
    """The rows that count: as given, or as the enclosing `valid_rows` says; None where neither the mode nor telemetry asks."""
    if valid is not None:
        ops.check_valid(valid, x, layer.name)
    if not modes.reads_valid(layer.scaling) and all(counts_of(layer, name) is None for name in layer.inputs):
        return None
    return modes.current_valid(x, layer.name) if valid is None else valid


def is_abstract(*values) -> bool:
    return any(isinstance(v, jax.ShapeDtypeStruct) for v in values)


def _without_source(op: Callable) -> Callable:
    """`op` compiled. Its source would be one more result, a copy of the floats; the layers have their own (`set_sources`)."""
    f = lambda w, four_over_six: dataclasses.replace(op(w, four_over_six=four_over_six), source=None)  # noqa: E731
    return jax.jit(f, static_argnames="four_over_six")


_quantize_weight, _quantize_transposed = _without_source(ops.quantize_weight), _without_source(ops.quantize_transposed)
_any_nan = jax.jit(lambda scale: jnp.isnan(scale).any())


def quantize_weight(w: Float[Array, "... N K"], four_over_six: str | None, name: str) -> NVFP4Array:
    """`ops.quantize_weight` compiled, shapes only for an abstract w; errors name the layer."""
    nvfp4_array.check_k(w.shape[-1], name, w.shape)
    nvfp4_array.check_shards(w, name)
    return _quantized(_quantize_weight, w, four_over_six, name)


def quantize_transposed(ws: Sequence[Float[Array, "... K _"]], four_over_six: str | None, name: str) -> NVFP4Array:
    """`ops.quantize_transposed`, as `quantize_weight` above."""
    for w in ws:
        nvfp4_array.check_k(w.shape[-2], name, w.shape)
        nvfp4_array.check_shards(w, name, -2)
    return _quantized(_quantize_transposed, tuple(ws), four_over_six, name)


def _quantized(compiled: Callable, w: Any, four_over_six: str | None, name: str) -> NVFP4Array:
    leaves = jax.tree.leaves(w)
    if is_abstract(*leaves):
        return jax.eval_shape(lambda w: compiled(w, four_over_six=four_over_six), w)  # traced once a shape
    quantized = compiled(w, four_over_six=four_over_six)  # no name: layers of one shape share a program
    # A row that holds NaN or infinity has NaN scales: there is no need to read the weight again.
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) and bool(_any_nan(quantized.scale)):
        shapes = " and ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ValueError(f"{name}: the weight of shape {shapes} holds NaN or infinity; NVFP4 would spread it over whole rows")
    return quantized


def shapes_or_values(f, value):
    """f(value), shapes only for an abstract value."""
    return jax.eval_shape(f, value) if is_abstract(value) else f(value)


def metadata_of(param: nnx.Variable, axes: tuple[tuple[int, ...], ...]) -> dict:
    """The Param's metadata, its sharding (if any) rearranged: new axis i is sharded as the first of the old axes[i]."""
    meta = dict(param.get_metadata())
    spec = meta.get("out_sharding")
    if isinstance(spec, tuple | list):
        spec = tuple(spec) + (None,) * len(param.shape)
        meta["out_sharding"] = tuple(next((spec[a] for a in group if spec[a] is not None), None) for group in axes)
    return meta


def scalar_metadata(meta: Mapping) -> dict:
    return {k: v for k, v in meta.items() if k != "out_sharding"}


def squeeze(global_scale, lead: int):
    """[..., 1, 1] of a stack -> [...]; a single weight's scalar stays."""
    return shapes_or_values(lambda g: g.reshape(g.shape[:lead]), global_scale)


def require(layer: Any, name: str, kind: type, *weights: str) -> None:
    """A ValueError unless the layer has what a layer of that kind has; `weights`: its Params."""
    usual = {nnx.Linear: ("in_features", "out_features", "dtype"), nnx.LinearGeneral: ("in_features", "out_features", "axis", "batch_axis")}
    missing = [a for a in (*weights, *usual.get(kind, ("einsum_str", "kernel_shape") if kind is nnx.Einsum else ())) if not hasattr(layer, a)]
    if missing or isinstance(layer, type) or not all(isinstance(getattr(layer, w), nnx.Variable) for w in weights):
        raise ValueError(f"{name}: layer: {arguments.shown(layer)} is no {kind.__name__}" + (f", it has no {missing[0]}" if missing else ""))


def refuse(layer: nnx.Module, name: str, defaults: Mapping[str, Any]) -> None:
    """A ValueError for an option of a float layer that its NVFP4 layer would not honour."""
    for option, usual in defaults.items():
        if getattr(layer, option, usual) not in (None, usual):
            raise ValueError(f"{name}: {type(layer).__name__} with a {option} of its own cannot be held in NVFP4; leave it in floating point "
                             "(Rule(..., skip=True)) or register a converter (nvfp4jax.register)")


class Decoded:
    """What reads like a Param of floats: a view of an NVFP4 weight, decoded where it is read."""

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    value = property(lambda self: self.get_value())
    T = property(lambda self: self.get_value().T)

    def astype(self, dtype: DTypeLike) -> Array:
        return self.get_value().astype(dtype)

    def __jax_array__(self) -> Array:
        return self.get_value()

    def __getitem__(self, index) -> Array:
        return self.get_value()[index]


@dataclasses.dataclass(frozen=True)
class DecodedKernel(Decoded):
    """The kernel of an NVFP4 layer in the float layer's shape."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    decode: Callable[[], Array]

    def get_value(self) -> Array:
        return self.decode()


def set_view(layer: nnx.Module, scaling: Any) -> None:
    """`nnx.view` of an NVFP4 layer: arrays of the mode that the layer has already stay, unless the mode brings its own."""
    if scaling is UNCHANGED:
        return
    scaling = modes.parse(scaling, layer.name, experts=hasattr(layer, "num_experts"))
    field = modes.CARRIED.get(type(scaling))
    given = field is not None and getattr(scaling, field) is not None  # which `==` does not look at
    if scaling == layer.scaling and not given:
        return
    same = type(scaling) is type(layer.scaling) and not given
    kept = {f"{name}_{kind}": getattr(layer, f"{name}_{kind}") for name in layer.inputs for kind in ("scale", "amax")}
    set_scaling(layer, scaling)
    for name, variable in kept.items():
        if same and variable is not None and field is not None:
            setattr(layer, name, variable)


def watch(layer: nnx.Module, name: str, x: Float[Array, "..."], valid: Array | None) -> None:
    """Notes the amax of a float layer's input, where a calibration asks for it."""
    seen = getattr(layer, f"{name}_amax")
    if seen is not None:
        rows, mask = x.reshape(-1, x.shape[-1]), None if valid is None else valid.reshape(-1)
        note(layer, name, modes.resolve(Calibrate(seen.get_value()), lax.stop_gradient(rows), mask)[1])
