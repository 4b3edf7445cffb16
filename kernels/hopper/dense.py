"""Dense NVFP4 matmul on Hopper: y[M, N] = x[M, K] @ dequantized(W)[N, K].T, from one token to prefill.

The operand is bf16 whatever the activations were (q * s for W4A4, x itself for W4A16), its K in `decode.permute_k` order; the
weights are read in the checkpoint's layout and decoded in registers.

A row of the result has the same bits for every M, position and neighbours. A sum over K is made of `slices(N, K)` chains of
m16n8k16 / k16 steps in float32, one a contiguous slice of K, added from left to right; all kernels make that sum:

- `dense_narrow` (up to 32 tokens, or 64 in tiles that make one wave; weights of few rows): mma.sync. A CTA owns 16 to 128 rows
  and all of K, one slice a warp, so that all SMs and all warps have work; the partial sums meet in shared memory.
- `dense_split` (where the tokens no longer fit beside the weights): wgmma, one slice a CTA of a cluster.
- `dense_wide`: wgmma, persistent. Warpgroups of 64 rows share the tokens; the slices follow one another in time.

(mma.sync and wgmma round alike: checked on the GPU by the tests.)
"""
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import dense_together
from nvfp4jax.kernels.hopper.decode import as_words
from nvfp4jax.kernels.hopper.dense_narrow import Narrow, memory_plan
from nvfp4jax.kernels.hopper.dense_product import STEP, Product
from nvfp4jax.kernels.hopper.dense_split import Split
from nvfp4jax.kernels.hopper.dense_wide import Wide
from nvfp4jax.kernels.hopper.machine import SMS

# Measured time of a tile of `Wide` by warpgroups and tokens, in some unit: tiles of sliced sums run in waves over the SMs.
_TILE_TIMES = {(1, 32): 46, (1, 64): 60, (2, 64): 92, (2, 128): 130, (2, 176): 168}


# --- rules: from the shape to the schedule --------------------------------------------------------------------------

