"""The operations, one public function each; `implementation=` picks who computes it.

implementation=None tries what suits the device and falls back to XLA, saying once why; a name fails loudly; a sequence is
tried in order. An implementation raises NotImplementedError for what it does not support.

Every operation differentiates straight through its rounding (`jax.custom_vjp`): with y = x^ w^T on the decoded operands,
dx = dy w^ and, where the weight is a float array quantized on the fly, dw = dy^T x^.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array
from nvfp4jax.backends import xla
from nvfp4jax.backends.xla import Scaling, Spec

log = logging.getLogger("nvfp4jax")

MODES = (None, "static", *scaling_modes.ONLINE, "expert")


def _hopper(name: str) -> Callable:
    """An implementation by the Hopper kernels; imported where it is first used, since it needs Mosaic GPU."""

    def call(*args):
        from nvfp4jax.backends import hopper

        return getattr(hopper, name)(*args)

    return call


IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "quantize": {"xla": xla.quantize, "hopper": _hopper("quantize")},
    "quantize_weight": {"xla": xla.quantize_weight, "hopper": _hopper("quantize_weight")},
    "matmul": {"xla": xla.matmul, "hopper": _hopper("matmul")},
    "grouped_matmul": {"xla": xla.grouped_matmul, "hopper": _hopper("grouped_matmul")},
    "grouped_swiglu": {"xla": xla.grouped_swiglu, "hopper": _hopper("grouped_swiglu")},
    "top_k_experts": {"xla": xla.top_k_experts, "hopper": _hopper("top_k_experts")},
    "experts": {"xla": xla.experts, "hopper": _hopper("experts")},
}


@functools.cache
def _default_order() -> tuple[str, ...]:
    """Hopper's kernels where the default device is one, then XLA."""
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"
    return ("hopper", "xla") if hopper else ("xla",)


@functools.cache
def _log_fallback(op: str, name: str, reason: str) -> None:
    log.warning("%s: %s does not apply (%s); trying the next implementation", op, name, reason)


def _dispatch(op: str, spec: Spec, *args) -> Array | NVFP4Array:
    return _first_that_can(op, spec.implementation, *args)


def _first_that_can(op: str, wanted: str | tuple[str, ...] | None, *args):
    table = IMPLEMENTATIONS[op]
    order = (wanted,) if isinstance(wanted, str) else tuple(n for n in _default_order() if n in table) if wanted is None else wanted
    for name in order:
        if name not in table:
            raise ValueError(f"{op}: no implementation {name!r}; there are {', '.join(table)}")
    errors = []
    for name in order:
        try:
            return table[name](*args)
        except NotImplementedError as error:
            if isinstance(wanted, str):
                raise
            errors.append(error)
            if len(order) > 1:
                _log_fallback(op, name, str(error))
    raise ExceptionGroup(f"{op}: none of {', '.join(order)} supports this case", errors)


