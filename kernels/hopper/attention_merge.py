"""The sums of decode attention: folded in registers, through memory where a (row, head) is divided among CTAs, and to
the output.

A tile is [m, m, part, part, 4 values] of a thread: of columns 2 quad and 2 quad + 1, the part lane / 4 % 4 of the sum
of weights, and two head dimensions (`dimensions`). No CTA waits for another: of a divided (row, head) the
unit that comes last adds up the sums.
"""
from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_plan import GROUPS, PIECES, SLOTS, WHOLE, WORDS
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, GROUP, PARTS, PIECE, f32
from nvfp4jax.kernels.hopper.threads import store_global

WARPS = 8  # of a CTA
THREADS = 32 * WARPS
AHEAD = 16  # sums fetched together
FEW = 4  # of shared groups
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


def dimensions(thread):
    """The first of a thread's two head dimensions, and how far the second lies from it: as fragments of the cache's dtype have them."""
    return (thread.slice * 16 + thread.row * 2, 1) if thread.s.fp8 else (thread.slice * 16 + thread.row, 8)


def _finish(thread, which, i, tile):
    """Writes the output of a tile of a (row, head)."""
    s = thread.s
    row, head = which // s.heads, which % s.heads
    _, _, *parts, a, b, c, d = tile
    factors = [sums.reciprocal(sums.lanes(p, sums.fadd, (4, 8))) for p in parts]
    words = [mg.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0,$1;", [sums.pack(*map(sums.fmul, pair, factors))])
             for pair in ((a, b), (c, d))]
    column = thread.row + 8 * i  # now a lane holds head dimensions 2 quad, + 1 (and + 8) of a column; of FP8 4 quad, + 2 and 4 quad + 1, + 3
    token = row * s.tokens + column // s.group
    at = mg.gmem_element(thread.refs["out"], token * (s.heads * s.group) + (head * s.group + column % s.group), s.d,
                         thread.slice * 16 + thread.quad * (4 if s.fp8 else 2), 2)
    own = (column < s.columns) & thread.own_slice
    if s.fp8:
        store_global(at, [mg.asm(f"prmt.b32 $0,$1,$2,{selector};", words, effects=False) for selector in (0x5410, 0x7632)], own)
        return
    for h in range(2):
        store_global(at + 16 * h, [words[h]], own)


# --- what rows share --------------------------------------------------------------------------------------------------

def shared_pieces(thread, at):
    """Of the row of the unit whose record is at `at`: the pieces that are not its own."""
    return mg.asm(f"ld.shared.b32 $0,[$1+{4 * WORDS}];", [at])


def _fetch_shared(thread, which, number, i, inside):
    """A tile's sums of a unit of what a row shares, nothing where not `inside`."""
    s = thread.s
    row, head = which // s.heads, which % s.heads
    first = (number * s.rows + row) * (s.heads * s.group) + head * s.group
    load = "{{.reg .pred p; setp.ne.u32 p,${n},0; mov.f32 $0,{a}; mov.f32 $1,0f00000000; @p {load}}}"
    marks, values = [], []
    for e in range(2):
        query = first + mg.minimum(thread.quad * 2 + (8 * i + e), s.columns - 1)
        at = mg.gmem_element(thread.refs["shared_marks"], query, 8, thread.row % PARTS * 2, 4)
        marks.append(mg.asm(load.format(n=3, a="0fF149F2CA", load="ld.global.nc.v2.f32 {$0,$1},[$2];"), [at, inside], "ff"))
        first_dimension, apart = dimensions(thread)
        at = mg.gmem_element(thread.refs["shared_sums"], query, s.d, first_dimension, 4)
        both = f"ld.global.nc.f32 $0,[$2]; @p ld.global.nc.f32 $1,[$2+{4 * apart}];"
        values.append(mg.asm(load.format(n=3, a="0f00000000", load=both), [at, inside], "ff"))
    (m0, part0), (m1, part1) = marks
    (a, c), (b, d) = values
    return [m0, m1, part0, part1, a, b, c, d]


def _shared_group(thread, which, number, pieces, i):
    """A tile's sums of group `number` of a row's shared pieces, of those below `pieces`."""
    if thread.s.shared == GROUP:
        return _fetch_shared(thread, which, number, i, number * GROUP < pieces)
    numbers, [group] = [number * GROUP + k for k in range(GROUP)], nothing(thread)[:1]
    for piece in [_fetch_shared(thread, which, n, i, n < pieces) for n in numbers]:
        [group] = fold(thread, [group], [piece])
    return group


def _shared_groups(thread, which, pieces, i):
    """A tile's sums of the whole groups of a row's shared pieces."""
    groups, few = pieces // GROUP, FEW if thread.s.shared == GROUP else 1

    def batch(j, *state):
        for group in [_shared_group(thread, which, j * few + k, groups * GROUP, i) for k in range(few)]:
            [state] = fold(thread, [state], [group])
        return state

    return mg.loop(0, (groups + (few - 1)) // few, 1, nothing(thread)[0], batch)


def beginning(thread, cursor, fresh):
    """What a unit's sums go on from, the group's and the row's, at its first piece."""
    s = thread.s
    if not s.shared:
        return nothing(thread), nothing(thread)
    at, which, _, piece, _ = cursor
    shared = shared_pieces(thread, at)
    other = [x for tile in nothing(thread) for x in tile]

    def load():
        groups = [_shared_group(thread, which, shared // GROUP, shared, i) for i in range(s.tiles)]
        whole = [_shared_groups(thread, which, shared, i) for i in range(s.tiles)]
        return [x for tile in (*groups, *whole) for x in tile]

    flat = mg.branch_values(fresh & (piece == shared) & (shared > 0), load, other + other)
    tiles = [list(flat[8 * i:8 * i + 8]) for i in range(2 * s.tiles)]
    return tiles[:s.tiles], tiles[s.tiles:]


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
    before = _shared_groups(thread, unit.which, unit.first, i) if thread.s.shared else nothing(thread)[i]
    return mg.loop(0, count, 1, before, batch)


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
        self.first = shared_pieces(thread, at) if s.shared else mg.i32(0)
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
    record = lambda i: thread.records + (i + 1) * (4 * s.words)

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
