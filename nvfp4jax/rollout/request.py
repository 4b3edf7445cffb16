"""The arguments of `generate`, checked: each error is a line that names the argument."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nvfp4jax import arguments, fp8
from nvfp4jax.models.cache import is_fp8
from nvfp4jax.models.protocol import Decoder
from nvfp4jax.rollout.decoding import Controls
from nvfp4jax.rollout.sampling import Edits, Sampling

_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """The scalar arguments of `generate`, checked."""

    max_new_tokens: int  # of any prompt
    limits: np.ndarray | None  # i32 [B], where each prompt has its own
    num_samples: int
    swap_every: int
    pad_id: int
    top_logprobs: int
    key: jax.Array
    sampling: Sampling
    controls: Controls


def check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module) or not isinstance(model, Decoder):
        raise ValueError(f"model: {arguments.shown(model)} is no models.Decoder: it needs init_cache and the call that models.protocol describes")


def check_fp8(model: Any, cache_dtype: DTypeLike | None) -> None:
    if cache_dtype == fp8.DTYPE and not is_fp8(jax.eval_shape(lambda: model.init_cache(1, 1, cache_dtype))):
        raise ValueError(f"cache_dtype={fp8.DTYPE}: {type(model).__name__} keeps no FP8 cache; its init_cache gave none")


def _within(name: str, value: Any, low: float, high: float, what: str) -> float:
    value = arguments.number(name, value, finite=False)
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: {what}")
    return value


def checked(
    *,
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    repetition_penalty: Any,
    presence_penalty: Any,
    logit_bias: Any,
    vocabulary: int | None,
    key: Any,
    prompts: int,
    num_samples: Any,
    stop_tokens: Any,
    pad_id: Any,
    top_logprobs: Any,
    swap_every: Any,
) -> Request:
    temperature = arguments.number("temperature", temperature)
    if temperature < 0 or 0 < temperature < 1e-6:  # logits over less than that are beyond float32
        raise ValueError(f"temperature={temperature}: 0 (greedy), or at least 1e-6")
    top_k = None if top_k is None else arguments.whole("top_k", top_k, 1)
    top_p = None if top_p is None else arguments.number("top_p", top_p)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: above 0 and at most 1, or None")
    min_p = 0.0 if min_p is None else _within("min_p", min_p, 0.0, 1.0, "at least 0 and at most 1, or None")
    if isinstance(stop_tokens, str | Mapping) or not isinstance(stop_tokens, Iterable) or getattr(stop_tokens, "ndim", 1) != 1:
        raise ValueError(f"stop_tokens={str(stop_tokens)[:40]}: a sequence of token ids is needed, () for none")
    stops = tuple(arguments.whole("stop_tokens", token, -_LARGEST, _LARGEST) for token in stop_tokens)
    greedy = temperature == 0
    limits = _checked_limits(max_new_tokens, prompts)
    return Request(
        max_new_tokens=arguments.whole("max_new_tokens", max_new_tokens, 1, _LARGEST) if limits is None else int(limits.max()),
        limits=limits,
        num_samples=arguments.whole("num_samples", num_samples, 1, _LARGEST // max(prompts, 1)),
        swap_every=arguments.whole("swap_every", swap_every, 1),
        pad_id=arguments.whole("pad_id", pad_id, -_LARGEST - 1, _LARGEST),
        top_logprobs=arguments.whole("top_logprobs", top_logprobs, 0),
        key=_checked_key(key, temperature, prompts),
        sampling=Sampling(greedy, None if greedy else top_k, not greedy and top_p is not None and top_p < 1),
        controls=Controls(
            jnp.float32(temperature or 1.0),
            jnp.float32(1.0 if top_p is None else top_p),
            jnp.asarray(stops, jnp.int32),
            None if greedy or not min_p else jnp.float32(min_p),
            _checked_edits(repetition_penalty, presence_penalty, logit_bias, vocabulary),
        ),
    )


def _checked_limits(max_new_tokens: Any, prompts: int) -> np.ndarray | None:
    """One number for each prompt, i32 [B]; None where there is one for all."""
    several = bool(max_new_tokens.ndim) if isinstance(max_new_tokens, np.ndarray | jax.Array) else isinstance(max_new_tokens, Sequence)
    if isinstance(max_new_tokens, str) or not several:
        return None
    if len(max_new_tokens) != prompts:
        raise ValueError(f"max_new_tokens: one number, or one for each of the {prompts} prompts, not {len(max_new_tokens)}")
    numbers = max_new_tokens if isinstance(max_new_tokens, Sequence) else np.asarray(max_new_tokens).tolist()
    return np.asarray([arguments.whole("max_new_tokens", number, 1, _LARGEST) for number in numbers], np.int32)


def _checked_edits(repetition_penalty: Any, presence_penalty: Any, logit_bias: Any, vocabulary: int | None) -> Edits | None:
    largest = float(np.finfo(np.float32).max)
    repetition = _within("repetition_penalty", repetition_penalty, 1e-6, 1e6, "above 0 (1 is none)")
    presence = _within("presence_penalty", presence_penalty, -largest, largest, "finite (0 is none)")
    if logit_bias is not None and not isinstance(logit_bias, Mapping):
        raise ValueError(f"logit_bias={str(logit_bias)[:40]}: {{token: what its logit gains}} is needed")
    bias = {}
    for token, gain in (logit_bias or {}).items():
        token = arguments.whole("logit_bias token", token, 0)
        if vocabulary is not None and token >= vocabulary:
            raise ValueError(f"logit_bias: token {token} is outside the vocabulary of {vocabulary}")
        bias[token] = _within(f"logit_bias[{token}]", gain, -float("inf"), largest, "a number below infinity")
    if vocabulary is not None and list(bias.values()).count(-float("inf")) == vocabulary:
        raise ValueError(f"logit_bias: -inf for each of the {vocabulary} tokens leaves none to draw")
    if repetition == 1 and presence == 0 and not bias:
        return None
    rest = [0] * (-len(bias) % 16)  # near numbers of tokens share a program
    return Edits(
        (jnp.asarray([*bias, *rest], jnp.int32), jnp.asarray([*bias.values(), *rest], jnp.float32)) if bias else None,
        None if repetition == 1 else jnp.float32(repetition),
        None if presence == 0 else jnp.float32(presence),
    )


def _checked_key(key: Any, temperature: float, prompts: int) -> jax.Array:
    if key is None:
        if temperature > 0:
            raise ValueError(
                f"key is None, but temperature={temperature} draws at random; pass key=jax.random.key(seed)"
            )
        return jax.random.key(0)  # greedy: drawn from by nobody
    if not isinstance(key, jax.Array):
        raise ValueError(f"key={str(key)[:40]}: a PRNG key is needed, not {type(key).__name__}: jax.random.key(seed)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            raise ValueError(f"key: {arguments.shown(key)} is no PRNG key: jax.random.key(seed)") from None
    if key.shape not in ((), (prompts,)):
        raise ValueError(f"key {list(key.shape)}: one key, or one for each of the {prompts} prompts")
    return key
