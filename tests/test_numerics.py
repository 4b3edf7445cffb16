"""The contract: golden vectors, an exhaustive bfloat16 sweep against numpy in IEEE arithmetic, and the edge table."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st

import nvfp4jax
from nvfp4jax import numerics
from nvfp4jax.scaling import NAMES

GOLDEN = np.load(DATA / "nvfp4_te_reference.npz")
SETS = sorted({k.rsplit("/", 1)[0] for k in GOLDEN.files if k.count("/") > 1})
F32 = np.float32


def run(x, rows, four_over_six, block_rows):
    amax = jnp.abs(x).max(-1, keepdims=True) if rows else jnp.abs(x).max()
    g, global_scale, amax = numerics.global_scales(amax, four_over_six=four_over_six is not None)
    return (*numerics.quantize_blocks(x, g, amax, four_over_six=four_over_six, block_rows=block_rows), global_scale)


jitted = jax.jit(run, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["jit", "op by op"])
def test_golden_vectors(compiled):
    """All 594 sets, each as one program and operation by operation."""
    with contextlib.nullcontext() if compiled else jax.disable_jit():
        checked = _check_golden_vectors(jitted if compiled else run)
    assert checked == 594


def _check_golden_vectors(quantize):
    checked = 0
    for name in SETS:
        source, granularity, *rest = name.split("/")
        x, codes, scales = GOLDEN[f"{source}/x_f32"], GOLDEN[f"{name}/codes"], GOLDEN[f"{name}/block_scale"]
        four_over_six = rest[0].split("-")[1] if rest else None
        tile = granularity == "tensor-2d16"
        rows = 16 if tile else 1
        packed, bits, global_scale = quantize(jnp.asarray(x), granularity == "row", four_over_six, rows)
        np.testing.assert_array_equal(packed, codes, err_msg=name)
        np.testing.assert_array_equal(np.repeat(bits, rows, 0) if scales.shape != bits.shape else bits, scales, err_msg=name)
        top = F32(1536 if four_over_six else 2688)
        amax = GOLDEN[f"{source}/{'row' if granularity == 'row' else 'tensor'}/amax"].astype(F32)
        expected = np.where(amax == 0, F32(1), amax / top)
        np.testing.assert_array_equal(np.ravel(global_scale), np.ravel(expected), err_msg=name)
        checked += 1
    return checked


def oracle(x, amax, top=2688):
    """The contract in numpy, rounding with ml_dtypes: a transcription of its five lines. Codes unpacked, scales as bits."""
    with np.errstate(all="ignore"):
        amax = amax[..., None]  # one for each row
        g = np.minimum(F32(top) / amax, np.finfo(F32).max)
        g = np.where(amax == 0, F32(1), g)
        d = F32(1) / g
        block = np.abs(x.reshape(*x.shape[:-1], -1, 16)).max(-1, keepdims=True)
        scale = np.clip(np.minimum(block * (g * F32(1 / 6)), np.finfo(F32).max), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        enc = np.minimum(F32(1) / (scale.astype(F32) * d), np.finfo(F32).max)
        y = np.clip(x.reshape(*x.shape[:-1], -1, 16) * enc, -6, 6)
        codes = (y + F32(0)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes.reshape(x.shape), scale.view(np.uint8)[..., 0]


@functools.partial(jax.jit, static_argnames="pow2")
def quantized(x, amax, pow2=False):
    g, _, amax = numerics.global_scales(amax, pow2=pow2)
    packed, bits = numerics.quantize_blocks(x, g, amax)
    return numerics.unpack(packed), bits


@pytest.mark.parametrize("exponent", [-100, -20, -1, 0, 3, 17, 60])
def test_exhaustive_bfloat16(exponent):
    """Every pair of bfloat16 mantissas (tensor amax, block amax) with every mantissa as the element: no byte may differ."""
    mantissas = F32(1) + np.arange(128, dtype=F32) / F32(128)
    amax = np.ldexp(mantissas, exponent)
    blocks = 0
    for shift in (-1, -2, -3):  # moves the elements over the whole E2M1 range
        x = np.zeros((128, 9, 16), F32)
        elements = np.ldexp(np.resize(mantissas, 135), exponent - 4 + shift) * np.resize([1, -1], 135).astype(F32)
        x[:, :, 1:] = elements.reshape(9, 15)
        x[:, :, 0] = np.ldexp(mantissas, exponent - 4)[:, None]  # the block's amax
        rows = x.reshape(128, 144)
        sources = np.broadcast_to(rows, (128, 128, 144)).reshape(-1, 144)
        tops = np.repeat(amax, 128)[:, None]
        codes, bits = quantized(jnp.asarray(sources), jnp.asarray(tops))
        expected_codes, expected_bits = oracle(sources, tops)
        np.testing.assert_array_equal(bits, expected_bits)
        np.testing.assert_array_equal(codes, expected_codes)
        blocks += bits.size
    assert blocks == 3 * 128 * 128 * 9


def test_exhaustive_sweep_can_fail():
    """The sweep sees the one change of order that the contract warns of: block / (6 * amax / 2688), not block * (g * (1/6))."""
    mantissas = F32(1) + np.arange(128, dtype=F32) / F32(128)
    block, amax = np.meshgrid(mantissas, mantissas)
    right = block * ((F32(2688) / amax) * F32(1 / 6))
    other = block / (F32(6) * (amax / F32(2688)))
    e4m3 = [np.clip(v / 8, 0, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for v in (right, other)]
    assert 0 < (e4m3[0] != e4m3[1]).sum() < 100


def test_roundings_against_ml_dtypes():
    x = np.concatenate([np.linspace(0, 448, 200001, dtype=F32), np.ldexp(np.linspace(1, 2, 4001, dtype=F32)[:-1], np.arange(-14, -4)[:, None]).ravel()])
    np.testing.assert_array_equal(jax.jit(numerics.encode_e4m3)(x), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    bits = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(numerics.decode_e4m3(jnp.asarray(bits)), bits.view(ml_dtypes.float8_e4m3fn).astype(F32))
    ties = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7], F32)
    y = np.concatenate([ties, np.nextafter(ties[1:], F32(9)), np.nextafter(ties[1:], F32(-1)), np.linspace(0, 7, 9999, dtype=F32)])
    y = np.concatenate([y, -y[y > 0]])
    np.testing.assert_array_equal(numerics.encode_e2m1(jnp.asarray(y)), y.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(numerics.decode_e2m1(jnp.asarray(codes)), codes.view(ml_dtypes.float4_e2m1fn).astype(F32))
    packed = numerics.pack(jnp.asarray(codes))
    assert int(packed[0]) == 0x10
    np.testing.assert_array_equal(numerics.unpack(packed), codes)


positive = st.floats(min_value=2.0**-60, max_value=2.0**60, width=32)


@given(st.lists(st.tuples(positive, positive), min_size=64, max_size=64))
def test_divide_is_correctly_rounded(pairs):
    a, b = np.array(pairs, F32).T
    np.testing.assert_array_equal(jax.jit(numerics.divide)(a, b), a / b)


def test_divide_mantissas_and_limits(key):
    m = np.ldexp(np.asarray(jax.random.randint(key, (4096,), 2**23, 2**24)).astype(F32), -23)
    np.testing.assert_array_equal(jax.jit(lambda a: numerics.divide(a, 6.0))(m), m / F32(6))
    np.testing.assert_array_equal(jax.jit(lambda a: numerics.divide(2688.0, a))(m), F32(2688) / m)
    a = np.array([0, 1, np.finfo(F32).max, 1], F32)
    b = np.array([3, 0, 0.5, np.finfo(F32).max], F32)
    np.testing.assert_array_equal(numerics.divide(jnp.asarray(a), jnp.asarray(b)), np.array([0, np.inf, np.inf, 0], F32))


def test_power_of_two_rounds_up_exactly(key):
    x = np.asarray(jnp.exp(jax.random.uniform(key, (4096,), minval=-60.0, maxval=60.0)))
    x = np.concatenate([x, np.ldexp(F32(1), np.arange(-100, 100))])
    m, e = np.frexp(x)
    np.testing.assert_array_equal(numerics.round_up_to_power_of_two(jnp.asarray(x)), np.ldexp(F32(1), np.where(m == 0.5, e - 1, e)))


@pytest.mark.parametrize("scaling", ["tensor", "tensor_pow2", "token"])
@pytest.mark.parametrize("four_over_six", [None, "mae", "mse"])
def test_scaling_by_a_power_of_two(key, scaling, four_over_six):
    """Codes and block scales keep their bits, the global scale moves by the power: online modes do not see drift."""
    x = jax.random.normal(key, (8, 64)) * jnp.exp(jax.random.normal(key, (8, 1)))
    f = jax.jit(lambda x: nvfp4jax.quantize(x, scaling=dataclasses.replace(NAMES[scaling], four_over_six=four_over_six)))
    base = f(x)
    # The reference's squared error leaves float32's range beyond; the other modes hold as far as the scales are normal.
    for k in (-31, -1, 1, 40) if four_over_six == "mse" else (-80, -31, -1, 1, 40, 90):
        q = f(x * jnp.float32(2.0**k))
        np.testing.assert_array_equal(q.packed, base.packed)
        np.testing.assert_array_equal(q.scale.view(jnp.uint8), base.scale.view(jnp.uint8))
        np.testing.assert_array_equal(q.global_scale, np.ldexp(base.global_scale, k))


# --- norm and SiLU ---------------------------------------------------------------------------------------------------

BF16 = ml_dtypes.bfloat16
EITHER = pytest.mark.parametrize("wrap", [jax.jit, lambda f, **kw: f], ids=["jit", "eager"])
TINY = 2.0**-126  # denormals may be flushed


def rounded_to_bfloat16(x):
    """float64 -> the nearest bfloat16, in float64: one rounding."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def every_gate():
    """All finite bfloat16 with a silu that is no denormal and, by the contract, not zero; and that silu in float64."""
    gate = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    with np.errstate(invalid="ignore"):
        wide = gate.astype(F32).astype(np.float64)
    gate, wide = (v[np.isfinite(wide) & (wide >= numerics.SILU_MIN)] for v in (gate, wide))
    silu = wide / (1 + np.exp(-wide))
    return (v[rounded_to_bfloat16(np.abs(silu)) > TINY] for v in (gate, wide, silu))


