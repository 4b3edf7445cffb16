"""The weighted sum of a token's rows after the grouped matmuls, in Triton: `nvfp4jax.routing.combine`, bit for bit."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from nvfp4jax.kernels.triton.call import call


@triton.jit
def combine_kernel(rows_ptr, slots_ptr, weights_ptr, o_ptr, H: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(slots_ptr + token * SLOTS + slot)
        weight = tl.load(weights_ptr + token * SLOTS + slot).to(tl.float32)
        value = tl.load(rows_ptr + tl.maximum(row, 0).to(tl.int64) * H + h, mask=h < H, other=0.0).to(tl.float32)
        total = tl.where(row >= 0, total + value * weight, total)
    tl.store(o_ptr + token.to(tl.int64) * H + h, total.to(o_ptr.dtype.element_ty), mask=h < H)


def combine(rows, row_of_slot, weights, *, out_dtype=jnp.bfloat16):
    """out[t] = sum over j, in order, of weights[t, j] * rows[row_of_slot[t, j]], in float32 with separate roundings.

    rows: [T * k, H]; row_of_slot: i32 [T, k], -1 for a slot of no expert, which adds nothing; weights: [T, k]. -> out_dtype [T, H].
    """
    (tokens, slots), hidden = weights.shape, rows.shape[1]
    if tokens == 0:
        return jnp.zeros((0, hidden), out_dtype)
    block = min(1024, triton.next_power_of_2(hidden))
    return call(combine_kernel, [rows, row_of_slot, weights], [], [jax.ShapeDtypeStruct((tokens, hidden), out_dtype)],
                grid=(tokens, triton.cdiv(hidden, block)), warps=4, constants=dict(H=hidden, SLOTS=slots, BLOCK=block))[0]
