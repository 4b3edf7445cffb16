"""NVFP4 arithmetic in plain jnp, exact to the bit on every backend: the contract, and the oracle of every kernel.

`x ~ qvalue * repeat(scale, 16) * global_scale`: E2M1 codes, one E4M3 scale for 16 consecutive elements of the last axis, a
float32 global scale that multiplies. The order of operations is that of TransformerEngine's reference quantizer
(`custom_recipes/reference_nvfp4.py`); another order changes about 0.1 % of the scale bytes.

Rounding to E2M1 and E4M3 and every division that decides bits are done on integers, because backends differ where it hurts:
XLA turns a division by a constant into a multiplication, XLA:GPU divides with an error of an ulp, XLA:CPU flushes
denormals in divisions, and a float32 -> E4M3 -> float32 round trip may be elided under jit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

BLOCK = 16  # elements that share one E4M3 scale
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MAX_FOUR_OVER_SIX = 256.0  # leaves room for the scale that maps a block's amax to 4 instead of 6
FLT_MAX = float(np.finfo(np.float32).max)
E4M3_NAN = 0x7F
# Below this amax the global scale would be a float32 denormal, which backends flush: such a tensor counts as zero.
AMAX_MIN = 2688.0 * 2.0**-126

_MANTISSA, _ONE, _HIDDEN = 0x7FFFFF, 0x3F800000, 0x800000


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def as_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, with the values it has in its own dtype.

    XLA may skip a producer's rounding to bfloat16 where the result is widened again (`xla_allow_excess_precision`, on GPUs);
    a `reduce_precision` is never skipped, and changes nothing where the rounding was done.
    """
    if x.dtype == jnp.bfloat16:
        return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(jnp.float32)


