"""Flax NNX layers with NVFP4 weights, each made `from_float` of the layer it takes the place of.

A layer keeps three leaves a weight: packed codes, block scales, global scale; the weight is stored [N, K], contraction last, as
checkpoints have it. They are `NVFP4Param`s, no `nnx.Param`s: a trainer's optimizer and `nnx.grad` pass them by.

`scaling` says where the activation's scale comes from (`nvfp4jax.scaling`): a frozen value without arrays. What a mode carries from
call to call, a delayed layer's history, is state of the layer, an `InputAmax`, that moves with a model as BatchNorm's statistics do
(under jit by `nnx.jit`, or split, merged and handed back). `generate` hands it on. `nnx.view(model, scaling=...)` gives the same
weights in another mode.

A model makes an activation once for all the layers that read it: see `feed`, `feed_norm` and `feed_gated`.

Shapes below are without the leading axis that a stack of layers adds; see `layer_index`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import array as nvfp4_array
from nvfp4jax import numerics, ops, routing
from nvfp4jax import scaling as modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.ops import Implementation
from nvfp4jax.scaling import Calibrate, Delayed, Name, Scaling, Static

# --- what a layer keeps ------------------------------------------------------------------------------------------------


class NVFP4Param(nnx.Variable):
    """Part of an NVFP4 weight: a scan over stacked layers leaves it whole and sets `layer_index`."""


class NVFP4Source(nnx.Variable):
    """The float weight that an NVFP4 one was made of, in a call that is differentiated; see `nvfp4jax.straight_through`."""


class InputScale(nnx.Variable):
    """A static layer's global scale of its input."""


class InputAmax(nnx.Variable):
    """What a layer has seen of its input's amax, brought up to date by each call: no weight, and in no checkpoint of weights."""


class AmaxHistory(InputAmax):
    """f32 [16]: the amax of the last calls, newest first; 0 where there was none (mode "delayed")."""


class LargestAmax(InputAmax):
    """f32 []: the largest amax of all calls; in place only while `nvfp4jax.calibrate` runs."""


# An nnx filter: what a checkpoint of weights holds, and a trainer's next step replaces.
WEIGHTS = nnx.Not(nnx.Any(nnx.RngState, InputAmax, NVFP4Source))
UNCHANGED = object()


def set_scaling(layer: nnx.Module, scaling: Name | Scaling | None, scales: Mapping[str, Array | None] | None = None) -> None:
    """Puts an NVFP4 layer into a mode, with what the mode needs for each of the layer's inputs.

    scales: by the names in `layer.inputs`, for static scaling; one that is missing or None is the mode's own, or to come (a
        checkpoint's, `nvfp4jax.calibrate`).
    """
    scaling = modes.parse(scaling, layer.name, experts=isinstance(layer, NVFP4Experts))
    given = (scaling.scale if isinstance(scaling, Static) else None, scaling.history if isinstance(scaling, Delayed) else None)
    for name in layer.inputs:
        scale = (scales or {}).get(name, given[0]) if isinstance(scaling, Static) else None
        setattr(layer, f"{name}_scale", nnx.data(None) if scale is None else InputScale(jnp.asarray(scale, jnp.float32)))
        seen = nnx.data(None)
        if isinstance(scaling, Delayed):
            seen = AmaxHistory(jnp.zeros((*layer.lead, modes.HISTORY), jnp.float32) if given[1] is None else given[1])
        if isinstance(scaling, Calibrate):
            seen = LargestAmax(jnp.zeros(layer.lead, jnp.float32))
        setattr(layer, f"{name}_amax", seen)
    field = modes.CARRIED.get(type(scaling))
    layer.scaling = scaling if field is None else dataclasses.replace(scaling, **{field: None})


def scaling_of(layer: nnx.Module, name: str) -> Scaling | None:
    """The scaling of one of a layer's inputs, with the array that its mode carries."""
    field = modes.CARRIED.get(type(layer.scaling))
    if field is None:
        return layer.scaling
    variable = getattr(layer, f"{name}_scale" if isinstance(layer.scaling, Static) else f"{name}_amax")
    return dataclasses.replace(layer.scaling, **{field: None if variable is None else variable.get_value()})


def note(layer: nnx.Module, name: str, carried: Array | None) -> None:
    """Keeps what a mode hands on to the next call."""
    if carried is not None:
        getattr(layer, f"{name}_amax").set_value(carried)


def _valid(layer: nnx.Module, x: Array, valid: Array | None) -> Array | None:
    """The rows that count: as given, or as the enclosing `valid_rows` says; None for modes that do not ask."""
    if not modes.reads_valid(layer.scaling):
        return None
    return modes.current_valid(x, layer.name) if valid is None else valid


# --- an activation, made once for its readers --------------------------------------------------------------------------


