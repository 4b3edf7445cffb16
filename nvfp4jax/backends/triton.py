"""The operations on CUDA GPUs, by the kernels of `nvfp4jax.kernels.triton`: the same functions as `backends.xla`.

A kernel reads a quantized activation as its decoded operand (qvalue * scale in float16, exact, K permuted) and a row scale, and the
weight in the checkpoint's own layout. An activation that is not quantized stays in its own dtype and order until a product reads it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends import xla
from nvfp4jax.backends.operands import global_scale, options, rows_of
from nvfp4jax.backends.xla import Operand
from nvfp4jax.kernels.triton import call, dense, grouped
from nvfp4jax.kernels.triton import combine as combiner
from nvfp4jax.kernels.triton import quantize as quantizer
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Request

NAME = "triton"
# Below compute capability 8.0 Triton multiplies without the matrix units: cuBLAS on decoded weights is ahead from here on.
MOST_TOKENS_BEFORE_AMPERE = 64
# What has no kernel here is XLA's.
attention, attention_plan, rope_write = xla.attention, xla.attention_plan, xla.rope_write
float_matmul, ragged_dot, norm = xla.float_matmul, xla.ragged_dot, xla.norm


def quantize(x: jax.Array, request: Request) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize(x, **options(request)))


def quantize_weight(w: jax.Array, four_over_six: str | None) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize_weight(w.astype(jnp.bfloat16), four_over_six=four_over_six))


def quantize_transposed(ws: tuple[jax.Array, ...], four_over_six: str | None) -> NVFP4Array:
    """XLA transposes in front of the kernel."""
    return quantize_weight(rows_of(ws), four_over_six)


def activation(x: jax.Array, request: Request | None, route: Routing | None = None) -> Operand:
    """With a route, a token is quantized once and stored once for each of its experts."""
    if request is not None:
        return quantizer.operand(x, copies=None if route is None else route.row_of_slot, **options(request))
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{x.dtype} activations without quantization; the kernels multiply float16")
    x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x  # a float16 operand is a permuted one
    return x if route is None else x[route.token_of_row], None


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, request: Request) -> Operand:
    return quantizer.operand(x, weight, eps=eps, **options(request))


def silu_mul(gate: jax.Array, up: jax.Array, request: Request) -> Operand:
    return quantizer.operand(gate, up, **options(request))


def packed(q: NVFP4Array) -> Operand:
    if q.global_scale.ndim not in (0, 2):
        raise NotImplementedError(f"an activation with a global scale of shape {q.global_scale.shape}")
    return quantizer.permute_k(q.dequantize_blocks(jnp.float16)), q.global_scale


def natural(operand: jax.Array) -> jax.Array:
    if operand.dtype != jnp.float16:
        return operand
    order = np.argsort(np.asarray(quantizer.permute_k(np.arange(operand.shape[-1], dtype=np.int32))))
    return operand[..., order].astype(jnp.bfloat16)


def _operand(a: QuantizedActivation) -> tuple[jax.Array, jax.Array]:
    """a as the products read it."""
    if call.capability() < 80 and a.operand.shape[0] > MOST_TOKENS_BEFORE_AMPERE:
        raise NotImplementedError(f"{a.operand.shape[0]} rows on compute capability 7.5, whose matrix units Triton does not use")
    if a.operand.dtype == jnp.float16:
        return a.operand, a.row_scale
    return quantizer.plain(a.operand, a.row_scale)


def matmul(
    a: QuantizedActivation, w: NVFP4Array, bias: jax.Array | None, out_dtype: jnp.dtype, residual: jax.Array | None = None
) -> jax.Array:
    y = dense.matmul(*_operand(a), w.packed, w.scale, global_scale(w, 0), bias=bias, out_dtype=out_dtype, layer=w.layer)
    return y if residual is None else residual + y


def matmuls(a: QuantizedActivation, ws: tuple[NVFP4Array, ...], biases: tuple, out_dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    return tuple(matmul(a, w, bias, out_dtype) for w, bias in zip(ws, biases, strict=True))


def grouped_matmul(a: QuantizedActivation, w: NVFP4Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return grouped.matmul(*_operand(a), w.packed, w.scale, global_scale(w, 1), group_sizes, out_dtype=out_dtype, layer=w.layer)


def grouped_swiglu(a: QuantizedActivation, w: NVFP4Array, group_sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return grouped.gate_up(*_operand(a), w.packed, w.scale, global_scale(w, 1), group_sizes, out_dtype=out_dtype, layer=w.layer)


def combine(rows: jax.Array, route: Routing, weights: jax.Array, out_dtype: jnp.dtype, residual: jax.Array | None) -> jax.Array:
    y = combiner.combine(rows, route.row_of_slot, weights, out_dtype=out_dtype)
    return y if residual is None else residual + y


# A router's choice and its sort have no kernel of their own here.
top_k_experts, route = xla.top_k_experts, xla.route
logits_in_parts, choose_and_route = xla.logits_in_parts, xla.choose_and_route
