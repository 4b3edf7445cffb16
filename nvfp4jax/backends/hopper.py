"""The operations on Hopper GPUs, by the kernels of `nvfp4jax.kernels`: same signatures as their twins in `xla`.

A kernel reads an activation as its decoded operand (qvalue * scale in bfloat16, K permuted) and a row scale, and the weight in
the checkpoint's own layout. NotImplementedError says what a kernel does not support.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nvfp4jax import scaling as scaling_modes
from nvfp4jax.array import NVFP4Array
from nvfp4jax.backends.xla import Scaling, Spec
from nvfp4jax.kernels.hopper import dense, grouped, routing
from nvfp4jax.kernels.hopper import quantize as quantizer
from nvfp4jax.kernels.hopper.mosaic import permute_k


def operand(x, spec: Spec, scaling: Scaling, group_sizes=None, route: routing.Routing | None = None) -> tuple[jax.Array, jax.Array]:
    """x [M, K] -> (operand bf16 [M, K], K permuted; row scale f32 [] or [M, 1]). route: of tokens to the rows of their experts; the
    results are those rows, [M * k, K]. A token is quantized once, and stored k times."""
    rows = None if route is None else route.row_of_slot
    gathered = lambda x: x if route is None else x[route.token_of_row]  # noqa: E731
    if isinstance(x, NVFP4Array):
        row_scale = x.global_scale
        if row_scale.ndim not in (0, 2):
            raise NotImplementedError(f"{spec.name}: a global scale of shape {row_scale.shape}")
        return permute_k(x.dequantize_blocks()), row_scale
    if spec.scaling is None:
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f"{spec.name}: {x.dtype} activations without quantization; the kernels multiply bfloat16")
        return permute_k(gathered(x)), jnp.float32(1)
    if spec.scaling == "static":
        scale = scaling.input_scale
        if scale.ndim:  # one an expert, given to each of its rows; their sort comes first
            x, rows = gathered(x), None
            scale = scale[scaling_modes.group_ids(group_sizes, x.shape[0])][:, None]
        return quantizer.operand(x, four_over_six=spec.four_over_six, global_scale=scale, rows=rows)
    mode, amax = spec.scaling, scaling.amax
    if mode == "expert":  # one amax an expert, given to each of its rows; their sort comes first
        x, rows = gathered(x), None
        mode, amax = "token", scaling_modes.expert_amax(x, group_sizes, scaling.valid) if amax is None else amax
    valid = scaling.valid if mode != "token" else None
    return quantizer.operand(x, scaling=mode, four_over_six=spec.four_over_six, amax=amax, valid=valid, rows=rows)


def _flat(x, spec: Spec, scaling: Scaling) -> tuple:
    """Leading axes into one."""
    lead = x.shape[:-1]
    if isinstance(x, NVFP4Array):
        rows = lambda v: v.reshape(-1, v.shape[-1])  # noqa: E731
        scale = x.global_scale if x.global_scale.ndim == 0 else rows(jnp.broadcast_to(x.global_scale, (*lead, 1)))
        return NVFP4Array(rows(x.packed), rows(x.scale), scale), scaling, lead
    row = lambda v: v if v is None or v.ndim == 0 else v.reshape(-1, 1)  # noqa: E731
    valid = None if scaling.valid is None else scaling.valid.reshape(-1)
    return x.reshape(-1, x.shape[-1]), Scaling(row(scaling.amax), valid, scaling.input_scale), lead


def _global_scale(w: NVFP4Array, axes: int) -> jax.Array:
    """The global scales of a weight with `axes` leading axes of experts: f32 [(L)] or [(L), E]."""
    lead = w.packed.shape[: axes + (w.layer is not None)]
    scale = w.aligned_global_scale
    if any(size > 1 for size in scale.shape[len(lead) :]):
        raise NotImplementedError(f"global scales of shape {w.global_scale.shape} for a weight of shape {w.shape}: one a matrix is supported")
    return jnp.broadcast_to(scale.reshape(scale.shape[: len(lead)]), lead)


def quantize(x, amax, valid, spec: Spec) -> NVFP4Array:
    flat, scaling, lead = _flat(x, spec, Scaling(amax, valid))
    packed, scale, global_scale = quantizer.quantize(
        flat, scaling=spec.scaling, four_over_six=spec.four_over_six, amax=scaling.amax, valid=scaling.valid
    )
    wide = lambda v: v.reshape(*lead, v.shape[-1])  # noqa: E731
    return NVFP4Array(wide(packed), wide(scale), wide(global_scale) if global_scale.ndim else global_scale)


def quantize_weight(w, spec: Spec) -> NVFP4Array:
    return NVFP4Array(*quantizer.quantize_weight(w.astype(jnp.bfloat16), four_over_six=spec.weight_four_over_six))


def matmul(x, w: NVFP4Array, bias, spec: Spec, scaling: Scaling) -> jax.Array:
    x, scaling, lead = _flat(x, spec, scaling)
    rows, row_scale = operand(x, spec, scaling)
    y = dense.matmul(
        rows, row_scale, w.packed, w.scale, _global_scale(w, 0), bias=bias, out_dtype=spec.out_dtype, layer=w.layer
    )
    return y.reshape(*lead, y.shape[-1])


def _inside(y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeros past the last group, where the kernels leave what they found."""
    return jnp.where((jnp.arange(y.shape[0], dtype=jnp.int32) < group_sizes.sum())[:, None], y, jnp.zeros((), y.dtype))


