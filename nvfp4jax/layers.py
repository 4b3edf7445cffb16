"""Flax NNX layers with NVFP4 weights, each made `from_float` of the layer it takes the place of.

A layer keeps three Params a weight: packed codes, block scales, global scale; the weight is stored [N, K], contraction last,
as checkpoints have it. The activation's scale is computed in the call (online), unless the mode says otherwise:

    None          activations stay as they are (weights only)
    "static"      the checkpoint's or a calibration's input_scale
    "delayed"     the largest amax of the last 16 calls (this call's own, where there were none): a baseline to compare with
    "tensor"      one amax over the valid rows of this call; "tensor_pow2": its global scale rounded up to a power of two
    "token"       one amax a row: a row's bits do not depend on its batch
    "expert"      (experts only) one amax over the rows of an expert

A delayed layer is scaled by its history and then puts its own amax into it, at every call: state, an `AmaxHistory`, that moves with
a model as BatchNorm's statistics do (under jit by `nnx.jit`, or split, merged and handed back). `generate` hands it on.

Shapes below are without the leading axis that a stack of layers adds; see `layer_index`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import array as nvfp4_array
from nvfp4jax import ops, routing
from nvfp4jax import scaling as modes
from nvfp4jax.array import NVFP4Array


class NVFP4Param(nnx.Param):
    """A Param that holds part of an NVFP4 weight: a scan over stacked layers leaves it whole and sets `layer_index`."""


class InputAmax(nnx.Variable):
    """What a layer has seen of its input's amax, brought up to date by each call: no weight, and in no checkpoint of weights."""


class AmaxHistory(InputAmax):
    """f32 [16]: the amax of the last calls, newest first; 0 where there was none (mode "delayed")."""


class LargestAmax(InputAmax):
    """f32 []: the largest amax of all calls; in place only while `nvfp4jax.calibrate` runs."""


def see(seen: InputAmax | None, x: Float[Array, "..."], valid: Bool[Array, "..."] | None) -> Array | None:
    """Notes the amax of x over its valid rows; the amax to scale x by, where the layer's history says it, else None."""
    if seen is None:
        return None
    amax = modes.activation_amax(jax.lax.stop_gradient(x), "tensor", valid)
    if isinstance(seen, LargestAmax):
        seen.set_value(jnp.maximum(seen.get_value(), amax))
        return None
    amax, history = modes.delayed_amax(seen.get_value(), amax)
    seen.set_value(history)
    return amax


def _scaling_of(scaling: str | None) -> str | None:
    """What an operation is asked for: a delayed layer gives it the amax for the whole tensor."""
    return "tensor" if scaling == "delayed" else scaling


# An nnx filter: what a checkpoint of weights holds, and a trainer's next step replaces.
WEIGHTS = nnx.Not(nnx.Any(nnx.RngState, InputAmax))


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


def _check_scaling(scaling: str | None, allowed: tuple[str | None, ...], name: str) -> None:
    if scaling not in allowed:
        raise ValueError(f"{name}: scaling={scaling!r} is not one of {', '.join(map(str, allowed))}")


def set_scaling(layer: "NVFP4Linear | NVFP4Experts", scaling: str | None, input_scales: Mapping[str, Array | None] | None = None) -> None:
    """Puts an NVFP4 layer into a mode, with what the mode needs for each of the layer's inputs.

    input_scales: by the names in `layer.inputs`, for "static"; one that is missing or None is to come (`nvfp4jax.calibrate`).
    """
    _check_scaling(scaling, layer.modes, layer.name)
    layer.scaling = scaling
    for name in layer.inputs:
        scale = (input_scales or {}).get(name) if scaling == "static" else None
        setattr(layer, f"{name}_scale", nnx.data(None) if scale is None else nnx.Param(jnp.asarray(scale, jnp.float32)))
        history = AmaxHistory(jnp.zeros((*layer.lead, modes.HISTORY), jnp.float32)) if scaling == "delayed" else nnx.data(None)
        setattr(layer, f"{name}_amax", history)


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


