"""Matmuls against float64 products of the decoded operands, dispatch, and gradients."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_array import decode, quantize

import nvfp4jax
from nvfp4jax import array, ops
from nvfp4jax.array import NVFP4Array
from nvfp4jax.backends import xla
from nvfp4jax.scaling import Static

MODES = [None, "tensor", "tensor_pow2", "token"]
# Programs, as in test_array: op by op some 300 small ones would be compiled for each shape.
quantize_weight = jax.jit(array.quantize_weight)
matmul = jax.jit(nvfp4jax.matmul, static_argnames=("scaling", "out_dtype"))


def check(y, a, b, dtype=jnp.float32):
    """y ~ a b^T within the bound of a float32 accumulation over K, and the rounding of the result."""
    y, exact = np.asarray(y, np.float64), a @ b.T
    bound = np.abs(a) @ np.abs(b).T * (a.shape[-1] * 2.0**-24) + 1e-30
    if dtype == jnp.bfloat16:
        bound = bound + np.abs(exact) * 2.0**-8
    assert (np.abs(y - exact) <= bound).all(), np.max(np.abs(y - exact) / bound)


def activation(x, scaling):
    return np.asarray(x, np.float64) if scaling is None else decode(quantize(x, scaling))


@pytest.mark.parametrize("scaling", MODES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_is_exact_to_the_accumulation(key, scaling, dtype):
    kx, kw, kb = jax.random.split(key, 3)
    x = (jax.random.normal(kx, (5, 7, 192)) * 3).astype(dtype)
    w = quantize_weight(jax.random.normal(kw, (40, 192)))
    y = jax.jit(lambda x, w: nvfp4jax.matmul(x, w, scaling=scaling))(x, w)
    assert y.shape == (5, 7, 40) and y.dtype == dtype
    check(y.reshape(35, 40), activation(x, scaling).reshape(35, 192), decode(w), dtype)
    bias = jax.random.normal(kb, (40,))
    with_bias = matmul(x, w, scaling=scaling, bias=bias, out_dtype=jnp.float32)
    without = matmul(x, w, scaling=scaling, out_dtype=jnp.float32)
    np.testing.assert_allclose(with_bias, without + bias[None, None], rtol=1e-5, atol=1e-5)


def test_matmul_takes_quantized_and_static_activations(key):
    x, w = jax.random.normal(key, (6, 64)), quantize_weight(jax.random.normal(key, (32, 64)))
    for scaling in MODES[1:]:
        q = nvfp4jax.quantize(x, scaling=scaling)
        np.testing.assert_array_equal(nvfp4jax.matmul(q, w, out_dtype=jnp.float32), nvfp4jax.matmul(x, w, scaling=scaling))
    static = Static(jnp.float32(0.002))
    check(nvfp4jax.matmul(x, w, scaling=static), decode(nvfp4jax.quantize(x, static)), decode(w))
    with pytest.raises(ValueError, match="q_proj: scaling: Static needs scale"):
        nvfp4jax.matmul(x, w, scaling="static", name="q_proj")


def test_extreme_scales_do_not_leave_float32(key):
    x, w = jax.random.normal(key, (4, 64)), jax.random.normal(key, (16, 64))
    y = matmul(x * jnp.float32(2.0**100), quantize_weight(w * jnp.float32(2.0**-100)), scaling="token")
    np.testing.assert_array_equal(y, matmul(x, quantize_weight(w), scaling="token"))


def test_every_code_and_scale_pair():
    """All 16 x 127 products of a code and a finite scale, subnormals included, come through a matmul exactly."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 127).reshape(127, 16)
    scales = np.arange(127, dtype=np.uint8)[:, None]
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    w = NVFP4Array(jnp.asarray(packed), jax.lax.bitcast_convert_type(jnp.asarray(scales), jnp.float8_e4m3fn), jnp.float32(1))
    np.testing.assert_array_equal(nvfp4jax.matmul(jnp.eye(16), w, scaling=None).T, decode(w))


