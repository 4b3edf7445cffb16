"""A reader never stops: whatever lies in a directory, it serves right weights, says what it refused, and takes the next good step.

The oracle is what the trainer had in memory: `net(seed)`'s own arrays, packed before anything was written.
"""

import errno
import functools
import os
import shutil
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nvfp4jax
from checkpoint import folders
from nvfp4jax import models
from nvfp4jax.checkpoint import CheckpointError, orbax, reload, saved_model
from nvfp4jax.checkpoint.reload import Reader, publish

# Orbax leaves its other reads unawaited when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning", "ignore::ResourceWarning")
CONFIG = {"any": "json"}


class Net(nnx.Module):
    """Somebody's own module: one layer to pack, with a bias, and one that stays."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(32, 32, param_dtype=jnp.bfloat16, rngs=rngs)
        self.head = nnx.Linear(32, 4, param_dtype=jnp.bfloat16, use_bias=False, rngs=rngs)


@functools.cache
def floats(seed: int) -> nnx.Module:
    net = Net(nnx.Rngs(seed))
    net.inner.bias.set_value(jnp.full(32, seed, jnp.bfloat16))
    nnx.update(net, jax.device_put(nnx.state(net), jax.devices()[0]))
    return net


@functools.cache
def net(seed: int) -> nnx.Module:
    return nvfp4jax.quantize_model(floats(seed), [nvfp4jax.Rule("inner")])


def contents(state) -> dict[str, bytes]:
    state = nnx.state(state) if isinstance(state, nnx.Module) else state
    return {path: np.asarray(leaf).tobytes() for path, leaf in orbax.flatten(state).items()}


def served(reader: Reader, seconds: float = 30.0):
    """The weights that a reader's thread brings within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (weights := reader.take()) is not None:
            return weights
        time.sleep(0.01)
    raise AssertionError(f"nothing came: {reader.health()}")


def test_a_directory_that_cannot_be_listed_for_a_while(tmp_path, monkeypatch):
    steps, calls = reload.steps, [0]

    def flaky(directory):
        calls[0] += 1
        if 2 <= calls[0] <= 4:
            raise OSError(errno.ESTALE, "Stale file handle", str(directory))
        return steps(directory)

    monkeypatch.setattr(reload, "steps", flaky)
    with Reader(tmp_path, net(0), poll_seconds=0.02) as reader:
        while calls[0] < 3:
            time.sleep(0.005)
        assert "Stale file handle" in reader.health().problem
        publish(tmp_path, 1, net(1), CONFIG)
        assert contents(served(reader).state) == contents(net(1))
        health = reader.health()
        assert health.watching and health.problem is None and health.serving == 1 and abs(health.since - time.time()) < 60


def _pipe(file):
    file.unlink()
    os.mkfifo(file)


def _device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def _elsewhere(file):
    outside = file.parents[len(file.parents) - 2] / f"nvfp4jax-outside-{os.getpid()}-{file.name}"
    shutil.move(file, outside)
    file.symlink_to(outside)


def _huge(file):
    with open(file, "r+b") as opened:
        opened.truncate(2**40)  # sparse


def _deep(file):
    file.write_bytes(b"[" * 1_000_000)


@pytest.mark.parametrize("place", [_pipe, _device, _huge, _deep])
def test_nothing_in_a_step_blocks_or_fills_the_memory(tmp_path, place):
    publish(tmp_path, 1, net(1), CONFIG)
    publish(tmp_path, 2, net(2), CONFIG)
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    if place in (_huge, _deep):
        files = [file for file in files if file.name in ("_CHECKPOINT_METADATA", "_METADATA", "process_0")]
    for file in files:
        raw = file.read_bytes()
        place(file)
        reader, begin = Reader(tmp_path, net(0)), time.monotonic()
        step = reader.poll()
        assert time.monotonic() - begin < 10, file
        if place in (_huge, _deep) and file.name == "process_0":  # Orbax may do without it
            assert contents(reader.take().state) == contents(net(step))
        else:
            assert step == 1 and list(reader.failures) == [2] and "\n" not in reader.failures[2], (file, reader.failures)
            assert contents(reader.take().state) == contents(net(1))
        file.unlink()
        file.write_bytes(raw)
        # The files are others now: the same reader tries the step again.
        assert reader.poll() in (2, None) and (step == 2 or contents(reader.take().state) == contents(net(2)))


