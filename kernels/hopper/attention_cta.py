"""The CTA of prefill attention and of the sums that rows share: a producer warpgroup and two consumers of 64 queries each.

    q_sm            each consumer's queries
    k_sm, v_sm      rings of STAGES pieces of 128 slots, which both consumers read
    x_full, x_empty a barrier each a consumer (q) or a stage (k, v): TMA has written, its readers have read
"""
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper.attention_sums import PIECE
from nvfp4jax.kernels.hopper.attention_wgmma import CONSUMERS, HALF
from nvfp4jax.kernels.hopper.machine import ROWS_128

STAGES = 2
REGISTERS = 240, 24  # of a consumer's and a producer's thread: 2 x 240 + 24 are the 3 x 168 that are launched


def divide(wg, produce, consume):
    """Each warpgroup to its work. wg: which this one is."""
    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        produce()

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        consume()


def launch(body, out_type, queries, d, ctas, **more):
    """-> a function of the body's arrays. queries: the shape of a consumer's, of which each half of d has HALF columns; more: scratch."""
    halves = d // HALF
    tile = lambda *shape: plgpu.SMEM((*shape, HALF), jnp.bfloat16, transforms=ROWS_128)
    scratch = dict(
        q_sm=tile(CONSUMERS, *queries), k_sm=tile(STAGES, halves * PIECE), v_sm=tile(STAGES, halves * PIECE), **more,
        q_full=plgpu.Barrier(num_arrivals=halves, num_barriers=CONSUMERS), q_empty=plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS),
        **{f"{x}_full": plgpu.Barrier(num_arrivals=halves, num_barriers=STAGES) for x in "kv"},
        **{f"{x}_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES) for x in "kv"})
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=scratch, grid=(ctas,), grid_names=("cta",), num_threads=CONSUMERS + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True))
