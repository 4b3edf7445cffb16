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

NAMES = ("qwen3-tiny", "qwen3-moe-tiny")


def positions_of(mask: np.ndarray) -> jax.Array:
    return jnp.asarray(np.maximum(np.cumsum(mask, 1) - 1, 0), jnp.int32)


def run(model, tokens, mask, **flags):
    """model on [B, T] without a cache, compiled."""
    graphdef, state = nnx.split(model)
    mask = np.asarray(mask)

    @jax.jit
    def call(state, tokens, positions, mask):
        return nnx.merge(graphdef, state)(tokens, positions, None, mask, **flags)

    return call(state, jnp.asarray(tokens), positions_of(mask), jnp.asarray(mask))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference(name, scan, graph):
    with nnx.set_graph_mode(graph):
        ref = loading.reference(name)
        model = loading.load(name, scan_layers=scan, **loading.REFERENCE_RUN)
        logits, cache = run(model, ref["input_ids"], ref["attention_mask"])
    assert cache is None and logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - ref["logits_f32"])[ref["attention_mask"] == 1]
    assert error.max() < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_oracle_and_float32_frequencies(name):
    """The oracle equals the reference; with float32 rotary frequencies (the default) the model equals the oracle."""
    ref = loading.reference(name)
    config = {"mlp_only_layers": []} | loading.config(name)
    row, mask = ref["input_ids"][1], ref["attention_mask"][1] == 1
    logits, _ = oracle.forward(loading.weights(name), config | loading.REFERENCE_RUN, row[mask])
    assert np.abs(logits - ref["logits_f32"][1][mask]).max() < 1e-5
    logits, routed = oracle.forward(loading.weights(name), config, row[mask])
    flags = dict(return_experts=True) if routed else {}
    ours, _, *experts = run(loading.load(name), ref["input_ids"], ref["attention_mask"], **flags)
    assert np.abs(logits - np.asarray(ours)[1][mask]).max() < 2e-5
    if routed:
        assert experts[0].shape == (len(routed), 3, 24, config["num_experts_per_tok"])
        np.testing.assert_array_equal(np.asarray(experts[0])[:, 1][:, mask], np.stack(routed))


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
        ours, _, experts = run(candidate, tokens[None], np.ones((1, 11)), return_experts=True)
        np.testing.assert_allclose(np.asarray(ours)[0], logits, atol=3e-5)
        np.testing.assert_array_equal(np.asarray(experts)[:, 0], np.stack(routed))


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
    assert model.config.rope_theta == 1e6
    stacked = models.stack_layers(model)
    assert models.depths(stacked) == (config["num_hidden_layers"],)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(stacked))) == total


def test_both_spellings():
    old = {k: v for k, v in SPARSE.items()} | sizes(2, 64, 4, 96, moe_intermediate_size=32)
    new = {k: v for k, v in old.items() if k not in ("num_experts", "rope_theta", "rope_scaling", "torch_dtype")}
    new |= dict(num_local_experts=128, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, dtype="bfloat16")
    assert models.Qwen3Config.from_hf(old) == models.Qwen3Config.from_hf(new)
    null = {key: None for key in ("rope_scaling", "rms_norm_eps", "attention_bias", "decoder_sparse_step", "use_sliding_window", "layer_types")}
    absent = {key: value for key, value in old.items() if key not in null}
    assert models.Qwen3Config.from_hf(absent | null) == models.Qwen3Config.from_hf(absent)
    parsed = models.Qwen3Config.from_hf({k: v for k, v in old.items() if k != "head_dim"})
    assert parsed.head_dim == 16  # hidden / heads for the sparse model
    assert dataclasses.replace(parsed, head_dim=128) == models.Qwen3Config.from_hf(old)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(architectures=["LlamaForCausalLM"]), "architectures=.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        (dict(architectures=None), "architectures"),
        (dict(model_type="llama"), "model_type='llama'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling.*yarn"),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), "rope_scaling.*linear"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_parameters.*yarn"),
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


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_cache_in_pieces_equals_one_forward(scan):
    """11, 1, 11 and 1 tokens at a time into a cache with slots to spare: the logits of the whole forward."""
    name = "qwen3-moe-tiny"
    ref = loading.reference(name)
    tokens, mask = jnp.asarray(ref["input_ids"]), ref["attention_mask"]
    model = loading.load(name, scan_layers=scan)
    whole, _ = run(model, tokens, mask)
    slots = 29
    key_mask = jnp.pad(jnp.asarray(mask), ((0, 0), (0, slots - 24)))
    positions = positions_of(mask)
    cache = model.init_cache(3, slots)
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    start = 0
    for steps in (11, 1, 11, 1):
        part = slice(start, start + steps)
        logits, cache = call(state, tokens[:, part], positions[:, part], cache, key_mask)
        start += steps
        assert int(cache.index) == start
        valid = mask[:, part] == 1
        np.testing.assert_allclose(np.asarray(logits)[valid], np.asarray(whole[:, part])[valid], atol=2e-5)


