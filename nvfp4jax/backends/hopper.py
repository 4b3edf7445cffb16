"""The operations on Hopper GPUs, by the kernels of `nvfp4jax.kernels.hopper`: the same functions as `backends.xla`.

A kernel reads an activation as its decoded operand (qvalue * scale in bfloat16, K permuted) and a row scale, and the weight in
the checkpoint's own layout.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4jax import fp8, numerics
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends.operands import global_scale, options, rows_of
from nvfp4jax.backends.xla import Operand
from nvfp4jax.fp8 import FP8Array
from nvfp4jax.kernels.hopper import attention as attention_kernels
from nvfp4jax.kernels.hopper import dense, float_dense, grouped, rope, routing
from nvfp4jax.kernels.hopper import quantize as quantizer
from nvfp4jax.kernels.hopper.decode import permute_k
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Request

NAME = "hopper"
log = logging.getLogger("nvfp4jax")


def _once(kernel: Callable, *static: str) -> Callable:
    """The kernel behind a jit of its own: calls of equal shapes are traced and lowered once in a program, not once a layer."""
    return jax.jit(kernel, static_argnames=static)


_QUANTIZE = "scaling", "four_over_six"
_operand = _once(quantizer.operand, *_QUANTIZE)
_rmsnorm_operand = _once(quantizer.rmsnorm_operand, "eps", *_QUANTIZE)
_norm = _once(quantizer.rms_norm, "eps")
_silu_mul_operand = _once(quantizer.silu_mul_operand, *_QUANTIZE)
_dense = _once(dense.matmul, "out_dtype")
_dense_together = _once(dense.matmuls, "out_dtype")
_grouped = _once(grouped.matmul, "out_dtype")
_gate_up = _once(grouped.gate_up)
_top_k = _once(routing.top_k_experts, "k", "normalize")
_choose_and_route = _once(routing.choose_and_route, "tokens", "k", "normalize")
_route = _once(routing.route, "num_experts")
_combine = _once(routing.combine, "out_dtype")
_attention = _once(attention_kernels.attention, "scale", "window", "soft_cap")


def quantize(x: jax.Array, request: Request) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize(x, **options(request)))


def quantize_weight(w: jax.Array, four_over_six: str | None) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize_weight(w.astype(jnp.bfloat16), four_over_six=four_over_six))


@functools.cache
def _log_transposed(reason: str) -> None:
    log.warning("%s; a transposed copy is written in front of the kernel; the bits are the same", reason)


def quantize_transposed(ws: tuple[jax.Array, ...], four_over_six: str | None) -> NVFP4Array:
    try:
        return NVFP4Array(*quantizer.quantize_transposed([w.astype(jnp.bfloat16) for w in ws], four_over_six=four_over_six))
    except NotImplementedError as error:
        _log_transposed(str(error))
        return quantize_weight(rows_of(ws), four_over_six)


def activation(x: jax.Array, request: Request | None, route: Routing | None = None) -> Operand:
    """With a route, a token is quantized once and stored once for each of its experts."""
    if request is None:
        _supported(x)
        return permute_k(x if route is None else x[route.token_of_row]), None
    return _operand(x, rows=None if route is None else route.row_of_slot, **options(request))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, request: Request) -> Operand:
    _, operand, row_scale = _rmsnorm_operand(x, weight, eps=eps, **options(request))
    return operand, row_scale


def silu_mul(gate: jax.Array, up: jax.Array, request: Request) -> Operand:
    _, operand, row_scale = _silu_mul_operand(gate, up, **options(request))
    return operand, row_scale


def packed(q: NVFP4Array) -> Operand:
    if q.global_scale.ndim not in (0, 2):
        raise NotImplementedError(f"an activation with a global scale of shape {q.global_scale.shape}")
    operand = q.dequantize_blocks()
    _supported(operand)
    return permute_k(operand), q.global_scale


def natural(operand: jax.Array) -> jax.Array:
    order = np.asarray(permute_k(np.arange(64)[None]))[0]
    chunks = operand.reshape(*operand.shape[:-1], operand.shape[-1] // 64, 64)
    return chunks[..., np.argsort(order)].reshape(operand.shape)


def _supported(operand: jax.Array) -> None:
    if operand.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{operand.dtype} activations without quantization; the kernels multiply bfloat16")
    if operand.shape[-1] % 64:
        raise NotImplementedError(f"K={operand.shape[-1]}; the kernels multiply K that is a multiple of 64")


def _row_scale(a: QuantizedActivation) -> jax.Array:
    return jnp.float32(1) if a.row_scale is None else a.row_scale


def matmul(
    a: QuantizedActivation, w: NVFP4Array, bias: jax.Array | None, out_dtype: jnp.dtype, residual: jax.Array | None = None
) -> jax.Array:
    _supported(a.operand)
    return _dense(
        a.operand, _row_scale(a), w.packed, w.scale, global_scale(w, 0), bias=bias, out_dtype=out_dtype, layer=w.layer, residual=residual
    )


def matmuls(a: QuantizedActivation, ws: tuple[NVFP4Array, ...], biases: tuple, out_dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """One launch where the kernels can: see `dense.matmuls`."""
    _supported(a.operand)
    weights = [(w.packed, w.scale, global_scale(w, 0), bias) for w, bias in zip(ws, biases, strict=True)]
    return _dense_together(a.operand, _row_scale(a), weights, out_dtype=out_dtype, layer=ws[0].layer)


def grouped_matmul(a: QuantizedActivation, w: NVFP4Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    _supported(a.operand)
    return _grouped(
        a.operand, _row_scale(a), w.packed, w.scale, global_scale(w, 1), group_sizes, out_dtype=out_dtype, layer=w.layer
    )


def grouped_swiglu(a: QuantizedActivation, w: NVFP4Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    if out_dtype != jnp.bfloat16:
        raise NotImplementedError(f"a result in {out_dtype}; gate and up give bfloat16")
    _supported(a.operand)
    return _gate_up(a.operand, _row_scale(a), w.packed, w.scale, global_scale(w, 1), group_sizes, layer=w.layer)


def top_k_experts(logits: jax.Array, k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    return _top_k(logits, k=k, normalize=normalize)


def route(expert_ids: jax.Array, num_experts: int, valid: jax.Array | None) -> Routing:
    return _route(expert_ids, num_experts=num_experts, valid=valid)


def logits_in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The choice adds them up."""
    return float_dense.sums(x, kernel)


