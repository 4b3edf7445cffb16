"""The sums of what rows share, for decode attention on Hopper: the keys and values of a prompt are read once for its rows.

A unit is a group of 1024 slots (`attention_sums`) of a shared row and key head, or a piece of it where groups are too few for all CTAs,
and as many of its rows as have 128 queries. A persistent CTA walks over units (`attention_cta`). A unit's sums go to memory, where
`attention_decode` goes on from them: pieces are folded to groups, whole groups to the row, and a last one that is not whole is the
beginning of the row's own group.

What all shared rows begin with, whole pieces, may lie in arrays of its own: the producer takes a piece from there or from the shared row,
and nothing else follows from it.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import attention_wgmma as part
from nvfp4jax.kernels.hopper.attention_cta import STAGES, divide, launch
from nvfp4jax.kernels.hopper.attention_sums import GROUP, PIECE
from nvfp4jax.kernels.hopper.attention_wgmma import CONSUMERS, HALF, ROWS
from nvfp4jax.kernels.hopper.machine import SMS

MARKS = 8  # f32 of a query and unit: maximum and part of the sum of weights, 4 times
FEW = SMS // 2  # units that leave CTAs idle


@dataclasses.dataclass(frozen=True)
class Shape(part.Shape):
    """tokens: rows of a shared row, one query each; rows: shared rows; capacity: their slots, those in front of them included."""

    @property
    def unit(self):
        """Pieces of a unit, at most."""
        return GROUP if self.rows * self.heads * self.tiles * -(-self.capacity // (GROUP * PIECE)) >= FEW else 1

    @property
    def padded(self):
        """A row's queries in a consumer's 64, those behind the group's zero."""
        return 1 << (self.group - 1).bit_length()

    @property
    def each(self):
        """Rows of a consumer."""
        return ROWS // self.padded

    @property
    def tiles(self):
        return -(-self.tokens // (CONSUMERS * self.each))

    @property
    def units(self):
        """Of a row and a tile."""
        return -(-self.capacity // (self.unit * PIECE))


def shape_of(q, keys, prefix=(), scale=None, soft_cap=None) -> Shape:
    """q [B, 1, Hq, D], keys [(L,) N, Hkv, P, D], prefix: nothing, or keys and values [(L,) 1, Hkv, F, D]: arrays, or what has their shapes."""
    rows, heads, capacity, d = keys.shape[-4:]
    front = prefix[0].shape[-2] if prefix else 0
    tokens, group = q.shape[0] // rows, q.shape[2] // heads
    return Shape(rows, tokens, heads, group, d, front + capacity, scale, None, soft_cap, front=front // PIECE)


def units(slots: jax.Array, s: Shape) -> jax.Array:
    """slots: i32 [B], the shared slots of each row -> i32 [1 + N units]: how many units there are of a head and a tile, then each,
    numbered shared row * units + unit."""
    some = (jnp.arange(s.units, dtype=jnp.int32)[None] * (s.unit * PIECE) < slots[:: s.tokens, None]).reshape(-1)
    place = jnp.where(some, jnp.cumsum(some, dtype=jnp.int32), some.size + 1)  # behind the number of them
    return jnp.zeros(1 + some.size, jnp.int32).at[0].set(some.sum(dtype=jnp.int32)).at[place].set(
        jnp.arange(some.size, dtype=jnp.int32), mode="drop")


def _kernel(q, keys, values, layer, slots, table, *refs, q_sm, k_sm, v_sm, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            s: Shape, ctas):
    *prefix, sums, marks_out = refs  # of what lies in front of all shared rows: keys, values; or nothing
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    halves = s.d // HALF
    per_group = s.heads * s.tiles
    own_units = lax.div(table[0] * per_group - cta + (ctas - 1), jnp.int32(ctas))

    def known(i):
        """Shared row, head, first row of the tile, number of the unit, pieces of it."""
        unit = cta + i * ctas
        which, rest = table[1 + lax.div(unit, jnp.int32(per_group))], lax.rem(unit, jnp.int32(per_group))
        row, number = lax.div(which, jnp.int32(s.units)), lax.rem(which, jnp.int32(s.units))
        pieces = jnp.minimum(lax.div(slots[row * s.tokens], jnp.int32(PIECE)) - number * s.unit, s.unit)
        return row, lax.div(rest, jnp.int32(s.tiles)), lax.rem(rest, jnp.int32(s.tiles)) * (CONSUMERS * s.each), number, pieces

    def produce():
        def unit(i, it):
            row, head, token, number, pieces = known(i)
            kv = (layer[0] * s.rows + row) * s.heads + head
            for w in range(CONSUMERS):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_empty.at[w]))
                for half in range(halves):
                    source = q.at[row, pl.ds(token + w * s.each, s.each), head, pl.ds(0, s.padded), pl.ds(half * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(source, q_sm.at[w, half], q_full.at[w])

            def piece(p, it):
                slot, p = lax.rem(it, jnp.int32(STAGES)), number * s.unit + p

                def load(array, at, p, sm, full):
                    for half in range(halves):
                        source = array.at[at, pl.ds(p * PIECE, PIECE), pl.ds(half * HALF, HALF)]
                        plgpu.copy_gmem_to_smem(source, sm.at[slot, pl.ds(half * PIECE, PIECE)], full.at[slot])

                for i, (array, sm, full, empty) in enumerate(((keys, k_sm, k_full, k_empty), (values, v_sm, v_full, v_empty))):
                    pl.when(it >= STAGES)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
                    if not prefix:
                        load(array, kv, p, sm, full)
                        continue
                    front_kv = layer[0] * s.heads + head
                    pl.when(p < s.front)(lambda i=i, sm=sm, full=full: load(prefix[i], front_kv, p, sm, full))
                    pl.when(p >= s.front)(lambda array=array, sm=sm, full=full: load(array, kv, p - s.front, sm, full))
                return it + 1

            return lax.fori_loop(0, pieces, piece, it)

        lax.fori_loop(0, own_units, unit, jnp.int32(0))

    def consume():
        seen = (jnp.int32(0),) * 3  # no slot of a piece is hidden

        def unit(i, it):
            row, head, token, number, pieces = known(i)
            plgpu.barrier_wait(q_full.at[wg])
            slot_of = lambda it: lax.rem(it, jnp.int32(STAGES))

            def values(it, scores, marks):
                slot = slot_of(it)
                plgpu.barrier_wait(v_full.at[slot])
                out, *rest = part.values(scores, v_sm.at[slot], marks, seen, s)
                plgpu.barrier_arrive(v_empty.at[slot])
                return out, list(rest[:part.MARKS]), rest[part.MARKS:]

            def piece(_, carry):
                it, scores, group, marks = carry
                out, marks, factors = values(it, scores, marks)
                slot = slot_of(it + 1)
                plgpu.barrier_wait(k_full.at[slot])
                scores, group = part.fold_and_score(q_sm.at[wg], k_sm.at[slot], group, out, factors, s)
                plgpu.barrier_arrive(k_empty.at[slot])
                return it + 1, scores, group, marks

            group, *marks = part.fresh(s.d)
            slot = slot_of(it)
            plgpu.barrier_wait(k_full.at[slot])
            scores = part.scores(q_sm.at[wg], k_sm.at[slot], s)
            plgpu.barrier_arrive(k_empty.at[slot])
            it, scores, group, marks = lax.fori_loop(0, pieces - 1, piece, (it, scores, group, marks))
            plgpu.barrier_arrive(q_empty.at[wg])
            out, marks, factors = values(it, scores, marks)
            group = part.fold_piece(group, out, factors, s)
            token = token + wg * s.each
            first = (number * s.rows + row) * s.tokens + token
            part.deliver(group, marks, sums, marks_out, (first, s.tokens - token, head), s.padded, s)
            return it + 1

        part.give_turn(wg)
        lax.fori_loop(0, own_units, unit, jnp.int32(0))

    divide(wg, produce, consume)


def shared_sums(q, keys, values, layer, slots, table, *prefix, scale, soft_cap=None, ctas=SMS):
    """q bf16 [B, 1, Hq, D], keys and values bf16 [L, N, Hkv, P, D], layer i32 [], slots i32 [B], table: of `units`, prefix: nothing, or
    keys and values bf16 [L, 1, Hkv, F, D] of slots in front of all shared rows, which `slots` counts -> sums f32 [units, B, Hq, D] and
    marks f32 [units, B, Hq, MARKS], those of units that are there, and a unit's pieces."""
    batch, _, query_heads, d = q.shape
    rows, heads = keys.shape[1:3]
    s = shape_of(q, keys, prefix, scale, soft_cap)
    kernel = lambda *refs, **scratch: _kernel(*refs, **scratch, s=s, ctas=ctas)
    kernel.__name__ = "shared_attention"
    flat, front = ([a.reshape(-1, *a.shape[3:]) for a in pair] for pair in ((keys, values), prefix))
    q = q.reshape(rows, batch // rows, heads, s.group, d)
    if s.padded > s.group:
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, s.padded - s.group), (0, 0)))
    single = lambda last: jax.ShapeDtypeStruct((s.units, batch, query_heads, last), jnp.float32)
    run = launch(kernel, (single(d), single(MARKS)), (d // HALF, s.each, s.padded), d, ctas)
    found = run(q, *flat, layer.reshape(1), slots, table, *front)
    return *found, s.unit
