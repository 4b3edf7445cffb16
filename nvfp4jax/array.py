"""NVFP4Array: packed codes, block scales and a global scale, and how arrays become one."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from nvfp4jax import numerics
from nvfp4jax import scaling as scaling_modes


@dataclasses.dataclass(frozen=True)
class NVFP4Array:
    """x ~ qvalue * repeat(scale, 16) * global_scale, the contraction axis K last.

    packed: u8 [..., K/2], two E2M1 codes a byte, the first in the low nibble.
    scale: float8_e4m3fn [..., K/16].
    global_scale: f32 [], [..., 1] for one a row, or with fewer axes, those of the leading axes: [E] or [E, 1, 1] for one an expert.
    layer: None, or an i32 scalar: the array is entry `layer` of a stack, and packed, scale and global_scale hold the whole
        stack in a leading axis. A kernel reads its layer in place; nothing is copied in front of it.
    """

    packed: UInt8[Array, "... K2"]
    scale: Float[Array, "... K16"]
    global_scale: Float[Array, "..."]
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, [..., K]."""
        lead = self.packed.shape[:-1] if self.layer is None else self.packed.shape[1:-1]
        return (*lead, 2 * self.packed.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def select(self) -> "NVFP4Array":
        """The same array without a stack around it."""
        if self.layer is None:
            return self
        return NVFP4Array(
            *(lax.dynamic_index_in_dim(v, self.layer, keepdims=False) for v in (self.packed, self.scale, self.global_scale))
        )

    @property
    def aligned_global_scale(self) -> Float[Array, "..."]:
        """The global scale with as many axes as packed has, those of length 1 appended."""
        return self.global_scale.reshape(*self.global_scale.shape, *(1,) * (self.packed.ndim - self.global_scale.ndim))

    @property
    def qvalue(self) -> Array:
        """The codes as float4_e2m1fn [..., K]."""
        return numerics.decode_e2m1(numerics.unpack(self.select().packed)).astype(jnp.float4_e2m1fn)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "... K"]:
        """(qvalue * scale) * global_scale in float32, rounded to dtype."""
        array = self.select()
        return (array.dequantize_blocks(jnp.float32) * array.aligned_global_scale).astype(dtype)

    def dequantize_blocks(self, dtype: DTypeLike = jnp.bfloat16) -> Float[Array, "... K"]:
        """qvalue * scale, without the global scale: exact in bfloat16."""
        array = self.select()
        return numerics.dequantize(array.packed, lax.bitcast_convert_type(array.scale, jnp.uint8), dtype)


_FIELDS = tuple(f.name for f in dataclasses.fields(NVFP4Array))


def _unflatten(_, leaves):
    # Not through __init__: transformations put their own placeholders into the leaves.
    array = object.__new__(NVFP4Array)
    for name, leaf in zip(_FIELDS, leaves, strict=True):
        object.__setattr__(array, name, leaf)
    return array


jax.tree_util.register_pytree_with_keys(
    NVFP4Array, lambda a: ([(jax.tree_util.GetAttrKey(n), getattr(a, n)) for n in _FIELDS], None), _unflatten
)


def check_k(k: int, what: str, shape: tuple[int, ...]) -> None:
    """A ValueError that names `what` and its shape unless K is a positive multiple of 16."""
    if k % numerics.BLOCK or not k:
        raise ValueError(f"{what} of shape {tuple(shape)}: the contraction axis K={k} is not a multiple of 16; NVFP4 shares a scale "
                         "among 16 elements, so pad K or leave this layer in bfloat16 (Rule(..., skip=True))")


def check_four_over_six(kind: str | None) -> None:
    if kind not in (None, "mae", "mse"):
        raise ValueError(f"four_over_six={kind!r}: None, 'mae' or 'mse'")


def quantize(
    x: Float[Array, "... K"],
    *,
    scaling: str = "tensor",
    four_over_six: str | None = None,
    amax: Float[Array, "..."] | None = None,
    valid: Bool[Array, "..."] | None = None,
) -> NVFP4Array:
    """`ops.quantize` in plain jnp: the implementation that every other is held to, bit for bit."""
    check_quantize(x, scaling, four_over_six)
    if amax is None:
        amax = scaling_modes.activation_amax(x, scaling, valid)
    return quantize_with_amax(x, jnp.asarray(amax, jnp.float32), pow2=scaling == "tensor_pow2", four_over_six=four_over_six)


def check_quantize(x: Float[Array, "..."], scaling: str, four_over_six: str | None) -> None:
    """What every implementation of `quantize` refuses."""
    if x.ndim == 0:
        raise ValueError("quantize needs at least one axis, got a scalar")
    check_k(x.shape[-1], "quantize: x", x.shape)
    check_four_over_six(four_over_six)
    if scaling not in scaling_modes.ONLINE:
        raise ValueError(f"scaling={scaling!r}: one of {', '.join(scaling_modes.ONLINE)}")


def quantize_with_amax(
    x: Float[Array, "... K"], amax: Float[Array, "..."], *, pow2: bool = False, four_over_six: str | None = None
) -> NVFP4Array:
    """`quantize` for an amax that broadcasts to x with a last axis of 1, or is a scalar."""
    g, global_scale, amax = numerics.global_scales(amax, pow2=pow2, four_over_six=four_over_six is not None)
    packed, bits = numerics.quantize_blocks(x, g, amax, four_over_six=four_over_six)
    return NVFP4Array(packed, lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), global_scale)


def quantize_static(x: Float[Array, "... K"], input_scale: Float[Array, "..."], *, four_over_six: str | None = None) -> NVFP4Array:
    """Quantizes with a given global scale (a checkpoint's `input_scale`: it multiplies, amax / 2688 by convention).

    input_scale: f32 [] or broadcastable to x with a last axis of 1. Values beyond 2688 * input_scale saturate.
    """
    input_scale = jnp.asarray(input_scale, jnp.float32)
    top = numerics.E2M1_MAX * (numerics.E4M3_MAX if four_over_six is None else numerics.E4M3_MAX_FOUR_OVER_SIX)
    g = numerics.divide(1.0, input_scale)
    packed, bits = numerics.quantize_blocks(x, g, input_scale * jnp.float32(top), four_over_six=four_over_six)
    return NVFP4Array(packed, lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), input_scale)


def quantize_weight(w: Float[Array, "... N K"], *, four_over_six: str | None = None) -> NVFP4Array:
    """A weight [..., N, K] -> NVFP4 with one global scale for each [N, K] matrix: f32 [] or [..., 1, 1].

    Values are rounded to bfloat16 first, so that a trainer with float32 masters and a loader of the bfloat16 export get the
    same bits. NaN or infinity in a row gives that row NaN scales.
    """
    check_k(w.shape[-1], "weight", w.shape)
    check_four_over_six(four_over_six)
    w = w.astype(jnp.bfloat16)
    amax = scaling_modes.magnitude(w).max((-2, -1), keepdims=w.ndim > 2)
    return quantize_with_amax(w, amax, four_over_six=four_over_six)
