"""The CPU runner of PTX finds what it is there to find."""
import aot
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest

from nvfp4jax.kernels.hopper.mosaic import asm, gmem_element, i32, smem_address, thread_index
from nvfp4jax.kernels.hopper.threads import store_global

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")]


def neighbour(*, barrier, shift=1, offset=0):
    """Each of 128 threads hands its number to another through shared memory."""
    def program(refs):
        tid, shared = thread_index(), smem_address(refs["shared"])
        asm("st.shared.b32 [$0],$1;", [shared + tid * 4, tid], "")
        if barrier:
            asm("bar.sync 0;", outputs="")
        other = asm("ld.shared.b32 $0,[$1];", [shared + (tid + shift) % 128 * 4])
        store_global(gmem_element(refs["out"], tid + offset, 1, 0, 4), [other], i32(1))

    call = ptx.run_thread_kernel(program, ["unused", "out", "shared"], [jax.ShapeDtypeStruct((128,), jnp.int32)], grid=1, warps=4,
                                 shared_words=128)
    return lambda: call(np.zeros(1, np.int32))


def test_a_missing_barrier_shows():
    want = (np.arange(128) + 32) % 128
    assert (neighbour(barrier=True, shift=32)()[0] == want).all()
    assert not all((neighbour(barrier=False, shift=32)()[0] == want).all() for _ in range(5))


def test_a_store_outside_an_output_raises():
    with pytest.raises(IndexError, match="outside"):
        neighbour(barrier=True, offset=1)()


def test_fma_rounds_once():
    a, b, c = (np.array([v], np.float32) for v in (1 + 2**-23, 1 + 2**-23, -1))
    assert ptx.fma(a, b, c)[0] == np.float32(2**-22 + 2**-46)
    # The exact sum lies just above the middle of two floats: two roundings would give the even one below.
    a, b, c = (np.array([v], np.float32) for v in (2**-24 + 2**-47, 1, 1))
    assert ptx.fma(a, b, c)[0] == np.float32(1 + 2**-23)
    assert ptx.fma(*(np.array([v], np.float32) for v in (2.0**-30, 2.0**-30, 1 + 2.0**-23)))[0] == np.float32(1 + 2**-23)
