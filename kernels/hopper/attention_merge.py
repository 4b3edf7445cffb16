"""The sums of decode attention: folded in registers, through memory where a (row, head) is divided among CTAs, and to
the output.

A tile is [m, m, part, part, 4 values] of a thread: of columns 2 quad and 2 quad + 1, the part lane / 4 % 4 of the sum
of weights, and head dimensions 16 slice + lane / 4 and + 8. No CTA waits for another: of a divided (row, head) the
unit that comes last adds up the sums.
"""
from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_plan import GROUPS, PIECES, SLOTS, WHOLE, WORDS
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, GROUP, PIECE, f32
from nvfp4jax.kernels.hopper.threads import store_global

WARPS = 8  # of a CTA
THREADS = 32 * WARPS
AHEAD = 16  # sums fetched together
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


def _finish(thread, which, i, tile):
    """Writes the output of a tile of a (row, head)."""
    s = thread.s
    row, head = which // s.heads, which % s.heads
    _, _, *parts, a, b, c, d = tile
    factors = [sums.reciprocal(sums.lanes(p, sums.fadd, (4, 8))) for p in parts]
    words = [mg.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0,$1;", [sums.pack(*map(sums.fmul, pair, factors))])
             for pair in ((a, b), (c, d))]
    column = thread.row + 8 * i  # now a lane holds head dimensions 2 quad, + 1 (and + 8) of a column
    token = row * s.tokens + column // s.group
    at = mg.gmem_element(thread.refs["out"], token * (s.heads * s.group) + (head * s.group + column % s.group), s.d,
                         thread.slice * 16 + thread.quad * 2, 2)
    own = (column < s.columns) & thread.own_slice
    for h in range(2):
        store_global(at + 16 * h, [words[h]], own)


# --- sums that pass through memory ------------------------------------------------------------------------------------

def _places(thread, slot, i):
    """Addresses of this thread's values and marks of a tile in a slot."""
    s = thread.s
    place, slot = thread.slice * 32 + thread.lane, slot * s.tiles + i
    return (mg.gmem_element(thread.refs["sums"], slot, 8 * s.d, place * 4, 4),
            mg.gmem_element(thread.refs["marks"], slot, 128, thread.lane * 4, 4))


def _save(thread, slot, i, tile):
    values, marks = _places(thread, slot, i)
    own, first = thread.warp < thread.s.d // 16, thread.warp == 0
    store = "{.reg .pred p; setp.ne.u32 p,$5,0; @p st.global.v4.f32 [$0],{$1,$2,$3,$4};}"
    mg.asm(store, [values, *tile[4:], own], "")
    mg.asm(store, [marks, *tile[:4], first], "")


def _fetch(thread, base, i, numbers, first, stop):
    """A tile's sums in the slots of `numbers`, nothing for those outside first .. stop - 1. base: the slot of number
    0."""
    load = ("{{.reg .pred p; setp.ne.u32 p,$5,0; mov.f32 $0,{0}; mov.f32 $1,{0}; mov.f32 $2,0f00000000; mov.f32 $3,0f00000000;"
            "@p ld.global.cg.v4.f32 {{$0,$1,$2,$3}},[$4];}}")
    out = []
    for number in numbers:
        here = (number < stop) & (number >= first)
        values, marks = _places(thread, base + number, i)
        out.append([*mg.asm(load.format("0fF149F2CA"), [marks, here], "ffff"), *mg.asm(load.format("0f00000000"), [values, here], "ffff")])
    return out


def _merge_groups(thread, unit, i):
    """A tile's sums of a (row, head) from those of its groups."""
    def batch(j, *state):
        at = unit.first_group + j * AHEAD
        fetched = _fetch(thread, unit.group_base, i, [at + k for k in range(AHEAD)], unit.first_group, unit.stop_group)
        for group in fetched:
            [state] = fold(thread, [state], [group])
        return state

    count = (unit.stop_group - unit.first_group + (AHEAD - 1)) // AHEAD
    return mg.loop(0, count, 1, nothing(thread)[0], batch)


def _merge_pieces(thread, unit, i, group, groups):
    """A tile's sums of 1 or 2 groups, number `group` and the next, from those of their pieces."""
    at = group * GROUP
    fetched = _fetch(thread, unit.piece_base, i, [at + k for k in range(GROUP * groups)], unit.first, unit.stop)
    state = nothing(thread)
    for j in range(groups):
        own = nothing(thread)
        for piece in fetched[GROUP * j:GROUP * (j + 1)]:
            own[:1] = fold(thread, own[:1], [piece])
        state[:1] = fold(thread, state[:1], own[:1]) if groups > 1 else own[:1]
    return state[0]


class _Unit:
    """The unit of a record, and what is known of its (row, head)."""

    def __init__(self, thread, at):
        s = thread.s
        self.which, self.end, self.begin, self.count, self.kind, self.piece_base, self.group_base = (
            mg.asm(f"ld.shared.b32 $0,[$1+{4 * i}];", [at]) for i in range(7))
        self.stop = (self.end + (PIECE - 1)) // PIECE
        self.first = mg.i32(0)
        if s.window:
            self.first = sums.not_negative(self.end + 1 - (s.tokens + s.window)) // PIECE
        self.first_group, self.stop_group = self.first // GROUP, (self.stop + (GROUP - 1)) // GROUP
        self.groups = self.stop_group - self.first_group
        self.group = self.begin // GROUP  # of its first piece