@pytest.mark.parametrize("make", [net, floats], ids=["packed", "float"])
def test_a_pipe_that_comes_while_a_step_is_loaded(tmp_path, monkeypatch, make):
    """After the look at the folder, and before its files are opened: the load fails, nothing waits for a writer."""
    publish(tmp_path, 1, net(1), CONFIG)
    publish(tmp_path, 2, make(2), CONFIG)
    load = orbax.ocp.load

    def swapped(path, *args, **options):
        if path.name == "2":
            for file in [*path.glob("state/d/*"), *path.glob("state/ocdbt.process_0/d/*")]:
                file.unlink()
                os.mkfifo(file)
        return load(path, *args, **options)

    monkeypatch.setattr(orbax.ocp, "load", swapped)
    reader, got = Reader(tmp_path, net(0), float_model=floats(0)), []
    thread = threading.Thread(target=lambda: got.append(reader.poll()), daemon=True)
    thread.start()
    thread.join(120)
    assert got == [1] and contents(reader.take().state) == contents(net(1))
    publish(tmp_path, 3, make(3), CONFIG)
    assert reader.poll() == 3


def test_links_within_a_step_and_to_a_whole_step(tmp_path):
    publish(tmp_path / "a", 1, net(1), CONFIG)
    step = tmp_path / "a" / "1"
    manifest = next(step.rglob("manifest.ocdbt"))
    shutil.move(manifest, step / "kept")
    manifest.symlink_to(step / "kept")
    reader = Reader(tmp_path / "a", net(0))
    assert reader.poll() == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "7").symlink_to(step)  # the metadata say step 1
    (tmp_path / "b" / "8").symlink_to(tmp_path / "b" / "8")
    (tmp_path / "b" / "9").symlink_to(tmp_path / "nowhere")
    reader = Reader(tmp_path / "b", net(0))
    assert reader.poll() is None and list(reader.failures) == [7]
    _elsewhere(step / "kept")
    reader = Reader(tmp_path / "a", net(0))
    assert reader.poll() is None and "is a link to something else" in reader.failures[1]


