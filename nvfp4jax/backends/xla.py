"""The operations in plain XLA, for any device: the reference that the kernels are held to.

A backend is a module with these functions. Activations and weights are decoded to bfloat16, exactly, and multiplied with float32
accumulation; the experts' weights one at a time. NotImplementedError says what a backend does not support.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nvfp4jax import array as nvfp4_array
from nvfp4jax import fp8, numerics, routing
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends.operands import rows_of
from nvfp4jax.fp8 import FP8Array
from nvfp4jax.numerics import compiled
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Request

NAME = "xla"
_QUERIES = 256  # whose scores are held at once
Operand = tuple[Array, Array | None]  # what a matmul reads of an activation: (operand, row scale)


def quantize(x: Array, request: Request) -> NVFP4Array:
    """x [M, K] as `request` says."""
    return nvfp4_array.quantize(x, request)


def quantize_weight(w: Array, four_over_six: str | None) -> NVFP4Array:
    """w [..., N, K], one global scale a matrix."""
    return nvfp4_array.quantize_weight(w, four_over_six=four_over_six)


def quantize_transposed(ws: tuple[Array, ...], four_over_six: str | None) -> NVFP4Array:
    """ws [..., K, N], the rows of all of them one after another, one global scale a matrix."""
    return quantize_weight(rows_of(ws), four_over_six)


@compiled
def activation(x: Array, request: Request | None, route: Routing | None = None) -> Operand:
    """What a matmul reads of x [M, K]. request None: x as it is. route: of its tokens, to copy them to their experts' rows."""
    if request is None:
        operand, row_scale = x, None
    else:
        q = quantize(x, request)
        operand, row_scale = q.dequantize_blocks(), q.global_scale
    if route is None:
        return operand, row_scale
    rows = route.token_of_row
    return operand[rows], row_scale if row_scale is None or row_scale.ndim == 0 else row_scale[rows]


@compiled(static_argnames=("eps",))
def rms_norm(x: Array, weight: Array, eps: float, request: Request | None) -> Operand:
    """What a matmul reads of `numerics.rms_norm(x, weight, eps)`."""
    return activation(numerics.rms_norm(x, weight, eps), request)


@compiled
def silu_mul(gate: Array, up: Array, request: Request | None) -> Operand:
    """What a matmul reads of `numerics.silu_mul(gate, up)`."""
    return activation(numerics.silu_mul(gate, up), request)


@compiled
def packed(q: NVFP4Array) -> Operand:
    """What a matmul reads of an activation that is an NVFP4Array."""
    return q.dequantize_blocks(), q.global_scale


def natural(operand: Array) -> Array:
    """The operand with K in its natural order."""
    return operand


@compiled(static_argnames=("out_dtype",))
def matmul(a: QuantizedActivation, w: NVFP4Array, bias: Array | None, out_dtype: jnp.dtype, residual: Array | None = None) -> Array:
    """a [M, K] times w [N, K] transposed; residual: out_dtype [M, N], added to the rounded result."""
    w = w.select()
    acc = scaled(dot(a.operand, w.dequantize_blocks()), a.row_scale, w.aligned_global_scale.reshape(-1))
    if bias is not None:
        acc = acc + bias.astype(jnp.float32)[None]
    return acc.astype(out_dtype) if residual is None else residual + acc.astype(out_dtype)


@compiled(static_argnames=("out_dtype",))
def matmuls(a: QuantizedActivation, ws: tuple[NVFP4Array, ...], biases: tuple, out_dtype: jnp.dtype) -> tuple[Array, ...]:
    """a times each of several weights [N_j, K], with their biases."""
    return tuple(matmul(a, w, bias, out_dtype) for w, bias in zip(ws, biases, strict=True))


@compiled(static_argnames=("out_dtype",))
def grouped_matmul(a: QuantizedActivation, w: NVFP4Array, group_sizes: Array, out_dtype: jnp.dtype) -> Array:
    """a [M, K], rows sorted by group, each times its group's w [E, N, K] transposed; rows past the last group hold anything."""

    def weight_of(e):
        weight = one_expert(w, e)
        return weight.dequantize_blocks(), weight.global_scale.reshape(-1)

    return scaled(grouped(a.operand, group_sizes, w.shape[1], weight_of), a.row_scale).astype(out_dtype)


