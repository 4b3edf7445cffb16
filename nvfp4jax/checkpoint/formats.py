"""The weight formats of Hugging Face folders: what a quantized layer's tensors are called and what they mean.

    modelopt            <m>.weight U8 [N, K/2], .weight_scale E4M3 [N, K/16], .weight_scale_2 F32 (multiplies), .input_scale F32
    compressed-tensors  <m>.weight_packed, .weight_scale, .weight_global_scale and .input_global_scale F32 (divide)
    fp8                 <m>.weight E4M3 [N, K], .weight_scale_inv F32, one for each block of 128 x 128 (multiplies)
    none                <m>.weight BF16, F16 or F32 [N, K]

Each folder is read as its tensors say; the quantization config must name a known scheme, and its exclude list is compared with the
tensors. Layouts: NVIDIA ModelOpt `export/quant_utils.py`, compressed-tensors `compressors/nvfp4/base.py`, DeepSeek-V3 `kernel.py`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from nvfp4jax.checkpoint.quantization_config import BLOCK, Quantization, parse_quantization
from nvfp4jax.checkpoint.safetensors import CheckpointError, TensorInfo, read_folder, read_json, read_tensor
from nvfp4jax.checkpoint.survey import require_folder
from nvfp4jax.models.family import ExpertNames
from nvfp4jax.numerics import LARGEST_WEIGHT_GLOBAL_SCALE

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (BF16, np.dtype(np.float16), np.dtype(np.float32))


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """An NVFP4 weight on the host: W[n, k] = e2m1(packed) * scale[n, k // 16] * global_scale.

    packed: u8 [N, K/2], low nibble first; scale: float8_e4m3fn [N, K/16]; global_scale, input_scale: f32 [], they multiply.
    """

    packed: np.ndarray
    scale: np.ndarray
    global_scale: np.ndarray
    input_scale: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened Hugging Face folder; no tensor is read yet."""

    directory: Path
    config: dict[str, Any]
    quantization: Quantization
    tensors: Mapping[str, TensorInfo]


# Keys of a config that size or shape a model: what their values must be. Absent and null are left to the model.
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step",
    "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace", "moe_layer_freq", "max_position_embeddings",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta", "routed_scaling_factor")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "norm_topk_prob", "use_sliding_window")
_WORDS = ("model_type", "hidden_act", "scoring_func", "topk_method")
_LARGEST_COUNT = 2**24
_DEEPEST = 256  # layers; a model is built of them, at 20 ms each. The deepest known have about 130.


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30


def check_config(config: Mapping[str, Any], tensors: Mapping[str, Any] | None, where: str) -> None:
    """CheckpointError for a config.json whose values have the wrong type, or describe more than the folder's tensors could hold.

    tensors: by name, each with a `shape`; None where only the types are in question.
    """

    def is_list(value, kind) -> bool:
        return isinstance(value, list) and len(value) <= 10_000 and all(type(item) is kind for item in value)

    tests = dict.fromkeys(_COUNTS, ("a count", lambda v: type(v) is int and 0 <= v <= _LARGEST_COUNT))
    tests["num_hidden_layers"] = (f"a count of at most {_DEEPEST}", lambda v: type(v) is int and 0 <= v <= _DEEPEST)
    tests |= dict.fromkeys(_NUMBERS, ("a number of at least 0", _is_number))
    tests |= dict.fromkeys(_SWITCHES, ("true or false", lambda v: isinstance(v, bool)))
    tests |= dict.fromkeys(_WORDS, ("a string", lambda v: isinstance(v, str)))
    tests |= dict.fromkeys(("architectures", "layer_types"), ("a list of strings", lambda v: is_list(v, str)))
    tests["mlp_only_layers"] = ("a list of integers", lambda v: is_list(v, int))
    for key in ("rope_parameters", "rope_scaling"):
        tests[key] = ("an object", lambda v: isinstance(v, Mapping))
    for key, (wanted, test) in tests.items():
        if config.get(key) is not None and not test(config[key]):
            raise CheckpointError(f"{where}: {key}={str(config[key])[:80]} must be {wanted}")
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in (config.get(key) or {}).items():
            if isinstance(value, bool | str) or value is None or _is_number(value) or is_list(value, int) or is_list(value, float):
                continue
            raise CheckpointError(f"{where}: {key}: {str(name)[:80]!r} has a value that cannot be read")
        theta = (config.get(key) or {}).get("rope_theta")
        if theta is not None and not _is_number(theta):
            raise CheckpointError(f"{where}: {key}: rope_theta={str(theta)[:80]} must be a number of at least 0")
    if tensors is None:
        return
    # A model is built of as many modules as this says: bounded by the file's size, not by what the config claims.
    layers = config.get("num_hidden_layers") or 0
    experts = max(config.get(key) or 0 for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    first_axes = [info.shape[0] for info in tensors.values() if len(info.shape) == 3]
    if layers > len(tensors) or experts > max([len(tensors), *first_axes]):
        raise CheckpointError(f"{where}: {layers} layers and {experts} experts, but the folder has {len(tensors)} tensors")


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Config, quantization and tensor table of a folder, checked. CheckpointError names the file and what is wrong with it."""
    directory = Path(directory)
    require_folder(directory)
    if (directory / "adapter_config.json").exists():  # transformers applies it on loading
        raise CheckpointError(f"{directory}: adapter_config.json: an adapter lies beside the weights, which would run without it; merge it into them "
                              "(peft: merge_and_unload), or move it elsewhere")  # fmt: skip
    config = read_json(directory / "config.json")
    # A converter may leave a stale hf_quant_config.json behind: config.json decides where it says anything.
    if config.get("quantization_config") is not None:
        quantization = parse_quantization(config["quantization_config"], f"{directory / 'config.json'}: quantization_config")
    elif (directory / "hf_quant_config.json").exists():
        path = directory / "hf_quant_config.json"
        quantization = parse_quantization(read_json(path) | {"quant_method": "modelopt"}, str(path))
    else:
        quantization = Quantization()
    tensors = read_folder(directory)
    check_config(config, tensors, str(directory / "config.json"))
    return Checkpoint(directory, config, quantization, tensors)


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is missing")
    return info


def _part(info: TensorInfo, index: int | None) -> TensorInfo:
    """The tensor itself, or entry `index` of its first axis."""
    if index is None:
        return info
    size = info.nbytes // info.shape[0]
    return dataclasses.replace(info, shape=info.shape[1:], offset=info.offset + index * size, nbytes=size)


def _check(info: TensorInfo, shape: tuple[int, ...], dtypes: Sequence[np.dtype]) -> None:
    if info.shape != shape:
        raise CheckpointError(f"{info.file}: tensor {info.name!r} has shape {info.shape}, expected {shape}")
    if info.dtype not in dtypes:
        raise CheckpointError(f"{info.file}: tensor {info.name!r} has dtype {info.dtype}, expected {' or '.join(map(str, dtypes))}")


def _finite(array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The array, unless it holds NaN or infinity."""
    if array.dtype == BF16:  # on the bits: several times as fast as through float32
        fine = ((array.view(np.uint16) & np.uint16(0x7F80)) != 0x7F80).all()
    elif array.dtype == E4M3:
        fine = ((array.view(np.uint8) & np.uint8(0x7F)) != 0x7F).all()
    else:
        fine = np.isfinite(array).all()
    if not fine:
        raise CheckpointError(f"{info.file}: tensor {info.name!r} holds NaN or infinity")
    return array


def cast(values: np.ndarray, dtype: DTypeLike, name: str) -> np.ndarray:
    """Finite values in another dtype; CheckpointError where one of them is beyond its range."""
    with np.errstate(over="ignore"):
        made = values.astype(np.dtype(dtype))
    if made.dtype != values.dtype and not np.isfinite(made).all():
        raise CheckpointError(f"{name}: values up to {float(np.abs(values.astype(np.float64)).max()):.3g} do not fit {made.dtype}; load it in float32")
    return made


def _block_scales(array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """NVFP4 block scales, unless one is NaN or negative: hardware reads them without a sign."""
    if (array.view(np.uint8) & np.uint8(0x80)).any():
        raise CheckpointError(f"{info.file}: tensor {info.name!r} holds a negative scale")
    return _finite(array, info)


def read_float(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in floating point (BF16, F16 or F32) of exactly this shape, finite."""
    info = _info(checkpoint, name)
    _check(info, shape, FLOATS)
    return _finite(read_tensor(info), info)


def read_scalar(checkpoint: Checkpoint, name: str, index: int | None = None) -> np.ndarray:
    """A finite, positive f32 [] from a tensor of one element, or entry `index` of one an expert."""
    info = _info(checkpoint, name)
    if index is not None and info.shape and info.shape[0] > 1:
        if index >= info.shape[0]:
            raise CheckpointError(f"{info.file}: tensor {name!r} has shape {info.shape}, expected one value an expert")
        info = _part(info, index)
    if info.nbytes != info.dtype.itemsize:
        raise CheckpointError(f"{info.file}: tensor {name!r} has shape {info.shape}, expected one value")
    _check(info, info.shape, FLOATS)
    value = read_tensor(info).reshape(()).astype(np.float32)
    if not np.isfinite(value) or value <= 0:
        raise CheckpointError(f"{info.file}: tensor {name!r} is {float(value)}; a scale must be finite and positive")
    return value


def reciprocal(value: np.ndarray) -> np.ndarray:
    """1 / value in float32, rounded once."""
    return np.asarray(np.float32(1) / np.float32(value), np.float32)


@dataclasses.dataclass(frozen=True)
class _Names:
    """A packed weight's tensors: of one module ('m.weight', 'm.weight_scale', ...) or of a raw parameter ('p', 'p_weight_scale', ...)."""

    packed: str
    scale: str
    global_scale: str
    input_scale: str
    inverse: bool


def _names(checkpoint: Checkpoint, module: str) -> _Names | None:
    """What the tensors of a packed module are called, None where it is in floating point or FP8."""
    tensors = checkpoint.tensors
    for extra in ("pre_quant_scale", "svdquant_lora_a", "weight_scale_inv_2"):
        if f"{module}.{extra}" in tensors:
            raise CheckpointError(f"{checkpoint.directory}: tensor {module + '.' + extra!r}: NVFP4 with {extra} (AWQ, SVDQuant) is not read")
    if f"{module}.weight_packed" in tensors:
        return _Names(
            f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_global_scale", f"{module}.input_global_scale", True
        )
    for weight, prefix in ((f"{module}.weight", f"{module}."), (module, f"{module}_")):
        if weight in tensors and tensors[weight].dtype == np.uint8:
            return _Names(weight, f"{prefix}weight_scale", f"{prefix}weight_scale_2", f"{prefix}input_scale", False)
    return None


def is_packed(checkpoint: Checkpoint, module: str) -> bool:
    """Whether the module's weight is stored in NVFP4."""
    return _names(checkpoint, module) is not None


# Scales of activations and of the KV cache: read where a mode asks for them, of no meaning to a weight.
ADVISORY = re.compile(r".*([_.]input_scale|\.input_global_scale|\.[kv]_scale)")


def weight_tensors(checkpoint: Checkpoint, module: str) -> set[str]:
    """The tensors that a module's weight is made of, whatever its format; empty where it is not stored."""
    names = _names(checkpoint, module)
    if names is not None:
        return {names.packed, names.scale, names.global_scale, names.input_scale}
    name = next((name for name in (f"{module}.weight", module) if name in checkpoint.tensors), None)
    if name is None:
        return set()
    return {name} | ({f"{module}.weight_scale_inv"} if checkpoint.tensors[name].dtype == E4M3 else set())


def input_scale_of(checkpoint: Checkpoint, module: str, index: int | None = None) -> np.ndarray | None:
    """The input scale f32 [] stored beside a packed module's weight (of expert `index`), None where there is none.

    CheckpointError where it is no scale: zero, negative, NaN or infinite, as that of an expert that no prompt was routed to.
    """
    names = _names(checkpoint, module)
    if names is None or names.input_scale not in checkpoint.tensors:
        return None
    value = read_scalar(checkpoint, names.input_scale, index)
    return reciprocal(value) if names.inverse else value


def _global_scale(checkpoint: Checkpoint, name: str, inverse: bool, index: int | None) -> np.ndarray:
    value = read_scalar(checkpoint, name, index)
    value = reciprocal(value) if inverse else value
    if not 0 < value < LARGEST_WEIGHT_GLOBAL_SCALE:
        stands = f"{'1 / ' if inverse else ''}{name} = {float(value):.4g}"
        raise CheckpointError(f"{checkpoint.directory}: {stands} stands for weights up to {2688 * float(value):.3g}: is it the inverse of a scale?")
    return value


def _fp8(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> np.ndarray:
    """An FP8 weight with one scale a block -> float32 [N, K], value times scale rounded once."""
    weight = _info(checkpoint, f"{module}.weight")
    if checkpoint.quantization.method != "fp8":
        raise CheckpointError(f"{weight.file}: tensor {weight.name!r} is FP8, but the config says quant_method {checkpoint.quantization.method!r}")
    scale = _info(checkpoint, f"{module}.weight_scale_inv")
    rows, columns = checkpoint.quantization.block
    _check(weight, shape, (E4M3,))
    _check(scale, (-(-shape[0] // rows), -(-shape[1] // columns)), FLOATS)
    values = _finite(read_tensor(weight), weight).astype(np.float32)
    scales = _finite(read_tensor(scale), scale).astype(np.float32)
    if (scales < 0).any():
        raise CheckpointError(f"{scale.file}: tensor {scale.name!r} holds a negative scale")
    for i in range(scales.shape[0]):  # a row of blocks at a time: the scales never exist at the weight's full size
        block, by = values[i * rows : (i + 1) * rows], np.repeat(scales[i], columns)[: shape[1]]
        if block[:, by == 0].any():
            raise CheckpointError(f"{scale.file}: tensor {scale.name!r} is 0 where the weight is not")
        with np.errstate(over="ignore"):
            block *= by
    if not np.isfinite(values).all():
        raise CheckpointError(f"{weight.file}: tensor {weight.name!r} times its scales is beyond float32")
    return values


def read_weight(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> np.ndarray | PackedWeight:
    """The weight [N, K] of a linear module: NVFP4 with its own bytes and without its input scale, else floats (FP8 as float32).

    CheckpointError names the file and tensor for one that is missing, has another shape or dtype, or holds NaN.
    """
    names = _names(checkpoint, module)
    if names is not None:
        n, k = shape
        packed, scale = _info(checkpoint, names.packed), _info(checkpoint, names.scale)
        _check(packed, (n, k // 2), (np.dtype(np.uint8),))
        _check(scale, (n, k // BLOCK), (E4M3,))
        global_scale = _global_scale(checkpoint, names.global_scale, names.inverse, None)
        return PackedWeight(read_tensor(packed), _block_scales(read_tensor(scale), scale), global_scale)
    info = _info(checkpoint, f"{module}.weight")
    if info.dtype == E4M3:
        return _fp8(checkpoint, module, shape)
    return read_float(checkpoint, info.name, shape)


def _fused_expert(info: TensorInfo, index: int, shape: tuple[int, int, int], transposed: bool) -> np.ndarray:
    """Expert `index` [R, C] of a tensor of all experts, [E, R, C] or, transposed, [E, C, R]."""
    experts, rows, columns = shape
    _check(info, (experts, columns, rows) if transposed else shape, (*FLOATS, np.dtype(np.uint8), E4M3))
    matrix = read_tensor(_part(info, index))
    return matrix.T if transposed else matrix


def fused_experts(checkpoint: Checkpoint, names: ExpertNames, experts: str, role: str) -> str | None:
    """The name under which a role ("gate", "up", "down") of all experts is stored as one tensor, None where each has its own."""
    fused = f"{experts}.{names.fused_down if role == 'down' else names.fused_gate_up}"
    return next((name for name in (fused, f"{fused}.weight") if name in checkpoint.tensors), None)


def expert_modules(checkpoint: Checkpoint, names: ExpertNames, experts: str, count: int, role: str) -> list[str]:
    """The modules that hold a role of `count` experts: one each, or one for all."""
    fused = fused_experts(checkpoint, names, experts, role)
    return [names.module(experts, e, role) for e in range(count)] if fused is None else [fused.removesuffix(".weight")]


def read_expert(
    checkpoint: Checkpoint, names: ExpertNames, experts: str, role: str, index: int, shape: tuple[int, int, int], *, input_scale: bool = False
) -> np.ndarray | PackedWeight:
    """One expert's gate, up or down [N, K]; experts: 'model.layers.0.mlp.experts', shape: (E, N, K).

    Stored as a module an expert, or fused: gate and up [E, 2N, K] (gate first) and down [E, N, K], also transposed
    ([E, K, 2N], packed [E, K/2, 2N]), as the batched-matmul experts of some models are. input_scale: read it too.
    """
    total, n, k = shape
    fused = fused_experts(checkpoint, names, experts, role)
    module = names.module(experts, index, role) if fused is None else fused.removesuffix(".weight")
    if fused is None:
        weight = read_weight(checkpoint, module, (n, k))
    else:
        weight = _read_fused(checkpoint, fused, module, role, index, shape)
    if input_scale and isinstance(weight, PackedWeight):
        scale = input_scale_of(checkpoint, module, None if fused is None else index)
        weight = dataclasses.replace(weight, input_scale=scale)
    return weight


def _read_fused(
    checkpoint: Checkpoint, fused: str, module: str, role: str, index: int, shape: tuple[int, int, int]
) -> np.ndarray | PackedWeight:
    total, n, k = shape
    info = checkpoint.tensors[fused]
    rows = n if role == "down" else 2 * n
    part = {"down": slice(None), "gate": slice(0, n), "up": slice(n, None)}[role]
    names = _names(checkpoint, module)
    if names is None:
        matrix = _fused_expert(info, index, (total, rows, k), info.shape != (total, rows, k) and info.shape == (total, k, rows))
        _check(info, info.shape, FLOATS)
        return np.ascontiguousarray(_finite(matrix[part], info))
    scale = _info(checkpoint, names.scale)
    transposed = scale.shape == (total, k // BLOCK, rows) and info.shape == (total, k // 2, rows)
    packed = _fused_expert(info, index, (total, rows, k // 2), transposed)[part]
    scales = _block_scales(np.ascontiguousarray(_fused_expert(scale, index, (total, rows, k // BLOCK), transposed)[part]), scale)
    global_scale = _global_scale(checkpoint, names.global_scale, names.inverse, index)
    return PackedWeight(np.ascontiguousarray(packed), scales, global_scale)


def reconcile(a: PackedWeight, b: PackedWeight, name: str) -> tuple[PackedWeight, PackedWeight]:
    """Two weights brought to the larger of their global scales, the other's block scales rounded again (to nearest even).

    CheckpointError, naming the pair, where a block would be lost that way.
    """
    larger = np.maximum(a.global_scale, b.global_scale)

    def bring(weight: PackedWeight) -> PackedWeight:
        if weight.global_scale == larger:
            return weight
        scale = (weight.scale.astype(np.float32) * np.float32(weight.global_scale / larger)).astype(E4M3)
        if ((scale.view(np.uint8) & 0x7F == 0) & (weight.scale.view(np.uint8) & 0x7F != 0)).any():
            raise CheckpointError(
                f"{name}: gate and up have global scales {float(a.global_scale):.4g} and {float(b.global_scale):.4g}, too far apart to "
                "share one: blocks would vanish; export the checkpoint with a scale shared by gate and up"
            )
        return dataclasses.replace(weight, scale=scale, global_scale=larger)

    return bring(a), bring(b)


def packed_tensors(module: str, weight: PackedWeight, method: str) -> dict[str, np.ndarray]:
    """The tensors under which `method` ("modelopt" or "compressed-tensors") stores a packed weight."""
    if method == "modelopt":
        tensors = {"weight": weight.packed, "weight_scale": weight.scale, "weight_scale_2": weight.global_scale}
        scale_name, input_scale = "input_scale", weight.input_scale
    else:
        tensors = {
            "weight_packed": weight.packed,
            "weight_scale": weight.scale,
            "weight_global_scale": reciprocal(weight.global_scale).reshape(1),
        }
        scale_name = "input_global_scale"
        input_scale = None if weight.input_scale is None else reciprocal(weight.input_scale).reshape(1)
    if input_scale is not None:
        tensors[scale_name] = input_scale
    return {f"{module}.{name}": np.asarray(tensor) for name, tensor in tensors.items()}
