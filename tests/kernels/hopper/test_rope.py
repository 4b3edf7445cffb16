"""Norm of the heads, rotation and cache write in one launch: the PTX on the CPU against numpy, the whole on a GPU against XLA."""

import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest

from nvfp4jax import numerics
from nvfp4jax.backends import xla
from nvfp4jax.kernels.hopper import rope, threads

BF16 = jnp.bfloat16
needs_aot = pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")


def arguments(key, rows, tokens, heads, kv_heads, d, capacity, layers=2):
    keys = jax.random.split(key, 8)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape, BF16)
    q, k, v = normal(0, rows, tokens, heads, d), normal(1, rows, tokens, kv_heads, d), normal(2, rows, tokens, kv_heads, d)
    angle = jax.random.uniform(keys[3], (rows, tokens, d // 2), maxval=100.0)
    caches = [normal(i, layers, rows, kv_heads, capacity, d) for i in (4, 5)]
    weights = [1 + normal(i, d) for i in (6, 7)]
    starts = jnp.asarray([capacity - 1, *range(rows - 1)], jnp.int32)  # the first row runs over where there are several tokens
    return q, k, v, jnp.cos(angle), jnp.sin(angle), starts, caches, weights


def expected(q, k, v, cos, sin, starts, caches, weights, eps, layer):
    """numpy: the rotation's products and sum rounded one by one."""
    cos, sin = (np.asarray(a)[:, :, None] for a in (cos, sin))

    def turned(x, weight):
        x = np.asarray(x if eps is None else numerics.rms_norm(x, weight, eps), np.float32)
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(ml_dtypes.bfloat16)

    q, k, v = turned(q, weights[0]), turned(k, weights[1]), np.asarray(v)
    keys, values = (np.array(c) for c in caches)
    for b, t in np.ndindex(*q.shape[:2]):
        if starts[b] + t < keys.shape[3]:
            keys[layer, b, :, starts[b] + t], values[layer, b, :, starts[b] + t] = k[b, t], v[b, t]
    return q, keys, values


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("d, eps, tokens", [(128, 1e-6, 1), (64, None, 3)])
def test_ptx(key, monkeypatch, d, eps, tokens):
    q, k, v, cos, sin, starts, caches, weights = given = arguments(key, 3, tokens, 4, 2, d, 7)
    monkeypatch.setattr(threads, "thread_kernel", ptx.run_thread_kernel)
    written = [np.array(c) for c in caches]
    norm = [] if eps is None else weights
    (out,) = rope._kernel(rope.Shape(3, tokens, 4, 2, d, 7, eps))(q, k, v, cos, sin, starts, np.asarray([1], np.int32), *norm, *written)
    for found, wanted in zip((out, *written), expected(*given, eps, 1), strict=True):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint16), wanted.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("rows, tokens, heads, kv_heads, d", [(1, 1, 32, 4, 128), (64, 1, 32, 4, 128), (5, 300, 8, 8, 64)])
def test_in_place(key, rows, tokens, heads, kv_heads, d):
    """Two layers of a stack in a scan, the caches donated."""
    q, k, v, cos, sin, starts, caches, weights = arguments(key, rows, tokens, heads, kv_heads, d, 321)
    kept = [np.asarray(c) for c in caches]

    def layers(write):
        def body(carry, index):
            out, *carry = write(q, k, v, cos, sin, starts, *carry, layer=index, norm=(*weights, 1e-6))
            return carry, out

        return jax.jit(lambda *c: jax.lax.scan(body, list(c), jnp.arange(2, dtype=jnp.int32)), donate_argnums=(0, 1))

    (keys, values), out = layers(rope.rope_write)(*caches)
    twin = layers(lambda *a, layer, norm: xla.rope_write(*a, layer, norm))
    (wanted_keys, wanted_values), wanted = twin(*map(jnp.asarray, kept))
    np.testing.assert_array_equal(np.asarray(values).view(np.uint16), np.asarray(wanted_values).view(np.uint16))
    for found, other in ((out, wanted), (keys, wanted_keys)):
        found, other = (np.asarray(x, np.float32) for x in (found, other))
        np.testing.assert_allclose(found, other, rtol=2.0**-7, atol=2.0**-8)  # XLA contracts a product and a sum
