"""The operations by the Hopper kernels against their XLA twins and float64, on a GPU: what dispatch adds around the kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA
from flax import nnx
from test_array import decode
from test_ops import activation, check

import nvfp4jax
from nvfp4jax import Rule, array, ops
from nvfp4jax.array import NVFP4Array
from nvfp4jax.ops import choice
from nvfp4jax.rollout.prompts import pack
from nvfp4jax.scaling import NAMES, Static

pytestmark = pytest.mark.gpu
BF16 = jnp.bfloat16


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.atleast_1d(np.asarray(x)).view(np.uint8), np.atleast_1d(np.asarray(y)).view(np.uint8))


class NothingNew:
    """A source of weights that never has any."""

    active_step = 7

    def take(self):
        return None


def test_hopper_is_the_default():
    assert choice._default_order() == ("hopper", "xla")


@pytest.mark.parametrize("scaling", ["tensor", "tensor_pow2", "token"])
@pytest.mark.parametrize("four_over_six", [None, "mae", "mse"])
def test_quantize(key, scaling, four_over_six):
    x = jax.random.normal(key, (3, 50, 320), BF16)
    valid = jax.random.bernoulli(key, 0.8, (3, 50))
    for kw in (dict(), dict(valid=valid), dict(amax=jnp.float32(3.3))):
        kw = kw if scaling != "token" else {k: v for k, v in kw.items() if k != "valid"}
        f = lambda name: jax.jit(lambda x: nvfp4jax.quantize(x, scaling=dataclasses.replace(NAMES[scaling], four_over_six=four_over_six), implementation=name, **kw))(x)  # noqa: B023
        same_bits(f("hopper"), f("xla"))


def test_quantize_weight(key):
    w = jax.random.normal(key, (6, 96, 192)) * jnp.exp2(jnp.arange(6, dtype=jnp.float32))[:, None, None]
    for v in (w, w[0]):
        for kind in (None, "mse"):
            f = lambda name: jax.jit(lambda w: ops.quantize_weight(w, four_over_six=kind, implementation=name))(v)  # noqa: B023
            same_bits(f("hopper"), f("xla"))


def test_quantize_transposed(key):
    """In place, and, K or N being odd to the kernel, behind a copy; float32 is rounded in front."""
    for shape, dtype in (((6, 192, 96), BF16), ((192, 96), jnp.float32), ((3, 208, 96), BF16), ((3, 64, 33), BF16)):
        ws = [jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i in range(2)]
        for kind in (None, "mse"):
            f = lambda name: jax.jit(lambda ws: ops.quantize_transposed(ws, four_over_six=kind, implementation=name))(ws)  # noqa: B023
            same_bits(f("hopper"), f("xla"))


@pytest.mark.parametrize("scaling", [None, "tensor", "tensor_pow2", "token"])
def test_matmul(key, scaling):
    x = jax.random.normal(key, (3, 11, 448), BF16)
    w = array.quantize_weight(jax.random.normal(key, (200, 448)))
    bias = jax.random.normal(key, (200,), BF16)
    y = jax.jit(lambda x, w: nvfp4jax.matmul(x, w, scaling=scaling, implementation="hopper", out_dtype=jnp.float32))(x, w)
    check(y.reshape(33, 200), activation(x, scaling).reshape(33, 448), decode(w))
    z = jax.jit(lambda x, w: nvfp4jax.matmul(x, w, scaling=scaling, implementation="hopper", bias=bias))(x, w)
    np.testing.assert_allclose(z.astype(jnp.float32), y + bias.astype(jnp.float32)[None, None], rtol=1e-2, atol=1e-2)
    stack = NVFP4Array(jnp.stack([w.packed * jnp.uint8(0), w.packed]), jnp.stack([w.scale] * 2), jnp.stack([w.global_scale] * 2), jnp.int32(1))
    at = jax.jit(lambda x, w: nvfp4jax.matmul(x, w, scaling=scaling, implementation="hopper", out_dtype=jnp.float32))(x, stack)
    np.testing.assert_array_equal(at, y)


def moe(key, tokens=37, e=16, h=256, i=128, k=4):
    keys = jax.random.split(key, 5)
    flat = array.quantize_weight(jax.random.normal(keys[0], (e, 2 * i, h)) * jnp.float32(h**-0.5))
    gate_up = NVFP4Array(flat.packed.reshape(e, 2, i, h // 2), flat.scale.reshape(e, 2, i, h // 16), flat.global_scale[..., None])
    down = array.quantize_weight(jax.random.normal(keys[1], (e, h, i)) * jnp.float32(i**-0.5))
    x = jax.random.normal(keys[2], (tokens, h), BF16)
    weights, ids = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[3], (tokens, e))), k)
    return x, ids, weights, gate_up, down


@pytest.mark.parametrize("scaling", [None, "tensor", "tensor_pow2", "token", "expert", "static"])
@pytest.mark.parametrize("tokens", [1, 37, 700])
def test_experts(key, scaling, tokens):
    args = moe(key, tokens)
    e = args[3].shape[0]
    options = dict(scaling=scaling, valid=jnp.arange(tokens) != 3)
    if scaling == "static":  # one an expert
        options["scaling"] = tuple(Static(jax.random.uniform(key, (e,), minval=1.0, maxval=2.0) * jnp.float32(4 / 2688)) for _ in range(2))
    hopper, xla = (
        np.asarray(jax.jit(lambda *a, name=name: nvfp4jax.experts(*a, **options, implementation=name))(*args), np.float32)
        for name in ("hopper", "xla")
    )
    # Both round the SwiGLU output to bfloat16 from sums in another order; a bit there may move codes of the second quantization.
    assert np.linalg.norm(hopper - xla) / np.linalg.norm(xla) < (0.004 if scaling is None else 0.06)


def test_experts_keep_a_rows_bits(key):
    """token mode: a token's result is bit-equal in any batch and at any place."""
    x, ids, weights, gate_up, down = moe(key, 512)
    f = jax.jit(lambda x, ids, weights: nvfp4jax.experts(x, ids, weights, gate_up, down, scaling="token", implementation="hopper"))
    whole = np.asarray(f(x, ids, weights)).view(np.uint16)
    for rows in (slice(0, 1), slice(3, 10), slice(100, 164), slice(0, 300)):
        np.testing.assert_array_equal(np.asarray(f(x[rows], ids[rows], weights[rows])).view(np.uint16), whole[rows])
    order = jax.random.permutation(key, 512)
    np.testing.assert_array_equal(np.asarray(f(x[order], ids[order], weights[order])).view(np.uint16), whole[order])


