"""Caches of key-value and latent arrays, single and stacked, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvfp4jax.models import cache
from nvfp4jax.models.cache import CacheArray, LayerCache

SHAPES = [{"keys": (2, None, 8), "values": (2, None, 4)}, {"latent": (None, 6), "rope": (None, 2)}]


@pytest.mark.parametrize("depths", [(None, None), (3, None), (3, 2)])
def test_writing_repeating_and_growing(depths, key):
    """Rows at their own slots, the last token of one row past the end; each sample has its prompt's slots."""
    kv = cache.init_cache(SHAPES, depths, 3, 7, jnp.float32)
    assert cache.length(kv) == 7 and len(cache.arrays(kv)) == 4
    assert kv[0]["keys"].value.shape == (*([] if depths[0] is None else [3]), 3, 2, 7, 8)
    starts = np.asarray([0, 2, 5])
    new = {name: jax.random.normal(jax.random.fold_in(key, i), (3, 3, *[s for s in shape if s is not None]))
           for i, (name, shape) in enumerate((n, s) for entry in SHAPES for n, s in entry.items())}  # fmt: skip
    expected = jax.tree.map(np.array, kv)
    written = []
    for entry, depth in enumerate(depths):
        part = LayerCache(dict(kv[entry]), None if depth is None else jnp.int32(1))
        part = part.write(jnp.asarray(starts, jnp.int32), **{name: new[name] for name in SHAPES[entry]})
        written.append(part.arrays)
        for name, shape in SHAPES[entry].items():
            target = expected[entry][name].value
            target = target if depth is None else target[1]
            for row in range(3):
                for t in range(3):
                    if starts[row] + t < 7:
                        target[(row, *[slice(None)] * shape.index(None), starts[row] + t)] = new[name][row, t]
    for a, b in zip(jax.tree.leaves(tuple(written)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    grown = cache.extend(cache.repeat(tuple(written), 2), 9)
    assert cache.length(grown) == 9
    for entry, depth in enumerate(depths):
        for name, shape in SHAPES[entry].items():
            value = np.asarray(grown[entry][name].value)
            rows = value if depth is None else value[1]
            one = expected[entry][name].value if depth is None else expected[entry][name].value[1]
            slot = 1 + shape.index(None)
            assert rows.shape[0] == 6 and rows.shape[slot] == 9
            old, extra = np.split(rows, [7], axis=slot)
            np.testing.assert_array_equal(old, np.repeat(one, 2, axis=0))
            assert not extra.any()


def drawn(kv):
    rng = np.random.default_rng()
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), kv)


@pytest.mark.parametrize("depths", [(None, None), (3, 2)])
def test_rows_put_and_taken(depths):
    """New rows of fewer slots in their places, one past the last dropped; the slots behind them, and other rows, as they were."""
    old, new = (drawn(cache.init_cache(SHAPES, depths, rows, slots, jnp.float32)) for rows, slots in ((5, 7), (3, 4)))
    places = jnp.asarray([3, 0, 5])
    found = jax.jit(cache.put, donate_argnums=0)(jax.tree.map(jnp.copy, old), places, new)
    for a, b, c in zip(cache.arrays(found), cache.arrays(old), cache.arrays(new), strict=True):
        front = lambda x: np.moveaxis(np.array(x.value), (x.value.ndim + x.batch, x.value.ndim + x.slots), (0, 1))
        expected = front(b)
        expected[3, :4], expected[0, :4] = front(c)[0], front(c)[1]
        np.testing.assert_array_equal(front(a), expected)
        np.testing.assert_array_equal(cache.take_rows(a.value, a.batch, jnp.asarray([4, 3])), np.take(a.value, [4, 3], a.value.ndim + a.batch))


def test_rows_that_share():
    """Two rows a unit: both kinds of rows go to their places; what all share stays, and so does a prefix."""
    def made(units, slots, seed):
        own, shared = (drawn(cache.init_cache(SHAPES[:1], (2,), rows, slots, jnp.float32)) for rows in (2 * units, units))
        return cache.SharedCache(own, shared, jnp.full(2 * units, 128 * seed, jnp.int32))

    old, new = made(3, 6, 1), made(1, 6, 2)
    found = jax.jit(cache.put)(old, jnp.asarray([2, 3]), new, jnp.asarray([1]))
    assert found.slots.tolist() == [128, 128, 256, 256, 128, 128]
    for name in ("keys", "values"):
        for part, places, others in (("shared", [1], [0, 2]), ("own", [2, 3], [0, 1, 4, 5])):
            a, b, c = (np.asarray(getattr(kv, part)[0][name].value) for kv in (found, old, new))
            np.testing.assert_array_equal(a[:, places], c)
            np.testing.assert_array_equal(a[:, others], b[:, others])
    first = drawn(cache.init_cache(SHAPES[:1], (2,), 1, 128, jnp.float32))
    behind = cache.put(dataclasses.replace(old, prefix=first), jnp.asarray([2, 3]), dataclasses.replace(new, prefix=found.own), jnp.asarray([1]))
    assert behind.prefix is first
    assert cache.put(made(2, 6, 1), jnp.asarray([2, 3]), made(1, 6, 2)).slots.tolist() == [128, 128, 256, 256]


@pytest.mark.parametrize("depths", [(None, None), (3, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float8_e4m3fn])
def test_what_one_row_holds_begins_all(depths, dtype):
    """A row's slots behind a place, of codes and scales alike, become the first ones of each row of a longer cache, whose others stay."""
    rng = np.random.default_rng()
    size, place = int(rng.integers(5, 12)), int(rng.integers(1, 5))
    row, others = (cache.init_cache(SHAPES, depths, rows, slots, dtype) for rows, slots in ((1, size), (3, 12)))
    row, others = (jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)).astype(x.dtype), kv) for kv in (row, others))
    front, behind = jax.jit(cache.split, static_argnums=1)(row, place)
    found = jax.jit(cache.begun)(others, behind)
    assert cache.length(front) == place and cache.length(behind) == size - place and jax.tree.structure(found) == jax.tree.structure(others)
    slots_first = lambda x: np.moveaxis(np.asarray(x.value, np.float32), (x.value.ndim + x.slots, x.value.ndim + x.batch), (0, 1))
    for whole, a, b, old, new in zip(*map(cache.arrays, (row, front, behind, others, found)), strict=True):
        assert a.value.dtype == b.value.dtype == new.value.dtype == whole.value.dtype
        whole, a, b, old, new = map(slots_first, (whole, a, b, old, new))
        np.testing.assert_array_equal(a, whole[:place])
        np.testing.assert_array_equal(b, whole[place:])
        np.testing.assert_array_equal(new, np.concatenate([np.repeat(whole[place:], 3, 1), old[size - place :]]))
    assert cache.split(row, size) == (row, None) and cache.split((), size) == ((), None)


def test_refusals():
    kv = cache.init_cache(SHAPES, (None, None), 1, 4, jnp.float32)
    with pytest.raises(ValueError, match="4 slots already, it cannot be extended to 3"):
        cache.extend(kv, 3)
    with pytest.raises(ValueError, match="made of|pytree of models.cache.CacheArray.*holds a"):
        cache.extend({"keys": jnp.zeros((1, 2, 4, 8))}, 8)
    with pytest.raises(ValueError, match=r"different numbers of slots: \[4, 5\]"):
        cache.length((*kv, {"more": CacheArray(jnp.zeros((1, 5, 2)), -3, -2)}))
    assert cache.length(()) is None and cache.repeat((), 3) == ()