@compiled(static_argnames=("out_dtype",))
def grouped_swiglu(a: QuantizedActivation, w: NVFP4Array, group_sizes: Array, out_dtype: jnp.dtype) -> Array:
    """w [E, 2, I, K], gate first -> silu(a gate^T) * (a up^T), in float32 until the last rounding."""
    gate, up = jnp.split(grouped_matmul(a, merge_halves(w), group_sizes, jnp.dtype(jnp.float32)), 2, -1)
    return (jax.nn.silu(gate) * up).astype(out_dtype)


@compiled(static_argnames=("k", "normalize"))
def top_k_experts(logits: Array, k: int, normalize: bool) -> tuple[Array, Array]:
    return routing.top_k_experts(logits, k, normalize=normalize)


@compiled(static_argnames=("num_experts",))
def route(expert_ids: Array, num_experts: int, valid: Array | None) -> Routing:
    return routing.route(expert_ids, num_experts, valid)


def logits_in_parts(x: Array, kernel: Array) -> Array:
    """x [T, K] times a router's kernel [K, E] -> f32 [P, >= T, E], whose sum over the parts, from left to right, is the product."""
    return float_matmul(x, kernel, jnp.dtype(jnp.float32))[None]


@compiled(static_argnames=("tokens", "k", "normalize"))
def choose_and_route(parts: Array, tokens: int, k: int, normalize: bool, valid: Array | None) -> tuple[Array, Array, Routing]:
    """`top_k_experts` of what the parts, as of `logits_in_parts`, add up to, and `route` of its ids."""
    logits = functools.reduce(jnp.add, [part[:tokens] for part in parts])
    weights, ids = top_k_experts(logits, k, normalize)
    return weights, ids, route(ids, parts.shape[-1], valid)


@compiled(static_argnames=("out_dtype",))
def combine(rows: Array, route: Routing, weights: Array, out_dtype: jnp.dtype, residual: Array | None) -> Array:
    return routing.combine(rows, route, weights, out_dtype=out_dtype, residual=residual)


@compiled(static_argnames=("out_dtype", "transposed"))
def float_matmul(x: Array, kernel: Array, out_dtype: jnp.dtype, transposed: bool = False) -> Array:
    """x [M, K] times a float kernel [K, N], or one that lies [N, K]."""
    if transposed:
        return dot(x, kernel).astype(out_dtype)
    x, kernel = product_operands(x, kernel)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    kind = out_dtype if x.dtype == out_dtype else jnp.float32  # a result of the operands' dtype is rounded where it is summed
    return jnp.matmul(x, kernel, precision=precision, preferred_element_type=kind).astype(out_dtype)


def ragged_dot(rows: Array, kernel: Array, group_sizes: Array) -> Array:
    """rows [M, K], sorted by group, each times its group's float kernel [E, K, N], in their dtype."""
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return lax.ragged_dot(rows, kernel, group_sizes, precision=precision)


def norm(x: Array, weight: Array, eps: float) -> Array:
    return numerics.rms_norm(x, weight, eps)


@compiled(static_argnames=("between",))
def write_slots(into: Array, starts: Array, new: Array, layer: Array | None, between: int) -> Array:
    """new [B, T, ...] in slots starts[b] + t of into [(L,) B, ..., S, ...], `between` axes between rows and slots; tokens past the last
    slot are dropped."""
    batch, steps = new.shape[:2]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    slots = starts[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
    lead = () if layer is None else (layer,)
    at = into.at[(*lead, rows, *(slice(None),) * between, slots)]
    return at.set(new.astype(into.dtype), mode="drop", unique_indices=True)


def _write(into: Array | FP8Array, starts: Array, new: Array, layer: Array | None) -> Array | FP8Array:
    """new [B, T, Hkv, D] in its slots; of an FP8 cache, codes and scales."""
    return jax.tree.map(lambda x, y: write_slots(x, starts, y, layer, 1), into, fp8.quantize(new) if isinstance(into, FP8Array) else new)


def rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm) -> tuple[Array, Array | FP8Array, Array | FP8Array]:
    """norm: None, or (weight of q, weight of k, eps)."""
    if norm is not None:
        q, k = (numerics.rms_norm(x, weight, norm[2]) for x, weight in zip((q, k), norm[:2], strict=True))
    q, k = (numerics.rotate(x, cos, sin).astype(v.dtype) for x in (q, k))
    return q, _write(keys, starts, k, layer), _write(values, starts, v, layer)