def _no_cotangent(tree):
    """Zero cotangents: float0 for integers, zeros for floats."""

    def zero(v):
        if jnp.issubdtype(v.dtype, jnp.floating):
            return jnp.zeros(v.shape, v.dtype)
        return np.zeros(v.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _quantized_weight(w: Array | NVFP4Array, spec: Spec) -> NVFP4Array:
    return w if isinstance(w, NVFP4Array) else _dispatch("quantize_weight", spec, w, spec)


def _decoded_activation(x, spec, scaling, group_sizes=None) -> Array:
    operand, row_scale = xla.quantize_activation(x, spec, scaling, group_sizes)
    return xla.scaled(operand.astype(jnp.float32), row_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(spec: Spec, x, w, bias, scaling: Scaling) -> Array:
    return _dispatch("matmul", spec, x, _quantized_weight(w, spec), bias, spec, scaling)


def _matmul_fwd(spec, x, w, bias, scaling):
    return _matmul(spec, x, w, bias, scaling), (x, w, bias, scaling)


def _matmul_bwd(spec, saved, dy):
    x, w, bias, scaling = saved
    dy = dy.astype(jnp.float32)
    decoded = _quantized_weight(w, spec).dequantize(jnp.float32)
    flat = dy.reshape(-1, dy.shape[-1])
    dx = _no_cotangent(x) if isinstance(x, NVFP4Array) else xla.dot(dy, decoded.T).astype(x.dtype)
    if isinstance(w, NVFP4Array):
        dw = _no_cotangent(w)
    else:
        rows = _decoded_activation(x, spec, scaling).reshape(flat.shape[0], -1)
        dw = xla.dot(flat.T, rows.T).astype(w.dtype)
    dbias = None if bias is None else flat.sum(0).astype(bias.dtype)
    return dx, dw, dbias, _no_cotangent(scaling)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(spec: Spec, x, w, group_sizes, scaling: Scaling) -> Array:
    return _dispatch("grouped_matmul", spec, x, _quantized_weight(w, spec), group_sizes, spec, scaling)


def _grouped_fwd(spec, x, w, group_sizes, scaling):
    return _grouped_matmul(spec, x, w, group_sizes, scaling), (x, w, group_sizes, scaling)


def _grouped_bwd(spec, saved, dy):
    x, w, group_sizes, scaling = saved
    return _grouped_cotangents(spec, x, w, _quantized_weight(w, spec), group_sizes, scaling, dy.astype(jnp.float32))


def _grouped_cotangents(spec, x, w, quantized: NVFP4Array, group_sizes, scaling, dy: Array) -> tuple:
    """Of x, w, group_sizes and scaling, for f32 dy [M, N]; quantized: w as [E, N, K]."""
    dx = _no_cotangent(x) if isinstance(x, NVFP4Array) else _grouped_dx(dy, quantized, group_sizes).astype(x.dtype)
    if isinstance(w, NVFP4Array):
        dw = _no_cotangent(w)
    else:
        rows = _decoded_activation(x, spec, scaling, group_sizes)
        dw = _grouped_dw(dy, rows, group_sizes).reshape(w.shape).astype(w.dtype)
    return dx, dw, _no_cotangent(group_sizes), _no_cotangent(scaling)


def _grouped_dx(dy: Array, w: NVFP4Array, group_sizes: Array) -> Array:
    return xla.grouped(dy, group_sizes, w.shape[-1], lambda e: (xla.one_expert(w, e).dequantize(jnp.float32).T, None))


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
def _grouped_swiglu(spec: Spec, x, w, group_sizes, scaling: Scaling) -> Array:
    return _dispatch("grouped_swiglu", spec, x, _quantized_swiglu_weight(w, spec), group_sizes, spec, scaling)


def _quantized_swiglu_weight(w, spec: Spec) -> NVFP4Array:
    """[E, 2, I, K] with one global scale an expert, shared by gate and up: [E, 1, 1, 1]."""
    if isinstance(w, NVFP4Array):
        return w
    q = _dispatch("quantize_weight", spec, w.reshape(w.shape[0], -1, w.shape[-1]), spec)
    split = lambda v: v.reshape(*w.shape[:-1], v.shape[-1])  # noqa: E731
    return NVFP4Array(split(q.packed), split(q.scale), q.global_scale[..., None])


def _swiglu_fwd(spec, x, w, group_sizes, scaling):
    return _grouped_swiglu(spec, x, w, group_sizes, scaling), (x, w, group_sizes, scaling)


def _swiglu_bwd(spec, saved, dy):
    x, w, group_sizes, scaling = saved
    flat = xla.merge_halves(_quantized_swiglu_weight(w, spec))
    wide = dataclasses.replace(spec, out_dtype=jnp.dtype(jnp.float32))
    both = xla.grouped_matmul(x, flat, group_sizes, wide, scaling)
    _, silu_vjp = jax.vjp(lambda both: jax.nn.silu(both[:, : both.shape[1] // 2]) * both[:, both.shape[1] // 2 :], both)
    (dboth,) = silu_vjp(dy.astype(jnp.float32))
    return _grouped_cotangents(spec, x, w, flat, group_sizes, scaling, dboth)


_grouped_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(spec: Spec, x, expert_ids, weights, gate_up, down, scalings) -> Array:
    return _dispatch("experts", spec, x, expert_ids, weights, gate_up, down, spec, scalings)


def _experts_fwd(spec, x, expert_ids, weights, gate_up, down, scalings):
    return _experts(spec, x, expert_ids, weights, gate_up, down, scalings), (x, expert_ids, weights, gate_up, down, scalings)


def _experts_bwd(spec, saved, dy):
    x, expert_ids, weights, gate_up, down, scalings = saved
    spec = dataclasses.replace(spec, implementation="xla")
    products = [lambda x, w, sizes, spec, scaling, f=f: f(spec, x, w, sizes, scaling) for f in (_grouped_swiglu, _grouped_matmul)]
    _, vjp = jax.vjp(lambda x, w: xla.experts(x, expert_ids, w, gate_up, down, spec, scalings, products), x, weights)
    dx, dweights = vjp(dy)
    return dx, _no_cotangent(expert_ids), dweights, *map(_no_cotangent, (gate_up, down, scalings))


_experts.defvjp(_experts_fwd, _experts_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _top_k_experts(k: int, normalize: bool, implementation, logits) -> tuple[Array, Array]:
    return _first_that_can("top_k_experts", implementation, logits, k, normalize)


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


def _spec(x, scaling, four_over_six, weight_four_over_six, out_dtype, implementation, name, modes) -> Spec:
    if scaling not in modes:
        raise ValueError(f"{name}: scaling={scaling!r} is not one of {', '.join(map(str, modes))}")
    nvfp4_array.check_four_over_six(four_over_six)
    nvfp4_array.check_four_over_six(weight_four_over_six)
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if isinstance(x, NVFP4Array) else x.dtype
    if implementation is not None and not isinstance(implementation, str):
        implementation = tuple(implementation)
        if not implementation:
            raise ValueError(f"{name}: implementation is an empty sequence")
    if isinstance(x, NVFP4Array):
        scaling = None
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x is {x.dtype}, not a float")
    return Spec(scaling, four_over_six, weight_four_over_six, jnp.dtype(out_dtype), implementation, name)


def _scaling(spec: Spec, amax, valid, input_scale) -> Scaling:
    if spec.scaling == "static" and input_scale is None:
        raise ValueError(f"{spec.name}: static scaling needs input_scale (see nvfp4jax.calibrate); without one an online mode runs (tensor, token)")
    as_f32 = lambda v: None if v is None else jnp.asarray(v, jnp.float32)  # noqa: E731
    return Scaling(as_f32(amax), valid, as_f32(input_scale) if spec.scaling == "static" else None)


def _check_weight(x, w, rank: int, name: str) -> None:
    if w.ndim != rank:
        raise ValueError(f"{name}: the weight of shape {tuple(w.shape)} needs {rank} axes")
    nvfp4_array.check_k(w.shape[-1], f"{name}: weight", w.shape)
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} and weight of shape {tuple(w.shape)} differ in K, their last axis")


def quantize(
    x: Float[Array, "... K"],
    *,
    scaling: str = "tensor",
    four_over_six: str | None = None,
    amax: Float[Array, "..."] | float | None = None,
    valid: Bool[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> NVFP4Array:
    """Quantizes to NVFP4 with a global scale computed from the values themselves (online).

    x: float [..., K], K a multiple of 16.
    scaling: "tensor" (one amax over the valid rows), "tensor_pow2" (its global scale rounded up to a power of two, so that
        a row's codes do not depend on its neighbours), or "token" (one amax a row).
    four_over_six: None, "mae" or "mse" (arXiv 2512.02010), with E4M3 maximum 256.
    amax: f32 [] or [..., 1], where a producer has computed it already; a static scale is amax = input_scale * 2688.
    valid: bool x.shape[:-1]; rows where it is False take no part in the amax.

    A row that holds NaN or infinity decodes to NaN, alone. ValueError for K not a multiple of 16 or an unknown mode.
    Contract: TransformerEngine's reference quantizer, to the bit, whoever computes it.
    """
    x = jnp.asarray(x)
    nvfp4_array.check_quantize(x, scaling, four_over_six)
    spec = _spec(x, scaling, four_over_six, None, None, implementation, "quantize", scaling_modes.ONLINE)
    return _dispatch("quantize", spec, x, None if amax is None else jnp.asarray(amax, jnp.float32), valid, spec)


def quantize_weight(
    w: Float[Array, "... N K"],
    *,
    four_over_six: str | None = None,
    implementation: str | Sequence[str] | None = None,
    name: str = "weight",
) -> NVFP4Array:
    """A weight [..., N, K] -> NVFP4 with one global scale for each [N, K] matrix: f32 [] or [..., 1, 1].

    Values are rounded to bfloat16 first, so that a trainer with float32 masters and a loader of the bfloat16 export get the
    same bits. NaN or infinity in a row gives that row NaN scales.
    """
    nvfp4_array.check_k(w.shape[-1], name, w.shape)
    spec = _spec(w, None, None, four_over_six, None, implementation, name, (None,))
    return _dispatch("quantize_weight", spec, w, spec)


def matmul(
    x: Float[Array, "... K"] | NVFP4Array,
    w: NVFP4Array | Float[Array, "N K"],
    *,
    scaling: str | None = "tensor",
    four_over_six: str | None = None,
    weight_four_over_six: str | None = None,
    bias: Float[Array, "N"] | None = None,
    amax: Float[Array, "..."] | None = None,
    valid: Bool[Array, "..."] | None = None,
    input_scale: Float[Array, ""] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
    name: str = "matmul",
) -> Float[Array, "... N"]:
    """x [..., K] times w [N, K] transposed, both in NVFP4, accumulated in float32.

    x: float, quantized here as `scaling` says, or an NVFP4Array.
    w: an NVFP4Array [N, K], or a float array that is quantized on the fly (bfloat16-rounded first) and gets a gradient.
    scaling: "tensor", "tensor_pow2", "token" (see `quantize`); "static" with `input_scale`; None leaves x unquantized.
    amax, valid: as in `quantize`. bias: [N], added in float32. out_dtype: x's by default (bfloat16 for an NVFP4Array).
    ValueError for shapes that do not fit, NotImplementedError from a named implementation that cannot do it.
    """
    _check_weight(x, w, 2, name)
    spec = _spec(x, scaling, four_over_six, weight_four_over_six, out_dtype, implementation, name, MODES[:-1])
    return _matmul(spec, x, w, bias, _scaling(spec, amax, valid, input_scale))


def grouped_matmul(
    x: Float[Array, "M K"] | NVFP4Array,
    w: NVFP4Array | Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    scaling: str | None = "tensor",
    four_over_six: str | None = None,
    weight_four_over_six: str | None = None,
    amax: Float[Array, "..."] | None = None,
    valid: Bool[Array, "M"] | None = None,
    input_scale: Float[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
    name: str = "grouped_matmul",
) -> Float[Array, "M N"]:
    """Rows sorted by group, each times the weight of its group: out[i] = x[i] w[group(i)]^T.

    group_sizes: i32 [E], rows of each group, in order; rows past their sum give zeros.
    scaling: as in `matmul`, and "expert": one amax a group. input_scale: f32 [] or [E]. w's global scale: [E, 1, 1].
    """
    _check_grouped(x, w, group_sizes, 3, name)
    spec = _spec(x, scaling, four_over_six, weight_four_over_six, out_dtype, implementation, name, MODES)
    return _grouped_matmul(spec, x, w, group_sizes, _scaling(spec, amax, valid, input_scale))


def grouped_swiglu(
    x: Float[Array, "M K"] | NVFP4Array,
    w: NVFP4Array | Float[Array, "E 2 I K"],
    group_sizes: Int[Array, "E"],
    *,
    scaling: str | None = "tensor",
    four_over_six: str | None = None,
    weight_four_over_six: str | None = None,
    amax: Float[Array, "..."] | None = None,
    valid: Bool[Array, "M"] | None = None,
    input_scale: Float[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
    name: str = "grouped_swiglu",
) -> Float[Array, "M I"]:
    """silu(x gate^T) * (x up^T) for each row's group, w holding gate then up; the gated half of a mixture of experts.

    w: [E, 2, I, K], gate and up of an expert sharing one global scale, [E, 1, 1, 1]. The rest as in `grouped_matmul`.
    """
    _check_grouped(x, w, group_sizes, 4, name)
    spec = _spec(x, scaling, four_over_six, weight_four_over_six, out_dtype, implementation, name, MODES)
    return _grouped_swiglu(spec, x, w, group_sizes, _scaling(spec, amax, valid, input_scale))


def top_k_experts(
    logits: Float[Array, "... E"], k: int, *, normalize: bool, implementation: str | Sequence[str] | None = None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """A router's choice: (weights f32 [..., k], ids i32 [..., k]) of the k likeliest of E experts, in falling order.

    logits: float32 [..., E]. weights: their softmax over all experts; normalize: divided by its sum over the k. Of equal ones the
    lower id comes first. ValueError for other dtypes or k > E.
    """
    wanted = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
    return _top_k_experts(k, normalize, wanted, logits)


def experts(
    x: Float[Array, "T H"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: NVFP4Array,
    down: NVFP4Array,
    *,
    scaling: str | None = "token",
    four_over_six: str | None = None,
    valid: Bool[Array, "T"] | None = None,
    input_scales: tuple[Array, Array] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
    name: str = "experts",
) -> Float[Array, "T H"]:
    """A mixture of gated experts after its router: sort, gate and up, SwiGLU, down, and the weighted sum over a token's experts.

    expert_ids: i32 [T, k]; weights: f32 [T, k]. gate_up [E, 2, I, H], gate first, one global scale an expert; down [E, H, I].
    Both activations, x and the SwiGLU output, are quantized as `scaling` says. valid: bool [T], tokens that count in an amax.
    input_scales: (gate_up's, down's), f32 [] or [E], for "static". The sum runs in slot order, in float32.
    """
    _check_weight(x, gate_up, 4, f"{name}: gate_up")
    if down.ndim != 3 or down.shape[0] != gate_up.shape[0] or down.shape[2] != gate_up.shape[2]:
        raise ValueError(f"{name}: down of shape {down.shape} does not fit gate_up of shape {gate_up.shape}")
    if expert_ids.shape != weights.shape or expert_ids.shape[:1] != x.shape[:1]:
        raise ValueError(f"{name}: x {x.shape}, expert_ids {expert_ids.shape} and weights {weights.shape} do not fit")
    spec = _spec(x, scaling, four_over_six, None, out_dtype, implementation, name, MODES)
    scalings = tuple(_scaling(spec, None, valid, s) for s in input_scales or (None, None))
    return _experts(spec, x, expert_ids.astype(jnp.int32), weights, gate_up, down, scalings)


def _check_grouped(x, w, group_sizes, rank: int, name: str) -> None:
    _check_weight(x, w, rank, name)
    if len(x.shape) != 2:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} needs two axes, rows sorted by group and K")
    if group_sizes.shape != (w.shape[0],):
        raise ValueError(f"{name}: group_sizes of shape {group_sizes.shape} needs one entry for each of the {w.shape[0]} groups")
