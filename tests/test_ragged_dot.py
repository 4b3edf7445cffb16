"""Float experts' products: tokamax's kernel where it is installed and applies, `jax.lax.ragged_dot` elsewhere, and a line that says which."""

import importlib.machinery
import importlib.util
import logging
import sys
import types

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import ops
from nvfp4jax.backends import hopper
from nvfp4jax.ops import choice

BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What is logged of a GPU that would be there."""
    monkeypatch.setattr(choice, "_default_order", lambda: ("hopper", "xla"))
    hopper._tokamax.cache_clear()
    choice._log_fallback.cache_clear()
    caplog.set_level(logging.WARNING, "nvfp4jax")
    yield lambda: [r.getMessage() for r in caplog.records if "ragged_dot" in r.getMessage()]
    hopper._tokamax.cache_clear()


@pytest.fixture
def tokamax(monkeypatch):
    """A module of that name, which keeps what it was called with."""
    module = types.ModuleType("tokamax")
    module.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    module.calls = []

    def ragged_dot(lhs, rhs, group_sizes, **options):
        module.calls.append((lhs.shape, rhs.shape, group_sizes.shape, lhs.dtype, options))
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    module.ragged_dot = ragged_dot
    monkeypatch.setitem(sys.modules, "tokamax", module)
    return module


def operands(key, k, n, dtype=BF16):
    x, w = jax.random.normal(key, (9, k), dtype), jax.random.normal(jax.random.fold_in(key, 1), (3, k, n), dtype)
    return x, w, jnp.array([4, 0, 5], jnp.int32)


def by_group(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return np.stack([row @ w[e] for row, e in zip(x, np.repeat(np.arange(3), sizes), strict=True)])


@pytest.mark.parametrize("k, n, dtype, reason", [(64, 128, BF16, None), (64, 48, BF16, "multiples of 64"), (96, 64, BF16, "multiples of 64"),
                                                 (64, 128, jnp.float32, "bfloat16, K and N")])  # fmt: skip
def test_which_runs(key, k, n, dtype, reason, tokamax, said):
    x, w, sizes = operands(key, k, n, dtype)
    for _ in range(2):
        got = jax.jit(lambda *args: ops.ragged_dot(*args))(x, w, sizes)
    want = by_group(x, w, sizes)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < (1e-2 if dtype == BF16 else 1e-5) * np.linalg.norm(want) and got.dtype == dtype
    if reason is None:
        assert tokamax.calls == [((16, 64), (3, 64, 128), (3,), BF16, dict(implementation="mosaic"))] * 2
        assert said() == ["experts in bfloat16 multiply by tokamax's Mosaic ragged_dot"]
    else:
        assert not tokamax.calls and len(said()) == 1 and "hopper does not apply" in said()[0] and reason in said()[0]


def test_without_tokamax(key, monkeypatch, said):
    args = operands(key, 64, 128)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=importlib.util.find_spec: None if name == "tokamax" else found(name))
    got = jax.jit(lambda *args: ops.ragged_dot(*args))(*args)
    np.testing.assert_array_equal(got, jax.jit(jax.lax.ragged_dot)(*args))
    (line,) = said()
    assert "ragged_dot: hopper does not apply (tokamax is not installed" in line and "pip install tokamax" in line
    with pytest.raises(NotImplementedError, match="tokamax is not installed"):
        jax.jit(lambda *args: ops.ragged_dot(*args, implementation="hopper"))(*args)


def test_one_that_cannot_be_imported(key, tokamax, monkeypatch, said):
    """It is made for one version of jax."""
    monkeypatch.delitem(sys.modules, "tokamax")
    broken = types.SimpleNamespace(create_module=lambda spec: None, exec_module=lambda module: module.missing)
    finder = types.SimpleNamespace(find_spec=lambda name, *_: importlib.machinery.ModuleSpec(name, broken) if name == "tokamax" else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    args = operands(key, 64, 128)
    np.testing.assert_array_equal(jax.jit(lambda *args: ops.ragged_dot(*args))(*args), jax.jit(jax.lax.ragged_dot)(*args))
    (line,) = said()
    assert "tokamax cannot be imported: AttributeError" in line


def test_shapes_that_do_not_fit(key, unchecked):
    x, w, sizes = operands(key, 64, 128)
    for args in ((x, w[0], sizes), (x[:, :32], w, sizes), (x, w, sizes[:2]), (x[0], w, sizes)):
        with pytest.raises(ValueError, match=r"ragged_dot: rows .* and group_sizes .* are needed"):
            ops.ragged_dot(*args)


def call(experts, x):
    ids = jnp.array([[0, 2], [3, 1], [2, 0]], jnp.int32)
    return experts(x, ids, jnp.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.5]]))


def test_experts_and_their_gradients(key, tokamax, monkeypatch):
    experts = nvfp4jax.Experts(4, 64, 128, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (3, 64), BF16)
    graphdef, state = nnx.split(experts)
    loss = lambda state, x: (call(nnx.merge(graphdef, state), x).astype(jnp.float32) ** 2).sum()  # noqa: E731
    traced_anew = lambda: jax.jit(lambda *args: jax.value_and_grad(loss, argnums=(0, 1))(*args))(state, x)  # noqa: E731
    got = traced_anew()
    assert [c[:2] for c in tokamax.calls] == [((8, 64), (4, 64, 128))] * 2 + [((8, 128), (4, 128, 64))]
    monkeypatch.setattr(choice, "_default_order", lambda: ("xla",))
    monkeypatch.setattr(tokamax, "ragged_dot", None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(traced_anew()), strict=True):
        assert np.abs(np.asarray(b, np.float32)).max() > 0
        np.testing.assert_array_equal(a, b)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available() or importlib.util.find_spec("tokamax") is None, reason="needs the extra `aot` and tokamax")
@pytest.mark.parametrize("tokens, gradients", [(3, False), (3, True), (200, False), (300, True)])
def test_tokamax_compiles_for_a_hopper(tokens, gradients):
    """Its kernels, gradients too, and no product of XLA's."""
    device, sharding = aot._device("h200")
    graphdef, state = nnx.split(nvfp4jax.Experts(8, 192, 320, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(0)))
    args = state, jnp.zeros((tokens, 192), BF16), jnp.zeros((tokens, 2), jnp.int32), jnp.ones((tokens, 2))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    forward = lambda state, *args: nnx.merge(graphdef, state)(*args).astype(jnp.float32).sum()  # noqa: E731
    with aot._default_device(device), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = jax.jit(jax.grad(forward, argnums=(0, 1)) if gradients else forward).lower(*args).compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == (8 if gradients else 3)  # the value itself is not asked for beside the gradients
    assert " dot(" not in text and "cublas" not in text and "ragged-dot" not in text


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="needs tokamax")
@pytest.mark.parametrize("rows", [[4, 0, 5], [0, 0, 1], [700, 3, 256], [40, 0, 31]])
def test_tokamax_against_float64(key, rows):
    """Values and both gradients, not tuned."""
    sizes, m = jnp.array(rows, jnp.int32), sum(rows)
    x, w, dy = (jax.random.normal(jax.random.fold_in(key, i), s, BF16) for i, s in enumerate([(m, 192), (3, 192, 320), (m, 320)]))
    y, vjp = jax.vjp(lambda x, w: ops.ragged_dot(x, w, sizes), x, w)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # its gradients are traced here
        dx, dw = jax.jit(vjp)(dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    groups = np.split(np.arange(m), np.cumsum(rows)[:-1])
    wanted = (by_group(x, w, rows), by_group(dy, w.swapaxes(1, 2), rows), np.stack([x[g].T @ dy[g] for g in groups]))
    for got, want in zip((y, dx, dw), wanted, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 5e-3 * np.linalg.norm(want)
