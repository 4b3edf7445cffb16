"""How an activation gets its global scale: one frozen value a mode, and the strings that stand for them.

    None                              activations stay as they are (weights only)
    "token"       Token()             one amax a row: a row's bits do not depend on its batch
    "tensor"      Tensor()            one amax over the valid rows of this call
    "tensor_pow2" Tensor(pow2=True)   the same, its global scale rounded up to a power of two
    "expert"      PerExpert()         one amax over the rows of each expert (experts alone)
    "static"      Static(scale)       a checkpoint's or a calibration's input scale
    "delayed"     Delayed(history)    the largest amax of the last 16 calls: a baseline to compare with

The one file that knows the modes. `resolve` turns a value into a `Request`, which is all that a quantizer needs to know.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import arguments, numerics, pytree

HISTORY = 16  # calls that a delayed amax looks back on

# Tensor(pow2=True): a power of two more or less in the global scale moves a block's E4M3 scale by an exponent, exactly, as long as
# that scale is normal: block amax / (6 * global_scale) >= 2**-6. The global scale is below 2 * amax / (6 * top), top the E4M3 maximum
# in use, so a block whose amax is at least amax / (2**5 * top) keeps its bits: 32 * 448, or 32 * 256 with four-over-six.
POW2_RANGE = {None: 14336, "mae": 8192, "mse": 8192}

FourOverSix = Literal["mae", "mse"]


def check_four_over_six(kind: str | None, what: str = "four_over_six") -> None:
    """A ValueError unless kind is None, "mae" or "mse" (arXiv 2512.02010)."""
    if kind not in (None, "mae", "mse"):
        raise ValueError(f"{what}={kind!r}: None, 'mae' or 'mse'")


@dataclasses.dataclass(frozen=True)
class _Mode:
    """four_over_six: None, "mae" or "mse": a block may map its amax to 4 instead of 6 (arXiv 2512.02010)."""

    four_over_six: FourOverSix | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check_four_over_six(self.four_over_six, f"{type(self).__name__}: four_over_six")


@dataclasses.dataclass(frozen=True)
class Token(_Mode):
    """One amax a row, of this call. A row's codes depend on nothing but the row."""


@dataclasses.dataclass(frozen=True)
class Tensor(_Mode):
    """One amax over the valid rows of this call.

    pow2: the global scale is rounded up to a power of two. A row's bits then depend on its neighbours only in blocks whose amax lies
        below 1/14336 of the call's (1/8192 with four-over-six; `POW2_RANGE`), whose scales are E4M3 denormals;
        `blocks_beyond_pow2_range` counts them.
    axes: names of mesh axes that hold other rows, under `jax.shard_map`: the amax is the largest over them (`lax.pmax`).
    """

    pow2: bool = False
    axes: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        arguments.flag("Tensor: pow2", self.pow2)
        if not isinstance(self.axes, tuple) or not all(isinstance(axis, str) for axis in self.axes):
            raise ValueError(f"Tensor: axes={str(self.axes)[:40]!r}: a tuple of names of mesh axes is needed")


@dataclasses.dataclass(frozen=True)
class PerExpert(_Mode):
    """One amax over the valid rows of each expert. For experts alone."""


@dataclasses.dataclass(frozen=True)
class Static(_Mode):
    """A global scale from before the call.

    scale: f32 [], for experts also [E]; it multiplies (amax / 2688 by convention). None, in a rule or a layer: the checkpoint's or
        a calibration's, which the layer keeps.
    """

    scale: Float[Array, "..."] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.scale is not None:
            arguments.array("Static: scale", self.scale)


@dataclasses.dataclass(frozen=True)
class Delayed(_Mode):
    """The largest amax of the calls before (this call's, where there is none): TransformerEngine's delayed scaling with
    `amax_compute_algo="max"`, but for the first call, which has a scale of 1 there.

    history: f32 [16], the amaxes of the last calls, newest first, 0 where there was none. None, in a rule or a layer: the layer's.
    """

    history: Float[Array, "H"] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.history is not None:
            arguments.array("Delayed: history", self.history, "float", ("...", HISTORY))


