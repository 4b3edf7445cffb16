"""What trainers ask of sampling, end to end on a model that is a table: each answer against a loop in numpy."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nvfp4jax import models
from nvfp4jax.rollout import Controls, Edits, Sampling, Settings, decoding, generate, generate_text, logprobs

TOKENS = 24


class Table(nnx.Module):
    """The next token's logits are the last token's row."""

    def __init__(self, table: np.ndarray):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.config = {"vocab_size": table.shape[1]}

    def init_cache(self, batch, length, dtype=None):
        return ()

    def __call__(self, tokens, positions, cache, *, valid=None, last=None):
        if last is not None:
            tokens = jnp.take_along_axis(tokens, last[:, None], axis=1)
        return models.Output(self.table[...][tokens], cache)


def table() -> np.ndarray:
    return np.random.default_rng().normal(0, 2, (TOKENS, TOKENS)).astype(np.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


PROMPTS = np.asarray([[0, 0, 3, 5], [7, 1, 2, 9], [0, 4, 4, 4]])
MASK = np.asarray([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize("repetition, presence, bias", [(1.4, 0.0, None), (1.0, 1.5, None), (1.2, 0.5, {3: 4.0, 5: -np.inf, 11: -2.0})])
def test_penalties_and_bias_in_the_loop(repetition, presence, bias):
    """Greedy answers step by step; the logprobs stay the model's."""
    weights = table()
    options = dict(repetition_penalty=repetition, presence_penalty=presence, logit_bias=bias)
    out = generate(Table(weights), PROMPTS, MASK, max_new_tokens=12, **options)
    for row in range(3):
        prompt = PROMPTS[row][MASK[row] == 1].tolist()
        answer, logprobs = [], []
        for _ in range(12):
            raw = weights[(prompt + answer)[-1]].astype(np.float64)
            logits = raw.copy()
            for token, gain in (bias or {}).items():
                logits[token] += gain
            for token in {*prompt, *answer}:
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
            for token in set(answer):
                logits[token] -= presence
            answer.append(int(logits.argmax()))
            logprobs.append(log_softmax(raw)[answer[-1]])
        assert out.tokens[row].tolist() == answer
        np.testing.assert_allclose(out.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)
    assert (out.tokens != generate(Table(weights), PROMPTS, MASK, max_new_tokens=12).tokens).any()


def test_min_p_leaves_likely_tokens_alone():
    weights = table()
    out = generate(Table(weights), PROMPTS, MASK, max_new_tokens=40, temperature=1.5, min_p=0.3, num_samples=4, key=jax.random.key(3))
    last = np.concatenate([np.repeat(PROMPTS[:, -1:], 4, 0), np.asarray(out.tokens)[:, :-1]], 1)
    p = np.exp(log_softmax(weights[last] / 1.5))
    chosen = np.take_along_axis(p, np.asarray(out.tokens)[..., None], -1)[..., 0]
    assert (chosen >= 0.3 * p.max(-1) * (1 - 1e-5)).all() and (chosen < p.max(-1)).any()
    np.testing.assert_allclose(out.logprobs, np.log(chosen), rtol=1e-4, atol=1e-5)


