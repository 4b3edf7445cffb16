"""Qwen3 against transformers' logits and against a float64 oracle; configs, masks, caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from models import loading, oracle
from nvfp4jax import models
from nvfp4jax.models import cache, qwen3

NAMES = ("qwen3-tiny", "qwen3-moe-tiny")


run = loading.run


@pytest.mark.parametrize("name, scan, graph", [(NAMES[0], False, True), (NAMES[1], False, False), (NAMES[0], True, False), (NAMES[1], True, True)])
def test_logits_equal_the_reference(name, scan, graph):
    ids, valid, logits = loading.right_padded(name)
    with nnx.set_graph_mode(graph):
        out = run(loading.load(name, scan_layers=scan), ids, valid)
    assert out.cache is None and out.experts is None and out.logits.dtype == jnp.float32
    assert np.abs(np.asarray(out.logits) - logits)[valid].max() < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_oracle(name):
    """The float64 oracle equals the reference and the model, the experts of each token too."""
    ids, valid, reference = loading.right_padded(name)
    config = {"mlp_only_layers": []} | loading.config(name)
    mask = valid[1]
    logits, routed = oracle.forward(loading.weights(name), config, ids[1][mask])
    assert np.abs(logits - reference[1][mask]).max() < 1e-5
    ours = run(loading.load(name), ids, valid, **(dict(return_experts=True) if routed else {}))
    assert np.abs(logits - np.asarray(ours.logits)[1][mask]).max() < 2e-5
    if routed:
        assert ours.experts.shape == (len(routed), 3, 24, config["num_experts_per_tok"])
        np.testing.assert_array_equal(np.asarray(ours.experts)[:, 1][:, mask], np.stack(routed))


MIXED = dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-5,
    num_experts=5,
    num_experts_per_tok=3,
    norm_topk_prob=False,
    mlp_only_layers=[3],
    decoder_sparse_step=2,
    attention_bias=True,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 5e3},
)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[0], tie_word_embeddings=True)],
    ids=["a", "b"],
)
def test_every_config_key_counts(changes):
    """Dense layers among sparse ones, biases, raw routing weights, tied or not, unrolled and stacked: the oracle's."""
    config = MIXED | changes
    model = models.build(config, jnp.float32, rngs=nnx.Rngs(3))
    key = jax.random.key(1)
    for i, (path, leaf) in enumerate(
        nnx.to_flat_state(nnx.state(model))
    ):  # biases and norms start at 0 and 1: make them count
        if path[-1] in ("bias", "scale"):
            leaf.set_value(leaf.get_value() + 0.3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape))
    tokens = np.arange(11) * 7 % 64
    logits, routed = oracle.forward(loading.export(model), config, tokens)
    assert len(routed) == {True: 5, False: 2}[bool(changes)]
    stacked = models.stack_layers(model)
    assert models.depths(stacked) == ((None, 5) if changes else (None, None, 3, None))
    for candidate in (model, stacked):
        out = run(candidate, tokens[None], return_experts=True)
        np.testing.assert_allclose(np.asarray(out.logits)[0], logits, atol=3e-5)
        np.testing.assert_array_equal(np.asarray(out.experts)[:, 0], np.stack(routed))


# From the published config.json and the totals of the published weights (the tied head counted once).
DENSE = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    vocab_size=151936,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1000000,
    rope_scaling=None,
    rms_norm_eps=1e-06,
    attention_bias=False,
    hidden_act="silu",
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=28,
    torch_dtype="bfloat16",
)
SPARSE = DENSE | dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)


def sizes(layers, hidden, heads, intermediate, tied=False, **more):
    return dict(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=intermediate,
                tie_word_embeddings=tied, **more)  # fmt: skip


PUBLISHED = {
    "0.6B": (DENSE | sizes(28, 1024, 16, 3072, True), 596_049_920),
    "1.7B": (DENSE | sizes(28, 2048, 16, 6144, True), 1_720_574_976),
    "4B": (DENSE | sizes(36, 2560, 32, 9728, True), 4_022_468_096),
    "8B": (DENSE | sizes(36, 4096, 32, 12288), 8_190_735_360),
    "14B": (DENSE | sizes(40, 5120, 40, 17408), 14_768_307_200),
    "32B": (DENSE | sizes(64, 5120, 64, 25600), 32_762_123_264),
    "30B-A3B": (SPARSE | sizes(48, 2048, 32, 6144, moe_intermediate_size=768), 30_532_122_624),
    "235B-A22B": (SPARSE | sizes(94, 4096, 64, 12288, moe_intermediate_size=1536), 235_093_634_560),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name):
    config, total = PUBLISHED[name]
    model = models.build(config)  # abstract: nothing is allocated
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == total
    assert model.config.rope.theta == 1e6
    stacked = models.stack_layers(model)
    assert models.depths(stacked) == (config["num_hidden_layers"],)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(stacked))) == total


