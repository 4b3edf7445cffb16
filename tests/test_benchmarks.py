"""The benchmarks that run anywhere, on a tiny model: they end, and their table and JSON hold what they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import aot
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rollout_floor():
    """By hand, for 64 rows of Qwen3-30B-A3B with 1024 slots: 5.5 ms, of which the cache is 1.5 and a bfloat16 head 0.14."""
    bench = load("bench_rollout")
    config = bench.config_of("qwen3-30b-a3b", 48)
    from nvfp4jax import Rule, quantize_model
    from nvfp4jax.models import build, stack_layers

    model = stack_layers(quantize_model(build(config), [Rule("lm_head|.*/mlp/gate", skip=True), Rule(".*")]))
    reached = 1 - (1 - 8 / 128) ** 64
    packed = 48 * 0.5625 * (2048 * 128 * (2 * 32 + 2 * 4) + reached * 128 * 3 * 2048 * 768)
    floats = 2 * (151936 * 2048 + 48 * 2048 * 128)
    by_hand = (packed + floats + 48 * 2 * 64 * 4 * 1024 * 128 * 2) / 4.3e12
    assert bench.floor(config, model, 64, 1024) == pytest.approx(by_hand, rel=0.01)
    assert bench.by_kind({"kernel_mosaic_gpu_kernel": (5.0, 2), "memcpy32_post": (1.0, 1), "anything": (2.0, 1)}) == {
        "FP4 matmul": 5.0, "the rest": 2.0, "copy": 1.0}  # fmt: skip


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not aot.available(), reason="needs the extra `aot`")
def test_compile():
    out = subprocess.run([sys.executable, str(FOLDER / "bench_compile.py"), "--geometries", "tiny"], check=True, capture_output=True, text=True).stdout
    kinds = [line.split()[:2] for line in out.splitlines()[1:]]
    assert kinds == [["tiny", "stacked"], ["tiny", "unrolled"]]


@pytest.mark.slow
def test_rollout(tmp_path):
    file = tmp_path / "found.json"
    argv = ["--geometry", "tiny", "--layers", "1", "--batches", "2", "--contexts", "16", "--prefill", "2x8", "--steps", "8",
            "--cache-dtype", "float8_e4m3fn", "--json", str(file)]  # fmt: skip
    out = subprocess.run([sys.executable, str(FOLDER / "bench_rollout.py"), *argv], check=True, capture_output=True, text=True).stdout
    assert [r["kind"] for r in json.loads(file.read_text())] == ["prefill", "decode"]
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 4


@pytest.mark.slow
def test_rollout_through_a_queue(tmp_path):
    file = tmp_path / "found.json"
    argv = ["--geometry", "tiny", "--layers", "1", "--scalings", "bf16", "--batches", "--prefix-prompts", "5", "--prefix", "140", "--own", "10",
            "--mean", "4", "--new", "8", "--rows-in-flight", "2", "--json", str(file)]  # fmt: skip
    subprocess.run([sys.executable, str(FOLDER / "bench_rollout.py"), *argv], check=True)
    batches, queue = json.loads(file.read_text())
    assert [r["kind"] for r in (batches, queue)] == ["prefix, shared, batches of 2", "prefix, shared, a queue of 2"]
    assert batches["mean_tokens"] == queue["mean_tokens"] > 1 and queue["tokens_per_s"] > 0


@pytest.mark.slow
def test_new_weights_in_a_rollout(tmp_path):
    file = tmp_path / "found.json"
    argv = ["--geometry", "tiny", "--unrolled", "--scalings", "token", "bf16", "--batches", "--reload", "2x16", "--json", str(file)]
    subprocess.run([sys.executable, str(FOLDER / "bench_rollout.py"), *argv], check=True)
    (found,) = json.loads(file.read_text())  # nothing to quantize in bfloat16
    assert found["kind"] == "new weights in a rollout" and found["requantize_ms"] > 0 and found["floor_ms"] > 0


@pytest.mark.slow
def test_rollout_of_samples_and_of_a_prefix(tmp_path):
    file = tmp_path / "found.json"
    argv = ["--geometry", "tiny", "--layers", "1", "--scalings", "bf16", "--batches", "--prompts", "2", "--samples", "2",
            "--length", "130", "--prefix-prompts", "3", "--prefix", "140", "--own", "10", "--mean", "4", "--new", "8", "--json", str(file)]  # fmt: skip
    subprocess.run([sys.executable, str(FOLDER / "bench_rollout.py"), *argv], check=True)
    found = json.loads(file.read_text())
    kinds = [f"{what}, {how}" for how in ("shared", "repeated") for what in ("2 samples", "prefix")]
    assert [r["kind"] for r in found] == kinds and all(r["tokens_per_s"] > 0 and 0 < r["floor_ms"] for r in found)
    assert found[0]["floor_ms"] < found[2]["floor_ms"] and 1 <= found[1]["mean_tokens"] <= 8
