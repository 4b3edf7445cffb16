"""Values and activations to NVFP4, the norm and the SiLU in front of it."""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments, counting, numerics
from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends.operands import rows_of
from nvfp4jax.ops.choice import Implementation, check_implementation, first_of
from nvfp4jax.scaling import Name, Observed, Scaling, Static, Tensor, Token


def quantize(
    x: Float[Array, "... K"],
    scaling: Name | Token | Tensor | Static = "tensor",
    *,
    amax: Float[Array, "..."] | float | None = None,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
) -> NVFP4Array:
    """Quantizes to NVFP4, with a global scale computed from the values themselves (online) unless `scaling` is `Static(scale)`.

    x: float [..., K], K a multiple of 16.
    scaling: "tensor", "tensor_pow2", "token", or a value of `nvfp4jax.scaling`.
    amax: f32 [] or [..., 1], where a producer has computed it already.
    valid: bool x.shape[:-1]; rows where it is False take no part in the amax.

    A row that holds NaN or infinity decodes to NaN, alone. ValueError for K not a multiple of 16 or another mode. Gradients pass
    through `dequantize` and `matmul` as if nothing had been rounded.
    Contract: TransformerEngine's reference quantizer, to the bit, whoever computes it.
    """
    x = jnp.asarray(check_x(x, "quantize: x"))
    mode = scaling_modes.parse(scaling, "quantize", experts=False)
    if not isinstance(mode, Token | Tensor | Static) or (isinstance(mode, Static) and mode.scale is None):
        raise ValueError(f"quantize: scaling={scaling!r}: 'tensor', 'tensor_pow2', 'token' or Static(scale)")
    lead, flat, valid = flat_rows(lax.stop_gradient(x), valid, "quantize")
    request, _ = resolved(mode, flat, valid, None, "quantize")
    assert request is not None  # only calibration quantizes nothing
    if amax is not None:
        amax = jnp.asarray(_check_amax(amax, (*lead, 1)), jnp.float32)
        request = dataclasses.replace(request, amax=amax.reshape(-1, 1) if amax.ndim else amax, valid=None)
    q = first_of("quantize", check_implementation(implementation), lambda backend: backend.quantize(flat, request))
    wide = lambda v: v.reshape(*lead, v.shape[-1])  # noqa: E731
    global_scale = wide(q.global_scale) if q.global_scale.ndim else q.global_scale
    return NVFP4Array(wide(q.packed), wide(q.scale), global_scale, source=traced(x))


def quantize_weight(
    w: Float[Array, "... N K"],
    *,
    four_over_six: str | None = None,
    implementation: Implementation = None,
    name: str = "weight",
) -> NVFP4Array:
    """A weight [..., N, K] -> NVFP4 with one global scale for each [N, K] matrix: f32 [] or [..., 1, 1].

    Values are rounded to bfloat16 first, so that a trainer with float32 masters and a loader of the bfloat16 export get the
    same bits. NaN or infinity in a row gives that row NaN scales. four_over_six: None, "mae" or "mse" (arXiv 2512.02010).
    """
    arguments.array(name, w, "float", ("...", "N", "K"))
    nvfp4_array.check_k(w.shape[-1], name, w.shape)
    nvfp4_array.check_shards(w, name)
    scaling_modes.check_four_over_six(four_over_six, f"{name}: four_over_six")
    value = lax.stop_gradient(w)
    q = first_of(name, check_implementation(implementation), lambda backend: backend.quantize_weight(value, four_over_six))
    return dataclasses.replace(q, source=traced(w))


