"""x [M, K] times an NVFP4 weight [N, K], transposed, in Triton: W4A4 and W4A16 alike, the weight in the checkpoint's layout.

A program owns BN outputs (rows of the weight) of BM tokens and computes the transposed product, so that the weight is the operand that
stays in registers. The sum over K runs in `segments` of whole chunks, their sums added in order; segments depend on N and K alone, so
that a row's bits do not depend on M. With few tokens and few outputs the segments are programs of their own, and a second launch adds
them in the same order.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from nvfp4jax.kernels.triton import call as calls
from nvfp4jax.kernels.triton.call import call
from nvfp4jax.kernels.triton.decode import (
    BK,
    least_tokens,
    load_weights,
    multiply,
    multiply_tail,
    shared_memory,
    stages,
)  # fmt: skip

GROUP = 8  # tiles of tokens that run side by side over all outputs, for the L2


@triton.jit
def _finish(acc, m, n, M, scale_ptr, g, bias_ptr, o_ptr, N: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr):
    """Scales, bias, one rounding, and the store. acc [BN, BM] holds the sum times 2**-7."""
    inside = (n < N)[:, None] & (m < M)[None, :]
    row_scale = tl.load(scale_ptr + (m if PER_ROW else m * 0), mask=m < M, other=0.0)
    y = acc * 128.0 * g * row_scale[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(o_ptr + m.to(tl.int64)[None, :] * N + n[:, None], y.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dense_kernel(x_ptr, scale_ptr, w_ptr, s_ptr, g_ptr, bias_ptr, layer_ptr, M, o_ptr, N: tl.constexpr, K: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SEGMENTS: tl.constexpr,
                 PARTS: tl.constexpr, STAGES: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, STACKED: tl.constexpr,
                 BIAS_STACKED: tl.constexpr):
    """PARTS: segments are programs, which leave f32 [SEGMENTS, M, N]."""
    tiles: tl.constexpr = (N + BN - 1) // BN
    first = tl.program_id(0) // (GROUP * tiles) * GROUP
    width = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    m = (first + within % width) * BM + tl.arange(0, BM)
    n = within // width * BN + tl.arange(0, BN)
    layer = tl.load(layer_ptr).to(tl.int64) if STACKED else 0
    row = (layer * N + tl.where(n < N, n, 0))[:, None] * (K // 16) + tl.arange(0, 16)[None, :]
    w_ptrs, s_ptrs = w_ptr.to(tl.pointer_type(tl.int64)) + row, s_ptr + row
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * K + tl.arange(0, 32)[:, None]
    tokens, inside = (m < M)[None, :], (n < N)[:, None]
    length: tl.constexpr = (K // 256 + SEGMENTS - 1) // SEGMENTS
    total = tl.zeros((BN, BM), tl.float32)
    for segment in range(tl.program_id(1), tl.program_id(1) + 1 if PARTS else SEGMENTS):
        acc = tl.zeros((BN, BM), tl.float32)
        for chunk in tl.range(segment * length, tl.minimum((segment + 1) * length, K // 256), num_stages=STAGES):
            words, factor = load_weights(w_ptrs + chunk * 16, s_ptrs + chunk * 16, inside, N % BN != 0)
            acc = multiply(acc, words, factor, x_ptrs + chunk * 256, tokens, 16)
        if K % 256:
            if segment == SEGMENTS - 1:
                acc = multiply_tail(acc, w_ptrs, s_ptrs, x_ptrs, inside, tokens, K)
        total += acc
    if PARTS:
        at = (tl.program_id(1).to(tl.int64) * M + m)[None, :] * N + n[:, None]
        tl.store(o_ptr + at, total, mask=tokens & inside)
    else:
        if BIAS_STACKED:
            bias_ptr += layer * N
        _finish(total, m, n, M, scale_ptr, tl.load(g_ptr + layer), bias_ptr, o_ptr, N, PER_ROW, BIAS)


@triton.jit
def sum_kernel(parts_ptr, scale_ptr, g_ptr, bias_ptr, layer_ptr, M, o_ptr, N: tl.constexpr, BN: tl.constexpr, SEGMENTS: tl.constexpr,
               PER_ROW: tl.constexpr, BIAS: tl.constexpr, STACKED: tl.constexpr, BIAS_STACKED: tl.constexpr):
    """The segments of `dense_kernel` added in order."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) + tl.zeros((1,), tl.int32)
    layer = tl.load(layer_ptr).to(tl.int64) if STACKED else 0
    total = tl.zeros((BN, 1), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        at = (m.to(tl.int64) + segment * M)[None, :] * N + n[:, None]
        total += tl.load(parts_ptr + at, mask=(n < N)[:, None], other=0.0)
    if BIAS_STACKED:
        bias_ptr += layer * N
    _finish(total, m, n, M, scale_ptr, tl.load(g_ptr + layer), bias_ptr, o_ptr, N, PER_ROW, BIAS)


def plan(sm: int, m: int, n: int, k: int) -> dict:
    """BM, BN, SEGMENTS, PARTS, warps, STAGES from the compute capability and the shape."""
    chunks, segments = k // BK, 1
    while segments < 8 and -(-n // 64) * segments < 128 and chunks >= 8 * segments:  # at least 4 steps a segment
        segments *= 2
    if sm < 80:  # no matrix instruction from Triton here: as few products as there are tokens
        bm, bn = min(8, triton.next_power_of_2(m)), 64
    elif shared_memory(sm) < 160000:  # wider tiles would leave no room for a step in flight
        bm, bn = min(64, max(least_tokens(sm), triton.next_power_of_2(m))), 64
    else:
        bm = min(128, max(least_tokens(sm), triton.next_power_of_2(m)))
        # 256 x 64, where its programs fill the SMs: Triton 3.9 fails to lay out the tokens for Blackwell's matrix instruction.
        bn = 64 if bm < 64 else 256 if bm == 64 and n >= 256 * 132 and sm == 90 else 128
    return dict(BM=bm, BN=bn, SEGMENTS=segments, PARTS=segments > 1 and m <= 64, warps=8 if bn >= 128 else 4,
                STAGES=stages(sm, bn * BK * 9 // 16 + bm * BK * 2, 4 if bn == 64 else 2) if sm >= 80 else 1)


def matmul(operand, row_scale, packed, scale, global_scale, *, bias=None, out_dtype=jnp.bfloat16, layer=None):
    """operand f16 [M, K] (see `quantize.operand`), row_scale f32 [] or [M, 1]; packed u8 [(L,) N, K/2], scale float8_e4m3fn
    [(L,) N, K/16], global_scale f32 [] or [L], bias [N] or [L, N]; layer: i32 [], which of L -> out_dtype [M, N]."""
    m, (n, k) = operand.shape[0], (packed.shape[-2], 2 * packed.shape[-1])
    if operand.shape[1] != k or operand.dtype != jnp.float16:
        raise ValueError(f"dense: an operand {operand.dtype}{operand.shape} for a weight of K={k}; `quantize.operand` makes it")
    if m == 0:
        return jnp.zeros((0, n), out_dtype)
    p = plan(calls.capability(), m, n, k)
    none = jnp.zeros(1, jnp.int32)
    flags = dict(PER_ROW=row_scale.size > 1 or row_scale.ndim == 2, BIAS=bias is not None, STACKED=layer is not None,
                 BIAS_STACKED=bias is not None and bias.ndim == 2)
    tail = [global_scale.reshape(-1), none if bias is None else bias, none if layer is None else layer.reshape(1)]
    row_scale = row_scale.reshape(-1)
    scale = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    result = jax.ShapeDtypeStruct((m, n), out_dtype)
    parts = p["PARTS"]
    tiles = triton.cdiv(m, p["BM"]) * triton.cdiv(n, p["BN"])
    out, = call(dense_kernel, [operand, row_scale, packed, scale, *tail], [m],
                [jax.ShapeDtypeStruct((p["SEGMENTS"], m, n), jnp.float32) if parts else result],
                grid=(tiles, p["SEGMENTS"] if parts else 1), warps=p["warps"], stages=p["STAGES"],
                constants=dict(N=n, K=k, GROUP=GROUP, **{c: v for c, v in p.items() if c != "warps"}, **flags))
    if not parts:
        return out
    return call(sum_kernel, [out, row_scale, *tail], [m], [result], grid=(triton.cdiv(n, 512), m), warps=4,
                constants=dict(N=n, BN=512, SEGMENTS=p["SEGMENTS"], **flags))[0]
