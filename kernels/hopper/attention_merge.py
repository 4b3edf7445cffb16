"""The sums of decode attention: folded in registers, through memory where a (row, head) is divided among CTAs, and to
the output.

A tile is [m, m, part, part, 4 values] of a thread: of columns 2 quad and 2 quad + 1, the part lane / 4 % 4 of the sum
of weights, and head dimensions 16 slice + lane / 4 and + 8. No CTA waits for another: of a divided (row, head) the
unit that comes last adds up the sums.
"""
from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_plan import GROUPS, PIECES, WHOLE, WORDS
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, GROUP, PIECE, f32

WARPS = 8  # of a CTA
THREADS = 32 * WARPS
BUFFERS = 3  # of 8 sums each, when they come back from memory
BARRIER = "bar.sync 0;"


def nothing(thread):
    return [[f32(EMPTY)] * 2 + [f32(0)] * 6 for _ in range(thread.s.tiles)]


def fold(thread, state, further):
    out = []
    for x, y in zip(state, further):
        m, a, b = zip(*(sums.fold_factors(x[e], y[e], thread.c) for e in range(2)))
        out.append([*m, *(sums.fold(x[2 + i], y[2 + i], a[i % 2], b[i % 2]) for i in range(6))])
    return out


def choose(condition, a, b):
    return [[mg.select(condition, x, y) for x, y in zip(*tiles)] for tiles in zip(a, b)]


def finish(thread, which, i, tile):
    """Writes the output of a tile of a (row, head)."""
    s, add, mul, div, rem = thread.s, mg.add, mg.mul, mg.div, mg.rem
    row, head = div(which, s.heads), rem(which, s.heads)
    _, _, *parts, a, b, c, d = tile
    factors = [sums.reciprocal(sums.lanes(p, sums.fadd, (4, 8))) for p in parts]
    words = [mg.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0,$1;", [sums.pack(*map(sums.fmul, pair, factors))])
             for pair in ((a, b), (c, d))]
    column = add(thread.row, mul(i, 8))  # now a lane holds head dimensions 2 quad, + 1 (and + 8) of a column
    token = add(mul(row, s.tokens), div(column, s.group))
    at = mg.gmem_element(thread.refs["out"], add(mul(token, s.heads * s.group), add(mul(head, s.group), rem(column, s.group))), s.d,
                         add(mul(thread.slice, 16), mul(thread.quad, 2)), 2)
    own = mg.bit_and(mg.flag("lt", column, s.columns), thread.own_slice)
    for h in range(2):
        mg.store_global(mg.offset_address(at, 16 * h), [words[h]], own)


# --- sums that pass through memory ------------------------------------------------------------------------------------

def _places(thread, slot, i):
    """Addresses of this thread's values and marks of a tile in a slot."""
    s = thread.s
    slot = mg.add(mg.mul(slot, s.tiles), i)
    return (mg.gmem_element(thread.refs["sums"], slot, 8 * s.d, mg.mul(thread.place, 4), 4),
            mg.gmem_element(thread.refs["marks"], slot, 128, mg.mul(thread.lane, 4), 4))


def _save(thread, slot, i, tile):
    values, marks = _places(thread, slot, i)
    first = mg.flag("eq", thread.warp, 0)
    store = "{.reg .pred p; setp.ne.u32 p,$5,0; @p st.global.v4.f32 [$0],{$1,$2,$3,$4};}"
    mg.asm(store, [values, *tile[4:], thread.own_slice], "")
    mg.asm(store, [marks, *tile[:4], first], "")


class _Unit:
    """The unit of a record, and the sums of its (row, head) that pass through memory: numbers first .. stop - 1, the
    slot of number 0, and how many of them are its own."""

    def __init__(self, thread, at):
        s = thread.s
        self.which, end, begin, count, self.kind, piece_base, group_base = (
            mg.asm(f"ld.shared.b32 $0,[$1+{4 * i}];", [at]) for i in range(7))
        first, stop = mg.i32(0), mg.div(mg.add(end, PIECE - 1), PIECE)
        if s.window:
            first = mg.div(sums.not_negative(mg.sub(mg.add(end, 1), s.tokens + s.window)), PIECE)
        group = lambda piece: mg.div(piece, GROUP)
        after = lambda piece: mg.div(mg.add(piece, GROUP - 1), GROUP)
        self.pieces = mg.flag("eq", self.kind, PIECES)
        self.first = mg.select(self.pieces, first, group(first))
        self.stop = mg.select(self.pieces, stop, after(stop))
        self.base = mg.select(self.pieces, piece_base, group_base)
        self.own = mg.select(self.pieces, count, mg.sub(after(mg.add(begin, count)), group(begin)))
        # Pieces are fetched a group at a time, groups as they come.
        self.origin = mg.select(self.pieces, mg.mul(group(first), GROUP), self.first)


