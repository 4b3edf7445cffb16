"""Grouped matmuls: the schedule under the interpreter, the compile without a GPU, and the results on one."""

import dataclasses
import itertools

import aot
import hopper_interpreted
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx_hopper
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import grouped
from nvfp4jax.kernels.hopper.decode import permute_k
from nvfp4jax.kernels.hopper.grouped_config import layout_of
from nvfp4jax.kernels.hopper.grouped_plan import Table
from nvfp4jax.kernels.hopper.machine import SHARED_MEMORY, register_budget, scale_rows

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# (experts, output channels of gate, hidden) of a model's expert layer; down is the transpose.
QWEN3_30B, QWEN3_235B, DEEPSEEK_V3, MIXTRAL = (768, 2048), (1536, 4096), (2048, 7168), (14336, 4096)


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def make(rng, sizes, n, k, *, gated, token_scale=True, spare=3):
    """Random weights over every code and every finite scale, random rows, and `spare` rows past the last expert's (negative: so many too few)."""
    experts, m = len(sizes), sum(sizes) + spare
    lead = (experts, 2, n) if gated else (experts, n)
    codes = rng.integers(0, 16, (*lead, k), dtype=np.uint8)
    scale = rng.integers(0, 127, (*lead, k // 16), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    x = rng.normal(size=(m, k)).astype(ml_dtypes.bfloat16)
    row_scale = rng.uniform(0.5, 2, (m, 1) if token_scale else ()).astype(np.float32)
    global_scale = rng.uniform(0.5, 2, experts).astype(np.float32) * np.float32(2e-3 / k**0.5)
    return x, np.asarray(row_scale), codes, scale, global_scale, np.asarray(sizes, np.int32)


def arguments(x, row_scale, codes, scale, global_scale, sizes):
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return tuple(map(jnp.asarray, (permute_k(jnp.asarray(x)), row_scale, packed, scale, global_scale, sizes)))


def oracle(x, row_scale, codes, scale, global_scale, sizes, *, gated):
    """float64 results and how far a float32 accumulation may be from them, rows of the groups only."""
    k, bound_of_sum = x.shape[1], lambda terms: (x.shape[1] + 16) * 2.0**-23 * terms
    results, bounds, row = [], [], 0
    row_scale = np.broadcast_to(row_scale.astype(np.float64), (x.shape[0], 1))
    for expert, size in enumerate(sizes):
        if not size:
            continue
        rows = slice(row, row + size)  # fewer, where x has no more
        row += size
        factor = row_scale[rows] * float(global_scale[expert])
        w = VALUES[codes[expert]] * np.repeat(scale[expert].astype(np.float64), 16, -1)
        xs = x[rows].astype(np.float64)
        if gated:
            (gate, up), (gate_terms, up_terms) = (
                [f(xs) @ f(w[i]).T * factor for i in range(2)] for f in (np.array, np.abs))
            gate_bound, up_bound = bound_of_sum(gate_terms), bound_of_sum(up_terms)
            silu = gate / (1 + np.exp(-gate))
            results.append(silu * up)
            # |silu'| < 1.1; the approximate exp2 and reciprocal are good to a few units of 2**-22.
            gate_error = 1.1 * gate_bound + np.abs(silu) * 2.0**-19
            bounds.append(gate_error * (np.abs(up) + up_bound) + np.abs(silu) * up_bound)
        else:
            results.append(xs @ w.T * factor)
            bounds.append(bound_of_sum(np.abs(xs) @ np.abs(w).T * factor))
    assert k % 64 == 0
    return np.concatenate(results), np.concatenate(bounds)


def check(out, reference, bound):
    rounding = 2.0**-8 if out.dtype == ml_dtypes.bfloat16 else 2.0**-23
    out = out.astype(np.float64)[:len(reference)]
    assert np.isfinite(out).all()
    error = np.abs(out - reference)
    allowed = bound + rounding * np.abs(reference) + 1e-30
    assert (error <= allowed).all(), f"{(error > allowed).mean():.1%} off, by up to {(error / allowed).max()} bounds"


def run(case, *, gated, **options):
    f = grouped.gate_up if gated else grouped.matmul
    return np.asarray(jax.jit(lambda *a: f(*a, **options))(*arguments(*case)))


# --- the configuration ----------------------------------------------------------------------------------------------

def test_every_configuration_fits():
    shapes = [QWEN3_30B, QWEN3_235B, DEEPSEEK_V3, MIXTRAL, (64, 64), (72, 192), (704, 1408)]
    for m, experts, (n, k), gated in itertools.product(
            (1, 8, 31, 64, 128, 500, 512, 2048, 8192, 65536), (1, 8, 128, 256), shapes, (True, False)):
        n, k = (n, k) if gated else (k, n)
        c = grouped.config(m, experts, n, k, gated=gated)
        table = Table(c.computes[-1] + 4, experts)
        layout = layout_of(c, k, 2 if gated else 1, table)
        consumer, producer = register_budget(c.warpgroups, per_sm=c.per_sm)
        assert (consumer * c.warpgroups + producer) * 128 * c.per_sm <= 65536
        assert layout.x_stages >= 2 and layout.w_stages >= 2
        tokens = layout.x_stages * c.x_rows * 128
        weights = layout.w_stages * layout.rows * 128 + layout.s_stages * layout.rows * layout.scale_row
        assert (tokens + weights) * c.per_sm <= SHARED_MEMORY
        assert all(t % 8 == 0 for t in c.tiles + c.computes) and max(c.computes) == max(c.tiles) <= min(256, c.x_rows)


def test_a_register_budget_that_would_hang_is_refused():
    for consumers in range(1, 5):
        consumer, producer = register_budget(consumers)
        assert consumer * consumers + producer <= 65536 // ((consumers + 1) * 128) // 8 * 8 * (consumers + 1)
    with pytest.raises(ValueError, match="no register budget"):
        register_budget(4, producer=512)


# --- the schedule, interpreted --------------------------------------------------------------------------------------

SMALL = dict(warpgroups=2, sms=2)
SCHEDULES = {
    "decode": ((3, 0, 9, 1), 72, 512, True, grouped.Config((8,), (8,), 32, **SMALL)),
    "K off the step": ((3, 0, 19), 100, 320, False, grouped.Config((8, 16), (8, 16), 64, **SMALL)),
    "tiny": ((0, 5), 72, 64, True, grouped.Config((8,), (8,), 32, warpgroups=1, per_sm=2, sms=1)),
    "scales from any word": ((2, 5, 1), 67, 320, True, grouped.Config((8,), (8,), 32, **SMALL)),
    "scales in blocks": ((20, 1), 64, 2304, False, grouped.Config((8, 16, 24), (8, 24), 32, **SMALL)),
    "tokens in chunks": ((17, 2, 0), 130, 768, False, grouped.Config((8, 24), (24,), 24, **SMALL)),
    "four steps a turn": ((3, 0, 19), 72, 1024, True, grouped.Config((8, 16, 24), (8, 24), 96, **SMALL)),
    "a crowd": ((2, 80, 30), 64, 512, False, grouped.Config((8, 24, 40), (24, 40), 40, crowd=40, **SMALL)),
    "stages of a size": ((40, 2, 9), 64, 512, True, grouped.Config((8, 16, 32), (8, 16, 32), 32, **SMALL)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_under_the_interpreter(rng, name, monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    monkeypatch.setattr(grouped, "Grouped", hopper_interpreted.Grouped)
    sizes, n, k, gated, use = SCHEDULES[name]
    case = make(rng, sizes, n, k, gated=gated, token_scale=name != "tiny")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = run(case, gated=gated, use=use)
        races = gpu_callbacks.get_races().races_found
    assert not races
    check(out, *oracle(*case, gated=gated))


def test_sizes_of_more_rows_than_there_are(rng, monkeypatch):
    """Those that there are come out right, and nothing is written past the last: the interpreter would say so."""
    monkeypatch.setattr(grouped, "Grouped", hopper_interpreted.Grouped)
    *given, sizes = make(rng, (3, 4), 64, 256, gated=False, spare=0)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out = run((*given, np.asarray([3, 20], np.int32)), gated=False, use=grouped.Config((8,), (8,), 32, **SMALL))
    check(out, *oracle(*given, sizes, gated=False))


def test_stacked_layers_under_the_interpreter(rng, monkeypatch):
    monkeypatch.setattr(grouped, "Grouped", hopper_interpreted.Grouped)
    x, row_scale, codes, scale, global_scale, sizes = make(rng, (4, 2), 64, 256, gated=False)
    layers = [make(rng, (4, 2), 64, 256, gated=False)[2:5] for _ in range(2)] + [(codes, scale, global_scale)]
    stacked = [np.stack(v) for v in zip(*layers)]
    args = arguments(x, row_scale, *stacked, sizes)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        use = grouped.Config((8,), (8,), 32, **SMALL)
        f = jax.jit(lambda layer, *a: grouped.matmul(*a, layer=layer, use=use))
        out = np.asarray(f(jnp.int32(2), *args))
    check(out, *oracle(x, row_scale, codes, scale, global_scale, sizes, gated=False))


def test_errors_name_the_shape(rng):
    x, row_scale, packed, scale, global_scale, sizes = arguments(*make(rng, (2, 1), 64, 128, gated=False))
    with pytest.raises(ValueError, match=r"operand must be bf16 \[M, 128\]"):
        grouped.matmul(x[:, :64], row_scale, packed, scale, global_scale, sizes)
    with pytest.raises(ValueError, match="row_scale"):
        grouped.matmul(x, row_scale[:1], packed, scale, global_scale, sizes)
    with pytest.raises(ValueError, match="group_sizes"):
        grouped.matmul(x, row_scale, packed, scale, global_scale, sizes[:1])
    with pytest.raises(ValueError, match="scales"):
        grouped.matmul(x, row_scale, packed, scale[..., :4], global_scale, sizes)
    with pytest.raises(ValueError, match="gate_up: packed"):
        grouped.gate_up(x, row_scale, packed, scale, global_scale, sizes)
    with pytest.raises(NotImplementedError, match="bf16 or f32"):
        grouped.matmul(x, row_scale, packed, scale, global_scale, sizes, out_dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="multiple of 64, got K=80"):
        grouped.matmul(x[:, :80], row_scale, packed[..., :40], scale[..., :5], global_scale, sizes)


# --- the compile ----------------------------------------------------------------------------------------------------

def structs(m, experts, n, k, *, gated, token_scale=True):
    lead = (experts, 2, n) if gated else (experts, n)
    return (((m, k), jnp.bfloat16), ((m, 1) if token_scale else (), jnp.float32), ((*lead, k // 2), jnp.uint8),
            ((*lead, k // 16), jnp.float8_e4m3fn), ((experts,), jnp.float32), ((experts,), jnp.int32))


COMPILED = [(gated, m, 128, *(QWEN3_30B if gated else QWEN3_30B[::-1]))
            for gated in (True, False) for m in (8, 128, 512, 2048, 4096, 8192, 65536)]
COMPILED += [(True, 64, 256, *DEEPSEEK_V3), (False, 64, 8, *MIXTRAL[::-1]), (True, 16, 60, 1408, 2048),
             (False, 2000, 60, 2048, 1408)]


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt")
@pytest.mark.parametrize("gated, m, experts, n, k", COMPILED)
def test_compiles_without_spills(gated, m, experts, n, k):
    f = grouped.gate_up if gated else grouped.matmul
    kernel, = aot.compile(f, *structs(m, experts, n, k, gated=gated))
    assert kernel.spills == 0 and not kernel.warnings
    c = grouped.config(m, experts, n, k, gated=gated)
    consumer, producer = register_budget(c.warpgroups, per_sm=c.per_sm)
    # The pool of a CTA is what it is launched with: setmaxnreg that asks for more hangs the GPU.
    assert consumer * c.warpgroups + producer <= kernel.registers * (c.warpgroups + 1)
    assert kernel.registers * (c.warpgroups + 1) * 128 * c.per_sm <= 65536
    assert f"setmaxnreg.inc.sync.aligned.u32 {consumer};" in kernel.ptx
    assert f"setmaxnreg.dec.sync.aligned.u32 {producer};" in kernel.ptx
    if kernel.sass:
        loop = kernel.loop("HGMMA")  # one a k16 step of 64 rows, by 128 threads
        # Weights and tokens in one ring; in two; tokens that bind, in stages of one 64-chunk.
        limit = 2.9 if c.together else 3.3 if c.warpgroups == 4 else 4.2
        assert loop["HGMMA"] and sum(loop.values()) / (loop["HGMMA"] * 64 * 16 / 128) < limit


# --- the compiled kernel, on the CPU ----------------------------------------------------------------------------------

EMULATED = {  # sizes, N, K, gated, configuration or rows of the rule's
    "decode": ((3, 0, 9), 64, 256, True, grouped.Config((8,), (8,), 32, warpgroups=1, sms=1)),
    "few rows": ((1, 0, 1, 2), 256, 768, False, 8),
    "four steps a turn": ((3, 0, 9, 20), 64, 2048, True, grouped.Config((8, 16, 24), (8, 24), 96, sms=2)),
    "turns in a ring of 8": ((3, 0, 5), 64, 2048, True, 8),
    "two stages a step": ((3, 0, 19, 33, 1), 200, 512, True, grouped.Config((8, 16, 32), (8, 16, 32), 32, sms=2)),
    "a large tile": ((3, 0, 19, 70, 1), 100, 768, False, 60),
    "a crowd": ((3, 0, 112, 30), 72, 512, True, grouped.Config((8, 40, 56), (40, 56), 128, sms=2, crowd=56)),
    "scales in blocks": ((20, 1), 70, 2304, False, grouped.Config((8, 16, 24), (8, 16, 24), 64, sms=2)),
    "64 rows": ((90, 60, 7), 256, 768, False, 192),
    "256 rows": ((300, 130), 128, 512, True, 1024),
    "scales from any word": ((2, 5, 1), 67, 320, True, 8),
    "200 experts": ((1,) * 130 + (0,) * 50 + (2,) * 20, 64, 64, True, 200),
    "sizes of more rows than there are": ((3, 20, 9), 64, 256, True, grouped.Config((8,), (8,), 32, warpgroups=1, sms=1)),
}


@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt")
@pytest.mark.parametrize("name", EMULATED)
def test_compiled_kernel_on_the_cpu(rng, name):
    """The machine-independent code of the kernel, plan, rings, swizzles and stores included, warps in random order."""
    sizes, n, k, gated, use = EMULATED[name]
    experts, halves = len(sizes), 2 if gated else 1
    if isinstance(use, int):
        use = dataclasses.replace(grouped.config(use, experts, n, k, gated=gated), sms=2)
    spare = -13 if name.startswith("sizes of more rows") else 3
    case = x, row_scale, codes, scale, global_scale, group_sizes = make(rng, sizes, n, k, gated=gated, spare=spare)
    f = grouped.gate_up if gated else grouped.matmul
    kernel, = aot.compile(lambda *a: f(*a, use=use), *structs(len(x), experts, n, k, gated=gated))
    operand, _, packed, scale, _, _ = map(np.asarray, arguments(*case))
    rows = use.warpgroups * 64 // halves
    layout = layout_of(use, k, halves, Table(use.computes[-1] + 4, experts))
    words = packed.reshape(experts * halves, n, k // 2).view(np.int32)
    scales = scale.view(np.uint8).reshape(experts * halves, n, k // 16).view(np.int32)
    swizzled = layout.scale_row if scale_rows(layout.scale_row) else 0
    maps = [ptx_hopper.TensorMap(scales.reshape(-1), (256,), 0) if k % 256 else
            ptx_hopper.TensorMap(scales, (layout.scale_row // 4, rows, 1), swizzled)]
    maps += [ptx_hopper.TensorMap(words, (32, rows, 1), 128)]
    maps += [ptx_hopper.TensorMap(operand, (64, t), 128) for t in use.tiles]
    most = use.computes[-1] + 4  # row scales of a tile; a copy takes up to 256
    maps += [ptx_hopper.TensorMap(row_scale.reshape(-1).view(np.int32), (min(256, most - at),), 0) for at in range(0, most, 256)]
    out = np.full((len(x), n), np.nan, ml_dtypes.bfloat16)
    layer = [np.zeros(1, np.int32)] if k % 256 else []  # elsewhere nothing depends on the number of the only layer
    buffers = {"ld.global.nc.b32": [group_sizes], "ld.global.b32": [*layer, global_scale],
               "st.global": [out]}
    ptx_hopper.run(kernel.ptx, buffers, maps, grid=use.sms * use.per_sm, threads=(use.warpgroups + 1) * 128,
                   shared=SHARED_MEMORY, seed=int(rng.integers(2**31)))
    check(out, *oracle(*case, gated=gated))
    assert np.isnan(out[sum(sizes):].astype(np.float32)).all()  # nothing is written past the groups


# --- on a GPU -------------------------------------------------------------------------------------------------------

GPU_CASES = {
    "uneven": ((0, 1, 0, 7, 30, 0, 90, 2), *QWEN3_30B),
    "one token": ((0, 0, 1), *QWEN3_30B),
    "all on one": ((0, 300, 0), *QWEN3_30B),
    "decode": ((1, 2, 1, 0, 3) * 12, 256, 512),
    "16 an expert": ((16, 20, 9, 31, 14) * 6, 256, 512),
    "64 an expert": ((64, 80, 49, 31, 114) * 3, 256, 512),
    "512 an expert": ((512, 530, 0, 477), 256, 1024),
    "235B": ((3, 0, 17), *QWEN3_235B),
    "DeepSeek": ((4, 13), *DEEPSEEK_V3),
    "Mixtral": ((2, 9), *MIXTRAL),
    "K 64": ((3, 9, 1), 64, 64),
    "K 192, N 100": ((3, 40, 1), 100, 192),
    "K 1408, N 70": ((70, 0, 1), 70, 1408),
    "K 320, N 67": ((1, 12, 5), 67, 320),
}


def poisoned(f, args):
    """f(*args) in memory that last held NaN."""
    shape = jax.eval_shape(f, *args)
    f(*args).block_until_ready()
    jax.block_until_ready([jnp.full(shape.shape, jnp.nan, shape.dtype) for _ in range(4)])
    return np.asarray(f(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_against_float64(rng, name):
    sizes, n, k = GPU_CASES[name]
    for gated, shape, dtype in ((True, (n, k), jnp.bfloat16), (False, (k, n) if n % 64 == 0 else (n, k), jnp.bfloat16),
                                (False, (n, k), jnp.float32)):
        case = make(rng, sizes, *shape, gated=gated, token_scale=dtype == jnp.bfloat16)
        f = jax.jit(grouped.gate_up if gated else lambda *a: grouped.matmul(*a, out_dtype=dtype))
        args = arguments(*case)
        out = poisoned(f, args)
        check(out, *oracle(*case, gated=gated))
        np.testing.assert_array_equal(out[:sum(sizes)], np.asarray(f(*args))[:sum(sizes)])  # the same bits again


@pytest.mark.gpu
@pytest.mark.parametrize("k", [64, 256])
def test_gpu_every_code_with_every_scale(rng, k):
    blocks = np.arange(127 * 16) // 16  # the scale of a block
    n = -(-len(blocks) // (k // 16))
    scale = np.resize(blocks, (1, n, k // 16)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    codes = (np.arange(16)[None, :] + (np.arange(n * k // 16) // 127)[:, None]) % 16
    codes = codes.reshape(1, n, k).astype(np.uint8)
    seen = set(zip(codes.ravel().tolist(), np.repeat(scale.view(np.uint8).ravel(), 16).tolist()))
    assert len(seen) == 16 * 127
    x = np.eye(k).astype(ml_dtypes.bfloat16)
    case = x, np.float32(1), codes, scale, np.ones(1, np.float32), np.array([k], np.int32)
    out = run(case, gated=False, out_dtype=jnp.float32)
    np.testing.assert_array_equal(out, (VALUES[codes[0]] * np.repeat(scale[0].astype(np.float64), 16, -1)).T)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_gpu_rows_keep_their_bits(rng, gated):
    """5 rows of one expert among other rows, other experts and other M, hence other kernels: the same bits."""
    n, k, experts = (2304, 2048, 16) if gated else (4608, 768, 16)
    x, row_scale, codes, scale, global_scale, _ = make(rng, (5,) + (0,) * (experts - 1), n, k, gated=gated, spare=0)
    f = jax.jit(grouped.gate_up if gated else lambda *a: grouped.matmul(*a, out_dtype=jnp.float32))
    expected, seen = None, set()
    for m, own in ((1, 1), (5, 5), (12, 9), (16, 9), (40, 17), (96, 13), (300, 31), (1000, 75), (2000, 250),
                   (4096, 700), (4096, 4096)):
        sizes = np.zeros(experts, np.int32)
        sizes[7] = own
        for other in rng.choice([e for e in range(experts) if e != 7], m - own):
            sizes[other] += 1
        first = sizes[:7].sum() + rng.integers(0, own - 4) if own >= 5 else sizes[:7].sum()
        xs = rng.normal(size=(m, k)).astype(ml_dtypes.bfloat16)
        rows = rng.uniform(0.5, 2, (m, 1)).astype(np.float32)
        xs[first:first + 5], rows[first:first + 5] = x[:min(5, own)], row_scale[:min(5, own)]
        codes7, scale7, global7 = (np.roll(v, 7, 0) for v in (codes, scale, global_scale))
        out = np.asarray(f(*arguments(xs, rows, codes7, scale7, global7, sizes)))[first:first + 5]
        if own >= 5:
            expected = out if expected is None else expected
        else:
            alone = out
        seen.add(grouped.config(m, experts, n, k, gated=gated))
        if expected is not None and own >= 5:
            np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8), err_msg=f"M = {m}")
    np.testing.assert_array_equal(alone.view(np.uint8), expected[:1].view(np.uint8))
    assert len(seen) >= 5


@pytest.mark.gpu
def test_gpu_reads_a_layer_in_place(rng):
    x, row_scale, codes, scale, global_scale, sizes = make(rng, (4, 0, 2), 128, 256, gated=True)
    layers = [make(rng, (4, 0, 2), 128, 256, gated=True)[2:5] for _ in range(2)] + [(codes, scale, global_scale)]
    args = arguments(x, row_scale, *(np.stack(v) for v in zip(*layers)), sizes)
    f = jax.jit(lambda layer, *a: grouped.gate_up(*a, layer=layer))
    check(np.asarray(f(jnp.int32(2), *args)), *oracle(x, row_scale, codes, scale, global_scale, sizes, gated=True))
    size = args[2].nbytes
    assert f.lower(jnp.int32(2), *args).compile().memory_analysis().temp_size_in_bytes < size  # no copy of the weights
