"""Many tokens, or many rows of weights: wgmma, persistent CTAs, the slices of K one after another.

A CTA an SM walks over tiles of 64 * warpgroups weight rows by `tokens` tokens:

    warpgroup 0 .. wgs - 1    consumers: warpgroup g owns weight rows 64 g .. 64 g + 63 of the tile, decodes them in its registers and
                              shares the tokens with the others
    warpgroup wgs             the producer: TMA into three rings

    ring      a stage holds                                        filled            released
    steps     w i32 [rows, 32], x bf16 [4, tokens, 64]: 256 of K   a step of K       when a warpgroup's wgmmas of the step are through
    scales    s i32 [rows, 32]: 2048 of K (`blocked`)              every 8 steps     with the last of its steps
    row       f32 [tokens], the row scales of a tile (`per_row`)   a tile            when the tile's results are scaled

Of several weights that read the same tokens, a CTA walks over its tiles of each in turn, and the rings go on: the first steps of a
weight are fetched while the last tile of the one before is computed, and only the last wave of all tiles leaves SMs idle.

With many tokens scales come with each step instead, in the ring of steps: TMA takes about 2 cycles for each row of a box, however
short, but then the tensor cores are the limit, and shared memory is short.

`paired`: the two CTAs of a cluster own neighbouring tiles of rows and the same tokens; each fetches half of the tokens for both, so
a stage is filled only when both CTAs have released it (`x_free`).
"""
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper.decode import DECODE_FACTOR, fragment_addresses, lanes, multiply_decoded
from nvfp4jax.kernels.hopper.dense_product import CHUNK, SCALE_STEPS, STEP, Product, Refs, chunks_at_once, load_bias, scaled
from nvfp4jax.kernels.hopper.epilogue import store_tokens
from nvfp4jax.kernels.hopper.machine import ROWS_128, SHARED_MEMORY, SMS, Hardware, register_budget
from nvfp4jax.kernels.hopper.mosaic import Memory, asm, inline, minimum, settled, smem_address
from nvfp4jax.kernels.hopper.ring import Ring


def _scale(acc, factor, row_scales, slot, bias, bias_at, channel, *, c):
    """acc * (row_scale * factor) + bias, before `store_tokens`."""
    p, lane = c.product, lanes(False)
    channel = channel + (lane.warp * 16 + lane.weight_row)
    biases = [None if p.bias_dtype is None else load_bias(bias, bias_at + minimum(channel + h, p.n - 1), p.bias_dtype) for h in range(2)]
    scales_at = smem_address(row_scales, (slot * c.scale_pitch + lane.quad * 2) * 4)
    out = np.empty_like(acc)
    for j in range(len(acc)):
        scales = [factor] * 2
        if p.per_row:
            pair = asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{32 * j}];", [scales_at], "ff")
            scales = [asm("mul.rn.f32 $0,$1,$2;", [v, factor], "f", effects=False) for v in pair]
        for h in range(2):
            out[j, h] = [scaled(v, scales[e], biases[h]) for e, v in enumerate(settled(acc[j, h]))]
    return out


@dataclasses.dataclass(frozen=True)
class _Shared:
    """A CTA's shared memory."""

    w_sm: Any
    s_sm: Any
    x_sm: Any
    r_sm: Any
    steps: Ring
    scales: Ring
    row: Ring
    x_free: Any


@dataclasses.dataclass(frozen=True)
class _Tile:
    """number: how many tiles this CTA has done before."""

    number: Any
    row_tile: Any
    token_tile: Any


@dataclasses.dataclass(frozen=True)
class _Share:
    """A CTA's tiles of a weight: `first`, and each `ctas`-th from there on."""

    first: Any
    ctas: int


