"""Qwen2 and Qwen2.5: a Llama whose q, k and v have a bias."""

from collections.abc import Mapping
from typing import Any

from nvfp4jax.models import family
from nvfp4jax.models.config import Keys
from nvfp4jax.models.llama import Llama, LlamaConfig


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads a config.json. ValueError, naming the key, for a missing one and for what this model does not compute."""
    keys = Keys(config)
    model_type = keys.get("model_type")
    if model_type != "qwen2":
        raise ValueError(f"config.json: model_type={str(model_type)[:80]!r} is not a Qwen2 ('qwen2')")
    keys.only("hidden_act", "silu")
    keys.only("use_mrope", False)
    keys.full_attention(keys.count("num_hidden_layers"))
    shape = LlamaConfig(**keys.decoder(), attention_bias=True)
    keys.done("Qwen2")
    return shape


family.register(
    family.Family(
        architectures=("Qwen2ForCausalLM",),
        model=Llama,
        read_config=read_config,
        shared=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    )
)
