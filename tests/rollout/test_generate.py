"""The rollout against transformers' greedy tokens, a float64 oracle, and itself with other neighbours and padding."""

import dataclasses
import functools
import importlib
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import loading, oracle
from scripted import Scripted

import nvfp4jax
from nvfp4jax import models, rollout
from nvfp4jax.rollout import decoding, generate
from nvfp4jax.rollout.prompts import bucket, pack, pad_left

generating = importlib.import_module("nvfp4jax.rollout.generate")  # the package's `generate` is the function

NAMES = ("qwen3-tiny", "qwen3-moe-tiny")


@functools.cache
def model_of(name: str, scan: bool = False) -> nnx.Module:
    return loading.load(name, scan_layers=scan)


def prompts(name: str) -> tuple[np.ndarray, np.ndarray]:
    ref = loading.reference(name)
    return ref["input_ids"], ref["attention_mask"]


def assert_equal(a: rollout.Rollout, b: rollout.Rollout, rows=slice(None)):
    np.testing.assert_array_equal(a.tokens[rows], b.tokens)
    np.testing.assert_array_equal(a.lengths[rows], b.lengths)
    np.testing.assert_allclose(a.logprobs[rows], b.logprobs, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_the_reference(name, scan):
    out = generate(model_of(name, scan), *prompts(name), max_new_tokens=16)
    np.testing.assert_array_equal(out.tokens, loading.reference(name)["greedy_16"])
    assert out.lengths.tolist() == [16, 16, 16]


def test_tree_mode():
    with nnx.set_graph_mode(False):
        name = "qwen3-tiny"
        out = generate(loading.load(name, scan_layers=True), *prompts(name), max_new_tokens=16)
    np.testing.assert_array_equal(out.tokens, loading.reference(name)["greedy_16"])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_and_experts_against_the_oracle(temperature):
    """Each row by teacher forcing in float64: logprobs of what was drawn, and the experts of every token read."""
    name = "qwen3-moe-tiny"
    ids, mask = prompts(name)
    model = model_of(name)
    out = generate(
        model,
        ids,
        mask,
        max_new_tokens=9,
        temperature=temperature,
        top_k=40,
        top_p=0.9,
        key=jax.random.key(5),
        num_samples=2,
        return_experts=True,
    )
    assert out.tokens.shape == out.logprobs.shape == (6, 9) and out.logprobs.dtype == jnp.float32
    assert out.experts.shape == (4, 6, 9, 2) and out.prompt_experts.shape == (4, 3, 24, 2)
    config = {"mlp_only_layers": []} | loading.config(name)
    for row in range(6):
        prompt = ids[row // 2][mask[row // 2] == 1]
        text = np.concatenate([prompt, np.asarray(out.tokens[row])])
        logits, routed = oracle.forward(loading.weights(name), config, text[:-1])
        logits = logits[len(prompt) - 1 :] / (temperature or 1)
        logits -= logits.max(-1, keepdims=True)
        expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(9), out.tokens[row]]
        np.testing.assert_allclose(out.logprobs[row], expected, atol=3e-5)
        routed = np.stack(routed)
        np.testing.assert_array_equal(out.prompt_experts[:, row // 2][:, mask[row // 2] == 1], routed[:, : len(prompt)])
        np.testing.assert_array_equal(out.experts[:, row, :8], routed[:, len(prompt) :])
    assert (np.asarray(out.experts)[:, :, 8] == -1).all()  # the last token is never read
    assert (np.asarray(out.prompt_experts)[:, mask == 0] == -1).all()
    # Truncation at work: at 0.7 the two samples of a prompt differ, greedy ones do not.
    pairs = np.asarray(out.tokens).reshape(3, 2, 9)
    assert (pairs[:, 0] == pairs[:, 1]).all() == (temperature == 0)


class Unigram(nnx.Module):
    """A foreign model: the same logits at every step, whatever it reads."""

    def __init__(self, logits: np.ndarray):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def init_cache(self, batch, length, dtype=None):
        return ()

    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        steps = 1 if last is not None else tokens.shape[1]
        return models.Output(self.logits[...][None, None] + jnp.zeros((tokens.shape[0], steps, 1)), cache)


def test_steps_and_samples_draw_independently():
    """Counts of tokens, and of pairs in consecutive steps, neighbouring samples and rows, against exact chances."""
    p = np.asarray([0.5, 0.25, 0.15, 0.1])
    out = generate(
        Unigram(np.log(p)),
        np.zeros((8, 3), int),
        max_new_tokens=60,
        temperature=1.0,
        num_samples=10,
        key=jax.random.key(4),
    )
    tokens = np.asarray(out.tokens).reshape(8, 10, 60)
    np.testing.assert_allclose(out.logprobs, np.log(p)[out.tokens], rtol=1e-5)

    def chi_square(observed, chances):
        counts = np.bincount(observed.ravel(), minlength=chances.size)
        expected = observed.size * chances.ravel()
        return ((counts - expected) ** 2 / expected).sum()

    assert chi_square(tokens, p) < 3 + 6 * np.sqrt(6) + 12
    pairs = p[:, None] * p
    steps = 4 * tokens[:, :, 0::2] + tokens[:, :, 1::2]
    samples = 4 * tokens[:, 0::2] + tokens[:, 1::2]
    rows = 4 * tokens[0::2] + tokens[1::2]
    for joint in (steps, samples, rows):
        assert chi_square(joint, pairs) < 15 + 6 * np.sqrt(30) + 12


class Bigram(Unigram):
    """A foreign model that never looks at `valid`: the next token's logits from the last token, through one layer."""

    def __init__(self, rngs: nnx.Rngs):
        table = jax.random.uniform(rngs.params(), (32, 32), minval=-1.0)
        table = table.at[:, 0].set(1.0).at[0].set(1000.0)  # every token has an amax of 1, but token 0, the padding
        self.table = nnx.Param(table)
        self.head = nnx.Linear(32, 32, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        logits = self.head(self.table[...][tokens]).at[..., 0].set(-1e9)
        if last is not None:
            logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)
        return models.Output(logits, cache)


def test_any_models_nvfp4_layers_see_valid_rows_alone():
    """Padding and finished rows, both loud, change no bit of a per-tensor scaled layer in a foreign model."""
    model = nvfp4jax.quantize_model(Bigram(nnx.Rngs(0)), nvfp4jax.Rule("head", scaling="tensor"))
    ids = np.arange(1, 49).reshape(3, 16) % 31 + 1
    settings = dict(max_new_tokens=16, temperature=1.0, key=jax.random.key(0))
    base = generate(model, ids, **settings)  # 16 is a bucket: no padding, and no row ends
    assert (np.asarray(base.tokens) != 0).all()
    padded = generate(model, np.pad(ids, ((0, 0), (5, 0))), np.pad(np.ones_like(ids), ((0, 0), (5, 0))), **settings)
    np.testing.assert_array_equal(padded.tokens, base.tokens)
    np.testing.assert_array_equal(padded.logprobs, base.logprobs)
    ended = generate(model, ids, stop_tokens=[int(base.tokens[0, 3])], **settings)
    lengths = ended.lengths.tolist()
    assert min(lengths) <= 4 and max(lengths) >= min(lengths) + 2
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(ended.tokens[row, :length], base.tokens[row, :length])
        np.testing.assert_array_equal(ended.logprobs[row, :length], base.logprobs[row, :length])


def test_padding_of_every_kind():
    """Left, right, with gaps, more of it, or none: the same rows."""
    name = "qwen3-moe-tiny"
    ids, mask = prompts(name)
    model = model_of(name, True)
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.95, key=jax.random.key(2), return_experts=True)
    base = generate(model, ids, mask, **settings)
    junk = np.full((3, 9), 77)
    wide = generate(model, np.concatenate([junk, ids], 1), np.concatenate([junk * 0, mask], 1), **settings)
    assert_equal(base, wide)
    np.testing.assert_array_equal(wide.prompt_experts[:, :, 9:], base.prompt_experts)
    right = np.argsort(mask == 0, axis=1, kind="stable")
    moved = generate(model, np.take_along_axis(ids, right, 1), np.take_along_axis(mask, right, 1), **settings)
    assert_equal(base, moved)
    gaps = np.insert(ids, [3, 20, 20], 9, axis=1), np.insert(mask, [3, 20, 20], 0, axis=1)
    gapped = generate(model, *gaps, **settings)
    assert_equal(base, gapped)
    np.testing.assert_array_equal(np.delete(gapped.prompt_experts, [3, 21, 22], axis=2), base.prompt_experts)
    # A row alone: row 0 keeps its key, its tokens and its logprobs without its neighbours.
    assert_equal(base, generate(model, ids[:1], mask[:1], **settings), slice(0, 1))
    assert_equal(base, generate(model, ids, mask, cache_length=36, **settings))


def test_stop_tokens_end_a_row():
    name = "qwen3-tiny"
    ids, mask = prompts(name)
    model = model_of(name)
    free = np.asarray(generate(model, ids, mask, max_new_tokens=16).tokens)
    stops = [int(free[0, 4]), int(free[1, 9])]
    out = generate(model, ids, mask, max_new_tokens=16, stop_tokens=stops, pad_id=511)
    for row in range(3):
        hits = np.flatnonzero(np.isin(free[row], stops))
        length = hits[0] + 1 if hits.size else 16
        assert out.lengths[row] == length
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        assert (np.asarray(out.tokens)[row, length:] == 511).all()
        assert (np.asarray(out.logprobs)[row, length:] == 0).all()
        assert (np.asarray(out.logprobs)[row, :length] < 0).all()
    assert sorted(out.lengths.tolist())[0] < 16


def rollout_arguments(
    model, ids, mask, new_tokens, *, stop=(), samples=1, temperature=None, slots=None, return_experts=False
):
    """What `generate` hands to the jitted core, without its buckets."""
    settings = decoding.Settings(
        new_tokens,
        slots or ids.shape[1] + new_tokens,
        samples,
        rollout.Sampling(greedy=temperature is None),
        return_experts=return_experts,
    )
    controls = decoding.Controls(jnp.float32(temperature or 1), jnp.float32(1), jnp.asarray(stop, jnp.int32))
    graphdef, params = nnx.split(model)
    packed = pack(np.asarray(ids), np.asarray(mask) == 1)
    return graphdef, params, jnp.asarray(packed.ids), jnp.asarray(packed.lengths), controls, settings


def test_the_loop_ends_when_all_rows_have():
    """Early exit: the number of steps is that of the longest row."""
    name = "qwen3-tiny"
    ids, mask = prompts(name)
    model = model_of(name)
    free = np.asarray(generate(model, ids, mask, max_new_tokens=16).tokens)
    stops = [int(free[row, 3 + row]) for row in range(3)]
    ends = [np.flatnonzero(np.isin(free[row], stops))[0] + 1 for row in range(3)]
    graphdef, params, tokens, valid, controls, settings = rollout_arguments(model, ids, mask, 16, stop=stops)
    state = decoding.rollout(graphdef, params, tokens, valid, jax.random.key(0), jnp.int32(16), controls, settings)
    assert int(state.step) == max(ends) < 16
    assert state.lengths.tolist() == ends


def test_finished_rows_leave_the_amax():
    """Per-tensor scales: once row 1 has stopped, row 0 goes on bit for bit as it does beside a row of nothing."""
    name = "qwen3-tiny"
    ids, mask = prompts(name)
    model = nvfp4jax.quantize_model(model_of(name, True), nvfp4jax.Rule(r"layers/.*", scaling="tensor"))
    graphdef, params, tokens, valid, controls, settings = rollout_arguments(model, ids, mask, 8, temperature=1.0)
    prefill = jax.jit(decoding.prefill, static_argnums=6)
    decode = jax.jit(decoding.decode, static_argnums=5)
    state = prefill(graphdef, params, tokens, valid, rollout.row_keys(jax.random.key(1), 3, 1), controls, settings)
    runs = []
    for last in (5, 300):  # two different last tokens of the stopped rows
        done = jnp.asarray([False, True, True])
        at = dataclasses.replace(state, done=done, token=jnp.where(done, last, state.token))
        runs.append(decode(graphdef, params, at, jnp.int32(8), controls, settings))
    np.testing.assert_array_equal(runs[0].tokens[0], runs[1].tokens[0])
    np.testing.assert_array_equal(runs[0].logprobs[0], runs[1].logprobs[0])
    assert runs[0].lengths.tolist() == [8, 1, 1]
    # While they run, they do count.
    runs = []
    for last in (5, 300):
        at = dataclasses.replace(state, token=state.token.at[1:].set(last))
        runs.append(decode(graphdef, params, at, jnp.int32(8), controls, settings))
    assert (np.asarray(runs[0].logprobs[0]) != np.asarray(runs[1].logprobs[0])).any()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_decode_in_chunks_and_with_new_weights_between(scan):
    """An engine's way: a prefill, then chunks, equal to one call; then new weights from a step on, compiled once."""
    name = "qwen3-tiny"
    ids, mask = prompts(name)
    model = model_of(name, scan)
    graphdef, params, tokens, valid, controls, settings = rollout_arguments(
        model, ids, mask, 12, samples=2, temperature=1.0
    )
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return decoding.decode(*args)

    prefill = jax.jit(decoding.prefill, static_argnums=6)
    decode = jax.jit(counted, static_argnums=5, donate_argnums=2)

    def start():
        keys = rollout.row_keys(jax.random.key(3), 3, 2)
        return prefill(graphdef, params, tokens, valid, keys, controls, settings)

    state = start()
    for limit in (3, 4, 9, 12):
        state = decode(graphdef, params, state, jnp.int32(limit), controls, settings)
        assert int(state.step) == limit
    whole = decoding.rollout(graphdef, params, tokens, valid, jax.random.key(3), jnp.int32(12), controls, settings)
    np.testing.assert_array_equal(state.tokens, whole.tokens)
    np.testing.assert_allclose(state.logprobs, whole.logprobs, atol=1e-5)
    other = jax.tree.map(lambda x: x * 1.5, params)
    swapped = decode(graphdef, params, start(), jnp.int32(6), controls, settings)
    swapped = decode(graphdef, other, swapped, jnp.int32(12), controls, settings)
    np.testing.assert_array_equal(swapped.tokens[:, :6], whole.tokens[:, :6])
    assert (np.asarray(swapped.tokens)[:, 6:] != np.asarray(whole.tokens)[:, 6:]).any()
    assert traces == 1


@pytest.mark.slow
def test_new_weights_never_retrace(monkeypatch):
    """20 swaps of NVFP4 weights, other limits and temperatures: one trace, one program; each swap takes effect."""
    name = "qwen3-tiny"
    ids, mask = prompts(name)
    base = loading.load(name)
    model = models.stack_layers(nvfp4jax.quantize_model(base, nvfp4jax.Rule(r"layers/.*")))
    calls = []
    inner = models.Qwen3.__call__
    monkeypatch.setattr(
        models.Qwen3, "__call__", lambda self, *args, **kwargs: calls.append(1) or inner(self, *args, **kwargs)
    )
    common = dict(key=jax.random.key(0), stop_tokens=(3,))
    first = generate(model, ids, mask, max_new_tokens=10, temperature=1.0, **common)
    assert len(calls) >= 2  # prefill and decode were traced
    traced = len(calls)
    requantize = jax.jit(lambda state: nvfp4jax.quantize_params(state, model))
    state = nnx.state(models.stack_layers(base))
    seen = {np.asarray(first.tokens).tobytes()}
    programs = decoding.rollout._cache_size()
    drift = jax.jit(
        lambda state, key: jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape, x.dtype), state)
    )
    for swap in range(20):
        state = drift(state, jax.random.key(swap))
        new = requantize(state)
        # From a checkpoint arrays come committed to their device, from a trainer's jit they do not.
        nnx.update(model, jax.device_put(new, jax.devices()[0]) if swap % 2 else new)
        out = generate(model, ids, mask, max_new_tokens=9 + swap % 7, temperature=0.5 + swap / 20, **common)
        seen.add(np.asarray(out.tokens).tobytes())
    assert len(calls) == traced
    assert decoding.rollout._cache_size() == programs
    assert len(seen) == 21
    generate(model, ids, mask, max_new_tokens=40, temperature=1.0, **common)  # another bucket: this one does
    assert len(calls) > traced


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(num_samples=0), "num_samples=0"),
        (dict(swap_every=0), "swap_every=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1.0), "key is None"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(cache_length=20), r"input_ids \[3, 24\].*need 28 slots.*cache_length=20"),
        (dict(cache_length=27), r"need 28 slots.*cache_length=27"),
        (dict(input_ids=np.zeros(4, int)), r"input_ids int64 \[4\]"),
        (dict(input_ids=np.zeros((3, 0), int)), r"input_ids int64 \[3, 0\]"),
        (dict(input_ids=np.zeros((3, 24))), "input_ids float64"),
        (dict(input_ids=np.full((3, 24), 512)), r"input_ids\[0, 0\]=512 is outside the vocabulary of 512"),
        (dict(input_ids=np.full((3, 24), -1)), r"input_ids\[0, 0\]=-1"),
        (dict(attention_mask=np.ones((3, 23))), r"attention_mask \[3, 23\].*\[3, 24\]"),
        (dict(attention_mask=np.eye(3, 24) * [[1], [0], [1]]), "attention_mask: row 1 has no token"),
        (dict(return_experts=True), "no mixture-of-experts layer"),
        (dict(attention_mask=np.full((3, 24), -1e9)), "attention_mask holds -1000"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5: an integer"),
        (dict(temperature="hot"), "temperature=hot: a number"),
        (dict(temperature=0.5, key=0), "key=0: a PRNG key is needed"),
        (dict(stop_tokens=5), "stop_tokens=5: a sequence"),
        (dict(stop_tokens=None), "stop_tokens=None"),
        (dict(stop_tokens=np.array(5)), "stop_tokens=5: a sequence"),
        (dict(stop_tokens=[2**40]), "stop_tokens=1099511627776: at most"),
        (dict(stop_tokens=[[5, 6], [7, 8]]), r"stop_tokens=\[5, 6\]: an integer"),
        (dict(stop_tokens=[[5, 6], [7]]), r"stop_tokens=\[5, 6\]: an integer"),
        (dict(stop_tokens={5: 1}), "stop_tokens={5: 1}: a sequence"),
        (dict(max_new_tokens=2**40), "max_new_tokens=1099511627776: at most"),
        (dict(num_samples=10**9), "num_samples=1000000000: at most"),
        (dict(cache_length=2**40), "cache_length=1099511627776: at most"),
        (dict(temperature=1e-38, key=jax.random.key(0)), "temperature=1e-38: 0 .greedy., or at least 1e-6"),
        (dict(logit_bias=dict.fromkeys(range(512), -np.inf)), "logit_bias: -inf for each of the 512 tokens"),
        (dict(max_new_tokens=2**31 - 1), r"max_new_tokens=2147483647 need more than the 2147483647 slots"),
        (dict(attention_mask=[[1, 1], [1]]), r"attention_mask: rows of different lengths; the shape of input_ids, \["),
    ],
)
def test_bad_arguments(arguments, words, unchecked):
    ids, mask = prompts("qwen3-tiny")
    good = dict(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(ValueError, match=words) as error:
        generate(model_of("qwen3-tiny"), **(good | arguments))
    assert "\n" not in str(error.value)


def test_traced_prompts_are_refused(unchecked):
    model = model_of("qwen3-tiny")  # loaded outside jit
    for arguments in ({"input_ids": jnp.ones((1, 2), jnp.int32)}, {"attention_mask": jnp.ones((1, 2), jnp.int32)}):
        call = lambda traced: generate(model, **({"input_ids": np.ones((1, 2), int)} | traced), max_new_tokens=2).tokens  # noqa: E731
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: traced by jit") as error:
            jax.jit(call)(arguments)
        assert "\n" not in str(error.value)


def test_prompts_to_pad(unchecked):
    ids, mask = pad_left([[1, 2], [3]])
    assert ids.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[True, True], [False, True]]
    for row in ([1.5], [2**64], ["1"], [True]):
        with pytest.raises(ValueError, match="prompt 1: token=.*(integer|at most)"):
            pad_left([[1], row])


