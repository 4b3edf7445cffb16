"""Input scales against a float64 model's activations, and to the bit where the amax is known; their way through each format."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint import folders
from checkpoint.test_huggingface import TOKENS, assert_same, leaves
from conftest import DATA
from flax import nnx
from models import loading, oracle

import nvfp4jax
from nvfp4jax import Rule, calibration, models
from nvfp4jax.checkpoint import load_model, orbax, saved_model
from nvfp4jax.checkpoint.convert import Calibration, Selection, quantize_folder
from nvfp4jax.layers import InputAmax
from nvfp4jax.scaling import Static, Token

NAMES = ("qwen3-tiny", "qwen3-moe-tiny")
STATIC = Rule(r"layers/.*(_proj|experts)", scaling="static")


def prompts(name):
    ref = loading.reference(name)
    return ref["input_ids"], ref["attention_mask"]


def batches_of(name):
    """Three prompts in two batches, junk under the mask."""
    ids, mask = prompts(name)
    ids = np.where(mask == 1, ids, 7)
    return [(ids[:2], mask[:2]), (ids[2:], mask[2:])]


def scales_by_module(model) -> dict[str, np.ndarray]:
    """Input scales by Hugging Face module; those of experts by 'gate_up' and 'down', of all experts."""
    found = {}
    for path, leaf in leaves(model).items():
        if path.endswith("input_scale"):
            module, _, name = path.rpartition("/")
            suffix = name.removesuffix("input_scale").removesuffix("_")
            found["model." + module.replace("/", ".") + ("." + suffix if suffix else "")] = leaf
    return found


def check_against_oracle(model, weights, name):
    config = {"mlp_only_layers": [], "decoder_sparse_step": 1} | loading.config(name)
    seen: dict[str, float] = {}
    for row, valid in zip(*prompts(name), strict=True):
        oracle.forward(weights, config, row[valid == 1], seen)
    found = scales_by_module(model)
    assert len(found) > 16
    for module, scale in found.items():
        if module.endswith(("gate_up", "down")):
            experts, _, which = module.rpartition(".")
            wanted = "gate_proj" if which == "gate_up" else "down_proj"
            amax = max(value for key, value in seen.items() if key.startswith(experts + ".") and key.endswith(wanted))
            assert scale.shape == (8,)
        else:
            amax = seen[module]
        np.testing.assert_allclose(scale, np.full(scale.shape, amax / 2688), rtol=2e-5, err_msg=module)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_a_float64_model(name):
    model = loading.load(name)
    qmodel = nvfp4jax.quantize_model(model, STATIC)
    before = leaves(qmodel)
    calibrated = nvfp4jax.calibrate(qmodel, batches_of(name), float_model=model)
    check_against_oracle(calibrated, loading.weights(name), name)
    for layer in calibrated.layers:  # what reads one input has one scale
        q, k, v = (getattr(layer.self_attn, f"{n}_proj").input_scale[...] for n in "qkv")
        assert q == k == v
        if name == "qwen3-tiny":
            assert layer.mlp.gate_proj.input_scale[...] == layer.mlp.up_proj.input_scale[...]
    # The models given are as they were, the weights shared, and nothing of the pass is left in the result.
    assert before.keys() == leaves(qmodel).keys() and not any("input_scale" in path for path in before)
    assert calibrated.layers[0].self_attn.o_proj.kernel_packed.get_value() is qmodel.layers[0].self_attn.o_proj.kernel_packed.get_value()
    assert not jax.tree.leaves(nnx.state((calibrated, qmodel, model), InputAmax))
    stacked = nvfp4jax.calibrate(models.stack_layers(qmodel), batches_of(name), float_model=models.stack_layers(model))
    for path, value in scales_by_module(models.unstack_layers(stacked)).items():
        np.testing.assert_allclose(value, scales_by_module(calibrated)[path], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_an_nvfp4_model_is_calibrated_on_its_decoded_weights(scan):
    name = "qwen3-moe-tiny"
    folder = DATA / name / "modelopt-nvfp4"
    stored = folders.tensors(folder)
    weights = {key: value.astype(np.float64) for key, value in stored.items() if value.dtype == ml_dtypes.bfloat16}
    weights |= {key: folders.decoded(folder, key.removesuffix(".weight")) for key in stored if stored[key].dtype == np.uint8}
    model = load_model(folder, jnp.float32, scaling="token", scan_layers=scan)
    calibrated = nvfp4jax.calibrate(nnx.view(model, scaling="static"), batches_of(name))
    check_against_oracle(models.unstack_layers(calibrated) if scan else calibrated, weights, name)
    assert model.layers[0].self_attn.q_proj.scaling == Token()


class Readers(nnx.Module):
    """A foreign model whose layers all read the same rows of a table: their amax is known to the bit."""

    def __init__(self, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (32, 64))
        self.table = nnx.Param(table.at[0].set(1000.0).at[5, 3].set(9.7531))  # token 0 is loud
        self.linear = nnx.Linear(64, 32, rngs=rngs)
        self.tied = self.linear
        self.low = nnx.Linear(64, 32, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        self.split = nnx.LinearGeneral(64, (4, 8), rngs=rngs)
        self.join = nnx.LinearGeneral((4, 16), 32, axis=(0, 3), rngs=rngs)
        self.einsum = nnx.Einsum("D...,DF->...F", (64, 32), (32,), rngs=rngs)
        self.six = nnx.Linear(64, 32, use_bias=False, rngs=rngs)
        self.experts = nvfp4jax.Experts(4, 64, 32, rngs=rngs)
        self.spare = nnx.Linear(64, 32, rngs=rngs)

    def init_cache(self, batch, length, dtype=None):
        return ()

    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        x = self.table[...][tokens]
        y = self.tied(x) + self.linear(x * jnp.float32(0.5)) + self.low(x).astype(jnp.float32) + self.six(x)
        y = y + self.split(x).reshape(y.shape) + self.einsum(x.transpose(2, 0, 1))
        y = y + self.join(x.reshape(*x.shape[:-1], 4, 16).transpose(2, 0, 1, 3))
        flat = x.reshape(-1, 64)
        ids = jnp.ones((flat.shape[0], 2), jnp.int32).at[:, 1].set(2)  # experts 0 and 3 see nothing
        flat_valid = None if valid is None else valid.reshape(-1)
        z = self.experts(flat, ids, jnp.full(ids.shape, 0.5, jnp.float32), valid=flat_valid)
        return models.Output(y[..., :1] + z.reshape(x.shape)[..., :1], cache)


READERS = [Rule("spare", scaling="token"), Rule("six", scaling=Static(four_over_six="mse")), Rule(".*", scaling="static")]
IDS, MASK = np.array([[0, 0, 3, 5], [7, 9, 11, 5]]), np.array([[0, 0, 1, 1], [1, 1, 1, 0]])


def readers(sharded=False):
    model = Readers(nnx.Rngs(0))
    if sharded:
        mesh = jax.make_mesh((2, 4), ("data", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

        def place(leaf):
            spec = jax.sharding.PartitionSpec(*("data", "tp")[: leaf.ndim]) if all(n % 4 == 0 for n in leaf.shape) else jax.sharding.PartitionSpec()
            return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

        nnx.update(model, jax.tree.map(place, nnx.state(model)))
    with jax.numpy_dtype_promotion("standard"):
        return model, nvfp4jax.quantize_model(model, READERS)


@pytest.mark.parametrize("floats, headroom, sharded", [(True, 1.0, False), (True, 1.7, True), (False, 1.7, False), (False, 1.0, True)])
def test_scales_to_the_bit(floats, headroom, sharded):
    """The contract's global scale of headroom times the largest value in a row that counts, in numpy's arithmetic."""
    model, qmodel = readers(sharded)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own layers promote
        calibrated = nvfp4jax.calibrate(qmodel, [(IDS[:1], MASK[:1]), (IDS[1:], MASK[1:])], headroom=headroom,
                                        float_model=model if floats else None)  # fmt: skip
    rows = np.abs(np.asarray(model.table[...])[IDS[MASK == 1]])
    assert rows.max() == np.float32(9.7531)

    def expected(amax, top=2688):
        return np.float32(amax) * np.float32(headroom) / np.float32(top)

    for name in ("linear", "split", "join", "einsum"):
        scale = np.asarray(getattr(calibrated, name).input_scale[...])
        assert scale.dtype == np.float32 and scale.shape == () and scale == expected(rows.max()), name
    assert calibrated.tied is calibrated.linear
    assert calibrated.low.input_scale[...] == expected(rows.max().astype(ml_dtypes.bfloat16))
    assert calibrated.six.input_scale[...] == expected(rows.max(), 1536)
    np.testing.assert_array_equal(calibrated.experts.gate_up_input_scale[...], np.full(4, expected(rows.max())))
    down = np.asarray(calibrated.experts.down_input_scale[...])
    tokens = np.asarray(model.table[...], np.float64)[IDS[MASK == 1]]
    source = model.experts
    if not floats:
        gate_up, w = (np.asarray(w.dequantize(), np.float64) for w in qmodel.experts.weights())
        gate, up = gate_up[1:3].swapaxes(0, 1)
    else:
        gate, up = (np.asarray(p[...], np.float64)[1:3].swapaxes(1, 2) for p in (source.gate_proj, source.up_proj))
    gate, up = (np.einsum("th,eih->eti", tokens, w) for w in (gate, up))
    np.testing.assert_allclose(down, np.full(4, headroom * np.abs(gate / (1 + np.exp(-gate)) * up).max() / 2688), rtol=1e-5)
    assert calibrated.spare.input_scale is None and calibrated.spare.scaling == Token()
    # A second pass replaces the scales; layers that are not static take no part.
    with jax.numpy_dtype_promotion("standard"):
        again = nvfp4jax.calibrate(calibrated, [IDS[:1, 2:3]])
    assert again.linear.input_scale[...] == np.float32(np.abs(np.asarray(model.table[...])[3]).max()) / np.float32(2688)


def test_calibrated_scales_stay_when_weights_change():
    model, qmodel = readers()
    with jax.numpy_dtype_promotion("standard"):
        calibrated = nvfp4jax.calibrate(qmodel, [(IDS, MASK)])
    state = jax.tree.map(lambda x: x * 2, nnx.state(model))
    before = scales_by_module(calibrated)
    eager = functools.partial(nvfp4jax.quantize_params, qmodel=calibrated)
    for requantize in (eager, jax.jit(eager)):
        nnx.update(calibrated, requantize(state))
        after = scales_by_module(calibrated)
        assert before.keys() == after.keys() and all(before[k].tobytes() == after[k].tobytes() for k in before)


def test_near_lengths_and_new_weights_share_a_program():
    name = "qwen3-tiny"
    model = loading.load(name, scan_layers=True)
    qmodel = nvfp4jax.quantize_model(model, STATIC)
    nvfp4jax.calibrate(qmodel, [np.ones((2, 17), int)], float_model=model)
    programs = calibration._observe._cache_size()
    nvfp4jax.calibrate(qmodel, [np.ones((2, n), int) for n in (18, 25, 32)], float_model=model)
    nnx.update(model, jax.tree.map(lambda x: x * 2, nnx.state(model)))
    nvfp4jax.calibrate(qmodel, [np.ones((2, 20), int)], float_model=model)
    assert calibration._observe._cache_size() == programs


def test_what_cannot_be_calibrated():
    model, qmodel = readers()
    batch = [(IDS, MASK)]
    unreached = nnx.view(qmodel, scaling="static")
    other = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    cases = [
        (unreached, batch, {}, r"spare: input: no token of the prompts reached it \(its amax is 0\.0\)"),
        (nnx.view(qmodel, scaling="token"), batch, {}, "no layer of the model has scaling='static'"),
        (qmodel, [], {}, "no batch of prompts"),
        (qmodel, batch, dict(headroom=0.5), "headroom=0.5: a finite factor of at least 1"),
        (qmodel, batch, dict(headroom=float("nan")), "headroom=nan"),
        (qmodel, batch, dict(headroom=1e38), "headroom=1e.38 takes its amax beyond float32"),
        (qmodel, batch, dict(float_model=other), "einsum: float_model has nothing there"),
        (qmodel, batch, dict(float_model=qmodel), "einsum: float_model has NVFP4Einsum there"),
        (qmodel, [IDS[0]], {}, r"input_ids int64 \[4\]"),
        (qmodel, [(IDS, MASK[:1])], {}, r"attention_mask \[1, 4\] does not fit"),
        (qmodel, [(IDS, MASK * [[1], [0]])], {}, "row 1 has no token"),
    ]
    with jax.numpy_dtype_promotion("standard"):
        for q, prompts_, options, message in cases:
            with pytest.raises(ValueError, match=message):
                nvfp4jax.calibrate(q, prompts_, **options)
        with pytest.raises(ValueError, match=r"Static needs scale; .*nvfp4jax.calibrate"):
            qmodel.linear(jnp.ones((2, 64)))
        stacked = nvfp4jax.quantize_model(models.stack_layers(loading.load("qwen3-tiny")), STATIC)
        stacked.layers[0].input_layernorm.scale[...] = stacked.layers[0].input_layernorm.scale[...].at[2].set(0)
        with pytest.raises(ValueError, match=r"layers/0/self_attn/._proj: input, layer 2 of the stack: no token"):
            nvfp4jax.calibrate(stacked, [np.ones((1, 4), int)])


ROWS = [(np.arange(20).reshape(2, 10) * 7 % 64, None), (np.array([[0, 0, 5, 9, 60]]), np.array([[0, 0, 1, 1, 1]]))]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model's folder, its calibrated layers, and a calibrated folder in each format."""
    path = tmp_path_factory.mktemp("calibrated")
    config = folders.small_config()
    folders.write(path / "source", config, folders.small_weights(config))
    quantize_folder(path / "source", path / "orbax", Selection(scaling="static"), calibration=Calibration(ROWS, 1.25))
    for output in ("modelopt", "compressed-tensors"):
        quantize_folder(path / "orbax", path / output, output=output)
    floats = load_model(path / "source")
    rules = saved_model.rules_from_json(orbax.read_folder(path / "orbax").metadata["rules"], "")
    calibrated = nvfp4jax.calibrate(nvfp4jax.quantize_model(floats, rules), ROWS, headroom=1.25, float_model=floats)
    return path, calibrated


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    return nnx.merge(graphdef, state)(jnp.asarray(TOKENS), positions).logits


