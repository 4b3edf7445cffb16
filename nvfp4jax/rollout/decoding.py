"""The rollout: prefill and a decode loop over a KV cache in one jitted function, with the weights as an argument.

    prefill(graphdef, params, prompt, ...) -> DecodeState   the prompts run once, their caches repeated for each sample
    decode(graphdef, params, state, ...)   -> DecodeState   tokens until a limit or until all have stopped

`rollout` is both in one program. `generate(weights=...)` runs them as two and swaps weights between chunks of `decode`:
params of the same shapes, so nothing is traced again.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import scaling
from nvfp4jax.layers import InputAmax
from nvfp4jax.models.attention import extend_cache
from nvfp4jax.rollout.sampling import Sampling, row_keys, sample


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What `generate` returns; row b * num_samples + s is sample s of prompt b.

    tokens: i32 [B * num_samples, max_new_tokens], pad_id after the end.
    lengths: i32 [B * num_samples], tokens of each row, its stop token included.
    logprobs: f32 like tokens, of each sampled token under softmax(logits / temperature), before top-k and top-p; 0
        after the end.
    experts: None, or i32 [L_moe, B * num_samples, max_new_tokens, k], the experts that each new token was routed to as
        the model read it: -1 where it never did (a row's last token, and after the end).
    prompt_experts: None, or i32 [L_moe, B, T, k], those of the prompts' tokens, -1 at padding.
    weight_versions: None, or i32 like tokens, the step of the weights that made the logits each token was sampled from,
        -1 after the end.
    """

    tokens: Int[Array, "R N"]
    lengths: Int[Array, "R"]
    logprobs: Float[Array, "R N"]
    experts: Int[Array, "L R N k"] | None = None
    prompt_experts: Int[Array, "L B T k"] | None = None
    weight_versions: Int[Array, "R N"] | None = None


@runtime_checkable
class WeightSource(Protocol):
    """Where `generate` looks for newer weights; `checkpoint.reload.Reader` is one."""

    active_step: int  # the step of the weights that the model holds

    def take(self) -> Any:
        """At once: None, or newer weights, `.state` (tree, shapes, dtypes and shardings of the model's) and their `.step`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a rollout. new_tokens and cache_length are sizes of buffers; the limit itself is traced."""

    new_tokens: int
    cache_length: int
    num_samples: int = 1
    sampling: Sampling = Sampling()
    pad_id: int = 0
    return_experts: bool = False
    cache_dtype: DTypeLike | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """What is traced about a rollout: another value compiles nothing."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stop_tokens: Int[Array, "n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Rows in flight. R = B * num_samples rows, S cache slots, N = new_tokens."""

    cache: Any
    key_mask: Bool[Array, "R S"]  # slots that hold a token of the row; False at padding and after a row's end
    keys: jax.Array  # [R], one PRNG key a row
    token: Int[Array, "R"]  # the last one sampled, not yet read by the model
    position: Int[Array, "R"]  # of `token`
    slot: Int[Array, ""]  # the cache slot `token` goes to
    step: Int[Array, ""]  # tokens sampled so far
    done: Bool[Array, "R"]
    tokens: Int[Array, "R N"]
    logprobs: Float[Array, "R N"]
    lengths: Int[Array, "R"]
    experts: Int[Array, "L R N k"] | None
    prompt_experts: Int[Array, "L B T k"] | None
    seen: Any  # the nnx.State of the layers' InputAmax, brought up to date by each call of the model (mode "delayed")


def _merge(graphdef: nnx.GraphDef, params: Mapping, seen: Mapping) -> nnx.Module:
    """The model; `seen` decides where `params` holds the same."""
    return nnx.merge(graphdef, nnx.merge_state(params, seen))


