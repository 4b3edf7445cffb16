"""What a rollout will hold on its device, known before it runs: a batch that cannot fit is refused with the number that would."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from nvfp4jax import ops
from nvfp4jax.models import cache
from nvfp4jax.rollout.decoding import Settings


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes, beside the weights: the caches, and the logits of all rows with what sampling makes of them. The activations of a prefill
    come on top."""

    cache: int
    logits: int

    @property
    def total(self) -> int:
        return self.cache + self.logits


def predict(model: nnx.Module, prompts: int, steps: int, settings: Settings, vocabulary: int | None, refill: Settings | None = None, few: int = 0) -> Prediction:
    """prompts: different ones, of `steps` slots each; vocabulary: None where it is not known, and nothing is counted for it.

    refill, few: in a queue, whose places are filled by `few` prompts at a time, what these have beside it.
    """
    kept, passing = _caches(model, prompts, steps, settings)
    if refill is not None:
        passing = sum(_caches(model, few, steps, refill)) + _held(model, 1, settings.prefix + settings.begin, settings)
    rows = prompts * settings.samples
    logits = 0 if vocabulary is None else 4 * rows * vocabulary * 4  # the logits, those of the temperature, exponentials, what truncation makes of them
    return Prediction(kept + passing, logits)


def _held(model: nnx.Module, rows: int, slots: int, settings: Settings, shared: bool = False) -> int:
    """shared: as rows share it, decoded."""
    kv = jax.eval_shape(lambda: model.init_cache(rows, slots, settings.cache_dtype))
    arrays = cache.arrays(jax.eval_shape(cache.decoded, kv) if shared and cache.is_fp8(kv) else kv)
    return sum(x.value.size * x.value.dtype.itemsize for x in arrays)


def _caches(model: nnx.Module, prompts: int, steps: int, settings: Settings) -> tuple[int, int]:
    """Bytes (of the cache that the tokens go into, of what it is made from)."""
    rows, room = prompts * settings.samples, settings.cache_length
    held = functools.partial(_held, model, settings=settings)
    if settings.prefix and settings.samples == 1:  # in place
        return held(1, settings.prefix, shared=True) + held(rows, room - settings.prefix), 0
    if settings.share_prompts or settings.prefix:
        parts = [(prompts, steps - settings.prefix), *([(1, settings.prefix)] if settings.prefix else [])]
        made, kept = (sum(held(*part, shared=shared) for part in parts) for shared in (False, True))
        return kept + held(rows, room - steps + ops.SHARED_STEP), made if kept != made else 0  # of floats the same arrays
    in_place = rows == prompts and steps == room
    return held(rows, room), 0 if in_place else held(prompts, steps)


def _host() -> tuple[int, int] | None:
    """Bytes (available and swap that is free, in all) of this machine; None where it does not tell (it is no Linux)."""
    try:
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available, swap, total = (1024 * int(found[name].split()[0]) for name in ("MemAvailable", "SwapFree", "MemTotal"))
    except (OSError, KeyError):
        return None
    return available + swap, total


def _free(params: Any) -> tuple[int, int] | None:
    """Bytes (free, in all) of the one device that holds the weights; None where that is not known: over a mesh."""
    devices = {d for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for d in x.devices()}
    if {d.platform for d in devices} == {"cpu"}:
        return _host()
    stats = next(iter(devices)).memory_stats() if len(devices) == 1 else None
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0), stats["bytes_limit"]


def has_room(params: Any, size: int) -> bool:
    """Whether `size` bytes are free, or it is not known."""
    found = _free(params)
    return found is None or size <= found[0]


def check(
    model: nnx.Module, params: Any, prompts: int, steps: int, settings: Settings, vocabulary: int | None, refill: Settings | None = None, few: int = 0
) -> None:
    """ValueError where the rollout cannot fit on the one device that holds the weights. Not known, not checked: over a mesh."""
    found = _free(params)
    if found is None:
        return
    free, limit = found
    need = predict(model, prompts, steps, settings, vocabulary, refill, few)
    if need.total > free:
        gb = lambda size: f"{size / 1e9:.1f} GB"  # noqa: E731
        fit, queue = prompts * free // need.total, refill is not None
        if not fit:
            ways = "Not even one prompt fits"
        elif queue:
            ways = f"About rows_in_flight={fit * settings.samples} fit"
        else:
            ways = f"About {fit} prompts at a time fit (rows_in_flight)"
        raise ValueError(
            f"{'rows_in_flight' if queue else 'input_ids'}: {prompts} prompts with {settings.samples} samples each "
            f"{'at a time ' if queue else ''}and {settings.cache_length} slots need {gb(need.cache)} for the "
            f"cache and {gb(need.logits)} for the logits; {gb(free)} of {gb(limit)} are free. {ways}; more with fewer samples, "
            "a smaller max_new_tokens or cache_dtype"
        )