def feed(x: Float[Array, "... K"], readers: Sequence[nnx.Module], valid: Bool[Array, "..."] | None = None) -> tuple:
    """What each of `readers`, layers that all read x, is to be called with.

    NVFP4 layers of equal scaling get one QuantizedActivation, the same object; a float layer, experts and layers that compute in
    another dtype get x. valid: bool x.shape[:-1], rows that count in an amax. Static layers are scaled by the largest of their scales.
    """
    return _feed(readers, x, valid, lambda **options: ops.quantize_activation(x, **options))


def feed_norm(norm: nnx.Module, x: Float[Array, "... K"], readers: Sequence[nnx.Module], valid: Bool[Array, "..."] | None = None) -> tuple:
    """`feed` of norm(x), `norm` an `RMSNorm`: norm and quantization in one launch where the backend can."""
    weight = norm.scale.get_value()
    return _feed(readers, norm(x), valid, lambda **options: ops.rms_norm(x, weight.astype(x.dtype), norm.eps, **options))


def feed_gated(
    gate: Float[Array, "... K"], up: Float[Array, "... K"], readers: Sequence[nnx.Module], valid: Bool[Array, "..."] | None = None
) -> tuple:
    """`feed` of silu(gate) * up, in one launch where the backend can."""
    return _feed(readers, numerics.silu_mul(gate, up), valid, lambda **options: ops.silu_mul(gate, up, **options))


def _feed(readers: Sequence[nnx.Module], value: Array, valid: Array | None, make: Callable[..., QuantizedActivation]) -> tuple:
    made: dict[Any, QuantizedActivation] = {}

    def given(reader: nnx.Module) -> Array | QuantizedActivation:
        if type(reader) is not NVFP4Linear or reader.compute_dtype(value.dtype) != value.dtype:
            return value
        key = (reader.scaling, reader.implementation)
        if key not in made:
            group = [r for r in readers if type(r) is NVFP4Linear and (r.scaling, r.implementation) == key]
            mode = scaling_of(reader, "input")
            if isinstance(mode, Static) and len(group) > 1 and all(r.input_scale is not None for r in group):
                largest = jnp.stack([r.input_scale.get_value() for r in group]).max(0)
                mode = dataclasses.replace(mode, scale=largest)
            made[key] = make(scaling=mode, valid=_valid(reader, value, valid), implementation=reader.implementation, name=reader.name)
            for r in group:
                note(r, "input", made[key].carried)
        return made[key]

    return tuple(given(reader) for reader in readers)


class RMSNorm(nnx.Module):
    """`numerics.rms_norm`: x over its root mean square, times `scale`, over the last axis; in x's dtype."""

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        return ops.norm(x, self.scale.get_value().astype(x.dtype), self.eps)


def project(layer: nnx.Module, x: Array | QuantizedActivation) -> Float[Array, "... N"]:
    """layer(x) in float32, for a head or a router. A plain `nnx.Linear` multiplies by `ops.float_matmul`: products exact, and on Hopper
    bits that do not depend on the batch."""
    if type(layer) is nnx.Linear and layer.bias is None and not isinstance(x, QuantizedActivation) and layer.dot_general is lax.dot_general:
        # A narrower dtype rounds, as in the layer itself; a wider one would change no product.
        dtype = None if layer.dtype is None else jnp.dtype(layer.dtype)
        narrow = lambda v: v if dtype is None or dtype.itemsize > v.dtype.itemsize else v.astype(dtype)  # noqa: E731
        return ops.float_matmul(narrow(x), narrow(layer.kernel.get_value()), name="project")
    return layer(x).astype(jnp.float32)


# --- making weights ----------------------------------------------------------------------------------------------------


def _is_abstract(*values) -> bool:
    return any(isinstance(v, jax.ShapeDtypeStruct) for v in values)


_quantize_weight = jax.jit(ops.quantize_weight, static_argnames="four_over_six")
_any_nan = jax.jit(lambda scale: jnp.isnan(scale).any())


def quantize_weight(w: Float[Array, "... N K"], four_over_six: str | None, name: str) -> NVFP4Array:
    """`ops.quantize_weight` compiled, shapes only for an abstract w; errors name the layer."""
    nvfp4_array.check_k(w.shape[-1], name, w.shape)
    if _is_abstract(w):
        return jax.eval_shape(lambda w: _quantize_weight(w, four_over_six=four_over_six), w)  # traced once a shape
    quantized = _quantize_weight(w, four_over_six=four_over_six)  # no name: layers of one shape share a program
    # A row that holds NaN or infinity has NaN scales: there is no need to read the weight again.
    if not isinstance(w, jax.core.Tracer) and bool(_any_nan(quantized.scale)):
        raise ValueError(f"{name}: the weight of shape {tuple(w.shape)} holds NaN or infinity; NVFP4 would spread it over whole rows")
    return quantized


def _map(f, value):
    """f(value), shapes only for an abstract value."""
    return jax.eval_shape(f, value) if _is_abstract(value) else f(value)


