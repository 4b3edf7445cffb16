"""Hugging Face folders into models: bfloat16, FP8 by blocks, ModelOpt NVFP4 and compressed-tensors NVFP4.

What a model's tensors are called is its `models.Family`'s business. NVFP4 weights keep their own bytes. Modules are read one at a
time, experts one expert at a time; no layer is ever held in bfloat16 and NVFP4 both. Every tensor of a folder is read, or known to
mean nothing to the model, or refused by name.
"""

import dataclasses
import functools
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
from jax.typing import DTypeLike

from nvfp4jax import arguments, models
from nvfp4jax.checkpoint import formats, quantization_config
from nvfp4jax.checkpoint.formats import BLOCK, E4M3, Checkpoint, PackedWeight
from nvfp4jax.checkpoint.safetensors import CheckpointError, TensorInfo, read_tensor
from nvfp4jax.layers import Experts, InputAmax, InputScale, NVFP4Experts, NVFP4Linear, is_abstract, quantize_weight
from nvfp4jax.models import Family
from nvfp4jax.scaling import Name, Scaling, Static, name_of, parse
from nvfp4jax.swap import Rule, path_string, quantize_model

_log = logging.getLogger(__name__)

# A role of a mixture's experts -> the Param of `layers.Experts` that holds it.
EXPERT_PARAMS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def open_folder(directory: str | Path) -> tuple[Checkpoint, Family]:
    """A folder and the family that its config names.

    A head that the folder stores though its config ties it to the embedding, and that differs, is taken, as transformers 5
    does: the config in the result says tie_word_embeddings=false, and that is logged.
    """
    checkpoint = formats.open_checkpoint(arguments.path("directory", directory))
    family = models.family_of(checkpoint.config)
    head, table = (family.tensor_name((name, "kernel")) for name in (family.head, family.embedding))
    if not checkpoint.config.get("tie_word_embeddings"):
        return checkpoint, family
    stored = formats.weight_tensors(checkpoint, family.module_name((family.head,)))
    if not stored or (stored == {head} and _same_bytes(checkpoint.tensors[head], checkpoint.tensors.get(table))):
        return checkpoint, family
    _log.warning("%s: config.json ties the head to the embedding, but %r is stored and differs: it is used", checkpoint.directory, head)
    return dataclasses.replace(checkpoint, config=checkpoint.config | {"tie_word_embeddings": False}), family


def _same_bytes(a: TensorInfo, b: TensorInfo | None) -> bool:
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return np.array_equal(read_tensor(a).view(np.uint8), read_tensor(b).view(np.uint8))


def quantizable(model: nnx.Module) -> dict[tuple, nnx.Module]:
    """The modules of one of our models that can be held in NVFP4, by path: linears and experts."""
    return {tuple(path): module for path, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear | Experts)}


def expert_modules(checkpoint: Checkpoint, family: Family, path: Sequence[Any], module: Experts | NVFP4Experts) -> list[str]:
    """The checkpoint's modules that a mixture is made of."""
    name = family.module_name(path)
    return [m for role in EXPERT_PARAMS for m in formats.expert_modules(checkpoint, family.experts, name, module.num_experts, role)]


def is_packed(checkpoint: Checkpoint, family: Family, path: Sequence[Any], module: nnx.Module) -> bool:
    """Whether the checkpoint stores a quantizable module in NVFP4. CheckpointError where only some of the experts are."""
    if not isinstance(module, Experts | NVFP4Experts):
        return formats.is_packed(checkpoint, family.module_name(path))
    modules = expert_modules(checkpoint, family, path, module)
    packed = [formats.is_packed(checkpoint, m) for m in modules]
    if any(packed) != all(packed):
        raise CheckpointError(f"{checkpoint.directory}: {modules[packed.index(True)]!r} is NVFP4, {modules[packed.index(False)]!r} is not: "
                              "the experts of a layer must be stored alike")
    return packed[0]


@dataclasses.dataclass
class Notes:
    """What a load has to tell, gathered so that each thing is said once."""

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


