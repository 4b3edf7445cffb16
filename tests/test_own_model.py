"""Models as a stranger to the package writes them, a decoder and a plain network: no `config`, no `dtypes`, no `layers` of ours."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import Rule, cli, layers
from nvfp4jax.checkpoint.reload import Reader, publish
from nvfp4jax.models import CacheArray, Output

VOCABULARY, WIDTH, HEADS = 50, 32, 2
IDS = np.array([[1, 2, 3], [4, 5, 6]])


class Block(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs):
        linear = lambda i, o: nnx.Linear(i, o, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, use_bias=False, rngs=rngs)  # noqa: E731
        self.depth = depth  # where it stands: nothing to do with stacks
        self.norm = nnx.RMSNorm(WIDTH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.q, self.k, self.v, self.out = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)

    def __call__(self, x, kv, start, seen):
        heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1)  # noqa: E731
        h = self.norm(x)
        q, k, v = (heads(f(h)) for f in (self.q, self.k, self.v))
        zero = jnp.int32(0)
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, zero, zero)))
        k, v = (write(old.value, new, start) for old, new in zip(kv, (k, v), strict=True))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, mask=seen).reshape(x.shape))
        x = x + self.down(jax.nn.silu(self.up(x)))
        return x, tuple(CacheArray(new, batch=-4, slots=-3) for new in (k, v))


class Decoder(nnx.Module):
    """`init_cache` and the call of the protocol."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(VOCABULARY, WIDTH, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List([Block(depth, rngs) for depth in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, param_dtype=jnp.bfloat16, use_bias=False, rngs=rngs)

    def init_cache(self, batch, length, dtype=None):
        empty = jnp.zeros((batch, length, HEADS, WIDTH // HEADS), dtype or jnp.bfloat16)
        return [tuple(CacheArray(empty, batch=-4, slots=-3) for _ in "kv") for _ in self.layers]

    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        x, parts = self.table(tokens), []
        slots = jnp.arange(cache[0][0].value.shape[1], dtype=jnp.int32)
        seen = (slots[None, None] <= positions[..., None])[:, None]
        for block, kv in zip(self.layers, cache, strict=True):
            x, kv = block(x, kv, positions[:, 0], seen)
            parts.append(kv)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return Output(self.head(x).astype(jnp.float32), parts)


class Network(nnx.Module):
    """No decoder: features in, classes out; a count of its own in `layers`, dropout and batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = 2
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.statistics = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(jax.nn.relu(self.statistics(self.first(x)))))


MAKE = {"decoder": (Decoder, r"layers/.*/(up|down)"), "network": (Network, r".*")}


@pytest.fixture(autouse=True, scope="module")
def as_flax_promotes():
    """Flax's own norms need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def pairs():
    """Each model and its swapped one."""
    out = {}
    for name, (make, pattern) in MAKE.items():
        model = make(nnx.Rngs(0))
        out[name] = model, nvfp4jax.quantize_model(model, Rule(pattern))
    return out


@pytest.fixture(params=MAKE)
def pair(request, pairs):
    return pairs[request.param]


def same_weights(a: nnx.Module, b: nnx.Module) -> bool:
    a, b = (dict(nnx.to_flat_state(nnx.state(model))) for model in (a, b))
    arrays = lambda v: np.asarray(jax.random.key_data(v.get_value()) if isinstance(v, nnx.RngKey) else v.get_value())  # noqa: E731
    return a.keys() == b.keys() and all(arrays(a[p]).tobytes() == arrays(b[p]).tobytes() for p in a)


def moved(model: nnx.Module) -> nnx.Module:
    """A trainer's next step: every kernel a little larger."""
    graphdef, kernels, rest = nnx.split(model, nnx.All(nnx.Param, nnx.PathContains("kernel")), ...)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * jnp.asarray(1.25, x.dtype), kernels), jax.tree.map(jnp.copy, rest))


def test_saved_and_loaded(pair, tmp_path):
    model, qmodel = pair
    nvfp4jax.save_model(tmp_path / "packed", qmodel)
    nvfp4jax.save_model(tmp_path / "float", model)
    other = nvfp4jax.quantize_model(moved(model), Rule(MAKE["decoder" if isinstance(model, Decoder) else "network"][1]))
    assert not same_weights(other, qmodel)
    assert same_weights(nvfp4jax.load_model(tmp_path / "packed", like=other), qmodel)
    assert not same_weights(other, qmodel)  # like is left alone
    assert same_weights(nvfp4jax.load_model(tmp_path / "float", like=moved(model)), model)


