"""Hugging Face folders into models: bfloat16, FP8 by blocks, ModelOpt NVFP4 and compressed-tensors NVFP4.

A model's module paths are the checkpoint's names with '/' and without 'model.', so the names follow from the paths. NVFP4 weights
keep their own bytes. Modules are read one at a time, experts one expert at a time; no layer is ever held in bfloat16 and NVFP4 both.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nvfp4jax import models
from nvfp4jax.checkpoint import formats
from nvfp4jax.checkpoint.formats import BLOCK, E4M3, Checkpoint, PackedWeight
from nvfp4jax.checkpoint.safetensors import CheckpointError
from nvfp4jax.layers import Experts, InputAmax, InputScale, NVFP4Experts, NVFP4Linear, quantize_weight
from nvfp4jax.scaling import Name, Scaling, Static
from nvfp4jax.swap import Rule, path_string, quantize_model

_log = logging.getLogger(__name__)

# What a float module's Params are called in a checkpoint, where the names differ.
_TENSOR_OF_PARAM = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# Tensors that no model here computes with, left out without a word.
_IGNORED = re.compile(r".*(\.rotary_emb\.inv_freq|[_.]input_scale|\.input_global_scale|\.[kv]_scale)")


def module_name(path: Sequence[Any]) -> str:
    """('layers', 0, 'mlp', 'up_proj') -> 'model.layers.0.mlp.up_proj'; the head has no prefix."""
    name = ".".join(map(str, path))
    return name if name == "lm_head" else f"model.{name}"


def tensor_of_param(param: str) -> str:
    """'kernel' -> 'weight': what a float module's Param is called in a checkpoint."""
    return _TENSOR_OF_PARAM.get(param, param)


def quantizable(model: nnx.Module) -> dict[tuple, nnx.Module]:
    """The modules of one of our models that can be held in NVFP4, by path: linears and experts."""
    return {tuple(path): module for path, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear | Experts)}


def is_packed(checkpoint: Checkpoint, path: Sequence[Any], module: nnx.Module) -> bool:
    """Whether the checkpoint stores a quantizable module in NVFP4. CheckpointError where only some of the experts are."""
    name = module_name(path)
    if not isinstance(module, Experts | NVFP4Experts):
        return formats.is_packed(checkpoint, name)
    modules = []
    for projection in ("gate_proj", "up_proj", "down_proj"):
        fused = formats.fused_experts(checkpoint, name, projection)
        modules += [f"{name}.{e}.{projection}" for e in range(module.num_experts)] if fused is None else [fused.removesuffix(".weight")]
    packed = [formats.is_packed(checkpoint, m) for m in modules]
    if any(packed) != all(packed):
        raise CheckpointError(f"{checkpoint.directory}: {modules[packed.index(True)]!r} is NVFP4, {modules[packed.index(False)]!r} is not: "
                              "the experts of a layer must be stored alike")
    return packed[0]


@dataclasses.dataclass
class Notes:
    """What a load has to tell, gathered so that each thing is said once."""

    used: set[str] = dataclasses.field(default_factory=set)
    reconciled: list[str] = dataclasses.field(default_factory=list)


def _quantize(w: np.ndarray, layer: nnx.Module, name: str) -> PackedWeight:
    array = quantize_weight(jnp.asarray(w), layer.weight_four_over_six, name)
    return PackedWeight(*(np.asarray(v) for v in (array.packed, array.scale, array.global_scale)))


