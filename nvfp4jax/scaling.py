"""Which amax an activation is scaled by: the modes of the online scale, and the mask that keeps padding out of it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import numerics

# Modes any matmul knows; experts add "expert", layers add "static", "delayed" and None.
ONLINE = ("tensor", "tensor_pow2", "token")
HISTORY = 16  # calls that a delayed amax looks back on

_valid_rows: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("valid_rows", default=None)


@contextlib.contextmanager
def valid_rows(mask: Bool[Array, "..."] | None) -> Iterator[None]:
    """Inside, NVFP4 layers leave the rows where `mask` is False out of every amax: padding and finished sequences.

    mask: bool, one entry a row (token) of the activations, e.g. [B, T]; None masks nothing. A layer applies it where the
    number of its rows equals the mask's size, so a model needs no argument for it. Meant for use while tracing.
    """
    token = _valid_rows.set(mask)
    try:
        yield
    finally:
        _valid_rows.reset(token)


def current_valid_rows(lead: tuple[int, ...]) -> jax.Array | None:
    """The mask of the enclosing `valid_rows`, in the shape `lead` of an activation's rows; None where none applies."""
    mask = _valid_rows.get()
    if mask is None:
        return None
    rows = 1
    for size in lead:
        rows *= size
    return mask.reshape(lead) if mask.size == rows else None


def magnitude(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """|x| in float32 with non-finite values counted as zero: they poison their own row, never an amax."""
    x = jnp.abs(numerics.as_float32(x))
    return jnp.where(jnp.isfinite(x), x, jnp.float32(0))


def activation_amax(
    x: Float[Array, "... K"], scaling: str, valid: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """The amax that `scaling` asks for: f32 [] for "tensor" and "tensor_pow2", f32 [..., 1] for "token".

    valid: bool x.shape[:-1]; rows where it is False take no part in a tensor's amax.
    """
    row_amax = magnitude(x).max(-1, keepdims=True, initial=jnp.float32(0))
    if scaling == "token":
        return row_amax
    if scaling not in ONLINE:
        raise ValueError(f"scaling={scaling!r}: one of {', '.join(ONLINE)}")
    if valid is not None:
        if valid.shape != x.shape[:-1]:
            raise ValueError(f"valid has shape {valid.shape}; x of shape {x.shape} needs {x.shape[:-1]}")
        row_amax = jnp.where(valid[..., None], row_amax, jnp.float32(0))
    return row_amax.max(initial=jnp.float32(0))


def delayed_amax(history: Float[Array, "H"], amax: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, "H"]]:
    """(the amax to scale a call by, the history after it): the largest of the calls before, this call's where there is none.

    history: f32, the amaxes of the last calls, newest first, 0 where there was none. amax: f32 [], of this call.
    TransformerEngine's delayed scaling (`amax_compute_algo="max"`), but for the first call, which has a scale of 1 there.
    """
    largest = history.max()
    return jnp.where(largest > 0, largest, amax), jnp.concatenate([amax[None], history[:-1]])


def group_ids(group_sizes: Int[Array, "E"], rows: int) -> Int[Array, "M"]:
    """The group of each of `rows` sorted rows; rows past the last group count to the last one."""
    ends = jnp.cumsum(group_sizes)
    ids = jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right")
    return jnp.minimum(ids, group_sizes.shape[0] - 1).astype(jnp.int32)


def expert_amax(
    x: Float[Array, "M K"], group_sizes: Int[Array, "E"], valid: Bool[Array, "M"] | None = None
) -> Float[Array, "M 1"]:
    """One amax a group of rows, given back to each of its rows ("expert" scaling)."""
    row_amax = magnitude(x).max(-1, initial=jnp.float32(0))
    inside = jnp.arange(x.shape[0]) < group_sizes.sum()
    row_amax = jnp.where(inside if valid is None else inside & valid, row_amax, jnp.float32(0))
    ids = group_ids(group_sizes, x.shape[0])
    return jax.ops.segment_max(row_amax, ids, num_segments=group_sizes.shape[0])[ids][:, None]