def grouped_matmul(x, w: NVFP4Array, group_sizes, spec: Spec, scaling: Scaling) -> jax.Array:
    rows, row_scale = operand(x, spec, scaling, group_sizes)
    y = grouped.matmul(
        rows, row_scale, w.packed, w.scale, _global_scale(w, 1), group_sizes, out_dtype=spec.out_dtype, layer=w.layer
    )
    return _inside(y, group_sizes)


def grouped_swiglu(x, w: NVFP4Array, group_sizes, spec: Spec, scaling: Scaling) -> jax.Array:
    _bfloat16_result(spec)
    rows, row_scale = operand(x, spec, scaling, group_sizes)
    y = grouped.gate_up(rows, row_scale, w.packed, w.scale, _global_scale(w, 1), group_sizes, layer=w.layer)
    return _inside(y, group_sizes)


def top_k_experts(logits, k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    return routing.top_k_experts(logits, k, normalize=normalize)


def _bfloat16_result(spec: Spec) -> None:
    if spec.out_dtype != jnp.bfloat16:
        raise NotImplementedError(f"{spec.name}: a result in {spec.out_dtype}; gate and up give bfloat16")


def experts(x, expert_ids, weights, gate_up: NVFP4Array, down: NVFP4Array, spec: Spec, scalings) -> jax.Array:
    """A token is quantized before it is copied to its experts' rows: a tensor's amax runs over the tokens."""
    _bfloat16_result(spec)
    first, second = scalings
    route = routing.route(expert_ids, gate_up.shape[0])
    of_rows = lambda s: s if s.valid is None else dataclasses.replace(s, valid=s.valid[route.token_of_row])  # noqa: E731
    first = of_rows(first) if spec.scaling == "expert" else first
    rows, row_scale = operand(x, spec, first, route.group_sizes, route)
    h = grouped.gate_up(
        rows, row_scale, gate_up.packed, gate_up.scale, _global_scale(gate_up, 1), route.group_sizes, layer=gate_up.layer
    )
    rows, row_scale = operand(h, spec, of_rows(second), route.group_sizes)
    y = grouped.matmul(
        rows, row_scale, down.packed, down.scale, _global_scale(down, 1), route.group_sizes, layer=down.layer
    )
    return routing.combine(y, route, weights, out_dtype=spec.out_dtype)
