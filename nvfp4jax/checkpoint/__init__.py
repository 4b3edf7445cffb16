"""Checkpoints in and out: Hugging Face folders and Orbax folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nvfp4jax import arguments
from nvfp4jax.checkpoint import huggingface, orbax, saved_model
from nvfp4jax.checkpoint.safetensors import CheckpointError
from nvfp4jax.checkpoint.saved_model import save_model
from nvfp4jax.scaling import Name, Scaling
from nvfp4jax.swap import Rule

__all__ = ["CheckpointError", "load_model", "save_model"]


@overload
def load_model[M: nnx.Module](directory: str | Path, *, like: M) -> M: ...


@overload
def load_model(
    directory: str | Path,
    dtype: DTypeLike | None = None,
    *,
    scaling: Name | Scaling | None = None,
    scan_layers: bool = False,
    rules: Sequence[Rule] | None = None,
) -> nnx.Module: ...


def load_model(
    directory: str | Path,
    dtype: DTypeLike | None = None,
    *,
    scaling: Name | Scaling | None = None,
    scan_layers: bool = False,
    rules: Sequence[Rule] | None = None,
    like: nnx.Module | None = None,
) -> nnx.Module:
    """A model from a Hugging Face folder or an Orbax folder of ours, on the default device.

    dtype: of the activations and of weights in floating point. None: bfloat16, or as stored in an Orbax folder.
    scaling: the mode of layers that are stored in NVFP4; "static" takes the folder's input scales. None: weights only for those of a
        Hugging Face folder, as stored for those of an Orbax folder.
    scan_layers: stack layers of equal structure, so that compile time does not grow with depth.
    rules: for Hugging Face folders: quantize while loading.
    like: for the Orbax folder of a model of your own, which no config builds: the same model, float or swapped as the one saved,
        with arrays or abstract (`nnx.eval_shape`). The result is a copy of it with the folder's weights, in its dtypes, shardings
        and modes (input scales are loaded where the folder has them); the other options are its business then.

        qmodel = nvfp4jax.quantize_model(nnx.eval_shape(lambda: MyModel(rngs=nnx.Rngs(0))), rules)
        qmodel = nvfp4jax.load_model("folder", like=qmodel)

    CheckpointError (a ValueError) names the file and tensor; ValueError for options that do not go together.
    """
    directory = arguments.path("load_model: directory", directory)
    dtype = None if dtype is None else arguments.dtype("load_model: dtype", dtype)
    if like is not None:
        if given := [n for n, v in (("dtype", dtype), ("scaling", scaling), ("scan_layers", scan_layers), ("rules", rules)) if v]:
            raise ValueError(f"load_model: {given[0]} beside like: like says how the model runs (nnx.view changes its modes)")
        if not orbax.exists(directory):
            raise CheckpointError(f"{directory}: not a folder that save_model or publish has made; like= loads those only")
        return saved_model.load_like(directory, like)
    options: dict[str, Any] = {"scaling": scaling, "scan_layers": scan_layers}
    if not orbax.exists(directory):
        return huggingface.load_model(directory, jnp.bfloat16 if dtype is None else dtype, rules=rules, **options)
    if rules is not None:
        raise ValueError(f"{directory}: rules quantize while a Hugging Face folder is read; this Orbax folder has its own")
    return saved_model.load_model(directory, dtype, **options)
