"""What the kernels of every GPU are handed alike."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nvfp4jax.array import NVFP4Array
from nvfp4jax.scaling import Request


def options(request: Request) -> dict:
    """A request as the quantizing kernels take it."""
    scaling = "token" if request.per_row else "tensor_pow2" if request.pow2 else "tensor"
    return dict(scaling=scaling, four_over_six=request.four_over_six, amax=request.amax, global_scale=request.global_scale, valid=request.valid)


def rows_of(ws: Sequence[jax.Array]) -> jax.Array:
    """Weights [..., K, N] transposed, their rows one after another: [..., sum of N, K]."""
    rows = [jnp.swapaxes(w, -1, -2) for w in ws]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, -2)


def global_scale(w: NVFP4Array, axes: int) -> jax.Array:
    """The global scales of a weight with `axes` leading axes of experts: f32 [(L)] or [(L), E]."""
    lead = w.packed.shape[: axes + (w.layer is not None)]
    scale = w.aligned_global_scale
    if any(size > 1 for size in scale.shape[len(lead) :]):
        raise NotImplementedError(f"global scales of shape {w.global_scale.shape} for a weight of shape {w.shape}: one a matrix is supported")
    return jnp.broadcast_to(scale.reshape(scale.shape[: len(lead)]), lead)
