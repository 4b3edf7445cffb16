"""A queue of prompts against the same prompts one by one: the bits of each row, the order of the results, what is compiled and copied.

Most of it on a model of integers, whose sums are exact in any order: no batch, no place and no number of slots may change a bit.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import loading
from models.test_stacking import FREE, outside_fusions
from scripted import Scripted

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.models import cache
from nvfp4jax.rollout import generate, generate_text, queue
from nvfp4jax.rollout.prompts import bucket

decoding = importlib.import_module("nvfp4jax.rollout.decoding")
TOKENS, FEATURES = 40, 4
STOP = (5, 17, 31)


class Integers(nnx.Module):
    """The next token's logits are a table's entry for all that a row has read, its tokens and their positions, through a cache of two
    layers in a stack and one alone; exact in float32. A cache slot that is another row's, or an older one's, changes them."""

    takes_shared_cache = True

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.embedding = nnx.Param(jnp.asarray(rng.integers(-8, 8, (TOKENS, FEATURES)), jnp.float32))
        self.table = nnx.Param(jnp.asarray(rng.integers(-24, 24, (97, TOKENS)) / 8, jnp.float32))
        self.config = {"vocab_size": TOKENS}

    def init_cache(self, batch, length, dtype=None):
        return cache.init_cache([{"read": (2, None, FEATURES)}, {"read": (None, FEATURES)}], [2, None], batch, length, jnp.float32)

    def __call__(self, tokens, positions, kv, *, valid=None, last=None, return_experts=False):
        shared = isinstance(kv, cache.SharedCache)
        slots = kv.slots if shared else jnp.zeros(len(tokens), jnp.int32)
        weight = (positions % jnp.int32(7) + jnp.int32(1)).astype(jnp.float32)[..., None]
        new = self.embedding[...][tokens] * weight
        parts, sums = cache.parts(kv), []
        for i, part in enumerate(parts):
            for layer in (jnp.int32(0), jnp.int32(1)) if i == 0 else (None,):
                part = part._replace(layer=layer).write(positions[:, 0] - slots, read=new[:, :, None].repeat(2, 2) if i == 0 else new)
                pick = lambda x: x if layer is None else x[layer, :, layer]
                own = pick(part["read"])
                seen = jnp.arange(own.shape[1])[None, None] <= (positions - slots[:, None])[..., None]
                total = jnp.where(seen[..., None], own[:, None], jnp.float32(0)).sum(2)
                if shared:
                    first = pick(part.shared["read"].value)
                    if part.prefix is not None:
                        front = pick(part.prefix["read"].value)
                        first = jnp.concatenate([jnp.repeat(front, len(first), axis=0), first], 1)
                    first = jnp.repeat(first, len(tokens) // len(first), axis=0)
                    held = jnp.arange(first.shape[1])[None] < slots[:, None]
                    total = total + jnp.where(held[..., None], first, jnp.float32(0)).sum(1)[:, None]
                sums.append(total)
            parts[i] = part._replace(layer=None)
        written = tuple(part.arrays for part in parts)
        row = jnp.abs(sum(x.sum(-1) * jnp.float32(n + 1) for n, x in enumerate(sums))).astype(jnp.int32) % jnp.int32(97)
        experts = jnp.stack([(tokens + positions + jnp.int32(n))[..., None] % jnp.arange(5, 7, dtype=jnp.int32)[None, None] for n in range(3)])
        if last is not None:
            row = jnp.take_along_axis(row, last[:, None], axis=1)
        kv = dataclasses.replace(kv, own=written) if shared else written
        return models.Output(self.table[...][row], kv, experts if return_experts else None)


@functools.cache
def integers() -> Integers:
    return Integers()


def prompts(lengths, common=0):
    """Ragged, padded on the left; the first `common` tokens alike."""
    rng, width = np.random.default_rng(), max(lengths)
    ids = rng.integers(0, TOKENS, (len(lengths), width))
    for row, length in zip(ids, lengths, strict=True):
        row[width - length :][:common] = np.arange(common) % TOKENS
    return ids, np.arange(width) >= width - np.asarray(lengths)[:, None]


FIELDS = ("tokens", "lengths", "logprobs", "experts", "prompt_experts", "top_tokens", "top_logprobs", "weight_versions")


def assert_bits(found, expected):
    for field in FIELDS:
        a, b = getattr(found, field), getattr(expected, field)
        assert (a is None) == (b is None) and type(a) is type(b), field
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field)


def keys(number, start=11):
    return jax.vmap(jax.random.key)(jnp.arange(start, start + number))


SAMPLED = dict(temperature=1.0, top_k=9, repetition_penalty=1.2, top_logprobs=2, pad_id=-3)


@pytest.mark.parametrize("options, in_flight", [
    (dict(), [1]), (SAMPLED, [4]), pytest.param(SAMPLED, [1, 2, 9, 50], marks=pytest.mark.slow)], ids=["greedy", "sampled", "many"])  # fmt: skip
def test_the_bits_of_each_prompt_alone(options, in_flight):
    """One by one, all at once, and through a queue of any number of rows; each row's key its own, so that a row alone has the same."""
    ids, mask = prompts(np.random.default_rng().integers(1, 16, 11) + np.arange(11) % 2 * 15)  # programs of two widths
    options = dict(max_new_tokens=12, stop_tokens=STOP, return_experts=True) | options
    of = lambda rows: dict(key=keys(11)[rows]) | options
    together = generate(integers(), ids, mask, **of(slice(None)))
    assert len(set(together.lengths.tolist())) > 1
    for row in (1, 3):
        alone = generate(integers(), ids[row : row + 1], mask[row : row + 1], **of(slice(row, row + 1)))
        for field in ("tokens", "logprobs", "lengths"):
            np.testing.assert_array_equal(getattr(alone, field)[0], getattr(together, field)[row])
    for rows in in_flight:
        assert_bits(generate(integers(), ids, mask, rows_in_flight=rows, **of(slice(None))), together)
    if len(in_flight) > 1:
        assert_bits(generate(integers(), ids, mask, rows_in_flight=3, cache_length=50, **of(slice(None))), together)
    order = np.random.default_rng().permutation(11)
    turned = generate(integers(), ids[order], mask[order], rows_in_flight=in_flight[0], **of(order))
    np.testing.assert_array_equal(turned.tokens, np.asarray(together.tokens)[order])
    np.testing.assert_array_equal(turned.logprobs, np.asarray(together.logprobs)[order])


