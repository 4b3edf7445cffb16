"""Attention over a cache, and what lies in front of it."""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from nvfp4jax import pytree
from nvfp4jax.backends import xla
from nvfp4jax.fp8 import FP8Array
from nvfp4jax.ops.choice import Backend, Implementation, check_implementation, first_of
from nvfp4jax.ops.products import no_cotangent

SHARED_STEP = 128  # slots: rows share a multiple of it, so that no sum of attention's has slots of both kinds


class SharedRows(NamedTuple):
    """What several rows of a cache begin with, held once for all of them.

    Row b begins with the first slots[b] slots, a multiple of SHARED_STEP, of row b // (B / N) here, as many as the other rows that do;
    its own keys and values are those from slot slots[b] on.

    prefix: None, or keys [*L, 1, Hkv, F, D] and values [*L, 1, Hkv, F, Dv] of slots that stand in front of those of each row here, of
    their dtype; F is a multiple of SHARED_STEP, and slots[b] counts them.
    """

    keys: Float[Array, "*L N Hkv P D"] | FP8Array
    values: Float[Array, "*L N Hkv P Dv"] | FP8Array
    slots: Int[Array, "B"]
    prefix: tuple[Any, Any] | None = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Keys and values, and those of the prefix."""
        return (self.keys, self.values, *(self.prefix or ()))

    def of(self, arrays: Sequence[Any]) -> "SharedRows":
        """With others in place of `arrays`."""
        keys, values, *prefix = arrays
        return SharedRows(keys, values, self.slots, (prefix[0], prefix[1]) if prefix else None)


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What a backend knows of a step's rows before its first layer: the same for all layers. value: the backend's own."""

    value: Any
    backend: str


pytree.register(AttentionPlan, "value")


@dataclasses.dataclass(frozen=True)
class _AttentionHow:
    """What is static about attention."""

    scale: float
    window: int | None
    soft_cap: float | None
    implementation: tuple[Backend, ...] | Backend | None


def attention_plan(
    starts: Int[Array, "B"],
    q: Any,
    keys: Any,
    *,
    window: int | None = None,
    shared: SharedRows | None = None,
    implementation: Implementation = None,
) -> AttentionPlan:
    """What `attention` needs besides, made once for all layers of a step whose shapes and window are these.

    q, keys, shared: those of `attention`; of arrays the shapes and dtypes count, and the values of starts and slots. No two calls with
    one plan may run at a time; layers follow one another.
    """

    def made(backend: ModuleType) -> AttentionPlan:
        return AttentionPlan(backend.attention_plan(starts, q, keys, window, shared), backend.NAME)

    return first_of("attention_plan", check_implementation(implementation), made)


def _no_fp8_gradients(op: str, keys: Any) -> None:
    if isinstance(keys, FP8Array):
        raise NotImplementedError(f"{op}: no gradients pass an FP8 cache; a loss calls the model without a cache, or with one of floats")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _AttentionHow, q, keys, values, starts, layer, counts, plan, shared) -> Array:
    def call(backend: ModuleType) -> Array:
        own = plan.value if plan is not None and plan.backend == backend.NAME else None
        return backend.attention(q, keys, values, starts, layer, how.scale, how.window, how.soft_cap, counts, own, shared)

    return first_of("attention", how.implementation, call)


def _attention_fwd(how, *args):
    return _attention(how, *args), args


def _attention_bwd(how, saved, dy):
    q, keys, values, starts, layer, counts, plan, shared = saved
    _no_fp8_gradients("attention", keys)

    def exact(q, keys, values, of_shared):
        rows = None if shared is None else shared.of(of_shared)
        return xla.attention(q, keys, values, starts, layer, how.scale, how.window, how.soft_cap, None, None, rows)

    dq, dkeys, dvalues, dshared = jax.vjp(exact, q, keys, values, None if shared is None else shared.arrays)[1](dy)
    dshared = None if shared is None else shared.of(dshared)._replace(slots=no_cotangent(shared.slots))
    return dq, dkeys, dvalues, *(no_cotangent(x) for x in (starts, layer, counts, plan)), dshared


_attention.defvjp(_attention_fwd, _attention_bwd)


def _stands_in_front(shared: SharedRows) -> bool:
    slots = shared.prefix[0].shape[-2] if shared.prefix else 0
    wanted = [((*x.shape[:-4], 1, x.shape[-3], slots, x.shape[-1]), x.dtype) for x in shared.arrays[:2]]
    return slots > 0 and slots % SHARED_STEP == 0 and [(x.shape, x.dtype) for x in shared.arrays[2:]] == wanted