def token_positions(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count the tokens alone; 0 at padding on the left."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - jnp.int32(1), jnp.int32(0))


def prefill(
    graphdef: nnx.GraphDef,
    params: Mapping,
    prompt: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: jax.Array,
    controls: Controls,
    settings: Settings,
    seen: Mapping | None = None,
) -> DecodeState:
    """Runs the prompts (padded on the left) and samples each row's first token. keys: [B * num_samples].

    seen: the nnx.State of the model's InputAmax, where `params` does not hold them (those of a `reload.Reader` do not).
    """
    model = _merge(graphdef, params, seen or {})
    batch, steps = prompt.shape
    positions = token_positions(mask)
    flags = dict(return_experts=True) if settings.return_experts else {}
    with scaling.valid_rows(mask):
        logits, cache, *experts = model(
            prompt,
            positions,
            model.init_cache(batch, steps, settings.cache_dtype),
            mask,
            decode_only_last_token=True,
            **flags,
        )
    prompt_experts = jnp.where(mask[None, :, :, None], experts[0], jnp.int32(-1)) if experts else None
    rows = lambda x: jnp.repeat(x, settings.num_samples, axis=0)  # noqa: E731
    total = batch * settings.num_samples
    new = settings.new_tokens
    state = DecodeState(
        cache=extend_cache(cache, settings.cache_length, settings.num_samples),
        key_mask=rows(jnp.pad(mask, ((0, 0), (0, settings.cache_length - steps)))),
        keys=keys,
        token=jnp.zeros(total, jnp.int32),
        position=rows(positions[:, -1]),
        slot=jnp.int32(steps - 1),
        step=jnp.int32(0),
        done=jnp.zeros(total, bool),
        tokens=jnp.full((total, new), settings.pad_id, jnp.int32),
        logprobs=jnp.zeros((total, new), jnp.float32),
        lengths=jnp.zeros(total, jnp.int32),
        experts=jnp.full((experts[0].shape[0], total, new, experts[0].shape[-1]), -1, jnp.int32) if experts else None,
        prompt_experts=prompt_experts,
        seen=nnx.state(model, InputAmax),
    )
    return _accept(state, rows(logits[:, -1]), controls, settings)


def decode(
    graphdef: nnx.GraphDef,
    params: Mapping,
    state: DecodeState,
    limit: Int[Array, ""],
    controls: Controls,
    settings: Settings,
) -> DecodeState:
    """Goes on until every row has `limit` tokens (at most settings.new_tokens) or has stopped."""
    limit = jnp.minimum(limit, jnp.int32(settings.new_tokens))

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < limit) & ~state.done.all()

    def step(state: DecodeState) -> DecodeState:
        model = _merge(graphdef, params, state.seen)
        alive = ~state.done
        # A finished row still runs, on its last token; its slot stays masked, which keeps it out of every amax.
        key_mask = lax.dynamic_update_slice(state.key_mask, alive[:, None], (jnp.int32(0), state.slot))
        flags = dict(return_experts=True) if settings.return_experts else {}
        with scaling.valid_rows(alive[:, None]):
            logits, cache, *experts = model(
                state.token[:, None], state.position[:, None], state.cache, key_mask, **flags
            )
        state = dataclasses.replace(state, cache=cache, key_mask=key_mask, seen=nnx.state(model, InputAmax))
        if experts:
            ids = jnp.where(alive[None, :, None, None], experts[0], jnp.int32(-1))
            zero = jnp.int32(0)
            at = (zero, zero, state.step - jnp.int32(1), zero)
            state = dataclasses.replace(state, experts=lax.dynamic_update_slice(state.experts, ids, at))
        return _accept(state, logits[:, -1], controls, settings)

    return lax.while_loop(unfinished, step, state)


