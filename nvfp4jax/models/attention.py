"""What every decoder shares: the KV cache, rotary embeddings, masks, grouped-query attention, the RMS norm."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax.backends.xla import product_operands
from nvfp4jax.layers import RMSNorm as RMSNorm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, S slots a sequence.

    keys, values: one array an entry of `model.layers`: [B, Hkv, S, D], or [L, B, Hkv, S, D] for a stack of L layers.
    index: i32 [], the slot that the next call writes first; all rows share it (prompts are padded on the left).
    """

    keys: tuple[Any, ...]  # Any: a tree of shapes or shardings is a KVCache too
    values: tuple[Any, ...]
    index: Any

    @property
    def length(self) -> int:
        return self.keys[0].shape[-2]


def init_cache(
    depths: tuple[int | None, ...], batch: int, heads: int, length: int, head_dim: int, dtype: DTypeLike
) -> KVCache:
    """An empty cache; `depths` holds, for each entry of `model.layers`, None or the number of layers stacked in it."""
    shape = (batch, heads, length, head_dim)
    zeros = lambda: tuple(jnp.zeros(shape if d is None else (d, *shape), dtype) for d in depths)  # noqa: E731
    return KVCache(zeros(), zeros(), jnp.int32(0))


def extend_cache(cache: KVCache, length: int, repeats: int = 1) -> KVCache:
    """The cache with room for `length` slots, and each sequence `repeats` times in a row (several samples a prompt)."""
    extra = length - cache.length
    if extra < 0:
        raise ValueError(f"the cache holds {cache.length} slots already, cannot extend it to {length}")

    def grow(x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, repeats, axis=x.ndim - 4) if repeats > 1 else x
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)])

    return KVCache(tuple(map(grow, cache.keys)), tuple(map(grow, cache.values)), cache.index)


class LayerCache(NamedTuple):
    """One layer's part of a KVCache: its arrays, or the arrays of its whole stack and the place in it."""

    keys: jax.Array
    values: jax.Array
    layer: Int[Array, ""] | None = None

    def write(
        self, keys: Float[Array, "B Hkv T D"], values: Float[Array, "B Hkv T D"], index: Int[Array, ""]
    ) -> "LayerCache":
        zero = jnp.int32(0)
        at = (zero, zero, index, zero)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(x.dtype)
            if self.layer is None:
                return lax.dynamic_update_slice(x, new, at)
            return lax.dynamic_update_slice(x, new[None], (self.layer, *at))

        return self._replace(keys=put(self.keys, keys), values=put(self.values, values))

    def read(self) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S D"]]:
        if self.layer is None:
            return self.keys, self.values
        return tuple(lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (self.keys, self.values))


class StepInputs(NamedTuple):
    """What all layers of one call share."""

    cos: Float[Array, "B T D//2"]
    sin: Float[Array, "B T D//2"]
    mask: Bool[Array, "B T S"]
    index: Int[Array, ""]  # the first slot this call writes; 0 without a cache


def rope(
    positions: Int[Array, "B T"], head_dim: int, theta: float, frequency_dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of the default rotary embedding, float32; frequency_dtype: what the frequencies are rounded to."""
    frequencies = (1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32).astype(frequency_dtype)
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies.astype(np.float32))[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T D//2"], sin: Float[Array, "B T D//2"]
) -> Float[Array, "B T H D"]:
    """Rotates the halves of D against each other (the Hugging Face layout), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def step_masks(
    attention_mask: ArrayLike | None, batch: int, steps: int, slots: int, index: Int[Array, ""]
) -> tuple[Bool[Array, "B T S"], Bool[Array, "B T"] | None]:
    """(which slot each query sees, which queries are real) from a mask over key slots [B, S] or over pairs [B, T, S].

    A [B, S] mask is made causal: the query in slot index + t sees slots up to its own. A [B, T, S] mask is taken as is.
    """
    causal = (jnp.arange(slots, dtype=jnp.int32)[None] <= index + jnp.arange(steps, dtype=jnp.int32)[:, None])[None]
    if attention_mask is None:
        return jnp.broadcast_to(causal, (batch, steps, slots)), None
    mask = jnp.asarray(attention_mask).astype(bool)
    if mask.shape == (batch, steps, slots):
        return mask, mask.any(-1)
    if mask.shape == (batch, slots):
        return mask[:, None] & causal, lax.dynamic_slice(mask, (jnp.int32(0), index), (batch, steps))
    raise ValueError(
        f"attention_mask has shape {mask.shape}; tokens [{batch}, {steps}] need [B, S] = {(batch, slots)} over the key "
        f"slots (S is the cache's length, or T without a cache) or [B, T, S] = {(batch, steps, slots)}"
    )


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B Hkv S D"],
    v: Float[Array, "B Hkv S D"],
    mask: Bool[Array, "B T S"],
    precision: lax.Precision | None = None,
    block: int = 256,
) -> Float[Array, "B T H D"]:
    """Grouped-query attention: scores and softmax in float32, the products in q's dtype.

    A query that sees no key gets the mean of all values. Scores are kept for `block` queries at a time, so that a long
    prompt does not hold T * S of them a head.
    """
    batch, steps, heads, head_dim = q.shape
    groups = heads // k.shape[1]
    k, v = k.astype(q.dtype), v.astype(q.dtype)

    def some(q: jax.Array, mask: jax.Array) -> jax.Array:
        q = q.reshape(batch, -1, k.shape[1], groups, head_dim)
        scores = jnp.einsum(
            "btkgd,bksd->bkgts", *product_operands(q, k), precision=precision, preferred_element_type=jnp.float32
        )
        scores = scores * jnp.float32(head_dim**-0.5)
        # A finite floor: a padding query with nothing to see must be no NaN, which would spread by its value.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        out = jnp.einsum(
            "bkgts,bksd->btkgd", *product_operands(weights, v), precision=precision, preferred_element_type=jnp.float32
        )
        return out.astype(q.dtype).reshape(batch, -1, heads, head_dim)

    if steps <= 2 * block:
        return some(q, mask)
    extra = -steps % block
    blocks = lambda x: jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)  # noqa: E731
    q = blocks(jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0))))
    mask = blocks(jnp.pad(mask, ((0, 0), (0, extra), (0, 0))))
    out = jnp.moveaxis(lax.map(lambda part: some(*part), (q, mask)), 0, 1)
    return out.reshape(batch, -1, heads, head_dim)[:, :steps]
