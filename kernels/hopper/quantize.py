"""NVFP4 quantizers for Hopper in Pallas Mosaic GPU: bit for bit what `numerics` does, alone or fused with the producer.

A thread owns whole blocks of 16 neighbouring elements, `warps_per_row` warps own a row, so that a row's amax, and whether
it holds NaN or infinity, is a maximum over registers, then lanes, then those warps. Every reduction but the sum of squares
is a maximum, and that sum runs over one fixed tree of K alone: a row's bits depend on nothing but the row and its amax.

Three ways to an amax:
- one a row ("token"), or a given one: a single launch, each row on its own;
- one a tensor, few rows: a single launch, of one CTA or of clusters. Each cluster reads all rows and shares its maxima
  through distributed shared memory, then each CTA quantizes its own part: redundant reads instead of a second launch;
- one a tensor, many elements: a launch that leaves one maximum a CTA, and one that reduces those and quantizes, from the
  last row to the first, because the last rows are still in the L2;
- one a matrix of many (weights): a single launch whose CTAs take the amax of a tile, then quantize a tile of an earlier
  matrix, whose amax is complete and whose values are still in the L2. CTAs draw their tiles in order from a counter, so that the
  first unfinished one never waits, however many CTAs run at once. So, too, weights that lie as a trainer holds them, [K, N].
"""
import dataclasses
import math

import jax
import jax.numpy as jnp

from nvfp4jax import numerics
from nvfp4jax.kernels.hopper import threads
from nvfp4jax.kernels.hopper.quantize_plan import (
    CHUNK,
    MAX_K,
    Offsets,
    Plan,
    Spec,
    columns_plan,
    groups_of_matrix,
    matrices_plan,
    plan_of,
    scan_plan,
)
from nvfp4jax.kernels.hopper.quantize_program import quantize_program


