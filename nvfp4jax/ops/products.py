"""Products of an activation with weights, dense and grouped, and their gradients."""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments
from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.backends import xla
from nvfp4jax.ops.choice import Activation, Backend, Implementation, backend_named, check_implementation, first_of, read_by
from nvfp4jax.ops.quantizing import check_valid, quantize_activation, quantize_weight, traced
from nvfp4jax.scaling import Name, Scaling


@dataclasses.dataclass(frozen=True)
class How:
    """What is static about a product."""

    out_dtype: jnp.dtype
    implementation: tuple[Backend, ...] | Backend | None
    name: str


def no_cotangent(tree):
    """Zero cotangents: float0 for integers, zeros for floats."""

    def zero(v):
        if jnp.issubdtype(v.dtype, jnp.floating):
            return jnp.zeros_like(v)
        return np.zeros(v.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _cotangent(a: QuantizedActivation, dx: Array) -> QuantizedActivation:
    return dataclasses.replace(no_cotangent(a), source=_like(dx.astype(a.source.dtype), a.source))


def _like(x: Array, wanted: Array) -> Array:
    """x, on explicit mesh axes split as `wanted` is."""
    sharding = jax.typeof(wanted).sharding
    return x if sharding.mesh.empty or jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def _decoded(a: QuantizedActivation) -> Array:
    """f32: the values that a product reads."""
    return xla.scaled(backend_named(a.backend).natural(a.operand).astype(jnp.float32), a.row_scale)


def split_source(w: NVFP4Array) -> tuple[NVFP4Array, Array | None]:
    return dataclasses.replace(w, source=None), w.source


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(how: How, a: QuantizedActivation, w: NVFP4Array, source: Array | None, bias: Array | None, residual: Array | None) -> Array:
    return first_of(how.name, how.implementation, lambda backend: backend.matmul(read_by(backend, a), w, bias, how.out_dtype, residual))


def _matmul_fwd(how, *args):
    *saved, residual = args
    return _matmul(how, *args), (*saved, residual is not None)


def _matmul_bwd(how, saved, dy):
    *saved, added = saved
    return *_matmul_cotangents(*saved, dy.astype(jnp.float32)), dy if added else None


def _matmul_cotangents(a, w: NVFP4Array, source: Array | None, bias: Array | None, dy: Array) -> tuple:
    """Of a, w [N, K], source and bias, for f32 dy [M, N]."""
    da = _cotangent(a, xla.dot(dy, w.dequantize(jnp.float32).T))
    dsource = None if source is None else _like(xla.dot(dy.T, _decoded(a).T).astype(source.dtype), source)
    return da, no_cotangent(w), dsource, None if bias is None else dy.sum(0).astype(bias.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmuls(how: How, a: QuantizedActivation, ws: tuple, sources: tuple, biases: tuple) -> tuple[Array, ...]:
    return first_of(how.name, how.implementation, lambda backend: backend.matmuls(read_by(backend, a), ws, biases, how.out_dtype))


def _matmuls_bwd(how, saved, dys):
    a, *members = saved
    each = (_matmul_cotangents(a, *member, dy.astype(jnp.float32)) for *member, dy in zip(*members, dys, strict=True))
    das, *rest = zip(*each, strict=True)
    da = dataclasses.replace(das[0], source=functools.reduce(jnp.add, [da.source for da in das]))
    return da, *rest


_matmuls.defvjp(lambda how, *args: (_matmuls(how, *args), args), _matmuls_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_product(how: How, a, w: NVFP4Array, source: Array | None, group_sizes: Array) -> Array:
    return first_of(how.name, how.implementation, lambda backend: backend.grouped_matmul(read_by(backend, a), w, group_sizes, how.out_dtype))


def _grouped_fwd(how, a, w, source, group_sizes):
    return grouped_product(how, a, w, source, group_sizes), (a, w, source, group_sizes)


def _grouped_bwd(how, saved, dy):
    return _grouped_cotangents(*saved, dy.astype(jnp.float32))


def _grouped_cotangents(a, w: NVFP4Array, source: Array | None, group_sizes, dy: Array) -> tuple:
    """Of a, w [E, N, K], source and group_sizes, for f32 dy [M, N]."""
    dx = xla.grouped(dy, group_sizes, w.shape[-1], lambda e: (xla.one_expert(w, e).dequantize(jnp.float32).T, None))
    dsource = None if source is None else _grouped_dw(dy, _decoded(a), group_sizes).reshape(source.shape).astype(source.dtype)
    return _cotangent(a, dx), no_cotangent(w), dsource, no_cotangent(group_sizes)


def _grouped_dw(dy: Array, rows: Array, group_sizes: Array) -> Array:
    """f32 [E, N, K]: sum over a group's rows of dy^T x."""
    ids = scaling_modes.group_ids(group_sizes, dy.shape[0])
    dy, rows = (scaling_modes.within(y, group_sizes) for y in (dy, rows))

    def group(e):
        mine = jnp.where((ids == e)[:, None], dy, jnp.float32(0))
        return xla.dot(mine.T, rows.T)

    return lax.map(group, jnp.arange(group_sizes.shape[0], dtype=ids.dtype))


grouped_product.defvjp(_grouped_fwd, _grouped_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu_product(how: How, a, w: NVFP4Array, source: Array | None, group_sizes: Array) -> Array:
    return first_of(how.name, how.implementation, lambda backend: backend.grouped_swiglu(read_by(backend, a), w, group_sizes, how.out_dtype))


def _swiglu_fwd(how, a, w, source, group_sizes):
    return swiglu_product(how, a, w, source, group_sizes), (a, w, source, group_sizes)


def _swiglu_bwd(how, saved, dy):
    a, w, source, group_sizes = saved
    flat = xla.merge_halves(w)
    both = xla.grouped_matmul(read_by(xla, a), flat, group_sizes, jnp.dtype(jnp.float32))
    _, silu_vjp = jax.vjp(lambda both: jax.nn.silu(both[:, : both.shape[1] // 2]) * both[:, both.shape[1] // 2 :], both)
    da, _, dsource, dsizes = _grouped_cotangents(a, flat, source, group_sizes, silu_vjp(dy.astype(jnp.float32))[0])
    return da, no_cotangent(w), dsource, dsizes


swiglu_product.defvjp(_swiglu_fwd, _swiglu_bwd)


def check_weight(x: Activation, w: NVFP4Array | Array, rank: int, name: str) -> None:
    if not isinstance(x, NVFP4Array | QuantizedActivation):
        arguments.array(f"{name}: x", x, "float", ("...", "K"))
    if not isinstance(w, NVFP4Array):
        arguments.array(f"{name}: weight", w)
    if w.ndim != rank:
        raise ValueError(f"{name}: the weight of shape {tuple(w.shape)} needs {rank} axes")
    nvfp4_array.check_k(w.shape[-1], f"{name}: weight", w.shape)
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} and weight of shape {tuple(w.shape)} differ in K, their last axis")


def _check_grouped(x: Activation, w: NVFP4Array | Array, group_sizes: Array, rank: int, name: str) -> None:
    check_weight(x, w, rank, name)
    if len(x.shape) != 2:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} needs two axes, rows sorted by group and K")
    arguments.array(f"{name}: group_sizes", group_sizes, "int")
    if group_sizes.shape != (w.shape[0],):
        raise ValueError(f"{name}: group_sizes of shape {group_sizes.shape} needs one entry for each of the {w.shape[0]} groups")
    # Traced sizes have no values yet: there, kernels leave out the rows that x does not have.
    if not isinstance(group_sizes, jax.core.Tracer) and getattr(group_sizes, "is_fully_addressable", True):
        total = int(np.asarray(group_sizes).sum(dtype=np.int64))
        if total > x.shape[0]:
            raise ValueError(f"{name}: group_sizes add up to {total} rows, x has {x.shape[0]}")


def _read(x: Activation, scaling, valid, implementation, name: str, group_sizes=None) -> QuantizedActivation:
    """What a product reads of x: x quantized here as `scaling` says, unless it is quantized already."""
    scaling_modes.parse(scaling, name, experts=group_sizes is not None)
    if valid is not None:
        check_valid(valid, x, name)
    if isinstance(x, QuantizedActivation):
        return x
    if isinstance(x, NVFP4Array):
        value = dataclasses.replace(x, source=None)

        def made(backend: ModuleType) -> QuantizedActivation:
            lead = x.shape[:-1]
            rows = lambda v: v.reshape(-1, v.shape[-1])  # noqa: E731
            scale = value.global_scale if value.global_scale.ndim == 0 else rows(jnp.broadcast_to(value.global_scale, (*lead, 1)))
            operand, row_scale = backend.packed(NVFP4Array(rows(value.packed), rows(value.scale), scale))
            operand = operand.reshape(x.shape)
            row_scale = row_scale.reshape(*lead, 1) if row_scale.ndim else row_scale
            return QuantizedActivation(operand, row_scale, operand if x.source is None else x.source, None, backend.NAME)

        return first_of(name, implementation, made)
    return quantize_activation(x, scaling, valid=valid, group_sizes=group_sizes, implementation=implementation, name=name)


def _flat(a: QuantizedActivation) -> QuantizedActivation:
    """Leading axes into one."""
    rows = lambda v: v.reshape(-1, v.shape[-1])  # noqa: E731
    row_scale = rows(a.row_scale) if a.row_scale is not None and a.row_scale.ndim else a.row_scale
    return dataclasses.replace(a, operand=rows(a.operand), row_scale=row_scale, source=rows(a.source), carried=None)


def flat_residual(residual: Array | None, shape: tuple[int, ...], how: How) -> Array | None:
    if residual is None:
        return None
    arguments.array(f"{how.name}: residual", residual)
    if residual.shape != shape or residual.dtype != how.out_dtype:
        raise ValueError(f"{how.name}: residual is {residual.dtype}{residual.shape}; the result is {how.out_dtype}{shape}")
    return residual.reshape(-1, shape[-1])


def how_of(x: Activation, out_dtype: DTypeLike | None, implementation: Implementation, name: str) -> How:
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if isinstance(x, NVFP4Array) else x.dtype
    else:
        out_dtype = arguments.dtype(f"{name}: out_dtype", out_dtype)
    return How(jnp.dtype(out_dtype), check_implementation(implementation), name)


def matmul(
    x: Activation,
    w: NVFP4Array | Float[Array, "N K"],
    *,
    scaling: Name | Scaling | None = "tensor",
    bias: Float[Array, "N"] | None = None,
    residual: Float[Array, "... N"] | None = None,
    valid: Bool[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "matmul",
) -> Float[Array, "... N"]:
    """x [..., K] times w [N, K] transposed, both in NVFP4, accumulated in float32.

    x: float, quantized here as `scaling` says (see `nvfp4jax.scaling`; None leaves it as it is), a QuantizedActivation, or an NVFP4Array.
    w: an NVFP4Array [N, K], or a float array, which `quantize_weight` quantizes here.
    valid: bool x.shape[:-1], rows that count in an amax. bias: [N], added in float32. out_dtype: x's by default (bfloat16 for an NVFP4Array).
    residual: out_dtype [..., N], added to the rounded result, the sum rounded again; in the same launch where the backend can.
    ValueError for shapes that do not fit, NotImplementedError from a named implementation that cannot do it.
    """
    check_weight(x, w, 2, name)
    if bias is not None:
        arguments.array(f"{name}: bias", bias, "float", w.shape[:1])
    how = how_of(x, out_dtype, implementation, name)
    residual = flat_residual(residual, (*x.shape[:-1], w.shape[0]), how)
    w, source = split_source(_weight(w, how))
    a = _read(x, scaling, valid, how.implementation, name)
    return _matmul(how, _flat(a), w, source, bias, residual).reshape(*a.shape[:-1], w.shape[0])


def matmuls(
    a: QuantizedActivation,
    ws: Sequence[NVFP4Array],
    *,
    biases: Sequence[Float[Array, "_"] | None] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "matmuls",
) -> tuple[Float[Array, "..."], ...]:
    """`matmul` of one activation with several weights [N_j, K], in one launch where the backend can: q, k and v, or gate and up.

    biases: [N_j] or None, for each weight. On Hopper a result's bits depend on the widths of the others, which is why a model makes the
    same call in prefill, decode and training.
    """
    for w in ws:
        check_weight(a, w, 2, name)
    how = how_of(a, out_dtype, implementation, name)
    weights, sources = zip(*map(split_source, ws), strict=True)
    ys = _matmuls(how, _flat(a), weights, sources, tuple(biases or (None,) * len(ws)))
    return tuple(y.reshape(*a.shape[:-1], w.shape[0]) for y, w in zip(ys, ws, strict=True))


def _weight(w: NVFP4Array | Array, how: How) -> NVFP4Array:
    return w if isinstance(w, NVFP4Array) else quantize_weight(w, implementation=how.implementation, name=f"{how.name}: weight")


def _swiglu_weight(w: NVFP4Array | Array, how: How) -> NVFP4Array:
    """[E, 2, I, K] with one global scale an expert, shared by gate and up: [E, 1, 1, 1]."""
    if isinstance(w, NVFP4Array):
        return w
    q = _weight(w.reshape(w.shape[0], -1, w.shape[-1]), how)
    split = lambda v: v.reshape(*w.shape[:-1], v.shape[-1])  # noqa: E731
    return NVFP4Array(split(q.packed), split(q.scale), q.global_scale[..., None], source=traced(w))


def grouped_matmul(
    x: Activation,
    w: NVFP4Array | Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    scaling: Name | Scaling | None = "tensor",
    valid: Bool[Array, "M"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "grouped_matmul",
) -> Float[Array, "M N"]:
    """Rows sorted by group, each times the weight of its group: out[i] = x[i] w[group(i)]^T.

    group_sizes: i32 [E], rows of each group, in order; rows past their sum give zeros.
    scaling: as in `matmul`, and "expert", one amax a group; the scale of a `Static` is f32 [] or [E]. w's global scale: [E, 1, 1].
    """
    _check_grouped(x, w, group_sizes, 3, name)
    how = how_of(x, out_dtype, implementation, name)
    w, source = split_source(_weight(w, how))
    a = _read(x, scaling, valid, how.implementation, name, group_sizes)
    return scaling_modes.within(grouped_product(how, _flat(a), w, source, group_sizes), group_sizes)


def grouped_swiglu(
    x: Activation,
    w: NVFP4Array | Float[Array, "E 2 I K"],
    group_sizes: Int[Array, "E"],
    *,
    scaling: Name | Scaling | None = "tensor",
    valid: Bool[Array, "M"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    name: str = "grouped_swiglu",
) -> Float[Array, "M I"]:
    """silu(x gate^T) * (x up^T) for each row's group, w holding gate then up; the gated half of a mixture of experts.

    w: [E, 2, I, K], gate and up of an expert sharing one global scale, [E, 1, 1, 1]. The rest as in `grouped_matmul`.
    """
    _check_grouped(x, w, group_sizes, 4, name)
    if w.shape[1] != 2:
        raise ValueError(f"{name}: weight of shape {tuple(w.shape)}; [E, 2, I, K] is needed, gate and up")
    how = how_of(x, out_dtype, implementation, name)
    w, source = split_source(_swiglu_weight(w, how))
    a = _read(x, scaling, valid, how.implementation, name, group_sizes)
    return scaling_modes.within(swiglu_product(how, _flat(a), w, source, group_sizes), group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _float_matmul(how: How, transposed: bool, x: Array, kernel: Array) -> Array:
    return first_of(how.name, how.implementation, lambda backend: backend.float_matmul(x, kernel, how.out_dtype, transposed))


def _float_matmul_bwd(how, transposed, saved, dy):
    return jax.vjp(lambda x, kernel: xla.float_matmul(x, kernel, how.out_dtype, transposed), *saved)[1](dy)


_float_matmul.defvjp(lambda how, transposed, x, kernel: (_float_matmul(how, transposed, x, kernel), (x, kernel)), _float_matmul_bwd)


def float_matmul(
    x: Float[Array, "... K"],
    kernel: Float[Array, "A B"],
    *,
    transposed: bool = False,
    out_dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
    name: str = "float_matmul",
) -> Float[Array, "... N"]:
    """x times a kernel [K, N] that is kept in floating point (a head, a router, a layer that a rule skips), products exact, accumulated
    in float32.

    transposed: the kernel lies [N, K], as an embedding that is the head too.
    On Hopper, in bfloat16, the bits of a row depend on nothing but the row and the kernel.
    """
    if kernel.ndim != 2 or x.shape[-1] != kernel.shape[transposed]:
        wanted = "[N, K]" if transposed else "[K, N]"
        raise ValueError(f"{name}: x of shape {tuple(x.shape)} and a kernel of shape {tuple(kernel.shape)}; [..., K] and {wanted} are needed")
    how = How(jnp.dtype(out_dtype), check_implementation(implementation), name)
    y = _float_matmul(how, transposed, x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[0 if transposed else 1])
