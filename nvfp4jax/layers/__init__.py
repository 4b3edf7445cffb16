"""Flax NNX layers with NVFP4 weights, each made `from_float` of the layer it takes the place of.

A layer keeps three leaves a weight: packed codes, block scales, global scale; the weight is stored [N, K], contraction last, as
checkpoints have it. They are `NVFP4Param`s, no `nnx.Param`s: a trainer's optimizer and `nnx.grad` pass them by.

`scaling` says where the activation's scale comes from (`nvfp4jax.scaling`): a frozen value without arrays. What a mode carries from
call to call, a delayed layer's history, is state of the layer, an `InputAmax`, that moves with a model as BatchNorm's statistics do
(under jit by `nnx.jit`, or split, merged and handed back). `generate` hands it on. `nnx.view(model, scaling=...)` gives the same
weights in another mode.

A model makes an activation once for all the layers that read it: see `feed`, `feed_norm` and `feed_gated`.

Shapes below are without the leading axis that a stack of layers adds; see `layer_index`.
"""

from nvfp4jax.layers.converters import CONVERTERS, register
from nvfp4jax.layers.experts import Experts, NVFP4Experts, NVFP4Weight
from nvfp4jax.layers.feeding import RMSNorm, add_to, call_each, choose_experts, feed, feed_gated, feed_norm, project
from nvfp4jax.layers.linear import NVFP4Einsum, NVFP4Linear, NVFP4LinearGeneral, contracted_last
from nvfp4jax.layers.state import (
    WEIGHTS,
    AmaxHistory,
    InputAmax,
    InputCounts,
    InputScale,
    LargestAmax,
    NVFP4Param,
    NVFP4Source,
    is_abstract,
    note,
    quantize_weight,
    scaling_of,
    set_scaling,
    set_view,
    watch,
)

__all__ = [
    "AmaxHistory",
    "CONVERTERS",
    "Experts",
    "InputAmax",
    "InputCounts",
    "InputScale",
    "LargestAmax",
    "NVFP4Einsum",
    "NVFP4Experts",
    "NVFP4Linear",
    "NVFP4LinearGeneral",
    "NVFP4Param",
    "NVFP4Source",
    "NVFP4Weight",
    "RMSNorm",
    "WEIGHTS",
    "add_to",
    "call_each",
    "choose_experts",
    "contracted_last",
    "feed",
    "feed_gated",
    "feed_norm",
    "is_abstract",
    "note",
    "project",
    "quantize_weight",
    "register",
    "scaling_of",
    "set_scaling",
    "set_view",
    "watch",
]