def test_loaded_like_an_abstract_model(pairs, tmp_path):
    model, qmodel = pairs["decoder"]
    nvfp4jax.save_model(tmp_path / "packed", qmodel)
    abstract = nvfp4jax.quantize_model(nnx.eval_shape(lambda: Decoder(nnx.Rngs(1))), Rule(MAKE["decoder"][1]))
    assert same_weights(nvfp4jax.load_model(tmp_path / "packed", like=abstract), qmodel)
    network, packed = pairs["network"]
    nvfp4jax.save_model(tmp_path / "network", packed)
    abstract = nvfp4jax.quantize_model(nnx.eval_shape(lambda: Network(nnx.Rngs(1))), Rule(".*"))
    with pytest.raises(ValueError, match="abstract dropout/rngs/.*build like with arrays"):
        nvfp4jax.load_model(tmp_path / "network", like=abstract)


def test_what_cannot_be_loaded_says_what_can(pairs, tmp_path):
    model, qmodel = pairs["decoder"]
    nvfp4jax.save_model(tmp_path / "packed", qmodel)
    nvfp4jax.save_model(tmp_path / "float", model, {"architectures": ["MyDecoder"], "width": WIDTH})
    with pytest.raises(nvfp4jax.CheckpointError, match=r"packed: saved without a config .*load_model\(folder, like=model\)"):
        nvfp4jax.load_model(tmp_path / "packed")
    with pytest.raises(nvfp4jax.CheckpointError, match=r"MyDecoder.*is not supported.*load_model\(folder, like=model\)"):
        nvfp4jax.load_model(tmp_path / "float")
    with pytest.raises(nvfp4jax.CheckpointError, match="floating point.*swap the result with quantize_model"):
        nvfp4jax.load_model(tmp_path / "float", like=qmodel)
    with pytest.raises(nvfp4jax.CheckpointError, match="layers/0/down/kernel is missing"):
        nvfp4jax.load_model(tmp_path / "packed", like=model)
    with pytest.raises(ValueError, match="scaling beside like"):
        nvfp4jax.load_model(tmp_path / "packed", like=qmodel, scaling="tensor")
    with pytest.raises(ValueError, match="load_model: like: State"):
        nvfp4jax.load_model(tmp_path / "packed", like=nnx.state(qmodel))
    with pytest.raises(nvfp4jax.CheckpointError, match="not a folder that save_model or publish has made"):
        nvfp4jax.load_model(tmp_path, like=qmodel)


def test_steps_for_a_reader(pair, tmp_path, caplog):
    """A trainer publishes NVFP4 and floats; the reader needs the float model for these, and says so."""
    model, qmodel = pair
    trained = moved(model)
    expected = nvfp4jax.quantize_params(nnx.state(trained), qmodel)
    publish(tmp_path, 1, qmodel)
    publish(tmp_path, 2, trained)
    reader = Reader(tmp_path, qmodel)
    assert reader.poll() == 1
    assert "saved without a config" in reader.failures[2] and "float_model=" in reader.failures[2]
    assert same_weights(nnx.merge(nnx.graphdef(qmodel), reader.take().state, nnx.state(qmodel, nnx.RngState)), qmodel)
    reader = Reader(tmp_path, qmodel, float_model=model)
    assert reader.poll() == 2
    found = dict(nnx.to_flat_state(reader.take().state))
    for path, leaf in nnx.to_flat_state(expected):
        assert np.asarray(found[path].get_value()).tobytes() == np.asarray(leaf.get_value()).tobytes(), path


@pytest.mark.slow
def test_generate(pairs, tmp_path):
    """Greedy tokens are those of whole forwards, also by weights that a reader hands over; what does not fit is an error."""
    model, qmodel = pairs["decoder"]
    trained = moved(model)
    publish(tmp_path, 3, trained)
    served = nnx.clone(qmodel)
    with Reader(tmp_path, served, float_model=model) as reader:
        out = nvfp4jax.generate(served, IDS, max_new_tokens=3, weights=reader)
    assert (np.asarray(out.weight_versions) == 3).all()
    forward = nnx.jit(lambda m, ids, at: m(ids, at, m.init_cache(2, 8), last=at[:, -1]).logits)
    rows = IDS
    for _ in range(3):
        ids = jnp.asarray(np.pad(rows, ((0, 0), (0, 5 - rows.shape[1]))), jnp.int32)
        at = jnp.minimum(jnp.arange(5, dtype=jnp.int32), jnp.int32(rows.shape[1] - 1))[None].repeat(2, 0)
        logits = forward(served, ids, at)
        rows = np.concatenate([rows, np.asarray(logits[:, -1].argmax(-1))[:, None]], axis=1)
    np.testing.assert_array_equal(np.asarray(out.tokens), rows[:, 3:])
    with pytest.raises(ValueError, match=r"input_ids\[1, 2\]=50 is outside the vocabulary of 50"):
        nvfp4jax.generate(qmodel, np.array([[1, 2, 3], [4, 5, 50]]), max_new_tokens=1)
    with pytest.raises(ValueError, match="return_experts: Decoder has no mixture-of-experts layer"):
        nvfp4jax.generate(qmodel, IDS, max_new_tokens=1, return_experts=True)
    with pytest.raises(ValueError, match="Network is no models.Decoder"):
        nvfp4jax.generate(pairs["network"][1], IDS, max_new_tokens=1)


