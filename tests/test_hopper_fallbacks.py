"""What the Hopper kernels do not compute is XLA's, and told in the log. Traced on a CPU, where nothing here launches a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax import ops
from nvfp4jax.array import NVFP4Array
from nvfp4jax.backends import hopper
from nvfp4jax.ops import choice

BF16, F32 = jnp.bfloat16, jnp.float32
ORDER = ("hopper", "xla")


@pytest.fixture(autouse=True)
def tell_again():
    """The log says a thing once a process."""
    choice._log_fallback.cache_clear()


def struct(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(key, *shape):
    return ops.quantize_weight(jax.random.normal(key, shape, BF16), implementation="xla")


def products(x, sizes, w, experts, pairs, scaling, name):
    how = dict(scaling=scaling, implementation=name, out_dtype=BF16)
    a = ops.quantize_activation(x, scaling, implementation=name)
    return (ops.matmul(x, w, **how), *ops.matmuls(a, (w, w), implementation=name, out_dtype=BF16), ops.grouped_matmul(x, experts, sizes, **how),
            ops.grouped_swiglu(x, pairs, sizes, **how))  # fmt: skip


def told_of(caplog):
    return {r.message.split(":")[0] for r in caplog.records if "hopper does not apply" in r.message}


@pytest.mark.parametrize("dtype, scaling", [(BF16, "token"), (BF16, None), (BF16, "tensor"), (jnp.float16, "token"), (F32, "token"), (F32, None)])
def test_k_off_64(key, caplog, dtype, scaling):
    """A matmul and its sisters, traced with their gradients; the first case is computed too."""
    x, sizes = jax.random.normal(key, (4, 80), dtype), jnp.asarray([3, 0, 1], jnp.int32)
    pairs = weight(key, 3, 2, 48, 80)
    given = sizes, weight(key, 48, 80), weight(key, 3, 48, 80), NVFP4Array(pairs.packed, pairs.scale, pairs.global_scale[:, :1])
    if (dtype, scaling) == (BF16, "token"):
        ours, xla = (jax.jit(lambda *a, name=name: products(*a, scaling, name))(x, *given) for name in (ORDER, "xla"))
        for a, b in zip(ours, xla, strict=True):
            np.testing.assert_array_equal(np.asarray(a[:4], np.float32), np.asarray(b[:4], np.float32))
    gradient = jax.grad(lambda x: sum(y.astype(F32).sum() for y in products(x, *given, scaling, ORDER)))
    assert jax.eval_shape(gradient, x) == jax.ShapeDtypeStruct(x.shape, dtype)
    assert told_of(caplog) >= {"matmul", "matmuls", "grouped_matmul", "grouped_swiglu"}
    with pytest.raises(NotImplementedError, match="multiple of 64|without quantization|cast it"):
        jax.eval_shape(lambda x: products(x, *given, scaling, "hopper"), x)


@pytest.mark.parametrize("k, n, dtype", [(80, 32, BF16), (64, 33, BF16), (64, 32, F32)])
def test_transposed_weights_that_no_kernel_reads_in_place(caplog, k, n, dtype):
    """They are copied in front of the kernel for [N, K], which is told; float32 is rounded, not transposed."""
    hopper._log_transposed.cache_clear()
    f = lambda *ws: ops.quantize_transposed(ws, implementation="hopper")  # noqa: E731
    q = jax.eval_shape(f, struct(3, k, n, dtype=dtype), struct(3, k, n, dtype=dtype))
    assert q.shape == (3, 2 * n, k) and q.global_scale.shape == (3, 1, 1)
    assert any("a transposed copy is written" in r.message for r in caplog.records) == (dtype == BF16)


def test_packed_activations_of_k_off_64(key):
    x, w = (weight(jax.random.fold_in(key, i), rows, 80) for i, rows in enumerate((4, 48)))
    ours, xla = (jax.jit(lambda x, w, name=name: ops.matmul(x, w, implementation=name))(x, w) for name in (ORDER, "xla"))
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(xla, np.float32))


@pytest.mark.parametrize("h, i", [(80, 64), (128, 80), (80, 80)])
@pytest.mark.parametrize("scaling", [None, "token"])
def test_experts_of_k_off_64(caplog, scaling, h, i):
    def f(x, ids, weights, scale, *parts):
        return ops.experts(x, ids, weights, NVFP4Array(*parts[:2], scale[..., None]), NVFP4Array(*parts[2:], scale), scaling=scaling, implementation=ORDER)

    parts = [struct(*lead, k // size, dtype=dtype) for *lead, k in ((3, 2, i, h), (3, h, i)) for size, dtype in ((2, jnp.uint8), (16, jnp.float8_e4m3fn))]
    y = jax.eval_shape(f, struct(4, h), struct(4, 2, dtype=jnp.int32), struct(4, 2, dtype=F32), struct(3, 1, 1, dtype=F32), *parts)
    assert y.shape == (4, h) and y.dtype == BF16
    assert "experts" in told_of(caplog)


@pytest.mark.parametrize("scaling", [None, "token", "tensor"])
def test_no_rows(key, scaling):
    w, x = weight(key, 48, 128), jnp.zeros((0, 128), BF16)

    def both(x, name):
        a = ops.quantize_activation(x, scaling, implementation=name)
        return ops.matmul(x, w, scaling=scaling, implementation=name), *ops.matmuls(a, (w, w), implementation=name)

    assert [y.shape for y in jax.jit(lambda x: both(x, ORDER))(x)] == [(0, 48)] * 3
    assert jax.eval_shape(jax.grad(lambda x: sum(y.astype(F32).sum() for y in both(x, ORDER))), x).shape == (0, 128)
    of_weight = jax.grad(lambda w: ops.matmul(x, w, scaling=scaling, implementation=ORDER).astype(F32).sum())
    assert jax.eval_shape(of_weight, struct(48, 128)).shape == (48, 128)


def test_a_router_whose_product_is_xlas(caplog):
    """For experts that are no multiple of 64, and in float32: the choice and the sort are still the kernel's."""
    for experts, dtype in ((8, BF16), (64, F32)):
        f = lambda x, kernel: ops.choose_experts(x, kernel, 2, normalize=True, implementation=ORDER)
        program = str(jax.make_jaxpr(f)(jnp.ones((3, 128), BF16), jnp.ones((128, experts), dtype)))
        assert "name=choose_and_route" in program and "top_k" not in program
    assert told_of(caplog) == {"choose_experts"}


