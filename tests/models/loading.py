"""A loader of the tests' own, apart from the library's: a bf16 Hugging Face folder into a model."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from nvfp4jax import models

DATA = pathlib.Path(__file__).parents[1] / "data"


# The references come from a model that `.to(torch.bfloat16)` had cast whole, rotary frequencies included: with the
# frequencies in float32, as published checkpoints run, the same logits differ by 3e-3.
REFERENCE_RUN = {"rope_frequency_dtype": "bfloat16"}


def config(name: str) -> dict:
    return json.loads((DATA / name / "bf16" / "config.json").read_text())


def load(name: str, dtype=jnp.float32, *, scan_layers: bool = False, **overrides):
    folder = DATA / name / "bf16"
    model = models.build(config(name) | overrides, dtype)
    graphdef, abstract = nnx.split(model)
    with safe_open(folder / "model.safetensors", "flax") as file:
        left = set(file.keys())

        def read(key: str):
            left.discard(key)
            return file.get_tensor(key)

        out = {}
        for path, leaf in nnx.to_flat_state(abstract):
            *module, name = map(str, path)
            key = ("" if module[0] == "lm_head" else "model.") + ".".join(module)
            if module[-1] == "experts":
                count = leaf.shape[0]
                value = jnp.stack([read(f"{key}.{e}.{name}.weight").T for e in range(count)])
            else:
                value = read(f"{key}.{'bias' if name == 'bias' else 'weight'}")
                value = value.T if name == "kernel" else value
            assert value.shape == leaf.shape, (path, value.shape, leaf.shape)
            out[path] = leaf.replace(value.astype(dtype))
    assert not left, left
    model = nnx.merge(graphdef, nnx.from_flat_state(out))
    return models.stack_layers(model) if scan_layers else model


def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / name / "bf16" / "reference.npz"))
