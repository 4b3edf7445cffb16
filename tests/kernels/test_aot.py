import aot
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")]


def doubled(n):
    def kernel(x, o):
        o[...] = x[...] * 2

    return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((n,), jnp.float32))


def test_reports_a_kernel_each_time_it_is_asked():
    for _ in range(2):
        kernel, = aot.compile(doubled(512), ((512,), jnp.float32))
        assert 0 < kernel.registers < 64 and kernel.spills == 0 and kernel.warnings == ()
        assert "sm_90a" in kernel.ptx


def test_no_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="0 reports"):
        aot.compile(lambda x: x + 1, ((8,), jnp.float32))


LOOP = """
.L_x_1:
   -:-:-:Y:01        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
.L_x_2:
   -:-:-:Y:01        /*0020*/                   LOP3.LUT R1, R2, 0xf ;
   -:-:-:Y:01        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
   -:-:-:Y:01        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
   -:-:-:Y:05        /*0050*/               @P1 BRA `(.L_x_2) ;
   -:-:-:Y:05        /*0060*/              @!P1 BRA `(.L_x_1) ;
   -:-:-:Y:05        /*0070*/                   EXIT ;
"""


def test_loop_is_the_innermost_one():
    kernel = aot.Kernel("k", 96, 0, 0, 0, (), "", LOOP)
    assert kernel.loop("HGMMA") == {"LOP3": 1, "HGMMA": 2, "BRA": 1}
    assert kernel.loop("HMMA") == {}
