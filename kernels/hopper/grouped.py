"""Grouped (ragged) NVFP4 matmuls for experts on Hopper: gate+up with SiLU, and down.

Rows of `operand` are sorted by expert and nothing is padded. A block is up to a token tile of rows of one expert; the
kernel itself lists the blocks from `group_sizes` (`_plan`). A persistent CTA an SM walks over (block, tile of weight
rows): a producer warpgroup (TMA) and consumer warpgroups of 64 weight rows each that share the tokens, decode in
registers and feed wgmma.

A row's sum over K is one chain of k16 steps in one f32 accumulator, whatever the tile: its bits depend on nothing but
its own inputs, so `config` may choose freely. Figures: benchmarks/README.md.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import mosaic

SMS = 132
STEP = 256  # K of a pipeline step: a 128-byte row of packed codes
CHUNK = 64  # K of a token tile's 128-byte row


@dataclasses.dataclass(frozen=True)
class Config:
    """tiles: the token tiles that a block may load, multiples of 8; computes: those it may compute with (each its own
    code).

    warpgroups of 64 weight rows a CTA, per_sm CTAs an SM. x_rows: 128-byte rows in a stage of tokens: 4, 2 or 1 chunks
    of 64 of K, as many as the tile leaves room for. Where that is a whole step for every tile, weights and tokens share
    their stages and barriers. crowd: the tile for an expert that has half of all rows, where it is not the largest.
    """

    tiles: tuple[int, ...]
    computes: tuple[int, ...]
    x_rows: int
    warpgroups: int = 4
    per_sm: int = 1
    sms: int = SMS
    crowd: int = 0

    def compute(self, tile):
        """The tile that a loaded one is computed with."""
        return min(t for t in self.computes if t >= tile)

    def chunks(self, compute):
        """64-chunks of K in a stage of tokens."""
        return max(q for q in (1, 2, 4) if q * compute <= self.x_rows)

    @property
    def scale_block(self):
        """K of a row of scales in shared memory: 64 bytes of it, so that more weights fit; 128 where rows are few."""
        return 1024 if self.warpgroups > 2 else 2048

    @property
    def together(self):
        """Whether a stage holds a step's weights and tokens."""
        return self.chunks(self.computes[-1]) * CHUNK == STEP


