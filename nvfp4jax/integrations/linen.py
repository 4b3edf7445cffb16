"""NVFP4 for Linen modules and MaxText-style code: three functions with the signatures that such code already takes.

    nn.Dense(512, dot_general=linen.dot_general)                                   # also DenseGeneral, MultiHeadDotProductAttention
    nn.Dense(512, dot_general=functools.partial(linen.dot_general, scaling="tensor"))
    linen.einsum("BTD,DNH->BTNH", x, kernel)                                       # for jnp.einsum(...)
    linen.ragged_dot(rows, kernels, group_sizes)                                   # for jax.lax.ragged_dot

Weights stay the float params of the module and are quantized in each call, to the bits of `quantize_model`, so training and scoring run
the rollout's forward; gradients pass straight through the rounding. Memory is saved by an NNX model only, whose layers hold
packed weights (`nvfp4jax.quantize_model`).
"""

import math
import operator
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nvfp4jax import arguments, ops
from nvfp4jax import array as nvfp4_array
from nvfp4jax import scaling as modes
from nvfp4jax.array import NVFP4Array
from nvfp4jax.layers.linear import einsum_letters, einsum_operands, merged_last, spelled_out
from nvfp4jax.ops import Implementation
from nvfp4jax.scaling import FourOverSix, Name, Scaling

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: DimensionNumbers,
    precision: object = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    scaling: Name | Scaling | None = "token",
    weight_four_over_six: FourOverSix | None = None,
    implementation: Implementation = None,
    name: str = "linen.dot_general",
) -> Float[Array, "..."]:
    """`lax.dot_general` of an activation and a weight in NVFP4, accumulated in float32.

    lhs: the activation; rhs: the weight. Each quantized along its contracted axes, whose product is a multiple of 16. scaling: of
    the activation, see `nvfp4jax.scaling`; None leaves it as it is. weight_four_over_six: as in `nvfp4jax.Rule`. precision: None or
    default. Returns [free axes of lhs, free axes of rhs] in preferred_element_type, lhs's dtype where that is None.
    ValueError for batch axes (attention's own products stay in floating point), and as `ops.matmul` has them.
    """
    arguments.array(f"{name}: lhs", lhs, "float")
    arguments.array(f"{name}: rhs", rhs, "float")
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = _axes(dimension_numbers, name)
    if lhs_batch or rhs_batch:
        raise ValueError(f"{name}: batch axes {tuple(lhs_batch)}, {tuple(rhs_batch)} of {lhs.shape} and {rhs.shape}: a weight has none; experts go "
                         "through ragged_dot, a product of two activations through lax.dot_general")  # fmt: skip
    if precision not in (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT, lax.Precision.DEFAULT)):
        raise ValueError(f"{name}: precision={precision}: NVFP4 has one; leave it None")
    _check_contracted((lhs, lhs_contract), (rhs, rhs_contract), ("lhs", "rhs"), f"dimension_numbers={dimension_numbers}", name)
    x, w = merged_last(lhs, lhs_contract), merged_last(rhs, rhs_contract)
    features = w.shape[:-1]
    mode = modes.parse(scaling, name, experts=False)
    valid = modes.current_valid(x, name) if modes.reads_valid(mode) else None
    y = ops.matmul(
        x, _weight(w.reshape(math.prod(features), -1), weight_four_over_six, implementation, name), scaling=mode, valid=valid,
        out_dtype=preferred_element_type, implementation=implementation, name=name,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], *features)


