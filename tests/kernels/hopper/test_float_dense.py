"""The bfloat16 matmul of fixed order: against float64, and the bits of a row in other batches."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax.kernels.hopper import float_dense

BF16 = jnp.bfloat16


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")
@pytest.mark.parametrize("m, n, transposed", [(3, 128, False), (70, 192, False), (200, 16896, False), (3, 16896, True), (301, 49152, True), (12, 192, True),
                                              (1100, 4096, False), (4000, 2048, True), (9, 16960, False), (1024, 4096, False), (100, 49152, True)])
def test_compiles(m, n, transposed):
    f = functools.partial(float_dense.matmul, transposed=transposed)
    (kernel,) = aot.compile(f, ((m, 2048), BF16), ((n, 2048) if transposed else (2048, n), BF16))
    assert kernel.spills == 0 and not any("C7510" in w for w in kernel.warnings)


def test_unsupported():
    for x, kernel in (((2, 96), (96, 128)), ((2, 64), (64, 100)), ((0, 64), (64, 128))):
        with pytest.raises(NotImplementedError):
            float_dense.matmul(jnp.zeros(x, BF16), jnp.zeros(kernel, BF16))


def test_more_tiles_than_a_launch_takes():
    """y and z of CUDA's grid end at 65535."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, BF16)
    for m, n in ((65535 * 64 + 1, 64), (1, 65537 * 64)):
        with pytest.raises(NotImplementedError, match="at most 65535 tiles"):
            jax.eval_shape(float_dense.matmul, shape(m, 64), shape(64, n))
    assert jax.eval_shape(float_dense.matmul, shape(65535 * 64, 64), shape(64, 64)).shape == (65535 * 64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, n", [(300, 128), (300, 16896), (1100, 4096), (2300, 4096)])
def test_a_rows_bits_are_its_own(key, m, n, transposed):
    x, kernel = jax.random.normal(key, (m, 2048), BF16), jax.random.normal(jax.random.fold_in(key, 1), (2048, n), BF16)
    f = jax.jit(lambda x, kernel: float_dense.matmul(x, kernel.T if transposed else kernel, transposed=transposed))
    whole = np.asarray(f(x, kernel))
    some = slice(0, m, 7), slice(n - 128, n)
    exact = np.asarray(x, np.float64)[some[0]] @ np.asarray(kernel[:, some[1]], np.float64)
    assert np.linalg.norm(whole[some] - exact) < 1e-5 * np.linalg.norm(exact)
    for rows in (slice(0, 1), slice(7, 71), slice(100, 228), slice(40, 296)):
        np.testing.assert_array_equal(np.asarray(f(x[rows], kernel)).view(np.uint32), whole[rows].view(np.uint32))
