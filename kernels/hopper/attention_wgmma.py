"""A warpgroup's part in prefill attention: 64 queries and a piece of 128 slots, by wgmma, one thread's registers at a
time.

Arrays in Pallas carry registers from one function to the next: f32 (64, n) in the wgmma layout, and marks, an f32 a
thread and row of its fragment: two maxima and two parts of the sum of weights.
"""
import dataclasses
import functools

import numpy as np

from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, PIECE, f32
from nvfp4jax.kernels.hopper.decode import lanes
from nvfp4jax.kernels.hopper.machine import ROWS_128, WARPGROUP
from nvfp4jax.kernels.hopper.threads import store_global, store_shared

CONSUMERS = 2  # warpgroups
ROWS = 64  # queries of each
HALF = 64  # head dimensions of a 128-byte row
MARKS = 4  # per-thread registers of a state: maxima and parts of the sum of the fragment's two rows


@dataclasses.dataclass(frozen=True)
class Shape:
    rows: int
    tokens: int
    heads: int
    group: int
    d: int
    capacity: int
    scale: float
    window: int | None
    soft_cap: float | None
    shared: int = 0  # rows that others begin with
    front: int = 0  # pieces that lie in front of all of these

    @property
    def tiles(self):
        return -(-self.tokens // (CONSUMERS * ROWS))

    @property
    def c(self):
        return sums.factor(self.scale, self.soft_cap)


def _descriptor(ref, leading=1):
    """Of rows of 128 swizzled bytes in groups of 8; leading: bytes / 16 between 64 columns where rows are K."""
    return mg.with_bits(mg.wide((mg.smem_address(ref) & 0x3FFFF) >> 4), (1 << 62) | (64 << 32) | (leading << 16))


# Named barriers 8 and 9: a warpgroup's turn to start its scores. In the registers that the compiler has left.
TURN = "{{.reg .b32 t; mov.u32 t,%tid.x; shr.u32 t,t,7; {id}; bar.{op} t,256;}} "


def _wgmma(columns, steps, operands, descriptors, between, turn=False):
    """Sum over k16 steps from zero, in one accumulator: f32 registers.

    steps: of A and B, 16 bytes on from the descriptors. operands: None where A lies in shared memory too, else a
    function of the step that makes its registers of A, while the step before runs. between: a function of the step,
    called behind it. turn: waits for this warpgroup's turn, and gives it to the other.
    """
    n, values = columns // 2, []
    accumulator = "{" + ",".join(f"${i}" for i in range(n)) + "}"
    for i, (a, b) in enumerate(steps):
        registers = [] if operands is None else operands(i)
        first, last = i == 0, i == len(steps) - 1
        at = n + len(values) + len(registers)
        text = "{.reg .b64 a,b; .reg .pred p; " + ("setp.ne.u32 p,0,0; " if first else "setp.eq.u32 p,0,0; ")
        if turn and first:
            text += TURN.format(op="sync", id="add.u32 t,t,8")
        text += "wgmma.fence.sync.aligned; "
        if operands is None:
            text += f"add.s64 a,${at},{a}; add.s64 b,${at + 1},{b}; "
            left, flags = "a", "1,1,0,0"
        else:
            text += f"add.s64 b,${at},{b}; "
            left, flags = "{" + ",".join(f"${at - 4 + j}" for j in range(4)) + "}", "1,1,1"
        text += f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {accumulator},{left},b,p,{flags};"
        if last:
            text += "wgmma.commit_group.sync.aligned;"
        if turn and last:
            text += TURN.format(op="arrive", id="sub.u32 t,9,t")
        values = mg.asm(text + "}", [*values, *registers, *descriptors], "f" * n, in_place=len(values))
        between(i)
    return mg.asm("wgmma.wait_group.sync.aligned 0;", values, "f" * n, in_place=n)


# --- what `mosaic.inline` takes and returns ---------------------------------------------------------------------------

def _flat(accumulator):
    """Its registers: i is row r + 8 (i / 2 % 2), column 8 (i / 4) + 2 quad + i % 2."""
    return mg.settled(accumulator.reshape(-1))


def _accumulator(values):
    return np.array(values, object).reshape(-1, 2, 2)


def _marks(words):
    return [mg.float_of(word) for word in mg.settled(words)]


def _words(marks):
    return [mg.bits_of(mark) for mark in marks]


def _rows(ref):
    return mg.Memory(ref, ROWS_128)


def fresh(columns):
    """The sums of nothing: an array of zeros and MARKS."""
    def program():
        return _accumulator([f32(0)] * (columns // 2)), *_words([f32(EMPTY)] * 2 + [f32(0)] * 2)

    return mg.inline(program, returns=[(ROWS, columns), *["each"] * MARKS])


def _scores_of(q, k, between, s: Shape):
    steps = [(half * ROWS * 8 + 2 * i, half * PIECE * 8 + 2 * i) for half in range(s.d // HALF) for i in range(4)]
    return _wgmma(PIECE, steps, None, [_descriptor(q), _descriptor(k)], between, turn=True)


def scores(q, k, s: Shape):
    """Queries times keys: f32 (64, PIECE)."""
    program = lambda q, k: _accumulator(_scores_of(q, k, lambda i: None, s))
    return mg.inline(program, _rows(q), _rows(k), returns=(ROWS, PIECE))


def _fold(group, piece, factors, which=slice(None)):
    return [sums.fold(x, y, factors[i // 2 % 2], factors[2 + i // 2 % 2])
            for i, (x, y) in list(enumerate(zip(group, piece)))[which]]


def fold_piece(group, piece, factors, s: Shape):
    """A piece's values folded to the group's."""
    program = lambda group, piece, *factors: _accumulator(_fold(_flat(group), _flat(piece), _marks(factors)))
    return mg.inline(program, group, piece, *factors, returns=(ROWS, s.d))


def fold_and_score(q, k, group, piece, factors, s: Shape):
    """`scores` of the next piece, and while they run `fold_piece` of this one."""
    def program(q, k, group, piece, *factors):
        group, piece, factors, folded = _flat(group), _flat(piece), _marks(factors), []
        each = len(group) // (s.d // 16)
        between = lambda i: folded.extend(_fold(group, piece, factors, slice(each * i, each * i + each)))
        scores = _scores_of(q, k, between, s)
        return _accumulator(scores), _accumulator(folded)

    return mg.inline(program, _rows(q), _rows(k), group, piece, *factors, returns=[(ROWS, PIECE), (ROWS, s.d)])


def give_turn(wg):
    """At the start the second warpgroup lets the first go."""
    mg.inline(lambda wg: mg.branch(wg == 1, lambda: mg.asm("bar.arrive 8,256;", outputs="")), wg)


def _maxima(scores):
    """Of the fragment's two rows."""
    maxima = []
    for h in range(2):
        m = f32(EMPTY)
        for e8, e in np.ndindex(2, 2):
            chain = [scores[8 * k + 4 * e8 + 2 * h + e] for k in range(PIECE // 16)]
            m = sums.fmax(m, functools.reduce(sums.fmax, chain))
        maxima.append(sums.lanes(m, sums.fmax, (1, 2)))
    return maxima


def _weights_of(scores, step, shifts, parts, c):
    """Registers of A of a k16 step; adds to the parts of the sum."""
    left = [None] * 4
    for h in range(2):
        p = [[sums.weight(x, c, shifts[h]) for x in scores[8 * step + 4 * e8 + 2 * h:][:2]] for e8 in range(2)]
        of_step = sums.fadd(sums.fadd(p[0][0], p[1][0]), sums.fadd(p[0][1], p[1][1]))
        parts[h] = of_step if step == 0 else sums.fadd(parts[h], of_step)
        for e8 in range(2):
            left[2 * e8 + h] = sums.pack(*p[e8])
    return left


def values(scores, v, marks, place, s: Shape):
    """A piece's values f32 (64, D), the group's marks with it, and the factors of the fold: of the fragment's two
    rows, first the group's. place: i32 scalars: the first row's end less the piece's first slot, the row's end less
    it, and whether any slot is not seen by all 64 queries."""
    def program(scores, v, *rest):
        marks, (first, end, masked) = _marks(rest[:MARKS]), rest[MARKS:]
        values = [sums.cap(x, s.scale, s.soft_cap) for x in _flat(scores)]
        lane = lanes(False, pinned=True)
        own = first + (lane.warp * 16 + lane.fragment_row)

        def mask():
            rests = [sums.least(own + 8 * h, end) - lane.quad * 2 for h in range(2)]
            return [sums.see(x, rests[i // 2 % 2], s.window, 8 * (i // 4) + i % 2) for i, x in enumerate(values)]

        values = mg.branch_values(masked, mask, values)
        c, parts = f32(s.c), [None, None]
        maxima = _maxima(values)
        shifts = [sums.fneg(sums.fmul(m, c)) for m in maxima]
        steps = [(0, i * 16 * 8) for i in range(PIECE // 16)]
        piece = _wgmma(s.d, steps, lambda i: _weights_of(values, i, shifts, parts, c), [_descriptor(v, PIECE * 8)], lambda i: None)
        # Here and not before: the registers are short while the product runs.
        maxima, a, b = zip(*(sums.fold_factors(old, new, c) for old, new in zip(marks, maxima)))
        parts = [sums.fold(marks[2 + h], parts[h], a[h], b[h]) for h in range(2)]
        return _accumulator(piece), *_words([*maxima, *parts, *a, *b])

    return mg.inline(program, scores, _rows(v), *marks, *place, returns=[(ROWS, s.d), *["each"] * (MARKS + 4)])


def zero_values(v, rest, s: Shape):
    """Zeroes the rows of v from `rest` on, where it is below PIECE, for the wgmmas of this warpgroup that follow."""
    def program(v, rest):
        rest = sums.not_negative(rest)
        tid = mg.thread_index() % WARPGROUP

        def zero():
            row = mg.smem_address(v) + tid * 128
            for half in range(s.d // HALF):
                for unit in range(8):
                    to = row + (half * PIECE * 128 + 16 * unit)
                    store_shared(to, [mg.i32(0)] * 4, tid >= rest)
            mg.asm("fence.proxy.async.shared::cta;", outputs="")
            mg.warpgroup_barrier()

        mg.branch(rest < PIECE, zero)

    mg.inline(program, _rows(v), rest)


class _State:
    """The row's sums of a thread in shared memory: values, 16 bytes a thread, then 64 times 4 parts. Its maxima are
    registers: all of it in shared memory is 96 bytes too much."""

    def __init__(self, state, d):
        self.count = d // 2
        tid = mg.thread_index() % WARPGROUP
        base = mg.smem_address(state)
        self.values = base + tid * 16
        row = tid // 32 * 16 + tid % 32 // 4
        self.parts = base + 4 * ROWS * d + (row * 16 + tid % 4 * 4)

    def load(self):
        values = [x for i in range(0, self.count, 4) for x in mg.asm(
            f"ld.shared.v4.f32 {{$0,$1,$2,$3}},[$4+{i // 4 * 16 * WARPGROUP}];", [self.values], "ffff")]
        return values, [mg.asm(f"ld.shared.f32 $0,[$1+{128 * h}];", [self.parts], "f") for h in range(2)]

    def store(self, values, parts):
        for i in range(0, self.count, 4):
            mg.asm(f"st.shared.v4.f32 [$0+{i // 4 * 16 * WARPGROUP}],{{$1,$2,$3,$4}};", [self.values, *values[i:i + 4]], "")
        for h in range(2):
            mg.asm(f"st.shared.f32 [$0+{128 * h}],$1;", [self.parts, parts[h]], "")

    def fold(self, maxima, group, marks, c):
        """The row's sums with a group's: values, maxima, parts."""
        values, parts = self.load()
        new, a, b = zip(*(sums.fold_factors(x, y, c) for x, y in zip(maxima, marks[:2])))
        parts = [sums.fold(x, y, a[h], b[h]) for h, (x, y) in enumerate(zip(parts, marks[2:]))]
        return [sums.fold(x, y, a[i // 2 % 2], b[i // 2 % 2]) for i, (x, y) in enumerate(zip(values, group))], list(new), parts


def bank(group, marks, maxima, state, done, some, s: Shape):
    """Folds a group that is done to the row's sums. some: whether there are any yet. -> the marks of the group to go
    on with, the row's maxima."""
    def program(group, *rest):
        marks, maxima, (state, done, some) = _marks(rest[:MARKS]), _marks(rest[MARKS:MARKS + 2]), rest[MARKS + 2:]
        values = _flat(group)

        def fold():
            row = _State(state, s.d)
            folded, new, parts = row.fold(maxima, values, marks, f32(s.c))
            row.store(folded, parts)
            return new

        def bank():
            mg.branch(some ^ 1, lambda: _State(state, s.d).store(values, marks[2:]))
            return [f32(EMPTY)] * 2 + [f32(0)] * 2 + mg.branch_values(some, fold, marks[:2])

        return _words(mg.branch_values(done, bank, marks + maxima))

    return mg.inline(program, group, *marks, *maxima, mg.Memory(state), done, some, returns=MARKS + 2)


def deliver(group, marks, sums_out, marks_out, place, padded, s: Shape):
    """Writes a group's sums, of rows of s.group queries, `padded` apart. place: i32 scalars: the first row, how many there are, the key
    head."""
    def program(group, *rest):
        marks, (sums_out, marks_out, first, count, head) = _marks(rest[:MARKS]), rest[MARKS:]
        values = _flat(group)
        lane = lanes(False, pinned=True)
        row = lane.warp * 16 + lane.fragment_row
        for h in range(2):
            own = row + 8 * h
            query = (first + own // padded) * (s.heads * s.group) + (head * s.group + own % padded)
            inside = mg.signed_less(own // padded, count) & (own % padded < s.group)
            at = mg.gmem_element(sums_out, query, s.d, lane.quad * 2, 4)
            for j in range(s.d // 8):
                store_global(at + 32 * j, values[4 * j + 2 * h:][:2], inside, "f32")
            store_global(mg.gmem_element(marks_out, query, 8, lane.quad * 2, 4), [marks[h], marks[2 + h]], inside, "f32")

    mg.inline(program, group, *marks, mg.Memory(sums_out), mg.Memory(marks_out), *place)


def finish(group, marks, maxima, state, out, place, s: Shape):
    """Writes the tile. place: i32 scalars: whether groups lie in `state`, the first query's row of `out`, how many
    queries there are, the query head."""
    def program(group, *rest):
        marks, maxima = _marks(rest[:MARKS]), _marks(rest[MARKS:MARKS + 2])
        state, out, some, first, count, head = rest[MARKS + 2:]
        values = _flat(group)

        def fold():
            folded, _, parts = _State(state, s.d).fold(maxima, values, marks, f32(s.c))
            return folded + parts

        values = mg.branch_values(some, fold, values + marks[2:])
        # Where nothing is seen all is zero, and so is the result.
        factors = [sums.reciprocal(sums.fmax(sums.lanes(p, sums.fadd, (1, 2)), f32(1e-30))) for p in values[-2:]]
        lane = lanes(False, pinned=True)
        row = lane.warp * 16 + lane.fragment_row
        for h in range(2):
            own = row + 8 * h
            token = (first + own) * (s.heads * s.group) + head
            at = mg.gmem_element(out, token, s.d, lane.quad * 2, 2)
            inside = mg.asm("{.reg .pred p; setp.lt.s32 p,$1,$2; selp.b32 $0,1,0,p;}", [own, count], effects=False)
            for j in range(s.d // 8):
                pair = [sums.fmul(x, factors[h]) for x in values[4 * j + 2 * h:][:2]]
                store_global(at + 16 * j, [sums.pack(*pair)], inside)

    mg.inline(program, group, *marks, *maxima, mg.Memory(state), mg.Memory(out), *place)
