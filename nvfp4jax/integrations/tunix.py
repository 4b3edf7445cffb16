"""The models of google-tunix 0.1.7 (qwen3 dense and MoE, llama3, qwen2, gemma, gemma3): they swap whole, and roll out.

Importing this file imports tunix's models and teaches `quantize_model` their Einsum and their mixture of experts; their
MLPs are `nnx.Linear`s. Embedding tables, norms, biases and routers stay in floating point. Paths are tunix's own, so a
trainer's state requantizes as it is:

    from nvfp4jax.integrations import tunix
    qmodel = nvfp4jax.quantize_model(model, nvfp4jax.Rule(r"layers/.*|lm_head"))
    nvfp4jax.generate(tunix.Decoder(qmodel), prompts, ...)
    nnx.update(qmodel, nvfp4jax.quantize_params(nnx.state(model), qmodel))
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

from nvfp4jax import arguments, layers, ops
from nvfp4jax import scaling as modes
from nvfp4jax.layers import NVFP4Einsum, NVFP4Experts
from nvfp4jax.layers.state import valid_of
from nvfp4jax.models.cache import CacheArray
from nvfp4jax.models.protocol import Output

# --- layers ------------------------------------------------------------------------------------------------------------


class TunixEinsum(NVFP4Einsum):
    """Takes the place of tunix's Einsum, whose Param is `w`; `shape` and `w` read as the float layer's."""

    @classmethod
    def from_float(cls, layer: nnx.Module, *, name: str = "einsum", **options) -> "TunixEinsum":
        # gemma's and llama's have no dtype: they compute in what input and weight promote to.
        as_flax = types.SimpleNamespace(
            einsum_str=layer.einsum_str, kernel_shape=tuple(layer.shape), kernel=layer.w, bias=None,
            dtype=getattr(layer, "dtype", None), preferred_element_type=None,
        )  # fmt: skip
        return super().from_float(as_flax, name=name, **options)

    shape = property(lambda self: self.kernel_shape)
    w = property(lambda self: self.kernel)

    def float_names(self) -> tuple[tuple[str, ...], ...]:
        return (("w",),)

    def float_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {("w",): super().float_shapes()[("kernel",)]}

    def quantize_params(self, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        return super().quantize_params({("kernel",): params[("w",)]})

    def set_sources(self, params: Mapping[tuple[str, ...], Array]) -> None:
        super().set_sources({("kernel",): params[("w",)]})


class TunixMoE(NVFP4Experts):
    """Takes the place of tunix's MoELayer: its raw expert Params in NVFP4, its router as it is."""

    @classmethod
    def from_float(cls, layer: nnx.Module, *, name: str = "experts", **options) -> "TunixMoE":
        new = super().from_float(layer, name=name, **options)
        new.router, new.experts_per_tok = layer.router, layer.experts_per_tok
        return new

    def __call__(self, x: Float[Array, "B T H"], use_megablox: bool = True) -> Float[Array, "B T H"]:
        """use_megablox: of tunix's layer; which kernels run is `implementation`'s business here."""
        del use_megablox
        valid = valid_of(self, x, None)
        flat = x.reshape(-1, x.shape[-1])
        logits = self.router(flat).astype(jnp.float32)
        weights, ids, route = ops.choose_and_route(logits, self.experts_per_tok, normalize=True)
        weights = weights.astype(self.dtype).astype(jnp.float32)  # rounded as tunix rounds them
        valid = None if valid is None else valid.reshape(-1)
        return super().__call__(flat, ids, weights, valid=valid, route=route).reshape(x.shape)


for _module in (qwen3, llama3, qwen2, gemma, gemma3):
    layers.register(_module.Einsum)(TunixEinsum.from_float)
layers.register(qwen3.MoELayer)(TunixMoE.from_float)

# --- rollout -----------------------------------------------------------------------------------------------------------

_EMPTY, _PADDING, _TOKEN = 0, 1, 2


def check_model(what: str, model: Any) -> nnx.Module:
    """The model itself, one of tunix's."""
    arguments.module(what, model)
    if not hasattr(model, "embedder") or not hasattr(model, "config"):
        raise ValueError(f"{what}: {type(model).__name__} is none of tunix's: it has no embedder and config")
    return model


