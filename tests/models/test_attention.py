"""Attention over a cache against numpy in float64; rotary frequencies against their formulas' landmarks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax import ops
from nvfp4jax.backends import xla
from nvfp4jax.models import attention
from nvfp4jax.models.rope import Rope


def oracle(q, keys, values, starts, scale=None, window=None, soft_cap=None):
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    out = np.zeros((*q.shape[:3], values.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        kv = h // (q.shape[2] // keys.shape[1])
        at = starts[b] + t
        first = 0 if window is None else max(0, at - window + 1)
        scores = keys[b, kv, first : at + 1] @ q[b, t, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ values[b, kv, first : at + 1]
    return out


@pytest.mark.parametrize("options", [{}, dict(scale=0.3, soft_cap=2.0), dict(window=4)], ids=["plain", "capped", "window"])
@pytest.mark.parametrize("steps", [1, 5])
def test_against_the_oracle(options, steps, key):
    shapes = [(3, steps, 6, 8), (3, 2, 12, 8), (3, 2, 12, 5)]
    q, keys, values = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    starts = jnp.asarray([0, 7, 3], jnp.int32)
    expected = oracle(q, keys, values, starts, **options)
    found = ops.attention(q, keys, values, starts, **options)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    stack = [jnp.stack([x + 1, x]) for x in (keys, values)]
    found = ops.attention(q, *stack, starts, layer=jnp.int32(1), **options)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_rows_that_share(key):
    """Two rows begin with the first shared row's slots, two with none of the second's; gradients reach what is shared."""
    shapes = [(4, 2, 6, 8), (4, 2, 12, 8), (4, 2, 12, 5), (2, 2, 140, 8), (2, 2, 140, 5)]
    q, keys, values, *shared = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    slots, starts = np.asarray([128, 128, 0, 0], np.int32), np.asarray([128, 135, 0, 3], np.int32)
    whole = []
    for own, common in ((keys, shared[0]), (values, shared[1])):
        rows = [np.concatenate([common[b // 2, :, :slots[b]], own[b], np.zeros((2, 128 - slots[b], own.shape[-1]))], 1) for b in range(4)]
        whole.append(np.stack(rows))

    def call(q, *arrays, layer=None):
        rows = ops.SharedRows(*arrays[2:], jnp.asarray(slots))
        return ops.attention(q, *arrays[:2], jnp.asarray(starts), layer=layer, shared=rows, soft_cap=3.0)

    expected = oracle(q, *whole, starts, soft_cap=3.0)
    np.testing.assert_allclose(call(q, keys, values, *shared), expected, atol=2e-6)
    stacks = [jnp.stack([x + 1, x]) for x in (keys, values, *shared)]
    np.testing.assert_allclose(call(q, *stacks, layer=jnp.int32(1)), expected, atol=2e-6)
    grads = jax.grad(lambda *a: (call(*a) ** 2).sum(), argnums=(3, 4))(q, keys, values, *shared)
    assert all(np.abs(g[0, :, :128]).min() > 0 and not np.asarray(g[0, :, 128:]).any() and not np.asarray(g[1]).any() for g in grads)


def test_rows_that_share_behind_a_prefix(key):
    """128 slots of all rows, then 128 of the first shared row, none of the second's; rows of a third have but a part of the prefix, as an
    empty place of a queue does. Gradients reach the prefix."""
    shapes = [(6, 2, 6, 8), (6, 2, 12, 8), (6, 2, 12, 5), (3, 2, 140, 8), (3, 2, 140, 5), (1, 2, 128, 8), (1, 2, 128, 5)]
    q, keys, values, *shared = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes))
    slots = np.asarray([256, 256, 128, 128, 0, 0], np.int32)
    starts = slots + np.asarray([0, 7, 10, 3, 0, 1], np.int32)
    whole = []
    for own, common, first in ((keys, shared[0], shared[2]), (values, shared[1], shared[3])):
        rows = [np.concatenate([np.concatenate([first[0], common[b // 2]], 1)[:, :slots[b]], own[b], np.zeros((2, 256 - slots[b], own.shape[-1]))], 1)
                for b in range(6)]  # fmt: skip
        whole.append(np.stack(rows))

    def call(q, *arrays, layer=None):
        rows = ops.SharedRows(*arrays[2:4], jnp.asarray(slots), arrays[4:])
        return ops.attention(q, *arrays[:2], jnp.asarray(starts), layer=layer, shared=rows, soft_cap=3.0)

    expected = oracle(q, *whole, starts, soft_cap=3.0)
    np.testing.assert_allclose(call(q, keys, values, *shared), expected, atol=2e-6)
    stacks = [jnp.stack([x + 1, x]) for x in (keys, values, *shared)]
    np.testing.assert_allclose(call(q, *stacks, layer=jnp.int32(1)), expected, atol=2e-6)
    grads = jax.grad(lambda *a: (call(*a) ** 2).sum(), argnums=(3, 4, 5, 6))(q, keys, values, *shared)
    assert all(np.abs(g[0, :, :128]).min() > 0 and not np.asarray(g[:, :, 128:]).any() and not np.asarray(g[1:]).any() for g in grads)


def test_shared_rows_that_do_not_fit(unchecked):
    q, keys, starts = jnp.zeros((4, 1, 2, 8)), jnp.zeros((4, 2, 12, 8)), jnp.zeros(4, jnp.int32)
    for shape, slots in (((3, 2, 128, 8), starts), ((2, 1, 128, 8), starts), ((2, 2, 128, 4), starts), ((2, 2, 128, 8), starts[:2])):
        shared = ops.SharedRows(jnp.zeros(shape), jnp.zeros(shape), slots)
        with pytest.raises(ValueError, match=r"attention: shared keys \("):
            ops.attention(q, keys, keys, starts, shared=shared)
    shared = jnp.zeros((2, 2, 128, 8))
    for shape, dtype in (((2, 2, 128, 8), jnp.float32), ((1, 2, 100, 8), jnp.float32), ((1, 1, 128, 8), jnp.float32), ((1, 2, 128, 8), jnp.bfloat16)):
        first = jnp.zeros(shape, dtype)
        with pytest.raises(ValueError, match="attention: a prefix of keys and values"):
            ops.attention(q, keys, keys, starts, shared=ops.SharedRows(shared, shared, starts, (first, first)))


def test_blocks_of_queries(monkeypatch, key):
    """The last block not full: what all at once gives."""
    q, keys, values = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate([(2, 45, 4, 8), (2, 2, 50, 8), (2, 2, 50, 8)]))
    starts = jnp.asarray([0, 5], jnp.int32)
    whole = ops.attention(q, keys, values, starts)
    monkeypatch.setattr(xla, "_QUERIES", 16)
    np.testing.assert_allclose(ops.attention(q, keys, values, starts), whole, atol=1e-6)


def test_rope_write(key):
    """Slots and layers but those named keep what they had; a gradient passes to queries, keys and the weights of the norm."""
    keys = jax.random.split(key, 7)
    q, k, v = (jax.random.normal(keys[i], (2, 3, h, 8)) for i, h in enumerate((4, 2, 2)))
    cache = [jax.random.normal(keys[i], (2, 2, 2, 6, 8)) for i in (3, 4)]
    cos, sin = attention.rope_angles(jnp.asarray([[0, 1, 2], [4, 5, 6]]), Rope().frequencies(8))
    weights = [1 + jax.random.normal(keys[i], (8,)) for i in (5, 6)]

    def write(q, k, weights):
        return ops.rope_write(q, k, v, cos, sin, jnp.asarray([0, 4], jnp.int32), *cache, layer=jnp.int32(1), norm=(*weights, 1e-6))

    out, *written = jax.jit(write)(q, k, weights)

    def turned(x, weight):
        x = np.asarray(x, np.float64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight)
        half = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arctan2(sin, cos))[:, :, None]
        return np.concatenate([half.real, half.imag], -1)

    np.testing.assert_allclose(out, turned(q, weights[0]), atol=1e-5)
    for found, before, new in zip(written, cache, (turned(k, weights[1]), np.asarray(v)), strict=True):
        expected = np.array(before)
        expected[1, 0, :, 0:3], expected[1, 1, :, 4:6] = new[0].swapaxes(0, 1), new[1, :2].swapaxes(0, 1)  # one runs over the end
        np.testing.assert_allclose(found, expected, atol=1e-5)
    grads = jax.grad(lambda *a: sum((x * x * x).sum() for x in write(*a)), argnums=(0, 1, 2))(q, k, weights)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_frequencies():
    plain = Rope(theta=5e5).frequencies(64)
    np.testing.assert_allclose(plain, 5e5 ** -(np.arange(0, 64, 2) / 64), rtol=1e-6)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(Rope(theta=5e5, kind="linear", factor=4.0).frequencies(64), plain / 4, rtol=1e-6)
    for kind in ("llama3", "yarn"):
        rope = Rope(theta=5e5, kind=kind, factor=8.0, original_max_position_embeddings=8192)
        found = rope.frequencies(64)
        np.testing.assert_allclose(found[:4], plain[:4], rtol=1e-6)  # short waves stay
        np.testing.assert_allclose(found[-4:], plain[-4:] / 8, rtol=1e-6)  # long ones are stretched
        assert (found <= plain * 1.000001).all() and (found >= plain / 8.000001).all() and (np.diff(found) < 0).all()
    # beta_slow above beta_fast: what transformers 5.24 computes of it
    falling = Rope(kind="yarn", factor=4.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=32.0).frequencies(16)
    expected = [0.25, 0.07905694097, 0.025, 0.00790569466, 0.00625, 0.00316227786, 0.001, 0.00031622777]
    np.testing.assert_allclose(falling, expected, rtol=1e-6)
    assert Rope(kind="yarn", factor=40.0).amplitude == pytest.approx(1.36888, abs=1e-5)  # 0.1 ln 40 + 1
    assert Rope(kind="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0).amplitude == 1.0
    assert Rope(kind="llama3", factor=8.0).amplitude == 1.0
