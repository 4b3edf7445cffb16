"""Sampling: frequencies against exact probabilities, the sets top-k and top-p leave, logprobs, independent rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax.rollout import Sampling, row_keys, sample

DRAWS = 20_000


def draw(logits, keys, *, temperature=1.0, top_p=1.0, **how):
    sampling = Sampling(greedy=False, top_p=top_p < 1, **how)
    return jax.jit(sample, static_argnums=4)(
        jnp.asarray(logits, jnp.float32), keys, jnp.float32(temperature), jnp.float32(top_p), sampling
    )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def kept(p: np.ndarray, top_k: int | None, top_p: float) -> np.ndarray:
    """The distribution that is left of p, float64, written the slow way."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total, reached, left = p[order].sum(), 0.0, []
    for i in order:
        if reached >= top_p:
            break
        left.append(i)
        reached += p[i] / total
    out = np.zeros_like(p)
    out[left] = p[left] / p[left].sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, 1.0),
        (0.5, None, 1.0),
        (2.0, 5, 1.0),
        (1.0, None, 0.7),
        (1.3, 6, 0.8),
        (1.0, 1, 1.0),
        (1.0, 99, 0.01),
    ],
)
def test_frequencies(temperature, top_k, top_p, key):
    """Chi-square of 20000 draws against the exact distribution; a token outside the kept set is never drawn."""
    logits = np.random.default_rng(0).normal(0, 1.5, 12)
    expected = kept(np.exp(log_softmax(logits / temperature)), top_k, top_p)
    keys = jax.random.split(key, DRAWS)
    tokens, logprobs = draw(np.tile(logits, (DRAWS, 1)), keys, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = np.asarray(tokens)
    counts = np.bincount(tokens, minlength=12)
    support = expected > 0
    assert counts[~support].sum() == 0
    freedom = support.sum() - 1
    chi = ((counts - DRAWS * expected)[support] ** 2 / (DRAWS * expected[support])).sum()
    assert chi <= freedom + 6 * np.sqrt(2 * freedom) + 12 * bool(freedom)  # a chance below 1e-7
    # Before any truncation, at the temperature.
    np.testing.assert_allclose(np.asarray(logprobs), log_softmax(logits / temperature)[tokens], rtol=1e-5, atol=1e-6)
    assert logprobs.dtype == jnp.float32 and tokens.dtype == np.int32


def test_a_wrong_distribution_is_noticed(key):
    """The chi-square bound above separates a temperature of 1 from 1.05."""
    logits = np.random.default_rng(0).normal(0, 1.5, 12)
    tokens, _ = draw(np.tile(logits, (DRAWS, 1)), jax.random.split(key, DRAWS), temperature=1.2)
    expected = np.exp(log_softmax(logits))
    chi = ((np.bincount(np.asarray(tokens), minlength=12) - DRAWS * expected) ** 2 / (DRAWS * expected)).sum()
    assert chi > 11 + 6 * np.sqrt(22) + 12


def test_greedy_takes_the_first_maximum():
    logits = jnp.asarray([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0]], jnp.float32)
    tokens, logprobs = sample(
        logits, jax.random.split(jax.random.key(0), 2), jnp.float32(1), jnp.float32(1), Sampling()
    )
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logprobs, log_softmax(logits)[[0, 1], [1, 0]], rtol=1e-6)


def test_ties_at_the_cut(key):
    """Of four equal logits top_k=2 keeps the lower two tokens, and exactly two."""
    tokens, _ = draw(np.zeros((500, 4)), jax.random.split(key, 500), top_k=2)
    assert set(np.asarray(tokens).tolist()) == {0, 1}


def test_rows_draw_on_their_own(key):
    """A row's key depends on its index and sample alone: not on how many rows there are, nor on the rows beside it."""
    small, large = row_keys(key, 3, 2), row_keys(key, 7, 2)
    np.testing.assert_array_equal(jax.random.key_data(small), jax.random.key_data(large)[:6])
    assert len({tuple(k) for k in jax.random.key_data(row_keys(key, 5, 8)).tolist()}) == 40
    wide = jax.random.key_data(row_keys(key, 3, 4)).reshape(3, 4, -1)
    np.testing.assert_array_equal(jax.random.key_data(small).reshape(3, 2, -1), wide[:, :2])
    logits = np.random.default_rng(1).normal(size=(6, 50))
    other = np.concatenate([logits[:3], np.random.default_rng(2).normal(size=(3, 50))])
    one, two = (draw(x, small, top_k=20, top_p=0.9) for x in (logits, other))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a[:3], b[:3])
