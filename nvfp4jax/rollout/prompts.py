"""Prompts on the host: checked, and moved to the left end of their rows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from nvfp4jax import arguments


class Packed(NamedTuple):
    """Prompts padded on the right.

    ids: i32 [B, T], 0 at padding; valid: bool [B, T]; lengths: i32 [B]; columns: i64 [B, T], the column of the caller's
    array that each token came from (for padding any).
    """

    ids: np.ndarray
    valid: np.ndarray
    lengths: np.ndarray
    columns: np.ndarray

    def cut(self, columns: int) -> "Packed":
        """The same in so many columns, at least the longest prompt's; as it is where it has no more."""
        return self._replace(ids=self.ids[:, :columns], valid=self.valid[:, :columns], columns=self.columns[:, :columns])

    def positions(self) -> np.ndarray:
        """i32 [B, T]: a token's position is its slot."""
        return np.broadcast_to(np.arange(self.ids.shape[1], dtype=np.int32), self.ids.shape)


def bucket(length: int) -> int:
    """length rounded up to a multiple of 16, or of an eighth of its power of two: few programs, little waste."""
    step = max(16, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def vocabulary_of(model: nnx.Module) -> int | None:
    """The number of tokens that a model knows, from its config or its embeddings; None where neither says it."""
    config = getattr(model, "config", None)
    for name in ("vocab_size", "num_embed"):
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    tables = [m.num_embeddings for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Embed)]
    return max(tables) if tables else None


def check_prompts(
    model: nnx.Module, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids i32 [B, T], mask bool [B, T]) on the host, or a ValueError."""
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"{name}: traced by jit or grad; prompts are read on the host, so call it outside")
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise ValueError("input_ids: rows of different lengths; pad them and give an attention_mask") from None
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids {ids.dtype} {list(ids.shape)}: token ids [B, T] are needed, at least one of them")
    try:
        mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask)
    except ValueError:
        raise ValueError(f"attention_mask: rows of different lengths; the shape of input_ids, {list(ids.shape)}, is needed") from None
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        example = mask[~np.isin(mask, (0, 1))][0]
        raise ValueError(f"attention_mask holds {example}: 1 (or True) is a token, 0 (or False) is none; no other values, "
                         "such as those of an additive mask")  # fmt: skip
    mask = mask.astype(bool)
    empty = np.flatnonzero(~mask.any(1))
    if empty.size:
        raise ValueError(f"attention_mask: row {empty[0]} has no token; give every prompt at least one")
    vocabulary = vocabulary_of(model)
    wrong = mask & ((ids < 0) | (ids >= (np.iinfo(np.int32).max if vocabulary is None else vocabulary)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"input_ids[{row}, {column}]={ids[row, column]} is outside the vocabulary of {vocabulary}")
    return np.where(mask, ids, 0).astype(np.int32), mask


def pack(ids: np.ndarray, mask: np.ndarray, length: int | None = None) -> Packed:
    """The masked tokens of each row from column 0 on, in `length` columns (as few as fit where it is None)."""
    lengths = mask.sum(1).astype(np.int32)
    length = int(lengths.max()) if length is None else length
    order = np.argsort(~mask, axis=1, kind="stable")[:, :length]
    order = np.pad(order, ((0, 0), (0, length - order.shape[1])))
    valid = np.arange(length) < lengths[:, None]
    return Packed(np.where(valid, np.take_along_axis(ids, order, 1), 0).astype(np.int32), valid, lengths, order)


def repeats(packed: Packed) -> int:
    """The largest k such that each prompt is given k times in a row, or a multiple of it."""
    rows = np.concatenate([packed.ids, packed.lengths[:, None]], 1)
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(1)) + 1
    return int(np.gcd.reduce(np.diff([0, *changes, len(rows)])))


def common(packed: Packed) -> int:
    """The tokens that all prompts begin with and go beyond; 0 where all are one prompt."""
    if not (packed.ids != packed.ids[:1]).any() and not (packed.lengths != packed.lengths[0]).any():
        return 0
    alike = (packed.ids == packed.ids[:1]).all(0)
    return min(int(packed.lengths.min()) - 1, len(alike) if alike.all() else int(alike.argmin()))


def unpack(values: ArrayLike, packed: Packed, columns: int, fill: int) -> jnp.ndarray:
    """[L, B, T, k] of packed tokens -> [L, B, columns, k] at the places that the caller gave them, `fill` elsewhere."""
    values = np.asarray(values)
    out = np.full((*values.shape[:2], columns, values.shape[3]), fill, values.dtype)
    rows, places = np.nonzero(packed.valid)
    out[:, rows, packed.columns[rows, places]] = values[:, rows, places]
    return jnp.asarray(out)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids i64 [B, T], padded on the left with 0; their mask, bool [B, T])."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        for token in row:
            if type(token) is not int or not -(2**63) <= token < 2**63:  # a message is made for those alone that may need one
                arguments.whole(f"prompt {i}: token", token, -(2**63), 2**63 - 1)
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return ids, mask
