"""From logits to a token and the log-probability it was drawn with."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is static about sampling; the temperature and p themselves are traced."""

    greedy: bool = True
    top_k: int | None = None
    top_p: bool = False


def row_keys(key: jax.Array, rows: int, samples: int) -> jax.Array:
    """Keys [rows * samples], each made of the row's and the sample's index alone, never of the rest of the batch."""
    row, sample = (jnp.arange(n, dtype=jnp.uint32) for n in (rows, samples))
    of_row = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
    return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, sample))(of_row).reshape(-1)


def sample(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    how: Sampling,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """(tokens i32 [B], logprobs f32 [B]).

    The logprob is that of the whole softmax of logits / temperature, before top-k and top-p; of the logits where
    greedy. top-k keeps the k largest logits; top-p then keeps the most probable tokens until their probabilities, taken
    among what top-k has left, reach p, the one that crosses it included (arXiv 1904.09751). Of equal logits the lower
    token comes first.
    keys: one a row.
    """
    logits = logits.astype(jnp.float32)
    if how.greedy:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = logits / temperature
        if how.top_k is None and not how.top_p:
            tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        else:
            vocabulary = logits.shape[-1]
            best, ids = lax.top_k(logits, vocabulary if how.top_k is None else min(how.top_k, vocabulary))
            if how.top_p:
                probabilities = jax.nn.softmax(best, axis=-1)
                before = jnp.pad(jnp.cumsum(probabilities, axis=-1)[:, :-1], ((0, 0), (1, 0)))
                best = jnp.where(before < top_p, best, -jnp.inf)
            choice = jax.vmap(jax.random.categorical)(keys, best)
            tokens = jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_sum_exp(logits)


def log_sum_exp(logits: Float[Array, "B V"]) -> Float[Array, "B"]:
    """log(sum(exp(logits))) in float32, its sums in one order whatever the batch: XLA's own reductions choose theirs by the shape."""
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    terms = jnp.exp(logits - largest)
    width = -(-terms.shape[1] // 128)
    terms = jnp.pad(terms, ((0, 0), (0, 128 * width - terms.shape[1]))).reshape(-1, 128, width)
    terms = _halved(terms)[:, 0]
    return jnp.log(_halved(jnp.pad(terms, ((0, 0), (0, (1 << (width - 1).bit_length()) - width))))[:, 0]) + largest[:, 0]


def _halved(x: Float[Array, "B n ..."]) -> Float[Array, "B 1 ..."]:
    """The sum over axis 1, a power of two, as a tree of additions."""
    while x.shape[1] > 1:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x