TRANSIENT = [
    MemoryError(),
    TimeoutError("the server did not answer"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."),
    Exception("UNAVAILABLE: connection reset"),
    RuntimeError("something that nobody has seen before"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: type(error).__name__)
def test_what_may_pass_is_tried_again(tmp_path, monkeypatch, caplog, error):
    publish(tmp_path, 1, net(1), CONFIG)
    load, calls = orbax.ocp.load, []

    def flaky(*args):
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise error
        return load(*args)

    monkeypatch.setattr(orbax.ocp, "load", flaky)
    monkeypatch.setattr(reload, "_FIRST_RETRY_SECONDS", 0.2)
    with Reader(tmp_path, net(0), poll_seconds=0.01) as reader:
        health = reader.health()
        assert list(health.retried) == [1] and not health.refused and health.ready is None
        assert contents(served(reader).state) == contents(net(1))
    assert calls[1] - calls[0] > 0.19 and not reader.failures
    assert len([r for r in caplog.records if "tried again" in r.getMessage()]) == 1


def test_retries_become_rare_and_damage_is_final(tmp_path, monkeypatch, caplog):
    publish(tmp_path, 1, net(1), CONFIG)
    publish(tmp_path, 2, net(2), CONFIG)
    load, tried, failure = orbax.ocp.load, {"1": 0, "2": 0}, [OSError(errno.EIO, "Input/output error")]

    def broken(path, *args):
        tried[path.name] += 1
        if path.name == "2":
            raise failure[0]
        return load(path, *args)

    monkeypatch.setattr(orbax.ocp, "load", broken)
    monkeypatch.setattr(reload, "_FIRST_RETRY_SECONDS", 0.05)
    with Reader(tmp_path, net(0), poll_seconds=0.01) as reader:
        assert served(reader).step == 1
        time.sleep(1.0)
    assert 2 <= tried["2"] <= 6, tried  # at 0, 0.05, 0.15, 0.35, 0.75
    failure[0] = ValueError("DATA_LOSS: the checksum is wrong")
    reader = Reader(tmp_path, net(0), active_step=1)
    before = tried["2"]
    assert reader.poll() is None and reader.poll() is None and tried["2"] == before + 1
    assert list(reader.health().refused) == [2] and not reader.health().retried
    assert len([r for r in caplog.records if "step 2 is refused" in r.getMessage()]) == 1


def test_a_failure_of_a_step_that_is_gone_is_forgotten(tmp_path):
    for step in range(20):
        (tmp_path / str(step)).mkdir()
    reader = Reader(tmp_path, net(0))
    assert reader.poll() is None and len(reader.failures) == 20
    for step in range(20):
        (tmp_path / str(step)).rmdir()
    assert reader.poll() is None and not reader.failures


def test_odd_names_are_no_steps(tmp_path):
    publish(tmp_path, 7, net(1), CONFIG)
    for name in ("07", "+8", "9 ", " 9", "\u0669", "1e3", "-1", "0x10", "1" * 19, "10.orbax-checkpoint-tmp", "nine\n"):
        shutil.copytree(tmp_path / "7", tmp_path / name)
    (tmp_path / "11").write_text("no folder")
    os.mkfifo(tmp_path / "12")
    assert reload.steps(tmp_path) == [7] and Reader(tmp_path, net(0)).poll() == 7
    assert reload.steps(tmp_path / "11") == [] and reload.steps(tmp_path / "absent") == []


def test_never_three_copies(tmp_path):
    """While step 2 is loaded, step 1 (ready, not taken) is given up; the live weights are whole."""
    publish(tmp_path, 1, net(1), CONFIG)
    live = net(0)
    reader = Reader(tmp_path, live)
    assert reader.poll() == 1
    ready = [weakref.ref(leaf) for leaf in jax.tree.leaves(reader._staged.weights.state) if leaf.size > 1]
    publish(tmp_path, 2, floats(2), CONFIG)
    load, alive = reader._quantizer.load, []
    reader._float_model = floats(0)

    def watched(*args):
        alive.append([ref() for ref in ready if ref() is not None])
        return load(*args)

    reader._quantizer.load = watched
    assert reader.poll() == 2 and alive == [[]]
    assert contents(reader.take().state) == contents(net(2)) and contents(live) == contents(net(0))


@pytest.mark.slow
def test_float_steps_are_loaded_in_pieces(tmp_path, monkeypatch):
    from nvfp4jax.checkpoint import quantizer

    config = folders.small_config()
    model = models.build(config, rngs=nnx.Rngs(1))
    rules = [nvfp4jax.Rule("lm_head|.*/mlp/gate", skip=True), nvfp4jax.Rule(".*")]
    publish(tmp_path, 1, model, config)
    monkeypatch.setattr(quantizer, "PIECE_BYTES", 20_000)
    load, sizes = orbax.restore_leaves, []

    def watched(folder, wanted, **options):
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values()))
        return load(folder, wanted, **options)

    monkeypatch.setattr(orbax, "restore_leaves", watched)
    live = models.stack_layers(nvfp4jax.quantize_model(models.build(config, rngs=nnx.Rngs(0)), rules))
    reader = Reader(tmp_path, live)
    assert reader.poll() == 1, reader.failures
    assert len(sizes) >= 3 and max(sizes) < 0.7 * sum(sizes)
    expected = models.stack_layers(nvfp4jax.quantize_model(model, rules))
    assert contents(reader.take().state) == contents(expected)


def test_what_is_ready_is_not_replaced_before_a_taker_can_meet_it(tmp_path):
    """A trainer that publishes faster than a reader loads must not starve the rollout."""
    reader = Reader(tmp_path, net(0), poll_seconds=5.0)
    publish(tmp_path, 1, net(1), CONFIG)
    reader._look(patient=True)
    publish(tmp_path, 2, net(2), CONFIG)
    reader._look(patient=True)
    assert reader.health().ready == 1
    assert reader.poll() == 2  # who asks himself takes next


def test_a_with_block_again_and_twice(tmp_path):
    reader = Reader(tmp_path, net(0), poll_seconds=0.01)
    for step in (1, 2):
        with reader:
            publish(tmp_path, step, net(step), CONFIG)
            assert served(reader).step == step
            with pytest.raises(RuntimeError, match="in a `with` block already"):
                reader.__enter__()
        assert not reader.health().watching


