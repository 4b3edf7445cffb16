"""Prefill attention on Hopper: many queries a row, wgmma, in decode's order of sums (`attention_sums`).

A tile is 128 queries of a row and a query head. A persistent CTA an SM walks over tiles, those with the longest past first: a
producer warpgroup loads queries, and keys and values a piece of 128 slots at a time, by TMA; two consumer warpgroups of 64
queries share them. A piece's scores, weights and values stay in registers; its values are folded to those of the group,
and at the end of 1024 slots these to the row's, which lie in shared memory, a thread's own.

TMA reads whole pieces: what lies past the row's end is masked in the scores and zeroed in the values.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from nvfp4jax.kernels.hopper import attention_sums as sums
from nvfp4jax.kernels.hopper import mosaic as mg
from nvfp4jax.kernels.hopper.attention_plan import SMS
from nvfp4jax.kernels.hopper.attention_sums import EMPTY, GROUP, PIECE, f32

CONSUMERS = 2  # warpgroups
ROWS = 64  # queries of each
STAGES = 2
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
    turns: bool = False

    @property
    def tiles(self):
        return -(-self.tokens // (CONSUMERS * ROWS))

    @property
    def c(self):
        return sums.factor(self.scale, self.soft_cap)


# --- one thread's part ------------------------------------------------------------------------------------------------

def _descriptor(ref, leading=1):
    """Of rows of 128 swizzled bytes in groups of 8; leading: bytes / 16 between 64 columns where rows are K."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.extui(i64, mg.shift_right(mg.bit_and(mg.smem_address(ref), 0x3FFFF), 4))
    return llvm.or_(address, arith.constant(i64, (1 << 62) | (64 << 32) | (leading << 16)))


