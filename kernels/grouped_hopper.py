"""Grouped (ragged) NVFP4 matmuls for experts on Hopper: gate+up with SiLU, and down.

Rows of `operand` are sorted by expert and nothing is padded. A block is up to a token tile of rows of one expert; `plan` lists
the blocks from `group_sizes` in traced code. A persistent CTA an SM walks over (block, tile of weight rows): a producer
warpgroup (TMA) and consumer warpgroups of 64 weight rows each that share the tokens, decode in registers and feed wgmma.

A row's sum over K is one chain of k16 steps in one f32 accumulator, whatever the tile: its bits depend on nothing but its own
inputs, so `config` may choose freely. Figures: benchmarks/README.md.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels import mosaic

SMS = 132
STEP = 256  # K of a pipeline step: a 128-byte row of packed codes
CHUNK = 64  # K of a token tile's 128-byte row
SCALE_BLOCK = 2048  # K of a 128-byte row of scales


@dataclasses.dataclass(frozen=True)
class Config:
    """tiles: the token tiles that a block may load, multiples of 8; computes: those it may compute with (each its own code).

    warpgroups of 64 weight rows a CTA, per_sm CTAs an SM. overlap: decode the next chunks while wgmma runs. x_chunks:
    64-chunks of K in a stage of tokens.
    """

    tiles: tuple[int, ...]
    computes: tuple[int, ...]
    warpgroups: int = 4
    per_sm: int = 1
    overlap: bool = False
    x_chunks: int = 4
    sms: int = SMS


def config(m, experts, n, k, *, gated):
    """The kernel's shape for M rows of E experts, N output channels: a rule on the rows an expert gets on average.

    Every choice gives the same bits.
    """
    rows = 128 if gated else 256  # output channels of a tile of 4 warpgroups
    active = min(m, experts)
    mean = m / experts
    if active * -(-n // rows) < 2 * SMS and mean <= 8:  # too few tiles to fill the SMs: 64 rows a CTA, two CTAs an SM
        return Config((8,), (8,), warpgroups=1, per_sm=2, overlap=True)
    if mean <= 1:
        return Config((8,), (8,))
    if mean <= 6:
        return Config((8, 16), (8, 16))
    if mean <= 20:
        return Config((8, 16, 24, 32), (8, 16, 24, 32))
    if gated:
        return Config((48, 64, 80, 96), (48, 64, 80, 96))
    return Config((48, 56, 64, 72, 80), (80,), overlap=True)


def plan(group_sizes, m, tiles):
    """i32 [E] -> blocks i32 [B, 4] (expert, first row, rows, index of the tile that holds them), how many are used i32 [1].

    B is the most blocks that M rows of E experts can make. An expert's rows are split evenly, in multiples of 8.
    """
    largest, experts = jnp.int32(tiles[-1]), group_sizes.shape[0]
    most = min(experts, m) + m // tiles[-1]
    sizes = group_sizes.astype(jnp.int32)
    pieces = lax.div(sizes + (largest - 1), largest)
    # Sums over a triangle: they fuse, where XLA's cumsum is a kernel of its own.
    below = jnp.arange(experts)[:, None] >= jnp.arange(experts)[None, :]
    ends, row_ends = (jnp.sum(jnp.where(below, v[None, :], 0), 1, dtype=jnp.int32) for v in (pieces, sizes))
    block = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.sum(ends[None, :] <= block[:, None], 1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    size, parts = sizes[expert], jnp.maximum(pieces[expert], 1)
    share = lax.div(lax.div(size + parts - 1, parts) + 7, jnp.int32(8)) * 8
    before = (block - (ends - pieces)[expert]) * share  # rows of the expert in earlier blocks
    rows = jnp.clip(size - before, 0, share)
    tile = jnp.sum(rows[:, None] > jnp.array(tiles, jnp.int32)[None, :], 1, dtype=jnp.int32)
    return jnp.stack([expert, (row_ends - sizes)[expert] + before, rows, tile], 1), ends[-1:]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Shared memory of a kernel: weight rows a stage, bytes of a row of scales, stages of weights, of tokens and of scales."""

    rows: int
    scale_row: int
    w_stages: int
    x_stages: int
    s_stages: int


