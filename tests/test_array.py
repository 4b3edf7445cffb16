"""quantize: modes, masks, given amax, the edge table, and the comparison with one-level FP4."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nvfp4jax
from nvfp4jax import ops
from nvfp4jax.array import quantize_weight
from nvfp4jax.scaling import NAMES, Static, Tensor

F32 = np.float32


def decode(q):
    """NVFP4Array -> float64, by ml_dtypes' own formats."""
    packed = np.asarray(q.packed)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    g = np.asarray(q.global_scale, np.float64)
    return values * np.repeat(np.asarray(q.scale).astype(np.float64), 16, -1) * g


@functools.partial(jax.jit, static_argnames="scaling")
def quantize(x, scaling="tensor", valid=None, amax=None):
    """One program a shape and mode: op by op each of some 300 small ones is compiled. That the bits are the same is held by
    `test_non_finite_rows_stay_alone` and by the golden sets."""
    return nvfp4jax.quantize(x, scaling=scaling, valid=valid, amax=amax)


dequantize = jax.jit(lambda q: q.dequantize())


def relative_error(x, y):
    return float(np.linalg.norm(np.asarray(y, np.float64) - np.asarray(x, np.float64)) / np.linalg.norm(np.asarray(x, np.float64)))


def same(a, b):
    np.testing.assert_array_equal(a.packed, b.packed)
    np.testing.assert_array_equal(a.scale.view(jnp.uint8), b.scale.view(jnp.uint8))
    np.testing.assert_array_equal(a.global_scale, b.global_scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(64,), (5, 128), (2, 3, 48)])
