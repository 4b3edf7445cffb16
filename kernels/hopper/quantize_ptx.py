"""The quantizers' arithmetic, in PTX; every register is an untyped i32.

E2M1 rounding runs on the FMA pipe: |y| splits into three saturated segments [0, 2], [2, 4], [4, 6] in which the codes are
4, 2 and 1 equal steps; adding the segments to 2**23 one after another rounds each to the even code and clamps at 6.
"""
import math
import struct

from nvfp4jax import numerics


def f32(value: float) -> str:
    """A PTX float32 literal."""
    bits, = struct.unpack("<I", struct.pack("<f", value))
    return f"0f{bits:08X}"


# Of two pairs: the two low halves as a pair, and the two high ones.
LOW_HALVES, HIGH_HALVES = ("prmt.b32 $0,$1,$2," + selector + ";" for selector in ("0x5410", "0x7632"))
# The larger of either half, $2 without its signs.
MAX_OF_PAIR = "{.reg .b32 t; and.b32 t,$2,0x7FFF7FFF; max.u16x2 $0,$1,t;}"
# A pair of bf16 with -0 made +0: adding +0 does, where a product with 1 would not.
CANONICAL = "{.reg .b32 o,z; mov.b32 o,0x3F803F80; mov.b32 z,0; fma.rn.bf16x2 $0,$1,o,z;}"
# bf16(silu(gate)) * up of two elements, as `numerics.silu_mul`: gate / (1 + sign(gate) * SILU_NUDGE + exp(-gate)); adding +0 to the
# product makes -0 +0. Below a gate of SILU_MIN the reciprocal is a denormal, which is flushed: zero.
SILU = ("{.reg .b32 g0,g1,e0,e1,k; shl.b32 g0,$1,16; and.b32 g1,$1,0xFFFF0000;" +
        "".join(f"mul.rn.f32 e{i},g{i},{f32(-numerics.SILU_RATE / math.log(2))}; ex2.approx.ftz.f32 e{i},e{i};"
                f"add.rn.f32 e{i},e{i},{f32(1 - numerics.SILU_NUDGE)}; mul.rn.sat.f32 k,g{i},{f32(2.0**127)};"
                f"fma.rn.f32 e{i},k,{f32(2 * numerics.SILU_NUDGE)},e{i};"
                f"rcp.approx.ftz.f32 e{i},e{i}; mul.rn.f32 e{i},e{i},g{i};" for i in range(2)) +
        "cvt.rn.bf16x2.f32 e0,e1,e0; mov.b32 k,0; fma.rn.bf16x2 $0,e0,$2,k;}")
# Two elements x, the inverse RMS, two weights: bf16(bf16(x * inverse) * weight); -0 as above.
NORM = ("{.reg .b32 l,h,z; shl.b32 l,$1,16; and.b32 h,$1,0xFFFF0000; mul.rn.f32 l,l,$2; mul.rn.f32 h,h,$2;"
        "cvt.rn.bf16x2.f32 l,h,l; mov.b32 z,0; fma.rn.bf16x2 $0,l,$3,z;}")
# The sum of squares of a block: low and high halves in order, then the two sums.
SQUARES = ("{.reg .b32 l,h,a,b; mov.b32 a,0; mov.b32 b,0;" +
           "".join(f"shl.b32 l,${i},16; and.b32 h,${i},0xFFFF0000; fma.rn.f32 a,l,l,a; fma.rn.f32 b,h,h,b;" for i in range(1, 9)) +
           "add.rn.f32 $0,a,b;}")
