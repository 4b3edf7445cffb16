"""Models in Flax NNX that read Hugging Face configs; one file an architecture, each with its registration."""

from nvfp4jax.models import deepseek_v3, llama, qwen2, qwen3  # noqa: F401  (each registers its family)
from nvfp4jax.models.cache import CacheArray, LayerCache
from nvfp4jax.models.family import Family, architectures, build, family_of, register
from nvfp4jax.models.llama import Llama, LlamaConfig
from nvfp4jax.models.protocol import Decoder, Output
from nvfp4jax.models.qwen3 import Qwen3, Qwen3Config
from nvfp4jax.models.stacking import depths, stack_layers, stack_state, unstack_layers, unstack_state

__all__ = [
    "CacheArray", "Decoder", "Family", "LayerCache", "Llama", "LlamaConfig", "Output", "Qwen3", "Qwen3Config",
    "architectures", "build", "depths", "family_of", "register", "stack_layers", "stack_state",
    "unstack_layers", "unstack_state",
]  # fmt: skip
