"""The order of sums of attention on Hopper: what decode and prefill must agree on for a row to keep its bits.

Slots of the cache fall into pieces of 128 and groups of 8 pieces, by their number, whatever the batch, the queries
beside a query and the work's division among CTAs.

    score    s = q . k: one float32 accumulator over k16 steps of the head dimension, in order
    piece    m = max s over the slots that the query sees; p = 2^(s c - m c), c = scale log2(e), one fma, m c rounded;
             o = sum of bfloat16(p) v: one float32 accumulator over the k16 steps of its slots, from zero;
             of the sum of p, part q (0..3) has slots 16 k + 8 h + 2 q + e: (h = 0, + 1) of e = 0, + e = 1, then k in order
    fold     m = max(m1, m2); x = fma(x1, 2^(c (m1 - m)), x2 2^(c (m2 - m))) for o and the parts of the sum
    row      pieces are folded from left to right to their group, groups from left to right to the row, each from nothing
    result   o / ((part 0 + part 1) + (part 2 + part 3)), the reciprocal rounded

An mma and a wgmma with one accumulator add alike, and so do an mma and its transpose. A piece of which a query sees
nothing has m = EMPTY and zeros: folding it changes no bit, so it may be left out. Rounding is written out in PTX,
since the assembler would contract a mul and an add in one kernel and not in another.
"""
import functools
import math

import numpy as np

from nvfp4jax.kernels.hopper import mosaic as mg

PIECE = 128  # slots of a maximum
GROUP = 8  # pieces
PARTS = 4  # of the sum of weights
EMPTY = -1e30  # the maximum of nothing: finite, so that no difference is NaN
LOG2E = math.log2(math.e)
NO_WINDOW = 2**31 - 1


def f32(value):
    """A constant."""
    return mg.float_of(mg.i32(np.float32(value).view(np.int32)))


def _pure(text, out="f"):
    return lambda *args: mg.asm(text, args, out, effects=False)


fmul = _pure("mul.rn.f32 $0,$1,$2;")
fadd = _pure("add.rn.f32 $0,$1,$2;")
fsub = _pure("sub.rn.f32 $0,$1,$2;")
ffma = _pure("fma.rn.f32 $0,$1,$2,$3;")
fmax = _pure("max.f32 $0,$1,$2;")
fneg = _pure("neg.f32 $0,$1;")
exp2 = _pure("ex2.approx.ftz.f32 $0,$1;")
reciprocal = _pure("rcp.rn.f32 $0,$1;")
pack = _pure("cvt.rn.bf16x2.f32 $0,$2,$1;", "r")  # low, high
bit_or = _pure("or.b32 $0,$1,$2;", "r")
not_negative = _pure("max.s32 $0,$1,0;", "r")
least = _pure("min.s32 $0,$1,$2;", "r")


def factor(scale, soft_cap):
    """c: what a score is multiplied by in front of the power of two."""
    return LOG2E * (soft_cap or scale)


def cap(score, scale, soft_cap):
    """tanh(score scale / soft_cap), by its exponential: the score where there is a soft cap."""
    if not soft_cap:
        return score
    text = ("{.reg .f32 t; mul.rn.f32 t,$1,$2; ex2.approx.ftz.f32 t,t; add.rn.f32 t,t,0f3F800000; rcp.approx.ftz.f32 t,t;"
            "fma.rn.f32 $0,t,0fC0000000,0f3F800000;}")
    return mg.asm(text, [score, f32(2 * LOG2E * scale / soft_cap)], "f", effects=False)


def see(score, rest, window, offset=0):
    """The score of a slot, minus infinity where the query does not see it. rest: how far the query's end (its own
    position plus one) lies beyond the slot `offset` to the left."""
    text = (f"{{.reg .pred p; .reg .b32 t; add.s32 t,$2,{-1 - offset}; setp.lt.u32 p,t,{window or NO_WINDOW};"
            "selp.f32 $0,$1,0fFF800000,p;}")
    return mg.asm(text, [score, rest], "f", effects=False)


def weight(score, c, minus_mc):
    return exp2(ffma(score, c, minus_mc))


def fold_factors(m1, m2, c):
    """The maximum of both, and what each side is multiplied by."""
    m = fmax(m1, m2)
    return m, exp2(fmul(fsub(m1, m), c)), exp2(fmul(fsub(m2, m), c))


def fold(x1, x2, a, b):
    return ffma(x1, a, fmul(x2, b))


def lanes(value, op, steps):
    """Over the lanes of a warp that differ in the bits `steps`."""
    for step in steps:
        value = op(value, mg.asm(f"shfl.sync.bfly.b32 $0,$1,{step},31,-1;", [value], "f"))
    return value


def total(values):
    return functools.reduce(fadd, values)
