"""Attention on Hopper: queries against a cache of ragged lengths, causal, grouped, read in place.

    y = attention(q, keys, values, starts, layer=i)

Slot and position are one: query t of row b stands at starts[b] + t and sees the slots up to its own. Few queries a row
go to `attention_decode`, many to `attention_prefill`. Both sum in the order of `attention_sums`, so that a query's
bits are the same in every batch, capacity and chunk, in prefill and in decode.

What several rows begin with may be held once for them: decode then reads it once, in `attention_shared`, and a row's bits are the
same still.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nvfp4jax.kernels.hopper import attention_plan, attention_shared
from nvfp4jax.kernels.hopper.attention_decode import MOST_COLUMNS, decode
from nvfp4jax.kernels.hopper.attention_plan import Plan
from nvfp4jax.kernels.hopper.attention_prefill import prefill
from nvfp4jax.kernels.hopper.attention_sums import PIECE

HEAD_DIMS = 64, 128


class Shared(NamedTuple):
    """keys, values: bf16 [(L,) N, Hkv, P, D]. slots: i32 [B], multiples of 128: row b begins with so many slots of row b // (B / N) here,
    as many as the other rows that begin with it; its own are those that follow. prefix: None, or keys and values bf16 [(L,) 1, Hkv, F, D]
    of slots, a multiple of 128, that stand in front of every row here: slots[b] counts them."""

    keys: jax.Array
    values: jax.Array
    slots: jax.Array
    prefix: tuple[jax.Array, jax.Array] | None = None


def _few(tokens, group):
    return tokens * group <= MOST_COLUMNS


def is_decode(q, keys, shared=None) -> bool:
    """Whether `attention` of these shapes is decode's: few queries a row."""
    return _few(q.shape[1], q.shape[2] // keys.shape[-3]) and (shared is None or q.shape[1] == 1)


def plan(starts, q, keys, *, window: int | None = None, shared=None) -> Plan | None:
    """What `attention` needs besides for few queries a row, None for many: the same for all layers of a step, so made
    once.

    q, keys: arrays, or what has their shapes. shared: None, or what `Shared` has. No two calls of `attention` with one plan may run at a time: layers that
    follow one another do not.
    """
    _, tokens, query_heads, _ = q.shape
    *_, heads, capacity, _ = keys.shape
    if not is_decode(q, keys, shared):
        return None
    if shared is None:
        return attention_plan.plan(starts, tokens=tokens, heads=heads, capacity=capacity, window=window)
    slots = shared.slots.astype(jnp.int32)
    own = attention_plan.plan(starts, tokens=tokens, heads=heads, capacity=capacity, window=window, shared=slots)
    return own._replace(shared=attention_shared.units(slots, attention_shared.shape_of(q, shared.keys, shared.prefix)))


def attention(q, keys, values, starts, *, layer=None, scale=None, window=None, soft_cap=None, counts=None, plan=None, shared=None, scales=None):
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
      shared: None, or a `Shared` (what has its fields): then `keys` and `values` have a row's slots from slots[b] on; `starts` count
        from the row's first slot.
      scales: None, or those of keys and values, f32 [(L,) B, Hkv, S] each, powers of two: then keys and values are float8_e4m3fn, the
        result is that of keys * scales and values * scales to the bit, and what is shared is decoded already, bf16 [L or 1, N, Hkv, P, D].
        Few queries a row alone.

    Returns:
      bf16 [B, T, Hq, D].

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: other dtypes or head dimensions; many queries a row of an FP8 cache.
    """
    if layer is None and keys.ndim == 4:
        keys, values, layer = keys[None], values[None], 0
        scales = scales if scales is None else tuple(a[None] for a in scales)
        if shared is not None and scales is None:
            shared = Shared(*jax.tree.map(lambda a: a[None], tuple(shared)))._replace(slots=shared.slots)
    if q.ndim != 4 or keys.ndim != 5 or layer is None or keys.shape != values.shape:
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and values {values.shape}; they should be [B, T, Hq, D] "
                         "and [B, Hkv, S, D], or [L, B, Hkv, S, D] with `layer`")
    rows, tokens, query_heads, d = q.shape
    _, cache_rows, heads, _, cache_d = keys.shape
    if (rows, d) != (cache_rows, cache_d) or query_heads % heads or starts.shape != (rows,):
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and starts {starts.shape} do not fit together: rows, head "
                         "dimension and a multiple of the key heads")
    cached = jnp.dtype(jnp.bfloat16 if scales is None else jnp.float8_e4m3fn)
    if q.dtype != jnp.bfloat16 or {keys.dtype, values.dtype} != {cached}:
        raise NotImplementedError(f"attention on Hopper: q {q.dtype}, keys {keys.dtype}, values {values.dtype}; only bfloat16, or float8_e4m3fn "
                                  "keys and values with scales")
    if scales is not None and {(a.shape, a.dtype) for a in scales} != {(keys.shape[:-1], jnp.dtype(jnp.float32))}:
        raise ValueError(f"attention: scales {[f'{a.dtype}{a.shape}' for a in scales]} beside keys {keys.shape}; float32 {keys.shape[:-1]} is needed")
    if 0 in (*q.shape, *keys.shape):
        raise NotImplementedError(f"attention on Hopper: nothing to do for q {q.shape} and keys {keys.shape}")
    if d not in HEAD_DIMS:
        raise NotImplementedError(f"attention on Hopper: a head dimension of {d}; only {HEAD_DIMS}")
    if shared is not None:
        one_layer = scales is not None and shared.keys.shape[:1] == (1,)
        _check_shared((1, *keys.shape[1:]) if one_layer else keys.shape, *shared, window)
    if soft_cap is not None and soft_cap <= 0 or window is not None and window < 1:
        raise ValueError(f"attention: a window of {window} and a soft cap of {soft_cap}; both are positive, or None")
    scale = d**-0.5 if scale is None else float(scale)
    options = dict(scale=scale, window=window, soft_cap=soft_cap)
    layer, starts = jnp.asarray(layer, jnp.int32), starts.astype(jnp.int32)
    if not is_decode(q, keys, shared):
        if scales is not None:
            raise NotImplementedError(f"attention on Hopper: {tokens} queries a row of an FP8 cache; prefill reads bfloat16")
        counts = jnp.full((rows,), tokens, jnp.int32) if counts is None else counts.astype(jnp.int32)
        of_shared = () if shared is None else (*shared[:3], *(shared.prefix or ()))
        return prefill(q, keys, values, layer, starts, counts, shared=of_shared, **options)
    if plan is None:
        plan = make_plan(starts, q, keys, window=window, shared=shared)
    if shared is not None:
        slots, capped = shared.slots.astype(jnp.int32), dict(scale=scale, soft_cap=soft_cap)
        of = jnp.int32(0) if one_layer else layer
        arrays = shared.keys, shared.values, of, slots, plan.shared, *(shared.prefix or ())
        options |= dict(shared=attention_shared.shared_sums(q, *arrays, **capped))
    return decode(q, keys, values, layer, plan, **options, scales=tuple(scales or ()))


make_plan = plan  # `attention` has an argument of its name


def _check_shared(shape, shared_keys, shared_values, slots, prefix, window):
    """shape: of the keys."""
    layers, rows, heads, _, d = shape
    fits = shared_keys.ndim == 5 and (*shared_keys.shape[:1], *shared_keys.shape[2::2]) == (layers, heads, d)
    if not fits or shared_keys.shape != shared_values.shape or rows % shared_keys.shape[1] or slots.shape != (rows,):
        raise ValueError(f"attention: shared keys {shared_keys.shape}, values {shared_values.shape} and slots {slots.shape} beside keys "
                         f"{shape}; they should be [L, N, Hkv, P, D], N a divisor of the rows, and [B]")
    if {shared_keys.dtype, shared_values.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"attention on Hopper: shared keys {shared_keys.dtype}, values {shared_values.dtype}; only bfloat16")
    front = () if prefix is None else prefix
    if {(a.shape[:3], a.shape[3] % PIECE, a.shape[4], a.dtype) for a in front} - {((layers, 1, heads), 0, d, shared_keys.dtype)}:
        raise ValueError(f"attention: a prefix {[f'{a.dtype}{a.shape}' for a in front]} in front of shared keys {shared_keys.shape}; it should be "
                         f"[L, 1, Hkv, F, D] with F a multiple of {PIECE}")
    if 0 in (*shared_keys.shape, *(size for a in front for size in a.shape)):
        raise NotImplementedError(f"attention on Hopper: shared keys {shared_keys.shape} and a prefix {[a.shape for a in front]} hold no slots")
    if window is not None:
        raise NotImplementedError("attention on Hopper: a window over slots that rows share")