class Decoder(nnx.Module):
    """A tunix model, float or swapped, as a `models.Decoder`.

    tunix writes all rows of a batch at one common slot, so rows that come padded on the right are moved to the right end
    of their call, and what is padding or comes of a finished row is masked as a key from then on. `model` is held, not
    copied: an update of its weights serves the next call. tunix computes the logits of every token of a prompt, also where
    the last one's alone are wanted.
    """

    def __init__(self, model: nnx.Module):
        self.model = check_model("Decoder: model", model)
        # gemma's local layers compare positions with slots: they are given slots for positions, which rotary embeddings, being
        # relative, cannot tell apart.
        self.positions_are_slots = isinstance(model, gemma.Gemma)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: tunix writes them as it computes them."""
        table = self.model.embedder.input_embedding
        return jnp.dtype(getattr(self.config, "dtype", table.dtype))

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> dict[str, Any]:
        """An empty cache; ValueError for a dtype other than the one that the model computes keys in."""
        if dtype is not None and jnp.dtype(dtype) != self.dtype:
            name = type(self.model).__name__
            raise ValueError(f"{name} of tunix keeps keys and values in {self.dtype}, not in {jnp.dtype(dtype)}")
        c = self.config
        shape = (batch, length, c.num_kv_heads, c.head_dim)
        new = lambda: CacheArray(jnp.zeros(shape, self.dtype), batch=-4, slots=-3)  # noqa: E731
        # What each slot holds: nothing yet, padding, or a token.
        kinds = CacheArray(jnp.full((batch, length), _EMPTY, jnp.int8), batch=-2, slots=-1)
        return {"kinds": kinds, "layers": [{"k": new(), "v": new()} for _ in range(c.num_layers)]}

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: dict[str, Any] | None = None,
        *,
        valid: Bool[Array, "B T"] | None = None,
        last: Int[Array, "B"] | None = None,
    ) -> Output:
        """See `models.Decoder`; `valid` marks the first tokens of each row, as many as it has."""
        tokens, positions = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
        batch, steps = tokens.shape
        valid = jnp.ones((batch, steps), bool) if valid is None else jnp.asarray(valid, bool)
        given = self.init_cache(batch, steps) if cache is None else cache
        start = (given["kinds"].value[0] != _EMPTY).sum(dtype=jnp.int32)
        # Column c of a row is moved to column c + shift: its last token to the call's last column.
        shift = jnp.int32(steps) - valid.sum(1, dtype=jnp.int32)
        columns = jnp.arange(steps, dtype=jnp.int32)[None]
        moved = (columns - shift[:, None]) % steps
        take = lambda x, at: jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
        tokens, positions, valid = (take(x, moved) for x in (tokens, positions, valid))
        new = jnp.where(valid, jnp.int8(_TOKEN), jnp.int8(_PADDING))
        kinds = lax.dynamic_update_slice(given["kinds"].value, new, (jnp.int32(0), start))
        slots = start + columns
        seen = (kinds == _TOKEN)[:, None] & (jnp.arange(kinds.shape[1], dtype=jnp.int32)[None, None] <= slots[..., None])
        positions = jnp.broadcast_to(slots, positions.shape) if self.positions_are_slots else positions
        with modes.valid_rows(valid), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            logits, new = self.model(tokens, positions, _to_tunix(given["layers"], start), seen)
        if last is None:
            logits = take(logits, (columns + shift[:, None]) % steps)
        else:
            logits = take(logits, (jnp.asarray(last, jnp.int32) + shift)[:, None])
        return Output(logits.astype(jnp.float32), None if cache is None else _from_tunix(given, kinds, new))


def _to_tunix(parts: list[dict[str, CacheArray]], start: Int[Array, ""]) -> dict[str, dict[str, Array]]:
    end = lambda part: jnp.broadcast_to(start, part["k"].value.shape[:1])  # noqa: E731
    return {f"layer_{i}": {"k": p["k"].value, "v": p["v"].value, "end_index": end(p)} for i, p in enumerate(parts)}


def _from_tunix(given: dict[str, Any], kinds: Array, new: dict[str, dict[str, Array]]) -> dict[str, Any]:
    put = lambda array, value: dataclasses.replace(array, value=value)  # noqa: E731
    parts = [{name: put(part[name], new[f"layer_{i}"][name]) for name in part} for i, part in enumerate(given["layers"])]
    return {"kinds": put(given["kinds"], kinds), "layers": parts}