def choose_and_route(
    parts: jax.Array, tokens: int, k: int, normalize: bool, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, Routing]:
    return _choose_and_route(parts, tokens=tokens, k=k, normalize=normalize, valid=valid)


def combine(rows: jax.Array, route: Routing, weights: jax.Array, out_dtype: jnp.dtype, residual: jax.Array | None) -> jax.Array:
    return _combine(rows, route, weights, out_dtype=out_dtype, residual=residual)


def attention_plan(
    starts: jax.Array, q: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct, window: int | None, shared: tuple | None
) -> attention_kernels.Plan | None:
    empty = 0 in (*q.shape, *keys.shape)
    if empty or q.dtype != jnp.bfloat16 or keys.dtype not in (jnp.bfloat16, fp8.DTYPE) or q.shape[-1] not in attention_kernels.HEAD_DIMS:
        return None  # `attention` says why it does not apply
    plan = attention_kernels.plan(starts, q, keys, window=window, shared=shared)
    # Behind the barrier XLA does not know that the counters are zeros; it would fill them anew in front of each layer's kernel.
    return None if plan is None else plan._replace(counters=lax.optimization_barrier(plan.counters))


@functools.cache
def _log_decoded(what: str) -> None:
    log.warning("attention: %s of an FP8 cache are decoded to bfloat16, a layer at a time, in front of the kernel; the bits are the same", what)


def _layer(x: jax.Array | FP8Array, layer: jax.Array | None) -> jax.Array:
    """A layer's, decoded, bf16 [1, ...]."""
    of_layer = lambda a: a[None] if layer is None else lax.dynamic_index_in_dim(a, layer)  # noqa: E731
    x = jax.tree.map(of_layer, x)
    return x.dequantize(jnp.bfloat16) if isinstance(x, FP8Array) else x


