"""DeepSeek-V3: multi-head latent attention, and experts behind a sigmoid router with groups and a shared expert.

The cache keeps of a token its latent and its rotated key, [B, S, kv_lora_rank + qk_rope_head_dim], for all heads.
Attention is absorbed, at prefill and at decode: queries go through W_UK into the latent space, attend to the cache as
one shared head, and what they gather goes through W_UV. The function is that of the plain form, keys and values are
never expanded, and a chunk of a prompt is summed as a decoding step is. The two halves of kv_b_proj are used as
matrices, so it stays in floating point unless a rule names it; in NVFP4 (ours or a checkpoint's) each call decodes it.
Sources: arXiv 2412.19437; transformers `modeling_deepseek_v3.py`, whose names the modules have.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import layers, numerics, ops, routing
from nvfp4jax.backends import xla
from nvfp4jax.fp8 import FP8Array
from nvfp4jax.layers import RMSNorm, add_to, call_each, feed, feed_norm
from nvfp4jax.models import blocks, family
from nvfp4jax.models.cache import LayerCache, Shapes, as_read
from nvfp4jax.models.config import Keys
from nvfp4jax.models.rope import yarn_mscale

# The norms of the latents have their own epsilon in transformers and in DeepSeek's code, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(blocks.DecoderConfig):
    """The shape of a DeepSeek-V3 model. q_lora_rank None: queries come straight from the hidden state."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rope_interleave: bool
    intermediate_size: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by; yarn's mscale_all_dim counts twice, for queries and for keys."""
        mscale = 1.0
        if self.rope.kind == "yarn" and self.rope.mscale_all_dim:
            mscale = yarn_mscale(self.rope.factor, self.rope.mscale_all_dim)
        return self.qk_head_dim**-0.5 * mscale**2


