"""Who runs the Triton kernels: a GPU, or Triton's interpreter, which must be chosen before triton is imported."""

import importlib.util
import os

import jax
import pytest

GPU = os.environ.get("NVFP4JAX_TEST_GPU") == "1"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path, config):
    """Without triton only the test that says so is collected."""
    return collection_path.name in ("test_kernels.py", "test_backend.py") and importlib.util.find_spec("triton") is None or None


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "interpreter"])
def machine(request, monkeypatch):
    """"gpu" or "interpreter"; `machine.sm` may be set to compute as another architecture would plan."""
    from nvfp4jax.kernels.triton import call, combine, dense, grouped, quantize

    if request.param == "interpreter":
        if GPU:
            pytest.skip("the interpreter was not chosen when triton was imported")
        import triton_interpreter

        for module in (combine, dense, grouped, quantize):
            monkeypatch.setattr(module, "call", triton_interpreter.call)
        monkeypatch.setattr(call, "capability", lambda: 80)
    elif jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    return request.param
