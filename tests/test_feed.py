"""An activation is quantized once for all that read it, to the bits of what each would have made; gradients through the swapped layers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import layers, models, numerics, ops
from nvfp4jax.backends import xla
from nvfp4jax.layers import feeding
from nvfp4jax.models import blocks
from nvfp4jax.scaling import Static, Token

BF16 = jnp.bfloat16
CONFIG = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64, hidden_size=512, intermediate_size=768,
              num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # fmt: skip


def backend_like_xla(**changes):
    """A backend as `backends.xla`, but for what is changed."""
    module = types.ModuleType("changed")
    vars(module).update(vars(xla) | changes)
    return module


def linears(key, *outputs, scaling="token", k=64):
    floats = [nnx.Linear(k, n, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(jax.random.fold_in(key, n))) for n in outputs]
    return floats, [nvfp4jax.NVFP4Linear.from_float(f, scaling=scaling, name=f"l{i}") for i, f in enumerate(floats)]


@pytest.mark.parametrize("scaling", [None, "token", "tensor", "tensor_pow2", "static", "delayed"])
def test_readers_share_one_activation(key, scaling):
    x = jax.random.normal(key, (3, 5, 64), BF16)
    valid = jnp.arange(15).reshape(3, 5) % 4 != 1
    floats, readers = linears(key, 32, 48, 16, scaling=scaling)
    if scaling == "static":
        for i, r in enumerate(readers):
            layers.set_scaling(r, Static(jnp.float32(0.001 * (i + 1))))
    norm = layers.RMSNorm(64, 1e-6, param_dtype=BF16)
    norm.scale.set_value(jax.random.normal(key, (64,), BF16))
    gate, up = (jax.random.normal(jax.random.fold_in(key, n), x.shape, BF16) for n in (1, 2))
    cases = (
        (lambda rs: layers.feed(x, rs, valid), x),
        (lambda rs: layers.feed_norm(norm, x, rs, valid), numerics.rms_norm(x, norm.scale[...], 1e-6)),
        (lambda rs: layers.feed_gated(gate, up, rs, valid), numerics.silu_mul(gate, up)),
    )
    for feed, value in cases:
        given = feed([*readers, floats[0]])
        assert given[0] is given[1] is given[2]
        np.testing.assert_array_equal(np.asarray(given[3], np.float32), np.asarray(value, np.float32))
        if scaling == "delayed":  # what each reader has seen is the same
            assert all((r.input_amax[...] == readers[0].input_amax[...]).all() and r.input_amax[0] > 0 for r in readers)
            continue
        largest = Static(readers[2].input_scale[...]) if scaling == "static" else readers[0].scaling
        for r, a in zip(readers, given[:3], strict=True):
            alone = ops.matmul(value, r.weight(), scaling=largest, valid=valid if scaling and "tensor" in scaling else None, bias=r.bias[...])
            np.testing.assert_array_equal(np.asarray(r(a), np.float32), np.asarray(alone, np.float32))


def test_readers_that_differ_are_fed_apart(key):
    x = jax.random.normal(key, (4, 64), BF16)
    _, readers = linears(key, 32, 48, 16)
    layers.set_scaling(readers[1], Token(four_over_six="mse"))
    readers[2].dtype = jnp.float32
    a, b, c = layers.feed(x, readers)
    assert a is not b and isinstance(c, jax.Array)  # another dtype: the layer quantizes for itself
    for r, given in zip(readers, (a, b, c), strict=True):
        np.testing.assert_array_equal(np.asarray(r(given)), np.asarray(r(x)))


def layer_call(implementation):
    model = models.build(CONFIG, rngs=nnx.Rngs(0))
    q = nvfp4jax.quantize_model(model, nvfp4jax.Rule("layers/.*", implementation=implementation))
    graphdef, state = nnx.split(q.layers[0])

    def call(x, state):
        batch = x.shape[0]
        angles = jnp.ones((batch, x.shape[1], 32))
        inputs = blocks.StepInputs(angles, angles, jnp.zeros(batch, jnp.int32), None)
        return nnx.merge(graphdef, state)(x, None, inputs)[0]

    return call, state


def kernels_of(jaxpr):
    """The Pallas calls of a program, those in inner programs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("pallas_call", "mpmd_map", "core_map"):
            yield eqn
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernels_of(inner)


