"""Rows sorted by expert, each times its expert's NVFP4 weight, in Triton; with SwiGLU fused for gate and up.

A tile is up to BM rows of one expert. Each program finds its own by a running sum over the experts' sizes, so that any routing runs
without a table made beforehand; programs past the last tile stop at once. Rows past the last group are left alone. The sum over K is
that of `dense`, in one segment.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from nvfp4jax.kernels.triton import call as calls
from nvfp4jax.kernels.triton.call import call
from nvfp4jax.kernels.triton.decode import BK, least_tokens, load_weights, multiply, multiply_tail, shared_memory, stages


@triton.jit
def _find(sizes_ptr, tile, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """Tile -> (its expert, E or more where there is none; its first row; the end of its group)."""
    e = tl.arange(0, EP)
    sizes = tl.load(sizes_ptr + e, mask=e < E, other=0)
    tiles = (sizes + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    before = ends <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    start = tl.sum(tl.where(before, sizes, 0), 0)
    row = start + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BM
    return expert, row, start + tl.sum(tl.where(e == expert, sizes, 0), 0)


@triton.jit
def grouped_kernel(x_ptr, scale_ptr, w_ptr, s_ptr, g_ptr, sizes_ptr, layer_ptr, M, o_ptr, E: tl.constexpr, EP: tl.constexpr,
                   N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
                   PER_ROW: tl.constexpr, STACKED: tl.constexpr, GATED: tl.constexpr, APART: tl.constexpr):
    """GATED: N rows of gate, then N of up, an expert. APART: one after the other, for fewer registers."""
    expert, row, end = _find(sizes_ptr, tl.program_id(0), E, EP, BM)
    end = tl.minimum(end, M)  # sizes that promise more rows than there are: nothing is written past the last
    if expert < E:
        m = row + tl.arange(0, BM)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        tokens, inside = (m < end)[None, :], (n < N)[:, None]
        matrix = expert.to(tl.int64)
        if STACKED:
            matrix += tl.load(layer_ptr).to(tl.int64) * E
        at = (matrix * (2 * N if GATED else N) + tl.where(n < N, n, 0))[:, None] * (K // 16) + tl.arange(0, 16)[None, :]
        w_ptrs, s_ptrs = w_ptr.to(tl.pointer_type(tl.int64)) + at, s_ptr + at
        x_ptrs = x_ptr + m.to(tl.int64)[None, :] * K + tl.arange(0, 32)[:, None]
        UP: tl.constexpr = N * (K // 16)  # from gate to up
        acc = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        for chunk in tl.range(0, K // 256, num_stages=STAGES):
            words, factor = load_weights(w_ptrs + chunk * 16, s_ptrs + chunk * 16, inside, N % BN != 0)
            acc = multiply(acc, words, factor, x_ptrs + chunk * 256, tokens, 16)
            if GATED and not APART:
                words, factor = load_weights(w_ptrs + UP + chunk * 16, s_ptrs + UP + chunk * 16, inside, N % BN != 0)
                up = multiply(up, words, factor, x_ptrs + chunk * 256, tokens, 16)
        if GATED and APART:
            for chunk in tl.range(0, K // 256, num_stages=STAGES):
                words, factor = load_weights(w_ptrs + UP + chunk * 16, s_ptrs + UP + chunk * 16, inside, N % BN != 0)
                up = multiply(up, words, factor, x_ptrs + chunk * 256, tokens, 16)
        if K % 256:
            acc = multiply_tail(acc, w_ptrs, s_ptrs, x_ptrs, inside, tokens, K)
            if GATED:
                up = multiply_tail(up, w_ptrs + UP, s_ptrs + UP, x_ptrs, inside, tokens, K)
        g = tl.load(g_ptr + matrix)
        row_scale = tl.load(scale_ptr + (m if PER_ROW else m * 0), mask=m < end, other=0.0)[None, :]
        y = acc * 128.0 * g * row_scale
        if GATED:
            up = up * 128.0 * g * row_scale
            y = y / (1.0 + tl.exp(-y)) * up
        tl.store(o_ptr + m.to(tl.int64)[None, :] * N + n[:, None], y.to(o_ptr.dtype.element_ty), mask=tokens & inside)


def plan(sm: int, m: int, experts: int, n: int, k: int, gated: bool) -> dict:
    """BM, BN, warps, STAGES from the compute capability and the shape: a tile as large as an expert's rows on average."""
    average = triton.next_power_of_2(max(1, -(-m // experts)))
    small = shared_memory(sm) < 160000
    if sm < 80:
        bm = min(8, average)
    else:
        # Gate and up of 64 tokens spill where three stages of them do not fit; of 32, in more than two stages.
        bm = min((32 if small else 64) if gated else 64 if small else 128, max(least_tokens(sm), 2 * average if average > 4 else average))
    bn = 128 if bm == 128 else 64
    step = (2 if gated else 1) * bn * BK * 9 // 16 + bm * BK * 2
    depth = 1 if sm < 80 else 2 if gated and small and bm == 32 else stages(sm, step, 4)
    return dict(BM=bm, BN=bn, warps=8 if bm == 128 else 4, STAGES=depth)


def _run(name, operand, row_scale, packed, scale, global_scale, group_sizes, out_dtype, layer, gated):
    m, (n, k) = operand.shape[0], (packed.shape[-2], 2 * packed.shape[-1])
    experts = group_sizes.shape[0]
    if operand.shape[1] != k or operand.dtype != jnp.float16:
        raise ValueError(f"{name}: an operand {operand.dtype}{operand.shape} for a weight of K={k}; `quantize.operand` makes it")
    if m == 0:
        return jnp.zeros((0, n), out_dtype)
    p = plan(calls.capability(), m, experts, n, k, gated)
    tiles = min(m, (m + min(experts, m) * (p["BM"] - 1)) // p["BM"])
    return call(
        grouped_kernel, [operand, row_scale.reshape(-1), packed, jax.lax.bitcast_convert_type(scale, jnp.uint8), global_scale.reshape(-1),
                         group_sizes.astype(jnp.int32), jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)],
        [m], [jax.ShapeDtypeStruct((m, n), out_dtype)], grid=(tiles, triton.cdiv(n, p["BN"])), warps=p["warps"], stages=p["STAGES"],
        constants=dict(E=experts, EP=triton.next_power_of_2(experts), N=n, K=k, BM=p["BM"], BN=p["BN"],
                       STAGES=p["STAGES"], PER_ROW=row_scale.ndim == 2, STACKED=layer is not None, GATED=gated, APART=gated and p["STAGES"] == 1))[0]


def gate_up(operand, row_scale, packed, scale, global_scale, group_sizes, *, out_dtype=jnp.bfloat16, layer=None):
    """silu(x gate^T) * (x up^T) in float32, rounded once; packed u8 [(L,) E, 2, N, K/2], gate first. As `matmul`."""
    return _run("grouped gate_up", operand, row_scale, packed, scale, global_scale, group_sizes, out_dtype, layer, True)


def matmul(operand, row_scale, packed, scale, global_scale, group_sizes, *, out_dtype=jnp.bfloat16, layer=None):
    """operand f16 [M, K] sorted by expert, row_scale f32 [] or [M, 1]; packed u8 [(L,) E, N, K/2], scale float8_e4m3fn
    [(L,) E, N, K/16], global_scale f32 [(L,) E], group_sizes i32 [E] -> out_dtype [M, N]; rows past the last group hold anything."""
    return _run("grouped matmul", operand, row_scale, packed, scale, global_scale, group_sizes, out_dtype, layer, False)
