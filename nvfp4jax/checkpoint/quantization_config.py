"""The quantization config of a Hugging Face folder: read in any spelling, its exclude list matched, and written as exporters write it."""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvfp4jax.checkpoint.errors import CheckpointError

BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A folder's quantization config: method None, "modelopt", "compressed-tensors" or "fp8".

    exclude: module patterns that stay in floating point: globs, `re:` regular expressions, names, prefixes ending in a dot.
    block: the shape of an FP8 block. weight_only: activations are not quantized (W4A16). kv_cache: the KV cache's scheme, or None.
    """

    method: str | None = None
    exclude: tuple[str, ...] = ()
    block: tuple[int, int] = (128, 128)
    weight_only: bool = False
    kv_cache: str | None = None


def _get(table: Mapping, key: str, kind: type | tuple[type, ...], where: str, default=None):
    value = table.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise CheckpointError(f"{where}: {key!r} has the wrong type, {type(value).__name__}")
    return value


def _strings(table: Mapping, key: str, where: str) -> tuple[str, ...]:
    values = _get(table, key, list, where, [])
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{where}: {key!r} must be a list of strings")
    return tuple(values)


# What a scheme's table may hold beside what is read here, and changes no weight.
_TOLD = {"quant_method", "quant_library", "quantization_status", "global_compression_ratio", "version", "producer", "activation_scheme", "scale_fmt",
         "dequantize"}
_READ = {
    "modelopt": {"quantization", "quant_algo", "quantized_layers", "group_size", "kv_cache_quant_algo", "kv_cache_scheme", "exclude_modules", "ignore",
                 "config_groups"},
    "compressed-tensors": {"config_groups", "format", "ignore", "kv_cache_scheme"},
    "fp8": {"weight_block_size", "modules_to_not_convert", "ignored_layers", "fmt", "expert_dtype"},
}  # fmt: skip


def _says_nothing(value: Any) -> bool:
    """Whether a value is empty, or a table of such."""
    return all(map(_says_nothing, value.values())) if isinstance(value, Mapping) else not value


def _check_keys(table: Mapping, method: str, where: str) -> None:
    """Every key is read, or changes no weight, or says that something is not there; else it is refused: a rotation, a sparsity, zero points."""
    for key, value in table.items():
        is_dense = key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense"
        if key in _TOLD | _READ[method] or _says_nothing(value) or is_dense:
            continue
        raise CheckpointError(f"{where}: {str(key)[:80]!r}={str(value)[:80]} is not known for {method}: it may change what the weights mean; "
                              "remove it if it does not")  # fmt: skip


def _check_weights(weights: Mapping, where: str) -> None:
    """What a group says of its weights must be NVFP4, and no more."""
    if (weights.get("num_bits"), weights.get("type"), weights.get("group_size")) != (4, "float", BLOCK):
        raise CheckpointError(f"{where}: weights are no NVFP4 (num_bits 4, type float, group_size 16)")
    if weights.get("symmetric") is False or weights.get("actorder") not in (None, False, "static", "weight") or weights.get("dynamic"):
        raise CheckpointError(f"{where}: weights with zero points, an order of their own or dynamic scales are not read")


def parse_quantization(table: Any, where: str) -> Quantization:
    """The quantization config of a folder in any spelling; CheckpointError for a scheme that cannot be read."""
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{where}: a JSON object is needed, not {type(table).__name__}")
    inner = _get(table, "quantization", Mapping, where)
    method = _get(table, "quant_method", str, where, "modelopt" if inner is not None or "quant_algo" in table else None)
    if method in ("modelopt", "modelopt_fp4"):
        for part in (table, inner or {}):
            _check_keys(part, "modelopt", where)
        for name, group in _get(table, "config_groups", Mapping, where, {}).items():
            if isinstance(group, Mapping) and group.get("weights") is not None:
                _check_weights(_get(group, "weights", Mapping, where), f"{where}: {str(name)[:80]}")
        return _parse_modelopt(table if inner is None else inner, where)
    if method == "compressed-tensors":
        _check_keys(table, "compressed-tensors", where)
        return _parse_compressed_tensors(table, where)
    if method == "fp8":
        block = _get(table, "weight_block_size", list, where)
        if block is None or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise CheckpointError(f"{where}: FP8 is read with one scale a block only; weight_block_size={block}")
        _check_keys(table, "fp8", where)
        if table.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
            raise CheckpointError(f"{where}: fmt={str(table['fmt'])[:40]!r} is not read, only 'e4m3'")
        if table.get("expert_dtype") not in (None, "fp8"):
            raise CheckpointError(f"{where}: expert_dtype={str(table['expert_dtype'])[:40]!r} is not read, only 'fp8'")
        kept = _strings(table, "modules_to_not_convert", where) + _strings(table, "ignored_layers", where)  # two names of one list
        return Quantization("fp8", kept, (block[0], block[1]))
    raise CheckpointError(f"{where}: quant_method {method!r} is not read; known: modelopt, compressed-tensors, fp8")


def _parse_modelopt(table: Mapping, where: str) -> Quantization:
    known = ("NVFP4", "W4A16_NVFP4")
    algorithm = _get(table, "quant_algo", str, where)
    if algorithm == "MIXED_PRECISION":
        layers = _get(table, "quantized_layers", Mapping, where, {})
        kinds = {name: _get(layer, "quant_algo", str, where) if isinstance(layer, Mapping) else None for name, layer in layers.items()}
    else:
        kinds = {"quant_algo": algorithm}
    for name, kind in kinds.items():
        if kind not in known:
            raise CheckpointError(f"{where}: {name[:200]}: {kind!r} is not read; known: {', '.join(known)}")
    if _get(table, "group_size", int, where, BLOCK) != BLOCK:
        raise CheckpointError(f"{where}: group_size={table['group_size']}; NVFP4 has 16")
    kv = _get(table, "kv_cache_quant_algo", str, where)
    scheme = _get(table, "kv_cache_scheme", (Mapping, str), where)
    if kv is None and scheme is not None:
        kv = scheme if isinstance(scheme, str) else "FP8" if scheme.get("num_bits") == 8 else "NVFP4"
    exclude = _strings(table, "exclude_modules", where) + _strings(table, "ignore", where)
    return Quantization("modelopt", exclude, weight_only=set(kinds.values()) == {"W4A16_NVFP4"}, kv_cache=kv)


def _parse_compressed_tensors(table: Mapping, where: str) -> Quantization:
    groups = _get(table, "config_groups", Mapping, where, {})
    weight_only = bool(groups)
    for name, group in groups.items():
        here = f"{where}: {str(name)[:80]}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{here}: a JSON object is needed")
        form = _get(group, "format", str, here) or _get(table, "format", str, where)
        if form != "nvfp4-pack-quantized":
            raise CheckpointError(f"{here}: format {form!r} is not read; known: nvfp4-pack-quantized")
        weights = _get(group, "weights", Mapping, here, {})
        _check_weights(weights, here)
        if group.get("output_activations"):
            raise CheckpointError(f"{here}: output_activations are not read")
        weight_only &= _get(group, "input_activations", Mapping, here) is None
    kv = "FP8" if _get(table, "kv_cache_scheme", Mapping, where) is not None else None
    return Quantization("compressed-tensors", _strings(table, "ignore", where), weight_only=weight_only, kv_cache=kv)


@functools.lru_cache(1024)
def safe_pattern(text: str) -> re.Pattern:
    """A regular expression from a checkpoint: one that could take exponential time (a repeat of more than one thing) is refused."""
    try:
        pattern = re.compile(text)
        parsed = re._parser.parse(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"exclude pattern {text[:80]!r} is no regular expression ({error})") from None

    def walk(items, repeats: int) -> int:
        for op, argument in items:
            name = str(op)
            if name in ("ASSERT", "ASSERT_NOT"):  # a look ahead or behind backtracks as the rest does
                repeats = walk(argument[1], repeats)
            elif name == "ATOMIC_GROUP":
                repeats = walk(argument, repeats)
            elif "REPEAT" in name:
                low, high, body = argument
                single = len(body) == 1 and str(body[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY")
                if high > 1 and not single:
                    raise CheckpointError(f"exclude pattern {text[:80]!r} repeats a group; that is not supported")
                repeats = walk(body, repeats + (high > 100))
            elif name == "SUBPATTERN":
                repeats = walk(argument[3], repeats)
            elif name == "BRANCH":
                repeats = max(walk(branch, repeats) for branch in argument[1])
            elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):  # references to groups
                raise CheckpointError(f"exclude pattern {text[:80]!r} has {name.lower()}; that is not supported")
        return repeats

    if len(text) > 1000 or walk(parsed, 0) > 3:
        raise CheckpointError(f"exclude pattern {text[:80]!r} is too long, or has more than 3 unbounded repeats")
    return pattern


def is_excluded(module: str, patterns: Sequence[str]) -> bool:
    """Whether a module name, e.g. 'model.layers.0.mlp.gate', falls under an exclude list.

    `re:` begins a regular expression matched at the name's start; *, ? and [ make a glob over the whole name; a trailing dot makes
    a prefix; any other entry is the module itself or one above it.
    """
    names, searches = _sorted_patterns(tuple(patterns))
    parts = module.split(".")
    if any(".".join(parts[:i]) in names for i in range(1, len(parts) + 1)):
        return True
    return any(search(module) for search in searches)


_MOST_SEARCHES = 256


@functools.lru_cache(16)
def _sorted_patterns(patterns: tuple[str, ...]) -> tuple[frozenset[str], list[Callable[[str], Any]]]:
    """(modules, searches): the names and dotted prefixes, which a look-up finds; the globs and expressions, each to be tried."""
    names, searches = set(), []
    for pattern in patterns:
        if pattern.startswith("re:"):
            searches.append(safe_pattern(pattern[3:]).match)
        elif any(c in pattern for c in "*?["):
            searches.append(re.compile(fnmatch.translate(pattern)).match)
        else:
            names.add(pattern.removesuffix("."))
    if len(searches) > _MOST_SEARCHES:
        raise CheckpointError(f"{len(searches)} exclude patterns with wildcards; at most {_MOST_SEARCHES} are read")
    return frozenset(names), searches


def quantization_configs(
    method: str, exclude: Sequence[str], *, weight_only: bool, kv_cache: str | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json's quantization_config, the content of hf_quant_config.json or None), as the format's own exporter writes them."""
    exclude = list(exclude)
    if method == "modelopt":
        producer = {"name": "modelopt", "version": "nvfp4jax"}
        algorithm = "W4A16_NVFP4" if weight_only else "NVFP4"
        part = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        group = {"weights": part, "targets": ["Linear"]}
        if not weight_only:
            group = {"input_activations": part} | group
        config: dict[str, Any] = {"config_groups": {"group_0": group}, "ignore": exclude, "quant_algo": algorithm}
        if kv_cache is not None:
            config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8 if kv_cache == "FP8" else 4, "type": "float"}
        config |= {"producer": producer, "quant_method": "modelopt"}
        quantization = {
            "quant_algo": algorithm, "kv_cache_quant_algo": kv_cache, "group_size": BLOCK, "exclude_modules": exclude,
        }  # fmt: skip
        return config, {"producer": producer, "quantization": quantization}
    weights = {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True, "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    activations = None if weight_only else weights | {"dynamic": "local", "observer": "static_minmax"}
    group = {
        "format": "nvfp4-pack-quantized", "targets": ["Linear"], "weights": weights, "input_activations": activations,
        "output_activations": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"config_group_0": group}, "ignore": exclude, "kv_cache_scheme": None, "global_compression_ratio": None,
    }, None  # fmt: skip