ADD = "add.rn.f32 $0,$1,$2;"
# v = sum of squares * (1/K) + eps -> 1 / sqrt(v), root and reciprocal each rounded to nearest even; 0 where v is infinite.
# rsqrt's approximation, refined: the residuals of the root (e) and of the reciprocal (the last d) are exact. Right for every
# mantissa of v and every first guess up to 6 ulps away (all tried); the factor a little above 2 serves the root 2 - 2**-23, whose
# reciprocal lies next to a tie.
INVERSE_RMS = ("{{.reg .pred p; .reg .b32 v,s,h,d,e,n,y; mul.rn.f32 v,$1,{share}; add.rn.f32 v,v,{eps}; rsqrt.approx.ftz.f32 $0,v;"
               "mul.rn.f32 s,v,$0; mul.rn.f32 h,$0,{half}; neg.f32 n,s; fma.rn.f32 d,n,h,{half}; fma.rn.f32 s,s,d,s; fma.rn.f32 h,h,d,h;"
               "neg.f32 n,s; fma.rn.f32 e,n,s,v; fma.rn.f32 s,e,h,s;"
               "neg.f32 n,s; mul.rn.f32 y,h,{two}; fma.rn.f32 d,n,y,{one}; fma.rn.f32 y,d,y,y; fma.rn.f32 d,n,y,{one};"
               "setp.lt.f32 p,v,0f7F800000; @p fma.rn.f32 $0,d,y,y;}}")
BUTTERFLY_ADD = "{{.reg .b32 o; shfl.sync.bfly.b32 o,$1,{step},31,-1; add.rn.f32 $0,$1,o;}}"


def unpack_text():
    """8 words of two bf16 -> 16 float32."""
    return "".join(f"shl.b32 ${2 * i},${16 + i},16; and.b32 ${2 * i + 1},${16 + i},0xFFFF0000;" for i in range(8))


def block_max_text(single):
    """A block -> the float32 bits of its largest magnitude ($0), and of its largest finite one ($1). Bits of magnitudes
    order like integers, NaN and infinity above all; the finite maximum needs a second look only where $0 is neither."""
    if single:  # 16 float32
        ops = ["{.reg .pred p; .reg .b32 t; and.b32 $0,$2,0x7FFFFFFF;"]
        ops += [f"and.b32 t,${i},0x7FFFFFFF; max.u32 $0,$0,t;" for i in range(3, 18)]
        ops += ["mov.b32 $1,$0; setp.lt.u32 p,$0,0x7F800000; @p bra DONE; mov.b32 $1,0;"]
        ops += [f"and.b32 t,${i},0x7FFFFFFF; setp.lt.u32 p,t,0x7F800000; @p max.u32 $1,$1,t;" for i in range(2, 18)]
        return "".join(ops) + "DONE: }"
    ops = ["{.reg .pred p; .reg .b32 m,t,u; and.b32 m,$2,0x7FFF7FFF;"]
    ops += [f"and.b32 t,${i},0x7FFF7FFF; max.u16x2 m,m,t;" for i in range(3, 10)]
    ops += ["shl.b32 t,m,16; max.u32 $0,m,t; and.b32 $0,$0,0xFFFF0000; mov.b32 $1,$0; setp.lt.u32 p,$0,0x7F800000; @p bra DONE;"
            "mov.b32 $1,0;"]
    for i in range(2, 10):
        ops += [f"and.b32 t,${i},0x7FFF7FFF; shl.b32 u,t,16; setp.lt.u32 p,u,0x7F800000; @p max.u32 $1,$1,u;"
                "and.b32 t,t,0xFFFF0000; setp.lt.u32 p,t,0x7F800000; @p max.u32 $1,$1,t;"]
    return "".join(ops) + "DONE: }"


MAX = "max.u32 $0,$1,$2;"
WARP_MAX = "redux.sync.max.u32 $0,$1,-1;"


def global_text(top, pow2, static):
    """amax (or, static, the global scale) $5 -> global scale, g/6, 2**-e, m (1/g = m 2**e), amax that they stand for.

    As `numerics.global_scales`, with the correctly rounded division that the contract asks for."""
    text = "{.reg .pred z; .reg .b32 a,g,d;"
    if static:
        text += f"setp.ne.u32 z,0,0; mov.b32 $0,$5; rcp.rn.f32 g,$0; mul.rn.f32 a,$0,{f32(top)};"
    else:
        text += f"setp.lt.f32 z,$5,{f32(numerics.AMAX_MIN)}; selp.b32 a,{f32(top)},$5,z; div.rn.f32 $0,a,{f32(top)};"
        if pow2:
            text += f"add.u32 $0,$0,0x7FFFFF; and.b32 $0,$0,0xFF800000; mul.rn.f32 a,$0,{f32(top)}; min.f32 a,a,0f7F7FFFFF;"
            text += "rcp.rn.f32 g,$0;"
        else:
            text += f"div.rn.f32 g,{f32(top)},a; min.f32 g,g,0f7F7FFFFF;"
    text += "rcp.rn.f32 d,g; mov.b32 $1,g; shr.u32 $2,d,23; sub.u32 $2,254,$2; shl.b32 $2,$2,23;"
    return text + "and.b32 $3,d,0x7FFFFF; or.b32 $3,$3,0x3F800000; selp.b32 $4,0,a,z;}"