def test_weights_in_memory_that_were_overtaken(tmp_path):
    publish(tmp_path, 6, net(2), CONFIG)
    reader = Reader(tmp_path, net(0))
    made = reader._quantizer.__call__

    def slow(*args, **options):
        assert reader.poll() == 6 and reader.take().step == 6
        return made(*args, **options)

    reader._quantizer = slow
    with pytest.raises(CheckpointError, match="step 5 is not after step 6, which serves"):
        reader.from_memory(5, floats(1))
    assert reader.active_step == 6 and reader.take() is None


def test_weights_in_memory_share_nothing_with_the_trainer(tmp_path):
    """The trainer's next step donates all it has, the bias of a packed layer among it."""
    trainer = jax.tree.map(jnp.copy, nnx.state(floats(3)))
    state = Reader(tmp_path, net(0)).from_memory(1, trainer).state
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)(trainer))
    for leaf in jax.tree.leaves(trainer):
        leaf.delete()
    assert contents(state) == contents(net(3))


def test_a_trainer_goes_back(tmp_path):
    """600 serves, the trainer restarts from 500: 501 is newer than 600, and so is the new 600."""
    reader = Reader(tmp_path, net(0))
    for step, seed in ((500, 1), (600, 2)):
        publish(tmp_path, step, net(seed), CONFIG)
        assert reader.poll() == step and reader.take().step == step
    with pytest.raises(CheckpointError, match="501 is not after step 600.*rewind=True"):
        publish(tmp_path, 501, net(3), CONFIG)
    publish(tmp_path, 501, net(3), CONFIG, rewind=True)
    assert reload.steps(tmp_path) == [500, 501] and sorted(os.listdir(tmp_path)) == [".generation", "500", "501"]
    assert reader.poll() == 501 and contents(reader.take().state) == contents(net(3))
    assert reader.poll() is None
    publish(tmp_path, 600, net(4), CONFIG)
    assert reader.poll() == 600 and contents(reader.take().state) == contents(net(4))
    # The very step that serves, trained anew while the reader looked away.
    publish(tmp_path, 600, net(5), CONFIG, rewind=True)
    assert reader.poll() == 600 and contents(reader.take().state) == contents(net(5))
    # A bad step of the new line: what is older than what serves is not taken for it.
    publish(tmp_path, 501, net(6), CONFIG, rewind=True)
    next((tmp_path / "501").rglob("manifest.ocdbt")).unlink()
    assert reader.poll() is None and list(reader.failures) == [501] and reader.active_step == 600
    # The line goes on though none of its steps can be read.
    (tmp_path / "501" / "_CHECKPOINT_METADATA").unlink()
    publish(tmp_path, 502, net(7), CONFIG)
    assert reader.poll() == 502 and contents(reader.take().state) == contents(net(7))


def test_a_trainer_goes_back_in_memory(tmp_path):
    publish(tmp_path, 9, net(1), CONFIG)
    reader = Reader(tmp_path, net(0))
    assert reader.poll() == 9 and reader.take().step == 9
    with pytest.raises(CheckpointError, match="step 4 is not after step 9.*rewind=True"):
        reader.from_memory(4, floats(2))
    assert reader.from_memory(4, floats(2), rewind=True).step == reader.active_step == 4
    assert reader.poll() is None  # step 9 lies there, and is of the line that was left
    publish(tmp_path, 5, net(3), CONFIG, rewind=True)
    assert reader.poll() == 5 and contents(reader.take().state) == contents(net(3))


SMALL = folders.small_config()


@pytest.mark.parametrize(
    "key, value", [("rope_theta", 1e5), ("rms_norm_eps", 1e-3), ("num_experts_per_tok", 1), ("norm_topk_prob", False), ("hidden_act", "gelu")]
)
def test_a_step_of_another_function_is_refused(tmp_path, key, value):
    """Same shapes, another config: no check of bytes would notice."""
    live = models.build(SMALL, rngs=nnx.Rngs(0))
    other = SMALL | {key: value}
    if key != "hidden_act":
        publish(tmp_path, 1, models.build(other, rngs=nnx.Rngs(1)), other)
    else:
        with pytest.raises(CheckpointError, match="hidden_act"):
            publish(tmp_path, 1, live, other)
        saved_model.save_model(tmp_path / "1", live, other)
    with pytest.raises(CheckpointError, match="another function|cannot be read"):
        publish(tmp_path, 2, live, other)
    assert reload.steps(tmp_path) == [1]
    publish(tmp_path, 2, live, SMALL | {"transformers_version": "5"})
    shutil.copytree(tmp_path / "2", tmp_path / "kept")
    shutil.rmtree(tmp_path / "2")
    reader = Reader(tmp_path, live)
    assert reader.poll() is None and reader.health().refused
    os.rename(tmp_path / "kept", tmp_path / "2")
    assert reader.poll() == 2, reader.failures


