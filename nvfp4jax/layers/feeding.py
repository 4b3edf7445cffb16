"""An activation, made once for the layers that read it, and the layers called with it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as flax_dtypes
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments, numerics, ops
from nvfp4jax.array import QuantizedActivation
from nvfp4jax.layers.linear import NVFP4Linear
from nvfp4jax.layers.state import note, scaling_of, valid_of
from nvfp4jax.routing import Routing
from nvfp4jax.scaling import Static


def feed(x: Float[Array, "... K"], readers: Sequence[nnx.Module], valid: Bool[Array, "..."] | None = None) -> tuple:
    """What each of `readers`, layers that all read x, is to be called with.

    NVFP4 layers of equal scaling get one QuantizedActivation, the same object; a float layer, experts and layers that compute in
    another dtype get x. valid: bool x.shape[:-1], rows that count in an amax. Static layers are scaled by the largest of their scales.
    """
    arguments.array("feed: x", x, "float", ("...", "K"))
    return _feed("feed", readers, x, valid, lambda **options: ops.quantize_activation(x, **options))


def feed_norm(norm: nnx.Module, x: Float[Array, "... K"], readers: Sequence[nnx.Module], valid: Bool[Array, "..."] | None = None) -> tuple:
    """`feed` of norm(x), `norm` an `RMSNorm`: norm and quantization in one launch where the backend can."""
    arguments.module("feed_norm: norm", norm, RMSNorm)
    weight = norm.scale.get_value()
    arguments.array("feed_norm: x", x, "float", ("...", weight.shape[-1]))
    return _feed("feed_norm", readers, norm(x), valid, lambda **options: ops.rms_norm(x, weight.astype(x.dtype), norm.eps, **options))


def feed_gated(
    gate: Float[Array, "... K"], up: Float[Array, "... K"], readers: Sequence[nnx.Module], valid: Bool[Array, "..."] | None = None
) -> tuple:
    """`feed` of silu(gate) * up, in one launch where the backend can."""
    arguments.array("feed_gated: gate", gate, "float", ("...", "K"))
    arguments.array("feed_gated: up", up, "float", gate.shape)
    return _feed("feed_gated", readers, numerics.silu_mul(gate, up), valid, lambda **options: ops.silu_mul(gate, up, **options))


def _feed(what: str, readers: Sequence[nnx.Module], value: Array, valid: Array | None, make: Callable[..., QuantizedActivation]) -> tuple:
    if not arguments.items(f"{what}: readers", readers, nnx.Module, "layer"):
        raise ValueError(f"{what}: readers: no layer is given")
    if valid is not None:
        ops.check_valid(valid, value, what)
    for reader in readers:
        if type(reader) is NVFP4Linear and value.shape[-1] != reader.matrix_shape[1]:
            raise ValueError(f"{what}: x of shape {tuple(value.shape)} does not fit {reader.name}, which reads K={reader.matrix_shape[1]}")
    made: dict[Any, QuantizedActivation] = {}

    def given(reader: nnx.Module) -> Array | QuantizedActivation:
        if type(reader) is not NVFP4Linear or reader.compute_dtype(value.dtype) != value.dtype:
            return value
        key = (reader.scaling, reader.implementation)
        if key not in made:
            group = [r for r in readers if type(r) is NVFP4Linear and (r.scaling, r.implementation) == key]
            largest = None
            if isinstance(reader.scaling, Static) and len(group) > 1 and all(r.input_scale is not None for r in group):
                largest = jnp.stack([r.input_scale.get_value() for r in group]).max(0)
            mode = scaling_of(reader, "input", largest)
            made[key] = make(scaling=mode, valid=valid_of(reader, value, valid), implementation=reader.implementation, name=reader.name)
            for r in group:
                note(r, "input", made[key].carried)
        return made[key]

    return tuple(given(reader) for reader in readers)


def call_each(readers: Sequence[nnx.Module], given: Sequence[Array | QuantizedActivation]) -> tuple[Float[Array, "... N"], ...]:
    """Each of `readers` called with what `feed` gave it: NVFP4 layers that share an activation in one launch where the backend can.

    A plain `nnx.Linear` that computes in bfloat16 multiplies by `ops.float_matmul`: on Hopper a row's bits do not depend on the batch.
    """
    groups: dict[Any, list[int]] = {}
    for i, (reader, x) in enumerate(zip(readers, given, strict=True)):
        together = type(reader) is NVFP4Linear and isinstance(x, QuantizedActivation)
        key = (id(x), reader.out_dtype(x.dtype), reader.implementation, reader.layer_index is None) if together else i
        groups.setdefault(key, []).append(i)
    out: dict[int, Array] = {}
    for members in groups.values():
        first, x = readers[members[0]], given[members[0]]
        if len(members) == 1:
            out[members[0]] = _call(first, x)
            continue
        group = [readers[i] for i in members]
        biases = [None if r.bias is None else r.bias.get_value() for r in group]
        ys = ops.matmuls(x, [r.weight() for r in group], biases=biases, out_dtype=first.out_dtype(x.dtype),
                         implementation=first.implementation, name=", ".join(r.name for r in group))  # fmt: skip
        out.update(zip(members, ys, strict=True))
    return tuple(out[i] for i in range(len(readers)))


def add_to(x: Float[Array, "... N"], layer: nnx.Module, given: Array | QuantizedActivation) -> Float[Array, "... N"]:
    """x + layer(given), the residual sum in the layer's own launch where the backend can."""
    if type(layer) is NVFP4Linear and isinstance(given, QuantizedActivation) and layer.out_dtype(given.dtype) == x.dtype:
        return layer(given, residual=x)
    return numerics.add(x, _call(layer, given))


