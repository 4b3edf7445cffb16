"""The sigmoid router with correction bias and groups, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax import routing


def expected(logits, bias, k, groups, top_groups, normalize, scale):
    """(weights, ids) of one token, by loops."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    biased = scores + bias
    size = len(scores) // groups
    order = lambda values: sorted(range(len(values)), key=lambda i: (-values[i], i))  # noqa: E731
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    value = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    allowed = {e for g in order(value)[:top_groups] for e in members[g]}
    ids = [e for e in order(biased) if e in allowed][:k]
    weights = scores[ids]
    return (weights / weights.sum() if normalize else weights) * scale, ids


SETTINGS = [(8, 2, 2, 1, True, 2.5), (16, 3, 4, 2, False, 1.0), (6, 6, 1, 1, True, 1.0), (256, 8, 8, 4, True, 2.5), (12, 5, 3, 3, False, 0.5)]


@pytest.mark.parametrize("experts, k, groups, top_groups, normalize, scale", SETTINGS)
def test_choice_and_weights(experts, k, groups, top_groups, normalize, scale):
    rng = np.random.default_rng()
    logits = (rng.normal(size=(3, 11, experts)) * 2).astype(np.float32)
    bias = rng.normal(size=experts).astype(np.float32)  # as large as the scores: most of the choice
    bias[rng.integers(experts)] = -3  # an expert in a good group whose biased score is below zero
    options = dict(groups=groups, top_groups=top_groups, normalize=normalize, scale=scale)
    weights, ids = jax.jit(lambda x, b: routing.sigmoid_top_k_experts(x, b, k, **options))(logits, bias)
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32 and weights.shape == ids.shape == (3, 11, k)
    for at in np.ndindex(3, 11):
        want, want_ids = expected(logits[at], bias.astype(np.float64), k, groups, top_groups, normalize, scale)
        assert list(ids[at]) == want_ids
        np.testing.assert_allclose(weights[at], want, rtol=2e-6)


def test_ties_go_to_the_lower_expert_and_group():
    weights, ids = routing.sigmoid_top_k_experts(jnp.zeros((1, 12)), jnp.zeros(12), 3, groups=4, top_groups=2, normalize=True)
    assert ids.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, np.full((1, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_runs_through_the_weights_alone(normalize):
    rng = np.random.default_rng()
    logits, bias, ct = (rng.normal(size=shape) for shape in ((5, 8), (8,), (5, 3)))

    def loss(logits, bias):
        weights, _ = routing.sigmoid_top_k_experts(logits, bias, 3, groups=2, top_groups=1, normalize=normalize, scale=2.5)
        return (weights * jnp.asarray(ct, jnp.float32)).sum()

    dlogits, dbias = jax.grad(loss, (0, 1))(jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32))
    assert not dbias.any()
    for t in range(5):  # finite differences, of the weights of the experts that were chosen
        _, ids = expected(logits[t], bias, 3, 2, 1, normalize, 2.5)

        def value(x, ids=ids, t=t):
            scores = 1 / (1 + np.exp(-x[ids]))
            return 2.5 * (scores / (scores.sum() if normalize else 1)) @ ct[t]

        for e in range(8):
            step = np.eye(8)[e] * 1e-5
            slope = (value(logits[t] + step) - value(logits[t] - step)) / 2e-5
            assert abs(float(dlogits[t, e]) - slope) < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=jnp.zeros(7)), r"bias is float32\(7,\)"),
        (dict(bias=jnp.zeros(8, jnp.bfloat16)), "want float32"),
        (dict(logits=jnp.zeros((2, 8), jnp.bfloat16)), "float32 logits"),
        (dict(k=9), "k=9"),
        (dict(groups=3), "groups=3"),
        (dict(groups=0), "groups=0"),
        (dict(groups=8, top_groups=3), "at least 2"),
        (dict(groups=4, top_groups=1), "at least k"),
        (dict(groups=2, top_groups=3), "top_groups=3"),
    ],
)
def test_errors(change, message):
    arguments = dict(logits=jnp.zeros((2, 8)), bias=jnp.zeros(8), k=3, normalize=True) | change
    with pytest.raises(ValueError, match=message):
        routing.sigmoid_top_k_experts(arguments.pop("logits"), arguments.pop("bias"), arguments.pop("k"), **arguments)
