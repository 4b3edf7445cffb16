"""`generate`: prompts of any shape in, sampled tokens out, through the jitted rollout."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from nvfp4jax.layers import InputAmax
from nvfp4jax.rollout import decoding
from nvfp4jax.rollout.decoding import Controls, DecodeState, Settings
from nvfp4jax.rollout.prompts import bucket, check_prompts, pack, unpack
from nvfp4jax.rollout.sampling import Sampling, row_keys

OWN_WEIGHTS = -2  # the version of tokens by weights that no step was taken for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What `generate` returns, a pytree; row b * num_samples + s is sample s of prompt b.

    tokens: i32 [B * num_samples, max_new_tokens], pad_id after the end.
    lengths: i32 [B * num_samples], tokens of each row, its stop token included.
    logprobs: f32 like tokens, of each sampled token under softmax(logits / temperature), before top-k and top-p; 0
        after the end.
    experts: None, or i32 [L_moe, B * num_samples, max_new_tokens, k], the experts that each new token was routed to as
        the model read it: -1 where it never did (a row's last token, and after the end).
    prompt_experts: None, or i32 [L_moe, B, T, k], those of the prompts' tokens, -1 at padding.
    weight_versions: None, or i64 like tokens, on the host: the step of the weights that made the logits each token was
        sampled from; OWN_WEIGHTS (-2) for weights of no step, those the model had when it was given; -1 after the end.
    """

    tokens: Int[Array, "R N"]
    lengths: Int[Array, "R"]
    logprobs: Float[Array, "R N"]
    experts: Int[Array, "L R N k"] | None = None
    prompt_experts: Int[Array, "L B T k"] | None = None
    weight_versions: Int[np.ndarray, "R N"] | None = None


@runtime_checkable
class WeightSource(Protocol):
    """Where `generate` looks for newer weights; `checkpoint.reload.Reader` is one."""

    active_step: int  # the step of the weights that the model holds, negative for none

    def take(self) -> Any:
        """At once: None, or newer weights, `.state` (tree, shapes, dtypes and shardings of the model's) and their `.step`."""


_prefill = jax.jit(decoding.prefill, static_argnames="settings")
_decode = jax.jit(decoding.decode, static_argnames="settings", donate_argnames="state")


def _swapping_rollout(
    model: nnx.Module,
    weights: WeightSource,
    swap_every: int,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: jax.Array,
    limit: int,
    controls: Controls,
    settings: Settings,
) -> tuple[DecodeState, np.ndarray]:
    """`rollout` in chunks of `swap_every` tokens, newer weights between them; and the version of each step, i64 [limit]."""
    graphdef, params, seen = _split(model)
    structure = jax.tree.structure(params)
    versions = np.full(limit, weights.active_step if weights.active_step >= 0 else OWN_WEIGHTS, np.int64)
    keys = row_keys(key, prompt.shape[0], settings.num_samples)
    state = None
    for start in [0, *range(1, limit, swap_every)]:
        new = weights.take()
        if new is not None:
            if jax.tree.structure(new.state) != structure:
                raise ValueError(f"weights: the state of step {new.step} has another tree than the model's")
            nnx.update(model, new.state)
            params = jax.tree.map(committed, new.state)
            versions[start:] = new.step
        if state is None:
            state = _prefill(graphdef, params, prompt, lengths, keys, controls, settings, seen)
        else:
            end = jnp.int32(min(start + swap_every, limit))
            state = _decode(graphdef, params, state, end, controls, settings)
        if np.asarray(state.done).all():  # waits for the chunk
            break
    return dataclasses.replace(state, cache=None), versions


