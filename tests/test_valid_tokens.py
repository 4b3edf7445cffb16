"""Tokens that are not valid go to no expert: the choice and its sort against loops, the mixture, and its gradients, against itself without
them."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import loading

import nvfp4jax
from nvfp4jax import layers, ops
from nvfp4jax.backends import hopper, xla
from nvfp4jax.layers.state import scaling_of

EXPERTS, HIDDEN, INNER, K = 5, 64, 32, 2


def by_loops(ids, valid):
    """(token_of_row, row_of_slot, group_sizes): the slots of valid tokens expert by expert, then the others, each in their order."""
    slots = [(t, j) for t in range(len(ids)) for j in range(ids.shape[1])]
    rows = [s for e in range(EXPERTS) for s in slots if valid[s[0]] and ids[s] == e]
    places, sizes = np.full(ids.shape, -1), np.zeros(EXPERTS, int)
    for row, slot in enumerate(rows):
        places[slot], sizes[ids[slot]] = row, sizes[ids[slot]] + 1
    return [t for t, _ in rows + [s for s in slots if not valid[s[0]]]], places, sizes


def masks(shape):
    """Some tokens, none, all."""
    drawn = np.random.default_rng().random(shape) < 0.6
    drawn.flat[:2] = False, True
    return drawn, np.zeros(shape, bool), np.ones(shape, bool)


def choices(key):
    """name -> (function of x f32 [..., HIDDEN] and a mask, or none), each of the public ways to choose."""
    kernel = jax.random.normal(key, (HIDDEN, EXPERTS))
    routers = {f"a router, bias {bias}": nnx.Linear(HIDDEN, EXPERTS, use_bias=bias, rngs=nnx.Rngs(key)) for bias in (False, True)}
    of_layer = lambda router: lambda x, **valid: layers.choose_experts(router, x, K, normalize=True, **valid)
    return {
        "choose_and_route": lambda x, **valid: ops.choose_and_route(x[..., :EXPERTS], K, normalize=True, **valid),
        "choose_experts": lambda x, **valid: ops.choose_experts(x, kernel, K, normalize=False, **valid),
    } | {name: of_layer(router) for name, router in routers.items()}


@pytest.mark.parametrize("name, shape", [
    ("choose_and_route", (2, 7)), ("choose_experts", (2, 7)), ("choose_experts", (1,)), ("a router, bias False", (5,)),
    ("a router, bias True", (3, 2))])  # fmt: skip
def test_the_choice_is_as_without_the_mask_and_the_sort_leaves_tokens_out(key, name, shape):
    x, ct, choose = jax.random.normal(key, (*shape, HIDDEN)), jax.random.normal(key, (*shape, K)), choices(key)[name]

    def both(x, **valid):
        loss = lambda x: (lambda weights, *rest: ((weights * ct).sum(), (weights, *rest)))(*choose(x, **valid))
        (_, out), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return *out, dx

    weights, ids, route, dx = jax.jit(both)(x)
    assert dx.any() and int(route.group_sizes.sum()) == ids.size
    masked = jax.jit(lambda x, valid: both(x, valid=valid))
    for valid in masks(shape):
        found = masked(x, valid)
        for a, b in zip((found[0], found[1], found[3]), (weights, ids, dx), strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(found[2], by_loops(np.asarray(ids).reshape(-1, K), valid.reshape(-1)), strict=True):
            assert a.dtype == jnp.int32
            np.testing.assert_array_equal(a, b)


def test_hopper_is_given_the_mask(key, monkeypatch, unchecked):
    """By the operations, and by its backend; the kernels themselves have tests of their own. Without a mask they get none."""
    given = []

    def kernel(op, value, *args, valid, **options):
        given.append(valid)
        return op(value, *args, valid=valid, **options)

    of = lambda op: lambda *args, **options: kernel(op, *args, **options)
    monkeypatch.setattr(hopper, "_choose_and_route", of(xla.choose_and_route))
    monkeypatch.setattr(hopper, "_route", of(xla.route))
    monkeypatch.setattr(hopper, "logits_in_parts", xla.logits_in_parts)
    mixed = types.ModuleType("mixed")
    vars(mixed).update(vars(xla) | dict(NAME="mixed", route=hopper.route))
    monkeypatch.setitem(ops.BACKENDS, "mixed", lambda: mixed)
    x, kernel_of = jax.random.normal(key, (7, HIDDEN)), jax.random.normal(key, (HIDDEN, EXPERTS))
    ids, weights = jax.random.randint(key, (7, K), 0, EXPERTS), jnp.ones((7, K))
    _, packed = made(key, "token")
    calls = dict(
        hopper=[lambda **options: ops.choose_and_route(x[:, :EXPERTS], K, normalize=True, **options),
                lambda **options: ops.choose_experts(x, kernel_of, K, normalize=True, **options)],
        mixed=[lambda **options: ops.experts(x, ids, weights, *packed.weights(), **options)],
    )  # fmt: skip
    for name, functions in calls.items():
        for f in functions:
            for valid in (masks(7)[0], None):
                given.clear()
                jax.eval_shape(lambda valid, name=name, f=f: f(valid=valid, implementation=name), valid)
                assert [None if v is None else (v.shape, v.dtype) for v in given] == [None if valid is None else ((7,), bool)]


WRONG = [
    (np.ones(6, bool), r"valid has shape \(6,\)"), (np.ones((7, 1), bool), r"valid has shape \(7, 1\)"),
    (np.ones(7, np.int32), r"valid: int32 \[7\]"), ([True] * 7, "valid: an array of bools")]  # fmt: skip


@pytest.mark.parametrize("valid, message", WRONG, ids=["fewer", "an axis more", "ints", "a list"])
def test_a_mask_of_another_shape_or_dtype(key, valid, message, unchecked):
    x, ids, weights = jnp.ones((7, HIDDEN)), jnp.zeros((7, K), jnp.int32), jnp.ones((7, K))
    for choose in choices(key).values():
        with pytest.raises(ValueError, match=f"choose_(experts|and_route): {message}"):
            choose(x, valid=valid)
    raw, packed = made(key, "token")
    operation = lambda *args, **options: ops.experts(*args, *packed.weights(), name="moe", **options)
    for name, f in (("experts", raw), ("experts", packed), ("moe", operation)):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            f(x, ids, weights, valid=valid)


def made(key, scaling):
    """Experts, raw and packed."""
    raw = nvfp4jax.Experts(EXPERTS, HIDDEN, INNER, rngs=nnx.Rngs(key))
    scales = dict(input_scales=(jnp.linspace(1e-3, 2e-3, EXPERTS), jnp.linspace(2e-3, 3e-3, EXPERTS))) if scaling == "static" else {}
    return raw, nvfp4jax.NVFP4Experts.from_float(raw, scaling=scaling, **scales)


def drawn(tokens):
    """x, expert_ids, weights and a residual."""
    rng = np.random.default_rng()
    ids = np.argsort(rng.random((tokens, EXPERTS)), 1)[:, :K].astype(np.int32)
    x, residual = rng.normal(size=(2, tokens, HIDDEN)).astype(np.float32)
    return x, ids, rng.random((tokens, K)).astype(np.float32), residual


def poisoned(y, group_sizes):
    return jnp.where((jnp.arange(len(y), dtype=jnp.int32) < group_sizes.sum())[:, None], y, jnp.full((), jnp.nan, y.dtype))


@pytest.fixture
def nan_behind_the_groups(monkeypatch):
    """A backend whose products leave NaN in rows of no expert, in gradients too, as kernels that write the rows of groups alone may."""
    for name in ("grouped_matmul", "grouped_swiglu"):
        op = getattr(xla, name)
        monkeypatch.setattr(xla, name, lambda a, w, sizes, dtype, op=op: poisoned(op(a, w, sizes, dtype), sizes))
    plain = xla.ragged_dot

    @jax.custom_vjp
    def ragged_dot(rows, kernel, sizes):
        return poisoned(plain(rows, kernel, sizes), sizes)

    def backward(saved, dy):
        rows, kernel, sizes = saved
        drows, _ = jax.vjp(lambda rows, kernel: plain(rows, kernel, sizes), rows, kernel)[1](dy)
        ends = jnp.cumsum(sizes)
        row = jnp.arange(len(rows))[None]
        own = (row >= (ends - sizes)[:, None]) & (row < ends[:, None])  # [E, M]
        masked = jnp.where(own[:, :, None], 1.0, 0.0) * rows[None]  # a product: what is NaN stays, in dy anyway
        return poisoned(drows, sizes), jnp.einsum("emk,mn->ekn", masked, dy), None

    ragged_dot.defvjp(lambda *args: (ragged_dot(*args), args), backward)
    monkeypatch.setattr(xla, "ragged_dot", ragged_dot)


def ways(layer):
    """The layer as functions of a mask and its other arguments: it sorts, or is given the sort, and then the operation itself is called."""

    def given_route(valid, x, ids, weights, **more):
        more |= dict(valid=valid, route=xla.route(ids, EXPERTS, valid))
        if isinstance(layer, nvfp4jax.Experts):
            return layer(x, ids, weights, **more)
        modes = tuple(scaling_of(layer, name) for name in layer.inputs)
        return ops.experts(x, ids, weights, *layer.weights(), scaling=modes, **more)

    return [lambda valid, *args, **more: layer(*args, valid=valid, **more), given_route]


@pytest.mark.parametrize("kind, tokens", [("raw", 11), ("token", 11), ("token", 1), ("tensor", 11), ("static", 11)])
def test_valid_tokens_keep_their_bits_and_the_others_get_nothing(key, kind, tokens, nan_behind_the_groups):
    """As without the mask where the others are zeros, which no amax counts; with it they are loud."""
    raw, packed = made(key, "token" if kind == "raw" else kind)
    layer = raw if kind == "raw" else packed
    x, ids, weights, residual = drawn(tokens)
    alone, (sorts, given_route) = jax.jit(lambda *args: layer(*args)), map(jax.jit, ways(layer))
    for valid in masks(tokens):
        loud = np.where(valid[:, None], x, 1e6 * x)
        want = alone(np.where(valid[:, None], x, 0), ids, weights)
        np.testing.assert_array_equal(sorts(valid, loud, ids, weights), np.where(valid[:, None], want, 0))
        added = given_route(valid, loud, ids, weights, residual=residual)
        np.testing.assert_array_equal(added, np.where(valid[:, None], want + residual, residual))
    assert np.asarray(want).any()  # the last mask has all


def test_rows_of_no_expert_are_in_no_amax(key, monkeypatch):
    """Neither where the sort alone knows of them, nor where an id is no expert's: the second quantization sees what a kernel left there."""
    _, packed = made(key, "tensor")
    x, ids, weights, _ = map(jnp.asarray, drawn(11))
    swiglu = xla.grouped_swiglu

    def loud(a, w, sizes, dtype):
        y = swiglu(a, w, sizes, dtype)
        return jnp.where((jnp.arange(len(y), dtype=jnp.int32) < sizes.sum())[:, None], y, jnp.full((), 1e6, y.dtype))

    run = lambda ids, route: ops.experts(x, ids, weights, *packed.weights(), scaling="tensor", route=route)
    valid = masks(11)[0]
    cases = [(ids, xla.route(ids, EXPERTS, valid)), (jnp.where(valid[:, None], ids, jnp.int32(EXPERTS)), None)]
    want = [run(*case) for case in cases]
    monkeypatch.setattr(xla, "grouped_swiglu", loud)
    for case, plain in zip(cases, want, strict=True):
        np.testing.assert_array_equal(run(*case), plain)
        assert np.asarray(plain)[valid].any()