def test_calibrate_a_network(pairs, tmp_path):
    """Scales are amax / 2688 of what each layer reads; the folder keeps them."""
    model, qmodel = pairs["network"]
    static = nnx.view(qmodel, scaling="static")
    batches = [np.random.default_rng().standard_normal((5, WIDTH)).astype(np.float32) for _ in range(2)]
    calibrated = nvfp4jax.calibrate(static, batches, float_model=model)
    hidden = [np.asarray(jax.nn.relu(model.statistics(model.first(x)))) for x in batches]
    for layer, inputs in ((calibrated.first, batches), (calibrated.second, hidden)):
        amax = max(np.abs(x).max() for x in inputs)
        np.testing.assert_allclose(float(layer.input_scale.get_value()), amax / 2688, rtol=1e-6)
    nvfp4jax.save_model(tmp_path / "static", calibrated)
    assert same_weights(nvfp4jax.load_model(tmp_path / "static", like=static), calibrated)


def test_calibrate_a_decoder(pairs):
    model, qmodel = pairs["decoder"]
    calibrated = nvfp4jax.calibrate(nnx.view(qmodel, scaling="static"), [IDS], float_model=model)
    seen = []
    watched = nnx.clone(model)
    up = watched.layers[0].up
    watched.layers[0].up = nnx.data(lambda x: seen.append(float(jnp.abs(x).max())) or up(x))
    watched(jnp.asarray(IDS), jnp.arange(3)[None].repeat(2, 0), watched.init_cache(2, 3))
    found = float(calibrated.layers[0].up.input_scale.get_value())
    np.testing.assert_allclose(found, seen[0] / 2688, rtol=2**-7)  # bfloat16's roundings differ under jit


def test_command_line(pairs, tmp_path, capsys):
    """`inspect` reads the folder; what needs the module's code says so."""
    model, qmodel = pairs["decoder"]
    nvfp4jax.save_model(tmp_path / "packed", qmodel)
    nvfp4jax.save_model(tmp_path / "float", model)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        return end.value.code, *capsys.readouterr()

    code, out, _ = run("inspect", str(tmp_path / "packed"))
    assert code == 0 and re.search(r"layers/\*/up/kernel_packed +2 +nvfp4 +\[32, 32\]", out)
    assert run("inspect", str(tmp_path / "float"))[0] == 0
    quantize = "quantize", "--save-dir", str(tmp_path / "out"), "--output", "modelopt", "--model-dir"
    code, _, err = run(*quantize, str(tmp_path / "packed"))
    assert code == 2 and "models.register" in err
    code, _, err = run(*quantize, str(tmp_path / "float"))
    assert code == 2 and "load_model, quantize_model, save_model" in err
    assert not (tmp_path / "out").exists()


def test_rules_for_what_a_converted_layer_keeps(monkeypatch, caplog):
    """A skip rule that names a router inside a registered mixture has matched; one that would pack it has not."""

    class Mixture(nnx.Module):
        def __init__(self, rngs):
            self.router, self.body = nnx.Linear(WIDTH, 4, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    class Packed(nnx.Module):
        @classmethod
        def from_float(cls, layer, *, name, **options):
            new = cls()
            new.router, new.body = layer.router, nvfp4jax.NVFP4Linear.from_float(layer.body, name=f"{name}/body", **options)
            return new

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.mixture = Mixture(rngs)

    monkeypatch.setattr(layers, "CONVERTERS", dict(layers.CONVERTERS))
    nvfp4jax.register(Mixture)(Packed.from_float)
    model = Model(nnx.Rngs(0))
    qmodel = nvfp4jax.quantize_model(model, [Rule(".*/router", skip=True), Rule(".*")])
    assert type(qmodel.mixture.router) is nnx.Linear and isinstance(qmodel.mixture.body, nvfp4jax.NVFP4Linear)
    with pytest.raises(ValueError, match="matches no layer"):
        nvfp4jax.quantize_model(model, [Rule(".*"), Rule(".*/router")])


def test_words_for_what_stays_in_floating_point():
    class Router(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.zeros((4, WIDTH)))

    class Embedder(nnx.Module):
        def __init__(self):
            self.input_embedding = nnx.Param(jnp.zeros((4, WIDTH)))

    class Model(nnx.Module):
        def __init__(self):
            self.router, self.embedder, self.norms = Router(), Embedder(), nnx.RMSNorm(WIDTH, rngs=nnx.Rngs(0))
            self.norms.scale = nnx.Param(jnp.ones((3, WIDTH)))  # of stacked layers

    why = {entry.kind: entry.why for entry in nvfp4jax.describe(Model()).left}
    assert why == {"Router": "a router, whose rounding would change the choice of experts", "Embedder": "an embedding",
                   "RMSNorm": "a norm, which multiplies no matrix"}  # fmt: skip
