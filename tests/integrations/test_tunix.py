"""tunix's models through the swap, the rollout and a requantization, against tunix's own forward."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix", reason="needs google-tunix==0.1.7")
    from integrations import tunix_models

import nvfp4jax
from nvfp4jax.integrations import tunix

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
NAMES = tuple(tunix_models.MODELS)


@pytest.fixture(autouse=True)
def as_tunix_promotes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_rollout(name):
    """Prompts of different lengths, two samples of each, some rows done early: the greedy tokens of each prompt alone."""
    model = tunix_models.make(name)
    ids = np.random.default_rng(0).integers(1, tunix_models.VOCABULARY, (3, 10))
    mask = np.arange(10)[None] >= np.array([[0], [4], [9]])
    alone = [tunix_models.greedy(model, row[seen], 6, 16) for row, seen in zip(ids, mask, strict=True)]
    stop = alone[0][2]
    rolled = nvfp4jax.generate(tunix.Decoder(model), ids, mask, max_new_tokens=6, num_samples=2, stop_tokens=[stop])
    for row, (tokens, length) in enumerate(zip(np.asarray(rolled.tokens), np.asarray(rolled.lengths), strict=True)):
        expected = alone[row // 2]
        expected = expected[: expected.index(stop) + 1] if stop in expected else expected
        assert tokens[:length].tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_swap_and_requantize(name):
    """All but tables, routers and vectors is packed; a trainer's next state gives the bits of a new swap."""
    model, trained = tunix_models.make(name), tunix_models.make(name, seed=1)
    qmodel = nvfp4jax.quantize_model(model, tunix_models.RULE)
    left = {entry.path for entry in nvfp4jax.describe(qmodel).left}
    assert left == {"embedder/input_embedding", *(f"layers/{i}/mlp/router/kernel" for i in range(2) if name == "qwen3-moe")}
    nnx.update(qmodel, nvfp4jax.quantize_params(nnx.state(trained), qmodel))
    expected = dict(nnx.to_flat_state(nnx.state(nvfp4jax.quantize_model(trained, tunix_models.RULE))))
    for path, leaf in nnx.to_flat_state(nnx.state(qmodel)):
        np.testing.assert_array_equal(np.asarray(leaf.get_value()), np.asarray(expected[path].get_value()), err_msg=str(path))


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma3", "gemma"])
def test_layers_multiply_by_their_decoded_weights(name):
    """Weights only: each swapped layer is tunix's own with the decoded weights in it; shapes read as before."""
    model = tunix_models.make(name)
    qmodel = nvfp4jax.quantize_model(model, nvfp4jax.Rule(r"layers/0/.*", scaling=None))
    floats, seen = dict(nnx.iter_modules(model)), set()
    for path, layer in nnx.iter_modules(qmodel):
        if isinstance(layer, tunix.TunixEinsum):
            own = floats[path]
            assert layer.shape == tuple(own.shape) and layer.w.shape == own.w.shape
            x = jax.random.normal(jax.random.key(0), (2, 3, 4, 16) if own.einsum_str == "BTNH,NHD->BTD" else (2, 3, 64))
            own.w.set_value(layer.w[...])
        elif isinstance(layer, tunix.TunixMoE):
            own, x = floats[path], jax.random.normal(jax.random.key(1), (2, 5, 64))
            gate_up, down = (w.dequantize(jnp.float32).swapaxes(-1, -2) for w in layer.weights())
            for param, w in (("gate_proj", gate_up[:, 0]), ("up_proj", gate_up[:, 1]), ("down_proj", down)):
                getattr(own, param).set_value(w)
        else:
            continue
        seen.add(getattr(own, "einsum_str", "experts"))
        np.testing.assert_allclose(layer(x), own(x), atol=1e-4)
    assert len(seen) >= 2


def test_a_cache_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="keeps keys and values in float32, not in bfloat16"):
        tunix.Decoder(tunix_models.make("qwen2")).init_cache(1, 8, jnp.bfloat16)
