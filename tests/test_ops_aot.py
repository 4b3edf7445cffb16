"""What dispatch puts around the Hopper kernels compiles for an H200 with no GPU, layer by layer of a model, without a fallback."""

import aot
import jax
import jax.numpy as jnp
import pytest

import nvfp4jax
from nvfp4jax.array import NVFP4Array
from nvfp4jax.scaling import Static

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")]
E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16


def weight(*shape, axes=0, layers=()):
    """Shapes of an NVFP4Array [..., N, K] with `axes` leading axes of experts."""
    *lead, k = (*layers, *shape)
    scale = (*layers, *shape[:axes], *(1,) * (len(shape) - axes)) if axes else layers
    layer = jax.ShapeDtypeStruct((), jnp.int32) if layers else None
    struct = jax.ShapeDtypeStruct
    return [struct((*lead, k // 2), jnp.uint8), struct((*lead, k // 16), E4M3), struct(scale, jnp.float32), layer]


def clean(kernels):
    assert kernels and all(k.spills == 0 for k in kernels), [(k.name, k.spills) for k in kernels]
    assert not any(k.warnings for k in kernels), [k.warnings for k in kernels]


@pytest.mark.parametrize("tokens, scaling", [(1, "token"), (33, "tensor"), (9, "static")])
def test_experts(tokens, scaling):
    gate_up, down = weight(16, 2, 192, 320, axes=1), weight(16, 320, 192, axes=1)

    def f(x, ids, weights, *parts):
        one, two = NVFP4Array(*parts[:3]), NVFP4Array(*parts[3:])
        mode = (Static(jnp.ones(16)),) * 2 if scaling == "static" else scaling  # one an expert
        return nvfp4jax.experts(x, ids, weights, one, two, scaling=mode, implementation="hopper")

    args = ((tokens, 320), BF16), ((tokens, 4), jnp.int32), ((tokens, 4), jnp.float32)
    clean(aot.compile(f, *args, *gate_up[:3], *down[:3]))


def test_stacked_linear_with_bias():
    w = weight(200, 448, layers=(3,))

    def f(x, bias, *parts):
        return nvfp4jax.matmul(x, NVFP4Array(*parts), scaling="token", bias=bias, implementation="hopper")

    clean(aot.compile(f, ((2, 9, 448), BF16), ((200,), BF16), *w))
