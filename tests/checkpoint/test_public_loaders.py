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
from conftest import DATA

from checkpoint import folders
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


MODELOPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import load_file
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

tensors = {}
for file in Path(sys.argv[1]).glob("*.safetensors"):
    tensors |= load_file(file)
weights = {}
for name in tensors:
    if name.endswith(".weight_scale_2"):
        module = name.removesuffix(".weight_scale_2")
        packed = tensors[module + ".weight"]
        q = NVFP4QTensor(torch.Size((packed.shape[0], 2 * packed.shape[1])), torch.float32, packed)
        scales = dict(scale=tensors[module + ".weight_scale"], double_scale=tensors[name], block_sizes={-1: 16})
        weights[module] = q.dequantize(dtype=torch.float32, **scales).numpy()
np.savez(sys.argv[2], **weights)
"""


def has_modelopt() -> bool:
    return INTERPRETER is not None and subprocess.run([INTERPRETER, "-c", "import modelopt.torch.quantization"], capture_output=True).returncode == 0


def test_modelopt_dequantizes_what_we_write(tmp_path):
    if not has_modelopt():
        pytest.skip("needs nvidia-modelopt: set NVFP4JAX_TORCH_PYTHON")
    quantize_folder(DATA / "qwen3-moe-tiny" / "bf16", tmp_path / "out", Selection(keep_last_n=1, four_over_six="mse"), output="modelopt")
    done = subprocess.run(
        [INTERPRETER, "-c", MODELOPT, str(tmp_path / "out"), str(tmp_path / "weights.npz")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(tmp_path / "weights.npz")
    assert len(theirs.files) == 84
    for module in theirs.files:
        # It multiplies the two scales first: one rounding more.
        np.testing.assert_allclose(theirs[module], folders.decoded(tmp_path / "out", module), rtol=2.0**-22, atol=0)