def attention(
    q: Float[Array, "B T Hq D"],
    keys: Float[Array, "*L B Hkv S D"] | FP8Array,
    values: Float[Array, "*L B Hkv S Dv"] | FP8Array,
    starts: Int[Array, "B"],
    *,
    layer: Int[Array, ""] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    counts: Int[Array, "B"] | None = None,
    plan: AttentionPlan | None = None,
    shared: SharedRows | None = None,
    implementation: Implementation = None,
) -> Float[Array, "B T Hq Dv"]:
    """Causal grouped-query attention over a cache, which is read in place: never repeated, and by Hopper's kernels never copied.

    starts: query t of row b is at slot starts[b] + t and sees the slots up to its own; of these only the last `window`. The slots that
        are seen must be finite. Query heads h Hq / Hkv .. (h + 1) Hq / Hkv - 1 read key head h.
    keys, values: arrays, or both `fp8.FP8Array`s: then the result is that of the decoded ones, on Hopper to the bit. What is shared may
        then be decoded: in bfloat16 that is exact.
    layer: which of a stack's keys and values, where they have a leading axis.
    scale: times the scores, D ** -0.5 where None. soft_cap: scores become soft_cap * tanh(scores / soft_cap).
    counts: i32 [B], a row's queries that count: the others' results are finite, and need not be worked for.
    plan: of `attention_plan`, where several calls share it.
    shared: what rows begin with, held once; starts and `window` still count a row's slots from its first.
    ValueError for shapes that do not fit together. On Hopper a query's bits depend on its row alone: on no batch, no capacity, no
    number of queries beside it, and not on how much of the row is shared.
    """
    coded, shared_coded = ({isinstance(x, FP8Array) for x in pair} for pair in ((keys, values), () if shared is None else shared.arrays))
    if len(coded) > 1 or len(shared_coded) > 1 or True in shared_coded - coded:
        raise ValueError("attention: keys and values are both FP8Arrays or neither is; shared ones only beside FP8Arrays")
    if q.ndim != 4 or keys.ndim != 4 + (layer is not None) or keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and values {values.shape}: [B, T, Hq, D] and [B, Hkv, S, D] are needed, or "
                         "[L, B, Hkv, S, D] with `layer`")
    rows, heads = keys.shape[-4:-2]
    if (q.shape[0], q.shape[-1], starts.shape) != (rows, keys.shape[-1], (rows,)) or q.shape[2] % heads:
        raise ValueError(f"attention: q {q.shape}, keys {keys.shape} and starts {starts.shape} differ in rows or head dimension, or the query "
                         "heads are no multiple of the key heads")
    if shared is not None:
        shapes, other = ([(*x.shape[:-4], *x.shape[-3:-2], x.shape[-1]) for x in pair] for pair in ((keys, values), shared[:2]))
        if shapes != other or shared.keys.shape[:-1] != shared.values.shape[:-1] or rows % shared.keys.shape[-4] or shared.slots.shape != (rows,):
            raise ValueError(f"attention: shared keys {shared.keys.shape}, values {shared.values.shape} and slots {shared.slots.shape} beside keys "
                             f"{keys.shape}: [N, Hkv, P, D] is needed, with N a divisor of the rows, and a number of slots for each row")
        if shared.prefix is not None and not _stands_in_front(shared):
            first = [f"{x.dtype}{x.shape}" for x in shared.prefix]
            raise ValueError(f"attention: a prefix of keys and values {first} in front of shared keys {shared.keys.dtype}{shared.keys.shape} and values "
                             f"{shared.values.shape}: one row of them, of their dtype, with a multiple of {SHARED_STEP} slots is needed")
    how = _AttentionHow(q.shape[-1] ** -0.5 if scale is None else float(scale), window, soft_cap, check_implementation(implementation))
    return _attention(how, q, keys, values, starts, layer, counts, plan, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rope_write(implementation, eps: float | None, q, k, v, cos, sin, starts, keys, values, layer, weights):
    norm = None if weights is None else (*weights, eps)
    return first_of("rope_write", implementation, lambda backend: backend.rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm))


def _rope_write_fwd(implementation, eps, *args):
    return _rope_write(implementation, eps, *args), args


def _rope_write_bwd(implementation, eps, saved, dy):
    q, k, v, cos, sin, starts, keys, values, layer, weights = saved
    _no_fp8_gradients("rope_write", keys)

    def exact(q, k, v, keys, values, weights):
        norm = None if weights is None else (*weights, eps)
        return xla.rope_write(q, k, v, cos, sin, starts, keys, values, layer, norm)

    dq, dk, dv, dkeys, dvalues, dweights = jax.vjp(exact, q, k, v, keys, values, weights)[1](dy)
    return dq, dk, dv, *(no_cotangent(x) for x in (cos, sin, starts)), dkeys, dvalues, no_cotangent(layer), dweights


_rope_write.defvjp(_rope_write_fwd, _rope_write_bwd)


def rope_write(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"],
    v: Float[Array, "B T Hkv Dv"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    starts: Int[Array, "B"],
    keys: Float[Array, "*L B Hkv S D"] | FP8Array,
    values: Float[Array, "*L B Hkv S Dv"] | FP8Array,
    *,
    layer: Int[Array, ""] | None = None,
    norm: tuple[Float[Array, "D"], Float[Array, "D"], float] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "*L B Hkv S D"] | FP8Array, Float[Array, "*L B Hkv S Dv"] | FP8Array]:
    """What lies between q, k, v and `attention`: the heads normed, q and k rotated, keys and values in their slots.

    starts: token t of row b goes to slot starts[b] + t; tokens past the last slot are dropped. layer: as in `attention`.
    norm: None, or the weights of `numerics.rms_norm` over the heads of q and of k, and its eps.
    keys, values: arrays, or both `fp8.FP8Array`s: then k and v, rounded to v's dtype, are quantized (`fp8.quantize`).
    -> q, keys, values; on Hopper the caches are written where they lie, in one launch.
    """
    if isinstance(keys, FP8Array) != isinstance(values, FP8Array):
        raise ValueError("rope_write: of keys and values one is an FP8Array and one is not")
    weights, eps = (None, None) if norm is None else (norm[:2], float(norm[2]))
    return _rope_write(check_implementation(implementation), eps, q, k, v, cos, sin, starts, keys, values, layer, weights)
