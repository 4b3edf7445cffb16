"""A warpgroup's part in prefill attention: 64 queries and a piece of 128 slots, by wgmma, one thread's registers at a
time.

Arrays in Pallas carry registers from one function to the next: f32 (64, n) in the wgmma layout, and marks, an f32 a
thread and row of its fragment: two maxima and two parts of the sum of weights.
"""
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, PIECE, f32

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

    @property
    def tiles(self):
        return -(-self.tokens // (CONSUMERS * ROWS))

    @property
    def c(self):
        return sums.factor(self.scale, self.soft_cap)


def _descriptor(ref, leading=1):
    """Of rows of 128 swizzled bytes in groups of 8; leading: bytes / 16 between 64 columns where rows are K."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.extui(i64, mg.shift_right(mg.bit_and(mg.smem_address(ref), 0x3FFFF), 4))
    return llvm.or_(address, arith.constant(i64, (1 << 62) | (64 << 32) | (leading << 16)))


# Named barriers 8 and 9: a warpgroup's turn to start its scores. In the registers that the compiler has left.
TURN = "{{.reg .b32 t; mov.u32 t,%tid.x; shr.u32 t,t,7; {id}; bar.{op} t,256;}} "


def _wgmma(columns, steps, operands, descriptors, between, turn=False):
    """Sum over k16 steps from zero, in one accumulator: f32 registers.

    steps: of A and B, 16 bytes on from the descriptors. operands: None where A lies in shared memory too, else a
    function of the step that makes its registers of A, while the step before runs. between: a function of the step,
    called behind it. turn: waits for this warpgroup's turn, and gives it to the other.
    """
    n, f32_type = columns // 2, ir.F32Type.get()
    accumulator = "{" + ",".join(f"${i}" for i in range(n)) + "}"
    struct, values = llvm.StructType.get_literal([f32_type] * n), []
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
        constraints = ["=f"] * n + [str(j) for j in range(len(values))] + ["r"] * len(registers) + ["l"] * len(descriptors)
        packed = llvm.inline_asm(struct, [*values, *registers, *descriptors], text + "}", ",".join(constraints),
                                 has_side_effects=True)
        values = [llvm.extractvalue(f32_type, packed, [j]) for j in range(n)]
        between(i)
    packed = llvm.inline_asm(struct, values, "wgmma.wait_group.sync.aligned 0;", ",".join(["=f"] * n + [str(j) for j in range(n)]),
                             has_side_effects=True)
    return [llvm.extractvalue(f32_type, packed, [j]) for j in range(n)]


def _if_else(condition, then, otherwise):
    """Values of then(), or `otherwise`, of the same types."""
    op = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ne, condition, mg.i32(0)), [v.type for v in otherwise], has_else=True)
    for block, values in ((op.then_block, then), (op.else_block, lambda: otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_(list(values()))
    return list(op.results)


def _registers(array):
    return [v for register in array.registers.flat for v in mg.elements(register)]


def _array(values, columns):
    pairs = np.array([mg.pair(*values[i:i + 2]) for i in range(0, len(values), 2)], dtype=object)
    return mg.wgmma_array(pairs, (ROWS, columns))


def _marks(arrays):
    return [arith.bitcast(ir.F32Type.get(), mg.of_thread(a)) for a in arrays]


def _as_marks(values):
    return tuple(mg.per_thread(arith.bitcast(mg.i32(), v)) for v in values)


PER_THREAD = (plgpu.ShapeDtypeStruct((mg.WARPGROUP,), jnp.int32, layout=mg.PER_THREAD),)


def _wgmma_type(columns):
    return plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=mg.WGMMA)


def fresh(columns):
    """The sums of nothing: an array of zeros and MARKS."""
    @plgpu.inline_mgpu(arg_types=(), return_type=(_wgmma_type(columns), *PER_THREAD * MARKS))
    def f(ctx):
        del ctx
        return _array([f32(0)] * (columns // 2), columns), *_as_marks([f32(EMPTY)] * 2 + [f32(0)] * 2)

    return f()


def _scores_of(q, k, between, s: Shape):
    steps = [(half * ROWS * 8 + 2 * i, half * PIECE * 8 + 2 * i) for half in range(s.d // HALF) for i in range(4)]
    return _wgmma(PIECE, steps, None, [_descriptor(q), _descriptor(k)], between, turn=True)


ROWS_TYPE = plgpu.RefType(mg.ROWS_128)


def scores(q, k, s: Shape):
    """Queries times keys: f32 (64, PIECE)."""
    @plgpu.inline_mgpu(arg_types=(ROWS_TYPE, ROWS_TYPE), return_type=_wgmma_type(PIECE))
    def f(ctx, q, k):
        del ctx
        return _array(_scores_of(q, k, lambda i: None, s), PIECE)

    return f(q, k)


def _fold(group, piece, factors, which=slice(None)):
    return [sums.fold(x, y, factors[i // 2 % 2], factors[2 + i // 2 % 2]) for i, (x, y) in list(enumerate(zip(group, piece)))[which]]


def fold_piece(group, piece, factors, s: Shape):
    """A piece's values folded to the group's."""
    @plgpu.inline_mgpu(arg_types=(mg.WGMMA,) * 2 + (mg.PER_THREAD,) * 4, return_type=_wgmma_type(s.d))
    def f(ctx, group, piece, *factors):
        del ctx
        return _array(_fold(_registers(group), _registers(piece), _marks(factors)), s.d)

    return f(group, piece, *factors)


def fold_and_score(q, k, group, piece, factors, s: Shape):
    """`scores` of the next piece, and while they run `fold_piece` of this one."""
    types = (ROWS_TYPE, ROWS_TYPE, *(mg.WGMMA,) * 2, *(mg.PER_THREAD,) * 4)

    @plgpu.inline_mgpu(arg_types=types, return_type=(_wgmma_type(PIECE), _wgmma_type(s.d)))
    def f(ctx, q, k, group, piece, *factors):
        del ctx
        group, piece, factors, folded = _registers(group), _registers(piece), _marks(factors), []
        each = len(group) // (s.d // 16)
        scores = _scores_of(q, k, lambda i: folded.extend(_fold(group, piece, factors, slice(each * i, each * i + each))), s)
        return _array(scores, PIECE), _array(folded, s.d)

    return f(q, k, group, piece, *factors)


def give_turn(wg):
    """At the start the second warpgroup lets the first go."""
    @plgpu.inline_mgpu(arg_types=(mg.SPLAT,))
    def f(ctx, wg):
        del ctx
        mg.branch(mg.flag("eq", mg.scalar(wg), 1), lambda: mg.asm("bar.arrive 8,256;", outputs=""))

    f(wg)


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
    types = (mg.WGMMA, ROWS_TYPE, *(mg.PER_THREAD,) * MARKS, *(mg.SPLAT,) * 3)

    @plgpu.inline_mgpu(arg_types=types, return_type=(_wgmma_type(s.d), *PER_THREAD * (MARKS + 4)))
    def f(ctx, scores, v, *rest):
        del ctx
        marks, (first, end, masked) = _marks(rest[:MARKS]), map(mg.scalar, rest[MARKS:])
        values = [sums.cap(x, s.scale, s.soft_cap) for x in _registers(scores)]
        warp, quad, row, _ = mg.lanes(False, pinned=True)
        own = mg.add(first, mg.add(mg.mul(warp, 16), row))

        def mask():
            rests = [mg.sub(sums.least(mg.add(own, 8 * h), end), mg.mul(quad, 2)) for h in range(2)]
            return [sums.see(x, rests[i // 2 % 2], s.window, 8 * (i // 4) + i % 2) for i, x in enumerate(values)]

        values = _if_else(masked, mask, values)
        c, parts = f32(s.c), [None, None]
        maxima = _maxima(values)
        shifts = [sums.fneg(sums.fmul(m, c)) for m in maxima]
        steps = [(0, i * 16 * 8) for i in range(PIECE // 16)]
        piece = _wgmma(s.d, steps, lambda i: _weights_of(values, i, shifts, parts, c), [_descriptor(v, PIECE * 8)], lambda i: None)
        # Here and not before: the registers are short while the product runs.
        maxima, a, b = zip(*(sums.fold_factors(old, new, c) for old, new in zip(marks, maxima)))
        parts = [sums.fold(marks[2 + h], parts[h], a[h], b[h]) for h in range(2)]
        return _array(piece, s.d), *_as_marks([*maxima, *parts, *a, *b])

    return f(scores, v, *marks, *place)


def zero_values(v, rest, s: Shape):
    """Zeroes the rows of v from `rest` on, where it is below PIECE, for the wgmmas of this warpgroup that follow."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(mg.ROWS_128), mg.SPLAT))
    def f(ctx, v, rest):
        del ctx
        rest = sums.not_negative(mg.scalar(rest))
        tid = mg.rem(mg.thread_index(), mg.WARPGROUP)

        def zero():
            row = mg.add(mg.smem_address(v), mg.mul(tid, 128))
            for half in range(s.d // HALF):
                for unit in range(8):
                    to = mg.add(row, half * PIECE * 128 + 16 * unit)
                    mg.store_shared(to, [mg.i32(0)] * 4, mg.bit_xor(mg.flag("lt", tid, rest), 1))
            mg.asm("fence.proxy.async.shared::cta;", outputs="")
            mg.warpgroup_barrier()

        mg.branch(mg.flag("lt", rest, PIECE), zero)

    f(v, rest)


class _State:
    """The row's sums of a thread in shared memory: values, 16 bytes a thread, then 64 times 4 parts. Its maxima are
    registers: all of it in shared memory is 96 bytes too much."""

    def __init__(self, state, d):
        self.count = d // 2
        tid = mg.rem(mg.thread_index(), mg.WARPGROUP)
        base = mg.smem_address(state)
        self.values = mg.add(base, mg.mul(tid, 16))
        row = mg.add(mg.mul(mg.div(tid, 32), 16), mg.div(mg.rem(tid, 32), 4))
        self.parts = mg.add(mg.add(base, 4 * ROWS * d), mg.add(mg.mul(row, 16), mg.mul(mg.rem(tid, 4), 4)))

    def load(self):
        values = [x for i in range(0, self.count, 4) for x in mg.asm(
            f"ld.shared.v4.f32 {{$0,$1,$2,$3}},[$4+{i // 4 * 16 * mg.WARPGROUP}];", [self.values], "ffff")]
        return values, [mg.asm(f"ld.shared.f32 $0,[$1+{128 * h}];", [self.parts], "f") for h in range(2)]

    def store(self, values, parts):
        for i in range(0, self.count, 4):
            mg.asm(f"st.shared.v4.f32 [$0+{i // 4 * 16 * mg.WARPGROUP}],{{$1,$2,$3,$4}};", [self.values, *values[i:i + 4]], "")
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
    types = (mg.WGMMA, *(mg.PER_THREAD,) * (MARKS + 2), mg.REF, mg.SPLAT, mg.SPLAT)

    @plgpu.inline_mgpu(arg_types=types, return_type=PER_THREAD * (MARKS + 2))
    def f(ctx, group, *rest):
        del ctx
        marks, maxima, state = _marks(rest[:MARKS]), _marks(rest[MARKS:MARKS + 2]), rest[MARKS + 2]
        done, some = map(mg.scalar, rest[MARKS + 3:])
        values = _registers(group)

        def fold():
            row = _State(state, s.d)
            folded, new, parts = row.fold(maxima, values, marks, f32(s.c))
            row.store(folded, parts)
            return new

        def bank():
            mg.branch(mg.bit_xor(some, 1), lambda: _State(state, s.d).store(values, marks[2:]))
            return [f32(EMPTY)] * 2 + [f32(0)] * 2 + _if_else(some, fold, marks[:2])

        return _as_marks(_if_else(done, bank, marks + maxima))

    return f(group, *marks, *maxima, state, done, some)


def finish(group, marks, maxima, state, out, place, s: Shape):
    """Writes the tile. place: i32 scalars: whether groups lie in `state`, the first query's row of `out`, how many
    queries there are, the query head."""
    types = (mg.WGMMA, *(mg.PER_THREAD,) * (MARKS + 2), mg.REF, mg.REF, *(mg.SPLAT,) * 4)

    @plgpu.inline_mgpu(arg_types=types)
    def f(ctx, group, *rest):
        del ctx
        marks, maxima, (state, out) = _marks(rest[:MARKS]), _marks(rest[MARKS:MARKS + 2]), rest[MARKS + 2:MARKS + 4]
        some, first, count, head = map(mg.scalar, rest[MARKS + 4:])
        values = _registers(group)

        def fold():
            folded, _, parts = _State(state, s.d).fold(maxima, values, marks, f32(s.c))
            return folded + parts

        values = _if_else(some, fold, values + marks[2:])
        # Where nothing is seen all is zero, and so is the result.
        factors = [sums.reciprocal(sums.fmax(sums.lanes(p, sums.fadd, (1, 2)), f32(1e-30))) for p in values[-2:]]
        warp, quad, row, _ = mg.lanes(False, pinned=True)
        row = mg.add(mg.mul(warp, 16), row)
        for h in range(2):
            own = mg.add(row, 8 * h)
            token = mg.add(mg.mul(mg.add(first, own), s.heads * s.group), head)
            at = mg.gmem_element(out, token, s.d, mg.mul(quad, 2), 2)
            inside = mg.asm("{.reg .pred p; setp.lt.s32 p,$1,$2; selp.b32 $0,1,0,p;}", [own, count], effects=False)
            for j in range(s.d // 8):
                pair = [sums.fmul(x, factors[h]) for x in values[4 * j + 2 * h:][:2]]
                mg.store_global(mg.offset_address(at, 16 * j), [sums.pack(*pair)], inside)

    f(group, *marks, *maxima, state, out, *place)