class NVFP4Linear(nnx.Module):
    """y = x w^T + bias with w in NVFP4; takes the place of `nnx.Linear`.

    Params: kernel_packed u8 [N, K/2], kernel_scale float8_e4m3fn [N, K/16], kernel_global_scale f32 []; bias as the float layer
    had it, or None; input_scale f32 [] (static mode) or None. `scaling`: see the module's docstring. input_amax: an
    `AmaxHistory` (delayed mode) or None.
    """

    modes = (*ops.MODES[:-1], "delayed")
    inputs = ("input",)

    def __init__(
        self,
        kernel: nnx.Variable,
        bias: nnx.Variable | None,
        *,
        name: str,
        features: tuple[tuple[int, ...], tuple[int, ...]],
        dtype: jnp.dtype | None,
        scaling: str | None = "token",
        four_over_six: str | None = None,
        weight_four_over_six: str | None = None,
        implementation: str | tuple[str, ...] | None = None,
        input_scale: Array | None = None,
    ):
        _check_scaling(scaling, self.modes, name)
        self.name = name
        self.contracted, self.features = features
        self.four_over_six = four_over_six
        self.weight_four_over_six = weight_four_over_six
        self.implementation = implementation
        self.dtype = dtype
        self.param_dtype = jnp.dtype(kernel.dtype)
        self.layer_index = nnx.data(None)
        lead = len(kernel.shape) - len(self._kernel_axes()[0]) - len(self._kernel_axes()[1])
        n_axes, k_axes = ([lead + a for a in axes] for axes in self._kernel_axes())
        meta = _metadata(kernel, (*((a,) for a in range(lead)), tuple(n_axes), tuple(k_axes)))
        w = quantize_weight(_map(self._matrix, kernel.get_value()), weight_four_over_six, name)
        self.kernel_packed = NVFP4Param(w.packed, **meta)
        self.kernel_scale = NVFP4Param(w.scale, **meta)
        self.kernel_global_scale = NVFP4Param(_squeeze(w.global_scale, lead), **_scalar_metadata(meta))
        self.bias = nnx.data(None) if bias is None else bias
        set_scaling(self, scaling, {"input": input_scale})

    @classmethod
    def from_float(cls, layer: nnx.Linear, *, name: str = "linear", **options) -> "NVFP4Linear":
        """layer: nnx.Linear, kernel [in, out] (or a stack of them). options: activation and the rest of the constructor's."""
        return cls(layer.kernel, layer.bias, name=name, features=((layer.in_features,), (layer.out_features,)), dtype=layer.dtype, **options)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes that a stack adds."""
        return tuple(self.kernel_global_scale.shape)

    @property
    def in_features(self) -> int:
        return math.prod(self.contracted)

    @property
    def out_features(self) -> int:
        return math.prod(self.features)

    def _kernel_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the float kernel that make N, and K, in that order."""
        return (1,), (0,)

    def _matrix(self, kernel: Array) -> Array:
        """The float kernel [(stack), ...] -> [(stack), N, K]."""
        n_axes, k_axes = self._kernel_axes()
        lead = kernel.ndim - len(n_axes) - len(k_axes)
        order = (*range(lead), *(lead + a for a in n_axes), *(lead + a for a in k_axes))
        return kernel.transpose(order).reshape(*kernel.shape[:lead], self.out_features, self.in_features)

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        """Where the float layer keeps what this one is made of."""
        return (("kernel",),) if self.bias is None else (("kernel",), ("bias",))

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        """The float layer's arrays -> this layer's, by name. Pure."""
        kernel = params[("kernel",)]
        lead = kernel.ndim - len(self._kernel_axes()[0]) - len(self._kernel_axes()[1])
        w = quantize_weight(self._matrix(kernel), self.weight_four_over_six, self.name)
        out = {("kernel_packed",): w.packed, ("kernel_scale",): w.scale, ("kernel_global_scale",): _squeeze(w.global_scale, lead)}
        if self.bias is not None:
            out[("bias",)] = params[("bias",)]
        return out

    def weight(self) -> NVFP4Array:
        """The weight as an NVFP4Array [N, K]."""
        return NVFP4Array(
            self.kernel_packed.get_value(), self.kernel_scale.get_value(), self.kernel_global_scale.get_value(), self.layer_index
        )

    def _matmul(self, x: Array, bias: Array | None) -> Array:
        """x [..., K] -> [..., N]."""
        x = x.astype(self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.param_dtype))
        valid = modes.current_valid_rows(x.shape[:-1])
        return ops.matmul(
            x,
            self.weight(),
            scaling=_scaling_of(self.scaling),
            four_over_six=self.four_over_six,
            bias=bias,
            amax=see(self.input_amax, x, valid),
            valid=valid if self.scaling in ("tensor", "tensor_pow2") else None,
            input_scale=None if self.input_scale is None else self.input_scale.get_value(),
            implementation=self.implementation,
            name=self.name,
        )

    def __call__(self, inputs: Float[Array, "... K"], out_sharding=None) -> Float[Array, "... N"]:
        return _constrain(self._matmul(inputs, None if self.bias is None else self.bias.get_value()), out_sharding)


