"""DeepSeek-V3 against transformers: logits, greedy tokens, the latent cache, configs, FP8 sources, quantized and saved."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import folders
from conftest import DATA
from flax import nnx

import nvfp4jax
from models import loading
from nvfp4jax import models
from nvfp4jax.checkpoint import huggingface, outputs, saved_model
from nvfp4jax.models import deepseek_v3

FOLDERS = {
    "tiny": DATA / "deepseek-v3-tiny" / "bf16",
    "plain": DATA / "deepseek-v3-plain",
    "yarn": DATA / "deepseek-v3-yarn",
    "fp8": DATA / "deepseek-v3-fp8",
}
RULE = nvfp4jax.Rule(r"layers/.*(proj|proj_with_mqa|experts)")


@functools.cache
def load(name: str, dtype=jnp.float32, **options) -> nnx.Module:
    """Shared by the tests of a process: clone it before you change it."""
    return nvfp4jax.load_model(FOLDERS[name], dtype, **options)


@functools.cache
def reference(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """(all of it, ids [B, T] and valid with rows moved to the left end, logits likewise)"""
    ref = dict(np.load(FOLDERS[name] / "reference.npz"))
    order = np.argsort(ref["attention_mask"] == 0, axis=1, kind="stable")
    ids, valid = (np.take_along_axis(ref[key], order, 1) for key in ("input_ids", "attention_mask"))
    return ref, ids, valid == 1, np.take_along_axis(ref["logits_f32"], order[..., None], 1)


def config(name: str = "yarn", **changes) -> dict:
    given = json.loads((FOLDERS[name] / "config.json").read_text()) | changes
    return {key: value for key, value in given.items() if value != "absent"}


@pytest.mark.parametrize("name, scan", [("tiny", False), ("plain", True), ("yarn", True), ("fp8", True)])
def test_logits(name, scan):
    _, ids, valid, logits = reference(name)
    model = load(name, scan_layers=scan)
    out = loading.run(model, ids, valid, return_experts=True)
    assert out.logits.dtype == jnp.float32
    assert np.abs(np.asarray(out.logits) - logits)[valid].max() < 2e-5
    sparse = model.config.num_layers - model.config.first_k_dense_replace
    assert out.experts.shape == (sparse, *ids.shape, model.config.num_experts_per_tok)


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "yarn", "fp8"))])
def test_greedy_tokens(name):
    ref = reference(name)[0]
    greedy = next(value for key, value in ref.items() if key.startswith("greedy"))
    rolled = nvfp4jax.generate(
        load(name, scan_layers=True), ref["input_ids"], ref["attention_mask"], max_new_tokens=greedy.shape[1]
    )
    np.testing.assert_array_equal(rolled.tokens, greedy)


def test_the_cache_is_the_latents():
    """[B, S, kv_lora_rank + rope], a stack's axis in front; filled in pieces it gives the logits of the whole forward."""
    model = load("tiny", scan_layers=True)
    _, ids, valid, _ = reference("tiny")
    whole = loading.run(model, ids, valid).logits
    cache = model.init_cache(3, 29)
    assert [x.shape for x in jax.tree.leaves(cache)] == [(3, 29, 64 + 16), (2, 3, 29, 64 + 16)]
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args[:3], valid=args[3]))
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    for part in (slice(0, 11), slice(11, 12), slice(12, 23), slice(23, 24)):
        out = call(state, *(jnp.asarray(x[:, part]) for x in (ids, positions)), cache, jnp.asarray(valid[:, part]))
        cache, real = out.cache, valid[:, part]
        np.testing.assert_allclose(np.asarray(out.logits)[real], np.asarray(whole[:, part])[real], atol=2e-5)


