"""Hugging Face folders into models: exact bytes, every spelling, and one clear line for what is wrong."""

import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from flax import nnx

import nvfp4jax
from checkpoint import folders
from nvfp4jax import models
from nvfp4jax.checkpoint import CheckpointError, formats, load_model, orbax, quantization_config, saved_model
from nvfp4jax.layers import NVFP4Experts, NVFP4Linear
from nvfp4jax.scaling import Delayed, PerExpert, Static, Tensor, Token

NAMES = ("qwen3-tiny", "qwen3-moe-tiny")
MOE = DATA / "qwen3-moe-tiny"
TOKENS = (np.arange(26).reshape(2, 13) * 37 % 64).astype(np.int32)


def leaves(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in orbax.flatten(nnx.state(model)).items()}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path


def logits(model) -> np.ndarray:
    graphdef, state = nnx.split(model)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    return np.asarray(jax.jit(lambda s: nnx.merge(graphdef, s)(jnp.asarray(TOKENS), positions).logits)(state))


def weight_of(model: nnx.Module, module: str) -> np.ndarray:
    """A module's weight [N, K] as the model holds it, in float32."""
    *path, last = module.removeprefix("model.").split(".")
    node = model
    for part in path:
        if isinstance(node, nvfp4jax.Experts | NVFP4Experts):
            break
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    if isinstance(node, NVFP4Experts):
        gate_up, down = node.weights()
        values = np.asarray(down.dequantize()) if last == "down_proj" else np.asarray(gate_up.dequantize())[:, ["gate_proj", "up_proj"].index(last)]
        return values[int(part)]
    if isinstance(node, nvfp4jax.Experts):
        return np.asarray(getattr(node, last)[...], np.float32)[int(part)].T
    node = getattr(node, last)
    return np.asarray(node.weight().dequantize()) if isinstance(node, NVFP4Linear) else np.asarray(node.kernel[...], np.float32).T


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_are_where_they_belong(name):
    model = load_model(DATA / name / "bf16", jnp.float32)
    for tensor, value in folders.tensors(DATA / name / "bf16").items():
        if "_proj" in tensor:
            np.testing.assert_array_equal(weight_of(model, tensor.removesuffix(".weight")), value.astype(np.float32))
    assert_same(load_model(DATA / name / "bf16", scan_layers=True), models.stack_layers(load_model(DATA / name / "bf16")))


@pytest.mark.parametrize("form", ["modelopt-nvfp4", "compressed-tensors-nvfp4"])
@pytest.mark.parametrize("name", NAMES)
def test_nvfp4_weights_decode_exactly(name, form):
    folder = DATA / name / form
    model = load_model(folder)
    stored = folders.tensors(folder)
    modules = [tensor.removesuffix("_scale").removesuffix(".weight") for tensor in stored if tensor.endswith(".weight_scale")]
    assert len(modules) > 20
    for module in modules:
        np.testing.assert_array_equal(weight_of(model, module), folders.decoded(folder, module))
    lm_head = getattr(model, "lm_head", None)
    assert lm_head is None or isinstance(lm_head, nnx.Linear)


def test_the_bytes_are_the_checkpoints_own():
    model, stored = load_model(MOE / "modelopt-nvfp4"), folders.tensors(MOE / "modelopt-nvfp4")
    q = model.layers[2].self_attn.q_proj
    assert np.asarray(q.kernel_packed[...]).tobytes() == stored["model.layers.2.self_attn.q_proj.weight"].tobytes()
    assert np.asarray(q.kernel_scale[...]).tobytes() == stored["model.layers.2.self_attn.q_proj.weight_scale"].tobytes()
    experts = model.layers[1].mlp.experts
    for half, projection in enumerate(("gate_proj", "up_proj")):
        module = f"model.layers.1.mlp.experts.5.{projection}"
        assert np.asarray(experts.gate_up_packed[...])[5, half].tobytes() == stored[f"{module}.weight"].tobytes()
        assert np.asarray(experts.gate_up_global_scale[...])[5] == stored[f"{module}.weight_scale_2"]


