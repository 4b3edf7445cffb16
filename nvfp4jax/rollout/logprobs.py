"""`logprobs`: what a model thinks of tokens that are there already, for a trainer's loss as for a score of prompts."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments
from nvfp4jax.models.cache import DTYPES
from nvfp4jax.rollout.decoding import call
from nvfp4jax.rollout.prompts import bucket, check_prompts
from nvfp4jax.rollout.request import check_fp8
from nvfp4jax.rollout.sampling import log_sum_exp

ROWS = 1024  # tokens whose logits over the whole vocabulary exist at a time


def logprobs(
    model: nnx.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    cache_dtype: DTypeLike | None = None,
) -> Float[Array, "B T"]:
    """The logprob of each token given those before it, under softmax(logits / temperature), in one pass: of prompts, or of prompts with
    their answers. f32 [B, T]; 0 at a row's first token and where there is no token.

    Arguments as of `generate`, or traced. It differentiates: a trainer calls it on `straight_through(qmodel, state)`, the rollout's own
    forward. On Hopper, in `token` mode, the values of an answer's tokens have the bits of its `Rollout.logprobs`.
    cache_dtype: the rollout's. Keys and values are rounded as its cache rounds them, and gradients pass straight through.
    A model with `features` and `logits` (see `models.protocol.Decoder`) never holds the logits of all tokens: they are made for ROWS
    tokens at a time, and made again in the backward pass. A history of amaxes (mode "delayed") is read and left alone.
    ValueError, naming the argument, for what does not fit.
    """
    if not callable(arguments.module("logprobs: model", model)):
        raise ValueError(f"logprobs: model: {type(model).__name__} has no call; see nvfp4jax.models.Decoder")
    ids: Any
    mask: Any
    dtype = _cache_dtype(model, cache_dtype)
    given = (input_ids,) if attention_mask is None else (input_ids, attention_mask)
    if any(isinstance(x, jax.core.Tracer) for x in given):
        ids = jnp.asarray(input_ids)
        mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask)
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or mask.shape != ids.shape:
            raise ValueError(f"logprobs: input_ids {ids.dtype}{ids.shape} and attention_mask {mask.shape}: integers [B, T], and as many marks")
    else:
        ids, mask = check_prompts(model, input_ids, attention_mask)
    if isinstance(temperature, jax.Array):
        arguments.array("logprobs: temperature", temperature, "float", ())
    elif arguments.number("logprobs: temperature", temperature) < 1e-6:
        raise ValueError(f"logprobs: temperature={temperature}: finite and at least 1e-6")
    steps = ids.shape[1]
    wide = ((0, 0), (0, bucket(steps) - steps))  # near lengths share a program
    pad = np.pad if isinstance(ids, np.ndarray) else jnp.pad
    graphdef, params = nnx.split(model)
    args = pad(ids, wide).astype(jnp.int32), pad(mask, wide).astype(bool), jnp.float32(temperature)
    return _logprobs(graphdef, params, *args, cache_dtype=dtype)[:, :steps]


def _cache_dtype(model: Any, cache_dtype: DTypeLike | None) -> jnp.dtype | None:
    """The argument, or a ValueError for a model that could not follow it."""
    if cache_dtype is None:
        return None
    dtype = arguments.dtype("logprobs: cache_dtype", cache_dtype, DTYPES)
    if not _in_parts(model):
        check_fp8(model, dtype)
    elif "cache_dtype" not in inspect.signature(model.features).parameters:
        raise ValueError(f"logprobs: cache_dtype={dtype}: {type(model).__name__}.features has no argument cache_dtype to follow it with")
    return dtype


def _in_parts(model: Any) -> bool:
    return hasattr(model, "features") and hasattr(model, "logits")


@functools.partial(jax.jit, static_argnames=("cache_dtype",))
def _logprobs(
    graphdef: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    temperature: Float[Array, ""],
    cache_dtype: jnp.dtype | None = None,
) -> Float[Array, "B T"]:
    batch, steps = tokens.shape
    place = jnp.argsort(~mask, axis=1, stable=True)  # a row's tokens first, in order
    positions = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None], tokens.shape)
    valid = positions < mask.sum(1, dtype=jnp.int32)[:, None]
    tokens = jnp.where(valid, jnp.take_along_axis(tokens, place, axis=1), jnp.int32(0))
    model = nnx.merge(graphdef, params)
    targets = tokens[:, 1:]

    def chosen(logits: Float[Array, "B c V"], targets: Int[Array, "B c"]) -> Float[Array, "B c"]:
        logits = logits.astype(jnp.float32) / temperature
        found = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return found - log_sum_exp(logits.reshape(-1, logits.shape[-1])).reshape(found.shape)

    if _in_parts(model):
        options = {} if cache_dtype is None else dict(cache_dtype=cache_dtype)
        x = model.features(tokens, positions, valid=valid, **options)[:, :-1]
        width = max(1, min(ROWS // batch, steps - 1))
        count = -(-(steps - 1) // width)

        @jax.checkpoint
        def part(args):
            x, valid, targets = args
            return chosen(nnx.merge(graphdef, params).logits(x, valid), targets)

        found = lax.map(part, tuple(_chunks(v, count, width) for v in (x, valid[:, :-1], targets)))
        found = found.swapaxes(0, 1).reshape(batch, -1)[:, : steps - 1]
    else:
        found = chosen(call(model, tokens, positions, model.init_cache(batch, steps, cache_dtype), valid=valid).logits[:, :-1], targets)
    found = jnp.where(valid, jnp.pad(found, ((0, 0), (1, 0))), jnp.float32(0))
    return jnp.zeros_like(found).at[jnp.arange(batch)[:, None], place].set(found)


def _chunks(x: Array, count: int, width: int) -> Array:
    """[B, T, ...] -> [count, B, width, ...], zeros behind the last token."""
    x = jnp.pad(x, ((0, 0), (0, count * width - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], count, width, *x.shape[2:]).swapaxes(0, 1)
