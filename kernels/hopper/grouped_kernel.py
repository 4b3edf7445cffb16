"""The kernel of the grouped matmuls: persistent CTAs over (block of rows, tile of weight rows).

    warpgroup 0 .. wgs - 1    consumers: each owns 64 weight rows of the tile (gated: 32 of gate and the same 32 of up), decodes them in
                              its registers and shares the tokens with the others
    warpgroup wgs             the producer: lists the blocks, then TMA

    ring      a stage holds                                          filled                        released
    known     4 words: expert, first row, rows, which tile           a tile, by plain stores       once read
    weights   i32 [rows, 32]: 256 of K                               a step of K                   by each consumer, when its wgmmas
    tokens    bf16 [x_rows, 64]: 1, 2 or 4 chunks of 64 of K           as many as a step takes       are through
    scales    i32 [halves, rows, scale_row / 4]                      a block of K of `scale_block`   at the block's end
    row       f32 [tokens + 4], row scales of a tile                 a tile                        when its results are stored

Where a stage of tokens is a whole step for every tile, weights and tokens are one ring (`together`). There, a turn of the
consumers' loop is a round of the ring: inside it a step's decode runs beside the wgmmas of the step before, and a stage is released
half a step late. `planned`: the blocks are listed.

K that is no multiple of 256 (`flat`): scales come as one run of words that starts up to 3 before the tile's first (TMA starts at 16
bytes), and the tile's `shift` says how many.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper.decode import DECODE_FACTOR, fragment_addresses, multiply_decoded
from nvfp4jax.kernels.hopper.epilogue import store_tokens
from nvfp4jax.kernels.hopper.grouped_config import CHUNK, STEP, Config, layout_of, scale_words
from nvfp4jax.kernels.hopper.grouped_plan import Table, expert_of, list_blocks, rows_of_block
from nvfp4jax.kernels.hopper.machine import ROWS_128, Hardware, register_budget, scale_rows
from nvfp4jax.kernels.hopper.ring import Ring
from nvfp4jax.kernels.hopper.threads import opaque


def _rem(a, b):
    return lax.rem(a, jnp.int32(b))


@dataclasses.dataclass(frozen=True)
class Refs:
    """In global memory: layer i32 [1], w i32 [L, E * halves, N, K/8], s i32 [L, E * halves, N, K/64] (one axis where K % 256), x bf16 [M,
    K], row_scale i32 [M] (bits of f32) or f32 [1], sizes i32 [E], global_scale f32 [L, E], out [M, N]."""

    layer: Any
    w: Any
    s: Any
    x: Any
    row_scale: Any
    sizes: Any
    global_scale: Any
    out: Any


@dataclasses.dataclass(frozen=True)
class _Shared:
    """A CTA's shared memory."""

    w_sm: Any
    s_sm: Any
    x_sm: Any
    table: Any
    known: Ring
    weights: Ring
    tokens: Ring
    scales: Ring
    row: Ring
    planned: Any


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of the CTA, its `number`-th. slot: of `known` and `row`; start, rows: of the block; load: index of the token tile."""

    number: Any
    slot: Any
    expert: Any
    start: Any
    rows: Any
    load: Any


@dataclasses.dataclass(frozen=True)
class Grouped(Hardware):
    """halves: 2 where gate and up lie behind each other (gated), else 1."""

    layers: int
    experts: int
    n: int
    k: int
    m: int
    config: Config
    gated: bool
    row_scaled: bool
    out_dtype: Any

    def __post_init__(self):
        _ = self.layout  # raises where nothing fits

    @property
    def halves(self) -> int:
        return 2 if self.gated else 1

    @property
    def at(self) -> Table:
        return Table(self.config.computes[-1] + 4 if self.row_scaled else 0, self.experts)

    @functools.cached_property
    def layout(self):
        return layout_of(self.config, self.k, self.halves, self.at)

    @property
    def rows(self) -> int:
        """Weight rows of a tile, of each half."""
        return self.layout.rows // self.halves

    @property
    def tiles(self) -> int:
        """Of a block."""
        return -(-self.n // self.rows)

    @property
    def steps(self) -> int:
        return -(-self.k // STEP)

    @property
    def flat(self) -> bool:
        return bool(self.k % STEP)

    @property
    def scale_blocks(self) -> int:
        return 1 if self.flat else -(-self.k // self.config.scale_block)

    @property
    def block_steps(self) -> int:
        return self.steps if self.flat else min(self.steps, self.config.scale_block // STEP)

    @property
    def scale_words(self) -> int:
        return scale_words(self.rows, self.layout.scale_row, self.k)

    @property
    def turn(self) -> int:
        """Steps in a turn of the consumers' loop, one for each stage."""
        stages = self.layout.w_stages
        return stages if self.config.together and self.steps % self.block_steps == self.block_steps % stages == 0 else 1

    @property
    def most_chunks(self) -> int:
        """Copies in a stage of tokens; where fewer, plain arrivals make up for them."""
        return self.config.chunks(self.config.computes[0])

    @property
    def scale_copies(self) -> list[tuple[int, int]]:
        """Of a tile's row scales: a copy takes up to 256."""
        return [(at, min(256, self.at.scales - at)) for at in range(0, self.at.scales, 256)]

    @property
    def grid(self) -> int:
        return self.config.sms * self.config.per_sm

    # --- which tiles

    def list_blocks(self, sizes, table):
        c = self.config
        list_blocks(sizes, table, self.at, largest=max(t for t in c.tiles if t != c.crowd), crowd=c.crowd, half=-(-self.m // 2))

    def expert_of(self, table, number):
        return expert_of(table, number, self.at)

    def opaque(self, value):
        """For loops of the producer, which has few registers."""
        return opaque(value)

    def own_tiles(self, table, cta):
        return lax.div(table[self.at.starts - 1] * self.tiles + (self.grid - 1) - cta, jnp.int32(self.grid))

    def x_stages_of(self, load):
        """Stages of tokens that a step takes, of a block in tile number `load`."""
        c = self.config
        stages = [STEP // CHUNK // c.chunks(c.compute(t)) for t in c.tiles]
        total = jnp.int32(stages[0])
        for i, (a, b) in enumerate(zip(stages, stages[1:])):
            total += (b - a) * (load > i).astype(jnp.int32)
        return total

    def over_steps(self, before, step, after, carry, *, size_of=lambda size: size, turn=1):
        """before and after(block of scales), carry = step(block, step in it, step, carry, q), `turn` steps at once, q of them."""
        def over_block(b, carry):
            first = b * self.block_steps
            before(b)

            def several(i, carry):
                for q in range(turn):
                    at = i * turn + q
                    carry = step(b, at, first + at, carry, q)
                return carry

            size = self.block_steps if self.steps % self.block_steps == 0 else jnp.minimum(self.block_steps, self.steps - first)
            carry = lax.fori_loop(0, size_of(size) // turn if turn > 1 else size_of(size), several, carry)
            after(b)
            return carry

        return over_block(0, carry) if self.scale_blocks == 1 else lax.fori_loop(0, self.scale_blocks, over_block, carry)

    # --- copies

    def fetch_scales(self, refs, sm, layer, tile, first, b):
        use = tile.number * self.scale_blocks + b
        slot = sm.scales.fill(use)
        full = sm.scales.arriving(slot)
        for h in range(self.halves):
            expert = tile.expert * self.halves + h
            if self.flat:
                word = ((layer * (self.experts * self.halves) + expert) * self.n + first) * (self.k // 64)
                word = pl.multiple_of(word - _rem(word, 4), 4)  # TMA starts at 16 bytes: see `shift`
                for q in range(self.scale_words // 256):
                    plgpu.copy_gmem_to_smem(refs.s.at[pl.ds(word + q * 256, 256)], sm.s_sm.at[slot, h, pl.ds(q * 256, 256)], full)
            else:
                words = pl.ds(b * (self.config.scale_block // 64), self.layout.scale_row // 4)
                plgpu.copy_gmem_to_smem(refs.s.at[layer, expert, pl.ds(first, self.rows), words], sm.s_sm.at[slot, h], full)

    def fetch_tokens(self, refs, sm, tile, t, k, stage):
        """From column k on, in token tile t."""
        compute = self.config.compute(t)
        chunks, full = self.config.chunks(compute), sm.tokens.arriving(stage)
        for q in range(chunks):
            source = refs.x.at[pl.ds(tile.start, t), pl.ds(k(q), CHUNK)]
            plgpu.copy_gmem_to_smem(source, sm.x_sm.at[stage, pl.ds(q * compute, t)], full)
        for _ in range(self.most_chunks - chunks):
            plgpu.barrier_arrive(full)

    def fetch_step(self, refs, sm, layer, tile, first, step_stages, at, x_used):
        """Weights and tokens of step `at`. -> stages of tokens used up to and with it."""
        c = self.config
        st = sm.weights.fill(tile.number * self.steps + at)
        for h in range(self.halves):
            source = refs.w.at[layer, tile.expert * self.halves + h, pl.ds(first, self.rows), pl.ds(at * (STEP // 8), STEP // 8)]
            plgpu.copy_gmem_to_smem(source, sm.w_sm.at[st, pl.ds(h * self.rows, self.rows)], sm.weights.arriving(st))

        def stage(g, x_used):
            x_stage = st if c.together else sm.tokens.fill(x_used)
            for index, t in enumerate(c.tiles):
                chunks = c.chunks(c.compute(t))
                k = lambda q, chunks=chunks: at * STEP + (g * chunks + q) * CHUNK
                pl.when(tile.load == index)(lambda t=t, k=k: self.fetch_tokens(refs, sm, tile, t, k, x_stage))
            return x_used + 1

        return lax.fori_loop(0, step_stages, stage, x_used)

    def fetch_row_scales(self, refs, sm, tile):
        """TMA starts at 16 bytes."""
        sm.row.fill(tile.number)
        first = pl.multiple_of(tile.start - _rem(tile.start, 4), 4)
        for at, size in self.scale_copies:
            target = sm.table.at[pl.ds(tile.slot * self.at.second + at, size)]
            plgpu.copy_gmem_to_smem(refs.row_scale.at[pl.ds(first + at, size)], target, sm.row.arriving(tile.slot))

    def fetch_tile(self, refs, sm, layer, cta, number, x_used):
        linear = cta + number * self.grid
        block, within = lax.div(linear, jnp.int32(self.tiles)), _rem(linear, self.tiles)
        first = within * self.rows
        expert = self.expert_of(sm.table, block)
        start, rows, load = rows_of_block(sm.table, block, expert, self.at, self.config.tiles)
        rows = jnp.minimum(rows, self.m - start)  # sizes that promise more rows than there are: nothing is written past the last
        slot = sm.known.fill(number)
        tile = _Tile(number, slot, expert, start, rows, load)
        for i, value in enumerate((expert, start, rows, load)):
            sm.table[self.at.fields + slot * 4 + i] = value
        plgpu.barrier_arrive(sm.known.arriving(slot))
        step_stages = self.opaque(self.x_stages_of(load))
        x_used = self.over_steps(
            lambda b: self.fetch_scales(refs, sm, layer, tile, first, b),
            lambda _b, _i, at, x_used, _q: self.fetch_step(refs, sm, layer, tile, first, step_stages, at, x_used),
            lambda b: None, x_used, size_of=self.opaque)
        if self.row_scaled:  # last, for they are used last
            self.fetch_row_scales(refs, sm, tile)
        return x_used

    def produce(self, refs, sm, cta):
        self.set_registers(register_budget(self.config.warpgroups, per_sm=self.config.per_sm)[1], "decrease")
        layer = refs.layer[0]
        self.list_blocks(refs.sizes, sm.table)
        plgpu.barrier_arrive(sm.planned)
        count = self.own_tiles(sm.table, cta)
        x_used = lax.fori_loop(0, count, lambda number, x_used: self.fetch_tile(refs, sm, layer, cta, number, x_used), jnp.int32(0))
        self.drain(sm.weights, count * self.steps)
        self.drain(sm.scales, count * self.scale_blocks)
        if not self.config.together:
            self.drain(sm.tokens, x_used)
        self.drain(sm.known, count)
        if self.row_scaled:
            self.drain(sm.row, count)

    # --- products

    def prepare(self, wg, shifts):
        return fragment_addresses(
            wg, [4 * v for v in shifts], scale_row=self.layout.scale_row, chunks=4 if self.most_chunks > 1 else 1,
            other=(self.rows, self.scale_words * 4) if self.gated else None)

    def multiply(self, acc, addresses, w, s, x, unit, wg, *, first, chunks, tokens, running):
        return multiply_decoded(acc, addresses, w, s, x, unit, first=first, chunks=chunks, tokens=tokens,
                                scale_row=self.layout.scale_row, running=running)

    def store(self, acc, scale, row_scales, out, start, rows, channel, *, tokens):
        store_tokens(acc, scale, row_scales, out, start, rows, channel, tokens=tokens, width=self.n, gated=self.gated,
                     masked=self.n % self.rows != 0)

    def shift(self, layer, expert, h):
        """Words by which a tile's scales lie further on than the 16 bytes that TMA started at."""
        words = self.n * (self.k // 64) % 4
        if not self.flat or words == 0:
            return jnp.int32(0)
        return _rem(((layer * self.experts + expert) * self.halves + h) * words, 4)

    def add_step(self, acc, addresses, sm, tile, x_used, t, slot, i, at, q, wg):
        """q: the stage, where a turn is a round of the ring."""
        c, turn = self.config, self.turn
        chunks = c.chunks(t) if turn == 1 else 2
        groups = STEP // CHUNK // chunks
        use = tile.number * self.steps + at
        st = q if turn > 1 else sm.weights.stage(use)
        plgpu.barrier_wait(sm.weights.arriving(st))
        for g in range(groups):
            x_stage, x_first = st, g * chunks * t
            if not c.together:
                x_stage, x_first = sm.tokens.take(x_used + at * groups + g), 0
            acc = self.multiply(acc, addresses, sm.w_sm.at[st], sm.s_sm.at[slot()], sm.x_sm.at[x_stage, pl.ds(x_first, chunks * t)], i, wg,
                                first=g * chunks, chunks=chunks, tokens=t,
                                running=int(g + 1 < groups or q + 1 < turn) if turn > 1 else 0)
            if g == 0 and q > 0:  # the wgmmas of the step before are through
                sm.weights.release(q - 1)
            if not c.together:
                sm.tokens.release(x_stage)
        if q == turn - 1:
            sm.weights.release(st)
        return acc

    def multiply_tile(self, refs, sm, tile, early, shifts, scales, x_used, within, t, wg):
        """In token tile t, one of `computes`. scales: of the expert, and the tensor's, if rows have none of their own."""
        addresses = self.prepare(wg, shifts) if early is None else early
        slot = lambda b: sm.scales.stage(tile.number * self.scale_blocks + b)
        acc = self.over_steps(
            lambda b: plgpu.barrier_wait(sm.scales.arriving(slot(b))),
            lambda b, i, at, acc, q: self.add_step(acc, addresses, sm, tile, x_used, t, lambda: slot(b), i, at, q, wg),
            lambda b: sm.scales.release(slot(b)), self.zeros(t), turn=self.turn)
        first = within() * self.rows + wg * (64 // self.halves)
        expert_scale, common_scale = scales
        scale = expert_scale * jnp.float32(DECODE_FACTOR)
        row_scales = None
        if self.row_scaled:
            plgpu.barrier_wait(sm.row.arriving(tile.slot))
            row_scales = sm.table, tile.slot * self.at.second + _rem(tile.start, 4)
        else:
            scale = common_scale * scale
        self.store(acc, scale, row_scales, refs.out, tile.start, tile.rows, first, tokens=t)

    def consume_tile(self, refs, sm, early, cta, number, x_used, wg):
        c = self.config
        linear = cta + number * self.grid
        slot = sm.known.take(number)
        expert, start, rows, load = (sm.table[self.at.fields + slot * 4 + i] for i in range(4))
        tile = _Tile(number, slot, expert, start, rows, load)
        sm.known.release(slot)
        layer = refs.layer[0] if self.layers > 1 else 0
        # Fetched here, first used after the loop over K.
        scales = refs.global_scale[layer, expert], None if self.row_scaled else refs.row_scale[0]
        shifts = self.shift(layer, expert, 0), self.shift(layer, expert, self.halves - 1)
        run = lambda t: self.multiply_tile(refs, sm, tile, early, shifts, scales, x_used, lambda: _rem(linear, self.tiles), t, wg)
        if len(c.computes) == 1:
            run(c.computes[0])
        else:
            below = -1
            for t in c.computes:
                last = max(i for i, size in enumerate(c.tiles) if size <= t)
                pl.when((load > below) & (load <= last))(lambda t=t: run(t))
                below = last
        if self.row_scaled:
            sm.row.release(slot)
        return x_used + self.steps * self.x_stages_of(load)

    def consume(self, refs, sm, cta, wg):
        self.set_registers(register_budget(self.config.warpgroups, per_sm=self.config.per_sm)[0], "increase")
        # Once for all tiles, where registers allow.
        early = None if self.flat or self.config.crowd else self.prepare(wg, (jnp.int32(0),) * 2)
        plgpu.barrier_wait(sm.planned)
        lax.fori_loop(0, self.own_tiles(sm.table, cta), lambda number, x_used: self.consume_tile(refs, sm, early, cta, number, x_used, wg),
                      jnp.int32(0))

    # --- all together

    def body(self, *refs, w_full, w_empty, x_full, x_empty, s_full, s_empty, r_full, r_empty, m_full, m_empty, **shared):
        refs, r, wgs = Refs(*refs), self.layout, self.config.warpgroups
        wg, cta = lax.axis_index("wg"), lax.axis_index("sm")
        weights = Ring(w_full, w_empty, r.w_stages)
        sm = _Shared(
            known=Ring(m_full, m_empty, 2), weights=weights, tokens=weights if self.config.together else Ring(x_full, x_empty, r.x_stages),
            scales=Ring(s_full, s_empty, r.s_stages), row=Ring(r_full, r_empty, 2), **shared)
        pl.when(wg == wgs)(lambda: self.produce(refs, sm, cta))
        pl.when(wg < wgs)(lambda: self.consume(refs, sm, cta, wg))

    def scratch(self) -> dict:
        c, r, wgs = self.config, self.layout, self.config.warpgroups
        words = (self.scale_words,) if self.flat else (self.rows, r.scale_row // 4)
        return dict(
            w_sm=plgpu.SMEM((r.w_stages, r.rows, STEP // 8), jnp.int32, transforms=ROWS_128),
            s_sm=plgpu.SMEM((r.s_stages, self.halves, *words), jnp.int32, transforms=() if self.flat else scale_rows(r.scale_row)),
            x_sm=plgpu.SMEM((r.x_stages, c.x_rows, CHUNK), jnp.bfloat16, transforms=ROWS_128),
            table=plgpu.SMEM((self.at.words,), jnp.int32),
            w_full=plgpu.Barrier(num_arrivals=self.halves + self.most_chunks * c.together, num_barriers=r.w_stages),
            w_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.w_stages),
            x_full=plgpu.Barrier(num_arrivals=self.most_chunks, num_barriers=r.x_stages),
            x_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.x_stages),
            s_full=plgpu.Barrier(num_arrivals=self.halves * (self.scale_words // 256 if self.flat else 1), num_barriers=r.s_stages),
            s_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=r.s_stages),
            r_full=plgpu.Barrier(num_arrivals=max(1, len(self.scale_copies)), num_barriers=2),
            r_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2),
            planned=plgpu.Barrier(num_arrivals=1), m_full=plgpu.Barrier(num_arrivals=1, num_barriers=2),
            m_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2))

    def launch(self, width: int):
        return plgpu.kernel(
            self.body, out_type=jax.ShapeDtypeStruct((self.m, width), self.out_dtype), scratch_types=self.scratch(), grid=(self.grid,),
            grid_names=("sm",), num_threads=self.config.warpgroups + 1, thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))

    def build(self):
        """-> a function of the arrays of `Refs` but the last, which it returns."""
        return self.launch(self.n)