@EITHER
def test_silu_of_every_bfloat16(wrap):
    gate, _, silu = every_gate()
    got = wrap(numerics.silu_mul)(jnp.asarray(gate), jnp.ones(gate.shape, jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), rounded_to_bfloat16(silu))
    special = [np.inf, np.nan, -np.inf, 0, -0.0, -87.5, -3e38]
    got = wrap(numerics.silu_mul)(jnp.array(special, jnp.bfloat16), jnp.ones(7, jnp.bfloat16)).astype(jnp.float32)
    np.testing.assert_array_equal(got, [np.inf, np.nan, np.nan, 0, 0, 0, 0])


def test_silu_leaves_room_for_inexact_backends():
    """The nudged formula in float64, off by 2**-20.4 either way, rounds to the right value everywhere; the plain one does not."""
    _, gate, silu = every_gate()
    right = rounded_to_bfloat16(silu)
    nudged = gate / (1 + np.sign(gate) * numerics.SILU_NUDGE + np.exp(-gate * numerics.SILU_RATE))
    for off in (1 - 2.0**-20.4, 1 + 2.0**-20.4):
        np.testing.assert_array_equal(rounded_to_bfloat16(nudged * off), right)
    wrong = [gate[rounded_to_bfloat16(silu * off) != right] for off in (1 - 2.0**-21, 1 + 2.0**-21)]
    assert set(np.concatenate(wrong)) == {-(2.0**-8), 2.0**-7, 5.9375, -3.046875}


