"""A decoder's cache: arrays that know their axes, so that what is done to a cache does not depend on the family.

A cache is any pytree of `CacheArray`s. Our models' are a tuple with one dict by name for each entry of `model.layers`:
keys and values [B, Hkv, S, D], or a latent [B, S, R], with a leading axis where an entry is a stack of layers.

A cache in FP8 (see `nvfp4jax.fp8`) has its codes by these names and, beside "keys", "keys_scale" [B, Hkv, S]: its axes are named like
any other's, so that a cache is repeated and extended with its scales. What several rows begin with can be held once for all of them: a
`SharedCache`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from nvfp4jax import arguments, fp8, ops
from nvfp4jax.backends import xla
from nvfp4jax.fp8 import FP8Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheArray:
    """One array of a cache. batch, slots: its axes for rows and for slots, negative, so that a stack's axis in front
    changes nothing."""

    value: Any  # an array; Any: a tree of shapes or shardings is a cache too
    batch: int = dataclasses.field(metadata=dict(static=True))
    slots: int = dataclasses.field(metadata=dict(static=True))


Cache = tuple[Mapping[str, CacheArray], ...]
# What a layer keeps of a row, by name: a shape with None where the slots are, e.g. {"keys": (Hkv, None, D)}.
Shapes = Mapping[str, tuple[int | None, ...]]
DTYPES = (*arguments.WEIGHT_DTYPES, fp8.DTYPE.name)


def _scale_of(name: str) -> str:
    return f"{name}_scale"


def init_cache(
    shapes: Sequence[Shapes], depths: Sequence[int | None], batch: int, length: int, dtype: DTypeLike
) -> Cache:
    """An empty cache. shapes, depths: one for each entry of `model.layers`; depth: None, or the layers stacked in it. ValueError for a
    dtype that is none of DTYPES."""
    dtype = arguments.dtype("cache_dtype", dtype, DTYPES)

    def empty(shape: tuple[int | None, ...], depth: int | None, dtype: DTypeLike) -> CacheArray:
        lead = () if depth is None else (depth,)
        sizes = tuple(length if size is None else size for size in shape)
        return CacheArray(jnp.zeros((*lead, batch, *sizes), dtype), -len(shape) - 1, shape.index(None) - len(shape))

    def of_layer(entry: Shapes, depth: int | None) -> dict[str, CacheArray]:
        arrays = {name: empty(shape, depth, dtype) for name, shape in entry.items()}
        scales = {_scale_of(name): empty(shape[:-1], depth, jnp.float32) for name, shape in entry.items() if dtype == fp8.DTYPE}
        return arrays | scales

    return tuple(of_layer(entry, depth) for entry, depth in zip(shapes, depths, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedCache:
    """A cache of B rows of which several begin alike: row b's first slots[b] slots, a multiple of ops.SHARED_STEP, are those of row
    b // (B / N) of `shared`, a cache of N rows; `own` has each row's slots from slots[b] on. `own` may be FP8 where `shared` is not.

    prefix: None, or a cache of one row, of whole steps of ops.SHARED_STEP, which stands in front of each row of `shared`: what all B rows
    begin with is held once, what several of them go on with once for these.
    """

    own: Cache
    shared: Cache
    slots: Int[Array, "B"]
    prefix: Cache | None = None


def arrays(cache: Any) -> list[CacheArray]:
    """The arrays of a cache. ValueError for one that is made of other things."""
    leaves = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, CacheArray))
    if other := [leaf for leaf in leaves if not isinstance(leaf, CacheArray)]:
        raise ValueError(
            f"a cache is a pytree of models.cache.CacheArray, which name the axes of rows and slots; this one holds a "
            f"{type(other[0]).__name__}"
        )
    return leaves


def _map(f: Callable[[CacheArray], Any], cache: Any) -> Any:
    arrays(cache)
    is_array = lambda x: isinstance(x, CacheArray)  # noqa: E731
    return jax.tree.map(lambda x: dataclasses.replace(x, value=f(x)), cache, is_leaf=is_array)


def length(cache: Any) -> int | None:
    """The slots of a row; None for a cache without arrays."""
    sizes = {x.value.shape[x.slots] for x in arrays(cache)}
    if len(sizes) > 1:
        raise ValueError(f"the cache's arrays have different numbers of slots: {sorted(sizes)}")
    return sizes.pop() if sizes else None


def split(cache: Any, slots: int) -> tuple[Any, Any | None]:
    """(the first `slots` slots of each row, those behind them or None)."""
    part = lambda start, stop: _map(lambda x: lax.slice_in_dim(x.value, start, stop, axis=x.value.ndim + x.slots), cache)  # noqa: E731
    size = length(cache) or slots
    return (cache, None) if size == slots else (part(0, slots), part(slots, size))


def begun(cache: Any, row: Any) -> Any:
    """The cache with the slots of `row`, a like cache of one row, as the first ones of each row."""
    values = iter(arrays(row))

    def put(x: CacheArray) -> jax.Array:
        value, axis = next(values).value, x.value.ndim + x.batch
        shape = [x.value.shape[axis] if a == axis else size for a, size in enumerate(value.shape)]
        return lax.dynamic_update_slice_in_dim(x.value, jnp.broadcast_to(value, shape), 0, x.value.ndim + x.slots)

    return _map(put, cache)


def repeat(cache: Any, times: int) -> Any:
    """Each row `times` times in a row: several samples of a prompt."""
    if times == 1:
        return cache
    return _map(lambda x: jnp.repeat(x.value, times, axis=x.value.ndim + x.batch), cache)


def put_rows(x: jax.Array, axis: int, rows: Int[Array, "n"], new: jax.Array) -> jax.Array:
    """x with the n rows of `new` in these places of `axis`, negative; new's axes behind it may be shorter, and what lies beyond them
    stays. Places that x does not have are dropped; no two are the same. A donated x is written where it lies."""
    lead = x.ndim + axis
    # Indices of all axes up to the rows': a scatter over a later axis alone would have XLA move the whole array's axes.
    at = jnp.meshgrid(*(jnp.arange(size, dtype=jnp.int32) for size in x.shape[:lead]), rows.astype(jnp.int32), indexing="ij")
    numbers = lax.ScatterDimensionNumbers(tuple(range(lead + 1, x.ndim)), tuple(range(lead + 1)), tuple(range(lead + 1)))
    return lax.scatter(x, jnp.stack(at, -1), new, numbers, unique_indices=True, mode=lax.GatherScatterMode.FILL_OR_DROP)


def take_rows(x: jax.Array, axis: int, rows: Int[Array, "n"]) -> jax.Array:
    """These rows of `axis`, negative."""
    return jnp.take(x, rows, axis=axis, mode="clip")


def put(cache: Any, rows: Int[Array, "n"], new: Any, shared_rows: Int[Array, "m"] | None = None) -> Any:
    """The cache with n rows of a like one, of as many slots or fewer, in these of its rows: see `put_rows`. shared_rows: where those that
    `new` shares go; None: what is shared stays. A prefix stays."""
    if isinstance(cache, SharedCache):
        shared = cache.shared if shared_rows is None else put(cache.shared, shared_rows, new.shared)
        own, slots = put(cache.own, rows, new.own), put_rows(cache.slots, -1, rows, new.slots)
        return dataclasses.replace(cache, own=own, shared=shared, slots=slots)
    values = iter(arrays(new))
    return _map(lambda x: put_rows(x.value, x.batch, rows, next(values).value), cache)


def share(cache: Cache, lengths: Int[Array, "N"], times: int, slots: int, prefix: Cache | None = None) -> SharedCache:
    """Each row `times` times in a row, as `repeat` does it, its whole steps of SHARED_STEP slots held once: the given cache, of which
    nothing is copied but a row's last step; of an FP8 cache it is the decoded one (see `decoded`). lengths: the slots in use; slots: room
    for more, of each row; prefix: a cache of one row that the given one goes on from."""
    held = 0 if prefix is None else length(prefix) or 0
    whole = lengths // ops.SHARED_STEP * ops.SHARED_STEP

    def rest(x: CacheArray) -> jax.Array:
        rows, axis = x.value.ndim + x.batch, x.value.ndim + x.slots
        at = jnp.minimum(whole[:, None] + jnp.arange(ops.SHARED_STEP, dtype=jnp.int32)[None], x.value.shape[axis] - 1)
        sizes = [at.shape[(rows, axis).index(a)] if a in (rows, axis) else 1 for a in range(x.value.ndim)]
        part = jnp.repeat(jnp.take_along_axis(x.value, at.reshape(sizes), axis), times, rows)
        return jnp.pad(part, [(0, slots if a == axis else 0) for a in range(x.value.ndim)])

    front = None if prefix is None else decoded(prefix)
    return SharedCache(_map(rest, cache), decoded(cache), jnp.repeat(whole + jnp.int32(held), times), front)


def decoded(cache: Cache) -> Cache:
    """The cache with what is FP8 in bfloat16, which is exact: what many rows read at each step is decoded once for all of them."""

    def of_layer(arrays: Mapping[str, CacheArray]) -> dict[str, CacheArray]:
        scales = {_scale_of(name) for name in arrays}
        plain = lambda x: x.dequantize(jnp.bfloat16) if isinstance(x, FP8Array) else x  # noqa: E731
        return {name: dataclasses.replace(x, value=plain(_named(arrays, name))) for name, x in arrays.items() if name not in scales}

    return tuple(map(of_layer, cache)) if is_fp8(cache) else cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def as_read(x: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """x [..., D], keys, values or latents, as attention reads it from a cache of this dtype, None for x's; gradients pass straight through."""
    if dtype is None or dtype == x.dtype:
        return x
    if dtype == fp8.DTYPE:
        return fp8.quantize(x).dequantize(x.dtype)
    return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)  # XLA may skip a rounding that is widened again


