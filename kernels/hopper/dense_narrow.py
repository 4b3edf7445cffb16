"""Few tokens, weights of few rows: mma.sync, every warp on its own slice of K.

A CTA owns 16 * tiles weight rows, a tile of tokens and all of K. Warp w owns 16-row tile w % tiles of slice w // tiles:

                     slice 0        slice 1      ...        x, of the same slices: all tiles of rows read it
    rows  0..15      warp 0         warp tiles              bf16 [tokens, 64] a 64-chunk
    rows 16..31      warp 1         warp tiles + 1
      ...                                                   w i32 [rows, 32], s i32 [rows, 4] a step of 256
                       |              |
    sums in shared memory, f32 [slices, tokens, rows + 4]   ->   added from left to right by all threads, stored

So that all SMs and all warps have work. What lies in shared memory at once (`memory`):

    "all"      all of K. Warpgroup 0 starts every copy of weights, the last those of scales and tokens; nobody waits for room.
    "weights"  all weights and scales, so fetched, and a ring of tokens, a stage a 64-chunk of each slice, filled by a producer.
    "steps"    a ring of both, a stage a step of each slice, filled by a producer.

`full` has a barrier for each (stage, slice): a warpgroup waits for the slices of its own four warps; in "weights" each warp for
its own alone. `done`: all warpgroups have put their sums.
"""
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import dense_narrow_thread as thread
from nvfp4jax.kernels.hopper.dense_narrow_thread import CHUNKS
from nvfp4jax.kernels.hopper.dense_product import CHUNK, SCALE_STEPS, STEP, Factors, Product, Refs, Tile, fetch_factors, pitch
from nvfp4jax.kernels.hopper.machine import ROWS_128, SHARED_MEMORY, WARPGROUP, Hardware, swizzled
from nvfp4jax.kernels.hopper.mosaic import Memory, inline
from nvfp4jax.kernels.hopper.ring import Ring

_BARRIERS = 32  # the most that Mosaic takes in an array


