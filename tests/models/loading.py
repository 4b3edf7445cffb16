"""The checkpoints of the tests, loaded; their raw weights by Hugging Face name, for the oracle."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import DATA
from flax import nnx
from safetensors import safe_open

import nvfp4jax
from nvfp4jax import models


def config(name: str) -> dict:
    return json.loads((DATA / name / "bf16" / "config.json").read_text())


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    with safe_open(DATA / name / "bf16" / "model.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / name / "bf16" / "reference.npz"))


def right_padded(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, valid, logits of the reference), its rows moved to the left end."""
    ref = reference(name)
    order = np.argsort(ref["attention_mask"] == 0, axis=1, kind="stable")
    move = lambda x: np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    return move(ref["input_ids"]), move(ref["attention_mask"]) == 1, move(ref["logits_f32"])


@functools.cache
def _loaded(name: str, dtype, scan_layers: bool) -> nnx.Module:
    return nvfp4jax.load_model(DATA / name / "bf16", dtype, scan_layers=scan_layers)


def load(name: str, dtype=jnp.float32, *, scan_layers: bool = False) -> nnx.Module:
    """The model of a folder, read once in a process; the caller's own copy."""
    return nnx.clone(_loaded(name, jnp.dtype(dtype), scan_layers))


@functools.cache
def _forward(flags: tuple):
    return jax.jit(lambda graphdef, state, *args: nnx.merge(graphdef, state)(*args[:2], None, valid=args[2], **dict(flags)))


def run(model: nnx.Module, tokens: np.ndarray, valid: np.ndarray | None = None, **flags) -> models.Output:
    """The forward of right-padded rows [B, T] without a cache, compiled once for each structure."""
    tokens = np.asarray(tokens, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid)
    return _forward(tuple(flags.items()))(*nnx.split(model), *map(jnp.asarray, (tokens, positions, valid)))


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
