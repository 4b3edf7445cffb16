"""The offline quantizer: a folder in, an NVFP4 folder out, one tensor at a time.

    Hugging Face (bf16, FP8 by blocks, ModelOpt or compressed-tensors NVFP4)  ->  orbax | modelopt | compressed-tensors
    Orbax (ours)                                                              ->  modelopt | compressed-tensors

With a `Calibration` the result has input scales made from its prompts, whatever the source had (then Orbax -> orbax too).

Work goes on in `<save_dir>.partial`, one output file for each input file, and a run that was interrupted goes on where it was.
The save_dir appears by one rename when all is done; bad input leaves nothing behind.
"""

import dataclasses
import functools
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nvfp4jax import models, numerics
from nvfp4jax.array import NVFP4Array, check_k, quantize
from nvfp4jax.calibration import input_scales
from nvfp4jax.checkpoint import formats, huggingface, orbax, resume
from nvfp4jax.checkpoint.formats import BF16, BLOCK, E4M3, Checkpoint, PackedWeight
from nvfp4jax.checkpoint.huggingface import quantizable
from nvfp4jax.checkpoint.safetensors import CheckpointError, TensorInfo, Writer, open_regular, read_header
from nvfp4jax.layers import WEIGHTS, Experts, NVFP4Experts, NVFP4Linear
from nvfp4jax.models import Family
from nvfp4jax.scaling import Name, Request, Scaling, Static, Token, parse
from nvfp4jax.swap import Rule, path_string, quantize_model, scaled_layers

_log = logging.getLogger(__name__)

OUTPUTS = ("orbax", "modelopt", "compressed-tensors")
REPORT = "quantization_report.json"
# Files beside the weights that a user of the result needs.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt",
              "chat_template.jinja")  # fmt: skip
_CHUNK = 2**22  # elements quantized at once, which bounds the scratch memory
_EXPORT_SHARD_BYTES = 4 * 2**30
_LARGEST_COMPANION = 2**28