def test_logits_are_those_of_the_decoded_weights(tmp_path):
    """Weights only: exactly a float model with the decoded values; and the two NVFP4 formats agree."""
    stored = folders.tensors(MOE / "modelopt-nvfp4")
    floats = {name: value for name, value in stored.items() if value.dtype == ml_dtypes.bfloat16}
    floats |= {name: folders.decoded(MOE / "modelopt-nvfp4", name.removesuffix(".weight")) for name in stored if stored[name].dtype == np.uint8}
    config = json.loads((MOE / "bf16" / "config.json").read_text())
    expected = logits(load_model(folders.write(tmp_path / "float", config, floats), jnp.float32))
    found = logits(load_model(MOE / "modelopt-nvfp4", jnp.float32))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    other = logits(load_model(MOE / "compressed-tensors-nvfp4", jnp.float32))
    assert np.abs(found - other).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("form, name, inverse", [
    ("modelopt-nvfp4", "input_scale", False), ("compressed-tensors-nvfp4", "input_global_scale", True),
])
def test_static_mode_takes_the_folders_input_scales(form, name, inverse):
    stored = folders.tensors(MOE / form)
    scale = lambda module: np.float32(1) / stored[f"{module}.{name}"] if inverse else stored[f"{module}.{name}"]  # noqa: E731
    model = load_model(MOE / form, scaling="static")
    assert model.layers[0].self_attn.k_proj.input_scale[...] == scale("model.layers.0.self_attn.k_proj")
    experts = model.layers[3].mlp.experts
    for e in range(8):
        both = [scale(f"model.layers.3.mlp.experts.{e}.{projection}") for projection in ("gate_proj", "up_proj")]
        assert np.asarray(experts.gate_up_input_scale[...])[e] == max(both)
        assert np.asarray(experts.down_input_scale[...])[e] == scale(f"model.layers.3.mlp.experts.{e}.down_proj")
    assert np.isfinite(logits(model)).all()


def test_a_scale_that_is_given_goes_before_the_folders(tmp_path):
    """In every kind of folder, with input scales and without."""
    given = Static(jnp.float32(7))
    packed = load_model(MOE / "modelopt-nvfp4", scaling=given)
    floats = load_model(MOE / "bf16", rules=[nvfp4jax.Rule("layers/.*proj|.*experts", scaling=given)])
    saved_model.save_model(tmp_path / "saved", load_model(MOE / "modelopt-nvfp4", scaling="token"), json.loads((MOE / "bf16" / "config.json").read_text()))
    saved = saved_model.load_model(tmp_path / "saved", scaling=given)
    for model in (packed, floats, saved):
        assert model.layers[0].self_attn.k_proj.input_scale[...] == 7
        assert (model.layers[0].mlp.experts.gate_up_input_scale[...] == 7).all() and (model.layers[0].mlp.experts.down_input_scale[...] == 7).all()
    history = jnp.full(16, 3.0, jnp.float32)
    delayed = load_model(MOE / "modelopt-nvfp4", scaling=Delayed(history))
    np.testing.assert_array_equal(delayed.layers[0].self_attn.k_proj.input_amax[...], history)


def test_static_mode_without_input_scales_names_the_layer(tmp_path):
    """A W4A16 export: no input scales, another quant_algo; fine in every other mode."""
    stored = folders.tensors(MOE / "modelopt-nvfp4")
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "w4a16", {name: None for name in stored if name.endswith("input_scale")})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
    (folder / "config.json").write_text(json.dumps(config))
    assert formats.open_checkpoint(folder).quantization.weight_only
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.experts.0.gate_proj' has no input_scale.*online"):
        load_model(folder, scaling="static")
    assert np.isfinite(logits(load_model(folder, scaling="token"))).all()


def test_quantize_on_load_equals_quantize_params():
    rules = [nvfp4jax.Rule("lm_head", skip=True), nvfp4jax.Rule(r"layers/0/.*", weight_four_over_six="mse"),
             nvfp4jax.Rule(r"layers/[1-3]/mlp/experts", scaling="expert")]  # fmt: skip
    model = load_model(MOE / "bf16", rules=rules)
    floats = load_model(MOE / "bf16")
    qmodel = nvfp4jax.quantize_model(floats, rules)
    assert_same(model, qmodel)
    nnx.update(qmodel, nvfp4jax.quantize_params(nnx.state(floats), qmodel))
    assert_same(model, qmodel)
    assert model.layers[1].mlp.experts.scaling == PerExpert() and isinstance(model.layers[1].self_attn.q_proj, nnx.Linear)
    with pytest.raises(ValueError, match="matches no layer"):
        load_model(MOE / "bf16", rules=[nvfp4jax.Rule("nothing")])