def slices(n: int, k: int) -> int:
    """Into how many slices a sum over K is split. From the weight's shape alone, or rows would not keep their bits.

    Weights of few rows need it: a warp decodes 16 rows, and the 132 SMs want about 8 busy warps each.
    """
    wanted = 8 if n <= 2048 else 4 if n <= 10240 else 2 if n <= 16384 else 1
    steps = -(-k // STEP)
    while wanted > steps:
        wanted //= 2
    return wanted


def _row_tiles(widths, rows):
    return sum(-(-n // rows) for n in widths)


def _narrow_tiles(widths, count):
    """16-row tiles of a CTA of `Narrow`: one wave of CTAs where they fit, whole warpgroups."""
    tiles = next((t for t in range(1, 8) if _row_tiles(widths, 16 * t) <= SMS), 8)
    return tiles if count % 4 == 0 else tiles + tiles % 2


def _narrow_tilings(widths, m, count):
    """(tiles, tokens) of `Narrow`, the best first. From 33 tokens on those of one wave: the fewest rows a CTA, then the fewest tokens."""
    if m <= 32:
        yield _narrow_tiles(widths, count), _tokens(m, 32)
        return
    for tiles in range(1, 4) if m <= 128 else (_narrow_tiles(widths, count),):
        for most in (32, 48, 64) if m <= 128 and tiles <= 2 else (32,):  # more tokens, and more than 32 rows: Wide is ahead
            tokens = _tokens(m, most)
            if tiles * count % 4 == 0 and _row_tiles(widths, 16 * tiles) * -(-m // tokens) <= SMS:
                yield tiles, tokens


def _waves(widths, m, wgs, tokens, paired):
    """Of tiles of `Wide`."""
    width = 2 if paired else 1
    return -(-_row_tiles(widths, 64 * wgs * width) * -(-m // tokens) // (SMS // width))


def _whole_sums(widths, m):
    """The schedule of `Wide` where the sums have one slice: 256 rows a CTA in pairs, or 128 (1 / 1.8 of the time a tile) where less
    of the last wave of tiles is idle."""
    tokens = _tokens(m, 128)
    paired = m > 8 and max(widths) > 256
    if _waves(widths, m, 2, tokens, False) < 1.8 * _waves(widths, m, 4, tokens, paired):
        return dict(slices=1, wgs=2, tokens=tokens, paired=False)
    return dict(slices=1, wgs=4, tokens=tokens, paired=paired)


def _tokens(m, most):
    """The token tile: a multiple of 8, the rows of M spread evenly over tiles of at most `most`."""
    return -(-(-(-m // (-(-m // most)))) // 8) * 8


def plan_of(n: int | tuple[int, ...], k: int, m: int, count: int | None = None) -> tuple[type, dict]:
    """The kernel for a shape, and its schedule. n: of one weight, or of several in one launch. count: the slices, where not n's own."""
    widths = (n,) if isinstance(n, int) else n
    n = sum(widths)
    count = slices(n, k) if count is None else count
    if count == 1:
        return Wide, _whole_sums(widths, m)
    for tiles, tokens in _narrow_tilings(widths, m, count):
        memory, _ = memory_plan(k, tokens, count, tiles)
        # Code that is laid out for all of K, once for each weight, may become too long to compile.
        long = len(widths) > 1 and memory != "steps" and len(widths) * -(-k // (STEP * count)) * tokens > 512
        if memory and not long:
            return Narrow, dict(slices=count, tiles=tiles, tokens=tokens)
    tokens = _tokens(m, 32)
    if m <= 32 or m <= 64 and count == 8:
        return Split, dict(slices=count, wgs=1 if n * count <= 16384 else 2, tokens=tokens)
    wgs, most = min(_TILE_TIMES, key=lambda tile: _waves(widths, m, *tile, False) * _TILE_TIMES[tile])
    return Wide, dict(slices=count, wgs=wgs, tokens=_tokens(m, most), paired=False)


# --- the operation --------------------------------------------------------------------------------------------------

def matmul(operand, row_scale, packed, scale, global_scale, *, bias=None, out_dtype=jnp.bfloat16, layer=None, residual=None):
    """operand @ dequantized(packed, scale, global_scale).T * row_scale + bias, accumulated in float32.

    Args:
        operand: bf16 [M, K], K in `decode.permute_k` order: the activations, or their decoded codes q * s.
        row_scale: f32 [] or [M, 1], multiplies the rows of the result: the activations' global scale, or ones.
        packed, scale: uint8 [N, K/2] and float8_e4m3fn [N, K/16], as in a checkpoint. K must be a multiple of 64.
        global_scale: f32 [], multiplies.
        bias: f32 or bf16 [N], added in float32.
        out_dtype: bfloat16 or float32.
        layer: i32 []: the weights, their scales and, if it has one too, the bias have one more leading axis, of which this index
            is read in place.
        residual: out_dtype [M, N], added to the rounded result, the sum rounded again.

    Returns:
        out_dtype [M, N]. The bits of a row depend on nothing but the row and the weights.

    Raises:
        ValueError: shapes or dtypes do not fit together. NotImplementedError: no schedule for them.
    """
    return _matmul(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer, residual=residual)


def _check(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer):
    lead, (n, half) = packed.shape[:-2], packed.shape[-2:]
    k = 2 * half
    if len(lead) != (layer is not None) or operand.ndim != 2 or operand.shape[1] != k:
        raise ValueError(f"dense.matmul: operand {operand.shape} and packed {packed.shape} want [M, K] and "
                         f"[{'layers, ' * (layer is not None)}N, K/2]; flatten leading axes, and give `layer` for stacked weights")
    m = operand.shape[0]
    if k % 64:
        raise NotImplementedError(f"dense.matmul: K must be a multiple of 64, got K={k} of packed {packed.shape}")
    if m == 0 or n == 0:
        raise NotImplementedError(f"dense.matmul: nothing to do for M={m}, N={n}")
    if operand.dtype != jnp.bfloat16 or packed.dtype != jnp.uint8 or scale.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"dense.matmul: want a bfloat16 operand, uint8 codes and float8_e4m3fn scales, got "
                         f"{operand.dtype}, {packed.dtype}, {scale.dtype}")
    if row_scale.shape not in ((), (m, 1)) or global_scale.shape != lead or (
            bias is not None and bias.shape not in ((n,), (*lead, n))):
        raise ValueError(f"dense.matmul: row_scale {row_scale.shape} wants [] or {(m, 1)}, global_scale "
                         f"{global_scale.shape} wants {lead}, bias {None if bias is None else bias.shape} {(n,)} or {(*lead, n)}")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32) or (
            bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float32)):
        raise NotImplementedError(f"dense.matmul: out_dtype {out_dtype} and bias must be bfloat16 or float32")


def matmuls(operand, row_scale, weights, *, out_dtype=jnp.bfloat16, layer=None):
    """`matmul` with several weights [N_j, K] in one launch; each in its own where the sums of all their rows would have one slice, and the
    weights alone have different slices, or too few tokens meet them for `Wide`.

    weights: (packed, scale, global_scale, bias or None) each. -> out_dtype [M, N_j] each. All sums have the slices of one weight of all
    the rows (or each its own, where that were one slice), so a result's bits depend on the widths of the others too, and on nothing
    else of them.
    """
    widths, (m, k) = tuple(packed.shape[-2] for packed, *_ in weights), operand.shape
    count, common = slices(sum(widths), k), dict(out_dtype=out_dtype, layer=layer)
    for weight in weights:
        _check(operand, row_scale, *weight, **common)
    whole = count == 1  # many rows: each weight keeps the slices that it has alone
    counts = {slices(n, k) for n in widths} if whole else {count}
    make, settings = plan_of(widths, k, m, max(counts))
    if whole and (make is not Wide or len(counts) > 1):
        return tuple(matmul(operand, row_scale, *weight[:3], bias=weight[3], **common) for weight in weights)
    kernels, arrays = zip(*(_prepared(operand, row_scale, *weight, **common, plan=(make, settings)) for weight in weights))
    return dense_together.build(kernels)(arrays)


def _matmul(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer, plan=None, residual=None):
    """`matmul`; plan: a kernel and its schedule in place of `plan_of`'s."""
    _check(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer)
    out_shape = operand.shape[0], packed.shape[-2]
    if residual is not None and (residual.shape != out_shape or residual.dtype != jnp.dtype(out_dtype)):
        raise ValueError(f"dense.matmul: residual {residual.dtype}{residual.shape} wants {jnp.dtype(out_dtype)}{out_shape}")
    plan = plan or plan_of(packed.shape[-2], packed.shape[-1] * 2, operand.shape[0])
    kernel, arrays = _prepared(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer, plan, residual)
    return kernel.build()(*arrays)


def _prepared(operand, row_scale, packed, scale, global_scale, bias, out_dtype, layer, plan, residual=None):
    """The kernel, and what it reads."""
    (m, k), n = operand.shape, packed.shape[-2]
    product = Product(n, k, m, per_row=row_scale.ndim == 2, bias_dtype=None if bias is None else jnp.dtype(bias.dtype), out_dtype=out_dtype,
                      stacked=layer is not None, bias_stacked=bias is not None and bias.ndim == 2,
                      residual=residual is not None)
    words, scales = as_words(packed, scale)
    if scales.shape[-1] % 4:  # TMA wants rows of whole 16 bytes: a copy of the scales, where K is no multiple of 256
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % 4)])
    row_scale, global_scale = (a.astype(jnp.float32).reshape(-1) for a in (row_scale, global_scale))
    make, settings = plan
    return make(product, **settings), (
        words, scales, operand, row_scale, global_scale, global_scale if bias is None else bias.reshape(-1), global_scale if residual is None else residual,
        jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1))
