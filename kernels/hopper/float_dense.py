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
MOST_TILES = 65535  # along y and z of a launch: rows and columns


def _tiles(m, k, n):
    """(rows, columns, stages) of a CTA, parts of K. The parts, which bits depend on, follow from k and n alone."""
    parts = max(p for p in (1, 2, 4, 8) if p == 1 or k % (256 * p) == 0 and p * n <= 1024)
    large = (64,) if m <= 64 else (128,) if m <= 128 else (256, 128)
    rows = next((rows for rows in large if -(-m // rows) * n >= 128 * SMS), None)
    if parts > 1 or n % 128 or rows is None:
        return 64, 64, 4, parts  # they would not fill the card: small tiles, so that there are several
    return rows, 128, 4, 1


def matmul(x, kernel, *, transposed=False):
    """x bf16 [M, K] times kernel bf16 [K, N] -> f32 [M, N]. transposed: the kernel lies as [N, K].

    The bits of a row depend on nothing but the row and the kernel. NotImplementedError for K or N not a multiple of 64, or other dtypes.
    """
    m = x.shape[0]
    parts = sums(x, kernel, transposed)[:, :m]
    return functools.reduce(jnp.add, [parts[i] for i in range(len(parts))])


def sums(x, kernel, transposed=False):
    """-> f32 [parts, >= M, N], whose sum over the parts, from left to right, is the product."""
    (m, k), n = x.shape, kernel.shape[0 if transposed else 1]
    rows, columns, stages, parts = _tiles(m, k, n)
    if {x.dtype, kernel.dtype} != {jnp.dtype(jnp.bfloat16)} or k % STEP or n % columns or not m:
        raise NotImplementedError(f"float_dense.matmul: {x.dtype}{x.shape} times {kernel.dtype}{kernel.shape}: bfloat16, K a multiple of {STEP}, "
                                  f"N of {columns} are supported")
    if max(-(-m // rows), n // columns) > MOST_TILES:
        raise NotImplementedError(f"float_dense.matmul: {x.dtype}{x.shape} times {kernel.dtype}{kernel.shape}: at most {MOST_TILES} tiles of {rows} rows "
                                  f"and of {columns} columns are supported")
    if m > 8:  # TMA takes groups of 8 rows; behind the last group, or the only one, it finds zeros
        x = jnp.pad(x, ((0, -m % 8), (0, 0)))
    return _launch(x, kernel, rows, columns, stages, parts, transposed)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _launch(x, kernel, rows, columns, stages, parts, transposed):
    """-> [parts, M, N], M rounded up to whole tiles."""
    k, n = kernel.shape[::-1] if transposed else kernel.shape
    m = -(-x.shape[0] // rows) * rows
    height = 128 if rows == 256 else 64  # of a warpgroup: four of them and the producer would ask for more registers than a CTA has, and wait forever
    down = rows // height  # warpgroups, one below the other
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
                place = at_rows.start + (wg // across) * height, at_columns.start + (wg % across) * width
                out_gmem[lax.axis_index("part"), pl.ds(place[0], height), pl.ds(place[1], width)] = acc[...]

            pl.run_scoped(scope, plgpu.ACC((height, width), jnp.float32))

        def step(_, x_smem, w_smem, acc):
            own_x = x_smem if down == 1 else x_smem.at[pl.ds((wg // across) * height, height)]
            own = slice(None) if across == 1 else pl.ds((wg % across) * width, width)
            plgpu.wgmma(acc, own_x, w_smem.at[own].T if transposed else w_smem.at[:, own])
            plgpu.wgmma_wait(0)
            return acc

        plgpu.emit_pipeline_warp_specialized(
            step, grid=(k // parts // STEP,), memory_registers=40, wg_axis="wg", num_compute_wgs=down * across, max_concurrent_steps=stages,
            compute_context=accumulate,
            in_specs=[plgpu.BlockSpec((rows, STEP), lambda i: (0, i), transforms=transforms(128), memory_space=plgpu.SMEM),
                      plgpu.BlockSpec((columns, STEP), lambda i: (0, i), transforms=transforms(128), memory_space=plgpu.SMEM) if transposed else
                      plgpu.BlockSpec((STEP, columns), lambda i: (i, 0), transforms=transforms(swizzle), memory_space=plgpu.SMEM)],
        )(x_gmem.at[at_rows, at_k], w_gmem.at[at_columns, at_k] if transposed else w_gmem.at[at_k, at_columns])  # fmt: skip

    return plgpu.kernel(
        float_dense, out_type=jax.ShapeDtypeStruct((parts, m, n), jnp.float32), grid=(n // columns, m // rows, parts),
        grid_names=("columns", "rows", "part"),
        num_threads=down * across + 1, thread_name="wg")(x, kernel)
