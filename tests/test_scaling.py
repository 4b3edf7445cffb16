"""The modes as values, what they resolve to, and the mask of models that do not pass it."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import scaling
from nvfp4jax.scaling import NAMES, Delayed, PerExpert, Static, Tensor, Token, parse

ALL = [None, *NAMES.values(), Token(four_over_six="mse"), Tensor(pow2=True, axes=("data", "fsdp"), four_over_six="mae"), Static(four_over_six="mse")]


def test_a_name_and_its_value_are_the_same(unchecked):
    for name, value in NAMES.items():
        assert parse(name, "x") == parse(value, "x") == value and scaling.name_of(value) == name
    assert parse(None, "x") is None
    assert Token() != Tensor() and Tensor() != Tensor(pow2=True) and hash(Static(jnp.float32(1))) == hash(Static())
    for wrong in ("row", "Token", 3, Tensor, "none"):
        with pytest.raises(ValueError, match="layers/0: scaling=.* is not one of token, tensor, tensor_pow2, expert, static, delayed"):
            parse(wrong, "layers/0")
    with pytest.raises(ValueError, match="layers/0: scaling='expert' is not one of token, tensor, tensor_pow2, static"):
        parse("expert", "layers/0", experts=False)
    with pytest.raises(ValueError, match="Static: four_over_six='max'"):
        Static(four_over_six="max")


def test_modes_go_through_json():
    for value in ALL:
        stored = json.loads(json.dumps(scaling.to_json(value)))
        assert scaling.from_json(stored) == value
    for wrong in ("row", {"name": "row"}, {"name": None}, {"name": "token", "axes": ["x"]}, {"name": "token", "more": 1}, 7):
        with pytest.raises(ValueError):
            scaling.from_json(wrong)


def test_modes_are_pytrees():
    """What a mode carries is a leaf, the rest is static: a jitted function compiles once for all scales."""
    traced = []

    @jax.jit
    def f(x, mode):
        traced.append(1)
        return nvfp4jax.quantize(x, mode).dequantize()

    x = jnp.ones((2, 32))
    for scale in (0.01, 0.02):
        np.testing.assert_array_equal(f(x, Static(jnp.float32(scale))), nvfp4jax.quantize(x, Static(jnp.float32(scale))).dequantize())
    assert len(traced) == 1


@pytest.mark.parametrize("kind", [None, "mse"])
def test_a_power_of_two_scale_keeps_rows_apart_within_its_range(key, kind):
    """A block's bits are those of its row alone as long as its amax is at least 1 / POW2_RANGE of the call's; not always below."""
    limit, mode = scaling.POW2_RANGE[kind], Tensor(pow2=True, four_over_six=kind)
    row = jax.random.uniform(key, (1, 512), minval=0.5, maxval=1.0)  # each block's amax is in (0.5, 1]
    amax = float(jnp.abs(row).max())
    alone = nvfp4jax.quantize(row, mode)

    def among(ratio):
        loud = jnp.zeros((1, 512)).at[0, 0].set(jnp.float32(ratio))
        return nvfp4jax.quantize(jnp.concatenate([row, loud]), mode)

    smallest = float(jnp.abs(row).reshape(-1, 16).max(1).min())
    for ratio in (amax, 3 * amax, 100.0, smallest * limit * 0.999):  # every block's amax >= ratio / limit
        both = among(ratio)
        np.testing.assert_array_equal(np.asarray(both.packed)[0], np.asarray(alone.packed)[0], err_msg=str(ratio))
    beyond = [np.asarray(among(smallest * limit * factor).packed)[0] for factor in (64.0, 100.0, 1000.0)]
    assert any((b != np.asarray(alone.packed)[0]).any() for b in beyond)


def test_tensor_over_a_mesh_axis(key):
    """Inside shard_map the amax is the whole tensor's, not a shard's."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(key, (8, 32)) * jnp.exp2(jnp.arange(8, dtype=jnp.float32))[:, None]
    spec = jax.sharding.PartitionSpec("data")
    f = jax.shard_map(lambda x: nvfp4jax.quantize(x, Tensor(axes=("data",))).dequantize(), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(f)(x), nvfp4jax.quantize(x, "tensor").dequantize())


