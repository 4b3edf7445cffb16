"""Publishing and reloading: right weights or a named error, never a mixture, never a second compilation."""

import functools
import gc
import json
import logging
import os
import re
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nvfp4jax
from checkpoint import folders
from nvfp4jax import models
from nvfp4jax.checkpoint import CheckpointError, orbax, saved_model
from nvfp4jax.checkpoint.digest import digests
from nvfp4jax.checkpoint.reload import Quantizer, Reader, publish, steps
from nvfp4jax.layers import state as layer_state
from nvfp4jax.rollout import decoding

CONFIG = folders.small_config(num_hidden_layers=3)
RULES = [nvfp4jax.Rule("lm_head|.*/mlp/gate", skip=True), nvfp4jax.Rule(".*")]

# Orbax leaves its other reads unawaited when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning", "ignore::ResourceWarning")


@functools.cache
def floats(seed: int, scan: bool = False) -> nnx.Module:
    """A small Qwen3-MoE in bfloat16: one dense layer, two sparse ones; committed to a device, as loaded models are."""
    model = models.build(CONFIG, rngs=nnx.Rngs(seed))
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    return models.stack_layers(model) if scan else model


@functools.cache
def packed(seed: int, scan: bool = False) -> nnx.Module:
    model = nvfp4jax.quantize_model(floats(seed), RULES)
    return models.stack_layers(model) if scan else model


def contents(state) -> dict[str, bytes]:
    state = nnx.state(state) if isinstance(state, nnx.Module) else state
    return {path: np.asarray(leaf).tobytes() for path, leaf in orbax.flatten(state).items()}


def same(a, b) -> bool:
    return contents(a) == contents(b)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("source", ["bf16", "nvfp4", "memory", "memory, donated"])
def test_every_road_gives_the_same_bits(tmp_path, source, scan):
    live = packed(0, scan)
    with Reader(tmp_path, live, poll_seconds=60) as reader:
        if source.startswith("memory"):
            state = jax.tree.map(jnp.copy, nnx.state(floats(1, scan)))
            weights = reader.from_memory(7, state, donate=source.endswith("donated"))
            if source.endswith("donated"):
                gone = {path for path, leaf in orbax.flatten(state).items() if leaf.is_deleted()}
                assert {path.split("/")[-1] for path in gone} == {"kernel", "gate_proj", "up_proj", "down_proj"}
        else:
            # A trainer's layers are stored one by one, however the rollout runs them.
            publish(tmp_path, 7, (floats if source == "bf16" else packed)(1), CONFIG)
            assert reader.poll() == 7
            weights = reader.take()
        assert weights.step == reader.active_step == 7 and reader.take() is None
    assert same(weights.state, packed(1, scan))
    assert jax.tree.structure(weights.state) == jax.tree.structure(nnx.state(live))
    assert same(live, packed(0, scan)) and not reader.failures


def test_a_trainer_with_single_layers_feeds_a_scanned_rollout():
    assert same(Quantizer(packed(0, True))(nnx.state(floats(1))), packed(1, True))
    assert same(Quantizer(packed(0, True))(floats(1, True)), packed(1, True))


def test_float32_masters_give_the_same_bits():
    masters = jax.tree.map(lambda x: x.astype(jnp.float32) * jnp.float32(1 + 1e-4), nnx.state(floats(1)))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters)
    assert same(Quantizer(packed(0))(masters), Quantizer(packed(0))(expected))


def test_the_thread_finds_newer_steps_and_skips_older_ones(tmp_path):
    publish(tmp_path, 3, packed(0), CONFIG)
    with Reader(tmp_path, packed(0), poll_seconds=0.01, active_step=3) as reader:
        time.sleep(0.1)
        assert reader.take() is None
        for step in (4, 5):
            publish(tmp_path, step, packed(step % 2), CONFIG)
        weights = wait_for(reader, 5)
        assert same(weights.state, packed(1)) and reader.take() is None
    with pytest.raises(CheckpointError, match="step 5 is not after step 5"):
        publish(tmp_path, 5, packed(0), CONFIG)
    with pytest.raises(CheckpointError, match="step 5 is not after step 5, which serves"):
        reader.from_memory(5, floats(1))
    assert steps(tmp_path) == [3, 4, 5]


def wait_for(reader: Reader, step: int):
    for _ in range(600):
        weights = reader.take()
        if weights is not None and weights.step == step:
            return weights
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came; {reader.failures}")