@pytest.mark.parametrize("samples, common, repeated", [
    (1, 140, 1), (2, 140, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((3, 0, 1), (1, 0, 2), (3, 0, 2), (3, 140, 1), (1, 140, 2)))])  # fmt: skip
def test_what_is_held_once(samples, common, repeated):
    """A prefix of 140 tokens, of which 128 are shared; samples, and prompts given twice in a row: a key for all, rows by their index."""
    ids, mask = prompts(np.random.default_rng().integers(260, 288, 6), common)
    ids, mask = (np.repeat(x, repeated, 0) for x in (ids, mask))
    options = dict(max_new_tokens=6, stop_tokens=STOP, temperature=1.0, key=jax.random.key(3), num_samples=samples, return_experts=True)
    plain = generate(integers(), ids, mask, **options)
    assert_bits(generate(integers(), ids, mask, rows_in_flight=3 * samples * repeated, **options), plain)
    if repeated > 1:  # a place is one prompt where no more fits
        assert_bits(generate(integers(), ids, mask, rows_in_flight=samples, **options), plain)


def unshared(*args, **options):
    """Rows that hold all of theirs, prompts that run whole."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Integers, "takes_shared_cache", False)
        return generate(*args, **options)


@pytest.mark.parametrize("samples, temperature, in_flight", [(1, 1.0, None), (1, 0.0, 3), (3, 1.0, 6), (2, 0.0, None)])
def test_any_number_of_tokens_in_common(samples, temperature, in_flight, monkeypatch):
    """They run once, by whole steps of 16, and of each prompt what lies behind them alone."""
    rng = np.random.default_rng()
    common, own = int(rng.choice([n for n in range(150, 300) if n % 16 and n % 128 > 16])), rng.integers(1, 70, 7)
    ids, mask = prompts(common + own, common)
    ids[np.arange(7), mask.argmax(1) + common] = np.arange(7)  # no token more is in common
    options = dict(max_new_tokens=5, stop_tokens=STOP, temperature=temperature, key=jax.random.key(3), num_samples=samples, return_experts=True)
    plain, called, call = unshared(integers(), ids, mask, **options), [], Integers.__call__
    monkeypatch.setattr(Integers, "__call__", lambda self, tokens, *args, **more: called.append(tokens.shape) or call(self, tokens, *args, **more))
    begin, behind = common // 16 * 16, (common + own - common // 16 * 16).tolist()
    for length in (None,) if in_flight else (None, int((common + own).max()) + 5):
        called.clear()
        assert_bits(generate(integers(), ids, mask, rows_in_flight=in_flight, cache_length=length, **options), plain)
        widths = map(bucket, behind) if in_flight else [max(behind) if length else bucket(max(behind))]
        assert called[0] == (1, begin) and {columns for _, columns in called} == {begin, *widths, 1}
        assert all(columns != begin or rows == 1 for rows, columns in called)


@pytest.mark.parametrize("samples, common", [(1, 0), pytest.param(1, 130, marks=pytest.mark.slow), pytest.param(2, 130, marks=pytest.mark.slow)])
def test_the_pool_shrinks_in_the_end(samples, common, monkeypatch):
    """32 places and answers of very different lengths: the later pool is a quarter, the rows are the same."""
    ids, mask = prompts(common + np.random.default_rng().integers(17, 30, 36), common)
    limits = np.where(np.arange(36) % 7 == 0, 30, np.random.default_rng().integers(1, 14, 36))
    options = dict(max_new_tokens=limits, temperature=1.0, key=jax.random.key(1), num_samples=samples, return_experts=True)
    sizes, chunk = [], queue._chunk
    monkeypatch.setattr(queue, "_chunk", lambda *args: sizes.append(len(args[2].done)) or chunk(*args))
    found = generate(integers(), ids, mask, rows_in_flight=32 * samples, **options)
    assert sizes[0] == 32 * samples and set(sizes) == {32 * samples, 8 * samples} and sizes == sorted(sizes, reverse=True)
    assert_bits(found, generate(integers(), ids, mask, **options))
    np.testing.assert_array_equal(found.lengths, np.repeat(limits, samples))
    # Where both sizes of an array do not fit beside each other, it stays as it is.
    monkeypatch.setattr(queue.memory, "has_room", lambda params, size: False)
    sizes.clear()
    assert_bits(generate(integers(), ids, mask, rows_in_flight=32 * samples, **options), found)
    assert set(sizes) == {32 * samples}


@pytest.mark.parametrize("samples, size, room, smaller", [
    (1, 1209, 1.0, 604), (1, 1209, 0.4, 302), (1, 1209, 0.01, 9), (1, 1209, 0.001, 0), (1, 257, 1.0, 128), (1, 256, 1.0, 64), (1, 32, 1.0, 8), (1, 31, 1.0, 0),
    (16, 64, 1.0, 32), (16, 16, 1.0, 4), (16, 3, 1.0, 1), (100, 2, 1.0, 1), (64, 7, 1.0, 3), (4, 3, 1.0, 0),
])  # fmt: skip
def test_to_what_a_pool_shrinks(samples, size, room, smaller, monkeypatch):
    """By halves above 256 rows, by quarters below, past those that have no room beside the pool's largest array."""
    monkeypatch.setattr(queue.memory, "has_room", lambda params, size: size <= 1000 * room)
    assert queue._smaller(None, 1000, size, queue.Settings(new_tokens=8, cache_length=16, num_samples=samples)) == smaller


