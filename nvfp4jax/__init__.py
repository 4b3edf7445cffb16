"""NVFP4 for JAX: quantization with an online activation scale, Flax layers, GPU kernels, and a jitted rollout."""

from nvfp4jax.array import NVFP4Array
from nvfp4jax.calibration import calibrate
from nvfp4jax.checkpoint import CheckpointError, load_model
from nvfp4jax.layers import (
    Experts,
    NVFP4Einsum,
    NVFP4Experts,
    NVFP4Linear,
    NVFP4LinearGeneral,
)
from nvfp4jax.ops import experts, grouped_matmul, grouped_swiglu, matmul, quantize
from nvfp4jax.rollout import Rollout, generate
from nvfp4jax.scaling import valid_rows
from nvfp4jax.swap import Rule, quantize_model, quantize_params, register, with_scaling

__all__ = [
    "CheckpointError",
    "Experts",
    "NVFP4Array",
    "NVFP4Einsum",
    "NVFP4Experts",
    "NVFP4Linear",
    "NVFP4LinearGeneral",
    "Rollout",
    "Rule",
    "calibrate",
    "experts",
    "generate",
    "grouped_matmul",
    "grouped_swiglu",
    "load_model",
    "matmul",
    "quantize",
    "quantize_model",
    "quantize_params",
    "register",
    "valid_rows",
    "with_scaling",
]