def _layout(c, k, halves):
    """The rings that fit. Raises NotImplementedError where K is too long for rows of scales that TMA cannot cut."""
    rows, largest = c.warpgroups * 64, c.tiles[-1]
    scale_row = k // 16 if k % STEP else min(k // 16, SCALE_BLOCK // 16)
    x_bytes, w_bytes, free = c.x_chunks * CHUNK * 2 * largest, rows * STEP // 2, mosaic.SHARED_MEMORY // c.per_sm - 3072
    for s_stages in ((2, 1) if c.per_sm == 1 else (1,)):
        left = free - s_stages * _scale_words(rows // halves, scale_row, k) * 4 * halves
        w_stages = max(2, min(8, left // (w_bytes + x_bytes * (STEP // CHUNK // c.x_chunks))))
        x_stages = min(8, (left - w_stages * w_bytes) // x_bytes)
        if x_stages >= 2:
            if c.x_chunks * CHUNK == STEP:
                x_stages = min(x_stages, w_stages)
            return _Layout(rows, scale_row, w_stages, x_stages, s_stages)
    raise NotImplementedError(f"K = {k} is too long: {rows} rows of scales do not fit the shared memory; a multiple of "
                              f"{STEP} is cut into pieces, other K go up to about 20000")


def _scale_words(rows, scale_row, k):
    """i32 words of the scales of `rows` rows in shared memory. K that TMA cannot stride over: whole rows, in copies of 256."""
    return rows * scale_row // 4 if k % STEP == 0 else -(-(rows * scale_row // 4 + 4) // 256) * 256


def _grouped(layers, experts, n, k, m, blocks, c, *, gated, row_scaled, out_dtype, interpret=False):
    """layer i32 [1], w i32 [L, E * halves, N, K/8], s i32 [L, E * halves, N, K/64] (flat where K % 256), x bf16 [M, K],
    row_scale f32 [M, 1], blocks i32 [B, 4] and count i32 [1] of `plan`, factor f32 [B] (a block's global scale times
    DECODE_FACTOR) -> [M, N]; halves is 2 where gate and up lie behind each other (gated), else 1."""
    halves = 2 if gated else 1
    r = _layout(c, k, halves)
    rows, wgs = r.rows // halves, c.warpgroups
    tiles, steps = -(-n // rows), -(-k // STEP)
    scale_blocks, block_steps = (1, steps) if k % STEP else (-(-k // SCALE_BLOCK), min(steps, SCALE_BLOCK // STEP))
    scale_words = _scale_words(rows, r.scale_row, k)
    flat, groups = bool(k % STEP), STEP // CHUNK // c.x_chunks
    lag = int(c.overlap)  # a stage of tokens is released a stage late: wgmma may still read it
    consumer_registers, producer_registers = mosaic.register_budget(wgs, per_sm=c.per_sm)
    grid = c.sms * c.per_sm

    def kernel(layer, w, s, x, row_scale, meta, count, factor, o, w_sm, s_sm, x_sm, w_full, w_empty, x_full, x_empty,
               s_full, s_empty, a_sm=None):
        x_fill, x_use = (x_sm, x_sm) if interpret else x_sm
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")

        def div_rem(a, b):
            return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))

        def block_of(linear):
            return jnp.minimum(div_rem(linear, tiles)[0], jnp.int32(blocks - 1))

        def block(linear, *columns):
            values = [meta[block_of(linear), i] for i in columns]
            return values[0] if len(values) == 1 else tuple(values)

        def over_steps(before, step, after):
            """before and after(block of scales), step(block, step in it, step)."""
            if scale_blocks == 1:
                before(0)
                pl.loop(0, steps)(lambda i: step(0, i, i))
                after(0)
                return

            @pl.loop(0, scale_blocks)
            def _(b):
                first = b * block_steps
                before(b)
                pl.loop(0, jnp.minimum(block_steps, steps - first))(lambda i: step(b, i, first + i))
                after(b)

        def produce():
            at_layer = layer[0]

            def tile_of(info, carry):
                (linear,), (tile, (e, start, load)) = info.index, carry
                after = block(linear + grid, 0, 1, 3)
                first = div_rem(linear, tiles)[1] * rows
                channels = pl.ds(first, rows)

                def scales(b):
                    use = tile * scale_blocks + b
                    slot = div_rem(use, r.s_stages)[1]
                    pl.when(use >= r.s_stages)(lambda: plgpu.barrier_wait(s_empty.at[slot]))
                    for h in range(halves):
                        expert = e * halves + h
                        if flat:
                            row = (at_layer * (experts * halves) + expert) * n + first
                            for q in range(scale_words // 256):
                                source = s.at[pl.ds(row * (k // 64) + q * 256, 256)]
                                plgpu.copy_gmem_to_smem(source, s_sm.at[slot, h, pl.ds(q * 256, 256)], s_full.at[slot])
                        else:
                            words = pl.ds(b * (SCALE_BLOCK // 64), r.scale_row // 4)
                            plgpu.copy_gmem_to_smem(s.at[at_layer, expert, channels, words], s_sm.at[slot, h], s_full.at[slot])

                def step(_b, _i, at):
                    it = tile * steps + at
                    st = div_rem(it, r.w_stages)[1]
                    pl.when(it >= r.w_stages)(lambda: plgpu.barrier_wait(w_empty.at[st]))
                    for h in range(halves):
                        source = w.at[at_layer, e * halves + h, channels, pl.ds(at * (STEP // 8), STEP // 8)]
                        plgpu.copy_gmem_to_smem(source, w_sm.at[st, pl.ds(h * rows, rows)], w_full.at[st])
                    for g in range(groups):
                        xi = it * groups + g
                        xst = div_rem(xi, r.x_stages)[1]
                        pl.when(xi >= r.x_stages - lag)(lambda: plgpu.barrier_wait(x_empty.at[xst]))

                        def tokens(t):
                            for q in range(c.x_chunks):
                                ks = pl.ds(at * STEP + (g * c.x_chunks + q) * CHUNK, CHUNK)
                                plgpu.copy_gmem_to_smem(x.at[pl.ds(start, t), ks], x_fill.at[xst, q, pl.ds(0, t)], x_full.at[xst])

                        for index, t in enumerate(c.tiles):
                            pl.when(load == index)(lambda t=t: tokens(t))

                over_steps(scales, step, lambda b: None)
                return tile + 1, after

            tile, _ = plgpu.nd_loop(
                (count[0] * tiles,), collective_axes="sm", init_carry=(jnp.int32(0), block(sm, 0, 1, 3)))(tile_of)
            if interpret:  # it wants every completed phase of a barrier observed
                for barrier, uses, stages in ((w_empty, tile * steps, r.w_stages), (s_empty, tile * scale_blocks, r.s_stages),
                                              (x_empty, tile * (steps * groups), r.x_stages - lag)):
                    size = stages + (lag if barrier is x_empty else 0)

                    @pl.loop(jnp.maximum(uses, stages), uses + stages)
                    def _(use):
                        plgpu.barrier_wait(barrier.at[div_rem(use, size)[1]])

        def consume():
            def load_of(linear):
                return block(linear, 3) if len(c.computes) > 1 else jnp.int32(0)

            def tile_of(info, carry):
                (linear,), (tile, load) = info.index, carry
                after = load_of(linear + grid)  # a tile ahead: it decides where to go; the rest is not waited for
                start, rows_used, scale = block(linear, 1), block(linear, 2), factor[block_of(linear)]

                def run(t):
                    parts = max(groups, (2 if t <= 32 else 4) if c.overlap else (1 if t <= 16 else 2 if t <= 64 else 4))
                    chunks = 4 // parts  # that a wgmma_wait covers

                    def slot(b):
                        return div_rem(tile * scale_blocks + b, r.s_stages)[1]

                    def step(acc, s_at, i, at):
                        it = tile * steps + at
                        st = div_rem(it, r.w_stages)[1]
                        plgpu.barrier_wait(w_full.at[st])
                        for p in range(parts):
                            g, first = p * groups // parts, p * chunks
                            xi = it * groups + g
                            xst, opens = div_rem(xi, r.x_stages)[1], p * groups % parts == 0
                            if interpret:
                                a = _decode_interpreted(w_sm.at[st], s_at, wg, i, first, chunks, rows, r.scale_row)
                                a_sm[wg, pl.ds(0, chunks)] = a
                                plgpu.commit_smem()
                                a = [a_sm.at[wg, q] for q in range(chunks)]
                            else:
                                a = mosaic.decode_fragments(
                                    w_sm.at[st], s_at, wg, i, chunks=chunks, first=first, scale_row=r.scale_row,
                                    other=(rows, scale_words * 4) if gated else None)
                            if opens:
                                plgpu.barrier_wait(x_full.at[xst])
                            for q in range(chunks):
                                plgpu.wgmma(acc, a[q], x_use.at[xst, (first + q) % c.x_chunks, pl.ds(0, t)].T)
                            if p == parts - 1:  # decoded: the codes are in registers
                                plgpu.barrier_arrive(w_empty.at[st])
                            plgpu.wgmma_wait(chunks if c.overlap else 0)
                            if c.overlap and opens:  # the stage before; unconditional, or ptxas serializes the wgmmas
                                plgpu.barrier_arrive(x_empty.at[div_rem(xi + (r.x_stages - 1), r.x_stages)[1]])
                            elif not c.overlap and (p + 1) * groups % parts == 0:
                                plgpu.barrier_arrive(x_empty.at[xst])

                    def body(acc):
                        over_steps(lambda b: plgpu.barrier_wait(s_full.at[slot(b)]),
                                   lambda b, i, at: step(acc, s_sm.at[slot(b)], i, at),
                                   lambda b: plgpu.barrier_arrive(s_empty.at[slot(b)]))
                        return acc[...]

                    acc = pl.run_scoped(body, plgpu.ACC((64, t), jnp.float32))
                    first = div_rem(linear, tiles)[1] * rows + wg * (64 // halves)
                    if interpret:
                        _store_interpreted(acc, scale, row_scale if row_scaled else None, o, start, rows_used, first, gated=gated)
                    else:
                        mosaic.store_tokens(acc, scale, row_scale if row_scaled else None, o, start, rows_used, first,
                                            tokens=t, width=n, gated=gated, masked=n % rows != 0)

                if len(c.computes) == 1:
                    run(c.computes[0])
                else:
                    below = -1
                    for t in c.computes:
                        last = max(i for i, size in enumerate(c.tiles) if size <= t)
                        pl.when((load > below) & (load <= last))(lambda t=t: run(t))
                        below = last
                return tile + 1, after

            plgpu.nd_loop((count[0] * tiles,), collective_axes="sm", init_carry=(jnp.int32(0), load_of(sm)))(tile_of)

        @pl.when(wg == wgs)
        def _():
            if not interpret:
                plgpu.set_max_registers(producer_registers, action="decrease")
            produce()

        @pl.when(wg < wgs)
        def _():
            if not interpret:
                plgpu.set_max_registers(consumer_registers, action="increase")
            consume()

    scratch = dict(
        w_sm=plgpu.SMEM((r.w_stages, r.rows, STEP // 8), jnp.int32, transforms=mosaic.ROWS_128),
        s_sm=plgpu.SMEM((r.s_stages, halves, scale_words) if flat else (r.s_stages, halves, rows, r.scale_row // 4), jnp.int32,
                        transforms=mosaic.ROWS_128 if r.scale_row == 128 and not flat else ()),
        x_sm=mosaic.token_ring(r.x_stages, c.x_chunks, c.tiles[-1], CHUNK),
        w_full=plgpu.Barrier(num_arrivals=halves, num_barriers=r.w_stages),
        w_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.w_stages),
        x_full=plgpu.Barrier(num_arrivals=c.x_chunks, num_barriers=r.x_stages),
        x_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.x_stages),
        s_full=plgpu.Barrier(num_arrivals=halves * (scale_words // 256 if flat else 1), num_barriers=r.s_stages),
        s_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.s_stages))
    width = n
    if interpret:  # it has no wgmma from registers and no rows past an edge
        width = tiles * rows
        swizzled = mosaic.swizzled(2)
        scratch["x_sm"] = plgpu.SMEM((r.x_stages, c.x_chunks, c.tiles[-1], CHUNK), jnp.bfloat16, transforms=swizzled)
        scratch["a_sm"] = plgpu.SMEM((wgs, 4, 64, CHUNK), jnp.bfloat16, transforms=swizzled)
    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((m, width), out_dtype), scratch_types=scratch, grid=(grid,),
        grid_names=("sm",), num_threads=wgs + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))


def _decode_interpreted(w, s, wg, unit, first, chunks, rows, scale_row):
    """`mosaic.decode_fragments` for the interpreter -> bf16 (chunks, 64, 64); gated: 32 rows of gate, then 32 of up."""
    halves = s.shape[0]
    own = pl.ds(wg * (64 // halves), 64 // halves)
    words, scales = [], []
    for h in range(halves):
        words.append(w[pl.ds(h * rows + wg * (64 // halves), 64 // halves), pl.ds(first * 8, chunks * 8)])
        if len(s.shape) == 2:
            table = s[h, pl.ds(0, rows * scale_row // 4)].reshape(rows, scale_row // 4)
            table = jnp.pad(table, ((0, 0), (0, 4)))
            scales.append(lax.dynamic_slice(table, (wg * (64 // halves), unit * 4 + first), (64 // halves, chunks)))
        else:
            scales.append(s[h, own, pl.ds(unit * 4 + first, chunks)])
    decoded = mosaic.decode_words(jnp.concatenate(words), jnp.concatenate(scales))
    return decoded.reshape(64, chunks, CHUNK).transpose(1, 0, 2)


def _store_interpreted(acc, factor, row_scale, out, row, count, channel, *, gated):
    """`mosaic.store_tokens` for the interpreter."""
    values = acc.T
    width = values.shape[1] // 2 if gated else values.shape[1]

    @pl.loop(0, count)
    def _(token):
        scale = factor if row_scale is None else row_scale[row + token, 0] * factor
        value = lax.dynamic_slice(values, (token, 0), (1, values.shape[1]))[0] * scale
        if gated:
            value = jax.nn.silu(value[:width]) * value[width:]
        out[row + token, pl.ds(channel, width)] = value.astype(out.dtype)


def _pad(x, *sizes):
    return jnp.pad(x, [(0, size - have) for size, have in zip(sizes, x.shape)])


def _run(name, operand, row_scale, packed, scale, global_scale, group_sizes, *, layer, gated, out_dtype, use, interpret):
    halves = 2 if gated else 1
    if layer is None:
        packed, scale, global_scale = packed[None], scale[None], global_scale[None]
    if packed.ndim != (5 if gated else 4) or (gated and packed.shape[2] != 2):
        raise ValueError(f"{name}: packed must be u8 {'[E, 2, I, K/2]' if gated else '[E, N, K/2]'}, with a leading axis of "
                         f"layers where `layer` is given; got {packed.shape}")
    layers, experts, n, k = packed.shape[0], packed.shape[1], packed.shape[-2], packed.shape[-1] * 2
    m = operand.shape[0]
    if operand.shape != (m, k) or operand.dtype != jnp.bfloat16:
        raise ValueError(f"{name}: operand must be bf16 [M, {k}] for weights {packed.shape}, got {operand.dtype} {operand.shape}")
    if row_scale.shape not in ((), (m, 1)):
        raise ValueError(f"{name}: row_scale must be f32 [] or [{m}, 1], got {row_scale.shape}")
    if group_sizes.shape != (experts,) or global_scale.shape != (layers, experts):
        raise ValueError(f"{name}: {experts} experts want group_sizes [{experts}] and global_scale [{experts}], got "
                         f"{group_sizes.shape} and {global_scale.shape[1:]}")
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{name}: results are bf16 or f32, not {out_dtype}")
    if m == 0:
        return jnp.zeros((0, n), out_dtype)
    w, s = mosaic.as_words(packed, scale)
    w = w.reshape(layers, experts * halves, n, k // 8)
    flat = k % STEP != 0
    if flat and s.size >= 2**31:
        raise NotImplementedError(f"{name}: scales of {s.size} words; where K ({k}) is no multiple of {STEP}, 2**31 is the most")
    s = s.reshape(-1) if flat else s.reshape(layers, experts * halves, n, k // 64)
    layer = jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    factor = jnp.take(global_scale, layer[0], axis=0).astype(jnp.float32) * jnp.float32(mosaic.DECODE_FACTOR)
    row_scaled = row_scale.ndim == 2
    if not row_scaled:
        factor = row_scale.astype(jnp.float32) * factor
        row_scale = jnp.zeros((1, 1), jnp.float32)
    use = use or config(m, experts, n, k, gated=gated)
    blocks, count = plan(group_sizes, m, use.tiles)
    kernel = _grouped(layers, experts, n, k, m, blocks.shape[0], use, gated=gated, row_scaled=row_scaled, out_dtype=out_dtype,
                      interpret=interpret)
    if interpret:
        rows = use.warpgroups * 64 // halves
        wide, long = -(-n // rows) * rows, -(-k // STEP) * STEP
        w = _pad(w, *w.shape[:2], wide, long // 8)
        s = jnp.pad(s, (0, rows * (k // 64) + 256)) if flat else _pad(s, *s.shape[:2], wide, -(-k // SCALE_BLOCK) * 32)
        operand = _pad(operand, m + use.tiles[-1], long)
    out = kernel(layer, w, s, operand, row_scale.astype(jnp.float32), blocks, count, factor[blocks[:, 0]])
    return out[:, :n] if interpret else out


def gate_up(operand, row_scale, packed, scale, global_scale, group_sizes, *, layer=None, use=None, interpret=False):
    """silu(x Wg^T) * (x Wu^T) for rows sorted by expert -> bf16 [M, I].

    operand: bf16 [M, K], K permuted by `mosaic.permute_k`; row_scale: f32 [] or [M, 1], multiplies. packed u8 [E, 2, I, K/2],
    gate first, scale e4m3 [E, 2, I, K/16], global_scale f32 [E]: the checkpoint's layout. group_sizes i32 [E]: rows of each
    expert, in order; rows past their sum come out undefined. K a multiple of 64; any M, E, I. layer: i32 scalar; the weights
    then carry a leading axis of layers, read in place. use: a `Config` in place of `config`'s; the bits are the same.
    """
    return _run("gate_up", operand, row_scale, packed, scale, global_scale, group_sizes, layer=layer, gated=True,
                out_dtype=jnp.bfloat16, use=use, interpret=interpret)


def matmul(operand, row_scale, packed, scale, global_scale, group_sizes, *, out_dtype=jnp.bfloat16, layer=None, use=None,
           interpret=False):
    """x W^T for rows sorted by expert -> [M, N] in out_dtype (bf16 or f32). packed u8 [E, N, K/2]; the rest as in `gate_up`."""
    return _run("matmul", operand, row_scale, packed, scale, global_scale, group_sizes, layer=layer, gated=False,
                out_dtype=out_dtype, use=use, interpret=interpret)
