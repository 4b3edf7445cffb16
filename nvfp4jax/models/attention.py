"""Rotary embeddings applied."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
