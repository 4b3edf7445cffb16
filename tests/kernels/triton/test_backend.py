"""`backends.triton` behind the operations, with the kernels in Triton's interpreter or on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np

from nvfp4jax import ops
from nvfp4jax.array import NVFP4Array
from nvfp4jax.backends import triton


def test_matmul_and_its_gradient(machine, key):
    x = jax.random.normal(key, (5, 272), jnp.bfloat16)
    w = jax.random.normal(jax.random.fold_in(key, 1), (70, 272), jnp.bfloat16)

    def loss(x, w, implementation, scaling):
        return ops.matmul(x, w, scaling=scaling, out_dtype=jnp.float32, implementation=implementation)

    for scaling in ("token", None):
        got, expected = (loss(x, w, name, scaling) for name in ("triton", "xla"))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)
    got, expected = (jax.vjp(lambda x, w, n=name: loss(x, w, n, "token"), x, w)[1](jnp.ones((5, 70), jnp.float32)) for name in ("triton", "xla"))
    for a, b in zip(got, expected):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-2)


def test_natural_undoes_the_permutation(key):
    values = jnp.round(jax.random.normal(key, (2, 272)) * 4).astype(jnp.float16)
    np.testing.assert_array_equal(triton.natural(triton.quantizer.permute_k(values)), values.astype(jnp.bfloat16))


def test_one_bias_beside_a_stack_of_weights(machine, key):
    """An [N] bias is that of every layer: layer 1 and those behind it read past its end. Once with segments, which a second launch adds."""
    for k in (64, 2048):
        x, w = (jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16) for i, shape in enumerate(((3, k), (3, 40, k))))
        stack = ops.quantize_weight(w, implementation="xla")
        stack = NVFP4Array(stack.packed, stack.scale, stack.global_scale.reshape(-1), jnp.int32(2))
        bias = jax.random.normal(jax.random.fold_in(key, 2), (40,)) * jnp.float32(100)
        got, expected = (ops.matmul(x, stack, bias=bias, scaling="token", out_dtype=jnp.float32, implementation=name) for name in ("triton", "xla"))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)
