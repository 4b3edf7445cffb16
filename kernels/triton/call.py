"""A Triton kernel as a JAX function. The one file that touches jax-triton, whose arguments differ between 0.3 and 0.4.

A kernel's parameters are, in this order: pointers to the inputs, i32 sizes, pointers to the outputs, constexprs. On a CPU nothing
here can run: the tests compile the kernels with Triton's own compiler and run them in its interpreter.
"""

import functools
import inspect
from collections.abc import Sequence

import jax

from nvfp4jax.kernels.triton import INSTALL


@functools.cache
def _jax_triton():
    """jax-triton's `triton_call`, and whether it is that of 0.3 (`out_shape`, `enable_fp_fusion`)."""
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"{INSTALL} ({error})") from error
    return jax_triton.triton_call, "out_shape" in inspect.signature(jax_triton.triton_call).parameters


@functools.cache
def capability() -> int:
    """The compute capability of the default device, e.g. 86. NotImplementedError where it is no CUDA GPU."""
    device = jax.devices()[0]
    version = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(version, str) or "." not in version:
        raise NotImplementedError(f"the Triton kernels need a CUDA GPU; the default device is {device}")
    major, minor = version.split(".")
    return 10 * int(major) + int(minor)


def call(kernel, inputs: Sequence[jax.Array], sizes: Sequence[int], outputs: Sequence[jax.ShapeDtypeStruct], *, grid: tuple[int, ...],
         warps: int, stages: int = 1, constants: dict) -> list[jax.Array]:
    """Runs `kernel` on grid programs of `warps` warps. Products and sums are never contracted: the bits of a quantizer depend on it."""
    triton_call, old = _jax_triton()
    shared = dict(kernel=kernel, grid=grid, num_warps=warps, num_stages=stages, compute_capability=capability(), name=kernel.__name__)
    if old:
        shared |= dict(out_shape=list(outputs), enable_fp_fusion=False)
    else:
        shared |= dict(out_type=list(outputs), backend_options={"enable_fp_fusion": False})
    return triton_call(*inputs, *sizes, **shared, **constants)
