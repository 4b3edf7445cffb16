"""The offline quantizer: its bits, its outputs, interruption, memory."""

import json
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from flax import nnx

import nvfp4jax
from checkpoint import folders
from checkpoint.test_huggingface import assert_same, leaves
from nvfp4jax import models
from nvfp4jax.array import quantize_weight
from nvfp4jax.checkpoint import CheckpointError, convert, huggingface, load_model, orbax, pieces, saved_model
from nvfp4jax.checkpoint.convert import Selection, quantize_folder

NAMES = ("qwen3-tiny", "qwen3-moe-tiny")
MOE = DATA / "qwen3-moe-tiny"


def rules_for(model, selection):
    return convert.rules_for(model, models.family_of({"architectures": ["Qwen3MoeForCausalLM"]}), selection)


def small(path, shards=1, **config):
    config = folders.small_config(**config)
    return folders.write(path, config, folders.small_weights(config), shards)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("qwen3-tiny", "mse"), ("qwen3-moe-tiny", None)])
def test_offline_equals_quantize_params(tmp_path, name, kind):
    source = DATA / name / "bf16"
    selection = Selection(keep_first_n=1, four_over_six=kind)
    quantize_folder(source, tmp_path / "out", selection)
    floats = load_model(source)
    rules = rules_for(floats, selection)
    qmodel = nvfp4jax.quantize_model(nnx.eval_shape(lambda: models.build(json.loads((source / "config.json").read_text()), rngs=nnx.Rngs(0))), rules)
    expected = nvfp4jax.quantize_params(nnx.state(floats), qmodel)
    expected = {path: np.asarray(leaf) for path, leaf in orbax.flatten(expected).items()}
    found = leaves(load_model(tmp_path / "out"))
    assert found.keys() == expected.keys()
    for path in found:
        assert found[path].tobytes() == expected[path].tobytes(), path


def test_a_float32_source_gives_the_bits_of_its_bf16_export(tmp_path):
    config = folders.small_config()
    weights = folders.small_weights(config)
    rng = np.random.default_rng(0)
    masters = {name: value.astype(np.float32) * (1 + rng.uniform(-1e-3, 1e-3, value.shape)).astype(np.float32) for name, value in weights.items()}
    quantize_folder(folders.write(tmp_path / "masters", config, masters), tmp_path / "a")
    export = {name: value.astype(ml_dtypes.bfloat16) for name, value in masters.items()}
    quantize_folder(folders.write(tmp_path / "export", config, export), tmp_path / "b")
    assert_same(load_model(tmp_path / "a"), load_model(tmp_path / "b"))


@pytest.mark.parametrize("name", NAMES)
def test_modelopt_to_orbax_to_modelopt_returns_the_same_bytes(tmp_path, name):
    """Input scales and KV scales too, though the model does not hold them."""
    kv = {"model.layers.1.self_attn.k_proj.k_scale": np.float32(0.37), "model.layers.1.self_attn.v_proj.v_scale": np.float32(0.21)}
    config = json.loads((DATA / name / "modelopt-nvfp4" / "config.json").read_text())["quantization_config"]
    config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    source = folders.copy(DATA / name / "modelopt-nvfp4", tmp_path / "source", kv, {"quantization_config": config})
    quantize_folder(source, tmp_path / "orbax")
    quantize_folder(tmp_path / "orbax", tmp_path / "back", output="modelopt")
    before, after = folders.tensors(source), folders.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype and before[tensor].shape == after[tensor].shape
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
    quantization = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert {k: quantization[k] for k in ("quant_method", "quant_algo", "kv_cache_scheme", "config_groups")} == {
        k: config[k] for k in ("quant_method", "quant_algo", "kv_cache_scheme", "config_groups")
    }
    assert sorted(quantization["ignore"]) == sorted(config["ignore"])
    quantize_folder(source, tmp_path / "ct", output="compressed-tensors")
    assert not [tensor for tensor in folders.tensors(tmp_path / "ct") if tensor.endswith(("k_scale", "v_scale"))]
    beside = json.loads((tmp_path / "back" / "hf_quant_config.json").read_text())["quantization"]
    assert beside["kv_cache_quant_algo"] == "FP8" and beside["group_size"] == 16 and beside["exclude_modules"] == quantization["ignore"]


