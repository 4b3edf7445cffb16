"""Prompts held once for all their samples: the tokens and logprobs of a rollout that repeats them."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import loading

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.models import cache
from nvfp4jax.rollout import Controls, Sampling, Settings, decode, prefill, row_keys
from nvfp4jax.rollout.generate import _split
from nvfp4jax.rollout.prompts import bucket, common, pack, repeats

generating = importlib.import_module("nvfp4jax.rollout.generate")  # the package's `generate` is the function

SAMPLES, NEW = 3, 5


def prompts(lengths, vocabulary=500):
    ids = np.random.default_rng().integers(1, vocabulary, (len(lengths), max(lengths)))
    return jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32)


@functools.cache
def compiled():
    return jax.jit(prefill, static_argnames="settings"), jax.jit(decode, static_argnames="settings")


def run(model, ids, lengths, share, limits=(NEW,)):
    """Shared, or in a cache as long as what the shared one is together, so that XLA sums alike."""
    graphdef, params, seen = _split(model)
    steps = ids.shape[1]
    settings = Settings(NEW, steps + NEW + (0 if share else 128), SAMPLES, Sampling(greedy=False), share_prompts=share)
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros(0, jnp.int32))
    start, go_on = compiled()
    state = start(graphdef, params, ids, lengths, row_keys(jax.random.key(3), len(ids), SAMPLES), controls, settings, seen)
    for limit in limits:
        state = go_on(graphdef, params, state, jnp.int32(limit), controls, settings)
    return state


def quantized(model):
    return nvfp4jax.quantize_model(model, nvfp4jax.Rule(r"layers/.*(_proj|experts)", scaling="token"))


@pytest.mark.parametrize("name, scan, quantize", [
    ("qwen3-tiny", True, False), pytest.param("qwen3-tiny", False, False, marks=pytest.mark.slow),
    pytest.param("qwen3-moe-tiny", True, True, marks=pytest.mark.slow), pytest.param("deepseek-v3-tiny", True, False, marks=pytest.mark.slow)])
def test_bits_of_a_rollout_that_repeats_them(name, scan, quantize):
    """Ragged prompts: one of no whole step of 128 slots, one of whole steps alone, decoded in chunks."""
    model = loading.load(name, jnp.bfloat16 if quantize else jnp.float32, scan_layers=scan)
    model = quantized(model) if quantize else model
    ids, lengths = prompts([60, 256, 200, 270])
    shared, repeated = run(model, ids, lengths, True, (2, NEW)), run(model, ids, lengths, False)
    np.testing.assert_array_equal(shared.tokens, repeated.tokens)
    np.testing.assert_array_equal(shared.logprobs, repeated.logprobs)
    assert isinstance(shared.cache, cache.SharedCache) and (np.asarray(shared.cache.slots) == np.repeat([0, 256, 128, 256], SAMPLES)).all()
    rows = lambda kv: {x.value.shape[x.batch] for x in cache.arrays(kv)}
    assert rows(shared.cache.shared) == {4} and rows(shared.cache.own) == {4 * SAMPLES} and cache.length(shared.cache.own) == 128 + NEW


def repeated(kv):
    """A SharedCache as one that holds all slots of each row; as long as its parts together, so that XLA sums alike."""
    slots = np.asarray(kv.slots)

    def whole(own, shared, first):
        rows, axis = own.value.ndim + own.batch, own.value.ndim + own.slots
        front = lambda x: np.moveaxis(np.asarray(x.value), (rows, axis), (0, 1))
        own_rows, shared_rows, first_rows = front(own), front(shared), front(first)
        length, out = own_rows.shape[1] + shared_rows.shape[1] + first_rows.shape[1], []
        for b, row in enumerate(own_rows):
            held = np.concatenate([first_rows[0], shared_rows[b // (len(own_rows) // len(shared_rows))]])[:slots[b]]
            row = np.concatenate([held, row])
            out.append(np.concatenate([row, np.zeros((length - len(row), *row.shape[1:]), row.dtype)]))
        return dataclasses.replace(own, value=jnp.asarray(np.moveaxis(np.stack(out), (0, 1), (rows, axis))))

    return jax.tree.map(whole, kv.own, kv.shared, kv.prefix, is_leaf=lambda x: isinstance(x, cache.CacheArray))


@pytest.mark.parametrize("name, scan, lengths, prefix", [
    ("qwen3-tiny", True, [257, 384, 200, 129], 128), pytest.param("qwen3-tiny", False, [300, 257], 256, marks=pytest.mark.slow),
    pytest.param("deepseek-v3-tiny", True, [150, 130, 270], 128, marks=pytest.mark.slow)])
def test_bits_behind_what_all_prompts_begin_with(name, scan, lengths, prefix):
    """Held once, each prompt's part behind it once; the samples decode as behind copies of both. Prompts of which nothing but the prefix, a
    step and one token more, whole steps alone."""
    model = loading.load(name, jnp.float32, scan_layers=scan)
    graphdef, params, seen = _split(model)
    ids, lengths = prompts(lengths)
    steps = ids.shape[1]
    ids = ids.at[:, :prefix].set(ids[:1, :prefix])
    settings = Settings(NEW, steps + NEW, SAMPLES, Sampling(greedy=False), share_prompts=True, prefix=prefix)
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros(0, jnp.int32))
    start, go_on = compiled()
    state = start(graphdef, params, ids, lengths, row_keys(jax.random.key(3), len(ids), SAMPLES), controls, settings, seen)
    kv = state.cache
    np.testing.assert_array_equal(kv.slots, np.repeat(lengths // 128 * 128, SAMPLES))
    sizes = [{(x.value.shape[x.batch], x.value.shape[x.slots]) for x in cache.arrays(part)} for part in (kv.prefix, kv.shared, kv.own)]
    assert sizes == [{(1, prefix)}, {(len(ids), steps - prefix)}, {(len(ids) * SAMPLES, 128 + NEW)}]
    copied = dataclasses.replace(state, cache=repeated(kv))
    found, expected = (go_on(graphdef, params, s, jnp.int32(NEW), controls, settings) for s in (state, copied))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)


class NothingNew:
    active_step = 3

    def take(self):
        return None


def unshared(model, monkeypatch, *args, **options):
    with monkeypatch.context() as m:
        m.setattr(type(model), "takes_shared_cache", False)
        return nvfp4jax.generate(model, *args, **options)


def assert_near(a, b):
    for name in ("tokens", "lengths", "experts", "prompt_experts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("samples, weights, common, lengths, begin", [
    (1, None, 150, (190, 151, 160), 144), *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        (2, NothingNew(), 150, (190, 151, 160), 144), (3, None, 256, (256, 257, 300), 240), (2, None, 256, (257, 258), 256),
        (2, None, 100, (190, 151, 160), 0)))])  # fmt: skip
def test_what_all_prompts_begin_with_runs_once(monkeypatch, samples, weights, common, lengths, begin):
    """Whole steps of 16 of the tokens in common, where they are 128 at least, one prompt's last token none of them; padding on the left,
    which the prompts' own lengths do not follow."""
    model = loading.load("qwen3-moe-tiny", scan_layers=True)
    rng, longest = np.random.default_rng(), max(lengths)
    ids = rng.integers(1, 500, (len(lengths), longest))
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    first = rng.integers(1, 500, common)
    for row, length in zip(ids, lengths, strict=True):
        row[longest - length:][:common] = first
    options = dict(max_new_tokens=4, temperature=1.0, key=jax.random.key(1), num_samples=samples, return_experts=True)
    plain = unshared(model, monkeypatch, ids, mask, **options)
    calls = []
    inner = type(model).__call__
    monkeypatch.setattr(type(model), "__call__", lambda self, tokens, *a, **k: calls.append(tokens.shape) or inner(self, tokens, *a, **k))
    assert_near(nvfp4jax.generate(model, ids, mask, weights=weights, **options), plain)
    expected = [(1, begin), (len(ids), bucket(longest - begin))] if begin else [(len(ids), bucket(longest))]
    assert calls[:len(expected)] == expected and (np.asarray(plain.prompt_experts)[:, mask] >= 0).all()


