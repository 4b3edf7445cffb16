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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper.decode import SCALE_PAIR, SELECTOR, decode_codes
from nvfp4jax.kernels.hopper.dense_product import CHUNK, SCALE_STEPS, STEP, Factors, Product, Refs, Tile, fetch_factors, finish_tile, pitch
from nvfp4jax.kernels.hopper.machine import ROWS_128, SHARED_MEMORY, WARP, WARPGROUP, Hardware, swizzled
from nvfp4jax.kernels.hopper.mosaic import Memory, asm, inline, load_shared, settled, smem_address, thread_index
from nvfp4jax.kernels.hopper.ring import Ring

_BARRIERS = 32  # the most that Mosaic takes in an array
_CHUNKS = STEP // CHUNK
_MMA = ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};")


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


# --- one thread's code ----------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Addresses:
    """Of a thread, i32 [128] each, computed before the data arrive: its sums, the codes of fragment rows r and r + 8 (weight rows 2 r
    and 2 r + 1), the tokens of k16 steps 0 1 and 2 3 of a chunk, and the scales, of each round where all lie in memory."""

    sums: jax.Array
    codes: tuple[jax.Array, ...]
    tokens: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]


def _place(tiles):
    """Of this thread: its lane, row of quads and place in its quad, and its warp's 16-row tile and slice."""
    tid = thread_index()
    lane, warp = tid % WARP, tid // WARP
    return lane, lane // 4, lane % 4, warp % tiles, warp // tiles


