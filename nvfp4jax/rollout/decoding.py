"""The rollout: prefill and a decode loop over a cache in one jitted function, with the weights as an argument.

    prefill(graphdef, params, prompt, ...) -> DecodeState   the prompts run once, their caches repeated for each sample
    decode(graphdef, params, state, ...)   -> DecodeState   tokens until a limit or until all have stopped

`rollout` is both in one program. `generate(weights=...)` runs them as two and swaps weights between chunks of `decode`:
params of the same shapes, so nothing is traced again. In a queue (see queue.py) `prefill` fills places of rows in flight between chunks.
The graphdef is an ordinary argument: a static pytree, which jit compares and never hashes, so a model may hold what cannot be hashed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import scaling
from nvfp4jax.layers import InputAmax
from nvfp4jax.models import cache
from nvfp4jax.models.protocol import Output
from nvfp4jax.rollout.sampling import Edits, Sampling, drawn, likeliest, prompt_tokens, row_keys, sample


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a rollout. new_tokens and cache_length are sizes of buffers; the limit itself is traced.

    repeats: how many rows of the caller's, one after the other, each prompt stands for; all have num_samples. For models that take a
    cache.SharedCache: share_prompts, a prompt's keys and values are held once for all its samples; prefix, slots, a multiple of
    ops.SHARED_STEP, that all prompts begin with and go beyond: they run once and are held once; of several samples each prompt is too.
    common: tokens that all prompts begin with and go beyond, 0 for no more than `prefix`: those behind it run once too, and each prompt
    has a copy of their keys and values.
    """

    new_tokens: int
    cache_length: int
    num_samples: int = 1
    sampling: Sampling = Sampling()
    pad_id: int = 0
    return_experts: bool = False
    cache_dtype: DTypeLike | None = None
    repeats: int = 1
    share_prompts: bool = False
    prefix: int = 0
    common: int = 0
    top_logprobs: int = 0

    @property
    def samples(self) -> int:
        """Of a prompt, those of its repetitions together."""
        return self.num_samples * self.repeats

    @property
    def begin(self) -> int:
        """The tokens that run once for all prompts."""
        return max(self.prefix, self.common)

    @property
    def prompt_slots(self) -> int:
        """Of a row, those in front of its new tokens. Prompts may come in fewer columns."""
        return self.cache_length - self.new_tokens

    @property
    def of_decode(self) -> "Settings":
        """What decoding reads: the same for prompts that have more tokens in common, within a step of 128, so that no program is compiled."""
        return dataclasses.replace(self, common=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beginning:
    """What the model made of the tokens that all prompts begin with, as a row of its own.

    shared: the cache's first settings.prefix slots, which rows share; own: those behind them, which each row has a copy of, or None.
    experts: i32 [L, 1, P, k], or None.
    """

    shared: Any
    own: Any
    experts: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """What is traced about a rollout: another value compiles nothing; what is None is not in the program."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stop_tokens: Int[Array, "n"]
    min_p: Float[Array, ""] | None = None
    edits: Edits | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Rows in flight. R = B * samples rows, N = new_tokens; the cache has each row's tokens from slot 0 on, those of the prompts
    once for all samples where they are shared."""

    cache: Any
    keys: jax.Array  # [R], one PRNG key a row
    token: Int[Array, "R"]  # the last one sampled, not yet read by the model
    position: Int[Array, "R"]  # of `token`, and its slot
    step: Int[Array, ""]  # calls of the model so far: the tokens of each row that began with it and has not stopped
    done: Bool[Array, "R"]
    tokens: Int[Array, "R N"]
    logprobs: Float[Array, "R N"]
    lengths: Int[Array, "R"]
    experts: Int[Array, "L R N k"] | None
    prompt_experts: Int[Array, "L B T k"] | None
    used: Int[Array, "R V"] | None  # where a penalty asks: the tokens of a row's prompt and answer, see `prompt_tokens`
    top_tokens: Int[Array, "R N n"] | None
    top_logprobs: Float[Array, "R N n"] | None
    # The nnx.State of the layers' InputAmax, brought up to date by each call of the model (mode "delayed", telemetry).
    seen: Any
    # The most tokens of each row, which then ends by itself and counts its own steps: rows may have begun at different ones. None:
    # all rows began together and go on to the limit that `decode` is given.
    limits: Int[Array, "R"] | None = None


def _merge(graphdef: Any, params: Mapping, seen: Mapping) -> nnx.Module:
    """The model; `seen` decides where `params` holds the same."""
    return nnx.merge(graphdef, nnx.merge_state(params, seen))


def takes_experts(model: nnx.Module) -> bool:
    """Whether a model's call has `return_experts`."""
    parameters = inspect.signature(type(model).__call__).parameters.values()
    return any(p.name == "return_experts" or p.kind is p.VAR_KEYWORD for p in parameters)


def call(
    model: nnx.Module,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    kv: Any,
    *,
    valid: Bool[Array, "B T"],
    last: Int[Array, "B"] | None = None,
    return_experts: bool = False,
) -> Output:
    """`model` called as the Decoder protocol says. ValueError for a model that does not answer as it says.

    Around a model that is not ours lies the mask of valid rows, for NVFP4 layers that it calls without one.
    """
    if return_experts and not takes_experts(model):
        raise ValueError(f"return_experts: {type(model).__name__} has no mixture-of-experts layer (its call takes no return_experts)")
    flags = dict(return_experts=True) if return_experts else {}
    with scaling.valid_rows(valid):
        out = model(tokens, positions, kv, valid=valid, last=last, **flags)
    if not isinstance(out, Output):
        raise ValueError(f"{type(model).__name__} gave a {type(out).__name__}; a decoder gives a nvfp4jax.models.Output")
    steps = tokens.shape[1] if last is None else 1
    if out.logits.ndim != 3 or out.logits.shape[:2] != (tokens.shape[0], steps):
        raise ValueError(
            f"{type(model).__name__} gave logits {list(out.logits.shape)} for {list(tokens.shape)} tokens; "
            f"[{tokens.shape[0]}, {steps}, V] is needed" + (" (last: one token a row)" if last is not None else "")
        )
    if return_experts and out.experts is None:
        raise ValueError(f"return_experts: {type(model).__name__} gave no experts")
    return out


def prefill(
    graphdef: Any,
    params: Mapping,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: jax.Array,
    controls: Controls,
    settings: Settings,
    seen: Mapping | None = None,
    limits: Int[Array, "R"] | None = None,
    first: Beginning | None = None,
    real: Bool[Array, "B"] | None = None,
) -> DecodeState:
    """Runs the prompts (padded on the right) and samples each row's first token. keys: [B * samples].

    seen: the nnx.State of the model's InputAmax, where `params` does not hold them (those of a `reload.Reader` do not).
    limits: see DecodeState; a row of 0 has ended before its first token. first: what `run_prefix` gave, where it has run. real: prompts
    that count, None: all; the others fill up a batch, are in no amax and in no count, and what is sampled for them is to be dropped.
    """
    model = _merge(graphdef, params, seen or {})
    batch, steps = prompt.shape
    positions = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None], (batch, steps))
    valid = positions < lengths[:, None]
    valid = valid if real is None else valid & real[:, None]
    if settings.prefix and first is None:
        first = _run_first(model, prompt[:1, : settings.begin], settings)
    out = _run_prompts(model, prompt, positions, valid, lengths, first, settings)
    rows = lambda x: jnp.repeat(x, settings.samples, axis=0)  # noqa: E731
    total, new = batch * settings.samples, settings.new_tokens
    prompt_experts = experts = None
    if settings.return_experts:
        prompt_experts = jnp.where(valid[None, :, :, None], out.experts, jnp.int32(-1))
        experts = jnp.full((out.experts.shape[0], total, new, out.experts.shape[-1]), -1, jnp.int32)
    used = None
    if controls.edits is not None and controls.edits.read_tokens:
        used = rows(prompt_tokens(prompt, lengths, out.logits.shape[-1]))
    n = settings.top_logprobs
    if n > out.logits.shape[-1]:
        raise ValueError(f"top_logprobs={n}: the vocabulary has {out.logits.shape[-1]} tokens")
    done = jnp.zeros(total, bool) if limits is None else limits < 1
    state = DecodeState(
        cache=_for_samples(out.cache, lengths, settings),
        keys=keys,
        token=jnp.zeros(total, jnp.int32),
        position=rows(lengths) - jnp.int32(1),  # behind the prompt, once the first token is accepted
        step=jnp.int32(0),
        done=done,
        tokens=jnp.full((total, new), settings.pad_id, jnp.int32),
        logprobs=jnp.zeros((total, new), jnp.float32),
        lengths=jnp.zeros(total, jnp.int32),
        experts=experts,
        prompt_experts=prompt_experts,
        used=used,
        top_tokens=jnp.full((total, new, n), settings.pad_id, jnp.int32) if n else None,
        top_logprobs=jnp.zeros((total, new, n), jnp.float32) if n else None,
        seen=nnx.state(model, InputAmax),
        limits=limits,
    )
    return _accept(state, rows(out.logits[:, -1]), controls, settings)


