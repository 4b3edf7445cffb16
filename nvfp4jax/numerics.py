"""NVFP4 arithmetic in plain jnp, exact to the bit on every backend: the contract, and the oracle of every kernel.

`x ~ qvalue * repeat(scale, 16) * global_scale`: E2M1 codes, one E4M3 scale for 16 consecutive elements of the last axis, a
float32 global scale that multiplies. The order of operations is that of TransformerEngine's reference quantizer
(`custom_recipes/reference_nvfp4.py`); another order changes about 0.1 % of the scale bytes.

Rounding to E2M1 and E4M3 and every division that decides bits are done on integers, because backends differ where it hurts:
XLA turns a division by a constant into a multiplication, XLA:GPU divides with an error of an ulp, XLA:CPU flushes
denormals in divisions, and a float32 -> E4M3 -> float32 round trip may be elided under jit.
"""

import functools

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
# A weight global scale above this stands for a weight beyond 2**18: it is the inverse of one (an encode multiplier, as
# compressed-tensors stores it), because weights of ordinary size have 2688 / amax up there.
LARGEST_WEIGHT_GLOBAL_SCALE = 2.0**18 / 2688
# Below this amax the global scale would be a float32 denormal, which backends flush: such a tensor counts as zero.
AMAX_MIN = 2688.0 * 2.0**-126
# silu(g) = g / (1 + exp(-g)) of a bfloat16 g lies so near to a tie of two bfloat16 at -2**-8, 2**-7, 5.9375 and -3.046875 that the last
# bits of an exponential would decide. With 1 + sign(g) * SILU_NUDGE + exp(-SILU_RATE * g) below, the rounded value is the right
# one for all g, and stays so under a relative error of 2**-20.4: exponentials and reciprocals of every backend are better.
SILU_NUDGE = 13 * 2.0**-23
SILU_RATE = 1 - 2.0**-22
SILU_MIN = -87.25  # below, exp(-g) leaves the range in which its reciprocal is no denormal; silu, under 2**-118, counts as zero

_MANTISSA, _ONE, _HIDDEN = 0x7FFFFF, 0x3F800000, 0x800000
# One program for an eager call, where each of its hundred operations would be compiled by itself; under a trace it leaves no mark.
compiled = functools.partial(jax.jit, inline=True)


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