def test_rules_choose_the_mode_of_packed_layers():
    model = load_model(MOE / "modelopt-nvfp4", scaling="token", rules=[nvfp4jax.Rule(r"layers/\d+/mlp/experts", scaling="tensor")])
    assert model.layers[0].mlp.experts.scaling == Tensor() and model.layers[0].self_attn.q_proj.scaling == Token()
    with pytest.raises(CheckpointError, match="layers.0.mlp.experts.*cannot be followed"):
        load_model(MOE / "modelopt-nvfp4", rules=[nvfp4jax.Rule(r"layers/0/mlp/experts", skip=True)])


def test_fp8_blocks(tmp_path):
    """Weights in E4M3 with one scale a block, at sizes that the block does not divide."""
    config = folders.small_config(quantization_config={"quant_method": "fp8", "weight_block_size": [20, 12], "fmt": "e4m3"})
    floats, rng = folders.small_weights(config), np.random.default_rng(1)
    stored, expected = {}, {}
    for name, value in floats.items():
        if "_proj" not in name:
            stored[name] = value
            continue
        n, k = value.shape
        fp8 = rng.normal(size=(n, k)).astype(ml_dtypes.float8_e4m3fn)
        scale = rng.uniform(0.01, 0.1, (-(-n // 20), -(-k // 12))).astype(np.float32)
        stored |= {name: fp8, f"{name}_scale_inv": scale}
        full = np.repeat(np.repeat(scale, 20, 0), 12, 1)[:n, :k]
        expected[name] = fp8.astype(np.float32) * full
    folder = folders.write(tmp_path / "fp8", config, stored)
    model, exact = load_model(folder), load_model(folder, jnp.float32)
    for name, value in expected.items():
        module = name.removesuffix(".weight")
        np.testing.assert_array_equal(weight_of(model, module), value.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(weight_of(exact, module), value)
    rules = [nvfp4jax.Rule(".*(proj|experts)")]
    assert_same(load_model(folder, rules=rules), nvfp4jax.quantize_model(model, rules))


@pytest.mark.parametrize("code, scale, message", [
    (1, -1, "weight_scale_inv' holds a negative scale"), (1, 0, "weight_scale_inv' is 0 where the weight is not"), (0, 0, None), (448, 1e38, "beyond float32"),
    (448, 1e3, "do not fit float16"),
])  # fmt: skip
def test_fp8_scales_that_are_none(tmp_path, code, scale, message):
    """A block of zeros may have any scale; all others a positive one, and the product fits."""
    name = "model.layers.0.self_attn.q_proj.weight"
    config = folders.small_config(quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"})
    stored = folders.small_weights(config)
    stored[name] = np.full((32, 32), code, ml_dtypes.float8_e4m3fn)
    stored[f"{name}_scale_inv"] = np.array([[1, scale], [1, 1]], np.float32)
    folder = folders.write(tmp_path / "fp8", config, stored)
    if message is None:
        assert (weight_of(load_model(folder), name.removesuffix(".weight")) == 0).all()
        return
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, jnp.float16)


def test_an_index_that_does_not_know_all_of_its_files(tmp_path):
    """As transformers does, files are read whole; two of a name are refused."""
    config = folders.small_config()
    weights, name = folders.small_weights(config), "model.layers.0.self_attn.q_proj.weight"
    whole = load_model(folders.write(tmp_path / "whole", config, weights))

    def sharded(kind, first, second):
        folder = folders.write(tmp_path / kind, config, {})
        (folder / "model.safetensors").unlink()
        folders.save_file(first, folder / "a.safetensors")
        folders.save_file(second, folder / "b.safetensors")
        index = {n: "a.safetensors" for n in first} | {n: "b.safetensors" for n in second if n not in first}
        index.pop(name, None)
        index.pop("model.norm.bias", None)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    rest = {n: v for n, v in weights.items() if n != name}
    assert_same(load_model(sharded("unlisted", {name: weights[name], "lm_head.weight": rest.pop("lm_head.weight")}, rest)), whole)
    rest = {n: v for n, v in weights.items() if n != name}
    with pytest.raises(CheckpointError, match=f"b.safetensors: tensor '{name}' is also in a.safetensors"):
        load_model(sharded("twice", rest | {name: weights[name]}, {name: -weights[name], "model.more": weights[name]}))
    with pytest.raises(CheckpointError, match="'model.norm.bias' is not computed with"):
        load_model(sharded("bias", weights, {"model.norm.bias": weights["model.norm.weight"], "model.more": weights[name]}))


def test_an_adapter_beside_the_weights(tmp_path):
    folder = folders.copy(DATA / "qwen3-tiny" / "bf16", tmp_path / "adapted")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="adapter_config.json: an adapter lies beside the weights"):
        load_model(folder)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_float_experts(tmp_path, transposed):
    """[E, 2I, H] as transformers 5 names them, or transposed, as batched-matmul experts are stored."""
    config = folders.small_config(moe_intermediate_size=48)
    weights = folders.small_weights(config)
    fused = dict(weights)
    prefix = "model.layers.1.mlp.experts"
    take = lambda p: np.stack([fused.pop(f"{prefix}.{e}.{p}.weight") for e in range(3)])  # noqa: E731
    made = {"gate_up_proj": np.concatenate([take("gate_proj"), take("up_proj")], 1), "down_proj": take("down_proj")}
    fused |= {f"{prefix}.{name}": np.ascontiguousarray(v.swapaxes(1, 2)) if transposed else v for name, v in made.items()}
    assert_same(load_model(folders.write(tmp_path / "fused", config, fused)), load_model(folders.write(tmp_path / "split", config, weights)))


@pytest.mark.parametrize("separator", [".", "_"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_packed_experts(tmp_path, transposed, separator):
    """One tensor for all experts, as batched-matmul experts are exported: [E, K/2, N] when transposed; scale_2 one an expert."""
    stored = folders.tensors(MOE / "modelopt-nvfp4")
    change = {}
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"
        for name, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for kind in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                parts = [[stored[f"{prefix}.{e}.{p}.{kind}"] for p in projections] for e in range(8)]
                change |= {f"{prefix}.{e}.{p}.{kind}": None for p in projections for e in range(8)}
                if kind in ("weight_scale_2", "input_scale"):
                    value = np.array([max(p) for p in parts], np.float32)
                else:
                    value = np.stack([np.concatenate(p) for p in parts])
                    value = np.ascontiguousarray(value.swapaxes(1, 2)) if transposed else value
                target = f"{prefix}.{name}" if separator == "_" and kind == "weight" else f"{prefix}.{name}{separator}{kind}"
                change[target] = value
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "fused", change)
    assert_same(load_model(folder, scaling="static"), load_model(MOE / "modelopt-nvfp4", scaling="static"))


def test_gate_and_up_of_different_scales_are_reconciled_and_told_once(tmp_path, caplog):
    prefix = "model.layers.1.mlp.experts"
    stored = folders.tensors(MOE / "modelopt-nvfp4")
    change = {f"{prefix}.{e}.up_proj.weight_scale_2": stored[f"{prefix}.{e}.up_proj.weight_scale_2"] * np.float32(3.3) for e in (2, 4)}
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "unshared", change)
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "in 2 experts (first: model.layers.1.mlp.experts.2)" in told[0]
    experts = model.layers[1].mlp.experts
    shared = np.asarray(experts.gate_up_global_scale[...])
    assert shared[2] == change[f"{prefix}.2.up_proj.weight_scale_2"] and shared[3] == stored[f"{prefix}.3.up_proj.weight_scale_2"]
    for projection in ("gate_proj", "up_proj"):
        module = f"{prefix}.2.{projection}"
        found, wanted = weight_of(model, module), folders.decoded(folder, module)
        np.testing.assert_allclose(found, wanted, rtol=2.0**-4)  # a block scale's half ulp
        assert projection == "gate_proj" or (found == wanted).all()


def test_gate_and_up_too_far_apart_are_refused(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_2"
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "far", {name: np.float32(50)})
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.experts.2: gate and up have global scales .* too far apart"):
        load_model(folder)


def bad(change, message, form="modelopt-nvfp4", config=None, **options):
    return pytest.param(form, change, config, options, message, id=message[:40])


X = "model.layers.0.self_attn.q_proj"
NAN_SCALE = np.full((128, 8), 0x7F, np.uint8).view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("form, change, config, options, message", [
    bad({f"{X}.weight_scale": None}, f"tensor '{X}.weight_scale' is missing"),
    bad({f"{X}.weight": None}, f"tensor '{X}.weight' is missing"),
    bad({"model.norm.weight": None}, "tensor 'model.norm.weight' is missing"),
    bad({f"{X}.weight": np.zeros((64, 128), np.uint8)}, rf"{X}.weight' has shape \(64, 128\), expected \(128, 64\)"),
    bad({f"{X}.weight_scale": np.zeros((128, 4), ml_dtypes.float8_e4m3fn)}, rf"{X}.weight_scale' has shape"),
    bad({f"{X}.weight_scale": np.zeros((128, 8), np.float32)}, rf"{X}.weight_scale' has dtype float32, expected float8_e4m3fn"),
    bad({f"{X}.weight_scale": NAN_SCALE}, f"{X}.weight_scale' holds NaN"),
    bad({f"{X}.weight_scale_2": np.float32(np.nan)}, f"{X}.weight_scale_2' is nan"),
    bad({f"{X}.weight_scale_2": np.float32(0)}, f"{X}.weight_scale_2' is 0"),
    bad({f"{X}.weight_scale_2": np.float32(2688 / 0.3)}, f"{X}.weight_scale_2 = .* the inverse"),
    bad({f"{X}.weight_scale_2": np.ones((2,), np.float32)}, f"{X}.weight_scale_2' has shape .* one value"),
    bad({f"{X}.weight_global_scale": np.float32(0.3 / 2688)}, f"1 / {X}.weight_global_scale .* the inverse", "compressed-tensors-nvfp4"),
    bad({f"{X}.pre_quant_scale": np.ones(128, np.float32)}, f"{X}.pre_quant_scale.*not read"),
    bad({"model.layers.0.mlp.experts.3.up_proj.weight": np.zeros((64, 128), ml_dtypes.bfloat16)}, "experts of a layer must be stored alike"),
    bad({"lm_head.weight": np.full((512, 128), np.nan, ml_dtypes.bfloat16)}, "tensor 'lm_head.weight' holds NaN", "bf16"),
    bad({"model.norm.weight": np.full((128,), np.inf, ml_dtypes.bfloat16)}, "tensor 'model.norm.weight' holds NaN or inf", "bf16"),
    bad({f"{X}.weight": np.zeros((128, 128), np.int8)}, f"{X}.weight' has dtype int8", "bf16"),
    bad({f"{X}.weight": np.zeros((128, 128), ml_dtypes.float8_e4m3fn)}, f"{X}.weight' is FP8, but", "bf16"),
    bad(None, "architectures=.*GemmaForCausalLM.* is not supported", "bf16", {"architectures": ["GemmaForCausalLM"]}),
    bad(None, "model_type='qwen3_moe' is not a Llama", "bf16", {"architectures": ["LlamaForCausalLM"]}),
    bad(None, "architectures=.*xxx.* is not supported", "bf16", {"architectures": ["x" * 5000]}),
    bad(None, "num_key_value_heads=0 must be an integer of at least 1", "bf16", {"num_key_value_heads": 0}),
    bad(None, "decoder_sparse_step=0 must be an integer of at least 1", "bf16", {"decoder_sparse_step": 0}),
    bad(None, "head_dim=33 must be even", "bf16", {"head_dim": 33}),
    bad(None, "rope_theta=0.0 must be a positive number", "bf16", {"rope_theta": 0.0, "rope_parameters": None}),
    bad(None, r"key 'x'=a\\nb\\ud800 is not known", "bf16", {"x": "a\nb\ud800"}),
    bad(None, "layer_types=.* is not supported", "bf16", {"layer_types": ["x" * 50] * 200}),
    bad(None, "key 'rope_frequency_dtype'=3 is not known", "bf16", {"rope_frequency_dtype": 3}),
    bad({f"{X}.bias": np.zeros(128, np.float32)}, f"'{X}.bias' is not computed with: '{X}'", "bf16"),
    bad({f"{X}.lora_B.weight": np.zeros((128, 4), np.float32)}, f"'{X}.lora_B.weight' is not computed with", "bf16"),
    bad({f"{X}.weight_scale": np.zeros((128, 1), np.float32)}, f"'{X}.weight_scale' is not computed with", "bf16"),
    bad({"model.layers.0.mlp.gate.e_score_correction_bias": np.zeros(8, np.float32)}, "e_score_correction_bias' is not computed with", "bf16"),
    bad({"model.layers.0.mlp.experts.8.up_proj.weight": np.zeros((64, 128), np.float32)}, "experts.8.up_proj.weight' is not computed with", "bf16"),
    bad({"model.layers.1.post_norm.weight": np.zeros(128, np.float32)}, "'model.layers.1.post_norm.weight' is not computed with", "bf16"),
    bad({"model.norm.bias": np.zeros(128, np.float32)}, "'model.norm.bias' is not computed with: 'model.norm'", "bf16"),
    bad(None, "stores no layer in NVFP4", "bf16", scaling="token"),
    bad(None, "quant_method 'gptq' is not read", "bf16", {"quantization_config": {"quant_method": "gptq"}}),
    bad(None, "'NVFP4_AWQ' is not read", "modelopt-nvfp4", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}}),
    bad({f"{X}.weight_scale": np.full((128, 8), 0xB8, np.uint8).view(ml_dtypes.float8_e4m3fn)}, f"{X}.weight_scale' holds a negative scale"),
    bad({f"{X}.weight": np.full((128, 128), 3.4e38, np.float32)}, f"'{X}': values up to 3.4e.38 do not fit bfloat16", "bf16"),
    bad({"model.norm.weight": np.full((128,), 1e6, np.float32)}, "'model.norm.weight': values up to 1e.06 do not fit float16", "bf16", dtype=jnp.float16),
    bad({"model.layers.1.mlp.experts.2.up_proj.weight": np.full((64, 128), 3.4e38, np.float32)}, "experts.2.up_proj': values .* do not fit bfloat16", "bf16"),
    *(bad(None, f"{key!r}=.* is not known for {method}", form, {"quantization_config": {"quant_method": method, **rest, key: value}}) for form, method, rest, key, value in (
        ("modelopt-nvfp4", "modelopt", {"quant_algo": "NVFP4"}, "rotate", True),
        ("modelopt-nvfp4", "modelopt", {"quant_algo": "NVFP4"}, "pre_quant_scale", True),
        ("compressed-tensors-nvfp4", "compressed-tensors", {}, "transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}),
        ("compressed-tensors-nvfp4", "compressed-tensors", {}, "sparsity_config", {"format": "sparse-24-bitmask"}),
        ("bf16", "fp8", {"weight_block_size": [128, 128]}, "rotation", "hadamard"),
        ("compressed-tensors-nvfp4", "compressed-tensors", {}, "rotation", {"format": "dense"}),
    )),
    *(bad(None, message, "compressed-tensors-nvfp4", {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {
        "g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16} | weights} | group}}}) for weights, group, message in (
            ({"symmetric": False}, {}, "g: weights with zero points"), ({"actorder": "group"}, {}, "g: weights with zero points.* an order"),
            ({"group_size": 32}, {}, "g: weights are no NVFP4"), ({}, {"output_activations": {"num_bits": 8}}, "g: output_activations are not read"),
    )),
    bad(None, "group_0: weights are no NVFP4", "modelopt-nvfp4",
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 16}}}}}),
    bad(None, "fmt='e5m2' is not read", "bf16", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}}),
    bad(None, "group_size=32", "bf16", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}}),
    bad(None, "a JSON object is needed", "bf16", {"quantization_config": [1]}),
    bad(None, "'ignore' must be a list of strings", "bf16", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [1]}}),
    bad(None, "format 'pack-quantized' is not read", "bf16",
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "pack-quantized"}}}}),
])  # fmt: skip
def test_bad_folders(tmp_path, form, change, config, options, message):
    folder = folders.copy(MOE / form, tmp_path / "bad", change, config)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_k_that_is_no_multiple_of_16_names_the_layer(tmp_path):
    config = folders.small_config(intermediate_size=40)
    folder = folders.write(tmp_path / "odd", config, folders.small_weights(config))
    with pytest.raises(ValueError, match=r"layers/0/mlp/down_proj.*K=40 is not a multiple of 16"):
        load_model(folder, rules=[nvfp4jax.Rule(".*proj")])


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("table, exclude, kv_cache", [
    # transformers 5's FineGrainedFP8Config.to_dict(), DeepSeek-V3's, and vLLM's name of the list
    (FP8 | {"expert_dtype": "fp8", "scale_fmt": "float", "modules_to_convert": None, "modules_to_not_convert": ["lm_head"], "dequantize": False}, ("lm_head",), None),
    (FP8 | {"fmt": "e4m3", "scale_fmt": "ue8m0"}, (), None),
    (FP8 | {"ignored_layers": ["model.norm"], "modules_to_not_convert": None}, ("model.norm",), None),
    # ModelOpt's, of several versions
    ({"quant_library": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": "FP8", "ignore": []}, (), "FP8"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.33"}, "ignore": ["a*"],
      "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, ("a*",), "FP8"),
    ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["b"]}}, ("b",), "NVFP4"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4,
      "type": "float", "group_size": 16, "symmetric": True, "actorder": None}}}, "sparsity_config": {"format": "dense"}, "ignore": ["lm_head"],
      "transform_config": {"config_groups": {}}, "global_compression_ratio": 1.5, "quantization_status": "compressed"}, ("lm_head",), None),
])  # fmt: skip
def test_quantization_configs_of_public_folders(table, exclude, kv_cache):
    found = quantization_config.parse_quantization(table, "config.json")
    assert found.exclude == exclude and found.kv_cache == kv_cache


