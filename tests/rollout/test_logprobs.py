"""`logprobs` against log-softmax of all logits in numpy, its gradient against that of the plain computation, and a rollout's own."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from nvfp4jax import fp8, models, rollout
from nvfp4jax.models import cache
from nvfp4jax.rollout.prompts import pack

BF16 = jnp.bfloat16

CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu", attention_bias=False,
    max_position_embeddings=256,
)  # fmt: skip
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1, 1]])


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def model(request):
    return models.build(CONFIG | dict(tie_word_embeddings=request.param), rngs=nnx.Rngs(0), dtype=jnp.float32)


def expected(model, ids, mask, temperature):
    packed = pack(ids, mask == 1)
    logits = np.asarray(model(packed.ids, packed.positions(), valid=packed.valid).logits, np.float64) / temperature
    out = np.zeros(ids.shape)
    for row in range(len(ids)):
        columns = np.flatnonzero(mask[row])
        for place, column in enumerate(columns[1:]):
            scores = logits[row, place]
            out[row, column] = scores[ids[row, column]] - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
    return out


def small_parts(monkeypatch, rows):
    module = sys.modules["nvfp4jax.rollout.logprobs"]
    monkeypatch.setattr(module, "ROWS", rows)
    module._logprobs.clear_cache()


@pytest.mark.parametrize("rows", [3, 1024])  # a position at a time; all at once
def test_values(model, rows, monkeypatch):
    small_parts(monkeypatch, rows)
    ids = np.random.default_rng().integers(0, 96, MASK.shape)
    got = nvfp4jax.logprobs(model, ids, MASK, temperature=0.7)
    assert got.shape == MASK.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected(model, ids, MASK, 0.7), atol=2e-5)
    traced = jax.jit(lambda ids, mask: nvfp4jax.logprobs(model, ids, mask, temperature=0.7))(ids, MASK)
    np.testing.assert_allclose(traced, got, atol=1e-5)


@pytest.mark.slow
def test_a_trainers_gradient(monkeypatch):
    """Through the rollout's own forward, straight through the rounding, as if all logits were there."""
    small_parts(monkeypatch, 8)
    float_model = models.build(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32)
    q = nvfp4jax.quantize_model(float_model, nvfp4jax.Rule("layers/.*"))
    ids = np.random.default_rng().integers(0, 96, (2, 9))
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))

    def ours(model):
        return nvfp4jax.logprobs(nvfp4jax.straight_through(q, model), jnp.asarray(ids)).sum()

    def plain(model):
        logits = nvfp4jax.straight_through(q, model)(ids, positions).logits[:, :-1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], -1).sum()

    got, want = (nnx.to_flat_state(nnx.jit(nnx.grad(f))(float_model)) for f in (ours, plain))
    assert len(got) == len(want) > 10
    for (path, a), (_, b) in zip(got, want, strict=True):
        a, b = np.asarray(a.get_value()), np.asarray(b.get_value())
        assert np.abs(b).max() > 0, path
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7, err_msg=str(path))


def test_the_logits_of_all_tokens_never_exist(model, monkeypatch):
    small_parts(monkeypatch, 16)
    graphdef, params = nnx.split(model)

    def loss(params):
        return nvfp4jax.logprobs(nnx.merge(graphdef, params), jnp.zeros((2, 64), jnp.int32)).sum()

    text = jax.jit(jax.grad(loss, allow_int=True)).lower(params).as_text()
    assert "2x8x96xf32" in text and "2x63x96x" not in text and "2x64x96x" not in text


def test_what_a_rollout_says(model):
    q = nvfp4jax.quantize_model(model, nvfp4jax.Rule("layers/.*"))
    ids = np.random.default_rng().integers(0, 96, (2, 5))
    out = rollout.generate(q, ids, max_new_tokens=6, temperature=0.7, key=jax.random.key(0))
    whole = np.concatenate([ids, out.tokens], 1)
    np.testing.assert_allclose(nvfp4jax.logprobs(q, whole, temperature=0.7)[:, 5:], out.logprobs, atol=0.3)  # codes near a tie move


LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", head_dim=16)
DEEPSEEK = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32, norm_topk_prob=True, routed_scaling_factor=1.0,
    scoring_func="sigmoid", topk_method="noaux_tc", head_dim=8,
)  # fmt: skip
FP8 = jnp.float8_e4m3fn