def generate(
    model: nnx.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    num_samples: int = 1,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    return_experts: bool = False,
    cache_length: int | None = None,
    cache_dtype: DTypeLike | None = None,
    weights: WeightSource | None = None,
    swap_every: int = 16,
) -> Rollout:
    """Samples `num_samples` continuations of each prompt.

    model: a `models.Decoder`, any nnx.Module with that call and `init_cache`; NVFP4 layers or none. Its weights are an
        argument of the compiled program: new ones of equal shape compile nothing. Layers in mode "delayed" go on from
        the model's histories of amaxes (one call for the prompts, one for each token), and the model has them afterwards.
    input_ids: int [B, T]; attention_mask: bool or int [B, T], 0 where there is no token (padding on either side, or
        gaps: what is masked does not exist, positions count the rest). None: every token counts.
    max_new_tokens: at least 1. temperature: 0 is greedy. top_k, top_p: see `sampling.sample`. key: a PRNG key, needed
        where temperature > 0; row b's samples depend on it, on b and on the row alone.
    stop_tokens: a row ends with the first of them it draws. pad_id: fills what follows.
    cache_length: slots of a row's cache, at least the longest prompt's tokens and max_new_tokens; without it, both are
        rounded up (see `bucket`), so that near lengths share a program. cache_dtype: the model's where it is None.
    weights: a `checkpoint.reload.Reader` of this model, or the like. It is asked for newer weights before the prompts and
        then at most every `swap_every` tokens, and never waited for. Weights that it hands over serve from the next
        token on and stay in `model`; `weight_versions` tells them apart. Rows in flight go on with the keys and values
        that older weights made of the tokens before (the usual in-flight update of reinforcement learning).

    ValueError, naming the argument, for what does not fit.
    """
    ids, mask = check_prompts(model, input_ids, attention_mask)
    ask = _checked(max_new_tokens, temperature, top_k, top_p, key, num_samples, stop_tokens, pad_id, swap_every)
    longest = int(mask.sum(1).max())
    if cache_length is not None and longest + ask.max_new_tokens > cache_length:
        raise ValueError(
            f"input_ids {list(ids.shape)} and max_new_tokens={ask.max_new_tokens} need {longest + ask.max_new_tokens} "
            f"slots; the cache has cache_length={cache_length}"
        )
    packed = pack(ids, mask, longest if cache_length is not None else bucket(longest))
    new_tokens = bucket(ask.max_new_tokens) if cache_length is None else cache_length - longest
    settings = Settings(
        new_tokens=new_tokens,
        cache_length=packed.ids.shape[1] + new_tokens,
        num_samples=ask.num_samples,
        sampling=ask.sampling,
        pad_id=ask.pad_id,
        return_experts=return_experts,
        cache_dtype=None if cache_dtype is None else jnp.dtype(cache_dtype),
    )
    versions = None
    prompt, lengths = jnp.asarray(packed.ids), jnp.asarray(packed.lengths)
    if weights is None:
        graphdef, params, seen = _split(model)
        limit = jnp.int32(ask.max_new_tokens)
        state = decoding.rollout(graphdef, params, prompt, lengths, ask.key, limit, ask.controls, settings, seen)
    else:
        state, of_step = _swapping_rollout(
            model, weights, ask.swap_every, prompt, lengths, ask.key, ask.max_new_tokens, ask.controls, settings
        )
        sampled = np.arange(ask.max_new_tokens) < np.asarray(state.lengths)[:, None]
        versions = np.where(sampled, of_step, -1)
    if jax.tree.leaves(state.seen):
        nnx.update(model, state.seen)
    return Rollout(
        state.tokens[:, : ask.max_new_tokens],
        state.lengths,
        state.logprobs[:, : ask.max_new_tokens],
        state.experts[:, :, : ask.max_new_tokens] if return_experts else None,
        unpack(state.prompt_experts, packed, ids.shape[1], -1) if return_experts else None,
        versions,
    )


@dataclasses.dataclass(frozen=True)
class _Request:
    """The scalar arguments of `generate`, checked."""

    max_new_tokens: int
    num_samples: int
    swap_every: int
    pad_id: int
    key: jax.Array
    sampling: Sampling
    controls: Controls


def _integer(name: str, value: Any, least: int | None = 1) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={str(value)[:40]}: an integer is needed, not {type(value).__name__}") from None
    if least is not None and value < least:
        raise ValueError(f"{name}={value}: at least {least}")
    return value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={str(value)[:40]}: a number is needed, not {type(value).__name__}") from None


def _checked(
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    key: Any,
    num_samples: Any,
    stop_tokens: Any,
    pad_id: Any,
    swap_every: Any,
) -> _Request:
    temperature = _number("temperature", temperature)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: finite and at least 0 (0 is greedy)")
    top_k = None if top_k is None else _integer("top_k", top_k)
    top_p = None if top_p is None else _number("top_p", top_p)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: above 0 and at most 1, or None")
    if isinstance(stop_tokens, str) or not isinstance(stop_tokens, Iterable):
        raise ValueError(f"stop_tokens={str(stop_tokens)[:40]}: a sequence of token ids is needed, () for none")
    stops = tuple(_integer("stop_tokens", token, None) for token in np.asarray(stop_tokens).ravel().tolist())
    greedy = temperature == 0
    return _Request(
        max_new_tokens=_integer("max_new_tokens", max_new_tokens),
        num_samples=_integer("num_samples", num_samples),
        swap_every=_integer("swap_every", swap_every),
        pad_id=_integer("pad_id", pad_id, None),
        key=_checked_key(key, temperature),
        sampling=Sampling(greedy, None if greedy else top_k, not greedy and top_p is not None and top_p < 1),
        controls=Controls(
            jnp.float32(temperature or 1.0), jnp.float32(1.0 if top_p is None else top_p), jnp.asarray(stops, jnp.int32)
        ),
    )


def _checked_key(key: Any, temperature: float) -> jax.Array:
    if key is None:
        if temperature > 0:
            raise ValueError(
                f"key is None, but temperature={temperature} draws at random; pass key=jax.random.key(seed)"
            )
        return jax.random.key(0)  # greedy: drawn from by nobody
    if not isinstance(key, jax.Array):
        raise ValueError(f"key={str(key)[:40]}: a PRNG key is needed, not {type(key).__name__}: jax.random.key(seed)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def _split(model: nnx.Module) -> tuple:
    """(graphdef, weights, the layers' InputAmax), committed; an amax to where the weights are, on every device."""
    graphdef, params, seen = nnx.split(model, nnx.Not(InputAmax), ...)
    params = jax.tree.map(committed, params)
    if jax.tree.leaves(seen):
        shardings = [leaf.sharding for leaf in jax.tree.leaves(params)]
        meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
        target = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec()) if meshes else shardings[0]
        seen = jax.device_put(seen, target)
    return graphdef, params, seen


def committed(x: jax.Array) -> jax.Array:
    """x committed to where it is, without a copy.

    jit compiles anew for arrays that differ in that alone, as those that a checkpoint restores (committed) and those
    that `quantize_params` makes (not) do.
    """
    return x if getattr(x, "committed", True) else jax.device_put(x, x.sharding)


