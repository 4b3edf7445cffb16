"""What a swap packed and what it left in floating point, and why."""

import dataclasses
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from nvfp4jax import arguments, layers

_log = logging.getLogger("nvfp4jax")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A layer or leaf: its path, its class, its bytes, and, of one left in floating point, why."""

    path: str
    kind: str
    nbytes: int
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """packed: layers in NVFP4. left: weights in floating point, those of at least two axes."""

    packed: tuple[Entry, ...]
    left: tuple[Entry, ...]

    @property
    def packed_bytes(self) -> int:
        return sum(e.nbytes for e in self.packed)

    @property
    def left_bytes(self) -> int:
        return sum(e.nbytes for e in self.left)

    def __str__(self) -> str:
        lines = [f"NVFP4: {len(self.packed)} layers, {self.packed_bytes:,} bytes; floating point: {self.left_bytes:,} bytes"]
        groups: dict[tuple[str, str, str], list[int]] = {}
        for e in self.left:
            groups.setdefault((re.sub(r"\d+", "*", e.path), e.kind, e.why), []).append(e.nbytes)
        lines += [f"  {path} ({kind}, {sum(sizes):,} bytes): {why}" for (path, kind, why), sizes in groups.items()]
        return "\n".join(lines)


def _nbytes(variable: nnx.Variable) -> int:
    return math.prod(variable.shape) * jnp.dtype(variable.dtype).itemsize


def describe(qmodel: nnx.Module) -> Report:
    """What of a swapped model is packed and what stayed in floating point, with the way out.

    Works on a model of arrays and on an abstract one.
    """
    arguments.module("describe: qmodel", qmodel)
    packed, left = [], []
    for path, module in nnx.iter_modules(qmodel):
        own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
        name = "/".join(map(str, path))
        quantized = [v for v in own.values() if isinstance(v, layers.NVFP4Param)]
        if quantized:
            packed.append(Entry(name, type(module).__name__, sum(map(_nbytes, quantized))))
        for key, variable in own.items():
            floats = jnp.issubdtype(variable.dtype, jnp.floating) and not isinstance(variable, layers.NVFP4Param | layers.InputAmax)
            if floats and isinstance(variable, nnx.Param) and len(variable.shape) > 1:
                left.append(Entry(f"{name}/{key}".lstrip("/"), type(module).__name__, _nbytes(variable), _why(module, key, variable)))
    return Report(tuple(packed), tuple(left))


def _why(module: nnx.Module, key: str, variable: nnx.Variable) -> str:
    if type(module) in layers.CONVERTERS:
        return "skipped, or no rule matched"
    parents = [cls.__name__ for cls in type(module).__mro__[1:] if cls in layers.CONVERTERS]
    if parents:
        return f"a subclass of {parents[0]}; teach it with nvfp4jax.register({type(module).__name__})"
    called = f"{type(module).__name__} {key}".lower()
    if isinstance(module, nnx.Embed) or "embed" in called:
        return "an embedding"
    if "norm" in called:
        return "a norm, which multiplies no matrix"
    if "router" in called:
        return "a router, whose rounding would change the choice of experts"
    if len(variable.shape) == 3:
        return "a raw Param; Rule(path, scaling=None) packs it for reading, nvfp4jax.register its module for multiplying"
    return f"no known layer; teach it with nvfp4jax.register({type(module).__name__})"


def log(report: Report, rules: Sequence[Any]) -> None:
    """A few lines on the logger, and a warning for each rule whose path matches more bytes in float than it packed."""
    text = str(report).splitlines()
    _log.info("%s", "\n".join([*text[:8], *([f"  ... {len(text) - 8} more"] if len(text) > 8 else [])]))
    first: dict[str, int] = {}
    for i, rule in enumerate(rules):
        if rule.skip:
            first = first | {e.path: i for e in (*report.packed, *report.left) if _matches(rule, e) and e.path not in first}
            continue
        mine = [e for e in (*report.packed, *report.left) if _matches(rule, e) and e.path not in first]
        first = first | {e.path: i for e in mine}
        packed = sum(e.nbytes for e in mine if not e.why)
        left = [e for e in mine if e.why and e.why != "skipped, or no rule matched"]
        if sum(e.nbytes for e in left) > packed:
            _log.warning("rule %r packed %d bytes and left %d in floating point: %s (%s): %s", rule.module_path, packed,
                         sum(e.nbytes for e in left), left[0].path, left[0].kind, left[0].why)  # fmt: skip


def _matches(rule: Any, entry: Entry) -> bool:
    """Whether the rule's path names the entry: the layer, or the leaf itself."""
    return any(re.fullmatch(rule.module_path, path) for path in (entry.path, entry.path.rpartition("/")[0]))