def _input_scale(weights: Sequence[PackedWeight], checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The input scale of weights that see the same activation: the largest."""
    if any(w.input_scale is None for w in weights):
        raise CheckpointError(f"{checkpoint.directory}: {name!r} has no input_scale, which scaling='static' needs; calibrate on some "
                              "prompts (see nvfp4jax.calibrate), or use an online mode")
    return np.asarray(np.max([w.input_scale for w in weights]), np.float32)


def _check_size(checkpoint: Checkpoint, name: str, shape: tuple[int, int, int]) -> None:
    """Before memory is taken for all experts of a layer: the folder must hold as much."""
    weights = 3 * math.prod(shape)
    if weights > 2 * sum(info.nbytes for info in checkpoint.tensors.values()):
        raise CheckpointError(f"{checkpoint.directory}: {name!r}: {shape[0]} experts of {shape[1:]} are more than the folder holds")


def _linear(checkpoint: Checkpoint, path: Sequence[Any], layer: NVFP4Linear) -> dict[str, np.ndarray]:
    name = module_name(path)
    w = formats.read_weight(checkpoint, name, (layer.out_features, layer.in_features))
    leaves = {}
    if isinstance(layer.scaling, Static):
        leaves["input_scale"] = _input_scale([w] if isinstance(w, PackedWeight) else [PackedWeight(w, w, w)], checkpoint, name)
    if not isinstance(w, PackedWeight):
        w = _quantize(w, layer, name)
    return leaves | {"kernel_packed": w.packed, "kernel_scale": w.scale, "kernel_global_scale": w.global_scale}


def gate_up(checkpoint: Checkpoint, experts: str, index: int, shape: tuple[int, int, int], notes: Notes):
    """One expert's gate and up: both floats, or both NVFP4 with one global scale (reconciled, and noted, where they differ)."""
    gate, up = (formats.read_expert(checkpoint, experts, p, index, shape) for p in ("gate_proj", "up_proj"))
    if isinstance(gate, PackedWeight) and isinstance(up, PackedWeight) and gate.global_scale != up.global_scale:
        notes.reconciled.append(f"{experts}.{index}")
        gate, up = formats.reconcile(gate, up, f"{experts}.{index}")
    return gate, up


def _experts(checkpoint: Checkpoint, path: Sequence[Any], layer: NVFP4Experts, notes: Notes) -> dict[str, np.ndarray]:
    name, e, h, i = module_name(path), layer.num_experts, layer.hidden, layer.intermediate
    _check_size(checkpoint, name, (e, h, i))
    leaves = {
        "gate_up_packed": np.empty((e, 2, i, h // 2), np.uint8),
        "gate_up_scale": np.empty((e, 2, i, h // BLOCK), E4M3),
        "gate_up_global_scale": np.empty((e,), np.float32),
        "down_packed": np.empty((e, h, i // 2), np.uint8),
        "down_scale": np.empty((e, h, i // BLOCK), E4M3),
        "down_global_scale": np.empty((e,), np.float32),
    }
    if isinstance(layer.scaling, Static):
        leaves |= {"gate_up_input_scale": np.empty((e,), np.float32), "down_input_scale": np.empty((e,), np.float32)}
    for index in range(e):
        gate, up = gate_up(checkpoint, name, index, (e, i, h), notes)
        down = formats.read_expert(checkpoint, name, "down_proj", index, (e, h, i))
        if isinstance(layer.scaling, Static):
            read = [w if isinstance(w, PackedWeight) else PackedWeight(w, w, w) for w in (gate, up, down)]
            leaves["gate_up_input_scale"][index] = _input_scale(read[:2], checkpoint, f"{name}.{index}.gate_proj")
            leaves["down_input_scale"][index] = _input_scale(read[2:], checkpoint, f"{name}.{index}.down_proj")
        if not isinstance(gate, PackedWeight):
            both = _quantize(np.concatenate([gate, up]), layer, f"{name}.{index}.gate_proj")
            gate, up = (PackedWeight(both.packed[s], both.scale[s], both.global_scale) for s in (slice(0, i), slice(i, None)))
        if not isinstance(down, PackedWeight):
            down = _quantize(down, layer, f"{name}.{index}.down_proj")
        for half, w in enumerate((gate, up)):
            leaves["gate_up_packed"][index, half], leaves["gate_up_scale"][index, half] = w.packed, w.scale
        leaves["gate_up_global_scale"][index] = gate.global_scale
        leaves["down_packed"][index], leaves["down_scale"][index] = down.packed, down.scale
        leaves["down_global_scale"][index] = down.global_scale
    return leaves


def _float_experts(checkpoint: Checkpoint, path: Sequence[Any], layer: Experts) -> dict[str, np.ndarray]:
    name, e = module_name(path), layer.num_experts
    _check_size(checkpoint, name, layer.gate_proj.shape)
    leaves = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        param = getattr(layer, projection)
        leaf = np.empty(param.shape, np.dtype(param.dtype))
        for index in range(e):
            leaf[index] = formats.read_expert(checkpoint, name, projection, index, (e, leaf.shape[2], leaf.shape[1])).T
        leaves[projection] = leaf
    return leaves


def module_leaves(checkpoint: Checkpoint, path: Sequence[Any], module: nnx.Module, notes: Notes) -> dict[str, np.ndarray]:
    """The values of one module's own Params by name, on the host; what lies in modules below is theirs."""
    own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
    leaves: dict[str, np.ndarray] = {}
    if isinstance(module, NVFP4Experts):
        return _experts(checkpoint, path, module, notes)
    if isinstance(module, Experts):
        return _float_experts(checkpoint, path, module)
    if isinstance(module, NVFP4Linear):
        leaves = _linear(checkpoint, path, module)
        own = {name: v for name, v in own.items() if name == "bias"}
    elif isinstance(module, nnx.Linear):
        weight = formats.read_weight(checkpoint, module_name(path), (module.out_features, module.in_features))
        leaves = {"kernel": np.ascontiguousarray(weight.T).astype(np.dtype(module.kernel.dtype))}
        own = {name: v for name, v in own.items() if name == "bias"}
    for name, variable in own.items():
        tensor = f"{module_name(path)}.{tensor_of_param(name)}"
        leaves[name] = formats.read_float(checkpoint, tensor, tuple(variable.shape)).astype(np.dtype(variable.dtype))
    return leaves


def owning_modules(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module]]:
    """The modules that hold Params themselves, by path, in the order of the model's layers."""
    found = [(tuple(path), m) for path, m in nnx.iter_modules(model) if any(isinstance(v, nnx.Variable) for v in vars(m).values())]
    return iter(sorted(found, key=lambda item: [(isinstance(part, str), part if isinstance(part, int) else str(part)) for part in item[0]]))


def abstract_model(
    checkpoint: Checkpoint, dtype: jnp.dtype, *, scaling: Name | Scaling | None = None, rules: Sequence[Rule] = ()
) -> nnx.Module:
    """The model that the folder makes, without values: layers it stores in NVFP4 swapped, and those that `rules` name."""
    model = models.build(checkpoint.config, dtype)
    layers = quantizable(model)
    packed = {path for path, module in layers.items() if is_packed(checkpoint, path, module)}
    decided = {path for path in packed if any(re.fullmatch(rule.module_path, path_string(path)) for rule in rules)}
    rules = [*rules, *(Rule(re.escape(path_string(path)), scaling=scaling) for path in layers if path in packed - decided)]
    if not rules:
        return model
    qmodel = quantize_model(model, rules)
    for path in packed & set(quantizable(qmodel)):
        raise CheckpointError(f"{checkpoint.directory}: {module_name(path)!r} is stored in NVFP4; a rule that skips it cannot be followed")
    return with_input_scales(qmodel)


def with_input_scales(qmodel: nnx.Module) -> nnx.Module:
    """The abstract model itself, with (abstract) input scales in static layers that have none."""
    for _, layer in owning_modules(qmodel):
        if isinstance(layer, NVFP4Linear) and isinstance(layer.scaling, Static) and layer.input_scale is None:
            layer.input_scale = InputScale(jax.ShapeDtypeStruct((), jnp.float32))
        if isinstance(layer, NVFP4Experts) and isinstance(layer.scaling, Static) and layer.gate_up_input_scale is None:
            for name in ("gate_up_input_scale", "down_input_scale"):
                setattr(layer, name, InputScale(jax.ShapeDtypeStruct((layer.num_experts,), jnp.float32)))
    return qmodel


def warn_about(checkpoint: Checkpoint, packed: Sequence[str], notes: Notes, unused: Sequence[str]) -> None:
    """Says once what is odd about a folder: reconciled scales, tensors without a place, an exclude list at odds with the tensors."""
    if notes.reconciled:
        _log.warning("%s: gate and up had different global scales in %d experts (first: %s); block scales were rounded again to the larger one",
                     checkpoint.directory, len(notes.reconciled), notes.reconciled[0])  # fmt: skip
    unused = [name for name in unused if not _IGNORED.fullmatch(name)]
    if unused:
        _log.warning("%s: %d tensors have no place in the model (first: %s)", checkpoint.directory, len(unused), unused[0])
    excluded = [name for name in packed if formats.is_excluded(name, checkpoint.quantization.exclude)]
    if excluded:
        _log.warning("%s: %d modules are NVFP4 though the config excludes them (first: %s); the tensors are followed",
                     checkpoint.directory, len(excluded), excluded[0])  # fmt: skip


def unused_tensors(checkpoint: Checkpoint, model: nnx.Module) -> list[str]:
    """Tensors of the folder that no module of the model reads."""
    known = set()
    for path, module in owning_modules(model):
        known.add(module_name(path))
        if isinstance(module, Experts | NVFP4Experts):
            known |= {f"{module_name(path)}.{e}.{p}" for e in range(module.num_experts) for p in ("gate_proj", "up_proj", "down_proj")}
            known |= {f"{module_name(path)}.{p}" for p in ("gate_up_proj", "down_proj")}
    tied = "lm_head" not in known  # a tied head is stored now and then, a copy of the embedding

    def is_used(name: str) -> bool:
        owner = name.rsplit(".", 1)[0]
        fused = name.split("_proj")[0] + "_proj"
        return name in known or owner in known or fused in known or (tied and owner == "lm_head")

    return [name for name in checkpoint.tensors if not is_used(name)]


def load_model(
    directory: str | Path,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    scaling: Name | Scaling | None = None,
    scan_layers: bool = False,
    rules: Sequence[Rule] | None = None,
) -> nnx.Module:
    """A model with the weights of a Hugging Face folder, on the default device.

    dtype: of the activations and of the weights that stay in floating point; float32 computes exact products.
    scaling: how layers that the folder stores in NVFP4 treat their input: None (weights only: the exact decode), "static" (the
        folder's input scales), "delayed", "tensor", "tensor_pow2", "token", and "expert" for experts.
    scan_layers: stack layers of equal structure, so that compile time does not grow with depth.
    rules: quantize while loading, expert by expert: as `quantize_model` and `quantize_params` afterwards, to the bit. For layers
        stored in NVFP4 already a rule gives the activation.

    CheckpointError, one line that names the file and tensor, for anything missing, truncated, misshapen, not finite or unknown.
    """
    checkpoint = formats.open_checkpoint(directory)
    model = abstract_model(checkpoint, dtype, scaling=scaling, rules=rules or ())
    notes = Notes()
    values: dict[tuple, Any] = {}
    packed = []
    # Committed to the device, as what Orbax restores is: then reloaded weights run the same compiled program.
    device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    for path, module in owning_modules(model):
        for name, value in module_leaves(checkpoint, path, module, notes).items():
            values[(*path, name)] = jax.device_put(value, device)
        if isinstance(module, NVFP4Linear | NVFP4Experts) and is_packed(checkpoint, path, module):
            packed.append(module_name(path))
    warn_about(checkpoint, packed, notes, unused_tensors(checkpoint, model))
    model = fill(model, values)
    return models.stack_layers(model) if scan_layers else model


def fill(model: nnx.Module, values: Mapping[tuple, Any]) -> nnx.Module:
    """An abstract model with values in place of its weights' shapes; histories of amaxes begin empty."""
    graphdef, histories, state = nnx.split(model, InputAmax, ...)
    histories = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), histories)
    flat = dict(nnx.to_flat_state(state))
    if missing := [path for path in flat if path not in values]:
        raise CheckpointError(f"no value for {path_string(missing[0])}")
    for path, variable in flat.items():
        if tuple(values[path].shape) != tuple(variable.shape) or values[path].dtype != variable.dtype:
            raise CheckpointError(f"{path_string(path)}: {values[path].dtype} {values[path].shape}, expected {variable.dtype} {variable.shape}")
    filled = nnx.from_flat_state({path: variable.replace(values[path]) for path, variable in flat.items()})
    return nnx.merge(graphdef, filled, histories)
