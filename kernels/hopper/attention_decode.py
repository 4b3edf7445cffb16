"""Decode attention on Hopper: few queries a row against a cache of ragged lengths, one launch, read in place.

Where rows share what they begin with (`attention_shared`), the pieces here are the rows' own: a unit goes on from the sums of the
shared ones.

A CTA walks over its units of the plan (`attention_plan`), a piece of 128 slots at a time. Each of its 8 warps loads 16
slots of keys and values by cp.async, a few pieces ahead and across units: zeros past a row's end, where nothing is
read. The scores of a piece are divided among the warps by slot and its values by head dimension, both by mma.sync
m16n8k16; maxima, parts of the sum and the weights cross through shared memory, so that the sums stay in registers from
piece to piece. The columns of an mma are queries: the heads of a group, times the tokens where there are several; more
than 8 take several mmas.

Of a divided (row, head) the unit that comes last adds up the sums, in order: no CTA waits for another.

An FP8 cache (`nvfp4jax.fp8`) goes through the ring as it is, half the bytes, with its scales behind it (`attention_fp8`).
"""
import dataclasses

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import attention_fp8 as fp8
from nvfp4jax.kernels.hopper import attention_merge as merge
from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper import threads
from nvfp4jax.kernels.hopper.attention_merge import BARRIER, THREADS, WARPS
from nvfp4jax.kernels.hopper.attention_plan import SLOTS, WORDS
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, GROUP, PARTS, PIECE, f32
from nvfp4jax.kernels.hopper.machine import SHARED_MEMORY
from nvfp4jax.kernels.hopper.threads import load_global, store_shared

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
    words: int = WORDS  # of a record
    shared: int = 0  # rows begin with pieces that lie elsewhere: for how many of them there are sums in memory at a time
    fp8: bool = False  # the cache

    @property
    def columns(self):
        return self.tokens * self.group

    @property
    def tiles(self):
        """mmas of 8 columns."""
        return -(-self.columns // 8)

    @property
    def row(self):
        """Bytes of a slot's keys."""
        return self.d if self.fp8 else 2 * self.d

    @property
    def query_row(self):
        return 2 * self.d

    @property
    def scales_at(self):
        """Offset in a stage: scales lie behind keys and values."""
        return 2 * PIECE * self.row

    @property
    def stage(self):
        return self.scales_at + (2 * PIECE * fp8.SCALE if self.fp8 else 0)

    @property
    def stages(self):
        return min(6, (SHARED_MEMORY - 1024 - self.exchange) // (self.stage + self.queries))

    @property
    def overlapped(self):
        """Whether a piece's scores run beside the values of the one before: where there are stages enough that loads stay on their way."""
        return self.fp8 and self.stages > 3

    @property
    def queries(self):
        return 8 * self.tiles * self.query_row

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
        return -(-(self.records_at + self.rounds * self.words * 4) // 256) * 256

    @property
    def shared_memory(self):
        return self.exchange + self.stages * (self.stage + self.queries)


class _Thread:
    """What a thread knows of its place, in registers, computed once.

    slice: the 16 head dimensions whose sums it has, of all columns; place: among the threads that have them;
    own_slice: whether no other warp has the same.
    """

    def __init__(self, refs, s: Shape):
        self.refs, self.s = refs, s
        self.tid = mg.thread_index()
        lane, self.warp = self.tid % 32, self.tid // 32
        self.lane, self.row, self.quad = lane, lane // 4, lane % 4
        self.layer = mg.asm("ld.global.nc.b32 $0,[$1];", [mg.gmem_address(refs["layer"])])
        base = mg.smem_address(refs["shared"])
        self.exchange = base
        self.records = base + s.records_at
        self.ring = base + s.exchange
        self.queries = self.ring + s.stages * s.stage
        self.c = f32(sums.factor(s.scale, s.soft_cap))
        # In a stage, 16-byte unit u of slot p lies at row p, unit u ^ p % 8: 8 slots of a unit hit 8 bank groups. (Of 64 FP8 bytes: u ^ p / 2 % 4.)
        units = s.row // 16  # of a slot
        twist = (lambda slot: slot // 2) if units == 4 else (lambda slot: slot)
        self.per_copy = 32 // units  # slots that a warp's copy instruction has
        own = self.warp * (16 * s.row)
        self.copy_row, unit = lane // units, lane % units
        self.copy_at = own + (self.copy_row * s.row + (unit ^ twist(self.copy_row)) * 16)
        key = lane % 16
        self.key_at = own + (key * s.row + (lane // 16 ^ key % 8) * 16)
        query = lane % 8
        self.query_at = query * s.query_row + (lane // 8 ^ query) * 16
        self.slice = self.warp % (s.d // 16)
        self.place, self.own_slice = self.slice * 32 + lane, self.warp < s.d // 16
        slot = lane % 8 + lane // 16 * 8
        unit = self.slice * 2 + lane // 8 % 2
        self.value_at = slot * s.row + ((unit ^ lane % 8) * 16 + PIECE * s.row)
        if s.fp8:
            self.key_at = own + (self.row * s.row + (twist(self.row) * 16 + self.quad * 2))
            self.value_at = lane * s.row + ((self.slice ^ twist(lane % 8)) * 16 + PIECE * s.row)
            self.scale_at = self.warp * (16 * fp8.SCALE) + (self.row * fp8.SCALE + s.scales_at)

    def columns(self):
        """[tile][e]: this lane's columns."""
        return [[self.quad * 2 + (8 * i + e) for e in range(2)] for i in range(self.s.tiles)]


def _record(thread, at, old, changed):
    """[(row, head), end, piece, pieces] of the unit whose record is at `at` where `changed`, else the old ones."""
    moves = "".join(f"mov.b32 ${i},${i + 4};" for i in range(4))
    return mg.asm(f"{{.reg .pred p; setp.ne.u32 p,$9,0; {moves} @p ld.shared.v4.b32 {{$0,$1,$2,$3}},[$8];}}", [*old, at, changed], "rrrr")


def _advance(thread, cursor):
    """cursor: address of the unit's record, (row, head), end, piece, pieces left with this one."""
    at, which, end, piece, left = cursor
    last = left == 1
    at = at + last * (4 * thread.s.words)
    return [at, *_record(thread, at, [which, end, piece + 1, left - (left > 0)], last)]


def _query_place(thread, at):
    """Where a unit's queries lie in shared memory: units in flight have places of their own."""
    s = thread.s
    number = (at - thread.records) // (4 * s.words)
    return thread.queries + number % s.stages * s.queries


def _issue(thread, stage, cursor):
    """Starts the loads of the cursor's piece into the stage at an address, and of its unit's queries with the first
    piece."""
    s = thread.s
    at, which, end, piece, left = cursor
    some = left > 0
    slot = piece * PIECE + thread.warp * 16
    rest = mg.select(some, end - slot - thread.copy_row, 0)
    head = thread.layer * (s.rows * s.heads) + which
    sources = [mg.gmem_element(thread.refs[name], head, s.capacity, mg.i32(0), s.row) for name in ("keys", "values")]
    own = slot - merge.shared_pieces(thread, at) * PIECE if s.shared else slot
    offset = own * s.row + thread.lane * 16
    sources = [source + offset for source in sources]
    to = stage + thread.copy_at
    places = {0: to}
    for i in range(16 // thread.per_copy):
        twist = 16 * thread.per_copy * i % 128
        if twist not in places:
            places[twist] = to ^ twist
        size = mg.asm(f"{{.reg .pred p; setp.gt.s32 p,$1,{thread.per_copy * i}; selp.b32 $0,16,0,p;}}", [rest], effects=False)
        for x, source in enumerate(sources):
            mg.asm(f"cp.async.cg.shared.global.L2::128B [$0+{512 * i + x * PIECE * s.row}],[$1+{512 * i}],16,$2;",
                   [places[twist], source, size], "")
    if s.fp8:
        fp8.issue_scales(thread, stage, head, own, mg.select(some, end - slot, 0))
    new = some & (piece == mg.asm("ld.shared.b32 $0,[$1+8];", [at]))
    mg.branch(new, lambda: _issue_queries(thread, _query_place(thread, at), which))
    mg.asm("cp.async.commit_group;", outputs="")


def _issue_queries(thread, place, which):
    s = thread.s
    units = s.query_row // 16
    row, head = which // s.heads, which % s.heads
    for first in range(0, 8 * s.tiles * units, THREADS):
        i = thread.tid + first
        column, unit = i // units, i % units
        token = row * s.tokens + column // s.group
        source = mg.gmem_element(thread.refs["q"], token * (s.heads * s.group) + (head * s.group + column % s.group),
                                 s.d, unit * 8, 2)
        size = (column < s.columns) * 16
        inside = column < 8 * s.tiles
        to = place + (column * s.query_row + (unit ^ column % 8) * 16)
        mg.asm("{.reg .pred p; setp.ne.u32 p,$3,0; @p cp.async.cg.shared.global [$0],[$1],16,$2;}", [to, source, size, inside], "")


def _scores(thread, stage, query, cursor):
    """The warp's 16 slots of the piece: [tile][slot row, row + 8][column 2 quad, + 1], minus infinity where not seen."""
    s = thread.s
    _, _, end, piece, _ = cursor
    at, queries = stage + thread.key_at, query + thread.query_at
    scores = [[f32(0)] * 4 for _ in range(s.tiles)]
    for pair in range(s.d // 32):
        if s.fp8:
            keys = [fp8.keys(thread, at ^ 16 * (2 * pair + i)) for i in range(2)]
        else:
            keys = [mg.asm(LDMATRIX, [at ^ 32 * (2 * pair + i)], "rrrr") for i in range(2)]
        for tile in range(s.tiles):
            q = mg.asm(LDMATRIX, [(queries ^ 64 * pair) + tile * 8 * s.query_row], "rrrr")
            for i in range(2):
                scores[tile] = mg.asm(MMA, [*keys[i], *q[2 * i:2 * i + 2], *scores[tile]], "ffff", effects=False)
    if s.fp8:
        scales = fp8.scales(thread, stage, "keys")
        scores = [[sums.fmul(x, scales[i // 2]) for i, x in enumerate(tile)] for tile in scores]
    slot = piece * PIECE + thread.warp * 16 + thread.row
    rest = end - slot
    out = []
    for tile, columns in zip(scores, thread.columns()):
        own = [rest] * 2 if s.tokens == 1 else [
            rest + (mg.minimum(c // s.group, s.tokens - 1) - (s.tokens - 1)) for c in columns]
        out.append([[sums.see(sums.cap(tile[2 * h + e], s.scale, s.soft_cap), own[e], s.window, 8 * h) for e in range(2)]
                    for h in range(2)])
    return out


def _weights(thread, stage, scores):
    """Leaves weights and parts of their sums in shared memory. -> [tile][column]: the piece's maximum."""
    s, c = thread.s, thread.c
    scales = fp8.scales(thread, stage, "values") if s.fp8 else None
    address = lambda offset: thread.exchange + offset
    for i, tile in enumerate(scores):
        m = [sums.lanes(sums.fmax(sums.fmax(tile[0][e], tile[1][e]), f32(EMPTY)), sums.fmax, (4, 8, 16)) for e in range(2)]
        to = address(s.maxima_at + 32 * i) + (thread.warp * (32 * s.tiles) + thread.quad * 8)
        mg.asm("{.reg .pred p; setp.eq.u32 p,$3,0; @p st.shared.v2.f32 [$0],{$1,$2};}", [to, *m, thread.row], "")
    mg.asm(BARRIER, outputs="")
    maxima = []
    for i, tile in enumerate(scores):
        at = address(s.maxima_at + 32 * i) + thread.quad * 8
        pairs = [mg.asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{w * 32 * s.tiles}];", [at], "ff") for w in range(WARPS)]
        m = [pairs[0][e] for e in range(2)]
        for p in pairs[1:]:
            m = [sums.fmax(a, b) for a, b in zip(m, p)]
        maxima.append(m)
        shift = [sums.fneg(sums.fmul(x, c)) for x in m]
        p = [[sums.weight(tile[h][e], c, shift[e]) for e in range(2)] for h in range(2)]
        parts = [sums.lanes(sums.fadd(p[0][e], p[1][e]), sums.fadd, (4,)) for e in range(2)]
        to = address(s.parts_at + 32 * i) + ((thread.warp * PARTS + thread.row // 2) * (32 * s.tiles) + thread.quad * 8)
        mg.asm("{.reg .pred p; setp.eq.u32 p,$3,0; @p st.shared.v2.f32 [$0],{$1,$2};}", [to, *parts, thread.row % 2], "")
        if s.fp8:
            p = [[sums.fmul(x, scales[h]) for x in p[h]] for h in range(2)]
        words = [mg.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0,$1;", [sums.pack(*p[h])]) for h in range(2)]
        to = thread.exchange + ((thread.warp * s.tiles + i) * 256 + thread.lane * 8)
        mg.asm("st.shared.v2.b32 [$0],{$1,$2};", [to, *words], "")
    mg.asm(BARRIER, outputs="")
    return maxima


def _values(thread, stage, maxima):
    """[tile]: the piece's sums, [m, m, part, part, 4 values]: of columns 2 quad and 2 quad + 1, part row % 4, and the head dimensions
    of `merge.dimensions`."""
    s = thread.s
    at, weights = stage + thread.value_at, thread.exchange + thread.lane * 8
    out, two = [[f32(0)] * 4 for _ in range(s.tiles)], None
    for k in range(WARPS):
        if s.fp8:
            two = two if k % 2 else fp8.values(thread, at, k // 2)  # a load has those of two steps
            values = two[k % 2]
        else:
            values = mg.asm(LDMATRIX_TRANSPOSED.replace("[$4]", f"[$4+{16 * k * s.row}]"), [at], "rrrr")
        for i in range(s.tiles):
            p = mg.asm(f"ld.shared.v2.b32 {{$0,$1}},[$2+{(k * s.tiles + i) * 256}];", [weights], "rr")
            out[i] = mg.asm(MMA, [*values, *p, *out[i]], "ffff", effects=False)
    at = thread.exchange + (thread.row % PARTS * (32 * s.tiles) + thread.quad * 8)
    pieces = []
    for i in range(s.tiles):
        parts = [mg.asm(f"ld.shared.v2.f32 {{$0,$1}},[$2+{s.parts_at + 32 * i + k * PARTS * 32 * s.tiles}];", [at], "ff") for k in range(WARPS)]
        pieces.append([*maxima[i], *(sums.total([p[e] for p in parts]) for e in range(2)), *out[i]])
    return pieces


def _program(refs, s: Shape):
    """One thread's program."""
    thread = _Thread(refs, s)
    cta = mg.asm("mov.u32 $0,%ctaid.x;", effects=False)
    table, vectors = mg.gmem_element(refs["table"], cta * s.rounds, s.words, mg.i32(0), 4), s.words // 4 * s.rounds
    for first in range(0, vectors, THREADS):
        i = thread.tid + first
        words = load_global(table + i * 16, 4, inside := i < vectors)
        store_shared(thread.records + i * 16, words, inside)
    mg.asm(BARRIER, outputs="")
    pieces = mg.asm("ld.shared.b32 $0,[$1];", [thread.records])
    at = thread.records + 4 * s.words
    first = [at, *_record(thread, at, [mg.i32(0)] * 4, mg.i32(1))]
    ahead = first
    for i in range(s.stages - 1):
        ahead = _advance(thread, ahead) if i else ahead
        _issue(thread, thread.ring + i * s.stage, ahead)

    def arrived(pieces):
        """Waits until so many of the stages hold a piece."""
        mg.asm(f"cp.async.wait_group {s.stages - 1 - pieces};", outputs="")
        mg.asm(BARRIER, outputs="")  # all warps' loads, and the last use of the piece before

    def scores_at(place, cursor):
        scores = _scores(thread, thread.ring + place, _query_place(thread, cursor[0]), cursor)
        return [x for tile in scores for pair in tile for x in pair]

    def piece(_, stage, behind, *carry):
        """stage: this piece's place in the ring; behind: the piece before's, free again."""
        cursor, ahead = list(carry[:5]), list(carry[5:10])
        flat, scores = carry[10:10 + 16 * s.tiles], list(carry[10 + 16 * s.tiles:])
        group, state = ([list(flat[8 * k:8 * k + 8]) for k in range(first, first + s.tiles)] for first in (0, s.tiles))
        arrived(2 if s.overlapped else 1)
        ahead = _advance(thread, ahead)
        _issue(thread, thread.ring + behind, ahead)
        here, after = thread.ring + stage, stage + s.stage
        after = mg.select(after == s.stages * s.stage, 0, after)
        if s.overlapped:
            following = _advance(thread, cursor)
        else:
            scores = scores_at(stage, cursor)
        maxima = _weights(thread, here, [[scores[4 * i + 2 * h:4 * i + 2 * h + 2] for h in range(2)] for i in range(s.tiles)])
        scores = scores_at(after, following) if s.overlapped else []
        sums_of_piece = _values(thread, here, maxima)

        fresh = cursor[3] == mg.asm("ld.shared.b32 $0,[$1+8];", [cursor[0]])
        starts_group = sums.bit_or(fresh, cursor[3] % GROUP == 0)
        group_before, before = merge.beginning(thread, cursor, fresh)
        group = merge.fold(thread, merge.choose(starts_group, group_before, group), sums_of_piece)
        done = sums.bit_or(cursor[4] == 1, cursor[3] % GROUP == GROUP - 1)
        state = merge.choose(fresh, before, state)
        state = merge.choose(done, merge.fold(thread, state, group), state)
        merge.deliver(thread, cursor, sums_of_piece, group, state)
        following = following if s.overlapped else _advance(thread, cursor)
        return after, stage, *following, *ahead, *(x for tile in (*group, *state) for x in tile), *scores

    nothing = [x for tile in merge.nothing(thread) for x in tile]
    scores = []
    if s.overlapped:
        arrived(1)
        scores = scores_at(mg.i32(0), first)
    mg.loop(0, pieces, 1, [mg.i32(0), mg.i32((s.stages - 1) * s.stage), *first, *ahead, *nothing, *nothing, *scores], piece)
    mg.asm("cp.async.wait_all;", outputs="")
    merge.join(thread)


def decode(q, keys, values, layer, plan, *, scale, window=None, soft_cap=None, shared=(), scales=()):
    """q bf16 [B, T, Hq, D], keys and values bf16 [L, B, Hkv, S, D], layer i32 [], plan: of `attention_plan.plan` ->
    q's shape. shared: what `attention_shared.shared_sums` gave, where rows share pieces; then T is 1. scales: those of FP8 keys and
    values, f32 [L, B, Hkv, S] each."""
    rows, tokens, query_heads, d = q.shape
    _, _, heads, capacity, _ = keys.shape
    ctas, rounds, words = plan.table.shape
    s = Shape(rows, tokens, heads, query_heads // heads, d, capacity, rounds, scale, window, soft_cap, words, *(shared[2:] or (0,)), bool(scales))
    if s.stages < 2:
        raise NotImplementedError(f"attention on Hopper: {rows} rows of {heads} key heads give a CTA {rounds} units, which leave no "
                                  "shared memory for two pieces; call it for fewer rows")
    single = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    slots = 2 * SLOTS * s.tiles
    return threads.thread_kernel(
        lambda refs: _program(refs, s), ["q", "keys", "values", "layer", "table", "counters", *["shared_sums", "shared_marks"][:len(shared[:2])],
                                     *["keys_scale", "values_scale"][:len(scales)], "out", "sums", "marks", "shared"],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), single(slots, 8 * d), single(slots, 128)], grid=ctas, warps=WARPS,
        shared_words=s.shared_memory // 4)(q, keys, values, layer.reshape(1), plan.table, plan.counters, *shared[:2], *scales)[0]