@EITHER
def test_silu_mul_rounds_in_hugging_faces_order(wrap):
    rng = np.random.default_rng()
    gate, up = (rng.normal(size=(2, 64, 80)) * np.array(4)).astype(F32)
    exact = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    got = np.asarray(wrap(numerics.silu_mul)(jnp.asarray(gate), jnp.asarray(up)))
    assert got.dtype == F32
    np.testing.assert_allclose(got, exact * up, rtol=4 * 2.0**-23)
    gate, up = gate.astype(BF16), up.astype(BF16)
    wide = gate.astype(np.float64)
    silu = rounded_to_bfloat16(wide / (1 + np.exp(-wide)))
    got = wrap(numerics.silu_mul)(jnp.asarray(gate), jnp.asarray(up))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), rounded_to_bfloat16(silu * up.astype(np.float64)))


def norm_oracle(x, weight, eps):
    """The contract in numpy, whose roots and quotients are IEEE's."""
    dtype, (*batch, k) = x.dtype, x.shape
    with np.errstate(all="ignore"):
        wide = x.astype(F32)
        squares = np.pad(wide * wide, [(0, 0)] * len(batch) + [(0, -k % 512)]).reshape(*batch, -1, 32, 16)
        even, odd = (np.add.accumulate(squares[..., i::2], axis=-1, dtype=F32)[..., -1] for i in (0, 1))
        lanes = even + odd
        while lanes.shape[-1] > 1:
            lanes = lanes[..., :lanes.shape[-1] // 2] + lanes[..., lanes.shape[-1] // 2:]
        total = np.add.accumulate(lanes[..., 0], axis=-1, dtype=F32)[..., -1:]
        inverse = F32(1) / np.sqrt(total * F32(1 / k) + F32(eps))
        normed = (wide * inverse).astype(dtype)
        return (normed.astype(F32) * weight.astype(F32)).astype(dtype)


NORM_SHAPES = ((2, 3, 64), (5, 768), (2, 7168), (4, 100), (3, 5))


@EITHER
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_rms_norm_bits(wrap, dtype):
    rng = np.random.default_rng()
    norm = wrap(numerics.rms_norm, **({"static_argnums": 2} if wrap is jax.jit else {}))
    for shape in NORM_SHAPES if wrap is jax.jit else NORM_SHAPES[:1]:
        x = (rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, (*shape[:-1], 1)))).astype(F32).astype(dtype)
        weight, eps = rng.normal(size=shape[-1]).astype(F32).astype(dtype), float(rng.choice([1e-12, 1e-6, 1e-5]))
        got = np.asarray(norm(jnp.asarray(x), jnp.asarray(weight), eps))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(F32), norm_oracle(x, weight, eps).astype(F32), err_msg=str((shape, eps)))
        wide = x.astype(np.float64)
        exact = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps)
        # Two roundings to dtype, and in float32 those of the sum (log K of them), the root, the reciprocal and the product.
        rtol = 2.0**-20 + (2.0**-7 if dtype is BF16 else 0)
        np.testing.assert_allclose(got.astype(np.float64), exact * weight.astype(np.float64), rtol=rtol)


