"""What Triton's own compiler makes of each kernel, for GPUs that are not there: no spills, shared memory within the architecture's
limit, the matrix instruction, the packed product of the decode. Compiled in a process of its own, since here Triton interprets."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton (pip install 'nvfp4jax[triton]')")

ROOT = pathlib.Path(__file__).parents[3]
INSTRUCTION = {75: None, 80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Few and many tokens; K that ends in a part of a chunk; segments; experts with few rows and with many.
CASES = [
    "dense-16-33792-8192", "dense-64-33792-8192", "dense-3-70-272", "dense-8-1024-2048", "dense-1024-4096-2048",
    "gated-8-128-768-2048", "gated-8192-128-768-2048", "grouped-512-128-2048-768", "combine-64-8-2048", "plain-64-2048-none-none",
    "quantize-64-2048-tensor-none", "operand-64-8192-token-mae", "norm-64-2048-token-none", "silu-64-768-tensor_pow2-none",
]  # fmt: skip

# Stores and loads of what found no register: a row of 8192 with four-over-six' two candidates fills the 128 of each of 512 threads, and
# 1024 threads of 64 spill more.
SPILLED = {(100, "operand-64-8192-token-mae"): 2}


def compiled(sm, *cases):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "triton_compile.py"), str(sm), *cases], env=environment, cwd=ROOT,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(sm, reports):
    sys.path.insert(0, str(ROOT))
    from nvfp4jax.kernels.triton import decode

    for r in reports:
        what = r["case"], r["kernel"], r["constants"]
        assert r["spills"] <= SPILLED.get((sm, r["case"]), 0) and r["local"] == 0, what
        assert r["shared"] <= decode.shared_memory(sm), what
        if r["kernel"] in ("dense_kernel", "grouped_kernel"):
            assert r["f16x2"] > 0, what
            if INSTRUCTION[sm] is None:  # Triton has no matrix instruction before 8.0
                assert not r["matrix"], what
            else:  # one for every tile: a row's bits depend on it
                assert len(r["matrix"]) == 1 and next(iter(r["matrix"])).startswith(INSTRUCTION[sm]), (what, r["matrix"])


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_a_few_kernels_compile(sm):
    check(sm, compiled(sm, "dense-16-33792-8192", "norm-64-2048-token-none"))


@pytest.mark.slow
@pytest.mark.parametrize("sm", sorted(INSTRUCTION))
def test_every_kernel_compiles(sm):
    reports = compiled(sm, *CASES)
    assert {r["case"] for r in reports} == set(CASES)
    check(sm, reports)