# What a block's scale should be -> its E4M3 bits, its value, and the multiplier 1 / (scale / g) of its elements. The product
# scale * m lies in [2**-9, 2**10), so the reciprocal needs none of rcp.rn's special cases: these are its three steps.
SCALE = ("{.reg .pred z; .reg .b16 h,l,u; .reg .b32 f,b,r,e; cvt.rn.satfinite.e4m3x2.f32 h,0f00000000,$3; cvt.u32.u16 $0,h;"
         "cvt.rn.f16x2.e4m3x2 f,h; mov.b32 {l,u},f; cvt.f32.f16 $1,l; mul.rn.f32 b,$1,$5; rcp.approx.f32 r,b; neg.f32 b,b;"
         f"fma.rn.f32 e,b,r,{f32(1)}; fma.rn.f32 r,e,r,r; mul.rn.f32 r,r,$4; min.f32 r,r,0f7F7FFFFF;"
         "setp.eq.f32 z,$1,0f00000000; selp.b32 $2,0f7F7FFFFF,r,z;}")
WANTED = "mul.rn.f32 $0,$1,$2;"
# Four-over-six: amax_block / 6 (a quotient below 2**-126 is 0) times g.
WANTED_SIX = ("{.reg .pred z; .reg .b32 q; div.rn.f32 q,$1,0f40C00000; setp.lt.f32 z,q,0f00800000; selp.b32 q,0,q,z;"
              "mul.rn.f32 $0,q,$2; min.f32 $0,$0,0f7F7FFFFF;}")
TIMES_1_5 = f"mul.rn.f32 $0,$1,{f32(1.5)};"


def round_text(y, t, s):
    """|y| -> 2**23 + its E2M1 code, in t. Every step is exact but the three additions, which round to the even code."""
    return (f"mul.rn.sat.f32 {s},{y},{f32(.5)}; fma.rn.f32 {t},{s},{f32(4)},{f32(2**23)};"
            f"fma.rn.sat.f32 {s},{y},{f32(.5)},{f32(-1)}; fma.rn.f32 {t},{s},{f32(2)},{t};"
            f"fma.rn.sat.f32 {s},{y},{f32(.5)},{f32(-2)}; add.rn.f32 {t},{t},{s};")


_MAGIC_SUM = (-0x4B000000 * sum(16**i for i in range(8))) % 2**32  # cancels the exponents of 2**23 in the packed word


def codes_text():
    """4 canonical words of two bf16, multiplier $5 -> 8 packed codes."""
    text = f"{{.reg .b32 x,s,t; mov.b32 $0,{_MAGIC_SUM};"
    for i in range(4):
        for half, take in enumerate((f"shl.b32 x,${1 + i},16;", f"and.b32 x,${1 + i},0xFFFF0000;")):
            text += take + "abs.f32 x,x; mul.rn.f32 x,x,$5;" + round_text("x", "t", "s") + f"mad.lo.u32 $0,t,{16**(2 * i + half)},$0;"
    # The sign bits of elements 0 2 4 6, then of 1 3 5 7, as the top bits of four bytes.
    text += "prmt.b32 x,$1,$2,0x7531; prmt.b32 s,$3,$4,0x7531; prmt.b32 t,x,s,0x6420; prmt.b32 x,x,s,0x7531;"
    return text + "shr.u32 t,t,4; and.b32 t,t,0x08080808; and.b32 x,x,0x80808080; or.b32 $0,$0,t; or.b32 $0,$0,x;}"


