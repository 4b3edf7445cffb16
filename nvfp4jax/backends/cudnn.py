"""Attention by cuDNN, to compare with: asked for by name alone.

cuDNN reads [B, S, H, D], so that the keys and values of our caches are copied in front of it, and its rows do not keep their bits
from small to large batches.
"""

from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax

NAME = "cudnn"


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotImplementedError(f"cuDNN computes attention alone, not {name}")


def attention_plan(
    starts: jax.Array, q: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct, window: int | None, shared: tuple | None
) -> None:
    """Nothing that the layers of a step could share."""


def attention(q, keys, values, starts, layer, scale, window, soft_cap, counts, plan, shared) -> jax.Array:
    del counts, plan
    if shared is not None:
        raise NotImplementedError("slots that rows share")
    if soft_cap is not None:
        raise NotImplementedError("a soft cap")
    if {q.dtype, keys.dtype, values.dtype} != {jnp.dtype(jnp.bfloat16)} or keys.shape[-1] != values.shape[-1]:
        raise NotImplementedError(f"q {q.dtype}{q.shape}, keys {keys.dtype}{keys.shape}, values {values.dtype}{values.shape}: bfloat16 of "
                                  "one head dimension is supported")
    if layer is not None:
        keys, values = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    batch, steps, slots = *q.shape[:2], keys.shape[1]
    if steps == 1 and window is None:
        seen = dict(query_seq_lengths=jnp.ones((batch,), jnp.int32), key_value_seq_lengths=starts + jnp.int32(1))
    else:
        at = starts[:, None, None] + jnp.arange(steps, dtype=jnp.int32)[None, :, None]
        slot = jnp.arange(slots, dtype=jnp.int32)[None, None]
        mask = slot <= at
        seen = dict(mask=(mask if window is None else mask & (slot > at - jnp.int32(window)))[:, None])
    return jax.nn.dot_product_attention(q, keys, values, scale=scale, implementation="cudnn", **seen)
