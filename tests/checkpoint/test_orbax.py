"""Saving and restoring through Orbax: exact bytes, and damage that ends in a named error."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint._src.futures import signaling_client, synchronization

from checkpoint import folders
from nvfp4jax import models
from nvfp4jax.checkpoint import load_model, orbax, save_model
from nvfp4jax.checkpoint.digest import digests, unhealthy
from nvfp4jax.checkpoint.safetensors import CheckpointError

# Orbax leaves its other reads unawaited when one of them fails.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning", "ignore::ResourceWarning"
)

METADATA = {"recipe": "te-exact/token", "config": {"model_type": "test"}, "rules": []}


def example() -> dict:
    rng = np.random.default_rng(0)
    return {
        "layers": {
            str(i): {
                "kernel": jnp.asarray(rng.integers(0, 255, (6, 8), dtype=np.uint8)),
                "kernel_scale": jnp.asarray(rng.integers(8, 126, (6, 1), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)),
                "kernel_global_scale": jnp.asarray(np.float32(0.001 * (i + 1))),
            }
            for i in range(2)
        },
        "norm": {"scale": jnp.asarray(rng.normal(size=(8,)).astype(ml_dtypes.bfloat16))},
    }


def assert_same(a, b):
    a, b = orbax.flatten(a), orbax.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.fixture
def folder(tmp_path):
    orbax.save(tmp_path / "step", example(), METADATA)
    return tmp_path / "step"


def test_round_trip_and_metadata(folder):
    assert_same(orbax.restore(folder, example()), example())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example())
    assert_same(orbax.restore(folder, abstract), example())
    metadata = orbax.read_folder(folder).metadata
    assert metadata["format_version"] == 1 and metadata["config"] == {"model_type": "test"}
    assert set(metadata["digests"]) == set(orbax.flatten(example()))


def test_nnx_state_round_trip(tmp_path):
    model = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    orbax.save(tmp_path / "step", nnx.state(model), METADATA)
    other = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(1))
    nnx.update(other, orbax.restore(tmp_path / "step", nnx.state(other)))
    np.testing.assert_array_equal(other.kernel[...], model.kernel[...])


def test_partial_save_equals_save(tmp_path, folder):
    leaves = orbax.flatten(example())
    names = list(leaves)
    partial = orbax.PartialSave(tmp_path / "partial")
    for name in names[:-1]:
        partial.add({name: np.asarray(leaves[name])})
        assert not (tmp_path / "partial").exists()
    partial.finish({names[-1]: np.asarray(leaves[names[-1]])}, METADATA)
    assert sorted(os.listdir(tmp_path)) == ["partial", "step"]
    assert orbax.read_folder(tmp_path / "partial").metadata == orbax.read_folder(folder).metadata
    assert_same(orbax.restore(tmp_path / "partial", example()), example())


def test_an_existing_folder_is_refused_and_kept(folder):
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        orbax.save(folder, example(), METADATA)
    with pytest.raises(CheckpointError, match="exists already"):
        orbax.PartialSave(folder)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_nan_is_not_saved_and_nothing_is_left(tmp_path):
    state = example()
    state["norm"]["scale"] = state["norm"]["scale"].at[3].set(jnp.bfloat16(float("nan")))
    with pytest.raises(CheckpointError, match="norm/scale: a value that is NaN"):
        orbax.save(tmp_path / "step", state, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="the metadata are no JSON"):
        orbax.save(tmp_path / "step", example(), METADATA | {"config": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_save_leaves_no_signals_behind(tmp_path):
    """Orbax's own notes of a save would grow with each one of a long training."""
    orbax.save(tmp_path / "1", {"x": jnp.ones(8)}, {"recipe": "float"})
    operation = synchronization.OperationIdGenerator.get_current_operation_id()
    assert signaling_client.get_signaling_client().key_value_dir_get(f"awaitable_signals_contract_{operation}/") == []


@pytest.mark.parametrize("change, message", [
    (lambda s: s["norm"].pop("scale"), "norm/scale is not expected"),
    (lambda s: s["norm"].update(bias=jnp.zeros(8)), "norm/bias is missing"),
    (lambda s: s["norm"].update(scale=jnp.zeros(9, jnp.bfloat16)), r"norm/scale has shape \(8,\), expected \(9,\)"),
    (lambda s: s["norm"].update(scale=jnp.zeros(8, jnp.float32)), "norm/scale has dtype bfloat16, expected float32"),
])
def test_another_tree_is_refused(folder, change, message):
    state = example()
    change(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        orbax.restore(folder, state)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_flipped_byte_or_a_lost_file_never_passes(folder, tmp_path):
    """Every file, damaged at several places, and removed: the right weights or a named error."""
    rng = np.random.default_rng(0)
    refused = 0
    for file in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]:
        raw = file.read_bytes()
        for damage in ["lost", *rng.integers(0, len(raw), 4), *(-rng.integers(1, len(raw) + 1, 2))]:
            if damage == "lost":
                file.unlink()
            elif damage >= 0:
                file.write_bytes(raw[:damage] + bytes([raw[damage] ^ 0x10]) + raw[damage + 1 :])
            else:
                file.write_bytes(raw[:damage])
            try:
                restored = orbax.restore(folder, example())
            except CheckpointError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert_same(restored, example())
            file.write_bytes(raw)
    assert refused > 10