@dataclasses.dataclass(frozen=True)
class Wide(Hardware):
    """wgs: warpgroups of 64 rows that share the tokens; tokens: the tile of M, a multiple of 8."""

    product: Product
    slices: int
    wgs: int
    tokens: int
    paired: bool

    def __post_init__(self):
        p = self.product
        if self.stages < 2:
            raise NotImplementedError(f"dense: no schedule for weights [{p.n}, {p.k}] at M={p.m}, tiles of {self.tokens} tokens")

    @property
    def rows(self) -> int:
        return 64 * self.wgs

    @property
    def width(self) -> int:
        """CTAs that share their tokens."""
        return 2 if self.paired else 1

    @property
    def row_tiles(self) -> int:
        """Of the pair."""
        return -(-self.product.n // (self.rows * self.width))

    @property
    def token_tiles(self) -> int:
        return -(-self.product.m // self.tokens)

    @property
    def tiles(self) -> int:
        return self.row_tiles * self.token_tiles

    @property
    def blocked(self) -> bool:
        """Whether scales come 128 bytes a row (2048 of K) at a time."""
        return self.tokens <= 32

    @property
    def scale_row(self) -> int:
        """Bytes of a row of scales in shared memory."""
        return 128 if self.blocked else 16

    @property
    def blocks(self) -> int:
        return -(-self.product.steps // SCALE_STEPS)

    @property
    def stages(self) -> int:
        box = self.rows * STEP // 2 + self.tokens * STEP * 2 + (0 if self.blocked else self.rows * 16)
        return min(8, (SHARED_MEMORY - 2048 - (2 * self.rows * 128 if self.blocked else 0)) // box)

    @property
    def scale_pitch(self) -> int:
        """Floats of a tile's row scales: TMA writes to multiples of 128 bytes."""
        return -(-self.tokens // 32) * 32

    def tile_at(self, number, linear, zero) -> _Tile:
        """Tiles in a snake, so that those at work at one time share weights and tokens in the L2."""
        if self.token_tiles == 1:
            row_tile, token_tile = linear, zero
        else:
            shape = self.row_tiles, self.token_tiles
            row_tile, token_tile = plgpu.planar_snake(linear, shape, 0, min(12 // self.width, self.row_tiles))
        return _Tile(number, row_tile * 2 + lax.axis_index("pair") if self.paired else row_tile, token_tile)

    def each_tile(self, share, number, work):
        """work(tile) for each tile of this CTA, which has done `number` before; -> how many it has done now."""
        def step(i, carry):
            zero = share.first * 0  # jax 0.12 refuses static slices that reach past the end
            work(self.tile_at(number + i, share.first + i * share.ctas, zero))
            return carry

        count = lax.div(self.tiles + share.ctas - 1 - share.first, jnp.int32(share.ctas))
        lax.fori_loop(0, count, step, None)
        return number + count

    # --- copies

    def fetch_scales(self, refs, sm, layer, own, tile, i):
        """In front of the first step of a block."""
        block = tile.number * self.blocks + lax.div(i, jnp.int32(SCALE_STEPS))
        slot = sm.scales.stage(block)

        @pl.when(lax.rem(i, jnp.int32(SCALE_STEPS)) == 0)
        def _():
            sm.scales.fill(block)
            plgpu.copy_gmem_to_smem(refs.s.at[(*layer, own, pl.ds(i * 4, 32))], sm.s_sm.at[slot], sm.scales.arriving(slot))

    def fetch_tokens(self, refs, sm, tile, i, use, stage):
        if self.paired:  # both CTAs must have released the stage
            @pl.when(use >= self.stages)
            def _():
                plgpu.barrier_arrive(sm.x_free.at[stage])
                plgpu.barrier_wait(sm.x_free.at[stage])

        for c in range(STEP // CHUNK):
            source = refs.x.at[pl.ds(tile.token_tile * self.tokens, self.tokens), pl.ds(i * STEP + c * CHUNK, CHUNK)]
            plgpu.copy_gmem_to_smem(source, sm.x_sm.at[stage, c], sm.steps.arriving(stage), collective_axes="pair" if self.paired else None)

    def fetch_tile(self, refs, sm, tile):
        layer = (refs.layer[0],) if self.product.stacked else ()
        own, steps = pl.ds(tile.row_tile * self.rows, self.rows), self.product.steps
        slot = sm.row.stage(tile.number)

        @pl.loop(0, steps)
        def _(i):
            use = tile.number * steps + i
            if self.blocked:
                self.fetch_scales(refs, sm, layer, own, tile, i)
            stage = sm.steps.fill(use)
            full = sm.steps.arriving(stage)
            plgpu.copy_gmem_to_smem(refs.w.at[(*layer, own, pl.ds(i * (STEP // 8), STEP // 8))], sm.w_sm.at[stage], full)
            if not self.blocked:
                plgpu.copy_gmem_to_smem(refs.s.at[(*layer, own, pl.ds(i * 4, 4))], sm.s_sm.at[stage], full)
            self.fetch_tokens(refs, sm, tile, i, use, stage)

        if self.product.per_row:  # last, for they are used last
            sm.row.fill(tile.number)
            source = refs.row_scale.at[pl.ds(tile.token_tile * self.tokens, self.tokens)]
            plgpu.copy_gmem_to_smem(source, sm.r_sm.at[slot, pl.ds(0, self.tokens)], sm.row.arriving(slot))

    def produce(self, refs, sm, share, number):
        return self.each_tile(share, number, lambda tile: self.fetch_tile(refs, sm, tile))

    def drain_rings(self, sm, number):
        self.drain(sm.steps, number * self.product.steps)
        if self.product.per_row:
            self.drain(sm.row, number)
        if self.blocked:
            self.drain(sm.scales, number * self.blocks)

    # --- products

    def prepare(self, wg):
        return fragment_addresses(wg, scale_row=self.scale_row)

    def multiply(self, acc, addresses, sm, stage, scales, unit, wg):
        chunks = chunks_at_once(self.tokens)
        for c in range(0, STEP // CHUNK, chunks):
            acc = multiply_decoded(acc, addresses, sm.w_sm.at[stage], scales, sm.x_sm.at[stage, pl.ds(c, chunks)], unit, first=c,
                                   chunks=chunks, tokens=self.tokens, scale_row=self.scale_row)
        return acc

    def add_step(self, acc, addresses, sm, tile, i, wg):
        use = tile.number * self.product.steps + i
        stage = sm.steps.stage(use)
        if self.blocked:
            slot = sm.scales.stage(tile.number * self.blocks + lax.div(i, jnp.int32(SCALE_STEPS)))
            unit = lax.rem(i, jnp.int32(SCALE_STEPS))
            pl.when(unit == 0)(lambda: plgpu.barrier_wait(sm.scales.arriving(slot)))
            scales = sm.s_sm.at[slot]
        else:
            unit, scales = jnp.int32(0), sm.s_sm.at[stage]
        plgpu.barrier_wait(sm.steps.arriving(stage))
        acc = self.multiply(acc, addresses, sm, stage, scales, unit, wg)
        sm.steps.release(stage)
        if self.blocked:
            last = (unit == SCALE_STEPS - 1) | (i == self.product.steps - 1)
            pl.when(last)(lambda: sm.scales.release(slot))
        return acc

    def sum_over_k(self, addresses, sm, tile, wg):
        steps = self.product.steps
        slice_steps = -(-steps // self.slices)

        def slice_sum(first, last):
            return lax.fori_loop(first, last, lambda i, acc: self.add_step(acc, addresses, sm, tile, i, wg), self.zeros(self.tokens))

        if self.slices == 1:
            return slice_sum(0, steps)

        def add_slice(p, total):  # from left to right
            return total + slice_sum(p * slice_steps, jnp.minimum((p + 1) * slice_steps, steps))

        return lax.fori_loop(1, -(-steps // slice_steps), add_slice, slice_sum(0, slice_steps))

    def finish(self, acc, factor, row, channel, slot, refs, sm):
        p = self.product
        bias_at = refs.layer[0] * p.n if p.bias_stacked else jnp.int32(0)
        acc = inline(functools.partial(_scale, c=self), acc, factor, Memory(sm.r_sm), slot, Memory(refs.bias), bias_at,
                     channel, returns=(64, self.tokens))
        store_tokens(acc, jnp.float32(1), None, refs.out, row, p.m - row, channel, tokens=self.tokens, width=p.n,
                     masked=p.n % (self.rows * self.width) != 0, residual=refs.residual if p.residual else None)

    def factor(self, refs):
        """What multiplies all of a weight's sums."""
        factor = refs.global_scale[refs.layer[0] if self.product.stacked else 0] * DECODE_FACTOR
        return factor if self.product.per_row else refs.row_scale[0] * factor

    def consume(self, refs, sm, wg, addresses, factor, share, number):
        p = self.product

        def work(tile):
            slot = sm.row.stage(tile.number)
            acc = self.sum_over_k(addresses, sm, tile, wg)
            row, channel = tile.token_tile * self.tokens, tile.row_tile * self.rows + wg * 64
            if p.per_row:
                plgpu.barrier_wait(sm.row.arriving(slot))
            self.finish(acc, factor, row, channel, slot, refs, sm)
            if p.per_row:
                sm.row.release(slot)

        return self.each_tile(share, number, work)

    # --- all together

    def scratch(self) -> dict:
        stages, wgs = self.stages, self.wgs
        out = dict(
            w_sm=plgpu.SMEM((stages, self.rows, STEP // 8), jnp.int32, transforms=ROWS_128),
            s_sm=(plgpu.SMEM((2, self.rows, 32), jnp.int32, transforms=ROWS_128) if self.blocked else
                  plgpu.SMEM((stages, self.rows, STEP // 64), jnp.int32)),
            x_sm=plgpu.SMEM((stages, STEP // CHUNK, self.tokens, CHUNK), jnp.bfloat16, transforms=ROWS_128),
            r_sm=plgpu.SMEM((2, self.scale_pitch), jnp.float32),
            r_full=plgpu.Barrier(num_barriers=2), r_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2),
            full=plgpu.Barrier(num_arrivals=STEP // CHUNK + (1 if self.blocked else 2), num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            s_full=plgpu.Barrier(num_barriers=2), s_empty=plgpu.Barrier(num_arrivals=wgs, num_barriers=2))
        if self.paired:
            out["x_free"] = plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=stages)
        return out

    def build(self):
        """-> a function of the arrays of `Refs` but the last, which it returns."""
        def body(*refs, **scratch):
            walk((self,), (Refs(*refs),), **scratch)

        return launch((self,), body, self.product.out_type)


def _ctas(kernels) -> int:
    """Of a launch: one an SM, or pairs of them."""
    return min(SMS // kernels[0].width, sum(kernel.tiles for kernel in kernels))


def walk(kernels, refs, *, full, empty, s_full, s_empty, r_full, r_empty, x_free=None, **shared):
    """A CTA's work: its share of the tiles of each weight. The kernels differ in N and the bias alone."""
    common, ctas, before, shares = kernels[0], _ctas(kernels), 0, []
    sm = _Shared(steps=Ring(full, empty, common.stages), scales=Ring(s_full, s_empty, 2), row=Ring(r_full, r_empty, 2),
                 x_free=x_free, **shared)
    wg, index = lax.axis_index("wg"), lax.axis_index("sm")
    for kernel in kernels:  # the CTA after that of a weight's last tile begins the next weight
        shares.append(_Share(lax.rem(index + -before % ctas, jnp.int32(ctas)), ctas))
        before += kernel.tiles

    @pl.when(wg == common.wgs)
    def _():
        common.set_registers(register_budget(common.wgs)[1], "decrease")
        number = jnp.int32(0)
        for kernel, own, share in zip(kernels, refs, shares):
            number = kernel.produce(own, sm, share, number)
        common.drain_rings(sm, number)

    @pl.when(wg < common.wgs)
    def _():
        common.set_registers(register_budget(common.wgs)[0], "increase")
        addresses, number = common.prepare(wg), jnp.int32(0)
        factors = [kernel.factor(own) for kernel, own in zip(kernels, refs)]  # all now: between two weights they would be waited for
        for kernel, own, factor, share in zip(kernels, refs, factors, shares):
            number = kernel.consume(own, sm, wg, addresses, factor, share, number)


def launch(kernels, body, out_type):
    """body(*refs, **scratch) of `walk` as a function of arrays."""
    common = kernels[0]
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=common.scratch(), grid=(_ctas(kernels),), grid_names=("sm",),
        num_threads=common.wgs + 1, thread_name="wg", **(dict(cluster=(2,), cluster_names=("pair",)) if common.paired else {}),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))