def test_a_number_of_tokens_for_each_prompt():
    """Each row is that of a rollout to its own number; with chunks as well."""
    ids, mask = prompts([3, 9, 4])
    options = dict(temperature=1.0, key=jax.random.key(2), num_samples=2, return_experts=True, top_logprobs=1, pad_id=-1)
    found = generate(integers(), ids, mask, max_new_tokens=[4, 1, 7], **options)
    for prompt, limit in enumerate((4, 1, 7)):
        expected = generate(integers(), ids, mask, max_new_tokens=limit, **options)
        for row in (2 * prompt, 2 * prompt + 1):
            for field in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
                np.testing.assert_array_equal(getattr(found, field)[row, :limit], getattr(expected, field)[row])
            np.testing.assert_array_equal(found.experts[:, row, :limit], expected.experts[:, row])
            assert (np.asarray(found.tokens)[row, limit:] == -1).all() and (np.asarray(found.experts)[:, row, max(limit - 1, 0) :] == -1).all()
    assert found.lengths.tolist() == [4, 4, 1, 1, 7, 7] and found.tokens.shape == (6, 7)
    calls = []
    chunked = generate(integers(), ids, mask, max_new_tokens=np.array([4, 1, 7]), swap_every=2, on_tokens=lambda *a: calls.append(a[1].tolist()), **options)
    assert_bits(chunked, found)
    assert calls == [[1] * 6, [3, 3, 1, 1, 3, 3], [4, 4, 1, 1, 5, 5], [4, 4, 1, 1, 7, 7]]