def _linear(checkpoint: Checkpoint, family: Family, path: Sequence[Any], layer: NVFP4Linear) -> dict[str, np.ndarray]:
    name = family.module_name(path)
    w = formats.read_weight(checkpoint, name, layer.matrix_shape)
    leaves = {}
    if isinstance(layer.scaling, Static):
        scale = layer.input_scale.get_value()
        if is_abstract(scale):  # else the mode brought its own
            scale = _input_scale([PackedWeight(w, w, w, formats.input_scale_of(checkpoint, name))], checkpoint, name)
        leaves["input_scale"] = np.asarray(scale)
    if not isinstance(w, PackedWeight):
        w = _quantize(w, layer, name)
    return leaves | {"kernel_packed": w.packed, "kernel_scale": w.scale, "kernel_global_scale": w.global_scale}


def gate_up(
    checkpoint: Checkpoint, family: Family, experts: str, index: int, shape: tuple[int, int, int], notes: Notes, *, input_scale: bool = False
) -> list[np.ndarray | PackedWeight]:
    """One expert's gate and up: both floats, or both NVFP4 with one global scale (reconciled, and noted, where they differ)."""
    gate, up = (
        formats.read_expert(checkpoint, family.experts, experts, role, index, shape, input_scale=input_scale) for role in ("gate", "up")
    )
    if isinstance(gate, PackedWeight) and isinstance(up, PackedWeight) and gate.global_scale != up.global_scale:
        notes.reconciled.append(f"{experts}.{index}")
        gate, up = formats.reconcile(gate, up, f"{experts}.{index}")
    return [gate, up]


