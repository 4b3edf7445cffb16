"""Telemetry against numpy on ml_dtypes, its place in a rollout, and its absence where it is off."""

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint import folders
from flax import nnx

import nvfp4jax
from nvfp4jax import Rule, calibration, counting, models, ops, telemetry
from nvfp4jax.layers import AmaxHistory, InputCounts
from nvfp4jax.models import stacking
from nvfp4jax.rollout import decoding
from nvfp4jax.scaling import Delayed, Observed, PerExpert, Static, Tensor, Token

F = np.float32
KINDS = ("saturated", "flushed", "beyond")


def fate(blocks, amax, top, four_over_six):
    """(saturated, of a scale below 2**-6, flushed) of blocks by their amaxes [M, n], under an amax [] or [M, 1]; rounded by ml_dtypes."""
    with np.errstate(invalid="ignore", over="ignore"):
        g = np.where(amax > 0, F(top) / np.where(amax > 0, amax, F(1)).astype(F), F(1)).astype(F)
        wanted = blocks / F(6) * g if four_over_six else blocks * (g * F(1 / 6))
        scale = wanted.astype(ml_dtypes.float8_e4m3fn).astype(F)  # NaN where it rounds past 448
        largest = (wanted * F(1.5)).astype(ml_dtypes.float8_e4m3fn).astype(F) if four_over_six else scale
    return np.isnan(scale), (blocks > 0) & (scale < 2.0**-6), (blocks > 0) & (largest == 0)


def oracle(x, valid, amax, four_over_six=False, per_row=False):
    """(amax, blocks, saturated, flushed, beyond) of x f32 [M, K] under the amax that its scale stands for."""
    top = 6 * (256 if four_over_six else 448)
    kept = np.where(np.isfinite(x), np.abs(x), F(0))
    largest = kept[valid].max(initial=0)
    rows = valid & np.isfinite(x).all(-1)
    blocks = kept.reshape(len(x), -1, 16).max(-1)
    saturated, low, flushed = fate(blocks, amax, top, four_over_six)
    spoiled, lost, _ = fate(blocks, kept.max(-1, keepdims=True), top, four_over_six)
    beyond = np.zeros_like(saturated) if per_row else (saturated | low) & ~(spoiled | lost)
    return largest, rows.sum() * blocks.shape[1], *(what[rows].sum() for what in (saturated, flushed, beyond))


