"""NVFP4 quantizers for Hopper in Pallas Mosaic GPU: bit for bit what `numerics` does, alone or fused with the producer.

A thread owns whole blocks of 16 neighbouring elements, `warps_per_row` warps own a row, so that a row's amax, and whether
it holds NaN or infinity, is a maximum over registers, then lanes, then those warps. Every reduction but the sum of squares
is a maximum, and that sum runs over one fixed tree of K alone: a row's bits depend on nothing but the row and its amax.

Three ways to an amax:
- one a row ("token"), or a given one: a single launch, each row on its own;
- one a tensor, few rows: a single launch, of one CTA or of clusters. Each cluster reads all rows and shares its maxima
  through distributed shared memory, then each CTA quantizes its own part: redundant reads instead of a second launch;
- one a tensor, many elements: a launch that leaves one maximum a CTA, and one that reduces those and quantizes, from the
  last row to the first, because the last rows are still in the L2;
- one a matrix of many (weights): a single launch whose CTAs take the amax of a tile, then quantize a tile of an earlier
  matrix, whose amax is complete and whose values are still in the L2. CTAs draw their tiles in order from a counter, so that the
  first unfinished one never waits, however many CTAs run at once.

E2M1 rounding runs on the FMA pipe: |y| splits into three saturated segments [0, 2], [2, 4], [4, 6] in which the codes are
4, 2 and 1 equal steps; adding the segments to 2**23 one after another rounds each to the even code and clamps at 6.
"""
import dataclasses
import math
import struct

import jax
import jax.numpy as jnp

from nvfp4jax import numerics
from nvfp4jax.kernels.hopper import _old as mg

SMS = 132  # of an H100 or H200: a grid of this many CTAs fills one wave
WARP = 32
CLUSTER = 16  # CTAs of a cluster: the largest that Hopper has
CLUSTERS = 2  # up to so many clusters, one launch beats two
MAX_K = 16 * WARP * 16 * 8
BLOCK_BYTES = 8  # packed codes of one block
MAX_TILES = 512  # of a matrix: each warp reads their maxima
TRANSPOSE_WORDS = 36 * 8  # of a warp: 8 rows (64-chunks of K) of 32 words, padded against bank conflicts


def _f32(value: float) -> str:
    """A PTX float32 literal."""
    bits, = struct.unpack("<I", struct.pack("<f", value))
    return f"0f{bits:08X}"


# --- inline PTX: every register is an untyped i32 --------------------------------------------------------------------

