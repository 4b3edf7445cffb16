"""The checkpoints of the tests, loaded; their raw weights by Hugging Face name, for the oracle."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
from conftest import DATA
from flax import nnx
from safetensors import safe_open

import nvfp4jax

# The references come from a model that `.to(torch.bfloat16)` had cast whole, rotary frequencies included: with the
# frequencies in float32, as published checkpoints run, the same logits differ by 3e-3.
REFERENCE_RUN = {"rope_frequency_dtype": "bfloat16"}


def config(name: str) -> dict:
    return json.loads((DATA / name / "bf16" / "config.json").read_text())


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    with safe_open(DATA / name / "bf16" / "model.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / name / "bf16" / "reference.npz"))


def load(name: str, dtype=jnp.float32, *, scan_layers: bool = False, **changes) -> nnx.Module:
    model = nvfp4jax.load_model(DATA / name / "bf16", dtype, scan_layers=scan_layers)
    model.config = dataclasses.replace(model.config, **changes)
    return model


def export(model: nnx.Module) -> dict[str, np.ndarray]:
    """The weights of an unrolled float model by their Hugging Face names, [out, in]."""
    out = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        *module, last = map(str, path)
        name = ("" if module[0] == "lm_head" else "model.") + ".".join(module)
        value = np.asarray(leaf.get_value())
        if module[-1] == "experts":
            out |= {f"{name}.{expert}.{last}.weight": v.T for expert, v in enumerate(value)}
        else:
            out[f"{name}.{'bias' if last == 'bias' else 'weight'}"] = value.T if last == "kernel" else value
    return out