def attention(q, keys, values, starts, layer, scale, window, soft_cap, counts, plan, shared) -> jax.Array:
    """Decode reads an FP8 cache as it is. Prefill, and the sums of what rows share, have kernels that read bfloat16."""
    how = dict(scale=scale, window=window, soft_cap=soft_cap, counts=counts, plan=plan)
    if keys.shape != values.shape:
        raise NotImplementedError(f"values of shape {values.shape} beside keys of shape {keys.shape}")
    if not isinstance(keys, FP8Array):
        return _attention(q, keys, values, starts, layer=layer, shared=shared, **how)
    if q.dtype != jnp.bfloat16 or q.shape[-1] not in attention_kernels.HEAD_DIMS:
        raise NotImplementedError(f"q {q.dtype}{q.shape} beside an FP8 cache; only bfloat16 heads of {attention_kernels.HEAD_DIMS}")
    is_decode = attention_kernels.is_decode(q, keys, shared)
    if shared is not None and (isinstance(shared.keys, FP8Array) or not is_decode):
        _log_decoded("keys and values that rows share")
        shared = shared.of([_layer(x, layer) for x in shared.arrays])
    elif shared is not None and layer is None:
        shared = shared.of([x[None] for x in shared.arrays])
    if is_decode:
        scales = keys.scale, values.scale
        return _attention(q, keys.qvalue, values.qvalue, starts, layer=layer, shared=shared, scales=scales, **how)
    _log_decoded("keys and values for prefill")
    keys, values = _layer(keys, layer), _layer(values, layer)
    return _attention(q, keys, values, starts, layer=jnp.int32(0), shared=shared, **how)


def rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm) -> tuple[jax.Array, jax.Array | FP8Array, jax.Array | FP8Array]:
    # XLA takes angles in any float, and one row's for all; the kernel reads float32 of each.
    cos, sin = (jnp.broadcast_to(a.astype(jnp.float32), (*q.shape[:2], a.shape[-1])) for a in (cos, sin))
    if isinstance(keys, FP8Array):
        caches, scales = (keys.qvalue, values.qvalue), (keys.scale, values.scale)
        q, *written = rope.rope_write(q, k, v, cos, sin, starts, *caches, layer=layer, norm=norm, scales=scales)
        return q, FP8Array(*written[::2]), FP8Array(*written[1::2])
    return rope.rope_write(q, k, v, cos, sin, starts, keys, values, layer=layer, norm=norm)


def float_matmul(x: jax.Array, kernel: jax.Array, out_dtype: jnp.dtype, transposed: bool) -> jax.Array:
    """XLA rounds, in the operation that reads it; it may not leave the rounding out where that one widens it again."""
    return numerics.rounded(float_dense.matmul(x, kernel, transposed=transposed), out_dtype).astype(out_dtype)


@functools.cache
def _tokamax() -> ModuleType:
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError("tokamax is not installed, whose kernel is several times as fast; pip install tokamax")
    try:
        import tokamax
    except Exception as error:  # tokamax and jax follow each other closely
        raise NotImplementedError(f"tokamax cannot be imported: {type(error).__name__}: {str(error)[:120]}") from error
    log.warning("experts in bfloat16 multiply by tokamax's Mosaic ragged_dot")
    return tokamax


def ragged_dot(rows: jax.Array, kernel: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """By tokamax's Mosaic kernel, with its own gradients. Not tuned: a cache of `tokamax.autotune` is read where there is one."""
    (m, k), n = rows.shape, kernel.shape[-1]
    if {rows.dtype, kernel.dtype} != {jnp.dtype(jnp.bfloat16)} or k % 64 or n % 64 or not m:
        raise NotImplementedError(f"rows {rows.dtype}{rows.shape} times {kernel.dtype}{kernel.shape}: bfloat16, K and N multiples of 64 are supported")
    rows = jnp.pad(rows, ((0, -m % (8 if m <= 64 else 64)), (0, 0)))  # its gradient of the kernel takes groups of 8 rows, and tiles of 64
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # tokamax asks for both, whatever its caller does
        return _tokamax().ragged_dot(rows, kernel, group_sizes, implementation="mosaic")[:m]


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return _norm(x, weight, eps=eps)
