"""Leaf checks that run where the arrays live: digests, and the health of scales and weights.

A digest is computed on the device, from the array as it will be used, and does not depend on its sharding: a check after loading
covers the disk, the file system, the decoder and the transfer, and a publisher with sharded weights gathers nothing (a digest is
a sum over words, each hashed with its position, so every shard gives its share). It guards
against damage and mix-ups, not against an attacker, who could rewrite it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A weight global scale above this stands for a weight beyond 2**18: it is the inverse of one (an encode multiplier, as
# compressed-tensors stores it), because weights of ordinary size have 2688 / amax up there.
LARGEST_WEIGHT_GLOBAL_SCALE = 2.0**18 / 2688

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> jnp.uint32(16))


def _per_word(x: jax.Array, shape: tuple[int, ...]) -> int:
    """Elements that are hashed at once: four bytes' worth where they line up in an array of this shape."""
    per_word = 4 // x.dtype.itemsize
    return per_word if shape and shape[-1] % per_word == 0 else 1


@functools.partial(jax.jit, static_argnames="shape")
def _digest(x: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The share u32 [2] in a digest of the piece x, which begins at index `start` (i32 [rank]) of an array of this shape."""
    per_word = _per_word(x, shape)
    word = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    if per_word > 1:
        word = lax.bitcast_convert_type(word.reshape(*x.shape[:-1], x.shape[-1] // per_word, per_word), jnp.uint32)
        shape = (*shape[:-1], shape[-1] // per_word)
    word = word.astype(jnp.uint32)
    position = jnp.zeros(word.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(word.ndim)):
        first = start[axis] // per_word if axis == word.ndim - 1 else start[axis]
        index = lax.broadcasted_iota(jnp.uint32, word.shape, axis) + first.astype(jnp.uint32)
        position += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    low = _mix(word ^ _mix(position + jnp.uint32(0x9E3779B9)))
    high = (low ^ (low >> jnp.uint32(15))) * jnp.uint32(0x2C1B3C6D)  # another nonlinear sum of the same words
    high ^= high >> jnp.uint32(12)
    return jnp.stack([low.sum(dtype=jnp.uint32), high.sum(dtype=jnp.uint32)])


def _pieces(leaf: jax.Array) -> list[tuple[jax.Array, np.ndarray]]:
    """An array's parts, each on one device and once, with the index where it begins: what is computed of them needs no collective."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and len(leaf.sharding.device_set) > 1:
        shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        pieces = [(shard.data, np.array([part.start or 0 for part in shard.index], np.int32)) for shard in shards]
        if all(piece.ndim == 0 or piece.shape[-1] % _per_word(leaf, leaf.shape) == 0 for piece, _ in pieces):
            return pieces
        leaf = jax.device_get(leaf)  # cut within a word
    return [(leaf, np.zeros(leaf.ndim, np.int32))]


def digests(leaves: dict[str, jax.Array]) -> dict[str, str]:
    """Path -> 16 hex digits over the leaf's bytes, in order, with its shape and dtype. Arrays of 1, 2 or 4 bytes an element."""
    # All are started before the first is waited for.
    pending = {
        path: [_digest(piece, start, tuple(leaf.shape)) for piece, start in _pieces(leaf)] for path, leaf in leaves.items()
    }
    result = {}
    for path, parts in zip(pending, jax.device_get(list(pending.values())), strict=True):
        low, high = (sum(int(part[i]) for part in parts) % 2**32 for i in range(2))
        seed = f"{leaves[path].dtype}{list(leaves[path].shape)}"
        salt = functools.reduce(lambda h, c: (h * 16777619) ^ ord(c), seed, 2166136261) & 0xFFFFFFFF
        result[path] = f"{high ^ salt:08x}{low:08x}"
    return result


@functools.partial(jax.jit, static_argnames="kind")
def _healthy(x: jax.Array, kind: str) -> jax.Array:
    if kind == "block_scale":
        return ((lax.bitcast_convert_type(x, jnp.uint8) & jnp.uint8(0x7F)) != jnp.uint8(0x7F)).all()
    finite = jnp.isfinite(x).all()
    if kind == "finite":
        return finite
    positive = (x > jnp.zeros((), x.dtype)).all()
    if kind == "input_scale":
        return finite & positive
    return finite & positive & (x < jnp.asarray(LARGEST_WEIGHT_GLOBAL_SCALE, x.dtype)).all()


_COMPLAINTS = {
    "block_scale": "a NaN block scale",
    "finite": "a value that is NaN or infinite",
    "input_scale": "an input scale that is not finite and positive",
    "global_scale": "a global scale that is not finite, not positive, or the inverse of one (it multiplies: amax / 2688)",
}


def _kind(path: str, leaf: jax.Array) -> str | None:
    if leaf.dtype == jnp.float8_e4m3fn:
        return "block_scale"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    name = path.rsplit("/", 1)[-1]
    return next((kind for kind in ("global_scale", "input_scale") if name.endswith(kind)), "finite")


def unhealthy(leaves: dict[str, jax.Array]) -> list[str]:
    """One complaint for each leaf that no rollout should serve: 'path: what is wrong'. Empty when all is well."""
    kinds = {path: _kind(path, leaf) for path, leaf in leaves.items()}
    pending = {path: [_healthy(piece, kind) for piece, _ in _pieces(leaves[path])] for path, kind in kinds.items() if kind}
    fine = jax.device_get(list(pending.values()))
    return [f"{path}: {_COMPLAINTS[kinds[path]]}" for path, parts in zip(pending, fine, strict=True) if not all(parts)]