def test_quantizations_of_a_layer(monkeypatch):
    """A dense layer quantizes four activations for its seven weights: on XLA's path, and as kernels, those of one activation in one launch."""
    made = []

    def counted(f):
        def call(*args):
            made.append(f.__name__)
            return f(*args)

        return call

    spy = backend_like_xla(**{n: counted(getattr(xla, n)) for n in ("activation", "rms_norm", "silu_mul", "matmul", "matmuls")})
    monkeypatch.setitem(ops.BACKENDS, "xla", lambda: spy)
    call, state = layer_call("xla")
    jax.jit(call).lower(jnp.ones((2, 3, 512), BF16), state)
    assert sorted(made) == ["activation", *["matmul"] * 2, *["matmuls"] * 2, "rms_norm", "rms_norm", "silu_mul"]
    call, state = layer_call("hopper")
    assert len(list(kernels_of(jax.make_jaxpr(call)(jnp.ones((2, 3, 512), BF16), state).jaxpr))) == 4 + 4


@pytest.mark.parametrize("bias", [False, True])
def test_a_kept_layer_multiplies_by_the_op(key, bias, monkeypatch):
    """Each product of a layer that no rule swapped is `ops.float_matmul`'s; value and gradients are those of Flax's own call."""
    config = CONFIG | dict(attention_bias=bias)
    graphdef, state = nnx.split(models.build(config, rngs=nnx.Rngs(0)).layers[0])
    state = jax.tree.map(lambda v: v + jax.random.normal(key, v.shape, v.dtype) / 64, state)  # biases that are no zeros
    calls = []

    def spy(x, kernel, out_dtype, transposed=False):
        calls.append((x.dtype, kernel.dtype, out_dtype, kernel.shape))
        return xla.float_matmul(x, kernel, out_dtype, transposed)

    monkeypatch.setitem(ops.BACKENDS, "xla", lambda: backend_like_xla(float_matmul=spy))
    x = jax.random.normal(key, (2, 3, 512), BF16)
    angles = jnp.ones((2, 3, 32))
    inputs = blocks.StepInputs(angles, angles, jnp.zeros(2, jnp.int32), None)

    def run(state, x):
        y = nnx.merge(graphdef, state)(x, None, inputs)[0]
        return (y.astype(jnp.float32) ** 2).mean(), y

    traced_anew = lambda: jax.jit(lambda *args: jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(*args))  # noqa: E731
    (_, values), grads = traced_anew()(state, x)
    kernels = sorted(v.shape for p, v in nnx.to_flat_state(state) if p[-1] == "kernel")
    assert sorted(shape for *_, shape in calls[: len(kernels)]) == kernels and len(kernels) == 7
    assert {d for call in calls for d in call[:3]} == {jnp.dtype(BF16)}
    monkeypatch.setattr(feeding, "_is_plain", lambda layer, x: False)
    count = len(calls)
    (_, flax), want = traced_anew()(state, x)
    assert len(calls) == count
    for a, b in zip(jax.tree.leaves((values, grads)), jax.tree.leaves((flax, want)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())  # XLA's sum of bfloat16 products has another order


def test_what_is_no_plain_product_in_bfloat16_is_called(key, monkeypatch):
    """A dot_general of its own, float32: the layer itself."""
    monkeypatch.setitem(ops.BACKENDS, "xla", lambda: backend_like_xla(float_matmul=None))
    x = jax.random.normal(key, (3, 64), BF16)
    own = lambda *args, **options: 2 * jax.lax.dot_general(*args, **options)  # noqa: E731
    for options in (dict(dtype=BF16, dot_general=own), dict(dtype=jnp.float32)):
        layer = nnx.Linear(64, 64, param_dtype=BF16, rngs=nnx.Rngs(0), **options)
        (y,) = layers.call_each((layer,), (x,))
        np.testing.assert_array_equal(y, layer(x))
        np.testing.assert_array_equal(layers.add_to(layer(x), layer, x), 2 * layer(x))


def test_an_activation_of_one_backend_is_read_by_another(key):
    """The Hopper operand has another order of K: XLA's matmul, where it takes over, reads the natural one."""
    x = jax.random.normal(key, (4, 128), BF16)
    w = ops.quantize_weight(jax.random.normal(key, (32, 128)))
    from nvfp4jax.backends import hopper

    a = ops.quantize_activation(x, "token")
    permuted = backend_like_xla(NAME="permuted", natural=hopper.natural)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.BACKENDS, "permuted", lambda: permuted)
        other = nvfp4jax.QuantizedActivation(hopper.permute_k(a.operand), a.row_scale, a.source, None, "permuted")
        np.testing.assert_array_equal(nvfp4jax.matmul(other, w), nvfp4jax.matmul(a, w))