@pytest.mark.parametrize("scaling", ["tensor", "token"])
def test_weights_quantized_like_activations(key, scaling):
    """A weight from `quantize`: one global scale for all of it, or one for each of its rows."""
    x, sizes = jax.random.normal(key, (9, 64)), jnp.array([2, 0, 7], jnp.int32)
    loud = jnp.exp(jax.random.normal(key, (3, 2, 16, 1)))
    w = quantize(jax.random.normal(key, (3, 2, 16, 64)) * loud, scaling)
    halves = [quantize(jax.random.normal(key, (3, 16, 64)) * loud[:, i], scaling) for i in (0, 1)]
    a, ids = np.asarray(x, np.float64), [0] * 2 + [2] * 7
    y = nvfp4jax.grouped_matmul(x, halves[0], sizes, scaling=None)
    for i, e in enumerate(ids):
        check(y[i : i + 1], a[i : i + 1], decode(halves[0])[e])
    one = jax.tree.map(lambda v: v if v.ndim == 0 else v[1], halves[1])
    check(nvfp4jax.matmul(x, one, scaling=None), a, decode(one))
    gate, up = (np.stack([decode(w)[e, h] @ a[i] for i, e in enumerate(ids)]) for h in (0, 1))
    np.testing.assert_allclose(nvfp4jax.grouped_swiglu(x, w, sizes, scaling=None), gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-3)