@dataclasses.dataclass(frozen=True)
class Calibrate(_Mode):
    """Nothing is quantized; the largest amax of all calls is noted, for `nvfp4jax.calibrate`.

    largest: f32 [], of the calls before. None, in a layer: the layer's.
    """

    largest: Float[Array, ""] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Observed(_Mode):
    """`mode`, None also, and what telemetry counts beside it; only `layers.scaling_of` makes one. four_over_six: the mode's own holds.

    counts: a `counting.Counts`, of the calls before; the call carries it on, in a pair behind what the mode itself carries.
    """

    mode: "Scaling | None"
    counts: Any


Scaling = Token | Tensor | PerExpert | Static | Delayed | Calibrate | Observed
Name = Literal["token", "tensor", "tensor_pow2", "expert", "static", "delayed"]

NAMES: dict[str, Scaling] = {
    "token": Token(),
    "tensor": Tensor(),
    "tensor_pow2": Tensor(pow2=True),
    "expert": PerExpert(),
    "static": Static(),
    "delayed": Delayed(),
}
def blocks_beyond_pow2_range(
    x: Float[Array, "... K"], valid: Bool[Array, "..."] | None = None, *, four_over_six: FourOverSix | None = None
) -> Int[Array, ""]:
    """How many blocks of 16 of x a call in mode Tensor(pow2=True) may round in another way than their row alone would be.

    Those whose amax, not 0, is below the call's over `POW2_RANGE`: their bits depend on the other rows. valid: bool x.shape[:-1], rows
    that count. For telemetry: jittable, nothing of it runs in a rollout.
    """
    rows = x.reshape(-1, x.shape[-1])
    mask = jnp.ones(rows.shape[0], bool) if valid is None else valid.reshape(-1)
    blocks = magnitude(rows).astype(jnp.float32).reshape(rows.shape[0], -1, numerics.BLOCK).max(-1)
    beyond = blocks * jnp.float32(POW2_RANGE[four_over_six]) < tensor_amax(rows, mask)
    return ((blocks > 0) & beyond & mask[:, None]).sum(dtype=jnp.int32)


# The array that a mode carries through a call, by class: what a layer keeps in a Variable.
CARRIED = {Static: "scale", Delayed: "history", Calibrate: "largest"}

for _cls in (Token, Tensor, PerExpert, Static, Delayed, Calibrate):
    pytree.register(_cls, *([CARRIED[_cls]] if _cls in CARRIED else []))


def parse(scaling: Any, what: str, *, experts: bool = True) -> Scaling | None:
    """The value that a mode's name stands for; a value as it is. ValueError that names `what` for anything else.

    experts: whether "expert" has a meaning there.
    """
    given = scaling
    if isinstance(scaling, str) and scaling in NAMES:
        scaling = NAMES[scaling]
    if scaling is not None and not isinstance(scaling, Scaling) or isinstance(scaling, PerExpert) and not experts:
        names = [n for n in NAMES if experts or n != "expert"]
        raise ValueError(f"{what}: scaling={given!r} is not one of {', '.join(names)}, None, or their values (nvfp4jax.scaling)")
    return scaling


def name_of(scaling: Scaling | None) -> str | None:
    """The string that stands for a mode, whatever else the value says."""
    if scaling is None:
        return None
    if isinstance(scaling, Tensor):
        return "tensor_pow2" if scaling.pow2 else "tensor"
    return next(name for name, value in NAMES.items() if type(value) is type(scaling))


def to_json(scaling: Scaling | None) -> str | dict | None:
    """A mode, without the array that it carries, as a JSON value: its name, or a dict where there is more to say."""
    name = name_of(scaling)
    if scaling is None or name is None or scaling == NAMES[name]:
        return name
    more = {"four_over_six": scaling.four_over_six, "axes": list(getattr(scaling, "axes", ()))}
    return {"name": name} | {key: value for key, value in more.items() if value}


