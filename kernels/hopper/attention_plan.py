"""Who does what in decode attention: a table for all layers of a step, in plain jnp.

A unit is a (row, key head) or some of its pieces. A whole one writes the output; of a divided (row, head) each unit
leaves sums in memory and the last to come adds them up. The table may follow from the whole batch: no bit of a result
depends on it.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4jax.kernels.hopper.attention_sums import GROUP, PIECE
from nvfp4jax.kernels.hopper.machine import SMS

SLOTS = 12 * SMS  # sums that may wait in memory, of pieces and of groups each
SIZES = 1 << 24, 4 * GROUP, GROUP, 1  # pieces of a unit, at most
WHOLE, PIECES, GROUPS = 0, 1, 2  # what becomes of a unit's sums
WORDS = 8  # of a record: (row, head), end, first piece, pieces, kind, slot of piece 0, slot of group 0, 0
SHARED_WORDS = 12  # where rows share pieces: how many the row does, and zeros


class Plan(NamedTuple):
    """What `attention_decode` is given.

    table: i32 [CTAs, 1 + units + 1, WORDS or SHARED_WORDS]: how many pieces and units the CTA has and how often it adds up sums at its
    end, then its units, then one of no pieces. counters: i32 zeros, which each call leaves at zero: no two calls may
    run on them at a time. shared: what `attention_shared` is given, where rows share pieces.
    """

    table: jax.Array
    counters: jax.Array
    shared: jax.Array | None = None


def units(rows, heads, capacity):
    """The units that a table holds, at most."""
    return min(rows * heads * -(-capacity // PIECE), rows * heads + SLOTS)


def plan(starts, *, tokens: int, heads: int, capacity: int, window: int | None = None, shared=None, ctas: int = SMS) -> Plan:
    """starts: i32 [B], a row's position of its first of `tokens` queries; key heads and slots of the cache. shared: None, or i32 [B], the
    slots of each row, whole pieces, that are not its own: its units are those of what follows.

    Units of full size come first, then what is left of the rows, the longest first; they are dealt to the CTAs back
    and forth. Which size is best follows from what the fullest CTA would have, weighed by measured times in units of a
    piece (2 us).
    """
    rows = starts.shape[0]
    before = 0 if shared is None else (shared := jnp.asarray(shared, jnp.int32))
    end = jnp.clip(starts.astype(jnp.int32) + tokens, before + 1, before + capacity)
    first = jnp.zeros_like(end) if window is None else jnp.maximum(end - tokens + 1 - window, 0) // PIECE
    first = first if shared is None else shared // PIECE
    words_of_record = WORDS if shared is None else SHARED_WORDS
    last = (end - 1) // PIECE
    rounds = -(-units(rows, heads, capacity) // ctas)
    i = jnp.arange(rounds * ctas, dtype=jnp.int32).reshape(rounds, ctas)
    i = jnp.where(jnp.arange(rounds)[:, None] % 2 == 1, i[:, ::-1], i).reshape(-1)  # the unit at each place
    groups = last // GROUP - first // GROUP + 1

    def bases(count, origin):
        """Of each row: the slot of its head 0's number 0, where `count` are saved from number `origin` on."""
        return heads * (jnp.cumsum(count) - count) - origin

    def deal(size):
        number = last // size - first // size + 1  # units of a head
        full = number - 1
        rest = last + 1 - jnp.maximum(first, last // size * size)
        ends, key = jnp.cumsum(full * heads), rest * rows - jnp.arange(rows)  # a sort of few rows takes XLA longer than this
        rank = (key[:, None] < key[None]).sum(1)
        order = jnp.where(rank[None] == jnp.arange(rows)[:, None], jnp.arange(rows)[None], 0).sum(1)
        row = (i[:, None] >= ends[None]).sum(1, dtype=jnp.int32)
        late = i - ends[-1]
        early = late < 0
        row = jnp.where(early, row, order[jnp.clip(late // heads, 0, rows - 1)].astype(jnp.int32))
        of = lambda values: values[jnp.minimum(row, rows - 1)]
        at, per_head = i - of(ends - full * heads), jnp.maximum(of(full), 1)
        head = jnp.where(early, at // per_head, late % heads)
        index = of(first) // size + jnp.where(early, at % per_head, of(full))
        start = jnp.maximum(of(first), index * size)
        count = jnp.where(late < rows * heads, jnp.minimum(of(last) + 1, (index + 1) * size) - start, 0)
        kind = jnp.where(of(full) == 0, WHOLE, jnp.where(size == 1, PIECES, GROUPS))
        pieces = last + 1 - first
        piece_slot = of(bases(pieces, first)) + head * of(pieces)
        group_slot = SLOTS + of(bases(groups, first // GROUP)) + head * of(groups)
        saved = jnp.where(size == 1, pieces, groups).sum() * heads
        load, cut = count.reshape(rounds, ctas).sum(0), ((count > 0) & (kind != WHOLE)).sum()
        # in tenths of a piece, of all CTAs: bandwidth is shared, so that a full CTA gets more of it at last
        cost = jnp.maximum(10 * count.sum(), 8 * ctas * load.max()) + jnp.where(cut > 0, jnp.where(size == 1, 24, 12) * ctas, 0) + 4 * cut
        fits = (cut == 0) | (saved <= SLOTS) & (number.sum() * heads <= rounds * ctas)
        words = [row * heads + head, of(end), start, count, kind, piece_slot, group_slot, jnp.zeros_like(row)]
        if shared is not None:
            words += [of(first)] + [jnp.zeros_like(row)] * (SHARED_WORDS - WORDS - 1)
        return jnp.stack([w.astype(jnp.int32) for w in words], 1), load, jnp.where(fits, cost, 2**31 - 1)

    # No units of one piece where rows share: a group is added up by whoever has its first own piece.
    tables, loads, costs = jax.vmap(deal)(jnp.array([size for size in SIZES if shared is None or size % GROUP == 0]))
    best = jnp.argmin(costs)
    table = tables[best].reshape(rounds, ctas, words_of_record).swapaxes(0, 1)
    stages = jnp.where((table[..., 4] == PIECES).any() & (groups > 2).any(), 2, (table[..., 4] != WHOLE).any().astype(jnp.int32))
    head = [loads[best], (table[..., 3] > 0).sum(1), jnp.full((ctas,), stages)]
    head = jnp.pad(jnp.stack(head, 1).astype(jnp.int32)[:, None], ((0, 0), (0, 0), (0, words_of_record - 3)))
    table = jnp.concatenate([head, table, jnp.zeros((ctas, 1, words_of_record), jnp.int32)], 1)
    # Behind the barrier XLA does not know that these are zeros: it would fill them anew in front of each layer's kernel.
    return Plan(table, lax.optimization_barrier(jnp.zeros((rows * heads + SLOTS,), jnp.int32)))
