"""Layers on a mesh, its axes explicit (what `jax.make_mesh` gives) or automatic: the results of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import folders
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nvfp4jax
from nvfp4jax import models


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(kind, kind), devices=jax.devices()[:4])


def layer(scaling, spec=None):
    metadata = {} if spec is None else {"out_sharding": spec}
    return nvfp4jax.NVFP4Linear.from_float(nnx.Linear(64, 32, rngs=nnx.Rngs(0), kernel_metadata=metadata), name="the/layer", scaling=scaling)


@functools.cache
def expected(scaling, seed):
    return np.asarray(layer(scaling)(jnp.asarray(inputs(seed))))


def inputs(seed):
    return np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float32)


@pytest.mark.parametrize("scaling, kind", [(None, AxisType.Explicit), ("token", AxisType.Explicit), ("token", AxisType.Auto)])
def test_a_layer_split_over_its_inputs(scaling, kind, seed):
    """K of the weight on `fsdp`, that of the activation too: partial sums are added; asked for rows on `fsdp`, the result has them there."""
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        q = layer(scaling, ("fsdp", "tp"))
        x = jax.device_put(inputs(seed), NamedSharding(mesh, P(None, "fsdp")))
        y = jax.jit(lambda q, x: q(x))(q, x)
        rows = nnx.jit(lambda q, x: q(x, out_sharding=P("fsdp")))(q, x)
        assert rows.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp")), 2)
    for found in (y, rows):
        np.testing.assert_allclose(np.asarray(found), expected(scaling, seed), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_split_layer(seed):
    gradient = jax.jit(jax.grad(lambda x, q: (q(x) ** 2).sum()))
    expected = gradient(jnp.asarray(inputs(seed)), layer(None))
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        x = jax.device_put(inputs(seed), NamedSharding(mesh_of(AxisType.Explicit), P(None, "fsdp")))
        found = gradient(x, layer(None, ("fsdp", None)))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-4)


HEADS = dict(q_proj=0, k_proj=0, v_proj=0, o_proj=1, gate_proj=0, up_proj=0, down_proj=1)
PROMPTS = np.array([[5, 17, 42, 8], [3, 9, 1, 22]])


def placed(model, mesh, axes):
    """A copy on the mesh: matrices whose path holds a name of `axes` split over tp along that axis of theirs, the rest whole."""
    graphdef, state = nnx.split(model)

    def spec(path, ndim):
        axis = next((axis for name, axis in axes.items() if name in "/".join(map(str, path))), None)
        return P() if axis is None or ndim < 2 else P(*[None] * axis, "tp")

    flat = nnx.to_flat_state(state)
    return nnx.merge(graphdef, nnx.from_flat_state({p: v.replace(jax.device_put(v[...], NamedSharding(mesh, spec(p, v.ndim)))) for p, v in flat}))


@pytest.fixture(scope="module")
def decoders():
    """Of one layer, float: dense, and with experts."""
    configs = (folders.small_config(num_hidden_layers=1, mlp_only_layers=dense, num_key_value_heads=2, intermediate_size=64, num_experts=4) for dense in ([0], []))
    return [models.build(config, rngs=nnx.Rngs(3)) for config in configs]


def test_a_rollout_of_split_heads(decoders):
    """Explicit axes: split heads, a split MLP, vocabulary and embedding, each the tokens of one device."""
    qmodel = nvfp4jax.quantize_model(decoders[0], nvfp4jax.Rule("layers/.*"))
    expected = nvfp4jax.generate(qmodel, PROMPTS, max_new_tokens=4)
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        found = nvfp4jax.generate(placed(qmodel, mesh, HEADS | dict(lm_head=1, embed=1)), PROMPTS, max_new_tokens=4)
    np.testing.assert_array_equal(np.asarray(found.tokens), np.asarray(expected.tokens))
    np.testing.assert_allclose(np.asarray(found.logprobs), np.asarray(expected.logprobs), atol=0.05)


@pytest.mark.parametrize("axes, message", [
    (dict(experts=0), r"layers/0/mlp/experts of shape \(4, 2, 16, 16\): the explicit mesh axis tp splits it; keep experts whole .*AxisType.Auto"),
    (dict(embed=0), r"embed_tokens/embedding of shape \(64, 32\): the explicit mesh axis tp splits it; split its features, or .*AxisType.Auto"),
])  # fmt: skip
def test_splits_that_are_refused(decoders, axes, message, unchecked):
    qmodel = nvfp4jax.quantize_model(decoders[1], nvfp4jax.Rule("layers/.*experts"))
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)), pytest.raises(ValueError, match=message):
        nvfp4jax.generate(placed(qmodel, mesh, axes), PROMPTS, max_new_tokens=2)


def test_shards_narrower_than_a_block(unchecked):
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        with pytest.raises(ValueError, match=r"the/layer of shape \(16, 32\): fsdp cuts K=16 into 2 shards, within the blocks of 16"):
            nvfp4jax.NVFP4Linear.from_float(nnx.Linear(16, 32, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": ("fsdp", None)}), name="the/layer")
        q = nvfp4jax.NVFP4Linear.from_float(nnx.Linear(16, 32, rngs=nnx.Rngs(0)), name="the/layer")
        x = jax.device_put(np.ones((4, 16), np.float32), NamedSharding(mesh_of(AxisType.Explicit), P(None, ("fsdp", "tp"))))
        with pytest.raises(ValueError, match=r"the/layer: x of shape \(4, 16\): fsdp/tp cuts K=16 into 4 shards"):
            q(x)