@pytest.mark.slow
def test_several_samples_of_a_prompt():
    """Each as if it were alone: a row's draws depend on its key and place, not on what the cache holds beside it."""
    model = load("yarn", scan_layers=True)
    ref = reference("yarn")[0]
    options = dict(max_new_tokens=6, temperature=1.0, key=jax.random.key(5))
    rolled = nvfp4jax.generate(model, ref["input_ids"], ref["attention_mask"], num_samples=3, **options)
    assert rolled.tokens.shape == (6, 6) and len({tuple(row) for row in rolled.tokens.tolist()}) > 2
    for row, tokens in enumerate(np.asarray(rolled.tokens)):  # the same logprobs from a forward over prompt and answer
        mask = ref["attention_mask"][row // 3] == 1
        text = np.concatenate([ref["input_ids"][row // 3][mask], tokens])[None]
        logprobs = jax.nn.log_softmax(loading.run(model, np.pad(text, ((0, 0), (0, 30 - text.shape[1])))).logits[0], axis=-1)
        start = mask.sum() - 1
        expected = np.asarray(logprobs)[np.arange(start, start + 6), tokens]
        np.testing.assert_allclose(rolled.logprobs[row], expected, atol=3e-5)


@pytest.mark.slow
def test_bfloat16_is_near():
    _, ids, valid, logits = reference("fp8")
    out = loading.run(load("fp8", jnp.bfloat16, scan_layers=True), ids, valid).logits
    assert out.dtype == jnp.float32
    error = (np.asarray(out) - logits)[valid]
    assert np.sqrt((error**2).mean() / (logits[valid] ** 2).mean()) < 0.06


def test_gradients():
    """They reach every weight but the correction bias, and agree with a difference quotient along themselves."""
    model = load("yarn")
    _, ids, _, _ = reference("yarn")
    graphdef, params = nnx.split(model)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (1, 12))

    def loss(params):
        logits = nnx.merge(graphdef, params)(jnp.asarray(ids[:1, :12]), positions).logits
        return jax.nn.logsumexp(logits, axis=-1).sum() - logits[..., 3].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    flat = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(grads)}
    for path, grad in flat.items():
        assert np.isfinite(grad).all() and grad.any() == (path[-1] != "e_score_correction_bias"), path
    squared = sum((g.astype(np.float64) ** 2).sum() for g in flat.values())
    step = 1e-3 / np.sqrt(squared)
    moved = jax.tree.map(lambda p, g: p + jnp.float32(step) * g, params, grads)
    assert abs((float(jax.jit(loss)(moved)) - float(value)) / step - squared) < 0.05 * squared


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="deepseek_v2"), "model_type"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(scoring_func="softmax"), "scoring_func.*only 'sigmoid'"),
        (dict(topk_method="greedy"), "topk_method"),
        (dict(moe_layer_freq=2), "moe_layer_freq"),
        (dict(q_lora_rank="absent"), "'q_lora_rank' is missing"),
        (dict(kv_lora_rank="absent"), "'kv_lora_rank' is missing"),
        (dict(n_group=None), "'n_group' is missing"),
        (dict(first_k_dense_replace=-1), "first_k_dense_replace"),
        (dict(num_key_value_heads=2), "num_key_value_heads"),
        (dict(qk_head_dim=32), "qk_head_dim"),
        (dict(head_dim=16), "head_dim"),
        (dict(qk_rope_head_dim=7, head_dim=7, qk_head_dim=23), "qk_rope_head_dim=7 must be even"),
        (dict(n_group=3), "n_group=3"),
        (dict(n_group=8), "groups of at least 2"),
        (dict(topk_group=5), "topk_group=5"),
        (dict(topk_group=1), "topk_group=1"),  # 2 experts a group, 3 wanted
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_type 'linear'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "factor"),
        (dict(routed_scaling_factor=-1.0), "routed_scaling_factor"),
        (dict(rope_interleave=1), "rope_interleave"),
        (dict(index_topk=64), "'index_topk'=64 is not known"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        deepseek_v3.read_config(config(**change))


def test_spellings_of_a_config():
    """DeepSeek's own keys, those of transformers 4 and 5, defaults where a key is absent."""
    new = config()
    rope = new["rope_parameters"]
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "head_dim", "qk_head_dim", "rope_interleave")}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    own = dict(ep_size=1, aux_loss_alpha=0.001, seq_aux=True, moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid")
    assert deepseek_v3.read_config(old | own | dict(rope_scaling=scaling, rope_theta=1e4)) == deepseek_v3.read_config(new)
    assert deepseek_v3.read_config(config(q_lora_rank=None)).q_lora_rank is None
    parsed = deepseek_v3.read_config(config(norm_topk_prob="absent", routed_scaling_factor="absent"))
    assert parsed.norm_topk_prob and parsed.routed_scaling_factor == 2.5


# -- quantized --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The FP8 folder without its third layer: one dense, one sparse."""
    return folders.copy(
        FOLDERS["fp8"], tmp_path_factory.mktemp("deepseek") / "short", config=dict(num_hidden_layers=2),
        change={name: None for name in folders.tensors(FOLDERS["fp8"]) if ".layers.2." in name},
    )  # fmt: skip


def test_what_stays_in_floating_point():
    family = nvfp4jax.models.family_of(config())
    assert family.keeps("lm_head") and family.keeps("layers/1/self_attn/kv_b_proj")
    assert not family.keeps("layers/1/self_attn/kv_a_proj_with_mqa") and not family.keeps("layers/2/mlp/experts")


@pytest.mark.slow
def test_quantized_logits(short):
    """Weights only, kv_b_proj among them: those of the float model with the decoded weights."""
    float_model = nvfp4jax.load_model(short, jnp.float32)
    qmodel = nvfp4jax.quantize_model(float_model, nvfp4jax.Rule(RULE.module_path, scaling=None))
    decoded = nnx.clone(float_model)
    layers = dict(nnx.iter_modules(decoded))
    for path, layer in nnx.iter_modules(qmodel):
        if isinstance(layer, nvfp4jax.NVFP4Linear):
            layers[path].kernel.set_value(layer.weight().dequantize(jnp.float32).T)
        elif isinstance(layer, nvfp4jax.NVFP4Experts):
            gate_up, down = (w.dequantize(jnp.float32) for w in layer.weights())
            for name, w in (("gate_proj", gate_up[:, 0]), ("up_proj", gate_up[:, 1]), ("down_proj", down)):
                getattr(layers[path], name).set_value(w.swapaxes(1, 2))
    _, ids, valid, _ = reference("fp8")
    quantized, expected, floats = (np.asarray(loading.run(m, ids, valid).logits)[valid] for m in (qmodel, decoded, float_model))
    np.testing.assert_allclose(quantized, expected, atol=3e-5)
    assert np.sqrt(((quantized - floats) ** 2).mean() / (floats**2).mean()) > 0.03  # something was quantized


@pytest.mark.slow
def test_a_quantized_row_does_not_depend_on_its_batch(tmp_path):
    folder = folders.copy(FOLDERS["plain"], tmp_path / "one")
    (folder / "config.json").write_text(json.dumps(config("plain", num_hidden_layers=1)))  # a sparse layer
    qmodel = nvfp4jax.quantize_model(nvfp4jax.load_model(folder), RULE)
    _, ids, valid, _ = reference("plain")
    together, alone = loading.run(qmodel, ids, valid).logits, loading.run(qmodel, ids[1:], valid[1:]).logits
    np.testing.assert_array_equal(np.asarray(together)[1][valid[1]], np.asarray(alone)[0][valid[1]])


def assert_same(state: nnx.State, expected: nnx.State) -> None:
    one, other = (dict(nnx.to_flat_state(s)) for s in (state, expected))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(np.asarray(leaf.get_value()), np.asarray(other[path].get_value()), err_msg=str(path))


def test_fp8_quantized_saved_and_restored(short, tmp_path):
    """Quantized while loading, afterwards, from a trainer's float state, and from an Orbax folder: the same bits."""
    rules = [nvfp4jax.Rule(r"layers/./self_attn/q_a_proj|layers/1/mlp/.*experts.*")]  # few shapes: each is compiled
    float_model = nvfp4jax.load_model(short)
    qmodel = nvfp4jax.quantize_model(float_model, rules)
    assert type(qmodel.layers[1].mlp.gate) is deepseek_v3.Router
    assert type(qmodel.layers[1].mlp.shared_experts.gate_proj) is nvfp4jax.NVFP4Linear
    assert type(qmodel.layers[0].self_attn.kv_b_proj) is nnx.Linear
    assert_same(nnx.state(nvfp4jax.load_model(short, rules=rules)), nnx.state(qmodel))
    assert_same(nvfp4jax.quantize_params(nnx.state(float_model), qmodel), nnx.state(qmodel))
    saved_model.save_model(tmp_path / "packed", qmodel, json.loads((short / "config.json").read_text()))
    assert_same(nnx.state(saved_model.load_model(tmp_path / "packed")), nnx.state(qmodel))


def test_what_the_converter_keeps():
    """The router, no linear of ours, is named in an export's ignore list; kv_b_proj, read as a matrix, is weights only where it is packed."""
    config = json.loads((FOLDERS["plain"] / "config.json").read_text())
    model, family = models.build(config), models.family_of(config)
    qmodel = nvfp4jax.quantize_model(model, [nvfp4jax.Rule(family.kept, skip=True), nvfp4jax.Rule(".*")])
    for method in ("modelopt", "compressed-tensors"):
        names = outputs.excluded(qmodel, family, method)
        routers = {f"model.layers.{i}.mlp.gate" for i, layer in enumerate(model.layers) if hasattr(layer.mlp, "gate")}
        assert routers and routers <= set(names) and "model.layers.0.self_attn.kv_b_proj" in names
    rule = lambda name: huggingface.packed_rule(family, ("layers", 0, "self_attn", name), "token")  # noqa: E731
    assert rule("kv_b_proj").scaling is None and rule("o_proj").scaling == nvfp4jax.Token()
