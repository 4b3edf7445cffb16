"""Mode "delayed" against a simulation in numpy: the amax of each call, the history, and how it travels."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA
from flax import nnx
from models import loading
from test_array import decode

import nvfp4jax
from nvfp4jax import Rule, models, quantize
from nvfp4jax.checkpoint import load_model, orbax, saved_model
from nvfp4jax.checkpoint.reload import Reader, publish
from nvfp4jax.layers import AmaxHistory, InputAmax
from nvfp4jax.rollout import decoding, generate
from nvfp4jax.scaling import Delayed, Tensor

generating = importlib.import_module("nvfp4jax.rollout.generate")  # the package's `generate` is the function

# Octaves up and down, a spike that has to age out, a call of nothing but zeros.
DRIFT = [0, 0.5, 1, 2, 3, 7, 3, 2, 1, 0, -1, -2, None, -3, -4, -4, -4, -4, -4, -4, -4, -4, -3, -3, -3]


class Simulation:
    """Delayed scaling in plain Python: a list of the amaxes so far."""

    def __init__(self):
        self.past: list[np.float32] = []

    def call(self, amax) -> np.float32:
        """The amax that the call is scaled by."""
        window = self.past[-16:]
        used = max(window, default=np.float32(0))
        self.past.append(np.float32(amax))
        return used if used > 0 else np.float32(amax)

    def history(self) -> np.ndarray:
        newest = self.past[::-1][:16]
        return np.array(newest + [0] * (16 - len(newest)), np.float32)


def magnitude(step):
    return 0.0 if step is None else 2.0**step


def carried(layer):
    """One compiled call of a layer as a function of its histories, which it hands back."""
    graphdef, params, seen = nnx.split(layer, nnx.Not(InputAmax), ...)

    @jax.jit
    def call(seen, valid, *inputs):
        layer = nnx.merge(graphdef, params, seen)
        with nvfp4jax.valid_rows(valid):
            y = layer(*inputs)
        return y, nnx.state(layer, InputAmax)

    return call, seen


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear(key, dtype):
    layer = nvfp4jax.NVFP4Linear.from_float(nnx.Linear(96, 40, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(key)), scaling="delayed")
    assert layer.input_amax.shape == (16,) and not layer.input_amax[...].any()
    call, seen = carried(layer)
    simulation, w = Simulation(), decode(layer.weight())
    valid = jnp.array([[True, True, False], [True, True, True]])
    for n, step in enumerate(DRIFT):
        x = (jax.random.normal(jax.random.fold_in(key, n), (2, 3, 96)) * magnitude(step)).astype(dtype)
        x = x.at[0, 2].set(1e4).at[1, 2, 5].set(jnp.nan)  # padding is loud, and a value that is no number counts for none
        y, seen = call(seen, valid, x)
        counting = np.abs(np.asarray(x, np.float32))[np.asarray(valid)]
        amax = simulation.call(np.where(np.isfinite(counting), counting, 0).max())
        np.testing.assert_array_equal(seen["input_amax"][...], simulation.history())
        expected = decode(quantize(x, amax=jnp.float32(amax))) @ w.T
        rows = np.array([[True, True, True], [True, True, False]])
        error = np.abs(np.asarray(y, np.float64) - expected)[rows].max(initial=0.0)
        assert error <= np.abs(expected[rows]).max() * (1e-5 if dtype == jnp.float32 else 2**-8)
        assert np.isnan(np.asarray(y, np.float32)[1, 2]).all()
    assert call._cache_size() == 1
    # Eager calls bring the layer itself up to date; the first is an online one, to the bit.
    tensor = nnx.view(layer, scaling="tensor")
    x = jax.random.normal(key, (4, 96), dtype)
    np.testing.assert_array_equal(layer(x), tensor(x))
    assert layer.input_amax[0] == jnp.abs(x.astype(jnp.float32)).max() and tensor.input_amax is None
    assert (np.asarray(layer(x * 8)) != np.asarray(tensor(x * 8))).any()


def test_experts(key):
    """One history for what gate and up read, one for what down reads, of all experts together."""
    e, h, i, t, k = 5, 64, 32, 11, 2
    float_layer = nvfp4jax.Experts(e, h, i, rngs=nnx.Rngs(key))
    layer = nvfp4jax.NVFP4Experts.from_float(float_layer, scaling="delayed")
    gate_up, down = (decode(w) for w in layer.weights())
    call, seen = carried(layer)
    first, second = Simulation(), Simulation()
    valid = jnp.arange(t) != 3
    for n, step in enumerate([s for s in DRIFT if s is not None][:20]):
        key = jax.random.fold_in(key, n)
        x = (jax.random.normal(key, (t, h)) * magnitude(step)).at[3].multiply(1e3)
        ids = jnp.stack([jax.random.permutation(jax.random.fold_in(key, m), e)[:k] for m in range(t)]).astype(jnp.int32)
        weights = jax.nn.softmax(jax.random.normal(key, (t, k)))
        y, seen = call(seen, valid, x, ids, weights)
        amax = first.call(np.abs(np.asarray(x))[np.asarray(valid)].max())
        np.testing.assert_array_equal(seen["gate_up_input_amax"][...], first.history())
        owners = np.asarray(ids).ravel()
        rows = decode(quantize(x, amax=jnp.float32(amax)))[np.repeat(np.arange(t), k)]
        gate, up = (np.einsum("mh,mih->mi", rows, gate_up[owners, n]) for n in (0, 1))
        hidden = gate * 0.5 * (1 + np.tanh(gate / 2)) * up
        amax = second.call(np.abs(hidden[np.repeat(np.asarray(valid), k)]).max())
        np.testing.assert_allclose(seen["down_input_amax"][...], second.history(), rtol=1e-5)
        rows = decode(quantize(jnp.asarray(hidden, jnp.float32), amax=jnp.float32(amax)))
        out = (np.einsum("mi,mhi->mh", rows, down[owners]).reshape(t, k, h) * np.asarray(weights, np.float64)[..., None]).sum(1)
        # A value next to a rounding boundary of the second quantization may fall on its other side.
        assert np.linalg.norm(y - out) < 0.03 * np.linalg.norm(out)
    assert call._cache_size() == 1


def test_gradients_go_straight_through(key):
    """As those of the online mode where the scale is the same; the history is brought up to date on the way."""
    delayed = nvfp4jax.NVFP4Linear.from_float(nnx.Linear(64, 32, rngs=nnx.Rngs(key)), scaling="delayed")
    online = nnx.view(delayed, scaling="tensor")
    x = jax.random.normal(key, (4, 64))
    loss = nnx.jit(nnx.value_and_grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=(nnx.DiffState(0, nnx.filterlib.PathContains("bias")), 1)))
    value, (dlayer, dx) = loss(delayed, x)
    expected, (donline, dx_online) = loss(online, x)
    assert value == expected
    np.testing.assert_array_equal(dx, dx_online)
    np.testing.assert_array_equal(dlayer["bias"][...], donline["bias"][...])
    assert delayed.input_amax[0] == jnp.abs(x).max()


class Speaker(nnx.Module):
    """A foreign model of one delayed layer: the amax of a token's input is known; token 0 (padding, the end) is loud."""

    def __init__(self, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (32, 32))
        table = table * jnp.exp2(jax.random.uniform(rngs.params(), (32, 1), minval=-3.0, maxval=3.0))
        self.table = nnx.Param(table.at[0].set(1000.0))
        self.head = nnx.Linear(32, 32, use_bias=False, rngs=rngs)

    def init_cache(self, batch, length, dtype=None):
        return ()

    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        logits = self.head(self.table[...][tokens]).at[..., 0].set(-1e9) * jnp.float32(0.3)
        if last is not None:
            logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)
        return models.Output(logits, cache)


