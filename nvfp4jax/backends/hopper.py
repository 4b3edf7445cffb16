"""The operations on Hopper GPUs, by the kernels of `nvfp4jax.kernels.hopper`: the same functions as `backends.xla`.

A kernel reads an activation as its decoded operand (qvalue * scale in bfloat16, K permuted) and a row scale, and the weight in
the checkpoint's own layout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends.xla import Operand
from nvfp4jax.kernels.hopper import attention as attention_kernels
from nvfp4jax.kernels.hopper import dense, float_dense, grouped, rope, routing
from nvfp4jax.kernels.hopper import quantize as quantizer
from nvfp4jax.kernels.hopper.decode import permute_k
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Request

NAME = "hopper"


def _once(kernel: Callable, *static: str) -> Callable:
    """The kernel behind a jit of its own: calls of equal shapes are traced and lowered once in a program, not once a layer."""
    return jax.jit(kernel, static_argnames=static)


_QUANTIZE = "scaling", "four_over_six"
_operand = _once(quantizer.operand, *_QUANTIZE)
_rmsnorm_operand = _once(quantizer.rmsnorm_operand, "eps", "normed", *_QUANTIZE)
_silu_mul_operand = _once(quantizer.silu_mul_operand, *_QUANTIZE)
_dense = _once(dense.matmul, "out_dtype")
_grouped = _once(grouped.matmul, "out_dtype")
_gate_up = _once(grouped.gate_up)
_top_k = _once(routing.top_k_experts, "k", "normalize")
_route = _once(routing.route, "num_experts")
_combine = _once(routing.combine, "out_dtype")
_attention = _once(attention_kernels.attention, "scale", "window", "soft_cap")


def _options(request: Request) -> dict:
    """A request as the quantizing kernels take it."""
    scaling = "token" if request.per_row else "tensor_pow2" if request.pow2 else "tensor"
    return dict(scaling=scaling, four_over_six=request.four_over_six, amax=request.amax, global_scale=request.global_scale, valid=request.valid)


def quantize(x: jax.Array, request: Request) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize(x, **_options(request)))


def quantize_weight(w: jax.Array, four_over_six: str | None) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize_weight(w.astype(jnp.bfloat16), four_over_six=four_over_six))


def activation(x: jax.Array, request: Request | None, route: Routing | None = None) -> Operand:
    """With a route, a token is quantized once and stored once for each of its experts."""
    if request is None:
        _bfloat16(x)
        return permute_k(x if route is None else x[route.token_of_row]), None
    return _operand(x, rows=None if route is None else route.row_of_slot, **_options(request))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, request: Request | None) -> Operand:
    if request is None:
        raise NotImplementedError("rms_norm without quantization: XLA fuses it")
    _, operand, row_scale = _rmsnorm_operand(x, weight, eps=eps, **_options(request))
    return operand, row_scale


def silu_mul(gate: jax.Array, up: jax.Array, request: Request | None) -> Operand:
    if request is None:
        raise NotImplementedError("silu_mul without quantization: XLA fuses it")
    _, operand, row_scale = _silu_mul_operand(gate, up, **_options(request))
    return operand, row_scale


def packed(q: NVFP4Array) -> Operand:
    if q.global_scale.ndim not in (0, 2):
        raise NotImplementedError(f"an activation with a global scale of shape {q.global_scale.shape}")
    return permute_k(q.dequantize_blocks()), q.global_scale


def natural(operand: jax.Array) -> jax.Array:
    order = np.asarray(permute_k(np.arange(64)[None]))[0]
    chunks = operand.reshape(*operand.shape[:-1], -1, 64)
    return chunks[..., np.argsort(order)].reshape(operand.shape)


def _bfloat16(x: jax.Array) -> None:
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype} activations without quantization; the kernels multiply bfloat16")


def _row_scale(a: QuantizedActivation) -> jax.Array:
    return jnp.float32(1) if a.row_scale is None else a.row_scale


def _global_scale(w: NVFP4Array, axes: int) -> jax.Array:
    """The global scales of a weight with `axes` leading axes of experts: f32 [(L)] or [(L), E]."""
    lead = w.packed.shape[: axes + (w.layer is not None)]
    scale = w.aligned_global_scale
    if any(size > 1 for size in scale.shape[len(lead) :]):
        raise NotImplementedError(f"global scales of shape {w.global_scale.shape} for a weight of shape {w.shape}: one a matrix is supported")
    return jnp.broadcast_to(scale.reshape(scale.shape[: len(lead)]), lead)


def matmul(a: QuantizedActivation, w: NVFP4Array, bias: jax.Array | None, out_dtype: jnp.dtype) -> jax.Array:
    _bfloat16(a.operand)
    return _dense(
        a.operand, _row_scale(a), w.packed, w.scale, _global_scale(w, 0), bias=bias, out_dtype=out_dtype, layer=w.layer
    )


def grouped_matmul(a: QuantizedActivation, w: NVFP4Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    _bfloat16(a.operand)
    return _grouped(
        a.operand, _row_scale(a), w.packed, w.scale, _global_scale(w, 1), group_sizes, out_dtype=out_dtype, layer=w.layer
    )


def grouped_swiglu(a: QuantizedActivation, w: NVFP4Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    if out_dtype != jnp.bfloat16:
        raise NotImplementedError(f"a result in {out_dtype}; gate and up give bfloat16")
    _bfloat16(a.operand)
    return _gate_up(a.operand, _row_scale(a), w.packed, w.scale, _global_scale(w, 1), group_sizes, layer=w.layer)


def top_k_experts(logits: jax.Array, k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    return _top_k(logits, k=k, normalize=normalize)


def route(expert_ids: jax.Array, num_experts: int) -> Routing:
    return _route(expert_ids, num_experts=num_experts)


def combine(rows: jax.Array, route: Routing, weights: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return _combine(rows, route, weights, out_dtype=out_dtype)


def attention_plan(starts: jax.Array, q: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct, window: int | None) -> attention_kernels.Plan | None:
    if q.dtype != jnp.bfloat16 or keys.dtype != jnp.bfloat16 or q.shape[-1] not in attention_kernels.HEAD_DIMS:
        return None  # `attention` says why it does not apply
    plan = attention_kernels.plan(starts, q, keys, window=window)
    # Behind the barrier XLA does not know that the counters are zeros; it would fill them anew in front of each layer's kernel.
    return None if plan is None else plan._replace(counters=lax.optimization_barrier(plan.counters))


def attention(q, keys, values, starts, layer, scale, window, soft_cap, counts, plan) -> jax.Array:
    options = dict(scale=scale, window=window, soft_cap=soft_cap, counts=counts, plan=plan)
    if keys.shape != values.shape:
        raise NotImplementedError(f"values of shape {values.shape} beside keys of shape {keys.shape}")
    return _attention(q, keys, values, starts, layer=layer, **options)


def rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm) -> tuple[jax.Array, jax.Array, jax.Array]:
    return rope.rope_write(q, k, v, cos, sin, starts, keys, values, layer=layer, norm=norm)


def float_matmul(x: jax.Array, kernel: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return float_dense.matmul(x, kernel, out_dtype=out_dtype)


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """By the quantizing kernel, which has the norm to the bit; its codes are written beside and read by nobody."""
    return _rmsnorm_operand(x, weight, eps=eps, scaling="token", normed=True)[0]
