"""The two quantized values: NVFP4Array, packed, and QuantizedActivation, made once behind a norm and read by several matmuls."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from nvfp4jax import arguments, numerics, pytree
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

    def __post_init__(self):
        # A tree of shardings, or of a transformation's axes, is one too.
        if any(hasattr(part, "dtype") for part in (self.packed, self.scale, self.global_scale)):
            _check_parts(self)

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
        packed, scale, global_scale = (
            lax.dynamic_index_in_dim(v, self.layer, keepdims=False) for v in (self.packed, self.scale, self.global_scale)
        )
        return NVFP4Array(packed, scale, global_scale, source=self.source)

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


def _check_parts(a: NVFP4Array) -> None:
    """A ValueError, naming the part, for one whose dtype or shape does not fit."""
    arguments.array("NVFP4Array: packed", a.packed, "int", ("...", "K/2"))
    arguments.array("NVFP4Array: scale", a.scale, "float", (*a.packed.shape[:-1], a.packed.shape[-1] // (numerics.BLOCK // 2)))
    arguments.array("NVFP4Array: global_scale", a.global_scale)
    for part, dtype in (("packed", jnp.uint8), ("scale", jnp.float8_e4m3fn), ("global_scale", jnp.float32)):
        if (found := getattr(a, part).dtype) != dtype:
            raise ValueError(f"NVFP4Array: {part}: {found}; {jnp.dtype(dtype).name} is needed")
    found, lead = a.global_scale.shape, (*a.packed.shape[:-1], 1)
    if len(found) > len(lead) or any(n not in (1, size) for n, size in zip(found, lead, strict=False)):
        raise ValueError(f"NVFP4Array: global_scale: shape {tuple(found)} fits no leading axes of {lead}")
    if a.layer is not None:
        arguments.array("NVFP4Array: layer", a.layer, "int", ())
    if a.source is not None:
        arguments.array("NVFP4Array: source", a.source, "float", a.shape)


pytree.register(NVFP4Array, "packed", "scale", "global_scale", "layer", "source")


@dataclasses.dataclass(frozen=True)
class QuantizedActivation:
    """An activation as matmuls read it, made once (`ops.quantize_activation`, `rms_norm`, `silu_mul`) for all its readers.

    operand: bfloat16 [..., K], qvalue * scale, exact; the order of K is that of the backend that made it. Where the mode is None it
        is the activation itself, in its own dtype.
    row_scale: f32 [] or [..., 1], its global scale, or None where the mode is None.
    source: the float activation [..., K]: where gradients go. No inference program computes or keeps it for this.
    carried: what the mode hands on to the next call (a history of amaxes; beside telemetry, a pair of it and the counts), or None.
    backend: the name of who made it.
    """

    operand: Float[Array, "... K"]
    row_scale: Float[Array, "..."] | None
    source: Float[Array, "... K"]
    carried: Any = None
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


def explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """How explicit mesh axes lay x out; None where there are none."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else None
    return None if sharding is None or sharding.mesh.empty else sharding


def check_shards(x: Any, what: str, axis: int = -1) -> None:
    """A ValueError where explicit mesh axes cut x, which is to be quantized along `axis`, within a block of 16."""
    sharding = explicit_sharding(x)
    if sharding is None or sharding.spec[axis] is None:
        return
    names = sharding.spec[axis] if isinstance(sharding.spec[axis], tuple) else (sharding.spec[axis],)
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    if x.shape[axis] % (parts * numerics.BLOCK):
        raise ValueError(f"{what} of shape {tuple(x.shape)}: {'/'.join(names)} cuts K={x.shape[axis]} into {parts} shards, within the blocks of 16 "
                         "that share a scale; shard another axis, or over fewer devices")


def check_unsplit(x: Any, axes: range, what: str, way_out: str) -> None:
    """A ValueError where explicit mesh axes split one of x's `axes`."""
    sharding = explicit_sharding(x)
    names = [] if sharding is None else [str(sharding.spec[a]) for a in axes if sharding.spec[a] is not None]
    if names:
        raise ValueError(f"{what} of shape {tuple(x.shape)}: the explicit mesh axis {', '.join(names)} splits it; {way_out}, or make the mesh "
                         "with axis_types=jax.sharding.AxisType.Auto")  # fmt: skip


@numerics.compiled
def quantize(x: Float[Array, "... K"], request: Request) -> NVFP4Array:
    """x -> NVFP4 as `request` says, in plain jnp: the implementation that every other is held to, bit for bit."""
    g, global_scale, amax = scaling_modes.multipliers(x, request)
    packed, bits = numerics.quantize_blocks(x, g, amax, four_over_six=request.four_over_six)
    return NVFP4Array(packed, lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), global_scale)


@numerics.compiled(static_argnames="four_over_six")
def quantize_weight(w: Float[Array, "... N K"], *, four_over_six: scaling_modes.FourOverSix | None = None) -> NVFP4Array:
    """A weight [..., N, K] -> NVFP4 with one global scale for each [N, K] matrix: f32 [] or [..., 1, 1].

    Values are rounded to bfloat16 first, so that a trainer with float32 masters and a loader of the bfloat16 export get the
    same bits. NaN or infinity in a row gives that row NaN scales.
    """
    w = w.astype(jnp.bfloat16)
    amax = scaling_modes.magnitude(w).max((-2, -1), keepdims=w.ndim > 2)
    return quantize(w, Request(amax=amax, four_over_six=four_over_six))
