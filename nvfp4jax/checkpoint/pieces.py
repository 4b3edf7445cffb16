"""The offline quantizer's work, piece by piece: each unit makes some tensors of the result, a file of them can be taken up again."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nvfp4jax import numerics
from nvfp4jax.array import NVFP4Array, check_k, quantize
from nvfp4jax.checkpoint import formats, huggingface, resume
from nvfp4jax.checkpoint.formats import BF16, BLOCK, E4M3, Checkpoint, PackedWeight
from nvfp4jax.checkpoint.safetensors import CheckpointError, TensorInfo, Writer, read_header
from nvfp4jax.layers import Experts, NVFP4Experts, NVFP4Linear
from nvfp4jax.models import Family
from nvfp4jax.scaling import Request

_log = logging.getLogger(__name__)

_CHUNK = 2**22  # elements quantized at once, which bounds the scratch memory
Progress = Callable[[int, int, str], None]


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
class Unit:
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


def report_row(name: str, weight: PackedWeight, error: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "shape": list(weight.shape), "global_scale": float(weight.global_scale)}
    if error is not None:
        row |= {"relative_error": error, "sqnr_db": float(-20 * np.log10(error)) if error else None}
    return row


def stored_input_scale(checkpoint: Checkpoint, module: str, index: int | None = None) -> np.ndarray | None:
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


def _with_input_scales(weights: Sequence[PackedWeight], names: Sequence[str], calibrated: Mapping[str, np.ndarray]) -> list[PackedWeight]:
    return [dataclasses.replace(w, input_scale=calibrated.get(name, w.input_scale)) for w, name in zip(weights, names, strict=True)]


def units_of(
    checkpoint: Checkpoint, family: Family, qmodel: nnx.Module, method: str, share: bool, notes: huggingface.Notes, calibrated: Mapping[str, np.ndarray]
) -> Iterator[Unit]:
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
) -> Unit:
    names = [family.module_name(path) for path, _ in group]
    shapes = [layer.matrix_shape for _, layer in group]
    sources = [_float_source(checkpoint, name) for name in names]
    specs = {}
    for name, shape in zip(names, shapes, strict=True):
        specs |= _packed_specs(name, shape, method, name in calibrated or stored_input_scale(checkpoint, name) is not None)

    def make():
        weights = [formats.read_weight(checkpoint, name, shape) for name, shape in zip(names, shapes, strict=True)]
        stored = {name: stored_input_scale(checkpoint, name) for name in names}
        errors: Sequence[float | None] = [None] * len(weights)
        if not isinstance(weights[0], PackedWeight):
            weights, errors = quantize_together(weights, names, group[0][1].weight_four_over_six)
        weights = _with_input_scales(weights, names, stored | dict(calibrated))
        tensors = {}
        for name, weight in zip(names, weights, strict=True):
            tensors |= formats.packed_tensors(name, weight, method)
        return tensors, [report_row(*row) for row in zip(names, weights, errors, strict=True)]

    return Unit(sources[0].file.name, sum(source.nbytes for source in sources), specs, make)


def _expert_units(
    checkpoint: Checkpoint, family: Family, path: tuple, layer: NVFP4Experts, method: str, notes: huggingface.Notes, calibrated: Mapping[str, np.ndarray]
) -> Iterator[Unit]:
    experts, e, h, i = family.module_name(path), layer.num_experts, layer.hidden, layer.intermediate
    for index in range(e):
        for roles, shape in ((("gate", "up"), (e, i, h)), (("down",), (e, h, i))):
            names = [family.experts.module(experts, index, role) for role in roles]
            fused = formats.fused_experts(checkpoint, family.experts, experts, roles[0])
            sources = [_float_source(checkpoint, name) for name in names] if fused is None else [checkpoint.tensors[fused]]
            holders = names if fused is None else [fused.removesuffix(".weight")] * len(names)
            stored = {
                name: stored_input_scale(checkpoint, holder, None if fused is None else index)
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
                return tensors, [report_row(*row) for row in zip(names, weights, errors, strict=True)]

            yield Unit(sources[0].file.name, sum(s.nbytes for s in sources) // (1 if fused is None else e), specs, make)


def _copies(checkpoint: Checkpoint, family: Family, path: tuple, layer: nnx.Module) -> Iterator[Unit]:
    """What stays in floating point, as it is (FP8 as bfloat16), and the KV cache's scales."""
    module = family.module_name(path)

    def decode(name: str, shape: tuple[int, ...]):
        return lambda: ({f"{name}.weight": formats.cast(formats.read_weight(checkpoint, name, shape), BF16, f"{checkpoint.directory}: {name!r}")}, [])

    def copy(info: TensorInfo):
        return lambda: ({info.name: formats.read_float(checkpoint, info.name, info.shape)}, [])

    def unit(info: TensorInfo) -> Unit:
        if info.dtype == E4M3:
            name = info.name.removesuffix(".weight")
            return Unit(info.file.name, info.nbytes, {info.name: (BF16, info.shape)}, decode(name, info.shape))
        return Unit(info.file.name, info.nbytes, {info.name: (info.dtype, info.shape)}, copy(info))

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


def _is_finished(piece: Path, rows_file: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bool:
    """Whether an earlier run has written the piece: its report comes last."""
    if not piece.exists() or not rows_file.exists():
        return False
    try:
        return {name: (info.dtype, info.shape) for name, info in read_header(piece).items()} == {k: (np.dtype(d), tuple(n)) for k, (d, n) in specs.items()}
    except CheckpointError:
        return False


def run_units(units: list[Unit], pieces: Path, progress: Progress) -> list[dict[str, Any]]:
    """Writes one safetensors file for each input file, skipping those that an earlier run has finished; the report's rows."""
    by_file: dict[str, list[Unit]] = {}
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