@pytest.mark.parametrize("name", NAMES)
def test_modelopt_to_compressed_tensors_equals_its_public_converter(tmp_path, name):
    """The folder in tests/data was made by compressed-tensors' own converter from the same ModelOpt folder."""
    quantize_folder(DATA / name / "modelopt-nvfp4", tmp_path / "out", output="compressed-tensors")
    ours, theirs = folders.tensors(tmp_path / "out"), folders.tensors(DATA / name / "compressed-tensors-nvfp4")
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        assert ours[tensor].reshape(theirs[tensor].shape).tobytes() == theirs[tensor].tobytes(), tensor
    assert_same(load_model(tmp_path / "out"), load_model(DATA / name / "compressed-tensors-nvfp4"))
    quantize_folder(DATA / name / "compressed-tensors-nvfp4", tmp_path / "orbax", Selection(scaling="static"))
    assert_same(load_model(tmp_path / "orbax"), load_model(tmp_path / "out", scaling="static"))


@pytest.mark.parametrize("output", ["modelopt", "compressed-tensors"])
def test_exports_of_float_weights(tmp_path, output):
    """Decoded apart from the library: every weight within NVFP4's error; fused layers share a scale; what was excluded stays."""
    quantize_folder(MOE / "bf16", tmp_path / "out", Selection(keep_last_n=1, exclude=("o_proj",)), output=output)
    stored, floats = folders.tensors(tmp_path / "out"), folders.tensors(MOE / "bf16")
    name = {"modelopt": "weight_scale_2", "compressed-tensors": "weight_global_scale"}[output]
    for tensor, value in floats.items():
        module = tensor.removesuffix(".weight")
        if "_proj" not in tensor or "layers.3." in tensor or "o_proj" in tensor:
            assert stored[tensor].tobytes() == value.tobytes()
        else:
            error = folders.decoded(tmp_path / "out", module) - value.astype(np.float32)
            assert np.linalg.norm(error) < 0.11 * np.linalg.norm(value.astype(np.float32)), module
    scale = lambda module: stored[f"model.layers.1.{module}.{name}"]  # noqa: E731
    assert scale("self_attn.q_proj") == scale("self_attn.k_proj") == scale("self_attn.v_proj")
    assert scale("mlp.experts.4.gate_proj") == scale("mlp.experts.4.up_proj") != scale("mlp.experts.5.up_proj")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == output and config["hidden_size"] == 128
    model = load_model(tmp_path / "out", scaling="token")
    assert isinstance(model.layers[3].self_attn.q_proj, nnx.Linear) and isinstance(model.layers[0].self_attn.o_proj, nnx.Linear)


