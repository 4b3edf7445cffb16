"""What a checkpoint holds: a table of its layers, and histograms of its scales. `nvfp4jax inspect`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvfp4jax import arguments
from nvfp4jax.checkpoint import formats, orbax
from nvfp4jax.checkpoint.safetensors import read_tensor
from nvfp4jax.checkpoint.survey import require_folder

_BLOCK_SCALES = 1 << 16  # of a tensor, as many are drawn


def show(directory: Path) -> None:
    """Prints the table. CheckpointError for a folder that cannot be read."""
    require_folder(directory)
    if orbax.exists(directory):
        arguments.device()
        _inspect_orbax(directory)
    else:
        _inspect_huggingface(directory)


def plot_scales(directory: Path, file: Path) -> None:
    """Draws histograms of log2: block scales (from evenly spread blocks of each tensor), global scales, input scales where there are any.

    ValueError where the folder has no NVFP4 weight, where matplotlib is missing, and for a file that cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    if file.suffix not in (".png", ".svg", ".pdf") or not file.absolute().parent.is_dir():
        raise ValueError(f"--plot {file}: a file that ends in .png, .svg or .pdf is needed, in a folder that exists")
    scales = _orbax_scales(directory) if orbax.exists(directory) else _huggingface_scales(directory)
    if not len(scales["block scales"]):
        raise ValueError(f"{directory}: no NVFP4 weight, so there is no scale to draw")
    drawn = {what: values[values > 0] for what, values in scales.items() if what == "block scales" or (values > 0).any()}
    figure, axes = plt.subplots(1, len(drawn), figsize=(10, 3), squeeze=False)
    for axis, (what, values) in zip(axes[0], drawn.items(), strict=True):
        axis.set(title=f"{what} ({len(values):,})", xlabel="log2")
        if len(values):
            axis.hist(np.log2(values), bins=40)
    blocks = axes[0, 0]
    blocks.axvspan(-9, -6, alpha=0.2, color="tab:red", label="E4M3 subnormal")
    blocks.legend(loc="upper center", fontsize=8)
    blocks.set_ylabel("how many")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def _some(values: np.ndarray) -> np.ndarray:
    flat = np.asarray(values).reshape(-1)
    return flat[:: -(-flat.size // _BLOCK_SCALES)].astype(np.float32)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(np.asarray(part, np.float32).reshape(-1) for part in parts)])


def _huggingface_scales(directory: Path) -> dict[str, np.ndarray]:
    checkpoint = formats.open_checkpoint(directory)
    blocks: list[np.ndarray] = []
    globals_: list[np.ndarray] = []
    inputs: list[np.ndarray] = []
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight").removesuffix(".weight_packed")
        if module == name or not formats.is_packed(checkpoint, module):
            continue
        blocks.append(_some(read_tensor(checkpoint.tensors[f"{module}.weight_scale"])))
        globals_ += _scalars(checkpoint, module, ".weight_scale_2", ".weight_global_scale")
        inputs += _scalars(checkpoint, module, ".input_scale", ".input_global_scale")
    return {"block scales": _joined(blocks), "global scales": _joined(globals_), "input scales": _joined(inputs)}


def _scalars(checkpoint: formats.Checkpoint, module: str, plain: str, inverse: str) -> list[np.ndarray]:
    """A module's scalar by ModelOpt's name, or by compressed-tensors', which stores the reciprocal."""
    if module + plain in checkpoint.tensors:
        return [formats.read_scalar(checkpoint, module + plain)]
    if module + inverse in checkpoint.tensors:
        return [formats.reciprocal(formats.read_scalar(checkpoint, module + inverse))]
    return []


def _orbax_scales(directory: Path) -> dict[str, np.ndarray]:
    folder = orbax.read_folder(directory)
    packed = {name.removesuffix("_packed") for name, leaf in folder.shapes.items() if name.endswith("_packed")}
    wanted = {name: leaf for name, leaf in folder.shapes.items() if name.endswith("_scale")}
    values = orbax.restore_leaves(folder, wanted, subset=True)
    blocks = [_some(values[f"{name}_scale"]) for name in packed]
    globals_ = [value for name, value in values.items() if name.endswith("_global_scale")]
    inputs = [value for name, value in values.items() if name.endswith("input_scale")]
    return {"block scales": _joined(blocks), "global scales": _joined(globals_), "input scales": _joined(inputs)}


def _grouped(leaves: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(pattern, names): leaves of one shape and dtype whose names differ in layer and expert numbers alone."""
    groups: dict[tuple, list[str]] = {}
    for name, leaf in leaves.items():
        pattern = re.sub(r"(?<=[./])\d+(?=[./]|$)", "*", name)
        groups.setdefault((pattern, tuple(leaf.shape), str(leaf.dtype)), []).append(name)
    return ((pattern, names) for (pattern, *_), names in groups.items())


def _range(values: Sequence[float]) -> str:
    return "" if not len(values) else f"{min(values):.3g}" if min(values) == max(values) else f"{min(values):.3g}..{max(values):.3g}"


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_total(nbytes: int, elements: int) -> None:
    print(f"total: {nbytes:,} bytes, {elements:,} weights, {8 * nbytes / max(elements, 1):.2f} bits a weight")


def _inspect_huggingface(directory: Path) -> None:
    checkpoint = formats.open_checkpoint(directory)
    tensors, quantization = checkpoint.tensors, checkpoint.quantization
    described = quantization.method or "none"
    if quantization.method is not None:
        described += f" ({'weights only, ' if quantization.weight_only else ''}{len(quantization.exclude)} exclude patterns, KV cache {quantization.kv_cache or 'unquantized'})"
    print(f"{directory}: Hugging Face, {' '.join(map(str, checkpoint.config.get('architectures') or ['?']))}, quantization: {described}")
    rows, elements = [], 0
    scales = (".weight_scale", ".weight_scale_2", ".weight_global_scale", ".input_scale", ".input_global_scale", ".weight_scale_inv")
    for pattern, names in _grouped({name: info for name, info in tensors.items() if not name.endswith(scales)}):
        info = tensors[names[0]]
        module = names[0].removesuffix(".weight").removesuffix(".weight_packed")
        modules = [name.removesuffix(".weight").removesuffix(".weight_packed") for name in names]
        packed = formats.is_packed(checkpoint, module)
        shape = (*info.shape[:-1], 2 * info.shape[-1]) if packed else info.shape
        parts = [tensors[f"{m}{scale}"] for m in modules for scale in scales if f"{m}{scale}" in tensors]
        globals_: list[float] = []
        inputs: list[float] = []
        for m in modules if packed else ():
            globals_ += map(float, _scalars(checkpoint, m, ".weight_scale_2", ".weight_global_scale"))
            inputs += map(float, _scalars(checkpoint, m, ".input_scale", ".input_global_scale"))
        nbytes = sum(tensors[name].nbytes for name in names) + sum(part.nbytes for part in parts)
        count = sum(tensors[name].nbytes // info.dtype.itemsize for name in names) * (2 if packed else 1)
        elements += count
        kind = "nvfp4" if packed else str(info.dtype)
        rows.append([pattern, str(len(names)), kind, str(list(shape)), _range(globals_), _range(inputs), f"{nbytes:,}"])
    _print_table(["tensor", "count", "format", "shape", "global scale", "input scale", "bytes"], rows)
    _print_total(sum(info.nbytes for info in tensors.values()), elements)


def _inspect_orbax(directory: Path) -> None:
    folder = orbax.read_folder(directory)
    metadata, shapes = folder.metadata, folder.shapes
    found: Any = metadata.get("config")
    config: Mapping[str, Any] = found if isinstance(found, dict) else {}
    print(f"{directory}: Orbax, format {metadata['format_version']}, {' '.join(map(str, config.get('architectures') or ['?']))}, "
          f"recipe {metadata.get('recipe')}")  # fmt: skip
    rules: Any = metadata.get("rules")
    for rule in rules[:12] if isinstance(rules, list) else ():
        print(f"  rule {rule}")
    if isinstance(rules, list) and len(rules) > 12:
        print(f"  ... {len(rules) - 12} more rules")
    suffixes = ("_global_scale", "_input_scale", "/input_scale")
    scales = orbax.restore_leaves(folder, {name: leaf for name, leaf in shapes.items() if name.endswith(suffixes)}, subset=True)
    values = {name: np.asarray(value).reshape(-1).tolist() for name, value in scales.items()}
    rows, elements = [], 0
    for pattern, names in _grouped({name: leaf for name, leaf in shapes.items() if not name.endswith((*suffixes, "_scale"))}):
        leaf = shapes[names[0]]
        packed = leaf.dtype == np.uint8
        bases = [name.removesuffix("_packed") for name in names]
        parts = [f"{base}{suffix}" for base in bases for suffix in ("_scale", "_global_scale", "_input_scale") if f"{base}{suffix}" in shapes]
        inputs = [f"{base.rpartition('/')[0]}/input_scale" for base in bases] if packed and bases[0].endswith("/kernel") else []
        inputs = [name for name in inputs if name in shapes] + [part for part in parts if part.endswith("_input_scale")]
        globals_ = [v for part in parts if part.endswith("_global_scale") for v in values[part]]
        nbytes = sum(shapes[name].size * shapes[name].dtype.itemsize for name in {*names, *parts, *inputs})
        if names != [orbax.EXTRAS]:  # scales of inputs, by the names in the metadata
            elements += sum(shapes[name].size for name in names) * (2 if packed else 1)
        shape = (*leaf.shape[:-1], 2 * leaf.shape[-1]) if packed else leaf.shape
        kind = "nvfp4" if packed else str(leaf.dtype)
        rows.append([pattern, str(len(names)), kind, str(list(shape)), _range(globals_), _range([v for n in inputs for v in values[n]]), f"{nbytes:,}"])
    _print_table(["leaf", "count", "format", "shape", "global scale", "input scale", "bytes"], rows)
    _print_total(sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values()), elements)
