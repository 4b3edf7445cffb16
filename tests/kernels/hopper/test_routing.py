"""Routing against numpy, on a GPU and from the PTX on the CPU; the plain jnp versions against the same."""
import aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest

from nvfp4jax import ops
from nvfp4jax import routing as plain
from nvfp4jax.kernels.hopper import routing, threads

needs_aot = pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")
VERSIONS = {"gpu": (routing.route, routing.combine), "ptx": (routing.route, routing.combine), "xla": (plain.route, plain.combine)}


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("ptx", marks=[pytest.mark.aot, needs_aot]), "xla"])
def version(request, monkeypatch):
    if request.param == "ptx":
        monkeypatch.setattr(threads, "thread_kernel", ptx.run_thread_kernel)
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
    shapes = [(1, 8, 128), (3, 2, 8), (5, 1, 1), (67, 8, 128), (300, 8, 256), (130, 1, 300), (600, 8, 64)]
    if version != "xla":
        shapes += [(4096, 8, 512), (8192, 8, 128)]
    if version == "ptx":
        shapes = [shapes[i] for i in rng.permutation(len(shapes))[:2]]
    for tokens, k, experts in shapes:
        ids = draw(rng, tokens, k, experts, kind)
        for valid in (None, rng.random(tokens) < 0.6):
            f = VERSIONS[version][0]
            got = call(version, (lambda i, v: f(i, experts, v)) if valid is not None else (lambda i: f(i, experts)), ids,
                       *([] if valid is None else [valid]))
            for name, a, b in zip(routing.Routing._fields, got, expected(ids, experts, valid)):
                assert a.dtype == np.int32 and (a == b).all(), (name, tokens, k, experts, valid is not None)


@pytest.mark.parametrize("normalize", (False, True), ids=("", "normalized"))
def test_top_k_experts(version, normalize):
    """Ids are lax.top_k's of the logits, weights a float64 softmax; ties, -0, -infinity; NaN and infinity poison their token alone."""
    rng = np.random.default_rng()
    f = plain.top_k_experts if version == "xla" else routing.top_k_experts
    shapes = [(1, 128, 8), (5, 128, 8), (3, 8, 2), (7, 300, 32), (2, 5, 5), (9, 64, 1)] + [(8192, 128, 8)] * (version == "gpu")
    if version == "ptx":
        shapes = [shapes[i] for i in rng.permutation(len(shapes))[:2]]
    for tokens, experts, k in shapes:
        logits = rng.normal(size=(tokens, experts)).astype(np.float32) * np.float32(3)
        logits[1::3] = rng.choice(np.array([-1, -0., 0, 2], np.float32), logits[1::3].shape)
        logits[2::5, 0] = -np.inf
        weights, ids = call(version, lambda x: f(x, k, normalize=normalize), logits)
        with jax.default_device(jax.devices("cpu")[0]):
            want = np.asarray(jax.lax.top_k(jnp.asarray(logits + np.float32(0)), k)[1])  # which orders -0 before 0
        assert ids.dtype == np.int32 and weights.dtype == np.float32 and weights.shape == ids.shape == (tokens, k)
        differs = (ids != want).any(1)
        if version == "xla":  # its order is of the probabilities, which may tie where logits do not
            assert differs.mean() < 0.01 or tokens < 100 and differs.sum() <= 1
        else:
            assert not differs.any(), (tokens, experts, k, np.argwhere(differs)[:4])
        e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        exact = np.take_along_axis(e / e.sum(1, keepdims=True), ids, 1)
        exact = exact / exact.sum(1, keepdims=True) if normalize else exact
        np.testing.assert_allclose(weights, exact, rtol=2e-6, atol=1e-37)

        bad = logits[:3].copy()
        bad[0, -1], bad[-1] = np.nan, -np.inf
        if tokens > 2:
            bad[1, experts // 2] = np.inf
        weights, ids = call(version, lambda x: f(x, k, normalize=normalize), bad)
        assert np.isnan(weights).all() and (ids == np.arange(k)).all()


def test_top_k_of_parts(monkeypatch):
    """Parts are added up from left to right, rows behind the tokens left alone."""
    monkeypatch.setattr(threads, "thread_kernel", ptx.run_thread_kernel)
    rng = np.random.default_rng()
    parts = rng.normal(size=(4, 8, 40)).astype(np.float32)
    parts[:, 5:] = np.nan
    got = routing.top_k_of_parts(parts, 5, 3, normalize=True)
    want = routing.top_k_experts(((parts[0] + parts[1]) + parts[2] + parts[3])[:5], 3, normalize=True)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)  # exponentials are off by an ulp at random here


