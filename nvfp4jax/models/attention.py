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
