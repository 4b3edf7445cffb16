"""`generate_text`: texts in, texts out, cut at stop strings, and given out as they grow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nvfp4jax import arguments
from nvfp4jax.rollout.generate import OnTokens, Rollout, check_on_tokens, generate, rows_to_end
from nvfp4jax.rollout.prompts import pad_left
from nvfp4jax.rollout.request import check_model

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of a character whose last bytes are still to come


@runtime_checkable
class TextTokenizer(Protocol):
    """`checkpoint.tokenizer.Tokenizer`, or any other with these two methods."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]: ...


def generate_text(
    model: nnx.Module,
    tokenizer: TextTokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] | np.ndarray,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> tuple[list[str], Rollout]:
    """(the text of each sample, and `generate`'s Rollout), row b * num_samples + s being sample s of prompt b.

    prompts: texts, or token ids (lists or arrays).
    stop_strings: a text ends in front of the first of them (of several that one token completes, the leftmost), as vLLM
        cuts it; the row's tokens, logprobs and experts end with the token that completes it. The rollout looks for them
        every `swap_every` tokens, and what a row drew behind its end in the meantime is removed.
    on_text: called on the host with (row, new text) every `swap_every` tokens; a row's pieces make up its text. What may be
        the start of a stop string, or of a character, is held back until it is known.
    options: of `generate`. ValueError as there, and for a prompt without tokens.
    """
    check_model(model)
    if not isinstance(tokenizer, TextTokenizer) or isinstance(tokenizer, str):
        raise ValueError(f"tokenizer: {arguments.shown(tokenizer)} has no encode(texts) and decode(rows)")
    stops = tuple(arguments.items("stop_strings", stop_strings, str, "string"))
    if not all(stops):
        raise ValueError(f"stop_strings={stop_strings!r}: a sequence of strings is needed, none of them empty")
    given = arguments.items("prompts", _listed(prompts), object, "prompt")
    if not given:
        raise ValueError("prompts: no prompt is given")
    prompts = [prompt if isinstance(prompt, str) else _token_ids(f"prompts[{i}]", prompt) for i, prompt in enumerate(given)]
    if on_text is not None and not callable(on_text):
        raise ValueError(f"on_text: a function of (row, text) is needed, not {arguments.shown(on_text)}")
    check_on_tokens(options.get("on_tokens"))
    encoded = iter(tokenizer.encode(texts) if (texts := [prompt for prompt in prompts if isinstance(prompt, str)]) else ())
    rows = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no token")
    ids, mask = pad_left(rows)
    watch = _Watch(tokenizer, stops, on_text, options.pop("on_tokens", None))
    callback = watch if stops or on_text else watch.also
    out = generate(model, ids, mask, max_new_tokens=max_new_tokens, on_tokens=callback, **options)
    if not (stops or on_text):
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        return tokenizer.decode([row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]), out
    for row in range(len(watch.texts)):
        watch.give_out(row, watch.texts[row])
    return watch.texts, _cut(out, watch.ends, options.get("pad_id", 0))


def _listed(value: Any) -> Any:
    """An array, of NumPy or jax, as a list."""
    return np.asarray(value).tolist() if isinstance(value, np.ndarray | jax.Array) else value


def _token_ids(what: str, prompt: Any) -> list[int]:
    tokens = arguments.items(what, _listed(prompt), object, "token id")
    return [token if type(token) is int else arguments.whole(f"{what}: token", token) for token in tokens]


class _Watch:
    """The rows' texts while they grow. ends: the number of tokens of the rows that met a stop string."""

    def __init__(self, tokenizer: TextTokenizer, stops: tuple[str, ...], on_text: Callable[[int, str], None] | None, also: OnTokens | None):
        self.tokenizer, self.stops, self.on_text, self.also = tokenizer, stops, on_text, also
        self.texts: list[str] = []
        self.given: list[str] = []  # what on_text has had of them
        self.seen: list[int] = []  # tokens of each row that its text is of
        self.ends: dict[int, int] = {}

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if not self.texts:
            self.texts, self.given, self.seen = [""] * len(tokens), [""] * len(tokens), [0] * len(tokens)
        grown = [row for row in range(len(self.texts)) if row not in self.ends and lengths[row] > self.seen[row]]
        for row, text in zip(grown, self.tokenizer.decode([tokens[row, : lengths[row]].tolist() for row in grown]), strict=True):
            if any(stop in text for stop in self.stops):
                text = self._end(row, tokens[row, : lengths[row]].tolist())
            self.texts[row] = text
            self.seen[row] = int(lengths[row])
            if row not in self.ends:
                self.give_out(row, text[: len(text) - self._undecided(text)])
        ended = np.isin(np.arange(len(self.texts)), list(self.ends))
        also = None if self.also is None else rows_to_end(self.also, tokens, lengths)
        return ended if also is None else ended | also

    def _end(self, row: int, tokens: list[int]) -> str:
        """The row's text in front of its stop string, which lies in `tokens`; notes the fewest tokens that hold it."""
        counts = range(self.seen[row] + 1, len(tokens) + 1)
        for count, text in zip(counts, self.tokenizer.decode([tokens[:n] for n in counts]), strict=True):
            places = [text.find(stop) for stop in self.stops if stop in text]
            if places:
                self.ends[row] = count
                return text[: min(places)]
        raise AssertionError("unreachable: the whole text holds a stop string")

    def _undecided(self, text: str) -> int:
        """How many of the last characters may be the start of a stop string, or of a character."""
        whole = text.rstrip(_INCOMPLETE)
        starts = (n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return len(text) - len(whole) + max(starts, default=0)

    def give_out(self, row: int, text: str) -> None:
        """Hands what is new in `text` to `on_text`."""
        new = text[len(self.given[row]) :]
        if new and self.on_text is not None:
            self.given[row] = text
            self.on_text(row, new)


def _cut(out: Rollout, ends: dict[int, int], pad_id: int) -> Rollout:
    """`out` with the rows in `ends` ended after that many tokens."""
    if not ends:
        return out
    lengths = np.asarray(out.lengths).copy()
    for row, end in ends.items():
        lengths[row] = end
    kept = jnp.asarray(np.arange(out.tokens.shape[1]) < lengths[:, None])
    read = jnp.asarray(np.arange(out.tokens.shape[1]) < lengths[:, None] - 1)  # a row's last token is never read
    pad = lambda x, fill, mask=kept: jnp.where(mask, x, jnp.asarray(fill, x.dtype))  # noqa: E731
    new: dict[str, Any] = dict(tokens=pad(out.tokens, pad_id), logprobs=pad(out.logprobs, 0), lengths=jnp.asarray(lengths))
    if out.experts is not None:
        new |= dict(experts=pad(out.experts, -1, read[None, :, :, None]))
    if out.weight_versions is not None:
        new |= dict(weight_versions=np.where(np.asarray(kept), out.weight_versions, -1))
    if out.top_tokens is not None:
        new |= dict(top_tokens=pad(out.top_tokens, pad_id, kept[..., None]), top_logprobs=pad(out.top_logprobs, 0, kept[..., None]))
    return dataclasses.replace(out, **new)
