"""NVFP4 for JAX: quantization with an online activation scale, Flax layers, GPU kernels, and a jitted rollout."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from nvfp4jax.array import NVFP4Array, QuantizedActivation
from nvfp4jax.calibration import calibrate
from nvfp4jax.layers import Experts, NVFP4Einsum, NVFP4Experts, NVFP4Linear, NVFP4LinearGeneral, feed, feed_gated, feed_norm, register
from nvfp4jax.ops import experts, grouped_matmul, grouped_swiglu, matmul, quantize, quantize_activation, rms_norm, silu_mul
from nvfp4jax.report import describe
from nvfp4jax.requantize import quantize_params, straight_through
from nvfp4jax.rollout import Rollout, generate, generate_text, logprobs
from nvfp4jax.scaling import Delayed, PerExpert, Static, Tensor, Token, valid_rows
from nvfp4jax.swap import Rule, quantize_model

if TYPE_CHECKING:
    from nvfp4jax.checkpoint import CheckpointError, load_model, save_model

__all__ = [
    "CheckpointError",
    "Delayed",
    "Experts",
    "NVFP4Array",
    "NVFP4Einsum",
    "NVFP4Experts",
    "NVFP4Linear",
    "NVFP4LinearGeneral",
    "PerExpert",
    "QuantizedActivation",
    "Rollout",
    "Rule",
    "Static",
    "Tensor",
    "Token",
    "calibrate",
    "describe",
    "experts",
    "feed",
    "feed_gated",
    "feed_norm",
    "generate",
    "generate_text",
    "grouped_matmul",
    "grouped_swiglu",
    "load_model",
    "logprobs",
    "matmul",
    "quantize",
    "quantize_activation",
    "quantize_model",
    "quantize_params",
    "register",
    "rms_norm",
    "save_model",
    "silu_mul",
    "straight_through",
    "valid_rows",
]


def __getattr__(name: str) -> Any:
    """Checkpoints bring Orbax with them: they are imported where they are first asked for. The version is pyproject.toml's."""
    if name == "__version__":
        try:
            return importlib.metadata.version("nvfp4jax")
        except importlib.metadata.PackageNotFoundError:
            raise AttributeError("nvfp4jax.__version__: the package is not installed, only its folder is on the path") from None
    if name in ("CheckpointError", "load_model", "save_model"):
        return getattr(importlib.import_module("nvfp4jax.checkpoint"), name)
    raise AttributeError(f"module 'nvfp4jax' has no attribute {name!r}")