def test_folders_of_others(tmp_path, folder):
    with pytest.raises(CheckpointError, match="no such folder"):
        orbax.read_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        orbax.read_folder(tmp_path / "empty")
    path = folder / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    stored["custom_metadata"]["format_version"] = 2
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="format version 2"):
        orbax.restore(folder, example())
    stored["custom_metadata"] = {}
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="without nvfp4jax's metadata"):
        orbax.restore(folder, example())
    shutil.rmtree(folder / "state")
    with pytest.raises(CheckpointError, match="step"):
        orbax.restore(folder, example())


def test_digest_sees_every_byte_the_order_and_the_shape():
    x = np.arange(48, dtype=np.uint8).reshape(6, 8)
    variants = [x, x.reshape(8, 6), x.reshape(12, 4), np.ascontiguousarray(x.T), x[::-1], x.view(np.int8)]
    for position in range(x.size):
        changed = x.copy().reshape(-1)
        changed[position] ^= 1
        variants.append(changed.reshape(x.shape))
    found = digests({str(i): jnp.asarray(v) for i, v in enumerate(variants)})
    assert len(set(found.values())) == len(variants)
    assert digests({"0": x})["0"] == found["0"]
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.uint8):
        a = jnp.asarray(x, dtype)
        assert digests({"a": a}) != digests({"a": a.at[0, 0].set(jnp.asarray(7, dtype))})
        assert len(digests({"a": a[:0], "b": a[0, 0]})) == 2


def by_hand(x: np.ndarray) -> str:
    """The digest's definition, in numpy and Python integers."""

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    key = lambda index, seed: mix((index + seed) % 2**32) | 1  # noqa: E731
    shape = x.shape or (1,)
    raw = np.ascontiguousarray(x).reshape(shape).view(f"u{x.dtype.itemsize}")
    words = raw.view(np.uint32) if x.shape and shape[-1] * x.dtype.itemsize % 4 == 0 else raw
    words = words.reshape(-1, words.shape[-1]).tolist()
    low = high = 0
    for r, row in enumerate(words):
        for c, word in enumerate(row):
            word = word * 0x85EBCA6B % 2**32
            word ^= word >> 16
            low += word * key(c, 0x9E3779B9) * key(r, 0x2545F491)
            high += word * key(c, 0x7F4A7C15) * key(r, 0x4F6CDD1D)
    salt = 2166136261
    for letter in f"{x.dtype}{list(x.shape)}":
        salt = salt * 16777619 % 2**32 ^ ord(letter)
    return f"{high % 2**32 ^ salt:08x}{low % 2**32:08x}"


def test_digest_against_its_definition():
    rng = np.random.default_rng(1)
    for dtype in (np.uint8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32, np.int8):
        for shape in ((), (1,), (7,), (64,), (6, 8), (3, 5), (4, 3, 12), (2, 3, 4, 6), (0, 8)):
            x = rng.integers(0, 100, shape).astype(dtype)
            assert digests({"x": jnp.asarray(x)})["x"] == by_hand(x), (dtype, shape)


