"""Keys, values and latents in FP8: E4M3 codes, and a power of two for each vector of the last axis.

    x ~ qvalue * scale,   scale = the smallest 2**e with max |x| <= 448 * 2**e over the last axis, e in [-115, 119]

Why a scale for each slot and head, not for a block of slots: a slot is written once, so a block's scale would have to be chosen from
its first token, and later ones would saturate, or the block would be written again and its bits depend on what came when. Alone, a slot's
bits follow from its own vector: the same in every batch, in prefill, in any chunk of it and in decode, shared or repeated. It costs
4 bytes beside D. Why a power of two: then qvalue * scale is exact in bfloat16, and multiplying a score, or a weight of softmax, by it
rounds nothing: a kernel that multiplies codes gives the bits of one that reads the decoded vectors. It costs no accuracy: E4M3 has
3 bits of mantissa in each of 15 binades, so the error is that of rounding (at most 1/16 of an element, 2.6 % in the mean square)
until an element is below 2**-14 of its vector's largest; outliers in a few channels cost the others nothing before that.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nvfp4jax import numerics, pytree
from nvfp4jax.numerics import compiled

DTYPE = jnp.dtype(jnp.float8_e4m3fn)
SMALLEST, LARGEST = 12, 246  # biased exponents of a scale: subnormal elements are zeros, 448 * scale is finite


@dataclasses.dataclass(frozen=True)
class FP8Array:
    """x [..., D] ~ qvalue * scale[..., None]. qvalue: float8_e4m3fn [..., D]; scale: f32 [...], powers of two; NaN where x was not finite."""

    qvalue: Float[Array, "... D"]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """That of the codes."""
        return self.qvalue.dtype

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "... D"]:
        """qvalue * scale, exact in bfloat16 and float32."""
        return (self.qvalue.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


pytree.register(FP8Array, "qvalue", "scale")


@compiled
def quantize(x: Float[Array, "... D"]) -> FP8Array:
    """Exactly what the module's formula says, ties to the even code."""
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.abs(x).max(-1), jnp.int32)
    # The mantissa of 448 is 1.75: what is above it carries into the exponent.
    exponent = jnp.clip(((bits + 0x1FFFFF) >> 23) - 8, SMALLEST, LARGEST)
    power = lambda biased: lax.bitcast_convert_type(biased << 23, jnp.float32)  # noqa: E731
    magnitude = jnp.minimum(jnp.abs(x) * power(254 - exponent)[..., None], jnp.float32(numerics.E4M3_MAX))
    codes = numerics.encode_e4m3(magnitude) | (jnp.signbit(x).astype(jnp.uint8) << 7)
    scale = jnp.where(bits < 0x7F800000, power(exponent), jnp.float32(jnp.nan))
    return FP8Array(lax.bitcast_convert_type(codes, DTYPE), scale)
