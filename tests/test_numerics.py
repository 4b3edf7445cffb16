"""The contract: golden vectors, an exhaustive bfloat16 sweep against numpy in IEEE arithmetic, and the edge table."""

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


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_golden_vectors(compiled):
    """All 594 sets, compiled and eager."""
    checked = 0
    for name in SETS:
        source, granularity, *rest = name.split("/")
        x, codes, scales = GOLDEN[f"{source}/x_f32"], GOLDEN[f"{name}/codes"], GOLDEN[f"{name}/block_scale"]
        four_over_six = rest[0].split("-")[1] if rest else None
        tile = granularity == "tensor-2d16"
        rows = 16 if tile else 1
        packed, bits, global_scale = (jitted if compiled else run)(jnp.asarray(x), granularity == "row", four_over_six, rows)
        np.testing.assert_array_equal(packed, codes, err_msg=name)
        np.testing.assert_array_equal(np.repeat(bits, rows, 0) if scales.shape != bits.shape else bits, scales, err_msg=name)
        top = F32(1536 if four_over_six else 2688)
        amax = GOLDEN[f"{source}/{'row' if granularity == 'row' else 'tensor'}/amax"].astype(F32)
        expected = np.where(amax == 0, F32(1), amax / top)
        np.testing.assert_array_equal(np.ravel(global_scale), np.ravel(expected), err_msg=name)
        checked += 1
    assert checked == 594


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