def activation(rows=24, k=64):
    """Blocks of all magnitudes, some of zeros; a row that holds NaN; loud rows that are not valid."""
    rng = np.random.default_rng()
    x = rng.standard_normal((rows, k // 16, 16)) * 2.0 ** rng.integers(-22, 5, (rows, k // 16, 1))
    x[0], x[1, 2] = 0, 0
    x[3, 1, 5] = np.nan
    x[5] *= 2.0**12
    valid = np.ones(rows, bool)
    valid[5] = False
    return np.asarray(x.reshape(rows, k), F), valid


@pytest.mark.parametrize("name", ["token", "token 4/6", "tensor", "tensor 4/6", "static", "static 4/6", "delayed", "expert"])
def test_counts(name):
    x, valid = activation()
    kept = np.where(np.isfinite(x), np.abs(x), F(0))
    rows = np.where(valid[:, None], kept, F(0)).max(-1, keepdims=True)
    four_over_six = "mse" if name.endswith("4/6") else None
    whole, small, sizes = rows.max(), F(2**-10), jnp.asarray([7, 0, 17], jnp.int32)
    top = F(6 * (256 if four_over_six else 448))
    group = np.where(np.arange(24) < 7, rows[:7].max(), rows[7:].max()).astype(F)[:, None]
    mode, amax = {
        "token": (Token(four_over_six=four_over_six), kept.max(-1, keepdims=True)),
        "tensor": (Tensor(four_over_six=four_over_six), whole),
        "static": (Static(jnp.float32(small), four_over_six=four_over_six), small * top),
        "delayed": (Delayed(jnp.zeros(16).at[3].set(small)), small),
        "expert": (PerExpert(), group),
    }[name.split()[0]]
    call = jax.jit(lambda x, counts: ops.quantize_activation(x, Observed(mode, counts), valid=jnp.asarray(valid), group_sizes=sizes).carried[1])
    counts = call(jnp.asarray(x), counting.zeros())
    expected = oracle(x, valid, amax, four_over_six is not None, name.startswith("token"))
    assert (counts.amax, *counts.blocks[:, 0].tolist()) == expected and not counts.blocks[:, 1].any()
    assert expected[1] == 22 * 4 and (expected[4] > 0) != name.startswith("token")
    assert (expected[2] > 0) == (name.split()[0] in ("static", "delayed"))
    again = call(jnp.asarray(x), counts)
    assert again.amax == counts.amax and (again.blocks == 2 * counts.blocks).all()


@pytest.mark.parametrize("four_over_six", [None, "mse"])
def test_the_quantizer_does_what_is_counted(four_over_six):
    """The codes of flushed blocks are 0, of no others; where nothing saturates, no element is off by more than rounding."""
    x, valid = activation()
    x = x[valid & np.isfinite(x).all(-1)]
    mode = Static(jnp.float32(2.0**-8), four_over_six=four_over_six)
    counts = ops.quantize_activation(jnp.asarray(x), Observed(mode, counting.zeros())).carried[1]
    decoded = np.asarray(nvfp4jax.quantize(jnp.asarray(x), mode).dequantize()).reshape(-1, 16)
    blocks = x.reshape(-1, 16)
    gone = (decoded == 0).all(-1) & (blocks != 0).any(-1)
    assert counts.blocks[2, 0] == gone.sum() > 0
    clipped = np.abs(blocks).max(-1) > 464 * 6 * 2.0**-8
    assert counts.blocks[1, 0] == clipped.sum() > 0 and (np.abs(decoded[clipped]).max(-1) == 448 * 6 * 2.0**-8).all()


def test_counts_beyond_int32():
    start = counting.Counts(jnp.float32(1), jnp.asarray([[2**24 - 1, 300], [2**24 - 3, 0], [5, 127], [0, 0]], jnp.int32))
    x = jnp.full((1, 64), 2.0**-20).at[0, 0].set(2.0**10)  # a saturated block and three that are flushed
    found = counting.counted(start, x, nvfp4jax.scaling.Request(global_scale=jnp.float32(2.0**-3)), None)
    assert found.blocks.tolist() == [[3, 301], [2**24 - 2, 0], [8, 127], [1, 0]]
    assert found.amax == 2.0**10


IDS = np.array([[0, 0, 5, 17, 42, 8], [3, 9, 1, 22, 6, 11]])
MASK = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
OPTIONS = dict(max_new_tokens=5, num_samples=2, temperature=1.0, key=jax.random.key(7))


def built(layers, dense):
    config = folders.small_config(num_hidden_layers=layers, mlp_only_layers=list(range(dense)))
    return stacking.stack_layers(models.build(config, rngs=nnx.Rngs(3)))


@pytest.fixture(scope="module")
def model():
    """Two stacked layers with experts: a small program."""
    return built(2, dense=0)


def quantized(model, scaling, what="o_proj|experts"):
    return nvfp4jax.quantize_model(model, Rule(f"layers/.*({what})", scaling=scaling))


def same(a, b):
    assert a.layers == b.layers
    for what in ("amax", "blocks", *KINDS):
        np.testing.assert_array_equal(getattr(a, what), getattr(b, what), what)


def test_a_rollout(model):
    """The tokens are those without; each token that a layer reads counts, once."""
    qmodel = quantized(model, "tensor")
    stops = [int(nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, stop_tokens=[0]).tokens[1, 1])]
    plain = nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, stop_tokens=stops)
    out = nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, stop_tokens=stops, telemetry=True)
    assert plain.telemetry is None and plain.lengths.min() < 5
    np.testing.assert_array_equal(plain.tokens, out.tokens)
    np.testing.assert_array_equal(plain.logprobs, out.logprobs)
    assert not jax.tree.leaves(nnx.state(qmodel, InputCounts))
    compiled = decoding.rollout._cache_size()
    same(out.telemetry, nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, stop_tokens=stops, telemetry=True).telemetry)
    assert decoding.rollout._cache_size() == compiled
    found, config = out.telemetry, qmodel.config
    read = MASK.sum() + int((out.lengths - 1).sum())  # nobody reads a row's last token
    down = config.num_experts_per_tok * config.moe_intermediate_size
    of_layer = {"mlp/experts/down_input": down, "mlp/experts/gate_up_input": config.hidden_size, "self_attn/o_proj": config.num_heads * config.head_dim}
    rows = {f"layers/{layer}/{name}": size for layer in range(2) for name, size in of_layer.items()}
    assert sorted(rows) == list(found.layers)
    assert [rows[name] * read // 16 for name in found.layers] == found.blocks.tolist()
    assert (found.saturated == 0).all() and (found.flushed <= found.beyond).all()


@pytest.mark.slow
def test_in_a_queue(model):
    """Seventeen prompts, two a refill: the last one's second place is filled up with a prompt that counts nowhere."""
    qmodel = quantized(model, "token")
    prompts = np.random.default_rng(3).integers(1, 64, (17, 5))
    options = dict(max_new_tokens=[2, 5, 3] * 5 + [4, 1], telemetry=True)
    same(nvfp4jax.generate(qmodel, prompts, rows_in_flight=16, **options).telemetry, nvfp4jax.generate(qmodel, prompts, **options).telemetry)


@pytest.mark.slow
def test_in_chunks(model):
    qmodel = quantized(model, "tensor")
    whole = nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, telemetry=True)
    chunks = nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, telemetry=True, swap_every=2, on_tokens=lambda *_: None)
    same(whole.telemetry, chunks.telemetry)