Progress = Callable[[int, int, str], None]


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
    four_over_six: str | None = None
    scaling: Name | Scaling | None = "token"

    def __post_init__(self):
        object.__setattr__(self, "scaling", parse(self.scaling, "Selection"))

    @property
    def selects(self) -> bool:
        """Whether it says anything about which layers, or how weights are rounded."""
        return dataclasses.replace(self, scaling="token") != Selection()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Prompts to make input scales from: batches and headroom as `nvfp4jax.calibrate` takes them. The model is loaded for it, whole."""

    batches: Sequence[Any]
    headroom: float = 1.0


def _calibrated(
    qmodel: nnx.Module, family: Family, calibration: Calibration, float_model: nnx.Module | None = None
) -> dict[str, np.ndarray]:
    """Input scales f32 [] by checkpoint module, of all NVFP4 layers."""
    static = nnx.view(qmodel, scaling="static")
    modules = scaled_layers(static)
    scales: dict[str, np.ndarray] = {}
    found = input_scales(static, calibration.batches, headroom=calibration.headroom, float_model=float_model)
    for path, inputs in found.items():
        name = family.module_name(path)
        if isinstance(modules[path], NVFP4Linear):
            scales[name] = np.asarray(inputs["input"])
            continue
        of = {"gate": "gate_up_input", "up": "gate_up_input", "down": "down_input"}
        for e in range(modules[path].num_experts):
            scales |= {family.experts.module(name, e, role): np.asarray(inputs[which]) for role, which in of.items()}
    return scales


def _with_input_scales(weights: Sequence[PackedWeight], names: Sequence[str], calibrated: Mapping[str, np.ndarray]) -> list[PackedWeight]:
    return [dataclasses.replace(w, input_scale=calibrated.get(name, w.input_scale)) for w, name in zip(weights, names, strict=True)]


def rules_for(model: nnx.Module, family: Family, selection: Selection) -> list[Rule]:
    """The rules of a selection for a float model (abstract is enough), without any that would match nothing.

    ValueError for an `exclude` that matches no layer, and for a selection that leaves nothing to quantize.
    """
    paths = {path_string(path): module for path, module in quantizable(model).items()}
    depth = len(model.layers)
    if selection.keep_first_n < 0 or selection.keep_last_n < 0:
        raise ValueError(f"keep_first_n={selection.keep_first_n} and keep_last_n={selection.keep_last_n} must not be negative")
    skipped: dict[str, list[str]] = {family.kept: [path for path in paths if family.keeps(path)]}
    kept = [*range(min(selection.keep_first_n, depth)), *range(max(depth - selection.keep_last_n, 0), depth)]
    for layer in dict.fromkeys(kept):
        skipped[rf"layers/{layer}/.*"] = [path for path in paths if path.startswith(f"layers/{layer}/")]
    for pattern in selection.exclude:
        try:
            found = [path for path in paths if re.search(pattern, path) or re.search(pattern, family.module_name(path.split("/")))]
        except re.error as error:
            raise ValueError(f"exclude {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise ValueError(f"exclude {pattern!r} matches no layer; the layers are: {', '.join([*paths][:4])}, ...")
        for path in found:
            skipped[re.escape(path)] = [path]
    if selection.experts_only:
        for path, module in paths.items():
            if not isinstance(module, Experts):
                skipped[re.escape(path)] = [path]
    rules, taken = [], set()
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


@functools.partial(jax.jit, static_argnames="four_over_six")
def _quantize_rows(w: jax.Array, amax: jax.Array, four_over_six: str | None) -> NVFP4Array:
    return quantize(w.astype(jnp.bfloat16), Request(amax=amax, four_over_six=four_over_six))


@jax.jit
def _squared_errors(w: jax.Array, array: NVFP4Array) -> tuple[jax.Array, jax.Array]:
    w = w.astype(jnp.float32)
    error = array.dequantize(jnp.float32) - w
    return (error * error).sum(), (w * w).sum()


def quantize_together(
    weights: Sequence[np.ndarray], names: Sequence[str], four_over_six: str | None = None
) -> tuple[list[PackedWeight], list[float]]:
    """Weights [N_i, K] -> NVFP4 with one global scale for all of them, and the relative error of each; in rows that fit the cache.

    The bits are those of `array.quantize_weight` on the weights stacked along N.
    """
    for w, name in zip(weights, names, strict=True):
        check_k(w.shape[1], name, w.shape)
    amax = np.float32(0)
    for w in weights:
        w = w.reshape(-1)
        for start in range(0, w.size, _CHUNK):
            amax = np.maximum(amax, np.abs(w[start : start + _CHUNK].astype(BF16).astype(np.float32)).max(initial=np.float32(0)))
    packed, errors = [], []
    for w in weights:
        n, k = w.shape
        rows = max(1, _CHUNK // k)
        out = PackedWeight(np.empty((n, k // 2), np.uint8), np.empty((n, k // BLOCK), E4M3), np.zeros((), np.float32))
        _, global_scale, _ = numerics.global_scales(jnp.float32(amax), four_over_six=four_over_six is not None)
        out = dataclasses.replace(out, global_scale=np.asarray(global_scale))
        squares = np.zeros(2)
        for start in range(0, n, rows):
            part = jnp.asarray(w[start : start + rows])
            array = _quantize_rows(part, jnp.float32(amax), four_over_six)
            out.packed[start : start + rows], out.scale[start : start + rows] = np.asarray(array.packed), np.asarray(array.scale)
            squares += np.array([float(s) for s in _squared_errors(part, array)])
        packed.append(out)
        errors.append(float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0)
    return packed, errors


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A piece of work: some tensors of the output, made at once.

    file: the input file that it is counted to. specs: tensor -> (dtype, shape). make: the tensors, and rows of the report.
    """

    file: str
    nbytes: int
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]]
    make: Callable[[], tuple[dict[str, np.ndarray], list[dict[str, Any]]]]