def logits(model):
    """One program for models of one structure."""
    return np.asarray(_logits(*nnx.split(model)))


def stored_scales(folder, name="input_scale"):
    return {key.removesuffix("." + name): value for key, value in folders.tensors(folder).items() if key.endswith("." + name)}


@pytest.mark.slow
def test_every_format_keeps_the_scales(small):
    """Equal bits in Orbax and ModelOpt; compressed-tensors stores the reciprocal, rounded once each way."""
    path, calibrated = small
    assert_same(load_model(path / "orbax"), calibrated)
    assert_same(load_model(path / "modelopt", scaling="static"), calibrated)
    np.testing.assert_array_equal(logits(load_model(path / "orbax")), logits(calibrated))
    np.testing.assert_array_equal(logits(load_model(path / "modelopt", scaling="static")), logits(calibrated))
    scales = scales_by_module(calibrated)
    stored, inverse = stored_scales(path / "modelopt"), stored_scales(path / "compressed-tensors", "input_global_scale")
    assert len(stored) == 4 * 2 + 3 + 3 * 3 and stored.keys() == inverse.keys()
    back = scales_by_module(load_model(path / "compressed-tensors", scaling="static"))
    for module, value in stored.items():
        experts, _, rest = module.partition(".experts.")
        key = module if not rest else f"{experts}.experts.{'down' if 'down' in rest else 'gate_up'}"
        scale = scales[key] if not rest else scales[key][int(rest[0])]
        assert value.tobytes() == scale.tobytes() and value.shape == () and value.dtype == np.float32
        assert inverse[module].tobytes() == (np.float32(1) / scale).tobytes() and inverse[module].shape == (1,)
        returned = back[key] if not rest else back[key][int(rest[0])]
        assert returned.tobytes() == (np.float32(1) / inverse[module]).tobytes()
    ours, theirs = logits(load_model(path / "compressed-tensors", scaling="static")), logits(calibrated)
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
    config = lambda name: json.loads((path / name / "config.json").read_text())["quantization_config"]  # noqa: E731
    assert config("modelopt")["quant_algo"] == "NVFP4"
    assert config("compressed-tensors")["config_groups"]["config_group_0"]["input_activations"]["dynamic"] == "local"