def _metadata(param: nnx.Variable, axes: tuple[tuple[int, ...], ...]) -> dict:
    """The Param's metadata, its sharding (if any) rearranged: new axis i is sharded as the first of the old axes[i]."""
    meta = dict(param.get_metadata())
    spec = meta.get("out_sharding")
    if isinstance(spec, tuple | list):
        spec = tuple(spec) + (None,) * len(param.shape)
        meta["out_sharding"] = tuple(next((spec[a] for a in group if spec[a] is not None), None) for group in axes)
    return meta


def _scalar_metadata(meta: Mapping) -> dict:
    return {k: v for k, v in meta.items() if k != "out_sharding"}


def _squeeze(global_scale, lead: int):
    """[..., 1, 1] of a stack -> [...]; a single weight's scalar stays."""
    return _map(lambda g: g.reshape(g.shape[:lead]), global_scale)


def _refuse(layer: nnx.Module, name: str, defaults: Mapping[str, Any]) -> None:
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


# --- linear layers -----------------------------------------------------------------------------------------------------


class NVFP4Linear(nnx.Module):
    """y = x w^T + bias with w in NVFP4; takes the place of `nnx.Linear`.

    Leaves: kernel_packed u8 [N, K/2], kernel_scale float8_e4m3fn [N, K/16], kernel_global_scale f32 []; bias as the float layer had it,
    or None; input_scale f32 [] (static scaling) or None; input_amax: an `AmaxHistory` (delayed) or None. `scaling`: see the module's
    docstring. The products are exact whatever the float layer's `precision` was; its `preferred_element_type` is the result's dtype.
    `kernel` reads like the float layer's Param, decoded.
    """

    inputs = ("input",)

    def __init__(
        self,
        kernel: nnx.Variable,
        bias: nnx.Variable | None,
        *,
        name: str,
        features: tuple[tuple[int, ...], tuple[int, ...]],
        dtype: jnp.dtype | None,
        scaling: Name | Scaling | None = "token",
        weight_four_over_six: str | None = None,
        implementation: Implementation = None,
        preferred_element_type: DTypeLike | None = None,
    ):
        self.name = name
        self.contracted, self.features = features
        self.weight_four_over_six = weight_four_over_six
        self.implementation = ops.check_implementation(implementation)
        self.dtype = dtype
        self.preferred_element_type = preferred_element_type
        self.param_dtype = jnp.dtype(kernel.dtype)
        self.layer_index = nnx.data(None)
        self.kernel_source = nnx.data(None)
        lead = len(kernel.shape) - len(self._kernel_axes()[0]) - len(self._kernel_axes()[1])
        self.kernel_shape = tuple(kernel.shape[lead:])
        n_axes, k_axes = ([lead + a for a in axes] for axes in self._kernel_axes())
        meta = _metadata(kernel, (*((a,) for a in range(lead)), tuple(n_axes), tuple(k_axes)))
        w = quantize_weight(_map(self._matrix, kernel.get_value()), weight_four_over_six, name)
        self.kernel_packed = NVFP4Param(w.packed, **meta)
        self.kernel_scale = NVFP4Param(w.scale, **meta)
        self.kernel_global_scale = NVFP4Param(_squeeze(w.global_scale, lead), **_scalar_metadata(meta))
        self.bias = nnx.data(None) if bias is None else bias
        set_scaling(self, scaling)

    @classmethod
    def from_float(cls, layer: nnx.Linear, *, name: str = "linear", **options) -> "NVFP4Linear":
        """layer: nnx.Linear, kernel [in, out] (or a stack of them). options: scaling and the rest of the constructor's.

        ValueError, naming it, for a layer with a dot_general or promote_dtype of its own.
        """
        _refuse(layer, name, {"dot_general": lax.dot_general, "promote_dtype": flax_dtypes.promote_dtype})
        features = (layer.in_features,), (layer.out_features,)
        return cls(layer.kernel, layer.bias, name=name, features=features, dtype=layer.dtype,
                   preferred_element_type=layer.preferred_element_type, **options)  # fmt: skip

    def set_view(self, scaling: Name | Scaling | None | object = UNCHANGED) -> None:
        """For `nnx.view(model, scaling=...)`: static scaling keeps an input scale that there is, delayed an earlier history."""
        set_view(self, scaling)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes that a stack adds."""
        return tuple(self.kernel_global_scale.shape)

    @property
    def in_features(self) -> int | tuple[int, ...]:
        return self.contracted[0]

    @property
    def out_features(self) -> int | tuple[int, ...]:
        return self.features[0]

    @property
    def use_bias(self) -> bool:
        return self.bias is not None

    @property
    def kernel(self) -> DecodedKernel:
        """The kernel in the float layer's shape and dtype, decoded where it is read; of a stack, all its layers."""
        return DecodedKernel((*self.lead, *self.kernel_shape), self.param_dtype, self._decode_kernel)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K)."""
        return math.prod(self.features), math.prod(self.contracted)

    def _kernel_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the float kernel that make N, and K, in that order."""
        return (1,), (0,)

    def _matrix(self, kernel: Array) -> Array:
        """The float kernel [(stack), ...] -> [(stack), N, K]."""
        n_axes, k_axes = self._kernel_axes()
        lead = kernel.ndim - len(n_axes) - len(k_axes)
        order = (*range(lead), *(lead + a for a in n_axes), *(lead + a for a in k_axes))
        return kernel.transpose(order).reshape(*kernel.shape[:lead], *self.matrix_shape)

    def _kernel_of(self, matrix: Array) -> Array:
        """The inverse of `_matrix`."""
        lead = matrix.ndim - 2
        split = matrix.reshape(*matrix.shape[:lead], *self.features, *self.contracted)
        axes = [lead + a for group in self._kernel_axes() for a in group]
        return split.transpose(*range(lead), *(lead + axes.index(lead + a) for a in range(len(axes))))

    def _decode_kernel(self) -> Array:
        global_scale = self.kernel_global_scale.get_value()
        global_scale = global_scale[..., None, None] if self.lead else global_scale
        w = NVFP4Array(self.kernel_packed.get_value(), self.kernel_scale.get_value(), global_scale)
        return self._kernel_of(w.dequantize(self.param_dtype))

    def merged(self, kernel: Array, lora_a: Array, lora_b: Array, factor: float) -> Array:
        """The float kernel with a low-rank adapter's product in it, in kernel's dtype.

        lora_a: [(stack), contracted axes, r]; lora_b: [(stack), r, features]; factor: alpha / r.
        """
        lead = kernel.ndim - len(self.kernel_shape)
        stack, rank = kernel.shape[:lead], lora_a.shape[-1]
        n, k = self.matrix_shape
        if lora_a.size != math.prod(stack) * k * rank or lora_b.size != math.prod(stack) * rank * n:
            raise ValueError(f"{self.name}: adapters of shapes {lora_a.shape} and {lora_b.shape} do not fit a kernel of shape {kernel.shape}")
        a = lora_a.astype(jnp.float32).reshape(*stack, k, rank)
        b = lora_b.astype(jnp.float32).reshape(*stack, rank, n)
        product = jnp.einsum("...kr,...rn->...nk", a, b, precision=lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + jnp.float32(factor) * self._kernel_of(product)).astype(kernel.dtype)

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        """Where the float layer keeps what this one is made of."""
        return (("kernel",),) if self.bias is None else (("kernel",), ("bias",))

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The shapes that the float layer's arrays had."""
        shapes = {("kernel",): (*self.lead, *self.kernel_shape)}
        return shapes if self.bias is None else shapes | {("bias",): tuple(self.bias.shape)}

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        """The float layer's arrays -> this layer's, by name. Pure."""
        kernel = params[("kernel",)]
        lead = kernel.ndim - len(self._kernel_axes()[0]) - len(self._kernel_axes()[1])
        w = quantize_weight(self._matrix(kernel), self.weight_four_over_six, self.name)
        out = {("kernel_packed",): w.packed, ("kernel_scale",): w.scale, ("kernel_global_scale",): _squeeze(w.global_scale, lead)}
        if self.bias is not None:
            out[("bias",)] = params[("bias",)]
        return out

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        """Lets gradients of the weight pass to the float layer's arrays."""
        self.kernel_source = NVFP4Source(params[("kernel",)])

    def weight(self) -> NVFP4Array:
        """The weight as an NVFP4Array [N, K]."""
        source = None if self.kernel_source is None else self._matrix(self.kernel_source.get_value())
        return NVFP4Array(
            self.kernel_packed.get_value(), self.kernel_scale.get_value(), self.kernel_global_scale.get_value(), self.layer_index, source
        )

    def compute_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """What an input of `dtype` is computed in, as the float layer does."""
        return jnp.dtype(self.dtype) if self.dtype is not None else jnp.promote_types(dtype, self.param_dtype)

    def _matmul(self, x: Array | QuantizedActivation, bias: Array | None, valid: Array | None) -> Array:
        """x [..., K] -> [..., N]."""
        a = x
        if not isinstance(x, QuantizedActivation):
            x = x.astype(self.compute_dtype(x.dtype))
            options = dict(valid=_valid(self, x, valid), implementation=self.implementation, name=self.name)
            a = ops.quantize_activation(x, scaling_of(self, "input"), **options)
            note(self, "input", a.carried)
        out_dtype = a.dtype if self.preferred_element_type is None else self.preferred_element_type
        return ops.matmul(a, self.weight(), bias=bias, out_dtype=out_dtype, implementation=self.implementation, name=self.name)

    def __call__(
        self, inputs: Float[Array, "... K"] | QuantizedActivation, out_sharding=None, *, valid: Bool[Array, "..."] | None = None
    ) -> Float[Array, "... N"]:
        """inputs: float, or a QuantizedActivation from `feed`. valid: bool inputs.shape[:-1], rows that count in an amax."""
        return _constrain(self._matmul(inputs, None if self.bias is None else self.bias.get_value(), valid), out_sharding)