def divide(a: jax.Array | float, b: jax.Array | float) -> jax.Array:
    """a / b for non-negative float32, rounded to nearest even on every backend; a quotient below 2**-126 becomes 0.

    The backend's own quotient of the mantissas is corrected by its exact integer residual, which is small and so survives
    32-bit wrap-around. A quotient of two 24-bit mantissas never lies half-way between two floats.
    """
    a, b = jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    abits, bbits = _bits(a), _bits(b)
    ma, mb = (abits & _MANTISSA) | _HIDDEN, (bbits & _MANTISSA) | _HIDDEN
    less = (ma < mb).astype(jnp.int32)
    quotient = _float((abits & _MANTISSA) | _ONE) / _float((bbits & _MANTISSA) | _ONE)
    q = (quotient * jnp.where(less == 1, jnp.float32(2**24), jnp.float32(2**23))).astype(jnp.int32)
    residual = (ma << (23 + less)) - q * mb  # modulo 2**32; the true value lies within a few mb
    for _ in range(2):
        step = (2 * residual > mb).astype(jnp.int32) - (2 * residual < -mb).astype(jnp.int32)
        q, residual = q + step, residual - step * mb
    exponent = (abits >> 23) - (bbits >> 23) - less + 127
    result = _float((exponent << 23) + (q - _HIDDEN))
    result = jnp.where(exponent >= 255, jnp.float32(jnp.inf), jnp.where(exponent <= 0, jnp.float32(0), result))
    result = jnp.where(a == 0, jnp.float32(0), result)
    return jnp.where((b == 0) | jnp.isinf(a), jnp.float32(jnp.inf), result)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent for int32 exponents in [-126, 127]."""
    return _float((exponent + 127) << 23)


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """The smallest power of two >= x, for positive normal float32 (exp2(ceil(log2(x))) is not exact)."""
    return _float((_bits(x) + _MANTISSA) & ~_MANTISSA)


def encode_e4m3(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """float32 in [0, 448] -> E4M3 bits, ties to even."""
    bits = _bits(x)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = jnp.round(x * jnp.float32(512)).astype(jnp.int32)  # quantum 2**-9; 8 of them are the first normal number
    return jnp.where(x < jnp.float32(2.0**-6), subnormal, normal).astype(jnp.uint8)


def decode_e4m3(bits: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """E4M3 bits -> float32; 0x7f and 0xff are NaN."""
    magnitude = (bits & 0x7F).astype(jnp.int32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * jnp.float32(2.0**-9), _float((magnitude + 960) << 20))
    value = jnp.where(magnitude == E4M3_NAN, jnp.float32(jnp.nan), value)
    return jnp.where(bits >= 0x80, -value, value)


def encode_e2m1(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """float32 -> E2M1 code (sign << 3 | magnitude), ties to the even code, saturating at 6. -0.0 gives code 0, NaN code 0."""
    a = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for threshold, tie_up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        limit = jnp.float32(threshold)
        code += ((a >= limit) if tie_up else (a > limit)).astype(jnp.uint8)
    return code | ((x < 0).astype(jnp.uint8) << 3)


def decode_e2m1(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """E2M1 codes 0..15 -> float32."""
    magnitude = (codes & 7).astype(jnp.int32)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * jnp.float32(0.5), _float((magnitude + 252) << 22))
    return jnp.where((codes & 8) != 0, -value, value)


def pack(codes: UInt8[Array, "... K"]) -> UInt8[Array, "... K//2"]:
    """Two codes a byte, the first in the low nibble."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: UInt8[Array, "... K2"]) -> UInt8[Array, "... 2*K2"]:
    """The inverse of `pack`."""
    return jnp.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def global_scales(
    amax: Float[Array, "..."], *, pow2: bool = False, four_over_six: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """amax -> (encode multiplier g, global_scale, the amax that they stand for), float32 of amax's shape.

    g = 2688 / amax and global_scale = amax / 2688 (1536 for four-over-six); with pow2 the global scale is rounded up to a
    power of two first. An amax of zero (or below AMAX_MIN) gives g = global_scale = 1.
    """
    top = E2M1_MAX * (E4M3_MAX_FOUR_OVER_SIX if four_over_six else E4M3_MAX)
    amax = jnp.asarray(amax, jnp.float32)
    zero = amax < jnp.float32(AMAX_MIN)
    amax = jnp.where(zero, jnp.float32(top), amax)
    global_scale = divide(amax, top)
    if pow2:
        global_scale = round_up_to_power_of_two(global_scale)
        amax = jnp.minimum(global_scale * jnp.float32(top), jnp.float32(FLT_MAX))
        g = divide(1.0, global_scale)
    else:
        g = jnp.minimum(divide(top, amax), jnp.float32(FLT_MAX))
    return g, global_scale, jnp.where(zero, jnp.float32(0), amax)


def quantize_blocks(
    x: Float[Array, "... K"],
    g: jax.Array,
    amax: jax.Array,
    *,
    four_over_six: str | None = None,
    block_rows: int = 1,
) -> tuple[UInt8[Array, "... K//2"], UInt8[Array, "..."]]:
    """x, the encode multiplier and its amax (from `global_scales`, broadcastable to x) -> packed codes and E4M3 scale bits.

    four_over_six: None, "mae" or "mse": a block may map its amax to 4 instead of 6 where that lowers the error (arXiv
    2512.02010). block_rows=16 shares a scale among 16 x 16 tiles (scale bits [..., M/16, K/16]).
    A row that holds NaN or infinity gets NaN scales and zero codes; other rows keep their bits.
    """
    *batch, k = x.shape
    x = as_float32(x)
    poisoned = ~jnp.isfinite(x).all(-1, keepdims=True)
    x = jnp.where(poisoned, jnp.float32(0), x)
    rank = x.ndim + 1
    blocks = x.reshape(*batch, k // BLOCK, BLOCK)
    g, amax = (jnp.asarray(v, jnp.float32).reshape((1,) * (rank - 1 - v.ndim) + (*v.shape, 1)) for v in (g, amax))
    block_amax = jnp.abs(blocks).max(-1, keepdims=True)
    if block_rows > 1:
        tiles = block_amax.reshape(*batch[:-1], batch[-1] // block_rows, block_rows, k // BLOCK, 1)
        block_amax = jnp.broadcast_to(tiles.max(-3, keepdims=True), tiles.shape).reshape(block_amax.shape)
    decode = divide(1.0, g)
    # 1 / (scale * decode) with decode's power of two taken out, so that no backend meets a denormal on the way.
    exponent = (_bits(decode) >> 23) - 127
    mantissa = _float((_bits(decode) & _MANTISSA) | _ONE)

    def encode(wanted):
        bits = encode_e4m3(jnp.clip(wanted, jnp.float32(0), jnp.float32(E4M3_MAX)))
        scale = decode_e4m3(bits)
        multiplier = divide(1.0, scale * mantissa) * _power_of_two(-exponent)
        multiplier = jnp.where(scale == 0, jnp.float32(FLT_MAX), jnp.minimum(multiplier, jnp.float32(FLT_MAX)))
        return encode_e2m1(jnp.clip(blocks * multiplier, jnp.float32(-E2M1_MAX), jnp.float32(E2M1_MAX))), bits, scale

    if four_over_six is None:
        codes, bits, _ = encode(jnp.minimum(block_amax * (g * jnp.float32(1 / 6)), jnp.float32(FLT_MAX)))
    else:
        base = jnp.minimum(divide(block_amax, 6.0) * g, jnp.float32(FLT_MAX))
        codes, bits, scale = encode(base)
        codes4, bits4, scale4 = encode(base * jnp.float32(1.5))
        better = _error(blocks, codes4, scale4, amax, four_over_six) < _error(blocks, codes, scale, amax, four_over_six)
        codes, bits = jnp.where(better, codes4, codes), jnp.where(better, bits4, bits)
    bits = jnp.where(poisoned, jnp.uint8(E4M3_NAN), bits[..., 0])
    if block_rows > 1:
        bits = bits.reshape(*batch[:-1], batch[-1] // block_rows, block_rows, k // BLOCK).max(-2)  # a NaN row spoils its tile
    return pack(codes.reshape(*batch, k)), bits


def _error(x, codes, scale, amax, kind: str):
    """The error of a four-over-six candidate, summed over the block in order."""
    value = decode_e2m1(codes) * scale * amax
    decoded = divide(jnp.abs(value), E2M1_MAX * E4M3_MAX_FOUR_OVER_SIX)
    e = jnp.where(value < 0, -decoded, decoded) - x
    # The minimum keeps a compiler from contracting square and sum into one fused multiply-add.
    e = jnp.abs(e) if kind == "mae" else jnp.minimum(e * e, jnp.float32(FLT_MAX))
    total = e[..., :1]
    for i in range(1, BLOCK):
        total = total + e[..., i : i + 1]
    return total


def dequantize(
    packed: UInt8[Array, "... K2"], scale_bits: UInt8[Array, "... blocks"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "... 2*K2"]:
    """qvalue * scale without the global scale: at most 6 significant bits, so exact in bfloat16 and float32."""
    codes = unpack(packed)
    values = decode_e2m1(codes).reshape(*scale_bits.shape, BLOCK) * decode_e4m3(scale_bits)[..., None]
    return values.reshape(codes.shape).astype(dtype)


def rms_norm(x, weight, eps):
    v = as_float32(x)
    v = v * lax.rsqrt(jnp.mean(v * v, axis=-1, keepdims=True) + jnp.float32(eps))
    return v.astype(x.dtype) * weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + weight.shape)


def silu_mul(gate, up):
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
