"""Llama 2 and 3, SmolLM2, and Mistral without a sliding window. Module paths are the Hugging Face tensor names with '/'
and without 'model.'."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from nvfp4jax.models import family
from nvfp4jax.models.blocks import MLP, Attention, AttentionShape, DecoderConfig, Dtypes, Layer, Transformer
from nvfp4jax.models.config import Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama, and of what is built like it. attention_bias: of q, k and v; attention_out_bias: of o."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False

    def attention(self, norm_eps: float | None = None) -> AttentionShape:
        """norm_eps: of the norms of a head's queries and keys, where there are any."""
        return AttentionShape(
            hidden=self.hidden_size,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            bias=self.attention_bias,
            out_bias=self.attention_out_bias,
            norm_eps=norm_eps,
        )


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads a config.json. ValueError, naming the key, for a missing one and for what this model does not compute."""
    keys = Keys(config)
    model_type = keys.get("model_type")
    if model_type not in ("llama", "mistral"):
        raise ValueError(f"config.json: model_type={str(model_type)[:80]!r} is not a Llama ('llama' or 'mistral')")
    keys.only("hidden_act", "silu")
    keys.only("pretraining_tp", 1)
    keys.only("rope_interleaved", False)
    depth = keys.count("num_hidden_layers")
    if model_type == "mistral":
        if config.get("sliding_window", 4096) is not None:  # transformers takes 4096 where the key is absent
            window = config.get("sliding_window", "4096 (where the key is absent)")
            raise ValueError(f"config.json: sliding_window={str(window)[:80]} is not supported, only null: full attention")
        keys.full_attention(depth)
    else:
        keys.ignore("layer_types")
    of_llama = model_type == "llama"
    shape = LlamaConfig(
        **keys.decoder(),
        attention_bias=of_llama and keys.switch("attention_bias"),
        attention_out_bias=of_llama and keys.switch("attention_bias"),
        mlp_bias=of_llama and keys.switch("mlp_bias"),
    )
    keys.done("Llama" if model_type == "llama" else "Mistral")
    return shape


class Llama(Transformer):
    """Llama, and what is built like it."""

    def make_layer(self, config: LlamaConfig, index: int, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.Module:
        attention = Attention(config.attention(), dtypes, rngs=rngs)
        mlp = MLP(config.hidden_size, config.intermediate_size, dtypes, bias=config.mlp_bias, rngs=rngs)
        return Layer(config.hidden_size, config.rms_norm_eps, attention, mlp, dtypes)


family.register(
    family.Family(
        architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        model=Llama,
        read_config=read_config,
        shared=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    )
)