# What is to be done for a unit's record: nothing; add up groups, or pieces of at most 2 groups, to the output; add up the pieces of a
# group.
OUT_OF_GROUPS, OUT_OF_PIECES, GROUP_OF_PIECES = 1, 2, 3


def _arrive(thread, at, later):
    """Counts a unit in, by one thread, and leaves in its record what is to be done because all have come. later: 0
    when the CTA has saved its units' sums; 1 when it has saved those of groups that it found complete."""
    unit, select = _Unit(thread, at), mg.select
    s = thread.s
    before = mg.asm("ld.shared.b32 $0,[$1+28];", [at])
    divided = unit.kind != WHOLE
    act = select(later, (before == GROUP_OF_PIECES), divided & (unit.count > 0))
    of_pieces = (unit.kind == PIECES) & (later ^ 1)
    few = unit.groups < 3
    own_group = of_pieces & (few ^ 1)
    counter = select(own_group, unit.group_base + unit.group + (s.rows * s.heads - SLOTS), unit.which)
    start, stop = unit.group * GROUP, (unit.group + 1) * GROUP
    pieces_of_group = mg.minimum(stop, unit.stop) - select(start < unit.first, unit.first, start)
    wanted = select(of_pieces, select(few, unit.stop - unit.first, pieces_of_group), unit.groups)
    last_group = (unit.begin + unit.count - 1) // GROUP
    amount = select(unit.kind == GROUPS, last_group - unit.group + 1, 1)
    outcome = select(own_group, GROUP_OF_PIECES, select(of_pieces, OUT_OF_PIECES, OUT_OF_GROUPS))
    counter = mg.gmem_element(thread.refs["counters"], counter, 1, mg.i32(0), 4)
    mg.asm("{.reg .b32 x,y; .reg .pred p,q; setp.ne.u32 q,$5,0; mov.b32 y,0; @q atom.add.acq_rel.gpu.global.u32 x,[$0],$2;"
           "@q add.u32 x,x,$2; @q setp.eq.u32 p,x,$3; @q selp.b32 y,$4,0,p; setp.ne.u32 q,y,0; @q st.global.u32 [$0],0;"
           "st.shared.u32 [$1+28],y;}", [counter, at, amount, wanted, outcome, act], "")


def join(thread):
    """Of each divided (row, head), the unit that comes last adds up the sums. All of a CTA's units are counted in at
    its end."""
    s = thread.s
    units, stages = (mg.asm(f"ld.shared.b32 $0,[$1+{i}];", [thread.records]) for i in (4, 8))
    record = lambda i: thread.records + (i + 1) * (4 * WORDS)

    def each(i):
        at = record(i)
        todo = mg.asm("ld.shared.b32 $0,[$1+28];", [at])

        def work():
            unit = _Unit(thread, at)

            def when(what, body):
                def tiles():
                    for i in range(s.tiles):
                        body(i)

                mg.branch(todo == what, tiles)

            when(OUT_OF_GROUPS, lambda i: _finish(thread, unit.which, i, _merge_groups(thread, unit, i)))
            when(OUT_OF_PIECES, lambda i: _finish(thread, unit.which, i, _merge_pieces(thread, unit, i, unit.first_group, 2)))
            when(GROUP_OF_PIECES, lambda i: _save(thread, unit.group_base + unit.group, i,
                                                  _merge_pieces(thread, unit, i, unit.group, 1)))

        mg.branch(todo, work)
        return ()

    def stage(later):
        mg.asm(BARRIER, outputs="")
        for first in range(0, s.rounds - 2, THREADS):
            i = thread.tid + first
            mg.branch(i < units, lambda i=i: _arrive(thread, record(i), later))
        mg.asm(BARRIER, outputs="")
        mg.loop(0, units, 1, (), each)
        return ()

    mg.loop(0, stages, 1, (), stage)


def deliver(thread, cursor, piece_sums, group, state):
    """What becomes of the sums after a piece: nothing yet, the output, or a slot in memory."""
    at, which, _, piece, left = cursor
    kind, piece_base, group_base = (mg.asm(f"ld.shared.b32 $0,[$1+{4 * i}];", [at]) for i in (4, 5, 6))
    unit_done = left == 1
    group_done = sums.bit_or(unit_done, piece % GROUP == GROUP - 1)

    def tiles(condition, body, of):
        mg.branch(condition, lambda: [body(i, tile) for i, tile in enumerate(of)])

    tiles((kind == WHOLE) & unit_done, lambda i, tile: _finish(thread, which, i, tile), state)
    tiles(kind == PIECES, lambda i, tile: _save(thread, piece_base + piece, i, tile), piece_sums)
    tiles((kind == GROUPS) & group_done,
          lambda i, tile: _save(thread, group_base + piece // GROUP, i, tile), group)
