"""A queue in front of the compiled loop: any number of prompts, so many rows in flight, the next for one that has ended.

    pool     a DecodeState with places for units; a unit is a prompt with all its samples, a place is its rows
    refill   the next few prompts run and are written into free places; a place that holds no unit is done
    chunk    tokens, until as many units have ended as a refill takes, or the host has something to do (see `Visits`)
    shrink   once nothing waits and few live, they move to a smaller pool: no step pays for rows that have ended

Each is a program of the pool's size; a refill's is also one of its prompts' width and of the tokens that all have in
common. The pool is donated from one to the next and written in place. The host looks at a chunk's ends alone, and copies
results while the next chunk runs. A row's tokens depend on its prompt and its key, as everywhere: not on its place, nor
on when its turn comes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nvfp4jax.models import cache
from nvfp4jax.rollout import decoding, memory
from nvfp4jax.rollout.decoding import Beginning, Controls, DecodeState, Settings
from nvfp4jax.rollout.progress import Show
from nvfp4jax.rollout.sampling import row_keys

REFILLS = 8  # a refill takes this part of the places: fewer stand empty, or more prompts run in one pass
# A pool of more rows than this shrinks to a half, where a step takes nearly as much longer as it has more rows; a smaller one to a quarter, if
# it has as many places.
# Each size is one more program to compile, 10 s for 48 layers.
MANY_ROWS = 256
LEAST_ROWS = 8  # no pool shrinks below: a step of fewer rows takes as long
_ENDLESS = 2**30  # steps of a chunk that nothing but its rows ends

# Where a DecodeState has its rows: the axis from behind. First what is an answer.
_ANSWERS = dict(tokens=-2, logprobs=-2, lengths=-1, experts=-3, top_tokens=-3, top_logprobs=-3)
_ROWS = _ANSWERS | dict(keys=-1, token=-1, position=-1, done=-1, used=-2, limits=-1)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is to run. U units, R = U * settings.samples rows, in the caller's order.

    key: one PRNG key, or [U * settings.repeats], one for each of the caller's prompts.
    limits: the most tokens of each row.
    """

    ids: Int[np.ndarray, "U T"]
    lengths: Int[np.ndarray, "U"]
    limits: Int[np.ndarray, "R"]
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Visits:
    """What the host does between chunks, which have at most `every` steps where there is anything.

    take: params -> None, or newer ones and their version. version: that of the params at first.
    on_tokens: see `generate`.
    """

    every: int
    take: Callable[[Any], tuple[Any, int] | None] | None = None
    version: int = 0
    on_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray | None] | None = None
    show: Show | None = None

    @property
    def any(self) -> bool:
        return not (self.take is None and self.on_tokens is None and self.show is None)