def test_old_steps_are_removed(tmp_path):
    for step in range(1, 6):
        publish(tmp_path, step, packed(0), CONFIG, keep=3)
    assert steps(tmp_path) == [3, 4, 5] and sorted(os.listdir(tmp_path)) == ["3", "4", "5"]


def rewrite(path, model, change):
    """Publishes a model and then alters what lies on disk through `change(leaves, metadata)`, digests untouched by default."""
    leaves = orbax.flatten(nnx.state(model))
    metadata = {"recipe": "te-exact/token", "config": CONFIG, "rules": saved_model.rules_to_json(RULES), "dtype": "bfloat16"}
    good = digests(leaves)
    change(leaves, metadata)
    orbax.ocp.save(path, orbax._nested(leaves), custom_metadata={"format_version": 1, "digests": good} | metadata)


def replace(name, f, redigest=False):
    def change(leaves, metadata):
        leaves[name] = f(leaves[name])
        if redigest:
            metadata["digests"] = digests(leaves)

    return change


def drop(leaves, metadata):
    leaves.pop("norm/scale")


def add(leaves, metadata):
    leaves["norm/bias"] = jnp.zeros(3)


def to_metadata(**values):
    return lambda leaves, metadata: metadata.update(values)


K = "layers/1/self_attn/q_proj/kernel"
Q = f"{K}_packed"
FAULTS = {
    "missing key": (drop, "norm/scale is missing"),
    "extra key": (add, "norm/bias is not expected"),
    "wrong shape": (replace(Q, lambda x: x[:16]), rf"{Q} has shape \(16, 16\), expected \(32, 16\)"),
    "wrong dtype": (replace("norm/scale", lambda x: x.astype(jnp.float32)), "norm/scale has dtype float32, expected bfloat16"),
    "codes as int8": (replace(Q, lambda x: x.astype(jnp.int8)), f"{Q} has dtype int8"),
    "transposed scale": (replace(f"{K}_scale", jnp.transpose), rf"{K}_scale has shape \(2, 32\)"),
    "transposed codes": (replace("layers/0/mlp/down_proj/kernel_packed", lambda x: x.reshape(24, -1).T.reshape(x.shape)), "down_proj/kernel_packed: its bytes do not match"),
    "rolled scales": (replace(f"{K}_scale", lambda x: x[::-1]), f"{K}_scale: its bytes do not match"),
    "inverted scale": (replace(f"{K}_global_scale", lambda x: jnp.float32(1) / x, True), "global scale that is .* the inverse"),
    "inverted input of a live scale": (replace("layers/2/mlp/experts/down_global_scale", lambda x: jnp.float32(1) / x, True), "inverse|inverted"),
    "NaN global scale": (replace(f"{K}_global_scale", lambda x: x * jnp.float32(jnp.nan), True), f"{K}_global_scale: a global scale"),
    "infinite global scale": (replace(f"{K}_global_scale", lambda x: x + jnp.float32(jnp.inf), True), f"{K}_global_scale: a global scale"),
    "zero global scale": (replace(f"{K}_global_scale", lambda x: x * jnp.float32(0), True), f"{K}_global_scale: a global scale"),
    "NaN block scale": (replace(f"{K}_scale", lambda x: x.at[3, 1].set(jnp.float8_e4m3fn(jnp.nan)), True), f"{K}_scale: a block scale that is NaN"),
    "negative block scale": (replace(f"{K}_scale", lambda x: x.at[3, 1].set(jnp.float8_e4m3fn(-1)), True), f"{K}_scale: a block scale that is NaN or negative"),
    "NaN weight": (replace("norm/scale", lambda x: x.at[3].set(jnp.bfloat16(jnp.nan)), True), "norm/scale: a value that is NaN"),
    "infinite weight": (replace("lm_head/kernel", lambda x: x.at[3, 4].set(jnp.bfloat16(jnp.inf)), True), "lm_head/kernel: a value"),
    "format version": (to_metadata(format_version=9), "format version 9"),
    "no digests": (to_metadata(digests=None), "digests do not cover"),
    "another step": (to_metadata(step=3), "say step 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_step_is_named_once_and_an_older_one_serves(tmp_path, caplog, fault):
    change, message = FAULTS[fault]
    publish(tmp_path, 4, packed(1), CONFIG)
    rewrite(tmp_path / "5", packed(2), change)
    reader = Reader(tmp_path, packed(0))
    with caplog.at_level(logging.WARNING, "nvfp4jax"):
        assert reader.poll() == 4
        assert reader.poll() == 4  # not tried again
    told = [record.getMessage() for record in caplog.records if record.name.startswith("nvfp4jax")]
    assert len(told) == 1 and "step 5" in told[0] and reader.failures[5] in told[0]
    assert re.search(message, reader.failures[5]), reader.failures[5]
    assert same(reader.take().state, packed(1))


def test_a_global_scale_inverted_within_plausible_bounds_is_seen_beside_the_live_one(tmp_path):
    """Weights of 100: 1 / scale stands for weights that a model might have; only the live weights tell."""
    grow = lambda m: jax.tree.map(lambda x: x * jnp.asarray(1000, x.dtype), nnx.state(m))  # noqa: E731
    live, new = nnx.clone(packed(0)), nnx.clone(packed(1))
    nnx.update(live, Quantizer(live)(grow(floats(0))))
    nnx.update(new, Quantizer(new)(grow(floats(1))))
    name = "layers/0/mlp/up_proj/kernel_global_scale"
    scale = orbax.flatten(nnx.state(new))[name]
    assert 1 < 1 / float(scale) < 97
    rewrite(tmp_path / "1", new, replace(name, lambda x: jnp.float32(1) / x, True))
    reader = Reader(tmp_path, live)
    assert reader.poll() is None and "is it inverted" in reader.failures[1]


def test_unfinished_and_empty_steps(tmp_path):
    publish(tmp_path, 1, packed(1), CONFIG)
    (tmp_path / "9").mkdir()  # final name, nothing in it
    shutil.copytree(tmp_path / "1", tmp_path / "8.orbax-checkpoint-tmp")  # a writer at work, or dead
    shutil.copytree(tmp_path / "1", tmp_path / ".removed-7")
    (tmp_path / "10").write_text("a file")
    (tmp_path / "latest").mkdir()
    reader = Reader(tmp_path, packed(0))
    assert reader.poll() == 1 and list(reader.failures) == [9]
    assert Reader(tmp_path / "absent", packed(0)).poll() is None


@pytest.mark.slow
def test_every_damaged_file_ends_in_right_weights_or_a_named_error(tmp_path):
    """Each file of a step: lost, a byte flipped, cut at several places. The new step's weights, or the older step's."""
    publish(tmp_path, 1, packed(1), CONFIG)
    publish(tmp_path, 2, packed(2), CONFIG)
    one, two = contents(packed(1)), contents(packed(2))
    rng = np.random.default_rng(0)
    outcomes = {1: 0, 2: 0}
    for file in sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_size):
        raw = file.read_bytes()
        flips = [("flip", int(at)) for at in rng.integers(0, len(raw), 2)]
        cuts = [("cut", int(at)) for at in {0, len(raw) - 1, int(rng.integers(0, len(raw)))}]
        for kind, at in [("lost", 0), *flips, *cuts]:
            if kind == "lost":
                file.unlink()
            else:
                file.write_bytes(raw[:at] + (bytes([raw[at] ^ 0x41]) + raw[at + 1 :] if kind == "flip" else b""))
            reader = Reader(tmp_path, packed(0))
            step = reader.poll()
            assert contents(reader.take().state) == {1: one, 2: two}[step], (file, kind, at)
            assert (2 in reader.failures) == (step == 1)
            outcomes[step] += 1
            file.write_bytes(raw)
    print(outcomes)
    assert outcomes[1] > 20


def test_a_step_removed_while_it_is_read(tmp_path, monkeypatch):
    publish(tmp_path, 1, packed(1), CONFIG)
    publish(tmp_path, 2, packed(2), CONFIG)
    load = orbax.ocp.load

    def remove_first(path, *args):
        if path.name == "2":
            shutil.rmtree(path)
        return load(path, *args)

    monkeypatch.setattr(orbax.ocp, "load", remove_first)
    reader = Reader(tmp_path, packed(0))
    assert reader.poll() == 1 and "cannot be read" in reader.failures[2]
    assert same(reader.take().state, packed(1))


def test_a_step_overtaken_from_memory_while_it_is_read_never_serves(tmp_path, monkeypatch):
    publish(tmp_path, 2, packed(2), CONFIG)
    reader = Reader(tmp_path, packed(0))
    load = orbax.ocp.load

    def slow(*args):
        assert reader.from_memory(3, floats(1)).step == 3
        return load(*args)

    monkeypatch.setattr(orbax.ocp, "load", slow)
    assert reader.poll() is None and reader.take() is None
    assert reader.active_step == 3 and not reader.failures


def test_nan_in_memory_is_refused_and_the_live_weights_stay(tmp_path):
    reader = Reader(tmp_path, packed(0))
    state = jax.tree.map(jnp.copy, nnx.state(floats(1)))
    kernel = state["layers"][1]["mlp"]["experts"]["up_proj"]
    kernel[...] = kernel[...].at[0, 1, 2].set(jnp.bfloat16(jnp.nan))
    with pytest.raises(CheckpointError, match="weights in memory: layers/1/mlp/experts: gate_up.* NaN"):
        reader.from_memory(1, state)
    assert reader.active_step == -1 and reader.from_memory(1, floats(1)).step == 1


def mesh_of(n: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:n]), ("x",))


