"""Strict dtypes and ranks, warnings as errors, and shapes checked by jaxtyping in every test."""

import gc
import itertools
import os
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# The same examples in each run; NVFP4JAX_SEED=NUMBER (make test-all draws one, CI takes the commit's) draws others, the same again for it.
SEED = os.environ.get("NVFP4JAX_SEED", "")
# NVFP4JAX_SHARE=6 (CI) runs a sixth of the slow tests, which sixth says the seed; and these files whole.
SHARE = int(os.environ.get("NVFP4JAX_SHARE", "1"))
ALWAYS = "test_notebooks.py", "test_soak.py"

if os.environ.get("NVFP4JAX_TEST_GPU") != "1":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # A third of the tests' time would be LLVM's. CI runs what holds bits optimized as for users, too.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

from jaxtyping import install_import_hook  # noqa: E402

# Before nvfp4jax is imported: annotations of these modules are enforced while tests run.
install_import_hook(
    ["nvfp4jax.numerics", "nvfp4jax.fp8", "nvfp4jax.array", "nvfp4jax.scaling", "nvfp4jax.ops", "nvfp4jax.models", "nvfp4jax.rollout"],
    "beartype.beartype",
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ours", deadline=None, max_examples=25, derandomize=not SEED, database=None, print_blob=True)
hypothesis.settings.load_profile("ours")
if SEED:
    hypothesis.core.global_force_seed = int(SEED)
_default_rng = np.random.default_rng

DATA = Path(__file__).parent / "data"
SLOW = Path(__file__).parent / "slow.txt"


def pytest_report_header():
    return f"NVFP4JAX_SEED={SEED} NVFP4JAX_SHARE={SHARE}"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """GPU tests run only where they are asked for: `NVFP4JAX_TEST_GPU=1 pytest -m gpu` on a machine with a Hopper GPU. What `slow.txt` names is
    marked so."""
    wanted = os.environ.get("NVFP4JAX_TEST_GPU") == "1"
    slow = {line for line in SLOW.read_text().splitlines() if not line.startswith("#")}
    if config.args == config.getini("testpaths") and (gone := slow - {item.nodeid for item in items}):
        raise pytest.UsageError(f"tests/slow.txt names tests that are gone: {', '.join(sorted(gone))}")
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    others = [item for item in items if "slow" in item.keywords and item.path.name not in ALWAYS and zlib.crc32(f"{SEED}{item.nodeid}".encode()) % SHARE]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    for item in items:
        if "gpu" in item.keywords and not wanted:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: NVFP4JAX_TEST_GPU=1 pytest -m gpu"))


_TESTS = itertools.count(1)


def _mappings() -> int:
    """Of this process' memory. Each compiled program takes a few, Linux allows 65,530, and beyond XLA's compiler dies of a fault."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """NVFP4JAX_CPU_TIMES=FILE appends the seconds of CPU of each test, its children's too: what `slow.txt` is made of."""
    before = sum(os.times()[:4])
    result = yield
    if next(_TESTS) % 10 == 0 and _mappings() > 25_000:
        jax.clear_caches()
        gc.collect()
    if file := os.environ.get("NVFP4JAX_CPU_TIMES"):
        with open(file, "a") as out:
            out.write(f"{sum(os.times()[:4]) - before:.2f} {item.nodeid}\n")
    return result


@pytest.fixture
def unchecked():
    """Turns jaxtyping off, so that a test meets the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def seed(request):
    """A test's own seed, another one for each NVFP4JAX_SEED. Printed when a test fails."""
    value = zlib.crc32(f"{request.node.nodeid}{SEED}".encode())
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