def test_a_model_calibrated_in_memory_saves_its_scales(small, tmp_path):
    path, calibrated = small
    saved_model.save_model(tmp_path / "saved", calibrated, json.loads((path / "source" / "config.json").read_text()))
    assert_same(load_model(tmp_path / "saved"), calibrated)
    quantize_folder(tmp_path / "saved", tmp_path / "mo", output="modelopt")
    ours, theirs = folders.tensors(tmp_path / "mo"), folders.tensors(path / "modelopt")
    assert ours.keys() == theirs.keys() and all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)


@pytest.mark.parametrize("output", ["modelopt", "compressed-tensors"])
def test_float_weights_straight_into_the_other_formats(small, tmp_path, output):
    """q, k and v share a weight scale there, so weights differ from Orbax; the input scales are those of the float model."""
    path, _ = small
    quantize_folder(path / "source", tmp_path / "out", output=output, calibration=Calibration(ROWS, 1.25))
    name = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}[output]
    ours, theirs = stored_scales(tmp_path / "out", name), stored_scales(path / output, name)
    assert ours.keys() == theirs.keys() and all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
    load_model(tmp_path / "out", scaling="static")


@pytest.mark.slow
def test_packed_folders_without_scales_get_them(small, tmp_path):
    """A W4A16 folder in, static out: weights and KV scales keep their bytes; and an Orbax folder calibrated anew."""
    path, _ = small
    drop = {f"{key}.input_scale": None for key in stored_scales(path / "modelopt")}
    kv = {"model.layers.1.self_attn.k_proj.k_scale": np.float32(0.37), "model.layers.1.self_attn.v_proj.v_scale": np.float32(0.21)}
    config = json.loads((path / "modelopt" / "config.json").read_text())["quantization_config"]
    config |= {"quant_algo": "W4A16_NVFP4", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
    source = folders.copy(path / "modelopt", tmp_path / "source", drop | kv, {"quantization_config": config})
    with pytest.raises(ValueError, match="has no input_scale"):
        load_model(source, scaling="static")
    expected = nvfp4jax.calibrate(nnx.view(load_model(source), scaling="static"), ROWS)
    quantize_folder(source, tmp_path / "orbax", Selection(scaling="static"), calibration=Calibration(ROWS))
    assert_same(load_model(tmp_path / "orbax"), expected)
    # Anew, on other prompts, from Orbax to Orbax and ModelOpt.
    other = Calibration(ROWS[1:], 2.0)
    quantize_folder(tmp_path / "orbax", tmp_path / "anew", Selection(scaling="static"), calibration=other)
    anew = nvfp4jax.calibrate(expected, ROWS[1:], headroom=2.0)
    assert_same(load_model(tmp_path / "anew"), anew)
    quantize_folder(tmp_path / "orbax", tmp_path / "mo", output="modelopt", calibration=other)
    quantize_folder(tmp_path / "anew", tmp_path / "mo2", output="modelopt")
    before, one, two = (folders.tensors(folder) for folder in (source, tmp_path / "mo", tmp_path / "mo2"))
    assert one.keys() == two.keys() == before.keys() | drop.keys()
    for key in one:
        assert one[key].tobytes() == two[key].tobytes()
        assert key in drop or one[key].tobytes() == before[key].tobytes(), key
    config = json.loads((tmp_path / "mo" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "NVFP4" and config["kv_cache_scheme"]["num_bits"] == 8
    assert_same(load_model(tmp_path / "mo", scaling="static"), anew)


def test_calibrations_that_make_no_sense(small, tmp_path):
    path, _ = small
    with pytest.raises(ValueError, match="headroom=0.1"):
        Calibration(ROWS, 0.1)
    for source, selection, output, options, message in [
        ("source", Selection(scaling=None), "orbax", Calibration(ROWS), "scaling=None quantizes no activation"),
        ("source", Selection(), "modelopt", Calibration([np.full((1, 3), 64)]), "outside the vocabulary"),
        ("orbax", Selection(), "orbax", Calibration(ROWS), "an Orbax checkpoint already"),
        ("orbax", Selection(scaling="tensor"), "modelopt", Calibration(ROWS), "modes cannot be chosen"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_folder(path / source, tmp_path / "out", selection, output=output, calibration=options)
    assert not list(tmp_path.iterdir())
