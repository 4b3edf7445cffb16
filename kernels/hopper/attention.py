"""Attention on Hopper: queries against a cache of ragged lengths, causal, grouped, read in place.

    y = attention(q, keys, values, starts, layer=i)

Slot and position are one: query t of row b stands at starts[b] + t and sees the slots up to its own. Few queries a row
go to `attention_decode`, many to `attention_prefill`. Both sum in the order of `attention_sums`, so that a query's
bits are the same in every batch, capacity and chunk, in prefill and in decode.
"""
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import attention_plan
from nvfp4jax.kernels.hopper.attention_decode import MOST_COLUMNS, decode
from nvfp4jax.kernels.hopper.attention_plan import Plan
from nvfp4jax.kernels.hopper.attention_prefill import prefill

HEAD_DIMS = 64, 128


def _few(tokens, group):
    return tokens * group <= MOST_COLUMNS


def plan(starts, q, keys, *, window: int | None = None) -> Plan | None:
    """What `attention` needs besides for few queries a row, None for many: the same for all layers of a step, so made
    once.

    q, keys: arrays, or what has their shapes. No two calls of `attention` with one plan may run at a time: layers that
    follow one another do not.
    """
    _, tokens, query_heads, _ = q.shape
    *_, heads, capacity, _ = keys.shape
    if not _few(tokens, query_heads // heads):
        return None
    return attention_plan.plan(starts, tokens=tokens, heads=heads, capacity=capacity, window=window)


def attention(q, keys, values, starts, *, layer=None, scale=None, window=None, soft_cap=None, counts=None, plan=None):
    """softmax(soft_cap tanh(q . keys scale / soft_cap)) values, over the slots that a query sees.

    Args:
      q: bf16 [B, T, Hq, D]; query t of row b stands at slot starts[b] + t and sees the slots up to that one.
      keys, values: bf16 [B, Hkv, S, D], or [L, B, Hkv, S, D] with `layer`, an i32 scalar: read in place, never copied.
        Query heads h Hq / Hkv .. (h + 1) Hq / Hkv - 1 read key head h. Slots up to a row's last query must be finite; what
        lies behind is not read, or has no effect.
      starts: i32 [B].
      scale: 1 / sqrt(D) if None. soft_cap: None for plain scores. window: a query sees the last `window` slots only.
      counts: i32 [B], None or the row's queries that count: what the others give is finite, and not worked for.
      plan: of `plan`, made here if None.

    Returns:
      bf16 [B, T, Hq, D].

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: other dtypes or head dimensions.
    """
    if layer is None and keys.ndim == 4:
        keys, values, layer = keys[None], values[None], 0
    if q.ndim != 4 or keys.ndim != 5 or layer is None or keys.shape != values.shape:
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and values {values.shape}; they should be [B, T, Hq, D] "
                         "and [B, Hkv, S, D], or [L, B, Hkv, S, D] with `layer`")
    rows, tokens, query_heads, d = q.shape
    _, cache_rows, heads, _, cache_d = keys.shape
    if (rows, d) != (cache_rows, cache_d) or query_heads % heads or starts.shape != (rows,):
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and starts {starts.shape} do not fit together: rows, head "
                         "dimension and a multiple of the key heads")
    if {q.dtype, keys.dtype, values.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"attention on Hopper: q {q.dtype}, keys {keys.dtype}, values {values.dtype}; only bfloat16")
    if d not in HEAD_DIMS:
        raise NotImplementedError(f"attention on Hopper: a head dimension of {d}; only {HEAD_DIMS}")
    if soft_cap is not None and soft_cap <= 0 or window is not None and window < 1:
        raise ValueError(f"attention: a window of {window} and a soft cap of {soft_cap}; both are positive, or None")
    scale = d**-0.5 if scale is None else float(scale)
    options = dict(scale=scale, window=window, soft_cap=soft_cap)
    layer, starts = jnp.asarray(layer, jnp.int32), starts.astype(jnp.int32)
    if not _few(tokens, query_heads // heads):
        counts = jnp.full((rows,), tokens, jnp.int32) if counts is None else counts.astype(jnp.int32)
        return prefill(q, keys, values, layer, starts, counts, **options)
    if plan is None:
        plan = attention_plan.plan(starts, tokens=tokens, heads=heads, capacity=keys.shape[3], window=window)
    return decode(q, keys, values, layer, plan, **options)
