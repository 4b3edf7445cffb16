"""Leaf checks that run where the arrays live: digests, and the health of scales and weights, in one pass over the bytes.

A digest is computed on the device, from the array as it will be used, and does not depend on its sharding: a check after loading
covers the disk, the file system, the decoder and the transfer, and a publisher with sharded weights gathers nothing (a digest is
a sum over words, each scrambled and times keys of its row and column, so every shard gives its share). It guards against damage
and mix-ups, not against an attacker, who could rewrite it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4jax.numerics import LARGEST_WEIGHT_GLOBAL_SCALE

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))


def _keys(index: jax.Array, seed: int) -> jax.Array:
    """An odd key for each index: times an odd number, no change of a word is lost."""
    return _mix(index + jnp.uint32(seed)) | jnp.uint32(1)


def _per_word(x: jax.Array, shape: tuple[int, ...]) -> int:
    """Elements that are hashed at once: four bytes' worth where they line up in an array of this shape."""
    per_word = 4 // x.dtype.itemsize
    return per_word if shape and shape[-1] % per_word == 0 else 1


def _unfit(word: jax.Array, dtype: jnp.dtype, per_word: int, signed: bool) -> jax.Array:
    """u32 words, not 0 where one of the elements of `dtype` in a word is NaN or infinite (its magnitude, as bits, is above the largest),
    or, unless `signed`, has a sign."""
    bits = 8 * dtype.itemsize
    sign = 1 << (bits - 1)
    largest = int(np.asarray(jnp.finfo(dtype).max, dtype).view(f"u{dtype.itemsize}"))
    each = sum(1 << (bits * i) for i in range(per_word))
    beyond = (word & jnp.uint32(each * (sign - 1))) + jnp.uint32(each * (sign - 1 - largest))
    return (beyond if signed else beyond | word) & jnp.uint32(each * sign)


@functools.partial(jax.jit, static_argnames=("shape", "kind"))
def _summary(x: jax.Array, start: jax.Array | None, shape: tuple[int, ...], kind: str | None) -> jax.Array:
    """u32 [3] of the piece x, which begins at index `start` (i32 [rank]; None: at 0) of an array of this shape: its share in the
    two sums of the digest, and not 0 where it is unfit for its kind. One reduction, because XLA on a CPU fuses no two into one."""
    dtype, per_word = x.dtype, _per_word(x, shape)
    fit = jnp.ones((), bool)
    if kind in ("input_scale", "global_scale"):
        fit = (x > jnp.zeros((), dtype)).all()
    if kind == "global_scale":
        fit &= (x < jnp.asarray(LARGEST_WEIGHT_GLOBAL_SCALE, dtype)).all()
    if not shape:
        x, start, shape = x[None], None, (1,)
    word = lax.bitcast_convert_type(x, _WORDS[dtype.itemsize])
    if per_word > 1:
        word = lax.bitcast_convert_type(word.reshape(*x.shape[:-1], x.shape[-1] // per_word, per_word), jnp.uint32)
    word = word.astype(jnp.uint32)
    start = jnp.zeros(x.ndim, jnp.uint32) if start is None else start.astype(jnp.uint32)
    column = lax.broadcasted_iota(jnp.uint32, (1,) * (x.ndim - 1) + word.shape[-1:], x.ndim - 1) + start[-1] // jnp.uint32(per_word)
    row = jnp.zeros(word.shape[:-1], jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim - 1)):
        row += (lax.broadcasted_iota(jnp.uint32, row.shape, axis) + start[axis]) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    scrambled = word * jnp.uint32(0x85EBCA6B)
    scrambled ^= scrambled >> jnp.uint32(16)
    flags = jnp.zeros_like(word) if kind is None else _unfit(word, dtype, per_word, signed=kind != "block_scale")
    zero = jnp.uint32(0)
    low, high, unfit = lax.reduce(
        (scrambled * _keys(column, 0x9E3779B9), scrambled * _keys(column, 0x7F4A7C15), flags),
        (zero, zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]),
        (x.ndim - 1,),
    )
    low = (low * _keys(row, 0x2545F491)).sum(dtype=jnp.uint32)
    high = (high * _keys(row, 0x4F6CDD1D)).sum(dtype=jnp.uint32)
    return jnp.stack([low, high, ((unfit != zero).any() | ~fit).astype(jnp.uint32)])


def _pieces(leaf: jax.Array) -> list[tuple[jax.Array, np.ndarray | None]]:
    """An array's parts, each on one device and once, with the index where it begins: what is computed of them needs no collective."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and len(leaf.sharding.device_set) > 1:
        shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        pieces = [(shard.data, np.array([part.start or 0 for part in shard.index], np.int32)) for shard in shards]
        if all(piece.ndim == 0 or piece.shape[-1] % _per_word(leaf, leaf.shape) == 0 for piece, _ in pieces):
            return pieces
        leaf = jax.device_get(leaf)  # cut within a word
    return [(leaf, None)]


_COMPLAINTS = {
    "block_scale": "a block scale that is NaN or negative",
    "finite": "a value that is NaN or infinite",
    "input_scale": "an input scale that is not finite and positive",
    "global_scale": "a global scale that is not finite, not positive, or the inverse of one (it multiplies: amax / 2688)",
}


def _kind(path: str, leaf: jax.Array) -> str | None:
    """What a leaf must be; None for integers, and for floats that are never NaN."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float4_e2m1fn:
        return None
    name = path.rsplit("/", 1)[-1]
    if leaf.dtype == jnp.float8_e4m3fn and name.endswith("_scale"):
        return "block_scale"
    return next((kind for kind in ("global_scale", "input_scale") if name.endswith(kind)), "finite")


def check(leaves: dict[str, jax.Array]) -> tuple[dict[str, str], list[str]]:
    """(digests, complaints) of arrays of 1, 2 or 4 bytes an element.

    digests: path -> 16 hex digits over the leaf's bytes, in order, with its shape and dtype.
    complaints: 'path: what is wrong' for each leaf that no rollout should serve; empty when all is well.
    """
    kinds = {path: _kind(path, leaf) for path, leaf in leaves.items()}
    # All are started before the first is waited for.
    pending = {
        path: [_summary(piece, start, tuple(leaf.shape), kinds[path]) for piece, start in _pieces(leaf)]
        for path, leaf in leaves.items()
    }
    digests, complaints = {}, []
    for path, parts in zip(pending, jax.device_get(list(pending.values())), strict=True):
        low, high, unfit = (sum(int(part[i]) for part in parts) % 2**32 for i in range(3))
        seed = f"{leaves[path].dtype}{list(leaves[path].shape)}"
        salt = functools.reduce(lambda h, c: (h * 16777619) ^ ord(c), seed, 2166136261) & 0xFFFFFFFF
        digests[path] = f"{high ^ salt:08x}{low:08x}"
        if unfit:
            complaints.append(f"{path}: {_COMPLAINTS[kinds[path]]}")
    return digests, complaints


def digests(leaves: dict[str, jax.Array]) -> dict[str, str]:
    """The digests of `check`."""
    return check(leaves)[0]


def unhealthy(leaves: dict[str, jax.Array]) -> list[str]:
    """The complaints of `check`; packed codes, which have no bad values, are not read."""
    return check({path: leaf for path, leaf in leaves.items() if _kind(path, leaf)})[1]