def run_prefix(graphdef: Any, params: Mapping, prefix: Int[Array, "1 P"], settings: Settings, seen: Mapping) -> tuple[Beginning, Any]:
    """What all prompts begin with, run as a row of its own, and the layers' InputAmax then: `prefill` goes on from it."""
    model = _merge(graphdef, params, seen)
    return _run_first(model, prefix, settings), nnx.state(model, InputAmax)


def _run_first(model: nnx.Module, prefix: Int[Array, "1 P"], settings: Settings) -> Beginning:
    tokens = prefix.shape[1]
    kv, last = model.init_cache(1, tokens, settings.cache_dtype), jnp.full((1,), tokens - 1, jnp.int32)
    positions = jnp.arange(tokens, dtype=jnp.int32)[None]
    out = call(model, prefix, positions, kv, valid=jnp.ones((1, tokens), bool), last=last, return_experts=settings.return_experts)
    return Beginning(*cache.split(out.cache, settings.prefix), out.experts if settings.return_experts else None)


def _run_prompts(
    model: nnx.Module,
    prompt: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    lengths: Int[Array, "B"],
    first: Beginning | None,
    settings: Settings,
) -> Output:
    """The call for all prompts, behind what they have in common, which has run as a row of its own."""
    batch, steps = prompt.shape
    options, dtype, held = dict(return_experts=settings.return_experts), settings.cache_dtype, settings.prefix
    if first is None:
        kv = model.init_cache(batch, steps, dtype)
        return call(model, prompt, positions, kv, valid=valid, last=lengths - jnp.int32(1), **options)
    # As many slots whatever is in common, so that decoding is one program; a refill's prompts have no more than they need.
    room = (max(steps, settings.prompt_slots) if settings.samples > 1 else settings.cache_length) - held
    own = model.init_cache(batch, room, dtype)
    own = own if first.own is None else cache.begun(own, first.own)
    kv = cache.SharedCache(own, first.shared, jnp.full((batch,), held, jnp.int32))
    begin = settings.begin
    rest = (x[:, begin:] for x in (prompt, positions))
    out = call(model, *rest, kv, valid=valid[:, begin:], last=lengths - jnp.int32(begin + 1), **options)
    if first.experts is None:
        return out
    experts = jnp.concatenate([jnp.repeat(first.experts, batch, axis=1), out.experts], axis=2)
    return dataclasses.replace(out, experts=experts)