class Source:
    """A source of weights that has none."""

    active_step = 0

    def take(self):
        return None


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
@pytest.mark.parametrize("chunks", [False, True])
def test_generate_carries_the_history(chunks, graph):
    """One call for the prompts, one for each token but the last; padding and finished rows left out; on to the next rollout."""
    ids = np.arange(1, 34).reshape(3, 11) % 31 + 1
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    with nnx.set_graph_mode(graph):
        model = nvfp4jax.quantize_model(Speaker(nnx.Rngs(0)), Rule("head", scaling="delayed"))
        sizes = np.abs(np.asarray(model.table[...])).max(1)
        settings = dict(temperature=1.0, num_samples=2, **(dict(weights=Source(), swap_every=3) if chunks else {}))
        stop = int(generate(nnx.view(model, scaling="token"), ids, mask, max_new_tokens=9, temperature=1.0, key=jax.random.key(0)).tokens[0, 2])
        simulation, programs = Simulation(), None
        for n in range(3):
            out = generate(model, ids, mask, max_new_tokens=9, stop_tokens=[stop], key=jax.random.key(n), **settings)
            tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
            simulation.call(sizes[ids[mask == 1]].max())
            for step in range(8):
                alive = lengths > step + 1  # it ends with the token that it draws next, or later
                if alive.any():
                    simulation.call(sizes[tokens[alive, step]].max())
            np.testing.assert_array_equal(model.head.input_amax[...], simulation.history())
            now = generating._decode._cache_size() if chunks else decoding.rollout._cache_size()
            assert programs in (None, now)
            programs = now
    assert len(simulation.past) > 16
    # A rollout is scaled by its model's history: one of small values makes all saturate.
    model.head.input_amax[...] = jnp.full(16, 2.0**-6)
    small = generate(model, ids, mask, max_new_tokens=9, temperature=1.0, key=jax.random.key(2), num_samples=2)
    assert (np.asarray(small.logprobs)[:, 0] != np.asarray(out.logprobs)[:, 0]).all()