def test_shapes_and_dequantize(key, shape, dtype):
    x = jax.random.normal(key, shape, dtype)
    for scaling, g_shape in (("tensor", ()), ("tensor_pow2", ()), ("token", (*shape[:-1], 1))):
        q = quantize(x, scaling)
        assert q.packed.shape == (*shape[:-1], shape[-1] // 2) and q.packed.dtype == jnp.uint8
        assert q.scale.shape == (*shape[:-1], shape[-1] // 16) and q.scale.dtype == jnp.float8_e4m3fn
        assert q.global_scale.shape == g_shape and q.global_scale.dtype == jnp.float32 and q.shape == shape
        np.testing.assert_allclose(q.dequantize(), decode(q), rtol=1e-6)
        assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(q.qvalue).astype(F32) * np.repeat(np.asarray(q.scale).astype(F32), 16, -1), q.dequantize_blocks(jnp.float32))
        assert relative_error(x, decode(q)) < 0.13


def test_accuracy_at_every_magnitude(key):
    """20.4 dB on Gaussian data whatever its size, 21.2 dB with four-over-six; one-level FP4 loses small and large tensors."""
    x = np.asarray(jax.random.normal(key, (128, 2048)))

    def one_level(x):
        blocks = x.reshape(-1, 16)
        scale = (np.abs(blocks).max(-1, keepdims=True) / F32(6)).clip(0, 448).astype(ml_dtypes.float8_e4m3fn).astype(F32)
        with np.errstate(all="ignore"):
            values = np.clip(np.nan_to_num(blocks / scale), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(F32)
        return (values * scale).reshape(x.shape)

    for magnitude in (1e-20, 1e-5, 1e-3, 1.0, 1e4, 1e20):
        y = (x * F32(magnitude)).astype(F32)
        for scaling in ("tensor", "tensor_pow2", "token"):
            assert abs(relative_error(y, dequantize(quantize(jnp.asarray(y), scaling))) - 0.0951) < 0.0015
        assert relative_error(y, dequantize(quantize(jnp.asarray(y), Tensor(four_over_six="mae")))) < 0.0892
    assert relative_error(x * F32(1e-4), one_level(x * F32(1e-4))) == 1.0
    assert relative_error(x * F32(1e4), one_level(x * F32(1e4))) > 0.5
    assert relative_error(x, one_level(x)) < 0.097


def test_static_scale_fails_upward_first(key):
    """The ladder of the contract: a scale calibrated at 2**0 on data 2**d larger; x64 headroom holds."""
    x = jax.random.normal(key, (128, 2048))
    static = jax.jit(lambda x, s: nvfp4jax.quantize(x, Static(s)).dequantize())
    scale = jnp.abs(x).max() / jnp.float32(2688)
    db = lambda d, s: -20 * np.log10(relative_error(x * 2.0**d, static(x * jnp.float32(2.0**d), s)))  # noqa: E731
    # The cliff's place follows the sample's amax, so a margin of 2 dB around the published ladder.
    for d, expected in ((0, 20.4), (1, 19.6), (2, 10.8), (3, 4.9), (4, 2.3), (-12, 20.4), (-14, 20.2), (-16, 17.1), (-18, 0.4)):
        assert abs(db(d, scale) - expected) < 2.0, (d, db(d, scale))
    for d in (-8, 0, 5):
        assert abs(db(d, scale * jnp.float32(64)) - 20.4) < 0.3


def test_zero_and_empty():
    for scaling in ("tensor", "tensor_pow2", "token"):
        for four_over_six in (None, "mse"):
            mode = dataclasses.replace(NAMES[scaling], four_over_six=four_over_six)
            q = quantize(jnp.zeros((3, 32)), mode)
            assert not np.any(q.packed) and not np.any(np.asarray(q.scale).astype(F32)) and np.all(q.global_scale == 1)
            np.testing.assert_array_equal(dequantize(q), 0)
            x = jnp.ones((3, 32)).at[1].set(0).at[2, 16:].set(0)
            decoded = dequantize(quantize(x, mode))
            assert np.isfinite(decoded).all() and not np.any(decoded[1]) and not np.any(decoded[2, 16:])
        empty = quantize(jnp.zeros((0, 32)), scaling)
        assert empty.packed.shape == (0, 16) and empty.dequantize().shape == (0, 32)
    tiny = quantize(jnp.full((3, 32), 1e-38))  # below the smallest usable global scale: zero, not noise
    np.testing.assert_array_equal(tiny.dequantize(), 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scaling", ["tensor", "tensor_pow2", "token"])
def test_non_finite_rows_stay_alone(key, scaling, poison):
    x = np.array(jax.random.normal(key, (6, 64)), F32)
    clean = nvfp4jax.quantize(jnp.asarray(np.where(np.arange(6)[:, None] == 2, np.where(np.arange(64) == 7, 0, x), x)), scaling=scaling)
    x[2, 7] = poison
    for f in (nvfp4jax.quantize, jax.jit(nvfp4jax.quantize, static_argnames="scaling")):
        q = f(jnp.asarray(x), scaling=scaling)
        assert np.isnan(q.dequantize()[2]).all()
        others = np.arange(6) != 2
        np.testing.assert_array_equal(np.asarray(q.packed)[others], np.asarray(clean.packed)[others])
        np.testing.assert_array_equal(np.asarray(q.dequantize())[others], np.asarray(clean.dequantize())[others])


def test_valid_mask_and_given_amax(key):
    x = jax.random.normal(key, (8, 64))
    loud = x.at[5].multiply(1e4)
    valid = jnp.arange(8) != 5
    for scaling in ("tensor", "tensor_pow2"):
        masked = quantize(loud, scaling=scaling, valid=valid)
        alone = quantize(x[np.asarray(valid)], scaling=scaling)
        np.testing.assert_array_equal(masked.global_scale, alone.global_scale)
        np.testing.assert_array_equal(np.asarray(masked.packed)[np.asarray(valid)], alone.packed)
    same(quantize(x, amax=jnp.abs(x).max()), quantize(x))
    same(quantize(x, scaling="token", amax=jnp.abs(x).max(-1, keepdims=True)), quantize(x, scaling="token"))
    with pytest.raises(ValueError, match=r"valid has shape \(3,\)"):
        nvfp4jax.quantize(x, valid=jnp.ones(3, bool))


def test_bad_arguments(unchecked):
    with pytest.raises(ValueError, match=r"\(4, 24\).*K=24 is not a multiple of 16"):
        nvfp4jax.quantize(jnp.ones((4, 24)))
    with pytest.raises(ValueError, match="scaling='row' is not one of token, tensor, tensor_pow2"):
        nvfp4jax.quantize(jnp.ones((4, 16)), scaling="row")
    with pytest.raises(ValueError, match="four_over_six='max'"):
        Tensor(four_over_six="max")


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.sampled_from(["tensor_pow2", "token"]), st.sampled_from([None, "mae"]))
def test_a_row_does_not_see_its_neighbours(seed, octaves, scaling, four_over_six):
    """token and tensor_pow2: the decoded row is bit-equal alone and among neighbours up to 2**12 louder or quieter."""
    rng = np.random.default_rng(seed)
    row = rng.normal(size=(1, 64)).astype(F32)
    others = rng.normal(size=(3, 64)).astype(F32) * F32(2.0) ** F32(rng.choice([-1, 1]) * octaves)
    mode = dataclasses.replace(NAMES[scaling], four_over_six=four_over_six)
    alone, among = quantize(jnp.asarray(row), mode), quantize(jnp.asarray(np.concatenate([others, row])), mode)
    np.testing.assert_array_equal(alone.packed[0], among.packed[3])
    np.testing.assert_array_equal(dequantize(alone)[0], dequantize(among)[3])


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_quantizing_decoded_values_again_changes_nothing(seed, rows):
    """Where the amax of row and blocks is representable the codes are a fixed point (TransformerEngine's own test)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, 4, 16)).astype(np.uint8)
    codes[:, :, 0] = 7  # each block reaches 6, so its scale is found again
    scale = np.abs(rng.normal(size=(rows, 4)) * 20 + 30).astype(ml_dtypes.float8_e4m3fn)
    scale[:, 0] = 448  # each row reaches 2688
    x = codes.view(ml_dtypes.float4_e2m1fn).astype(F32) * scale.astype(F32)[..., None]
    q = quantize(jnp.asarray(x.reshape(rows, 64)), "token")
    np.testing.assert_array_equal(dequantize(q), x.reshape(rows, 64))
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), scale.view(np.uint8))


def test_weights_are_rounded_to_bfloat16_first(key):
    w = jax.random.normal(key, (3, 32, 64))
    q = quantize_weight(w)
    same(q, quantize_weight(w.astype(jnp.bfloat16)))
    assert q.global_scale.shape == (3, 1, 1)
    same(quantize_weight(w[1]), jax.tree.map(lambda v: v[1].reshape(v.shape[1:] if v.shape[-1] > 1 else ()), q))
    one = nvfp4jax.quantize(w[1].astype(jnp.bfloat16))
    same(quantize_weight(w[1]), one)


@pytest.mark.parametrize("kind", [None, "mae"])
def test_transposed_weights_are_weights(key, kind):
    """Of one shape or not, with a global scale for all of them; NaN spoils its own row."""
    for lead, widths in (((), (32,)), ((3,), (16, 16)), ((2, 3), (8, 3, 1))):
        ws = [jax.random.normal(jax.random.fold_in(key, i), (*lead, 48, n)) * 4.0**i for i, n in enumerate(widths)]
        ws[-1] = ws[-1].at[..., 5, 0].set(jnp.nan)
        rows = jnp.concatenate([jnp.swapaxes(w, -1, -2) for w in ws], -2)
        q = ops.quantize_transposed(ws, four_over_six=kind)
        same(q, ops.quantize_weight(rows, four_over_six=kind))
        assert np.isnan(np.asarray(q.scale, np.float32)).any(-1).sum(-1).tolist() == np.ones(lead).tolist()


def test_transposed_weights_that_do_not_fit(unchecked):
    for ws, message in (
        (jnp.ones((16, 4)), "ws: .* a sequence of arrays"), ([], "a sequence of arrays"), ([jnp.ones((16, 4)), jnp.ones((32, 4))], "share no leading"),
        ([jnp.ones((2, 16, 4)), jnp.ones((16, 4))], "share no leading"), ([jnp.ones((24, 16))], r"weight of shape \(24, 16\): .* K=24"),
        ([jnp.ones((16, 4), jnp.int32)], "int32"), ([jnp.ones(16)], "K, N"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.quantize_transposed(ws)