@pytest.mark.parametrize("samples, temperature", [(1, 1.0), (2, 0.0)])
def test_an_fp8_cache_behind_any_number_of_tokens_in_common(monkeypatch, samples, temperature):
    """Those behind the last step of 128 are copied, codes and scales, into each row; of several samples they end in the prompts' steps."""
    model, rng = loading.load("qwen3-tiny", scan_layers=True), np.random.default_rng()
    common, lengths = int(rng.choice([n for n in range(150, 300) if n % 128 >= 16])), rng.integers(1, 60, 4)
    ids = rng.integers(1, 500, (4, common + lengths.max()))
    ids[:, :common], ids[:, common] = ids[0, :common], np.arange(1, 5)
    mask = np.arange(ids.shape[1]) < common + lengths[:, None]
    options = dict(max_new_tokens=5, temperature=temperature, key=jax.random.key(1), num_samples=samples, cache_dtype=jnp.float8_e4m3fn)
    plain = unshared(model, monkeypatch, ids, mask, **options)
    found = nvfp4jax.generate(model, ids, mask, **options)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-3)


@pytest.mark.slow
def test_a_prompt_given_several_times_in_a_row_runs_once(monkeypatch):
    """Its rows draw with their own keys, as they do beside a prompt that is given once."""
    model = loading.load("qwen3-moe-tiny", scan_layers=True)
    ids = np.random.default_rng().integers(1, 500, (3, 140)).repeat([2, 2, 1], 0)
    options = dict(max_new_tokens=4, temperature=1.0, key=jax.random.key(1), num_samples=2, return_experts=True)
    plain = unshared(model, monkeypatch, ids, **options)
    calls = []
    inner = type(model).__call__
    monkeypatch.setattr(type(model), "__call__", lambda self, tokens, *a, **k: calls.append(tokens.shape) or inner(self, tokens, *a, **k))
    out = nvfp4jax.generate(model, ids[:4], **options)
    assert calls[0] == (2, 144)
    assert_near(out, dataclasses.replace(
        plain, tokens=plain.tokens[:8], lengths=plain.lengths[:8], logprobs=plain.logprobs[:8], experts=plain.experts[:, :8],
        prompt_experts=plain.prompt_experts[:, :4]))  # fmt: skip