def test_delayed_layer(key):
    """The history that a layer on the kernels keeps is the XLA path's, to the bit, and their results agree."""
    layer = nnx.Linear(448, 200, use_bias=False, param_dtype=BF16, dtype=BF16, rngs=nnx.Rngs(key))
    both = [nvfp4jax.NVFP4Linear.from_float(layer, scaling="delayed", implementation=name) for name in ("hopper", "xla")]
    call = nnx.jit(lambda q, x: q(x))
    for n, step in enumerate((0, 3, 3, -2, -4, *[-4] * 15, 1)):
        x = jax.random.normal(jax.random.fold_in(key, n), (5, 448), BF16) * jnp.asarray(2.0**step, BF16)
        y, z = (np.asarray(call(q, x), np.float32) for q in both)
        same_bits(both[0].input_amax[...], both[1].input_amax[...])
        assert both[0].input_amax[0] == jnp.abs(x.astype(jnp.float32)).max()
        assert np.abs(y - z).max() <= 2.0**-8 * np.abs(z).max()


def test_calibration():
    """Static scales from prompts, of a model on the kernels and of one on XLA: their float sums differ, hence the last bits of amaxes."""
    folder = DATA / "qwen3-moe-tiny" / "bf16"
    ids = np.load(folder / "reference.npz")["input_ids"]
    model, scales = nvfp4jax.load_model(folder, scan_layers=True), []
    for name in ("hopper", "xla"):
        rules = [Rule("lm_head|.*/mlp/gate", skip=True), Rule(".*", scaling="static", implementation=name)]
        q = nvfp4jax.calibrate(nvfp4jax.quantize_model(model, rules), [ids])
        scales.append(jax.tree.leaves(nnx.state(q, lambda path, _: path[-1].endswith("input_scale"))))
    assert len(scales[0]) >= 4
    for a, b in zip(*scales, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.2)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_rollout(scan_layers):
    """A model end to end: the kernels are taken without a fallback, and prefill and decode agree with the XLA path."""
    folder = DATA / "qwen3-moe-tiny" / "bf16"
    reference = np.load(folder / "reference.npz")
    ids, mask = reference["input_ids"], reference["attention_mask"]
    packed = pack(ids, mask == 1)
    model = nvfp4jax.load_model(folder, scan_layers=scan_layers)
    outs = []
    for name in ("hopper", "xla"):
        q = nvfp4jax.quantize_model(model, [Rule("lm_head|.*/mlp/gate", skip=True), Rule(".*", scaling="token", implementation=name)])
        logits = jax.jit(lambda ids, q=q: q(ids, packed.positions(), valid=packed.valid).logits)(jnp.asarray(packed.ids))
        out = nvfp4jax.generate(q, ids, mask, max_new_tokens=16)
        assert np.isfinite(out.logprobs).all()
        if scan_layers and name == "hopper":  # in chunks, with no newer weights between them: the same bits
            chunks = nvfp4jax.generate(q, ids, mask, max_new_tokens=16, weights=NothingNew(), swap_every=6)
            same_bits((out.tokens, out.logprobs), (chunks.tokens, chunks.logprobs))
        outs.append(np.asarray(logits)[packed.valid])
    assert np.linalg.norm(outs[0] - outs[1]) / np.linalg.norm(outs[1]) < 0.2