def einsum(
    einsum_str: str,
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."],
    *,
    precision: object = None,
    preferred_element_type: DTypeLike | None = None,
    scaling: Name | Scaling | None = "token",
    weight_four_over_six: FourOverSix | None = None,
    implementation: Implementation = None,
    name: str = "linen.einsum",
) -> Float[Array, "..."]:
    """`jnp.einsum(einsum_str, inputs, kernel)` in NVFP4; the rest as in `dot_general`.

    ValueError for a string that is no plain matmul of an activation and a weight, as `quantize_model` has it for an Einsum.
    """
    if not isinstance(einsum_str, str) or not re.fullmatch(r"[A-Za-z. ]+,[A-Za-z ]+->[A-Za-z. ]+", einsum_str):
        raise ValueError(f"{name}: einsum_str={str(einsum_str)[:40]!r}: a string for two operands, with their result, is needed: 'BTD,DNH->BTNH'")
    arguments.array(f"{name}: inputs", inputs, "float")
    arguments.array(f"{name}: kernel", kernel, "float")
    lhs, out = spelled_out(einsum_str, inputs.ndim)
    kernel_letters = einsum_operands(einsum_str)[1]
    features, contracted = einsum_letters(einsum_str, name)
    if len(lhs) != inputs.ndim or len(kernel_letters) != kernel.ndim:
        raise ValueError(f"{name}: inputs {inputs.shape} and kernel {kernel.shape} do not fit {einsum_str!r}")
    if sorted(out) != sorted([*(c for c in lhs if c not in contracted), *features]):
        raise ValueError(f"{name}: einsum_str={einsum_str!r}: the result needs each axis of inputs and kernel that is not contracted, once")
    axes = [lhs.index(c) for c in contracted], [kernel_letters.index(c) for c in contracted]
    _check_contracted((inputs, axes[0]), (kernel, axes[1]), ("inputs", "kernel"), f"einsum_str={einsum_str!r}", name)
    y = dot_general(
        inputs, kernel, (axes, ((), ())), precision, preferred_element_type,
        scaling=scaling, weight_four_over_six=weight_four_over_six, implementation=implementation, name=name,
    )  # fmt: skip
    letters = [*(c for c in lhs if c not in contracted), *features]
    return y.transpose([letters.index(c) for c in out])


def ragged_dot(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    precision: object = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    scaling: Name | Scaling | None = "token",
    weight_four_over_six: FourOverSix | None = None,
    implementation: Implementation = None,
    name: str = "linen.ragged_dot",
) -> Float[Array, "M N"]:
    """`lax.ragged_dot` in NVFP4: rows sorted by expert, each times the kernel of its own. The rest as in `dot_general`.

    scaling: "expert" as well, one amax an expert. Rows past the last group give zeros.
    """
    if precision not in (None, lax.Precision.DEFAULT):
        raise ValueError(f"{name}: precision={precision}: NVFP4 has one; leave it None")
    arguments.array(f"{name}: lhs", lhs, "float", ("M", "K"))
    arguments.array(f"{name}: rhs", rhs, "float", ("E", "K", "N"))
    _check_contracted((lhs, [1]), (rhs, [1]), ("lhs", "rhs"), "ragged_dot", name)
    mode = modes.parse(scaling, name, experts=True)
    valid = modes.current_valid(lhs, name) if modes.reads_valid(mode) else None
    w = _weight(jnp.swapaxes(rhs, 1, 2), weight_four_over_six, implementation, name)
    return ops.grouped_matmul(
        lhs, w, group_sizes, scaling=mode, valid=valid, out_dtype=preferred_element_type, implementation=implementation, name=name
    )


def _axes(dimension_numbers: Any, name: str) -> list[list[list[int]]]:
    """[contracted, batch], each [axes of lhs, axes of rhs]. ValueError for what lax.dot_general does not take either."""
    try:
        pairs = [[[operator.index(axis) for axis in axes] for axes in pair] for pair in dimension_numbers]
    except TypeError:
        pairs = []
    if [len(pair) for pair in pairs] != [2, 2]:
        raise ValueError(f"{name}: dimension_numbers={str(dimension_numbers)[:80]}: ((contracted of lhs, of rhs), ((), ())) is needed")
    return pairs


def _check_contracted(lhs: tuple[Array, Sequence[int]], rhs: tuple[Array, Sequence[int]], names: tuple[str, str], what: str, name: str) -> None:
    """A ValueError unless two arrays fit together along the axes of each that are contracted; names: of the arrays. what: says which axes."""
    sizes = []
    for (x, axes), array in zip((lhs, rhs), names, strict=True):
        if len({a % max(x.ndim, 1) for a in axes}) != len(axes) or not axes or not all(-x.ndim <= a < x.ndim for a in axes):
            raise ValueError(f"{name}: {what}: {array} of shape {tuple(x.shape)} has no such axes to contract, each once")
        sizes.append([x.shape[a] for a in axes])
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name}: {what}: {names[0]} of shape {tuple(lhs[0].shape)} and {names[1]} of shape {tuple(rhs[0].shape)} differ in the "
                         f"contracted sizes, {sizes[0]} and {sizes[1]}")  # fmt: skip
    nvfp4_array.check_k(math.prod(sizes[1]), f"{name}: {names[1]}", rhs[0].shape)


def _weight(w: Array, four_over_six: FourOverSix | None, implementation: Implementation, name: str) -> NVFP4Array:
    return ops.quantize_weight(w, four_over_six=four_over_six, implementation=implementation, name=f"{name}: weight")