def config(m, experts, n, k, *, gated):
    """The kernel's shape for M rows of E experts, N output channels: a rule on the rows an expert gets on average.

    Every choice gives the same bits. The largest tile is for routings far from the average: with it, all rows on a few
    experts make one or two waves of CTAs.
    """
    rows = 128 if gated else 256  # output channels of a tile of 4 warpgroups
    mean = m / experts
    most = mean + 2 * mean**0.5  # 19 of 20 experts have fewer, where tokens choose evenly
    tiles = -(-n // rows)
    if min(m, experts) * tiles < 2 * SMS and mean <= 8:  # too few tiles: 64 rows a CTA, two CTAs an SM
        return Config((8,), (8,), 32, warpgroups=1, per_sm=2)
    if mean <= 1:
        return Config((8,), (8,), 32)
    crowd = -(-m // (SMS // tiles) // 8) * 8 if tiles <= SMS else 0  # all rows on one expert: one wave
    if mean <= 6:
        largest = min(32, max(24, crowd))
        return Config(tuple(range(8, largest + 1, 8)), (8, largest), 4 * largest)
    if mean <= 20:  # all rows on 8 experts: two waves
        largest = min(64, max(40, -(-m // 64 // max(1, 2 * SMS // (8 * tiles))) * 8))
        if not largest < crowd <= 96:
            return Config((8, 16, 24, 32, largest), (16, 24, 32, largest), 128)
        return Config((8, 16, 24, 32, largest, crowd), (16, 24, 32, largest, crowd), 128, crowd=crowd)
    if most <= 96:
        low, high = (-(-int(rows) // 8) * 8 for rows in (mean, most))
        return Config(tuple(range(max(8, low - 16), high + 1, 8)), (low, high), 2 * high)
    # Tokens bind: two warpgroups of 64 rows with up to 256 tokens; the smaller tile is what an even split of `most`
    # gives.
    low = -(-int(most / -(-most // 256)) // 16) * 16
    return Config((low - 32, low, 256), (low, 256), 256, warpgroups=2)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Where what is known of a tile before its data lies in shared memory, in i32 words: row scales of two tiles, 4 fields
    of two tiles, `ends` [E], `starts` [E + 1], and room to work in. `scales`: words of a tile's row scales, from up to 3
    before its first row; 0: there are none."""

    scales: int
    experts: int

    @property
    def second(self):
        """The second tile's row scales: TMA writes to multiples of 128 bytes."""
        return -(-self.scales // 32) * 32

    @property
    def fields(self):
        return self.second + self.scales

    @property
    def ends(self):
        return self.fields + 8

    @property
    def starts(self):
        return self.ends + self.experts

    @property
    def words(self):
        return self.starts + self.experts + 1 + 3 + 8 * -(-self.experts // mosaic.WARPGROUP)


def _plan(sizes, table, at, *, largest, crowd, half):
    """The producer warpgroup's first act: i32 [E] rows of each expert, in global memory -> in shared memory, blocks up
    to and with each expert, and rows before it, where `at`, a `_Table`, says. Blocks are of up to `largest` rows, or
    `crowd` for an expert with at least `half` rows."""
    experts = at.experts

    @plgpu.inline_mgpu(arg_types=(mosaic.REF,) * 2)
    def f(ctx, sizes, table):
        del ctx
        tid = mosaic.rem(mosaic.thread_index(), mosaic.WARPGROUP)
        lane, warp = mosaic.rem(tid, 32), mosaic.div(tid, 32)
        ends = mosaic.smem_address(table, 4 * at.ends)
        starts, totals = mosaic.add(ends, 4 * experts), mosaic.add(ends, (8 * experts + 4 + 15) // 16 * 16)
        before = [mosaic.i32(0)] * 2  # blocks and rows of the experts of earlier rounds
        mosaic.store_shared(starts, before[:1], mosaic.flag("eq", tid, 0))
        for first in range(0, experts, mosaic.WARPGROUP):
            expert = mosaic.add(tid, first)
            inside = mosaic.flag("lt", expert, experts)
            rows, = mosaic.load_global(mosaic.gmem_address(sizes, mosaic.mul(expert, 4)), 1, inside)
            blocks, few = (mosaic.div(mosaic.add(rows, tile - 1), tile) for tile in (largest, crowd or largest))
            blocks = mosaic.select(mosaic.flag("le", half, rows), few, blocks)
            scans = [mosaic.warp_scan(v) for v in (blocks, rows)]
            here = mosaic.add(totals, 4 * 8 * (first // mosaic.WARPGROUP))
            mosaic.store_shared(mosaic.add(here, mosaic.mul(warp, 8)), scans, mosaic.flag("eq", lane, 31))
            mosaic.warpgroup_barrier()
            sums = [mosaic.load_shared(here, 8 * w, 2) for w in range(4)]
            for i, out in enumerate((ends, mosaic.add(starts, 4))):
                value = mosaic.add(before[i], scans[i])
                for w in range(3):
                    value = mosaic.add(value, mosaic.select(mosaic.flag("lt", w, warp), sums[w][i], 0))
                mosaic.store_shared(mosaic.add(out, mosaic.mul(expert, 4)), [value], inside)
                for w in range(4):
                    before[i] = mosaic.add(before[i], sums[w][i])
        mosaic.warpgroup_barrier()

    f(sizes, table)


def _expert_of(table, number, at):
    """How many experts end at or before block `number`, hence whose it is: every thread of the warpgroup looks at its
    own."""
    experts = at.experts

    @plgpu.inline_mgpu(arg_types=(mosaic.REF, mosaic.SPLAT),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=mosaic.SPLAT))
    def f(ctx, table, number):
        del ctx
        number = mosaic.scalar(number)
        tid = mosaic.rem(mosaic.thread_index(), mosaic.WARPGROUP)
        ends = mosaic.smem_address(table, 4 * at.ends)
        own = mosaic.add(ends, mosaic.mul(tid, 4))
        total = mosaic.i32(0)
        for first in range(0, experts, mosaic.WARPGROUP):
            inside = mosaic.flag("lt", tid, experts - first)
            end, = mosaic.load_shared(mosaic.select(inside, mosaic.add(own, 4 * first), ends), 0, 1)
            earlier = mosaic.bit_and(inside, mosaic.flag("le", end, number))
            total = mosaic.add(total, mosaic.count_in_warpgroup(earlier, 15))
        return mosaic.splat(total)

    return f(table, number)


def _block(table, number, expert, at, *, tiles):
    """Block `number` of the plan, of `expert` -> first row, rows, index of the tile that holds them.

    An expert's rows are split evenly over its blocks, in multiples of 8.
    """
    ends, starts = (lambda i: table[at.ends + i]), (lambda i: table[at.starts + i])
    before = jnp.where(expert == 0, 0, ends(jnp.maximum(expert - 1, 0)))
    blocks, start = ends(expert) - before, starts(expert)
    size = starts(expert + 1) - start
    share = lax.div(lax.div(size + blocks - 1, blocks) + 7, jnp.int32(8)) * 8
    earlier = (number - before) * share
    rows = jnp.minimum(share, size - earlier)
    tile = sum(((rows > t).astype(jnp.int32) for t in tiles[:-1]), jnp.int32(0))
    return start + earlier, rows, tile


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Shared memory of a kernel: weight rows a stage, bytes of a row of scales, stages of weights, of tokens and of
    scales."""

    rows: int
    scale_row: int
    w_stages: int
    x_stages: int
    s_stages: int


def _layout(c, k, halves, table):
    """The rings that fit. Raises NotImplementedError where K is too long for rows of scales that TMA cannot cut."""
    rows = c.warpgroups * 64
    scale_row = k // 16 if k % STEP else min(k, c.scale_block) // 16
    x_bytes, w_bytes = c.x_rows * CHUNK * 2, rows * STEP // 2
    x_stages_a_step = STEP // CHUNK // c.chunks(c.computes[0])
    # Pallas aligns arrays to 1024 bytes; the last 1024 are for the barriers.
    free = mosaic.SHARED_MEMORY // c.per_sm - 1024 - -(-table.words * 4 // 1024) * 1024
    for s_stages in ((2, 1) if c.per_sm == 1 else (1,)):
        left = free - s_stages * -(-halves * _scale_words(rows // halves, scale_row, k) * 4 // 1024) * 1024
        if c.together:  # a power of two: the number of a stage then costs one instruction
            x_stages = w_stages = max((q for q in (2, 4, 8) if q * (w_bytes + x_bytes) <= left), default=0)
        else:  # tokens come from the L2: a step less of them does not delay the weights
            w_stages = max(2, min(8, (left + x_bytes * x_stages_a_step) // (w_bytes + x_bytes * x_stages_a_step)))
            x_stages = min(8, (left - w_stages * w_bytes) // x_bytes)
        if w_stages >= 2 and x_stages >= 2:
            return _Layout(rows, scale_row, w_stages, x_stages, s_stages)
    raise NotImplementedError(f"K = {k} is too long: {rows} rows of scales do not fit the shared memory; a multiple of "
                              f"{STEP} is cut into pieces, other K go up to about 20000")


def _scale_words(rows, scale_row, k):
    """i32 words of the scales of `rows` rows in shared memory. K that TMA cannot stride over: whole rows, in copies of
    256."""
    return rows * scale_row // 4 if k % STEP == 0 else -(-(rows * scale_row // 4 + 4) // 256) * 256


def _grouped(layers, experts, n, k, m, c, *, gated, row_scaled, out_dtype, interpret=False):
    """layer i32 [1], w i32 [L, E * halves, N, K/8], s i32 [L, E * halves, N, K/64] (flat where K % 256), x bf16 [M,
    K], row_scale i32 [M], bits of f32 (row_scaled), or f32 [1], sizes i32 [E] (rows of each expert), global_scale f32 [L, E] ->
    [M, N]; halves is 2 where gate and up lie behind each other (gated), else 1."""
    halves = 2 if gated else 1
    known = _Table(c.computes[-1] + 4 if row_scaled else 0, experts)
    r = _layout(c, k, halves, known)
    rows, wgs = r.rows // halves, c.warpgroups
    tiles, steps = -(-n // rows), -(-k // STEP)
    scale_blocks, block_steps = (1, steps) if k % STEP else (-(-k // c.scale_block), min(steps, c.scale_block // STEP))
    scale_words = _scale_words(rows, r.scale_row, k)
    largest, half = max(t for t in c.tiles if t != c.crowd), -(-m // 2)
    flat = bool(k % STEP)
    # Steps in a turn of the consumers' loop, one for each stage: inside a turn, a step's decode runs beside the wgmmas of the
    # step before, and a stage is released half a step late.
    turn = r.w_stages if c.together and steps % block_steps == block_steps % r.w_stages == 0 else 1
    most_chunks = c.chunks(c.computes[0])  # copies in a stage of tokens; where fewer, plain arrivals make up for them
    scale_copies = [(at, min(256, known.scales - at)) for at in range(0, known.scales, 256)]  # a copy takes up to 256
    consumer_registers, producer_registers = mosaic.register_budget(wgs, per_sm=c.per_sm)
    grid = c.sms * c.per_sm

    def kernel(layer, w, s, x, row_scale, sizes, global_scale, o, w_sm, s_sm, x_sm, table, w_full, w_empty, x_full,
               x_empty, s_full, s_empty, r_full, r_empty, planned, m_full, m_empty, a_sm=None):
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
        if c.together:
            x_full, x_empty = w_full, w_empty

        def div_rem(a, b):
            return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))

        def x_stages_of(load):
            """Stages of tokens that a step takes, of a block in tile number `load`."""
            stages = [STEP // CHUNK // c.chunks(c.compute(t)) for t in c.tiles]
            total = jnp.int32(stages[0])
            for i, (a, b) in enumerate(zip(stages, stages[1:])):
                total += (b - a) * (load > i).astype(jnp.int32)
            return total

        opaque = jnp.int32 if interpret else mosaic.opaque  # loops of the producer, which has few registers

        def own_tiles():
            return lax.div(table[known.starts - 1] * tiles + (grid - 1) - sm, jnp.int32(grid))

        def over_steps(before, step, after, carry=None, *, size_of=lambda size: size, turn=1):
            """before and after(block of scales), carry = step(block, step in it, step, carry), `turn` steps at once:
            each is told which of the turn's it is."""
            def over_block(b, carry):
                first = b * block_steps
                before(b)

                def several(i, carry):
                    for q in range(turn):
                        at = i * turn + q
                        carry = step(b, at, first + at, carry, *((q,) if turn > 1 else ()))
                    return carry

                size = block_steps if steps % block_steps == 0 else jnp.minimum(block_steps, steps - first)
                carry = lax.fori_loop(0, size_of(size) // turn if turn > 1 else size_of(size), several, carry)
                after(b)
                return carry

            if scale_blocks == 1:
                return over_block(0, carry)
            return lax.fori_loop(0, scale_blocks, over_block, carry)

        def produce():
            at_layer = layer[0]
            if interpret:
                pieces = (lax.div(sizes[...] + (tile - 1), jnp.int32(tile)) for tile in (c.crowd or largest, largest))
                pieces = jnp.where(sizes[...] >= half, *pieces)
                table[pl.ds(known.ends, experts)] = jnp.cumsum(pieces)
                table[known.starts] = jnp.int32(0)
                table[pl.ds(known.starts + 1, experts)] = jnp.cumsum(sizes[...])
            else:
                _plan(sizes, table, known, largest=largest, crowd=c.crowd, half=half)
            plgpu.barrier_arrive(planned)

            def tile_of(tile, x_used):
                linear = sm + tile * grid
                number, within = div_rem(linear, tiles)
                first = within * rows
                if interpret:
                    e = jnp.sum((table[pl.ds(known.ends, experts)] <= number).astype(jnp.int32))
                else:
                    e = _expert_of(table, number, known)
                start, rows_used, load = _block(table, number, e, known, tiles=c.tiles)
                m_slot = div_rem(tile, 2)[1]
                pl.when(tile >= 2)(lambda: plgpu.barrier_wait(m_empty.at[m_slot]))
                for i, value in enumerate((e, start, rows_used, load)):
                    table[known.fields + m_slot * 4 + i] = value
                plgpu.barrier_arrive(m_full.at[m_slot])
                channels, step_stages = pl.ds(first, rows), opaque(x_stages_of(load))

                def scales(b):
                    use = tile * scale_blocks + b
                    slot = div_rem(use, r.s_stages)[1]
                    pl.when(use >= r.s_stages)(lambda: plgpu.barrier_wait(s_empty.at[slot]))
                    for h in range(halves):
                        expert = e * halves + h
                        if flat:
                            word = ((at_layer * (experts * halves) + expert) * n + first) * (k // 64)
                            word = pl.multiple_of(word - div_rem(word, 4)[1], 4)  # TMA starts at 16 bytes: see `shift`
                            for q in range(scale_words // 256):
                                source = s.at[pl.ds(word + q * 256, 256)]
                                plgpu.copy_gmem_to_smem(source, s_sm.at[slot, h, pl.ds(q * 256, 256)], s_full.at[slot])
                        else:
                            words = pl.ds(b * (c.scale_block // 64), r.scale_row // 4)
                            source = s.at[at_layer, expert, channels, words]
                            plgpu.copy_gmem_to_smem(source, s_sm.at[slot, h], s_full.at[slot])

                def step(_b, _i, at, x_at):
                    it = tile * steps + at
                    st = div_rem(it, r.w_stages)[1]
                    pl.when(it >= r.w_stages)(lambda: plgpu.barrier_wait(w_empty.at[st]))
                    for h in range(halves):
                        source = w.at[at_layer, e * halves + h, channels, pl.ds(at * (STEP // 8), STEP // 8)]
                        plgpu.copy_gmem_to_smem(source, w_sm.at[st, pl.ds(h * rows, rows)], w_full.at[st])

                    def stage(g, xi):
                        xst = st
                        if not c.together:
                            xst = div_rem(xi, r.x_stages)[1]
                            pl.when(xi >= r.x_stages)(lambda: plgpu.barrier_wait(x_empty.at[xst]))

                        def tokens(t):
                            compute = c.compute(t)
                            chunks = c.chunks(compute)
                            for q in range(chunks):
                                ks = pl.ds(at * STEP + (g * chunks + q) * CHUNK, CHUNK)
                                plgpu.copy_gmem_to_smem(x.at[pl.ds(start, t), ks], x_sm.at[xst, pl.ds(q * compute, t)],
                                                        x_full.at[xst])
                            for _ in range(most_chunks - chunks):
                                plgpu.barrier_arrive(x_full.at[xst])

                        for index, t in enumerate(c.tiles):
                            pl.when(load == index)(lambda t=t: tokens(t))
                        return xi + 1

                    return lax.fori_loop(0, step_stages, stage, x_at)

                x_used = over_steps(scales, step, lambda b: None, x_used, size_of=opaque)
                if row_scaled:  # last, for they are used last; TMA starts at 16 bytes
                    pl.when(tile >= 2)(lambda: plgpu.barrier_wait(r_empty.at[m_slot]))
                    first_scale = pl.multiple_of(start - div_rem(start, 4)[1], 4)
                    for at, size in scale_copies:
                        target = table.at[pl.ds(m_slot * known.second + at, size)]
                        plgpu.copy_gmem_to_smem(row_scale.at[pl.ds(first_scale + at, size)], target, r_full.at[m_slot])
                return x_used

            tile = own_tiles()
            x_used = lax.fori_loop(0, tile, tile_of, jnp.int32(0))
            if interpret:  # it wants every completed phase of a barrier observed
                for barrier, uses, stages in (
                        (w_empty, tile * steps, r.w_stages), (s_empty, tile * scale_blocks, r.s_stages),
                        *(() if c.together else ((x_empty, x_used, r.x_stages),)), (m_empty, tile, 2),
                        *(((r_empty, tile, 2),) if row_scaled else ())):
                    @pl.loop(jnp.maximum(uses, stages), uses + stages)
                    def _(use):
                        plgpu.barrier_wait(barrier.at[div_rem(use, stages)[1]])

        def consume():
            def lanes(shifts):
                return mosaic.fragment_lanes(wg, [4 * v for v in shifts], scale_row=r.scale_row,
                                             chunks=4 if most_chunks > 1 else 1,
                                             other=(rows, scale_words * 4) if gated else None)

            # Once for all tiles, where registers allow.
            early = None if interpret or flat or c.crowd else lanes((jnp.int32(0),) * 2)
            plgpu.barrier_wait(planned)

            def tile_of(tile, x_used):
                linear = sm + tile * grid
                m_slot = div_rem(tile, 2)[1]
                plgpu.barrier_wait(m_full.at[m_slot])
                e, start, rows_used, load = (table[known.fields + m_slot * 4 + i] for i in range(4))
                plgpu.barrier_arrive(m_empty.at[m_slot])
                at_layer = layer[0] if layers > 1 else 0
                # Fetched here, first used after the loop over K.
                expert_scale, common_scale = global_scale[at_layer, e], None if row_scaled else row_scale[0]

                def shift(h):
                    """Words by which a tile's scales lie further on than the 16 bytes that TMA started at."""
                    if not flat or n * (k // 64) % 4 == 0:
                        return jnp.int32(0)
                    return div_rem(((at_layer * experts + e) * halves + h) * (n * (k // 64) % 4), 4)[1]

                shifts = shift(0), shift(halves - 1)

                def run(t):
                    chunks = c.chunks(t) if turn == 1 else 2
                    groups = STEP // CHUNK // chunks
                    if not interpret:
                        lane_values = early or lanes(shifts)

                    def slot(b):
                        return div_rem(tile * scale_blocks + b, r.s_stages)[1]

                    def stage_of(it):
                        return div_rem(it, r.w_stages)[1]

                    def step(b, i, at, acc, q=0):
                        it = tile * steps + at
                        st = q if turn > 1 else stage_of(it)
                        plgpu.barrier_wait(w_full.at[st])
                        for g in range(groups):
                            xst, x_first = st, g * chunks * t
                            if not c.together:
                                xst, x_first = div_rem(x_used + at * groups + g, r.x_stages)[1], 0
                                plgpu.barrier_wait(x_full.at[xst])
                            tokens = x_sm.at[xst, pl.ds(x_first, chunks * t)]
                            if interpret:
                                _multiply_interpreted(acc, a_sm.at[wg], w_sm.at[st], s_sm.at[slot(b)], tokens,
                                                      wg, i, g * chunks, chunks, rows, r.scale_row, shifts, t)
                            else:
                                acc = mosaic.multiply_decoded(
                                    acc, lane_values, w_sm.at[st], s_sm.at[slot(b)], tokens, i, first=g * chunks,
                                    chunks=chunks, tokens=t, scale_row=r.scale_row,
                                    running=int(g + 1 < groups or q + 1 < turn) if turn > 1 else 0)
                            if g == 0 and q > 0:  # the wgmmas of the step before are through
                                plgpu.barrier_arrive(w_empty.at[q - 1])
                            if not c.together:
                                plgpu.barrier_arrive(x_empty.at[xst])
                        if q == turn - 1:
                            plgpu.barrier_arrive(w_empty.at[st])
                        return None if interpret else acc

                    def over_k(acc):
                        return over_steps(lambda b: plgpu.barrier_wait(s_full.at[slot(b)]),
                                          step if not interpret else lambda b, i, at, _, q=0: step(b, i, at, acc, q),
                                          lambda b: plgpu.barrier_arrive(s_empty.at[slot(b)]),
                                          None if interpret else acc, turn=turn)

                    if interpret:
                        def interpreted(acc):
                            over_k(acc)
                            return acc[...]
                        acc = pl.run_scoped(interpreted, plgpu.ACC((64, t), jnp.float32))
                    else:
                        acc = over_k(plgpu.layout_cast(jnp.zeros((64, t), jnp.float32), mosaic.WGMMA))
                    first = div_rem(linear, tiles)[1] * rows + wg * (64 // halves)
                    scale = expert_scale * jnp.float32(mosaic.DECODE_FACTOR)
                    if not row_scaled:
                        scale = common_scale * scale
                    row_scales = None
                    if row_scaled:
                        plgpu.barrier_wait(r_full.at[m_slot])
                        row_scales = table, m_slot * known.second + div_rem(start, 4)[1]
                    if interpret:
                        _store_interpreted(acc, scale, row_scales, o, start, rows_used, first, gated=gated)
                    else:
                        mosaic.store_tokens(acc, scale, row_scales, o, start, rows_used, first,
                                            tokens=t, width=n, gated=gated, masked=n % rows != 0)

                if len(c.computes) == 1:
                    run(c.computes[0])
                else:
                    below = -1
                    for t in c.computes:
                        last = max(i for i, size in enumerate(c.tiles) if size <= t)
                        pl.when((load > below) & (load <= last))(lambda t=t: run(t))
                        below = last
                if row_scaled:
                    if interpret:  # it orders reads before the next copy by this fence; the hardware by the barrier
                        plgpu.commit_smem()
                    plgpu.barrier_arrive(r_empty.at[m_slot])
                return x_used + steps * x_stages_of(load)

            lax.fori_loop(0, own_tiles(), tile_of, jnp.int32(0))

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
        s_sm=plgpu.SMEM((r.s_stages, halves, *((scale_words,) if flat else (rows, r.scale_row // 4))), jnp.int32,
                        transforms=() if flat else mosaic.scale_rows(r.scale_row)),
        x_sm=plgpu.SMEM((r.x_stages, c.x_rows, CHUNK), jnp.bfloat16, transforms=mosaic.ROWS_128),
        table=plgpu.SMEM((known.words,), jnp.int32),
        w_full=plgpu.Barrier(num_arrivals=halves + most_chunks * c.together, num_barriers=r.w_stages),
        w_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.w_stages),
        x_full=plgpu.Barrier(num_arrivals=most_chunks, num_barriers=r.x_stages),
        x_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.x_stages),
        s_full=plgpu.Barrier(num_arrivals=halves * (scale_words // 256 if flat else 1), num_barriers=r.s_stages),
        s_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.s_stages),
        r_full=plgpu.Barrier(num_arrivals=max(1, len(scale_copies)), num_barriers=2),
        r_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2),
        planned=plgpu.Barrier(num_arrivals=1), m_full=plgpu.Barrier(num_arrivals=1, num_barriers=2),
        m_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2))
    width = n
    if interpret:  # it has no wgmma from registers and no rows past an edge
        width = tiles * rows
        swizzled = mosaic.swizzled(2)
        scratch["x_sm"] = plgpu.SMEM((r.x_stages, c.x_rows, CHUNK), jnp.bfloat16, transforms=swizzled)
        scratch["a_sm"] = plgpu.SMEM((wgs, 4, 64, CHUNK), jnp.bfloat16, transforms=swizzled)
    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((m, width), out_dtype), scratch_types=scratch, grid=(grid,),
        grid_names=("sm",), num_threads=wgs + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))


def _multiply_interpreted(acc, a_sm, w, s, x, wg, unit, first, chunks, rows, scale_row, shifts, tokens):
    """`mosaic.multiply_decoded` for the interpreter, by way of shared memory; gated: 32 rows of gate, then 32 of
    up."""
    halves = s.shape[0]
    height = 64 // halves
    words, scales = [], []
    for h in range(halves):
        words.append(w[pl.ds(h * rows + wg * height, height), pl.ds(first * 8, chunks * 8)])
        if len(s.shape) == 2:
            table = lax.dynamic_slice(s[h], (shifts[h],), (rows * scale_row // 4,))
            table = jnp.pad(table.reshape(rows, scale_row // 4), ((0, 0), (0, 4)))
            scales.append(lax.dynamic_slice(table, (wg * height, unit * 4 + first), (height, chunks)))
        else:
            scales.append(s[h, pl.ds(wg * height, height), pl.ds(unit * 4 + first, chunks)])
    decoded = mosaic.decode_words(jnp.concatenate(words), jnp.concatenate(scales))
    for q in range(chunks):
        a_sm[q] = decoded[:, q * CHUNK:(q + 1) * CHUNK]
    plgpu.commit_smem()
    for q in range(chunks):
        plgpu.wgmma(acc, a_sm.at[q], x.at[pl.ds(q * tokens, tokens)].T)
    plgpu.wgmma_wait(0)


def _store_interpreted(acc, factor, row_scales, out, row, count, channel, *, gated):
    """`mosaic.store_tokens` for the interpreter."""
    values = acc.T
    width = values.shape[1] // 2 if gated else values.shape[1]

    @pl.loop(0, count)
    def _(token):
        scale = factor
        if row_scales is not None:
            scale = lax.bitcast_convert_type(row_scales[0][row_scales[1] + token], jnp.float32) * factor
        value = lax.dynamic_slice(values, (token, 0), (1, values.shape[1]))[0] * scale
        if gated:
            value = jax.nn.silu(value[:width]) * value[width:]
        out[row + token, pl.ds(channel, width)] = value.astype(out.dtype)


def _pad(x, *sizes):
    return jnp.pad(x, [(0, size - have) for size, have in zip(sizes, x.shape)])


def _run(name, operand, row_scale, packed, scale, global_scale, group_sizes, *, layer, gated, out_dtype, use,
         interpret):
    halves = 2 if gated else 1
    if layer is None:
        packed, scale, global_scale = packed[None], scale[None], global_scale[None]
    if packed.ndim != (5 if gated else 4) or (gated and packed.shape[2] != 2):
        expected = "[E, 2, I, K/2]" if gated else "[E, N, K/2]"
        raise ValueError(f"{name}: packed must be u8 {expected}, with a leading axis of layers where `layer` is given; "
                         f"got {packed.shape}")
    layers, experts, n, k = packed.shape[0], packed.shape[1], packed.shape[-2], packed.shape[-1] * 2
    m = operand.shape[0]
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
    w, s = mosaic.as_words(packed, scale)
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
    kernel = _grouped(layers, experts, n, k, m, use, gated=gated, row_scaled=row_scaled, out_dtype=out_dtype,
                      interpret=interpret)
    if interpret:
        rows = use.warpgroups * 64 // halves
        wide, long = -(-n // rows) * rows, -(-k // STEP) * STEP
        w = _pad(w, *w.shape[:2], wide, long // 8)
        blocks = -(-k // use.scale_block) * use.scale_block
        s = jnp.pad(s, (0, rows * (k // 64) + 256)) if flat else _pad(s, *s.shape[:2], wide, blocks // 64)
        operand = _pad(operand, m + use.tiles[-1], long)
        row_scale = _pad(row_scale, m + 4 + use.computes[-1]) if row_scaled else row_scale
    out = kernel(layer, w, s, operand, row_scale, group_sizes.astype(jnp.int32), global_scale)
    return out[:, :n] if interpret else out


def gate_up(operand, row_scale, packed, scale, global_scale, group_sizes, *, layer=None, use=None, interpret=False):
    """silu(x Wg^T) * (x Wu^T) for rows sorted by expert -> bf16 [M, I].

    operand: bf16 [M, K], K permuted by `mosaic.permute_k`; row_scale: f32 [] or [M, 1], multiplies. packed u8 [E, 2,
    I, K/2], gate first, scale e4m3 [E, 2, I, K/16], global_scale f32 [E]: the checkpoint's layout. group_sizes i32
    [E]: rows of each expert, in order; rows past their sum come out undefined. K a multiple of 64; any M, E, I. layer:
    i32 scalar; the weights then carry a leading axis of layers, read in place. use: a `Config` in place of `config`'s;
    the bits are the same.
    """
    return _run("gate_up", operand, row_scale, packed, scale, global_scale, group_sizes, layer=layer, gated=True,
                out_dtype=jnp.bfloat16, use=use, interpret=interpret)


def matmul(operand, row_scale, packed, scale, global_scale, group_sizes, *, out_dtype=jnp.bfloat16, layer=None,
           use=None, interpret=False):
    """x W^T for rows sorted by expert -> [M, N] in out_dtype (bf16 or f32). packed u8 [E, N, K/2]; else as
    `gate_up`."""
    return _run("matmul", operand, row_scale, packed, scale, global_scale, group_sizes, layer=layer, gated=False,
                out_dtype=out_dtype, use=use, interpret=interpret)
