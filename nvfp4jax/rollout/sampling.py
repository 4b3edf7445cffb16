"""From logits to a token and the log-probability it was drawn with."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is static about sampling; the temperature and p themselves are traced."""

    greedy: bool = True
    top_k: int | None = None
    top_p: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """What changes the model's logits before a token is drawn; None: not in the program at all.

    In this order, which is vLLM's and transformers': the bias is added; the logits of tokens that the prompt or the answer
    holds are divided by repetition_penalty where positive, and multiplied by it elsewhere (arXiv 1909.05858); those of
    tokens that the answer holds lose presence_penalty.

    bias: (tokens i32 [n], what their logits gain f32 [n]).
    """

    bias: tuple[Int[Array, "n"], Float[Array, "n"]] | None = None
    repetition_penalty: Float[Array, ""] | None = None
    presence_penalty: Float[Array, ""] | None = None

    @property
    def read_tokens(self) -> bool:
        return self.repetition_penalty is not None or self.presence_penalty is not None

    def __call__(self, logits: Float[Array, "B V"], used: Int[Array, "B V"] | None) -> Float[Array, "B V"]:
        """used: see `prompt_tokens`; needed where `read_tokens`."""
        logits = logits.astype(jnp.float32)
        if self.bias is not None:
            tokens, gains = self.bias
            logits = logits.at[:, tokens].add(gains[None])
        if self.repetition_penalty is not None:
            scaled = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(used != _UNUSED, scaled, logits)
        if self.presence_penalty is not None:
            logits = jnp.where(used == _ANSWER, logits - self.presence_penalty, logits)
        return logits


_UNUSED, _PROMPT, _ANSWER = 0, 1, 2
_ONE_DRAW = 4096  # logits: noise for so many costs less than a second draw


def prompt_tokens(prompt: Int[Array, "B T"], lengths: Int[Array, "B"], vocabulary: int) -> Int[Array, "B V"]:
    """i8 [B, V], for each token of the vocabulary: 0, 1 where the row's prompt holds it, 2 (once drawn) where its answer does."""
    valid = jnp.arange(prompt.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    rows = jnp.arange(prompt.shape[0], dtype=jnp.int32)[:, None]
    marks = jnp.where(valid, jnp.int8(_PROMPT), jnp.int8(_UNUSED))
    return jnp.full((prompt.shape[0], vocabulary), _UNUSED, jnp.int8).at[rows, prompt].max(marks)


def drawn(used: Int[Array, "B V"], tokens: Int[Array, "B"]) -> Int[Array, "B V"]:
    """`used` once each row has drawn its token."""
    return used.at[jnp.arange(tokens.shape[0], dtype=jnp.int32), tokens].set(jnp.int8(_ANSWER))


def row_keys(key: jax.Array, rows: int | Int[Array, "n"], samples: int) -> jax.Array:
    """Keys [rows * samples], each made of the row's and the sample's index alone, never of the rest of the batch.

    key: one PRNG key, or [rows], each row's own, which then decides without the row's index. rows: how many, or which.
    """
    row = jnp.arange(rows, dtype=jnp.uint32) if isinstance(rows, int) else rows.astype(jnp.uint32)
    sample = jnp.arange(samples, dtype=jnp.uint32)
    of_row = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, row)
    return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, sample))(of_row).reshape(-1)