@pytest.mark.parametrize("family", [{}, LLAMA, DEEPSEEK], ids=["qwen3", "llama", "deepseek"])
def test_an_fp8_cache(family):
    """What the head reads has the bits of a pass through an FP8 cache, and the values are its rollout's; gradients are near those of the
    forward that does not round."""
    model = models.build(CONFIG | dict(num_hidden_layers=2) | family, rngs=nnx.Rngs(0))
    q = nvfp4jax.quantize_model(model, nvfp4jax.Rule("layers/.*(o|down)_proj|layers/1/.*q_proj"))
    ids = np.random.default_rng(0).integers(0, 96, (3, 5))  # the bounds below were measured
    out = rollout.generate(q, ids, max_new_tokens=6, temperature=1.0, key=jax.random.key(0), cache_dtype=FP8)
    whole = jnp.concatenate([jnp.asarray(ids, jnp.int32), out.tokens], 1)
    positions = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32)[None], whole.shape)
    graphdef, params = nnx.split(q)

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        features = model.features(whole, positions, cache_dtype=FP8)
        return model.logits(features), model(whole, positions, model.init_cache(3, 11, FP8)).logits, model(whole, positions).logits

    rounded, through_cache, plain = both(params)
    np.testing.assert_array_equal(rounded, through_cache)
    assert (rounded != plain).mean() > 0.5
    got = nvfp4jax.logprobs(q, whole, cache_dtype=FP8)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(rounded)[:, :-1], whole[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(got[:, 1:], chosen, atol=1e-5)
    near = np.abs(np.asarray(got)[:, 5:] - np.asarray(out.logprobs))
    assert np.median(near) < 1e-5 and near.max() < 0.3, near  # XLA sums in another order in decode: codes near a tie move

    def gradient(cache_dtype):
        loss = lambda model: nvfp4jax.logprobs(nvfp4jax.straight_through(q, model), whole, cache_dtype=cache_dtype).sum()  # noqa: E731
        return nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model))

    def alike(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    paths, *both_ways = zip(*((p, *(np.asarray(x.get_value(), np.float64).ravel() for x in (a, b))) for (p, a), (_, b) in
                              zip(gradient(FP8), gradient(None), strict=True) if p[-1] != "e_score_correction_bias"), strict=True)  # fmt: skip
    assert {"k_proj", "kv_b_proj"} & {name for path in paths for name in path}
    for path, a, b in zip(paths, *both_ways, strict=True):
        assert alike(a, b) > 0.5, path  # NaN where either is all zeros
    assert alike(*map(np.concatenate, both_ways)) > 0.9


def test_the_rounding_of_a_cache():
    """As `generate` keeps keys and values: of a wider dtype nothing, of a narrower one its rounding, gradients as if there were none."""
    x, c = jax.random.normal(jax.random.key(0), (2, 3, 5, 16))
    for name, want in ((None, x), ("float32", x), ("bfloat16", x.astype(BF16).astype(jnp.float32)), (FP8, fp8.quantize(x).dequantize(jnp.float32))):
        dtype = None if name is None else jnp.dtype(name)
        f = jax.jit(lambda x, dtype=dtype: cache.as_read(x, dtype))
        np.testing.assert_array_equal(f(x), want)
        np.testing.assert_array_equal(jax.grad(lambda x, f=f: (f(x) * c).sum())(x), c)
    assert (cache.as_read(x.astype(BF16), jnp.dtype(jnp.float32)).dtype, cache.as_read(x.astype(BF16), jnp.dtype(FP8)).dtype) == (BF16, BF16)


class Plain(nnx.Module):
    """A decoder that gives all logits, or features that know no cache."""

    def __init__(self, inner):
        self.inner = inner

    def init_cache(self, *args):
        return self.inner.init_cache(*args)

    def __call__(self, *args, **options):
        return self.inner(*args, **options)


class WithoutCacheDtype(Plain):
    def features(self, tokens, positions, *, valid=None):
        return self.inner.features(tokens, positions, valid=valid)

    def logits(self, x, valid=None):
        return self.inner.logits(x, valid)


def test_a_model_of_your_own_with_an_fp8_cache(model):
    ids = np.random.default_rng().integers(0, 96, (2, 7))
    got, want = (nvfp4jax.logprobs(m, ids, cache_dtype=FP8) for m in (Plain(model), model))
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match=r"cache_dtype=float8_e4m3fn: WithoutCacheDtype.features has no argument cache_dtype"):
        nvfp4jax.logprobs(WithoutCacheDtype(model), ids, cache_dtype=FP8)


@pytest.mark.gpu
@pytest.mark.parametrize("tied, rule", [(False, "layers/.*"), (True, "layers/.*"), (False, "layers/1/.*")])
def test_the_bits_of_a_rollout(tied, rule):
    """On Hopper, in token mode: prefill, decode and this pass have one order of sums, in layers kept in bfloat16 too."""
    wide = dict(hidden_size=512, intermediate_size=1024, head_dim=128, vocab_size=16896, tie_word_embeddings=tied, num_hidden_layers=2,
                attention_bias=True)  # fmt: skip
    q = nvfp4jax.quantize_model(models.build(CONFIG | wide, rngs=nnx.Rngs(0)), nvfp4jax.Rule(rule))
    ids = np.random.default_rng().integers(0, 16896, (5, 40))
    mask = np.arange(40) < np.array([[40], [7], [33], [1], [12]])
    for cache_dtype in (None, FP8):
        out = rollout.generate(q, ids, mask, max_new_tokens=20, temperature=1.0, key=jax.random.key(0), cache_dtype=cache_dtype)
        whole, marks = np.concatenate([ids, out.tokens], 1), np.concatenate([mask, np.ones((5, 20), bool)], 1)
        got = np.asarray(nvfp4jax.logprobs(q, whole, marks, cache_dtype=cache_dtype))[:, 40:]
        np.testing.assert_array_equal(got.view(np.int32), np.asarray(out.logprobs).view(np.int32))


def test_bad_arguments(model):
    for arguments, options in (((np.zeros((2, 3)),), {}), ((np.full((1, 3), 96),), {}), ((np.zeros((1, 3), int), np.zeros((1, 2), int)), {}),
                               ((np.zeros((1, 3), int),), dict(temperature=0.0))):  # fmt: skip
        with pytest.raises(ValueError, match="input_ids|attention_mask|temperature"):
            nvfp4jax.logprobs(model, *arguments, **options)