def test_repeats_and_what_is_common():
    def of(*rows):
        ids = np.zeros((len(rows), max(map(len, rows))), int)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = row
        return pack(ids, np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None])

    assert repeats(of([1], [1], [2], [2], [3], [3])) == 2 and repeats(of([1], [1], [1], [1], [2], [2])) == 2
    assert repeats(of([1], [2], [1], [2])) == repeats(of([1], [1], [1, 0], [1, 0], [3])) == 1 and repeats(of([7, 8], [7, 8], [7, 8])) == 3
    assert repeats(of([1], [1, 0])) == 1  # padding is no token
    assert common(of([1, 2, 3, 4], [1, 2, 5, 4])) == 2 and common(of([1, 2, 3], [1, 2, 3, 4])) == 2 and common(of([1, 2, 3])) == 0
    assert common(of([1, 2], [1, 2])) == 0 and common(of([1, 0], [1])) == 0 and common(of([2, 1], [3, 1])) == 0


def test_what_cannot_share_says_why(monkeypatch, caplog):
    generating._log_unshared.cache_clear()
    packed = pack(np.arange(300).reshape(1, 300) + 1, np.ones((1, 300), bool))
    with caplog.at_level("INFO", "nvfp4jax"):
        for _ in range(2):
            assert generating._sharing(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), packed, 1, 2) == {}
    assert [r.getMessage() for r in caplog.records] == [
        "generate: Linear takes no cache.SharedCache, so that each row holds its whole prompt"]  # fmt: skip
    two = pack(np.arange(300).reshape(1, 300).repeat(2, 0) + np.eye(2, 300, 299, int), np.ones((2, 300), bool))
    model = loading.load("qwen3-tiny", scan_layers=True)
    assert generating._sharing(model, two, 1, 1) == dict(share_prompts=False, prefix=256, common=288)
    with caplog.at_level("INFO", "nvfp4jax"):
        delayed = nvfp4jax.quantize_model(model, nvfp4jax.Rule("layers/.*_proj", scaling="delayed"))
        assert generating._sharing(delayed, two, 1, 2) == dict(share_prompts=True, prefix=0, common=0)
    assert "histories of amaxes" in caplog.records[-1].getMessage()


@pytest.mark.gpu
@pytest.mark.parametrize("scan", [True, False])
def test_bits_on_a_gpu(monkeypatch, scan):
    """Heads of 64, so that Hopper's kernels attend; samples, and a prefix, against rows that hold all of theirs."""
    config = loading.config("qwen3-moe-tiny") | dict(head_dim=64)
    model = quantized(models.build(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(int(np.random.default_rng().integers(2**31)))))
    model = models.stack_layers(model) if scan else model
    ids, lengths = prompts([60, 256, 200, 270])
    shared, repeated = run(model, ids, lengths, True, (2, NEW)), run(model, ids, lengths, False)
    np.testing.assert_array_equal(shared.tokens, repeated.tokens)
    np.testing.assert_array_equal(shared.logprobs, repeated.logprobs)
    ids = np.asarray(ids).copy()
    ids[:, :150] = ids[0, :150]
    mask = np.arange(270) < np.array([160, 256, 200, 270])[:, None]
    for samples, dtype in ((1, None), (3, None), (3, jnp.float8_e4m3fn)):
        options = dict(max_new_tokens=9, temperature=1.0, key=jax.random.key(1), num_samples=samples, cache_dtype=dtype)
        out, plain = nvfp4jax.generate(model, ids, mask, **options), unshared(model, monkeypatch, ids, mask, **options)
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        np.testing.assert_array_equal(out.logprobs, plain.logprobs)