def sample(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    how: Sampling,
    *,
    min_p: Float[Array, ""] | None = None,
    edited: Float[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """(tokens i32 [B], logprobs f32 [B]).

    The logprob is the model's: of the whole softmax of logits / temperature, before `edited`, top-k, top-p and min-p; of the
    logits where greedy. The token is drawn from `edited`, what `Edits` made of the logits, where it is given. In transformers'
    order: top-k keeps the k largest; top-p then keeps the most probable tokens until their probabilities, taken among
    what top-k has left, reach p, the one that crosses it included (arXiv 1904.09751); min-p drops those less probable
    than min_p times the most probable (arXiv 2407.01082). Of equal logits the lower token comes first.
    keys: one a row.
    """
    logits = logits.astype(jnp.float32)
    edited = logits if edited is None else edited
    if how.greedy:
        tokens = jnp.argmax(edited, axis=-1).astype(jnp.int32)
    else:
        logits, edited = logits / temperature, edited / temperature
        ids = None
        if how.top_k is not None and how.top_k < logits.shape[-1]:
            edited, ids = _largest(edited, how.top_k)
        if how.top_p:
            kept = _within(edited, top_p) if ids is None else _within_sorted(edited, top_p)
            edited = jnp.where(kept, edited, -jnp.inf)
        tokens = _draw(keys, _at_least(edited, min_p))
        tokens = tokens if ids is None else jnp.take_along_axis(ids, tokens[:, None], axis=-1)[:, 0]
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_sum_exp(logits)


def _draw(keys: jax.Array, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """A token of softmax(logits), i32: where logits and Gumbel noise have their maximum.

    Of a large vocabulary first a group of tokens and then a token of it, which is the same distribution: noise for all of 151936 tokens
    takes a GPU several times as long as reading their logits.
    """
    categorical = jax.vmap(jax.random.categorical)
    if logits.shape[1] <= _ONE_DRAW:
        return categorical(keys, logits).astype(jnp.int32)
    of_group, of_token = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    groups = _grouped(logits, -jnp.inf)
    group = categorical(of_group, jnp.log(_group_sums(logits)[1])).astype(jnp.int32)
    within = jnp.take_along_axis(groups, group[:, None, None], axis=2)[:, :, 0]
    return categorical(of_token, within).astype(jnp.int32) * groups.shape[2] + group


def _at_least(logits: Float[Array, "B V"], min_p: Float[Array, ""] | None) -> Float[Array, "B V"]:
    if min_p is None:
        return logits
    return jnp.where(jnp.exp(logits - logits.max(-1, keepdims=True)) < min_p, -jnp.inf, logits)


def likeliest(logits: Float[Array, "B V"], temperature: Float[Array, ""], n: int) -> tuple[Int[Array, "B n"], Float[Array, "B n"]]:
    """The n likeliest tokens, i32, and their logprobs, f32: those of `sample`. Of equal logits the lower token comes first."""
    logits = logits.astype(jnp.float32) / temperature
    best, tokens = _largest(logits, n)
    return tokens, best - log_sum_exp(logits)[:, None]


def _largest(x: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`lax.top_k`, which sorts all of V on a GPU unless k is small, by two sorts of about sqrt(V * k).

    Of groups of neighbours the k with the largest maxima hold the k largest: any other group's elements come behind k maxima.
    """
    x = jnp.where(x == 0, jnp.float32(0), x)  # one zero: to a sort -0 is less, to argmax the two are equal
    group = 1 << (math.isqrt(x.shape[1] // k) + 1).bit_length() - 1
    groups = -(-x.shape[1] // group)
    if group < 2 or k >= groups:
        best, ids = lax.top_k(x, k)
        return best, ids.astype(jnp.int32)
    grouped = jnp.pad(x, ((0, 0), (0, groups * group - x.shape[1])), constant_values=-jnp.inf).reshape(-1, groups, group)
    chosen = jnp.sort(lax.top_k(grouped.max(-1), k)[1], axis=-1).astype(jnp.int32)  # in their order: of equals the lower token comes first
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1)
    best, places = lax.top_k(candidates.reshape(-1, k * group), k)
    places = places.astype(jnp.int32)
    return best, jnp.take_along_axis(chosen, places // group, axis=-1) * group + places % group


def _within_sorted(logits: Float[Array, "B k"], p: Float[Array, ""]) -> Bool[Array, "B k"]:
    """Which tokens top-p keeps of logits that fall: those that less than p of the probability lies before."""
    reached = jnp.cumsum(jnp.exp(logits - logits[:, :1]), axis=-1)
    return jnp.pad(reached[:, :-1], ((0, 0), (1, 0))) < p * reached[:, -1:]


def _within(logits: Float[Array, "B V"], p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """The same of logits in any order, without a sort: a bisection for the least logit that is kept.

    Probabilities are summed as integers, so that no order of the sums, and no batch, changes what is kept.
    """
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, jnp.float32(0), logits), jnp.uint32)  # one zero
    rank = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))  # in the order of the logits
    terms = jnp.exp(logits - logits.max(-1, keepdims=True))

    def above(bound: UInt[Array, "B 1"]) -> Float[Array, "B 1"]:
        """The sum of the terms whose rank is higher, cut off at 2**-39 each; V below 2**19."""
        rest, total = jnp.where(rank > bound, terms, jnp.float32(0)), jnp.zeros(bound.shape, jnp.float32)
        for part in (1, 2, 3):
            rest = rest * jnp.float32(1 << 13)
            whole = jnp.floor(rest)
            total += whole.astype(jnp.uint32).sum(-1, keepdims=True, dtype=jnp.uint32).astype(jnp.float32) * jnp.float32(2.0 ** (-13 * part))
            rest = rest - whole
        return total

    least = rank.min(-1, keepdims=True) - jnp.uint32(1)
    wanted = p * above(least)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // jnp.uint32(2)
        enough = above(middle) < wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, last = lax.fori_loop(0, 32, halve, (least, rank.max(-1, keepdims=True)))
    # Of equal logits at the edge the lower tokens are kept, as many as p takes.
    equal = rank == last
    earlier = jnp.cumsum(equal, axis=-1, dtype=jnp.int32) - jnp.int32(1)
    at_edge = above(last) + earlier.astype(jnp.float32) * jnp.where(equal, terms, jnp.float32(0)) < wanted
    return (rank > last) | (equal & (at_edge | (earlier == 0)))


def log_sum_exp(logits: Float[Array, "B V"]) -> Float[Array, "B"]:
    """log(sum(exp(logits))) in float32, its sums in one order whatever the batch: XLA's own reductions choose theirs by the shape."""
    largest, sums = _group_sums(logits)
    width = sums.shape[1]
    return jnp.log(_halved(jnp.pad(sums, ((0, 0), (0, (1 << (width - 1).bit_length()) - width))))[:, 0]) + largest[:, 0]


def _group_sums(logits: Float[Array, "B V"]) -> tuple[Float[Array, "B 1"], Float[Array, "B G"]]:
    """The largest logit, and of each group the sum of exp(logits less that).

    In two kernels: in one, whose threads add up 128 terms each, a GPU has too few of them (631 us in place of 197 for 1024 rows).
    """
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    terms = _grouped(jnp.exp(logits - largest), 0.0)
    parts = lax.optimization_barrier(_halved(terms, 16))
    return largest, _halved(parts)[:, 0]


def _grouped(x: Float[Array, "B V"], fill: float) -> Float[Array, "B 128 G"]:
    """Groups of 128, each of every G-th token, in the last axis: then neighbouring threads read neighbouring tokens."""
    width = -(-x.shape[1] // 128)
    return jnp.pad(x, ((0, 0), (0, 128 * width - x.shape[1])), constant_values=fill).reshape(-1, 128, width)


def _halved(x: Float[Array, "B n ..."], left: int = 1) -> Float[Array, "B m ..."]:
    """The sum over axis 1, a power of two, as a tree of additions; as far as `left` of it are left."""
    while x.shape[1] > left:
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x
