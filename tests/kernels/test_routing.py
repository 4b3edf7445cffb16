"""Routing against numpy, on a GPU and from the PTX on the CPU; the plain jnp versions against the same."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest

from nvfp4jax.kernels import aot, mosaic, routing

needs_aot = pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")
VERSIONS = {"gpu": (routing.route, routing.combine), "ptx": (routing.route, routing.combine), "xla": (routing.route_xla, routing.combine_xla)}


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("ptx", marks=[pytest.mark.aot, needs_aot]), "xla"])
def version(request, monkeypatch):
    if request.param == "ptx":
        monkeypatch.setattr(mosaic, "thread_kernel", ptx.run_thread_kernel)
    return request.param


def call(version, f, *args):
    return jax.tree.map(np.asarray, f(*args) if version == "ptx" else jax.jit(f)(*args))


def expected(ids, experts, valid):
    """By loops: rows of expert 0 in slot order, then of expert 1, ..., then those of no expert."""
    groups = [[] for _ in range(experts + 1)]
    for slot, e in enumerate(ids.reshape(-1)):
        known = 0 <= e < experts and (valid is None or valid[slot // ids.shape[1]])
        groups[e if known else experts].append(slot)
    order = [slot for group in groups for slot in group]
    row_of_slot = np.full(ids.size, -1, np.int32)
    for row, slot in enumerate(order[:ids.size - len(groups[-1])]):
        row_of_slot[slot] = row
    return np.array(order, np.int32) // ids.shape[1], row_of_slot.reshape(ids.shape), np.array([len(g) for g in groups[:-1]], np.int32)


def draw(rng, tokens, k, experts, kind):
    if kind == "one":  # all tokens on one expert
        return np.full((tokens, k), experts - 1, np.int32)
    if kind == "skewed":
        return (experts * rng.random((tokens, k)) ** 6).astype(np.int32)
    ids = np.argsort(rng.random((tokens, max(experts, k))), 1)[:, :k].astype(np.int32) % experts
    if kind == "unknown":
        ids[rng.random(ids.shape) < 0.3] = -1
        ids[rng.random(ids.shape) < 0.1] = experts
    return ids


@pytest.mark.parametrize("kind", ("spread", "one", "skewed", "unknown"))
def test_route(version, kind):
    rng = np.random.default_rng()
    shapes = [(1, 8, 128), (3, 2, 8), (5, 1, 1), (67, 8, 128), (300, 8, 256), (130, 1, 300)]
    if version == "ptx":
        shapes = [shapes[i] for i in rng.permutation(len(shapes))[:2]]
    elif version == "gpu":
        shapes += [(4096, 8, 512), (8192, 8, 128)]
    for tokens, k, experts in shapes:
        ids = draw(rng, tokens, k, experts, kind)
        for valid in (None, rng.random(tokens) < 0.6):
            f = VERSIONS[version][0]
            got = call(version, (lambda i, v: f(i, experts, v)) if valid is not None else (lambda i: f(i, experts)), ids,
                       *([] if valid is None else [valid]))
            for name, a, b in zip(routing.Routing._fields, got, expected(ids, experts, valid)):
                assert a.dtype == np.int32 and (a == b).all(), (name, tokens, k, experts, valid is not None)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32), ids=("bf16", "f32"))
def test_combine_adds_in_slot_order(version, dtype):
    """Also: the rows of no expert hold NaN, and leave no trace."""
    rng = np.random.default_rng()
    for tokens, k, hidden in ((1, 8, 2048), (13, 8, 64), (5, 2, 4096), (3, 1, 8)) if version != "ptx" else ((5, 8, 72), (3, 1, 8)):
        ids = draw(rng, tokens, k, 16, "spread")
        valid = rng.random(tokens) < 0.8
        route = routing.Routing(*expected(ids, 16, valid))
        rows = rng.normal(size=(tokens * k, hidden)).astype(np.dtype(dtype))
        rows[route.group_sizes.sum():] = np.nan
        weights = rng.random((tokens, k)).astype(np.dtype(dtype))
        total = np.zeros((tokens, hidden), np.float32)
        for j in range(k):
            row = route.row_of_slot[:, j]
            product = rows[np.maximum(row, 0)].astype(np.float32) * weights[:, j, None].astype(np.float32)
            total = np.where(row[:, None] >= 0, total + product, total)
        for out in (jnp.bfloat16, jnp.float32):
            f = VERSIONS[version][1]
            got = call(version, lambda rows, row_of_slot, weights: f(rows, routing.Routing(None, row_of_slot, None), weights, out_dtype=out),
                       rows, route.row_of_slot, weights)
            want = total.astype(ml_dtypes.bfloat16) if out == jnp.bfloat16 else total
            assert got.dtype == want.dtype
            if version == "xla":  # a compiler may contract the products and sums
                np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2e-2 if out == jnp.bfloat16 else 1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.aot
@needs_aot
def test_no_spills():
    for tokens in (2, 64, 8192):  # none that another test compiles: jax 0.12 reports a kernel once a process
        cases = (lambda i, v: routing.route(i, 127, v), ((tokens, 8), jnp.int32), ((tokens,), jnp.bool_)), (
            lambda y, i, w: routing.combine(y, routing.Routing(None, i, None), w), ((tokens * 8, 2048), jnp.bfloat16),
            ((tokens, 8), jnp.int32), ((tokens, 8), jnp.float32))
        for f, *args in cases:
            kernel, = aot.compile(f, *args)
            assert kernel.spills == 0 and kernel.stack == 0 and not kernel.warnings and kernel.registers <= 64, (tokens, kernel.registers)


def test_arguments_are_checked():
    ids = jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match="i32"):
        routing.route(ids.astype(jnp.int16), 8)
    with pytest.raises(ValueError, match="valid"):
        routing.route(ids, 8, jnp.zeros(3, bool))
    with pytest.raises(NotImplementedError, match="shared memory"):
        routing.route(jnp.zeros((4096, 8), jnp.int32), 4000)
    with pytest.raises(ValueError, match="do not match"):
        routing.combine(jnp.zeros((7, 8), jnp.bfloat16), routing.Routing(None, ids, None), jnp.zeros((4, 2)))
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        routing.combine(jnp.zeros((8, 12), jnp.bfloat16), routing.Routing(None, ids, None), jnp.zeros((4, 2)))


def test_no_tokens():
    got = routing.route(jnp.zeros((0, 8), jnp.int32), 4)
    assert got.group_sizes.tolist() == [0] * 4 and got.row_of_slot.shape == (0, 8)
    assert routing.combine(jnp.zeros((0, 16), jnp.bfloat16), got, jnp.zeros((0, 8))).shape == (0, 16)
