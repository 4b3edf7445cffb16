"""The arithmetic of `nvfp4jax.numerics` in Triton: rounding to E2M1 and E4M3, scales, bit for bit.

Divisions are `div.rn.f32`. Kernels that use this are compiled without contraction of products and sums.
"""

import triton
import triton.language as tl

from nvfp4jax import numerics

FLT_MAX = tl.constexpr(numerics.FLT_MAX)
AMAX_MIN = tl.constexpr(numerics.AMAX_MIN)
SILU_NUDGE = tl.constexpr(numerics.SILU_NUDGE)
SILU_RATE = tl.constexpr(numerics.SILU_RATE)
SILU_MIN = tl.constexpr(numerics.SILU_MIN)
SIXTH = tl.constexpr(1 / 6)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no inline PTX
TWO_23 = tl.constexpr(8388608.0)  # adding it to a float32 below 2**23 rounds to an integer, ties to even
TWO_23_BITS = tl.constexpr(0x4B000000)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def divide(a, b):
    """a / b rounded to nearest even; below 2**-126 it is 0, as in `numerics.divide`."""
    quotient = tl.div_rn(a, b)
    return tl.where(quotient < 1.1754943508222875e-38, 0.0, quotient)


@triton.jit
def global_scales(amax, TOP: tl.constexpr, POW2: tl.constexpr):
    """-> (g, global scale, the amax that they stand for), as `numerics.global_scales`."""
    zero = amax < AMAX_MIN
    top = tl.zeros_like(amax) + TOP
    amax = tl.where(zero, top, amax)
    scale = tl.div_rn(amax, top)
    if POW2:
        scale = float_of((bits_of(scale) + 0x7FFFFF) & -0x800000)
        amax = tl.minimum(scale * TOP, FLT_MAX)
        g = tl.div_rn(tl.zeros_like(amax) + 1.0, scale)
    else:
        g = tl.minimum(tl.div_rn(top, amax), FLT_MAX)
    return g, scale, tl.where(zero, 0.0, amax)


@triton.jit
def encode_e4m3(x):
    """float32 in [0, 448] -> E4M3 bits as i32, ties to even."""
    bits = bits_of(x)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = bits_of(x * 512.0 + TWO_23) - TWO_23_BITS
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def decode_e4m3(bits):
    """Bits of a non-negative E4M3 number, not NaN, as i32 -> float32."""
    return tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, float_of((bits + 960) << 20))


