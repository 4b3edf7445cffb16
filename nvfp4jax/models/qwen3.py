"""Qwen3 and Qwen3-MoE. Module paths are the Hugging Face tensor names with '/' and without 'model.'."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import layers
from nvfp4jax.layers import RMSNorm, feed_norm
from nvfp4jax.models import family
from nvfp4jax.models.blocks import (
    MLP,
    Attention,
    Dtypes,
    Layer,
    Transformer,
)
from nvfp4jax.models.config import Keys
from nvfp4jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """The shape of a Qwen3 or Qwen3-MoE model; num_experts is 0 for a dense one."""

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_moe(self, layer: int) -> bool:
        return (
            bool(self.num_experts) and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )


def read_config(config: Mapping[str, Any]) -> Qwen3Config:
    """Reads a config.json. ValueError, naming the key, for a missing one and for what this model does not compute."""
    keys = Keys(config)
    model_type = keys.get("model_type")
    if model_type not in ("qwen3", "qwen3_moe"):
        raise ValueError(f"config.json: model_type={str(model_type)[:80]!r} is not a Qwen3 model ('qwen3' or 'qwen3_moe')")
    moe = model_type == "qwen3_moe"
    keys.only("hidden_act", "silu")
    keys.full_attention(keys.count("num_hidden_layers"))
    # Where head_dim is absent, transformers takes 128 for Qwen3 and hidden / heads for Qwen3-MoE.
    bias = keys.switch("attention_bias")
    fields = keys.decoder(None if moe else 128) | dict(attention_bias=bias, attention_out_bias=bias)
    if moe:
        fields |= dict(
            num_experts=keys.count("num_experts", "num_local_experts"),
            num_experts_per_tok=keys.count("num_experts_per_tok"),
            moe_intermediate_size=keys.count("moe_intermediate_size"),
            norm_topk_prob=keys.switch("norm_topk_prob"),
            decoder_sparse_step=keys.count("decoder_sparse_step", default=1),
            mlp_only_layers=tuple(keys.get("mlp_only_layers", ())),
        )
        if fields["num_experts_per_tok"] > fields["num_experts"]:
            raise ValueError(
                "config.json: num_experts_per_tok={num_experts_per_tok} exceeds num_experts={num_experts}".format(**fields)
            )
    keys.done("Qwen3-MoE" if moe else "Qwen3")
    return Qwen3Config(**fields)


class MoE(nnx.Module):
    """x + top-k experts of norm(x), routed by a softmax over all of them, in float32."""

    def __init__(self, config: Qwen3Config, dtypes: Dtypes, *, rngs: nnx.Rngs):
        self.gate = dtypes.linear(config.hidden_size, config.num_experts, dtype=jnp.float32, rngs=rngs)
        self.experts = layers.Experts(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            dtype=dtypes.dtype,
            param_dtype=dtypes.param_dtype,
            rngs=rngs,
        )
        self.k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T H"], valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H"], Int[Array, "B T k"]]:
        to_gate, h = feed_norm(norm, x, (self.gate, self.experts), valid)
        weights, ids, route = layers.choose_experts(self.gate, to_gate, self.k, normalize=self.normalize, valid=valid)
        flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
        valid = None if valid is None else valid.reshape(-1)
        y = self.experts(flat(h), flat(ids), flat(weights), valid=valid, residual=flat(x), route=route)
        return y.reshape(x.shape), ids


class Qwen3(Transformer):
    """Qwen3, dense or mixture of experts."""

    def make_layer(self, config: Qwen3Config, index: int, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.Module:
        attention = Attention(config.attention(config.rms_norm_eps), dtypes, rngs=rngs)
        if config.is_moe(index):
            mlp = MoE(config, dtypes, rngs=rngs)
        else:
            mlp = MLP(config.hidden_size, config.intermediate_size, dtypes, rngs=rngs)
        return Layer(config.hidden_size, config.rms_norm_eps, attention, mlp, dtypes)


family.register(
    family.Family(
        architectures=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        model=Qwen3,
        read_config=read_config,
        kept=r"lm_head|.*/mlp/gate",
        shared=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    )
)