def test_both_spellings():
    old = {k: v for k, v in SPARSE.items()} | sizes(2, 64, 4, 96, moe_intermediate_size=32)
    new = {k: v for k, v in old.items() if k not in ("num_experts", "rope_theta", "rope_scaling", "torch_dtype")}
    new |= dict(num_local_experts=128, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, dtype="bfloat16")
    assert qwen3.read_config(old) == qwen3.read_config(new)
    null = {key: None for key in ("rope_scaling", "rms_norm_eps", "attention_bias", "decoder_sparse_step", "use_sliding_window", "layer_types")}
    absent = {key: value for key, value in old.items() if key not in null}
    assert qwen3.read_config(absent | null) == qwen3.read_config(absent)
    parsed = qwen3.read_config({k: v for k, v in old.items() if k != "head_dim"})
    assert parsed.head_dim == 16  # hidden / heads for the sparse model
    assert dataclasses.replace(parsed, head_dim=128) == qwen3.read_config(old)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(architectures=["GemmaForCausalLM"]), "architectures=.*GemmaForCausalLM.*Qwen3ForCausalLM"),
        (dict(architectures=None), "architectures"),
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "rope_scaling.*dynamic"),
        (dict(rope_scaling={"type": "linear"}), "rope_scaling.*linear.*factor"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "factor": 2.0}), "rope_parameters.*factor"),
        (dict(rope_theta=None, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 1e6}),
         "rope_scaling beside rope_parameters"),
        (dict(logit_soft_cap=30.0), "'logit_soft_cap'=30.0 is not known"),
        (dict(rope_frequency_dtype="bfloat16"), "'rope_frequency_dtype'"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}), "rope_parameters"),
        (
            dict(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
            "rope_parameters.*partial_rotary_factor",
        ),
        (dict(use_sliding_window=True, sliding_window=4096), "use_sliding_window"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types.*sliding_attention"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(hidden_size=None), "'hidden_size' is missing"),
        (dict(num_key_value_heads=3), "num_attention_heads=4.*num_key_value_heads=3"),
        (dict(num_experts=None), "'num_experts' or 'num_local_experts' is missing"),
        (dict(num_experts=4, num_experts_per_tok=8), "num_experts_per_tok=8 exceeds num_experts=4"),
    ],
)
def test_bad_configs_name_the_key(change, words):
    good = SPARSE | sizes(2, 64, 4, 96, moe_intermediate_size=32)
    models.build(good)
    with pytest.raises(ValueError, match=words) as error:
        models.build(good | change)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_cache_in_pieces_equals_one_forward(scan):
    """11, 1, 11 and 1 tokens at a time, rows of different lengths, slots to spare: the logits of the whole forward."""
    name = "qwen3-moe-tiny"
    ids, valid, _ = loading.right_padded(name)
    model = loading.load(name, scan_layers=scan)
    whole = run(model, ids, valid).logits
    kv = model.init_cache(3, 29)
    assert cache.length(kv) == 29
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args[:3], valid=args[3]))
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    start = 0
    for steps in (11, 1, 11, 1):
        part = slice(start, start + steps)
        out = call(state, *(jnp.asarray(x[:, part], jnp.int32) for x in (ids, positions)), kv, jnp.asarray(valid[:, part]))
        start, kv = start + steps, out.cache
        np.testing.assert_allclose(np.asarray(out.logits)[valid[:, part]], np.asarray(whole[:, part])[valid[:, part]], atol=2e-5)


def test_rows_go_on_from_their_own_lengths():
    """A prompt of each length, then more tokens behind it over the padding's slots: the logits of the rows alone."""
    name = "qwen3-tiny"
    ids = np.random.default_rng(3).integers(0, 512, (3, 12))
    lengths = np.asarray([12, 5, 9], np.int32)
    model = loading.load(name, scan_layers=True)
    valid = np.arange(12) < lengths[:, None]
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), ids.shape)
    out = model(ids, positions, model.init_cache(3, 16), valid=valid, last=lengths - 1)
    assert out.logits.shape == (3, 1, 512)
    more = np.random.default_rng(4).integers(0, 512, (3, 2))
    behind = model(more, lengths[:, None] + np.arange(2, dtype=np.int32), out.cache, valid=np.ones((3, 2), bool))
    for row, n in enumerate(lengths):
        alone = run(model, np.concatenate([ids[row, :n], more[row]])[None]).logits[0]
        np.testing.assert_allclose(out.logits[row, 0], alone[n - 1], atol=2e-5)
        np.testing.assert_allclose(behind.logits[row], alone[n:], atol=2e-5)


def test_refusals_of_a_call():
    model = loading.load("qwen3-tiny")
    ids = np.zeros((3, 24), np.int32)
    with pytest.raises(ValueError, match=r"tokens \[3, 24\] do not fit into a cache of 16 slots"):
        model(ids, ids, model.init_cache(3, 16))
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        model(ids, ids, return_experts=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, scan", [("qwen3-tiny", False), ("qwen3-moe-tiny", True)], ids=["unrolled", "scanned-moe"]
)
def test_padding_takes_no_part_in_an_nvfp4_amax(name, scan):
    """Per-tensor scales: other tokens in the padding change no bit of a valid row; without the mask they do."""
    ids, valid, _ = loading.right_padded(name)
    rules = [nvfp4jax.Rule(r".*/gate", skip=True)] if scan else []
    model = nvfp4jax.quantize_model(loading.load(name), [*rules, nvfp4jax.Rule(r"layers/.*", scaling="tensor")])
    model = models.stack_layers(model) if scan else model
    table = model.embed_tokens.embedding
    table.set_value(table.get_value().at[5].set(jax.nn.one_hot(3, 128)))  # a loud token: one channel, 11.3 once normed
    quiet, loud = (np.where(valid, np.where(ids == 5, 6, ids), pad) for pad in (7, 5))
    for mask, same in ((valid, True), (None, False)):
        one, two = (np.asarray(run(model, tokens, mask).logits) for tokens in (quiet, loud))
        assert (one[valid] == two[valid]).all() == same
        assert (one[~valid] != two[~valid]).any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(name):
    ids, valid, reference = loading.right_padded(name)
    logits = run(loading.load(name, jnp.bfloat16), ids, valid).logits
    assert logits.dtype == jnp.float32
    error = (np.asarray(logits) - reference)[valid]
    assert np.sqrt((error**2).mean() / (reference[valid] ** 2).mean()) < 0.03