# A pair of bf16 with -0 made +0: adding +0 does, where a product with 1 would not.
CANONICAL = "{.reg .b32 o,z; mov.b32 o,0x3F803F80; mov.b32 z,0; fma.rn.bf16x2 $0,$1,o,z;}"
# bf16(silu(gate)) * up of two elements, as `numerics.silu_mul`: gate / (1 + sign(gate) * SILU_NUDGE + exp(-gate)); adding +0 to the
# product makes -0 +0. Below a gate of SILU_MIN the reciprocal is a denormal, which is flushed: zero.
SILU = ("{.reg .b32 g0,g1,e0,e1,k; shl.b32 g0,$1,16; and.b32 g1,$1,0xFFFF0000;" +
        "".join(f"mul.rn.f32 e{i},g{i},{_f32(-numerics.SILU_RATE / math.log(2))}; ex2.approx.ftz.f32 e{i},e{i};"
                f"add.rn.f32 e{i},e{i},{_f32(1 - numerics.SILU_NUDGE)}; mul.rn.sat.f32 k,g{i},{_f32(2.0**127)};"
                f"fma.rn.f32 e{i},k,{_f32(2 * numerics.SILU_NUDGE)},e{i};"
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


def _unpack_text():
    """8 words of two bf16 -> 16 float32."""
    return "".join(f"shl.b32 ${2 * i},${16 + i},16; and.b32 ${2 * i + 1},${16 + i},0xFFFF0000;" for i in range(8))


def _block_max_text(single):
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


def _global_text(top, pow2, static):
    """amax (or, static, the global scale) $5 -> global scale, g/6, 2**-e, m (1/g = m 2**e), amax that they stand for.

    As `numerics.global_scales`, with the correctly rounded division that the contract asks for."""
    text = "{.reg .pred z; .reg .b32 a,g,d;"
    if static:
        text += f"setp.ne.u32 z,0,0; mov.b32 $0,$5; rcp.rn.f32 g,$0; mul.rn.f32 a,$0,{_f32(top)};"
    else:
        text += f"setp.lt.f32 z,$5,{_f32(numerics.AMAX_MIN)}; selp.b32 a,{_f32(top)},$5,z; div.rn.f32 $0,a,{_f32(top)};"
        if pow2:
            text += f"add.u32 $0,$0,0x7FFFFF; and.b32 $0,$0,0xFF800000; mul.rn.f32 a,$0,{_f32(top)}; min.f32 a,a,0f7F7FFFFF;"
            text += "rcp.rn.f32 g,$0;"
        else:
            text += f"div.rn.f32 g,{_f32(top)},a; min.f32 g,g,0f7F7FFFFF;"
    text += "rcp.rn.f32 d,g; mov.b32 $1,g; shr.u32 $2,d,23; sub.u32 $2,254,$2; shl.b32 $2,$2,23;"
    return text + "and.b32 $3,d,0x7FFFFF; or.b32 $3,$3,0x3F800000; selp.b32 $4,0,a,z;}"


# What a block's scale should be -> its E4M3 bits, its value, and the multiplier 1 / (scale / g) of its elements. The product
# scale * m lies in [2**-9, 2**10), so the reciprocal needs none of rcp.rn's special cases: these are its three steps.
SCALE = ("{.reg .pred z; .reg .b16 h,l,u; .reg .b32 f,b,r,e; cvt.rn.satfinite.e4m3x2.f32 h,0f00000000,$3; cvt.u32.u16 $0,h;"
         "cvt.rn.f16x2.e4m3x2 f,h; mov.b32 {l,u},f; cvt.f32.f16 $1,l; mul.rn.f32 b,$1,$5; rcp.approx.f32 r,b; neg.f32 b,b;"
         f"fma.rn.f32 e,b,r,{_f32(1)}; fma.rn.f32 r,e,r,r; mul.rn.f32 r,r,$4; min.f32 r,r,0f7F7FFFFF;"
         "setp.eq.f32 z,$1,0f00000000; selp.b32 $2,0f7F7FFFFF,r,z;}")
WANTED = "mul.rn.f32 $0,$1,$2;"
# Four-over-six: amax_block / 6 (a quotient below 2**-126 is 0) times g.
WANTED_SIX = ("{.reg .pred z; .reg .b32 q; div.rn.f32 q,$1,0f40C00000; setp.lt.f32 z,q,0f00800000; selp.b32 q,0,q,z;"
              "mul.rn.f32 $0,q,$2; min.f32 $0,$0,0f7F7FFFFF;}")
TIMES_1_5 = f"mul.rn.f32 $0,$1,{_f32(1.5)};"


def _round(y, t, s):
    """|y| -> 2**23 + its E2M1 code, in t. Every step is exact but the three additions, which round to the even code."""
    return (f"mul.rn.sat.f32 {s},{y},{_f32(.5)}; fma.rn.f32 {t},{s},{_f32(4)},{_f32(2**23)};"
            f"fma.rn.sat.f32 {s},{y},{_f32(.5)},{_f32(-1)}; fma.rn.f32 {t},{s},{_f32(2)},{t};"
            f"fma.rn.sat.f32 {s},{y},{_f32(.5)},{_f32(-2)}; add.rn.f32 {t},{t},{s};")


_MAGIC_SUM = (-0x4B000000 * sum(16**i for i in range(8))) % 2**32  # cancels the exponents of 2**23 in the packed word


def _codes_text():
    """4 canonical words of two bf16, multiplier $5 -> 8 packed codes."""
    text = f"{{.reg .b32 x,s,t; mov.b32 $0,{_MAGIC_SUM};"
    for i in range(4):
        for half, take in enumerate((f"shl.b32 x,${1 + i},16;", f"and.b32 x,${1 + i},0xFFFF0000;")):
            text += take + "abs.f32 x,x; mul.rn.f32 x,x,$5;" + _round("x", "t", "s") + f"mad.lo.u32 $0,t,{16**(2 * i + half)},$0;"
    # The sign bits of elements 0 2 4 6, then of 1 3 5 7, as the top bits of four bytes.
    text += "prmt.b32 x,$1,$2,0x7531; prmt.b32 s,$3,$4,0x7531; prmt.b32 t,x,s,0x6420; prmt.b32 x,x,s,0x7531;"
    return text + "shr.u32 t,t,4; and.b32 t,t,0x08080808; and.b32 x,x,0x80808080; or.b32 $0,$0,t; or.b32 $0,$0,x;}"


# The sign of a product that underflows to zero is dropped, as the contract's "code 8 where x * multiplier < 0". Only a
# multiplier below 2**-17 can do that to a bf16. 8 words, multiplier $16.
def _underflow_text():
    text = "{.reg .pred p; .reg .b32 x;" + "".join(f"mov.b32 ${i},${8 + i};" for i in range(8))
    text += f"setp.ge.f32 p,$16,{_f32(2.0**-16)}; @p bra DONE;"
    for i in range(8):
        text += f"shl.b32 x,${8 + i},16; mul.rn.f32 x,x,$16; setp.eq.f32 p,x,0f00000000; @p and.b32 ${i},${i},0xFFFF0000;"
        text += f"and.b32 x,${8 + i},0xFFFF0000; mul.rn.f32 x,x,$16; setp.eq.f32 p,x,0f00000000; @p and.b32 ${i},${i},0x0000FFFF;"
    return text + "DONE: }"


def _codes_single_text():
    """8 float32, multiplier $9 -> 8 packed codes. Adding +0 makes the sign that of a product below zero."""
    text = f"{{.reg .b32 x,s,t; mov.b32 $0,{_MAGIC_SUM};"
    for i in range(8):
        text += f"mul.rn.f32 x,${1 + i},$9; add.rn.f32 x,x,0f00000000; shr.u32 s,x,31; mad.lo.u32 $0,s,{8 * 16**i},$0;"
        text += "abs.f32 x,x;" + _round("x", "t", "s") + f"mad.lo.u32 $0,t,{16**i},$0;"
    return text + "}"


def _error_text(kind):
    """16 float32 (from $1), multiplier $17, scale $18, amax as mantissa $19 and power of two $20 -> the candidate's error.

    The division by 1536 is corrected by its residual, which is exact for the mantissas met here; the power of two comes
    last: a product below 2**-126 becomes 0 (ftz), one whose undivided value is no float32 becomes infinity."""
    text = "{.reg .pred p; .reg .b32 x,s,t,q; mov.b32 $0,0;"
    for i in range(16):
        text += f"abs.f32 x,${1 + i}; mul.rn.f32 x,x,$17;" + _round("x", "t", "s")
        text += f"shl.b32 t,t,22; mul.rn.f32 t,t,{_f32(2.0**126)}; mul.rn.f32 t,t,$18; mul.rn.f32 t,t,$19;"
        text += f"mul.rn.f32 q,t,{_f32(1 / 1536)}; fma.rn.f32 s,q,{_f32(-1536)},t; fma.rn.f32 q,s,{_f32(1 / 1536)},q;"
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
STORE_SHARED = "st.shared.b32 [$0],$1;"
LOAD_SHARED = "ld.shared.b32 $0,[$1];"


# --- how rows lie over threads ---------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Plan:
    """`grid` CTAs of `warps` warps; `warps_per_row` of them share a row, a lane owning `blocks` blocks of it, 32 *
    warps_per_row blocks apart. cluster: CTAs of a cluster, which share one reading of the whole tensor. tile: groups of rows
    that a CTA draws at a time, where it draws."""

    warps: int
    warps_per_row: int
    blocks: int
    grid: int
    cluster: int = 1
    tile: int = 1

    @property
    def rows(self) -> int:
        """Rows a CTA works on at a time: a group."""
        return self.warps // self.warps_per_row


def _power_of_two_at_least(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _scan_plan(m: int, k: int, words: int) -> _Plan | None:
    """One launch for one amax: every cluster reads all rows, every CTA quantizes one group. None where two launches win.

    While the loads of all rows fit a thread's registers, CTAs of 4 warps that each read everything: an L2 latency instead of
    a cluster, which costs 0.8 us more than a plain launch; a second launch costs 1.2 us and its gap. Small CTAs start sooner."""
    units = -(-k // (16 * WARP))  # warps that one block a lane would take
    per_row = min(16, _power_of_two_at_least(units))
    blocks = -(-units // per_row)
    warps = max(4, per_row)
    groups = -(-m // (warps // per_row))
    if groups == 1 or groups * blocks * words <= 64:
        return _Plan(warps, per_row, blocks, groups)
    warps = max(8, per_row)
    clusters = -(-m // (warps // per_row * CLUSTER))
    return _Plan(warps, per_row, blocks, clusters * CLUSTER, CLUSTER) if clusters <= CLUSTERS else None


def _plan(m: int, k: int, words: int, emit: str = "packed") -> _Plan:
    """words: 32-bit registers that a block takes: 8, or 16 where it is float32 or has two inputs.

    Few rows: one block a lane, for latency. Many: up to 4 (2) blocks a lane and few warps a row, which saves reductions and
    the row's scalars. CTAs stay and fetch the next rows while they work on these; for codes of full lanes as many as their registers
    leave room for; operands of full lanes, four times as many bytes to store, come sooner from CTAs that each do one group."""
    units = -(-k // (16 * WARP))
    if m * units <= 16 * SMS:
        per_row = min(16, _power_of_two_at_least(units))
        warps = max(4, per_row)
        return _Plan(warps, per_row, -(-units // per_row), -(-m // (warps // per_row)))
    per_row = min(16, _power_of_two_at_least(-(-units // (32 // words))))
    blocks = -(-units // per_row)
    warps = max(4, per_row)
    groups = -(-m // (warps // per_row))
    resident = 16 // (warps // 4) if blocks * words < 32 else groups if emit == "operand" else max(1, 12 // warps)
    return _Plan(warps, per_row, blocks, min(groups, SMS * resident))


def _matrices_plan(n: int, k: int) -> tuple[int, _Plan]:
    """For many matrices [n, k]: how many rows are read as one, so that every lane has whole blocks, and a plan of tiles of
    some 32 KiB, at most MAX_TILES a matrix. As many CTAs as registers leave room for, three an SM, while their tiles, which the L2
    must keep beside a matrix, are no more than 10 MB; a matrix that the L2 cannot keep is read twice from memory."""
    pack = next((p for p in (1, 2, 4, 8) if n % p == 0 and p * k % (16 * WARP) == 0 and p * k <= 2048), 1)
    n, k = n // pack, pack * k
    units = -(-k // (16 * WARP))
    per_row = min(16, _power_of_two_at_least(-(-units // 4)))
    warps = max(4, per_row)
    groups = -(-n // (warps // per_row))
    tile = max(1, (1 << 15) // (warps // per_row * k * 2), -(-groups // MAX_TILES))
    tile = -(-groups // -(-groups // tile))  # tiles of a matrix alike
    resident = 12 // warps
    if n * k * 2 <= 20_000_000:
        resident = min(resident, 10_000_000 // (tile * (warps // per_row) * k * 2 * SMS))
    return pack, _Plan(warps, per_row, -(-units // per_row), max(1, resident) * SMS, tile=tile)


# --- the kernel ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Spec:
    """What a kernel does. source: "x", "rmsnorm" or "silu". amax: where it comes from: "row", "scalar" or "rows" (given; static:
    the given are global scales), "partials" (of an earlier launch), "scan" (of the tensor, in this launch) or "matrices" (of each
    `matrix` rows, in this launch). emit: "amax" (the partials: one a CTA), "packed" or "operand"."""

    m: int
    k: int
    source: str
    single: bool  # float32 input
    amax: str
    emit: str
    static: bool = False
    pow2: bool = False
    four_over_six: str | None = None
    eps: float = 0.0
    masked: bool = False
    copies: int = 0  # row i of x goes to rows rows[i, 0], rows[i, 1], ... of this many
    values: bool = False  # also the bfloat16 values that are quantized, in natural order
    partials: int = 0
    matrix: int = 0
    pack: int = 1  # rows of x that are read as one of m; NaN or infinity still poisons only its own

    @property
    def words(self) -> int:
        """i32 registers of a block's inputs."""
        return 16 if self.single or self.source == "silu" else 8


def _program(refs, spec: _Spec, plan: _Plan):
    """One thread's program; refs: name -> ref."""
    asm, add, mul, div, rem = mg.asm, mg.add, mg.mul, mg.div, mg.rem
    m, k, blocks_of_row = spec.m, spec.k, spec.k // 16
    warps, per_row, blocks, rows = plan.warps, plan.warps_per_row, plan.blocks, plan.rows
    groups = -(-m // rows)
    groups_of_matrix = -(-spec.matrix // (rows * plan.tile)) * plan.tile
    tid = mg.thread_index()
    lane, warp = rem(tid, WARP), div(tid, WARP)
    row_of_group, part = div(warp, per_row), rem(warp, per_row)
    full = blocks_of_row == 32 * per_row * blocks  # every lane has a block
    pure = dict(effects=False)
    index = [add(mul(add(part, j * per_row), WARP), lane) for j in range(blocks)]  # of the block in the row
    inside = [mg.i32(1) if full else mg.flag("lt", i, blocks_of_row) for i in index]

    shared = mg.smem_address(refs["shared"])
    max_slots, square_slots, transpose, cta_slots, cluster_slots = (add(shared, 4 * o) for o in _offsets(spec, plan)[:5])
    squares_of_row = per_row * blocks

    def synchronize_row():
        if plan.rows == 1:
            asm("bar.sync 0;", outputs="")
        else:
            asm(f"bar.sync $0,{WARP * per_row};", [add(row_of_group, 1)], "")

    def row_of(group):
        """This thread's row of a group, and whether there is one."""
        if spec.matrix:  # whole groups to a matrix
            row = add(mul(rem(group, groups_of_matrix), rows), row_of_group)
            ok = mg.flag("lt", row, spec.matrix)
            row = add(mul(div(group, groups_of_matrix), spec.matrix), row)
            return row, mg.bit_and(ok, mg.flag("lt", row, m))
        row = add(mul(group, rows), row_of_group)
        return row, mg.flag("lt", row, m)

    def fetch(group):
        """The raw registers of this thread's blocks of a group of rows."""
        row, ok = row_of(group)
        out = []
        for name in ("x", "up") if spec.source == "silu" else ("x",):
            itemsize = 4 if spec.single else 2
            first = mg.gmem_element(refs[name], row, k, mul(add(mul(part, WARP), lane), 16), itemsize)
            n = 16 if spec.single else 8
            for j in range(blocks):
                address = mg.offset_address(first, j * per_row * WARP * 16 * itemsize)
                out += mg.load_global(address, n, ok if full else mg.bit_and(ok, inside[j]))
        return out

    def produce(raw, parity):
        """Raw registers -> what is quantized: for each block 8 words of two bf16 without -0, or 16 float32."""
        n = 16 if spec.single else 8
        raw = [raw[i:i + n] for i in range(0, len(raw), n)]
        if spec.single:
            return raw
        if spec.source == "silu":
            return [[asm(SILU, pair, **pure) for pair in zip(*gate_up)] for gate_up in zip(raw[:blocks], raw[blocks:])]
        if spec.source == "rmsnorm":
            inverse = inverse_rms(raw, parity)
            first = mg.gmem_element(refs["weight"], mg.i32(0), 0, mul(add(mul(part, WARP), lane), 16), 2)
            for j in range(blocks):
                weight = mg.load_global(mg.offset_address(first, j * per_row * WARP * 32), 8, inside[j])
                raw[j] = [asm(NORM, [word, inverse, w], **pure) for word, w in zip(raw[j], weight)]
            return raw
        return [[asm(CANONICAL, [word], **pure) for word in block] for block in raw]

    def inverse_rms(raw, parity):
        """1 / sqrt(mean(x**2) + eps), summed as in `numerics.rms_norm`: a block's even and odd elements in order, the 32 blocks
        of a unit by halves (lanes by a butterfly), then the units in order."""
        sums = []
        for block in raw:
            total = asm(SQUARES, block, **pure)
            for step in (16, 8, 4, 2, 1):
                total = asm(BUTTERFLY_ADD.format(step=step), [total])
            sums.append(total)
        if per_row > 1:
            slot = add(square_slots, mul(add(mul(parity, rows), row_of_group), 4 * squares_of_row))
            def publish():
                for j, total in enumerate(sums):
                    asm(STORE_SHARED, [add(slot, mul(add(part, j * per_row), 4)), total], "")
            mg.branch(mg.flag("eq", lane, 0), publish)
            synchronize_row()
            sums = [asm(LOAD_SHARED, [add(slot, 4 * i)]) for i in range(squares_of_row)]
        total = sums[0]
        for other in sums[1:-(-blocks_of_row // WARP)]:
            total = asm(ADD, [total, other], **pure)
        constants = dict(share=1 / k, eps=spec.eps, half=.5, one=1, two=2 + 2.0**-22)
        return asm(INVERSE_RMS.format(**{name: _f32(value) for name, value in constants.items()}), [total], **pure)

    def block_maxima(block):
        return asm(_block_max_text(spec.single), block, "rr", **pure)

    def maximum(values):
        out = values[0]
        for v in values[1:]:
            out = asm(MAX, [out, v], **pure)
        return out

    def minimum(values):
        out = values[0]
        for v in values[1:]:
            out = mg.minimum(out, v)
        return out

    def row_maxima(maxima, parity):
        """(raw, finite) of the row from those of this thread's blocks."""
        out = [asm(WARP_MAX, [maximum(v)]) for v in zip(*maxima)]
        if per_row == 1:
            return out
        slot = add(max_slots, mul(add(mul(parity, warps), mul(row_of_group, per_row)), 8))
        def publish():
            asm("st.shared.v2.b32 [$0],{$1,$2};", [add(slot, mul(part, 8)), *out], "")
        mg.branch(mg.flag("eq", lane, 0), publish)
        synchronize_row()
        pairs = [asm("ld.shared.v2.b32 {$0,$1},[$2];", [add(slot, 8 * i)], "rr") for i in range(per_row)]
        return [maximum(v) for v in zip(*pairs)]

    def poisoned_blocks(maxima):
        """For each of this thread's blocks, whether its row of the `pack` holds NaN or infinity. A warp has all of them."""
        bad = [mg.flag("le", 0x7F800000, raw) for raw, _ in maxima]
        at = [div(i, blocks_of_row // spec.pack) for i in index]
        out = [mg.i32(0)] * blocks
        for r in range(spec.pack):
            here = [mg.flag("eq", a, r) for a in at]
            any_bad = asm(WARP_MAX, [maximum([mg.bit_and(b, h) for b, h in zip(bad, here)])])
            out = [mg.select(h, any_bad, o) for h, o in zip(here, out)]
        return out

    def cta_maximum(value):
        """The maximum over all threads of the CTA, in all of them."""
        value = asm(WARP_MAX, [value])
        mg.branch(mg.flag("eq", lane, 0), lambda: asm(STORE_SHARED, [add(cta_slots, mul(warp, 4)), value], ""))
        asm("bar.sync 0;", outputs="")
        return asm(WARP_MAX, [asm(LOAD_SHARED, [add(cta_slots, mul(mg.minimum(lane, warps - 1), 4))])])

    def cluster_maximum(value, rank):
        """The maximum over the cluster: lane i of warp 0 writes the CTA's into CTA i's slot of this rank."""
        asm("barrier.cluster.wait.aligned;", outputs="")  # all CTAs of the cluster have started
        send = mg.bit_and(mg.flag("eq", warp, 0), mg.flag("lt", lane, plan.cluster))
        mg.branch(send, lambda: asm(
            "{.reg .b32 a; mapa.shared::cluster.u32 a,$0,$1; st.shared::cluster.b32 [a],$2;}",
            [add(cluster_slots, mul(rank, 4)), lane, value], ""))
        asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", outputs="")
        return asm(WARP_MAX, [asm(LOAD_SHARED, [add(cluster_slots, mul(rem(lane, plan.cluster), 4))])])

    def largest(group, maxima):
        """The largest finite magnitude of this thread's blocks, if its row takes part."""
        found = maximum([finite for _, finite in maxima])
        if spec.masked:
            row = add(mul(group, rows), row_of_group)
            valid, = mg.load_global(mg.gmem_element(refs["valid"], row, 1, mg.i32(0), 1), 1, mg.flag("lt", row, m), form="u8")
            found = mg.select(valid, found, 0)
        return found

    def scan(order, start, stop, step, best, parity):
        """The largest finite magnitude that this thread meets in groups order(start), order(start + step), ..."""
        def body(i, best, parity, *raw):
            following = fetch(order(add(i, step)))
            found = largest(order(i), map(block_maxima, produce(raw, parity)))
            return (asm(MAX, [best, found], **pure), mg.bit_xor(parity, 1), *following)

        best, *_ = mg.loop(start, stop, step, [best, parity, *fetch(order(start))], body)
        return best

    def scales(amax):
        """-> the global scale, (its g, 2**-e, m), and the amax that they stand for, of one amax."""
        top = numerics.E2M1_MAX * (numerics.E4M3_MAX if spec.four_over_six is None else numerics.E4M3_MAX_FOUR_OVER_SIX)
        return asm(_global_text(top, spec.pow2, spec.static), [amax], "rrrrr", **pure)

    def candidate(wanted, power, mantissa):
        return asm(SCALE, [wanted, power, mantissa], "rrr", **pure)  # bits, value, multiplier

    def quantize_block(block, finite, scaled):
        """-> E4M3 bits and two words of codes."""
        _, g, power, mantissa, amax = scaled
        if spec.four_over_six is None:
            sixth = asm(f"mul.rn.f32 $0,$1,{_f32(1 / 6)};", [g], **pure)
            bits, _, multiplier = candidate(asm(WANTED, [finite, sixth], **pure), power, mantissa)
        else:
            if not spec.single:
                block = asm(_unpack_text(), block, "r" * 16, **pure)
            base = asm(WANTED_SIX, [finite, g], **pure)
            parts = asm(SPLIT, [amax], "rr", **pure)
            parts[0] = mg.select(amax, parts[0], 0)
            tried = []
            for wanted in (base, asm(TIMES_1_5, [base], **pure)):
                bits, value, multiplier = candidate(wanted, power, mantissa)
                error = asm(_error_text(spec.four_over_six), [*block, multiplier, value, *parts], **pure)
                tried.append((error, bits, multiplier))
            six, four = tried
            bits, multiplier = (asm(CHOOSE, [four[0], six[0], four[i], six[i]], **pure) for i in (1, 2))
        if spec.single or spec.four_over_six:
            return bits, [asm(_codes_single_text(), [*block[i:i + 8], multiplier], **pure) for i in (0, 8)]
        block = asm(_underflow_text(), [*block, multiplier], "r" * 8, **pure)
        return bits, [asm(_codes_text(), [*block[i:i + 4], multiplier], **pure) for i in (0, 4)]

    def targets_of(row, ok):
        """(row of the result, whether there is one) of each copy of a row."""
        if not spec.copies:
            return [(row, ok)]
        at = [mg.gmem_element(refs["rows"], row, spec.copies, mg.i32(i), 4) for i in range(spec.copies)]
        targets = [mg.load_global(a, 1, ok)[0] for a in at]
        return [(t, mg.bit_and(ok, mg.flag("lt", t, m * spec.copies))) for t in targets]  # unsigned: none of -1

    def write_operand(targets, j, words, bits, poisoned):
        """Decodes and stores a warp's 32 blocks: a quad's 4 blocks are a 64-chunk, which the permutation mixes."""
        factor = asm(mg.SCALE, [bits, mg.i32(0x4440)], **pure)
        factor = mg.select(poisoned, 0x7FC07FC0, factor)
        base = add(transpose, mul(warp, 4 * TRANSPOSE_WORDS))
        at = add(base, add(mul(div(lane, 4), 144), mul(rem(lane, 4), 4)))
        for h, word in enumerate(words):
            for s, pair in enumerate(mg.decode_codes(word, factor)):
                pair = asm("{.reg .b32 f; mov.b32 f,0x43004300; mul.rn.bf16x2 $0,$1,f;}", [pair], **pure)  # the decode's 2**7
                asm(f"st.shared.b32 [$0+{32 * s + 16 * h}],$1;", [at, pair], "")
        asm("bar.warp.sync -1;", outputs="")
        chunk = add(mul(part, WARP), j * per_row * WARP)  # the warp's first block
        source = add(base, add(mul(div(lane, 8), 144), mul(rem(lane, 8), 16)))
        for i in range(2):
            values = asm(f"ld.shared.v4.b32 {{$0,$1,$2,$3}},[$4+{i * 4 * 144}];", [source], "rrrr")
            here = mg.i32(1) if full else mg.flag("lt", add(chunk, add(mul(div(lane, 8), 4), 16 * i)), blocks_of_row)
            for row, ok in targets:
                start = mg.gmem_element(refs["operand"], row, k, add(mul(chunk, 16), mul(lane, 8)), 2)
                mg.store_global(mg.offset_address(start, 512 * i), values, mg.bit_and(ok, here))
        asm("bar.warp.sync -1;", outputs="")

    def quantize_group(group, raw, parity, scaled):
        produced = produce(raw, parity)
        quantize_produced(group, produced, [block_maxima(block) for block in produced], parity, scaled)

    def quantize_produced(group, produced, maxima, parity, scaled):
        row, ok = row_of(group)
        targets = targets_of(row, ok)
        raw_max, finite_max = (None, None) if spec.pack > 1 else row_maxima(maxima, parity)
        poisoned = poisoned_blocks(maxima) if spec.pack > 1 else [mg.flag("le", 0x7F800000, raw_max)] * blocks
        if spec.amax == "row":
            scaled = scales(finite_max)
        elif spec.amax == "rows":
            scaled = scales(*mg.load_global(mg.gmem_element(refs["amax"], row, 1, mg.i32(0), 4), 1, ok))
        if spec.amax in ("row", "rows"):
            first = mg.flag("eq", add(part, lane), 0)
            for target, there in targets:
                address = mg.gmem_element(refs["global_scale"], target, 1, mg.i32(0), 4)
                mg.store_global(address, scaled[:1], mg.bit_and(there, first))
        for j, (block, (_, finite)) in enumerate(zip(produced, maxima)):
            here = ok if full else mg.bit_and(ok, inside[j])
            if spec.values:
                address = mg.gmem_element(refs["values"], row, k, mul(index[j], 16), 2)
                for i in range(2):
                    mg.store_global(mg.offset_address(address, 16 * i), block[4 * i:4 * i + 4], here)
            bits, words = quantize_block(block, finite, scaled)
            if spec.emit == "operand":
                write_operand(targets, j, words, bits, poisoned[j])
                continue
            words = [mg.select(poisoned[j], 0, word) for word in words]
            bits = mg.select(poisoned[j], numerics.E4M3_NAN, bits)
            address = mg.gmem_element(refs["packed"], row, k // 2, mul(index[j], BLOCK_BYTES), 1)
            mg.store_global(address, words, here)
            mg.store_global(mg.gmem_element(refs["scale"], row, k // 16, index[j], 1), [bits], here, form="u8")

    def quantize_groups(first, step, scaled, reverse=False):
        order = (lambda group: mg.sub(groups - 1, group)) if reverse else (lambda group: group)
        raw = fetch(order(first))
        if callable(scaled):
            scaled = scaled()  # after the first loads are on their way
        if not isinstance(step, int) or step < groups:
            def body(group, parity, *raw):
                # Past the end a row is >= m (in reverse by unsigned wrap): all zeros, nothing stored.
                following = fetch(order(add(group, step)))
                quantize_group(order(group), list(raw), parity, scaled)
                return (mg.bit_xor(parity, 1), *following)

            mg.loop(first, groups, step, [mg.i32(0), *raw], body)
        else:
            quantize_group(order(first), raw, mg.i32(0), scaled)

    def scalar_scales(amax, cta):
        """The scales of one amax for all rows; one thread leaves the global scale."""
        scaled = scales(amax)
        if spec.emit != "amax":
            first = mg.flag("eq", add(cta, tid), 0)
            mg.store_global(mg.gmem_address(refs["global_scale"]), scaled[:1], first)
        return scaled

    def draw_tiles():
        """Word 0 of `zeroed` counts the draws, word 1 + t is tile t's amax with the sign set. Draw t: the amax of tile t, then
        the codes of tile t - lag, whose matrix has only tiles below t, all drawn before."""
        tile = plan.tile
        per = groups_of_matrix // tile  # tiles of a matrix
        tiles = m // spec.matrix * per
        lag = per + plan.grid  # others are at work on the last `grid` draws
        first = mg.flag("eq", tid, 0)
        draw_slots = add(cta_slots, 4 * warps)  # of either parity

        def word(i):
            return mg.gmem_element(refs["zeroed"], i, 1, mg.i32(0), 4)

        def draw():
            return asm("{.reg .pred p; setp.ne.u32 p,$2,0; mov.b32 $0,0; @p atom.global.add.u32 $0,[$1],1;}", [word(mg.i32(0)), first])

        def step(t, parity, pending, *raw):
            begun = mg.flag("le", lag, t)
            q = mg.select(begun, mg.sub(t, lag), tiles)  # `tiles`: nothing there
            matrix = div(q, per)
            base = add(mul(matrix, per), 1)
            words = []  # the amax of each tile of the matrix; used after the loads of x are on their way
            for i in range(0, per, WARP):
                here = mg.bit_and(begun, mg.flag("lt", add(lane, i), per))
                words.append(asm("{.reg .pred p; setp.ne.u32 p,$2,0; mov.b32 $0,0x80000000; @p ld.relaxed.gpu.global.b32 $0,[$1];}",
                                 [word(add(base, add(lane, i))), here]))

            def amax_of_group(r, best, *raw):
                following = fetch(mg.select(mg.flag("eq", r, tile - 1), mul(q, tile), add(add(mul(t, tile), r), 1)))
                found = maximum([finite for _, finite in map(block_maxima, (raw[i:i + 8] for i in range(0, len(raw), 8)))])
                return [asm(MAX, [best, found], **pure), *following]

            best, *raw = mg.loop(0, tile, 1, [mg.i32(0), *raw], amax_of_group)
            best = asm(WARP_MAX, [best])
            slots, draw_slot = add(cta_slots, mul(parity, 4 * (warps + 2))), add(draw_slots, mul(parity, 4 * (warps + 2)))
            mg.store_shared(add(slots, mul(warp, 4)), [best], mg.flag("eq", lane, 0))
            mg.store_shared(draw_slot, [pending], first)
            asm("bar.sync 0;", outputs="")
            best = asm(WARP_MAX, [asm(LOAD_SHARED, [add(slots, mul(mg.minimum(lane, warps - 1), 4))])])
            asm("{.reg .pred p; .reg .b32 v; setp.ne.u32 p,$2,0; or.b32 v,$1,0x80000000; @p st.relaxed.gpu.global.b32 [$0],v;}",
                [word(add(t, 1)), best, mg.bit_and(first, mg.flag("lt", t, tiles))], "")
            following_draw = asm(LOAD_SHARED, [draw_slot])
            pending = draw()

            known = asm("redux.sync.min.u32 $0,$1,-1;", [minimum(words)])
            amax = asm(WAIT, [maximum(words), known, word(add(base, lane)), mg.sub(per, mg.minimum(lane, per))])
            amax = mg.bit_and(asm(WARP_MAX, [amax]), 0x7FFFFFFF)
            scaled = scales(amax)
            owner = mg.bit_and(mg.bit_and(first, begun), mg.flag("eq", rem(q, per), 0))
            mg.store_global(mg.gmem_element(refs["global_scale"], matrix, 1, mg.i32(0), 4), scaled[:1], owner)

            def quantize_one(r, row_parity, *raw):
                group = add(mul(q, tile), r)
                following = fetch(mg.select(mg.flag("eq", r, tile - 1), mul(following_draw, tile), add(group, 1)))
                quantize_group(group, list(raw), row_parity, scaled)
                return [mg.bit_xor(row_parity, 1), *following]

            _, *raw = mg.loop(0, tile, 1, [mg.i32(0), *raw], quantize_one)
            return [following_draw, mg.bit_xor(parity, 1), pending, *raw]

        mg.store_shared(draw_slots, [draw()], first)
        asm("bar.sync 0;", outputs="")
        t = asm(LOAD_SHARED, [draw_slots])
        asm("bar.sync 0;", outputs="")
        mg.while_loop([t, mg.i32(0), draw(), *fetch(mul(t, tile))], lambda t, *_: mg.flag("lt", t, tiles + lag), step)

    cta = asm("mov.u32 $0,%ctaid.x;")
    if spec.amax == "scan":
        if plan.cluster > 1:
            rank, cluster = asm("mov.u32 $0,%cluster_ctarank;"), asm("mov.u32 $0,%clusterid.x;")
            asm("barrier.cluster.arrive.relaxed.aligned;", outputs="")
        else:
            rank, cluster = mg.i32(0), cta
        clusters = plan.grid // plan.cluster
        others = lambda i: add(rank, mul(rem(add(cluster, i), clusters), plan.cluster))
        own = others(mg.i32(0))
        raw = fetch(own)
        at_once = [others(mg.i32(i)) for i in range(1, clusters)] if plan.cluster == 1 else []
        fetched = [(group, fetch(group)) for group in at_once]
        produced = produce(raw, mg.i32(0))  # stays in registers
        maxima = [block_maxima(block) for block in produced]
        best = largest(own, maxima)
        for i, (group, raw) in enumerate(fetched):
            best = asm(MAX, [best, largest(group, map(block_maxima, produce(raw, mg.i32(1 - i % 2))))], **pure)
        if clusters > 1 and not at_once:
            best = scan(others, 1, clusters, 1, best, mg.i32(1))
        best = cta_maximum(best)
        if plan.cluster > 1:
            best = cluster_maximum(best, rank)
        quantize_produced(own, produced, maxima, mg.i32(0), scalar_scales(best, cta))
    elif spec.emit == "amax":
        best = cta_maximum(scan(lambda i: i, cta, groups, plan.grid, mg.i32(0), mg.i32(0)))
        mg.store_global(mg.gmem_element(refs["partials"], cta, 1, mg.i32(0), 4), [best], mg.flag("eq", tid, 0))
    elif spec.amax == "matrices":
        draw_tiles()
    elif spec.amax == "partials":
        def reduced():
            positions = [add(lane, WARP * i) for i in range(-(-spec.partials // WARP))]
            loads = [mg.load_global(mg.gmem_element(refs["amax"], p, 1, mg.i32(0), 4), 1, mg.flag("lt", p, spec.partials))[0]
                     for p in positions]
            return scalar_scales(asm(WARP_MAX, [maximum(loads)]), cta)
        quantize_groups(cta, plan.grid, reduced, reverse=True)
    elif spec.amax == "scalar":
        quantize_groups(cta, plan.grid, lambda: scalar_scales(*mg.load_global(mg.gmem_address(refs["amax"]), 1, mg.i32(1)), cta))
    else:
        quantize_groups(cta, plan.grid, None, reverse=spec.amax == "rows")


def _offsets(spec: _Spec, plan: _Plan):
    """Word offsets in shared memory of: row maxima, sums of squares, transposition, CTA maxima, cluster maxima; the total."""
    sizes = (2 * 2 * plan.warps, 2 * plan.warps * plan.blocks if spec.source == "rmsnorm" else 0,
             plan.warps * TRANSPOSE_WORDS if spec.emit == "operand" else 0,
             2 * (plan.warps + 2) if spec.amax == "matrices" else plan.warps, plan.cluster)
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


def _kernel(spec: _Spec, plan: _Plan):
    """-> a function of the inputs that the spec names: x, weight or up, amax, valid; returns the outputs as a dict."""
    inputs = ["x", *{"x": [], "rmsnorm": ["weight"], "silu": ["up"]}[spec.source]]
    inputs += ["amax"] if spec.amax in ("scalar", "rows", "partials") else []
    inputs += ["valid"] if spec.masked else []
    inputs += ["rows"] if spec.copies else []
    outputs = {}
    if spec.emit == "amax":
        outputs["partials"] = jax.ShapeDtypeStruct((plan.grid,), jnp.float32)
    else:
        if spec.emit == "packed":
            outputs["packed"] = jax.ShapeDtypeStruct((spec.m, spec.k // 2), jnp.uint8)
            outputs["scale"] = jax.ShapeDtypeStruct((spec.m, spec.k // 16), jnp.float8_e4m3fn)
        else:
            outputs["operand"] = jax.ShapeDtypeStruct((spec.m * max(1, spec.copies), spec.k), jnp.bfloat16)
        count = spec.m * max(1, spec.copies) if spec.amax in ("row", "rows") else spec.m // spec.matrix if spec.matrix else 1
        outputs["global_scale"] = jax.ShapeDtypeStruct((count,), jnp.float32)
        if spec.values:
            outputs["values"] = jax.ShapeDtypeStruct((spec.m, spec.k), jnp.bfloat16)
    names = [*inputs, *outputs, "shared", *(["zeroed"] if spec.amax == "matrices" else [])]
    zeroed = 0
    if spec.amax == "matrices":
        zeroed = 1 + spec.m // spec.matrix * -(-spec.matrix // (plan.rows * plan.tile))

    call = mg.thread_kernel(lambda refs: _program(refs, spec, plan), names, list(outputs.values()), grid=plan.grid, warps=plan.warps,
                            cluster=plan.cluster, shared_words=_offsets(spec, plan)[-1], zeroed_words=zeroed)
    return lambda arguments: dict(zip(outputs, call(*(arguments[name] for name in inputs))))


# --- the functions ---------------------------------------------------------------------------------------------------

def _run(what, source, arrays, emit, *, scaling, four_over_six, amax, static, valid, eps=0.0, values=False, rows=None):
    """Checks the arguments, picks the plan and runs one launch, or two."""
    x = arrays["x"]
    if x.ndim != 2:
        raise NotImplementedError(f"{what}: wants x [M, K], got {x.shape}; reshape the leading axes into one")
    m, k = x.shape
    unit = 64 if emit == "operand" else 16
    if k % unit or not 0 < k <= MAX_K:
        raise NotImplementedError(f"{what}: K={k} of x {x.shape} must be a multiple of {unit} and at most {MAX_K}")
    if x.dtype not in ((jnp.bfloat16, jnp.float32) if source == "x" else (jnp.bfloat16,)):
        raise NotImplementedError(f"{what}: x is {x.dtype}; cast it to bfloat16" + (" or float32" if source == "x" else ""))
    for name, array in arrays.items():
        wanted = {"weight": (k,)}.get(name, (m, k))
        if array.shape != wanted or array.dtype != x.dtype:
            raise ValueError(f"{what}: {name} is {array.dtype}{array.shape}; x {x.dtype}{x.shape} wants {x.dtype}{wanted}")
    if scaling not in ("tensor", "tensor_pow2", "token"):
        raise ValueError(f"{what}: scaling={scaling!r}: one of tensor, tensor_pow2, token")
    if four_over_six not in (None, "mae", "mse"):
        raise ValueError(f"{what}: four_over_six={four_over_six!r}: None, 'mae' or 'mse'")
    if valid is not None and valid.shape != (m,):
        raise ValueError(f"{what}: valid has shape {valid.shape}; x of shape {x.shape} wants ({m},)")
    if amax is not None and static is not None:
        raise ValueError(f"{what}: give amax or global_scale, not both")
    given = amax if amax is not None else static
    if given is not None and given.shape not in ((), (m, 1)):
        raise ValueError(f"{what}: the given amax or global scale has shape {given.shape}; x of shape {x.shape} wants () or ({m}, 1)")
    row_scales = scaling == "token" if given is None else given.shape != ()
    if rows is not None and (rows.ndim != 2 or rows.shape[0] != m or rows.dtype != jnp.int32):
        raise ValueError(f"{what}: rows must be i32 [M, copies], got {rows.dtype}{rows.shape} for x of shape {x.shape}")
    if m == 0:
        out = dict(packed=jnp.zeros((0, k // 2), jnp.uint8), scale=jnp.zeros((0, k // 16), jnp.float8_e4m3fn),
                   operand=jnp.zeros((0, k), jnp.bfloat16), values=jnp.zeros((0, k), jnp.bfloat16))
        one = jnp.ones((0, 1) if row_scales else (), jnp.float32)  # an amax over nothing counts as zero
        return out | dict(global_scale=one if given is None or row_scales else _scalar_global_scale(given, scaling, static, four_over_six))
    spec = _Spec(m, k, source, x.dtype == jnp.float32, "row", emit, static is not None, scaling == "tensor_pow2", four_over_six, eps,
                 values=values)
    arrays, plan = dict(arrays), _plan(m, k, spec.words, emit)
    if rows is not None:
        spec, arrays["rows"] = dataclasses.replace(spec, copies=rows.shape[1]), rows
    if given is not None:
        arrays["amax"] = given.astype(jnp.float32).reshape(-1)
        spec = dataclasses.replace(spec, amax="rows" if given.shape else "scalar")
    elif scaling != "token":
        if valid is not None:
            arrays["valid"] = valid
        spec = dataclasses.replace(spec, amax="scan", masked=valid is not None)
        few = _scan_plan(m, k, spec.words)
        if few is None:
            first = _plan(m, k, spec.words)
            scan = dataclasses.replace(spec, emit="amax", amax="row", values=False, copies=0)
            arrays["amax"] = _kernel(scan, first)(arrays)["partials"]
            spec = dataclasses.replace(spec, amax="partials", partials=first.grid, masked=False)
        plan = few or plan
    out = _kernel(spec, plan)(arrays)
    out["global_scale"] = out["global_scale"].reshape((-1, 1) if spec.amax in ("row", "rows") else ())
    return out


def _scalar_global_scale(given, scaling, static, four_over_six):
    if static is not None:
        return given.astype(jnp.float32)
    return numerics.global_scales(given, pow2=scaling == "tensor_pow2", four_over_six=four_over_six is not None)[1]


def quantize(x, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None):
    """Quantizes activations or weights to NVFP4, bit for bit as `numerics` on a CPU.

    x: bfloat16 or float32 [M, K], K a multiple of 16.
    scaling: "tensor" (one amax over the valid rows), "tensor_pow2" (its global scale rounded up to a power of two) or
        "token" (one amax a row).
    four_over_six: None, "mae" or "mse".
    amax: f32 [] or [M, 1], where a producer knows it already. global_scale: f32 [] or [M, 1], a static scale (it multiplies).
    valid: bool [M]; rows where it is False take no part in a tensor's amax.
    -> packed u8 [M, K/2], scale float8_e4m3fn [M, K/16], global_scale f32 [] or [M, 1].
    A row with NaN or infinity gets NaN scales and zero codes, alone. NotImplementedError for shapes that do not fit.
    """
    out = _run("quantize", "x", dict(x=x), "packed", scaling=scaling, four_over_six=four_over_six, amax=amax,
               static=global_scale, valid=valid)
    return out["packed"], out["scale"], out["global_scale"]


def operand(x, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, rows=None):
    """Quantizes as `quantize` does, and decodes at once: what the Hopper matmuls read.

    K must be a multiple of 64. rows: i32 [M, c], to hand out c copies of each row on the way: row i of x becomes the rows rows[i]
    of the M * c results (`routing`'s row_of_slot; -1: nowhere). Rows of the results that are nobody's hold anything.
    -> bfloat16 [M or M * c, K] of code * scale, exact, K permuted by `mosaic.permute_k`; global_scale f32 [] or [M or M * c, 1].
    A row with NaN or infinity is NaN throughout.
    """
    out = _run("operand", "x", dict(x=x), "operand", scaling=scaling, four_over_six=four_over_six, amax=amax,
               static=global_scale, valid=valid, rows=rows)
    return out["operand"], out["global_scale"]


def rmsnorm_operand(x, weight, *, eps, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, normed=False):
    """RMSNorm, then `operand` of its bfloat16 result, in one launch where `operand` takes one.

    x: bfloat16 [M, K]; weight: bfloat16 [K]. Bit for bit `numerics.rms_norm` (there a denormal may be flushed).
    normed: also return that result, K in natural order, for whoever else reads it (a router).
    -> (bfloat16 [M, K] or None, operand bfloat16 [M, K], global_scale f32 [] or [M, 1]).
    """
    out = _run("rmsnorm_operand", "rmsnorm", dict(x=x, weight=weight), "operand", scaling=scaling, four_over_six=four_over_six,
               amax=amax, static=global_scale, valid=valid, eps=float(eps), values=normed)
    return out["values"] if normed else None, out["operand"], out["global_scale"]


def silu_mul_operand(gate, up, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, product=False):
    """SiLU times up, then `operand` of the bfloat16 product. gate, up: bfloat16 [M, K]. Bit for bit `numerics.silu_mul`.

    product: also return the rounded product. -> (bfloat16 [M, K] or None, operand bfloat16 [M, K], global_scale).
    """
    out = _run("silu_mul_operand", "silu", dict(x=gate, up=up), "operand", scaling=scaling, four_over_six=four_over_six,
               amax=amax, static=global_scale, valid=valid, values=product)
    return out["values"] if product else None, out["operand"], out["global_scale"]


def quantize_weight(w, *, four_over_six=None):
    """Quantizes weights with one global scale for each [N, K] matrix, as `nvfp4jax.array.quantize_weight`.

    w: bfloat16 [..., N, K], K a multiple of 16. -> packed u8 [..., N, K/2], scale float8_e4m3fn [..., N, K/16], global_scale
    f32 [..., 1, 1], or [] for a single matrix. A row with NaN or infinity gets NaN scales; it does not spoil the matrix.
    """
    *lead, n, k = w.shape
    if w.dtype != jnp.bfloat16 or k % 16 or not 0 < k <= MAX_K or not w.size:
        raise NotImplementedError(f"quantize_weight: wants bfloat16 [..., N, K], not empty, K a multiple of 16 and at most {MAX_K}; got "
                                  f"{w.dtype}{w.shape}")
    count = math.prod(lead)
    if count == 1:
        packed, scale, global_scale = quantize(w.reshape(n, k), four_over_six=four_over_six)
    else:
        pack, plan = _matrices_plan(n, k)
        rows = w.reshape(count * n // pack, k * pack)
        spec = _Spec(*rows.shape, "x", False, "matrices", "packed", four_over_six=four_over_six, matrix=n // pack, pack=pack)
        packed, scale, global_scale = _kernel(spec, plan)(dict(x=rows)).values()
    global_scale = global_scale.reshape(*lead, 1, 1) if lead else global_scale
    return packed.reshape(*lead, n, k // 2), scale.reshape(*lead, n, k // 16), global_scale