@triton.jit
def below_zero(x):
    """1.0 where x < 0, else 0.0: one instruction, where a comparison and a choice are two."""
    if INTERPRETED:
        return tl.where(x < 0.0, 1.0, 0.0)
    return tl.inline_asm_elementwise("set.lt.f32.f32 $0, $1, 0f00000000;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def encode_e2m1(x):
    """float32 -> i32 whose low four bits are the E2M1 code, ties to the even code, saturating at 6; -0.0 gives code 0. Bits 4 to 22 are 0.

    With a power of two at most the magnitude, and at least 1, the codes are power / 2 apart: adding power * 2**22 rounds to them. Adding
    power * exponent, and power * 4 where x is negative, counts the codes of smaller powers, and the sign."""
    a = tl.minimum(tl.abs(x), 6.0)
    power = bits_of(tl.maximum(a, 1.0)) & 0x7F800000
    steps = tl.fma(below_zero(x), 4.0, float_of((power >> 22) + 0x4A7FFF02))  # 2**22 + exponent
    return bits_of(tl.fma(float_of(power), steps, a))


@triton.jit
def round_e2m1(x):
    """float32 -> the nearest value of E2M1, ties to the even code, saturating at 6."""
    x = tl.minimum(tl.maximum(x, -6.0), 6.0)
    power = tl.maximum(float_of(bits_of(x) & 0x7F800000), 1.0)
    return tl.fma(power, -6291456.0, tl.fma(power, 6291456.0, x))  # 1.5 * 2**22, for either sign


@triton.jit
def pack(codes):
    """[R, B, 8] of `encode_e2m1` -> i32 [R, B]."""
    R: tl.constexpr = codes.shape[0]
    B: tl.constexpr = codes.shape[1]
    fours = tl.sum(codes.reshape(R, B, 2, 4) << (4 * tl.arange(0, 4))[None, None, None, :], 3)  # what is no code lies above bit 22
    low, high = tl.split(fours)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _candidate(wanted, mantissa, power):
    """The scale that [R, B] wants -> (multiplier, scale bits i32, scale)."""
    bits = encode_e4m3(tl.minimum(tl.maximum(wanted, 0.0), 448.0))
    scale = decode_e4m3(bits)
    denominator = tl.where(scale == 0.0, 1.0, scale * mantissa)
    multiplier = tl.div_rn(tl.zeros_like(denominator) + 1.0, denominator) * power
    return tl.where(scale == 0.0, FLT_MAX, tl.minimum(multiplier, FLT_MAX)), bits, scale


@triton.jit
def eight(x, R: tl.constexpr, B: tl.constexpr):
    """[R, B, 8] -> its eight [R, B], in order."""
    even, odd = tl.split(x.reshape(R, B, 4, 2))
    a, c = tl.split(even.reshape(R, B, 2, 2))  # 0 4; 2 6
    b, d = tl.split(odd.reshape(R, B, 2, 2))  # 1 5; 3 7
    x0, x4 = tl.split(a)
    x1, x5 = tl.split(b)
    x2, x6 = tl.split(c)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _half_error(half, multiplier, scale, amax, SQUARED: tl.constexpr):
    """The errors of a four-over-six candidate [R, B, 8]."""
    value = round_e2m1(half * multiplier[:, :, None]) * scale[:, :, None] * amax[:, None, None]
    decoded = divide(tl.abs(value), tl.zeros_like(value) + 1536.0)
    e = tl.where(value < 0.0, -decoded, decoded) - half
    return tl.minimum(e * e, FLT_MAX) if SQUARED else tl.abs(e)


@triton.jit
def _error(first, second, multiplier, scale, amax, SQUARED: tl.constexpr):
    """The error of a four-over-six candidate, summed over a block in order: f32 [R, B]."""
    R: tl.constexpr = first.shape[0]
    B: tl.constexpr = first.shape[1]
    e0, e1, e2, e3, e4, e5, e6, e7 = eight(_half_error(first, multiplier, scale, amax, SQUARED), R, B)
    total = ((((((e0 + e1) + e2) + e3) + e4) + e5) + e6) + e7
    e0, e1, e2, e3, e4, e5, e6, e7 = eight(_half_error(second, multiplier, scale, amax, SQUARED), R, B)
    return (((((((total + e0) + e1) + e2) + e3) + e4) + e5) + e6) + e7


@triton.jit
def inverse_rms(first, second, eps, K: tl.constexpr):
    """1 / sqrt(mean(x * x) + eps) of the one row whose blocks' halves are first and second [1, B, 8], each step rounded; 0 where the sum
    overflows. f32 scalar.

    The sum has the order of `numerics.rms_norm`: a block's even elements, its odd ones, both; the 32 blocks of a unit by halves; the
    units in order."""
    B: tl.constexpr = first.shape[1]
    a0, a1, a2, a3, a4, a5, a6, a7 = eight(first * first, 1, B)
    b0, b1, b2, b3, b4, b5, b6, b7 = eight(second * second, 1, B)
    even = ((((((a0 + a2) + a4) + a6) + b0) + b2) + b4) + b6
    odd = ((((((a1 + a3) + a5) + a7) + b1) + b3) + b5) + b7
    L: tl.constexpr = min(32, B)  # a shorter row is padded with zeros, which add nothing
    U: tl.constexpr = B // L
    sums = (even + odd).reshape(U, L)
    lane = tl.arange(0, L)[None, :] + tl.zeros((U, 1), tl.int32)
    for step in tl.static_range(5):
        if (16 >> step) < L:
            sums += tl.gather(sums, lane ^ (16 >> step), 1)
    units = tl.sum(tl.where(lane == 0, sums, 0.0), 1)
    total = tl.sum(tl.where(tl.arange(0, U) == 0, units, 0.0), 0)
    for i in tl.static_range(1, (K + 511) // 512):
        total += tl.sum(tl.where(tl.arange(0, U) == i, units, 0.0), 0)
    mean = total * (1 / K) + eps
    return tl.where(total < float("inf"), tl.div_rn(total * 0.0 + 1.0, tl.sqrt_rn(mean)), tl.where(total == total, 0.0, total))


@triton.jit
def silu(gate, NUDGED: tl.constexpr):
    """gate / (1 + exp(-gate)); of a bfloat16 gate, nudged away from ties as in `numerics.silu_mul`."""
    if NUDGED:
        nudge = tl.where(gate < 0.0, -SILU_NUDGE, SILU_NUDGE)
        if INTERPRETED:
            value = gate / ((1.0 + tl.exp(gate * -SILU_RATE)) + nudge)
        else:  # no denormal decides here, and Triton's own forms spend ten instructions on them
            power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [(gate * -SILU_RATE) * 1.4426950408889634],
                                              dtype=tl.float32, is_pure=True, pack=1)
            value = gate * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [(1.0 + power) + nudge], dtype=tl.float32,
                                                     is_pure=True, pack=1)
        return tl.where(gate < SILU_MIN, gate * 0.0, value)
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def block_scales(first, second, block_amax, g, amax, FOUR_OVER_SIX: tl.constexpr):
    """The two halves of blocks, f32 [R, B, 8] of finite values, their magnitudes [R, B], g and amax [R] -> what multiplies a block before
    E2M1 rounds it f32, scale bits i32, scale f32, each [R, B].

    FOUR_OVER_SIX: 0, 1 ("mae") or 2 ("mse"). As `numerics.quantize_blocks`."""
    decode = tl.div_rn(tl.zeros_like(g) + 1.0, g)
    mantissa = float_of((bits_of(decode) & 0x7FFFFF) | 0x3F800000)[:, None]
    power = float_of(tl.maximum(254 - (bits_of(decode) >> 23), 0) << 23)[:, None]  # of two, that of decode inverted
    if FOUR_OVER_SIX == 0:
        multiplier, bits, scale = _candidate(tl.minimum(block_amax * (g * SIXTH)[:, None], FLT_MAX), mantissa, power)
    else:
        base = tl.minimum(divide(block_amax, tl.zeros_like(block_amax) + 6.0) * g[:, None], FLT_MAX)
        multiplier, bits, scale = _candidate(base, mantissa, power)
        multiplier4, bits4, scale4 = _candidate(base * 1.5, mantissa, power)
        error4 = _error(first, second, multiplier4, scale4, amax, FOUR_OVER_SIX == 2)
        better = error4 < _error(first, second, multiplier, scale, amax, FOUR_OVER_SIX == 2)
        multiplier = tl.where(better, multiplier4, multiplier)
        bits = tl.where(better, bits4, bits)
        scale = tl.where(better, scale4, scale)
    return multiplier, bits, scale
