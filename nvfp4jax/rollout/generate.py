"""`generate`: prompts of any shape in, sampled tokens out, through the jitted rollout."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from nvfp4jax import arguments, ops
from nvfp4jax import telemetry as telemetries
from nvfp4jax.layers import AmaxHistory, InputAmax, InputCounts
from nvfp4jax.models.cache import DTYPES
from nvfp4jax.rollout import decoding, memory, queue
from nvfp4jax.rollout.decoding import Controls, DecodeState, Settings
from nvfp4jax.rollout.progress import bar as progress_bar
from nvfp4jax.rollout.prompts import Packed, bucket, check_prompts, common, pack, repeats, unpack, vocabulary_of
from nvfp4jax.rollout.request import Request, check_fp8, check_model, checked
from nvfp4jax.rollout.sampling import row_keys

log = logging.getLogger("nvfp4jax")

COMMON_STEP = 16  # tokens that all prompts begin with run once by so many: each number of them is a program
OWN_WEIGHTS = -2  # the version of tokens by weights that no step was taken for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What `generate` returns, a pytree; row b * num_samples + s is sample s of prompt b.

    tokens: i32 [B * num_samples, max_new_tokens], pad_id after the end.
    lengths: i32 [B * num_samples], tokens of each row, its stop token included.
    logprobs: f32 like tokens, of each sampled token under the model's own softmax(logits / temperature), which a trainer
        can compute again: before logit_bias, penalties, top-k, top-p and min-p (temperature 1 where greedy); 0 after the
        end. With all of those off it is the log of the probability that the token was drawn with.
    experts: None, or i32 [L_moe, B * num_samples, max_new_tokens, k], the experts that each new token was routed to as
        the model read it: -1 where it never did (a row's last token, and after the end).
    prompt_experts: None, or i32 [L_moe, B, T, k], those of the prompts' tokens, -1 at padding.
    weight_versions: None, or i64 like tokens, on the host: the step of the weights that made the logits each token was
        sampled from; OWN_WEIGHTS (-2) for weights of no step, those the model had when it was given; -1 after the end.
    top_tokens, top_logprobs: None, or the n likeliest tokens at each place, i32, and their logprobs, f32, as in
        `logprobs`; pad_id and 0 after the end.
    telemetry: None, or what NVFP4 made of each layer's activations, on the host: print it, or `telemetry.plot()`.
    """

    tokens: Int[Array, "R N"]
    lengths: Int[Array, "R"]
    logprobs: Float[Array, "R N"]
    experts: Int[Array, "L R N k"] | None = None
    prompt_experts: Int[Array, "L B T k"] | None = None
    weight_versions: Int[np.ndarray, "R N"] | None = None
    top_tokens: Int[Array, "R N n"] | None = None
    top_logprobs: Float[Array, "R N n"] | None = None
    telemetry: telemetries.Telemetry | None = None


@runtime_checkable
class WeightSource(Protocol):
    """Where `generate` looks for newer weights; `checkpoint.reload.Reader` is one."""

    active_step: int  # the step of the weights that the model holds, negative for none

    def take(self) -> Any:
        """At once: None, or newer weights, `.state` (tree, shapes, dtypes and shardings of the model's) and their `.step`."""


_prefill = jax.jit(decoding.prefill, static_argnames="settings")
_decode = jax.jit(decoding.decode, static_argnames="settings", donate_argnames="state")


OnTokens = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


def _newer(model: nnx.Module, weights: WeightSource, params: Any) -> tuple[Any, int] | None:
    """Weights that have come, in the model: (params, their step). ValueError, and the model as it was, for what does not fit."""
    new = weights.take()
    if new is None:
        return None
    if not (hasattr(new, "state") and hasattr(new, "step")):
        raise ValueError(f"weights: take() gave {arguments.shown(new)}: None, or an object with `state` and `step`, is needed")
    step = arguments.whole("weights: step", new.step)
    structure: Any = jax.tree.structure(params)
    if structure != jax.tree.structure(new.state):
        raise ValueError(f"weights: the state of step {step} has another tree than the model's")
    for (path, old), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new.state), strict=True):
        if (np.shape(leaf), jnp.result_type(leaf)) != (old.shape, old.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"weights: step {step} has {name} as {arguments.shown(leaf)}, the model as {arguments.shown(old)}")
    nnx.update(model, new.state)
    return jax.tree.map(committed, new.state), step


