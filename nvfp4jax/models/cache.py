"""A decoder's cache: arrays that know their axes, so that what is done to a cache does not depend on the family.

A cache is any pytree of `CacheArray`s. Our models' are a tuple with one dict by name for each entry of `model.layers`:
keys and values [B, Hkv, S, D], or a latent [B, S, R], with a leading axis where an entry is a stack of layers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from nvfp4jax.backends import xla


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


def init_cache(
    shapes: Sequence[Shapes], depths: Sequence[int | None], batch: int, length: int, dtype: DTypeLike
) -> Cache:
    """An empty cache. shapes, depths: one for each entry of `model.layers`; depth: None, or the layers stacked in it."""

    def empty(shape: tuple[int | None, ...], depth: int | None) -> CacheArray:
        lead = () if depth is None else (depth,)
        sizes = tuple(length if size is None else size for size in shape)
        return CacheArray(jnp.zeros((*lead, batch, *sizes), dtype), -len(shape) - 1, shape.index(None) - len(shape))

    return tuple(
        {name: empty(shape, depth) for name, shape in entry.items()} for entry, depth in zip(shapes, depths, strict=True)
    )


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


def repeat(cache: Any, times: int) -> Any:
    """Each row `times` times in a row: several samples of a prompt."""
    if times == 1:
        return cache
    return _map(lambda x: jnp.repeat(x.value, times, axis=x.value.ndim + x.batch), cache)


def extend(cache: Any, slots: int) -> Any:
    """The cache with room for `slots` slots a row, the new ones zero."""

    def grow(x: CacheArray) -> jax.Array:
        extra = slots - x.value.shape[x.slots]
        if extra < 0:
            raise ValueError(f"the cache has {x.value.shape[x.slots]} slots already, it cannot be extended to {slots}")
        axis = x.value.ndim + x.slots
        return jnp.pad(x.value, [(0, extra if a == axis else 0) for a in range(x.value.ndim)])

    return _map(grow, cache)


class LayerCache(NamedTuple):
    """One layer's part of a cache: its arrays, or the arrays of its whole stack and its place in it."""

    arrays: dict[str, CacheArray]
    layer: Int[Array, ""] | None = None

    def write(self, starts: Int[Array, "B"], **new: jax.Array) -> "LayerCache":
        """The part after T tokens of each row were written from slot starts[b] on; tokens past the last slot are dropped.

        new: by name, [B, T, ...], the axes between rows and slots, and those behind the slots, after T.
        """
        written = {name: self._write(self.arrays[name], starts, value) for name, value in new.items()}
        return self._replace(arrays=self.arrays | written)

    def _write(self, into: CacheArray, starts: Int[Array, "B"], new: jax.Array) -> CacheArray:
        value = xla.write_slots(into.value, starts, new, self.layer, into.slots - into.batch - 1)
        return dataclasses.replace(into, value=value)

    def replace(self, **values: jax.Array) -> "LayerCache":
        """The part with other values in its arrays, of the same shapes."""
        changed = {name: dataclasses.replace(self.arrays[name], value=value) for name, value in values.items()}
        return self._replace(arrays=self.arrays | changed)

    def __getitem__(self, name: str) -> jax.Array:
        """A whole array, the stack's where there is one: an operation takes `layer` beside it."""
        return self.arrays[name].value
