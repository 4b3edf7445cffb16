"""Prefill attention on Hopper: many queries a row, wgmma, in decode's order of sums (`attention_sums`).

A tile is 128 queries of a row and a query head. A persistent CTA an SM walks over tiles, those with the longest past
first: a producer warpgroup loads queries, and keys and values a piece of 128 slots at a time, by TMA; two consumer
warpgroups of 64 queries share them. A piece's scores, weights and values stay in registers: the weights of a k16 step
are made while the product with the values of the step before runs, and its values are folded to those of the group
while the next piece's scores run. At the end of 1024 slots the group's are folded to the row's, which lie in shared
memory.

TMA reads whole pieces: what lies past the row's end is masked in the scores and zeroed in the values.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import attention_wgmma as part
from nvfp4jax.kernels.hopper.attention_cta import STAGES, divide, launch
from nvfp4jax.kernels.hopper.attention_sums import GROUP, PIECE
from nvfp4jax.kernels.hopper.attention_wgmma import CONSUMERS, HALF, MARKS, ROWS, Shape
from nvfp4jax.kernels.hopper.machine import SMS


def _div_rem(a, b):
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _tile(tile, s: Shape):
    """Row, query head and first token: the last tokens first; heads of a group are neighbours."""
    late, rest = _div_rem(tile, s.rows * s.heads * s.group)
    row, head = _div_rem(rest, s.heads * s.group)
    return row, head, (s.tiles - 1 - late) * (CONSUMERS * ROWS)


def _span(start, count, first_token, s: Shape):
    """The end of what a tile's queries see, and its pieces: first, stop. One piece where no query counts."""
    end = start + jnp.minimum(first_token + CONSUMERS * ROWS, count)
    stop = jnp.where(count > first_token, lax.div(end + (PIECE - 1), jnp.int32(PIECE)), 1)
    if s.window is None:
        return end, jnp.int32(0), stop
    low = lax.div(jnp.maximum(start + first_token + 1 - s.window, 0), jnp.int32(PIECE))
    return end, jnp.minimum(low, stop - 1), stop


