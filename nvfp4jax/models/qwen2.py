"""Qwen2 and Qwen2.5. Module paths are the Hugging Face tensor names with '/' and without 'model.'."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from nvfp4jax.models import family
from nvfp4jax.models.blocks import MLP, Attention, AttentionShape, DecoderConfig, Dtypes, Layer, Transformer
from nvfp4jax.models.config import Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """The shape of a Qwen2."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int


def read_config(config: Mapping[str, Any]) -> Qwen2Config:
    """Reads a config.json. ValueError, naming the key, for a missing one and for what this model does not compute."""
    keys = Keys(config)
    model_type = keys.get("model_type")
    if model_type != "qwen2":
        raise ValueError(f"config.json: model_type={str(model_type)[:80]!r} is not a Qwen2 ('qwen2')")
    keys.only("hidden_act", "silu")
    keys.only("use_mrope", False)
    hidden, (heads, kv_heads), depth = keys.count("hidden_size"), keys.heads(), keys.count("num_hidden_layers")
    keys.full_attention(depth)
    shape = Qwen2Config(
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=depth,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=keys.head_dim(max(hidden // heads, 1)),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=keys.rope(),
        tie_word_embeddings=keys.switch("tie_word_embeddings"),
    )
    keys.done("Qwen2")
    return shape


class Qwen2(Transformer):
    """Qwen2: a Llama whose q, k and v have a bias."""

    def make_layer(self, config: Qwen2Config, index: int, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.Module:
        shape = AttentionShape(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=True,
        )
        attention = Attention(shape, dtypes, rngs=rngs)
        mlp = MLP(config.hidden_size, config.intermediate_size, dtypes, rngs=rngs)
        return Layer(config.hidden_size, config.rms_norm_eps, attention, mlp, dtypes)


family.register(
    family.Family(
        architectures=("Qwen2ForCausalLM",),
        model=Qwen2,
        read_config=read_config,
        shared=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    )
)