@pytest.mark.slow
def test_stacked_layers_have_a_history_each():
    name = "qwen3-moe-tiny"
    model = nvfp4jax.quantize_model(loading.load(name), Rule("layers/.*(_proj|experts)", scaling="delayed"))
    stacked = models.stack_layers(model)
    ids, mask = loading.reference(name)["input_ids"], loading.reference(name)["attention_mask"]
    out = [generate(m, ids, mask, max_new_tokens=4) for m in (model, stacked)]
    np.testing.assert_array_equal(out[0].tokens, out[1].tokens)
    np.testing.assert_allclose(out[0].logprobs, out[1].logprobs, atol=1e-4)
    alone, together = (dict(nnx.to_flat_state(nnx.state(m, AmaxHistory))) for m in (model, models.unstack_layers(stacked)))
    assert len(alone) == 4 * (4 + 2) and alone.keys() == together.keys()
    for path, history in alone.items():
        assert (np.asarray(history[...])[:4] > 0).all() and not np.asarray(history[...])[4:].any()
        np.testing.assert_allclose(history[...], together[path][...], rtol=1e-3)


@pytest.mark.slow
def test_checkpoints_and_reloads_leave_the_history_alone(tmp_path):
    folder = DATA / "qwen3-tiny" / "bf16"
    config = json.loads((folder / "config.json").read_text())
    floats = load_model(folder)
    model = models.stack_layers(nvfp4jax.quantize_model(floats, Rule(r"layers/.*", scaling="delayed")))
    ids = np.arange(12).reshape(2, 6) + 3
    generate(model, ids, max_new_tokens=2)

    def history(m):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(m, InputAmax))]

    before = history(model)
    assert before and all(leaf[..., 0].all() for leaf in before)
    nnx.update(model, nvfp4jax.quantize_params(nnx.state(models.stack_layers(floats)), model))
    # A folder holds none; what is loaded from one starts anew.
    publish(tmp_path / "steps", 1, model, config)
    publish(tmp_path / "steps", 2, floats, config)
    assert not [path for path in orbax.read_folder(tmp_path / "steps" / "1").shapes if "amax" in path]
    loaded = load_model(tmp_path / "steps" / "1", scan_layers=True)
    assert loaded.layers[0].mlp.up_proj.scaling == Delayed()
    assert len(history(loaded)) == len(before) and not any(leaf.any() for leaf in history(loaded))
    nnx.update(model, saved_model.restore_state(tmp_path / "steps" / "1", model))
    reader = Reader(tmp_path / "steps", model)
    assert reader.poll() == 2, reader.failures
    nnx.update(model, reader.take().state)
    nnx.update(model, reader.from_memory(3, models.stack_layers(floats)).state)
    assert all((a == b).all() for a, b in zip(history(model), before, strict=True))
    # A rollout that takes new weights on its way goes on with the history that it has.
    publish(tmp_path / "steps", 4, model, config)
    assert reader.poll() == 4, reader.failures
    out = generate(model, ids, max_new_tokens=2, weights=reader)
    assert (np.asarray(out.weight_versions) == 4).all()
    for old, new in zip(before, history(model), strict=True):
        np.testing.assert_array_equal(new[..., 2:], old[..., :-2])


def test_generate_on_a_mesh():
    """Weights on eight devices, histories that begin on one: no complaint, no second program, the history of one device."""
    model = nvfp4jax.quantize_model(Speaker(nnx.Rngs(0)), Rule("head", scaling="delayed"))
    ids = np.arange(1, 17).reshape(2, 8)
    single = nnx.merge(*nnx.split(model))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda x: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*["data"][: x.ndim]))  # noqa: E731
    weights = nnx.state(model, nnx.Not(InputAmax))
    nnx.update(model, jax.tree.map(lambda x: jax.device_put(x, spread(x)), weights))
    generate(single, ids, max_new_tokens=5)
    generate(model, ids, max_new_tokens=5)
    programs = decoding.rollout._cache_size()
    generate(single, ids, max_new_tokens=5)
    generate(model, ids, max_new_tokens=5)
    assert decoding.rollout._cache_size() == programs
    np.testing.assert_array_equal(model.head.input_amax[...], single.head.input_amax[...])


def test_modes_of_a_model_that_is_swapped_already(key):
    model = nvfp4jax.quantize_model(nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(key))), Rule(".*", scaling="tensor"))
    x = jax.random.normal(key, (4, 32))
    tensor = model(x)
    with_token = nnx.view(model, scaling="token")
    assert model.layers[0].scaling == Tensor() and with_token.layers[0].kernel_packed.get_value() is model.layers[0].kernel_packed.get_value()
    np.testing.assert_array_equal(nnx.view(with_token, scaling="tensor")(x), tensor)
    with pytest.raises(ValueError, match="layers/0: scaling='expert' is not one of token, .*delayed"):
        nnx.view(model, scaling="expert")
