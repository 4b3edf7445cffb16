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
def encode_e2m1(x):
    """float32 -> E2M1 code as i32, ties to the even code, saturating at 6; -0.0 gives code 0.

    With 2**e at most the magnitude, and at least 1, the codes are 2**(e - 1) apart: adding 2**(22 + e) rounds to them."""
    a = tl.minimum(tl.abs(x), 6.0)
    power = tl.maximum(bits_of(a), 0x3F800000) & 0x7F800000
    magic = power + 0x0B000000
    steps = bits_of(a + float_of(magic)) - magic
    return (steps + (power >> 22) - 254) | tl.where(x < 0.0, 8, 0)


@triton.jit
def decode_e2m1(code):
    """E2M1 code 0..15 as i32 -> float32."""
    magnitude = code & 7
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, float_of((magnitude + 252) << 22))
    return tl.where(code >= 8, -value, value)


@triton.jit
def _candidate(blocks, wanted, mantissa, power):
    """Blocks [R, B, 16] with the scale that [R, B] wants -> (codes i32, scale bits i32, scale)."""
    bits = encode_e4m3(tl.minimum(tl.maximum(wanted, 0.0), 448.0))
    scale = decode_e4m3(bits)
    denominator = tl.where(scale == 0.0, 1.0, scale * mantissa)
    multiplier = tl.div_rn(tl.zeros_like(denominator) + 1.0, denominator) * power
    multiplier = tl.where(scale == 0.0, FLT_MAX, tl.minimum(multiplier, FLT_MAX))
    scaled = blocks * multiplier[:, :, None]
    return encode_e2m1(scaled), bits, scale


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
def _in_order(e, R: tl.constexpr, B: tl.constexpr):
    """The sum of [R, B, 16] over its last axis, from the first element to the last."""
    even, odd = tl.split(e.reshape(R, B, 8, 2))
    e0, e2, e4, e6, e8, e10, e12, e14 = eight(even, R, B)
    e1, e3, e5, e7, e9, e11, e13, e15 = eight(odd, R, B)
    first = (((((((e0 + e1) + e2) + e3) + e4) + e5) + e6) + e7) + e8
    return ((((((first + e9) + e10) + e11) + e12) + e13) + e14) + e15


@triton.jit
def _error(blocks, codes, scale, amax, SQUARED: tl.constexpr):
    """The error of a four-over-six candidate, summed over a block in order: f32 [R, B]."""
    value = decode_e2m1(codes) * scale[:, :, None] * amax[:, None, None]
    decoded = divide(tl.abs(value), tl.zeros_like(value) + 1536.0)
    e = tl.where(value < 0.0, -decoded, decoded) - blocks
    e = tl.minimum(e * e, FLT_MAX) if SQUARED else tl.abs(e)
    return _in_order(e, blocks.shape[0], blocks.shape[1])


@triton.jit
def _column(x_ptr, blocks, K: tl.constexpr, COLUMN: tl.constexpr):
    """The squares of one element of every block; a row's end is that of its last block."""
    x = tl.load(x_ptr + blocks * 16 + COLUMN, mask=blocks < K // 16, other=0.0).to(tl.float32)
    return x * x


@triton.jit
def inverse_rms(x_ptr, eps, K: tl.constexpr):
    """1 / sqrt(mean(x * x) + eps) of the row at x_ptr, each step rounded; 0 where the sum overflows. f32 scalar.

    The sum has the order of `numerics.rms_norm`: a block's even elements, its odd ones, both; the 32 blocks of a unit by halves; the
    units in order."""
    U: tl.constexpr = triton.next_power_of_2((K + 511) // 512)
    unit, lane = tl.arange(0, U)[:, None], tl.arange(0, 32)[None, :]
    blocks = unit * 32 + lane
    even, odd = _column(x_ptr, blocks, K, 0), _column(x_ptr, blocks, K, 1)
    for i in tl.static_range(2, 16, 2):
        even += _column(x_ptr, blocks, K, i)
        odd += _column(x_ptr, blocks, K, i + 1)
    sums = even + odd
    for step in tl.static_range(5):
        sums += tl.gather(sums, (lane ^ (16 >> step)) + unit * 0, 1)
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
        value = gate / ((1.0 + tl.exp(gate * -SILU_RATE)) + nudge)
        return tl.where(gate < SILU_MIN, gate * 0.0, value)
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def quantize_blocks(blocks, block_amax, g, amax, FOUR_OVER_SIX: tl.constexpr):
    """f32 [R, B, 16] of finite values, their magnitudes [R, B], g and amax [R] -> (codes i32 [R, B, 16], scale bits i32 [R, B], scale f32 [R, B]).

    FOUR_OVER_SIX: 0, 1 ("mae") or 2 ("mse"). As `numerics.quantize_blocks`."""
    decode = tl.div_rn(tl.zeros_like(g) + 1.0, g)
    mantissa = float_of((bits_of(decode) & 0x7FFFFF) | 0x3F800000)[:, None]
    power = float_of(tl.maximum(254 - (bits_of(decode) >> 23), 0) << 23)[:, None]  # of two, that of decode inverted
    if FOUR_OVER_SIX == 0:
        wanted = tl.minimum(block_amax * (g * SIXTH)[:, None], FLT_MAX)
        codes, bits, scale = _candidate(blocks, wanted, mantissa, power)
    else:
        base = tl.minimum(divide(block_amax, tl.zeros_like(block_amax) + 6.0) * g[:, None], FLT_MAX)
        codes, bits, scale = _candidate(blocks, base, mantissa, power)
        codes4, bits4, scale4 = _candidate(blocks, base * 1.5, mantissa, power)
        error4, error = _error(blocks, codes4, scale4, amax, FOUR_OVER_SIX == 2), _error(blocks, codes, scale, amax, FOUR_OVER_SIX == 2)
        better = error4 < error
        codes = tl.where(better[:, :, None], codes4, codes)
        bits = tl.where(better, bits4, bits)
        scale = tl.where(better, scale4, scale)
    return codes, bits, scale