as_read.defvjp(lambda x, dtype: (as_read(x, dtype), None), lambda dtype, _, dy: (dy,))


def is_fp8(cache: Any) -> bool:
    return any(x.value.dtype == fp8.DTYPE for x in arrays(cache))


def extend(cache: Any, slots: int) -> Any:
    """The cache with room for `slots` slots a row, the new ones zero."""

    def grow(x: CacheArray) -> jax.Array:
        extra = slots - x.value.shape[x.slots]
        if extra < 0:
            raise ValueError(f"the cache has {x.value.shape[x.slots]} slots already, it cannot be extended to {slots}")
        axis = x.value.ndim + x.slots
        return jnp.pad(x.value, [(0, extra if a == axis else 0) for a in range(x.value.ndim)])

    return _map(grow, cache)


def parts(cache: Cache | SharedCache) -> list["LayerCache"]:
    """One for each entry of `model.layers`."""
    if isinstance(cache, SharedCache):
        fronts = [None] * len(cache.own) if cache.prefix is None else [dict(x) for x in cache.prefix]
        entries = zip(cache.own, cache.shared, fronts, strict=True)
        return [LayerCache(dict(own), None, dict(shared), cache.slots, prefix) for own, shared, prefix in entries]
    return [LayerCache(dict(own)) for own in cache]


