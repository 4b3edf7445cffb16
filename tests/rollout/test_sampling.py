"""Sampling: frequencies against exact probabilities, the sets top-k and top-p leave, logprobs, independent rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax.rollout import Edits, Sampling, likeliest, row_keys, sample
from nvfp4jax.rollout.sampling import _largest, _within, _within_sorted, drawn, prompt_tokens

DRAWS = 20_000


def draw(logits, keys, *, temperature=1.0, top_p=1.0, min_p=None, edited=None, **how):
    sampling = Sampling(greedy=False, top_p=top_p < 1, **how)
    return jax.jit(sample, static_argnums=4)(
        jnp.asarray(logits, jnp.float32), keys, jnp.float32(temperature), jnp.float32(top_p), sampling,
        min_p=None if min_p is None else jnp.float32(min_p), edited=None if edited is None else jnp.asarray(edited, jnp.float32),
    )  # fmt: skip


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def kept(p: np.ndarray, top_k: int | None, top_p: float, min_p: float | None = None) -> np.ndarray:
    """The distribution that is left of p, float64, written the slow way: top-k, top-p, min-p, as transformers orders them."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total, reached, left = p[order].sum(), 0.0, []
    for i in order:
        if reached >= top_p:
            break
        left.append(i)
        reached += p[i] / total
    left = [i for i in left if min_p is None or p[i] >= min_p * p.max()]
    out = np.zeros_like(p)
    out[left] = p[left] / p[left].sum()
    return out


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [
        (1.0, None, 1.0, None),
        (0.5, None, 1.0, None),
        (2.0, 5, 1.0, None),
        (1.0, None, 0.7, None),
        (1.3, 6, 0.8, None),
        (1.0, 1, 1.0, None),
        (1.0, 99, 0.01, None),
        (1.0, None, 1.0, 0.2),
        (2.0, None, 1.0, 0.4),
        (1.0, 8, 0.95, 0.15),
        (1.0, None, 0.6, 0.3),
        (1.0, None, 1.0, 1.0),
    ],
)
def test_frequencies(temperature, top_k, top_p, min_p, key):
    """Chi-square of 20000 draws against the exact distribution; a token outside the kept set is never drawn."""
    logits = np.random.default_rng(0).normal(0, 1.5, 12)
    expected = kept(np.exp(log_softmax(logits / temperature)), top_k, top_p, min_p)
    keys = jax.random.split(key, DRAWS)
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, logprobs = draw(np.tile(logits, (DRAWS, 1)), keys, **settings)
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