def quantize_transposed(
    ws: Sequence[Float[Array, "... K _"]],
    *,
    four_over_six: str | None = None,
    implementation: Implementation = None,
    name: str = "weight",
) -> NVFP4Array:
    """`quantize_weight` of weights that lie transposed, as trainers hold them; Hopper's kernel reads them where they lie (K a multiple of 64, N even).

    ws: one or several [..., K, N] of the same leading axes and K, whose rows come one after another and share a global scale, as an
    expert's gate and up do. -> NVFP4Array [..., sum of N, K], the bits of transposing first. Made inside a trace it has a source, the
    transposed floats: a jitted function that returns it writes them out, one that returns `dataclasses.replace(array, source=None)` not.
    """
    if not isinstance(ws, Sequence) or not ws:
        raise ValueError(f"{name}: ws: {arguments.shown(ws)}; a sequence of arrays [..., K, N] is needed")
    for w in ws:
        arguments.array(name, w, "float", ("...", "K", "N"))
        if w.shape[:-1] != ws[0].shape[:-1]:
            raise ValueError(f"{name}: weights of shapes {tuple(ws[0].shape)} and {tuple(w.shape)} share no leading axes and K")
        nvfp4_array.check_k(w.shape[-2], name, w.shape)
        nvfp4_array.check_shards(w, name, -2)
    scaling_modes.check_four_over_six(four_over_six, f"{name}: four_over_six")
    values = tuple(lax.stop_gradient(w) for w in ws)
    q = first_of(name, check_implementation(implementation), lambda backend: backend.quantize_transposed(values, four_over_six))
    return dataclasses.replace(q, source=rows_of(ws) if any(traced(w) is not None for w in ws) else None)


def quantize_activation(
    x: Float[Array, "... K"],
    scaling: Name | Scaling | None = "token",
    *,
    valid: Bool[Array, "..."] | None = None,
    group_sizes: Int[Array, "E"] | None = None,
    implementation: Implementation = None,
    name: str = "quantize_activation",
) -> QuantizedActivation:
    """An activation as matmuls read it, made once for all of them.

    x: float [..., K], K a multiple of 16. scaling: see `nvfp4jax.scaling`; None leaves x as it is. valid: bool x.shape[:-1], rows that
    count in an amax. group_sizes: i32 [E], where the rows of x [M, K] are sorted by expert and the mode asks whose a row is.
    """
    mode = scaling_modes.parse(scaling, name, experts=group_sizes is not None)
    check_x(x, f"{name}: x")
    if group_sizes is not None:
        arguments.array(f"{name}: group_sizes", group_sizes, "int", ("E",))
    return _activation(x, mode, valid, implementation, name, lambda backend, flat, request: backend.activation(flat, request), group_sizes)


def rms_norm(
    x: Float[Array, "... K"],
    weight: Float[Array, "K"],
    eps: float,
    scaling: Name | Scaling | None = "token",
    *,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
    name: str = "rms_norm",
) -> QuantizedActivation:
    """`quantize_activation` of `numerics.rms_norm(x, weight, eps)`, the norm in the same launch where the backend can."""
    mode = scaling_modes.parse(scaling, name, experts=False)
    eps = arguments.number(f"{name}: eps", eps, 0)
    check_x(x, f"{name}: x")
    arguments.array(f"{name}: weight", weight, "float", x.shape[-1:])
    value = lax.stop_gradient((x, weight))
    return _activation(
        numerics.rms_norm(x, weight, eps), mode, valid, implementation, name,
        lambda backend, flat, request: backend.rms_norm(value[0].reshape(flat.shape), value[1], eps, request),
    )  # fmt: skip


def silu_mul(
    gate: Float[Array, "... K"],
    up: Float[Array, "... K"],
    scaling: Name | Scaling | None = "token",
    *,
    valid: Bool[Array, "..."] | None = None,
    implementation: Implementation = None,
    name: str = "silu_mul",
) -> QuantizedActivation:
    """`quantize_activation` of `numerics.silu_mul(gate, up)`, silu(gate) * up, in the same launch where the backend can."""
    mode = scaling_modes.parse(scaling, name, experts=False)
    arguments.array(f"{name}: up", up, "float", check_x(gate, f"{name}: gate").shape)
    gate_value, up_value = lax.stop_gradient((gate, up))
    return _activation(
        numerics.silu_mul(gate, up), mode, valid, implementation, name,
        lambda backend, flat, request: backend.silu_mul(gate_value.reshape(flat.shape), up_value.reshape(flat.shape), request),
    )  # fmt: skip


