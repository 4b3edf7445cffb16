"""The operations, one public function each; `implementation=` picks who computes it.

implementation=None tries what suits the device and falls back to XLA, saying once why; a name fails loudly; a sequence is
tried in order. A backend raises NotImplementedError for what it does not support.

Every operation differentiates straight through its rounding: with y = x^ w^T on the decoded operands, dx = dy w^ and, where the
weight was quantized from a float array in the same trace, dw = dy^T x^.
"""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import array as nvfp4_array
from nvfp4jax import numerics, pytree, routing
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends import xla
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Name, Scaling, Static, Tensor, Token

log = logging.getLogger("nvfp4jax")

Backend = Literal["xla", "hopper", "triton", "cudnn"]
Implementation = Backend | Sequence[Backend] | None
Activation = Float[Array, "... K"] | NVFP4Array | QuantizedActivation


# --- who computes ------------------------------------------------------------------------------------------------------


def _hopper() -> ModuleType:
    from nvfp4jax.backends import hopper

    return hopper


def _triton() -> ModuleType:
    from nvfp4jax.backends import triton

    return triton


def _cudnn() -> ModuleType:
    from nvfp4jax.backends import cudnn

    return cudnn


# Modules with the same functions (see `backends.xla`), imported where first used: those of GPUs need what a CPU's rollout does not.
BACKENDS: dict[str, Callable[[], ModuleType]] = {"xla": lambda: xla, "hopper": _hopper, "triton": _triton, "cudnn": _cudnn}


def _backend(name: str) -> ModuleType:
    return BACKENDS[name]()


def check_implementation(implementation: Implementation) -> tuple[str, ...] | str | None:
    """The argument as something hashable; ValueError for a name that is no backend's."""
    names = (implementation,) if isinstance(implementation, str) else implementation
    if names is not None:
        names = tuple(names)
        if not names:
            raise ValueError(f"implementation is an empty sequence; give names of backends ({', '.join(BACKENDS)}), or None")
        if unknown := [name for name in names if name not in BACKENDS]:
            raise ValueError(f"implementation={unknown[0]!r}: one of {', '.join(BACKENDS)}, a sequence of them, or None")
    return implementation if isinstance(implementation, str) else names