class LayerCache(NamedTuple):
    """One layer's part of a cache: its arrays, or the arrays of its whole stack and its place in it; of a SharedCache also what its
    rows share, and the prefix where it has one."""

    arrays: dict[str, CacheArray]
    layer: Int[Array, ""] | None = None
    shared: dict[str, CacheArray] | None = None
    shared_slots: Int[Array, "B"] | None = None
    prefix: dict[str, CacheArray] | None = None

    def shared_rows(self, keys: str, values: str, view: Callable[[Any], Any] = lambda x: x) -> ops.SharedRows | None:
        """What `ops.attention` reads besides: arrays by name, viewed as keys and values."""
        if self.shared is None:
            return None
        pair = lambda arrays: (view(_named(arrays, keys)), view(_named(arrays, values)))  # noqa: E731
        return ops.SharedRows(*pair(self.shared), self.shared_slots, None if self.prefix is None else pair(self.prefix))

    def write(self, starts: Int[Array, "B"], **new: jax.Array) -> "LayerCache":
        """The part after T tokens of each row were written from slot starts[b] of `arrays` on; tokens past the last one are dropped.

        new: by name, [B, T, ...], the axes between rows and slots, and those behind the slots, after T; in an FP8 cache it is quantized.
        """
        parts = _parts({name: fp8.quantize(value) if _scale_of(name) in self.arrays else value for name, value in new.items()})
        return self._replace(arrays=self.arrays | {name: self._write(self.arrays[name], starts, value) for name, value in parts.items()})

    def _write(self, into: CacheArray, starts: Int[Array, "B"], new: jax.Array) -> CacheArray:
        value = xla.write_slots(into.value, starts, new, self.layer, into.slots - into.batch - 1)
        return dataclasses.replace(into, value=value)

    def replace(self, **values: jax.Array | FP8Array) -> "LayerCache":
        """The part with other values in its arrays, of the same shapes."""
        changed = {name: dataclasses.replace(self.arrays[name], value=value) for name, value in _parts(values).items()}
        return self._replace(arrays=self.arrays | changed)

    def __getitem__(self, name: str) -> jax.Array | FP8Array:
        """A whole array, the stack's where there is one: an operation takes `layer` beside it."""
        return _named(self.arrays, name)


def _named(arrays: Mapping[str, CacheArray], name: str) -> jax.Array | FP8Array:
    """The array of a name, with its scales where it has any."""
    scale = arrays.get(_scale_of(name))
    return arrays[name].value if scale is None else FP8Array(arrays[name].value, scale.value)


def _parts(values: Mapping[str, jax.Array | FP8Array]) -> dict[str, jax.Array]:
    """The arrays of a cache that hold these values, by name."""
    parts = {}
    for name, value in values.items():
        parts |= {name: value.qvalue, _scale_of(name): value.scale} if isinstance(value, FP8Array) else {name: value}
    return parts