def _wgmma(columns, steps, left, descriptors, turn=()):
    """Starts the sum over k16 steps from zero, in one accumulator: f32 registers, to be waited for. steps: of A and B, 16 bytes on
    from the descriptors; left: registers of A (a step each), or None where A lies in shared memory too. turn: named barriers:
    to wait at before, and to arrive at after."""
    n = columns // 2
    registers = [] if left is None else [r for step in left for r in step]
    accumulator = "{" + ",".join(f"${i}" for i in range(n)) + "}"
    at = n + len(registers)
    text = ["{.reg .b64 a,b; .reg .pred z,p; setp.ne.u32 z,0,0; setp.eq.u32 p,0,0; wgmma.fence.sync.aligned;"]
    for i, (a, b) in enumerate(steps):
        if left is None:
            text.append(f"add.s64 a,${at},{a}; add.s64 b,${at + 1},{b};")
            operand, flags = "a", "1,1,0,0"
        else:
            text.append(f"add.s64 b,${at},{b};")
            operand, flags = "{" + ",".join(f"${n + 4 * i + j}" for j in range(4)) + "}", "1,1,1"
        text.append(f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {accumulator},{operand},b,{'p' if i else 'z'},{flags};")
    text.append("wgmma.commit_group.sync.aligned;}")
    if turn:
        text.insert(0, f"bar.sync ${at + len(descriptors)},256;")
        text.append(f"bar.arrive ${at + len(descriptors) + 1},256;")
    constraints = ",".join(["=f"] * n + ["r"] * len(registers) + ["l"] * len(descriptors) + ["r"] * len(turn))
    f32_type = ir.F32Type.get()
    struct = llvm.inline_asm(llvm.StructType.get_literal([f32_type] * n), [*registers, *descriptors, *turn], "\n".join(text), constraints,
                             has_side_effects=True)
    return [llvm.extractvalue(f32_type, struct, [i]) for i in range(n)]


def _wait(values):
    """The values of `_wgmma` when it is through."""
    n = len(values)
    struct = llvm.inline_asm(llvm.StructType.get_literal([ir.F32Type.get()] * n), list(values), "wgmma.wait_group.sync.aligned 0;",
                             ",".join(["=f"] * n + [str(i) for i in range(n)]), has_side_effects=True)
    return [llvm.extractvalue(ir.F32Type.get(), struct, [i]) for i in range(n)]


def _if_else(condition, then, otherwise):
    """Values of then() or otherwise(), of the same types."""
    flag = arith.cmpi(arith.CmpIPredicate.ne, condition, mg.i32(0))
    op = scf.IfOp(flag, [v.type for v in otherwise], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.yield_(then())
    with ir.InsertionPoint(op.else_block):
        scf.yield_(list(otherwise))
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


def _fresh(columns):
    """The sums of nothing: an array of zeros and MARKS."""
    @plgpu.inline_mgpu(arg_types=(), return_type=(_wgmma_type(columns), *PER_THREAD * MARKS))
    def f(ctx):
        del ctx
        return _array([f32(0)] * (columns // 2), columns), *_as_marks([f32(EMPTY)] * 2 + [f32(0)] * 2)

    return f()


def _start_scores(q, k, wg, s: Shape):
    steps = [(half * ROWS * 8 + 2 * i, half * PIECE * 8 + 2 * i) for half in range(s.d // HALF) for i in range(4)]
    turn = (mg.add(wg, 8), mg.sub(9, wg)) if s.turns else ()
    return _wgmma(PIECE, steps, None, [_descriptor(q), _descriptor(k)], turn)


ROWS_TYPE = plgpu.RefType(mg.ROWS_128)


def _scores(q, k, wg, s: Shape):
    """Queries times keys: f32 (64, PIECE)."""
    @plgpu.inline_mgpu(arg_types=(ROWS_TYPE, ROWS_TYPE, mg.SPLAT), return_type=_wgmma_type(PIECE))
    def f(ctx, q, k, wg):
        del ctx
        return _array(_wait(_start_scores(q, k, mg.scalar(wg), s)), PIECE)

    return f(q, k, wg)


def _fold(group, piece, factors):
    return [sums.fold(x, y, factors[i // 2 % 2], factors[2 + i // 2 % 2]) for i, (x, y) in enumerate(zip(group, piece))]


def _fold_piece(group, piece, factors, s: Shape):
    """A piece's values folded to the group's."""
    @plgpu.inline_mgpu(arg_types=(mg.WGMMA,) * 2 + (mg.PER_THREAD,) * 4, return_type=_wgmma_type(s.d))
    def f(ctx, group, piece, *factors):
        del ctx
        return _array(_fold(_registers(group), _registers(piece), _marks(factors)), s.d)

    return f(group, piece, *factors)


def _fold_and_score(q, k, wg, group, piece, factors, s: Shape):
    """`_scores` of the next piece, and while they run `_fold_piece` of this one."""
    types = (ROWS_TYPE, ROWS_TYPE, mg.SPLAT, *(mg.WGMMA,) * 2, *(mg.PER_THREAD,) * 4)

    @plgpu.inline_mgpu(arg_types=types, return_type=(_wgmma_type(PIECE), _wgmma_type(s.d)))
    def f(ctx, q, k, wg, group, piece, *factors):
        del ctx
        running = _start_scores(q, k, mg.scalar(wg), s)
        folded = _fold(_registers(group), _registers(piece), _marks(factors))
        return _array(_wait(running), PIECE), _array(folded, s.d)

    return f(q, k, wg, group, piece, *factors)


def _give_turn(wg):
    """At the start the second warpgroup lets the first go."""
    @plgpu.inline_mgpu(arg_types=(mg.SPLAT,))
    def f(ctx, wg):
        del ctx
        mg.branch(mg.flag("eq", mg.scalar(wg), 1), lambda: mg.asm("bar.arrive 8,256;", outputs=""))

    f(wg)


def _weights(scores, marks, c):
    """Scores of the fragment's two rows -> A registers of the weights, a k16 step each; the new marks; factors of the old sums and
    of the piece's, by row."""
    left, new, old_factors, factors = [[[None] * 4 for _ in range(PIECE // 16)], [None] * MARKS, [], []]
    for h in range(2):
        own = [[scores[8 * k + 4 * e8 + 2 * h:][:2] for e8 in range(2)] for k in range(PIECE // 16)]  # [k][8 slots][e]
        chains = [[own[k][e8][e] for k in range(PIECE // 16)] for e8 in range(2) for e in range(2)]
        m = f32(EMPTY)
        for chain in chains:
            top = chain[0]
            for x in chain[1:]:
                top = sums.fmax(top, x)
            m = sums.fmax(m, top)
        m = sums.lanes(m, sums.fmax, (1, 2))
        shift = sums.fneg(sums.fmul(m, c))
        part = None
        for k in range(PIECE // 16):
            p = [[sums.weight(x, c, shift) for x in pair] for pair in own[k]]
            of_step = sums.fadd(sums.fadd(p[0][0], p[1][0]), sums.fadd(p[0][1], p[1][1]))
            part = of_step if part is None else sums.fadd(part, of_step)
            for e8 in range(2):
                left[k][2 * e8 + h] = sums.pack(*p[e8])
        new[h], a, b = sums.fold_factors(marks[h], m, c)
        new[2 + h] = sums.fold(marks[2 + h], part, a, b)
        old_factors.append(a)
        factors.append(b)
    return left, new, old_factors, factors


def _values(scores, v, marks, place, s: Shape):
    """A piece's values f32 (64, D), the group's marks with it, and the factors of the fold: of the fragment's two rows, first the
    group's. place: i32 scalars: the first row's end less the piece's first slot, the row's end less it, and whether any slot is
    not seen by all 64 queries."""
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
        left, new, old_factors, factors = _weights(values, marks, f32(s.c))
        steps = [(0, i * 16 * 8) for i in range(PIECE // 16)]
        piece = _wait(_wgmma(s.d, steps, left, [_descriptor(v, PIECE * 8)]))
        return _array(piece, s.d), *_as_marks(new + old_factors + factors)

    return f(scores, v, *marks, *place)


def _zero_values(v, rest, s: Shape):
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


def _state_address(state):
    return mg.add(mg.smem_address(state), mg.mul(mg.rem(mg.thread_index(), mg.WARPGROUP), 16))


def _load_state(at, n):
    return [x for i in range(0, n, 4) for x in mg.asm(f"ld.shared.v4.f32 {{$0,$1,$2,$3}},[$4+{i // 4 * 16 * mg.WARPGROUP}];", [at], "ffff")]


def _fold_group(row_sums, row_marks, group, marks, c):
    new, factors = [None] * MARKS, []
    for h in range(2):
        new[h], a, b = sums.fold_factors(row_marks[h], marks[h], c)
        new[2 + h] = sums.fold(row_marks[2 + h], marks[2 + h], a, b)
        factors.append((a, b))
    return [sums.fold(x, y, *factors[i // 2 % 2]) for i, (x, y) in enumerate(zip(row_sums, group))], new


def _bank(group, marks, row_marks, state, done, some, s: Shape):
    """Folds a group that is done to the row's sums in shared memory. some: whether there are any yet. -> the group's and the row's
    marks."""
    types = (mg.WGMMA, *(mg.PER_THREAD,) * 2 * MARKS, mg.REF, mg.SPLAT, mg.SPLAT)

    @plgpu.inline_mgpu(arg_types=types, return_type=PER_THREAD * 2 * MARKS)
    def f(ctx, group, *rest):
        del ctx
        marks, row_marks = _marks(rest[:MARKS]), _marks(rest[MARKS:2 * MARKS])
        state, done, some = rest[2 * MARKS], *map(mg.scalar, rest[2 * MARKS + 1:])
        values = _registers(group)

        def store():
            at = _state_address(state)

            def fold():
                folded, new = _fold_group(_load_state(at, len(values)), row_marks, values, marks, f32(s.c))
                return folded + new

            out = _if_else(some, fold, values + marks)
            for i in range(0, len(values), 4):
                mg.asm(f"st.shared.v4.f32 [$0+{i // 4 * 16 * mg.WARPGROUP}],{{$1,$2,$3,$4}};", [at, *out[i:i + 4]], "")
            return [f32(EMPTY)] * 2 + [f32(0)] * 2 + out[len(values):]

        return _as_marks(_if_else(done, store, marks + row_marks))

    return f(group, *marks, *row_marks, state, done, some)


def _finish(group, marks, row_marks, state, out, place, s: Shape):
    """Writes the tile. place: i32 scalars: whether groups lie in `state`, the first query's row of `out`, how many queries there
    are, the query head."""
    types = (mg.WGMMA, *(mg.PER_THREAD,) * 2 * MARKS, mg.REF, mg.REF, *(mg.SPLAT,) * 4)

    @plgpu.inline_mgpu(arg_types=types)
    def f(ctx, group, *rest):
        del ctx
        marks, row_marks = _marks(rest[:MARKS]), _marks(rest[MARKS:2 * MARKS])
        state, out = rest[2 * MARKS:2 * MARKS + 2]
        some, first, count, head = map(mg.scalar, rest[2 * MARKS + 2:])
        values = _registers(group)

        def fold():
            folded, new = _fold_group(_load_state(_state_address(state), len(values)), row_marks, values, marks, f32(s.c))
            return folded + new

        values = _if_else(some, fold, values + marks)
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

    f(group, *marks, *row_marks, state, out, *place)


# --- the kernel -------------------------------------------------------------------------------------------------------

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


def _kernel(q, keys, values, layer, starts, counts, out, *, q_sm, k_sm, v_sm, state, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            s: Shape, ctas):
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
            kv = (layer[0] * s.rows + row) * s.heads + lax.div(head, jnp.int32(s.group))
            for w in range(CONSUMERS):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_empty.at[w]))
                for half in range(halves):
                    source = q.at[row, pl.ds(token + w * ROWS, ROWS), head, pl.ds(half * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(source, q_sm.at[w, pl.ds(half * ROWS, ROWS)], q_full.at[w])

            def piece(p, it):
                slot = lax.rem(it, jnp.int32(STAGES))
                for array, sm, full, empty in ((keys, k_sm, k_full, k_empty), (values, v_sm, v_full, v_empty)):
                    pl.when(it >= STAGES)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
                    for half in range(halves):
                        source = array.at[kv, pl.ds(p * PIECE, PIECE), pl.ds(half * HALF, HALF)]
                        plgpu.copy_gmem_to_smem(source, sm.at[slot, pl.ds(half * PIECE, PIECE)], full.at[slot])
                return it + 1

            return lax.fori_loop(first, stop, piece, it)

        lax.fori_loop(0, own_tiles, tile, jnp.int32(0))

    def consume():
        def tile(i, carry):
            it, start, count = carry
            row, head, token = _tile(cta + i * ctas, s)
            following = jnp.minimum(i + 1, own_tiles - 1)  # fetched a tile ahead
            _, _, _, *fetched = known(following)
            end, first, stop = _span(start, count, token, s)
            own = start + token + wg * ROWS  # the first query's position
            plgpu.barrier_wait(q_full.at[wg])

            def slot_of(it):
                return lax.rem(it, jnp.int32(STAGES))

            def values(p, it, scores, marks):
                slot, base = slot_of(it), p * PIECE
                masked = base + PIECE > jnp.minimum(own + 1, end)
                if s.window is not None:
                    masked |= base < jnp.minimum(own + ROWS, end) - s.window
                plgpu.barrier_wait(v_full.at[slot])
                _zero_values(v_sm.at[slot], end - base, s)
                place = own + 1 - base, end - base, masked.astype(jnp.int32)
                out, *rest = _values(scores, v_sm.at[slot], marks, place, s)
                plgpu.barrier_arrive(v_empty.at[slot])
                return out, list(rest[:MARKS]), rest[MARKS:]

            def piece(p, carry):
                """Piece p, and the scores of the next."""
                it, scores, group, marks, row_marks, some = carry
                out, marks, factors = values(p, it, scores, marks)
                slot = slot_of(it + 1)
                plgpu.barrier_wait(k_full.at[slot])
                scores, group = _fold_and_score(q_sm.at[wg], k_sm.at[slot], wg, group, out, factors, s)
                plgpu.barrier_arrive(k_empty.at[slot])
                done = (lax.rem(p, jnp.int32(GROUP)) == GROUP - 1).astype(jnp.int32)
                banked = _bank(group, marks, row_marks, state.at[wg], done, some, s)
                return it + 1, scores, group, list(banked[:MARKS]), list(banked[MARKS:]), some | done

            group, *marks = _fresh(s.d)
            slot = slot_of(it)
            plgpu.barrier_wait(k_full.at[slot])
            scores = _scores(q_sm.at[wg], k_sm.at[slot], wg, s)
            plgpu.barrier_arrive(k_empty.at[slot])
            carry = it, scores, group, marks, marks, jnp.int32(0)
            it, scores, group, marks, row_marks, some = lax.fori_loop(first, stop - 1, piece, carry)
            plgpu.barrier_arrive(q_empty.at[wg])
            out_of_last, marks, factors = values(stop - 1, it, scores, marks)
            group = _fold_piece(group, out_of_last, factors, s)
            it = it + 1
            at = token + wg * ROWS
            place = some, row * s.tokens + at, s.tokens - at, head
            _finish(group, marks, row_marks, state.at[wg], out, place, s)
            return it, *fetched

        if s.turns:
            _give_turn(wg)
        *_, start, count = known(jnp.int32(0))
        lax.fori_loop(0, own_tiles, tile, (jnp.int32(0), start, count))

    consumer_registers, producer_registers = mg.register_budget(CONSUMERS)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(producer_registers, action="decrease")
        produce()

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(consumer_registers, action="increase")
        consume()


def prefill(q, keys, values, layer, starts, counts, *, scale, window=None, soft_cap=None, ctas=SMS, turns=False):
    """q bf16 [B, T, Hq, D], keys and values bf16 [L, B, Hkv, S, D], layer i32 [], starts and counts i32 [B] -> q's shape."""
    rows, tokens, query_heads, d = q.shape
    layers, _, heads, capacity, _ = keys.shape
    s = Shape(rows, tokens, heads, query_heads // heads, d, capacity, scale, window, soft_cap, turns)
    halves = d // HALF
    tile = lambda *shape: plgpu.SMEM((*shape, HALF), jnp.bfloat16, transforms=mg.ROWS_128)
    scratch = dict(
        q_sm=tile(CONSUMERS, halves * ROWS), k_sm=tile(STAGES, halves * PIECE), v_sm=tile(STAGES, halves * PIECE),
        state=plgpu.SMEM((CONSUMERS, ROWS * d), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=halves, num_barriers=CONSUMERS), q_empty=plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS),
        **{f"{x}_full": plgpu.Barrier(num_arrivals=halves, num_barriers=STAGES) for x in "kv"},
        **{f"{x}_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES) for x in "kv"})
    kernel = lambda *refs, **scratch: _kernel(*refs, **scratch, s=s, ctas=ctas)
    flat = [a.reshape(layers * rows * heads, capacity, d) for a in (keys, values)]
    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(q.shape, q.dtype), scratch_types=scratch, grid=(ctas,), grid_names=("cta",),
        num_threads=CONSUMERS + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))(q, *flat, layer.reshape(1), starts, counts)
