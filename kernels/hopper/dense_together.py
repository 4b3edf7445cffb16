"""Several weights that read the same tokens, in one launch: q, k and v, or the gate and the up projection of a small layer.

    CTA  0 ..            ctas of weight 0       each a CTA of `Narrow` or `Split` with its weight's refs: the branch is the same for all
         ctas of 0 ..    ctas of weight 1       of its threads, and the kernels differ in N and the bias alone, so that shared memory and
         ...                                    threads fit all of them

A CTA of `Wide` stays on its SM and works for each weight in turn (`dense_wide.walk`).
"""
import dataclasses

from jax import lax
from jax.experimental import pallas as pl

from nvfp4jax.kernels.hopper import dense_wide
from nvfp4jax.kernels.hopper.dense_product import Refs

_COMMON = "x", "row_scale", "layer"  # of `Refs`: what all weights read
_OWN = tuple(field.name for field in dataclasses.fields(Refs) if field.name not in (*_COMMON, "out"))


def build(kernels):
    """-> a function of the arrays of each kernel's `Refs` but the last, which it returns, for each."""
    first, count = kernels[0], len(kernels)
    persistent = isinstance(first, dense_wide.Wide)

    def body(*refs, **scratch):
        common, own, outs = dict(zip(_COMMON, refs)), refs[len(_COMMON):-count], refs[-count:]
        parts = [Refs(**common, **dict(zip(_OWN, own[j * len(_OWN):])), out=out) for j, out in enumerate(outs)]
        if persistent:
            dense_wide.walk(kernels, parts, **scratch)
            return
        tile, start = lax.axis_index("tile"), 0
        for kernel, part in zip(kernels, parts):
            inside = (tile >= start) & (tile < start + kernel.ctas)
            pl.when(inside)(lambda kernel=kernel, part=part, start=start: kernel.run(part, tile - start, **scratch))
            start += kernel.ctas

    out_types = [kernel.product.out_type for kernel in kernels]
    if persistent:
        launch = dense_wide.launch(kernels, body, out_types)
    else:
        launch = first.launch(body, out_types, sum(kernel.ctas for kernel in kernels))

    def run(arrays):
        named = [dict(zip((field.name for field in dataclasses.fields(Refs)), a)) for a in arrays]
        return tuple(launch(*(named[0][name] for name in _COMMON), *(a[name] for a in named for name in _OWN)))

    return run