def _experts(checkpoint: Checkpoint, family: Family, path: Sequence[Any], layer: NVFP4Experts, notes: Notes) -> dict[str, np.ndarray]:
    name, e, h, i = family.module_name(path), layer.num_experts, layer.hidden, layer.intermediate
    given = layer.gate_up_input_scale  # of a static layer alone; with values where the mode brought them
    static = given is not None and is_abstract(given.get_value())
    _check_size(checkpoint, name, (e, h, i))
    leaves = {
        "gate_up_packed": np.empty((e, 2, i, h // 2), np.uint8),
        "gate_up_scale": np.empty((e, 2, i, h // BLOCK), E4M3),
        "gate_up_global_scale": np.empty((e,), np.float32),
        "down_packed": np.empty((e, h, i // 2), np.uint8),
        "down_scale": np.empty((e, h, i // BLOCK), E4M3),
        "down_global_scale": np.empty((e,), np.float32),
    }
    if given is not None and not static:
        leaves |= {f"{which}_scale": np.asarray(getattr(layer, f"{which}_scale").get_value()) for which in layer.inputs}
    if static:
        leaves |= {"gate_up_input_scale": np.empty((e,), np.float32), "down_input_scale": np.empty((e,), np.float32)}
    for index in range(e):
        gate, up = gate_up(checkpoint, family, name, index, (e, i, h), notes, input_scale=static)
        down = formats.read_expert(checkpoint, family.experts, name, "down", index, (e, h, i), input_scale=static)
        names = [family.experts.module(name, index, role) for role in EXPERT_PARAMS]
        if static:
            read = [w if isinstance(w, PackedWeight) else PackedWeight(w, w, w) for w in (gate, up, down)]
            leaves["gate_up_input_scale"][index] = _input_scale(read[:2], checkpoint, names[0])
            leaves["down_input_scale"][index] = _input_scale(read[2:], checkpoint, names[2])
        if not isinstance(gate, PackedWeight):
            both = _quantize(np.concatenate([gate, up]), layer, names[0])
            gate, up = (PackedWeight(both.packed[s], both.scale[s], both.global_scale) for s in (slice(0, i), slice(i, None)))
        if not isinstance(down, PackedWeight):
            down = _quantize(down, layer, names[2])
        for half, w in enumerate((gate, up)):
            leaves["gate_up_packed"][index, half], leaves["gate_up_scale"][index, half] = w.packed, w.scale
        leaves["gate_up_global_scale"][index] = gate.global_scale
        leaves["down_packed"][index], leaves["down_scale"][index] = down.packed, down.scale
        leaves["down_global_scale"][index] = down.global_scale
    return leaves


def _float_experts(checkpoint: Checkpoint, family: Family, path: Sequence[Any], layer: Experts) -> dict[str, np.ndarray]:
    name, e = family.module_name(path), layer.num_experts
    _check_size(checkpoint, name, layer.gate_proj.shape)
    leaves = {}
    for role, param_name in EXPERT_PARAMS.items():
        param = getattr(layer, param_name)
        leaf = np.empty(param.shape, np.dtype(param.dtype))
        for index in range(e):
            weight = formats.read_expert(checkpoint, family.experts, name, role, index, (e, leaf.shape[2], leaf.shape[1]))
            leaf[index] = formats.cast(weight.T, leaf.dtype, f"{checkpoint.directory}: {family.experts.module(name, index, role)!r}")
        leaves[param_name] = leaf
    return leaves


def module_leaves(
    checkpoint: Checkpoint, family: Family, path: Sequence[Any], module: nnx.Module, notes: Notes
) -> dict[str, np.ndarray]:
    """The values of one module's own Params by name, on the host; what lies in modules below is theirs."""
    if isinstance(module, NVFP4Experts):
        return _experts(checkpoint, family, path, module, notes)
    if isinstance(module, Experts):
        return _float_experts(checkpoint, family, path, module)
    leaves: dict[str, np.ndarray] = {}
    if isinstance(module, NVFP4Linear):
        leaves = _linear(checkpoint, family, path, module)
    elif isinstance(module, nnx.Linear):
        module_name = family.module_name(path)
        weight = formats.read_weight(checkpoint, module_name, (module.out_features, module.in_features))
        leaves = {"kernel": formats.cast(np.ascontiguousarray(weight.T), module.kernel.dtype, f"{checkpoint.directory}: {module_name!r}")}
    for name, variable in plain_params(module).items():
        tensor = family.tensor_name((*path, name))
        leaves[name] = formats.cast(formats.read_float(checkpoint, tensor, tuple(variable.shape)), variable.dtype, f"{checkpoint.directory}: {tensor!r}")
    return leaves


def plain_params(module: nnx.Module) -> dict[str, nnx.Variable]:
    """A module's own Params that are stored one tensor each: all but the weight of a linear layer, and experts."""
    if isinstance(module, Experts | NVFP4Experts):
        return {}
    own = {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}
    return {name: v for name, v in own.items() if name == "bias" or not isinstance(module, nnx.Linear | NVFP4Linear)}


def owning_modules(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module]]:
    """The modules that hold Params themselves, by path, in the order of the model's layers."""
    found = [(tuple(path), m) for path, m in nnx.iter_modules(model) if any(isinstance(v, nnx.Variable) for v in vars(m).values())]
    return iter(sorted(found, key=lambda item: [(isinstance(part, str), part if isinstance(part, int) else str(part)) for part in item[0]]))


def packed_rule(family: Family, path: Sequence[Any], scaling: Name | Scaling | None) -> Rule:
    """For a layer that is stored in NVFP4: `scaling` of its input, or weights only where the family keeps it in floating point."""
    name = path_string(tuple(path))
    return Rule(re.escape(name), scaling=None if family.keeps(name) else scaling)


def abstract_model(
    checkpoint: Checkpoint, family: Family, dtype: DTypeLike, *, scaling: Name | Scaling | None = None, rules: Sequence[Rule] = ()
) -> nnx.Module:
    """The model that the folder makes, without values: layers it stores in NVFP4 swapped, and those that `rules` name."""
    model = models.build(checkpoint.config, dtype)
    layers = quantizable(model)
    packed = {path for path, module in layers.items() if is_packed(checkpoint, family, path, module)}
    if scaling is not None and not packed:
        name = name_of(parse(scaling, "load_model"))
        raise CheckpointError(f"{checkpoint.directory}: scaling={name!r}: the folder stores no layer in NVFP4, so there is nothing that it could "
                              "scale; quantize on loading with rules=[Rule(..., scaling=...)], or `nvfp4jax quantize` the folder first")
    decided = {path for path in packed if any(re.fullmatch(rule.module_path, path_string(path)) for rule in rules)}
    rules = [*rules, *(packed_rule(family, path, scaling) for path in layers if path in packed - decided)]
    if not rules:
        return model
    qmodel = quantize_model(model, rules)
    for path in packed & set(quantizable(qmodel)):
        raise CheckpointError(f"{checkpoint.directory}: {family.module_name(path)!r} is stored in NVFP4; a rule that skips it cannot be followed")
    return with_input_scales(qmodel)


def with_input_scales(qmodel: nnx.Module) -> nnx.Module:
    """The abstract model itself, with (abstract) input scales in static layers that have none."""
    for _, layer in owning_modules(qmodel):
        if isinstance(layer, NVFP4Linear) and isinstance(layer.scaling, Static) and layer.input_scale is None:
            layer.input_scale = InputScale(jax.ShapeDtypeStruct(layer.lead, jnp.float32))
        if isinstance(layer, NVFP4Experts) and isinstance(layer.scaling, Static) and layer.gate_up_input_scale is None:
            for name in ("gate_up_input_scale", "down_input_scale"):
                setattr(layer, name, InputScale(jax.ShapeDtypeStruct((*layer.lead, layer.num_experts), jnp.float32)))
    return qmodel


def warn_about(checkpoint: Checkpoint, family: Family, stored: Mapping[tuple, bool], notes: Notes) -> None:
    """Says once what is odd about a folder: reconciled scales, a config at odds with the tensors.

    stored: whether each module that could be in NVFP4 is.
    """
    excludes = functools.partial(quantization_config.is_excluded, patterns=checkpoint.quantization.exclude)
    if notes.reconciled:
        _log.warning("%s: gate and up had different global scales in %d experts (first: %s); block scales were rounded again to the larger one",
                     checkpoint.directory, len(notes.reconciled), notes.reconciled[0])  # fmt: skip
    names = {family.module_name(path): (packed, family.keeps(path_string(path))) for path, packed in stored.items()}
    excluded = [name for name, (packed, _) in names.items() if packed and excludes(name)]
    if excluded:
        _log.warning("%s: %d modules are NVFP4 though the config excludes them (first: %s); the tensors are followed",
                     checkpoint.directory, len(excluded), excluded[0])  # fmt: skip
    plain = [name for name, (packed, kept) in names.items() if not packed and not kept and not excludes(name)]
    if plain and checkpoint.quantization.method in ("modelopt", "compressed-tensors"):
        _log.warning("%s: %d modules are not NVFP4 though the config says so (first: %s); the tensors are followed",
                     checkpoint.directory, len(plain), plain[0])  # fmt: skip


def check_tensors(checkpoint: Checkpoint, family: Family, model: nnx.Module) -> None:
    """Every tensor of the folder is one that the model reads, or one that means nothing to it, or refused.

    CheckpointError, naming it, for a tensor inside a module of the model: with it the folder computes something else. One
    warning, with the first names, for those of modules that the model has not. Scales of activations and what the family calls
    `unread` are left out without a word.
    """
    known: set[str] = set()
    modules: set[str] = set()
    for path, module in owning_modules(model):
        name = family.module_name(path)
        modules.add(name)
        if isinstance(module, Experts | NVFP4Experts):
            parts = expert_modules(checkpoint, family, path, module)
        else:
            parts = [name] if isinstance(module, nnx.Linear | NVFP4Linear) else []
        for part in parts:
            stored = formats.weight_tensors(checkpoint, part)
            if not stored:
                raise CheckpointError(f"{checkpoint.directory}: tensor {part + '.weight'!r} is missing")
            known |= stored
        known |= {family.tensor_name((*path, param)) for param in plain_params(module)}
    if checkpoint.config.get("tie_word_embeddings"):  # a tied head is stored now and then, a copy of the embedding
        known |= formats.weight_tensors(checkpoint, family.module_name((family.head,)))
    layers = {family.module_name(path[:2]) for path, _ in owning_modules(model) if len(path) > 2}
    left = [name for name in checkpoint.tensors if name not in known and not formats.ADVISORY.fullmatch(name)]
    left = [name for name in left if not any(re.fullmatch(pattern, name) for pattern, _ in family.unread)]
    for name in left:
        parts = name.split(".")
        inside = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules | layers), None)
        if inside is not None:
            raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is not computed with: {inside!r} of this model has no such parameter "
                                  "(is it an adapter to be merged, or does config.json say something else?)")
    if left:
        _log.warning("%s: %d tensors have no place in the model, which has no such modules: they are not read (%s%s)",
                     checkpoint.directory, len(left), ", ".join(left[:4]), ", ..." if len(left) > 4 else "")  # fmt: skip


def load_model(
    directory: str | Path,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    scaling: Name | Scaling | None = None,
    scan_layers: bool = False,
    rules: Sequence[Rule] | None = None,
) -> nnx.Module:
    """A model with the weights of a Hugging Face folder, on the default device.

    dtype: of the activations and of the weights that stay in floating point; float32 computes exact products.
    scaling: how layers that the folder stores in NVFP4 treat their input: None (weights only: the exact decode), "static" (the
        folder's input scales; a `Static(scale)` brings its own), "delayed", "tensor", "tensor_pow2", "token", and "expert" for experts. An error for a folder without any.
    scan_layers: stack layers of equal structure, so that compile time does not grow with depth.
    rules: quantize while loading, expert by expert: as `quantize_model` and `quantize_params` afterwards, to the bit. For layers
        stored in NVFP4 already a rule gives the activation.

    CheckpointError, one line that names the file and tensor, for anything missing, truncated, misshapen, not finite or unknown.
    """
    dtype = arguments.dtype("load_model: dtype", dtype)
    arguments.flag("load_model: scan_layers", scan_layers)
    scaling = parse(scaling, "load_model")
    arguments.device()
    rules = [] if rules is None else arguments.items("load_model: rules", rules, Rule, "Rule")
    checkpoint, family = open_folder(directory)
    model = abstract_model(checkpoint, family, dtype, scaling=scaling, rules=rules)
    check_tensors(checkpoint, family, model)
    notes = Notes()
    values: dict[tuple, Any] = {}
    stored = {}
    # Committed to the device, as what Orbax restores is: then reloaded weights run the same compiled program.
    device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    for path, module in owning_modules(model):
        for name, value in module_leaves(checkpoint, family, path, module, notes).items():
            values[(*path, name)] = jax.device_put(value, device)
        if isinstance(module, nnx.Linear | NVFP4Linear | Experts | NVFP4Experts):
            stored[tuple(path)] = is_packed(checkpoint, family, path, module)
    warn_about(checkpoint, family, stored, notes)
    model = fill(model, values)
    return models.stack_layers(model) if scan_layers else model


def fill(model: nnx.Module, values: Mapping[tuple, Any]) -> nnx.Module:
    """An abstract model with values in place of its weights' shapes; histories of amaxes begin empty, or as their mode brought them."""
    graphdef, histories, state = nnx.split(model, InputAmax, ...)
    histories = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_abstract(leaf) else leaf, histories)
    flat = dict(nnx.to_flat_state(state))
    if missing := [path for path in flat if path not in values]:
        raise CheckpointError(f"no value for {path_string(missing[0])}")
    for path, variable in flat.items():
        if tuple(values[path].shape) != tuple(variable.shape) or values[path].dtype != variable.dtype:
            raise CheckpointError(f"{path_string(path)}: {values[path].dtype} {values[path].shape}, expected {variable.dtype} {variable.shape}")
    filled = nnx.from_flat_state({path: variable.replace(values[path]) for path, variable in flat.items()})
    return nnx.merge(graphdef, filled, histories)
