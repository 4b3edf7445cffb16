"""Strict dtypes and ranks, warnings as errors, and shapes checked by jaxtyping in every test."""

import itertools
import os
import sys
import zlib
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
import numpy as np  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in each run; NVFP4JAX_FRESH=1 (make test-all, CI) draws new ones, and says which where one fails.
FRESH = os.environ.get("NVFP4JAX_FRESH") == "1"
hypothesis.settings.register_profile("ours", deadline=None, max_examples=25, derandomize=not FRESH, print_blob=True)
hypothesis.settings.load_profile("ours")
_default_rng = np.random.default_rng

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
def seed(request):
    """A test's own seed; a new one in each run under NVFP4JAX_FRESH=1. Printed when a test fails."""
    value = int.from_bytes(os.urandom(4), "little") if FRESH else zlib.crc32(request.node.nodeid.encode())
    print("seed", value)
    return value


@pytest.fixture
def key(seed):
    return jax.random.key(seed)


@pytest.fixture(autouse=True)
def numpy_draws_from_the_seed(seed, monkeypatch):
    """np.random.default_rng() without a seed takes the test's, another one at each call."""
    calls = itertools.count()
    monkeypatch.setattr(np.random, "default_rng", lambda given=None: _default_rng([seed, next(calls)] if given is None else given))
