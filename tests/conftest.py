"""Strict dtypes and ranks, warnings as errors, and shapes checked by jaxtyping in every test."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("NVFP4JAX_TEST_GPU") != "1":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook  # noqa: E402

# Before nvfp4jax is imported: annotations of these modules are enforced while tests run.
install_import_hook(
    ["nvfp4jax.numerics", "nvfp4jax.array", "nvfp4jax.scaling", "nvfp4jax.ops", "nvfp4jax.models", "nvfp4jax.rollout"],
    "beartype.beartype",
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("ci")

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(config, items):
    """GPU tests run only where they are asked for: `NVFP4JAX_TEST_GPU=1 pytest -m gpu` on a machine with a Hopper GPU."""
    wanted = os.environ.get("NVFP4JAX_TEST_GPU") == "1"
    for item in items:
        if "gpu" in item.keywords and not wanted:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: NVFP4JAX_TEST_GPU=1 pytest -m gpu"))


@pytest.fixture
def unchecked():
    """Turns jaxtyping off, so that a test meets the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    """A fresh random key; the seed is printed when a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return jax.random.key(seed)
