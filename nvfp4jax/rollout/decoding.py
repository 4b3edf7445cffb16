"""The rollout: prefill and a decode loop over a cache in one jitted function, with the weights as an argument.

    prefill(graphdef, params, prompt, ...) -> DecodeState   the prompts run once, their caches repeated for each sample
    decode(graphdef, params, state, ...)   -> DecodeState   tokens until a limit or until all have stopped

`rollout` is both in one program. `generate(weights=...)` runs them as two and swaps weights between chunks of `decode`:
params of the same shapes, so nothing is traced again. The graphdef is an ordinary argument: a static pytree, which jit
compares and never hashes, so a model may hold what cannot be hashed.
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
from nvfp4jax.rollout.sampling import Sampling, row_keys, sample


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
    """Rows in flight. R = B * num_samples rows, N = new_tokens; the cache has each row's tokens from slot 0 on."""

    cache: Any
    keys: jax.Array  # [R], one PRNG key a row
    token: Int[Array, "R"]  # the last one sampled, not yet read by the model
    position: Int[Array, "R"]  # of `token`, and its slot
    step: Int[Array, ""]  # tokens sampled so far
    done: Bool[Array, "R"]
    tokens: Int[Array, "R N"]
    logprobs: Float[Array, "R N"]
    lengths: Int[Array, "R"]
    experts: Int[Array, "L R N k"] | None
    prompt_experts: Int[Array, "L B T k"] | None
    seen: Any  # the nnx.State of the layers' InputAmax, brought up to date by each call of the model (mode "delayed")


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
) -> DecodeState:
    """Runs the prompts (padded on the right) and samples each row's first token. keys: [B * num_samples].

    seen: the nnx.State of the model's InputAmax, where `params` does not hold them (those of a `reload.Reader` do not).
    """
    model = _merge(graphdef, params, seen or {})
    batch, steps = prompt.shape
    positions = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None], (batch, steps))
    valid = positions < lengths[:, None]
    out = call(
        model,
        prompt,
        positions,
        model.init_cache(batch, steps, settings.cache_dtype),
        valid=valid,
        last=lengths - jnp.int32(1),
        return_experts=settings.return_experts,
    )
    rows = lambda x: jnp.repeat(x, settings.num_samples, axis=0)  # noqa: E731
    total, new = batch * settings.num_samples, settings.new_tokens
    prompt_experts = experts = None
    if settings.return_experts:
        prompt_experts = jnp.where(valid[None, :, :, None], out.experts, jnp.int32(-1))
        experts = jnp.full((out.experts.shape[0], total, new, out.experts.shape[-1]), -1, jnp.int32)
    state = DecodeState(
        cache=cache.extend(cache.repeat(out.cache, settings.num_samples), settings.cache_length),
        keys=keys,
        token=jnp.zeros(total, jnp.int32),
        position=rows(lengths) - jnp.int32(1),
        step=jnp.int32(0),
        done=jnp.zeros(total, bool),
        tokens=jnp.full((total, new), settings.pad_id, jnp.int32),
        logprobs=jnp.zeros((total, new), jnp.float32),
        lengths=jnp.zeros(total, jnp.int32),
        experts=experts,
        prompt_experts=prompt_experts,
        seen=nnx.state(model, InputAmax),
    )
    return _accept(state, rows(out.logits[:, -1]), controls, settings)


def decode(
    graphdef: Any,
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
        # A finished row still runs, on a slot behind its last token, and takes no part in any amax.
        alive = ~state.done
        token, position = state.token[:, None], state.position[:, None]
        out = call(
            model, token, position, state.cache, valid=alive[:, None], return_experts=settings.return_experts
        )
        state = dataclasses.replace(state, cache=out.cache, seen=nnx.state(model, InputAmax))
        if settings.return_experts:
            ids = jnp.where(alive[None, :, None, None], out.experts, jnp.int32(-1))
            zero = jnp.int32(0)
            at = (zero, zero, state.step - jnp.int32(1), zero)
            state = dataclasses.replace(state, experts=lax.dynamic_update_slice(state.experts, ids, at))
        return _accept(state, out.logits[:, -1], controls, settings)

    return lax.while_loop(unfinished, step, state)


def _accept(state: DecodeState, logits: Float[Array, "R V"], controls: Controls, settings: Settings) -> DecodeState:
    """Samples the next token of each row that has not stopped and books it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token, logprob = sample(logits, keys, controls.temperature, controls.top_p, settings.sampling)
    alive = ~state.done
    at = (jnp.int32(0), state.step)
    stored = jnp.where(alive, token, jnp.int32(settings.pad_id))
    logprob = jnp.where(alive, logprob, jnp.float32(0))
    return dataclasses.replace(
        state,
        token=jnp.where(alive, token, jnp.int32(0)),  # pad_id need not be a token
        position=state.position + alive.astype(jnp.int32),
        step=state.step + jnp.int32(1),
        done=state.done | (token[:, None] == controls.stop_tokens[None]).any(-1),
        tokens=lax.dynamic_update_slice(state.tokens, stored[:, None], at),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], at),
        lengths=state.lengths + alive.astype(jnp.int32),
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
) -> DecodeState:
    """Prefill and decode in one program; all but `settings` is traced. The cache is not returned.

    prompt: padded on the right, lengths: the tokens of each row.
    """
    keys = row_keys(key, prompt.shape[0], settings.num_samples)
    state = prefill(graphdef, params, prompt, lengths, keys, controls, settings, seen)
    state = decode(graphdef, params, state, limit, controls, settings)
    return dataclasses.replace(state, cache=None)