@functools.cache
def oracle():
    graphdef, _ = nnx.split(integers())
    return jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))


def answered(states, versions, prompt, key):
    """Oracle: the tokens of one row, token n by the weights states[versions[n]], the cache that of the weights at the time."""
    call = oracle()
    kv, read, start, tokens = integers().init_cache(1, 64), prompt, 0, []
    for n, version in enumerate(versions):
        positions = np.arange(start, start + len(read), dtype=np.int32)[None]
        out = call(states[version], jnp.asarray(read, jnp.int32)[None], jnp.asarray(positions), kv)
        tokens.append(int(jax.random.categorical(jax.random.fold_in(key, n), out.logits[0, -1])))
        kv, start, read = out.cache, start + len(read), tokens[-1:]
    return tokens


def test_weights_that_come_between_chunks():
    """Each token by the weights that its version names, over the keys and values that older ones left; later prompts by newer ones alone."""
    ids, mask = prompts([20] * 7)
    model = nnx.clone(integers())
    states = {3: nnx.state(integers()), 5: nnx.state(Integers(1)), 8: nnx.state(Integers(2))}
    source = Scripted({2: (5, states[5]), 4: (8, states[8])})
    found = generate(
        model, ids, mask, max_new_tokens=[7, 4, 6, 7, 5, 7, 7], temperature=1.0, key=jax.random.key(9), weights=source, swap_every=2, rows_in_flight=3)  # fmt: skip
    row_keys = nvfp4jax.rollout.row_keys(jax.random.key(9), 7, 1)
    for row in range(7):
        length = int(found.lengths[row])
        versions = found.weight_versions[row]
        assert (versions[:length] > 0).all() and (versions[length:] == -1).all() and (np.diff(versions[:length]) >= 0).all()
        assert answered(states, versions[:length].tolist(), ids[row][mask[row]], row_keys[row]) == found.tokens[row, :length].tolist()
    # A token and a chunk of two; two more or fewer, as a row ends with the fourth; ...
    assert found.weight_versions[0].tolist() == [3, 3, 3, 5, 5, 5, 8] and found.weight_versions[3].tolist() == [5, 5, 5, 8, 8, 8, 8]
    np.testing.assert_array_equal(model.table[...], states[8]["table"][...])
    other = generate(integers(), ids, mask, max_new_tokens=7, weights=Scripted({}, -1), rows_in_flight=3)
    assert set(np.unique(other.weight_versions)) <= {-2, -1}


@pytest.mark.parametrize("samples", [1, 2])
def test_new_weights_run_the_prefix_again(samples):
    """Also the part of it that each row has a copy of."""
    rng = np.random.default_rng()
    common = int(rng.integers(146, 250))
    ids, mask = prompts(common + rng.integers(1, 40, 6), common)
    ids[np.arange(6), mask.argmax(1) + common] = np.arange(6)  # no token more is in common
    new = nnx.state(Integers(1))
    options = dict(max_new_tokens=4, temperature=1.0, key=jax.random.key(0), num_samples=samples)
    found = generate(nnx.clone(integers()), ids, mask, weights=Scripted({2: (5, new)}), rows_in_flight=2 * samples, **options)
    begun = found.weight_versions[:, 0] == 5
    assert begun.sum() >= 3 * samples
    expected = generate(nnx.merge(nnx.graphdef(integers()), new), ids, mask, **options)
    np.testing.assert_array_equal(np.asarray(found.tokens)[begun], np.asarray(expected.tokens)[begun])


class Heard(Integers):
    """Says what it is called with."""

    said: list = []

    def __call__(self, tokens, positions, kv, *, valid=None, **options):
        jax.debug.callback(lambda *given: self.said.append(tuple(map(np.asarray, given))), positions, valid, ordered=True)
        return super().__call__(tokens, positions, kv, valid=valid, **options)


def heard(*args, **options):
    """(what `generate` gives, (positions, valid) of each step)."""
    Heard.said.clear()
    found = generate(Heard(), *args, **options)
    jax.effects_barrier()
    return found, [(positions[:, 0], valid[:, 0]) for positions, valid in Heard.said if positions.shape[1] == 1]