def _squeeze(global_scale, lead: int):
    """[..., 1, 1] of a stack -> [...]; a single weight's scalar stays."""
    return _map(lambda g: g.reshape(g.shape[:lead]), global_scale)


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
        return cls(
            layer.kernel, layer.bias, name=name, features=(layer.in_features, layer.out_features), axis=layer.axis, dtype=layer.dtype, **options
        )

    def _kernel_axes(self):
        n_in = len(self.contracted)
        return tuple(range(n_in, n_in + len(self.features))), tuple(range(n_in))

    def __call__(self, inputs: Float[Array, "..."], out_sharding=None) -> Float[Array, "..."]:
        if tuple(inputs.shape[a] for a in self.axis) != self.contracted:
            raise ValueError(f"{self.name}: inputs of shape {inputs.shape} at axes {self.axis} need sizes {self.contracted}")
        x = contracted_last(self, inputs)
        y = self._matmul(x, None if self.bias is None else self.bias.get_value().reshape(-1))
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
        n_letters, k_letters = _einsum_letters(layer.einsum_str, name)
        sizes = dict(zip(_operands(layer.einsum_str)[1], layer.kernel_shape, strict=True))
        features = tuple(sizes[c] for c in k_letters), tuple(sizes[c] for c in n_letters)
        return cls(layer.kernel, layer.bias, name=name, features=features, einsum_str=layer.einsum_str, dtype=layer.dtype, **options)

    def _kernel_axes(self):
        letters = _operands(self.einsum_str)[1]
        return tuple(tuple(letters.index(c) for c in group) for group in _einsum_letters(self.einsum_str, self.name))

    def __call__(self, inputs: Float[Array, "..."], einsum_str: str | None = None, out_sharding=None) -> Float[Array, "..."]:
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
        y = self._matmul(x, bias).reshape(*x.shape[:-1], *self.features)
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

    def __call__(self, x: Float[Array, "T H"], expert_ids: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Float[Array, "T H"]:
        dtype = self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.gate_proj.dtype)
        route = routing.route(expert_ids, self.num_experts)
        rows = x.astype(dtype)[route.token_of_row]
        valid = _valid_of_rows(x, route)

        def product(rows, w):
            precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
            return jax.lax.ragged_dot(rows, w.get_value().astype(dtype), route.group_sizes, precision=precision)

        see(self.gate_up_input_amax, rows, valid)
        h = jax.nn.silu(product(rows, self.gate_proj)) * product(rows, self.up_proj)
        see(self.down_input_amax, h, valid)
        return routing.combine(product(h, self.down_proj), route, weights, out_dtype=dtype)


def _valid_of_rows(x: Array, route: routing.Routing) -> Array | None:
    valid = modes.current_valid_rows(x.shape[:1])
    return None if valid is None else valid[route.token_of_row]


