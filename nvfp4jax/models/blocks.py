"""What decoders are built of: norm, linear layers of one precision, grouped-query attention, the gated MLP, and the whole.

An architecture's file reads its config and says which blocks its layers have; see models/llama.py for the shortest one.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import ops
from nvfp4jax.backends import xla
from nvfp4jax.layers import RMSNorm, feed, feed_gated, feed_norm, project
from nvfp4jax.models import attention, cache, stacking
from nvfp4jax.models.cache import LayerCache
from nvfp4jax.models.protocol import Output
from nvfp4jax.models.rope import Rope


class AttentionCase(NamedTuple):
    """What layers have in common that share an `ops.AttentionPlan`. window: 0 for none."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0


class StepInputs(NamedTuple):
    """What all layers of one call share."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    starts: Int[Array, "B"]  # the slot of each row's first token
    valid: Bool[Array, "B T"] | None
    counts: Int[Array, "B"] | None = None  # the tokens of each row that are valid, where there are several
    plans: Mapping[AttentionCase, ops.AttentionPlan] | None = None


@dataclasses.dataclass(frozen=True)
class Dtypes:
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

    def norm(self, features: int, eps: float) -> RMSNorm:
        return RMSNorm(features, eps, param_dtype=self.param_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Grouped-query attention: heads, biases, and whether queries and keys are normed a head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False  # of q, k and v
    out_bias: bool = False
    norm_eps: float | None = None  # q_norm and k_norm, where there are any


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings, over a cache of keys and values or over the call's own tokens."""

    def __init__(self, shape: AttentionShape, dtypes: Dtypes, *, rngs: nnx.Rngs):
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = dtypes.linear(shape.hidden, queries, bias=shape.bias, rngs=rngs)
        self.k_proj = dtypes.linear(shape.hidden, keys, bias=shape.bias, rngs=rngs)
        self.v_proj = dtypes.linear(shape.hidden, keys, bias=shape.bias, rngs=rngs)
        self.o_proj = dtypes.linear(queries, shape.hidden, bias=shape.out_bias, rngs=rngs)
        if shape.norm_eps is not None:
            self.q_norm = dtypes.norm(shape.head_dim, shape.norm_eps)
            self.k_norm = dtypes.norm(shape.head_dim, shape.norm_eps)
        self.shape = shape
        self.case = AttentionCase(shape.heads, shape.kv_heads, shape.head_dim)

    def cache_shapes(self) -> cache.Shapes:
        one = (self.shape.kv_heads, None, self.shape.head_dim)
        return {"keys": one, "values": one}

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T H"], part: LayerCache | None, inputs: StepInputs
    ) -> tuple[Float[Array, "B T H"], LayerCache | None]:
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.shape.head_dim)  # noqa: E731
        readers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (heads(f(h)) for f, h in zip(readers, feed_norm(norm, x, readers, inputs.valid), strict=True))
        weight = lambda norm: norm.scale.get_value().astype(x.dtype)  # noqa: E731
        eps = self.shape.norm_eps
        norm_heads = None if eps is None else (weight(self.q_norm), weight(self.k_norm), eps)
        if part is None:
            layer, plan, starts = None, None, jnp.zeros_like(inputs.starts)
            keys, values = (jnp.zeros((x.shape[0], self.shape.kv_heads, x.shape[1], self.shape.head_dim), x.dtype) for _ in range(2))
        else:
            keys, values, layer, starts = part["keys"], part["values"], part.layer, inputs.starts
            plan = inputs.plans[self.case]
        q, keys, values = ops.rope_write(q, k, v, inputs.cos, inputs.sin, starts, keys, values, layer=layer, norm=norm_heads)
        part = part if part is None else part.replace(keys=keys, values=values)
        y = ops.attention(q, keys, values, starts, layer=layer, counts=inputs.counts, plan=plan)
        (y,) = feed(y.reshape(*y.shape[:2], -1), (self.o_proj,), inputs.valid)
        return self.o_proj(y), part


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, dtypes: Dtypes, *, bias: bool = False, rngs: nnx.Rngs):
        self.gate_proj = dtypes.linear(hidden, intermediate, bias=bias, rngs=rngs)
        self.up_proj = dtypes.linear(hidden, intermediate, bias=bias, rngs=rngs)
        self.down_proj = dtypes.linear(intermediate, hidden, bias=bias, rngs=rngs)

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T H"], valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H"], None]:
        gate, up = feed_norm(norm, x, (self.gate_proj, self.up_proj), valid)
        (h,) = feed_gated(self.gate_proj(gate), self.up_proj(up), (self.down_proj,), valid)
        return self.down_proj(h), None