def add(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """a + b; of two bfloat16 arrays whose roundings XLA does not skip (see `as_float32`)."""
    return rounded(as_float32(a) + as_float32(b), a.dtype).astype(a.dtype) if a.dtype == b.dtype == jnp.bfloat16 else a + b


@compiled
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


@compiled
def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """The smallest power of two >= x, for positive normal float32 (exp2(ceil(log2(x))) is not exact)."""
    return _float((_bits(x) + _MANTISSA) & ~_MANTISSA)


@compiled
def encode_e4m3(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """float32 in [0, 448] -> E4M3 bits, ties to even."""
    bits = _bits(x)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = jnp.round(x * jnp.float32(512)).astype(jnp.int32)  # quantum 2**-9; 8 of them are the first normal number
    return jnp.where(x < jnp.float32(2.0**-6), subnormal, normal).astype(jnp.uint8)


@compiled
def decode_e4m3(bits: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """E4M3 bits -> float32; 0x7f and 0xff are NaN."""
    magnitude = (bits & 0x7F).astype(jnp.int32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * jnp.float32(2.0**-9), _float((magnitude + 960) << 20))
    value = jnp.where(magnitude == E4M3_NAN, jnp.float32(jnp.nan), value)
    return jnp.where(bits >= 0x80, -value, value)


@compiled
def encode_e2m1(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """float32 -> E2M1 code (sign << 3 | magnitude), ties to the even code, saturating at 6. -0.0 gives code 0, NaN code 0."""
    a = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for threshold, tie_up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        limit = jnp.float32(threshold)
        code += ((a >= limit) if tie_up else (a > limit)).astype(jnp.uint8)
    return code | ((x < 0).astype(jnp.uint8) << 3)


@compiled
def decode_e2m1(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """E2M1 codes 0..15 -> float32."""
    magnitude = (codes & 7).astype(jnp.int32)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * jnp.float32(0.5), _float((magnitude + 252) << 22))
    return jnp.where((codes & 8) != 0, -value, value)


@compiled
def pack(codes: UInt8[Array, "... K"]) -> UInt8[Array, "... K//2"]:
    """Two codes a byte, the first in the low nibble."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


@compiled
def unpack(packed: UInt8[Array, "... K2"]) -> UInt8[Array, "... 2*K2"]:
    """The inverse of `pack`."""
    return jnp.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


@compiled(static_argnames=("pow2", "four_over_six"))
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


def wanted_scales(block_amax: Float[Array, "..."], g: Float[Array, "..."], four_over_six: bool) -> Float[Array, "..."]:
    """The scale that maps a block's amax to 6, before it is clipped and rounded to E4M3. Two orders of operations: TransformerEngine's."""
    wanted = divide(block_amax, 6.0) * g if four_over_six else block_amax * (g * jnp.float32(1 / 6))
    return jnp.minimum(wanted, jnp.float32(FLT_MAX))


@compiled(static_argnames=("four_over_six", "block_rows"))
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

    base = wanted_scales(block_amax, g, four_over_six is not None)
    if four_over_six is None:
        codes, bits, _ = encode(base)
    else:
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


@compiled(static_argnames=("dtype",))
def dequantize(
    packed: UInt8[Array, "... K2"], scale_bits: UInt8[Array, "... blocks"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "... 2*K2"]:
    """qvalue * scale without the global scale: at most 6 significant bits, so exact in bfloat16 and float32."""
    codes = unpack(packed)
    values = decode_e2m1(codes).reshape(*scale_bits.shape, BLOCK) * decode_e4m3(scale_bits)[..., None]
    return values.reshape(codes.shape).astype(dtype)


# --- what a layer does before it quantizes ---------------------------------------------------------------------------
# In the order of Hugging Face's models, rounded where they round. Results below 2**-126 may be flushed to zero.


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """float32 x rounded to dtype, in float32; no compiler skips it (see `as_float32`)."""
    return as_float32(x.astype(dtype))


@compiled
def inverse_sqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x) for positive normal float32, root and reciprocal each rounded to nearest even on every backend.

    As in `divide`, the backend's own results are corrected by their exact integer residuals.
    """
    bits = _bits(x)
    exponent = (bits >> 23) - 127
    odd = exponent & 1
    mantissa = ((bits & _MANTISSA) | _HIDDEN) << odd
    root = lax.sqrt(mantissa.astype(jnp.float32) * jnp.float32(2**23)).astype(jnp.int32)  # in [2**23, 2**24)
    residual = (mantissa << 23) - root * root  # modulo 2**32; the true value lies within a few roots
    for _ in range(2):
        step = (residual > root).astype(jnp.int32) - (residual <= -root).astype(jnp.int32)
        root, residual = root + step, residual - step * (2 * root + step)
    inverse = (jnp.float32(2**47) / root.astype(jnp.float32)).astype(jnp.int32)  # in (2**23, 2**24]
    residual = -(inverse * root)  # 2**47 is 0 modulo 2**32
    for _ in range(2):
        step = (2 * residual > root).astype(jnp.int32) - (2 * residual < -root).astype(jnp.int32)
        inverse, residual = inverse + step, residual - step * root
    return _float(((126 - ((exponent - odd) >> 1)) << 23) + (inverse - _HIDDEN))


def _sum_of_squares(x: Float[Array, "... K"]) -> Float[Array, "..."]:
    """Over the last axis, in float32 and in one order, which the kernels follow whatever threads a row has.

    K is cut into blocks of 16 and 32 blocks into a unit, padded with zeros. A block: even elements in order, odd elements in
    order, the two sums. A unit: its first half of blocks on its second, by halves. The units in order.
    """
    squares = as_float32(x) * as_float32(x)  # exact of 16-bit inputs
    exact = x.dtype.itemsize == 2
    if not exact:  # the minimum keeps a compiler from contracting square and sum into one fused multiply-add
        squares = jnp.minimum(squares, jnp.float32(FLT_MAX))
    *batch, k = x.shape
    blocks = min(32, 1 << (-(-k // BLOCK) - 1).bit_length())  # fewer than 32 need no padding to 32: adding zero is exact
    units = -(-k // (BLOCK * blocks))
    squares = jnp.pad(squares, [(0, 0)] * len(batch) + [(0, units * blocks * BLOCK - k)])
    pairs = squares.reshape(*batch, units, blocks, BLOCK // 2, 2)
    total = functools.reduce(jnp.add, (pairs[..., i, :] for i in range(BLOCK // 2)))
    total = total[..., 0] + total[..., 1]
    while blocks > 1:
        blocks //= 2
        total = total[..., :blocks] + total[..., blocks:]
    total = functools.reduce(jnp.add, (total[..., i, 0] for i in range(units)))
    return total if exact else jnp.where(total >= jnp.float32(FLT_MAX), jnp.float32(jnp.inf), total)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)  # traced once a shape: a model has many norms
def _inverse_rms(x: Float[Array, "... K"], eps: float) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x * x) + eps), each step rounded to float32; 0 where the sum overflows."""
    total = _sum_of_squares(x)[..., None]
    mean = jnp.minimum(total * jnp.float32(1 / x.shape[-1]), jnp.float32(FLT_MAX))  # not contracted with the next sum
    inverse = inverse_sqrt(mean + jnp.float32(eps))
    return jnp.where(total < jnp.float32(jnp.inf), inverse, jnp.where(jnp.isnan(total), total, jnp.float32(0)))


@_inverse_rms.defjvp
def _inverse_rms_jvp(eps, primals, tangents):
    (x,), (dx,) = primals, tangents
    inverse = _inverse_rms(x, eps)
    slope = (as_float32(x) * dx.astype(jnp.float32)).mean(-1, keepdims=True)
    return inverse, -inverse * inverse * inverse * slope


@compiled(static_argnames=("eps",))
def rms_norm(x: Float[Array, "... K"], weight: Float[Array, "K"], eps: float) -> Float[Array, "... K"]:
    """x / sqrt(mean(x * x) + eps) over the last axis, rounded to x's dtype, times weight in that dtype: the order of
    transformers' LlamaRMSNorm and Qwen3RMSNorm.

    The bits are the same on every backend, and in the kernels: the sum of squares has one order (`_sum_of_squares`), the mean is
    the sum times float32(1 / K) as in torch on a GPU, root and reciprocal are rounded to nearest. eps: at least 1e-20.
    """
    normed = rounded(as_float32(x) * _inverse_rms(x, eps), x.dtype)
    weight = rounded(weight.astype(jnp.float32), x.dtype)
    return (normed * weight.reshape((1,) * (x.ndim - 1) + weight.shape)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _silu(gate: jax.Array, nudged: bool) -> jax.Array:
    """gate / (1 + exp(-gate)) in float32; nudged: see SILU_NUDGE."""
    if not nudged:
        return gate / (jnp.float32(1) + jnp.exp(-gate))
    nudge = jnp.where(gate < 0, jnp.float32(-SILU_NUDGE), jnp.float32(SILU_NUDGE))
    silu = gate / ((jnp.float32(1) + jnp.exp(gate * jnp.float32(-SILU_RATE))) + nudge)
    return jnp.where(gate < jnp.float32(SILU_MIN), gate * jnp.float32(0), silu)


@_silu.defjvp
def _silu_jvp(nudged, primals, tangents):
    (gate,), (dgate,) = primals, tangents
    sigmoid = jax.nn.sigmoid(gate)
    return _silu(gate, nudged), dgate * (sigmoid * (1 + gate * (1 - sigmoid)))


@compiled
def silu_mul(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(gate), rounded to its dtype, times up in that dtype: the order of transformers' gated MLPs.

    Of a bfloat16 gate, silu is the exact value rounded to nearest, on every backend and in the kernels (see SILU_NUDGE; zero
    below SILU_MIN, NaN at minus infinity). Of a float32 gate it is within 3 ulps; its last bits are the backend's.
    """
    silu = rounded(_silu(as_float32(gate), gate.dtype == jnp.bfloat16), gate.dtype)
    return (silu * as_float32(up)).astype(gate.dtype)


@compiled
def rotate(x: Float[Array, "B T H D"], cos: Float[Array, "B T D//2"], sin: Float[Array, "B T D//2"]) -> Float[Array, "B T H D"]:
    """Rotates the halves of D against each other (the Hugging Face layout), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
