"""Grouped (ragged) NVFP4 matmuls for experts on Hopper: gate+up with SiLU, and down.

Rows of `operand` are sorted by expert and nothing is padded. A block is up to a token tile of rows of one expert; the
kernel itself lists the blocks from `group_sizes` (`grouped_plan`). A persistent CTA an SM walks over (block, tile of weight
rows): a producer warpgroup (TMA) and consumer warpgroups of 64 weight rows each that share the tokens, decode in
registers and feed wgmma.

A row's sum over K is one chain of k16 steps in one f32 accumulator, whatever the tile: its bits depend on nothing but
its own inputs, so `config` may choose freely. Figures: benchmarks/README.md.
"""
import jax.numpy as jnp
from jax import lax

from nvfp4jax.kernels.hopper.decode import as_words
from nvfp4jax.kernels.hopper.grouped_config import STEP, Config, config
from nvfp4jax.kernels.hopper.grouped_kernel import Grouped

__all__ = ["Config", "config", "gate_up", "matmul"]


def _run(name, operand, row_scale, packed, scale, global_scale, group_sizes, *, layer, gated, out_dtype, use):
    halves = 2 if gated else 1
    if layer is None:
        packed, scale, global_scale = packed[None], scale[None], global_scale[None]
    if packed.ndim != (5 if gated else 4) or (gated and packed.shape[2] != 2):
        expected = "[E, 2, I, K/2]" if gated else "[E, N, K/2]"
        raise ValueError(f"{name}: packed must be u8 {expected}, with a leading axis of layers where `layer` is given; "
                         f"got {packed.shape}")
    layers, experts, n, k = packed.shape[0], packed.shape[1], packed.shape[-2], packed.shape[-1] * 2
    m = operand.shape[0]
    if k % 64:
        raise NotImplementedError(f"{name}: K must be a multiple of 64, got K={k} of packed {packed.shape}")
    if operand.shape != (m, k) or operand.dtype != jnp.bfloat16:
        raise ValueError(f"{name}: operand must be bf16 [M, {k}] for weights {packed.shape}, got {operand.dtype} "
                         f"{operand.shape}")
    if row_scale.shape not in ((), (m, 1)):
        raise ValueError(f"{name}: row_scale must be f32 [] or [{m}, 1], got {row_scale.shape}")
    if group_sizes.shape != (experts,) or global_scale.shape != (layers, experts):
        raise ValueError(f"{name}: {experts} experts want group_sizes [{experts}] and global_scale [{experts}], got "
                         f"{group_sizes.shape} and {global_scale.shape[1:]}")
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{name}: results are bf16 or f32, not {out_dtype}")
    if m == 0:
        return jnp.zeros((0, n), out_dtype)
    w, s = as_words(packed, scale)
    w = w.reshape(layers, experts * halves, n, k // 8)
    flat = k % STEP != 0
    if flat and s.size >= 2**31:
        raise NotImplementedError(f"{name}: weights {packed.shape} have {s.size} words of scales; 2**31 is the most "
                                  f"where K ({k}) is no multiple of {STEP}")
    s = s.reshape(-1) if flat else s.reshape(layers, experts * halves, n, k // 64)
    layer = jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    row_scaled = row_scale.ndim == 2
    row_scale, global_scale = row_scale.astype(jnp.float32).reshape(-1), global_scale.astype(jnp.float32)
    if row_scaled:  # they lie among integers in shared memory
        row_scale = lax.bitcast_convert_type(row_scale, jnp.int32)
    use = use or config(m, experts, n, k, gated=gated)
    kernel = Grouped(layers, experts, n, k, m, use, gated=gated, row_scaled=row_scaled, out_dtype=out_dtype).build()
    return kernel(layer, w, s, operand, row_scale, group_sizes.astype(jnp.int32), global_scale)


def gate_up(operand, row_scale, packed, scale, global_scale, group_sizes, *, layer=None, use=None):
    """silu(x Wg^T) * (x Wu^T) for rows sorted by expert -> bf16 [M, I].

    operand: bf16 [M, K], K permuted by `decode.permute_k`; row_scale: f32 [] or [M, 1], multiplies. packed u8 [E, 2,
    I, K/2], gate first, scale e4m3 [E, 2, I, K/16], global_scale f32 [E]: the checkpoint's layout. group_sizes i32
    [E]: rows of each expert, in order; rows past their sum come out undefined. K a multiple of 64; any M, E, I. layer:
    i32 scalar; the weights then carry a leading axis of layers, read in place. use: a `Config` in place of `config`'s;
    the bits are the same.
    """
    return _run("gate_up", operand, row_scale, packed, scale, global_scale, group_sizes, layer=layer, gated=True,
                out_dtype=jnp.bfloat16, use=use)


def matmul(operand, row_scale, packed, scale, global_scale, group_sizes, *, out_dtype=jnp.bfloat16, layer=None,
           use=None):
    """x W^T for rows sorted by expert -> [M, N] in out_dtype (bf16 or f32). packed u8 [E, N, K/2]; else as
    `gate_up`."""
    return _run("matmul", operand, row_scale, packed, scale, global_scale, group_sizes, layer=layer, gated=False,
                out_dtype=out_dtype, use=use)
