"""More tokens, weights of few rows: wgmma, the slices of K side by side, one a CTA of a cluster.

    cluster: a tile of 64 * warpgroups weight rows by `tokens` tokens
        CTA p      slice p of K; warpgroup g owns weight rows 64 g .. 64 g + 63 and shares the tokens with the others

    shared memory, a stage of the ring     w i32 [rows, 32], s i32 [rows, 4], x bf16 [4, tokens, 64]: a step of 256 of K
    where two CTAs fit an SM               all steps are resident: warpgroup 0 starts all copies, nobody waits for room
    else                                   a producer warpgroup fills, `warpgroups` consumers take and release

    at the end     each CTA puts its sums where its tokens were (`done`: all its warpgroups have read them), f32 [tokens, rows + 4];
                   the cluster meets; CTA p finishes tokens [p * tokens / slices, ...) from all CTAs' sums, slice by slice;
                   the cluster meets again: no CTA leaves while another reads its sums
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
from nvfp4jax.kernels.hopper.dense_product import CHUNK, STEP, Product, Refs, chunks_at_once, finish_pair, load_bias, pitch
from nvfp4jax.kernels.hopper.machine import ROWS_128, SHARED_MEMORY, WARPGROUP, Hardware, register_budget
from nvfp4jax.kernels.hopper.mosaic import Memory, asm, gmem_address, inline, minimum, smem_address, thread_index
from nvfp4jax.kernels.hopper.ring import Ring

_MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


def _put_sums(acc, base, wg, rows):
    lane = lanes(False)
    row = wg * 64 + lane.warp * 16 + lane.weight_row
    target = base + (lane.quad * 2 * pitch(rows) + row) * 4
    for j, e in np.ndindex(len(acc), 2):
        asm(f"st.shared.v2.f32 [$0+{(8 * j + e) * pitch(rows) * 4}],{{$1,$2}};", [target, *acc[j, :, e]], "")


def _meet(acc, sums, p, wg, factor, row_scale, bias, bias_at, first_token, first, residual, out, *, c):
    """Puts this CTA's sums into shared memory, and finishes its share of the tokens from those of the whole cluster."""
    product, rows = c.product, c.rows
    base = smem_address(sums)
    _put_sums(acc, base, wg, rows)
    asm(_MEET, (), "")
    sources = [asm(f"mapa.shared::cluster.u32 $0,$1,{q};", [base], effects=False) for q in range(c.slices)]
    pairs, threads = rows // 2 * c.share, WARPGROUP * c.wgs
    for t in range(-(-pairs // threads)):
        index = thread_index() + t * threads
        inside = index < pairs
        safe = minimum(index, pairs - 1)
        token = p * c.share + safe // (rows // 2)
        row = safe % (rows // 2) * 2
        at = (token * pitch(rows) + row) * 4
        parts = [asm("ld.shared::cluster.v2.f32 {$0,$1},[$2];", [source + at], "ff") for source in sources]
        token = first_token + token
        inside = inside & (token < product.m)
        token = minimum(token, product.m - 1)
        of_row = gmem_address(row_scale, token * 4 if product.per_row else None)
        scale = asm("{.reg .f32 s; ld.global.nc.f32 s,[$1]; mul.rn.f32 $0,s,$2;}", [of_row, factor], "f")
        columns = [minimum(first + row + e, product.n - 1) for e in range(2)]
        biases = [None if product.bias_dtype is None else load_bias(bias, bias_at + column, product.bias_dtype) for column in columns]
        finish_pair(product, parts, token, first + row, inside, scale, biases, residual, out)
    asm(_MEET, (), "")


@dataclasses.dataclass(frozen=True)
class _Shared:
    """A CTA's shared memory."""

    w_sm: Any
    s_sm: Any
    x_sm: Any
    ring: Ring
    done: Any


@dataclasses.dataclass(frozen=True)
class _Place:
    """Of a CTA: its slice, its tiles of weight rows and of tokens, and the index of the layer, if there is one."""

    slice: Any
    row_tile: Any
    token_tile: Any
    layer: tuple


@dataclasses.dataclass(frozen=True)
class Split(Hardware):
    """wgs: warpgroups of 64 rows; tokens: the tile of M, a multiple of 8 that the slices divide."""

    product: Product
    slices: int
    wgs: int
    tokens: int

    def __post_init__(self):
        p = self.product
        if self.tokens % self.slices or self.stages < 2 and not self.resident:
            raise NotImplementedError(f"dense: no schedule for weights [{p.n}, {p.k}] at M={p.m}, tiles of {self.tokens} tokens")

    @property
    def rows(self) -> int:
        return 64 * self.wgs

    @property
    def rounds(self) -> int:
        """Steps of a slice."""
        return -(-self.product.steps // self.slices)

    @property
    def row_tiles(self) -> int:
        return -(-self.product.n // self.rows)

    @property
    def token_tiles(self) -> int:
        return -(-self.product.m // self.tokens)

    @property
    def box(self) -> int:
        """Bytes of a stage."""
        return self.rows * (STEP // 2 + 16) + self.tokens * STEP * 2

    @property
    def resident(self) -> bool:
        """Two CTAs an SM, each with all of its slice."""
        return self.rounds * self.box <= SHARED_MEMORY // 2 - 2048

    @property
    def stages(self) -> int:
        return self.rounds if self.resident else min(8, (SHARED_MEMORY - 2048) // self.box)

    @property
    def share(self) -> int:
        """Tokens whose sums a CTA finishes."""
        return self.tokens // self.slices

    # --- copies

    def fetch(self, refs, sm, at, i, stage):
        step, own = at.slice * self.rounds + i, pl.ds(at.row_tile * self.rows, self.rows)
        full = sm.ring.arriving(stage)
        plgpu.copy_gmem_to_smem(refs.w.at[(*at.layer, own, pl.ds(step * (STEP // 8), STEP // 8))], sm.w_sm.at[stage], full)
        plgpu.copy_gmem_to_smem(refs.s.at[(*at.layer, own, pl.ds(step * 4, 4))], sm.s_sm.at[stage], full)
        for c in range(STEP // CHUNK):
            source = refs.x.at[pl.ds(at.token_tile * self.tokens, self.tokens), pl.ds(step * STEP + c * CHUNK, CHUNK)]
            plgpu.copy_gmem_to_smem(source, sm.x_sm.at[stage, c], full)

    def produce(self, refs, sm, at):
        self.set_registers(register_budget(self.wgs)[1], "decrease")

        @pl.loop(0, self.rounds)
        def _(i):
            self.fetch(refs, sm, at, i, sm.ring.fill(i))

        self.drain(sm.ring, self.rounds)

    # --- products

    def prepare(self, wg):
        return fragment_addresses(wg, scale_row=16)

    def multiply(self, acc, addresses, sm, stage, wg):
        chunks = chunks_at_once(self.tokens)
        for c in range(0, STEP // CHUNK, chunks):
            acc = multiply_decoded(
                acc, addresses, sm.w_sm.at[stage], sm.s_sm.at[stage], sm.x_sm.at[stage, pl.ds(c, chunks)], jnp.int32(0),
                first=c, chunks=chunks, tokens=self.tokens, scale_row=16)
        return acc

    def finish(self, acc, refs, sm, at, wg):
        plgpu.barrier_arrive(sm.done)
        plgpu.barrier_wait(sm.done)  # all warpgroups have read their tokens
        p = self.product
        factor = refs.global_scale[refs.layer[0] if p.stacked else 0] * DECODE_FACTOR
        bias_at = refs.layer[0] * p.n if p.bias_stacked else jnp.int32(0)
        inline(functools.partial(_meet, c=self), acc, Memory(sm.x_sm, ROWS_128), at.slice, wg, factor, Memory(refs.row_scale),
               Memory(refs.bias), bias_at, at.token_tile * self.tokens, at.row_tile * self.rows, Memory(refs.residual), Memory(refs.out))

    def consume(self, refs, sm, at, wg):
        if not self.resident:
            self.set_registers(register_budget(self.wgs)[0], "increase")
        acc = self.zeros(self.tokens)
        addresses = self.prepare(wg)

        def step(i, acc):
            stage = i if self.resident else sm.ring.stage(i)
            plgpu.barrier_wait(sm.ring.arriving(stage))
            acc = self.multiply(acc, addresses, sm, stage, wg)
            if not self.resident:
                sm.ring.release(stage)
            return acc

        self.finish(lax.fori_loop(0, self.rounds, step, acc), refs, sm, at, wg)

    # --- all together

    def body(self, *refs, **scratch):
        self.run(Refs(*refs), lax.axis_index("tile"), **scratch)

    def run(self, refs, tile, *, full, empty, **shared):
        """A CTA's work. tile: of `ctas`."""
        sm = _Shared(ring=Ring(full, empty, self.stages), **shared)
        wg, p = lax.axis_index("wg"), lax.axis_index("slice")
        row_tile, token_tile = lax.div(tile, jnp.int32(self.token_tiles)), lax.rem(tile, jnp.int32(self.token_tiles))
        at = _Place(p, row_tile, token_tile, (refs.layer[0],) if self.product.stacked else ())
        if self.resident:
            @pl.when(wg == 0)
            def _():
                for i in range(self.rounds):
                    self.fetch(refs, sm, at, i + p * 0, i)  # jax 0.12 refuses static slices that reach past the end
        else:
            pl.when(wg == self.wgs)(lambda: self.produce(refs, sm, at))
        pl.when(wg < self.wgs)(lambda: self.consume(refs, sm, at, wg))

    def scratch(self) -> dict:
        x_stages = max(self.stages, -(-pitch(self.rows) * 4 // (STEP * 2)))  # the sums take the place of the tokens
        return dict(
            w_sm=plgpu.SMEM((self.stages, self.rows, STEP // 8), jnp.int32, transforms=ROWS_128),
            s_sm=plgpu.SMEM((self.stages, self.rows, STEP // 64), jnp.int32),
            x_sm=plgpu.SMEM((x_stages, STEP // CHUNK, self.tokens, CHUNK), jnp.bfloat16, transforms=ROWS_128),
            full=plgpu.Barrier(num_arrivals=2 + STEP // CHUNK, num_barriers=self.stages),
            empty=plgpu.Barrier(num_arrivals=self.wgs, num_barriers=self.stages), done=plgpu.Barrier(num_arrivals=self.wgs))

    @property
    def ctas(self) -> int:
        """Clusters."""
        return self.row_tiles * self.token_tiles

    def axes(self, ctas: int) -> dict:
        return dict(grid=(ctas,), grid_names=("tile",), cluster=(self.slices,), cluster_names=("slice",))

    def launch(self, body, out_type, ctas: int):
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=self.scratch(), num_threads=self.wgs + (not self.resident), thread_name="wg",
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True), **self.axes(ctas))

    def build(self):
        """-> a function of the arrays of `Refs` but the last, which it returns."""
        return self.launch(self.body, self.product.out_type, self.ctas)
