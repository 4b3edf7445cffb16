"""The offline quantizer: a folder in, an NVFP4 folder out, one tensor at a time.

    Hugging Face (bf16, FP8 by blocks, ModelOpt or compressed-tensors NVFP4)  ->  orbax | modelopt | compressed-tensors
    Orbax (ours)                                                              ->  modelopt | compressed-tensors

With a `Calibration` the result has input scales made from its prompts, whatever the source had (then Orbax -> orbax too).

Work goes on in `<save_dir>.partial`, one output file for each input file, and a run that was interrupted goes on where it was.
The save_dir appears by one rename when all is done; bad input leaves nothing behind.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nvfp4jax import arguments, models
from nvfp4jax.calibration import check_batches, check_headroom, input_scales
from nvfp4jax.checkpoint import formats, huggingface, orbax, resume, saved_model
from nvfp4jax.checkpoint.formats import Checkpoint
from nvfp4jax.checkpoint.huggingface import quantizable
from nvfp4jax.checkpoint.outputs import copy_companions, export_module, finish_folder, to_orbax
from nvfp4jax.checkpoint.pieces import Progress, run_units, units_of
from nvfp4jax.checkpoint.safetensors import CheckpointError, Writer
from nvfp4jax.layers import WEIGHTS, Experts, NVFP4Experts, NVFP4Linear, set_scaling
from nvfp4jax.models import Family
from nvfp4jax.scaling import CARRIED, FourOverSix, Name, Scaling, Static, Token, check_four_over_six, parse
from nvfp4jax.swap import Rule, path_string, quantize_model, scaled_layers

_log = logging.getLogger(__name__)

OUTPUTS = ("orbax", "modelopt", "compressed-tensors")
REPORT = "quantization_report.json"
_EXPORT_SHARD_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers become NVFP4, and how.

    keep_first_n, keep_last_n: layers that stay in floating point. exclude: regular expressions, searched in the module's path
    ('layers/0/mlp/up_proj') and in its checkpoint name ('model.layers.0.mlp.up_proj'). experts_only: nothing but experts.
    four_over_six: of the weights: None, "mae" or "mse". scaling: the mode that the result's layers run in.
    """

    keep_first_n: int = 0
    keep_last_n: int = 0
    exclude: tuple[str, ...] = ()
    experts_only: bool = False
    four_over_six: FourOverSix | None = None
    scaling: Name | Scaling | None = "token"

    def __post_init__(self):
        for name in ("keep_first_n", "keep_last_n"):
            arguments.whole(f"Selection: {name}", getattr(self, name), 0)
        if not isinstance(self.exclude, tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ValueError(f"Selection: exclude={str(self.exclude)[:40]!r}: a tuple of regular expressions is needed")
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"exclude {pattern!r} is no regular expression: {error}") from error
        arguments.flag("Selection: experts_only", self.experts_only)
        check_four_over_six(self.four_over_six, "Selection: four_over_six")
        object.__setattr__(self, "scaling", parse(self.scaling, "Selection"))
        if (field := CARRIED.get(type(self.scaling))) and getattr(self.scaling, field) is not None:
            raise ValueError(f"Selection: scaling: {type(self.scaling).__name__} with a {field} of its own is in no folder; leave it None, with a "
                             "Calibration where input scales are to be made")

    @property
    def selects(self) -> bool:
        """Whether it says anything about which layers, or how weights are rounded."""
        return dataclasses.replace(self, scaling="token") != Selection()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Prompts to make input scales from: batches and headroom as `nvfp4jax.calibrate` takes them. The model is loaded for it, whole."""

    batches: Sequence[Any]
    headroom: float = 1.0

    def __post_init__(self):
        check_headroom(self.headroom)
        if not list(check_batches(self.batches)):
            raise ValueError("Calibration: batches: no batch of prompts was given")


def _calibrated(
    qmodel: nnx.Module, family: Family, calibration: Calibration, float_model: nnx.Module | None = None
) -> dict[str, np.ndarray]:
    """Input scales f32 [] by checkpoint module, of all NVFP4 layers."""
    static = nnx.view(qmodel, scaling="static")
    modules = scaled_layers(static)
    for path, module in modules.items():
        if family.keeps(path_string(path)):  # weights only: no call reads its input
            set_scaling(module, None)
    scales: dict[str, np.ndarray] = {}
    found = input_scales(static, calibration.batches, headroom=calibration.headroom, float_model=float_model)
    for path, inputs in found.items():
        name = family.module_name(path)
        module = modules[path]
        if isinstance(module, NVFP4Linear):
            scales[name] = np.asarray(inputs["input"])
            continue
        of = {"gate": "gate_up_input", "up": "gate_up_input", "down": "down_input"}
        for e in range(module.num_experts):
            scales |= {family.experts.module(name, e, role): np.asarray(inputs[which]) for role, which in of.items()}
    return scales


def rules_for(model: nnx.Module, family: Family, selection: Selection) -> list[Rule]:
    """The rules of a selection for a float model (abstract is enough), without any that would match nothing.

    ValueError for an `exclude` that matches no layer, and for a selection that leaves nothing to quantize.
    """
    paths = {path_string(path): module for path, module in quantizable(model).items()}
    depth = len(getattr(model, "layers", ()))
    if (selection.keep_first_n or selection.keep_last_n) and not depth:
        raise ValueError(f"keep_first_n, keep_last_n: {type(model).__name__} has no `layers`; name those to keep with exclude")
    skipped: dict[str, list[str]] = {family.kept: [path for path in paths if family.keeps(path)]}
    kept = [*range(min(selection.keep_first_n, depth)), *range(max(depth - selection.keep_last_n, 0), depth)]
    for layer in dict.fromkeys(kept):
        skipped[rf"layers/{layer}/.*"] = [path for path in paths if path.startswith(f"layers/{layer}/")]
    for pattern in selection.exclude:
        found = [path for path in paths if re.search(pattern, path) or re.search(pattern, family.module_name(path.split("/")))]
        if not found:
            raise ValueError(f"exclude {pattern!r} matches no layer; the layers are: {', '.join([*paths][:4])}, ...")
        for path in found:
            skipped[re.escape(path)] = [path]
    if selection.experts_only:
        for path, module in paths.items():
            if not isinstance(module, Experts):
                skipped[re.escape(path)] = [path]
    rules: list[Rule] = []
    taken: set[str] = set()
    for pattern, found in skipped.items():
        if set(found) - taken:
            rules.append(Rule(pattern, skip=True))
            taken |= set(found)
    if not set(paths) - taken:
        raise ValueError("the selection leaves no layer to quantize")
    return [
        *rules,
        Rule(".*", scaling=selection.scaling, weight_four_over_six=selection.four_over_six),
    ]  # fmt: skip


def quantize_folder(
    source: str | Path,
    save_dir: str | Path,
    selection: Selection = Selection(),
    *,
    output: str = "orbax",
    calibration: Calibration | None = None,
    progress: Progress = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """Converts a folder as the module's docstring says; the report: one row a weight, with its relative error where it was quantized.

    Layers that the source stores in NVFP4 keep their bytes; a source that has any is not quantized further. The bits of `orbax` output
    are those of `quantize_params` on the loaded model. In the other outputs q, k and v, and gate and up, share a global scale,
    because the serving stacks that read them fuse these layers and take one scale: where their amaxes differ, block scales and
    codes differ from `quantize_model`'s. An Orbax folder that is exported keeps the bits that it has.
    Memory: about one input tensor and its result; for `orbax` output one layer's experts.

    calibration: input scales from its prompts, for every layer that is NVFP4 in the result, stored whatever the activation mode
        ("static" runs by them; other serving stacks read them). A floating-point source is calibrated in floating point, an NVFP4
        source with its weights decoded; first the whole model is loaded, on the default device.
    progress(done, total, what) is called along the way. CheckpointError or ValueError for bad input, before anything is written
    where that can be known; save_dir must not exist.
    """
    source, save_dir = arguments.path("source", source), arguments.path("save_dir", save_dir).absolute()
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r}: one of {', '.join(OUTPUTS)}")
    if not isinstance(selection, Selection):
        raise ValueError(f"selection: a Selection is needed, not {arguments.shown(selection)}")
    if not isinstance(calibration, Calibration | None):
        raise ValueError(f"calibration: a Calibration is needed, not {arguments.shown(calibration)}")
    if not callable(progress):
        raise ValueError(f"progress: a function of (done, total, what) is needed, not {arguments.shown(progress)}")
    arguments.device()
    orbax.refuse_existing(save_dir)
    if calibration is not None and selection.scaling is None:
        raise ValueError("calibration: scaling=None quantizes no activation, so there is nothing to scale")
    with resume.only_run(save_dir):
        convert = _export if orbax.exists(source) else _quantize
        return convert(source, save_dir, selection, output, calibration, progress)


def _quantize(
    source: Path, save_dir: Path, selection: Selection, output: str, calibration: Calibration | None, progress: Progress
) -> list[dict[str, Any]]:
    """A Hugging Face folder into any output."""
    checkpoint, family = huggingface.open_folder(source)
    model = models.build(checkpoint.config, jnp.bfloat16)
    layers = quantizable(model)
    packed = [path for path, module in layers.items() if huggingface.is_packed(checkpoint, family, path, module)]
    if packed and selection.selects:
        raise CheckpointError(f"{source}: the weights are NVFP4 already ({family.module_name(packed[0])}, ...); only the activation mode can be chosen")
    if packed:
        rules = [huggingface.packed_rule(family, path, selection.scaling) for path in packed]
    else:
        rules = rules_for(model, family, selection)
        if isinstance(selection.scaling, Static) and calibration is None:
            raise CheckpointError(f"{source}: scaling='static' needs input scales, which this folder has not; calibrate on some prompts "
                                  "(--calibration-prompts), or use an online mode")
    calibrated: dict[str, np.ndarray] = {}
    if calibration is not None:
        progress(0, 1, "calibration")
        if packed:
            weights_only = [dataclasses.replace(rule, scaling=None) for rule in rules]
            calibrated = _calibrated(huggingface.load_model(source, rules=weights_only), family, calibration)
        else:
            calibrated = _calibrated(quantize_model(model, rules), family, calibration, huggingface.load_model(source))
    qmodel = huggingface.with_input_scales(quantize_model(model, rules))
    huggingface.check_tensors(checkpoint, family, qmodel)
    method, share = ("modelopt", False) if output == "orbax" else (output, True)
    notes = huggingface.Notes()
    units = list(units_of(checkpoint, family, qmodel, method, share, notes, calibrated))
    if output == "compressed-tensors" and checkpoint.quantization.kv_cache is not None:
        _log.warning("%s: the KV cache's scales are left out: compressed-tensors output has none", source)
        units = [unit for unit in units if not any(name.endswith((".k_scale", ".v_scale")) for name in unit.specs)]
    sources = resume.Sources(info.file for info in checkpoint.tensors.values())
    table = sorted((i.name, str(i.dtype), i.shape, i.file.name, i.offset) for i in checkpoint.tensors.values())
    plan = [orbax.FORMAT_VERSION, output, method, share, saved_model.rules_to_json(rules), checkpoint.config, table]
    plan.append({name: float(scale) for name, scale in calibrated.items()})
    working = save_dir.with_name(save_dir.name + ".partial")
    with resume.kept_unless_bad(working):
        resume.working_folder(working, resume.fingerprint(sources, plan))
        if output == "orbax" and packed and not calibrated:
            report = _packed_report(checkpoint, qmodel)
            to_orbax(checkpoint, qmodel, rules, working / "orbax", progress)
        else:
            report = run_units(units, working, progress)
            weight_only = checkpoint.quantization.weight_only and not calibrated if packed else selection.scaling is None
            kv = checkpoint.quantization.kv_cache if method == "modelopt" else None
            finish_folder(working, checkpoint.config, method, qmodel, weight_only, kv)
            if output == "orbax":
                to_orbax(formats.open_checkpoint(working), qmodel, rules, working / "orbax", progress)
        huggingface.warn_about(checkpoint, family, {path: path in packed for path in layers}, notes)
        sources.check()
        _publish(working, save_dir, source, report, output)
    return report


def _publish(working: Path, save_dir: Path, source: Path, report: list[dict[str, Any]], output: str) -> None:
    finished = working / "orbax" if output == "orbax" else working
    if output != "orbax":
        _warn_of_missing_scales(formats.open_checkpoint(finished), save_dir)
    resume.write_json(finished / REPORT, report)
    copy_companions(source, finished)
    resume.appear(working, finished, save_dir)


def _warn_of_missing_scales(checkpoint: Checkpoint, save_dir: Path) -> None:
    """Says so where the config promises quantized activations and no tensor has a scale for them: ours find one at each call."""
    stored = any(name.endswith(("input_scale", "input_global_scale")) for name in checkpoint.tensors)
    if not checkpoint.quantization.weight_only and not stored:
        _log.warning("%s: its config says that activations are quantized, but it has no input scales, which other serving stacks ask for: make them "
                     "with --calibration-prompts, or export with --scaling none (weights only)", save_dir)  # fmt: skip


def _packed_report(checkpoint: Checkpoint, qmodel: nnx.Module) -> list[dict[str, Any]]:
    rows = []
    for name, info in checkpoint.tensors.items():
        if info.dtype == np.uint8:
            rows.append({"name": name.removesuffix(".weight").removesuffix(".weight_packed"), "shape": [*info.shape[:-1], 2 * info.shape[-1]]})
    return rows


def _export(
    source: Path, save_dir: Path, selection: Selection, output: str, calibration: Calibration | None, progress: Progress
) -> list[dict[str, Any]]:
    """An Orbax folder of ours into ModelOpt or compressed-tensors files; with a calibration, into Orbax too, in static mode."""
    to_static = calibration is not None and isinstance(selection.scaling, Static)
    if output == "orbax" and not to_static:
        raise CheckpointError(f"{source}: an Orbax checkpoint already; choose output modelopt or compressed-tensors")
    if selection.selects or (selection.scaling != Token() and not to_static):
        raise CheckpointError(f"{source}: the weights are quantized already; layers and modes cannot be chosen any more")
    folder = orbax.read_folder(source)
    metadata = folder.metadata
    if metadata.get("recipe") == "float":
        raise CheckpointError(f"{source}: an Orbax folder in floating point; quantize the Hugging Face folder that it was made from, or, in "
                              "Python: load_model, quantize_model, save_model")  # fmt: skip
    way_out = "such a model goes into these formats once nvfp4jax.models.register knows its family; in Python, save_model and load_model(like=)"
    qmodel = saved_model.abstract_model(source, metadata, way_out=way_out)
    family = models.family_of(metadata["config"])
    extras = orbax.restore_extras(folder)
    if calibration is not None:
        progress(0, 1, "calibration")
        found = _calibrated(saved_model.load_model(source), family, calibration)
        extras |= {f"{name}.input_scale": scale for name, scale in found.items()}
    shapes = orbax.flatten(nnx.state(qmodel, WEIGHTS))
    working = save_dir.with_name(save_dir.name + ".partial")
    modules = list(huggingface.owning_modules(qmodel))
    method = "modelopt" if output == "orbax" else output
    report: list[dict[str, Any]] = []
    with resume.kept_unless_bad(working):
        resume.working_folder(working, resume.fingerprint(resume.Sources(()), ["export", str(source), output, metadata.get("digests")]))
        shards: list[list[tuple]] = [[]]
        size = 0
        for path, module in modules:
            nbytes = sum(leaf.size * leaf.dtype.itemsize for name, leaf in shapes.items() if name.rpartition("/")[0] == path_string(path))
            if size and size + nbytes > _EXPORT_SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append((path, module))
            size += nbytes
        done = 0
        for number, shard in enumerate(shards):
            tensors: dict[str, np.ndarray] = {}
            for path, module in shard:
                wanted = {name: leaf for name, leaf in shapes.items() if name.rpartition("/")[0] == path_string(path)}
                leaves = {name.rpartition("/")[2]: np.asarray(v) for name, v in orbax.restore_leaves(folder, wanted, subset=True).items()}
                tensors |= export_module(family, path, module, leaves, extras, method, report)
                done += 1
                progress(done, len(modules), path_string(path))
            if number == 0 and method == "modelopt":
                tensors |= {name: value for name, value in extras.items() if name.endswith(("k_scale", "v_scale"))}
            file = working / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            with Writer(file, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
        weight_only = not any(isinstance(m, NVFP4Linear | NVFP4Experts) and m.scaling is not None for _, m in modules)
        kv = metadata.get("kv_cache") if method == "modelopt" else None
        finish_folder(working, metadata["config"], method, qmodel, weight_only and not extras, kv)
        if output == "orbax":
            checkpoint = formats.open_checkpoint(working)
            static = huggingface.with_input_scales(nnx.view(qmodel, scaling="static"))
            to_orbax(checkpoint, static, saved_model.rules_of(static), working / "orbax", progress)
        _publish(working, save_dir, source, report, output)
    return report