def test_stacked_layers():
    """Are named and counted as if they were not stacked."""
    rules = [Rule(".*/0/.*k_proj", skip=True), Rule("layers/.*[qk]_proj", scaling="tensor")]
    qmodel, found = nvfp4jax.quantize_model(stacking.unstack_layers(built(3, dense=3)), rules), []

    @nnx.jit
    def forward(model):
        ids, valid = jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK, bool)
        model(ids, jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6)), valid=valid)

    for one in (qmodel, stacked := stacking.stack_layers(qmodel)):
        observed = telemetry.observed(one)
        forward(observed)
        found.append(telemetry.read(observed))
    same(*found)
    assert stacking.depths(stacked) == (None, 2) and found[0].amax.min() > 0
    assert {*found[0].layers} == {f"layers/{i}/self_attn/{name}_proj" for i in range(3) for name in "qk"} - {"layers/0/self_attn/k_proj"}


def test_amaxes_are_those_of_a_calibration(model):
    """Mode None: the amax alone; of the prompts, for the one token that is drawn is read by nobody."""
    found = nvfp4jax.generate(quantized(model, None), IDS, MASK, max_new_tokens=1, telemetry=True).telemetry
    assert not found.blocks.any() and all(np.isnan(getattr(found, what)).all() for what in KINDS)
    scales = calibration.input_scales(quantized(model, "static"), [(IDS, MASK)])
    expected = {}
    for (_, first, *path), of_layer in scales.items():
        for name, values in of_layer.items():
            for layer, scale in enumerate(values, first):
                expected["/".join(map(str, ("layers", layer, *path, *([name] if len(of_layer) > 1 else []))))] = scale * 2688
    assert list(found.layers) == sorted(expected)
    np.testing.assert_allclose(found.amax, [expected[name] for name in found.layers], rtol=1e-6)


def test_delayed():
    """The model's histories go on as they do without telemetry, and the model keeps nothing else."""
    model = built(2, dense=2)
    one, other = (quantized(model, "delayed", "o_proj") for _ in range(2))
    for _ in range(2):
        plain = nvfp4jax.generate(one, IDS, MASK, **OPTIONS)
        out = nvfp4jax.generate(other, IDS, MASK, **OPTIONS, telemetry=True)
    np.testing.assert_array_equal(plain.tokens, out.tokens)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one, AmaxHistory), nnx.state(other, AmaxHistory))
    assert nnx.graphdef(one) == nnx.graphdef(other) and not jax.tree.leaves(nnx.state(other, InputCounts))