def without_noise(monkeypatch):
    """The interpreter's approximations are off by an ulp at random; two programs agree to the bit where they are not."""
    single = ptx._Run.single
    monkeypatch.setattr(ptx._Run, "single", lambda run, base, parts, v: single(run, base, [p for p in parts if p != "approx"], v))


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("version", [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("ptx", marks=[pytest.mark.aot, needs_aot])], indirect=True)
def test_choose_and_route_is_the_two_launches(version, masked, monkeypatch):
    """To the bit; ids and rows are those of loops and of jnp, too. Logits in parts, with ties, NaN and infinities."""
    without_noise(monkeypatch)
    rng = np.random.default_rng()
    one_cta, clusters = [(1, 8, 128), (16, 8, 128), (5, 1, 8), (11, 3, 40), (2, 32, 300)], [(17, 8, 128), (37, 5, 100), (70, 1, 33), (64, 10, 512)]
    clusters += [(128, 8, 128)] * (1 if version == "gpu" or masked else 4)
    shapes = one_cta + clusters if version == "gpu" else [cases[rng.integers(len(cases))] for cases in (one_cta, clusters)]
    for tokens, k, experts in shapes:
        assert routing.plan_of_one_launch(tokens, k, experts), (tokens, k, experts)
        parts = rng.normal(size=(rng.integers(1, 4), tokens + 3, experts)).astype(np.float32)
        parts[:, tokens:] = np.nan
        parts[:, 1::3] = rng.choice(np.array([-1, -0., 0, 2], np.float32), parts[:, 1::3].shape)
        for value in (np.nan, np.inf, -np.inf):
            parts[0, rng.integers(tokens), rng.integers(experts)] = value
        valid = (rng.random(tokens) < 0.6,) if masked else ()
        normalize = bool(rng.integers(2))
        together = lambda p, *v: routing.choose_and_route(p, tokens, k, normalize=normalize, valid=v[0] if v else None)
        weights, ids, *routed = jax.tree.leaves(call(version, together, parts, *valid))
        apart = *call(version, lambda p: routing.top_k_of_parts(p, tokens, k, normalize=normalize), parts), *call(
            version, lambda i, *v: routing.route(i, experts, *v), ids, *valid)
        for a, b in zip((weights, ids, *routed), apart, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
        for a, b, c in zip(routed, expected(ids, experts, *(valid or (None,))), plain.route(jnp.asarray(ids), experts, *valid), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def test_one_launch_or_two(monkeypatch):
    """One up to 128 tokens and 8 of 128 experts; in each, a warp has a token. No tokens launch nothing."""
    launched = []
    monkeypatch.setattr(threads, "thread_kernel", lambda program, names, types, **how: lambda *a: launched.append(how) or [
        jnp.zeros(t.shape, t.dtype) for t in types])
    for tokens, count in ((0, 0), (1, 1), (16, 1), (17, 1), (128, 1), (129, 2), (1024, 2)):
        launched.clear()
        routing.choose_and_route(jnp.zeros((1, tokens, 128)), tokens, 8, normalize=True)
        assert len(launched) == count, tokens
        assert count != 1 or launched[0]["warps"] * launched[0]["grid"] >= tokens
    for k, experts in ((1, 1), (8, 128), (10, 512), (32, 1024)):
        for tokens in range(1, 257):
            if plan := routing.plan_of_one_launch(tokens, k, experts):
                warps, cluster = plan
                assert warps % 4 == 0 and 4 <= warps <= 16 and warps * cluster >= tokens
        assert plan or (k, experts) != (1, 1)


@pytest.mark.parametrize("version", ["xla", pytest.param("hopper", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_router_in_one_call(version, tokens):
    """The product, the choice and the sort, and their gradients, as when called one after the other."""
    rng = np.random.default_rng()
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((tokens, 512), (512, 64)))
    of = dict(implementation=version)
    together = lambda x, kernel: ops.choose_experts(x, kernel, 4, normalize=True, **of)
    apart = lambda x, kernel: ops.top_k_experts(ops.float_matmul(x, kernel, **of), 4, normalize=True, **of)
    between = lambda x, kernel: ops.choose_and_route(ops.float_matmul(x, kernel, **of), 4, normalize=True, **of)
    want = jax.jit(lambda x, kernel: (lambda weights, ids: (weights, ids, plain.route(ids, 64)))(*apart(x, kernel)))(x, kernel)
    for f in (together, between):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(f)(x, kernel), want)
    loss = lambda f: jax.jit(jax.grad(lambda x, kernel: (f(x, kernel)[0] * jnp.arange(1, 5, dtype=jnp.float32)[None]).sum(), argnums=(0, 1)))
    for a, b in zip(loss(together)(x, kernel), loss(apart)(x, kernel)):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("version", ["xla", pytest.param("hopper", marks=pytest.mark.gpu)])
def test_top_k_experts_differentiates(version):
    """Through the weights, at the experts that were chosen, as plain jnp does."""
    logits = np.random.default_rng().normal(size=(2, 3, 16)).astype(np.float32)

    def loss(f):
        return jax.jit(jax.grad(lambda x: (f(x)[0] * jnp.arange(1, 5, dtype=jnp.float32)[None, None]).sum()))(logits)

    for normalize in (False, True):
        want = loss(lambda x: plain.top_k_experts(x, 4, normalize=normalize))
        for f in (ops.top_k_experts, ops.choose_and_route):
            got = loss(lambda x: f(x, 4, normalize=normalize, implementation=version))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


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
            residual = (rng.normal(size=want.shape) * 10).astype(want.dtype)
            added = call(version, lambda rows, row_of_slot, weights, residual: f(
                rows, routing.Routing(None, row_of_slot, None), weights, out_dtype=out, residual=residual),
                rows, route.row_of_slot, weights, residual)
            both = (residual.astype(np.float32) + got.astype(np.float32)).astype(want.dtype)
            if version == "xla":
                np.testing.assert_allclose(added.astype(np.float32), both.astype(np.float32), rtol=2e-2 if out == jnp.bfloat16 else 1e-5, atol=1e-4)
            else:
                np.testing.assert_array_equal(added.view(np.uint8), both.view(np.uint8))


@pytest.mark.aot
@needs_aot
def test_no_spills():
    for tokens in (2, 64, 8192):  # none that another test compiles: jax 0.12 reports a kernel once a process
        cases = (lambda x: routing.top_k_experts(x, 8, normalize=True), ((tokens, 127), jnp.float32)), (lambda i, v: routing.route(i, 127, v), ((tokens, 8), jnp.int32), ((tokens,), jnp.bool_)), (
            lambda y, i, w: routing.combine(y, routing.Routing(None, i, None), w), ((tokens * 8, 2048), jnp.bfloat16),
            ((tokens, 8), jnp.int32), ((tokens, 8), jnp.float32))
        more = [(lambda i: routing.route(i, 1021), ((tokens, 8), jnp.int32))] if tokens > 64 else []  # more buckets than threads
        if routing.plan_of_one_launch(tokens, 8, 127):
            more = [(lambda x, v: routing.choose_and_route(x, tokens, 8, normalize=True, valid=v), ((8, tokens, 127), jnp.float32), ((tokens,), jnp.bool_))]
        for f, *args in [*cases, *more]:
            kernel, = aot.compile(f, *args)
            assert kernel.spills == 0 and kernel.stack == 0 and not kernel.warnings, (tokens, kernel.registers)
            assert kernel.registers <= 64 or tokens > 64 and kernel.registers <= 128, (tokens, kernel.registers)
    for tokens, k, experts in ((127, 8, 128), (60, 10, 512), (60, 32, 1021)):
        kernel, = aot.compile(lambda x: routing.choose_and_route(x, tokens, k, normalize=True), ((1, tokens, experts), jnp.float32))
        assert kernel.spills == 0 and kernel.stack == 0 and not kernel.warnings and kernel.registers <= 255, kernel.registers


def test_arguments_are_checked():
    ids = jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match="i32"):
        routing.route(ids.astype(jnp.int16), 8)
    with pytest.raises(ValueError, match="valid"):
        routing.route(ids, 8, jnp.zeros(3, bool))
    with pytest.raises(NotImplementedError, match="shared memory"):
        routing.route(jnp.zeros((4096, 8), jnp.int32), 4000)
    with pytest.raises(ValueError, match="logits"):
        routing.top_k_experts(jnp.zeros((4, 8)), 9, normalize=True)
    with pytest.raises(NotImplementedError, match="at most 32"):
        routing.top_k_experts(jnp.zeros((4, 64)), 33, normalize=True)
    with pytest.raises(NotImplementedError, match="at most 32"):
        routing.choose_and_route(jnp.zeros((1, 4, 64)), 4, 33, normalize=True)
    with pytest.raises(ValueError, match="valid"):
        routing.choose_and_route(jnp.zeros((1, 4, 64)), 4, 8, normalize=True, valid=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="logits"):
        ops.choose_and_route(jnp.zeros((4, 8)), 9, normalize=True)
    with pytest.raises(ValueError, match="do not match"):
        routing.combine(jnp.zeros((7, 8), jnp.bfloat16), routing.Routing(None, ids, None), jnp.zeros((4, 2)))
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        routing.combine(jnp.zeros((8, 12), jnp.bfloat16), routing.Routing(None, ids, None), jnp.zeros((4, 2)))


def test_no_tokens():
    assert routing.top_k_experts(jnp.zeros((0, 8)), 2, normalize=False)[1].shape == (0, 2)
    assert routing.choose_and_route(jnp.zeros((1, 0, 8)), 0, 2, normalize=False)[2].row_of_slot.shape == (0, 2)
    got = routing.route(jnp.zeros((0, 8), jnp.int32), 4)
    assert got.group_sizes.tolist() == [0] * 4 and got.row_of_slot.shape == (0, 8)
    assert routing.combine(jnp.zeros((0, 16), jnp.bfloat16), got, jnp.zeros((0, 8))).shape == (0, 16)
