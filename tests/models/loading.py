"""Loaders of the tests' own, apart from the library's: a bf16 Hugging Face folder, or a random model, with its weights by name."""

import functools
import json

import jax.numpy as jnp
import numpy as np
from conftest import DATA
from flax import nnx
from safetensors import safe_open

from nvfp4jax import models

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


def load(name: str, dtype=jnp.float32, *, scan_layers: bool = False, **overrides) -> nnx.Module:
    model = models.build(config(name) | overrides, dtype)
    graphdef, abstract = nnx.split(model)
    left = dict(weights(name))
    out = {}
    for path, leaf in nnx.to_flat_state(abstract):
        *module, last = path
        value = np.stack([left.pop(key).T for key in keys]) if len(keys := names(path, leaf.shape)) > 1 else left.pop(keys[0])
        value = value.T if last == "kernel" else value
        assert value.shape == leaf.shape, (path, value.shape, leaf.shape)
        out[path] = leaf.replace(jnp.asarray(value).astype(dtype))
    assert not left, left.keys()
    model = nnx.merge(graphdef, nnx.from_flat_state(out))
    return models.stack_layers(model) if scan_layers else model


def names(path: tuple, shape: tuple) -> list[str]:
    """The Hugging Face tensors that the Param at `path` of an unrolled model holds; several for experts."""
    *module, last = map(str, path)
    prefix = ("" if module[0] == "lm_head" else "model.") + ".".join(module)
    if module[-1] == "experts":
        return [f"{prefix}.{expert}.{last}.weight" for expert in range(shape[0])]
    return [f"{prefix}.{'bias' if last == 'bias' else 'weight'}"]


def export(model: nnx.Module) -> dict[str, np.ndarray]:
    """The weights of an unrolled float model by their Hugging Face names."""
    out = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(leaf.get_value())
        keys = names(path, value.shape)
        for i, key in enumerate(keys):
            out[key] = value[i].T if len(keys) > 1 else value.T if path[-1] == "kernel" else value
    return out
