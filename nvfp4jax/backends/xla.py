"""The operations in plain XLA, for any device, and what an operation is asked: the reference that the kernels are held to.

An implementation takes arrays, a `Spec` of what is static and a `Scaling` of what is not. Activations and weights are decoded to
bfloat16, exactly, and multiplied with float32 accumulation; the experts' weights one at a time.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nvfp4jax import array as nvfp4_array
from nvfp4jax import routing
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a matmul: how the activation is quantized, and who is asked to compute."""

    scaling: str | None
    four_over_six: str | None
    weight_four_over_six: str | None
    out_dtype: jnp.dtype
    implementation: str | tuple[str, ...] | None
    name: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaling:
    """The arrays that go with a mode: a given amax, the mask of rows that count, a static input scale."""

    amax: Array | None = None
    valid: Array | None = None
    input_scale: Array | None = None


def quantize_activation(
    x: Array | NVFP4Array, spec: Spec, scaling: Scaling, group_sizes: Array | None = None
) -> tuple[Array, Array | None]:
    """x -> (operand, row scale): the decoded qvalue * scale and the global scale (f32 [] or [..., 1]), or (x, None).

    The operand is bfloat16, in which qvalue * scale is exact, so that a matmul of two operands errs only by accumulation.
    """
    if isinstance(x, NVFP4Array):
        return x.dequantize_blocks(), x.global_scale
    if spec.scaling is None:
        return x, None
    if spec.scaling == "static":
        input_scale = scaling.input_scale
        if group_sizes is not None and input_scale.ndim == 1:
            input_scale = input_scale[scaling_modes.group_ids(group_sizes, x.shape[0])][:, None]
        q = nvfp4_array.quantize_static(x, input_scale, four_over_six=spec.four_over_six)
    else:
        amax = scaling.amax
        if amax is None and spec.scaling == "expert":
            amax = scaling_modes.expert_amax(x, group_sizes, scaling.valid)
        elif amax is None:
            amax = scaling_modes.activation_amax(x, spec.scaling, scaling.valid)
        q = nvfp4_array.quantize_with_amax(
            x, jnp.asarray(amax, jnp.float32), pow2=spec.scaling == "tensor_pow2", four_over_six=spec.four_over_six
        )
    return q.dequantize_blocks(), q.global_scale


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
    return lax.dot_general(operand, weight, dims, precision=precision, preferred_element_type=jnp.float32)


def scaled(acc: Array, *scales: Array | None) -> Array:
    """acc times each scale in turn: their product alone may leave float32's range."""
    for scale in scales:
        if scale is not None:
            acc = acc * scale.reshape((1,) * (acc.ndim - scale.ndim) + scale.shape)
    return acc


def matmul(x, w: NVFP4Array, bias, spec: Spec, scaling: Scaling) -> Array:
    operand, row_scale = quantize_activation(x, spec, scaling)
    w = w.select()
    acc = scaled(dot(operand, w.dequantize_blocks()), row_scale, w.aligned_global_scale.reshape(-1))
    if bias is not None:
        acc = acc + bias.astype(jnp.float32).reshape((1,) * (acc.ndim - 1) + bias.shape)
    return acc.astype(spec.out_dtype)


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


def grouped_matmul(x, w: NVFP4Array, group_sizes, spec: Spec, scaling: Scaling) -> Array:
    operand, row_scale = quantize_activation(x, spec, scaling, group_sizes)

    def weight_of(e):
        weight = one_expert(w, e)
        return weight.dequantize_blocks(), weight.global_scale.reshape(-1)

    return scaled(grouped(operand, group_sizes, w.shape[1], weight_of), row_scale).astype(spec.out_dtype)


def grouped_swiglu(x, w: NVFP4Array, group_sizes, spec: Spec, scaling: Scaling) -> Array:
    """w [E, 2, I, K], gate first -> silu(x gate^T) * (x up^T), in float32 until the last rounding."""
    wide = dataclasses.replace(spec, out_dtype=jnp.dtype(jnp.float32))
    gate, up = jnp.split(grouped_matmul(x, merge_halves(w), group_sizes, wide, scaling), 2, -1)
    return (jax.nn.silu(gate) * up).astype(spec.out_dtype)


def merge_halves(w: NVFP4Array) -> NVFP4Array:
    """[E, 2, I, K] -> [E, 2 I, K]."""
    flat = lambda v: v.reshape(*v.shape[:-3], v.shape[-3] * v.shape[-2], v.shape[-1])  # noqa: E731
    scale = w.aligned_global_scale
    if scale.shape[-3:] != (1, 1, 1):
        scale = jnp.broadcast_to(scale, (*scale.shape[:-3], *w.packed.shape[-3:-1], 1))
    return NVFP4Array(flat(w.packed), flat(w.scale), flat(scale), w.layer)


def quantize(x, amax, valid, spec: Spec) -> NVFP4Array:
    return nvfp4_array.quantize(x, scaling=spec.scaling, four_over_six=spec.four_over_six, amax=amax, valid=valid)


def quantize_weight(w, spec: Spec) -> NVFP4Array:
    return nvfp4_array.quantize_weight(w, four_over_six=spec.weight_four_over_six)


def top_k_experts(logits, k: int, normalize: bool) -> tuple[Array, Array]:
    return routing.top_k_experts(logits, k, normalize=normalize)


def experts(
    x, expert_ids, weights, gate_up: NVFP4Array, down: NVFP4Array, spec: Spec, scalings, products=(grouped_swiglu, grouped_matmul)
) -> Array:
    """products: the two grouped products, for who differentiates through them."""
    first, second = products
    route = routing.route(expert_ids, gate_up.shape[0])
    scalings = [s if s.valid is None else dataclasses.replace(s, valid=s.valid[route.token_of_row]) for s in scalings]
    h = first(x[route.token_of_row], gate_up, route.group_sizes, spec, scalings[0])
    y = second(h, down, route.group_sizes, spec, scalings[1])
    return routing.combine(y, route, weights, out_dtype=spec.out_dtype)