class Layer(nnx.Module):
    """One decoder layer, or `depth` of them stacked in its Params (see models.stacking).

    self_attn: called as `Attention` is, with its `cache_shapes`; mlp: called as `MLP` is, it gives (y, experts or None).
    """

    def __init__(self, hidden: int, eps: float, self_attn: nnx.Module, mlp: nnx.Module, dtypes: Dtypes):
        self.input_layernorm = dtypes.norm(hidden, eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = dtypes.norm(hidden, eps)
        self.mlp = mlp
        self.depth: int | None = None

    def cache_shapes(self) -> cache.Shapes:
        return self.self_attn.cache_shapes()

    def __call__(
        self, x: Float[Array, "B T H"], part: LayerCache | None, inputs: StepInputs
    ) -> tuple[Float[Array, "B T H"], LayerCache | None, Int[Array, "B T k"] | None]:
        y, part = self.self_attn(self.input_layernorm, x, part, inputs)
        x = x + y
        y, experts = self.mlp(self.post_attention_layernorm, x, inputs.valid)
        return x + y, part, experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every architecture's config has."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    rope: Rope
    head_dim: int
    tie_word_embeddings: bool = False

    @property
    def rope_dim(self) -> int:
        """Features of a head that are rotated."""
        return self.head_dim


class Transformer(nnx.Module):
    """A decoder (see `models.protocol.Decoder`); an architecture overrides `make_layer`.

    dtype: of the activations. bfloat16 keeps norms, softmax, router and logits in float32; float32 computes every
        product at the highest precision. param_dtype: of the weights, dtype where it is None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dtypes = Dtypes(jnp.dtype(dtype), jnp.dtype(param_dtype or dtype))
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtypes.dtype, param_dtype=dtypes.param_dtype, rngs=rngs
        )
        self.layers = nnx.List([self.make_layer(config, i, dtypes, rngs) for i in range(config.num_layers)])
        self.norm = dtypes.norm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = dtypes.linear(config.hidden_size, config.vocab_size, out_dtype=jnp.float32, rngs=rngs)
        self.config = config
        self.dtypes = dtypes

    def make_layer(self, config: DecoderConfig, index: int, dtypes: Dtypes, rngs: nnx.Rngs) -> nnx.Module:
        raise NotImplementedError

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> cache.Cache:
        """An empty cache of `length` slots a row; dtype: the activations' where it is None."""
        shapes = [layer.cache_shapes() for layer in self.layers]
        return cache.init_cache(shapes, stacking.depths(self), batch, length, dtype or self.dtypes.dtype)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"],
        kv: cache.Cache | None = None,
        *,
        valid: Bool[Array | np.ndarray, "B T"] | None = None,
        last: Int[Array | np.ndarray, "B"] | None = None,
        return_experts: bool = False,
    ) -> Output:
        """See `models.protocol.Decoder`; logits are float32.

        kv: None also, for a forward of whole rows: then the call's own T tokens are all that there is to see.
        """
        tokens, positions = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
        batch, steps = tokens.shape
        if kv is not None and steps > (slots := cache.length(kv)):
            raise ValueError(f"tokens [{batch}, {steps}] do not fit into a cache of {slots} slots")
        valid = None if valid is None else jnp.asarray(valid, bool)
        cos, sin = attention.rope_angles(
            positions, self.config.rope.frequencies(self.config.rope_dim), self.config.rope.amplitude
        )
        counts = None if valid is None or steps == 1 else valid.sum(1, dtype=jnp.int32)
        inputs = StepInputs(cos, sin, positions[:, 0], valid, counts, self._plans(positions[:, 0], steps, kv))
        parts, experts = [], []
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            part = None if kv is None else LayerCache(dict(kv[i]))
            run = layer if layer.depth is None else stacking.stack_of(layer)
            x, part, ids = run(x, part, inputs)
            parts.append(part)
            if ids is not None:
                experts.append(ids[None] if layer.depth is None else ids)
        if return_experts and not experts:
            raise ValueError("return_experts: this model has no mixture-of-experts layer")
        if last is not None:
            take = lambda y: jnp.take_along_axis(y, jnp.asarray(last)[:, None], axis=1)  # noqa: E731
            x = jnp.take_along_axis(x, jnp.asarray(last, jnp.int32)[:, None, None], axis=1)
            valid = None if valid is None else take(valid)
        return Output(
            self._logits(x, valid),
            None if kv is None else tuple(part.arrays for part in parts),
            jnp.concatenate(experts) if return_experts else None,
        )

    def _plans(self, starts: Int[Array, "B"], steps: int, kv: cache.Cache | None) -> dict[AttentionCase, ops.AttentionPlan]:
        """What the layers' attention has in common."""
        plans = {}
        for layer, part in zip(self.layers, kv or (), strict=False):
            case = getattr(layer.self_attn, "case", None)  # other kinds of attention have none
            if case is not None and case not in plans:
                q = jax.ShapeDtypeStruct((*starts.shape, steps, case.heads, case.head_dim), self.dtypes.dtype)
                keys = part["keys"].value
                keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
                plans[case] = ops.attention_plan(starts, q, keys, window=case.window or None)
        return plans

    def _logits(self, x: Float[Array, "B P H"], valid: Bool[Array, "B P"] | None) -> Float[Array, "B P V"]:
        if not self.config.tie_word_embeddings:
            (h,) = feed_norm(self.norm, x, (self.lm_head,), valid)
            return project(self.lm_head, h)
        x = self.norm(x)
        table = self.embed_tokens.embedding[...].astype(x.dtype)
        return jnp.einsum(
            "bth,vh->btv",
            *xla.product_operands(x, table),
            precision=self.dtypes.precision,
            preferred_element_type=jnp.float32,
        )