def test_attention_in_blocks():
    """Blocks of queries, the last one not full: what all at once gives."""
    from nvfp4jax.models.attention import attend

    parts = [
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 45, 4, 8), (2, 2, 50, 8), (2, 2, 50, 8)])
    ]
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 45, 50))
    whole = attend(*parts, mask, jax.lax.Precision.HIGHEST)
    assert whole.shape == (2, 45, 4, 8)
    np.testing.assert_allclose(attend(*parts, mask, jax.lax.Precision.HIGHEST, block=16), whole, atol=1e-5)


def test_masks():
    name = "qwen3-tiny"
    ref = loading.reference(name)
    model = loading.load(name)
    tokens, mask = ref["input_ids"], ref["attention_mask"]
    logits, _ = run(model, tokens, mask)
    # The same mask over pairs.
    pairs = (mask[:, None] == 1) & np.tril(np.ones((24, 24), bool))
    graphdef, state = nnx.split(model)
    other, _ = nnx.merge(graphdef, state)(jnp.asarray(tokens), positions_of(mask), None, jnp.asarray(pairs))
    np.testing.assert_allclose(np.asarray(other)[mask == 1], np.asarray(logits)[mask == 1], atol=1e-5)
    # Row 0 has no padding, so no mask is the same; and the last token alone.
    alone, _ = model(jnp.asarray(tokens[:1]), positions_of(mask[:1]), None, None, decode_only_last_token=True)
    assert alone.shape == (1, 1, 512)
    np.testing.assert_allclose(np.asarray(alone)[0, 0], np.asarray(logits)[0, -1], atol=1e-5)
    assert np.isfinite(np.asarray(logits)).all()  # padding has no meaning, but is no NaN
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 23\).*\(3, 24\)"):
        model(jnp.asarray(tokens), positions_of(mask), None, jnp.asarray(mask[:, 1:]))
    with pytest.raises(ValueError, match=r"tokens \[3, 24\] do not fit into a cache of 16 slots"):
        model(jnp.asarray(tokens), positions_of(mask), model.init_cache(3, 16), jnp.asarray(mask[:, :16]))
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        model(jnp.asarray(tokens), positions_of(mask), None, None, return_experts=True)


@pytest.mark.parametrize(
    "name, scan", [("qwen3-tiny", False), ("qwen3-moe-tiny", True)], ids=["unrolled", "scanned-moe"]
)
def test_padding_takes_no_part_in_an_nvfp4_amax(name, scan):
    """Per-tensor scales: other tokens in the padding change no bit of a valid row; without the mask they do."""
    ref = loading.reference(name)
    mask = ref["attention_mask"]
    rules = [nvfp4jax.Rule(r".*/gate", skip=True)] if scan else []
    model = nvfp4jax.quantize_model(loading.load(name), [*rules, nvfp4jax.Rule(r"layers/.*", scaling="tensor")])
    model = models.stack_layers(model) if scan else model
    table = model.embed_tokens.embedding
    table.set_value(table.get_value().at[5].set(jax.nn.one_hot(3, 128)))  # a loud token: one channel, 11.3 once normed
    quiet, loud = (np.where(mask == 1, np.where(ref["input_ids"] == 5, 6, ref["input_ids"]), pad) for pad in (7, 5))
    graphdef, state = nnx.split(model)
    # Over pairs: rows of padding that see nothing are no rows; where they see themselves they count.
    seen = np.tril(np.ones((24, 24), bool)) & (mask[:, None] == 1)
    call = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args)[0])
    for pairs, same in ((seen, True), (seen | np.eye(24, dtype=bool), False)):
        one, two = (
            np.asarray(call(state, jnp.asarray(t), positions_of(mask), None, jnp.asarray(pairs))) for t in (quiet, loud)
        )
        assert (one[mask == 1] == two[mask == 1]).all() == same
        assert (one[mask == 0] != two[mask == 0]).any()
    if not scan:
        keys = np.asarray(call(state, jnp.asarray(loud), positions_of(mask), None, jnp.asarray(mask)))
        one = np.asarray(call(state, jnp.asarray(loud), positions_of(mask), None, jnp.asarray(seen)))
        np.testing.assert_array_equal(keys[mask == 1], one[mask == 1])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(name):
    ref = loading.reference(name)
    valid = ref["attention_mask"] == 1
    logits, _ = run(loading.load(name, jnp.bfloat16, **loading.REFERENCE_RUN), ref["input_ids"], ref["attention_mask"])
    assert logits.dtype == jnp.float32
    error = (np.asarray(logits) - ref["logits_f32"])[valid]
    assert np.sqrt((error**2).mean() / (ref["logits_f32"][valid] ** 2).mean()) < 0.03