@pytest.mark.parametrize("min_p", [None, 0.05])
@pytest.mark.parametrize("vocabulary", [4097, 5120])
def test_a_large_vocabulary_is_drawn_from_by_groups(vocabulary, min_p, key):
    """As the exact distribution has it, token by token and group by group; banned tokens and whole banned groups never come."""
    rng = np.random.default_rng()
    logits = rng.normal(0, 1.5, vocabulary)
    groups = -(-vocabulary // 128)
    logits[np.arange(vocabulary) % groups == 3] = -np.inf
    likely = [0, 1, groups, 7 * groups + 5, vocabulary - 1]
    logits[likely] = rng.normal(7, 0.5, len(likely))
    rows, expected = 4000, kept(np.exp(log_softmax(logits)), None, 1.0, min_p)
    tokens, logprobs = draw(np.tile(logits, (rows, 1)), jax.random.split(key, rows), min_p=min_p)
    np.testing.assert_allclose(np.asarray(logprobs), log_softmax(logits)[np.asarray(tokens)], rtol=1e-5, atol=1e-5)
    of_token = np.full(vocabulary, len(likely))
    of_token[likely] = range(len(likely))
    for cells in (of_token, np.arange(vocabulary) % groups):
        counts, shares = np.bincount(cells[np.asarray(tokens)], minlength=cells.max() + 1), np.bincount(cells, expected)
        assert counts[shares == 0].sum() == 0
        some, freedom = shares > 0, (shares > 0).sum() - 1
        chi = ((counts - rows * shares)[some] ** 2 / (rows * shares[some])).sum()
        assert chi <= freedom + 8 * np.sqrt(2 * freedom) + 20 * bool(freedom)


def test_a_row_draws_the_same_token_in_every_batch(key):
    logits = np.random.default_rng().normal(0, 2, (9, 9000))
    keys = jax.random.split(key, 9)
    together = draw(logits, keys)
    for row in (0, 4, 8):
        for a, b in zip(together, draw(logits[row : row + 1], keys[row : row + 1]), strict=True):
            np.testing.assert_array_equal(a[row], b[0])


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


def edited_by_hand(logits, bias, repetition, presence, prompts, answers):
    """vLLM's and transformers' definitions, token by token in float64: bias, repetition over both texts, presence over the answer."""
    out = np.asarray(logits, np.float64).copy()
    for row in range(len(out)):
        for token in range(out.shape[1]):
            x = out[row, token] + bias.get(token, 0.0)
            if token in prompts[row] or token in answers[row]:
                x = x * repetition if x < 0 else x / repetition
            out[row, token] = x - presence * (token in answers[row])
    return out


@pytest.mark.parametrize("repetition, presence", [(1.3, 0.0), (1.0, 0.7), (0.8, -0.4), (1.5, 1.1), (1.0, 0.0)])
def test_bias_and_penalties_against_their_definitions(repetition, presence):
    rng = np.random.default_rng()
    logits = rng.normal(0, 3, (4, 30)).astype(np.float32)
    prompt, lengths = rng.integers(0, 30, (4, 9)), np.asarray([9, 1, 4, 7])
    answer = rng.integers(0, 30, (4, 5))
    bias = {3: 2.5, 0: -1.0, 29: -np.inf, 7: -100.0}
    used = prompt_tokens(jnp.asarray(prompt, jnp.int32), jnp.asarray(lengths, jnp.int32), 30)
    for column in range(5):
        used = drawn(used, jnp.asarray(answer[:, column], jnp.int32))
    edits = Edits(
        (jnp.asarray([*bias, 0, 0], jnp.int32), jnp.asarray([*bias.values(), 0, 0], jnp.float32)),
        None if repetition == 1 else jnp.float32(repetition),
        None if presence == 0 else jnp.float32(presence),
    )
    assert edits.read_tokens == (repetition != 1 or presence != 0)
    got = edits(jnp.asarray(logits), used if edits.read_tokens else None)
    prompts = [set(row[:n].tolist()) for row, n in zip(prompt, lengths, strict=True)]
    expected = edited_by_hand(logits, bias, repetition, presence, prompts, [set(row.tolist()) for row in answer])
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_edited_logits_decide_the_token_and_not_its_logprob(key):
    logits = np.random.default_rng().normal(0, 1.5, 12)
    edited = logits + np.random.default_rng().normal(0, 1.5, 12)
    tokens, logprobs = draw(
        np.tile(logits, (DRAWS, 1)), jax.random.split(key, DRAWS), temperature=0.8, top_k=7, edited=np.tile(edited, (DRAWS, 1))
    )
    expected = kept(np.exp(log_softmax(edited / 0.8)), 7, 1.0)
    counts, support = np.bincount(np.asarray(tokens), minlength=12), expected > 0
    assert counts[~support].sum() == 0
    assert ((counts - DRAWS * expected)[support] ** 2 / (DRAWS * expected[support])).sum() < 6 + 6 * np.sqrt(12) + 12
    np.testing.assert_allclose(logprobs, log_softmax(logits / 0.8)[np.asarray(tokens)], rtol=1e-5, atol=1e-6)
    greedy, logprob = sample(
        jnp.asarray(logits[None], jnp.float32), key[None], jnp.float32(1), jnp.float32(1), Sampling(),
        edited=jnp.asarray(edited[None], jnp.float32),
    )  # fmt: skip
    assert int(greedy[0]) == edited.argmax()
    np.testing.assert_allclose(logprob[0], log_softmax(logits)[edited.argmax()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 4096])
def test_both_zeros_are_one_logit(vocabulary):
    """The first of equal logits, as argmax has it: also with top_k=1 of a -0 in front of a 0."""
    logits = jnp.full((1, vocabulary), -1.0).at[0, :2].set(jnp.array([-0.0, 0.0]))
    assert _largest(logits, 1)[1].tolist() == [[0]] == jnp.argmax(logits, axis=-1)[None].tolist()


def test_the_likeliest_tokens():
    logits = np.random.default_rng().normal(0, 2, (3, 40)).astype(np.float32)
    logits[1, [5, 9]] = 11.0  # a tie
    tokens, logprobs = likeliest(jnp.asarray(logits), jnp.float32(0.6), 4)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(logprobs, np.take_along_axis(log_softmax(logits / 0.6), order, 1), rtol=1e-5, atol=1e-6)


def test_a_key_of_its_own_for_each_row(key):
    own = jax.random.split(key, 3)
    keys = jax.random.key_data(row_keys(own, 3, 2)).reshape(3, 2, -1)
    turned = jax.random.key_data(row_keys(own[::-1], 3, 2)).reshape(3, 2, -1)
    np.testing.assert_array_equal(keys, turned[::-1])  # a row's place plays no part
    assert len({tuple(k) for k in keys.reshape(6, -1).tolist()}) == 6


@pytest.mark.parametrize("vocabulary", [7, 300, 5000])
def test_the_largest_are_those_of_a_stable_sort(vocabulary):
    """With ties, banned tokens and rows of one value: values and tokens as numpy sorts them, whatever k."""
    rng = np.random.default_rng()
    x = rng.normal(size=(6, vocabulary)).astype(np.float32)
    x[1] = np.round(x[1])  # zeros of both signs are equals
    x[2] = 0
    x[3, rng.permutation(vocabulary)[: vocabulary - 2]] = -np.inf
    x[4] = np.sort(x[4])
    order = np.argsort(-x, axis=-1, kind="stable")
    for k in {1, 3, min(50, vocabulary), vocabulary // 3, vocabulary}:
        best, tokens = _largest(jnp.asarray(x), k)
        np.testing.assert_array_equal(tokens, order[:, :k])
        np.testing.assert_array_equal(best, np.take_along_axis(x, order[:, :k], -1))


@pytest.mark.parametrize("p", [1e-42, 1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_its_definition_keeps(p):
    """In float64, by a stable sort: with ties across the edge, zeros of both signs, banned tokens, flat and peaked rows. A token may differ
    only where float32 cannot tell the edge."""
    rng = np.random.default_rng()
    x = rng.normal(size=(7, 3000)).astype(np.float32) * np.float32([[1], [4], [0.01], [1], [1], [0], [30]])
    x[3] = np.round(x[3])
    x[4, rng.random(3000) < 0.9] = -np.inf
    x[5, ::3] = -0.0
    kept = np.asarray(_within(jnp.asarray(x), jnp.float32(p)))
    for row, mine in zip(x.astype(np.float64), kept, strict=True):
        order = np.argsort(-row, kind="stable")
        chances = np.exp(row - row.max())[order]
        before = (np.cumsum(chances) - chances) / chances.sum()
        decided = np.abs(before - np.float32(p)) > 1e-6
        np.testing.assert_array_equal(mine[order][decided], (before < np.float32(p))[decided])
        assert mine[order[0]]
    best = -np.sort(-x, axis=-1)
    assert abs(np.asarray(_within_sorted(jnp.asarray(best), jnp.float32(p))).sum(1) - kept.sum(1)).max() <= 1


def test_what_top_p_keeps_is_a_rows_own():
    """Alone, and among rows in two other orders: to the bit, also where the sums come close to p."""
    rng = np.random.default_rng()
    x = (rng.normal(size=(16, 4096)) * 2).astype(np.float32)
    keep = jax.jit(_within)
    all_rows = np.asarray(keep(x, jnp.float32(0.95)))
    for start in range(0, 16, 4):
        np.testing.assert_array_equal(keep(x[start : start + 1], jnp.float32(0.95))[0], all_rows[start])
    np.testing.assert_array_equal(np.asarray(keep(x[::-1], jnp.float32(0.95)))[::-1], all_rows)
    # The same chances in another order of tokens: integers have no order of sums.
    shuffled = rng.permutation(4096)
    np.testing.assert_array_equal(np.asarray(keep(x[:, shuffled], jnp.float32(0.95))), all_rows[:, shuffled])
