"""What public functions ask of their arguments: each check is a ValueError of one line that begins with the argument's name.

Arrays are judged by shape and dtype alone, also traced ones, so nothing of this is in a compiled program.
"""

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool_}
WEIGHT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def shown(value: Any) -> str:
    """A value in a few words, on one line."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, nnx.Module | type) or callable(value):
        return value.__name__ if isinstance(value, type) else type(value).__name__
    return f"{type(value).__name__} {' '.join(repr(value).split())[:60]}"


def array(what: str, value: Any, kind: str | None = "float", shape: Sequence[int | str | None] | None = None) -> Any:
    """The value itself: an array (of jax or numpy), of floats, ints or bools (kind None: of anything), and of `shape`.

    shape: sizes, or letters where any will do; "..." in front stands for any number of axes.
    """
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise ValueError(f"{what}: an array{f' of {kind}s' if kind else ''} is needed, not {shown(value)}")
    if kind is not None and not jnp.issubdtype(value.dtype, _KINDS[kind]):
        raise ValueError(f"{what}: {shown(value)} is no array of {kind}s")
    if shape is not None:
        leading = list(shape[:1]) == ["..."]
        sizes = shape[1:] if leading else shape
        found = value.shape[len(value.shape) - len(sizes) :] if leading else value.shape
        fits = len(found) == len(sizes) and all(not isinstance(size, int) or size == n for size, n in zip(sizes, found, strict=True))
        if not fits:
            raise ValueError(f"{what}: shape {tuple(value.shape)}; [{', '.join(map(str, shape))}] is needed")
    return value


def held(what: str, value: Any) -> Any:
    """The value itself: an array that has values, or a traced one."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{what}: {shown(value)} is a shape without values")
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_deleted():
        raise ValueError(f"{what}: {shown(value)} has been deleted; was it donated to another call?")
    return value


def whole(what: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer of Python, numpy or jax, within bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{what}={str(value)[:40]}: an integer is needed, not {type(value).__name__}")
    if least is not None and number < least:
        raise ValueError(f"{what}={number}: at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{what}={number}: at most {most}")
    return number


def number(what: str, value: Any, least: float | None = None, *, finite: bool = True) -> float:
    """A number of Python, numpy or jax, not below `least`."""
    try:
        found = None if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        found = None
    if found is None:
        raise ValueError(f"{what}={str(value)[:40]}: a number is needed, not {type(value).__name__}")
    if finite and not math.isfinite(found):
        raise ValueError(f"{what}={value}: a finite number is needed")
    if least is not None and found < least:
        raise ValueError(f"{what}={value}: at least {least}")
    return found


def flag(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what}={str(value)[:40]}: True or False is needed, not {type(value).__name__}")
    return value


def dtype(what: str, value: DTypeLike, among: Sequence[str] = WEIGHT_DTYPES) -> jnp.dtype:
    """A dtype, one of those named."""
    try:
        found = None if value is None else jnp.dtype(value)
    except TypeError:
        found = None
    if found is None or found.name not in among:
        raise ValueError(f"{what}={str(value)[:40]}: one of the dtypes {', '.join(among)} is needed")
    return found


def module(what: str, value: Any, kinds: type | tuple[type, ...] = nnx.Module) -> Any:
    """A Flax NNX module, of one of those classes."""
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{what}: {shown(value)} is no {'nnx.Module' if kinds is nnx.Module else names}")
    return value


def config(what: str, value: Any) -> Mapping:
    """A config.json as it was read."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what}: the Hugging Face config.json is needed, a dict, not {shown(value)}")
    return value


def path(what: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or (isinstance(value, str) and not value):
        raise ValueError(f"{what}={str(value)[:40]!r}: the path of a folder or file is needed, not {type(value).__name__}")
    return Path(value)


def items(what: str, value: Any, kind: type, one: str) -> list:
    """The entries of a sequence, each of a class; `one`: what one is called, whose plural has an s."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or isinstance(value, nnx.Module | jax.Array | Mapping):
        raise ValueError(f"{what}: a sequence of {one}s is needed, not {shown(value)}")
    found = list(value)
    for i, item in enumerate(found):
        if not isinstance(item, kind):
            raise ValueError(f"{what}[{i}]: {shown(item)} is no {one}")
    return found


def device() -> jax.Device:
    """The default device. A ValueError where jax finds none of those that it is told to use: no folder and no model is to blame."""
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        wanted = jax.config.jax_platforms or "by itself"
        raise ValueError(f"JAX_PLATFORMS={wanted}: jax finds no such device here ({' '.join(str(error).split())[:200] or 'no reason given'})") from error
