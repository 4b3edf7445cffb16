"""Which rows belong to which block, found by the kernel itself from the sizes of the groups.

A block is up to a token tile of rows of one expert; an expert's rows are split evenly over its blocks, in multiples of 8. The
producer warpgroup lists the blocks once (`list_blocks`), looks up whose a block is (`expert_of`), and writes what the consumers
need of a tile into one of two slots of four fields. All of it lies in shared memory, in a `Table` of i32 words:

    | row scales, slot 0 | row scales, slot 1 | 4 fields x 2 slots | ends [E] | starts [E + 1] | room to work in |
"""
import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from nvfp4jax.kernels.hopper.machine import WARP, WARPGROUP
from nvfp4jax.kernels.hopper.mosaic import (
    Memory,
    gmem_address,
    i32,
    inline,
    load_shared,
    select,
    smem_address,
    thread_index,
    warpgroup_barrier,
)
from nvfp4jax.kernels.hopper.threads import count_in_warpgroup, load_global, store_shared, warp_scan


@dataclasses.dataclass(frozen=True)
class Table:
    """Where what is known of a tile before its data lies. ends: blocks up to and with each expert; starts: rows before each.
    scales: words of a tile's row scales, from up to 3 before its first row; 0: there are none."""

    scales: int
    experts: int

    @property
    def second(self) -> int:
        """The second tile's row scales: TMA writes to multiples of 128 bytes."""
        return -(-self.scales // 32) * 32

    @property
    def fields(self) -> int:
        return self.second + self.scales

    @property
    def ends(self) -> int:
        return self.fields + 8

    @property
    def starts(self) -> int:
        return self.ends + self.experts

    @property
    def words(self) -> int:
        return self.starts + self.experts + 1 + 3 + 8 * -(-self.experts // WARPGROUP)


def _list_blocks(sizes, table, *, at, largest, crowd, half):
    experts = at.experts
    tid = thread_index() % WARPGROUP
    lane, warp = tid % WARP, tid // WARP
    ends = smem_address(table, 4 * at.ends)
    starts, totals = ends + 4 * experts, ends + (8 * experts + 4 + 15) // 16 * 16
    before = [i32(0)] * 2  # blocks and rows of the experts of earlier rounds
    store_shared(starts, before[:1], tid == 0)
    for first in range(0, experts, WARPGROUP):
        expert = tid + first
        inside = expert < experts
        rows, = load_global(gmem_address(sizes, expert * 4), 1, inside)
        blocks, few = ((rows + (tile - 1)) // tile for tile in (largest, crowd or largest))
        blocks = select(i32(half) <= rows, few, blocks)
        scans = [warp_scan(v) for v in (blocks, rows)]
        here = totals + 4 * 8 * (first // WARPGROUP)
        store_shared(here + warp * 8, scans, lane == 31)
        warpgroup_barrier()
        sums = [load_shared(here, 8 * w, 2) for w in range(4)]
        for i, out in enumerate((ends, starts + 4)):
            value = before[i] + scans[i]
            for w in range(3):
                value = value + select(i32(w) < warp, sums[w][i], 0)
            store_shared(out + expert * 4, [value], inside)
            for w in range(4):
                before[i] = before[i] + sums[w][i]
    warpgroup_barrier()


def list_blocks(sizes, table, at: Table, *, largest: int, crowd: int, half: int) -> None:
    """The producer warpgroup's first act: i32 [E] rows of each expert, in global memory -> `ends` and `starts`.

    Blocks are of up to `largest` rows, or `crowd` for an expert with at least `half` rows."""
    inline(functools.partial(_list_blocks, at=at, largest=largest, crowd=crowd, half=half), Memory(sizes), Memory(table))


def _expert_of(table, number, *, at):
    tid = thread_index() % WARPGROUP
    ends = smem_address(table, 4 * at.ends)
    own = ends + tid * 4
    total = i32(0)
    for first in range(0, at.experts, WARPGROUP):
        inside = tid < at.experts - first
        end, = load_shared(select(inside, own + 4 * first, ends), 0, 1)
        total = total + count_in_warpgroup(inside & (end <= number), 15)
    return total


def expert_of(table, number, at: Table):
    """How many experts end at or before block `number`, hence whose it is: every thread of the warpgroup looks at its own."""
    return inline(functools.partial(_expert_of, at=at), Memory(table), number, returns="scalar")


def rows_of_block(table, number, expert, at: Table, tiles):
    """Block `number` of `expert` -> first row, rows, index of the tile that holds them."""
    ends, starts = (lambda i: table[at.ends + i]), (lambda i: table[at.starts + i])
    before = jnp.where(expert == 0, 0, ends(jnp.maximum(expert - 1, 0)))
    blocks, start = ends(expert) - before, starts(expert)
    size = starts(expert + 1) - start
    share = lax.div(lax.div(size + blocks - 1, blocks) + 7, jnp.int32(8)) * 8
    earlier = (number - before) * share
    rows = jnp.minimum(share, size - earlier)
    tile = sum(((rows > t).astype(jnp.int32) for t in tiles[:-1]), jnp.int32(0))
    return start + earlier, rows, tile