def test_gate_and_up_in_different_shards(tmp_path):
    one, four = small(tmp_path / "one"), small(tmp_path / "four", shards=4)
    index = json.loads((four / "model.safetensors.index.json").read_text())["weight_map"]
    pairs = [(index[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"], index[f"model.layers.1.mlp.experts.{e}.up_proj.weight"]) for e in range(3)]
    assert any(a != b for a, b in pairs)
    for folder in (one, four):
        quantize_folder(folder, folder.with_suffix(".q"))
        quantize_folder(folder, folder.with_suffix(".m"), output="modelopt")
    assert_same(load_model(one.with_suffix(".q")), load_model(four.with_suffix(".q")))
    assert_same(load_model(one.with_suffix(".m")), load_model(four.with_suffix(".m")))
    assert len(list(four.with_suffix(".m").glob("*.safetensors"))) == 4


@pytest.mark.parametrize("selection, packed", [
    (Selection(experts_only=True), ["layers/1/mlp/experts"]),
    (Selection(keep_first_n=1, exclude=("q_proj|k_proj",)), ["layers/1/mlp/experts", "layers/1/self_attn/o_proj", "layers/1/self_attn/v_proj"]),
    (Selection(keep_last_n=1, exclude=(r"model\.layers\.0\.self_attn",)), [f"layers/0/mlp/{n}_proj" for n in ("down", "gate", "up")]),
])  # fmt: skip
def test_selection(tmp_path, selection, packed):
    model = models.build(folders.small_config())
    qmodel = nvfp4jax.quantize_model(model, rules_for(model, selection))
    quantized = {"/".join(map(str, path)) for path in set(huggingface.quantizable(model)) - set(huggingface.quantizable(qmodel))}
    assert sorted(quantized) == packed
    quantize_folder(small(tmp_path / "source"), tmp_path / "out", selection)
    rules = saved_model.rules_from_json(orbax.read_folder(tmp_path / "out").metadata["rules"], "")
    assert rules == rules_for(model, selection)
    load_model(tmp_path / "out")


def test_report_holds_each_weights_error(tmp_path):
    report = quantize_folder(small(tmp_path / "source"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / convert.REPORT).read_text()) == report
    weights = folders.small_weights(folders.small_config())
    assert {row["name"] + ".weight" for row in report} == {name for name in weights if "_proj" in name}
    row = next(row for row in report if row["name"] == "model.layers.0.mlp.down_proj")
    w = weights["model.layers.0.mlp.down_proj.weight"]
    array = quantize_weight(jnp.asarray(w))
    error = np.asarray(array.dequantize(jnp.float32), np.float64) - w.astype(np.float64)
    assert row["relative_error"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(w.astype(np.float64)), rel=1e-5)
    assert row["global_scale"] == float(array.global_scale) and row["shape"] == [32, 48]
    assert row["sqnr_db"] == pytest.approx(-20 * np.log10(row["relative_error"]))


def test_rows_in_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    ws = [rng.normal(size=(n, 64)).astype(ml_dtypes.bfloat16) for n in (40, 24)]
    array = quantize_weight(jnp.asarray(np.concatenate(ws)))
    monkeypatch.setattr(pieces, "_CHUNK", 64 * 7)
    packed, _ = pieces.quantize_together(ws, ["a", "b"])
    assert np.concatenate([p.packed for p in packed]).tobytes() == np.asarray(array.packed).tobytes()
    assert np.concatenate([p.scale for p in packed]).tobytes() == np.asarray(array.scale).tobytes()
    assert all(p.global_scale == array.global_scale for p in packed)


class Stop(BaseException):
    """As a Ctrl-C."""


@pytest.mark.parametrize("output", ["orbax", "modelopt"])
def test_an_interrupted_run_goes_on(tmp_path, output, monkeypatch):
    source = small(tmp_path / "source", shards=4)
    quantize_folder(source, tmp_path / "whole", output=output)

    def stop_late(done, total, what):
        if done > 0.6 * total:
            raise Stop

    with pytest.raises(Stop):
        quantize_folder(source, tmp_path / "out", output=output, progress=stop_late)
    assert not (tmp_path / "out").exists()
    finished = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert 0 < len(finished) < 4
    made = []
    make = pieces.quantize_together
    monkeypatch.setattr(pieces, "quantize_together", lambda weights, names, kind: made.extend(names) or make(weights, names, kind))
    report = quantize_folder(source, tmp_path / "out", output=output)
    assert len(made) < len(report) and report == json.loads((tmp_path / "whole" / convert.REPORT).read_text())
    assert_same(load_model(tmp_path / "out"), load_model(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_work_of_another_run_is_not_taken(tmp_path):
    source = small(tmp_path / "source", shards=2)

    def stop(done, total, what):
        if done == total:
            raise Stop

    with pytest.raises(Stop):
        quantize_folder(source, tmp_path / "out", Selection(four_over_six="mse"), progress=stop)
    quantize_folder(source, tmp_path / "out")
    quantize_folder(source, tmp_path / "other")
    assert_same(load_model(tmp_path / "out"), load_model(tmp_path / "other"))


def test_bad_input_leaves_nothing(tmp_path):
    good = small(tmp_path / "good")
    weights = folders.small_weights(folders.small_config())
    nan = weights["model.layers.1.mlp.experts.2.down_proj.weight"].copy()
    nan[3, 5] = np.nan
    sources = {
        "nan": (weights | {"model.layers.1.mlp.experts.2.down_proj.weight": nan}, {}, "'model.layers.1.mlp.experts.2.down_proj.weight' holds NaN"),
        "missing": ({k: v for k, v in weights.items() if k != "model.norm.weight"}, {}, "'model.norm.weight' is missing"),
        "shape": (weights | {"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 32), ml_dtypes.bfloat16)}, {}, r"q_proj.weight' has shape \(8, 32\)"),
        "odd": (folders.small_weights(folders.small_config(intermediate_size=40)), {"intermediate_size": 40}, "layers/0/mlp/down_proj.*multiple of 16"),
        "unknown": (weights, {"architectures": ["Other"]}, "architectures"),
    }
    for name, (tensors, config, message) in sources.items():
        folder = folders.write(tmp_path / name, folders.small_config(**config), tensors)
        for output in ("orbax", "modelopt"):
            with pytest.raises(ValueError, match=message):
                quantize_folder(folder, tmp_path / "out", output=output)
    with pytest.raises(ValueError, match="Selection: scaling='nonsense' is not one of"):
        Selection(scaling="nonsense")
    for wrong, message in ((dict(exclude=("(",)), "no regular expression"), (dict(keep_first_n=-1), "keep_first_n=-1"), (dict(four_over_six="l1"), "four_over_six='l1'")):
        with pytest.raises(ValueError, match=message):
            Selection(**wrong)
    cut = small(tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    for folder, selection, output, message in [
        (tmp_path / "cut", Selection(), "orbax", "model.safetensors.*truncated"),
        (tmp_path / "absent", Selection(), "orbax", "no such folder"),
        (good, Selection(), "gguf", "output='gguf'"),
        (good, Selection(exclude=("nothing",)), "orbax", "exclude 'nothing' matches no layer"),
        (good, Selection(keep_first_n=2), "orbax", "leaves no layer"),
        (good, Selection(scaling="static"), "orbax", "static.*input scales"),
        (MOE / "modelopt-nvfp4", Selection(keep_first_n=1), "orbax", "NVFP4 already"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            quantize_folder(folder, tmp_path / "out", selection, output=output)
        assert "\n" not in str(caught.value)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
    quantize_folder(good, tmp_path / "out")
    before = leaves(load_model(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_folder(good, tmp_path / "out")
    assert leaves(load_model(tmp_path / "out")).keys() == before.keys()


def test_tokenizer_files_come_along(tmp_path):
    source = small(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    for output in ("orbax", "modelopt"):
        quantize_folder(source, tmp_path / output, output=output)
        assert (tmp_path / output / "tokenizer.json").read_text() == "{}"


MEMORY = """
import resource, sys
import numpy as np
from nvfp4jax.checkpoint.convert import quantize_folder
source, out, output = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
quantize_folder(source + "/warm", out + "/warm", output=output)  # imports, the compiler
before = peak()
quantize_folder(source + "/large", out + "/large", output=output)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("output", ["orbax", "modelopt"])
def test_memory_stays_under_three_shards(tmp_path, output):
    """Peak resident memory of a process above what the same work on a small model of the same matrices needs."""
    config = folders.small_config(
        num_hidden_layers=2, hidden_size=512, moe_intermediate_size=1024, num_experts=16, intermediate_size=1024, head_dim=64,
        num_attention_heads=4,
    )  # fmt: skip
    warm = config | {"num_experts": 2}
    for name, c in (("warm", warm), ("large", config)):
        folders.write(tmp_path / name, c, folders.small_weights(c), shards=2)
    largest = max(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert largest > 20e6
    os.mkdir(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), str(tmp_path / "out"), output], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print("peak", int(done.stdout), "largest shard", largest)
    assert int(done.stdout) < 3 * largest