class RMSNorm(nnx.Module):
    """`numerics.rms_norm`: x over its root mean square, times `scale`, over the last axis; in x's dtype."""

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        return ops.norm(x, self.scale.get_value().astype(x.dtype), self.eps)


def _is_plain(layer: nnx.Module, x: Array | QuantizedActivation) -> bool:
    """Whether the layer is a product of floats, and a bias if there is one, and nothing else."""
    plain = type(layer) is nnx.Linear and layer.dot_general is lax.dot_general and layer.promote_dtype is flax_dtypes.promote_dtype
    return plain and not isinstance(x, QuantizedActivation)


def _is_product(layer: nnx.Module, x: Array | QuantizedActivation) -> bool:
    return _is_plain(layer, x) and layer.bias is None


def _call(layer: nnx.Module, x: Array | QuantizedActivation) -> Array:
    """layer(x), a plain one's product in bfloat16 by `ops.float_matmul`; the bias is added as Flax adds it."""
    if not _is_plain(layer, x):
        return layer(x)
    bias = None if layer.bias is None else layer.bias.get_value()
    values, kernel, bias = flax_dtypes.promote_dtype((x, layer.kernel.get_value(), bias), dtype=layer.dtype)
    if values.dtype != jnp.bfloat16:
        return layer(x)
    y = ops.float_matmul(values, kernel, out_dtype=layer.preferred_element_type or values.dtype, name="float layer")
    return y if bias is None else numerics.add(y, bias.reshape((1,) * (y.ndim - 1) + (-1,)))


def _narrowed(layer: nnx.Linear, x: Array) -> tuple[Array, Array]:
    """x and the kernel as the layer reads them: a narrower dtype rounds, a wider one would change no product."""
    dtype = None if layer.dtype is None else jnp.dtype(layer.dtype)
    narrow = lambda v: v if dtype is None or dtype.itemsize > v.dtype.itemsize else v.astype(dtype)  # noqa: E731
    return narrow(x), narrow(layer.kernel.get_value())


def project(layer: nnx.Module, x: Array | QuantizedActivation) -> Float[Array, "... N"]:
    """layer(x) in float32, for a head or a router. A plain `nnx.Linear` multiplies by `ops.float_matmul`: products exact, and on Hopper
    bits that do not depend on the batch."""
    if _is_product(layer, x):
        return ops.float_matmul(*_narrowed(layer, x), name="project")
    return _call(layer, x).astype(jnp.float32)


def choose_experts(
    router: nnx.Module, x: Array | QuantizedActivation, k: int, *, normalize: bool, valid: Bool[Array, "..."] | None = None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"], Routing]:
    """`ops.choose_and_route` of project(router, x): (weights, ids, route), what experts are called with, beside the same `valid`."""
    if _is_product(router, x):
        return ops.choose_experts(*_narrowed(router, x), k, normalize=normalize, valid=valid)
    return ops.choose_and_route(project(router, x), k, normalize=normalize, valid=valid)
