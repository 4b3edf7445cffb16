"""What the offline quantizer writes around the weights: index and configs, an Orbax folder, the files beside; and a module's tensors."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from nvfp4jax import models
from nvfp4jax.checkpoint import formats, huggingface, orbax, resume, saved_model
from nvfp4jax.checkpoint.formats import Checkpoint, PackedWeight
from nvfp4jax.checkpoint.pieces import Progress, report_row, stored_input_scale
from nvfp4jax.checkpoint.quantization_config import quantization_configs
from nvfp4jax.checkpoint.safetensors import CheckpointError, open_regular, read_header
from nvfp4jax.layers import Experts, NVFP4Experts, NVFP4Linear
from nvfp4jax.models import Family
from nvfp4jax.swap import Rule, path_string

# Files beside the weights that a user of the result needs.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt",
              "chat_template.jinja")  # fmt: skip
_LARGEST_COMPANION = 2**28


def excluded(qmodel: nnx.Module, family: Family, method: str) -> list[str]:
    """The modules left in floating point, in the format's own spelling."""
    head, embedding = (family.module_name((name,)) for name in (family.head, family.embedding))
    names = [head, embedding] if method == "modelopt" else [head]
    for path, module in huggingface.owning_modules(qmodel):
        matrices = [v for v in vars(module).values() if isinstance(v, nnx.Param) and len(v.shape) > 1]
        if not matrices or isinstance(module, nnx.Embed):
            continue
        name = family.module_name(path)  # linears, experts, and a router that is no linear
        if isinstance(module, Experts):
            name = f"{name}*" if method == "modelopt" else f"re:{re.escape(name)}\\..*"
        names.append(name)
    return list(dict.fromkeys(names))


def finish_folder(folder: Path, config: dict[str, Any], method: str, qmodel: nnx.Module, weight_only: bool, kv: str | None) -> None:
    """Index and configs around the pieces."""
    weight_map, size = {}, 0
    for piece in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(piece).items():
            weight_map[name] = piece.name
            size += info.nbytes
    resume.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    ignored = excluded(qmodel, models.family_of(config), method)
    quantization, separate = quantization_configs(method, ignored, weight_only=weight_only, kv_cache=kv)
    resume.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "quantization_config"} | {"quantization_config": quantization})
    if separate is not None:
        resume.write_json(folder / "hf_quant_config.json", separate)


def extras_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Scales that the model does not hold, kept for a way back: input scales and the KV cache's, by ModelOpt's names."""
    found: dict[str, np.ndarray | None] = {}
    for name in checkpoint.tensors:
        module, _, kind = name.rpartition(".")
        if kind in ("k_scale", "v_scale"):
            found[name] = formats.read_scalar(checkpoint, name)
        elif kind in ("input_scale", "input_global_scale"):
            found[f"{module}.input_scale"] = stored_input_scale(checkpoint, module)
    found = {name: value for name, value in found.items() if value is not None}
    return found


def to_orbax(checkpoint: Checkpoint, qmodel: nnx.Module, rules: Sequence[Rule], target: Path, progress: Progress) -> None:
    """A packed Hugging Face folder into an Orbax folder, some modules at a time."""
    family, notes = models.family_of(checkpoint.config), huggingface.Notes()
    save = orbax.PartialSave(target)
    modules = list(huggingface.owning_modules(qmodel))
    batch: dict[str, np.ndarray] = {}
    limit = min(2**28, max(info.nbytes for info in checkpoint.tensors.values()) * 4)
    for number, (path, module) in enumerate(modules):
        for name, leaf in huggingface.module_leaves(checkpoint, family, path, module, notes).items():
            batch[path_string((*path, name))] = leaf
        if sum(leaf.nbytes for leaf in batch.values()) >= limit and number + 1 < len(modules):
            save.add(batch)
            batch = {}
        progress(number + 1, len(modules), "orbax")
    extras = extras_of(checkpoint)
    metadata = {
        "recipe": saved_model.recipe_id(rules),
        "config": {k: v for k, v in checkpoint.config.items() if k != "quantization_config"},
        "rules": saved_model.rules_to_json(rules),
        "dtype": str(saved_model.dtype_of(qmodel)),
        "kv_cache": checkpoint.quantization.kv_cache,
    }
    if extras:
        batch[orbax.EXTRAS] = np.array(list(extras.values()), np.float32)
        metadata[orbax.EXTRAS] = list(extras)
    save.finish(batch, metadata)


def copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            opened, size = open_regular(source / name)
            with opened, open(target / name, "wb") as copy:
                if size > _LARGEST_COMPANION:
                    raise CheckpointError(f"{source / name}: {size} bytes; at most {_LARGEST_COMPANION} are copied")
                shutil.copyfileobj(opened, copy)


def export_module(
    family: Family, path: tuple, module: nnx.Module, leaves: dict[str, np.ndarray], extras: dict[str, np.ndarray], method: str, report: list
) -> dict[str, np.ndarray]:
    name = family.module_name(path)
    packed: dict[str, PackedWeight] = {}
    tensors: dict[str, np.ndarray] = {}

    def add(weight_name: str, values: str, scale: str, global_scale, input_scale) -> None:
        input_scale = extras.get(f"{weight_name}.input_scale", input_scale)
        packed[weight_name] = PackedWeight(values, scale, np.asarray(global_scale), input_scale)

    if isinstance(module, NVFP4Linear):
        add(name, leaves.pop("kernel_packed"), leaves.pop("kernel_scale"), leaves.pop("kernel_global_scale"), leaves.pop("input_scale", None))
    elif isinstance(module, NVFP4Experts):
        for e in range(module.num_experts):
            for half, role in enumerate(("gate", "up")):
                given = leaves.get("gate_up_input_scale")
                add(family.experts.module(name, e, role), leaves["gate_up_packed"][e, half], leaves["gate_up_scale"][e, half],
                    leaves["gate_up_global_scale"][e], None if given is None else given[e])  # fmt: skip
            given = leaves.get("down_input_scale")
            add(family.experts.module(name, e, "down"), leaves["down_packed"][e], leaves["down_scale"][e], leaves["down_global_scale"][e],
                None if given is None else given[e])  # fmt: skip
        leaves = {}
    elif isinstance(module, Experts):
        for role, param in huggingface.EXPERT_PARAMS.items():
            value, e = leaves[param], range(module.num_experts)
            tensors |= {f"{family.experts.module(name, i, role)}.weight": np.ascontiguousarray(value[i].T) for i in e}
        leaves = {}
    for weight_name, weight in packed.items():
        tensors |= formats.packed_tensors(weight_name, weight, method)
        report.append(report_row(weight_name, weight, None))
    for param, value in leaves.items():
        value = np.ascontiguousarray(value.T) if param == "kernel" else value
        tensors[family.tensor_name((*path, param))] = value
    return tensors
