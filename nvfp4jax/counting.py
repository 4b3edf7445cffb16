"""What telemetry counts of an activation: its amax, and how many of its blocks a quantizer cannot represent well."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nvfp4jax import numerics, pytree
from nvfp4jax.scaling import Request, multipliers, row_amax, tensor_amax

# A scale that rounds to more than E4M3's 448: above half the way to 480, which would be the next. From 448 to here it rounds to 448
# as any scale rounds, and the block's amax, at most 6.21 of it, to 6.
SATURATED = 464.0
_LOW = 24  # bits of a count's first half: a call adds fewer than 2**31 - 2**24 blocks


@dataclasses.dataclass(frozen=True)
class Counts:
    """What calls have counted; see `counted`.

    amax: f32 [], the largest. blocks: i32 [4, 2]: all, saturated, flushed, beyond a shared scale's range; each n as
    (n % 2**24, n // 2**24), for a rollout may have more than 2**31.
    """

    amax: Float[Array, ""]
    blocks: Int[Array, "4 2"]


pytree.register(Counts, "amax", "blocks")


def zeros(lead: tuple[int, ...] = ()) -> Counts:
    """Of no call. lead: axes that a stack of layers adds."""
    return Counts(jnp.zeros(lead, jnp.float32), jnp.zeros((*lead, 4, 2), jnp.int32))


def counted(counts: Counts, x: Float[Array, "M K"], request: Request | None, valid: Bool[Array, "M"] | None) -> Counts:
    """`counts` and those of a call that quantizes x as `request` says (None: not at all; then its amax alone counts).

    Of 16 elements the wanted scale is amax / (6 * global scale), as the quantizer computes it. Such a block is
      saturated         where the wanted scale rounds to more than 448, E4M3's largest (it is above 464): its largest elements clip;
      flushed           where the scale rounds to 0, though not all its elements are 0: all become 0. With four-over-six, where the
                        scale that maps its amax to 4 rounds to 0 as well;
      beyond the range  where a scale that other rows or calls have a part in (all modes but "token") spoils it: it is saturated, or
                        its scale is below 2**-6 (flushed, or of fewer bits, E4M3's denormals), and under an amax of its own row it
                        would be neither.
    valid: rows that count. A row that holds NaN or infinity counts in no block; its finite values count in the amax, as in the modes.
    """
    amax = jnp.maximum(counts.amax, tensor_amax(x, valid))
    if request is None:
        return Counts(amax, counts.blocks)
    four_over_six = request.four_over_six is not None
    x = numerics.as_float32(x)
    rows = jnp.isfinite(x).all(-1, keepdims=True)
    x = jnp.where(rows, x, jnp.float32(0))
    rows = rows if valid is None else rows & valid[:, None]
    largest = jnp.abs(x).reshape(x.shape[0], -1, numerics.BLOCK).max(-1)
    saturated, low, flushed = _fate(largest, multipliers(x, request)[0], four_over_six)
    beyond = jnp.zeros((), bool)
    if not request.per_row:
        own, _, _ = numerics.global_scales(row_amax(x), four_over_six=four_over_six)
        spoiled, lost, _ = _fate(largest, own, four_over_six)
        beyond = (saturated | low) & ~(spoiled | lost)
    found = [(rows & what).sum(dtype=jnp.int32) for what in (jnp.ones(largest.shape, bool), saturated, flushed, beyond)]
    first = counts.blocks[:, 0] + jnp.stack(found)
    return Counts(amax, jnp.stack([first & ((1 << _LOW) - 1), counts.blocks[:, 1] + (first >> _LOW)], -1))


def _fate(largest: Float[Array, "M blocks"], g: Array, four_over_six: bool) -> tuple[Array, Array, Array]:
    """Of blocks by their amaxes, under the encode multiplier g ([] or [M, 1]): (saturated, of a scale below 2**-6, flushed)."""
    wanted = numerics.wanted_scales(largest, g, four_over_six)
    bits = lambda wanted: numerics.encode_e4m3(jnp.minimum(wanted, jnp.float32(numerics.E4M3_MAX)))  # noqa: E731
    widest = wanted * jnp.float32(1.5) if four_over_six else wanted
    some = largest > 0
    return wanted > jnp.float32(SATURATED), some & (bits(wanted) < 8), some & (bits(widest) == 0)
