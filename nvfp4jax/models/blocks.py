"""What decoders are built of: norm, linear layers of one precision, grouped-query attention, the gated MLP, and the whole.

An architecture's file reads its config and says which blocks its layers have; see models/llama.py for the shortest one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import array as nvfp4_array
from nvfp4jax import ops
from nvfp4jax.layers import RMSNorm, add_to, call_each, feed, feed_gated, feed_norm, project
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
    places: Int[Array, "B"] | None = None  # where starts lie in the cache, which has the slots from a row's own first one on
    cache_dtype: jnp.dtype | None = None  # without a cache: that of the one whose rounding is wanted; static


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


def whole(x: Float[Array, "... N"]) -> Float[Array, "... N"]:
    """x, its last axis on every device where explicit mesh axes split it.

    Of heads that is: with explicit axes each device computes the attention of all of them, over a whole cache. Where a projection is
    split over automatic axes (AxisType.Auto) it stays so, and jax splits the attention too.
    """
    sharding = nvfp4_array.explicit_sharding(x)
    if sharding is None or sharding.spec[-1] is None:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:-1], None)))


class Attention(nnx.Module):
    """x + grouped-query attention of norm(x), with rotary embeddings, over a cache of keys and values or the call's own tokens."""

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
        heads = lambda y: whole(y).reshape(*y.shape[:2], -1, self.shape.head_dim)  # noqa: E731
        readers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = map(heads, call_each(readers, feed_norm(norm, x, readers, inputs.valid)))
        weight = lambda norm: norm.scale.get_value().astype(x.dtype)  # noqa: E731
        eps = self.shape.norm_eps
        norm_heads = None if eps is None else (weight(self.q_norm), weight(self.k_norm), eps)
        if part is None:
            layer, plan, shared, starts = None, None, None, jnp.zeros_like(inputs.starts)
            places = starts
            keys, values = (jnp.zeros((x.shape[0], self.shape.kv_heads, x.shape[1], self.shape.head_dim), x.dtype) for _ in range(2))
        else:
            keys, values, layer, starts = part["keys"], part["values"], part.layer, inputs.starts
            plan, shared, places = inputs.plans[self.case], part.shared_rows("keys", "values"), inputs.places
        q, keys, values = ops.rope_write(q, k, v, inputs.cos, inputs.sin, places, keys, values, layer=layer, norm=norm_heads)
        if part is None:
            keys, values = (cache.as_read(x, inputs.cache_dtype) for x in (keys, values))
        else:
            part = part.replace(keys=keys, values=values)
        y = ops.attention(q, keys, values, starts, layer=layer, counts=inputs.counts, plan=plan, shared=shared)
        (y,) = feed(y.reshape(*y.shape[:2], -1), (self.o_proj,), inputs.valid)
        return add_to(x, self.o_proj, y), part


