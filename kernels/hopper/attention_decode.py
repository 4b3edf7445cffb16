"""Decode attention on Hopper: few queries a row against a cache of ragged lengths, one launch, read in place.

A CTA walks over its units of the plan (`attention_plan`), a piece of 128 slots at a time. Each of its 8 warps loads 16
slots of keys and values by cp.async, a few pieces ahead and across units: zeros past a row's end, where nothing is
read. The scores of a piece are divided among the warps by slot and its values by head dimension, both by mma.sync
m16n8k16; maxima, parts of the sum and the weights cross through shared memory, so that the sums stay in registers from
piece to piece. The columns of an mma are queries: the heads of a group, times the tokens where there are several; more
than 8 take several mmas.

Of a divided (row, head) the unit that comes last adds up the sums, in order: no CTA waits for another.
"""
import dataclasses

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import attention_merge as merge
from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_merge import BARRIER, THREADS, WARPS
from nvfp4jax.kernels.hopper.attention_plan import SLOTS, WORDS
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, GROUP, PARTS, PIECE, f32

MOST_COLUMNS = 32  # queries of a key head: more do not fit the registers
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3},[$4];"
LDMATRIX_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3},[$4];"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for. heads: key heads; group: query heads of each; rounds: records of a CTA in the
    table."""

    rows: int
    tokens: int
    heads: int
    group: int
    d: int
    capacity: int
    rounds: int
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def columns(self):
        return self.tokens * self.group

    @property
    def tiles(self):
        """mmas of 8 columns."""
        return -(-self.columns // 8)

    @property
    def row(self):
        """Bytes of a slot's keys, and of a query."""
        return 2 * self.d

    @property
    def stage(self):
        return 2 * PIECE * self.row

    @property
    def stages(self):
        return min(6, (mg.SHARED_MEMORY - 1024 - self.exchange) // (self.stage + self.queries))

    @property
    def queries(self):
        return 8 * self.tiles * self.row

    @property
    def maxima_at(self):
        """Offset in the shared memory that the warps exchange by: weights, maxima, parts, records."""
        return self.tiles * WARPS * 256

    @property
    def parts_at(self):
        return self.maxima_at + self.tiles * WARPS * 32

    @property
    def records_at(self):
        return self.parts_at + self.tiles * WARPS * PARTS * 32

    @property
    def exchange(self):
        return -(-(self.records_at + self.rounds * WORDS * 4) // 256) * 256

    @property
    def shared(self):
        return self.exchange + self.stages * (self.stage + self.queries)


class _Thread:
    """What a thread knows of its place, in registers, computed once.

    slice: the 16 head dimensions whose sums it has, of all columns; place: among the threads that have them;
    own_slice: whether no other warp has the same.
    """

    def __init__(self, refs, s: Shape):
        add, mul, div, rem, xor = mg.add, mg.mul, mg.div, mg.rem, mg.bit_xor
        self.refs, self.s = refs, s
        self.tid = mg.thread_index()
        lane, self.warp = rem(self.tid, 32), div(self.tid, 32)
        self.lane, self.row, self.quad = lane, div(lane, 4), rem(lane, 4)
        self.layer = mg.asm("ld.global.nc.b32 $0,[$1];", [mg.gmem_address(refs["layer"])])
        base = mg.smem_address(refs["shared"])
        self.exchange = base
        self.records = add(base, s.records_at)
        self.ring = add(base, s.exchange)
        self.queries = add(self.ring, s.stages * s.stage)
        self.c = f32(sums.factor(s.scale, s.soft_cap))
        # In a stage, 16-byte unit u of slot p lies at row p, unit u ^ p % 8: 8 slots of a unit hit 8 bank groups.
        units = s.d // 8  # of a slot
        self.per_copy = 32 // units  # slots that a warp's copy instruction has
        own = mul(self.warp, 16 * s.row)
        self.copy_row, unit = div(lane, units), rem(lane, units)
        self.copy_at = add(own, add(mul(self.copy_row, s.row), mul(xor(unit, self.copy_row), 16)))
        key = rem(lane, 16)
        self.key_at = add(own, add(mul(key, s.row), mul(xor(div(lane, 16), rem(key, 8)), 16)))
        query = rem(lane, 8)
        self.query_at = add(mul(query, s.row), mul(xor(div(lane, 8), query), 16))
        self.slice = rem(self.warp, s.d // 16)
        self.place, self.own_slice = add(mul(self.slice, 32), lane), mg.flag("lt", self.warp, s.d // 16)
        slot = add(rem(lane, 8), mul(div(lane, 16), 8))
        unit = add(mul(self.slice, 2), rem(div(lane, 8), 2))
        self.value_at = add(mul(slot, s.row), add(mul(xor(unit, rem(lane, 8)), 16), PIECE * s.row))

    def columns(self):
        """[tile][e]: this lane's columns."""
        return [[mg.add(mg.mul(self.quad, 2), 8 * i + e) for e in range(2)] for i in range(self.s.tiles)]


def _record(thread, at, old, changed):
    """[(row, head), end, piece, pieces] of the unit whose record is at `at` where `changed`, else the old ones."""
    moves = "".join(f"mov.b32 ${i},${i + 4};" for i in range(4))
    return mg.asm(f"{{.reg .pred p; setp.ne.u32 p,$9,0; {moves} @p ld.shared.v4.b32 {{$0,$1,$2,$3}},[$8];}}", [*old, at, changed], "rrrr")


def _advance(thread, cursor):
    """cursor: address of the unit's record, (row, head), end, piece, pieces left with this one."""
    at, which, end, piece, left = cursor
    last = mg.flag("eq", left, 1)
    at = mg.add(at, mg.mul(last, 4 * WORDS))
    return [at, *_record(thread, at, [which, end, mg.add(piece, 1), mg.sub(left, mg.flag("lt", 0, left))], last)]


def _query_place(thread, at):
    """Where a unit's queries lie in shared memory: units in flight have places of their own."""
    s = thread.s
    number = mg.div(mg.sub(at, thread.records), 4 * WORDS)
    return mg.add(thread.queries, mg.mul(mg.rem(number, s.stages), s.queries))


def _issue(thread, stage, cursor):
    """Starts the loads of the cursor's piece into the stage at an address, and of its unit's queries with the first
    piece."""
    s, add, mul = thread.s, mg.add, mg.mul
    at, which, end, piece, left = cursor
    some = mg.flag("lt", 0, left)
    slot = add(mul(piece, PIECE), mul(thread.warp, 16))
    rest = mg.select(some, mg.sub(mg.sub(end, slot), thread.copy_row), 0)
    head = add(mul(thread.layer, s.rows * s.heads), which)
    sources = [mg.gmem_element(thread.refs[name], head, s.capacity, mg.i32(0), s.row) for name in ("keys", "values")]
    offset = add(mul(slot, s.row), mul(thread.lane, 16))
    sources = [sums.wide_add(source, offset) for source in sources]
    to = add(stage, thread.copy_at)
    places = {0: to}
    for i in range(16 // thread.per_copy):
        twist = 16 * thread.per_copy * i % 128
        if twist not in places:
            places[twist] = mg.bit_xor(to, twist)
        size = mg.asm(f"{{.reg .pred p; setp.gt.s32 p,$1,{thread.per_copy * i}; selp.b32 $0,16,0,p;}}", [rest], effects=False)
        for x, source in enumerate(sources):
            mg.asm(f"cp.async.cg.shared.global.L2::128B [$0+{512 * i + x * PIECE * s.row}],[$1+{512 * i}],16,$2;",
                   [places[twist], source, size], "")
    new = mg.bit_and(some, mg.flag("eq", piece, mg.asm("ld.shared.b32 $0,[$1+8];", [at])))
    mg.branch(new, lambda: _issue_queries(thread, _query_place(thread, at), which))
    mg.asm("cp.async.commit_group;", outputs="")


def _issue_queries(thread, place, which):
    s, add, mul, div, rem = thread.s, mg.add, mg.mul, mg.div, mg.rem
    units = s.d // 8
    row, head = div(which, s.heads), rem(which, s.heads)
    for first in range(0, 8 * s.tiles * units, THREADS):
        i = add(thread.tid, first)
        column, unit = div(i, units), rem(i, units)
        token = add(mul(row, s.tokens), div(column, s.group))
        source = mg.gmem_element(thread.refs["q"], add(mul(token, s.heads * s.group), add(mul(head, s.group), rem(column, s.group))),
                                 s.d, mul(unit, 8), 2)
        size = mul(mg.flag("lt", column, s.columns), 16)
        inside = mg.flag("lt", column, 8 * s.tiles)
        to = add(place, add(mul(column, s.row), mul(mg.bit_xor(unit, rem(column, 8)), 16)))
        mg.asm("{.reg .pred p; setp.ne.u32 p,$3,0; @p cp.async.cg.shared.global [$0],[$1],16,$2;}", [to, source, size, inside], "")


def _scores(thread, stage, query, cursor):
    """The warp's 16 slots of the piece: [tile][slot row, row + 8][column 2 quad, + 1], minus infinity where not seen."""
    s = thread.s
    _, _, end, piece, _ = cursor
    at, queries = mg.add(stage, thread.key_at), mg.add(query, thread.query_at)
    scores = [[f32(0)] * 4 for _ in range(s.tiles)]
    for pair in range(s.d // 32):
        keys = [mg.asm(LDMATRIX, [mg.bit_xor(at, 32 * (2 * pair + i))], "rrrr") for i in range(2)]
        for tile in range(s.tiles):
            q = mg.asm(LDMATRIX, [mg.add(mg.bit_xor(queries, 64 * pair), tile * 8 * s.row)], "rrrr")
            for i in range(2):
                scores[tile] = mg.asm(MMA, [*keys[i], *q[2 * i:2 * i + 2], *scores[tile]], "ffff", effects=False)
    slot = mg.add(mg.add(mg.mul(piece, PIECE), mg.mul(thread.warp, 16)), thread.row)
    rest = mg.sub(end, slot)
    out = []
    for tile, columns in zip(scores, thread.columns()):
        own = [rest] * 2 if s.tokens == 1 else [
            mg.add(rest, mg.sub(mg.minimum(mg.div(c, s.group), s.tokens - 1), s.tokens - 1)) for c in columns]
        out.append([[sums.see(sums.cap(tile[2 * h + e], s.scale, s.soft_cap), own[e], s.window, 8 * h) for e in range(2)]
                    for h in range(2)])
    return out


def _weights(thread, scores):
    """Leaves weights and parts of their sums in shared memory. -> [tile][column]: the piece's maximum."""
    s, c = thread.s, thread.c
    address = lambda offset: mg.add(thread.exchange, offset)
    for i, tile in enumerate(scores):
        m = [sums.lanes(sums.fmax(sums.fmax(tile[0][e], tile[1][e]), f32(EMPTY)), sums.fmax, (4, 8, 16)) for e in range(2)]
        to = mg.add(address(s.maxima_at + 32 * i), mg.add(mg.mul(thread.warp, 32 * s.tiles), mg.mul(thread.quad, 8)))
        mg.asm("{.reg .pred p; setp.eq.u32 p,$3,0; @p st.shared.v2.f32 [$0],{$1,$2};}", [to, *m, thread.row], "")
    mg.asm(BARRIER, outputs="")
    maxima = []
    for i, tile in enumerate(scores):
        at = mg.add(address(s.maxima_at + 32 * i), mg.mul(thread.quad, 8))
        pairs = [mg.asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{w * 32 * s.tiles}];", [at], "ff") for w in range(WARPS)]
        m = [pairs[0][e] for e in range(2)]
        for p in pairs[1:]:
            m = [sums.fmax(a, b) for a, b in zip(m, p)]
        maxima.append(m)
        shift = [sums.fneg(sums.fmul(x, c)) for x in m]
        p = [[sums.weight(tile[h][e], c, shift[e]) for e in range(2)] for h in range(2)]
        parts = [sums.lanes(sums.fadd(p[0][e], p[1][e]), sums.fadd, (4,)) for e in range(2)]
        to = mg.add(address(s.parts_at + 32 * i), mg.add(mg.mul(mg.add(mg.mul(thread.warp, PARTS), mg.div(thread.row, 2)), 32 * s.tiles),
                                                         mg.mul(thread.quad, 8)))
        mg.asm("{.reg .pred p; setp.eq.u32 p,$3,0; @p st.shared.v2.f32 [$0],{$1,$2};}", [to, *parts, mg.rem(thread.row, 2)], "")
        words = [mg.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0,$1;", [sums.pack(*p[h])]) for h in range(2)]
        to = mg.add(thread.exchange, mg.add(mg.mul(mg.add(mg.mul(thread.warp, s.tiles), i), 256), mg.mul(thread.lane, 8)))
        mg.asm("st.shared.v2.b32 [$0],{$1,$2};", [to, *words], "")
    mg.asm(BARRIER, outputs="")
    return maxima


def _values(thread, stage, maxima):
    """[tile]: the piece's sums, [m, m, part, part, 4 values]: of columns 2 quad and 2 quad + 1, part row % 4, and head
    dimensions 16 slice + row and + 8."""
    s = thread.s
    at, weights = mg.add(stage, thread.value_at), mg.add(thread.exchange, mg.mul(thread.lane, 8))
    out = [[f32(0)] * 4 for _ in range(s.tiles)]
    for k in range(WARPS):
        values = mg.asm(LDMATRIX_TRANSPOSED.replace("[$4]", f"[$4+{16 * k * s.row}]"), [at], "rrrr")
        for i in range(s.tiles):
            p = mg.asm(f"ld.shared.v2.b32 {{$0,$1}},[$2+{(k * s.tiles + i) * 256}];", [weights], "rr")
            out[i] = mg.asm(MMA, [*values, *p, *out[i]], "ffff", effects=False)
    at = mg.add(thread.exchange, mg.add(mg.mul(mg.rem(thread.row, PARTS), 32 * s.tiles), mg.mul(thread.quad, 8)))
    pieces = []
    for i in range(s.tiles):
        parts = [mg.asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{s.parts_at + 32 * i + k * PARTS * 32 * s.tiles}];", [at], "ff") for k in range(WARPS)]
        pieces.append([*maxima[i], *(sums.total([p[e] for p in parts]) for e in range(2)), *out[i]])
    return pieces


def _program(refs, s: Shape):
    """One thread's program."""
    thread = _Thread(refs, s)
    cta = mg.asm("mov.u32 $0,%ctaid.x;", effects=False)
    table = mg.gmem_element(refs["table"], mg.mul(cta, s.rounds), WORDS, mg.i32(0), 4)
    for first in range(0, 2 * s.rounds, THREADS):
        i = mg.add(thread.tid, first)
        words = mg.load_global(sums.wide_add(table, mg.mul(i, 16)), 4, inside := mg.flag("lt", i, 2 * s.rounds))
        mg.store_shared(mg.add(thread.records, mg.mul(i, 16)), words, inside)
    mg.asm(BARRIER, outputs="")
    pieces = mg.asm("ld.shared.b32 $0,[$1];", [thread.records])
    at = mg.add(thread.records, 4 * WORDS)
    first = [at, *_record(thread, at, [mg.i32(0)] * 4, mg.i32(1))]
    ahead = first
    for i in range(s.stages - 1):
        ahead = _advance(thread, ahead) if i else ahead
        _issue(thread, mg.add(thread.ring, i * s.stage), ahead)

    def piece(_, stage, behind, *carry):
        """stage: this piece's place in the ring; behind: the piece before's, free again."""
        cursor, ahead = list(carry[:5]), list(carry[5:10])
        flat = carry[10:]
        group, state = ([list(flat[8 * k:8 * k + 8]) for k in range(first, first + s.tiles)] for first in (0, s.tiles))
        mg.asm(f"cp.async.wait_group {s.stages - 2};", outputs="")
        mg.asm(BARRIER, outputs="")  # all warps' loads, and the last use of the piece before
        ahead = _advance(thread, ahead)
        _issue(thread, mg.add(thread.ring, behind), ahead)
        here = mg.add(thread.ring, stage)
        scores = _scores(thread, here, _query_place(thread, cursor[0]), cursor)
        sums_of_piece = _values(thread, here, _weights(thread, scores))

        fresh = mg.flag("eq", cursor[3], mg.asm("ld.shared.b32 $0,[$1+8];", [cursor[0]]))
        starts_group = sums.bit_or(fresh, mg.flag("eq", mg.rem(cursor[3], GROUP), 0))
        group = merge.fold(thread, merge.choose(starts_group, merge.nothing(thread), group), sums_of_piece)
        done = sums.bit_or(mg.flag("eq", cursor[4], 1), mg.flag("eq", mg.rem(cursor[3], GROUP), GROUP - 1))
        state = merge.choose(fresh, merge.nothing(thread), state)
        state = merge.choose(done, merge.fold(thread, state, group), state)
        merge.deliver(thread, cursor, sums_of_piece, group, state)
        behind, stage = stage, mg.add(stage, s.stage)
        stage = mg.select(mg.flag("eq", stage, s.stages * s.stage), 0, stage)
        return stage, behind, *_advance(thread, cursor), *ahead, *(x for tile in (*group, *state) for x in tile)

    nothing = [x for tile in merge.nothing(thread) for x in tile]
    mg.loop(0, pieces, 1, [mg.i32(0), mg.i32((s.stages - 1) * s.stage), *first, *ahead, *nothing, *nothing], piece)
    mg.asm("cp.async.wait_all;", outputs="")
    merge.join(thread)


def decode(q, keys, values, layer, plan, *, scale, window=None, soft_cap=None):
    """q bf16 [B, T, Hq, D], keys and values bf16 [L, B, Hkv, S, D], layer i32 [], plan: of `attention_plan.plan` ->
    q's shape."""
    rows, tokens, query_heads, d = q.shape
    _, _, heads, capacity, _ = keys.shape
    ctas, rounds, _ = plan.table.shape
    s = Shape(rows, tokens, heads, query_heads // heads, d, capacity, rounds, scale, window, soft_cap)
    if s.stages < 2:
        raise NotImplementedError(f"attention on Hopper: {rows} rows of {heads} key heads give a CTA {rounds} units, which leave no "
                                  "shared memory for two pieces; call it for fewer rows")
    single = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    slots = 2 * SLOTS * s.tiles
    return mg.thread_kernel(
        lambda refs: _program(refs, s), ["q", "keys", "values", "layer", "table", "counters", "out", "sums", "marks", "shared"],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), single(slots, 8 * d), single(slots, 128)], grid=ctas, warps=WARPS,
        shared_words=s.shared // 4)(q, keys, values, layer.reshape(1), plan.table, plan.counters)[0]