@functools.cache
def _default_order() -> tuple[str, ...]:
    """Hopper's kernels where the default device is one, Triton's on other CUDA GPUs, then XLA."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(capability, str) or "." not in capability:
        return ("xla",)
    if capability == "9.0":
        return ("hopper", "xla")
    if importlib.util.find_spec("jax_triton") is None:
        log.warning("%s: decoding weights in XLA; for fused kernels pip install 'nvfp4jax[triton]'", device.device_kind)
        return ("xla",)
    return ("triton", "xla")


@functools.cache
def _log_fallback(op: str, name: str, reason: str) -> None:
    log.warning("%s: %s does not apply (%s); trying the next implementation", op, name, reason)


def _first[T](op: str, implementation: tuple[str, ...] | str | None, call: Callable[[ModuleType], T]) -> T:
    """call(backend) by the first backend that supports the case."""
    order = (implementation,) if isinstance(implementation, str) else implementation or _default_order()
    errors = []
    for name in order:
        try:
            return call(_backend(name))
        except NotImplementedError as error:
            if isinstance(implementation, str):
                raise NotImplementedError(f"{op}: {error}") from error
            errors.append(error)
            if len(order) > 1:
                _log_fallback(op, name, str(error))
    raise ExceptionGroup(f"{op}: none of {', '.join(order)} supports this case", errors)


def _for(backend: ModuleType, a: QuantizedActivation) -> QuantizedActivation:
    """The activation as `backend` reads it."""
    if a.backend == backend.NAME:
        return a
    operand, _ = backend.activation(_backend(a.backend).natural(a.operand), None)
    return dataclasses.replace(a, operand=operand, backend=backend.NAME)


# --- quantizing --------------------------------------------------------------------------------------------------------


def quantize(
    x: Float[Array, "... K"],
    scaling: Name | Token | Tensor | Static = "tensor",
    *,
    amax: Float[Array, "..."] | float | None = None,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
) -> NVFP4Array:
    """Quantizes to NVFP4, with a global scale computed from the values themselves (online) unless `scaling` is `Static(scale)`.

    x: float [..., K], K a multiple of 16.
    scaling: "tensor", "tensor_pow2", "token", or a value of `nvfp4jax.scaling`.
    amax: f32 [] or [..., 1], where a producer has computed it already.
    valid: bool x.shape[:-1]; rows where it is False take no part in the amax.

    A row that holds NaN or infinity decodes to NaN, alone. ValueError for K not a multiple of 16 or another mode. Gradients pass
    through `dequantize` and `matmul` as if nothing had been rounded.
    Contract: TransformerEngine's reference quantizer, to the bit, whoever computes it.
    """
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("quantize needs at least one axis, got a scalar")
    nvfp4_array.check_k(x.shape[-1], "quantize: x", x.shape)
    _check_float(x, "quantize")
    mode = scaling_modes.parse(scaling, "quantize", experts=False)
    if not isinstance(mode, Token | Tensor | Static) or (isinstance(mode, Static) and mode.scale is None):
        raise ValueError(f"quantize: scaling={scaling!r}: 'tensor', 'tensor_pow2', 'token' or Static(scale)")
    lead, flat, valid = _rows(lax.stop_gradient(x), valid, "quantize")
    request, _ = scaling_modes.resolve(mode, flat, valid)
    if amax is not None:
        amax = jnp.asarray(amax, jnp.float32)
        request = dataclasses.replace(request, amax=amax.reshape(-1, 1) if amax.ndim else amax, valid=None)
    q = _first("quantize", check_implementation(implementation), lambda backend: backend.quantize(flat, request))
    wide = lambda v: v.reshape(*lead, v.shape[-1])  # noqa: E731
    global_scale = wide(q.global_scale) if q.global_scale.ndim else q.global_scale
    return NVFP4Array(wide(q.packed), wide(q.scale), global_scale, source=_source(x))


def quantize_weight(
    w: Float[Array, "... N K"],
    *,
    four_over_six: str | None = None,
    implementation: Implementation = None,
    name: str = "weight",
) -> NVFP4Array:
    """A weight [..., N, K] -> NVFP4 with one global scale for each [N, K] matrix: f32 [] or [..., 1, 1].

    Values are rounded to bfloat16 first, so that a trainer with float32 masters and a loader of the bfloat16 export get the
    same bits. NaN or infinity in a row gives that row NaN scales. four_over_six: None, "mae" or "mse" (arXiv 2512.02010).
    """
    nvfp4_array.check_k(w.shape[-1], name, w.shape)
    scaling_modes.check_four_over_six(four_over_six, f"{name}: four_over_six")
    _check_float(w, name)
    value = lax.stop_gradient(w)
    q = _first(name, check_implementation(implementation), lambda backend: backend.quantize_weight(value, four_over_six))
    return dataclasses.replace(q, source=_source(w))


def quantize_activation(
    x: Float[Array, "... K"],
    scaling: Name | Scaling | None = "token",
    *,
    valid: Bool[Array, "..."] | None = None,
    group_sizes: Int[Array, "E"] | None = None,
    implementation: Implementation = None,
    name: str = "quantize_activation",
) -> QuantizedActivation:
    """An activation as matmuls read it, made once for all of them.

    x: float [..., K], K a multiple of 16. scaling: see `nvfp4jax.scaling`; None leaves x as it is. valid: bool x.shape[:-1], rows that
    count in an amax. group_sizes: i32 [E], where the rows of x [M, K] are sorted by expert and the mode asks whose a row is.
    """
    mode = scaling_modes.parse(scaling, name, experts=group_sizes is not None)
    nvfp4_array.check_k(x.shape[-1], f"{name}: x", x.shape)
    _check_float(x, name)
    return _activation(x, mode, valid, implementation, name, lambda backend, flat, request: backend.activation(flat, request), group_sizes)


def rms_norm(
    x: Float[Array, "... K"],
    weight: Float[Array, "K"],
    eps: float,
    scaling: Name | Scaling | None = "token",
    *,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
    name: str = "rms_norm",
) -> QuantizedActivation:
    """`quantize_activation` of `numerics.rms_norm(x, weight, eps)`, the norm in the same launch where the backend can."""
    mode = scaling_modes.parse(scaling, name, experts=False)
    value = lax.stop_gradient((x, weight))
    return _activation(
        numerics.rms_norm(x, weight, eps), mode, valid, implementation, name,
        lambda backend, flat, request: backend.rms_norm(value[0].reshape(flat.shape), value[1], eps, request),
    )  # fmt: skip


def silu_mul(
    gate: Float[Array, "... K"],
    up: Float[Array, "... K"],
    scaling: Name | Scaling | None = "token",
    *,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
    name: str = "silu_mul",
) -> QuantizedActivation:
    """`quantize_activation` of `numerics.silu_mul(gate, up)`, silu(gate) * up, in the same launch where the backend can."""
    mode = scaling_modes.parse(scaling, name, experts=False)
    gate_value, up_value = lax.stop_gradient((gate, up))
    return _activation(
        numerics.silu_mul(gate, up), mode, valid, implementation, name,
        lambda backend, flat, request: backend.silu_mul(gate_value.reshape(flat.shape), up_value.reshape(flat.shape), request),
    )  # fmt: skip


def _activation(x, mode, valid, implementation, name, call, group_sizes=None) -> QuantizedActivation:
    """x, the float activation, quantized as `mode` says by call(backend, x [M, K], request)."""
    lead, flat, valid = _rows(lax.stop_gradient(x), valid, name)
    request, carried = (None, None) if mode is None else scaling_modes.resolve(_complete(mode, name), flat, valid, group_sizes)

    def made(backend: ModuleType) -> QuantizedActivation:
        operand, row_scale = call(backend, flat, request)
        row_scale = row_scale.reshape(*lead, 1) if row_scale is not None and row_scale.ndim else row_scale
        return QuantizedActivation(operand.reshape(x.shape), row_scale, x, carried, backend.NAME)

    return _first(name, check_implementation(implementation), made)


def _complete(mode: Scaling, name: str) -> Scaling:
    """The mode itself; ValueError where it lacks the array that it scales by."""
    field = scaling_modes.CARRIED.get(type(mode))
    if field is not None and getattr(mode, field) is None:
        way_out = {"scale": "without an input scale (see nvfp4jax.calibrate) an online mode runs: tensor, token",
                   "history": f"give f32 [{scaling_modes.HISTORY}], zeros at first", "largest": "give f32 [], zero at first"}  # fmt: skip
        raise ValueError(f"{name}: {type(mode).__name__} needs {field}; {way_out[field]}")
    return mode


def _rows(x: Array, valid: Array | None, name: str) -> tuple[tuple[int, ...], Array, Array | None]:
    """(leading axes, x [M, K], valid [M])."""
    lead = x.shape[:-1]
    if valid is not None and valid.shape != lead:
        raise ValueError(f"{name}: valid has shape {tuple(valid.shape)}; x of shape {tuple(x.shape)} needs {tuple(lead)}")
    return lead, x.reshape(-1, x.shape[-1]), None if valid is None else valid.reshape(-1)


def _source(x: Array) -> Array | None:
    """x, where a gradient may come back for it."""
    return x if isinstance(x, jax.core.Tracer) else None


def _check_float(x: Any, name: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x is {x.dtype}, not a float")


# --- matmuls -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _How:
    """What is static about a product."""

    out_dtype: jnp.dtype
    implementation: tuple[str, ...] | str | None
    name: str


def _no_cotangent(tree):
    """Zero cotangents: float0 for integers, zeros for floats."""

    def zero(v):
        if jnp.issubdtype(v.dtype, jnp.floating):
            return jnp.zeros(v.shape, v.dtype)
        return np.zeros(v.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _cotangent(a: QuantizedActivation, dx: Array) -> QuantizedActivation:
    return dataclasses.replace(_no_cotangent(a), source=dx.astype(a.source.dtype))


def _decoded(a: QuantizedActivation) -> Array:
    """f32: the values that a product reads."""
    return xla.scaled(_backend(a.backend).natural(a.operand).astype(jnp.float32), a.row_scale)


def _split_source(w: NVFP4Array) -> tuple[NVFP4Array, Array | None]:
    return dataclasses.replace(w, source=None), w.source


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(how: _How, a: QuantizedActivation, w: NVFP4Array, source: Array | None, bias: Array | None) -> Array:
    return _first(how.name, how.implementation, lambda backend: backend.matmul(_for(backend, a), w, bias, how.out_dtype))


def _matmul_fwd(how, a, w, source, bias):
    return _matmul(how, a, w, source, bias), (a, w, source, bias)


def _matmul_bwd(how, saved, dy):
    a, w, source, bias = saved
    dy = dy.astype(jnp.float32)
    da = _cotangent(a, xla.dot(dy, w.dequantize(jnp.float32).T))
    dsource = None if source is None else xla.dot(dy.T, _decoded(a).T).astype(source.dtype)
    return da, _no_cotangent(w), dsource, None if bias is None else dy.sum(0).astype(bias.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(how: _How, a, w: NVFP4Array, source: Array | None, group_sizes: Array) -> Array:
    return _first(how.name, how.implementation, lambda backend: backend.grouped_matmul(_for(backend, a), w, group_sizes, how.out_dtype))


def _grouped_fwd(how, a, w, source, group_sizes):
    return _grouped_matmul(how, a, w, source, group_sizes), (a, w, source, group_sizes)


def _grouped_bwd(how, saved, dy):
    return _grouped_cotangents(*saved, dy.astype(jnp.float32))


def _grouped_cotangents(a, w: NVFP4Array, source: Array | None, group_sizes, dy: Array) -> tuple:
    """Of a, w [E, N, K], source and group_sizes, for f32 dy [M, N]."""
    dx = xla.grouped(dy, group_sizes, w.shape[-1], lambda e: (xla.one_expert(w, e).dequantize(jnp.float32).T, None))
    dsource = None if source is None else _grouped_dw(dy, _decoded(a), group_sizes).reshape(source.shape).astype(source.dtype)
    return _cotangent(a, dx), _no_cotangent(w), dsource, _no_cotangent(group_sizes)


def _grouped_dw(dy: Array, rows: Array, group_sizes: Array) -> Array:
    """f32 [E, N, K]: sum over a group's rows of dy^T x."""
    ids = scaling_modes.group_ids(group_sizes, dy.shape[0])
    inside = jnp.arange(dy.shape[0], dtype=ids.dtype) < group_sizes.sum().astype(ids.dtype)

    def group(e):
        mine = jnp.where(((ids == e) & inside)[:, None], dy, jnp.float32(0))
        return xla.dot(mine.T, rows.T)

    return lax.map(group, jnp.arange(group_sizes.shape[0], dtype=ids.dtype))


_grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(how: _How, a, w: NVFP4Array, source: Array | None, group_sizes: Array) -> Array:
    return _first(how.name, how.implementation, lambda backend: backend.grouped_swiglu(_for(backend, a), w, group_sizes, how.out_dtype))


def _swiglu_fwd(how, a, w, source, group_sizes):
    return _grouped_swiglu(how, a, w, source, group_sizes), (a, w, source, group_sizes)


def _swiglu_bwd(how, saved, dy):
    a, w, source, group_sizes = saved
    flat = xla.merge_halves(w)
    both = xla.grouped_matmul(_for(xla, a), flat, group_sizes, jnp.dtype(jnp.float32))
    _, silu_vjp = jax.vjp(lambda both: jax.nn.silu(both[:, : both.shape[1] // 2]) * both[:, both.shape[1] // 2 :], both)
    da, _, dsource, dsizes = _grouped_cotangents(a, flat, source, group_sizes, silu_vjp(dy.astype(jnp.float32))[0])
    return da, _no_cotangent(w), dsource, dsizes


_grouped_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _check_weight(x: Activation, w: NVFP4Array | Array, rank: int, name: str) -> None:
    if w.ndim != rank:
        raise ValueError(f"{name}: the weight of shape {tuple(w.shape)} needs {rank} axes")
    nvfp4_array.check_k(w.shape[-1], f"{name}: weight", w.shape)
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} and weight of shape {tuple(w.shape)} differ in K, their last axis")


def _check_grouped(x: Activation, w: NVFP4Array | Array, group_sizes: Array, rank: int, name: str) -> None:
    _check_weight(x, w, rank, name)
    if len(x.shape) != 2:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} needs two axes, rows sorted by group and K")
    if group_sizes.shape != (w.shape[0],):
        raise ValueError(f"{name}: group_sizes of shape {group_sizes.shape} needs one entry for each of the {w.shape[0]} groups")


def _read(x: Activation, scaling, valid, implementation, name: str, group_sizes=None) -> QuantizedActivation:
    """What a product reads of x: x quantized here as `scaling` says, unless it is quantized already."""
    if isinstance(x, QuantizedActivation):
        return x
    if isinstance(x, NVFP4Array):
        value = dataclasses.replace(x, source=None)

        def made(backend: ModuleType) -> QuantizedActivation:
            lead = x.shape[:-1]
            rows = lambda v: v.reshape(-1, v.shape[-1])  # noqa: E731
            scale = value.global_scale if value.global_scale.ndim == 0 else rows(jnp.broadcast_to(value.global_scale, (*lead, 1)))
            operand, row_scale = backend.packed(NVFP4Array(rows(value.packed), rows(value.scale), scale))
            operand = operand.reshape(x.shape)
            row_scale = row_scale.reshape(*lead, 1) if row_scale.ndim else row_scale
            return QuantizedActivation(operand, row_scale, operand if x.source is None else x.source, None, backend.NAME)

        return _first(name, implementation, made)
    return quantize_activation(x, scaling, valid=valid, group_sizes=group_sizes, implementation=implementation, name=name)


def _flat(a: QuantizedActivation) -> QuantizedActivation:
    """Leading axes into one."""
    rows = lambda v: v.reshape(-1, v.shape[-1])  # noqa: E731
    row_scale = rows(a.row_scale) if a.row_scale is not None and a.row_scale.ndim else a.row_scale
    return dataclasses.replace(a, operand=rows(a.operand), row_scale=row_scale, source=rows(a.source), carried=None)


def _how(x: Activation, out_dtype: DTypeLike | None, implementation: Implementation, name: str) -> _How:
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if isinstance(x, NVFP4Array) else x.dtype
    return _How(jnp.dtype(out_dtype), check_implementation(implementation), name)


def matmul(
    x: Activation,
    w: NVFP4Array | Float[Array, "N K"],
    *,
    scaling: Name | Scaling | None = "tensor",
    bias: Float[Array, "N"] | None = None,
    valid: Bool[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "matmul",
) -> Float[Array, "... N"]:
    """x [..., K] times w [N, K] transposed, both in NVFP4, accumulated in float32.

    x: float, quantized here as `scaling` says (see `nvfp4jax.scaling`; None leaves it as it is), a QuantizedActivation, or an NVFP4Array.
    w: an NVFP4Array [N, K], or a float array, which `quantize_weight` quantizes here.
    valid: bool x.shape[:-1], rows that count in an amax. bias: [N], added in float32. out_dtype: x's by default (bfloat16 for an NVFP4Array).
    ValueError for shapes that do not fit, NotImplementedError from a named implementation that cannot do it.
    """
    _check_weight(x, w, 2, name)
    how = _how(x, out_dtype, implementation, name)
    w, source = _split_source(_weight(w, how))
    a = _read(x, scaling, valid, how.implementation, name)
    return _matmul(how, _flat(a), w, source, bias).reshape(*a.shape[:-1], w.shape[0])


def _weight(w: NVFP4Array | Array, how: _How) -> NVFP4Array:
    return w if isinstance(w, NVFP4Array) else quantize_weight(w, implementation=how.implementation, name=f"{how.name}: weight")


def _swiglu_weight(w: NVFP4Array | Array, how: _How) -> NVFP4Array:
    """[E, 2, I, K] with one global scale an expert, shared by gate and up: [E, 1, 1, 1]."""
    if isinstance(w, NVFP4Array):
        return w
    q = _weight(w.reshape(w.shape[0], -1, w.shape[-1]), how)
    split = lambda v: v.reshape(*w.shape[:-1], v.shape[-1])  # noqa: E731
    return NVFP4Array(split(q.packed), split(q.scale), q.global_scale[..., None], source=_source(w))


def _within(y: Array, group_sizes: Array) -> Array:
    """Zeros past the last group, where a backend leaves what it found."""
    return jnp.where((jnp.arange(y.shape[0], dtype=jnp.int32) < group_sizes.sum())[:, None], y, jnp.zeros((), y.dtype))


def grouped_matmul(
    x: Activation,
    w: NVFP4Array | Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    scaling: Name | Scaling | None = "tensor",
    valid: Bool[Array, "M"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "grouped_matmul",
) -> Float[Array, "M N"]:
    """Rows sorted by group, each times the weight of its group: out[i] = x[i] w[group(i)]^T.

    group_sizes: i32 [E], rows of each group, in order; rows past their sum give zeros.
    scaling: as in `matmul`, and "expert", one amax a group; the scale of a `Static` is f32 [] or [E]. w's global scale: [E, 1, 1].
    """
    _check_grouped(x, w, group_sizes, 3, name)
    how = _how(x, out_dtype, implementation, name)
    w, source = _split_source(_weight(w, how))
    a = _read(x, scaling, valid, how.implementation, name, group_sizes)
    return _within(_grouped_matmul(how, _flat(a), w, source, group_sizes), group_sizes)


def grouped_swiglu(
    x: Activation,
    w: NVFP4Array | Float[Array, "E 2 I K"],
    group_sizes: Int[Array, "E"],
    *,
    scaling: Name | Scaling | None = "tensor",
    valid: Bool[Array, "M"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "grouped_swiglu",
) -> Float[Array, "M I"]:
    """silu(x gate^T) * (x up^T) for each row's group, w holding gate then up; the gated half of a mixture of experts.

    w: [E, 2, I, K], gate and up of an expert sharing one global scale, [E, 1, 1, 1]. The rest as in `grouped_matmul`.
    """
    _check_grouped(x, w, group_sizes, 4, name)
    how = _how(x, out_dtype, implementation, name)
    w, source = _split_source(_swiglu_weight(w, how))
    a = _read(x, scaling, valid, how.implementation, name, group_sizes)
    return _within(_grouped_swiglu(how, _flat(a), w, source, group_sizes), group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_matmul(how: _How, x: Array, kernel: Array) -> Array:
    return _first(how.name, how.implementation, lambda backend: backend.float_matmul(x, kernel, how.out_dtype))


def _float_matmul_bwd(how, saved, dy):
    return jax.vjp(lambda x, kernel: xla.float_matmul(x, kernel, how.out_dtype), *saved)[1](dy)


_float_matmul.defvjp(lambda how, x, kernel: (_float_matmul(how, x, kernel), (x, kernel)), _float_matmul_bwd)


def float_matmul(
    x: Float[Array, "... K"],
    kernel: Float[Array, "K N"],
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
    name: str = "float_matmul",
) -> Float[Array, "... N"]:
    """x times a kernel that is kept in floating point (a head, a router), products exact, accumulated in float32.

    On Hopper, in bfloat16, the bits of a row depend on nothing but the row and the kernel.
    """
    if kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} and a kernel of shape {tuple(kernel.shape)}; [..., K] and [K, N] are needed")
    y = _float_matmul(_How(jnp.dtype(out_dtype), check_implementation(implementation), name), x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(eps: float, implementation, x: Array, weight: Array) -> Array:
    return _first("norm", implementation, lambda backend: backend.norm(x, weight, eps))


def _norm_bwd(eps, implementation, saved, dy):
    return jax.vjp(lambda x, weight: numerics.rms_norm(x, weight, eps), *saved)[1](dy)


_norm.defvjp(lambda eps, implementation, x, weight: (_norm(eps, implementation, x, weight), (x, weight)), _norm_bwd)


def norm(
    x: Float[Array, "... K"], weight: Float[Array, "K"], eps: float, *, implementation: Implementation = None
) -> Float[Array, "... K"]:
    """`numerics.rms_norm`, in one launch where the backend can: for readers that take a float."""
    return _norm(float(eps), check_implementation(implementation), x.reshape(-1, x.shape[-1]), weight).reshape(x.shape)


# --- mixtures of experts -----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _top_k_experts(k: int, normalize: bool, implementation, logits) -> tuple[Array, Array]:
    return _first("top_k_experts", implementation, lambda backend: backend.top_k_experts(logits, k, normalize))


def _top_k_experts_fwd(k, normalize, implementation, logits):
    weights, ids = _top_k_experts(k, normalize, implementation, logits)
    return (weights, ids), (logits, ids)


def _top_k_experts_bwd(k, normalize, implementation, saved, dy):
    logits, ids = saved

    def chosen(logits):
        weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids, -1)
        return weights / weights.sum(-1, keepdims=True) if normalize else weights

    return jax.vjp(chosen, logits)[1](dy[0])


_top_k_experts.defvjp(_top_k_experts_fwd, _top_k_experts_bwd)


def top_k_experts(
    logits: Float[Array, "... E"], k: int, *, normalize: bool, implementation: Implementation = None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """A router's choice: (weights f32 [..., k], ids i32 [..., k]) of the k likeliest of E experts, in falling order.

    logits: float32 [..., E]. weights: their softmax over all experts; normalize: divided by its sum over the k. Of equal ones the
    lower id comes first. ValueError for other dtypes or k > E.
    """
    return _top_k_experts(k, normalize, check_implementation(implementation), logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(how: _How, rows: Array, route: Routing, weights: Array) -> Array:
    return _first(how.name, how.implementation, lambda backend: backend.combine(rows, route, weights, how.out_dtype))


def _combine_fwd(how, rows, route, weights):
    return _combine(how, rows, route, weights), (rows, route, weights)


def _combine_bwd(how, saved, dy):
    rows, route, weights = saved
    _, vjp = jax.vjp(lambda rows, weights: routing.combine(rows, route, weights, out_dtype=how.out_dtype), rows, weights)
    drows, dweights = vjp(dy)
    return drows, _no_cotangent(route), dweights


_combine.defvjp(_combine_fwd, _combine_bwd)


def experts(
    x: Float[Array, "T H"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: NVFP4Array,
    down: NVFP4Array,
    *,
    scaling: Name | Scaling | None | tuple[Scaling | None, Scaling | None] = "token",
    valid: Bool[Array, "T"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "experts",
) -> Float[Array, "T H"]:
    """A mixture of gated experts after its router: sort, gate and up, SwiGLU, down, and the weighted sum over a token's experts.

    expert_ids: i32 [T, k]; weights: f32 [T, k]. gate_up [E, 2, I, H], gate first, one global scale an expert; down [E, H, I].
    scaling: of both activations, x and the SwiGLU output, or a pair, one each. valid: bool [T], tokens that count in an amax.
    The sum runs in slot order, in float32.
    """
    return experts_carrying(x, expert_ids, weights, gate_up, down, scaling=scaling, valid=valid, out_dtype=out_dtype,
                            implementation=implementation, name=name)[0]  # fmt: skip


def experts_carrying(
    x, expert_ids, weights, gate_up: NVFP4Array, down: NVFP4Array, *, scaling, valid, out_dtype, implementation, name
) -> tuple[Array, tuple[Array | None, Array | None]]:
    """`experts`, and what the two modes carry into the next call."""
    modes = scaling if isinstance(scaling, tuple) else (scaling, scaling)
    modes = tuple(scaling_modes.parse(mode, name) for mode in modes)
    _check_weight(x, gate_up, 4, f"{name}: gate_up")
    if down.ndim != 3 or down.shape[0] != gate_up.shape[0] or down.shape[2] != gate_up.shape[2]:
        raise ValueError(f"{name}: down of shape {down.shape} does not fit gate_up of shape {gate_up.shape}")
    if x.ndim != 2 or expert_ids.shape != weights.shape or expert_ids.shape[:1] != x.shape[:1]:
        raise ValueError(f"{name}: x {x.shape}, expert_ids {expert_ids.shape} and weights {weights.shape} do not fit")
    how = _how(x, out_dtype, implementation, name)
    route = _first(name, how.implementation, lambda backend: backend.route(expert_ids.astype(jnp.int32), gate_up.shape[0]))
    of_rows = None if valid is None else valid[route.token_of_row]
    options = dict(implementation=how.implementation, name=name, group_sizes=route.group_sizes)
    if scaling_modes.by_group(modes[0]):
        first = quantize_activation(x[route.token_of_row], modes[0], valid=of_rows, **options)
    else:
        # A token is quantized before it is copied to its experts' rows.
        first = _routed(x, modes[0], valid, route, how)
    up = _grouped_swiglu(how, dataclasses.replace(first, carried=None), *_split_source(gate_up), route.group_sizes)
    second = quantize_activation(up, modes[1], valid=of_rows, **options)
    y = _grouped_matmul(how, dataclasses.replace(second, carried=None), *_split_source(down), route.group_sizes)
    return _combine(how, y, route, weights), (first.carried, second.carried)


def _routed(x: Array, mode: Scaling | None, valid: Array | None, route: Routing, how: _How) -> QuantizedActivation:
    """x [T, H] quantized, and handed out to the rows of its experts: [T * k, H]."""
    _, value, valid = _rows(lax.stop_gradient(x), valid, how.name)
    request, carried = (None, None) if mode is None else scaling_modes.resolve(_complete(mode, how.name), value, valid)

    def made(backend: ModuleType) -> QuantizedActivation:
        operand, row_scale = backend.activation(value, request, route)
        return QuantizedActivation(operand, row_scale, x[route.token_of_row], carried, backend.NAME)

    return _first(how.name, how.implementation, made)


# --- attention ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What a backend knows of a step's rows before its first layer: the same for all layers. value: the backend's own."""

    value: Any
    backend: str


pytree.register(AttentionPlan, "value")


@dataclasses.dataclass(frozen=True)
class _AttentionHow:
    """What is static about attention."""

    scale: float
    window: int | None
    soft_cap: float | None
    implementation: tuple[str, ...] | str | None


def attention_plan(
    starts: Int[Array, "B"],
    q: Any,
    keys: Any,
    *,
    window: int | None = None,
    implementation: Implementation = None,
) -> AttentionPlan:
    """What `attention` needs besides, made once for all layers of a step whose shapes and window are these.

    q, keys: those of `attention`, or what has their shapes and dtypes. No two calls with one plan may run at a time; layers follow one another.
    """

    def made(backend: ModuleType) -> AttentionPlan:
        return AttentionPlan(backend.attention_plan(starts, q, keys, window), backend.NAME)

    return _first("attention_plan", check_implementation(implementation), made)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _AttentionHow, q, keys, values, starts, layer, counts, plan) -> Array:
    def call(backend: ModuleType) -> Array:
        own = plan.value if plan is not None and plan.backend == backend.NAME else None
        return backend.attention(q, keys, values, starts, layer, how.scale, how.window, how.soft_cap, counts, own)

    return _first("attention", how.implementation, call)


def _attention_fwd(how, q, keys, values, starts, layer, counts, plan):
    return _attention(how, q, keys, values, starts, layer, counts, plan), (q, keys, values, starts, layer, counts, plan)


def _attention_bwd(how, saved, dy):
    q, keys, values, starts, layer, *rest = saved
    exact = lambda q, keys, values: xla.attention(q, keys, values, starts, layer, how.scale, how.window, how.soft_cap, None, None)  # noqa: E731
    return *jax.vjp(exact, q, keys, values)[1](dy), *(_no_cotangent(x) for x in (starts, layer, *rest))


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(
    q: Float[Array, "B T Hq D"],
    keys: Float[Array, "*L B Hkv S D"],
    values: Float[Array, "*L B Hkv S Dv"],
    starts: Int[Array, "B"],
    *,
    layer: Int[Array, ""] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    counts: Int[Array, "B"] | None = None,
    plan: AttentionPlan | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T Hq Dv"]:
    """Causal grouped-query attention over a cache, which is read in place: never repeated, and by Hopper's kernels never copied.

    starts: query t of row b is at slot starts[b] + t and sees the slots up to its own; of these only the last `window`. The slots that
        are seen must be finite. Query heads h Hq / Hkv .. (h + 1) Hq / Hkv - 1 read key head h.
    layer: which of a stack's keys and values, where they have a leading axis.
    scale: times the scores, D ** -0.5 where None. soft_cap: scores become soft_cap * tanh(scores / soft_cap).
    counts: i32 [B], a row's queries that count: the others' results are finite, and need not be worked for.
    plan: of `attention_plan`, where several calls share it.
    ValueError for shapes that do not fit together. On Hopper a query's bits depend on its row alone: on no batch, no capacity and no
    number of queries beside it.
    """
    if q.ndim != 4 or keys.ndim != 4 + (layer is not None) or keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and values {values.shape}: [B, T, Hq, D] and [B, Hkv, S, D] are needed, or "
                         "[L, B, Hkv, S, D] with `layer`")
    rows, heads = keys.shape[-4:-2]
    if (q.shape[0], q.shape[-1], starts.shape) != (rows, keys.shape[-1], (rows,)) or q.shape[2] % heads:
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and starts {starts.shape} differ in rows or head dimension, or the query "
                         "heads are no multiple of the key heads")
    how = _AttentionHow(q.shape[-1] ** -0.5 if scale is None else float(scale), window, soft_cap, check_implementation(implementation))
    return _attention(how, q, keys, values, starts, layer, counts, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rope_write(implementation, eps: float | None, q, k, v, cos, sin, starts, keys, values, layer, weights):
    norm = None if weights is None else (*weights, eps)
    return _first("rope_write", implementation, lambda backend: backend.rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm))


def _rope_write_fwd(implementation, eps, *args):
    return _rope_write(implementation, eps, *args), args


def _rope_write_bwd(implementation, eps, saved, dy):
    q, k, v, cos, sin, starts, keys, values, layer, weights = saved

    def exact(q, k, v, keys, values, weights):
        norm = None if weights is None else (*weights, eps)
        return xla.rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm)

    dq, dk, dv, dkeys, dvalues, dweights = jax.vjp(exact, q, k, v, keys, values, weights)[1](dy)
    return dq, dk, dv, *(_no_cotangent(x) for x in (cos, sin, starts)), dkeys, dvalues, _no_cotangent(layer), dweights


_rope_write.defvjp(_rope_write_fwd, _rope_write_bwd)


def rope_write(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv Dv"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    starts: Int[Array, "B"],
    keys: Float[Array, "*L B Hkv S D"],
    values: Float[Array, "*L B Hkv S Dv"],
    *,
    layer: Int[Array, ""] | None = None,
    norm: tuple[Float[Array, "D"], Float[Array, "D"], float] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "*L B Hkv S D"], Float[Array, "*L B Hkv S Dv"]]:
    """What lies between q, k, v and `attention`: the heads normed, q and k rotated, keys and values in their slots.

    starts: token t of row b goes to slot starts[b] + t; tokens past the last slot are dropped. layer: as in `attention`.
    norm: None, or the weights of `numerics.rms_norm` over the heads of q and of k, and its eps.
    -> q, keys, values; on Hopper the caches are written where they lie, in one launch.
    """
    weights, eps = (None, None) if norm is None else (norm[:2], float(norm[2]))
    return _rope_write(check_implementation(implementation), eps, q, k, v, cos, sin, starts, keys, values, layer, weights)
