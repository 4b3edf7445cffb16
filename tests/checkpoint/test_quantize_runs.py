"""A quantize run that reports success wrote what it was asked; one that cannot says so in a line and keeps what is done."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nvfp4jax
from checkpoint import folders
from checkpoint.test_huggingface import assert_same
from nvfp4jax.checkpoint import CheckpointError, load_model, orbax, safetensors
from nvfp4jax.checkpoint.convert import REPORT, Calibration, Selection, quantize_folder

CONFIG = folders.small_config(num_hidden_layers=1, mlp_only_layers=[0])


def source_of(path, seed=0, shards=2):
    return folders.write(path, CONFIG, folders.small_weights(CONFIG, seed), shards)


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("output", ["orbax", "modelopt"])
def test_one_run_at_a_time(tmp_path, output):
    """A second run of the same save-dir is refused while the first is at work, and touches nothing of it."""
    source = source_of(tmp_path / "source")
    inside, go = threading.Event(), threading.Event()
    outcome: list = []

    def waits(done, total, what):
        inside.set()
        go.wait(300)

    def first():
        try:
            outcome.append(quantize_folder(source, tmp_path / "out", output=output, progress=waits))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(300)
    try:
        with pytest.raises(CheckpointError, match=r"out: process \d+ on .* is at work there") as error:
            quantize_folder(source, tmp_path / "out", output=output)
        assert one_line(error)
    finally:
        go.set()
        thread.join(300)
    assert isinstance(outcome[0], list), outcome
    quantize_folder(source, tmp_path / "alone", output=output)
    assert_same(load_model(tmp_path / "out"), load_model(tmp_path / "alone"))
    assert sorted(os.listdir(tmp_path)) == ["alone", "out", "source"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tmp_path):
    """SIGKILL leaves the lock's file and half a folder; the next run takes both over."""
    source = source_of(tmp_path / "source")
    code = textwrap.dedent("""
        import os, signal, sys
        from nvfp4jax.checkpoint.convert import quantize_folder
        quantize_folder(sys.argv[1], sys.argv[2], output="modelopt", progress=lambda done, total, what: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL))
    """)
    environment = os.environ | {"PYTHONPATH": str(Path(nvfp4jax.__file__).parents[1]), "XLA_FLAGS": ""}
    assert subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "out")], env=environment).returncode == -9
    assert {".out.lock", "out.partial"} <= {*os.listdir(tmp_path)}
    quantize_folder(source, tmp_path / "out", output="modelopt")
    quantize_folder(source, tmp_path / "alone", output="modelopt")
    assert folders.tensors(tmp_path / "out").keys() == folders.tensors(tmp_path / "alone").keys()
    for name, value in folders.tensors(tmp_path / "alone").items():
        assert folders.tensors(tmp_path / "out")[name].tobytes() == value.tobytes(), name
    assert sorted(os.listdir(tmp_path)) == ["alone", "out", "source"]


@pytest.mark.parametrize("place", ["a piece", "the Orbax folder", "its name"])
def test_what_is_right_is_kept(tmp_path, monkeypatch, place):
    """A full disk, a name that cannot be given: one line, and started again it goes on from what is done."""
    source = source_of(tmp_path / "source")
    calls = [0]
    write, save = safetensors.Writer.write, orbax.ocp.partial.save

    def full(self, name, array):
        calls[0] += 1
        if calls[0] == 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, array)

    def unsaved(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    def denied(working, path):
        raise CheckpointError(f"{path}: cannot be given its name (Permission denied)")

    with monkeypatch.context() as patch:
        if place == "a piece":
            patch.setattr(safetensors.Writer, "write", full)
        elif place == "the Orbax folder":
            patch.setattr(orbax.ocp.partial, "save", unsaved)
        else:
            patch.setattr(orbax, "appear", denied)
        with pytest.raises(CheckpointError, match="No space left|cannot be given its name") as error:
            quantize_folder(source, tmp_path / "out")
    assert one_line(error) and "started again it goes on" in str(error.value) and save is orbax.ocp.partial.save
    kept = sorted(path.name for path in (tmp_path / "out.partial").glob("*.safetensors"))
    assert len(kept) == {"a piece": 1}.get(place, 2) and not (tmp_path / "out").exists()
    made: list[str] = []
    quantize_folder(source, tmp_path / "out", progress=lambda done, total, what: made.append(what))
    quantize_folder(source, tmp_path / "alone")
    assert_same(load_model(tmp_path / "out"), load_model(tmp_path / "alone"))
    assert sorted(os.listdir(tmp_path)) == ["alone", "out", "source"]


@pytest.mark.parametrize("output", ["orbax", "modelopt"])
def test_an_interrupted_run_is_known_by_what_it_read(tmp_path, output):
    """Another source of the same names, sizes and times in its place: nothing of the first run is taken."""
    source = source_of(tmp_path / "source")

    class Stop(BaseException):
        pass

    def stop(done, total, what):
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        quantize_folder(source, tmp_path / "out", output=output, progress=stop)
    other = source_of(tmp_path / "other", seed=1)
    for file in source.iterdir():
        times = file.stat()
        shutil.copyfile(other / file.name, file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    quantize_folder(source, tmp_path / "out", output=output)
    quantize_folder(other, tmp_path / "alone", output=output)
    assert_same(load_model(tmp_path / "out"), load_model(tmp_path / "alone"))


def test_a_source_that_changes_while_it_is_read(tmp_path):
    source = source_of(tmp_path / "source")
    file = source / "model-00001-of-00002.safetensors"

    def change(done, total, what):
        os.utime(file, ns=(0, 0))

    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: changed while it was read; start again"):
        quantize_folder(source, tmp_path / "out", output="modelopt", progress=change)
    assert not (tmp_path / "out").exists()


def test_a_config_that_promises_input_scales(tmp_path, caplog):
    """W4A4 without a scale for the activations is said, with the way out; what has them, or is weights only, needs no word."""
    source = source_of(tmp_path / "source", shards=1)
    said = "activations are quantized, but it has no input scales"
    calibration = Calibration([np.array([[1, 2, 3]])])
    for output in ("modelopt", "compressed-tensors"):
        for name, selection, options, told in (("bare", Selection(), {}, True), ("none", Selection(scaling=None), {}, False), ("given", Selection(), dict(calibration=calibration), False)):
            caplog.clear()
            quantize_folder(source, tmp_path / output / name, selection, output=output, **options)
            assert (said in caplog.text) == told, (output, name, caplog.text)
            stored = folders.tensors(tmp_path / output / name)
            assert any(key.endswith(("input_scale", "input_global_scale")) for key in stored) == (name == "given")
        assert json.loads((tmp_path / output / "none" / REPORT).read_text())
    assert {v.dtype for v in stored.values()} >= {np.dtype(np.uint8), np.dtype(ml_dtypes.bfloat16)}