@pytest.mark.parametrize("shares, samples, common", [(False, 2, 140), (True, 1, 150), (True, 2, 0), (True, 2, 150)])
def test_where_finished_rows_stand(shares, samples, common, monkeypatch):
    """On the first slot of their own and not valid; the others on their tokens' slots. Rows end by their number of tokens, a stop token, or
    because `on_tokens` says so."""
    monkeypatch.setattr(Heard, "takes_shared_cache", shares)
    lengths = common + np.random.default_rng().integers(1, 150, 5)
    lengths[0] = common + 150  # a prompt of a step of 128 at least
    ids, mask = prompts(lengths, common)
    ends = lambda tokens, counts: (np.arange(5 * samples) == 2 * samples) & (counts > 2)
    options = dict(max_new_tokens=[9, 2, 8, 6, 1], stop_tokens=STOP, temperature=1.0, key=jax.random.key(5), num_samples=samples, swap_every=2)
    found, steps = heard(ids, mask, on_tokens=ends, **options)
    read, made = np.repeat(lengths, samples), np.asarray(found.lengths)
    shared = read if samples > 1 else np.full(5, common)
    assert len(steps) >= made.max() - 1 and made[2 * samples] < 8
    for n, (positions, valid) in enumerate(steps):
        np.testing.assert_array_equal(valid, n + 1 < made)
        np.testing.assert_array_equal(positions, np.where(n + 1 < made, read + n, shared // 128 * 128 if shares else 0))


def test_where_the_places_of_a_queue_stand_empty(monkeypatch):
    """Behind the prefix that all share; each row that lives reads its tokens but the last, once."""
    lengths = 150 + np.random.default_rng().integers(1, 40, 5)
    for shares in (True, False):
        monkeypatch.setattr(Heard, "takes_shared_cache", shares)
        found, steps = heard(*prompts(lengths, 150), max_new_tokens=[9, 2, 8, 6, 1], rows_in_flight=3)
        positions, valid = (np.concatenate(x) for x in zip(*steps, strict=True))
        assert sorted(positions[valid]) == sorted(int(n) + t for n, made in zip(lengths, found.lengths, strict=True) for t in range(made - 1))
        assert set(positions[~valid].tolist()) == {128 if shares else 0}


def test_on_tokens_sees_all_rows_and_ends_them():
    ids, mask = prompts([17, 22, 19, 24, 18, 21])
    options = dict(max_new_tokens=9, temperature=1.0, key=jax.random.key(4), swap_every=2, pad_id=-1)
    free, calls = generate(integers(), ids, mask, **options), []

    def watch(tokens, lengths):
        calls.append(lengths.copy())
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(tokens[row, :length], free.tokens[row, :length])
            assert (tokens[row, length:] == -1).all()
        return (np.arange(6) == 1) & (lengths > 2) | (np.arange(6) == 5)  # row 5 has not begun

    found = generate(integers(), ids, mask, rows_in_flight=2, on_tokens=watch, **options)
    assert (np.diff(calls, axis=0) >= 0).all() and calls[0].tolist() == [3, 3, 0, 0, 0, 0] and np.diff(calls, axis=0).max() <= 3
    assert found.lengths.tolist() == [9, 3, 9, 9, 9, 0] == calls[-1].tolist()
    for row, length in enumerate(found.lengths):
        np.testing.assert_array_equal(found.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_array_equal(found.logprobs[row, :length], free.logprobs[row, :length])
        assert (np.asarray(found.tokens)[row, length:] == -1).all()


def test_one_sample_of_a_prompt_is_ended():
    """The other goes on, and the place is free once both have ended; one that was ended while it waited has no token."""
    ids, mask = prompts([20, 20, 20])
    options = dict(max_new_tokens=8, temperature=1.0, key=jax.random.key(4), swap_every=3, num_samples=2, pad_id=-1)
    ends = lambda tokens, lengths: np.asarray([False, True, False, False, False, True]) & (lengths.sum() > 5)
    found = generate(integers(), ids, mask, rows_in_flight=2, on_tokens=ends, **options)
    assert found.lengths.tolist() == [8, 4, 8, 8, 8, 0]
    free = generate(integers(), ids, mask, **options)
    for row, length in enumerate(found.lengths):
        np.testing.assert_array_equal(found.tokens[row, :length], free.tokens[row, :length])


@pytest.mark.parametrize("options", [dict(), dict(top_logprobs=2)])
def test_a_repetition_that_is_ended_while_it_waits_has_no_token(options):
    """Though the prompt runs for the other one; `on_tokens` sees no token of it either. Behind a prefix of its own, too."""
    ids = np.array([[5, 6, 7], [5, 6, 7], [8, 9, 10], [8, 9, 10]])
    options = dict(max_new_tokens=8, temperature=1.0, key=jax.random.key(4), pad_id=-1) | options
    for long in (False, True):
        given = np.concatenate([np.tile(np.arange(130) % TOKENS, (4, 1)), ids], 1) if long else ids
        free, seen = generate(integers(), given, **options), []

        def ends(tokens, lengths):
            seen.append(lengths[2])
            return np.arange(4) == 2

        found = generate(integers(), given, rows_in_flight=2, swap_every=4, on_tokens=ends, **options)
        assert found.lengths.tolist() == [8, 8, 0, 8] and not any(seen) and (found.tokens[2] == -1).all() and not found.logprobs[2].any()
        np.testing.assert_array_equal(found.tokens[np.array([0, 1, 3])], free.tokens[np.array([0, 1, 3])])
        assert found.top_tokens is None or (found.top_tokens[2] == -1).all()


def test_a_second_call_compiles_nothing():
    """Other prompts, as many rows in flight, more of them, within the same buckets."""
    def run(number, seed):
        ids, mask = prompts(np.resize([17, 30, 20, 32], number))
        limits = np.resize([3, 20 - seed, 5, 2, 4, 3, 6, 2], number)
        generate(integers(), ids, mask, max_new_tokens=limits, temperature=0.5 + seed, key=jax.random.key(seed), rows_in_flight=32)

    programs = (queue._empty, queue._refill, queue._chunk, queue._answers, queue._take_but_cache, queue._take_rows)
    before = [f._cache_size() for f in programs]
    run(33, 0)
    sizes = [f._cache_size() for f in programs]
    assert [b - a for a, b in zip(before[:3], sizes[:3], strict=True)] == [1, 1, 2]  # of 32 rows, and of 8
    run(40, 1)
    assert [f._cache_size() for f in programs] == sizes


@pytest.mark.parametrize("samples", [1, 2])
def test_more_tokens_in_common_compile_no_decoding(samples):
    """What fills the places is of their number; what runs for each token is not."""
    def run(common):
        ids, mask = prompts([170, 172, 176], common)
        ids[np.arange(3), mask.argmax(1) + common] = np.arange(3)
        generate(integers(), ids, mask, max_new_tokens=3, rows_in_flight=2 * samples, num_samples=samples, temperature=1.0, key=jax.random.key(0))
        return [f._cache_size() for f in (queue._refill, queue._chunk, queue._answers)]

    first, later = run(144), run(160)
    assert later[0] == first[0] + 1 and later[1:] == first[1:]


@pytest.mark.parametrize("samples", [1, 2])
def test_empty_places_write_behind_the_prefix(samples):
    """A row's slot in its own part of the cache is its position less what it shares, and a kernel does not look whether that is negative."""
    graphdef, params = nnx.split(integers())
    settings = decoding.Settings(16, 176, samples, share_prompts=samples > 1, prefix=128)
    controls = decoding.Controls(jnp.float32(1), jnp.float32(1), jnp.zeros(0, jnp.int32))
    first, _ = queue._run_prefix(graphdef, params, jnp.zeros((1, 128), jnp.int32), settings, nnx.State({}))
    pool = queue._empty(graphdef, params, first, nnx.State({}), jax.random.key(0), controls, 5, 160, settings)
    assert pool.cache.slots.tolist() == [128] * 5 * samples and pool.done.all()
    found = queue._chunk(graphdef, params, pool, np.int32(3), np.int32(5), controls, settings)
    assert found.step == 0  # no step without a row that lives


@pytest.mark.parametrize("share, prefix", [(False, 0), (True, 0), pytest.param(True, 128, marks=pytest.mark.slow)], ids=["own", "shared", "prefix"])
def test_the_pool_is_never_copied(share, prefix, unchecked):
    """A chunk and a refill write into the donated cache: nothing of its shapes is made but what is written in place."""
    model = loading.load("qwen3-tiny", scan_layers=True)
    graphdef, params = nnx.split(model)
    samples, places, few, width = 2, 6, 3, 144
    settings = decoding.Settings(16, width + 16, samples, share_prompts=share, prefix=prefix)
    controls = decoding.Controls(jnp.float32(1), jnp.float32(1), jnp.zeros(0, jnp.int32))
    ints = lambda *shape: jnp.zeros(shape, jnp.int32)
    first = queue._run_prefix(graphdef, params, jnp.zeros((1, prefix), jnp.int32), settings, nnx.State({}))[0] if prefix else None
    pool = queue._empty(graphdef, params, first, nnx.State({}), jax.random.key(0), controls, places, width, settings)
    shapes = {x.value.shape for part in ((pool.cache.own, pool.cache.shared) if share else (pool.cache,)) for x in cache.arrays(part)}
    kept = {x.value.shape for x in cache.arrays(pool.cache.prefix)} if prefix else set()  # what stays is not written either
    chunk = queue._chunk.lower(graphdef, params, pool, ints(), ints(), controls, settings)
    refill = queue._refill.lower(
        graphdef, params, pool, first, ints(few, width), ints(few), jax.random.key(0), ints(few), ints(few * samples), ints(few), controls, settings)  # fmt: skip
    for lowered in (chunk, refill):
        program = outside_fusions(lowered.compile().as_text())
        made = [op for op, _, shape in program if shape in shapes and op not in FREE]
        assert made and "copy" not in made and len(made) <= 2 * len(shapes), made
        assert not [op for op, _, shape in program if shape in kept and op not in FREE]


def close(a, b):
    for field in ("tokens", "lengths", "experts", "prompt_experts"):
        if getattr(b, field) is not None:
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_transformer():
    """Scanned layers of attention, more prompts than rows."""
    model = loading.load("qwen3-tiny", scan_layers=True)
    ids, mask = prompts([17, 30, 24, 32, 19, 20])
    options = dict(max_new_tokens=[8, 3, 5, 1, 8, 6], temperature=1.0, key=jax.random.key(7))
    close(generate(model, ids, mask, rows_in_flight=4, **options), generate(model, ids, mask, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe-tiny", "deepseek-v3-tiny"])
@pytest.mark.parametrize("scan, samples, common", [(True, 1, 140), (False, 2, 0), (True, 2, 140)])
def test_transformers(name, scan, samples, common):
    model = loading.load(name, scan_layers=scan)
    ids, mask = prompts(np.random.default_rng().integers(common + 130, common + 180, 7), common)
    options = dict(max_new_tokens=np.arange(2, 9), temperature=1.0, key=jax.random.key(7), num_samples=samples, return_experts="moe" in name)
    close(generate(model, ids, mask, rows_in_flight=3 * samples, **options), generate(model, ids, mask, **options))


@pytest.mark.slow
def test_layers_with_a_history():
    """Mode "delayed": an entry for each filling and each step, and the model has them afterwards."""
    model = nvfp4jax.quantize_model(loading.load("qwen3-tiny", scan_layers=True), nvfp4jax.Rule("layers/.*/up_proj", scaling="delayed"))
    ids, mask = prompts([9, 12, 11, 10])
    out = generate(model, ids, mask, max_new_tokens=3, rows_in_flight=2)
    (history,) = jax.tree.leaves(nnx.state(model, nvfp4jax.layers.InputAmax))
    calls = 4 + 2 * 2  # a prompt at a time; two and two rows together
    assert ((np.asarray(history)[..., :calls] > 0).all() and not np.asarray(history)[..., calls:].any()) and out.lengths.tolist() == [3] * 4


class Letters:
    """A letter a token."""

    def encode(self, texts):
        return [[ord(letter) - 97 for letter in text] for text in texts]

    def decode(self, rows):
        return ["".join(chr(97 + token) for token in row) for row in rows]


def test_texts():
    options = dict(max_new_tokens=12, stop_strings=["b", "pq"], swap_every=3)
    texts = ["hello", "abc", "z", "queue", "xyz"]
    given = {row: "" for row in range(5)}
    answers, found = generate_text(integers(), Letters(), texts, rows_in_flight=2, on_text=lambda row, new: given.update({row: given[row] + new}), **options)
    expected, plain = generate_text(integers(), Letters(), texts, **options)
    assert answers == expected == list(given.values())
    assert_bits(found, plain)


def test_a_progress_bar(capfd):
    ids, mask = prompts([3, 4, 5])
    plain = generate(integers(), ids, mask, max_new_tokens=5, progress=False)
    assert capfd.readouterr() == ("", "")
    for rows in (None, 2):
        assert_bits(generate(integers(), ids, mask, max_new_tokens=5, swap_every=2, progress=True, rows_in_flight=rows), plain)
        out, err = capfd.readouterr()
        assert out == "" and "3/3" in err and "tokens/s" in err
    ended = lambda tokens, lengths: np.arange(3) > 0  # the last one while it waits
    generate(integers(), ids, mask, max_new_tokens=5, progress=True, rows_in_flight=2, on_tokens=ended)
    assert "3/3" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rows_in_flight=0), "rows_in_flight=0: at least 1"),
        (dict(rows_in_flight=2.5), "rows_in_flight=2.5: an integer"),
        (dict(progress=1), "progress=1: True or False"),
        (dict(on_tokens=lambda tokens, lengths: [True]), r"on_tokens gave bool \[1\]: None, or bool \[2\], one for each row"),
        (dict(on_tokens=lambda tokens, lengths: [True], rows_in_flight=1), r"on_tokens gave bool \[1\]"),
        (dict(max_new_tokens=[3]), "max_new_tokens: one number, or one for each of the 2 prompts, not 1"),
        (dict(max_new_tokens=[3, 0]), "max_new_tokens=0: at least 1"),
        (dict(max_new_tokens=np.array([3.0, 1.0])), "max_new_tokens=3.0: an integer"),
    ],
)
def test_bad_arguments(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        generate(integers(), [[1, 2], [3, 4]], **(dict(max_new_tokens=2) | options))


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2])
def test_an_fp8_cache_and_telemetry(samples):
    """Behind a prefix that all share, held decoded, and a part of which each has a copy; the counts are of all calls."""
    model = loading.load("qwen3-tiny", scan_layers=True)
    model = nvfp4jax.quantize_model(model, nvfp4jax.Rule("layers/.*_proj", scaling="token"))
    ids, mask = prompts([170, 153, 160, 151, 190], common=150)
    options = dict(max_new_tokens=6, num_samples=samples, cache_dtype=jnp.float8_e4m3fn)
    plain = generate(model, ids, mask, **options)
    queued = generate(model, ids, mask, rows_in_flight=2 * samples, telemetry=True, **options)
    np.testing.assert_array_equal(queued.tokens, plain.tokens)
    np.testing.assert_allclose(queued.logprobs, plain.logprobs, atol=2e-2)
    assert queued.telemetry.layers and (queued.telemetry.blocks > 0).all() and (queued.telemetry.amax > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype, common, samples", [(None, 140, 1), (jnp.float8_e4m3fn, 0, 1), (None, 140, 2), (jnp.float8_e4m3fn, 300, 2)])
def test_bits_on_a_gpu(cache_dtype, common, samples):
    """Hopper's kernels: tokens and logprobs of a prompt, to the bit, through a queue and alone."""
    config = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
                  num_attention_heads=8, num_key_value_heads=2, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)  # fmt: skip
    model = models.stack_layers(models.build(config, rngs=nnx.Rngs(0)))
    model, rng = nvfp4jax.quantize_model(model, nvfp4jax.Rule("layers/.*_proj", scaling="token")), np.random.default_rng()
    counts, limits, keys = common + rng.integers(1, 60, 9), rng.integers(1, 25, 9), jax.random.split(jax.random.key(0), 9)
    ids = rng.integers(1, 1000, (9, counts.max()))
    ids[:, :common] = ids[0, :common]
    mask = np.arange(counts.max()) < counts[:, None]

    def run(rows, **more):
        return generate(model, ids[rows], mask[rows], max_new_tokens=limits[rows], temperature=1.0, key=keys[rows], num_samples=samples,
                        cache_dtype=cache_dtype, **more)  # fmt: skip

    queued = run(slice(9), rows_in_flight=3 * samples)
    np.testing.assert_array_equal(queued.lengths, limits.repeat(samples))
    for row in range(9):
        alone, made, rows = run(slice(row, row + 1)), slice(0, limits[row]), slice(row * samples, (row + 1) * samples)
        np.testing.assert_array_equal(alone.tokens[:, made], queued.tokens[rows, made])
        np.testing.assert_array_equal(alone.logprobs[:, made], queued.logprobs[rows, made])


@pytest.mark.parametrize("free, waiting, few, wanted", [(10, 9, 4, 9), (9, 10, 4, 8), (3, 10, 4, 0), (1, 1, 4, 1), (4, 4, 4, 4), (5, 0, 2, 0)])
def test_who_begins_together(free, waiting, few, wanted):
    """Whole refills of the first that wait, or all that are left, by their length."""
    lengths = np.random.default_rng().integers(1, 100, 50).astype(np.int32)
    begin = queue._beginning(np.arange(20, 20 + waiting), free, few, lengths)
    assert sorted(begin) == list(range(20, 20 + wanted)) and (np.diff(lengths[begin]) >= 0).all()


@pytest.mark.parametrize("most", [1, 16, 144, 1000, 16384])
def test_columns_of_a_refill(most):
    """Enough, never more than all have, and few different numbers."""
    columns = {longest: queue._columns(longest, most) for longest in range(1, most + 1)}
    assert all(longest <= n <= most for longest, n in columns.items()) and len(set(columns.values())) <= 8