def attention_plan(starts: Array, q: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct, window: int | None, shared: tuple | None) -> None:
    """Nothing that the layers of a step could share."""


def _joined(own: Array, shared: Array, slots: Array, prefix: Array | None) -> Array:
    """own [B, H, S, D] behind the first slots[b] of the shared row of row b, [N, H, P, D], and of the prefix in front of it, [1, H, F, D]
    -> [B, H, (F +) P + S, D]."""
    if prefix is not None:
        shared = jnp.concatenate([jnp.repeat(prefix, shared.shape[0], axis=0), shared], axis=2)
    shared = shared.astype(own.dtype)  # bfloat16 beside FP8 that was decoded to q's dtype
    first = jnp.pad(jnp.repeat(shared, own.shape[0] // shared.shape[0], axis=0), ((0, 0), (0, 0), (0, own.shape[2]), (0, 0)))
    place = (jnp.arange(first.shape[2], dtype=jnp.int32)[None] - slots[:, None])[:, None, :, None]
    rest = jnp.take_along_axis(own, jnp.maximum(place, 0), axis=2, mode="clip")
    return jnp.where(place < 0, first, rest)


@compiled(static_argnames=("scale", "window", "soft_cap"))
def attention(q, keys, values, starts, layer, scale, window, soft_cap, counts, plan, shared) -> Array:
    """Scores and softmax in float32, the products in q's dtype. Scores are held for some queries at a time, so that a long prompt does
    not hold T * S of them a head. What rows share is gathered for each: the sums are those of a cache of F + P + S slots a row. A layer's
    FP8 keys and values are decoded first."""
    del counts, plan

    def of_layer(x: Array | FP8Array) -> Array:
        x = x if layer is None else jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False), x)
        return x.dequantize(q.dtype) if isinstance(x, FP8Array) else x

    keys, values = of_layer(keys), of_layer(values)
    if shared is not None:
        shared_keys, shared_values, *prefix = (of_layer(x) for x in shared.arrays)
        first_keys, first_values = prefix or (None, None)
        pairs = (keys, shared_keys, shared.slots, first_keys), (values, shared_values, shared.slots, first_values)
        keys, values = lax.optimization_barrier(tuple(_joined(*x) for x in pairs))
    batch, steps, heads, head_dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def product(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, *product_operands(a, b), precision=precision, preferred_element_type=jnp.float32)

    def some(q: Array, at: Array) -> Array:
        """q [B, t, Hq, D], at [B, t], the slot of each."""
        grouped = q.reshape(batch, q.shape[1], kv_heads, heads // kv_heads, head_dim)
        scores = product("btkgd,bksd->bkgts", grouped, keys) * jnp.float32(scale)
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
        return out.astype(q.dtype).reshape(batch, q.shape[1], heads, values.shape[-1])

    at = starts[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
    if steps <= 2 * _QUERIES:
        return some(q, at)
    extra = -steps % _QUERIES
    blocks = lambda x: jnp.moveaxis(x.reshape(batch, x.shape[1] // _QUERIES, _QUERIES, *x.shape[2:]), 1, 0)  # noqa: E731
    q = blocks(jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0))))
    at = blocks(jnp.pad(at, ((0, 0), (0, extra))))
    out = jnp.moveaxis(lax.map(lambda part: some(*part), (q, at)), 0, 1)
    return out.reshape(batch, steps + extra, heads, out.shape[-1])[:, :steps]


# --- what they are made of, and the gradients of every backend ---------------------------------------------------------


def product_operands(*operands: Array) -> tuple[Array, ...]:
    """The operands of a product that accumulates in float32, as the backend takes them.

    XLA:CPU cannot run bfloat16 x bfloat16 -> float32 in every layout; in float32 the products are the same.
    """
    if jax.default_backend() == "cpu" or len({o.dtype for o in operands}) > 1:
        return tuple(o.astype(jnp.float32) for o in operands)
    return operands


def dot(operand: Array, weight: Array) -> Array:
    """[..., K] x [N, K] -> f32 [..., N], float32 accumulation; a float32 operand keeps its precision."""
    operand, weight = product_operands(operand, weight)
    precision = lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None
    dims = (((operand.ndim - 1,), (1,)), ((), ()))
    out = _summed(operand, weight)
    return lax.dot_general(operand, weight, dims, precision=precision, preferred_element_type=jnp.float32, out_sharding=out)


def _summed(operand: Array, weight: Array) -> jax.sharding.NamedSharding | None:
    """Where explicit mesh axes split K of both, jax asks what becomes of the partial sums: they are added, on every device."""
    a, b = (jax.typeof(x).sharding for x in (operand, weight))
    if a.mesh.empty or a.spec[-1] is None or a.spec[-1] != b.spec[-1]:
        return None
    return jax.sharding.NamedSharding(a.mesh, jax.sharding.PartitionSpec(*a.spec[:-1], *b.spec[:-1]))


def scaled(acc: Array, *scales: Array | None) -> Array:
    """acc times each scale in turn: their product alone may leave float32's range."""
    for scale in scales:
        if scale is not None:
            acc = acc * scale.reshape((1,) * (acc.ndim - scale.ndim) + scale.shape)
    return acc


def grouped(operand: Array, group_sizes: Array, out: int, weight_of: Callable[[Array], tuple[Array, Array | None]]) -> Array:
    """f32 [M, out]: each row times the [out, K] weight of its group. One group's weight is decoded at a time, empty groups
    cost nothing, and work grows with the rows: tiles of each group in turn."""
    m = operand.shape[0]
    tile = min(128, max(8, 1 << max(0, m - 1).bit_length()))
    padded = jnp.pad(operand, ((0, tile), (0, 0)))
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)

    def group(e, acc):
        end = ends[e]
        start = end - group_sizes[e].astype(jnp.int32)
        weight, scale = weight_of(e)

        def rows(carry):
            first, acc = carry
            y = scaled(dot(lax.dynamic_slice_in_dim(padded, first, tile), weight), scale)
            inside = (first + jnp.arange(tile, dtype=jnp.int32) < end)[:, None]
            old = lax.dynamic_slice_in_dim(acc, first, tile)
            return first + tile, lax.dynamic_update_slice_in_dim(acc, jnp.where(inside, y, old), first, 0)

        return lax.while_loop(lambda carry: carry[0] < end, rows, (start, acc))[1]

    def step(e, acc):
        return lax.cond(group_sizes[e] > 0, group, lambda e, acc: acc, e, acc)

    return lax.fori_loop(0, group_sizes.shape[0], step, jnp.zeros((m + tile, out), jnp.float32))[:m]


