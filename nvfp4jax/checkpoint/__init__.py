"""Checkpoints in and out: Hugging Face folders and Orbax folders."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from nvfp4jax.checkpoint import huggingface, orbax
from nvfp4jax.checkpoint.safetensors import CheckpointError

__all__ = ["CheckpointError", "load_model"]


def load_model(directory: str | Path, dtype: jnp.dtype = jnp.bfloat16, **options) -> nnx.Module:
    """A model from a Hugging Face folder (`huggingface.load_model`) or an Orbax folder of ours (`orbax.load_model`).

    options: scaling, scan_layers; for Hugging Face folders also rules. CheckpointError (a ValueError) names the file and tensor.
    """
    if orbax.exists(directory):
        return orbax.load_model(directory, dtype, **options)
    return huggingface.load_model(directory, dtype, **options)