def read_config(config: Mapping[str, Any]) -> DeepseekV3Config:
    """Reads a config.json. ValueError, naming the key, for a missing one and for what this model does not compute."""
    keys = Keys(config)
    keys.only("model_type", "deepseek_v3")
    keys.only("hidden_act", "silu")
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    keys.only("moe_layer_freq", 1)
    if "q_lora_rank" not in config:  # null says that there is none; transformers takes 1536 where the key is absent
        raise ValueError("config.json: key 'q_lora_rank' is missing (null where queries have no latent)")
    dense = keys.get("first_k_dense_replace", 3)
    if type(dense) is not int or dense < 0:
        raise ValueError(f"config.json: first_k_dense_replace={str(dense)[:80]} must be an integer of at least 0")
    fields: dict[str, Any] = {
        name: keys.count(name)
        for name in (
            "vocab_size", "hidden_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
            "n_group", "topk_group",
        )
    }  # fmt: skip
    fields |= dict(
        num_layers=keys.count("num_hidden_layers"),
        num_heads=keys.count("num_attention_heads"),
        q_lora_rank=None if config["q_lora_rank"] is None else keys.count("q_lora_rank"),
        attention_bias=keys.switch("attention_bias"),
        rope_interleave=keys.switch("rope_interleave", True),
        first_k_dense_replace=dense,
        norm_topk_prob=keys.switch("norm_topk_prob", True),
        routed_scaling_factor=keys.number("routed_scaling_factor", 2.5),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=keys.switch("tie_word_embeddings"),
        rope=keys.rope(("default", "yarn")),
        head_dim=fields["qk_rope_head_dim"],  # as transformers has it: what is rotated
    )
    parsed = DeepseekV3Config(**fields)
    keys.only("num_key_value_heads", parsed.num_heads)
    keys.only("qk_head_dim", parsed.qk_head_dim)
    keys.only("head_dim", parsed.head_dim)
    keys.ignore("num_nextn_predict_layers", "num_mtp_layers", "pretraining_tp")
    keys.done("DeepSeek-V3")
    if parsed.qk_rope_head_dim % 2:
        raise ValueError(f"config.json: qk_rope_head_dim={parsed.head_dim} must be even: rotary embeddings turn pairs")
    experts, groups, best, k = parsed.n_routed_experts, parsed.n_group, parsed.topk_group, parsed.num_experts_per_tok
    if experts % groups or experts < 2 * groups or best > groups or best * (experts // groups) < k:
        raise ValueError(
            f"config.json: n_group={groups} and topk_group={best} do not fit n_routed_experts={experts} and "
            f"num_experts_per_tok={k}: equal groups of at least 2, and at least k experts in topk_group of them"
        )
    return parsed


def _one_head(latents: Float[Array, "*L B S R"] | FP8Array) -> Float[Array, "*L B 1 S R"] | FP8Array:
    if isinstance(latents, FP8Array):
        return FP8Array(_one_head(latents.qvalue), jnp.expand_dims(latents.scale, -2))
    return latents.reshape(*latents.shape[:-2], 1, *latents.shape[-2:])


class LatentAttention(nnx.Module):
    """Multi-head latent attention, absorbed (see the module's docstring)."""

    def __init__(self, config: DeepseekV3Config, dtypes: blocks.Dtypes, *, rngs: nnx.Rngs):
        c = config
        if c.q_lora_rank is None:
            self.q_proj = dtypes.linear(c.hidden_size, c.num_heads * c.qk_head_dim, rngs=rngs)
        else:
            self.q_a_proj = dtypes.linear(c.hidden_size, c.q_lora_rank, bias=c.attention_bias, rngs=rngs)
            self.q_a_layernorm = dtypes.norm(c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = dtypes.linear(c.q_lora_rank, c.num_heads * c.qk_head_dim, rngs=rngs)
        self.kv_a_proj_with_mqa = dtypes.linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=c.attention_bias, rngs=rngs
        )
        self.kv_a_layernorm = dtypes.norm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = dtypes.linear(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), rngs=rngs)
        self.o_proj = dtypes.linear(c.num_heads * c.v_head_dim, c.hidden_size, bias=c.attention_bias, rngs=rngs)
        self.config = config
        self.dtypes = dtypes

    def cache_shapes(self) -> Shapes:
        return {"latents": (None, self.config.kv_lora_rank + self.config.qk_rope_head_dim)}

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T H"], part: LayerCache | None, inputs: blocks.StepInputs
    ) -> tuple[Float[Array, "B T H"], LayerCache | None]:
        c = self.config
        first = self.q_proj if c.q_lora_rank is None else self.q_a_proj
        readers = (first, self.kv_a_proj_with_mqa)
        q, kv = map(blocks.whole, call_each(readers, feed_norm(norm, x, readers, inputs.valid)))
        q_nope, q_rope = jnp.split(self._queries(q, inputs), [c.qk_nope_head_dim], axis=-1)
        latent, k_rope = jnp.split(kv, [c.kv_lora_rank], axis=-1)
        k_rope = self._rotate(k_rope[:, :, None], inputs)[:, :, 0]
        entry = jnp.concatenate([self.kv_a_layernorm(latent), k_rope], -1)
        w_uk, w_uv = self._up_projections(x.dtype)
        q = jnp.concatenate([self._product("bthn,rhn->bthr", q_nope, w_uk), self._rotate(q_rope, inputs)], -1)
        if part is None:
            latents, layer, shared, starts = as_read(entry, inputs.cache_dtype), None, None, jnp.zeros_like(inputs.starts)
        else:
            part = part.write(inputs.places, latents=entry)
            latents, layer, starts = part["latents"], part.layer, inputs.starts
            shared = part.shared_rows("latents", "latents", _one_head)
        # One head that all queries share, its keys also its values: a slice of them would be a copy of the cache. What
        # is gathered of the rotated keys is dropped.
        keys = _one_head(latents)
        y = ops.attention(q, keys, keys, starts, layer=layer, scale=c.attention_scale, shared=shared)[..., : c.kv_lora_rank]
        y = self._product("bthr,rhv->bthv", y, w_uv)
        (y,) = feed(y.reshape(*y.shape[:2], -1), (self.o_proj,), inputs.valid)
        return add_to(x, self.o_proj, y), part

    def _queries(self, q: Float[Array, "B T N"], inputs: blocks.StepInputs) -> Float[Array, "B T Hq D"]:
        """From what the first projection gives: the queries, or their latents."""
        if self.config.q_lora_rank is not None:
            readers = (self.q_b_proj,)
            (q,) = map(blocks.whole, call_each(readers, feed_norm(self.q_a_layernorm, q, readers, inputs.valid)))
        return q.reshape(*q.shape[:2], self.config.num_heads, self.config.qk_head_dim)

    def _rotate(self, x: Float[Array, "B T Hq D"], inputs: blocks.StepInputs) -> Float[Array, "B T Hq D"]:
        if self.config.rope_interleave:  # pairs of neighbours to pairs across halves, for queries and keys alike
            x = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
        return numerics.rotate(x, inputs.cos, inputs.sin).astype(x.dtype)

    def _up_projections(self, dtype) -> tuple[Float[Array, "R Hq Dn"], Float[Array, "R Hq Dv"]]:
        """W_UK and W_UV, the halves of each head in kv_b_proj."""
        c, layer = self.config, self.kv_b_proj
        if isinstance(layer, layers.NVFP4Linear):
            kernel = layer.weight().dequantize(dtype).T
        else:
            kernel = layer.kernel[...].astype(dtype)
        w = blocks.whole(kernel).reshape(c.kv_lora_rank, c.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        return w[..., : c.qk_nope_head_dim], w[..., c.qk_nope_head_dim :]

    def _product(self, spec: str, x: Array, w: Array) -> Array:
        operands = xla.product_operands(x, w)
        y = jnp.einsum(spec, *operands, precision=self.dtypes.precision, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)


class Router(nnx.Module):
    """Which experts a token goes to, in float32.

    Its Params are what a checkpoint has: weight [E, H]; e_score_correction_bias f32 [E], which changes the choice but
    not the weights, and gets no gradient.
    """

    def __init__(self, config: DeepseekV3Config, dtypes: blocks.Dtypes, *, rngs: nnx.Rngs):
        shape = (config.n_routed_experts, config.hidden_size)
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = nnx.Param(init(rngs.params(), shape, dtypes.param_dtype))
        self.e_score_correction_bias = nnx.Param(jnp.zeros(shape[:1], jnp.float32))
        self.config = config

    def __call__(self, x: Float[Array, "T H"]) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
        c = self.config
        return routing.sigmoid_top_k_experts(
            ops.float_matmul(x, self.weight[...], transposed=True, name="router"),
            self.e_score_correction_bias[...],
            c.num_experts_per_tok,
            groups=c.n_group,
            top_groups=c.topk_group,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )


class MoE(nnx.Module):
    """x + routed experts of norm(x) + a gated MLP of it that all tokens share."""

    def __init__(self, config: DeepseekV3Config, dtypes: blocks.Dtypes, *, rngs: nnx.Rngs):
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config, dtypes, rngs=rngs)
        self.experts = layers.Experts(
            config.n_routed_experts, hidden, intermediate, dtype=dtypes.dtype, param_dtype=dtypes.param_dtype, rngs=rngs
        )
        self.shared_experts = blocks.MLP(hidden, intermediate * config.n_shared_experts, dtypes, rngs=rngs)

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T H"], valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H"], Int[Array, "B T k"]]:
        flat = norm(x).reshape(-1, x.shape[-1])
        weights, ids = self.gate(flat)
        routed = self.experts(flat, ids, weights, valid=None if valid is None else valid.reshape(-1))
        shared = self.shared_experts
        y = add_to(routed.reshape(x.shape), shared.down_proj, shared.hidden(norm, x, valid))
        return x + y, ids.reshape(*x.shape[:2], -1)


class DeepseekV3(blocks.Transformer):
    """DeepSeek-V3 (see `models.protocol.Decoder`)."""

    def make_layer(self, config: DeepseekV3Config, index: int, dtypes: blocks.Dtypes, rngs: nnx.Rngs) -> nnx.Module:
        if index < config.first_k_dense_replace:
            mlp = blocks.MLP(config.hidden_size, config.intermediate_size, dtypes, rngs=rngs)
        else:
            mlp = MoE(config, dtypes, rngs=rngs)
        self_attn = LatentAttention(config, dtypes, rngs=rngs)
        return blocks.Layer(config.hidden_size, config.rms_norm_eps, self_attn, mlp, dtypes)


family.register(
    family.Family(
        architectures=("DeepseekV3ForCausalLM",),
        model=DeepseekV3,
        read_config=read_config,
        kept=r"lm_head|.*/kv_b_proj",  # its halves are used as matrices; the router is no quantizable layer
        shared=(("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")),
        unread=(
            (r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed"),
            (r"model\.layers\.61\..*", "the published models' layer for predicting a second token"),
        ),
    )
)