def one_expert(w: NVFP4Array, e: Array) -> NVFP4Array:
    """Expert e of [E, N, K]; its global scale is f32 [1, 1], or [N, 1] where each row has its own."""
    stacked = w.layer is not None
    scale = w.aligned_global_scale
    experts = w.packed.shape[: 1 + stacked]
    leaves = w.packed, w.scale, jnp.broadcast_to(scale, (*experts, *scale.shape[len(experts) :]))
    if not stacked:
        return NVFP4Array(*(lax.dynamic_index_in_dim(v, e, keepdims=False) for v in leaves))
    return NVFP4Array(*(lax.dynamic_slice(v, (w.layer, e, 0, 0), (1, 1, *v.shape[2:]))[0, 0] for v in leaves))


def merge_halves(w: NVFP4Array) -> NVFP4Array:
    """[E, 2, I, K] -> [E, 2 I, K]."""
    flat = lambda v: v.reshape(*v.shape[:-3], v.shape[-3] * v.shape[-2], v.shape[-1])  # noqa: E731
    scale = w.aligned_global_scale
    if scale.shape[-3:] != (1, 1, 1):
        scale = jnp.broadcast_to(scale, (*scale.shape[:-3], *w.packed.shape[-3:-1], 1))
    return NVFP4Array(flat(w.packed), flat(w.scale), flat(scale), w.layer)
