"""The two quantized values: NVFP4Array, packed, and QuantizedActivation, made once behind a norm and read by several matmuls."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from nvfp4jax import numerics, pytree
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.scaling import Request


@dataclasses.dataclass(frozen=True)
class NVFP4Array:
    """x ~ qvalue * repeat(scale, 16) * global_scale, the contraction axis K last.

    packed: u8 [..., K/2], two E2M1 codes a byte, the first in the low nibble.
    scale: float8_e4m3fn [..., K/16].
    global_scale: f32 [], [..., 1] for one a row, or with fewer axes, those of the leading axes: [E] or [E, 1, 1] for one an expert.
    layer: None, or an i32 scalar: the array is entry `layer` of a stack, and packed, scale and global_scale hold the whole
        stack in a leading axis. A kernel reads its layer in place; nothing is copied in front of it.
    source: None, or the float array [..., K] that it was made of, to which gradients go (straight through the rounding). Only what is
        made inside a trace has one; `dataclasses.replace(array, source=None)` lets it go.
    """

    packed: UInt8[Array, "... K2"]
    scale: Float[Array, "... K16"]
    global_scale: Float[Array, "..."]
    layer: Int[Array, ""] | None = None
    source: Float[Array, "... K"] | None = None

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
        leaves = (lax.dynamic_index_in_dim(v, self.layer, keepdims=False) for v in (self.packed, self.scale, self.global_scale))
        return NVFP4Array(*leaves, source=self.source)

    @property
    def aligned_global_scale(self) -> Float[Array, "..."]:
        """The global scale with as many axes as packed has, those of length 1 appended."""
        return self.global_scale.reshape(*self.global_scale.shape, *(1,) * (self.packed.ndim - self.global_scale.ndim))

    @property
    def qvalue(self) -> Array:
        """The codes as float4_e2m1fn [..., K]."""
        return numerics.decode_e2m1(numerics.unpack(self.select().packed)).astype(jnp.float4_e2m1fn)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "... K"]:
        """(qvalue * scale) * global_scale in float32, rounded to dtype. A gradient goes to what was quantized, as it is."""
        array = self.select()
        decoded = (array.dequantize_blocks(jnp.float32) * array.aligned_global_scale).astype(dtype)
        return decoded if self.source is None else _straight_through(lax.stop_gradient(decoded), self.source)

    def dequantize_blocks(self, dtype: DTypeLike = jnp.bfloat16) -> Float[Array, "... K"]:
        """qvalue * scale, without the global scale: exact in bfloat16."""
        array = self.select()
        return numerics.dequantize(array.packed, lax.bitcast_convert_type(array.scale, jnp.uint8), dtype)


pytree.register(NVFP4Array, "packed", "scale", "global_scale", "layer", "source")


@dataclasses.dataclass(frozen=True)
class QuantizedActivation:
    """An activation as matmuls read it, made once (`ops.quantize_activation`, `rms_norm`, `silu_mul`) for all its readers.

    operand: bfloat16 [..., K], qvalue * scale, exact; the order of K is that of the backend that made it. Where the mode is None it
        is the activation itself, in its own dtype.
    row_scale: f32 [] or [..., 1], its global scale, or None where the mode is None.
    source: the float activation [..., K]: where gradients go. No inference program computes or keeps it for this.
    carried: what the mode hands on to the next call (a history of amaxes), or None.
    backend: the name of who made it.
    """

    operand: Float[Array, "... K"]
    row_scale: Float[Array, "..."] | None
    source: Float[Array, "... K"]
    carried: Float[Array, "..."] | None = None
    backend: str = "xla"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operand.shape

    @property
    def ndim(self) -> int:
        return self.operand.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the activation that it stands for."""
        return self.source.dtype


pytree.register(QuantizedActivation, "operand", "row_scale", "source", "carried")


@jax.custom_jvp
def _straight_through(value: Array, source: Array) -> Array:
    """value, whose derivative is that of source."""
    return value


@_straight_through.defjvp
def _(primals, tangents):
    return primals[0], tangents[1].astype(primals[0].dtype)


def check_k(k: int, what: str, shape: tuple[int, ...]) -> None:
    """A ValueError that names `what` and its shape unless K is a positive multiple of 16."""
    if k % numerics.BLOCK or not k:
        raise ValueError(f"{what} of shape {tuple(shape)}: the contraction axis K={k} is not a multiple of 16; NVFP4 shares a scale "
                         "among 16 elements, so pad K or leave this layer in bfloat16 (Rule(..., skip=True))")


def quantize(x: Float[Array, "... K"], request: Request) -> NVFP4Array:
    """x -> NVFP4 as `request` says, in plain jnp: the implementation that every other is held to, bit for bit."""
    kind = request.four_over_six
    if request.global_scale is not None:
        global_scale = jnp.asarray(request.global_scale, jnp.float32)
        top = numerics.E2M1_MAX * (numerics.E4M3_MAX if kind is None else numerics.E4M3_MAX_FOUR_OVER_SIX)
        g, amax = numerics.divide(1.0, global_scale), global_scale * jnp.float32(top)
    else:
        amax = request.amax
        if amax is None:
            amax = scaling_modes.row_amax(x) if request.per_row else scaling_modes.tensor_amax(x, request.valid)
        g, global_scale, amax = numerics.global_scales(amax, pow2=request.pow2, four_over_six=kind is not None)
    packed, bits = numerics.quantize_blocks(x, g, amax, four_over_six=kind)
    return NVFP4Array(packed, lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), global_scale)


def quantize_weight(w: Float[Array, "... N K"], *, four_over_six: str | None = None) -> NVFP4Array:
    """A weight [..., N, K] -> NVFP4 with one global scale for each [N, K] matrix: f32 [] or [..., 1, 1].

    Values are rounded to bfloat16 first, so that a trainer with float32 masters and a loader of the bfloat16 export get the
    same bits. NaN or infinity in a row gives that row NaN scales.
    """
    w = w.astype(jnp.bfloat16)
    amax = scaling_modes.magnitude(w).max((-2, -1), keepdims=w.ndim > 2)
    return quantize(w, Request(amax=amax, four_over_six=four_over_six))
