"""Norm of the heads, rotation and cache write in one launch: the PTX on the CPU against numpy, the whole on a GPU against XLA."""

import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import ptx_attention
import pytest

from nvfp4jax import fp8, numerics
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


@pytest.mark.aot
@needs_aot
@pytest.mark.parametrize("d, tokens", [(128, 1), (64, 3)])
def test_fp8_ptx(key, monkeypatch, d, tokens):
    """Codes and scales are `fp8.quantize` of what a bfloat16 cache gets; no other slot is touched. Also zeros, the smallest and the
    largest numbers, and what is not finite."""
    q, k, v, cos, sin, starts, _, weights = arguments(key, 3, tokens, 4, 2, d, 7)
    v = v * jnp.asarray((2.0 ** np.arange(-4, 4)).repeat(d // 8), BF16)[None, None, None]
    v = v.at[0, 0, 0].set(0).at[1, 0, 0].set(1e-38).at[1, 0, 1].set(3e38).at[2, 0, 0, 5].set(-jnp.inf)
    caches = [np.zeros((2, 3, 2, 7, d), BF16)] * 2
    _, *wanted = expected(q, k, v, cos, sin, starts, caches, weights, 1e-6, 1)
    monkeypatch.setattr(threads, "thread_kernel", ptx.run_thread_kernel)
    codes, scales = [np.full(c.shape, 77, np.uint8).view(ml_dtypes.float8_e4m3fn) for c in caches], [np.full(c.shape[:-1], 77, np.float32) for c in caches]
    shape = rope.Shape(3, tokens, 4, 2, d, 7, 1e-6, True)
    rope._kernel(shape)(q, k, v, cos, sin, starts, np.asarray([1], np.int32), *weights, *codes, *scales)
    written = np.zeros((2, 3, 2, 7), bool)
    for b, t in np.ndindex(3, tokens):
        written[1, b, :, int(starts[b]) + t:int(starts[b]) + t + 1] = True
    for cache, code, scale in zip(wanted, codes, scales, strict=True):
        quantized = fp8.quantize(jnp.asarray(cache))
        np.testing.assert_array_equal(scale, np.where(written, quantized.scale, 77))
        finite = np.isfinite(scale)
        np.testing.assert_array_equal(code.view(np.uint8)[finite], np.where(written[..., None], np.asarray(quantized.qvalue).view(np.uint8), 77)[finite])


@pytest.mark.aot
@needs_aot
def test_fp8_compiles_and_writes_in_place():
    """One launch, no spills; in a loop over layers nothing of a cache's size is made."""
    struct = jax.ShapeDtypeStruct
    heads, slots = (struct((64, 1, h, 128), BF16) for h in (32, 4, 4)), struct((3, 64, 4, 1088, 128), jnp.float8_e4m3fn)
    angles, starts, scale = struct((64, 1, 64), jnp.float32), struct((64,), jnp.int32), struct((3, 64, 4, 1088), jnp.float32)

    def write(layer, q, k, v, cos, sin, starts, keys, values, *scales):
        return rope.rope_write(q, k, v, cos, sin, starts, keys, values, layer=layer, scales=scales)

    given = *heads, angles, angles, starts, slots, slots, scale, scale
    kernel, = aot.compile(lambda *a: write(jnp.int32(1), *a), *given)
    assert not kernel.spills and not kernel.warnings

    def layers(q, k, v, cos, sin, starts, *caches):
        def body(layer, carry):
            q, *caches = carry
            return list(write(layer, q, k, v, cos, sin, starts, *caches))

        return jax.lax.fori_loop(0, 3, body, [q, *caches])

    text = ptx_attention.compiled_text(layers, *given, donate=range(6, 10))
    made = [line for line in text.splitlines() for size in ("f8e4m3fn[3,64,4,1088,128]", "f32[3,64,4,1088]") if f" = {size}" in line]
    assert made and all(any(a in line for a in ("parameter(", "get-tuple-element(", "bitcast(")) for line in made), made


def test_shapes_that_do_not_fit():
    """The kernel would read and write past the end of what is smaller."""
    struct = jax.ShapeDtypeStruct
    q, k, angles, starts, cache = struct((2, 3, 4, 64), BF16), struct((2, 3, 2, 64), BF16), struct((2, 3, 32), jnp.float32), struct((2,), jnp.int32), struct((2, 2, 9, 64), BF16)
    right = dict(q=q, k=k, v=k, cos=angles, sin=angles, starts=starts, keys=cache, values=cache)
    assert jax.eval_shape(rope.rope_write, *right.values())[0].shape == q.shape
    for wrong in (dict(cos=struct((2, 3, 32), BF16)), dict(sin=struct((1, 3, 32), jnp.float32)), dict(k=struct((2, 1, 2, 64), BF16)), dict(starts=struct((1,), jnp.int32)),
                  dict(keys=struct((1, 2, 9, 64), BF16), values=struct((1, 2, 9, 64), BF16))):  # fmt: skip
        with pytest.raises(ValueError, match="rope_write: q"):
            jax.eval_shape(rope.rope_write, *(right | wrong).values())
    with pytest.raises(NotImplementedError, match="nothing to do"):
        empty = struct((2, 2, 0, 64), BF16)
        jax.eval_shape(rope.rope_write, *(right | dict(keys=empty, values=empty)).values())


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


@pytest.mark.gpu
@pytest.mark.parametrize("rows, tokens, heads, kv_heads, d", [(64, 1, 32, 4, 128), (5, 300, 8, 8, 64)])
def test_fp8_on_a_gpu(key, rows, tokens, heads, kv_heads, d):
    """Codes and scales of what the kernel writes into a bfloat16 cache, to the bit."""
    q, k, v, cos, sin, starts, _, weights = arguments(key, rows, tokens, heads, kv_heads, d, 321)
    empty = lambda dtype: [jnp.zeros((2, rows, kv_heads, 321, d), dtype) for _ in range(2)]
    scales = [jnp.zeros((2, rows, kv_heads, 321), jnp.float32) for _ in range(2)]
    write = jax.jit(lambda *a, scales: rope.rope_write(q, k, v, cos, sin, starts, *a, layer=jnp.int32(1), norm=(*weights, 1e-6), scales=scales))
    out, *floats = write(*empty(BF16), scales=None)
    same, *found = write(*empty(jnp.float8_e4m3fn), scales=scales)
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), np.asarray(same).view(np.uint16))
    for cache, codes, scale in zip(floats, found[:2], found[2:], strict=True):
        wanted = fp8.quantize(cache)
        some = np.asarray(cache, np.float32).any(-1)
        np.testing.assert_array_equal(np.asarray(scale)[some], np.asarray(wanted.scale)[some])
        np.testing.assert_array_equal(np.asarray(codes).view(np.uint8)[some], np.asarray(wanted.qvalue).view(np.uint8)[some])
        assert not np.asarray(scale)[~some].any()
