"""Linen through `dot_general`, `einsum` and `ragged_dot`: a small transformer, each product against decoded operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nvfp4jax
from nvfp4jax import ops
from nvfp4jax.integrations import linen

EXPERTS = 3


def decoded(w: np.ndarray) -> np.ndarray:
    """The kernel [K, N] as NVFP4 keeps it, float32."""
    return np.asarray(ops.quantize_weight(jnp.asarray(w).T).dequantize(jnp.float32)).T


class Block(nn.Module):
    """Attention, an MLP as MaxText writes it (einsum) and experts by ragged_dot, with the products that it is given."""

    dot_general: object = jax.lax.dot_general
    einsum: object = jnp.einsum
    ragged_dot: object = jax.lax.ragged_dot

    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=2, use_bias=False, qkv_dot_general=self.dot_general, out_dot_general=self.dot_general
        )(h, mask=nn.make_causal_mask(x[..., 0]))
        h = nn.RMSNorm()(x)
        wi = self.param("wi", nn.initializers.lecun_normal(), (32, 2, 48))
        gate, up = jnp.moveaxis(self.einsum("btd,dgf->btgf", h, wi), 2, 0)
        x = x + nn.Dense(32, use_bias=True, dot_general=self.dot_general)(nn.silu(gate) * up)
        experts = self.param("experts", nn.initializers.lecun_normal(), (EXPERTS, 32, 32))
        rows = nn.RMSNorm()(x).reshape(-1, 32)
        sizes = jnp.asarray([rows.shape[0] - 5, 0, 5], jnp.int32)
        return x + self.ragged_dot(rows, experts, sizes).reshape(x.shape)


class Model(nn.Module):
    products: tuple = ()

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(40, 32)(tokens)
        x = Block(*self.products)(x)
        return nn.Dense(40, use_bias=False)(nn.RMSNorm()(x))


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))


@pytest.fixture(scope="module")
def params():
    with jax.numpy_rank_promotion("allow"):
        return Model().init(jax.random.key(0), TOKENS)


@pytest.fixture(autouse=True)
def as_linen_broadcasts():
    with jax.numpy_rank_promotion("allow"):
        yield


def nvfp4(scaling):
    return tuple(functools.partial(f, scaling=scaling) for f in (linen.dot_general, linen.einsum, linen.ragged_dot))


def with_decoded_weights(params):
    """The float params, each kernel that NVFP4 multiplies by replaced by what NVFP4 keeps of it."""

    def visit(path, w):
        name, where = path[-1].key, "/".join(p.key for p in path)
        if name == "experts":
            return np.stack([decoded(e) for e in w])
        if name == "kernel" and "Block" in where:
            contract = 2 if "/out/" in where else 1
            return decoded(w.reshape(np.prod(w.shape[:contract]), -1)).reshape(w.shape)
        return decoded(w.reshape(32, -1)).reshape(w.shape) if name == "wi" else w

    return jax.tree_util.tree_map_with_path(visit, jax.tree.map(np.asarray, params))


@pytest.mark.slow
def test_weights_only_is_the_float_model_over_decoded_weights(params):
    """scaling=None: every product in place, none confused, none left out; and the gradient of every leaf, straight through."""
    target = jnp.asarray(np.random.default_rng().normal(size=(2, 9, 40)), jnp.float32)

    def value_and_gradient(model, p):
        def loss(p):
            logits = model.apply(p, TOKENS)
            return (logits * target).sum(), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(p)
        return logits, gradient

    got, gradient = value_and_gradient(Model(nvfp4(None)), params)
    expected, wanted = value_and_gradient(Model(), jax.tree.map(jnp.asarray, with_decoded_weights(params)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(got - Model().apply(params, TOKENS)).max() > 1e-2
    for path, value in jax.tree_util.tree_leaves_with_path(gradient):
        leaf = functools.reduce(lambda tree, p: tree[p.key], path, wanted)
        np.testing.assert_allclose(value, leaf, rtol=2e-3, atol=2e-3, err_msg=str(path))


@pytest.mark.parametrize("scaling", [None, "token", "tensor"])
def test_the_bits_of_a_swapped_layer(scaling):
    """A Linen Dense and einsum, and nnx layers of the same weights that `quantize_model` swapped."""
    rng = np.random.default_rng()
    x = jnp.asarray(rng.normal(size=(3, 5, 32)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(32, 4, 24)), jnp.float32)

    class Both(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(32, 96, use_bias=False, rngs=nnx.Rngs(0))
            self.einsum = nnx.Einsum("btd,dgf->btgf", (32, 4, 24), rngs=nnx.Rngs(0))
            self.linear.kernel[...] = kernel.reshape(32, 96)
            self.einsum.kernel[...] = kernel

    swapped = nvfp4jax.quantize_model(Both(), nvfp4jax.Rule(".*", scaling=scaling))
    dense = nn.Dense(96, use_bias=False, dot_general=functools.partial(linen.dot_general, scaling=scaling))
    np.testing.assert_array_equal(dense.apply({"params": {"kernel": kernel.reshape(32, 96)}}, x), swapped.linear(x))
    got = linen.einsum("btd,dgf->btgf", x, kernel, scaling=scaling)
    np.testing.assert_array_equal(got, swapped.einsum(x))
    # Axes in any order, contracted ones first in the input, several of them.
    turned = linen.einsum("dbt,dgf->gtbf", jnp.moveaxis(x, 2, 0), kernel, scaling=scaling)
    np.testing.assert_array_equal(jnp.transpose(turned, (2, 1, 0, 3)), got)


def test_ragged_dot_against_a_loop():
    rng = np.random.default_rng()
    x, w = rng.normal(size=(20, 32)).astype(np.float32), rng.normal(size=(4, 32, 16)).astype(np.float32)
    sizes = np.asarray([7, 0, 9, 2])
    run = lambda scaling: jax.jit(functools.partial(linen.ragged_dot, scaling=scaling))(  # noqa: E731
        jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32)
    )
    expected, start = np.zeros((20, 16)), 0
    for e, n in enumerate(sizes):
        expected[start : start + n] = x[start : start + n] @ decoded(w[e])
        start += n
    np.testing.assert_allclose(run(None), expected, rtol=1e-4, atol=1e-4)
    assert 0.01 < np.linalg.norm(run("expert") - expected) / np.linalg.norm(expected) < 0.2


@pytest.mark.slow
def test_training_descends(params):
    """Ten steps of gradient descent through the quantized forward lower the loss."""
    model = Model(nvfp4("token"))

    def loss(p):
        logits = jax.nn.log_softmax(model.apply(p, TOKENS))
        return -jnp.take_along_axis(logits[:, :-1], jnp.asarray(TOKENS)[:, 1:, None], -1).mean()

    @jax.jit
    def step(p):
        value, gradient = jax.value_and_grad(loss)(p)
        return value, jax.tree.map(lambda w, g: w - 0.3 * g, p, gradient)

    losses, trained = [], params
    for _ in range(10):
        value, trained = step(trained)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: linen.dot_general(x, w, (((1,), (0,)), ((0,), (1,)))), "batch axes"),
        (lambda x, w: linen.dot_general(x, w, (((1,), (0,)), ((), ())), precision="highest"), "precision"),
        (lambda x, w: linen.dot_general(x[:, :20], w[:20], (((1,), (0,)), ((), ()))), "20"),
        (lambda x, w: linen.einsum("td,td->t", x, x), "no plain matmul"),
        (lambda x, w: linen.einsum("bdd,dn->bn", jnp.ones((2, 32, 32)), jnp.ones((32, 16))), "no plain matmul .*a diagonal"),
        (lambda x, w: linen.einsum("btd,dn->btn", x, w), "do not fit"),
        (lambda x, w: linen.dot_general(x, w, (((1,), (0,)), ((), ())), scaling="expert"), "expert"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    x, w = jnp.ones((4, 32)), jnp.ones((32, 16))
    with pytest.raises(ValueError, match=message):
        call(x, w)