@pytest.mark.parametrize("kind, tokens, way", [("raw", 11, 0), ("token", 11, 0), ("token", 1, 0), ("tensor", 11, 1)])
def test_gradients_are_those_of_the_valid_tokens_alone(key, kind, tokens, way, nan_behind_the_groups):
    """Of x, weights, residual and the float experts; a token that went nowhere has none but its residual's, whatever comes back for it."""
    raw, packed = made(key, "token" if kind == "raw" else kind)
    given = drawn(tokens)
    ct = np.random.default_rng().normal(size=given[0].shape).astype(np.float32)

    def gradients(call):
        def loss(x, weights, residual, raw, ids, ct, valid):
            layer = raw if kind == "raw" else nvfp4jax.straight_through(packed, raw)
            return (call(layer)(valid, x, ids, weights, residual=residual) * ct).sum()

        grads = jax.jit(nnx.grad(loss, argnums=(0, 1, 2, 3)))

        def run(x, ids, weights, residual, ct, valid):
            *found, experts = grads(x, weights, residual, raw, ids, ct, valid)
            return *map(np.asarray, found), *map(np.asarray, jax.tree.leaves(experts))

        return run

    alone, masked = gradients(lambda layer: lambda valid, *args, **more: layer(*args, **more)), gradients(lambda layer: ways(layer)[way])
    for valid in masks(tokens)[:2] if tokens > 1 else masks(tokens)[1:]:
        want = alone(*(v[valid] for v in (*given, ct)), None) if valid.any() else [np.float32(0)] * 6
        dx, dweights, dresidual, *dexperts = found = masked(*given, ct, valid)
        assert len(found) == 6 and not dx[~valid].any() and not dweights[~valid].any()
        np.testing.assert_array_equal(dresidual, ct)
        for a, b in zip((dx[valid], dweights[valid], *dexperts), (*want[:2], *want[3:]), strict=True):
            assert a.any() == valid.any()
            np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), rtol=1e-5, atol=1e-6)