def from_json(value: Any) -> Scaling | None:
    """The inverse of `to_json`; ValueError for anything that it does not give."""
    if not isinstance(value, dict):
        return parse(value, "scaling")
    mode = parse(value.get("name"), "scaling")
    more: dict[str, Any] = {key: tuple(v) if key == "axes" else v for key, v in value.items() if key != "name"}
    if mode is None or more.keys() - {"four_over_six", "axes"} or ("axes" in more and not isinstance(mode, Tensor)):
        raise ValueError(f"scaling={str(value)[:80]} is not a mode")
    return dataclasses.replace(mode, **more)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a quantizer is asked, for x [M, K]: the modes, reduced to what a kernel knows.

    amax: f32 [] or [M, 1], given; or global_scale: f32 [] or [M, 1], given. Where neither is, the quantizer finds one amax a row
    (per_row), or one over the rows that `valid` (bool [M], or None: all) marks.
    """

    amax: Array | None = None
    global_scale: Array | None = None
    valid: Array | None = None
    per_row: bool = False
    pow2: bool = False
    four_over_six: FourOverSix | None = None


pytree.register(Request, "amax", "global_scale", "valid")


def resolve(
    scaling: Scaling, x: Float[Array, "M K"], valid: Bool[Array, "M"] | None = None, group_sizes: Int[Array, "E"] | None = None
) -> tuple[Request | None, Array | None]:
    """(what a quantizer is asked for x, what the mode carries into the next call); None: x stays as it is; nothing is carried.

    group_sizes: i32 [E], where the rows of x are sorted by expert.
    """
    kind = scaling.four_over_six
    if isinstance(scaling, Token):
        return Request(per_row=True, four_over_six=kind), None
    if isinstance(scaling, Static):
        scale = jnp.asarray(scaling.scale, jnp.float32)
        if scale.ndim:
            assert group_sizes is not None  # `parse` lets experts alone have a scale each
            scale = scale[group_ids(group_sizes, x.shape[0])][:, None]
        return Request(global_scale=scale, four_over_six=kind), None
    if isinstance(scaling, PerExpert):
        assert group_sizes is not None  # `parse` refuses it elsewhere
        return Request(amax=expert_amax(x, group_sizes, valid), four_over_six=kind), None
    if isinstance(scaling, Tensor):
        if not scaling.axes:
            return Request(valid=valid, pow2=scaling.pow2, four_over_six=kind), None
        amax = lax.pmax(tensor_amax(x, valid), scaling.axes)
        return Request(amax=amax, pow2=scaling.pow2, four_over_six=kind), None
    amax = tensor_amax(x, valid)
    if isinstance(scaling, Calibrate):
        assert scaling.largest is not None  # the layer's: `layers.scaling_of`
        return None, jnp.maximum(scaling.largest, amax)
    assert isinstance(scaling, Delayed)  # `ops` takes an Observed apart
    assert scaling.history is not None
    largest = scaling.history.max()
    history = jnp.concatenate([amax[None], scaling.history[:-1]])
    return Request(amax=jnp.where(largest > 0, largest, amax), four_over_six=kind), history


def multipliers(x: Float[Array, "... K"], request: Request) -> tuple[Array, Array, Array]:
    """What `request` means for x: (encode multiplier, global scale, the amax that they stand for), as of `numerics.global_scales`."""
    four_over_six, amax = request.four_over_six is not None, request.amax
    if request.global_scale is not None:
        global_scale = jnp.asarray(request.global_scale, jnp.float32)
        top = numerics.E2M1_MAX * (numerics.E4M3_MAX_FOUR_OVER_SIX if four_over_six else numerics.E4M3_MAX)
        return numerics.divide(1.0, global_scale), global_scale, global_scale * jnp.float32(top)
    if amax is None:
        amax = row_amax(x) if request.per_row else tensor_amax(x, request.valid)
    return numerics.global_scales(amax, pow2=request.pow2, four_over_six=four_over_six)


def by_group(scaling: Scaling | None) -> bool:
    """Whether the mode asks which expert a row goes to."""
    if isinstance(scaling, Observed):
        return by_group(scaling.mode)
    return isinstance(scaling, PerExpert) or (isinstance(scaling, Static) and scaling.scale is not None and scaling.scale.ndim > 0)


def reads_valid(scaling: Scaling | None) -> bool:
    """Whether rows that are not valid would change the result of the others."""
    return isinstance(scaling, Tensor | PerExpert | Delayed | Calibrate)


# --- amaxes ------------------------------------------------------------------------------------------------------------


def magnitude(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """|x| in float32 with non-finite values counted as zero: they poison their own row, never an amax."""
    x = jnp.abs(numerics.as_float32(x))
    return jnp.where(jnp.isfinite(x), x, jnp.float32(0))


def row_amax(x: Float[Array, "... K"]) -> Float[Array, "... 1"]:
    return magnitude(x).max(-1, keepdims=True, initial=jnp.float32(0))


def tensor_amax(x: Float[Array, "... K"], valid: Bool[Array, "..."] | None = None) -> Float[Array, ""]:
    """The amax over the rows that `valid` (bool x.shape[:-1]) marks."""
    rows = row_amax(x)
    if valid is not None:
        rows = jnp.where(valid[..., None], rows, jnp.float32(0))
    return rows.max(initial=jnp.float32(0))


def expert_amax(
    x: Float[Array, "M K"], group_sizes: Int[Array, "E"], valid: Bool[Array, "M"] | None = None
) -> Float[Array, "M 1"]:
    """One amax a group of rows, given back to each of its rows."""
    rows = row_amax(x)[:, 0]
    inside = in_groups(group_sizes, x.shape[0])
    rows = jnp.where(inside if valid is None else inside & valid, rows, jnp.float32(0))
    ids = group_ids(group_sizes, x.shape[0])
    return jax.ops.segment_max(rows, ids, num_segments=group_sizes.shape[0])[ids][:, None]


def group_ids(group_sizes: Int[Array, "E"], rows: int) -> Int[Array, "M"]:
    """The group of each of `rows` sorted rows; rows past the last group count to the last one."""
    ends = jnp.cumsum(group_sizes)
    ids = jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right")
    return jnp.minimum(ids, group_sizes.shape[0] - 1).astype(jnp.int32)


def in_groups(group_sizes: Int[Array, "E"], rows: int) -> Bool[Array, "M"]:
    """Which of `rows` sorted rows belong to a group: those past the last one hold what a backend left there."""
    return jnp.arange(rows, dtype=jnp.int32) < group_sizes.sum(dtype=jnp.int32)


def within(y: Array, group_sizes: Int[Array, "E"]) -> Array:
    """y [M, N] with zeros past the last group; neither a value nor a gradient passes from there."""
    return jnp.where(in_groups(group_sizes, y.shape[0])[:, None], y, jnp.zeros((), y.dtype))


# --- the mask of a model that does not pass it -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rows:
    mask: jax.Array | None
    cleared: bool  # None inside another mask
    traced: bool  # entered while jax traced a program


_rows: contextvars.ContextVar[_Rows | None] = contextvars.ContextVar("valid_rows", default=None)


def is_tracing() -> bool:
    """Whether jax traces a program here: what it computes then is no value yet."""
    return isinstance(jnp.zeros(()) + jnp.ones(()), jax.core.Tracer)


@contextlib.contextmanager
def valid_rows(mask: Bool[Array, "..."] | None) -> Iterator[None]:
    """For models that do not pass `valid` to their layers: inside, rows where `mask` is False take no part in any amax.

    mask: bool, of the shape of the activations without their last axis, e.g. [B, T]. A layer whose scaling reads it and whose input has
    another shape is an error that names the layer, never a guess. Under `jit`, enter it in the traced function, with a traced mask.
    """
    if mask is not None:
        arguments.array("valid_rows: mask", mask, "bool")
    outer = _rows.get()
    cleared = mask is None and outer is not None and outer.mask is not None
    token = _rows.set(_Rows(None if mask is None else jnp.asarray(mask, bool), cleared, is_tracing()))
    try:
        yield
    finally:
        _rows.reset(token)


def current_valid(x: Float[Array, "... K"], name: str) -> Bool[Array, "..."] | None:
    """The mask of the enclosing `valid_rows` for x, the input of layer `name`; ValueError where it cannot be meant."""
    rows = _rows.get()
    if rows is None:
        return None
    if rows.cleared:
        raise ValueError(f"{name}: valid_rows(None) inside valid_rows(mask) would let padding into this layer's amax; leave the inner one out, "
                         "or give it the mask of the rows that count")
    if rows.mask is None:
        return None
    if rows.mask.shape != x.shape[:-1]:
        raise ValueError(f"{name}: the mask of valid_rows has shape {rows.mask.shape}, this layer's input of shape {tuple(x.shape)} needs "
                         f"{tuple(x.shape[:-1])}; pass valid= to the layer, or enter valid_rows with a mask of that shape around it")
    if not rows.traced and not isinstance(rows.mask, jax.core.Tracer) and is_tracing():
        raise ValueError(f"{name}: valid_rows was entered outside of jit, so its mask would be a constant of the compiled program; enter it in "
                         "the jitted function, with the mask as an argument")
    return rows.mask