def _packed_specs(module: str, shape: tuple[int, int], method: str, input_scale: bool) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    n, k = shape
    scalar = np.zeros((), np.float32)
    weight = PackedWeight(np.empty((n, k // 2), np.uint8), np.empty((n, k // BLOCK), E4M3), scalar + 1, scalar + 1 if input_scale else None)
    return {name: (tensor.dtype, tensor.shape) for name, tensor in formats.packed_tensors(module, weight, method).items()}


def _row(name: str, weight: PackedWeight, error: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "shape": list(weight.shape), "global_scale": float(weight.global_scale)}
    if error is not None:
        row |= {"relative_error": error, "sqnr_db": float(-20 * np.log10(error)) if error else None}
    return row


def _stored_input_scale(checkpoint: Checkpoint, module: str, index: int | None = None) -> np.ndarray | None:
    """The folder's input scale, None where it has none or one that is no scale: it is then left out."""
    try:
        return formats.input_scale_of(checkpoint, module, index)
    except CheckpointError as error:
        _log.warning("%s; it is left out", error)
        return None


def _float_source(checkpoint: Checkpoint, module: str) -> TensorInfo:
    for name in (f"{module}.weight", f"{module}.weight_packed", module):
        if name in checkpoint.tensors:
            return checkpoint.tensors[name]
    raise CheckpointError(f"{checkpoint.directory}: tensor {module + '.weight'!r} is missing")


def _units(
    checkpoint: Checkpoint, family: Family, qmodel: nnx.Module, method: str, share: bool, notes: huggingface.Notes, calibrated: Mapping[str, np.ndarray]
) -> Iterator[_Unit]:
    """The work that turns a folder into `method`'s tensors. share: q, k, v, and gate and up, get one global scale each group.

    calibrated: input scales by module, in place of the folder's.
    """
    done: set[tuple] = set()
    layers = dict(huggingface.owning_modules(qmodel))
    for path, layer in layers.items():
        if isinstance(layer, NVFP4Experts):
            yield from _expert_units(checkpoint, family, path, layer, method, notes, calibrated)
            continue
        if isinstance(layer, NVFP4Linear):
            if path not in done:
                group = _group(path, layers, checkpoint, family) if share else [path]
                done |= set(group)
                yield _linear_unit(checkpoint, family, [(p, layers[p]) for p in group], method, calibrated)
        yield from _copies(checkpoint, family, path, layer)


def _group(path: tuple, layers: dict[tuple, nnx.Module], checkpoint: Checkpoint, family: Family) -> list[tuple]:
    """The linears that serving stacks fuse with this one, and so must share its global scale; packed ones keep theirs."""
    group = [*family.group(path)]
    fused = all(isinstance(layers.get(p), NVFP4Linear) and not huggingface.is_packed(checkpoint, family, p, layers[p]) for p in group)
    return group if fused else [path]


def _linear_unit(
    checkpoint: Checkpoint, family: Family, group: list[tuple[tuple, NVFP4Linear]], method: str, calibrated: Mapping[str, np.ndarray]
) -> _Unit:
    names = [family.module_name(path) for path, _ in group]
    shapes = [layer.matrix_shape for _, layer in group]
    sources = [_float_source(checkpoint, name) for name in names]
    specs = {}
    for name, shape in zip(names, shapes, strict=True):
        specs |= _packed_specs(name, shape, method, name in calibrated or _stored_input_scale(checkpoint, name) is not None)

    def make():
        weights = [formats.read_weight(checkpoint, name, shape) for name, shape in zip(names, shapes, strict=True)]
        stored = {name: _stored_input_scale(checkpoint, name) for name in names}
        errors: Sequence[float | None] = [None] * len(weights)
        if not isinstance(weights[0], PackedWeight):
            weights, errors = quantize_together(weights, names, group[0][1].weight_four_over_six)
        weights = _with_input_scales(weights, names, stored | dict(calibrated))
        tensors = {}
        for name, weight in zip(names, weights, strict=True):
            tensors |= formats.packed_tensors(name, weight, method)
        return tensors, [_row(*row) for row in zip(names, weights, errors, strict=True)]

    return _Unit(sources[0].file.name, sum(source.nbytes for source in sources), specs, make)


def _expert_units(
    checkpoint: Checkpoint, family: Family, path: tuple, layer: NVFP4Experts, method: str, notes: huggingface.Notes, calibrated: Mapping[str, np.ndarray]
) -> Iterator[_Unit]:
    experts, e, h, i = family.module_name(path), layer.num_experts, layer.hidden, layer.intermediate
    for index in range(e):
        for roles, shape in ((("gate", "up"), (e, i, h)), (("down",), (e, h, i))):
            names = [family.experts.module(experts, index, role) for role in roles]
            fused = formats.fused_experts(checkpoint, family.experts, experts, roles[0])
            sources = [_float_source(checkpoint, name) for name in names] if fused is None else [checkpoint.tensors[fused]]
            holders = names if fused is None else [fused.removesuffix(".weight")] * len(names)
            stored = {
                name: _stored_input_scale(checkpoint, holder, None if fused is None else index)
                for name, holder in zip(names, holders, strict=True)
            }
            specs = {}
            for name in names:
                specs |= _packed_specs(name, shape[1:], method, name in calibrated or stored[name] is not None)

            def make(index=index, roles=roles, shape=shape, names=names, stored=stored):
                if len(roles) == 2:
                    weights = huggingface.gate_up(checkpoint, family, experts, index, shape, notes)
                else:
                    weights = [formats.read_expert(checkpoint, family.experts, experts, roles[0], index, shape)]
                errors: Sequence[float | None] = [None] * len(weights)
                if not isinstance(weights[0], PackedWeight):
                    weights, errors = quantize_together(weights, names, layer.weight_four_over_six)
                weights = _with_input_scales(weights, names, stored | dict(calibrated))
                tensors = {}
                for name, weight in zip(names, weights, strict=True):
                    tensors |= formats.packed_tensors(name, weight, method)
                return tensors, [_row(*row) for row in zip(names, weights, errors, strict=True)]

            yield _Unit(sources[0].file.name, sum(s.nbytes for s in sources) // (1 if fused is None else e), specs, make)


def _copies(checkpoint: Checkpoint, family: Family, path: tuple, layer: nnx.Module) -> Iterator[_Unit]:
    """What stays in floating point, as it is (FP8 as bfloat16), and the KV cache's scales."""
    module = family.module_name(path)

    def decode(name: str, shape: tuple[int, ...]):
        return lambda: ({f"{name}.weight": formats.read_weight(checkpoint, name, shape).astype(BF16)}, [])

    def copy(info: TensorInfo):
        return lambda: ({info.name: formats.read_float(checkpoint, info.name, info.shape)}, [])

    def unit(info: TensorInfo) -> _Unit:
        if info.dtype == E4M3:
            name = info.name.removesuffix(".weight")
            return _Unit(info.file.name, info.nbytes, {info.name: (BF16, info.shape)}, decode(name, info.shape))
        return _Unit(info.file.name, info.nbytes, {info.name: (info.dtype, info.shape)}, copy(info))

    names = [family.tensor_name((*path, param)) for param in huggingface.plain_params(layer)]
    if isinstance(layer, Experts):
        modules = dict.fromkeys(huggingface.expert_modules(checkpoint, family, path, layer))
        names += [m if m in checkpoint.tensors else f"{m}.weight" for m in modules]
    elif isinstance(layer, nnx.Linear):
        names.append(f"{module}.weight")
    for name in names:
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is missing")
        yield unit(checkpoint.tensors[name])
    for kind in ("k_scale", "v_scale"):
        if f"{module}.{kind}" in checkpoint.tensors:
            yield unit(checkpoint.tensors[f"{module}.{kind}"])


def _excluded(qmodel: nnx.Module, family: Family, method: str) -> list[str]:
    """The modules left in floating point, in the format's own spelling."""
    head, embedding = (family.module_name((name,)) for name in (family.head, family.embedding))
    names = [head, embedding] if method == "modelopt" else [head]
    for path, module in quantizable(qmodel).items():
        name = family.module_name(path)
        if isinstance(module, Experts):
            name = f"{name}*" if method == "modelopt" else f"re:{re.escape(name)}\\..*"
        names.append(name)
    return list(dict.fromkeys(names))


def _is_finished(piece: Path, rows_file: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bool:
    """Whether an earlier run has written the piece: its report comes last."""
    if not piece.exists() or not rows_file.exists():
        return False
    try:
        return {name: (info.dtype, info.shape) for name, info in read_header(piece).items()} == {k: (np.dtype(d), tuple(n)) for k, (d, n) in specs.items()}
    except CheckpointError:
        return False


def _run_units(units: list[_Unit], pieces: Path, progress: Progress) -> list[dict[str, Any]]:
    """Writes one safetensors file for each input file, skipping those that an earlier run has finished; the report's rows."""
    by_file: dict[str, list[_Unit]] = {}
    for unit in units:
        by_file.setdefault(unit.file, []).append(unit)
    total, done = sum(unit.nbytes for unit in units), 0
    report = []
    for number, file in enumerate(sorted(by_file)):
        piece = pieces / f"model-{number + 1:05d}-of-{len(by_file):05d}.safetensors"
        rows_file = piece.with_suffix(".report.json")
        nbytes = sum(unit.nbytes for unit in by_file[file])
        specs = {name: spec for unit in by_file[file] for name, spec in unit.specs.items()}
        if _is_finished(piece, rows_file, specs):
            done += nbytes
            report += json.loads(rows_file.read_text())
            progress(done, total, file)
            continue
        rows = []
        with Writer(piece, specs) as writer:
            for unit in by_file[file]:
                tensors, unit_rows = unit.make()
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                rows += unit_rows
                done += unit.nbytes
                progress(done, total, file)
        resume.write_json(rows_file, rows)
        report += rows
    return report


def _finish_folder(folder: Path, config: dict[str, Any], method: str, qmodel: nnx.Module, weight_only: bool, kv: str | None) -> None:
    """Index and configs around the pieces."""
    weight_map, size = {}, 0
    for piece in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(piece).items():
            weight_map[name] = piece.name
            size += info.nbytes
    resume.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    excluded = _excluded(qmodel, models.family_of(config), method)
    quantization, separate = formats.quantization_configs(method, excluded, weight_only=weight_only, kv_cache=kv)
    resume.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "quantization_config"} | {"quantization_config": quantization})
    if separate is not None:
        resume.write_json(folder / "hf_quant_config.json", separate)


def _extras(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Scales that the model does not hold, kept for a way back: input scales and the KV cache's, by ModelOpt's names."""
    found: dict[str, np.ndarray | None] = {}
    for name in checkpoint.tensors:
        module, _, kind = name.rpartition(".")
        if kind in ("k_scale", "v_scale"):
            found[name] = formats.read_scalar(checkpoint, name)
        elif kind in ("input_scale", "input_global_scale"):
            found[f"{module}.input_scale"] = _stored_input_scale(checkpoint, module)
    found = {name: value for name, value in found.items() if value is not None}
    return found


def _to_orbax(checkpoint: Checkpoint, qmodel: nnx.Module, rules: Sequence[Rule], target: Path, progress: Progress) -> None:
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
    extras = _extras(checkpoint)
    metadata = {
        "recipe": orbax.recipe_id(rules),
        "config": {k: v for k, v in checkpoint.config.items() if k != "quantization_config"},
        "rules": orbax.rules_to_json(rules),
        "dtype": str(jnp.dtype(qmodel.dtypes.dtype)),
        "kv_cache": checkpoint.quantization.kv_cache,
    }
    if extras:
        batch[orbax.EXTRAS] = np.array(list(extras.values()), np.float32)
        metadata[orbax.EXTRAS] = list(extras)
    save.finish(batch, metadata)


def _copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            opened, size = open_regular(source / name)
            with opened, open(target / name, "wb") as copy:
                if size > _LARGEST_COMPANION:
                    raise CheckpointError(f"{source / name}: {size} bytes; at most {_LARGEST_COMPANION} are copied")
                shutil.copyfileobj(opened, copy)


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
    because the serving stacks that read them fuse these layers and take one scale.
    Memory: about one input tensor and its result; for `orbax` output one layer's experts.

    calibration: input scales from its prompts, for every layer that is NVFP4 in the result, stored whatever the activation mode
        ("static" runs by them; other serving stacks read them). A floating-point source is calibrated in floating point, an NVFP4
        source with its weights decoded; first the whole model is loaded, on the default device.
    progress(done, total, what) is called along the way. CheckpointError or ValueError for bad input, before anything is written
    where that can be known; save_dir must not exist.
    """
    source, save_dir = Path(source), Path(save_dir).absolute()
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r}: one of {', '.join(OUTPUTS)}")
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
        rules = [
            Rule(re.escape(path_string(path)), scaling=selection.scaling)
            for path in packed
        ]
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
    units = list(_units(checkpoint, family, qmodel, method, share, notes, calibrated))
    if output == "compressed-tensors" and checkpoint.quantization.kv_cache is not None:
        _log.warning("%s: the KV cache's scales are left out: compressed-tensors output has none", source)
        units = [unit for unit in units if not any(name.endswith((".k_scale", ".v_scale")) for name in unit.specs)]
    sources = resume.Sources(info.file for info in checkpoint.tensors.values())
    table = sorted((i.name, str(i.dtype), i.shape, i.file.name, i.offset) for i in checkpoint.tensors.values())
    plan = [orbax.FORMAT_VERSION, output, method, share, orbax.rules_to_json(rules), checkpoint.config, table]
    plan.append({name: float(scale) for name, scale in calibrated.items()})
    working = save_dir.with_name(save_dir.name + ".partial")
    with resume.kept_unless_bad(working):
        resume.working_folder(working, resume.fingerprint(sources, plan))
        if output == "orbax" and packed and not calibrated:
            report = _packed_report(checkpoint, qmodel)
            _to_orbax(checkpoint, qmodel, rules, working / "orbax", progress)
        else:
            report = _run_units(units, working, progress)
            weight_only = checkpoint.quantization.weight_only and not calibrated if packed else selection.scaling is None
            kv = checkpoint.quantization.kv_cache if method == "modelopt" else None
            _finish_folder(working, checkpoint.config, method, qmodel, weight_only, kv)
            if output == "orbax":
                _to_orbax(formats.open_checkpoint(working), qmodel, rules, working / "orbax", progress)
        huggingface.warn_about(checkpoint, [family.module_name(path) for path in packed], notes)
        sources.check()
        _publish(working, save_dir, source, report, output)
    return report


def _publish(working: Path, save_dir: Path, source: Path, report: list[dict[str, Any]], output: str) -> None:
    finished = working / "orbax" if output == "orbax" else working
    resume.write_json(finished / REPORT, report)
    _copy_companions(source, finished)
    resume.appear(working, finished, save_dir)


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
    qmodel = orbax.abstract_model(source, metadata)
    family = models.family_of(metadata["config"])
    extras = orbax.restore_extras(folder)
    if calibration is not None:
        progress(0, 1, "calibration")
        found = _calibrated(orbax.load_model(source), family, calibration)
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
                tensors |= _export_module(family, path, module, leaves, extras, method, report)
                done += 1
                progress(done, len(modules), path_string(path))
            if number == 0 and method == "modelopt":
                tensors |= {name: value for name, value in extras.items() if name.endswith(("k_scale", "v_scale"))}
            path = working / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            with Writer(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
        weight_only = not any(isinstance(m, NVFP4Linear | NVFP4Experts) and m.scaling is not None for _, m in modules)
        kv = metadata.get("kv_cache") if method == "modelopt" else None
        _finish_folder(working, metadata["config"], method, qmodel, weight_only and not extras, kv)
        if output == "orbax":
            checkpoint = formats.open_checkpoint(working)
            static = huggingface.with_input_scales(nnx.view(qmodel, scaling="static"))
            _to_orbax(checkpoint, static, orbax.rules_of(static), working / "orbax", progress)
        _publish(working, save_dir, source, report, output)
    return report


def _export_module(
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
        report.append(_row(weight_name, weight, None))
    for param, value in leaves.items():
        value = np.ascontiguousarray(value.T) if param == "kernel" else value
        tensors[family.tensor_name((*path, param))] = value
    return tensors