# The sign of a product that underflows to zero is dropped, as the contract's "code 8 where x * multiplier < 0". Only a
# multiplier below 2**-17 can do that to a bf16. 8 words, multiplier $16.
def underflow_text():
    text = "{.reg .pred p; .reg .b32 x;" + "".join(f"mov.b32 ${i},${8 + i};" for i in range(8))
    text += f"setp.ge.f32 p,$16,{f32(2.0**-16)}; @p bra DONE;"
    for i in range(8):
        text += f"shl.b32 x,${8 + i},16; mul.rn.f32 x,x,$16; setp.eq.f32 p,x,0f00000000; @p and.b32 ${i},${i},0xFFFF0000;"
        text += f"and.b32 x,${8 + i},0xFFFF0000; mul.rn.f32 x,x,$16; setp.eq.f32 p,x,0f00000000; @p and.b32 ${i},${i},0x0000FFFF;"
    return text + "DONE: }"


def codes_single_text():
    """8 float32, multiplier $9 -> 8 packed codes. Adding +0 makes the sign that of a product below zero."""
    text = f"{{.reg .b32 x,s,t; mov.b32 $0,{_MAGIC_SUM};"
    for i in range(8):
        text += f"mul.rn.f32 x,${1 + i},$9; add.rn.f32 x,x,0f00000000; shr.u32 s,x,31; mad.lo.u32 $0,s,{8 * 16**i},$0;"
        text += "abs.f32 x,x;" + round_text("x", "t", "s") + f"mad.lo.u32 $0,t,{16**i},$0;"
    return text + "}"


def error_text(kind):
    """16 float32 (from $1), multiplier $17, scale $18, amax as mantissa $19 and power of two $20 -> the candidate's error.

    The division by 1536 is corrected by its residual, which is exact for the mantissas met here; the power of two comes
    last: a product below 2**-126 becomes 0 (ftz), one whose undivided value is no float32 becomes infinity."""
    text = "{.reg .pred p; .reg .b32 x,s,t,q; mov.b32 $0,0;"
    for i in range(16):
        text += f"abs.f32 x,${1 + i}; mul.rn.f32 x,x,$17;" + round_text("x", "t", "s")
        text += f"shl.b32 t,t,22; mul.rn.f32 t,t,{f32(2.0**126)}; mul.rn.f32 t,t,$18; mul.rn.f32 t,t,$19;"
        text += f"mul.rn.f32 q,t,{f32(1 / 1536)}; fma.rn.f32 s,q,{f32(-1536)},t; fma.rn.f32 q,s,{f32(1 / 1536)},q;"
        text += "mul.rn.f32 t,t,$20; setp.eq.f32 p,t,0f7F800000; mul.rn.ftz.f32 q,q,$20; selp.b32 q,t,q,p;"
        text += f"abs.f32 x,${1 + i}; sub.rn.f32 q,q,x;"
        text += "abs.f32 q,q;" if kind == "mae" else "mul.rn.f32 q,q,q; min.f32 q,q,0f7F7FFFFF;"
        text += "add.rn.f32 $0,$0,q;" if i else "mov.b32 $0,q;"
    return text + "}"


SPLIT = "and.b32 $0,$2,0x7FFFFF; or.b32 $0,$0,0x3F800000; and.b32 $1,$2,0x7F800000;"
CHOOSE = "{.reg .pred p; setp.lt.f32 p,$1,$2; selp.b32 $0,$3,$4,p;}"  # $3 where $1 < $2, else $4
# Where $2 has no sign, some words $3, $3 + 128 bytes, ... (of every 32nd of the next $4 words) are not there yet: waits for this lane's
# and takes their maximum; else $1.
WAIT = ("{.reg .pred p; .reg .b64 a; .reg .s32 n; .reg .b32 v; mov.b32 $0,$1; setp.lt.s32 p,$2,0; @p bra DONE; mov.b64 a,$3; mov.b32 n,$4;"
        "NEXT: setp.le.s32 p,n,0; @p bra DONE;"
        "AGAIN: ld.relaxed.gpu.global.b32 v,[a]; setp.lt.s32 p,v,0; @p bra TAKEN; nanosleep.u32 100; bra AGAIN;"
        "TAKEN: max.u32 $0,$0,v; add.s64 a,a,128; sub.s32 n,n,32; bra NEXT; DONE: }")