def _addresses(w_sm, s_sm, x_sm, partial, *, c):
    lane, r, quad, tile, p = _place(c.tiles)
    row = tile * 16 + r * 2
    out = [smem_address(partial, ((p * c.tokens + quad * 2) * pitch(c.rows) + row) * 4)]
    for h in range(2):
        phase = r * 2 + h & 7
        line = (p * c.rows + row) * 128 + 128 * h
        out.append(smem_address(w_sm, line + ((quad // 2 ^ phase) * 16 + quad % 2 * 8)))
    t, matrix = lane % 8, lane // 8
    for half in range(2):
        unit = matrix + 4 * half ^ t
        out.append(smem_address(x_sm, p * c.slice_bytes + (t * 128 + unit * 16)))
    if not c.resident:
        return *out, smem_address(s_sm, (p * c.rows + row) * 16)
    for i in range(c.rounds):
        step = p * c.rounds + i
        unit = step % SCALE_STEPS ^ row % 8
        line = step // SCALE_STEPS * c.rows + row
        out.append(smem_address(s_sm, line * 128 + unit * 16))
    return out


def _decode(u, w0, w1, w_at, s0, s1):
    """A 64-chunk of a step -> for each of four k16 steps the operand of mma: rows r and r + 8 in turn."""
    selector = asm(SELECTOR, [thread_index() % 4], effects=False)
    factors = asm(SCALE_PAIR, [s0, s1, selector], "rr", effects=False)
    words = [[decode_codes(word, factor) for word in load_shared(base ^ 32 * u, w_at, 2)] for base, factor in zip((w0, w1), factors)]
    return [[words[0][0][q], words[1][0][q], words[0][1][q], words[1][1][q]] for q in range(4)]


def _load_tokens(address, offset):
    """8 tokens of two k16 steps."""
    return asm(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0,$1,$2,$3}},[$4+{offset}];", [address], "rrrr")


def _mma(left, right, sums):
    return asm(_MMA, [*left, *right, *sums], "ffff", effects=False)


def _decode_chunk(*addresses, u, w_at):
    w0, w1, scale_at = settled(addresses)
    (s0,), (s1,) = load_shared(scale_at, 4 * u, 1), load_shared(scale_at ^ 16, 128 + 4 * u, 1)
    return [v for step in _decode(u, w0, w1, w_at, s0, s1) for v in step]


def _add_chunk(acc, *registers, x_at):
    x0, x1, *left = settled(registers)
    sums = [settled(pair.reshape(-1)) for pair in acc]
    for half, address in enumerate((x0, x1)):  # half of the tokens' registers at a time
        right = [_load_tokens(address, x_at + j * 1024) for j in range(len(acc))]
        for q in range(2):
            for j in range(len(acc)):
                sums[j] = _mma(left[8 * half + 4 * q:][:4], right[j][2 * q:][:2], sums[j])
    return np.array(sums, object).reshape(acc.shape)


def _add_round(acc, stage, *addresses, c, i):
    w0, w1, x0, x1, scale_at = settled(addresses)
    w_at, x_at = (i * c.slices * c.rows * 128, i * c.slices * c.slice_bytes) if c.resident else (0, 0)
    if not c.resident:
        w0, w1 = (v + stage * (c.slices * c.rows * 128) for v in (w0, w1))
        x0, x1 = (v + stage * (c.slices * c.slice_bytes) for v in (x0, x1))
        scale_at = scale_at + stage * (c.slices * c.rows * 16)
    # rows r and r + 8 are neighbours: their scales' units differ in the lowest bit of the swizzle
    s0 = load_shared(scale_at, 0, 4)
    s1 = load_shared(scale_at ^ 16, 128, 4) if c.resident else load_shared(scale_at, 16, 4)
    sums = [settled(pair.reshape(-1)) for pair in acc]
    chunk_bytes, group_bytes = (1024, _CHUNKS * 1024) if c.x_tiled else (c.tokens * 128, 1024)
    for u in range(_CHUNKS):
        right = [[_load_tokens(v, x_at + u * chunk_bytes + j * group_bytes) for v in (x0, x1)] for j in range(len(acc))]
        left = _decode(u, w0, w1, w_at, s0[u], s1[u])
        for q in range(4):
            for j in range(len(acc)):
                sums[j] = _mma(left[q], right[j][q // 2][2 * (q % 2):][:2], sums[j])
    return np.array(sums, object).reshape(acc.shape)


def _put_sums(acc, address, _, *, rows):
    for j, e in np.ndindex(len(acc), 2):
        asm(f"st.shared.v2.f32 [$0+{(8 * j + e) * pitch(rows) * 4}],{{$1,$2}};", [address, *acc[j, :, e]], "")


def _finish(first_token, first, out, partial, *factors, tile, slices):
    floats = pitch(tile.rows)
    finish_tile(tile, lambda token, row: smem_address(partial, (token * floats + row) * 4),
                [p * tile.tokens * floats * 4 for p in range(slices)], factors, first_token, first, out)


# --- the kernel -----------------------------------------------------------------------------------------------------

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
    addresses: Addresses
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
                for c in range(_CHUNKS):
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
        @pl.loop(0, self.rounds * _CHUNKS)
        def _(c):
            stage = sm.ring.fill(c)
            for p in range(self.slices):
                source = refs.x.at[pl.ds(at.token, self.tokens), pl.ds((p * self.rounds * _CHUNKS + c) * CHUNK, CHUNK)]
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
        program = functools.partial(_addresses, c=self)
        memories = (Memory(sm.w_sm, ROWS_128), Memory(sm.s_sm, ROWS_128 if self.resident else ()),
                    Memory(sm.x_sm, self.x_transforms), Memory(sm.partial))
        out = inline(program, *memories, returns=5 + (self.rounds if self.resident else 1))
        own_slice = None
        if self.memory == "weights":
            own_slice = inline(lambda: _place(self.tiles)[-1], returns="scalar")
        return _Prepared(factors, Addresses(out[0], out[1:3], out[3:5], out[5:]), own_slice)

    def add_round(self, acc, i, stage, prepared, sm, wg):
        """One step of the warp's slice: 16 weight rows x 256 of K, four mma for each 64 and 8 tokens."""
        at = prepared.addresses
        program = functools.partial(_add_round, c=self, i=i)
        return inline(program, acc, jnp.int32(0 if self.resident else stage), *at.codes, *at.tokens, at.scales[i if self.resident else 0],
                      returns=(64, self.tokens))

    def decode_chunk(self, i, u, prepared):
        """A 64-chunk of weights that lie in shared memory as a whole."""
        at = prepared.addresses
        program = functools.partial(_decode_chunk, u=u, w_at=i * self.slices * self.rows * 128)
        return inline(program, *at.codes, at.scales[i], returns=16)

    def add_chunk(self, acc, i, u, stage, decoded, prepared, sm, wg):
        """A decoded 64-chunk times the tokens of a stage."""
        program = functools.partial(_add_chunk, x_at=stage * self.slices * self.slice_bytes)
        return inline(program, acc, *prepared.addresses.tokens, *decoded, returns=(64, self.tokens))

    def finish(self, acc, prepared, refs, sm, at, wg):
        inline(functools.partial(_put_sums, rows=self.rows), acc, prepared.addresses.sums, Memory(sm.partial))
        plgpu.barrier_arrive(sm.done)
        plgpu.barrier_wait(sm.done)
        program = functools.partial(_finish, tile=self.tile, slices=self.slices)
        f = prepared.factors
        inline(program, at.token, at.first, Memory(refs.out), Memory(sm.partial), f.global_scale, *f.row_scales, *f.biases)

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
        total = self.rounds * _CHUNKS
        for c in range(total):
            (i, u), stage = divmod(c, _CHUNKS), sm.ring.stage(c)
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

    def body(self, *refs, full, empty, w_full=None, **shared):
        refs, ring = Refs(*refs), Ring(full, empty, self.stages, self.slices)
        sm = _Shared(ring=ring, weights=ring if w_full is None else Ring(w_full, None, self.rounds, self.slices), **shared)
        wg, tile = lax.axis_index("wg"), lax.axis_index("tile")  # CTAs of the same weights are neighbours
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
            x_box, copies = ((self.tokens, STEP), 1) if self.x_tiled else ((_CHUNKS, self.tokens, CHUNK), _CHUNKS)
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

    def build(self):
        """-> a function of the arrays of `Refs` but the last, which it returns."""
        return plgpu.kernel(
            self.body, out_type=self.product.out_type, scratch_types=self.scratch(),
            grid=(-(-self.product.n // self.rows) * self.token_tiles,), grid_names=("tile",),
            num_threads=self.warpgroups + (self.memory != "all"), thread_name="wg",
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True))