def test_config_spellings(tmp_path):
    """The quantization config beside config.json only; nested in it; a stale one beside a config.json that is right."""
    reference = load_model(MOE / "modelopt-nvfp4")
    assert_same(load_model(folders.copy(MOE / "modelopt-nvfp4", tmp_path / "beside", config={"quantization_config": None})), reference)
    nested = json.loads((MOE / "modelopt-nvfp4" / "hf_quant_config.json").read_text())
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "nested", config={"quantization_config": nested})
    (folder / "hf_quant_config.json").unlink()
    assert_same(load_model(folder), reference)
    assert formats.open_checkpoint(folder).quantization == formats.open_checkpoint(tmp_path / "beside").quantization
    stale = formats.open_checkpoint(MOE / "compressed-tensors-nvfp4").quantization
    assert stale.method == "compressed-tensors" and stale.exclude == ("lm_head", "model.embed_tokens")


def test_kv_entries_are_read(tmp_path):
    scales = {f"model.layers.0.self_attn.{kv}_proj.{kv}_scale": np.float32(0.5) for kv in "kv"}
    config = json.loads((MOE / "modelopt-nvfp4" / "config.json").read_text())["quantization_config"]
    config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "kv", scales, {"quantization_config": config})
    assert formats.open_checkpoint(folder).quantization.kv_cache == "FP8"
    assert_same(load_model(folder), load_model(MOE / "modelopt-nvfp4"))


