"""A bfloat16 matmul on Hopper whose bits do not depend on the number of rows: for the head, routers and layers kept in bfloat16.

Each element of the result is one float32 accumulator over the k16 steps of K, in order, whatever the tile. A CTA takes 64 to 256 rows
and 64 or 128 columns; a warp keeps both operands coming by TMA. Few columns (a router's) divide K among CTAs, in parts that follow from
the kernel's shape alone, added up in order behind them: one CTA could not fetch the operands fast enough.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

STEP = 64  # of K, at a time
SMS = 132


def _tiles(m, k, n):
    """(rows, columns, stages) of a CTA, parts of K."""
    if n < 128 * SMS:  # few columns: small tiles, so that there are several
        return 64, 64, 4, max(p for p in (1, 2, 4, 8) if p == 1 or k % (256 * p) == 0 and p * n <= 1024)
    return 64 if m <= 64 else 128 if m <= 128 else 256, 128, 4, 1


def matmul(x, kernel, *, out_dtype=jnp.float32):
    """x bf16 [M, K] times kernel bf16 [K, N] -> out_dtype [M, N], accumulated in float32.

    The bits of a row depend on nothing but the row and the kernel. NotImplementedError for K not a multiple of 64, N not one of 64
    (128 from 16896 on), or other dtypes.
    """
    (m, k), n = x.shape, kernel.shape[1]
    rows, columns, stages, parts = _tiles(m, k, n)
    if {x.dtype, kernel.dtype} != {jnp.dtype(jnp.bfloat16)} or k % STEP or n % columns or not m:
        raise NotImplementedError(f"float_dense.matmul: {x.dtype}{x.shape} times {kernel.dtype}{kernel.shape}: bfloat16, K a multiple of {STEP}, "
                                  f"N of {columns} are supported")
    padded = jnp.pad(x, ((0, -m % rows), (0, 0)))
    sums = _launch(padded, kernel, jnp.dtype(out_dtype if parts == 1 else jnp.float32), rows, columns, stages, parts)[:, :m]
    return functools.reduce(jnp.add, [sums[i] for i in range(parts)]).astype(out_dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _launch(x, kernel, out_dtype, rows, columns, stages, parts):
    """-> [parts, M, N]."""
    (m, k), n = x.shape, kernel.shape[1]
    down = rows // 64  # warpgroups, one below the other
    across = 2 if down == 1 and columns == 128 else 1
    width = columns // across
    itemsize = 2
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    transforms = lambda bytes_: (plgpu.TilingTransform((8, bytes_ // itemsize)), plgpu.SwizzleTransform(bytes_))

    def float_dense(x_gmem, w_gmem, out_gmem):
        wg = lax.axis_index("wg")
        at_k = pl.ds(lax.axis_index("part") * (k // parts), k // parts)
        at_rows, at_columns = pl.ds(lax.axis_index("rows") * rows, rows), pl.ds(lax.axis_index("columns") * columns, columns)

        def accumulate(evaluate):
            def scope(acc):
                evaluate(acc)
                place = at_rows.start + (wg // across) * 64, at_columns.start + (wg % across) * width
                out_gmem[lax.axis_index("part"), pl.ds(place[0], 64), pl.ds(place[1], width)] = acc[...].astype(out_dtype)

            pl.run_scoped(scope, plgpu.ACC((64, width), jnp.float32))

        def step(_, x_smem, w_smem, acc):
            own_x = x_smem if down == 1 else x_smem.at[pl.ds((wg // across) * 64, 64)]
            plgpu.wgmma(acc, own_x, w_smem if across == 1 else w_smem.at[:, pl.ds((wg % across) * width, width)])
            plgpu.wgmma_wait(0)
            return acc

        plgpu.emit_pipeline_warp_specialized(
            step, grid=(k // parts // STEP,), memory_registers=40, wg_axis="wg", num_compute_wgs=down * across, max_concurrent_steps=stages,
            compute_context=accumulate,
            in_specs=[plgpu.BlockSpec((rows, STEP), lambda i: (0, i), transforms=transforms(128), memory_space=plgpu.SMEM),
                      plgpu.BlockSpec((STEP, columns), lambda i: (i, 0), transforms=transforms(swizzle), memory_space=plgpu.SMEM)],
        )(x_gmem.at[at_rows, at_k], w_gmem.at[at_k, at_columns])  # fmt: skip

    return plgpu.kernel(
        float_dense, out_type=jax.ShapeDtypeStruct((parts, m, n), out_dtype), grid=(n // columns, m // rows, parts),
        grid_names=("columns", "rows", "part"),
        num_threads=down * across + 1, thread_name="wg")(x, kernel)
