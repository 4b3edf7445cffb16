"""What we write, read by the formats' own code. Optional: needs torch and compressed-tensors, here or in another interpreter.

    NVFP4JAX_TORCH_PYTHON=/path/to/python pytest tests/checkpoint/test_public_loaders.py
"""

import importlib.util
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from checkpoint import folders
from conftest import DATA

from nvfp4jax.checkpoint.convert import Selection, quantize_folder

INTERPRETER = os.environ.get("NVFP4JAX_TORCH_PYTHON")
if INTERPRETER is None and importlib.util.find_spec("compressed_tensors") is not None:
    INTERPRETER = sys.executable

DECOMPRESS = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import load_file
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig

folder, out = Path(sys.argv[1]), sys.argv[2]
config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
(scheme,) = config.config_groups.values()
index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
tensors = {}
for file in sorted(set(index.values())):
    tensors |= load_file(folder / file)
assert set(tensors) == set(index)
weights = {}
for name in tensors:
    if name.endswith(".weight_packed"):
        module = name.removesuffix(".weight_packed")
        own = {key.removeprefix(module + "."): value for key, value in tensors.items() if key.rpartition(".")[0] == module}
        weights[module] = NVFP4PackedCompressor.decompress(own, scheme)["weight"].float().numpy()
np.savez(out, **weights)
"""


@pytest.mark.skipif(INTERPRETER is None, reason="needs compressed-tensors: set NVFP4JAX_TORCH_PYTHON")
@pytest.mark.parametrize("source", ["bf16", "modelopt-nvfp4"])
def test_compressed_tensors_decompresses_what_we_write(tmp_path, source):
    selection = Selection(keep_last_n=1) if source == "bf16" else Selection()
    quantize_folder(DATA / "qwen3-moe-tiny" / source, tmp_path / "out", selection, output="compressed-tensors")
    done = subprocess.run(
        [INTERPRETER, "-c", textwrap.dedent(DECOMPRESS), str(tmp_path / "out"), str(tmp_path / "weights.npz")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(tmp_path / "weights.npz")
    assert len(theirs.files) == {"bf16": 84, "modelopt-nvfp4": 112}[source]
    for module in theirs.files:
        # It computes in bfloat16, and divides the block scale first.
        np.testing.assert_allclose(theirs[module], folders.decoded(tmp_path / "out", module), rtol=2.0**-7, atol=0)
