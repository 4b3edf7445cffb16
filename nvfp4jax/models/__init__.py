"""Models in Flax NNX that read Hugging Face configs; one file an architecture."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nvfp4jax.models.attention import KVCache
from nvfp4jax.models.qwen3 import Qwen3, Qwen3Config
from nvfp4jax.models.stacking import depths, stack_layers, stack_state, unstack_layers, unstack_state

__all__ = [
    "ARCHITECTURES", "KVCache", "Qwen3", "Qwen3Config", "build", "depths", "stack_layers", "stack_state",
    "unstack_layers", "unstack_state",
]  # fmt: skip

ARCHITECTURES = {"Qwen3ForCausalLM": (Qwen3, Qwen3Config), "Qwen3MoeForCausalLM": (Qwen3, Qwen3Config)}


def build(
    config: Mapping[str, Any],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    param_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """The model that a Hugging Face config.json describes, with random weights, or abstract where `rngs` is None.

    An abstract model holds ShapeDtypeStructs, for a loader to fill. ValueError for an architecture that is not in
    ARCHITECTURES, and for a config that the model cannot compute, naming the key.
    """
    names = config.get("architectures") or []
    known = [name for name in names if name in ARCHITECTURES]
    if not known:
        raise ValueError(f"config.json: architectures={str(names)[:80]} is not supported; known: {', '.join(ARCHITECTURES)}")
    cls, config_cls = ARCHITECTURES[known[0]]
    parsed = config_cls.from_hf(config)
    make = lambda rngs: cls(parsed, dtype=dtype, param_dtype=param_dtype, rngs=rngs)  # noqa: E731
    return nnx.eval_shape(lambda: make(nnx.Rngs(0))) if rngs is None else make(rngs)