def _for_samples(prompts: Any, lengths: Int[Array, "B"], settings: Settings) -> Any:
    """The cache of all samples, with room for their tokens."""
    if settings.prefix and settings.samples == 1:
        return dataclasses.replace(prompts, shared=cache.decoded(prompts.shared))
    room = settings.cache_length - settings.prefix
    if settings.prefix:  # the prompts' own parts become what their samples share
        behind = lengths - jnp.int32(settings.prefix)
        return cache.share(prompts.own, behind, settings.samples, room - cache.length(prompts.own), prompts.shared)
    if not settings.share_prompts:
        return cache.extend(cache.repeat(prompts, settings.samples), room)
    return cache.share(prompts, lengths, settings.samples, room - cache.length(prompts))


def decode(
    graphdef: Any,
    params: Mapping,
    state: DecodeState,
    limit: Int[Array, ""],
    controls: Controls,
    settings: Settings,
    wanted: Int[Array, ""] | None = None,
) -> DecodeState:
    """Goes on until the state's step is `limit` or every row has stopped; with `wanted`, at most all, until all samples of so many prompts
    have.

    Rows without `limits` of their own have a token a step: the step is then at most settings.new_tokens.
    """
    limit = limit if state.limits is not None else jnp.minimum(limit, jnp.int32(settings.new_tokens))

    def unfinished(state: DecodeState) -> jax.Array:
        if wanted is None:
            return (state.step < limit) & ~state.done.all()
        ended = state.done.reshape(-1, settings.samples).all(1).sum(dtype=jnp.int32)
        return (state.step < limit) & (ended < wanted)

    def step(state: DecodeState) -> DecodeState:
        model = _merge(graphdef, params, state.seen)
        # A finished row still runs, takes no part in any amax and goes to no expert. It stands on the first slot of its own, which nobody
        # reads any more: behind its last token attention would read all of them.
        alive = ~state.done
        front = state.cache.slots if isinstance(state.cache, cache.SharedCache) else jnp.int32(0)
        token, position = state.token[:, None], jnp.where(alive, state.position, front)[:, None]
        out = call(
            model, token, position, state.cache, valid=alive[:, None], return_experts=settings.return_experts
        )
        state = dataclasses.replace(state, cache=out.cache, seen=nnx.state(model, InputAmax))
        if settings.return_experts:
            ids = jnp.where(alive[None, :, None, None], out.experts, jnp.int32(-1))
            column = _column(state) - jnp.int32(1)  # of the token that was read
            state = dataclasses.replace(state, experts=_put(state.experts, ids, column, 2))
        return _accept(state, out.logits[:, -1], controls, settings)

    return lax.while_loop(unfinished, step, state)


