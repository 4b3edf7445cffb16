"""Kernels for CUDA GPUs from compute capability 7.5 on, in Triton, called through jax-triton (the extra `triton`)."""

INSTALL = "the Triton kernels need jax-triton: pip install 'nvfp4jax[triton]'"

try:
    import triton as _  # noqa: F401
except ImportError as error:
    raise NotImplementedError(f"{INSTALL} ({error})") from error
