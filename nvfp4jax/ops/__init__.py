"""The operations, one public function each; `implementation=` picks who computes it.

implementation=None tries what suits the device and falls back to XLA, saying once why; a name fails loudly; a sequence is
tried in order. A backend raises NotImplementedError for what it does not support.

Every operation differentiates straight through its rounding: with y = x^ w^T on the decoded operands, dx = dy w^ and, where the
weight was quantized from a float array in the same trace, dw = dy^T x^.
"""

from nvfp4jax.ops.attending import SHARED_STEP, AttentionPlan, SharedRows, attention, attention_plan, rope_write
from nvfp4jax.ops.choice import BACKENDS, Activation, Backend, Implementation, check_implementation
from nvfp4jax.ops.mixture import check_routed, choose_and_route, choose_experts, experts, experts_carrying, ragged_dot, top_k_experts
from nvfp4jax.ops.products import float_matmul, grouped_matmul, grouped_swiglu, matmul, matmuls
from nvfp4jax.ops.quantizing import (
    check_valid,
    norm,
    quantize,
    quantize_activation,
    quantize_transposed,
    quantize_weight,
    rms_norm,
    silu_mul,
)

__all__ = [
    "Activation",
    "AttentionPlan",
    "BACKENDS",
    "Backend",
    "Implementation",
    "SHARED_STEP",
    "SharedRows",
    "attention",
    "attention_plan",
    "check_implementation",
    "check_routed",
    "check_valid",
    "choose_and_route",
    "choose_experts",
    "experts",
    "experts_carrying",
    "float_matmul",
    "grouped_matmul",
    "grouped_swiglu",
    "matmul",
    "matmuls",
    "norm",
    "quantize",
    "quantize_activation",
    "quantize_transposed",
    "quantize_weight",
    "ragged_dot",
    "rms_norm",
    "rope_write",
    "silu_mul",
    "top_k_experts",
]
