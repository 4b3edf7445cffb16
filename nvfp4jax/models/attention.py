"""Rotary embeddings applied, and causal grouped-query attention over a cache, as XLA runs it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from nvfp4jax.backends.xla import product_operands

_BLOCK = 256  # queries whose scores are held at once


def rope_angles(
    positions: Int[Array, "B T"], frequencies: np.ndarray, factor: float = 1.0
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of position * frequency, float32, times `factor`. frequencies: f32 [half]."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(angles) * jnp.float32(factor), jnp.sin(angles) * jnp.float32(factor)


def rotate(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T D//2"], sin: Float[Array, "B T D//2"]
) -> Float[Array, "B T H D"]:
    """Rotates the halves of D against each other (the Hugging Face layout), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(
    q: Float[Array, "B T Hq D"],
    keys: Float[Array, "*L B Hkv S D"],
    values: Float[Array, "*L B Hkv S Dv"],
    starts: Int[Array, "B"],
    *,
    layer: Int[Array, ""] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T Hq Dv"]:
    """Causal grouped-query attention: scores and softmax in float32, the products in q's dtype.

    starts: query t of row b is at slot starts[b] + t and sees the slots up to its own; of these only the last `window`.
    layer: which of a stack's keys and values, where they have a leading axis.
    scale: times the scores, D ** -0.5 where None. soft_cap: scores become soft_cap * tanh(scores / soft_cap).
    Scores are held for some queries at a time, so that a long prompt does not hold T * S of them a head.
    """
    if layer is not None:
        keys, values = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
    batch, steps, heads, head_dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)
    scale = jnp.float32(head_dim**-0.5 if scale is None else scale)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, *product_operands(a, b), precision=precision, preferred_element_type=jnp.float32)

    def some(q: jax.Array, at: jax.Array) -> jax.Array:
        """q [B, t, Hq, D], at [B, t], the slot of each."""
        grouped = q.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
        scores = product("btkgd,bksd->bkgts", grouped, keys) * scale
        if soft_cap is not None:
            scores = jnp.float32(soft_cap) * jnp.tanh(scores / jnp.float32(soft_cap))
        slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
        seen = slot <= at[..., None]
        if window is not None:
            seen = seen & (slot > at[..., None] - jnp.int32(window))
        # A finite floor: a query that sees nothing (padding past the last slot, with a window) must be no NaN.
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        out = product("bkgts,bksd->btkgd", weights, values)
        return out.astype(q.dtype).reshape(batch, -1, heads, values.shape[-1])

    at = starts[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
    if steps <= 2 * _BLOCK:
        return some(q, at)
    extra = -steps % _BLOCK
    blocks = lambda x: jnp.moveaxis(x.reshape(batch, -1, _BLOCK, *x.shape[2:]), 1, 0)  # noqa: E731
    q = blocks(jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0))))
    at = blocks(jnp.pad(at, ((0, 0), (0, extra))))
    out = jnp.moveaxis(lax.map(lambda part: some(*part), (q, at)), 0, 1)
    return out.reshape(batch, -1, heads, out.shape[-1])[:, :steps]