def set_view(layer: nnx.Module, scaling: Any) -> None:
    """`nnx.view` of an NVFP4 layer: arrays of the mode that the layer has already stay."""
    if scaling is UNCHANGED:
        return
    scaling = modes.parse(scaling, layer.name, experts=isinstance(layer, NVFP4Experts))
    if scaling == layer.scaling:
        return
    same = type(scaling) is type(layer.scaling)
    kept = {f"{name}_{kind}": getattr(layer, f"{name}_{kind}") for name in layer.inputs for kind in ("scale", "amax")}
    set_scaling(layer, scaling)
    for name, variable in kept.items():
        if same and variable is not None and modes.CARRIED.get(type(scaling)) is not None:
            setattr(layer, name, variable)


def _constrain(y: Array, out_sharding) -> Array:
    return y if out_sharding is None else jax.lax.with_sharding_constraint(y, out_sharding)


class NVFP4LinearGeneral(NVFP4Linear):
    """Takes the place of `nnx.LinearGeneral` without batch axes: several axes contracted, several features."""

    def __init__(self, *args, axis: tuple[int, ...], **kwargs):
        self.axis = axis
        super().__init__(*args, **kwargs)

    @classmethod
    def from_float(cls, layer: nnx.LinearGeneral, *, name: str = "linear_general", **options) -> "NVFP4LinearGeneral":
        if layer.batch_axis:
            raise ValueError(f"{name}: LinearGeneral with batch_axis={dict(layer.batch_axis)} has one weight a batch entry; leave it "
                             "in bfloat16 (Rule(..., skip=True)) or use nvfp4jax.Experts")
        _refuse(layer, name, {"dot_general": lax.dot_general, "dot_general_cls": None, "promote_dtype": flax_dtypes.promote_dtype})
        return cls(layer.kernel, layer.bias, name=name, features=(layer.in_features, layer.out_features), axis=layer.axis,
                   dtype=layer.dtype, preferred_element_type=layer.preferred_element_type, **options)  # fmt: skip

    in_features = property(lambda self: self.contracted)
    out_features = property(lambda self: self.features)

    def _kernel_axes(self):
        n_in = len(self.contracted)
        return tuple(range(n_in, n_in + len(self.features))), tuple(range(n_in))

    def __call__(self, inputs: Float[Array, "..."], out_sharding=None, *, valid: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        if tuple(inputs.shape[a] for a in self.axis) != self.contracted:
            raise ValueError(f"{self.name}: inputs of shape {inputs.shape} at axes {self.axis} need sizes {self.contracted}")
        x = contracted_last(self, inputs)
        y = self._matmul(x, None if self.bias is None else self.bias.get_value().reshape(-1), valid)
        return _constrain(y.reshape(*x.shape[:-1], *self.features), out_sharding)


class NVFP4Einsum(NVFP4Linear):
    """Takes the place of `nnx.Einsum` whose string contracts input and kernel without a shared batch axis."""

    def __init__(self, *args, einsum_str: str, **kwargs):
        self.einsum_str = einsum_str
        super().__init__(*args, **kwargs)

    @classmethod
    def from_float(cls, layer: nnx.Einsum, *, name: str = "einsum", **options) -> "NVFP4Einsum":
        if layer.einsum_str is None:
            raise ValueError(f"{name}: this Einsum takes its string at each call; give it one at construction to quantize it")
        _refuse(layer, name, {"einsum_op": jnp.einsum, "promote_dtype": flax_dtypes.promote_dtype})
        n_letters, k_letters = _einsum_letters(layer.einsum_str, name)
        sizes = dict(zip(_operands(layer.einsum_str)[1], layer.kernel_shape, strict=True))
        features = tuple(sizes[c] for c in k_letters), tuple(sizes[c] for c in n_letters)
        return cls(layer.kernel, layer.bias, name=name, features=features, einsum_str=layer.einsum_str, dtype=layer.dtype,
                   preferred_element_type=layer.preferred_element_type, **options)  # fmt: skip

    def _kernel_axes(self):
        letters = _operands(self.einsum_str)[1]
        return tuple(tuple(letters.index(c) for c in group) for group in _einsum_letters(self.einsum_str, self.name))

    def __call__(
        self, inputs: Float[Array, "..."], einsum_str: str | None = None, out_sharding=None, *, valid: Bool[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        if einsum_str is not None:
            raise ValueError(f"{self.name}: quantized for {self.einsum_str!r}; it takes no einsum_str at the call")
        lhs, out = _spelled_out(self.einsum_str, inputs.ndim)
        n_letters, k_letters = _einsum_letters(self.einsum_str, self.name)
        if len(lhs) != inputs.ndim:
            raise ValueError(f"{self.name}: inputs of shape {inputs.shape} do not fit {self.einsum_str!r}")
        x = contracted_last(self, inputs)
        bias = None
        if self.bias is not None:  # kept as the float layer had it: the features in the order of the result
            order = [c for c in out if c in n_letters]
            shape = dict(zip(n_letters, self.features, strict=True))
            bias = self.bias.get_value().reshape([shape[c] for c in order]).transpose([order.index(c) for c in n_letters]).reshape(-1)
        y = self._matmul(x, bias, valid).reshape(*x.shape[:-1], *self.features)
        letters = [*(c for c in lhs if c not in k_letters), *n_letters]
        return _constrain(y.transpose([letters.index(c) for c in out]), out_sharding)


def _operands(einsum_str: str) -> tuple[str, str, str]:
    inputs, out = einsum_str.replace(" ", "").split("->")
    lhs, kernel = inputs.split(",")
    return lhs, kernel, out


def _spelled_out(einsum_str: str, ndim: int) -> tuple[str, str]:
    """The letters of an input with `ndim` axes, and of the result, an ellipsis replaced by letters."""
    lhs, kernel, out = _operands(einsum_str)
    unused = [c for c in map(chr, range(ord("A"), ord("Z") + 1)) if c not in lhs + kernel + out]
    dots = "".join(unused[: ndim - len(lhs) + 3])
    return lhs.replace("...", dots), out.replace("...", dots)


def contracted_last(layer: nnx.Module, inputs: Float[Array, "..."]) -> Float[Array, "... K"]:
    """What a linear layer (of Flax or of ours) reads, the axes that it contracts made one and put last."""
    if isinstance(layer, nnx.LinearGeneral | NVFP4LinearGeneral):
        axes = [a % inputs.ndim for a in layer.axis]
    elif isinstance(layer, nnx.Einsum | NVFP4Einsum):
        letters, _ = _spelled_out(layer.einsum_str, inputs.ndim)
        axes = [letters.index(c) for c in _einsum_letters(layer.einsum_str, "einsum")[1]]
    else:
        axes = [inputs.ndim - 1]
    free = [a for a in range(inputs.ndim) if a not in axes]
    return inputs.transpose(*free, *axes).reshape(*(inputs.shape[a] for a in free), math.prod(inputs.shape[a] for a in axes))


def _einsum_letters(einsum_str: str, name: str) -> tuple[str, str]:
    """The kernel's letters that are features, and those that are contracted, each in the kernel's order."""
    lhs, kernel, out = _operands(einsum_str)
    features = "".join(c for c in kernel if c in out and c not in lhs)
    contracted = "".join(c for c in kernel if c in lhs and c not in out)
    plain = len(set(kernel)) == len(kernel) == len(features) + len(contracted) and "." not in kernel
    if not plain or not features or not contracted or any(c not in out and c not in contracted for c in lhs.replace("...", "")):
        raise ValueError(f"{name}: einsum {einsum_str!r} is no plain matmul (a batch axis in the kernel, or an axis summed on its own); "
                         "leave it in bfloat16 (Rule(..., skip=True)) or use nvfp4jax.Experts")
    return features, contracted


# --- experts -----------------------------------------------------------------------------------------------------------


class Experts(nnx.Module):
    """The experts of a gated mixture, in floating point: silu(x gate) * (x up), times down, weighted and summed.

    Params gate_proj, up_proj [E, K, N] = [E, hidden, intermediate] and down_proj [E, intermediate, hidden], raw, as trainers
    keep them. Call: x [T, hidden], expert_ids i32 [T, k], weights f32 [T, k] -> [T, hidden].
    """

    def __init__(self, num_experts: int, hidden: int, intermediate: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.dtype = dtype

        def init(inputs, outputs):
            scale = jnp.asarray(inputs**-0.5, param_dtype)
            return nnx.Param(jax.random.normal(rngs.params(), (num_experts, inputs, outputs), param_dtype) * scale)

        self.gate_proj, self.up_proj = init(hidden, intermediate), init(hidden, intermediate)
        self.down_proj = init(intermediate, hidden)
        self.gate_up_input_amax, self.down_input_amax = nnx.data(None), nnx.data(None)

    def __call__(
        self, x: Float[Array, "T H"], expert_ids: Int[Array, "T k"], weights: Float[Array, "T k"], *, valid: Bool[Array, "T"] | None = None
    ) -> Float[Array, "T H"]:
        """valid: bool [T], tokens that count in an amax: read where a calibration notes one."""
        dtype = self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.gate_proj.dtype)
        route = routing.route(expert_ids, self.num_experts)
        rows = x.astype(dtype)[route.token_of_row]
        if self.gate_up_input_amax is not None:
            valid = modes.current_valid(x, "experts") if valid is None else valid
            valid = None if valid is None else valid[route.token_of_row]

        def product(rows, w):
            precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
            return jax.lax.ragged_dot(rows, w.get_value().astype(dtype), route.group_sizes, precision=precision)

        watch(self, "gate_up_input", rows, valid)
        h = numerics.silu_mul(product(rows, self.gate_proj), product(rows, self.up_proj))
        watch(self, "down_input", h, valid)
        return routing.combine(product(h, self.down_proj), route, weights, out_dtype=dtype)


def watch(layer: nnx.Module, name: str, x: Float[Array, "..."], valid: Array | None) -> None:
    """Notes the amax of a float layer's input, where a calibration asks for it."""
    seen = getattr(layer, f"{name}_amax")
    if seen is not None:
        rows, mask = x.reshape(-1, x.shape[-1]), None if valid is None else valid.reshape(-1)
        note(layer, name, modes.resolve(Calibrate(seen.get_value()), lax.stop_gradient(rows), mask)[1])


class NVFP4Experts(nnx.Module):
    """`Experts` with NVFP4 weights; both matmuls take an online scale, the second on the SwiGLU output.

    Leaves: gate_up_packed u8 [E, 2, I, H/2] (gate first), gate_up_scale [E, 2, I, H/16], gate_up_global_scale f32 [E], shared by gate
    and up; down_packed u8 [E, H, I/2], down_scale, down_global_scale; gate_up_input_scale and down_input_scale f32 [] or [E] (static
    scaling) or None. `scaling` as in the module's docstring; gate_up_input_amax and down_input_amax: an `AmaxHistory`, of all experts
    together (delayed), or None.
    """

    inputs = ("gate_up_input", "down_input")

    def __init__(
        self,
        gate_proj: nnx.Variable,
        up_proj: nnx.Variable,
        down_proj: nnx.Variable,
        *,
        name: str,
        dtype: jnp.dtype | None,
        scaling: Name | Scaling | None = "token",
        weight_four_over_six: str | None = None,
        implementation: Implementation = None,
        input_scales: tuple[Array, Array] | None = None,
    ):
        self.name = name
        self.num_experts, self.hidden, self.intermediate = gate_proj.shape[-3:]
        self.weight_four_over_six = weight_four_over_six
        self.implementation = ops.check_implementation(implementation)
        self.dtype = dtype
        self.param_dtype = jnp.dtype(gate_proj.dtype)
        self.layer_index = nnx.data(None)
        self.gate_up_source, self.down_source = nnx.data(None), nnx.data(None)
        values = {(n,): p.get_value() for n, p in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj))}
        abstract = _is_abstract(*values.values())
        made = self._quantize_abstract(values) if abstract else self.quantize_params(values)
        lead = tuple((a,) for a in range(len(gate_proj.shape) - 2))
        n = len(lead)
        for weight, param, axes in (("gate_up", gate_proj, (*lead, (), (n + 1,), (n,))), ("down", down_proj, (*lead, (n + 1,), (n,)))):
            meta = _metadata(param, axes)
            setattr(self, f"{weight}_packed", NVFP4Param(made[(f"{weight}_packed",)], **meta))
            setattr(self, f"{weight}_scale", NVFP4Param(made[(f"{weight}_scale",)], **meta))
            setattr(self, f"{weight}_global_scale", NVFP4Param(made[(f"{weight}_global_scale",)], **_metadata(param, lead)))
        set_scaling(self, scaling, None if input_scales is None else dict(zip(self.inputs, input_scales, strict=True)))

    @classmethod
    def from_float(cls, layer: nnx.Module, *, name: str = "experts", **options) -> "NVFP4Experts":
        """layer: `Experts`, or any module with Params gate_proj, up_proj [E, hidden, I] and down_proj [E, I, hidden] (or stacks)."""
        return cls(layer.gate_proj, layer.up_proj, layer.down_proj, name=name, dtype=getattr(layer, "dtype", None), **options)

    def set_view(self, scaling: Name | Scaling | None | object = UNCHANGED) -> None:
        """For `nnx.view(model, scaling=...)`."""
        set_view(self, scaling)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes that a stack adds."""
        return tuple(self.gate_up_global_scale.shape[:-1])

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        return (("gate_proj",), ("up_proj",), ("down_proj",))

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        wide = (*self.lead, self.num_experts, self.hidden, self.intermediate)
        return {("gate_proj",): wide, ("up_proj",): wide, ("down_proj",): (*wide[:-2], self.intermediate, self.hidden)}

    def _quantize_abstract(self, params):
        nvfp4_array.check_k(self.hidden, f"{self.name}: gate_proj", params[("gate_proj",)].shape)
        nvfp4_array.check_k(self.intermediate, f"{self.name}: down_proj", params[("down_proj",)].shape)
        return jax.eval_shape(self.quantize_params, params)

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        """The float layer's arrays [E, K, N] -> this layer's, by name. Pure."""
        gate, up, down = (jnp.swapaxes(params[n], -1, -2) for n in self.float_names())
        both = quantize_weight(jnp.concatenate([gate, up], -2), self.weight_four_over_six, f"{self.name}: gate_up")
        down = quantize_weight(down, self.weight_four_over_six, f"{self.name}: down")
        halves = lambda v: v.reshape(*v.shape[:-2], 2, v.shape[-2] // 2, v.shape[-1])  # noqa: E731
        return {
            ("gate_up_packed",): halves(both.packed),
            ("gate_up_scale",): halves(both.scale),
            ("gate_up_global_scale",): both.global_scale[..., 0, 0],
            ("down_packed",): down.packed,
            ("down_scale",): down.scale,
            ("down_global_scale",): down.global_scale[..., 0, 0],
        }

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        """Lets gradients of the weights pass to the float layer's arrays."""
        gate, up, down = (jnp.swapaxes(params[n], -1, -2) for n in self.float_names())
        self.gate_up_source, self.down_source = NVFP4Source(jnp.stack([gate, up], -3)), NVFP4Source(down)

    def weights(self) -> tuple[NVFP4Array, NVFP4Array]:
        """gate_up [E, 2, I, H] and down [E, H, I] as NVFP4Arrays."""
        gate, down = self.gate_up_global_scale.get_value(), self.down_global_scale.get_value()
        sources = [None if s is None else s.get_value() for s in (self.gate_up_source, self.down_source)]
        return (
            NVFP4Array(self.gate_up_packed.get_value(), self.gate_up_scale.get_value(), gate[..., None, None, None], self.layer_index, sources[0]),
            NVFP4Array(self.down_packed.get_value(), self.down_scale.get_value(), down[..., None, None], self.layer_index, sources[1]),
        )

    def __call__(
        self, x: Float[Array, "T H"], expert_ids: Int[Array, "T k"], weights: Float[Array, "T k"], *, valid: Bool[Array, "T"] | None = None
    ) -> Float[Array, "T H"]:
        """valid: bool [T], tokens that count in an amax."""
        dtype = self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.param_dtype)
        x = x.astype(dtype)
        scaling = tuple(scaling_of(self, name) for name in self.inputs)
        y, carried = ops.experts_carrying(
            x, expert_ids, weights, *self.weights(), scaling=scaling, valid=_valid(self, x, valid), out_dtype=dtype,
            implementation=self.implementation, name=self.name,
        )  # fmt: skip
        for name, state in zip(self.inputs, carried, strict=True):
            note(self, name, state)
        return y