def _rollout_in_chunks(
    parts: tuple[Any, Any, Any],
    visits: queue.Visits,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: jax.Array,
    limit: int,
    limits: Int[Array, "R"] | None,
    controls: Controls,
    settings: Settings,
) -> tuple[DecodeState, np.ndarray | None]:
    """`rollout` in chunks of visits.every tokens; and the version of the weights of each step, i64 [limit], where they may change.

    parts: `_split` of the model.

    Between chunks newer weights are taken, `on_tokens` sees the tokens so far and may end rows, and the progress is shown.
    """
    graphdef, params, seen = parts
    versions = None if visits.take is None else np.full(limit, visits.version, np.int64)
    keys = row_keys(key, prompt.shape[0] * settings.repeats, settings.num_samples)
    state: DecodeState | None = None
    for start in [0, *range(1, limit, visits.every)]:
        if versions is not None and visits.take is not None and (newer := visits.take(params)) is not None:
            params, versions[start:] = newer
        if state is None:
            state = _prefill(graphdef, params, prompt, lengths, keys, controls, settings, seen, limits)
        else:
            end = jnp.int32(min(start + visits.every, limit)) if limits is None else state.step + jnp.int32(visits.every)
            state = _decode(graphdef, params, state, end, controls, settings.of_decode)
        if visits.on_tokens is not None:
            ended = visits.on_tokens(np.asarray(state.tokens[:, :limit]), np.asarray(state.lengths))
            if ended is not None:
                state = dataclasses.replace(state, done=state.done | jnp.asarray(ended))
        done = np.asarray(state.done)  # waits for the chunk
        if visits.show is not None:
            counts = np.asarray(state.lengths)
            visits.show(int((done | (counts >= limit)).sum()), int(counts.sum()))
        if done.all():
            break
    assert state is not None  # the first chunk is the prompts
    return dataclasses.replace(state, cache=None), versions