def _column(state: DecodeState) -> Int[Array, ""] | Int[Array, "R"]:
    """Where the next token goes: the same for all rows that began together, or one for each."""
    return state.step if state.limits is None else state.lengths


def _put(buffer: jax.Array, new: jax.Array, column: Int[Array, ""] | Int[Array, "R"], axis: int) -> jax.Array:
    """new, with one column, in that column of the buffer [..., R, N, ...], N at `axis`; columns past the last one are dropped."""
    if not column.ndim:
        return lax.dynamic_update_slice_in_dim(buffer, new, column, axis)
    lead = [jnp.arange(size, dtype=jnp.int32).reshape(-1, *[1] * (axis - 1 - i)) for i, size in enumerate(buffer.shape[:axis])]
    places = (*lead, column.reshape(*[1] * (axis - 1), -1))  # all axes in front, so that no scatter has to move the buffer's
    return buffer.at[places].set(new.squeeze(axis), mode="drop", unique_indices=True)


def _accept(state: DecodeState, logits: Float[Array, "R V"], controls: Controls, settings: Settings) -> DecodeState:
    """Samples the next token of each row that has not stopped and books it."""
    column = _column(state)
    keys = jax.vmap(jax.random.fold_in, (0, 0 if column.ndim else None))(state.keys, column)
    edited = None if controls.edits is None else controls.edits(logits, state.used)
    token, logprob = sample(
        logits, keys, controls.temperature, controls.top_p, settings.sampling, min_p=controls.min_p, edited=edited
    )
    alive = ~state.done
    if settings.top_logprobs:
        ids, logprobs = likeliest(logits, controls.temperature, settings.top_logprobs)
        ids = jnp.where(alive[:, None], ids, jnp.int32(settings.pad_id))
        logprobs = jnp.where(alive[:, None], logprobs, jnp.float32(0))
        state = dataclasses.replace(
            state,
            top_tokens=_put(state.top_tokens, ids[:, None], column, 1),
            top_logprobs=_put(state.top_logprobs, logprobs[:, None], column, 1),
        )
    if state.used is not None:
        state = dataclasses.replace(state, used=drawn(state.used, token))
    stored = jnp.where(alive, token, jnp.int32(settings.pad_id))
    logprob = jnp.where(alive, logprob, jnp.float32(0))
    done = state.done | (token[:, None] == controls.stop_tokens[None]).any(-1)
    lengths = state.lengths + alive.astype(jnp.int32)
    return dataclasses.replace(
        state,
        token=jnp.where(alive, token, jnp.int32(0)),  # pad_id need not be a token
        position=state.position + alive.astype(jnp.int32),
        step=state.step + jnp.int32(1),
        done=done if state.limits is None else done | (lengths >= state.limits),
        tokens=_put(state.tokens, stored[:, None], column, 1),
        logprobs=_put(state.logprobs, logprob[:, None], column, 1),
        lengths=lengths,
    )


@functools.partial(jax.jit, static_argnames="settings")
def rollout(
    graphdef: Any,
    params: Mapping,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: jax.Array,
    limit: Int[Array, ""],
    controls: Controls,
    settings: Settings,
    seen: Mapping | None = None,
    limits: Int[Array, "R"] | None = None,
) -> DecodeState:
    """Prefill and decode in one program; all but `settings` is traced. The cache is not returned.

    prompt: padded on the right, lengths: the tokens of each row; limits: see DecodeState.
    """
    keys = row_keys(key, prompt.shape[0] * settings.repeats, settings.num_samples)
    state = prefill(graphdef, params, prompt, lengths, keys, controls, settings, seen, limits)
    state = decode(graphdef, params, state, limit, controls, settings)
    return dataclasses.replace(state, cache=None)