class NVFP4Weight(Decoded, nnx.Module):
    """A raw Param [..., K, N] held in NVFP4, weights only: `w[...]`, `w.get_value()` or jnp functions see it decoded.

    Takes the place of the Param itself in a module that nobody registered, e.g. expert weights [E, K, N] used in an einsum.
    The decoded copy is the user's: prefer `NVFP4Experts`, which keeps none.
    """

    def __init__(self, param: nnx.Variable, *, name: str, weight_four_over_six: str | None = None):
        self.name = name
        self.weight_four_over_six = weight_four_over_six
        self.matrix_shape, self.dtype = tuple(param.shape[-2:]), jnp.dtype(param.dtype)
        self.kernel_source = nnx.data(None)
        lead = tuple((a,) for a in range(len(param.shape) - 2))
        n = len(lead)
        meta = _metadata(param, (*lead, (n + 1,), (n,)))
        value = param.get_value()
        made = jax.eval_shape(self.quantize_params, {(): value}) if _is_abstract(value) else self.quantize_params({(): value})
        self.kernel_packed = NVFP4Param(made[("kernel_packed",)], **meta)
        self.kernel_scale = NVFP4Param(made[("kernel_scale",)], **meta)
        self.kernel_global_scale = NVFP4Param(made[("kernel_global_scale",)], **_metadata(param, lead))

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        return ((),)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.kernel_global_scale.shape, *self.matrix_shape)

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {(): self.shape}

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        w = quantize_weight(jnp.swapaxes(params[()], -1, -2), self.weight_four_over_six, self.name)
        return {("kernel_packed",): w.packed, ("kernel_scale",): w.scale, ("kernel_global_scale",): w.global_scale[..., 0, 0]}

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        self.kernel_source = NVFP4Source(jnp.swapaxes(params[()], -1, -2))

    def get_value(self) -> Float[Array, "... K N"]:
        global_scale = self.kernel_global_scale.get_value()[..., None, None]
        source = None if self.kernel_source is None else self.kernel_source.get_value()
        w = NVFP4Array(self.kernel_packed.get_value(), self.kernel_scale.get_value(), global_scale, source=source)
        return jnp.swapaxes(w.dequantize(self.dtype), -1, -2)


# --- which layer takes the place of which -----------------------------------------------------------------------------

CONVERTERS: dict[type, Callable[..., nnx.Module]] = {
    nnx.Linear: NVFP4Linear.from_float,
    nnx.LinearGeneral: NVFP4LinearGeneral.from_float,
    nnx.Einsum: NVFP4Einsum.from_float,
    Experts: NVFP4Experts.from_float,
}


def register(module_type: type[nnx.Module]) -> Callable[[Callable[..., nnx.Module]], Callable[..., nnx.Module]]:
    """Teaches `quantize_model` a layer of yours: decorate `convert(layer, *, name, scaling,
    weight_four_over_six, implementation) -> nnx.Module`.

    The result may be one of this package's layers, or hold some. If `quantize_params` is to requantize it, it has their
    `float_names()` and `quantize_params(params)`.
    """

    def decorate(convert):
        CONVERTERS[module_type] = convert
        return convert

    return decorate