def generate(
    model: nnx.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int | Sequence[int] | np.ndarray,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    key: jax.Array | None = None,
    num_samples: int = 1,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    top_logprobs: int = 0,
    return_experts: bool = False,
    cache_length: int | None = None,
    cache_dtype: DTypeLike | None = None,
    weights: WeightSource | None = None,
    swap_every: int = 16,
    on_tokens: OnTokens | None = None,
    telemetry: bool = False,
    rows_in_flight: int | None = None,
    progress: bool = False,
) -> Rollout:
    """Samples `num_samples` continuations of each prompt.

    A prompt that has several, or that is given several times in a row, is run once, and its keys and values are held once. What all
    prompts begin with, 128 tokens or more, is run once, by steps of 16 tokens, and held once, by steps of 128. A row's tokens and
    logprobs are the same as without it, to the bit on Hopper where no scale spans rows; what cannot share is logged once.

    model: a `models.Decoder`, any nnx.Module with that call and `init_cache`; NVFP4 layers or none. Its weights are an
        argument of the compiled program: new ones of equal shape compile nothing. Layers in mode "delayed" go on from
        the model's histories of amaxes (one call for the prompts, one for each token), and the model has them afterwards.
    input_ids: int [B, T]; attention_mask: bool or int [B, T], 0 where there is no token (padding on either side, or
        gaps: what is masked does not exist, positions count the rest). None: every token counts.
    max_new_tokens: at least 1; one number, or one for each prompt, int [B]. temperature: 0 is greedy. top_k, top_p, min_p: see `sampling.sample`.
    repetition_penalty, presence_penalty, logit_bias (what a token's logit gains, -inf bans it): see `sampling.Edits`; they
        work where greedy, too.
    key: a PRNG key, needed where temperature > 0; row b's samples depend on it, on b and on the row alone. Or B keys, a
        seed for each prompt: `jax.vmap(jax.random.key)(seeds)`; then they depend on key[b] and on the row alone.
    stop_tokens: a row ends with the first of them it draws. pad_id: fills what follows.
    top_logprobs: how many of the likeliest tokens to return at each place. Logprobs of the prompts: see `logprobs`.
    cache_length: slots of a row's cache, at least the longest prompt's tokens and max_new_tokens; without it, both are
        rounded up (see `bucket`), so that near lengths share a program, where what all prompts begin with does not cross a step of 16
        tokens. cache_dtype: the model's where it is None;
        float8_e4m3fn halves what attention reads, with a scale for each slot and head (see `nvfp4jax.fp8`).
    weights: a `checkpoint.reload.Reader` of this model, or the like. It is asked for newer weights before the prompts and
        then at most every `swap_every` tokens, and never waited for. Weights that it hands over serve from the next
        token on and stay in `model`; `weight_versions` tells them apart. Rows in flight go on with the keys and values
        that older weights made of the tokens before (the usual in-flight update of reinforcement learning).
    on_tokens: called on the host after the first token and then every `swap_every` tokens with two NumPy arrays: the tokens so far, i32
        [B * num_samples, max_new_tokens], and the rows' lengths, i32 [B * num_samples]. It returns None, or bool [B * num_samples],
        True for rows that end here.
    telemetry: True returns a `telemetry.Telemetry`: for each NVFP4 layer the amax of its input over all calls, and which shares of its
        blocks saturated, were flushed, or lie beyond a shared scale's range. The tokens are the same. It is another program, in which
        XLA reads each activation once more beside the kernels; False, nothing of it is in the program.
    rows_in_flight: how many rows are decoded at a time; None: all. With a number, prompts wait in a queue, in their order, and take
        the places of rows that have ended, some at a time (`queue.REFILLS`), so that short answers do not wait for long ones, and any number
        of prompts fits: those of one filling run together, near lengths where several begin, not all. A place is a prompt with all its samples, and all its repetitions in
        a row where they fit: the number is rounded down to a multiple of that, to one place at least. A row's tokens are the same as
        without; so are the logprobs' bits on Hopper where no scale spans rows. Newer weights are also taken when places are filled, and
        run what all prompts begin with again: rows in flight go on behind the part that is held once, too. `on_tokens` is also called
        then, sees rows that wait with a length of 0, and may end them, too: then they have no token, and a prompt whose rows have all
        been ended does not run. Layers in mode "delayed" have one call for each filling, for all its prompts. Results are gathered on
        the host.
    progress: a bar on stderr, of rows that have ended and tokens a second; brought up to date as `on_tokens` is called.

    ValueError, naming the argument, for what does not fit: also a batch whose cache is more than a GPU has free, with the number of
    prompts, or of rows in flight, that would fit.
    """
    check_model(model)
    check_on_tokens(on_tokens)
    ids, mask = check_prompts(model, input_ids, attention_mask)
    vocabulary = vocabulary_of(model)
    ask = checked(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, logit_bias=logit_bias, vocabulary=vocabulary, key=key, prompts=ids.shape[0], num_samples=num_samples,
        stop_tokens=stop_tokens, pad_id=pad_id, top_logprobs=top_logprobs, swap_every=swap_every,
    )  # fmt: skip
    longest, largest = int(mask.sum(1).max()), 2**31 - 1
    arguments.flag("return_experts", return_experts)
    counting = telemetries.observed(model) if arguments.flag("telemetry", telemetry) else None
    arguments.flag("progress", progress)
    rows_in_flight = None if rows_in_flight is None else arguments.whole("rows_in_flight", rows_in_flight, 1)
    cache_dtype = None if cache_dtype is None else arguments.dtype("cache_dtype", cache_dtype, DTYPES)
    check_fp8(model, cache_dtype)
    if weights is not None and not isinstance(weights, WeightSource):
        raise ValueError(f"weights: {arguments.shown(weights)} has no take() and active_step; a checkpoint.reload.Reader of this model has")
    active_step = -1 if weights is None else arguments.whole("weights: active_step", weights.active_step)
    cache_length = None if cache_length is None else arguments.whole("cache_length", cache_length, 1, largest)
    if cache_length is not None and longest + ask.max_new_tokens > cache_length:
        raise ValueError(
            f"input_ids {list(ids.shape)} and max_new_tokens={ask.max_new_tokens} need {longest + ask.max_new_tokens} "
            f"slots; the cache has cache_length={cache_length}"
        )
    if cache_length is None and bucket(longest) + bucket(ask.max_new_tokens) > largest:
        raise ValueError(f"input_ids {list(ids.shape)} and max_new_tokens={ask.max_new_tokens} need more than the {largest} slots that a cache may "
                         "have; ask for fewer tokens")
    packed = pack(ids, mask, longest if cache_length is not None else bucket(longest))
    new_tokens = bucket(ask.max_new_tokens) if cache_length is None else cache_length - longest
    graphdef, params, seen = _split(model if counting is None else counting)
    times = repeats(packed)
    if rows_in_flight is not None:  # a place holds as many repetitions as fit
        times = max(n for n in range(1, times + 1) if times % n == 0 and (n == 1 or n * ask.num_samples <= rows_in_flight))
    sharing = _sharing(model, packed, times, ask.num_samples)
    settings = Settings(
        new_tokens=new_tokens,
        cache_length=packed.ids.shape[1] + new_tokens,
        num_samples=ask.num_samples,
        sampling=ask.sampling,
        pad_id=ask.pad_id,
        return_experts=return_experts,
        cache_dtype=cache_dtype,
        repeats=times,
        **sharing,
        top_logprobs=ask.top_logprobs,
    )
    if cache_length is None:  # what runs is what lies behind the common tokens
        packed = packed.cut(settings.common + bucket(longest - settings.common))
    parts, rows = (graphdef, params, seen), ids.shape[0] * ask.num_samples
    with progress_bar(rows, progress) as show:
        visits = queue.Visits(
            ask.swap_every,
            None if weights is None else functools.partial(_newer, model, weights),
            OWN_WEIGHTS if active_step < 0 else active_step,
            None if on_tokens is None else functools.partial(rows_to_end, on_tokens),
            show,
        )
        if rows_in_flight is None:
            out, noted = _all_at_once(model, parts, packed, ask, settings, visits, vocabulary)
        else:
            out, noted = _queued(model, parts, packed, ask, settings, rows_in_flight, visits, vocabulary)
    if counting is not None:
        nnx.update(counting, noted)
        noted = nnx.filter_state(noted, nnx.Not(InputCounts))
        out = dataclasses.replace(out, telemetry=telemetries.read(counting))
    if jax.tree.leaves(noted):
        nnx.update(model, noted)
    if out.prompt_experts is None:
        return out
    experts = unpack(np.repeat(np.asarray(out.prompt_experts), times, axis=1), packed, ids.shape[1], -1)
    return dataclasses.replace(out, prompt_experts=experts)


