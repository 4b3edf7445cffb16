"""kernels/hopper/dense.py against float64 products of the decoded operands.

On the CPU: the schedules under the Mosaic GPU interpreter with its race detector, and what the compiler says of the
kernels for an H200. With `-m gpu`: results on a Hopper GPU.
"""
import functools

import aot
import hopper_interpreted
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx_hopper
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from nvfp4jax.kernels.hopper import dense as dense_hopper
from nvfp4jax.kernels.hopper import dense_wide
from nvfp4jax.kernels.hopper.decode import permute_k
from nvfp4jax.kernels.hopper.dense_narrow import memory_plan
from nvfp4jax.kernels.hopper.machine import SHARED_MEMORY

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def weights(rng, n, k, layers=()):
    """packed, scale (numpy), and their product in float64; every code, every finite scale >= 0, subnormals included."""
    codes = rng.integers(0, 16, (*layers, n, k)).astype(np.uint8)
    scale = rng.integers(0, 127, (*layers, n, k // 16)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed, scale, VALUES[codes] * np.repeat(scale.astype(np.float64), 16, -1)


def tokens(rng, m, k):
    return rng.normal(size=(m, k)).astype(ml_dtypes.bfloat16)


def check(out, x, dequantized, factor, bias=0.0):
    """Within the bound of a float32 sum in any order (of the products' magnitudes) and one rounding to out's dtype."""
    k = x.shape[1]
    x = x.astype(np.float64)
    reference = x @ dequantized.T * factor + bias
    magnitude = np.abs(x) @ np.abs(dequantized).T * np.abs(factor) + np.abs(bias)
    rounding = 2.0**-8 if out.dtype == ml_dtypes.bfloat16 else 2.0**-23
    bound = magnitude * (k + 8) * 2.0**-24 + rounding * np.abs(reference) + 1e-30
    error = np.abs(out.astype(np.float64) - reference)
    assert np.isfinite(out.astype(np.float64)).all() and (error <= bound).all(), (error / bound).max()


def run(plan, x, row_scale, packed, scale, global_scale, *, bias=None, out_dtype=jnp.bfloat16, layer=None):
    f = jax.jit(functools.partial(dense_hopper._matmul, plan=plan), static_argnames="out_dtype")
    return np.asarray(f(permute_k(jnp.asarray(x)), jnp.asarray(row_scale, jnp.float32), packed, scale,
                        jnp.asarray(global_scale, jnp.float32), bias, out_dtype, layer))


# --- rules ----------------------------------------------------------------------------------------------------------

# (N, K) of the linear layers of Qwen3 0.6B to 32B, 30B-A3B, 235B-A22B, DeepSeek-V3 and Mixtral, with fused projections.
MODEL_SHAPES = [
    (4096, 1024), (1024, 2048), (6144, 1024), (3072, 1024), (1024, 3072), (2048, 2048), (12288, 2048), (2048, 6144),
    (6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728), (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288),
    (7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408), (10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600),
    (5120, 2048), (4096, 2048), (2048, 4096), (512, 2048), (151936, 2048), (151936, 5120), (9216, 4096), (4096, 8192),
    (1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168),
    (7168, 2048), (129280, 7168), (14336, 4096), (4096, 14336), (32000, 4096), (256, 7168), (33792, 8192)]


@pytest.mark.parametrize("n, k", MODEL_SHAPES + [(1, 64), (17, 192), (100, 320), (16385, 64)])
def test_every_shape_has_a_schedule(n, k):
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 100, 128, 129, 256, 4096):
        make, settings = dense_hopper.plan_of(n, k, m)
        make(dense_hopper.Product(n, k, m), **settings)
    steps = -(-k // dense_hopper.STEP)
    assert 1 <= dense_hopper.slices(n, k) <= steps


def test_token_tiles_cover_m_evenly():
    for m in range(1, 700):
        tile = dense_hopper._tokens(m, 128)
        assert tile % 8 == 0 and tile <= 128 and -(-m // tile) == -(-m // 128)


def test_errors_name_the_shapes():
    x, packed, scale = jnp.zeros((4, 128), jnp.bfloat16), jnp.zeros((32, 64), jnp.uint8), jnp.zeros((32, 8), jnp.float8_e4m3fn)
    one = jnp.float32(1)
    with pytest.raises(ValueError, match=r"operand \(4, 64\)"):
        dense_hopper.matmul(x[:, :64], one, packed, scale, one)
    with pytest.raises(ValueError, match="float32"):
        dense_hopper.matmul(x.astype(jnp.float32), one, packed, scale, one)
    with pytest.raises(ValueError, match=r"row_scale \(3, 1\)"):
        dense_hopper.matmul(x, jnp.ones((3, 1)), packed, scale, one)
    with pytest.raises(NotImplementedError, match="K=96"):
        dense_hopper.matmul(x[:, :96], one, packed[:, :48], scale[:, :6], one)
    with pytest.raises(NotImplementedError, match="M=0"):
        dense_hopper.matmul(x[:0], one, packed, scale, one)


# --- under the interpreter ------------------------------------------------------------------------------------------

NARROW, SPLIT, WIDE = dense_hopper.Narrow, dense_hopper.Split, dense_hopper.Wide
INTERPRETED = {NARROW: hopper_interpreted.Narrow, SPLIT: hopper_interpreted.Split, WIDE: hopper_interpreted.Wide}


@pytest.mark.parametrize("n, k, m, plan", [
    (64, 512, 8, (NARROW, dict(slices=2, tiles=2, tokens=8))),  # all of K in shared memory
    (64, 1024, 3, (NARROW, dict(slices=4, tiles=2, tokens=8))),
    (32, 320, 13, (NARROW, dict(slices=2, tiles=2, tokens=16))),  # K ends inside a step, M inside 8 tokens
    (32, 16384, 8, (NARROW, dict(slices=2, tiles=2, tokens=8))),  # a ring
    (32, 16384, 11, (NARROW, dict(slices=2, tiles=2, tokens=16))),
    (16, 1024, 48, (NARROW, dict(slices=4, tiles=1, tokens=24))),  # tiles of tokens
    (32, 4096, 64, (NARROW, dict(slices=4, tiles=2, tokens=64))),  # all weights, a ring of tokens
    (48, 4032, 37, (NARROW, dict(slices=4, tiles=3, tokens=40))),
    (64, 1024, 24, (SPLIT, dict(slices=2, wgs=1, tokens=16))),
    (64, 32768, 8, (SPLIT, dict(slices=2, wgs=1, tokens=8))),  # a ring
    (192, 768, 8, (WIDE, dict(slices=1, wgs=1, tokens=8, paired=False))),
    (128, 5120, 16, (WIDE, dict(slices=1, wgs=2, tokens=8, paired=False))),  # several blocks of scales, tiles of tokens
    (128, 1280, 48, (WIDE, dict(slices=2, wgs=2, tokens=48, paired=False))),  # slices of 3 and 2 steps, scales with each step
], ids=lambda v: "-".join([v[0].__name__, *map(str, v[1].values())]) if isinstance(v, tuple) else str(v))
def test_interpreted(n, k, m, plan, capfd):
    rng = np.random.default_rng(n + k + m)
    packed, scale, dequantized = weights(rng, n, k)
    x, bias = tokens(rng, m, k), rng.normal(size=n).astype(np.float32)
    row_scale = rng.uniform(0.5, 2, (m, 1)).astype(np.float32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = run((INTERPRETED[plan[0]], plan[1]), x, row_scale, packed, scale, 0.25, bias=bias, out_dtype=jnp.float32)
    check(out, x, dequantized, row_scale.astype(np.float64) * 0.25, bias)
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("plan, m", [
    ((NARROW, dict(slices=4, tiles=2, tokens=8)), 16), ((WIDE, dict(slices=2, wgs=1, tokens=16, paired=False)), 48),
    ((WIDE, dict(slices=1, wgs=1, tokens=40, paired=False)), 80)], ids=["Narrow", "Wide-16", "Wide-40"])
def test_several_weights_in_one_launch(plan, m, monkeypatch, capfd):
    """Each weight's result is what it gets alone, to the bit. Two CTAs of `Wide` walk over them all: its rings go on from one weight to the next."""
    k, widths = 1024, (192, 64, 64)
    monkeypatch.setattr(dense_wide, "SMS", 2)
    rng = np.random.default_rng(m)
    plan = (INTERPRETED[plan[0]], plan[1])
    x, row_scale = tokens(rng, m, k), rng.uniform(0.5, 2, (m, 1)).astype(np.float32)
    made = [weights(rng, n, k) for n in widths]
    biases = [rng.normal(size=n).astype(np.float32) if j else None for j, n in enumerate(widths)]
    monkeypatch.setattr(dense_hopper, "plan_of", lambda *shape: plan)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        outs = dense_hopper.matmuls(permute_k(jnp.asarray(x)), jnp.asarray(row_scale),
                                    [(packed, scale, jnp.float32(0.25), bias) for (packed, scale, _), bias in zip(made, biases)],
                                    out_dtype=jnp.float32)
        alone = run(plan, x, row_scale, *made[1][:2], 0.25, bias=biases[1], out_dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(outs[1]), alone)
    for out, (_, _, dequantized), bias in zip(outs, made, biases):
        check(np.asarray(out), x, dequantized, row_scale.astype(np.float64) * 0.25, 0.0 if bias is None else bias)
    assert "RACE" not in "".join(capfd.readouterr())


def test_many_weights_have_schedules():
    for widths, k in [((4096, 512, 512), 2048), ((1536, 576), 7168), ((8192, 1024, 1024), 5120), ((576, 192, 192), 576), ((17, 1), 64)]:
        for m in (1, 9, 32, 64, 100, 256, 4096):
            make, settings = dense_hopper.plan_of(widths, k, m)
            count = dense_hopper.slices(sum(widths), k)
            assert settings["slices"] == count
            for n in widths:
                make(dense_hopper.Product(n, k, m), **settings)
                alone, own = dense_hopper.plan_of(n, k, m, count)
                alone(dense_hopper.Product(n, k, m), **own)
                assert own["slices"] == count


# --- compiled for an H200 -------------------------------------------------------------------------------------------

aot_only = [pytest.mark.aot, pytest.mark.skipif(not aot.available(), reason="needs jax-cuda13-plugin and -pjrt")]


def compiled(n, k, m, *, bias=None, out_dtype=jnp.bfloat16, per_row=False, layers=(), plan=None):
    def f(x, row_scale, packed, scale, global_scale, bias_, layer):
        return dense_hopper._matmul(x, row_scale, packed, scale, global_scale, bias_ if bias else None, out_dtype,
                                    layer if layers else None, plan)

    kernel, = aot.compile(
        f, ((m, k), jnp.bfloat16), ((m, 1) if per_row else (), jnp.float32), ((*layers, n, k // 2), jnp.uint8),
        ((*layers, n, k // 16), jnp.float8_e4m3fn), (layers, jnp.float32), ((*layers, n), bias or jnp.float32),
        ((), jnp.int32))
    return kernel


@pytest.mark.parametrize("n, k, m, options", [
    *((33792, 8192, m, {}) for m in (1, 16, 32, 64, 128, 4096)),
    *((4096, 2048, m, {}) for m in (1, 13, 16, 32, 64, 128, 256, 1024)),
    *((2048, 4096, m, {}) for m in (16, 32, 64)), (1024, 2048, 64, {}), *((5120, 2048, m, {}) for m in (33, 64)), *((10240, 5120, m, {}) for m in (16, 17, 64, 128)),
    (5120, 25600, 8, {}), (151936, 2048, 8, {}),
    (4097, 2048, 9, dict(bias=jnp.bfloat16, out_dtype=jnp.float32, per_row=True, layers=(3,))),
    (4097, 2048, 100, dict(bias=jnp.bfloat16, out_dtype=jnp.float32, per_row=True, layers=(3,))),
    *((33792, 8192, m, dict(bias=jnp.bfloat16, per_row=True)) for m in (8, 64, 128)),
    (5120, 2048, 2048, dict(per_row=True)),
    (20001, 320, 100, dict(bias=jnp.float32, per_row=True)),
], ids=str)
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_compiles_clean(n, k, m, options, _):
    kernel = compiled(n, k, m, **options)
    assert kernel.spills == 0 and kernel.stack == 0 and kernel.warnings == ()
    make, settings = dense_hopper.plan_of(n, k, m)
    warpgroups = settings["tiles"] * settings["slices"] // 4 if make is NARROW else settings["wgs"]
    assert kernel.registers * 128 * (warpgroups + 1) <= 65536 and kernel.smem <= SHARED_MEMORY
    if make is SPLIT and kernel.smem <= SHARED_MEMORY // 2:  # two CTAs an SM
        assert kernel.registers * 128 * warpgroups * 2 <= 65536


@pytest.mark.parametrize("m, widths, k, kernels", [
    *((m, (4096, 512, 576), 2048, 1) for m in (1, 64, 128, 1024, 2048)),  # about q, k and v of Qwen3-30B-A3B
    (8, (12288, 12352), 2048, 2), (2048, (12288, 12352), 2048, 1), (2048, (16448, 16512), 2048, 1),  # gate and up: two slices each, and one
    (64, (16448, 16512), 2048, 1), (2048, (16448, 1024), 2048, 2)], ids=str)
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_weights_of_the_same_tokens_are_one_launch(m, widths, k, kernels, _):
    """But for few tokens and many rows, and where sums have other slices alone. No two weights are alike: a kernel is reported once a process."""

    def f(x, row_scale, *arrays):
        return dense_hopper.matmuls(x, row_scale, [(*arrays[3 * j:3 * j + 3], None) for j in range(len(widths))])

    of_weight = lambda n: [((n, k // 2), jnp.uint8), ((n, k // 16), jnp.float8_e4m3fn), ((), jnp.float32)]
    found = aot.compile(f, ((m, k), jnp.bfloat16), ((m, 1), jnp.float32), *(a for n in widths for a in of_weight(n)))
    assert len(found) == kernels
    assert all(kernel.spills == 0 and kernel.stack == 0 and kernel.warnings == () for kernel in found)


TILES = [tile for tile in dense_hopper._TILE_TIMES if tile[1] > 32]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("n, options", [(4160, {}), (4001, dict(out_dtype=jnp.float32, bias=jnp.bfloat16, layers=(3,)))], ids=["plain", "all"])
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_tiles_of_sliced_sums_compile_clean(tile, n, options, _):
    wgs, tokens = tile
    kernel = compiled(n, 2048, 1009, per_row=True, plan=(WIDE, dict(slices=4, wgs=wgs, tokens=tokens, paired=False)), **options)
    assert kernel.spills == 0 and kernel.stack == 0 and kernel.warnings == () and kernel.smem <= SHARED_MEMORY


@pytest.mark.parametrize("n, k, m", [(2048, 4096, 8), (2048, 4096, 256), (20001, 320, 40)])
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_a_residual_compiles_clean(n, k, m, _):
    f = lambda x, row_scale, packed, scale, one, residual: dense_hopper.matmul(x, row_scale, packed, scale, one, residual=residual)
    residual_compiled(f, n, k, m)


def residual_compiled(f, n, k, m):
    kernel, = aot.compile(f, ((m, k), jnp.bfloat16), ((m, 1), jnp.float32), ((n, k // 2), jnp.uint8), ((n, k // 16), jnp.float8_e4m3fn),
                          ((), jnp.float32), ((m, n), jnp.bfloat16))
    assert kernel.spills == 0 and kernel.stack == 0 and kernel.warnings == ()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_a_residual_compiles_clean_in_each_tile(tile, _):
    plan = WIDE, dict(zip(("wgs", "tokens"), tile), slices=8, paired=False)
    residual_compiled(lambda x, row_scale, *arrays: dense_hopper._matmul(
        x, row_scale, *arrays[:3], None, jnp.bfloat16, None, plan, arrays[3]), 2050, 4096, 1009)


@pytest.mark.parametrize("n, k, m, most", [(33792, 8192, 8, 390), (33792, 8192, 64, 395), (33792, 8192, 128, 395),
                                           (5120, 25600, 8, 380)])
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_instructions_of_the_main_loop(n, k, m, most, _):
    """A loop iteration decodes 128 codes a thread: 3.2 instructions a code at most."""
    if not aot.nvdisasm_root():
        pytest.skip("needs nvdisasm")
    kernel = compiled(n, k, m)
    matrix = "HGMMA" if "HGMMA" in kernel.sass else "HMMA"  # wgmma, or mma.sync where there are few tokens
    loop = kernel.loop(matrix)
    assert loop[matrix] == 16 and sum(loop.values()) <= most, loop


# --- the compiled kernels, on the CPU -------------------------------------------------------------------------------

def x_map(operand, tokens, memory):
    """As `Narrow` reads them: by 8-row groups in one copy a step where M allows it."""
    m, k = operand.shape
    if m % 8 or memory == "weights":
        return ptx_hopper.TensorMap(operand, (64, tokens), 128)
    groups = np.ascontiguousarray(operand.reshape(m // 8, 8, k // 64, 64).transpose(0, 2, 1, 3))
    return (ptx_hopper.TensorMap(groups[0], (64, 8, 4), 128) if m == 8 else
            ptx_hopper.TensorMap(groups, (64, 8, 4, tokens // 8), 128))


@pytest.mark.parametrize("n, k, m, plan", [
    (64, 2048, 8, (NARROW, dict(slices=4, tiles=2, tokens=8))),
    (40, 2048, 13, (NARROW, dict(slices=4, tiles=1, tokens=16))),  # N and M end inside a tile
    (96, 2048, 16, (NARROW, dict(slices=4, tiles=3, tokens=8))),  # tiles of tokens, slices across warpgroups
    (32, 4096, 24, (NARROW, dict(slices=8, tiles=1, tokens=16))),
    (64, 1280, 11, (NARROW, dict(slices=4, tiles=4, tokens=16))),
    (32, 8192, 32, (NARROW, dict(slices=4, tiles=2, tokens=32))),  # a ring
    (40, 2048, 61, (NARROW, dict(slices=4, tiles=2, tokens=64))),  # all weights, a ring of tokens; N and M end inside a tile
    (48, 1856, 64, (NARROW, dict(slices=4, tiles=3, tokens=64))),  # K ends inside a step; three stages
    (16, 4096, 48, (NARROW, dict(slices=8, tiles=1, tokens=48))),
    (128, 2304, 8, (WIDE, dict(slices=1, wgs=2, tokens=8, paired=False))),
    (100, 1280, 40, (WIDE, dict(slices=2, wgs=1, tokens=24, paired=False))),
    (64, 512, 80, (WIDE, dict(slices=1, wgs=1, tokens=80, paired=False))),
    (64, 512, 128, (WIDE, dict(slices=1, wgs=1, tokens=128, paired=False))),
    (100, 1280, 176, (WIDE, dict(slices=2, wgs=2, tokens=176, paired=False))),  # N ends inside the tile
], ids=lambda v: "-".join([v[0].__name__, *map(str, v[1].values())]) if isinstance(v, tuple) else str(v))
@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_compiled_kernel_on_the_cpu(n, k, m, plan, _):
    """The PTX itself, warps in random order: addresses, swizzles, barriers, decode, epilogue."""
    rng = np.random.default_rng(n + k + m)
    packed, scale, dequantized = weights(rng, n, k)
    x, row_scale = tokens(rng, m, k), rng.uniform(0.5, 2, (m, 1)).astype(np.float32)
    make, settings = plan
    tile = settings["tokens"]
    words, scales, operand = packed.view(np.int32), scale.view(np.uint8).view(np.int32), np.asarray(permute_k(jnp.asarray(x)))
    if make is NARROW:
        rows, warpgroups = 16 * settings["tiles"], settings["tiles"] * settings["slices"] // 4
        memory, _ = memory_plan(k, tile, settings["slices"], settings["tiles"])
        whole = memory != "steps"
        ctas, producers, g = -(-n // rows) * -(-m // tile), 0 if memory == "all" else 1, "ld.global.nc.b32"
    else:
        rows, warpgroups = 64 * settings["wgs"], settings["wgs"]
        whole, ctas, producers, g = tile <= 32, -(-n // rows) * -(-m // tile), 1, "ld.global.b32"
    maps = [ptx_hopper.TensorMap(words, (32, rows), 128),
            ptx_hopper.TensorMap(scales, (32 if whole else 4, rows), 128 if whole else 0),
            x_map(operand, tile, memory) if make is NARROW else ptx_hopper.TensorMap(operand, (64, tile), 128)]
    if make is WIDE and whole:
        maps[:2] = maps[1::-1]  # in the order of their use
    out = np.full((m, n), np.nan, np.float32)
    buffers = {"ld.global.nc.f32": [row_scale], g: [np.float32([0.25])], "st.global": [out]}
    if make is WIDE:
        maps.append(ptx_hopper.TensorMap(buffers.pop("ld.global.nc.f32")[0].reshape(-1), (tile,), 0))
    kernel = compiled(n, k, m, out_dtype=jnp.float32, per_row=True, plan=plan)
    ptx_hopper.run(kernel.ptx, buffers, maps, grid=ctas, threads=(warpgroups + producers) * 128,
                   shared=SHARED_MEMORY, seed=int(rng.integers(2**31)))
    check(out, x, dequantized, row_scale.astype(np.float64) * 0.25)


@pytest.mark.parametrize("_", [pytest.param(0, marks=aot_only)], ids=[""])
def test_compiled_weights_of_the_same_tokens_on_the_cpu(_, monkeypatch):
    """One CTA walks over the tiles of both weights, whose rows end inside a tile."""
    monkeypatch.setattr(dense_wide, "SMS", 1)
    monkeypatch.setattr(dense_hopper, "plan_of", lambda *shape: (WIDE, dict(slices=2, wgs=1, tokens=104, paired=False)))
    rng, k, m, widths = np.random.default_rng(0), 768, 100, (100, 40)
    made, x, row_scale = [weights(rng, n, k) for n in widths], tokens(rng, m, k), rng.uniform(0.5, 2, (m, 1)).astype(np.float32)

    def f(x, row_scale, *arrays):
        return dense_hopper.matmuls(x, row_scale, [(*arrays[3 * j:3 * j + 3], None) for j in range(2)], out_dtype=jnp.float32)

    of_weight = lambda n: [((n, k // 2), jnp.uint8), ((n, k // 16), jnp.float8_e4m3fn), ((), jnp.float32)]
    kernel, = aot.compile(f, ((m, k), jnp.bfloat16), ((m, 1), jnp.float32), *(a for n in widths for a in of_weight(n)))
    maps, shared_maps = [], [ptx_hopper.TensorMap(np.asarray(permute_k(jnp.asarray(x))), (64, 104), 128), ptx_hopper.TensorMap(row_scale.reshape(-1), (104,), 0)]
    for j, (packed, scale, _) in enumerate(made):  # in the order of their use
        maps += [ptx_hopper.TensorMap(packed.view(np.int32), (32, 64), 128), ptx_hopper.TensorMap(scale.view(np.uint8).view(np.int32), (4, 64), 0)]
        maps += shared_maps * (j == 0)
    outs = [np.full((m, n), np.nan, np.float32) for n in widths]
    ptx_hopper.run(kernel.ptx, {"ld.global.b32": [np.float32([0.25]), np.float32([0.5])], "st.global": outs}, maps, grid=1, threads=256,
                   shared=SHARED_MEMORY, seed=0)
    for out, (_, _, dequantized), factor in zip(outs, made, (0.25, 0.5)):
        check(out, x, dequantized, row_scale.astype(np.float64) * factor)


# --- on a GPU -------------------------------------------------------------------------------------------------------

def poison(m, n, dtype):
    """Fills and frees memory that the next output is likely to get."""
    jax.block_until_ready([jnp.full((m, n), jnp.nan, dtype) for _ in range(3)])


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(4096, 2048), (2048, 4096), (1024, 2048), (5120, 2048), (33792, 1024), (576, 7168),
                                  (10240, 5120), (2560, 9728), (1001, 192), (20001, 320), (7, 64), (12288, 2048)])
def test_results_and_batch_invariance(n, k):
    """Each result within the float32 bound; a row's bits the same for every M, position and neighbours."""
    rng = np.random.default_rng(n * k)
    packed, scale, dequantized = weights(rng, n, k)
    packed, scale = jnp.asarray(packed), jnp.asarray(scale)
    most = 200
    x, row_scale = tokens(rng, most, k), rng.uniform(0.5, 2, (most, 1)).astype(np.float32)
    f = jax.jit(functools.partial(dense_hopper.matmul, out_dtype=jnp.float32))
    permuted = permute_k(jnp.asarray(x))
    full = np.asarray(f(permuted, jnp.asarray(row_scale), packed, scale, jnp.float32(0.25)))
    check(full, x, dequantized, row_scale.astype(np.float64) * 0.25)
    for m in (1, 3, 8, 9, 16, 17, 32, 33, 40, 48, 64, 128, 129):
        start = int(rng.integers(0, most - m + 1))
        poison(m, n, jnp.float32)
        own = slice(start, start + m)
        for _ in range(2):
            out = np.asarray(f(permuted[own], jnp.asarray(row_scale[own]), packed, scale, jnp.float32(0.25)))
            np.testing.assert_array_equal(out.view(np.int32), full[own].view(np.int32), err_msg=f"M={m} from row {start}")
    order = rng.permutation(most)
    moved = np.asarray(f(permuted[order], jnp.asarray(row_scale[order]), packed, scale, jnp.float32(0.25)))
    np.testing.assert_array_equal(moved.view(np.int32), full[order].view(np.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(33792, 1024), (4096, 2048), (2048, 4096), (1024, 2048)])
def test_prefill_and_decode_agree(n, k):
    rng = np.random.default_rng(n + k)
    packed, scale, _ = weights(rng, n, k)
    packed, scale, x = jnp.asarray(packed), jnp.asarray(scale), permute_k(jnp.asarray(tokens(rng, 4096, k)))
    f = jax.jit(functools.partial(dense_hopper.matmul, out_dtype=jnp.float32))
    one = jnp.float32(1)
    full = np.asarray(f(x, one, packed, scale, one)).view(np.int32)
    for m in (1, 24, 64, 256, 1024):
        start = int(rng.integers(0, 4096 - m + 1))
        out = np.asarray(f(x[start:start + m], one, packed, scale, one)).view(np.int32)
        np.testing.assert_array_equal(out, full[start:start + m], err_msg=f"M={m} from row {start}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("n, k, layers, bias, out_dtype", [
    (4097, 2048, (3,), jnp.bfloat16, jnp.float32), (4098, 2048, (), jnp.float32, jnp.bfloat16),
    (2050, 4096, (2,), jnp.float32, jnp.bfloat16), (20003, 576, (2,), jnp.float32, jnp.bfloat16),
    (20002, 512, (), jnp.bfloat16, jnp.float32)])
@pytest.mark.parametrize("one_bias", [False, True])
def test_bias_layers_and_dtypes(m, n, k, layers, bias, out_dtype, one_bias):
    rng = np.random.default_rng(m + n)
    packed, scale, dequantized = weights(rng, n, k, layers)
    x = tokens(rng, m, k)
    biases = (rng.normal(size=n if one_bias else (*layers, n)) * 100).astype(bias)
    factors = rng.uniform(0.5, 2, layers).astype(np.float32)
    poison(m, n, out_dtype)
    layer = layers[0] - 1 if layers else None
    out = np.asarray(dense_hopper.matmul(
        permute_k(jnp.asarray(x)), jnp.float32(0.5), jnp.asarray(packed), jnp.asarray(scale), jnp.asarray(factors),
        bias=jnp.asarray(biases), out_dtype=out_dtype, layer=None if layer is None else jnp.int32(layer)))
    at = () if layer is None else (layer,)
    check(out, x, dequantized[at], float(factors[at]) * 0.5, biases[() if one_bias else at].astype(np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("widths, k", [((4096, 512, 512), 2048), ((1536, 576), 7168), ((8192, 1024, 1024), 5120), ((130, 64, 1), 576)])
def test_weights_together_keep_a_rows_bits(widths, k):
    """One launch or one a weight, a row alone, among others, in a prefill: the same bits."""
    rng = np.random.default_rng()
    made = [weights(rng, n, k) for n in widths]
    arrays = [(jnp.asarray(packed), jnp.asarray(scale), jnp.float32(0.25), None) for packed, scale, _ in made]
    x, row_scale = tokens(rng, 2048, k), rng.uniform(0.5, 2, (2048, 1)).astype(np.float32)
    permuted = permute_k(jnp.asarray(x))
    f = jax.jit(functools.partial(dense_hopper.matmuls, out_dtype=jnp.float32))
    full = [np.asarray(y) for y in f(permuted, jnp.asarray(row_scale), arrays)]
    for y, (_, _, dequantized) in zip(full, made):
        check(y, x, dequantized, row_scale.astype(np.float64) * 0.25)
    for m in (1, 9, 32, 33, 64, 130, 300, 1024, 1209):
        own = slice(start := int(rng.integers(0, 2048 - m)), start + m)
        for n in widths:
            poison(m, n, jnp.float32)
        for y, whole in zip(f(permuted[own], jnp.asarray(row_scale[own]), arrays), full):
            np.testing.assert_array_equal(np.asarray(y).view(np.int32), whole[own].view(np.int32), err_msg=f"M={m} from row {start}")


@pytest.mark.gpu
@pytest.mark.parametrize("n, k, m, per_row", [(4096, 2048, 2500, True), (2050, 4096, 200, False), (1001, 2048, 2500, False), (514, 1280, 200, True)])
def test_every_tile_gives_the_same_bits(n, k, m, per_row):
    """With stacked layers, a bias and a residual; N and M end inside tiles, and a CTA has several. The first tile is that of other tests."""
    rng, count = np.random.default_rng(n + per_row), dense_hopper.slices(n, k)
    packed, scale, _ = weights(rng, n, k, (2,))
    x = permute_k(jnp.asarray(tokens(rng, m, k)))
    row_scale = jnp.asarray(rng.uniform(0.5, 2, (m, 1)), jnp.float32) if per_row else jnp.float32(0.5)
    residual = jnp.asarray(rng.normal(size=(m, n)) * 1e3, jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=(2, n)) * 100, jnp.float32)
    arrays, outs = (jnp.asarray(packed), jnp.asarray(scale), jnp.float32([0.25, 0.75]), bias), []
    for wgs, largest in TILES:
        plan = WIDE, dict(slices=count, wgs=wgs, tokens=dense_hopper._tokens(m, largest), paired=False)
        f = jax.jit(lambda x, row_scale, residual, plan=plan: dense_hopper._matmul(
            x, row_scale, *arrays, jnp.bfloat16, jnp.int32(1), plan, residual))
        poison(m, n, jnp.bfloat16)
        for _ in range(2):
            outs.append(np.asarray(f(x, row_scale, residual)).view(np.int16))
            np.testing.assert_array_equal(outs[-1], outs[0], err_msg=f"{plan[1]}")


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("n, k", [(4096, 2048), (2048, 4096), (10240, 5120), (4097, 512), (20003, 320), (20002, 320)])
def test_residual_is_added_to_the_rounded_result(n, k, out_dtype):
    rng = np.random.default_rng()
    packed, scale, _ = weights(rng, n, k)
    f = jax.jit(functools.partial(dense_hopper.matmul, out_dtype=out_dtype))
    for m in (1, 24, 50, 200):
        x, row_scale = tokens(rng, m, k), rng.uniform(0.5, 2, (m, 1)).astype(np.float32)
        residual = jnp.asarray(rng.normal(size=(m, n)) * 1e5, out_dtype)
        args = permute_k(jnp.asarray(x)), jnp.asarray(row_scale), jnp.asarray(packed), jnp.asarray(scale), jnp.float32(0.25)
        expected = np.asarray(residual).astype(np.float32) + np.asarray(f(*args)).astype(np.float32)
        poison(m, n, out_dtype)
        np.testing.assert_array_equal(np.asarray(f(*args, residual=residual)), expected.astype(out_dtype), err_msg=f"M={m}")


@pytest.mark.gpu
@pytest.mark.parametrize("n, m", [(4096, 8), (4096, 40), (33792, 8), (33792, 64)])
def test_every_code_and_scale_is_exact(n, m):
    """One-hot tokens read single weights: all 16 codes x all finite scales, bit for bit."""
    k = 256
    scale = np.resize(np.arange(127), (n, k // 16)).astype(np.uint8)
    scale = scale.view(ml_dtypes.float8_e4m3fn)
    codes = np.resize(np.arange(16), (n, k)).astype(np.uint8)
    dequantized = VALUES[codes] * np.repeat(scale.astype(np.float64), 16, -1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    for start in range(0, k, m):
        x = np.zeros((m, k), ml_dtypes.bfloat16)
        x[np.arange(m), (start + np.arange(m)) % k] = 1
        out = np.asarray(dense_hopper.matmul(permute_k(jnp.asarray(x)), jnp.float32(1), jnp.asarray(packed),
                                             jnp.asarray(scale), jnp.float32(1), out_dtype=jnp.float32))
        np.testing.assert_array_equal(out.astype(np.float64), dequantized[:, (start + np.arange(m)) % k].T)
