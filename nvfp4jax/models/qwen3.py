"""Qwen3 and Qwen3-MoE. Module paths are the Hugging Face tensor names with '/' and without 'model.'."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from nvfp4jax import layers, numerics, ops, scaling
from nvfp4jax.backends import xla
from nvfp4jax.models import attention, stacking
from nvfp4jax.models.attention import KVCache, LayerCache, RMSNorm, StepInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """The shape of a Qwen3 or Qwen3-MoE model; num_experts is 0 for a dense one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # transformers keeps the rotary frequencies in float32, unless a whole model was cast by `.to(torch.bfloat16)`. A
    # config.json may say so by this key of ours, to reproduce such a run (angles at position p move by up to p / 512).
    rope_frequency_dtype: str = "float32"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """Reads a config.json, `num_experts` or `num_local_experts`, `rope_theta` or `rope_parameters`.

        ValueError, naming the key, for a missing one and for what this model does not compute: another architecture,
        rope type or activation function, a sliding window.
        """
        config = {key: value for key, value in config.items() if value is not None}  # null counts as absent
        model_type = config.get("model_type")
        if model_type not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"config.json: model_type={str(model_type)[:80]!r} is not a Qwen3 model ('qwen3' or 'qwen3_moe')")
        moe = model_type == "qwen3_moe"

        def need(*keys: str, default: int | None = None) -> int:
            key = next((key for key in keys if key in config), None)
            if key is None and default is None:
                raise ValueError(f"config.json: key {' or '.join(map(repr, keys))} is missing")
            value = default if key is None else config[key]
            if value < 1:
                raise ValueError(f"config.json: {key or keys[0]}={value} must be at least 1")
            return value

        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act={config['hidden_act'][:80]!r} is not supported, only 'silu'")
        if config.get("use_sliding_window"):
            raise ValueError("config.json: use_sliding_window=true is not supported, only full attention")
        if set(config.get("layer_types", ())) - {"full_attention"}:
            raise ValueError(
                f"config.json: layer_types={str(config['layer_types'])[:80]} is not supported, only 'full_attention'"
            )
        hidden, heads, kv_heads = (
            need(f"{name}") for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        frequency_dtype = config.get("rope_frequency_dtype", "float32")
        if frequency_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"config.json: rope_frequency_dtype={str(frequency_dtype)[:80]!r} must be 'float32' or 'bfloat16'")
        fields = dict(
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            intermediate_size=need("intermediate_size"),
            num_layers=need("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            # Where the key is absent, transformers takes 128 for Qwen3 and hidden / heads for Qwen3-MoE.
            head_dim=need("head_dim", default=hidden // heads if moe else 128),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            rope_frequency_dtype=frequency_dtype,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
        )
        if fields["head_dim"] % 2:
            raise ValueError(f"config.json: head_dim={fields['head_dim']} must be even: rotary embeddings turn pairs")
        if moe:
            fields |= dict(
                num_experts=need("num_experts", "num_local_experts"),
                num_experts_per_tok=need("num_experts_per_tok"),
                moe_intermediate_size=need("moe_intermediate_size"),
                norm_topk_prob=bool(config.get("norm_topk_prob", False)),
                decoder_sparse_step=need("decoder_sparse_step", default=1),
                mlp_only_layers=tuple(config.get("mlp_only_layers", ())),
            )
            if fields["num_experts_per_tok"] > fields["num_experts"]:
                raise ValueError(
                    "config.json: num_experts_per_tok={num_experts_per_tok} exceeds num_experts={num_experts}".format(
                        **fields
                    )
                )
        return cls(**fields)


def _rope_theta(config: Mapping[str, Any]) -> float:
    for key in ("rope_parameters", "rope_scaling"):  # transformers 5, transformers 4
        rope = {name: value for name, value in config.get(key, {}).items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if (
            kind != "default"
            or rope.get("partial_rotary_factor", 1.0) != 1.0
            or any(isinstance(v, Mapping) for v in rope.values())
        ):
            raise ValueError(f"config.json: {key}={str(rope)[:80]} is not supported, only rope_type 'default'")
        if "rope_theta" in rope:
            return float(rope["rope_theta"])
    return float(config.get("rope_theta", 10000.0))


@dataclasses.dataclass(frozen=True)
class _Dtypes:
    """How a model computes: activations in `dtype`, exact float32 products where that is float32."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @property
    def precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def linear(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        dtype: DTypeLike | None = None,
        out_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> nnx.Linear:
        dtype = dtype or self.dtype
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=bias,
            dtype=dtype,
            param_dtype=self.param_dtype,
            preferred_element_type=out_dtype,
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            rngs=rngs,
        )


class Attention(nnx.Module):
    def __init__(self, config: Qwen3Config, dtypes: _Dtypes, *, rngs: nnx.Rngs):
        hidden, queries, keys = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = dtypes.linear(hidden, queries, bias=bias, rngs=rngs)
        self.k_proj = dtypes.linear(hidden, keys, bias=bias, rngs=rngs)
        self.v_proj = dtypes.linear(hidden, keys, bias=bias, rngs=rngs)
        self.o_proj = dtypes.linear(queries, hidden, bias=bias, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=dtypes.param_dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=dtypes.param_dtype)
        self.head_dim = config.head_dim
        self.dtypes = dtypes

    def __call__(
        self, x: Float[Array, "B T H"], cache: LayerCache | None, inputs: StepInputs
    ) -> tuple[Float[Array, "B T H"], LayerCache | None]:
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q = attention.rotate(self.q_norm(heads(self.q_proj(x))), inputs.cos, inputs.sin).astype(x.dtype)
        k = attention.rotate(self.k_norm(heads(self.k_proj(x))), inputs.cos, inputs.sin).astype(x.dtype).swapaxes(1, 2)
        v = heads(self.v_proj(x)).swapaxes(1, 2)
        if cache is not None:
            cache = cache.write(k, v, inputs.index)
            k, v = cache.read()
        y = attention.attend(q, k, v, inputs.mask, self.dtypes.precision)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), cache


class MLP(nnx.Module):
    def __init__(self, config: Qwen3Config, dtypes: _Dtypes, *, rngs: nnx.Rngs):
        self.gate_proj = dtypes.linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.up_proj = dtypes.linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down_proj = dtypes.linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H"]) -> tuple[Float[Array, "B T H"], None]:
        return self.down_proj(numerics.silu_mul(self.gate_proj(x), self.up_proj(x))), None


class MoE(nnx.Module):
    """Top-k experts, routed by a softmax over all of them, in float32."""

    def __init__(self, config: Qwen3Config, dtypes: _Dtypes, *, rngs: nnx.Rngs):
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

    def __call__(self, x: Float[Array, "B T H"]) -> tuple[Float[Array, "B T H"], Int[Array, "B T k"]]:
        weights, ids = ops.top_k_experts(self.gate(x).astype(jnp.float32), self.k, normalize=self.normalize)
        flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
        return self.experts(flat(x), flat(ids), flat(weights)).reshape(x.shape), ids


class Qwen3Layer(nnx.Module):
    """One decoder layer, or `depth` of them stacked in its Params (see models.stacking)."""

    def __init__(self, config: Qwen3Config, index: int, dtypes: _Dtypes, *, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=dtypes.param_dtype)  # noqa: E731
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtypes, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = (MoE if config.is_moe(index) else MLP)(config, dtypes, rngs=rngs)
        self.depth: int | None = None

    def __call__(
        self, x: Float[Array, "B T H"], cache: LayerCache | None, inputs: StepInputs
    ) -> tuple[Float[Array, "B T H"], LayerCache | None, Int[Array, "B T k"] | None]:
        y, cache = self.self_attn(self.input_layernorm(x).astype(x.dtype), cache, inputs)
        x = x + y
        y, experts = self.mlp(self.post_attention_layernorm(x).astype(x.dtype))
        return x + y, cache, experts


class Qwen3(nnx.Module):
    """Qwen3, dense or mixture of experts.

    dtype: of the activations. bfloat16 keeps norms, softmax, router and logits in float32; float32 computes every
        product at the highest precision. param_dtype: of the weights, dtype where it is None.
    """

    def __init__(
        self,
        config: Qwen3Config,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dtypes = _Dtypes(jnp.dtype(dtype), jnp.dtype(param_dtype or dtype))
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtypes.dtype, param_dtype=dtypes.param_dtype, rngs=rngs
        )
        self.layers = nnx.List([Qwen3Layer(config, i, dtypes, rngs=rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=dtypes.param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = dtypes.linear(config.hidden_size, config.vocab_size, out_dtype=jnp.float32, rngs=rngs)
        self.config = config
        self.dtypes = dtypes

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> KVCache:
        """An empty cache of `length` slots; dtype: the activations' where it is None."""
        c = self.config
        return attention.init_cache(
            stacking.depths(self), batch, c.num_kv_heads, length, c.head_dim, dtype or self.dtypes.dtype
        )

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"],
        cache: KVCache | None = None,
        attention_mask: ArrayLike | None = None,
        *,
        decode_only_last_token: bool = False,
        return_experts: bool = False,
    ) -> tuple:
        """(logits f32 [B, T, V], cache), with `return_experts` also i32 [L_moe, B, T, k], the experts of each token.

        positions: i32 [B, T], for the rotary embedding; those of padding do not matter.
        cache: None, or what `init_cache` or the last call gave; the call writes its T tokens at slot `cache.index`,
            which must leave room for them (a slot past the end cannot be seen under jit).
        attention_mask: bool or int, [B, S] over key slots (S = T without a cache), made causal here, or [B, T, S],
            taken as it is. Padding it marks takes no part in any NVFP4 amax. None: no padding.
        decode_only_last_token: logits [B, 1, V], of the last token alone.
        """
        tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
        batch, steps = tokens.shape
        slots = steps if cache is None else cache.length
        if steps > slots:
            raise ValueError(f"tokens [{batch}, {steps}] do not fit into a cache of {slots} slots")
        index = jnp.int32(0) if cache is None else cache.index
        mask, valid = attention.step_masks(attention_mask, batch, steps, slots, index)
        inputs = StepInputs(*self._rope(positions), mask, index)
        keys, values, experts = [], [], []
        with scaling.valid_rows(valid):
            x = self.embed_tokens(tokens)
            for i, layer in enumerate(self.layers):
                part = None if cache is None else LayerCache(cache.keys[i], cache.values[i])
                x, part, ids = (
                    layer(x, part, inputs) if layer.depth is None else stacking.run_stack(layer, x, part, inputs)
                )
                if part is not None:
                    keys.append(part.keys)
                    values.append(part.values)
                if ids is not None:
                    experts.append(ids[None] if layer.depth is None else ids)
        if decode_only_last_token:
            x, valid = x[:, -1:], None if valid is None else valid[:, -1:]
        with scaling.valid_rows(valid):
            logits = self._logits(self.norm(x).astype(x.dtype))
        cache = None if cache is None else KVCache(tuple(keys), tuple(values), index + jnp.int32(steps))
        if not return_experts:
            return logits, cache
        if not experts:
            raise ValueError("return_experts: this model has no mixture-of-experts layer")
        return logits, cache, jnp.concatenate(experts)

    def _rope(self, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        c = self.config
        return attention.rope(positions, c.head_dim, c.rope_theta, jnp.dtype(c.rope_frequency_dtype))

    def _logits(self, x: Float[Array, "B T H"]) -> Float[Array, "B T V"]:
        if not self.config.tie_word_embeddings:
            return self.lm_head(x).astype(jnp.float32)
        table = self.embed_tokens.embedding[...].astype(x.dtype)
        return jnp.einsum(
            "bth,vh->btv",
            *xla.product_operands(x, table),
            precision=self.dtypes.precision,
            preferred_element_type=jnp.float32,
        )