def _kernel(spec: Spec, plan: Plan):
    """-> a function of the inputs that the spec names: x, weight or up, amax, valid; returns the outputs as a dict."""
    inputs = [f"x{i}" for i in range(spec.parts)] if spec.columns else ["x"]
    inputs += {"x": [], "rmsnorm": ["weight"], "silu": ["up"]}[spec.source]
    inputs += ["amax"] if spec.amax in ("scalar", "rows", "partials") else []
    inputs += ["valid"] if spec.masked else []
    inputs += ["rows"] if spec.copies else []
    outputs = {}
    if spec.emit == "amax":
        outputs["partials"] = jax.ShapeDtypeStruct((plan.grid,), jnp.float32)
    elif spec.emit == "values":
        outputs["values"] = jax.ShapeDtypeStruct((spec.m, spec.k), jnp.bfloat16)
    else:
        if spec.emit == "packed":
            outputs["packed"] = jax.ShapeDtypeStruct((spec.m, spec.k // 2), jnp.uint8)
            outputs["scale"] = jax.ShapeDtypeStruct((spec.m, spec.k // 16), jnp.float8_e4m3fn)
        else:
            outputs["operand"] = jax.ShapeDtypeStruct((spec.m * max(1, spec.copies), spec.k), jnp.bfloat16)
        count = spec.m * max(1, spec.copies) if spec.amax in ("row", "rows") else spec.m // spec.matrix if spec.matrix else 1
        outputs["global_scale"] = jax.ShapeDtypeStruct((count,), jnp.float32)
        if spec.values:
            outputs["values"] = jax.ShapeDtypeStruct((spec.m, spec.k), jnp.bfloat16)
    names = [*inputs, *outputs, "shared", *(["zeroed"] if spec.amax == "matrices" else [])]
    zeroed = 0
    if spec.amax == "matrices":
        zeroed = 1 + spec.m // spec.matrix * (groups_of_matrix(spec, plan) // plan.tile)

    call = threads.thread_kernel(
        lambda refs: quantize_program(refs, spec, plan), names, list(outputs.values()), grid=plan.grid, warps=plan.warps,
        cluster=plan.cluster, shared_words=Offsets.of(spec, plan).words, zeroed_words=zeroed)
    return lambda arguments: dict(zip(outputs, call(*(arguments[name] for name in inputs))))


# --- the functions ---------------------------------------------------------------------------------------------------

def _run(what, source, arrays, emit, *, scaling, four_over_six, amax, static, valid, eps=0.0, values=False, rows=None):
    """Checks the arguments, picks the plan and runs one launch, or two."""
    x = arrays["x"]
    if x.ndim != 2:
        raise NotImplementedError(f"{what}: wants x [M, K], got {x.shape}; reshape the leading axes into one")
    m, k = x.shape
    unit = 64 if emit == "operand" else 16
    if k % unit or not 0 < k <= MAX_K:
        raise NotImplementedError(f"{what}: K={k} of x {x.shape} must be a multiple of {unit} and at most {MAX_K}")
    if x.dtype not in ((jnp.bfloat16, jnp.float32) if source == "x" else (jnp.bfloat16,)):
        raise NotImplementedError(f"{what}: x is {x.dtype}; cast it to bfloat16" + (" or float32" if source == "x" else ""))
    for name, array in arrays.items():
        wanted = {"weight": (k,)}.get(name, (m, k))
        if array.shape != wanted:
            raise ValueError(f"{what}: {name} is {array.dtype}{array.shape}; x {x.dtype}{x.shape} wants {x.dtype}{wanted}")
        if array.dtype != x.dtype:
            raise NotImplementedError(f"{what}: {name} is {array.dtype} beside x in {x.dtype}; one dtype is supported")
    if scaling not in ("tensor", "tensor_pow2", "token"):
        raise ValueError(f"{what}: scaling={scaling!r}: one of tensor, tensor_pow2, token")
    if four_over_six not in (None, "mae", "mse"):
        raise ValueError(f"{what}: four_over_six={four_over_six!r}: None, 'mae' or 'mse'")
    if valid is not None and valid.shape != (m,):
        raise ValueError(f"{what}: valid has shape {valid.shape}; x of shape {x.shape} wants ({m},)")
    if amax is not None and static is not None:
        raise ValueError(f"{what}: give amax or global_scale, not both")
    given = amax if amax is not None else static
    if given is not None and given.shape not in ((), (m, 1)):
        raise ValueError(f"{what}: the given amax or global scale has shape {given.shape}; x of shape {x.shape} wants () or ({m}, 1)")
    row_scales = scaling == "token" if given is None else given.shape != ()
    if rows is not None and (rows.ndim != 2 or rows.shape[0] != m or rows.dtype != jnp.int32):
        raise ValueError(f"{what}: rows must be i32 [M, copies], got {rows.dtype}{rows.shape} for x of shape {x.shape}")
    if m == 0:
        out = dict(packed=jnp.zeros((0, k // 2), jnp.uint8), scale=jnp.zeros((0, k // 16), jnp.float8_e4m3fn),
                   operand=jnp.zeros((0, k), jnp.bfloat16), values=jnp.zeros((0, k), jnp.bfloat16))
        one = jnp.ones((0, 1) if row_scales else (), jnp.float32)  # an amax over nothing counts as zero
        return out | dict(global_scale=one if given is None or row_scales else _scalar_global_scale(given, scaling, static, four_over_six))
    spec = Spec(m, k, source, x.dtype == jnp.float32, "row", emit, static is not None, scaling == "tensor_pow2", four_over_six, eps,
                 values=values)
    arrays, plan = dict(arrays), plan_of(m, k, spec.words, emit)
    if rows is not None:
        spec, arrays["rows"] = dataclasses.replace(spec, copies=rows.shape[1]), rows
    if given is not None:
        arrays["amax"] = given.astype(jnp.float32).reshape(-1)
        spec = dataclasses.replace(spec, amax="rows" if given.shape else "scalar")
    elif scaling != "token":
        if valid is not None:
            arrays["valid"] = valid
        spec = dataclasses.replace(spec, amax="scan", masked=valid is not None)
        few = scan_plan(m, k, spec.words)
        if few is None:
            first = plan_of(m, k, spec.words)
            scan = dataclasses.replace(spec, emit="amax", amax="row", values=False, copies=0)
            arrays["amax"] = _kernel(scan, first)(arrays)["partials"]
            spec = dataclasses.replace(spec, amax="partials", partials=first.grid, masked=False)
        plan = few or plan
    out = _kernel(spec, plan)(arrays)
    if emit == "values":
        return out
    out["global_scale"] = out["global_scale"].reshape((-1, 1) if spec.amax in ("row", "rows") else ())
    return out


def _scalar_global_scale(given, scaling, static, four_over_six):
    if static is not None:
        return given.astype(jnp.float32)
    return numerics.global_scales(given, pow2=scaling == "tensor_pow2", four_over_six=four_over_six is not None)[1]


def quantize(x, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None):
    """Quantizes activations or weights to NVFP4, bit for bit as `numerics` on a CPU.

    x: bfloat16 or float32 [M, K], K a multiple of 16.
    scaling: "tensor" (one amax over the valid rows), "tensor_pow2" (its global scale rounded up to a power of two) or
        "token" (one amax a row).
    four_over_six: None, "mae" or "mse".
    amax: f32 [] or [M, 1], where a producer knows it already. global_scale: f32 [] or [M, 1], a static scale (it multiplies).
    valid: bool [M]; rows where it is False take no part in a tensor's amax.
    -> packed u8 [M, K/2], scale float8_e4m3fn [M, K/16], global_scale f32 [] or [M, 1].
    A row with NaN or infinity gets NaN scales and zero codes, alone. NotImplementedError for shapes that do not fit.
    """
    out = _run("quantize", "x", dict(x=x), "packed", scaling=scaling, four_over_six=four_over_six, amax=amax,
               static=global_scale, valid=valid)
    return out["packed"], out["scale"], out["global_scale"]


def operand(x, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, rows=None):
    """Quantizes as `quantize` does, and decodes at once: what the Hopper matmuls read.

    K must be a multiple of 64. rows: i32 [M, c], to hand out c copies of each row on the way: row i of x becomes the rows rows[i]
    of the M * c results (`routing`'s row_of_slot; -1: nowhere). Rows of the results that are nobody's hold anything.
    -> bfloat16 [M or M * c, K] of code * scale, exact, K permuted by `decode.permute_k`; global_scale f32 [] or [M or M * c, 1].
    A row with NaN or infinity is NaN throughout.
    """
    out = _run("operand", "x", dict(x=x), "operand", scaling=scaling, four_over_six=four_over_six, amax=amax,
               static=global_scale, valid=valid, rows=rows)
    return out["operand"], out["global_scale"]


def rmsnorm_operand(x, weight, *, eps, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, normed=False):
    """RMSNorm, then `operand` of its bfloat16 result, in one launch where `operand` takes one.

    x: bfloat16 [M, K]; weight: bfloat16 [K]. Bit for bit `numerics.rms_norm` (there a denormal may be flushed).
    normed: also return that result, K in natural order, for whoever else reads it (a router).
    -> (bfloat16 [M, K] or None, operand bfloat16 [M, K], global_scale f32 [] or [M, 1]).
    """
    out = _run("rmsnorm_operand", "rmsnorm", dict(x=x, weight=weight), "operand", scaling=scaling, four_over_six=four_over_six,
               amax=amax, static=global_scale, valid=valid, eps=float(eps), values=normed)
    return out["values"] if normed else None, out["operand"], out["global_scale"]


def rms_norm(x, weight, *, eps):
    """RMSNorm alone, for readers that take a float. x: bfloat16 [M, K]; weight: bfloat16 [K]; K a multiple of 16.

    -> bfloat16 [M, K], bit for bit `numerics.rms_norm` (there a denormal may be flushed).
    """
    return _run("rms_norm", "rmsnorm", dict(x=x, weight=weight), "values", scaling="token", four_over_six=None, amax=None, static=None,
                valid=None, eps=float(eps))["values"]


def silu_mul_operand(gate, up, *, scaling="tensor", four_over_six=None, amax=None, global_scale=None, valid=None, product=False):
    """SiLU times up, then `operand` of the bfloat16 product. gate, up: bfloat16 [M, K]. Bit for bit `numerics.silu_mul`.

    product: also return the rounded product. -> (bfloat16 [M, K] or None, operand bfloat16 [M, K], global_scale).
    """
    out = _run("silu_mul_operand", "silu", dict(x=gate, up=up), "operand", scaling=scaling, four_over_six=four_over_six,
               amax=amax, static=global_scale, valid=valid, values=product)
    return out["values"] if product else None, out["operand"], out["global_scale"]


def quantize_weight(w, *, four_over_six=None):
    """Quantizes weights with one global scale for each [N, K] matrix, as `nvfp4jax.array.quantize_weight`.

    w: bfloat16 [..., N, K], K a multiple of 16. -> packed u8 [..., N, K/2], scale float8_e4m3fn [..., N, K/16], global_scale
    f32 [..., 1, 1], or [] for a single matrix. A row with NaN or infinity gets NaN scales; it does not spoil the matrix.
    """
    *lead, n, k = w.shape
    if w.dtype != jnp.bfloat16 or k % 16 or not 0 < k <= MAX_K or not w.size:
        raise NotImplementedError(f"quantize_weight: wants bfloat16 [..., N, K], not empty, K a multiple of 16 and at most {MAX_K}; got "
                                  f"{w.dtype}{w.shape}")
    count = math.prod(lead)
    if count == 1:
        packed, scale, global_scale = quantize(w.reshape(n, k), four_over_six=four_over_six)
    else:
        pack, plan = matrices_plan(n, k)
        rows = w.reshape(count * n // pack, k * pack)
        spec = Spec(*rows.shape, "x", False, "matrices", "packed", four_over_six=four_over_six, matrix=n // pack, pack=pack)
        packed, scale, global_scale = _kernel(spec, plan)(dict(x=rows)).values()
    global_scale = global_scale.reshape(*lead, 1, 1) if lead else global_scale
    return packed.reshape(*lead, n, k // 2), scale.reshape(*lead, n, k // 16), global_scale


def quantize_transposed(ws, *, four_over_six=None):
    """`quantize_weight` of weights that lie transposed, as trainers hold them, and need no transposed copy.

    ws: one or several bfloat16 [..., K, N] of one shape, K a multiple of 64 and N of 2, whose rows come one after another and share a
    global scale. -> packed u8 [..., len(ws) * N, K/2], scale float8_e4m3fn [..., len(ws) * N, K/16], global_scale f32 [..., 1, 1], or []
    for a single matrix.
    """
    *lead, k, n = ws[0].shape
    if any(w.dtype != jnp.bfloat16 or w.shape != ws[0].shape for w in ws) or k % CHUNK or n % 2 or not ws[0].size:
        raise NotImplementedError(f"quantize_transposed: wants bfloat16 [..., K, N] of one shape, not empty, K a multiple of {CHUNK} and N of 2; "
                                  f"got {', '.join(f'{w.dtype}{w.shape}' for w in ws)}")
    count, rows = math.prod(lead), len(ws) * n
    spec = Spec(count * rows, k, "x", False, "matrices", "packed", four_over_six=four_over_six, matrix=rows, columns=n)
    arrays = {f"x{i}": w.reshape(count * k, n) for i, w in enumerate(ws)}
    packed, scale, global_scale = _kernel(spec, columns_plan(n, k, len(ws)))(arrays).values()
    global_scale = global_scale.reshape(*lead, 1, 1) if lead else global_scale.reshape(())
    return packed.reshape(*lead, rows, k // 2), scale.reshape(*lead, rows, k // 16), global_scale