def _kernel(q, keys, values, layer, starts, counts, *refs, q_sm, k_sm, v_sm, state, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            s: Shape, ctas):
    *shared, out = refs  # of what rows share: keys, values, slots, and keys and values in front of these; or nothing
    front = shared[3:]
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    halves = s.d // HALF
    own_tiles = lax.div(s.rows * s.heads * s.group * s.tiles - cta + (ctas - 1), jnp.int32(ctas))

    def known(i):
        row, head, token = _tile(cta + i * ctas, s)
        return row, head, token, starts[row], counts[row]

    def produce():
        def tile(i, it):
            row, head, token, start, count = known(i)
            _, first, stop = _span(start, count, token, s)
            kv_head = lax.div(head, jnp.int32(s.group))
            kv = (layer[0] * s.rows + row) * s.heads + kv_head
            if shared:
                before = lax.div(shared[2][row], jnp.int32(PIECE))
                front_kv = layer[0] * s.heads + kv_head
                shared_kv = (layer[0] * s.shared + lax.div(row, jnp.int32(s.rows // s.shared))) * s.heads + kv_head
            for w in range(CONSUMERS):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_empty.at[w]))
                for half in range(halves):
                    source = q.at[row, pl.ds(token + w * ROWS, ROWS), head, pl.ds(half * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(source, q_sm.at[w, pl.ds(half * ROWS, ROWS)], q_full.at[w])

            def piece(p, it):
                slot = lax.rem(it, jnp.int32(STAGES))

                def load(array, at, p, sm, full):
                    for half in range(halves):
                        source = array.at[at, pl.ds(p * PIECE, PIECE), pl.ds(half * HALF, HALF)]
                        plgpu.copy_gmem_to_smem(source, sm.at[slot, pl.ds(half * PIECE, PIECE)], full.at[slot])

                for i, (array, sm, full, empty) in enumerate(((keys, k_sm, k_full, k_empty), (values, v_sm, v_full, v_empty))):
                    pl.when(it >= STAGES)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
                    if not shared:
                        load(array, kv, p, sm, full)
                        continue
                    behind = p < before
                    if front:
                        pl.when(behind & (p < s.front))(lambda i=i, sm=sm, full=full: load(front[i], front_kv, p, sm, full))
                        behind &= p >= s.front
                    pl.when(behind)(lambda i=i, sm=sm, full=full: load(shared[i], shared_kv, p - s.front, sm, full))
                    pl.when(p >= before)(lambda array=array, sm=sm, full=full: load(array, kv, p - before, sm, full))
                return it + 1

            return lax.fori_loop(first, stop, piece, it)

        lax.fori_loop(0, own_tiles, tile, jnp.int32(0))

    def consume():
        def tile(i, carry):
            it, start, count = carry
            row, head, token = _tile(cta + i * ctas, s)
            end, first, stop = _span(start, count, token, s)
            own = start + token + wg * ROWS  # the first query's position
            plgpu.barrier_wait(q_full.at[wg])

            def banked_before(p):
                """Whether groups before that of piece p lie in shared memory."""
                return (lax.div(p, jnp.int32(GROUP)) > lax.div(first, jnp.int32(GROUP))).astype(jnp.int32)

            def slot_of(it):
                return lax.rem(it, jnp.int32(STAGES))

            def values(p, it, scores, marks):
                slot, base = slot_of(it), p * PIECE
                masked = base + PIECE > jnp.minimum(own + 1, end)
                if s.window is not None:
                    masked |= base < jnp.minimum(own + ROWS, end) - s.window
                plgpu.barrier_wait(v_full.at[slot])
                part.zero_values(v_sm.at[slot], end - base, s)
                place = own + 1 - base, end - base, masked.astype(jnp.int32)
                out, *rest = part.values(scores, v_sm.at[slot], marks, place, s)
                plgpu.barrier_arrive(v_empty.at[slot])
                return out, list(rest[:MARKS]), rest[MARKS:]

            def piece(p, carry):
                """Piece p, and the scores of the next."""
                it, scores, group, marks, maxima = carry
                out, marks, factors = values(p, it, scores, marks)
                slot = slot_of(it + 1)
                plgpu.barrier_wait(k_full.at[slot])
                scores, group = part.fold_and_score(q_sm.at[wg], k_sm.at[slot], group, out, factors, s)
                plgpu.barrier_arrive(k_empty.at[slot])
                done = (lax.rem(p, jnp.int32(GROUP)) == GROUP - 1).astype(jnp.int32)
                banked = part.bank(group, marks, maxima, state.at[wg], done, banked_before(p), s)
                return it + 1, scores, group, list(banked[:MARKS]), list(banked[MARKS:])

            group, *marks = part.fresh(s.d)
            slot = slot_of(it)
            plgpu.barrier_wait(k_full.at[slot])
            scores = part.scores(q_sm.at[wg], k_sm.at[slot], s)
            plgpu.barrier_arrive(k_empty.at[slot])
            carry = it, scores, group, marks, marks[:2]
            it, scores, group, marks, maxima = lax.fori_loop(first, stop - 1, piece, carry)
            plgpu.barrier_arrive(q_empty.at[wg])
            out_of_last, marks, factors = values(stop - 1, it, scores, marks)
            group = part.fold_piece(group, out_of_last, factors, s)
            it = it + 1
            at = token + wg * ROWS
            place = banked_before(stop - 1), row * s.tokens + at, s.tokens - at, head
            _, _, _, *fetched = known(jnp.minimum(i + 1, own_tiles - 1))  # in time for the next tile
            part.finish(group, marks, maxima, state.at[wg], out, place, s)
            return it, *fetched

        part.give_turn(wg)
        *_, start, count = known(jnp.int32(0))
        lax.fori_loop(0, own_tiles, tile, (jnp.int32(0), start, count))

    divide(wg, produce, consume)


def prefill(q, keys, values, layer, starts, counts, *, scale, window=None, soft_cap=None, shared=(), ctas=SMS):
    """q bf16 [B, T, Hq, D], keys and values bf16 [L, B, Hkv, S, D], layer i32 [], starts and counts i32 [B] -> q's
    shape. shared: keys and values bf16 [L, N, Hkv, P, D] that the rows begin with, and i32 [B], how many slots of them; perhaps also keys
    and values bf16 [L, 1, Hkv, F, D] in front of all of these, which that number counts."""
    rows, tokens, query_heads, d = q.shape
    _, _, heads, capacity, _ = keys.shape
    s = Shape(rows, tokens, heads, query_heads // heads, d, capacity, scale, window, soft_cap, shared[0].shape[1] if shared else 0,
              shared[3].shape[3] // PIECE if shared[3:] else 0)
    kernel = lambda *refs, **scratch: _kernel(*refs, **scratch, s=s, ctas=ctas)
    flat, shared_flat, front = ([a.reshape(-1, *a.shape[3:]) for a in pair] for pair in ((keys, values), shared[:2], shared[3:]))
    run = launch(kernel, jax.ShapeDtypeStruct(q.shape, q.dtype), (d // HALF * ROWS,), d, ctas,
                 state=plgpu.SMEM((CONSUMERS, ROWS * (d + 4)), jnp.float32))
    return run(q, *flat, layer.reshape(1), starts, counts, *shared_flat, *shared[2:3], *front)