def test_rms_norm_of_special_rows():
    """Zeros, NaN, infinity and a sum that overflows, as torch has them; one weight dtype for another."""
    x = np.ones((5, 64), F32)
    x[0], x[1, 3], x[2, 3], x[3] = 0, np.nan, np.inf, 1e25
    for dtype in (BF16, F32):
        weight = np.full(64, 2, F32)
        got = jax.jit(numerics.rms_norm, static_argnums=2)(jnp.asarray(x.astype(dtype)), jnp.asarray(weight), 1e-6)
        np.testing.assert_array_equal(np.asarray(got).astype(F32), norm_oracle(x.astype(dtype), weight.astype(dtype), 1e-6).astype(F32))


def test_inverse_sqrt_is_correctly_rounded():
    rng = np.random.default_rng()
    near = np.square((rng.integers(1 << 23, 1 << 24, 50000) * 2 + 1) * 2.0**-24).astype(F32)  # roots next to ties
    x = np.concatenate([near, np.exp2(rng.uniform(-125, 127, 100000)).astype(F32)])
    ends = np.array([1, 2, 4, 2.0**-126, 2.0**64, 2.0**127], F32)
    x = np.concatenate([x, ends, np.nextafter(ends[:-1], F32(np.inf)), np.nextafter(ends[[0, 1, 2, 4, 5]], F32(0))])
    np.testing.assert_array_equal(jax.jit(numerics.inverse_sqrt)(x), F32(1) / np.sqrt(x))


def test_norm_and_silu_have_gradients(key):
    """Those of the plain float32 formulas."""
    x, y, weight, dy = (jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate([(3, 48), (3, 48), (48,), (3, 48)]))

    def plain_norm(x, weight):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight[None]

    for f, plain, arguments in (
        (lambda x, w: numerics.rms_norm(x, w, 1e-6), plain_norm, (x, weight)),
        (numerics.silu_mul, lambda x, y: jax.nn.silu(x) * y, (x, y)),
    ):
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
            arguments = tuple(a.astype(dtype) for a in arguments)
            got = jax.jit(lambda dy, *arguments, f=f: jax.vjp(f, *arguments)[1](dy))(dy.astype(dtype), *arguments)
            want = jax.vjp(plain, *(a.astype(jnp.float32) for a in arguments))[1](dy.astype(dtype).astype(jnp.float32))
            for a, b in zip(got, want, strict=True):
                assert a.dtype == dtype
                np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)