def sharded(model: nnx.Module, n: int) -> nnx.Module:
    """Each array split over n devices along its first axis that n divides."""
    mesh = mesh_of(n)

    def place(x):
        axis = next((i for i, size in enumerate(x.shape) if size % n == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "x")
        return jax.device_put(x, NamedSharding(mesh, spec))

    out = nnx.clone(model)
    nnx.update(out, jax.tree.map(place, nnx.state(out)))
    return out


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_one_device_to_eight_and_back(tmp_path, scan):
    eight = sharded(packed(0, scan), 8)
    publish(tmp_path / "a", 1, packed(1), CONFIG)
    publish(tmp_path / "a", 2, floats(2), CONFIG)
    wanted = jax.tree.map(lambda x: x.sharding, nnx.state(eight))
    reader = Reader(tmp_path / "a", eight)
    for step in (2, 1):
        if step == 1:
            shutil.rmtree(tmp_path / "a" / "2")
            reader = Reader(tmp_path / "a", eight)
        assert reader.poll() == step, reader.failures
        state = reader.take().state
        assert same(state, packed(step, scan)) and jax.tree.map(lambda x: x.sharding, state) == wanted
    # A trainer on eight devices publishes; a rollout on one loads. And eight to two, in memory.
    publish(tmp_path / "b", 1, sharded(floats(1), 8), CONFIG)
    publish(tmp_path / "b", 2, sharded(packed(2), 8), CONFIG)
    reader = Reader(tmp_path / "b", packed(0, scan))
    assert reader.poll() == 2 and same(reader.take().state, packed(2, scan))
    shutil.rmtree(tmp_path / "b" / "2")
    reader = Reader(tmp_path / "b", packed(0, scan))
    assert reader.poll() == 1 and same(reader.take().state, packed(1, scan))
    assert same(Quantizer(eight)(sharded(floats(2, scan), 8)), packed(2, scan))


@pytest.mark.slow
def test_fifty_reloads_retrace_nothing_and_keep_memory_flat(tmp_path):
    live = packed(0)
    graphdef, params = nnx.split(live)

    @jax.jit
    def forward(params, tokens):
        positions = jnp.arange(4, dtype=jnp.int32)[None]
        return nnx.merge(graphdef, params)(tokens, positions).logits

    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    reader = Reader(tmp_path, live)
    expected = {seed: np.asarray(forward(nnx.state(packed(seed)), tokens)) for seed in (1, 2)}
    reader.from_memory(0, floats(1))
    traces, compiled = forward._cache_size(), layer_state._quantize_transposed._cache_size()
    live_arrays = []
    for step in range(1, 51):
        seed = 1 + step % 2
        if step % 2:
            weights = reader.from_memory(step, floats(seed))
        else:
            publish(tmp_path, step, (floats if step % 4 else packed)(seed), CONFIG, keep=2)
            assert reader.poll() == step, reader.failures
            weights = reader.take()
        params = weights.state
        del weights
        np.testing.assert_array_equal(np.asarray(forward(params, tokens)), expected[seed])
        if step in (10, 50):
            gc.collect()  # another test's arrays may still wait for it
            live_arrays.append(sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted()))
    assert forward._cache_size() == traces and layer_state._quantize_transposed._cache_size() == compiled
    assert live_arrays[1] <= live_arrays[0]