@pytest.mark.slow
def test_a_bad_float_step_does_not_spoil_the_next(tmp_path):
    rules = [nvfp4jax.Rule("lm_head|.*/mlp/gate", skip=True), nvfp4jax.Rule(".*")]
    build = lambda seed, config=SMALL, dtype=jnp.bfloat16: models.build(config, dtype, rngs=nnx.Rngs(seed))  # noqa: E731
    live = nvfp4jax.quantize_model(build(0), rules)
    reader = Reader(tmp_path, live)
    wide = SMALL | {"moe_intermediate_size": 32}
    publish(tmp_path, 1, build(1, wide), wide)
    assert reader.poll() is None and "moe_intermediate_size is 32, not 16" in reader.failures[1]
    publish(tmp_path, 2, build(2, SMALL, jnp.float32), SMALL)  # float32 masters are no mistake
    assert reader.poll() == 2 and reader.take().step == 2
    publish(tmp_path, 3, build(3), SMALL)
    assert reader.poll() == 3, reader.failures
    assert contents(reader.take().state) == contents(nvfp4jax.quantize_model(build(3), rules))


def test_reloads_leave_no_objects_behind(tmp_path):
    """Objects that the garbage collector sees, after the caches are warm: no more of them with each reload."""
    import gc

    publish(tmp_path, 1, net(1), CONFIG)
    reader, counts = Reader(tmp_path, net(0)), []
    for i in range(30):
        reader.active_step, reader._staged = -1, None
        assert reader.poll() == 1 and reader.take().step == 1
        if i in (9, 29):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 20, counts


def test_the_versions_of_tokens(tmp_path):
    """A step that is there serves from the first token; a step is any number of up to 18 digits; the model's own weights are none."""
    step = 202611291037
    live = models.build(SMALL, rngs=nnx.Rngs(0))
    publish(tmp_path, step, models.build(SMALL, rngs=nnx.Rngs(1)), SMALL)
    ids = np.asarray([[1, 2, 3]])
    with Reader(tmp_path, nnx.clone(live)) as reader:
        out = nvfp4jax.generate(nnx.clone(live), ids, max_new_tokens=3, weights=reader)
    assert (out.weight_versions == step).all()
    free = nvfp4jax.generate(models.build(SMALL, rngs=nnx.Rngs(1)), ids, max_new_tokens=3)
    np.testing.assert_array_equal(out.tokens, free.tokens)
    stop = int(free.tokens[0, 0])
    out = nvfp4jax.generate(live, ids, max_new_tokens=3, weights=Reader(tmp_path / "absent", live), stop_tokens=[stop])
    sampled = np.arange(3) < np.asarray(out.lengths)[:, None]
    np.testing.assert_array_equal(out.weight_versions, np.where(sampled, -2, -1))


def test_the_thread_takes_what_two_trainers_in_this_process_publish(tmp_path):
    """Saves beside loads in one process, through Orbax's global state: every step right, no publish fails, the thread lives."""
    failed, wrong = [], []

    def train(first):
        for step in range(first, first + 12, 2):
            try:
                publish(tmp_path, step, net(step), CONFIG, keep=50)
            except CheckpointError as error:
                if "is not after" not in str(error):
                    failed.append(error)
            time.sleep(0.02)

    with Reader(tmp_path, net(0), poll_seconds=0.005) as reader:
        trainers = [threading.Thread(target=train, args=(first,)) for first in (1, 2)]
        [t.start() for t in trainers]
        while any(t.is_alive() for t in trainers) or reader.health().serving < reload.steps(tmp_path)[-1]:
            if (weights := reader.take()) is not None and contents(weights.state) != contents(net(weights.step)):
                wrong.append(weights.step)
            time.sleep(0.002)
    assert not failed and not wrong and reader.health().problem is None


def test_a_reader_that_cannot_be(tmp_path):
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="poll_seconds"):
            Reader(tmp_path, net(0), poll_seconds=seconds)