def memory_plan(k: int, tokens: int, slices: int, tiles: int) -> tuple[str, int]:
    """`memory`, and in how many stages; ("", 0): the kernel cannot run."""
    rows = 16 * tiles
    rounds = -(-(-(-k // STEP)) // slices)
    box, chunk = rows * STEP // 2 + tokens * STEP * 2, slices * tokens * 128
    room = SHARED_MEMORY - 2048 - slices * tokens * pitch(rows) * 4
    weights = rounds * slices * rows * STEP // 2 + -(-rounds * slices // SCALE_STEPS) * rows * 128
    if weights + rounds * slices * tokens * STEP * 2 <= room:
        return "all", rounds
    steps = min(8, room // (slices * (box + rows * 16)))
    chunks = min(8, _BARRIERS // slices, (room - weights) // chunk)
    if steps < 2 and chunks >= 2 and rounds * slices <= _BARRIERS:
        return "weights", chunks
    return ("steps", steps) if steps >= 2 else ("", 0)


@dataclasses.dataclass(frozen=True)
class _Shared:
    """A CTA's shared memory. weights: full, one barrier a (round, slice), where the weights have barriers of their own."""

    w_sm: Any
    s_sm: Any
    x_sm: Any
    partial: Any
    ring: Ring
    weights: Ring
    s_full: Any
    done: Any


@dataclasses.dataclass(frozen=True)
class _Place:
    """Of a CTA: its first token and weight row, the index of the layer, if there is one, and a 0 that is not static: jax 0.12 refuses
    static slices that reach past the end."""

    token: Any
    first: Any
    layer: tuple
    zero: Any


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Of a thread, before its data arrive."""

    factors: Factors
    addresses: thread.Addresses
    own_slice: Any  # in "weights", an index of barriers that is another for the warps of a warpgroup: each waits for its own


@dataclasses.dataclass(frozen=True)
class Narrow(Hardware):
    """tiles: 16-row tiles of a CTA; tokens: the tile of M, a multiple of 8."""

    product: Product
    slices: int
    tiles: int
    tokens: int

    def __post_init__(self):
        p = self.product
        if self.tiles * self.slices % 4 or self.tiles * self.slices > 24 or not self.stages:
            raise NotImplementedError(f"dense: no schedule for weights [{p.n}, {p.k}] at M={p.m}")

    @property
    def rows(self) -> int:
        return 16 * self.tiles

    @property
    def warpgroups(self) -> int:
        return self.tiles * self.slices // 4

    @property
    def token_tiles(self) -> int:
        return -(-self.product.m // self.tokens)

    @property
    def rounds(self) -> int:
        """Steps of a slice."""
        return -(-self.product.steps // self.slices)

    @property
    def scale_blocks(self) -> int:
        return -(-self.rounds * self.slices // SCALE_STEPS)

    @property
    def memory(self) -> str:
        return memory_plan(self.product.k, self.tokens, self.slices, self.tiles)[0]

    @property
    def stages(self) -> int:
        return memory_plan(self.product.k, self.tokens, self.slices, self.tiles)[1]

    @property
    def resident(self) -> bool:
        """The weights are."""
        return self.memory != "steps"

    @property
    def x_tiled(self) -> bool:
        """x by whole 8-row groups in one copy where M allows it, else a 64-chunk a copy: the same bytes in another order."""
        return (self.product.m <= 8 or self.product.m % 8 == 0) and self.memory != "weights"

    @property
    def slice_bytes(self) -> int:
        """Of tokens in a stage."""
        return self.tokens * (CHUNK if self.memory == "weights" else STEP) * 2

    @property
    def tile(self) -> Tile:
        return Tile(self.product, self.rows, self.tokens, WARPGROUP * self.warpgroups)

    # --- copies

    def fetch_weights(self, refs, sm, at, i, stage):
        for p in range(self.slices):
            source = refs.w.at[(*at.layer, pl.ds(at.first, self.rows), pl.ds((p * self.rounds + i + at.zero) * (STEP // 8), STEP // 8))]
            plgpu.copy_gmem_to_smem(source, sm.w_sm.at[stage, p], sm.weights.arriving(stage, p))

    def fetch_tokens(self, refs, sm, at, i, stage):
        own = pl.ds(at.token, self.tokens)
        for p in range(self.slices):
            start, target, barrier = (p * self.rounds + i + at.zero) * STEP, sm.x_sm.at[stage, p], sm.ring.arriving(stage, p)
            if self.x_tiled:
                plgpu.copy_gmem_to_smem(refs.x.at[own, pl.ds(start, STEP)], target, barrier)
            else:
                for c in range(CHUNKS):
                    plgpu.copy_gmem_to_smem(refs.x.at[own, pl.ds(start + c * CHUNK, CHUNK)], target.at[c], barrier)

    def fetch_resident(self, refs, sm, at, wg):
        @pl.when(wg == 0)
        def _():
            for i in range(self.rounds):
                self.fetch_weights(refs, sm, at, i, i)

        @pl.when(wg == self.warpgroups - 1)
        def _():
            own = pl.ds(at.first, self.rows)
            for b in range(self.scale_blocks):
                plgpu.copy_gmem_to_smem(refs.s.at[(*at.layer, own, pl.ds(b * 32 + at.zero, 32))], sm.s_sm.at[b], sm.s_full)
            if self.memory == "all":
                for i in range(self.rounds):
                    self.fetch_tokens(refs, sm, at, i, i)

    def produce_tokens(self, refs, sm, at):
        """The producer of "weights"."""
        @pl.loop(0, self.rounds * CHUNKS)
        def _(c):
            stage = sm.ring.fill(c)
            for p in range(self.slices):
                source = refs.x.at[pl.ds(at.token, self.tokens), pl.ds((p * self.rounds * CHUNKS + c) * CHUNK, CHUNK)]
                plgpu.copy_gmem_to_smem(source, sm.x_sm.at[stage, p], sm.ring.arriving(stage, p))

    def produce_steps(self, refs, sm, at):
        """The producer of "steps"."""
        @pl.loop(0, self.rounds)
        def _(i):
            stage = sm.ring.fill(i)
            self.fetch_weights(refs, sm, at, i, stage)
            for p in range(self.slices):
                source = refs.s.at[(*at.layer, pl.ds(at.first, self.rows), pl.ds((p * self.rounds + i) * 4, 4))]
                plgpu.copy_gmem_to_smem(source, sm.s_sm.at[stage, p], sm.ring.arriving(stage, p))
            self.fetch_tokens(refs, sm, at, i, stage)

        self.drain(sm.ring, self.rounds)

    # --- products

    def prepare(self, refs, sm, at) -> _Prepared:
        factors = fetch_factors(self.tile, refs, at.token, at.first)
        program = functools.partial(thread.addresses, c=self)
        memories = (Memory(sm.w_sm, ROWS_128), Memory(sm.s_sm, ROWS_128 if self.resident else ()),
                    Memory(sm.x_sm, self.x_transforms), Memory(sm.partial))
        out = inline(program, *memories, returns=5 + (self.rounds if self.resident else 1))
        own_slice = None
        if self.memory == "weights":
            own_slice = inline(lambda: thread.place(self.tiles)[-1], returns="scalar")
        return _Prepared(factors, thread.Addresses(out[0], out[1:3], out[3:5], out[5:]), own_slice)

    def add_round(self, acc, i, stage, prepared, sm, wg):
        """One step of the warp's slice: 16 weight rows x 256 of K, four mma for each 64 and 8 tokens."""
        at = prepared.addresses
        program = functools.partial(thread.add_round, c=self, i=i)
        return inline(program, acc, jnp.int32(0 if self.resident else stage), *at.codes, *at.tokens, at.scales[i if self.resident else 0],
                      returns=(64, self.tokens))

    def decode_chunk(self, i, u, prepared):
        """A 64-chunk of weights that lie in shared memory as a whole."""
        at = prepared.addresses
        program = functools.partial(thread.decode_chunk, u=u, w_at=i * self.slices * self.rows * 128)
        return inline(program, *at.codes, at.scales[i], returns=16)

    def add_chunk(self, acc, i, u, stage, decoded, prepared, sm, wg):
        """A decoded 64-chunk times the tokens of a stage."""
        program = functools.partial(thread.add_chunk, x_at=stage * self.slices * self.slice_bytes)
        return inline(program, acc, *prepared.addresses.tokens, *decoded, returns=(64, self.tokens))

    def finish(self, acc, prepared, refs, sm, at, wg):
        inline(functools.partial(thread.put_sums, rows=self.rows), acc, prepared.addresses.sums, Memory(sm.partial))
        plgpu.barrier_arrive(sm.done)
        plgpu.barrier_wait(sm.done)
        program = functools.partial(thread.finish, tile=self.tile, slices=self.slices)
        f = prepared.factors
        inline(program, at.token, at.first, Memory(refs.residual), Memory(refs.out), Memory(sm.partial), f.global_scale, *f.row_scales, *f.biases)

    def wait(self, ring: Ring, stage, own_slice, wg):
        """Until the stage holds the slice of this warp, or those of all this warpgroup's warps."""
        if own_slice is not None:
            plgpu.barrier_wait(ring.arriving(stage, own_slice))
            return
        least, most = (lax.div(wg * 4 + w, jnp.int32(self.tiles)) for w in (0, 3))
        for d in range(min(3 // self.tiles + 2, 4)):
            pl.when(least + d <= most)(lambda d=d: plgpu.barrier_wait(ring.full.at[stage * self.slices + least + d]))

    def multiply_all(self, acc, prepared, sm, wg):
        for i in range(self.rounds):
            self.wait(sm.ring, i, None, wg)
            acc = self.add_round(acc, i, i, prepared, sm, wg)
        return acc

    def multiply_chunks(self, acc, prepared, sm, wg):
        """In "weights": a chunk is decoded before its tokens have come, and beside the products of the chunk before."""
        total = self.rounds * CHUNKS
        for c in range(total):
            (i, u), stage = divmod(c, CHUNKS), sm.ring.stage(c)
            if u == 0:
                self.wait(sm.weights, i, prepared.own_slice, wg)
            decoded = self.decode_chunk(i, u, prepared)
            self.wait(sm.ring, stage, prepared.own_slice, wg)
            acc = self.add_chunk(acc, i, u, stage, decoded, prepared, sm, wg)
            if c + self.stages < total:
                sm.ring.release(stage)
        return acc

    def multiply_steps(self, acc, prepared, sm, wg):
        def step(i, acc):
            stage = sm.ring.stage(i)
            self.wait(sm.ring, stage, None, wg)
            acc = self.add_round(acc, i, stage, prepared, sm, wg)
            sm.ring.release(stage)
            return acc

        return lax.fori_loop(0, self.rounds, step, acc)

    # --- all together

    def body(self, *refs, **scratch):
        self.run(Refs(*refs), lax.axis_index("tile"), **scratch)

    def run(self, refs, tile, *, full, empty, w_full=None, **shared):
        """A CTA's work. tile: of `ctas`; those of the same weights are neighbours."""
        ring = Ring(full, empty, self.stages, self.slices)
        sm = _Shared(ring=ring, weights=ring if w_full is None else Ring(w_full, None, self.rounds, self.slices), **shared)
        wg = lax.axis_index("wg")
        token = lax.rem(tile, jnp.int32(self.token_tiles)) * self.tokens
        first = lax.div(tile, jnp.int32(self.token_tiles)) * self.rows
        at = _Place(token, first, (refs.layer[0],) if self.product.stacked else (), tile * 0)
        if self.resident:
            self.fetch_resident(refs, sm, at, wg)
        if self.memory != "all":
            pl.when(wg == self.warpgroups)(
                lambda: (self.produce_tokens if self.memory == "weights" else self.produce_steps)(refs, sm, at))

        @pl.when(wg < self.warpgroups)
        def _():
            prepared = self.prepare(refs, sm, at)
            acc = self.zeros(self.tokens)  # each warp's sums of 16 rows stand as its 16 rows
            if self.resident:
                plgpu.barrier_wait(sm.s_full)
            multiply = {"all": self.multiply_all, "weights": self.multiply_chunks, "steps": self.multiply_steps}[self.memory]
            self.finish(multiply(acc, prepared, sm, wg), prepared, refs, sm, at, wg)

    @property
    def x_transforms(self) -> tuple:
        return swizzled(2) if self.x_tiled else ROWS_128

    def scratch(self) -> dict:
        count = self.stages * self.slices
        w_stages = self.rounds if self.resident else self.stages
        if self.memory == "weights":
            x_box, copies = (self.tokens, CHUNK), 1
        else:
            x_box, copies = ((self.tokens, STEP), 1) if self.x_tiled else ((CHUNKS, self.tokens, CHUNK), CHUNKS)
        copies += {"all": 1, "weights": 0, "steps": 2}[self.memory]  # weights, and scales
        out = dict(
            w_sm=plgpu.SMEM((w_stages, self.slices, self.rows, STEP // 8), jnp.int32, transforms=ROWS_128),
            s_sm=(plgpu.SMEM((self.scale_blocks, self.rows, 32), jnp.int32, transforms=ROWS_128) if self.resident else
                  plgpu.SMEM((self.stages, self.slices, self.rows, STEP // 64), jnp.int32)),
            x_sm=plgpu.SMEM((self.stages, self.slices, *x_box), jnp.bfloat16, transforms=self.x_transforms),
            partial=plgpu.SMEM((self.slices, self.tokens, pitch(self.rows)), jnp.float32),
            full=plgpu.Barrier(num_arrivals=copies, num_barriers=count),
            empty=plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.stages),
            s_full=plgpu.Barrier(num_arrivals=self.scale_blocks),
            done=plgpu.Barrier(num_arrivals=self.warpgroups))
        if self.memory == "weights":
            out["w_full"] = plgpu.Barrier(num_barriers=self.rounds * self.slices)
        return out

    @property
    def ctas(self) -> int:
        return -(-self.product.n // self.rows) * self.token_tiles

    def launch(self, body, out_type, ctas: int):
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=self.scratch(), grid=(ctas,), grid_names=("tile",),
            num_threads=self.warpgroups + (self.memory != "all"), thread_name="wg",
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True))

    def build(self):
        """-> a function of the arrays of `Refs` but the last, which it returns."""
        return self.launch(self.body, self.product.out_type, self.ctas)