@pytest.mark.parametrize("patterns, name, expected", [
    (["lm_head"], "lm_head", True),
    (["lm_head"], "lm_head2", False),
    (["model.layers.0.mlp.gate"], "model.layers.0.mlp.gate", True),
    (["model.layers.0.mlp.gate"], "model.layers.0.mlp.gate_proj", False),
    (["model.layers.0."], "model.layers.0.mlp.up_proj", True),
    (["model.layers.1."], "model.layers.11.mlp.up_proj", False),
    (["model.layers.1"], "model.layers.1.mlp.up_proj", True),
    (["*mlp.gate.*", "*lm_head*"], "lm_head", True),
    (["model.layers.0*"], "model.layers.0.self_attn.q_proj", True),
    (["model.layers.[0-2].*"], "model.layers.3.self_attn.q_proj", False),
    (["re:.*mlp.gate$"], "model.layers.3.mlp.gate", True),
    (["re:.*mlp.gate$"], "model.layers.3.mlp.gate_proj", False),
    (["re:.*\\.(q|k|v)_proj$"], "model.layers.3.self_attn.v_proj", True),
    ([], "anything", False),
])  # fmt: skip
def test_exclude_patterns(patterns, name, expected):
    assert quantization_config.is_excluded(name, patterns) == expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(", "(?:(?:a*)*)*", "(.*){9}x", "a" * 2000, ".*.*.*.*.*x", "(\\d+|x)+y"])
def test_exclude_patterns_that_could_hang_are_refused(pattern):
    with pytest.raises(CheckpointError, match="exclude pattern"):
        quantization_config.is_excluded("a" * 60, ["re:" + pattern])


def test_tensors_without_a_place_are_told_once(tmp_path, caplog):
    extra = {"model.layers.4.mlp.gate.weight": np.zeros(3, np.float32), "model.mtp.weight": np.zeros(3, np.float32),
             "model.rotary_emb.inv_freq": np.zeros(3, np.float32)}  # fmt: skip
    folder = folders.copy(MOE / "bf16", tmp_path / "more", extra)
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    told = caplog.records[0].getMessage()
    assert len(caplog.records) == 1 and "2 tensors have no place" in told and "model.mtp.weight" in told


def test_a_tied_head_that_is_stored(tmp_path, caplog):
    """A copy of the embedding says nothing; another one is used, and told."""
    folder, table = DATA / "qwen3-tiny" / "bf16", "model.embed_tokens.weight"
    weights = folders.tensors(folder)
    same = folders.copy(folder, tmp_path / "same", {"lm_head.weight": weights[table]})
    head = weights[table][::-1].copy()
    other = folders.copy(folder, tmp_path / "other", {"lm_head.weight": head})
    untied = folders.copy(folder, tmp_path / "untied", {"lm_head.weight": head}, {"tie_word_embeddings": False})
    with caplog.at_level(logging.WARNING):
        assert_same(load_model(same), load_model(folder))
        assert not caplog.records
        assert_same(load_model(other), load_model(untied))
    assert len(caplog.records) == 1 and "'lm_head.weight' is stored and differs: it is used" in caplog.records[0].getMessage()


def test_a_single_file_beside_an_index_that_does_not_know_it(tmp_path, caplog):
    folder = folders.copy(DATA / "qwen3-tiny" / "bf16", tmp_path / "both")
    old = {name: -value for name, value in folders.tensors(folder).items()}
    folders.save_file(old, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        assert_same(load_model(folder), load_model(DATA / "qwen3-tiny" / "bf16"))
    assert len(caplog.records) == 1 and "model.safetensors is read" in caplog.records[0].getMessage()


@pytest.mark.parametrize("form, name, value", [
    ("compressed-tensors-nvfp4", "input_global_scale", np.array([np.inf], np.float32)), ("modelopt-nvfp4", "input_scale", np.float32(0)),
])  # fmt: skip
def test_input_scales_that_the_mode_does_not_read(tmp_path, form, name, value):
    """An expert that no prompt reached: only static scaling minds."""
    tensor = f"model.layers.1.mlp.experts.3.down_proj.{name}"
    folder = folders.copy(MOE / form, tmp_path / "odd", {tensor: value})
    for scaling in (None, "token"):
        assert_same(load_model(folder, scaling=scaling), load_model(MOE / form, scaling=scaling))
    with pytest.raises(CheckpointError, match=tensor):
        load_model(folder, scaling="static")


def test_packed_modules_that_the_config_excludes_are_told_once(tmp_path, caplog):
    config = json.loads((MOE / "modelopt-nvfp4" / "config.json").read_text())["quantization_config"]
    config["ignore"] = ["model.layers.2.", "lm_head"]
    folder = folders.copy(MOE / "modelopt-nvfp4", tmp_path / "odd", config={"quantization_config": config})
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert len(caplog.records) == 1 and "though the config excludes them" in caplog.records[0].getMessage()


@pytest.mark.parametrize("form", ["modelopt-nvfp4", "compressed-tensors-nvfp4"])
def test_float_modules_of_which_the_config_says_nvfp4_are_told_once(tmp_path, caplog, form):
    """Not those that it excludes, and not the routers, which exporters leave unsaid; the floats are loaded as they are."""
    config = json.loads((MOE / form / "config.json").read_text())["quantization_config"]
    config["ignore"] = ["lm_head", "re:model.layers.0.*"]
    folder = folders.copy(MOE / "bf16", tmp_path / "odd", config={"quantization_config": config})
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    told = f"{5 * (layers - 1)} modules are not NVFP4 though the config says so (first: model.layers.1."
    assert len(caplog.records) == 1 and told in caplog.records[0].getMessage()
    assert_same(model, load_model(MOE / "bf16"))