def groups(rng, m, e):
    """Group sizes of every kind that sum to m or less."""
    yield np.bincount(rng.integers(0, e, m), minlength=e)
    for hot in (0, e - 1):
        yield np.where(np.arange(e) == hot, m, 0)
    yield np.zeros(e, int)
    yield np.eye(e, dtype=int)[e // 2]
    yield np.where(np.arange(e) % 2, m // e, 0)


@pytest.mark.parametrize("scaling", [*MODES, "expert"])
def test_grouped_matmul(key, scaling):
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    m, e, n, k = 150, 5, 24, 64
    x = jax.random.normal(key, (m, k)) * jnp.exp(jax.random.normal(jax.random.key(1), (m, 1)))
    w = quantize_weight(jax.random.normal(key, (e, n, k)) * jnp.exp2(jnp.arange(e, dtype=jnp.float32))[:, None, None])
    decoded = decode(w)
    f = jax.jit(lambda x, w, sizes: nvfp4jax.grouped_matmul(x, w, sizes, scaling=scaling))
    for sizes in groups(rng, m, e):
        y = np.asarray(f(x, w, jnp.asarray(sizes, jnp.int32)))
        start = 0
        whole = None if scaling == "expert" else activation(x, scaling)
        for i, size in enumerate(sizes):
            rows = slice(start, start + size)
            if size:
                a = whole
                if a is None:
                    here = (np.arange(m) >= start) & (np.arange(m) < start + size)
                    a = decode(quantize(x, "tensor", jnp.asarray(here)))
                check(y[rows], a[rows], decoded[i])
            start += size
        np.testing.assert_array_equal(y[start:], 0)


def test_all_patterns_of_empty_groups(key):
    x, w = jax.random.normal(key, (16, 32)), quantize_weight(jax.random.normal(key, (4, 8, 32)))
    f = jax.jit(lambda sizes: nvfp4jax.grouped_matmul(x, w, sizes, scaling="token"))
    a, b = activation(x, "token"), decode(w)
    for pattern in itertools.product((0, 1), repeat=4):
        sizes = np.array(pattern) * 4
        ids = np.repeat(np.arange(4), sizes)
        y = np.asarray(f(jnp.asarray(sizes, jnp.int32)))
        for row, e in enumerate(ids):
            check(y[row : row + 1], a[row : row + 1], b[e])
        np.testing.assert_array_equal(y[len(ids) :], 0)


def test_grouped_swiglu(key):
    x = jax.random.normal(key, (20, 64))
    w = jax.random.normal(key, (3, 2, 32, 64))
    sizes = jnp.array([7, 0, 13], jnp.int32)
    y = jax.jit(lambda x, w: nvfp4jax.grouped_swiglu(x, w, sizes, scaling="token"))(x, w)
    q = quantize_weight(w.reshape(3, 64, 64))  # gate and up share a global scale
    both = np.stack([activation(x, "token")[i] @ decode(q)[e].T for i, e in enumerate([0] * 7 + [2] * 13)])
    gate, up = np.split(both, 2, -1)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=2e-5, atol=2e-4)


def test_no_decoded_copy_of_all_experts(key):
    """The compiled program holds no array of E x N x K elements in any float format."""
    e, n, k, m = 16, 48, 80, 6
    w = quantize_weight(jax.random.normal(key, (e, n, k)))
    x, sizes = jnp.ones((m, k), jnp.bfloat16), jnp.zeros(e, jnp.int32).at[3].set(m)
    compiled = jax.jit(lambda x, w, s: nvfp4jax.grouped_matmul(x, w, s, scaling="token")).lower(x, w, sizes).compile()
    text = compiled.as_text()
    assert f"[{e},{n},{k // 2}]" in text
    for shape in (f"[{e},{n},{k}]", f"[{e},{k},{n}]", f"[{e},{n},{k // 16},16]", f"[{e * n},{k}]"):
        assert not any(f"{dtype}{shape}" in text for dtype in ("bf16", "f32", "f16")), shape


def test_stacked_layers_select_in_place(key):
    grouped = jax.jit(nvfp4jax.grouped_matmul)
    stack = quantize_weight(jax.random.normal(key, (3, 24, 64)))
    stack = NVFP4Array(stack.packed, stack.scale, stack.global_scale[:, 0, 0])
    experts = quantize_weight(jax.random.normal(key, (2, 4, 24, 64)))
    x, sizes = jax.random.normal(key, (9, 64)), jnp.array([2, 0, 3, 4], jnp.int32)
    for layer in range(2):
        at = lambda w: NVFP4Array(w.packed, w.scale, w.global_scale, jnp.int32(layer))  # noqa: B023, E731
        one = lambda w: NVFP4Array(w.packed[layer], w.scale[layer], w.global_scale[layer])  # noqa: B023, E731
        np.testing.assert_array_equal(matmul(x, at(stack)), matmul(x, one(stack)))
        np.testing.assert_array_equal(grouped(x, at(experts), sizes), grouped(x, one(experts), sizes))


def test_straight_through_gradients(key):
    """The gradient of y = x^ w^T with x^ and w^ taken as x and w."""
    kx, kw, ky = jax.random.split(key, 3)
    x, w, dy = jax.random.normal(kx, (6, 64)), jax.random.normal(kw, (16, 64)), jax.random.normal(ky, (6, 16))
    xq, wq = decode(quantize(x, "token")), decode(quantize_weight(w))
    _, vjp = jax.vjp(jax.jit(lambda x, w: nvfp4jax.matmul(x, w, scaling="token")), x, w)
    dx, dw = vjp(dy)
    np.testing.assert_allclose(dx, np.asarray(dy, np.float64) @ wq, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, np.asarray(dy, np.float64).T @ xq, rtol=1e-4, atol=1e-4)
    sizes = jnp.array([2, 0, 4], jnp.int32)
    we = jax.random.normal(kw, (3, 16, 64))
    weq = decode(quantize_weight(we))
    ids = [0, 0, 2, 2, 2, 2]
    _, vjp = jax.vjp(jax.jit(lambda x, w: nvfp4jax.grouped_matmul(x, w, sizes, scaling="token")), x, we)
    dx, dw = vjp(dy)
    np.testing.assert_allclose(dx, np.stack([np.asarray(dy[i], np.float64) @ weq[e] for i, e in enumerate(ids)]), rtol=1e-4, atol=1e-4)
    expected = np.zeros((3, 16, 64))
    for i, e in enumerate(ids):
        expected[e] += np.outer(np.asarray(dy[i], np.float64), xq[i])
    np.testing.assert_allclose(dw, expected, rtol=1e-4, atol=1e-4)
    wg = jax.random.normal(kw, (3, 2, 16, 64)) * jnp.float32(0.1)
    loss = lambda x, w: (nvfp4jax.grouped_swiglu(x, w, sizes, scaling=None) * dy).sum()  # noqa: E731
    wgq = jnp.asarray(decode(quantize_weight(wg.reshape(3, 32, 64))).reshape(3, 2, 16, 64), jnp.float32)

    def plain(x, w):
        gate, up = (jnp.stack([w[e, h] @ x[i] for i, e in enumerate(ids)]) for h in (0, 1))
        return (jax.nn.silu(gate) * up * dy).sum()

    for ours, expected in zip(jax.jit(jax.grad(loss, (0, 1)))(x, wg), jax.grad(plain, (0, 1))(x, wgq), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-4)
    assert jax.jit(jax.grad(lambda x, w: nvfp4jax.matmul(x, w).sum()))(x, quantize_weight(w)).shape == x.shape


def test_gradients_through_experts(key):
    """d/dx and d/dweights of the mixture, against jax's own on the decoded weights."""
    x, w = jax.random.normal(key, (5, 64)), jax.random.normal(key, (3, 2, 32, 64)) * jnp.float32(0.1)
    down = quantize_weight(jax.random.normal(key, (3, 64, 32)))
    flat = quantize_weight(w.reshape(3, 64, 64))
    gate_up = NVFP4Array(flat.packed.reshape(3, 2, 32, 32), flat.scale.reshape(3, 2, 32, 4), flat.global_scale[..., None])
    ids = jnp.array([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]], jnp.int32)
    weights = jax.random.uniform(key, (5, 2))
    decoded, back = (jnp.asarray(decode(q), jnp.float32) for q in (gate_up, down))

    def plain(x, weights):
        gate, up = (jnp.einsum("th,tkih->tki", x, decoded[ids, n], precision="highest") for n in (0, 1))
        return jnp.einsum("tki,tkhi,tk->th", jax.nn.silu(gate) * up, back[ids], weights, precision="highest")

    ours = jax.jit(lambda x, weights: nvfp4jax.experts(x, ids, weights, gate_up, down, scaling=None))
    np.testing.assert_allclose(ours(x, weights), plain(x, weights), rtol=1e-4, atol=1e-4)
    dy = jax.random.normal(key, (5, 64))
    for a, b in zip(*(jax.grad(lambda x, w, f=f: (f(x, w) * dy).sum(), (0, 1))(x, weights) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_dispatch(key, monkeypatch, caplog, unchecked):
    x, w = jax.random.normal(key, (2, 32)), quantize_weight(jax.random.normal(key, (8, 32)))

    def refuses(*args):
        raise NotImplementedError("K=32 is too small")

    picky = types.ModuleType("picky")
    vars(picky).update(vars(xla) | dict(NAME="picky", matmul=refuses))
    monkeypatch.setitem(ops.BACKENDS, "picky", lambda: picky)
    with pytest.raises(NotImplementedError, match="too small"):
        nvfp4jax.matmul(x, w, implementation="picky")
    for _ in range(2):
        np.testing.assert_array_equal(nvfp4jax.matmul(x, w, implementation=["picky", "xla"]), nvfp4jax.matmul(x, w))
    assert [r.message for r in caplog.records] == ["matmul: picky does not apply (K=32 is too small); trying the next implementation"]
    with pytest.raises(ExceptionGroup, match="none of picky supports this case"):
        nvfp4jax.matmul(x, w, implementation=["picky"])
    with pytest.raises(ValueError, match="implementation='cuda': one of xla, hopper"):
        nvfp4jax.matmul(x, w, implementation="cuda")


def test_bad_shapes_name_the_layer(unchecked):
    w = quantize_weight(jnp.ones((8, 32)))
    for call, message in (
        (lambda: nvfp4jax.matmul(jnp.ones((2, 48)), w, name="layers/0/q"), r"layers/0/q: x of shape \(2, 48\) and weight of shape \(8, 32\)"),
        (lambda: nvfp4jax.matmul(jnp.ones((2, 32), jnp.int32), w), r"x: int32 \[2, 32\] is no array of floats"),
        (lambda: nvfp4jax.matmul(jnp.ones((2, 32)), jnp.ones((2, 8, 32))), "needs 2 axes"),
        (lambda: nvfp4jax.matmul(jnp.ones((2, 32)), w, scaling="expert"), "scaling='expert' is not one of"),
        (lambda: nvfp4jax.matmul(jnp.ones((2, 24)), jnp.ones((8, 24))), "K=24 is not a multiple of 16"),
        (lambda: nvfp4jax.grouped_matmul(jnp.ones((2, 32)), jnp.ones((3, 8, 32)), jnp.ones(2, jnp.int32)), "3 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