def check_on_tokens(on_tokens: Any) -> None:
    if on_tokens is not None and not callable(on_tokens):
        raise ValueError(f"on_tokens: a function is needed, not {arguments.shown(on_tokens)}")


def rows_to_end(on_tokens: OnTokens, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """What `on_tokens` answers, bool [R] or None."""
    asked = on_tokens(tokens, lengths)
    if asked is None:
        return None
    ended = np.asarray(asked, bool)
    if ended.shape != lengths.shape:
        raise ValueError(f"on_tokens gave {arguments.shown(ended)}: None, or bool [{len(lengths)}], one for each row, is needed")
    return ended


def _all_at_once(
    model: nnx.Module,
    parts: tuple[Any, Any, Any],
    packed: Packed,
    ask: Request,
    settings: Settings,
    visits: queue.Visits,
    vocabulary: int | None,
) -> tuple[Rollout, Any]:
    """Every prompt in flight from the first token on: one program, or chunks of it where there are visits; and what the layers noted.
    prompt_experts as packed."""
    graphdef, params, seen = parts
    times, new = settings.repeats, ask.max_new_tokens
    memory.check(model, params, len(packed.ids) // times, settings.prompt_slots, settings, vocabulary)
    versions = None
    prompt, lengths = jnp.asarray(packed.ids[::times]), jnp.asarray(packed.lengths[::times])
    limits = None if ask.limits is None else jnp.asarray(np.repeat(ask.limits, ask.num_samples))
    if not visits.any:
        state = decoding.rollout(graphdef, params, prompt, lengths, ask.key, jnp.int32(new), ask.controls, settings, seen, limits)
    else:
        state, of_step = _rollout_in_chunks(parts, visits, prompt, lengths, ask.key, new, limits, ask.controls, settings)
        if of_step is not None:
            sampled = np.arange(new) < np.asarray(state.lengths)[:, None]
            versions = np.where(sampled, of_step, -1)
    out = Rollout(
        state.tokens[:, :new],
        state.lengths,
        state.logprobs[:, :new],
        None if state.experts is None else state.experts[:, :, :new],
        state.prompt_experts,
        versions,
        None if state.top_tokens is None else state.top_tokens[:, :new],
        None if state.top_logprobs is None else state.top_logprobs[:, :new],
    )
    return out, state.seen


def _queued(
    model: nnx.Module,
    parts: tuple[Any, Any, Any],
    packed: Packed,
    ask: Request,
    settings: Settings,
    rows_in_flight: int,
    visits: queue.Visits,
    vocabulary: int | None,
) -> tuple[Rollout, Any]:
    """So many rows in flight, the other prompts in a queue; and what the layers noted. prompt_experts as packed."""
    graphdef, params, seen = parts
    times, new, steps = settings.repeats, ask.max_new_tokens, settings.prompt_slots
    size = queue.places(rows_in_flight, len(packed.ids) // times, settings)
    few = queue.refill_size(size)
    memory.check(model, params, size, steps, settings, vocabulary, queue.refill_settings(settings, steps), few)
    each = np.full(len(packed.ids), new, np.int32) if ask.limits is None else ask.limits
    prompts = queue.Prompts(packed.ids[::times], packed.lengths[::times], np.repeat(each, ask.num_samples), ask.key)
    found, versions, seen = queue.run(graphdef, params, seen, prompts, size, ask.controls, settings, visits)
    cut = lambda name, axis: jnp.asarray(found[name][(slice(None),) * axis + (slice(new),)]) if name in found else None  # noqa: E731
    out = Rollout(
        jnp.asarray(found["tokens"][:, :new]),
        jnp.asarray(found["lengths"]),
        jnp.asarray(found["logprobs"][:, :new]),
        cut("experts", 2),
        jnp.asarray(found["prompt_experts"]) if settings.return_experts else None,
        None if versions is None else versions[:, :new],
        cut("top_tokens", 1),
        cut("top_logprobs", 1),
    )
    return out, seen


def _sharing(model: nnx.Module, packed: Packed, times: int, samples: int) -> dict[str, Any]:
    """What is held once: fields of `Settings`."""
    alike = common(packed)
    held = alike // ops.SHARED_STEP * ops.SHARED_STEP
    several = times * samples > 1 and packed.ids.shape[1] >= ops.SHARED_STEP
    if not (held or several):
        return {}
    if not getattr(model, "takes_shared_cache", False):
        _log_unshared(type(model).__name__, "takes no cache.SharedCache, so that each row holds its whole prompt")
        return {}
    if held and jax.tree.leaves(nnx.state(model, AmaxHistory)):
        _log_unshared(type(model).__name__, "keeps histories of amaxes, one entry a call, so that no prefix is run by itself")
        held = 0
    return dict(share_prompts=several, prefix=held, common=alike // COMMON_STEP * COMMON_STEP if held else 0)


@functools.cache
def _log_unshared(name: str, reason: str) -> None:
    log.info("generate: %s %s", name, reason)


def _split(model: nnx.Module) -> tuple:
    """(graphdef, weights, the layers' InputAmax), committed; an amax to where the weights are, on every device."""
    parts: Any = nnx.split(model, nnx.Not(InputAmax), ...)
    graphdef, params, seen = parts
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