def test_stop_tokens_may_be_a_set(unchecked):
    model = Unigram(np.log([0.4, 0.3, 0.2, 0.1]))
    assert generate(model, [[1, 2]], max_new_tokens=3, stop_tokens={0, 3}).lengths.tolist() == [1]


@dataclasses.dataclass
class PlainConfig:
    """Not frozen: with __eq__ and without a hash."""

    vocab_size: int = 4


def test_foreign_models(unchecked):
    """A config that cannot be hashed, scalars of numpy and jax; a vocabulary from the config; two calls trace once."""
    model = Unigram(np.log([0.4, 0.3, 0.2, 0.1]))
    model.config = PlainConfig()
    with pytest.raises(TypeError, match="unhashable"):
        hash(model.config)
    settings = dict(max_new_tokens=np.int64(3), temperature=jnp.float32(0.5), key=jax.random.key(0))
    out = generate(model, np.array([[1, 2]]), **settings)
    assert out.tokens.shape == (1, 3)
    programs = decoding.rollout._cache_size()
    again = nnx.clone(model)
    again.config = PlainConfig()  # another object, equal
    assert_equal(out, generate(again, np.array([[1, 2]]), **settings))
    assert decoding.rollout._cache_size() == programs
    with pytest.raises(ValueError, match="outside the vocabulary of 4"):
        generate(model, [[1, 4]], **settings)
    with pytest.raises(ValueError, match="return_experts: Unigram has no mixture-of-experts layer"):
        generate(model, np.array([[1, 2]]), return_experts=True, **settings)
    leaves, tree = jax.tree.flatten(out)  # a pytree
    assert len(leaves) == 3 and jax.tree.unflatten(tree, leaves).weight_versions is None