class Lowered(Exception):
    pass


@pytest.mark.usefixtures("unchecked")  # lowering has placeholders for arrays
def test_off_is_not_in_the_program(model, monkeypatch):
    """The same text as of a program without the places where telemetry would be asked for, before and after one that counts."""
    qmodel, rollout = quantized(model, "tensor"), decoding.rollout

    def raises_its_text(*args):
        raise Lowered(rollout.lower(*args).as_text())

    monkeypatch.setattr(decoding, "rollout", raises_its_text)

    def text(**options):
        jax.clear_caches()
        with pytest.raises(Lowered) as caught:
            nvfp4jax.generate(qmodel, IDS, MASK, **OPTIONS, **options)
        return str(caught.value)

    before, on, after = text(), text(telemetry=True), text(telemetry=False)
    monkeypatch.setattr(importlib.import_module("nvfp4jax.layers.state"), "counts_of", lambda layer, name: None)
    monkeypatch.setattr(counting, "counted", None)
    assert before == after == text() != on


class Own(nnx.Module):
    """Somebody's own module: two layers, one of them called twice."""

    def __init__(self, rngs):
        self.up, self.down = (nnx.Linear(32, 32, use_bias=False, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.down(x) + self.up(self.up(x))


def test_any_module(key):
    """Static scales that are too small saturate, too large ones flush, and both are beyond what a scale of the row would do."""
    model, x = Own(nnx.Rngs(0)), 1 + jax.random.uniform(key, (4, 32))
    call = nnx.jit(lambda model, x: model(x))
    for scale, expected in ((1e-6, (1, 0, 1)), (1e-3, (0, 0, 0)), (60.0, (0, 0, 1)), (1e6, (0, 1, 1))):
        observed = telemetry.observed(nvfp4jax.quantize_model(model, Rule("down", scaling=Static(jnp.float32(scale)))))
        call(observed, x)
        call(observed, x)
        found = telemetry.read(observed)
        assert found.layers == ("down",) and found.blocks.tolist() == [2 * 4 * 2] and found.amax == np.abs(x).max()
        assert tuple(getattr(found, what)[0] for what in KINDS) == expected, scale
    both = telemetry.observed(nvfp4jax.quantize_model(model, Rule(".*")))
    with nvfp4jax.valid_rows(jnp.array([True, False, True, True])):
        both(x)
    with pytest.raises(ValueError, match="(down|up): the mask of valid_rows has shape"), nvfp4jax.valid_rows(jnp.ones((2, 2), bool)):
        both(x)
    assert telemetry.read(both).layers == ("down", "up") and telemetry.read(both).blocks.tolist() == [3 * 2, 2 * 3 * 2]


def example():
    shares = [np.array(v) for v in ([0.0, 0.25, np.nan], [0.5, 0.0, np.nan], [0.5, 1e-5, np.nan])]
    return telemetry.Telemetry(("layers/0/q_proj", "layers/1/q_proj", "head"), np.array([1.5, 30, 2], np.float32), np.array([40, 80, 0]), *shares)


def test_summary():
    assert str(example()).splitlines() == [
        "3 inputs of NVFP4 layers, 120 blocks: saturated 16.67%, beyond 16.67%, flushed 16.67%",
        "layer            amax  saturated  beyond  flushed",
        "layers/1/q_proj    30     25.00%  <0.01%        0",
        "layers/0/q_proj   1.5          0  50.00%   50.00%",
        "head                2          -       -        -",
    ]
    assert len(example().summary(1).splitlines()) == 3 and len(example().summary(0).splitlines()) == 1
    assert jax.tree.map(lambda x: x, example()).layers == example().layers


def test_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    axes = example().plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000 and [t.get_text() for t in axes.get_xticklabels()] == list(example().layers)
    assert example().plot(given := plt.subplots()[1]) is given
    assert example().plot() is not given
    plt.close("all")


def test_what_has_nothing_to_count(model):
    with pytest.raises(ValueError, match="telemetry: .*no layer .* NVFP4"):
        nvfp4jax.generate(model, IDS, MASK, max_new_tokens=1, telemetry=True)