def _merge(thread, unit, i):
    """A tile's sums of a (row, head) from those of its pieces or groups, fetched 8 at a time, two such batches ahead."""
    s = thread.s
    slot_bytes = 32 * s.d + 512
    here = lambda number: mg.bit_and(mg.flag("lt", number, unit.stop), mg.bit_xor(mg.flag("lt", number, unit.first), 1))
    buffer = lambda batch: mg.add(thread.ring, mg.mul(mg.rem(batch, BUFFERS), GROUP * slot_bytes))
    copy = "{.reg .pred p; setp.ne.u32 p,$2,0; @p cp.async.cg.shared.global [$0],[$1],16;}"

    def issue(batch):
        first = mg.add(unit.origin, mg.mul(batch, GROUP))
        to = buffer(batch)
        for k in range(GROUP):
            number = mg.add(first, k)
            values, marks = _places(thread, mg.add(unit.base, number), i)
            inside = here(number)
            at = mg.add(to, k * slot_bytes)
            mg.asm(copy, [mg.add(at, mg.mul(thread.place, 16)), values, mg.bit_and(inside, thread.own_slice)], "")
            marked = mg.bit_and(inside, mg.flag("eq", thread.warp, k % WARPS))
            mg.asm(copy, [mg.add(at, mg.add(mg.mul(thread.lane, 16), 32 * s.d)), marks, marked], "")
        mg.asm("cp.async.commit_group;", outputs="")

    def batch(j, *state):
        mg.asm(f"cp.async.wait_group {BUFFERS - 2};", outputs="")
        mg.asm(BARRIER, outputs="")  # all threads' copies, and the last use of the batch before
        issue(mg.add(j, BUFFERS - 1))
        state = list(state)
        current = [mg.select(unit.pieces, x, y) for x, y in zip(nothing(thread)[0], state)]
        at = buffer(j)
        for k in range(GROUP):
            inside = here(mg.add(mg.add(unit.origin, mg.mul(j, GROUP)), k))
            load = f"ld.shared.v4.f32 {{$0,$1,$2,$3}},[$4+{k * slot_bytes}];"
            values = mg.asm(load, [mg.add(at, mg.mul(thread.place, 16))], "ffff")
            marks = mg.asm(load, [mg.add(at, mg.add(mg.mul(thread.lane, 16), 32 * s.d))], "ffff")
            further = [mg.select(inside, x, y) for x, y in zip([*marks, *values], nothing(thread)[0])]
            [current] = fold(thread, [current], [further])
        [folded] = fold(thread, [state], [current])
        return [mg.select(unit.pieces, x, y) for x, y in zip(folded, current)]

    for j in range(BUFFERS - 1):
        issue(mg.i32(j))
    count = mg.div(mg.add(mg.sub(unit.stop, unit.origin), GROUP - 1), GROUP)
    state = mg.loop(0, count, 1, nothing(thread)[0], batch)
    mg.asm("cp.async.wait_all;", outputs="")
    mg.asm(BARRIER, outputs="")
    return state


def _arrive(thread, at):
    """Counts a unit's sums in, by one thread, and leaves in its record whether all of its (row, head) have come."""
    unit = _Unit(thread, at)
    divided = mg.bit_xor(mg.flag("eq", unit.kind, WHOLE), 1)
    counter = mg.gmem_element(thread.refs["counters"], unit.which, 1, mg.i32(0), 4)
    mg.asm("{.reg .b32 x,y; .reg .pred p,q; setp.ne.u32 q,$4,0; mov.b32 y,0; @q atom.add.acq_rel.gpu.global.u32 x,[$0],$2;"
           "@q add.u32 x,x,$2; @q setp.eq.u32 p,x,$3; @q selp.b32 y,1,0,p; setp.ne.u32 q,y,0; @q st.global.u32 [$0],0;"
           "st.shared.u32 [$1+28],y;}", [counter, at, unit.own, mg.sub(unit.stop, unit.first), divided], "")


def join(thread):
    """Of each divided (row, head), the unit that comes last adds up the sums. All of a CTA's units are counted in at
    its end."""
    s = thread.s
    units = mg.asm("ld.shared.b32 $0,[$1+4];", [thread.records])  # 0 where none is divided
    record = lambda i: mg.add(thread.records, mg.mul(mg.add(i, 1), 4 * WORDS))

    def each(i):
        at = record(i)

        def work():
            unit = _Unit(thread, at)

            def tile(i):
                finish(thread, unit.which, i, _merge(thread, unit, i))
                return ()

            mg.loop(0, s.tiles, 1, (), tile)

        mg.branch(mg.asm("ld.shared.b32 $0,[$1+28];", [at]), work)
        return ()

    def all_units():
        mg.asm(BARRIER, outputs="")
        for first in range(0, s.rounds - 2, THREADS):
            i = mg.add(thread.tid, first)
            mg.branch(mg.flag("lt", i, units), lambda i=i: _arrive(thread, record(i)))
        mg.asm(BARRIER, outputs="")
        mg.loop(0, units, 1, (), each)

    mg.branch(units, all_units)


def deliver(thread, cursor, piece_sums, group, state):
    """What becomes of the sums after a piece: nothing yet, the output, or a slot in memory."""
    at, which, _, piece, left = cursor
    kind, piece_base, group_base = (mg.asm(f"ld.shared.b32 $0,[$1+{4 * i}];", [at]) for i in (4, 5, 6))
    unit_done = mg.flag("eq", left, 1)
    group_done = sums.bit_or(unit_done, mg.flag("eq", mg.rem(piece, GROUP), GROUP - 1))

    def tiles(condition, body, of):
        mg.branch(condition, lambda: [body(i, tile) for i, tile in enumerate(of)])

    tiles(mg.bit_and(mg.flag("eq", kind, WHOLE), unit_done), lambda i, tile: finish(thread, which, i, tile), state)
    tiles(mg.flag("eq", kind, PIECES), lambda i, tile: _save(thread, mg.add(piece_base, piece), i, tile), piece_sums)
    tiles(mg.bit_and(mg.flag("eq", kind, GROUPS), group_done),
          lambda i, tile: _save(thread, mg.add(group_base, mg.div(piece, GROUP)), i, tile), group)