class MLP(nnx.Module):
    """x + down(silu(gate(h)) * up(h)), h = norm(x)."""

    def __init__(self, hidden: int, intermediate: int, dtypes: Dtypes, *, bias: bool = False, rngs: nnx.Rngs):
        self.gate_proj = dtypes.linear(hidden, intermediate, bias=bias, rngs=rngs)
        self.up_proj = dtypes.linear(hidden, intermediate, bias=bias, rngs=rngs)
        self.down_proj = dtypes.linear(intermediate, hidden, bias=bias, rngs=rngs)

    def __call__(
        self, norm: RMSNorm, x: Float[Array, "B T H"], valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T H"], None]:
        return add_to(x, self.down_proj, self.hidden(norm, x, valid)), None

    def hidden(self, norm: RMSNorm, x: Float[Array, "B T H"], valid: Bool[Array, "B T"] | None):
        """What `down_proj` is to be called with."""
        readers = (self.gate_proj, self.up_proj)
        gate, up = call_each(readers, feed_norm(norm, x, readers, valid))
        return feed_gated(gate, up, (self.down_proj,), valid)[0]


class Layer(nnx.Module):
    """One decoder layer, or `depth` of them stacked in its Params (see models.stacking).

    self_attn: called as `Attention` is, with its `cache_shapes`; mlp: called as `MLP` is, it gives (x + y, experts or None).
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
        x, part = self.self_attn(self.input_layernorm, x, part, inputs)
        x, experts = self.mlp(self.post_attention_layernorm, x, inputs.valid)
        return x, part, experts


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

    takes_shared_cache = True

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
        kv: cache.Cache | cache.SharedCache | None = None,
        *,
        valid: Bool[Array | np.ndarray, "B T"] | None = None,
        last: Int[Array | np.ndarray, "B"] | None = None,
        return_experts: bool = False,
    ) -> Output:
        """See `models.protocol.Decoder`; logits are float32.

        kv: None also, for a forward of whole rows: then the call's own T tokens are all that there is to see.
        """
        valid = None if valid is None else jnp.asarray(valid, bool)
        x, kv, experts = self._run(tokens, positions, kv, valid)
        if return_experts and not experts:
            raise ValueError("return_experts: this model has no mixture-of-experts layer")
        if last is not None:
            take = lambda y: jnp.take_along_axis(y, jnp.asarray(last)[:, None], axis=1)  # noqa: E731
            x = jnp.take_along_axis(x, jnp.asarray(last, jnp.int32)[:, None, None], axis=1)
            valid = None if valid is None else take(valid)
        return Output(self.logits(x, valid), kv, jnp.concatenate(experts) if return_experts else None)

    def features(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        valid: Bool[Array, "B T"] | None = None,
        cache_dtype: DTypeLike | None = None,
    ) -> Float[Array, "B T H"]:
        """What the head reads, of whole rows. cache_dtype: keys and values are rounded as a cache of it rounds them."""
        return self._run(tokens, positions, None, valid, cache_dtype)[0]

    def logits(self, x: Float[Array, "B P H"], valid: Bool[Array, "B P"] | None = None) -> Float[Array, "B P V"]:
        """float32, of what `features` gave; valid: tokens that count in an amax."""
        if not self.config.tie_word_embeddings:
            (h,) = feed_norm(self.norm, x, (self.lm_head,), valid)
            return whole(project(self.lm_head, h))
        x = self.norm(x)
        return ops.float_matmul(x, self.embed_tokens.embedding[...].astype(x.dtype), transposed=True, name="tied head")

    def _run(
        self, tokens: Any, positions: Any, kv: Any, valid: Bool[Array, "B T"] | None, cache_dtype: DTypeLike | None = None
    ) -> tuple[Float[Array, "B T H"], Any, list]:
        """(what the head reads, the cache after the call, the experts of each layer that has some)."""
        tokens, positions = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
        batch, steps = tokens.shape
        shared = isinstance(kv, cache.SharedCache)
        given = [None] * len(self.layers) if kv is None else cache.parts(kv)
        if kv is not None and steps > (slots := cache.length(kv.own if shared else kv)):
            raise ValueError(f"tokens [{batch}, {steps}] do not fit into a cache of {slots} slots")
        cos, sin = attention.rope_angles(
            positions, self.config.rope.frequencies(self.config.rope_dim), self.config.rope.amplitude
        )
        counts = None if valid is None or steps == 1 else valid.sum(1, dtype=jnp.int32)
        starts = positions[:, 0]
        places = starts - kv.slots if shared else starts
        dtype = None if cache_dtype is None else jnp.dtype(cache_dtype)
        inputs = StepInputs(cos, sin, starts, valid, counts, self._plans(starts, steps, given), places, dtype)
        parts, experts = [], []
        table = self.embed_tokens.embedding.get_value()
        nvfp4_array.check_unsplit(table, range(1), "embed_tokens/embedding", "split its features")
        x = whole(self.embed_tokens(tokens))
        for layer, part in zip(self.layers, given, strict=True):
            run = layer if layer.depth is None else stacking.stack_of(layer)
            x, part, ids = run(x, part, inputs)
            parts.append(part)
            if ids is not None:
                experts.append(ids[None] if layer.depth is None else ids)
        written = None if kv is None else tuple(part.arrays for part in parts)
        return x, dataclasses.replace(kv, own=written) if shared else written, experts

    def _plans(self, starts: Int[Array, "B"], steps: int, parts: list[LayerCache | None]) -> dict[AttentionCase, ops.AttentionPlan]:
        """What the layers' attention has in common."""
        plans = {}
        for layer, part in zip(self.layers, parts, strict=True):
            case = getattr(layer.self_attn, "case", None)  # other kinds of attention have none
            if part is not None and case is not None and case not in plans:
                q = jax.ShapeDtypeStruct((*starts.shape, steps, case.heads, case.head_dim), self.dtypes.dtype)
                keys, shared = part["keys"], part.shared_rows("keys", "values")
                keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
                plans[case] = ops.attention_plan(starts, q, keys, window=case.window or None, shared=shared)
        return plans
