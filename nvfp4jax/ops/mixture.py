"""Mixtures of experts: a router's choice, and the experts behind it."""

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments, routing
from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends import xla
from nvfp4jax.ops.choice import Implementation, check_implementation, first_of
from nvfp4jax.ops.products import How, check_weight, flat_residual, grouped_product, how_of, no_cotangent, split_source, swiglu_product
from nvfp4jax.ops.quantizing import check_valid, flat_rows, quantize_activation, resolved
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Name, Scaling

_SPLIT = "the sort is over all tokens: replicate them, or take top_k_experts"


def _of_tokens(valid: Array | None, x: Array, name: str) -> Array | None:
    """The mask of x's tokens, bool [T]."""
    if valid is None:
        return None
    check_valid(valid, x, name)
    return valid.reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _top_k_experts(k: int, normalize: bool, implementation, logits) -> tuple[Array, Array]:
    return first_of("top_k_experts", implementation, lambda backend: backend.top_k_experts(logits, k, normalize))


def _top_k_experts_fwd(k, normalize, implementation, logits):
    weights, ids = _top_k_experts(k, normalize, implementation, logits)
    return (weights, ids), (logits, ids)


def _top_k_experts_bwd(k, normalize, implementation, saved, dy):
    logits, ids = saved

    def chosen(logits):
        weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids, -1)
        return weights / weights.sum(-1, keepdims=True) if normalize else weights

    return jax.vjp(chosen, logits)[1](dy[0])


_top_k_experts.defvjp(_top_k_experts_fwd, _top_k_experts_bwd)