def test_logprobs_of_prompts_and_of_the_likeliest():
    weights = table()
    model = Table(weights)
    out = generate(
        model, PROMPTS, MASK, max_new_tokens=9, temperature=0.7, top_k=5, top_logprobs=3, pad_id=-7, key=jax.random.key(1),
        stop_tokens=[6, 7, 8, 9],
    )  # fmt: skip
    assert out.top_tokens.shape == out.top_logprobs.shape == (3, 9, 3)
    for row in range(3):
        n = int(out.lengths[row])
        text = np.concatenate([PROMPTS[row][MASK[row] == 1], np.asarray(out.tokens[row, :n])])
        expected = log_softmax(weights[text[:-1]] / 0.7)[-n:]
        order = np.argsort(-expected, axis=1)[:, :3]
        np.testing.assert_array_equal(out.top_tokens[row, :n], order)
        np.testing.assert_allclose(out.top_logprobs[row, :n], np.take_along_axis(expected, order, 1), rtol=1e-5, atol=1e-5)
        assert (np.asarray(out.top_tokens)[row, n:] == -7).all() and (np.asarray(out.top_logprobs)[row, n:] == 0).all()
    # `logprobs` gives the prompts', at the caller's places, and those of an answer again.
    prompts = np.asarray(logprobs(model, PROMPTS, MASK, temperature=0.7))
    assert prompts.dtype == np.float32 and (prompts[MASK == 0] == 0).all()
    for row in range(3):
        tokens = PROMPTS[row][MASK[row] == 1]
        expected = log_softmax(weights[tokens[:-1]] / 0.7)[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(prompts[row][MASK[row] == 1], [0, *expected], rtol=1e-5, atol=1e-5)
    whole = np.concatenate([PROMPTS, np.maximum(np.asarray(out.tokens), 0)], 1)
    mask = np.concatenate([MASK, np.arange(9) < np.asarray(out.lengths)[:, None]], 1)
    np.testing.assert_allclose(logprobs(model, whole, mask, temperature=0.7)[:, 4:], out.logprobs, rtol=1e-5, atol=1e-5)
    assert logprobs(model, PROMPTS[:, -1:]).tolist() == [[0.0]] * 3


def test_a_seed_for_each_row():
    model = Table(table())
    keys = jax.vmap(jax.random.key)(jnp.asarray([11, 12, 13]))
    settings = dict(max_new_tokens=20, temperature=1.0, num_samples=2)
    out = generate(model, PROMPTS, MASK, key=keys, **settings)
    alone = generate(model, PROMPTS[1:2], MASK[1:2], key=keys[1:2], **settings)
    np.testing.assert_array_equal(out.tokens[2:4], alone.tokens)
    np.testing.assert_array_equal(out.logprobs[2:4], alone.logprobs)
    order = np.asarray([2, 0, 1])
    turned = generate(model, PROMPTS[order], MASK[order], key=keys[order], **settings)
    np.testing.assert_array_equal(np.asarray(turned.tokens).reshape(3, 2, -1), np.asarray(out.tokens).reshape(3, 2, -1)[order])
    raw = generate(model, PROMPTS, MASK, key=jax.random.key_data(keys), **settings)
    np.testing.assert_array_equal(raw.tokens, out.tokens)
    with pytest.raises(ValueError, match=r"key \[2\]: one key, or one for each of the 3 prompts"):
        generate(model, PROMPTS, MASK, key=keys[:2], **settings)


def primitives(jaxpr) -> set[str]:
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            found |= primitives(inner) if hasattr(inner, "eqns") else set()
    return found


def test_what_is_off_is_not_in_the_program():
    graphdef, params = nnx.split(Table(table()))
    controls = Controls(jnp.float32(1), jnp.float32(1), jnp.zeros(0, jnp.int32))

    def program(controls, **settings):
        settings = Settings(8, 12, sampling=Sampling(greedy=False), **settings)
        arguments = graphdef, params, jnp.asarray(PROMPTS, jnp.int32), jnp.full(3, 4, jnp.int32), jax.random.key(0), jnp.int32(8), controls

        def carried(*arguments):
            state = decoding.rollout(*arguments, settings)
            return state.used, state.top_tokens, state.top_logprobs

        jaxpr, shapes = jax.make_jaxpr(carried, return_shape=True)(*arguments)
        return primitives(jaxpr.jaxpr), shapes

    costly = {"scatter-add", "scatter_add", "scatter", "scatter-max", "scatter_max", "top_k", "sort"}
    plain, shapes = program(controls)
    assert not plain & costly and shapes == (None, None, None)
    # The same look does see what is on.
    edits = Edits((jnp.zeros(16, jnp.int32), jnp.zeros(16, jnp.float32)), jnp.float32(1.1), jnp.float32(0.1))
    full, shapes = program(Controls(jnp.float32(1), jnp.float32(1), jnp.zeros(0, jnp.int32), jnp.float32(0.1), edits), top_logprobs=2)
    assert full & costly and [x.shape for x in shapes] == [(3, TOKENS), (3, 8, 2), (3, 8, 2)]


def test_another_value_compiles_nothing():
    model = Table(table())
    settings = dict(max_new_tokens=8, temperature=1.0, key=jax.random.key(0))
    generate(model, PROMPTS, MASK, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2, logit_bias={1: 2.0}, **settings)
    before = decoding.rollout._cache_size()
    generate(model, PROMPTS, MASK, min_p=0.4, repetition_penalty=1.7, presence_penalty=-0.2, logit_bias={5: 1.0, 2: -3.0}, **settings)
    assert decoding.rollout._cache_size() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(min_p=1.5), "min_p=1.5: at least 0 and at most 1"),
        (dict(min_p=float("nan")), "min_p=nan"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0: above 0"),
        (dict(presence_penalty=float("inf")), "presence_penalty=inf: finite"),
        (dict(logit_bias={TOKENS: 1.0}), f"logit_bias: token {TOKENS} is outside the vocabulary of {TOKENS}"),
        (dict(logit_bias={1: float("nan")}), r"logit_bias\[1\]=nan"),
        (dict(logit_bias=[1.0]), "logit_bias"),
        (dict(top_logprobs=-1), "top_logprobs=-1: at least 0"),
        (dict(top_logprobs=TOKENS + 1), f"top_logprobs={TOKENS + 1}: the vocabulary has {TOKENS} tokens"),
    ],
)
def test_bad_options_are_named(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        generate(Table(table()), PROMPTS, MASK, max_new_tokens=4, **options)


# --- texts -------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuv"


class Letters:
    """A token a letter; tokens 22 and 23 are the two bytes of an e with an acute accent."""

    calls = 0

    def encode(self, texts):
        return [[LETTERS.index(c) for c in text] for text in texts]

    def decode(self, rows):
        self.calls += 1
        as_bytes = [*(c.encode() for c in LETTERS), b"\xc3", b"\xa9"]
        return [b"".join(as_bytes[t] for t in row).decode(errors="replace") for row in rows]


def spelling(text: str) -> Table:
    """A model that goes through `text` once, each letter of it once, then says the last letter again and again."""
    ids = [LETTERS.index(c) if c in LETTERS else None for c in text]
    order = [t for i in ids for t in ((22, 23) if i is None else (i,))]
    weights = np.zeros((TOKENS, TOKENS), np.float32)
    for one, next_ in zip(order, [*order[1:], order[-1]], strict=True):
        weights[one, next_] = 30.0
    return Table(weights)


@pytest.mark.parametrize("every", [1, 3, 16])
@pytest.mark.parametrize(
    "stops, text, tokens",
    [
        (("fgh",), "bcde", 7),
        (("fgh", "ef"), "bcd", 5),
        (("zz", "a"), "bcdefghijé", 32),  # the prompt's own letters do not count
        (("jé",), "bcdefghi", 11),
        (("h", "fgh"), "bcde", 7),  # of two that one token completes, the leftmost
        ((), "bcdefghijé", 32),
    ],
)
def test_stop_strings_cut_exactly(stops, text, tokens, every):
    model = spelling("abcdefghijék")
    pieces = {0: "", 1: ""}
    texts, out = generate_text(
        model, Letters(), ["a", "ab"], max_new_tokens=32, stop_strings=stops, swap_every=every, pad_id=-1, top_logprobs=1,
        on_text=lambda row, new: pieces.update({row: pieces[row] + new}),
    )  # fmt: skip
    rest = "" if stops and text != "bcdefghijé" else "k" * (32 - 11)
    assert texts[0] == text + rest and texts[1] == (text + rest)[1:] + ("k" if rest else "")
    assert [pieces[0], pieces[1]] == texts
    free = generate(model, np.asarray([[0], [1]]), max_new_tokens=32)
    for row, n in enumerate((tokens, tokens - 1 if not rest else tokens)):
        assert out.lengths[row] == n
        np.testing.assert_array_equal(out.tokens[row, :n], free.tokens[row, :n])
        np.testing.assert_array_equal(out.logprobs[row, :n], free.logprobs[row, :n])
        assert (np.asarray(out.tokens)[row, n:] == -1).all() and (np.asarray(out.top_logprobs)[row, n:] == 0).all()
        assert (np.asarray(out.logprobs)[row, n:] == 0).all()


def test_text_is_given_out_while_it_grows():
    """No piece holds the start of the stop string, nor half a character; the first piece comes after the first token."""
    given = []
    generate_text(
        spelling("abcdefghijék"), Letters(), ["a"], max_new_tokens=12, stop_strings=["efgz", "ék"], swap_every=1,
        on_text=lambda row, new: given.append(new),
    )  # fmt: skip
    assert given == ["b", "c", "d", "efgh", "i", "j"]


def test_stop_strings_end_the_work(monkeypatch):
    """Once every row has met its stop string, no further chunk runs."""
    module = importlib.import_module("nvfp4jax.rollout.generate")
    chunks, decode = [], module._decode
    monkeypatch.setattr(module, "_decode", lambda *a: chunks.append(1) or decode(*a))
    generate_text(spelling("abcdefghijk"), Letters(), ["a"], max_new_tokens=64, stop_strings=["efg"], swap_every=4)
    assert len(chunks) == 2


def test_plain_text_runs_in_one_program_and_decodes_once():
    tokenizer = Letters()
    texts, out = generate_text(spelling("abcdef"), tokenizer, ["a", "ab"], max_new_tokens=4)
    assert texts == ["bcde", "cdef"] and tokenizer.calls == 1 and out.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("stops", ["end", ("a", ""), (3,)])
def test_bad_stop_strings_are_named(stops, unchecked):
    with pytest.raises(ValueError, match="stop_strings"):
        generate_text(spelling("ab"), Letters(), ["a"], max_new_tokens=2, stop_strings=stops)


def test_prompts_that_are_arrays(unchecked):
    """Token ids of NumPy and of jax, one by one or in two dimensions."""
    model, options = spelling("abcdef"), dict(max_new_tokens=3)
    rows = [[1, 2], [2, 1]]
    expected, _ = generate_text(model, Letters(), rows, **options)
    for prompts in (np.array(rows), jnp.array(rows), [np.array(row) for row in rows], [jnp.array(rows[0]), tuple(rows[1])], [[np.int64(1), 2], rows[1]]):
        assert generate_text(model, Letters(), prompts, **options)[0] == expected
    for prompts, message in (
        ([rows[0], np.array([1.0, 2.0])], r"prompts\[1\]: token=1.0: an integer is needed, not float"),
        ([np.array(rows)], r"prompts\[0\]: token=\[1, 2\]: an integer is needed, not list"),
        (np.array([1, 2]), r"prompts\[0\]: a sequence of token ids is needed, not int 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_text(model, Letters(), prompts, **options)


@pytest.mark.parametrize("also", [dict(stop_strings=["zz"]), dict(on_text=lambda row, new: None), dict()])
def test_on_tokens_beside_texts(also, unchecked):
    """It is checked as `generate` does."""
    model, options = spelling("abcdef"), dict(max_new_tokens=3) | also
    with pytest.raises(ValueError, match="on_tokens: a function is needed, not int 5"):
        generate_text(model, Letters(), ["a"], on_tokens=5, **options)
    for answer in (True, [True, False]):
        with pytest.raises(ValueError, match=r"on_tokens gave bool \[.*\]: None, or bool \[1\], one for each row"):
            generate_text(model, Letters(), ["a"], on_tokens=lambda tokens, lengths, answer=answer: answer, **options)