def places(rows_in_flight: int, units: int, settings: Settings) -> int:
    """How many units are in flight at a time."""
    return max(1, min(units, rows_in_flight // settings.samples))


def refill_size(places: int) -> int:
    return max(1, places // REFILLS)


def refill_settings(settings: Settings, width: int) -> Settings:
    """Those of the prompts of a refill: without room for tokens, which the pool has."""
    return dataclasses.replace(settings, cache_length=width)


def _rows(places: Int[Array, "n"], settings: Settings) -> Int[Array, "m"]:
    """The rows of these places."""
    return (places[:, None] * settings.samples + jnp.arange(settings.samples, dtype=jnp.int32)[None]).reshape(-1)


def _present(pool: DecodeState, axes: Mapping[str, int]) -> list[tuple[str, int, jax.Array]]:
    """(name, the axis of its rows, value) of those arrays that the pool has."""
    return [(name, axis, getattr(pool, name)) for name, axis in axes.items() if getattr(pool, name) is not None]


def _shares_prefix(settings: Settings) -> bool:
    """Whether what rows share is the prefix of all; else it is a unit's own, behind a prefix where there is one."""
    return settings.prefix > 0 and settings.samples == 1


def _with_prefix(kv: cache.SharedCache, first: Beginning, settings: Settings) -> cache.SharedCache:
    """A pool's cache with this prefix: a copy of its own, for the pool will be donated."""
    held = jax.tree.map(jnp.copy, cache.decoded(first.shared))
    return dataclasses.replace(kv, **{"shared" if _shares_prefix(settings) else "prefix": held})


# keep_unused: the pool is to lie where the params do.
@functools.partial(jax.jit, static_argnames=("units", "width", "settings"), keep_unused=True)
def _empty(
    graphdef: Any,
    params: Mapping,
    first: Beginning | None,
    seen: Any,
    key: jax.Array,
    controls: Controls,
    units: int,
    width: int,
    settings: Settings,
) -> DecodeState:
    """A pool of places that hold no unit. width: slots of a prompt; first: what `run_prefix` gave."""
    rows = units * settings.samples
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    prefill, trees = functools.partial(decoding.prefill, settings=settings), []

    def fresh(*args: Any, **options: Any) -> list[jax.Array]:  # leaves: a DecodeState is not one of shapes
        leaves, tree = jax.tree.flatten(prefill(*args, **options))
        trees.append(tree)
        return leaves

    of_rows = jax.ShapeDtypeStruct((rows,), key.dtype)
    args = graphdef, params, ints(units, width), ints(units), of_rows, controls
    shapes = jax.eval_shape(fresh, *args, seen=seen, limits=ints(rows), first=first)
    keys = jnp.broadcast_to(key.reshape(-1)[:1], (rows,))
    pool = jax.tree.unflatten(trees[0], [keys if x.dtype == key.dtype else jnp.zeros(x.shape, x.dtype) for x in shapes])
    if first is not None:
        # All rows share as many slots at least, in an empty place too.
        held = jnp.full(rows, settings.prefix, jnp.int32)
        pool = dataclasses.replace(pool, cache=dataclasses.replace(_with_prefix(pool.cache, first, settings), slots=held))
    seen = jax.tree.unflatten(jax.tree.structure(pool.seen), [jnp.copy(x) for x in jax.tree.leaves(seen)])
    return dataclasses.replace(pool, done=jnp.ones(rows, bool), prompt_experts=None, seen=seen)


_run_prefix = jax.jit(decoding.run_prefix, static_argnames="settings")


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="pool")
def _refill(
    graphdef: Any,
    params: Mapping,
    pool: DecodeState,
    first: Beginning | None,
    prompt: Int[Array, "n T"],
    lengths: Int[Array, "n"],
    key: jax.Array,
    callers: Int[Array, "p"],
    limits: Int[Array, "m"],
    places: Int[Array, "n"],
    controls: Controls,
    settings: Settings,
) -> tuple[DecodeState, Int[Array, "L n T k"] | None]:
    """(the pool with n more prompts, each in its place, dropped where the pool has none such; their tokens' experts).

    callers: the prompts' indices among the caller's, all repetitions.
    """
    keys = row_keys(key, callers, settings.num_samples)
    new = refill_settings(settings, prompt.shape[1])
    real = places < len(pool.done) // settings.samples
    fresh = decoding.prefill(graphdef, params, prompt, lengths, keys, controls, new, pool.seen, limits, first, real)
    rows = _rows(places, settings)
    put = {name: cache.put_rows(x, axis, rows, getattr(fresh, name)) for name, axis, x in _present(pool, _ROWS)}
    kv = cache.put(pool.cache, rows, fresh.cache, None if _shares_prefix(settings) else places)
    return dataclasses.replace(pool, cache=kv, seen=fresh.seen, **put), fresh.prompt_experts


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="pool")
def _chunk(
    graphdef: Any,
    params: Mapping,
    pool: DecodeState,
    steps: Int[Array, ""],
    wanted: Int[Array, ""],
    controls: Controls,
    settings: Settings,
) -> DecodeState:
    """At most `steps` more tokens of each row; ends once `wanted` places are done."""
    return decoding.decode(graphdef, params, pool, pool.step + steps, controls, settings, wanted)


@functools.partial(jax.jit, static_argnames="settings")
def _answers(pool: DecodeState, places: Int[Array, "n"], settings: Settings) -> dict[str, jax.Array]:
    rows = _rows(places, settings)
    return {name: cache.take_rows(x, axis, rows) for name, axis, x in _present(pool, _ANSWERS)}


_take_rows = jax.jit(cache.take_rows, static_argnames="axis")


@jax.jit
def _take_but_cache(pool: DecodeState, rows: Int[Array, "m"]) -> DecodeState:
    taken = {name: cache.take_rows(x, axis, rows) for name, axis, x in _present(pool, _ROWS)}
    return dataclasses.replace(pool, **taken)


def _shrink(pool: DecodeState, places: Int[Array, "n"], settings: Settings) -> DecodeState:
    """A pool of these places alone. The old one is given up array by array: both are never in memory as a whole."""
    rows, kv = _rows(places, settings), pool.cache
    small = _take_but_cache(dataclasses.replace(pool, cache=None), rows)

    def take(part: Any, rows: jax.Array) -> Any:
        def one(x: cache.CacheArray) -> cache.CacheArray:
            value = _take_rows(x.value, axis=x.batch, rows=rows)
            x.value.delete()
            return dataclasses.replace(x, value=value)

        return jax.tree.map(one, part, is_leaf=lambda x: isinstance(x, cache.CacheArray))

    if not isinstance(kv, cache.SharedCache):
        return dataclasses.replace(small, cache=take(kv, rows))
    shared = kv.shared if _shares_prefix(settings) else take(kv.shared, places)
    slots = _take_rows(kv.slots, axis=-1, rows=rows)
    return dataclasses.replace(small, cache=dataclasses.replace(kv, own=take(kv.own, rows), shared=shared, slots=slots))


def _next_size(size: int, settings: Settings) -> int:
    """The places that a pool of `size` shrinks to, 0 where it stays."""
    smaller = size // (2 if size < 4 or size * settings.samples > MANY_ROWS else 4)
    return smaller if smaller * settings.samples >= LEAST_ROWS else 0


def _smaller(params: Any, largest: int, size: int, settings: Settings) -> int:
    """The places of the next smaller pool that has room beside a pool's largest array, of so many bytes; 0 for none."""
    smaller = _next_size(size, settings)
    while smaller and not memory.has_room(params, largest * smaller // size):
        smaller = _next_size(smaller, settings)
    return smaller


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays as it is while a queue runs. few: the prompts of a refill."""

    graphdef: Any
    prompts: Prompts
    few: int
    controls: Controls
    settings: Settings

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these units, or of these places."""
        return (numbers[:, None] * self.settings.samples + np.arange(self.settings.samples)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the host knows of all rows, in the caller's order: arrays that are written into.

    answers: by their names in DecodeState: the lengths as of the last visit, the rest of rows that have ended; and the
        prompts' experts. versions: of the weights of each token, or None.
    done: a row has ended; ended: `on_tokens` has asked for that.
    late: results that are still to be copied, (rows, values); late_prompts: the experts of prompts, (units, values).
    """

    answers: dict[str, np.ndarray]
    versions: np.ndarray | None
    done: np.ndarray
    ended: np.ndarray
    late: list[tuple[np.ndarray, dict[str, jax.Array]]] = dataclasses.field(default_factory=list)
    late_prompts: list[tuple[np.ndarray, jax.Array]] = dataclasses.field(default_factory=list)


def _nothing_found(job: _Job, pool: DecodeState, versioned: bool) -> _Found:
    total, pad = len(job.prompts.limits), job.settings.pad_id
    fills, answers = dict(tokens=pad, top_tokens=pad, experts=-1), {}
    for name, axis, x in _present(pool, _ANSWERS):
        shape = list(x.shape)
        shape[axis] = total
        answers[name] = np.full(shape, fills.get(name, 0), x.dtype)
    versions = np.full(answers["tokens"].shape, -1, np.int64) if versioned else None
    return _Found(answers, versions, np.zeros(total, bool), np.zeros(total, bool))


def run(
    graphdef: Any,
    params: Any,
    seen: Any,
    prompts: Prompts,
    size: int,
    controls: Controls,
    settings: Settings,
    visits: Visits,
) -> tuple[dict[str, np.ndarray], np.ndarray | None, Any]:
    """(the answers by their names in DecodeState, with the prompts' experts, of all rows in the caller's order, on the
    host; the version of the weights of each token where visits.take may change them; the layers' InputAmax at the end).

    size: places of the pool. Prompts begin in their order, those that begin together by their length (`_beginning`).
    Weights that are taken run the shared prefix again, so that a prompt that begins behind it is answered by them alone; rows in flight go on behind the part that is held once with
    what older weights made of the rest.
    """
    job, version = _Job(graphdef, prompts, refill_size(size), controls, settings), visits.version
    first, seen = _first(job, params, seen)
    pool = _empty(graphdef, params, first, seen, prompts.key, controls, size, prompts.ids.shape[1], settings)
    found = _nothing_found(job, pool, visits.take is not None)
    waiting, unit = np.arange(len(prompts.lengths)), np.full(size, -1)  # unit: the one in each place, -1 for none
    every = np.int32(visits.every if visits.any else _ENDLESS)
    while len(waiting) or (unit >= 0).any():
        if visits.take is not None and (newer := visits.take(params)) is not None:
            params, version = newer
            first, noted = _first(job, params, pool.seen)
            pool = dataclasses.replace(pool, seen=noted)
            if first is not None:
                pool = dataclasses.replace(pool, cache=_with_prefix(pool.cache, first, settings))
        begin = _beginning(waiting, int((unit < 0).sum()), job.few, job.prompts.lengths)
        waiting = waiting[len(begin) :]
        for start in range(0, len(begin), job.few):
            pool = _begin(job, params, pool, first, begin[start : start + job.few], unit, found)
        largest = max((x.nbytes for x in jax.tree.leaves(pool.cache)), default=0)
        smaller = _smaller(params, largest, len(unit), settings)
        wanted = min(job.few, len(waiting)) if len(waiting) else len(unit) - smaller
        pool = _chunk(graphdef, params, pool, every, np.int32(wanted), controls, settings.of_decode)
        _copy(job, found)
        _book(job, found, pool, unit, version)
        if visits.on_tokens is not None:
            pool = _ask(job, found, pool, unit, visits.on_tokens)
            never = found.ended[job.rows(waiting)].reshape(-1, settings.samples).all(1)
            found.done[job.rows(waiting[never])] = True
            waiting = waiting[~never]
        if visits.show is not None:
            visits.show(int(found.done.sum()), int(found.answers["lengths"].sum()))
        _harvest(job, found, pool, unit)
        living, size = int((unit >= 0).sum()), len(unit)
        while not len(waiting) and 0 < living <= smaller:
            size, smaller = smaller, _next_size(smaller, settings)
        if size < len(unit):
            kept = np.argsort(unit < 0, kind="stable")[:size]
            pool, unit = _shrink(pool, jnp.asarray(kept, jnp.int32), settings), unit[kept]
    _copy(job, found)
    return found.answers, found.versions, pool.seen


def _first(job: _Job, params: Any, seen: Any) -> tuple[Beginning | None, Any]:
    """What all prompts begin with, run, None where that is nothing; and the layers' InputAmax then."""
    begin = job.settings.begin
    return _run_prefix(job.graphdef, params, job.prompts.ids[:1, :begin], job.settings, seen) if begin else (None, seen)


def _beginning(waiting: np.ndarray, free: int, few: int, lengths: np.ndarray) -> np.ndarray:
    """Those of the units that wait which fill free places now: whole refills of the first, or all that are left. Near lengths come
    together, so that a refill has no more columns than it needs."""
    begin = waiting[: len(waiting) if len(waiting) <= free else free // few * few]
    return begin[np.argsort(lengths[begin], kind="stable")]


def _columns(longest: int, most: int) -> int:
    """Those of a refill whose longest prompt has so many tokens, where no prompt has more than `most`: at most eight different numbers,
    each of which is a program."""
    step = max(16, 1 << max(0, most.bit_length() - 3))
    return min(most, -(-longest // step) * step)


def _begin(
    job: _Job, params: Any, pool: DecodeState, first: Beginning | None, group: np.ndarray, unit: np.ndarray, found: _Found
) -> DecodeState:
    """The units of `group`, a refill or fewer, in free places. Fewer are filled up with the last one again, which goes
    nowhere and counts nowhere: a program has one size."""
    free, missing = np.flatnonzero(unit < 0)[: len(group)], job.few - len(group)
    unit[free] = group
    places = np.concatenate([free, len(unit) + np.arange(missing)]).astype(np.int32)
    filled, prompts = np.pad(group, (0, missing), mode="edge"), job.prompts
    begin = job.settings.begin
    width = begin + _columns(int(prompts.lengths[filled].max()) - begin, prompts.ids.shape[1] - begin)
    callers, key = (filled[:, None] * job.settings.repeats + np.arange(job.settings.repeats)).reshape(-1), prompts.key
    if key.ndim:  # on the host: a gather on the device would be a program for each number of prompts
        data = np.asarray(jax.random.key_data(key))[callers]
        key = jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(key))
    rows = job.rows(filled)
    limits = np.where(found.ended[rows], 0, prompts.limits[rows]).astype(np.int32)  # a row that was ended while it waited has no token
    ids, lengths = prompts.ids[filled, :width], prompts.lengths[filled]
    pool, experts = _refill(
        job.graphdef, params, pool, first, ids, lengths, key, callers.astype(np.int32), limits, places, job.controls,
        job.settings,
    )  # fmt: skip
    if experts is not None:
        found.late_prompts.append((group, experts))
    return pool


def _in_flight(job: _Job, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the rows of the pool that hold one of the caller's, which these are)."""
    at = np.flatnonzero(unit >= 0)
    return job.rows(at), job.rows(unit[at])


def _book(job: _Job, found: _Found, pool: DecodeState, unit: np.ndarray, version: int) -> None:
    """Waits for the chunk, and notes how far its rows are: what is new was made by the weights of `version`."""
    done, lengths = jax.device_get((pool.done, pool.lengths))
    in_pool, rows = _in_flight(job, unit)
    before, now = found.answers["lengths"][rows], lengths[in_pool]
    found.done[rows], found.answers["lengths"][rows] = done[in_pool], now
    if found.versions is not None:
        columns = np.arange(found.versions.shape[1])
        made = (columns >= before[:, None]) & (columns < now[:, None])
        found.versions[rows] = np.where(made, version, found.versions[rows])


def _ask(job: _Job, found: _Found, pool: DecodeState, unit: np.ndarray, on_tokens: Callable) -> DecodeState:
    """Shows the tokens of all rows, and ends those that it is told to."""
    in_pool, rows = _in_flight(job, unit)
    found.answers["tokens"][rows] = np.asarray(pool.tokens)[in_pool]
    longest = job.prompts.limits.max()
    asked = on_tokens(found.answers["tokens"][:, :longest].copy(), found.answers["lengths"].copy())
    if asked is not None:
        np.logical_or(found.ended, asked, out=found.ended)
    if not (found.ended[rows] & ~found.done[rows]).any():
        return pool
    found.done[rows] |= found.ended[rows]
    mask = np.zeros(len(unit) * job.settings.samples, bool)
    mask[in_pool] = found.ended[rows]
    return dataclasses.replace(pool, done=pool.done | jnp.asarray(mask))


def _harvest(job: _Job, found: _Found, pool: DecodeState, unit: np.ndarray) -> None:
    """Frees the places of units that have ended; their answers are copied later."""
    at = np.flatnonzero(unit >= 0)
    over = at[found.done[job.rows(unit[at])].reshape(-1, job.settings.samples).all(1)]
    for start in range(0, len(over), job.few):
        some = over[start : start + job.few]
        values = _answers(pool, np.resize(some, job.few).astype(np.int32), job.settings.of_decode)
        found.late.append((job.rows(unit[some]), values))
    unit[over] = -1


def _copy(job: _Job, found: _Found) -> None:
    """Waits for the results that are late."""
    for rows, values in found.late:
        for name, value in values.items():
            into = np.moveaxis(found.answers[name], _ANSWERS[name], 0)
            into[rows] = np.moveaxis(np.asarray(value), _ANSWERS[name], 0)[: len(rows)]
    for units, value in found.late_prompts:
        experts = np.asarray(value)
        if "prompt_experts" not in found.answers:
            shape = (experts.shape[0], *job.prompts.ids.shape, experts.shape[-1])
            found.answers["prompt_experts"] = np.full(shape, -1, np.int32)
        found.answers["prompt_experts"][:, units, : experts.shape[2]] = experts[:, : len(units)]
    found.late.clear()
    found.late_prompts.clear()