def top_k_experts(
    logits: Float[Array, "... E"], k: int, *, normalize: bool, implementation: Implementation = None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """A router's choice: (weights f32 [..., k], ids i32 [..., k]) of the k likeliest of E experts, in falling order.

    logits: float32 [..., E]. weights: their softmax over all experts; normalize: divided by its sum over the k. Of equal ones the
    lower id comes first. ValueError for other dtypes or k > E.
    """
    return _top_k_experts(k, normalize, check_implementation(implementation), logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _choose_and_route(k: int, normalize: bool, implementation, logits, valid) -> tuple[Array, Array, Routing]:
    return first_of("choose_and_route", implementation, lambda backend: backend.choose_and_route(logits[None], len(logits), k, normalize, valid))


def _choose_and_route_fwd(k, normalize, implementation, logits, valid):
    out = _choose_and_route(k, normalize, implementation, logits, valid)
    return out, (logits, out[1])


def _choose_and_route_bwd(k, normalize, implementation, saved, dy):
    return *_top_k_experts_bwd(k, normalize, implementation, saved, dy), None


_choose_and_route.defvjp(_choose_and_route_fwd, _choose_and_route_bwd)


def choose_and_route(
    logits: Float[Array, "... E"], k: int, *, normalize: bool, valid: Bool[Array, "..."] | None = None, implementation: Implementation = None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"], Routing]:
    """`top_k_experts`, and the sort of its ids for `experts`: (weights, ids, route). On Hopper one launch up to 128 tokens, else two.

    logits: float32 [..., E], of T tokens in all. valid: bool [...]; a token where it is False is chosen for like any other, and
    sorted to no expert. route: token_of_row i32 [T * k], row_of_slot i32 [T, k], -1 for tokens that are not valid, group_sizes
    i32 [E]. ValueError for other dtypes, k > E, or tokens that a mesh axis splits.
    """
    routing.check_top_k(logits, k)
    rows = logits.reshape(-1, logits.shape[-1])
    nvfp4_array.check_unsplit(rows, range(1), "choose_and_route: logits", _SPLIT)
    valid = _of_tokens(valid, logits, "choose_and_route")
    weights, ids, route = _choose_and_route(k, normalize, check_implementation(implementation), rows, valid)
    return weights.reshape(*logits.shape[:-1], k), ids.reshape(*logits.shape[:-1], k), route


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _choose_experts(k: int, normalize: bool, implementation, x, kernel, valid) -> tuple[Array, Array, Routing]:
    parts = first_of("choose_experts", implementation, lambda backend: backend.logits_in_parts(x, kernel))
    return first_of("choose_experts", implementation, lambda backend: backend.choose_and_route(parts, len(x), k, normalize, valid))


def _choose_experts_fwd(k, normalize, implementation, x, kernel, valid):
    out = _choose_experts(k, normalize, implementation, x, kernel, valid)
    return out, (x, kernel, out[1])


def _choose_experts_bwd(k, normalize, implementation, saved, dy):
    x, kernel, ids = saved
    logits, product_vjp = jax.vjp(lambda x, kernel: xla.float_matmul(x, kernel, jnp.dtype(jnp.float32)), x, kernel)
    return *product_vjp(*_top_k_experts_bwd(k, normalize, implementation, (logits, ids), dy)), None


_choose_experts.defvjp(_choose_experts_fwd, _choose_experts_bwd)


def choose_experts(
    x: Float[Array, "... K"],
    kernel: Float[Array, "K E"],
    k: int,
    *,
    normalize: bool,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "... k"], Int[Array, "... k"], Routing]:
    """`choose_and_route` of `float_matmul(x, kernel)`, a router's kernel: on Hopper two launches up to 128 tokens, else three."""
    if kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"choose_experts: x of shape {tuple(x.shape)} and a kernel of shape {tuple(kernel.shape)}; [..., K] and [K, E] are needed")
    rows = x.reshape(-1, x.shape[-1])
    nvfp4_array.check_unsplit(rows, range(1), "choose_experts: x", _SPLIT)
    valid = _of_tokens(valid, x, "choose_experts")
    weights, ids, route = _choose_experts(k, normalize, check_implementation(implementation), rows, kernel, valid)
    return weights.reshape(*x.shape[:-1], k), ids.reshape(*x.shape[:-1], k), route


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(how: How, rows: Array, route: Routing, weights: Array, residual: Array | None) -> Array:
    return first_of(how.name, how.implementation, lambda backend: backend.combine(rows, route, weights, how.out_dtype, residual))


def _combine_fwd(how, rows, route, weights, residual):
    return _combine(how, rows, route, weights, residual), (rows, route, weights, residual is not None)


def _combine_bwd(how, saved, dy):
    rows, route, weights, added = saved
    _, vjp = jax.vjp(lambda rows, weights: routing.combine(rows, route, weights, out_dtype=how.out_dtype), rows, weights)
    drows, dweights = vjp(dy)
    return drows, no_cotangent(route), dweights, dy if added else None


_combine.defvjp(_combine_fwd, _combine_bwd)


def experts(
    x: Float[Array, "T H"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: NVFP4Array,
    down: NVFP4Array,
    *,
    scaling: Name | Scaling | None | tuple[Scaling | None, Scaling | None] = "token",
    valid: Bool[Array, "T"] | None = None,
    residual: Float[Array, "T H"] | None = None,
    route: Routing | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "experts",
) -> Float[Array, "T H"]:
    """A mixture of gated experts after its router: sort, gate and up, SwiGLU, down, and the weighted sum over a token's experts.

    expert_ids: i32 [T, k]; weights: f32 [T, k]. gate_up [E, 2, I, H], gate first, one global scale an expert; down [E, H, I].
    scaling: of both activations, x and the SwiGLU output, or a pair, one each. valid: bool [T]; a token where it is False counts in no
    amax and goes to no expert: its sum is zero. The sum runs in slot order, in float32. residual: out_dtype [T, H], added to the
    rounded sum. route: of these expert_ids and this mask, where `choose_and_route` gave them; otherwise they are sorted here.
    """
    options = dict(out_dtype=out_dtype, implementation=implementation, name=name)
    return experts_carrying(x, expert_ids, weights, gate_up, down, valid, scaling=scaling, counted=valid, residual=residual, route=route,
                            **options)[0]  # fmt: skip


def ragged_dot(
    rows: Float[Array, "M K"], kernel: Float[Array, "E K N"], group_sizes: Int[Array, "E"], *, implementation: Implementation = None
) -> Float[Array, "M N"]:
    """Rows sorted by group, each times its group's kernel, which is kept in floating point: `jax.lax.ragged_dot`, or on Hopper, in bfloat16,
    tokamax's Mosaic kernel where it is installed. A row's bits may depend on the others. Gradients are those of the one that runs."""
    if kernel.ndim != 3 or rows.shape[1:] != kernel.shape[1:2] or group_sizes.shape != kernel.shape[:1]:
        raise ValueError(f"ragged_dot: rows {rows.shape}, kernel {kernel.shape} and group_sizes {group_sizes.shape}; [M, K], [E, K, N] and [E] are needed")
    call = lambda backend: backend.ragged_dot(rows, kernel, group_sizes)  # noqa: E731
    return first_of("ragged_dot", check_implementation(implementation), call)


def check_routed(
    x: Any, expert_ids: Any, weights: Any, valid: Any, route: Any, name: str, num_experts: int, hidden: int | str = "H"
) -> None:
    """A ValueError unless x [T, hidden], expert_ids [T, k], weights [T, k], valid [T] and the route of them fit together; hidden: a size, or
    a letter."""
    arguments.array(f"{name}: x", x, "float", ("T", hidden))
    arguments.array(f"{name}: expert_ids", expert_ids, "int", (x.shape[0], "k"))
    arguments.array(f"{name}: weights", weights, "float", expert_ids.shape)
    if valid is not None:
        check_valid(valid, x, name)
    if route is not None:
        shapes = (expert_ids.size,), expert_ids.shape, (num_experts,)
        if not isinstance(route, Routing) or [(jnp.shape(x), jnp.result_type(x)) for x in route] != [(shape, jnp.int32) for shape in shapes]:
            raise ValueError(f"{name}: route: {arguments.shown(route)}; a Routing of i32 arrays of shapes {shapes} is needed")


def experts_carrying(
    x, expert_ids, weights, gate_up: NVFP4Array, down: NVFP4Array, valid, *, scaling, counted, residual, route, out_dtype, implementation, name
) -> tuple[Array, tuple[Any, Any]]:
    """`experts`, and what the two modes carry into the next call. counted: `valid` where a mode reads it."""
    modes = scaling if isinstance(scaling, tuple) else (scaling, scaling)
    if len(modes) != 2:
        raise ValueError(f"{name}: scaling: {len(modes)} modes; one is needed, or a pair")
    modes = tuple(scaling_modes.parse(mode, name) for mode in modes)
    for what, w in (("gate_up", gate_up), ("down", down)):
        if not isinstance(w, NVFP4Array):
            raise ValueError(f"{name}: {what}: an NVFP4Array is needed, not {arguments.shown(w)}")
    check_routed(x, expert_ids, weights, valid, route, name, gate_up.shape[0])
    check_weight(x, gate_up, 4, f"{name}: gate_up")
    if gate_up.shape[1] != 2:
        raise ValueError(f"{name}: gate_up of shape {gate_up.shape}; [E, 2, I, H] is needed")
    if down.ndim != 3 or down.shape[0] != gate_up.shape[0] or down.shape[1:] != (gate_up.shape[3], gate_up.shape[2]):
        raise ValueError(f"{name}: down of shape {down.shape} does not fit gate_up of shape {gate_up.shape}")
    how = how_of(x, out_dtype, implementation, name)
    residual = flat_residual(residual, x.shape, how)
    if route is None:
        route = first_of(name, how.implementation, lambda backend: backend.route(expert_ids.astype(jnp.int32), gate_up.shape[0], valid))
    of_rows = scaling_modes.in_groups(route.group_sizes, route.token_of_row.size)
    of_rows = of_rows if counted is None else of_rows & counted[route.token_of_row]
    options = dict(implementation=how.implementation, name=name, group_sizes=route.group_sizes)
    if scaling_modes.by_group(modes[0]):
        first = quantize_activation(x[route.token_of_row], modes[0], valid=of_rows, **options)
    else:
        # A token is quantized before it is copied to its experts' rows.
        first = _routed(x, modes[0], counted, route, how)
    up = swiglu_product(how, dataclasses.replace(first, carried=None), *split_source(gate_up), route.group_sizes)
    second = quantize_activation(up, modes[1], valid=of_rows, **options)
    y = grouped_product(how, dataclasses.replace(second, carried=None), *split_source(down), route.group_sizes)
    return _combine(how, y, route, weights, residual), (first.carried, second.carried)


def _routed(x: Array, mode: Scaling | None, valid: Array | None, route: Routing, how: How) -> QuantizedActivation:
    """x [T, H] quantized, and handed out to the rows of its experts: [T * k, H]."""
    _, value, valid = flat_rows(lax.stop_gradient(x), valid, how.name)
    request, carried = (None, None) if mode is None else resolved(mode, value, valid, None, how.name)

    def made(backend: ModuleType) -> QuantizedActivation:
        operand, row_scale = backend.activation(value, request, route)
        return QuantizedActivation(operand, row_scale, x[route.token_of_row], carried, backend.NAME)

    return first_of(how.name, how.implementation, made)
