"""Low-rank adapters in a trainer's state: refused by name, or merged into the kernel where asked; never left out.

The oracle merges in numpy; values are small multiples of 1/8, so that every product and sum is exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import Rule
from nvfp4jax.checkpoint import CheckpointError
from nvfp4jax.checkpoint.reload import Quantizer

RANK = 4
LAYERS = {
    "linear": (lambda rngs: nnx.Linear(32, 16, use_bias=False, rngs=rngs), (32,), (16,)),
    "general": (lambda rngs: nnx.LinearGeneral((2, 16), (4, 8), axis=(-2, -1), use_bias=False, rngs=rngs), (2, 16), (4, 8)),
    "einsum": (lambda rngs: nnx.Einsum("btd,ndh->btnh", (2, 32, 8), rngs=rngs), (32,), (2, 8)),
}


class Net(nnx.Module):
    def __init__(self, layer):
        self.up = layer


def eighths(*shape):
    return jnp.asarray(np.random.default_rng().integers(-8, 9, shape) / 8, jnp.float32)


def with_exact_kernel(model):
    kernel = model.up.kernel
    kernel.set_value(eighths(*kernel.shape))
    return model


def merged(kind, kernel, a, b, factor):
    a, b, kernel = (np.asarray(v, np.float64) for v in (a, b, kernel))
    product = {"linear": "kr,rn->kn", "general": "abr,rcd->abcd", "einsum": "dr,rnh->ndh"}[kind]
    return jnp.asarray(kernel + factor * np.einsum(product, a, b), jnp.float32)


def check(kind, qmodel, state, kernel, a, b, names):
    """Refused by name; merged to the bit, with a factor too; and straight through."""
    with pytest.raises(ValueError, match=f"{names[0]}.*low-rank adapter.*merge_lora=True"):
        nvfp4jax.quantize_params(state, qmodel)
    with pytest.raises(CheckpointError, match=f"({'|'.join(names)}).* has no place in the live model"):
        Quantizer(qmodel)(state)
    for merge, factor in ((True, 1.0), (0.5, 0.5)):
        expected = nvfp4jax.quantize_params({"up": {"kernel": merged(kind, kernel, a, b, factor)}}, qmodel)
        found = nvfp4jax.quantize_params(state, qmodel, merge_lora=merge)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("names", [("lora_a", "lora_b"), ("kernel_lora_a", "kernel_lora_b")], ids=lambda names: names[0])
def test_leaves_beside_the_kernel(kind, names):
    """As qwix and tunix keep them: lora_a [contracted axes, r], lora_b [r, features]."""
    make, contracted, features = LAYERS[kind]
    model = with_exact_kernel(Net(make(nnx.Rngs(0))))
    qmodel = nvfp4jax.quantize_model(model, Rule("up"))
    a, b = eighths(*contracted, RANK), eighths(RANK, *features)
    state = nnx.to_pure_dict(nnx.state(model))
    kernel = state["up"]["kernel"]
    state["up"] |= dict(zip(names, (a, b), strict=True))
    check(kind, qmodel, state, kernel, a, b, [f"up/{name}" for name in names])


def test_flax_lora_linear():
    """`nnx.LoRALinear`: a kernel, and an nnx.LoRA below it."""
    plain = with_exact_kernel(Net(nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))))
    trainer = Net(nnx.LoRALinear(32, 16, lora_rank=RANK, use_bias=False, rngs=nnx.Rngs(1)))
    trainer.up.kernel.set_value(plain.up.kernel.get_value())
    a, b = eighths(32, RANK), eighths(RANK, 16)
    trainer.up.lora.lora_a.set_value(a)
    trainer.up.lora.lora_b.set_value(b)
    qmodel = nvfp4jax.quantize_model(plain, Rule("up"))
    check("linear", qmodel, nnx.state(trainer), plain.up.kernel.get_value(), a, b, ["up/lora/lora_a", "up/lora/lora_b"])


def test_flax_lora_around_a_layer():
    """`nnx.LoRA(base_module=layer)`: the layer has moved one level down in the trainer's model."""
    plain = with_exact_kernel(Net(nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))))
    trainer = Net(nnx.LoRA(32, RANK, 16, base_module=nnx.clone(plain.up), rngs=nnx.Rngs(1)))
    a, b = eighths(32, RANK), eighths(RANK, 16)
    trainer.up.lora_a.set_value(a)
    trainer.up.lora_b.set_value(b)
    qmodel = nvfp4jax.quantize_model(plain, Rule("up"))
    state = nnx.state(trainer)
    with pytest.raises(ValueError, match="up/lora_a.*low-rank adapter.*merge_lora=True"):
        nvfp4jax.quantize_params(state, qmodel)
    expected = nvfp4jax.quantize_params({"up": {"kernel": merged("linear", plain.up.kernel.get_value(), a, b, 1.0)}}, qmodel)
    for one, other in zip(jax.tree.leaves(nvfp4jax.quantize_params(state, qmodel, merge_lora=True)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_gradients_reach_an_adapter():
    plain = with_exact_kernel(Net(nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))))
    qmodel = nvfp4jax.quantize_model(plain, Rule("up", scaling=None))
    kernel, a, b, x = plain.up.kernel.get_value(), eighths(32, RANK), eighths(RANK, 16), eighths(8, 32)

    def loss(adapter):
        return nvfp4jax.straight_through(qmodel, {"up": {"kernel": kernel} | adapter}, merge_lora=True).up(x).sum()

    found = jax.grad(loss)({"lora_a": a, "lora_b": b})
    dy = np.ones((8, 16))
    np.testing.assert_allclose(found["lora_a"], np.asarray(x).T @ dy @ np.asarray(b).T, rtol=1e-5)
    np.testing.assert_allclose(found["lora_b"], np.asarray(a).T @ np.asarray(x).T @ dy, rtol=1e-5)