def test_digest_sees_structured_damage():
    """What a sum over words might miss: swapped rows, columns and blocks, signs, the same bit everywhere, zeros, shifts."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 2**32, (32, 64), dtype=np.uint32)
    variants = {"": x}
    for i in range(31):
        for axis in (0, 1):
            order = np.arange(x.shape[axis])
            order[[i, i + 1]] = order[[i + 1, i]]
            variants[f"swap {axis} {i}"] = x.take(order, axis)
            variants[f"roll {axis} {i}"] = np.roll(x, i + 1, axis)
        block = x.copy()
        block[i : i + 2, i : i + 2] = block[i : i + 2, i : i + 2][::-1, ::-1]
        variants[f"block {i}"] = block
    for bit in range(32):
        variants[f"bit {bit} of all"] = x ^ np.uint32(1 << bit)
        for _ in range(40):
            variants[f"bit {bit} of some {len(variants)}"] = x ^ (rng.integers(0, 2, x.shape, dtype=np.uint32) << np.uint32(bit))
            pair = x.copy()
            pair.reshape(-1)[rng.choice(x.size, 2, False)] ^= np.uint32(1 << bit)
            variants[f"bit {bit} of two {len(variants)}"] = pair
    for rows in (1, 8, 31):
        for low in (0, 1):
            cut = x.copy()
            cut[-rows:] = low * 0xFFFFFFFF
            variants[f"lost {rows} {low}"] = cut
    assert len(variants) > 2700
    found = digests({name: jnp.asarray(v.view(np.uint8)) for name, v in variants.items()})
    # Not only the pair: each half alone, which a weaker sum would let collide.
    for half in (slice(0, 8), slice(8, 16)):
        assert len({value[half] for value in found.values()}) == len(variants)


def test_health_of_every_value():
    """Each bit pattern of the 8- and 16-bit floats, at every place in a word: unfit exactly where numpy says so."""
    for dtype in (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        bits = 8 * np.dtype(dtype).itemsize
        values = np.arange(2**bits).astype(f"u{bits // 8}").view(dtype)
        bad = ~np.isfinite(values.astype(np.float32))
        assert bad.any() and unhealthy({"x": jnp.asarray(values[~bad][: bad.size // 8 * 7])}) == []
        for place in range(5):
            for value in values[bad][:: max(1, bad.sum() // 20)]:
                for width in (5, 8):
                    row = np.ones(width, dtype)
                    row[place] = value
                    assert len(unhealthy({"x": jnp.asarray(row)})) == 1
    codes = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)  # as a block scale: no sign either
    for place in range(4):
        rows = np.ones((256, 4), codes.dtype)
        rows[:, place] = codes
        found = [bool(unhealthy({"kernel_scale": jnp.asarray(row)})) for row in rows]
        assert found == (np.signbit(codes.astype(np.float32)) | np.isnan(codes.astype(np.float32))).tolist()
    f32 = np.asarray([np.finfo(np.float32).max, -0.0, 1e-45, -np.finfo(np.float32).max], np.float32)
    assert unhealthy({"x": jnp.asarray(f32)}) == []
    for value in (np.inf, -np.inf, np.nan, np.uint32(0xFFFFFFFF).view(np.float32), np.uint32(0x7F800001).view(np.float32)):
        assert len(unhealthy({"x": jnp.asarray(np.asarray([1, value], np.float32))})) == 1


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), ("x", "y"), (None, "y"), (("x", "y"),), ()])
def test_digest_does_not_depend_on_the_sharding(spec):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    rng = np.random.default_rng(0)
    everywhere = jax.device_put(np.float32(2.5), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert digests({"x": everywhere}) == digests({"x": np.float32(2.5)})
    for dtype in (np.uint8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32):
        for shape in ((8, 16), (16, 8, 3), (8, 4)):
            x = rng.integers(0, 100, shape).astype(dtype)
            placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
            assert digests({"x": placed}) == digests({"x": x})
            assert unhealthy({"x": placed}) == []
            if dtype == np.float32:
                assert unhealthy({"x": placed.at[-1, -1].set(np.nan)}) == ["x: a value that is NaN or infinite"]


def test_health():
    scale = jnp.asarray(np.array([[0x38, 0x7E]], np.uint8).view(ml_dtypes.float8_e4m3fn))
    bad_scale = jnp.asarray(np.array([[0x38, 0xFF]], np.uint8).view(ml_dtypes.float8_e4m3fn))
    fine = {"a/kernel": jnp.zeros((2, 2), jnp.uint8), "a/kernel_scale": scale, "a/kernel_global_scale": jnp.asarray([1.0, 1e-6], jnp.float32),
            "a/input_scale": jnp.asarray(3.0, jnp.float32), "norm/scale": jnp.zeros(3, jnp.bfloat16)}
    assert unhealthy(fine) == []
    for name, value in {"a/kernel_scale": bad_scale, "a/kernel_global_scale": jnp.asarray([1.0, 0.0], jnp.float32),
                        "a/input_scale": jnp.asarray(jnp.inf, jnp.float32), "norm/scale": jnp.asarray([jnp.nan], jnp.bfloat16)}.items():
        assert [line.split(":")[0] for line in unhealthy(fine | {name: value})] == [name]
    inverted = {"a/kernel_global_scale": jnp.asarray(2688 / 0.2, jnp.float32)}
    assert "inverse" in unhealthy(inverted)[0]


def test_a_dtype_that_is_too_narrow(tmp_path):
    """A folder in bfloat16, asked for in float16, whose largest is 65504."""
    config = folders.small_config(num_hidden_layers=1)
    model = models.build(config, jnp.bfloat16, rngs=nnx.Rngs(0))
    save_model(tmp_path / "fine", model, config)
    assert load_model(tmp_path / "fine", jnp.float16).norm.scale.dtype == jnp.float16
    model.norm.scale.set_value(model.norm.scale[...] * jnp.bfloat16(1e5))
    save_model(tmp_path / "large", model, config)
    assert load_model(tmp_path / "large").norm.scale[0] > 65504
    with pytest.raises(CheckpointError, match="in float16 norm/scale: a value that is NaN or infinite; load it as it is stored"):
        load_model(tmp_path / "large", jnp.float16)


def test_metadata_of_the_callers_own(tmp_path):
    """Kept; under a name that the folder itself uses it would spoil it, so it is refused and nothing is written."""
    model = nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    for name in ("format_version", "digests", "leaves", "recipe", "dtype", "kv_cache", "extras"):
        with pytest.raises(ValueError, match=f"save_model: '{name}' is an entry of the folder's own metadata"):
            save_model(tmp_path / "out", model, **{name: "mine"})
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "out", model, loss=1.5)
    assert orbax.read_folder(tmp_path / "out").metadata["loss"] == 1.5