class Mute(Unigram):
    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        return jnp.zeros((*tokens.shape, 4)), cache


class Wordy(Unigram):
    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        return models.Output(jnp.zeros((*tokens.shape, 4)), cache)


@pytest.mark.parametrize("kind, words", [(Mute, "Mute gave a tuple; a decoder gives a nvfp4jax.models.Output"), (Wordy, r"logits \[1, 16, 4\]")])
def test_models_that_break_the_protocol_are_told(kind, words):
    with pytest.raises(ValueError, match=words):
        generate(kind(np.zeros(4)), np.array([[1, 2]]), max_new_tokens=2)


def test_buckets():
    lengths = np.arange(1, 5000)
    sizes = np.asarray([bucket(int(n)) for n in lengths])
    assert (sizes >= lengths).all() and (np.diff(sizes) >= 0).all()
    assert (sizes <= np.maximum(lengths * 1.125 + 1, lengths + 15)).all()
    assert len(set(sizes.tolist())) < 60


def test_the_first_columns_of_packed_prompts():
    """As packed in so many columns; as they were where there are no more."""
    rng = np.random.default_rng()
    ids, mask = rng.integers(1, 99, (4, 23)), rng.random((4, 23)) < 0.5
    mask[:, 0] = True
    longest = int(mask.sum(1).max())
    whole = pack(ids, mask, 32)
    for columns in (longest, int(rng.integers(longest, 32)), 32, 50):
        for a, b in zip(whole.cut(columns), pack(ids, mask, min(columns, 32)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_raw_keys_and_masks_of_pads():
    """A legacy uint32 key samples as the typed key does; the ids under the mask are never looked at."""
    ids, mask = prompts("qwen3-tiny")
    model = model_of("qwen3-tiny")
    key = jax.random.key(9)
    typed = generate(model, ids, mask, max_new_tokens=16, temperature=1.0, key=key)
    raw = generate(
        model, np.where(mask == 1, ids, -100), mask, max_new_tokens=16, temperature=1.0, key=jax.random.key_data(key)
    )
    assert_equal(typed, raw)


def shifted(state: nnx.State, by: float) -> nnx.State:
    return jax.tree.map(lambda x: x * jnp.asarray(1 + by, x.dtype), state)


def one_by_one(model, states, ids, mask, new_tokens, *, key, temperature, stop):
    """The oracle: the model called once a token on a batch without padding slots, weights states[n] for the n-th token,
    all bookkeeping in numpy. One sample a prompt; every prompt as long as the others."""
    graphdef, _ = nnx.split(model)
    assert mask.all()
    rows, length = ids.shape

    @jax.jit
    def call(state, tokens, positions, cache):
        out = nnx.merge(graphdef, state)(tokens, positions, cache)
        return out.logits, out.cache

    cache = model.init_cache(rows, length + new_tokens, None)
    read = jnp.asarray(ids, jnp.int32)
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))
    keys = rollout.row_keys(key, rows, 1)
    tokens, logprobs = np.zeros((rows, new_tokens), int), np.zeros((rows, new_tokens))
    lengths, alive = np.zeros(rows, int), np.ones(rows, bool)
    for n in range(new_tokens):
        logits, cache = call(states[n], read, positions, cache)
        for row in np.flatnonzero(alive):
            scaled = np.asarray(logits[row, -1], np.float64) / temperature
            drawn = int(jax.random.categorical(jax.random.fold_in(keys[row], n), logits[row, -1] / temperature))
            tokens[row, n] = drawn
            logprobs[row, n] = scaled[drawn] - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum())
            lengths[row] += 1
        alive &= ~np.isin(tokens[:, n], stop)
        read = jnp.asarray(tokens[:, n : n + 1], jnp.int32)
        positions = jnp.full((rows, 1), length + n, jnp.int32)
    return tokens, logprobs, lengths


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_new_weights_in_flight_against_an_oracle(scan):
    """Weights swapped twice during a rollout: each token from the weights that its version names, over the old cache."""
    name = "qwen3-tiny"
    ids = prompts(name)[0][:, -12:]
    model = nnx.clone(model_of(name, scan))
    first = nnx.state(nnx.clone(model))
    second, third = shifted(first, 0.2), shifted(first, -0.15)
    common = dict(key=jax.random.key(8), temperature=0.8)
    states = [first] * 5 + [second] * 4 + [third] * 3  # looks 1, 2, 3...: before tokens 0, 1, 5, 9
    free = one_by_one(model, states, ids, np.ones_like(ids), 12, stop=(), **common)[0]
    stop = (int(free[1, 6]),)
    tokens, logprobs, lengths = one_by_one(model, states, ids, np.ones_like(ids), 12, stop=stop, **common)
    source = Scripted({3: (5, second), 4: (9, third)})
    out = generate(model, ids, max_new_tokens=12, stop_tokens=stop, pad_id=7, weights=source, swap_every=4, **common)
    np.testing.assert_array_equal(out.lengths, lengths)
    assert lengths[1] < 12 and lengths.max() == 12
    versions = np.asarray([3] * 5 + [5] * 4 + [9] * 3)
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(out.tokens[row, :n], tokens[row, :n])
        np.testing.assert_allclose(out.logprobs[row, :n], logprobs[row, :n], atol=2e-5)
        np.testing.assert_array_equal(out.weight_versions[row], np.where(np.arange(12) < n, versions, -1))
    assert out.weight_versions.dtype == np.int64 and (np.asarray(out.tokens)[1, lengths[1] :] == 7).all()
    # The swaps matter, and the newest weights stay in the model.
    stale = generate(model_of(name, scan), ids, max_new_tokens=12, **common)
    assert (np.asarray(stale.tokens)[:, :5] == free[:, :5]).all() and (np.asarray(stale.tokens) != free).any()
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(third), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_chunks_with_nothing_to_swap_are_the_undivided_rollout(name):
    """Whatever the chunks, the bits of one rollout; the versions name the weights that served; padding has none."""
    ids, mask = prompts(name)
    model = nvfp4jax.quantize_model(model_of(name, True), nvfp4jax.Rule(r"layers/.*", scaling="tensor"))
    common = dict(
        max_new_tokens=11, temperature=1.0, num_samples=2, key=jax.random.key(2), return_experts="moe" in name
    )
    free = generate(model, ids, mask, **common)
    assert free.weight_versions is None
    common["stop_tokens"] = (int(free.tokens[0, 5]), int(free.tokens[3, 2]))
    whole = generate(model, ids, mask, **common)
    for swap_every in (1, 4, 100):
        source = Scripted({})
        out = generate(model, ids, mask, weights=source, swap_every=swap_every, **common)
        for field in ("tokens", "lengths", "logprobs", "experts", "prompt_experts"):
            a, b = getattr(whole, field), getattr(out, field)
            assert (a is None) == (b is None) and (a is None or np.asarray(a).tobytes() == np.asarray(b).tobytes()), field
        expected = np.where(np.arange(11) < np.asarray(whole.lengths)[:, None], 3, -1)
        np.testing.assert_array_equal(out.weight_versions, expected)
        longest = int(max(whole.lengths))
        assert source.looks == min(1 + -(-10 // swap_every), 1 + max(1, -(-(longest - 1) // swap_every)))


def test_swaps_in_flight_compile_nothing():
    """Two programs, a prefill and a chunk, for any weights, limit and length of a chunk."""
    name = "qwen3-tiny"
    ids, mask = prompts(name)
    model = nvfp4jax.quantize_model(model_of(name, True), nvfp4jax.Rule(r"layers/.*"))
    state = nnx.state(nnx.clone(model))
    made = jax.jit(lambda: shifted(nnx.state(model_of(name, True)), 0.1))()
    made = nvfp4jax.quantize_params(made, model)  # not committed to a device
    put = jax.device_put(made, jax.devices()[0])  # committed, as restored ones are
    generate(model, ids, mask, max_new_tokens=10, weights=Scripted({}), swap_every=3)
    sizes = generating._prefill._cache_size(), generating._decode._cache_size()
    before = decoding.rollout._cache_size()
    compiled = []
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("jax._src.dispatch"), "propagate", False)
        handler = logging.Handler()
        handler.emit = lambda record: compiled.append(record.getMessage())
        logging.getLogger("jax._src.dispatch").addHandler(handler)
        for new_tokens, swap_every in ((10, 3), (16, 5), (12, 1)):
            source = Scripted({2: (4, made), 3: (5, put), 4: (6, state)})
            out = generate(model, ids, mask, max_new_tokens=new_tokens, weights=source, swap_every=swap_every)
            assert len(set(np.asarray(out.weight_versions).reshape(-1).tolist())) == 4
        logging.getLogger("jax._src.dispatch").removeHandler(handler)
    assert (generating._prefill._cache_size(), generating._decode._cache_size()) == sizes
    assert decoding.rollout._cache_size() == before
    assert not [line for line in compiled if "decode" in line or "prefill" in line]


def test_weights_of_another_tree_are_refused():
    name = "qwen3-tiny"
    model = model_of(name)
    with pytest.raises(ValueError, match="weights: the state of step 8 has another tree"):
        generate(model, *prompts(name), max_new_tokens=2, weights=Scripted({1: (8, nnx.State({}))}))


@pytest.mark.parametrize("rows_in_flight", [None, 1])
def test_weights_that_do_not_fit_leave_the_model_as_it_was(rows_in_flight):
    """Before anything runs: no program is made."""
    name = "qwen3-tiny"
    model = model_of(name)
    state = nnx.state(model)
    before = jax.tree.map(np.asarray, state)
    half = jax.tree.map(lambda x: x[: len(x) // 2], state)
    for source, message in (
        (Scripted({1: (8, half)}), r"weights: step 8 has .*embed_tokens/embedding.* as \w+ \[.*\], the model as \w+ \["),
        (Scripted({1: (8, jax.tree.map(lambda x: x.astype(jnp.float16), state))}), "weights: step 8 has .* as float16"),
        (Scripted({1: ("a", state)}), "weights: step=a: an integer is needed"),
        (Scripted({}, active_step=None), "weights: active_step=None: an integer is needed"),
        (types.SimpleNamespace(active_step=0, take=lambda: state), r"weights: take\(\) gave State .*: None, or an object with `state` and `step`"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, *prompts(name), max_new_tokens=2, weights=source, rows_in_flight=rows_in_flight)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