def test_a_models_mixture_masks_its_sort(key):
    """Qwen3's: what lies in no valid token goes through unchanged, in the others as it does alone."""
    layer = loading.load("qwen3-moe-tiny").layers[1]
    x = jax.random.normal(key, (2, 5, layer.mlp.experts.hidden))
    valid = masks((2, 5))[0]
    f = jax.jit(lambda x, valid: layer.mlp(layer.post_attention_layernorm, x, valid))
    (y, ids), (plain, plain_ids) = f(x, valid), f(x, None)
    np.testing.assert_array_equal(ids, plain_ids)
    np.testing.assert_array_equal(y, np.where(valid[..., None], plain, x))
    assert (np.asarray(plain) != x).any((1, 2)).all()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="needs tokamax")
@pytest.mark.parametrize("tokens", [7, 300])
def test_padding_in_bfloat16_on_a_gpu(key, tokens):
    """tokamax' kernels, which leave anything behind the last group: values and gradients are those of the valid tokens alone."""
    graphdef, state = nnx.split(nvfp4jax.Experts(EXPERTS, 192, 320, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(key)))
    rng = np.random.default_rng()
    ids = np.argsort(rng.random((tokens, EXPERTS)), 1)[:, :K].astype(np.int32)
    x, ct = (jnp.asarray(v, jnp.bfloat16) for v in rng.normal(size=(2, tokens, 192)))
    weights, valid = rng.random((tokens, K)).astype(np.float32), rng.random(tokens) < 0.6
    valid[:2] = True, False

    def loss(state, x, weights, ids, ct, valid):
        y = nnx.merge(graphdef, state)(x, ids, weights, valid=valid)
        return (y.astype(jnp.float32) * ct.astype(jnp.float32)).sum(), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # tokamax' gradients are traced here
        (experts, dx, dweights), y = run(state, jnp.where(valid[:, None], x, 1e6), weights, ids, ct, valid)
        (experts_alone, *alone), y_alone = run(state, x[valid], weights[valid], ids[valid], ct[valid], None)
    for found in (y, dx, dweights):
        assert not np.asarray(found, np.float32)[~valid].any()
    pairs = [(y[valid], y_alone), (dx[valid], alone[0]), (dweights[valid], alone[1])]
    for a, b in [*pairs, *zip(jax.tree.leaves(experts), jax.tree.leaves(experts_alone), strict=True)]:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.linalg.norm(b) > 0 and np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)