def test_adapters_that_cannot_be_merged(unchecked):
    experts = Net(nvfp4jax.Experts(2, 32, 16, rngs=nnx.Rngs(0)))
    qmodel = nvfp4jax.quantize_model(experts, Rule("up"))
    state = nnx.to_pure_dict(nnx.state(experts))
    state["up"] |= {"lora_a": eighths(2, 32, RANK), "lora_b": eighths(2, RANK, 16)}
    with pytest.raises(ValueError, match="up/lora_a: the state has a low-rank adapter, which this NVFP4 layer has no place for"):
        nvfp4jax.quantize_params(state, qmodel, merge_lora=True)
    linear = Net(nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0)))
    qmodel = nvfp4jax.quantize_model(linear, Rule("up"))
    state = nnx.to_pure_dict(nnx.state(linear))
    for more, message in (
        ({"lora_a": eighths(32, RANK)}, "up/lora_a: the state has it"),
        ({"lora_a": eighths(32, RANK), "lora_b": eighths(RANK + 1, 16)}, r"up: adapters of shapes \(32, 4\) and \(5, 16\) do not fit"),
        ({"lora_a": eighths(RANK, 32), "lora_b": eighths(RANK, 16)}, r"up: adapters of shapes \(4, 32\)"),
        ({"lora_a": eighths(32, RANK), "lora_b": eighths(16, RANK)}, r"up: adapters of shapes \(32, 4\) and \(16, 4\) do not fit"),
        ({"lora_a": jnp.ones((32, RANK), jnp.int32), "lora_b": eighths(RANK, 16)}, "up/lora_a: int32 in the state"),
        ({"lora_a": eighths(32, RANK), "lora_b": jnp.ones((RANK, 16), jnp.float8_e4m3fn)}, "up/lora_b: float8_e4m3fn in the state"),
    ):
        with pytest.raises(ValueError, match=message):
            nvfp4jax.quantize_params({"up": state["up"] | more}, qmodel, merge_lora=True)
    with pytest.raises(ValueError, match="merge_lora=0 would leave the adapters out"):  # 8 // 16
        nvfp4jax.quantize_params({"up": state["up"] | {"lora_a": eighths(32, RANK), "lora_b": eighths(RANK, 16)}}, qmodel, merge_lora=8 // 16)