def test_a_decode_running_during_the_swap(tmp_path):
    """Tokens before the swap are the old weights', those after it the new ones', and each knows its version."""
    graphdef, params = nnx.split(packed(0))
    settings = decoding.Settings(new_tokens=16, cache_length=24)
    controls = decoding.Controls(jnp.float32(1), jnp.float32(1), jnp.zeros((0,), jnp.int32))
    prompt, lengths = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32), jnp.full(2, 4, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    prefill = jax.jit(lambda p: decoding.prefill(graphdef, p, prompt, lengths, keys, controls, settings))
    decode = jax.jit(lambda p, state, limit: decoding.decode(graphdef, p, state, limit, controls, settings))

    def by_hand(swap_at):
        state = prefill(nnx.state(packed(0)))
        state = decode(nnx.state(packed(0)), state, jnp.int32(swap_at))
        return np.asarray(decode(nnx.state(packed(1)), state, jnp.int32(16)).tokens)

    publish(tmp_path, 1, packed(0), CONFIG)
    with Reader(tmp_path, packed(0), poll_seconds=0.01, active_step=1) as reader:
        trainer = threading.Thread(target=publish, args=(tmp_path, 2, floats(1), CONFIG))
        version, versions = 1, [1]
        state = prefill(params)
        for step in range(2, 17):
            if step == 6:
                trainer.start()
            if step == 10:
                trainer.join()
                weights = wait_for(reader, 2)
                version, params = weights.step, weights.state
            state = decode(params, state, jnp.int32(step))
            versions.append(version)
    assert versions == [1] * 9 + [2] * 7
    np.testing.assert_array_equal(np.asarray(state.tokens), by_hand(9))
    assert decode._cache_size() == 1 and (by_hand(9) != by_hand(16)).any()


@pytest.mark.slow
def test_generate_takes_a_published_step_in_flight(tmp_path):
    """A step published while tokens are drawn serves the chunks after it, is named by their versions, and stays in the model."""

    class Published(Reader):
        looks = 0

        def take(self):
            self.looks += 1
            if self.looks == 3:  # before tokens 0, 1 and 5
                publish(tmp_path, 8, floats(1), CONFIG)
                assert self.poll() == 8
            return super().take()

    live = nnx.clone(packed(0, True))
    common = dict(max_new_tokens=12, key=jax.random.key(0), temperature=1.0)
    ids = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    reader = Published(tmp_path, live, active_step=7)
    out = nvfp4jax.generate(live, ids, weights=reader, swap_every=4, **common)
    np.testing.assert_array_equal(out.weight_versions, np.tile([7] * 5 + [8] * 7, (2, 1)))
    nothing = Reader(tmp_path / "absent", live)
    old, new = (np.asarray(nvfp4jax.generate(packed(seed, True), ids, weights=nothing, **common).tokens) for seed in (0, 1))
    np.testing.assert_array_equal(out.tokens[:, :5], old[:, :5])
    assert (np.asarray(out.tokens)[:, 5:] != old[:, 5:]).any() and (np.asarray(out.tokens) != new).any()
    assert same(live, packed(1, True)) and reader.active_step == 8
    # The next rollout begins with it, and takes nothing.
    again = nvfp4jax.generate(live, ids, weights=reader, **common)
    np.testing.assert_array_equal(again.tokens, new)
    assert (np.asarray(again.weight_versions) == 8).all()


@pytest.mark.slow
def test_bytes_moved(tmp_path):
    """Packed weights are 4.5 bits: against bfloat16, 3.5 times fewer bytes for the layers that are packed."""
    config = folders.small_config(hidden_size=256, moe_intermediate_size=256, num_experts=8, vocab_size=64, mlp_only_layers=[])
    model = models.build(config, rngs=nnx.Rngs(0))
    publish(tmp_path / "a", 1, model, config)
    publish(tmp_path / "b", 1, nvfp4jax.quantize_model(model, RULES), config)
    size = lambda path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())  # noqa: E731
    print(size(tmp_path / "a"), size(tmp_path / "b"))
    bf16, nvfp4 = (sum(leaf.size * leaf.dtype.itemsize for leaf in orbax.read_folder(tmp_path / d / "1").shapes.values()) for d in "ab")
    assert bf16 / nvfp4 > 3.3 and size(tmp_path / "b") < 1.1 * nvfp4
    assert json.loads((tmp_path / "b" / "1" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["step"] == 1
