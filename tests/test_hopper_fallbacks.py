"""What the Hopper kernels do not compute is XLA's, and told in the log. Traced on a CPU, where nothing here launches a kernel."""

import jax
import jax.numpy as jnp
import numpy as np

from nvfp4jax.backends import hopper

BF16, F32 = jnp.bfloat16, jnp.float32


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