class Foreign(nnx.Module):
    """A model that passes no mask: two layers over [B, T, K]."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def test_the_mask_of_a_foreign_model(key):
    model = nvfp4jax.quantize_model(Foreign(nnx.Rngs(0)), nvfp4jax.Rule(".*", scaling="tensor"))
    x = jax.random.normal(key, (2, 3, 32))
    mask = jnp.array([[True, True, False], [True, False, False]])
    loud = jnp.where(mask[..., None], x, jnp.float32(1e4))

    @jax.jit
    def masked(x, mask):
        with nvfp4jax.valid_rows(mask):
            return model(x)

    np.testing.assert_array_equal(np.asarray(masked(loud, mask))[mask], np.asarray(masked(x, mask))[mask])
    with nvfp4jax.valid_rows(mask):
        np.testing.assert_array_equal(np.asarray(model(loud))[mask], np.asarray(masked(x, mask))[mask])
        token = nnx.view(model, scaling="token")
        token(x[0])  # a mode that reads no mask does not ask for its shape
        for wrong, shape in ((x.swapaxes(0, 1), r"\(3, 2\)"), (x.reshape(6, 32), r"\(6,\)"), (x[:, -1:], r"\(2, 1\)")):
            with pytest.raises(ValueError, match=rf"first: the mask of valid_rows has shape \(2, 3\).* needs {shape}"):
                model(wrong)
        with pytest.raises(ValueError, match="first: valid_rows was entered outside of jit"):
            jax.jit(lambda x: model(x))(x)
        with pytest.raises(ValueError, match=r"first: valid_rows\(None\) inside valid_rows\(mask\)"), nvfp4jax.valid_rows(None):
            model(x)
    with pytest.raises(ValueError, match=r"first: valid has shape \(3, 2\); x of shape \(2, 3, 32\) needs \(2, 3\)"):
        model.first(x, valid=mask.T)


def test_what_a_mode_lacks_is_named(key):
    x, w = jax.random.normal(key, (2, 32)), nvfp4jax.ops.quantize_weight(jax.random.normal(key, (16, 32)))
    for mode, message in (("static", "q: scaling: Static needs scale.*calibrate"), ("delayed", r"q: scaling: Delayed needs history; give f32 \[16\]")):
        with pytest.raises(ValueError, match=message):
            nvfp4jax.matmul(x, w, scaling=mode, name="q")
    history = jnp.zeros(scaling.HISTORY).at[3].set(2.0)
    got = nvfp4jax.matmul(x, w, scaling=Delayed(history))
    np.testing.assert_array_equal(got, nvfp4jax.matmul(nvfp4jax.quantize(x, amax=2.0), w, out_dtype=jnp.float32))
    with pytest.raises(ValueError, match="matmul: scaling=PerExpert"):
        nvfp4jax.matmul(x, w, scaling=PerExpert())


def test_a_scale_or_history_that_is_given_is_taken(key, unchecked):
    """Also where the layer is in that mode already, and for each layer of a stack."""
    half, full = Static(jnp.float32(0.5)), jnp.full(scaling.HISTORY, 3.0, jnp.float32)
    model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(key)))
    static = nvfp4jax.quantize_model(model, nvfp4jax.Rule(".*", scaling=Static(jnp.float32(0.001))))
    delayed = nvfp4jax.quantize_model(model, nvfp4jax.Rule(".*", scaling="delayed"))
    for mode in (half, Static(jnp.float32(0.5), four_over_six="mse")):
        assert nnx.view(static, scaling=mode).layers[0].input_scale[...] == 0.5
    for mode in ("static", Static(four_over_six="mse")):  # none is given
        assert nnx.view(static, scaling=mode).layers[0].input_scale[...] == jnp.float32(0.001)
    np.testing.assert_array_equal(nnx.view(delayed, scaling=Delayed(full)).layers[0].input_amax[...], full)
    experts = nvfp4jax.Experts(4, 32, 32, rngs=nnx.Rngs(key))
    stack = nvfp4jax.NVFP4Experts.from_float(nnx.merge(nnx.graphdef(experts), jax.tree.map(lambda v: jnp.stack([v] * 3), nnx.state(experts))))
    for scale, found in ((half.scale, (3,)), (jnp.full(4, 0.5), (3, 4)), (jnp.full((3, 4), 0.5), (3, 4)), (jnp.full(3, 0.5), (3,))):
        layer = nnx.view(stack, scaling=Static(scale))
        assert layer.gate_up_input_scale.shape == layer.down_input_scale.shape == found
    assert nnx.view(stack, scaling=Delayed(full)).down_input_amax.shape == (3, scaling.HISTORY)
    for layer, mode, message in (
        (stack, Static(jnp.ones(5)), r"experts: Static: scale of shape \(5,\); \[4\] or \[\] is needed, or that behind \[3\]"),
        (static, Static(jnp.ones(5)), r"layers/0: Static: scale of shape \(5,\); \[\] is needed"),
        *((static, Static(jnp.float32(value)), "layers/0: Static: scale .* not finite and positive") for value in (0.0, -1.0, np.nan, np.inf)),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.view(layer, scaling=mode)


def test_importing_brings_no_gpu_kernels_and_no_orbax():
    program = """
import sys, numpy as np, jax
from flax import nnx
import nvfp4jax
from nvfp4jax import models
config = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64, hidden_size=32, intermediate_size=32,
              num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
model = nvfp4jax.quantize_model(models.build(config, rngs=nnx.Rngs(0)), nvfp4jax.Rule("layers/.*"))
nvfp4jax.generate(model, np.array([[1, 2, 3]]), max_new_tokens=2)
bad = [m for m in sys.modules if m.startswith(("nvfp4jax.kernels", "nvfp4jax.backends.hopper", "orbax", "jax.experimental.pallas", "jax.experimental.mosaic"))]
print(bad)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]", out


def test_replace_keeps_what_a_mode_says():
    assert dataclasses.replace(NAMES["tensor_pow2"], four_over_six="mse") == Tensor(pow2=True, four_over_six="mse")


@pytest.mark.parametrize("kind, limit", [(None, 14336), ("mse", 8192)])
def test_blocks_beyond_the_range(kind, limit):
    """The count is numpy's: blocks, not all 0, of valid rows whose amax is below the call's over the limit."""
    rng = np.random.default_rng()
    x = rng.standard_normal((6, 4, 16)).astype(np.float32) * np.float32(2.0) ** rng.integers(-24, 4, (6, 4, 1))
    x[0, 0], x[1, 2] = 0, 112
    x[2, 1] = 0.0078125 if kind is None else 0.013671875  # 112 over the limit, exactly: inside
    valid = np.array([True, True, True, False, True, True])
    amax = np.abs(x).max(-1)
    expected = ((amax > 0) & (amax * np.float32(limit) < amax[valid].max()) & valid[:, None]).sum()
    found = jax.jit(lambda x, valid: scaling.blocks_beyond_pow2_range(x, valid, four_over_six=kind))(x.reshape(6, 64), valid)
    assert int(found) == expected > 0