def test_gradients_reach_floats_through_quantize(key):
    """Straight through: the gradient is that of the value itself, whatever was rounded."""
    w, c = jax.random.normal(key, (16, 64)), jax.random.normal(jax.random.fold_in(key, 1), (16, 64))
    for f in (lambda w: nvfp4jax.quantize(w), lambda w: nvfp4jax.quantize(w, "token"), lambda w: ops.quantize_weight(w),
              lambda w: ops.quantize_transposed([w[:4].T, w[4:].T])):
        for compiled in (lambda g: g, jax.jit):
            grad = compiled(jax.grad(lambda w, f=f: (f(w).dequantize() * c).sum()))(w)
            np.testing.assert_array_equal(grad, c)
    x = jax.random.normal(key, (5, 64))
    dy = jax.random.normal(jax.random.fold_in(key, 2), (5, 16))
    decoded = nvfp4jax.quantize(x, "token").dequantize()
    grad = jax.jit(jax.grad(lambda w: (nvfp4jax.matmul(x, ops.quantize_weight(w), scaling="token") * dy).sum()))(w)
    np.testing.assert_allclose(grad, dy.T @ decoded, rtol=1e-5, atol=1e-5)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.experts = nvfp4jax.Experts(4, 64, 32, rngs=rngs)
        self.down = nnx.Einsum("td,dkh->tkh", (64, 2, 16), rngs=rngs)

    def __call__(self, x):
        h = self.experts(self.up(x), jnp.array([[0, 2], [3, 1], [2, 0]], jnp.int32), jnp.array([[0.5, 0.5], [0.2, 0.8], [1.0, 0.1]]))
        return self.down(h)


def test_a_trainer_differentiates_the_rollouts_forward(key):
    """`straight_through` computes the swapped model's own values, and its gradients are those of the decoded weights."""
    net = Net(nnx.Rngs(0))
    q = nvfp4jax.quantize_model(net, nvfp4jax.Rule(".*", scaling=None))
    x, c = jax.random.normal(key, (3, 32)), jax.random.normal(key, (3, 2, 16))

    @nnx.jit
    def ours(net):
        return nnx.value_and_grad(lambda net: (nvfp4jax.straight_through(q, net)(x) * c).sum())(net)

    value, grads = ours(net)
    np.testing.assert_allclose(value, (q(x) * c).sum(), rtol=1e-5)
    decoded = nnx.clone(net)
    decoded.up.kernel.set_value(q.up.kernel[...])
    decoded.down.kernel.set_value(q.down.kernel[...])
    gate_up, down = (w.dequantize() for w in q.experts.weights())
    for name, w in (("gate_proj", gate_up[:, 0]), ("up_proj", gate_up[:, 1]), ("down_proj", down)):
        getattr(decoded.experts, name).set_value(w.swapaxes(-1, -2))
    want = nnx.grad(lambda net: (net(x) * c).sum())(decoded)
    for (path, a), (_, b) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(want), strict=True):
        np.testing.assert_allclose(a[...], b[...], rtol=2e-3, atol=2e-4, err_msg=str(path))
        assert np.abs(np.asarray(a[...])).max() > 0
    with pytest.raises(ValueError, match="quantize_params passes no gradient.*straight_through"):
        nnx.grad(lambda net: nvfp4jax.quantize_params(net, q)["up"]["kernel_scale"][...].astype(jnp.float32).sum())(net)


def test_optimizers_and_grad_pass_the_codes_by(key):
    """Nothing of a swapped layer is an nnx.Param but its bias."""
    q = nvfp4jax.quantize_model(Net(nnx.Rngs(0)), nvfp4jax.Rule("up|experts", scaling=None))
    assert {p for p, _ in nnx.to_flat_state(nnx.state(q, nnx.Param))} == {("up", "bias"), ("down", "kernel")}
    x = jax.random.normal(key, (3, 32))
    grads = nnx.grad(lambda q: q(x).sum())(q)
    assert {p for p, _ in nnx.to_flat_state(grads)} == {("up", "bias"), ("down", "kernel")}