def test_a_norm_and_a_product_of_two_dtypes(key, caplog):
    x, up, w = (jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i, (shape, dtype) in enumerate((((4, 128), BF16), ((4, 128), F32), ((128,), F32))))
    for f in (
        lambda name: ops.rms_norm(x, w, 1e-6, "token", implementation=name).row_scale,
        lambda name: ops.silu_mul(x, up, "token", implementation=name).row_scale,
        lambda name: ops.norm(x, w, 1e-6, implementation=name),
    ):
        with jax.numpy_dtype_promotion("standard"):
            ours, xla = (jax.jit(lambda name=name: f(name))() for name in (ORDER, "xla"))
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(xla, np.float32))
    assert told_of(caplog) == {"rms_norm", "silu_mul", "norm"}


def cache(rows=2, tokens=1, slots=9, d=64):
    """q, k, v, cos, sin, starts, keys, values of 4 query heads and 2 key heads."""
    angles = [jnp.zeros((rows, tokens, d // 2))] * 2
    return [jnp.ones((rows, tokens, h, d), BF16) for h in (4, 2, 2)] + angles + [jnp.zeros(rows, jnp.int32)] + [jnp.ones((rows, 2, slots, d), BF16)] * 2


def test_angles_reach_the_kernel_as_it_reads_them(monkeypatch, unchecked):
    """bfloat16, or one row's for all: the kernel read past their end."""
    q, k, v, cos, sin, starts, keys, values = cache(rows=2, tokens=3)
    got = []
    monkeypatch.setattr(hopper.rope, "rope_write", lambda q, k, v, cos, sin, starts, keys, values, **_: (got.append((cos, sin)), (q, keys, values))[1])
    cos = jnp.arange(96.0).reshape(1, 3, 32)
    hopper.rope_write(q, k, v, cos.astype(BF16), sin[:1], starts, keys, values, None, None)
    for angles, wanted in zip(got[0], (cos, sin[:1]), strict=True):
        assert angles.shape == (2, 3, 32) and angles.dtype == F32
        np.testing.assert_array_equal(angles, np.broadcast_to(wanted, (2, 3, 32)))


@pytest.mark.parametrize("empty", [dict(rows=0), dict(tokens=0), dict(slots=0), dict(rows=0, tokens=600)])
def test_an_empty_cache_or_batch(empty):
    """XLA's, and of it too: an error of jax for no rows."""
    q, *rest = cache(**empty)
    k, v, cos, sin, starts, keys, values = rest

    def attend(q, keys, values, starts, name):
        plan = ops.attention_plan(starts, q, keys, implementation=name)
        return ops.attention(q, keys, values, starts, plan=plan, implementation=name)

    for name in (ORDER, "xla"):
        y = jax.jit(lambda *a: attend(*a, name))(q, keys, values, starts)
        assert y.shape == q.shape and y.dtype == q.dtype
        assert jax.eval_shape(jax.grad(lambda *a: attend(*a, name).astype(F32).sum()), q, keys, values, starts).shape == q.shape
        written = jax.jit(lambda *a: ops.rope_write(*a, implementation=name))(q, *rest)
        assert [a.shape for a in written] == [q.shape, keys.shape, values.shape]


def test_sizes_of_more_rows_than_there_are(key, unchecked):
    """Concrete sizes are refused; traced ones give the rows that there are."""
    x, sizes = jax.random.normal(key, (5, 64), BF16), jnp.asarray([3, 0, 9], jnp.int32)
    w, pairs = weight(key, 3, 48, 64), weight(key, 3, 2, 48, 64)
    pairs = NVFP4Array(pairs.packed, pairs.scale, pairs.global_scale[:, :1])
    for f, of in ((ops.grouped_matmul, w), (ops.grouped_swiglu, pairs)):
        with pytest.raises(ValueError, match="experts/up: group_sizes add up to 12 rows, x has 5"):
            f(x, of, sizes, implementation="xla", name="experts/up")
    run = jax.jit(lambda sizes: ops.grouped_matmul(x, w, sizes, scaling="token", implementation="xla"))
    np.testing.assert_array_equal(run(sizes), run(jnp.asarray([3, 0, 2], jnp.int32)))
