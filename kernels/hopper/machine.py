"""A Hopper SM: its threads, registers and shared memory, and how rows lie in the latter."""
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import mosaic

SMS = 132  # of an H100 or H200: a grid of this many CTAs fills one wave
WARP = 32  # threads
WARPGROUP = 128  # threads
SHARED_MEMORY = 227 * 1024  # bytes an SM
SCHEDULERS = 4  # of an SM, each issues for a fourth of the warps
CLUSTER = 16  # CTAs of a cluster: the largest

# 128-byte rows in shared memory, 16-byte unit u of row r at u ^ r % 8: TMA writes them so, from any row and past any
# edge (zeros), and the decode reads them so.
ROWS_128 = (plgpu.SwizzleTransform(128),)


def scale_rows(size: int) -> tuple:
    """Transforms of rows of `size` bytes of scales: 128 and 64 bytes are swizzled, the latter with unit u of row r at
    u ^ r / 2 % 4."""
    return (plgpu.SwizzleTransform(size),) if size in (64, 128) else ()


def swizzled(itemsize: int) -> tuple:
    """Transforms of a shared memory operand of wgmma, K in 128-byte rows.

    An array of these and one of ROWS_128 hold the same bytes while a row is 128 bytes, but Pallas fills this one only
    from rows at multiples of 8 of an array that has a multiple of 8.
    """
    return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)


def register_budget(consumers: int, *, per_sm: int = 1, producer: int = 32) -> tuple[int, int]:
    """Registers a thread for `consumers` warpgroups and one producer warpgroup: (consumer, producer), for setmaxnreg.

    A CTA owns registers-at-launch x threads for its whole life; asking for more waits for ever and hangs the GPU, so
    the numbers are chosen here only. ptxas launches with the lesser of the consumers' number and a thread's share.
    """
    threads = (consumers + 1) * WARPGROUP
    share = min(232, 65536 // (threads * per_sm) // 8 * 8)
    pooled = min(232, (share * (consumers + 1) - producer) // consumers // 8 * 8)
    consumer = pooled if per_sm == 1 else share  # more than the share would leave room for one CTA only
    launched = min(share, consumer)
    if consumer * consumers + producer > launched * (consumers + 1) or launched * threads * per_sm > 65536:
        raise ValueError(f"no register budget for {consumers} consumers of {consumer} and a producer of {producer}: "
                         f"{threads} threads are launched with {launched} each, {per_sm} CTAs an SM")
    return consumer, producer


class Hardware:
    """What a kernel asks of the hardware and not of the interpreter; the tests' kernels override it."""

    def set_registers(self, count: int, action: str) -> None:
        """Of a thread of this warpgroup; action: "increase" or "decrease"."""
        plgpu.set_max_registers(count, action=action)

    def zeros(self, columns: int) -> jax.Array:
        """An accumulator of wgmma, f32 [64, columns]."""
        return mosaic.zero_accumulator(columns)

    def drain(self, ring, uses) -> None:
        """The producer's last act. The hardware wants none; the interpreter wants every phase of a barrier observed."""