class NVFP4Experts(nnx.Module):
    """`Experts` with NVFP4 weights; both matmuls take an online scale, the second on the SwiGLU output.

    Params: gate_up_packed u8 [E, 2, I, H/2] (gate first), gate_up_scale [E, 2, I, H/16], gate_up_global_scale f32 [E], shared by gate
    and up; down_packed u8 [E, H, I/2], down_scale, down_global_scale; gate_up_input_scale and down_input_scale f32 [E] (static mode)
    or None. `scaling` as in the module's docstring; gate_up_input_amax and down_input_amax: an `AmaxHistory`, of all experts
    together (delayed mode), or None.
    """

    modes = (*ops.MODES, "delayed")
    inputs = ("gate_up_input", "down_input")

    def __init__(
        self,
        gate_proj: nnx.Variable,
        up_proj: nnx.Variable,
        down_proj: nnx.Variable,
        *,
        name: str,
        dtype: jnp.dtype | None,
        scaling: str | None = "token",
        four_over_six: str | None = None,
        weight_four_over_six: str | None = None,
        implementation: str | tuple[str, ...] | None = None,
        input_scales: tuple[Array, Array] | None = None,
    ):
        _check_scaling(scaling, self.modes, name)
        self.name = name
        self.num_experts, self.hidden, self.intermediate = gate_proj.shape[-3:]
        self.four_over_six = four_over_six
        self.weight_four_over_six = weight_four_over_six
        self.implementation = implementation
        self.dtype = dtype
        self.param_dtype = jnp.dtype(gate_proj.dtype)
        self.layer_index = nnx.data(None)
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
        set_scaling(self, scaling, dict(zip(self.inputs, input_scales or (None, None), strict=True)))

    @classmethod
    def from_float(cls, layer: nnx.Module, *, name: str = "experts", **options) -> "NVFP4Experts":
        """layer: `Experts`, or any module with Params gate_proj, up_proj [E, hidden, I] and down_proj [E, I, hidden] (or stacks)."""
        return cls(layer.gate_proj, layer.up_proj, layer.down_proj, name=name, dtype=getattr(layer, "dtype", None), **options)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes that a stack adds."""
        return tuple(self.gate_up_global_scale.shape[:-1])

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        return (("gate_proj",), ("up_proj",), ("down_proj",))

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

    def weights(self) -> tuple[NVFP4Array, NVFP4Array]:
        """gate_up [E, 2, I, H] and down [E, H, I] as NVFP4Arrays."""
        gate, down = self.gate_up_global_scale.get_value(), self.down_global_scale.get_value()
        return (
            NVFP4Array(self.gate_up_packed.get_value(), self.gate_up_scale.get_value(), gate[..., None, None, None], self.layer_index),
            NVFP4Array(self.down_packed.get_value(), self.down_scale.get_value(), down[..., None, None], self.layer_index),
        )

    def __call__(self, x: Float[Array, "T H"], expert_ids: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Float[Array, "T H"]:
        dtype = self.dtype if self.dtype is not None else jnp.promote_types(x.dtype, self.param_dtype)
        x = x.astype(dtype)
        if self.gate_up_input_amax is not None:
            return self._by_products(x, expert_ids.astype(jnp.int32), weights)
        gate_up, down = self.weights()
        scales = (self.gate_up_input_scale, self.down_input_scale)
        return ops.experts(
            x,
            expert_ids,
            weights,
            gate_up,
            down,
            scaling=self.scaling,
            four_over_six=self.four_over_six,
            valid=modes.current_valid_rows(x.shape[:1]),
            input_scales=None if scales[0] is None else tuple(s.get_value() for s in scales),
            implementation=self.implementation,
            name=self.name,
        )

    def _by_products(self, x: Array, expert_ids: Array, weights: Array) -> Array:
        """The same as one operation a product, so that the amax of what each reads is seen."""
        route = routing.route(expert_ids, self.num_experts)
        valid = _valid_of_rows(x, route)

        def product(op: Callable[..., Array], x: Array, w: NVFP4Array, seen: InputAmax) -> Array:
            return op(
                x,
                w,
                route.group_sizes,
                scaling=_scaling_of(self.scaling),
                four_over_six=self.four_over_six,
                amax=see(seen, x, valid),
                implementation=self.implementation,
                name=self.name,
            )

        gate_up, down = self.weights()
        h = product(ops.grouped_swiglu, x[route.token_of_row], gate_up, self.gate_up_input_amax)
        y = product(ops.grouped_matmul, h, down, self.down_input_amax)
        return routing.combine(y, route, weights, out_dtype=x.dtype)


class NVFP4Weight(nnx.Module):
    """A raw Param [..., K, N] held in NVFP4, weights only: `w[...]`, `w.get_value()` or jnp functions see it decoded.

    Takes the place of the Param itself in a module that nobody registered, e.g. expert weights [E, K, N] used in an einsum.
    The decoded copy is the user's: prefer `NVFP4Experts`, which keeps none.
    """

    def __init__(self, param: nnx.Variable, *, name: str, weight_four_over_six: str | None = None):
        self.name = name
        self.weight_four_over_six = weight_four_over_six
        self.shape, self.dtype = tuple(param.shape), jnp.dtype(param.dtype)
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

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        w = quantize_weight(jnp.swapaxes(params[()], -1, -2), self.weight_four_over_six, self.name)
        return {("kernel_packed",): w.packed, ("kernel_scale",): w.scale, ("kernel_global_scale",): w.global_scale[..., 0, 0]}

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def get_value(self) -> Float[Array, "... K N"]:
        global_scale = self.kernel_global_scale.get_value()[..., None, None]
        w = NVFP4Array(self.kernel_packed.get_value(), self.kernel_scale.get_value(), global_scale)
        return jnp.swapaxes(w.dequantize(self.dtype), -1, -2)

    def __jax_array__(self) -> Array:
        return self.get_value()

    def __getitem__(self, index) -> Array:
        return self.get_value()[index]