def _accept(state: DecodeState, logits: Float[Array, "R V"], controls: Controls, settings: Settings) -> DecodeState:
    """Samples the next token of each row that has not stopped and books it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token, logprob = sample(logits, keys, controls.temperature, controls.top_p, settings.sampling)
    alive = ~state.done
    token = jnp.where(alive, token, jnp.int32(settings.pad_id))
    logprob = jnp.where(alive, logprob, jnp.float32(0))
    at = (jnp.int32(0), state.step)
    one = jnp.int32(1)
    return dataclasses.replace(
        state,
        token=token,
        position=state.position + alive.astype(jnp.int32),
        slot=state.slot + one,
        step=state.step + one,
        done=state.done | (token[:, None] == controls.stop_tokens[None]).any(-1),
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], at),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], at),
        lengths=state.lengths + alive.astype(jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"))
def rollout(
    graphdef: nnx.GraphDef,
    params: Mapping,
    prompt: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    key: jax.Array,
    limit: Int[Array, ""],
    controls: Controls,
    settings: Settings,
    seen: Mapping | None = None,
) -> DecodeState:
    """Prefill and decode in one program; all but `graphdef` and `settings` is traced. The cache is not returned."""
    keys = row_keys(key, prompt.shape[0], settings.num_samples)
    state = prefill(graphdef, params, prompt, mask, keys, controls, settings, seen)
    state = decode(graphdef, params, state, limit, controls, settings)
    return dataclasses.replace(state, cache=None)


_prefill = jax.jit(prefill, static_argnames=("graphdef", "settings"))
_decode = jax.jit(decode, static_argnames=("graphdef", "settings"), donate_argnames="state")


def _swapping_rollout(
    model: nnx.Module,
    weights: WeightSource,
    swap_every: int,
    prompt: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    key: jax.Array,
    limit: int,
    controls: Controls,
    settings: Settings,
) -> tuple[DecodeState, np.ndarray]:
    """`rollout` in chunks of `swap_every` tokens, newer weights between them; and the version of each step, i32 [limit]."""
    graphdef, params, seen = _split(model)
    structure = jax.tree.structure(params)
    versions = np.full(limit, weights.active_step, np.int32)
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
            state = _prefill(graphdef, params, prompt, mask, keys, controls, settings, seen)
        else:
            end = jnp.int32(min(start + swap_every, limit))
            state = _decode(graphdef, params, state, end, controls, settings)
        if np.asarray(state.done).all():  # waits for the chunk
            break
    return dataclasses.replace(state, cache=None), versions


def bucket(length: int) -> int:
    """length rounded up to a multiple of 16, or of an eighth of its power of two: few programs, little waste."""
    step = max(16, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


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

    model: called as `model(tokens, positions, cache, attention_mask [B, S], decode_only_last_token=...) -> (logits,
        cache)`, with `init_cache(batch, length, dtype) -> models.KVCache`; NVFP4 layers or none. Its weights are an
        argument of the compiled program: new ones of equal shape compile nothing. Layers in mode "delayed" go on from
        the model's histories of amaxes (one call for the prompts, one for each token), and the model has them afterwards.
    input_ids: int [B, T]; attention_mask: bool or int [B, T], 0 where there is no token (padding on either side, or
        gaps: what is masked does not exist, positions count the rest). None: every token counts.
    max_new_tokens: at least 1. temperature: 0 is greedy. top_k, top_p: see `sampling.sample`. key: a PRNG key, needed
        where temperature > 0; row b's samples depend on it, on b and on the row alone.
    stop_tokens: a row ends with the first of them it draws. pad_id: fills what follows.
    cache_length: slots of the KV cache, at least T + max_new_tokens; without it, T and max_new_tokens are rounded up
        (see `bucket`), so that near lengths share a program. cache_dtype: the model's where it is None.
    weights: a `checkpoint.reload.Reader` of this model, or the like. It is asked for newer weights before the prompts and
        then at most every `swap_every` tokens, and never waited for. Weights that it hands over serve from the next
        token on and stay in `model`; `weight_versions` tells them apart. Rows in flight go on with the keys and values
        that older weights made of the tokens before (the usual in-flight update of reinforcement learning).

    ValueError, naming the argument, for what does not fit.
    """
    ids, mask = check_prompts(model, input_ids, attention_mask)
    batch, length = ids.shape
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples), ("swap_every", swap_every)):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: above 0 and at most 1, or None")
    if temperature > 0 and key is None:
        raise ValueError(f"key is None, but temperature={temperature} draws at random; pass key=jax.random.key(seed)")
    if cache_length is not None and length + max_new_tokens > cache_length:
        raise ValueError(
            f"input_ids [{batch}, {length}] and max_new_tokens={max_new_tokens} need {length + max_new_tokens} slots; "
            f"the cache has cache_length={cache_length}"
        )
    # Tokens to the right, padding to the left; then padding up to the bucket.
    order = np.argsort(mask, axis=1, kind="stable")
    pad = 0 if cache_length is not None else bucket(length) - length
    ids, mask = (np.pad(np.take_along_axis(x, order, 1), ((0, 0), (pad, 0))) for x in (ids, mask))
    ids = np.where(mask, ids, 0)
    new_tokens = bucket(max_new_tokens) if cache_length is None else cache_length - length
    greedy = temperature == 0
    settings = Settings(
        new_tokens=new_tokens,
        cache_length=ids.shape[1] + new_tokens,
        num_samples=num_samples,
        sampling=Sampling(greedy, None if greedy else top_k, not greedy and top_p is not None and top_p < 1),
        pad_id=pad_id,
        return_experts=return_experts,
        cache_dtype=None if cache_dtype is None else jnp.dtype(cache_dtype),
    )
    controls = Controls(
        jnp.float32(temperature or 1.0),
        jnp.float32(1.0 if top_p is None else top_p),
        jnp.asarray(tuple(stop_tokens), jnp.int32),
    )
    if key is None:
        key = jax.random.key(0)  # greedy: drawn from by nobody
    elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    prompt, valid = jnp.asarray(ids), jnp.asarray(mask)
    versions = None
    if weights is None:
        graphdef, params, seen = _split(model)
        state = rollout(graphdef, params, prompt, valid, key, jnp.int32(max_new_tokens), controls, settings, seen)
    else:
        state, of_step = _swapping_rollout(
            model, weights, swap_every, prompt, valid, key, max_new_tokens, controls, settings
        )
        sampled = np.arange(max_new_tokens) < np.asarray(state.lengths)[:, None]
        versions = jnp.asarray(np.where(sampled, of_step, np.int32(-1)))
    if jax.tree.leaves(state.seen):
        nnx.update(model, state.seen)
    prompt_experts = state.prompt_experts
    if return_experts:
        back = jnp.asarray(np.argsort(order, axis=1, kind="stable"))
        prompt_experts = jnp.take_along_axis(prompt_experts[:, :, pad:], back[None, :, :, None], axis=2)
    return Rollout(
        state.tokens[:, :max_new_tokens],
        state.lengths,
        state.logprobs[:, :max_new_tokens],
        state.experts[:, :, :max_new_tokens] if return_experts else None,
        prompt_experts,
        versions,
    )


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


def check_prompts(
    model: nnx.Module, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids i32 [B, T], mask bool [B, T]) on the host, or a ValueError."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids {ids.dtype} {list(ids.shape)}: token ids [B, T] are needed, at least one of them")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}")
    mask = mask.astype(bool)
    empty = np.flatnonzero(~mask.any(1))
    if empty.size:
        raise ValueError(f"attention_mask: row {empty[0]} has no token; give every prompt at least one")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    wrong = mask & ((ids < 0) | (ids >= (np.iinfo(np.int32).max if vocabulary is None else vocabulary)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"input_ids[{row}, {column}]={ids[row, column]} is outside the vocabulary of {vocabulary}")
    return ids.astype(np.int32), mask