def _activation(x, mode, valid, implementation, name, call, group_sizes=None) -> QuantizedActivation:
    """x, the float activation, quantized as `mode` says by call(backend, x [M, K], request); without a request XLA has made x."""
    lead, flat, valid = flat_rows(lax.stop_gradient(x), valid, name)
    request, carried = (None, None) if mode is None else resolved(mode, flat, valid, group_sizes, name)

    def made(backend: ModuleType) -> QuantizedActivation:
        operand, row_scale = backend.activation(flat, None) if request is None else call(backend, flat, request)
        row_scale = row_scale.reshape(*lead, 1) if row_scale is not None and row_scale.ndim else row_scale
        return QuantizedActivation(operand.reshape(x.shape), row_scale, x, carried, backend.NAME)

    return first_of(name, check_implementation(implementation), made)


def resolved(mode: Scaling, x: Array, valid: Array | None, group_sizes: Array | None, name: str) -> tuple:
    """`scaling.resolve`; ValueError where the mode lacks the array that it scales by, or has one that does not fit."""
    if isinstance(mode, Observed):
        request, carried = (None, None) if mode.mode is None else resolved(mode.mode, x, valid, group_sizes, name)
        return request, (carried, counting.counted(mode.counts, x, request, valid))
    field = scaling_modes.CARRIED.get(type(mode))
    if field is not None and getattr(mode, field) is None:
        way_out = {"scale": "without an input scale (see nvfp4jax.calibrate) an online mode runs: tensor, token",
                   "history": f"give f32 [{scaling_modes.HISTORY}], zeros at first", "largest": "give f32 [], zero at first"}  # fmt: skip
        raise ValueError(f"{name}: scaling: {type(mode).__name__} needs {field}; {way_out[field]}")
    shape = mode.scale.shape if isinstance(mode, Static) and mode.scale is not None else ()
    if shape and (group_sizes is None or shape != group_sizes.shape):
        groups = "a scale f32 []" if group_sizes is None else f"one for each of {group_sizes.shape[0]} groups, or f32 []"
        raise ValueError(f"{name}: scaling: a Static scale of shape {tuple(shape)}; {groups} is needed")
    return scaling_modes.resolve(mode, x, valid, group_sizes)


def flat_rows(x: Array, valid: Array | None, name: str) -> tuple[tuple[int, ...], Array, Array | None]:
    """(leading axes, x [M, K], valid [M])."""
    lead = x.shape[:-1]
    if valid is not None:
        check_valid(valid, x, name)
    return lead, x.reshape(-1, x.shape[-1]), None if valid is None else valid.reshape(-1)


def traced(x: Array) -> Array | None:
    """x, where a gradient may come back for it."""
    return x if isinstance(x, jax.core.Tracer) else None


def check_valid(valid: Any, x: Any, name: str) -> None:
    """A ValueError unless `valid` is a mask of x's rows: bool x.shape[:-1]."""
    arguments.array(f"{name}: valid", valid, "bool")
    if valid.shape != x.shape[:-1]:
        raise ValueError(f"{name}: valid has shape {tuple(valid.shape)}; x of shape {tuple(x.shape)} needs {tuple(x.shape[:-1])}")


def check_x(x: Any, what: str) -> Any:
    """x itself, floats [..., K] with K a multiple of 16."""
    arguments.array(what, x, "float", ("...", "K"))
    nvfp4_array.check_k(x.shape[-1], what, x.shape)
    nvfp4_array.check_shards(x, what)
    return x


def _check_amax(amax: Any, rows: tuple[int, ...]) -> Any:
    """An amax, of a whole or of each row."""
    if not hasattr(amax, "shape"):
        return arguments.number("quantize: amax", amax, 0)
    return arguments.array("quantize: amax", amax, "float", rows if amax.shape else ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(eps: float, implementation, x: Array, weight: Array) -> Array:
    return first_of("norm", implementation, lambda backend: backend.norm(x, weight, eps))


def _norm_bwd(eps, implementation, saved, dy):
    return jax.vjp(lambda x, weight: numerics.rms_norm(x, weight, eps), *saved)[1](dy)


_norm.defvjp(lambda eps, implementation, x, weight: (_norm(eps, implementation, x, weight), (x, weight)), _norm_bwd)


def norm(
    x: Float[Array, "... K"], weight: Float[Array, "K"], eps: float, *, implementation: Implementation = None
) -> Float[Array, "... K"]:
    """`numerics.rms_norm`, in one launch where the backend can: for readers that take a float."""
    return _norm(float(eps), check_implementation(implementation), x.reshape(-1, x.shape[-1]), weight).reshape(x.shape)
