"""The command line: quantize, rollout, inspect, demo. Bad input ends with exit code 2 and one line on stderr."""

import dataclasses
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="NVFP4 checkpoints and rollouts in JAX.")


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"nvfp4jax {importlib.metadata.version('nvfp4jax')}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """NVFP4 checkpoints and rollouts in JAX."""


_FOLLOW_LINKS = Annotated[bool, typer.Option("--follow-links", help="Read files that are links out of the folder, too.")]


def _follow_links(follow: bool) -> None:
    from nvfp4jax.checkpoint.safetensors import FOLLOW_LINKS

    FOLLOW_LINKS.set(follow)


# jax is imported inside the commands: `--help` answers at once.
MODES = ("none", "static", "delayed", "tensor", "tensor_pow2", "token", "expert")
_CALIBRATION_BATCH = 8  # prompts in one forward pass


def _scaling(name: str, four_over_six: str | None = None) -> Any:
    from nvfp4jax import scaling

    if name not in MODES:
        raise ValueError(f"--scaling {name}: one of {', '.join(MODES)}")
    mode = None if name == "none" else scaling.NAMES[name]
    return mode if mode is None or four_over_six is None else dataclasses.replace(mode, four_over_six=four_over_six)


@app.command()
def quantize(
    model_dir: Annotated[Path, typer.Option(help="Hugging Face folder (bf16, FP8 by blocks, NVFP4), or an Orbax folder of ours.")],
    save_dir: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    output: Annotated[str, typer.Option(help="orbax, modelopt or compressed-tensors.")] = "orbax",
    keep_first_n: Annotated[int, typer.Option(help="First layers that stay in bfloat16.")] = 0,
    keep_last_n: Annotated[int, typer.Option(help="Last layers that stay in bfloat16.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Regular expression, searched in 'layers/0/mlp/up_proj'. May repeat.")] = None,
    experts_only: Annotated[bool, typer.Option(help="Quantize experts and nothing else.")] = False,
    four_over_six: Annotated[str | None, typer.Option(help="mse or mae: four-over-six for weights.")] = None,
    scaling: Annotated[
        str, typer.Option(help="Mode of the layers: none, static, delayed, tensor, tensor_pow2, token, expert.")
    ] = "token",
    scaling_four_over_six: Annotated[str | None, typer.Option(help="mse or mae: four-over-six for activations.")] = None,
    calibration_prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line, to make input scales from (static mode, other serving stacks).")
    ] = None,
    calibration_token_ids: Annotated[list[str] | None, typer.Option(help='The same, a prompt as token ids, "1,2,3"; may repeat.')] = None,
    calibration_headroom: Annotated[float, typer.Option(help="Input scales leave room for this many times the largest value.")] = 1.0,
    follow_links: _FOLLOW_LINKS = False,
) -> None:
    """Quantize a model to NVFP4, shard by shard; a run that was interrupted goes on when it is started again."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from nvfp4jax.checkpoint import convert

    _follow_links(follow_links)
    selection = convert.Selection(
        keep_first_n, keep_last_n, tuple(exclude or ()), experts_only, four_over_six, _scaling(scaling, scaling_four_over_six)
    )
    calibration = None
    if calibration_prompts is not None or calibration_token_ids:
        rows, _ = _prompt_rows(model_dir, (), calibration_prompts, calibration_token_ids, ("--calibration-prompts", "--calibration-token-ids"))
        rows.sort(key=len)  # little padding
        batches = [_padded(rows[i : i + _CALIBRATION_BATCH]) for i in range(0, len(rows), _CALIBRATION_BATCH)]
        calibration = convert.Calibration(batches, calibration_headroom)
    elif calibration_headroom != 1:
        raise ValueError("--calibration-headroom: without --calibration-prompts there is nothing to calibrate")
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        report = convert.quantize_folder(
            model_dir, save_dir, selection, output=output, calibration=calibration,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )  # fmt: skip
    errors = sorted(((row["relative_error"], row["name"]) for row in report if row.get("relative_error") is not None), reverse=True)
    print(f"{save_dir}: {len(report)} weights in NVFP4 ({output})")
    if errors:
        mean = sum(error for error, _ in errors) / len(errors)
        print(f"relative error: mean {mean:.4f}, worst {errors[0][0]:.4f} ({errors[0][1]}); each weight's: {convert.REPORT}")


def _prompt_rows(
    checkpoint: Path, prompts: Sequence[str], file: Path | None, token_ids: Sequence[str] | None, options: Sequence[str]
) -> tuple[list[list[int]], Any]:
    """(the token ids of each prompt: of texts, of a file's lines, then as given; the folder's tokenizer, where there is text).

    options: what the arguments are called on the command line, in their order.
    """
    from nvfp4jax.checkpoint.survey import require_folder

    *_, file_option, ids_option = options
    texts = list(prompts)
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file_option} {file}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    rows = []
    for text in token_ids or ():
        try:
            rows.append([int(part) for part in text.replace(",", " ").split()])
        except ValueError:
            raise ValueError(f"{ids_option} {text!r}: integers separated by commas are needed") from None
    if not texts and not rows:
        raise ValueError(f"no prompt: pass {' or '.join(options)}" if file is None else f"{file_option} {file}: no prompt in it")
    require_folder(checkpoint)
    tokenizer = _tokenizer(checkpoint, ids_option) if texts else None
    if tokenizer is not None:
        rows = tokenizer.encode(texts) + rows
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no token")
    return rows, tokenizer


def _padded(rows: Sequence[Sequence[int]]):
    """Token ids i64 [B, T], padded on the left, and their mask."""
    import numpy as np

    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return ids, mask


def _tokenizer(checkpoint: Path, ids_option: str):
    from nvfp4jax.checkpoint.tokenizer import Tokenizer

    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file, so text cannot be turned into tokens; pass {ids_option}")
    return Tokenizer(file)


def _stop_tokens(checkpoint: Path) -> list[int]:
    from nvfp4jax.checkpoint.safetensors import read_json

    file = checkpoint / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    found = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in found):
        raise ValueError(f"{file}: eos_token_id must be an integer or a list of them")
    return found


@app.command()
def rollout(
    checkpoint: Annotated[Path, typer.Option(help="Hugging Face folder or Orbax folder.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may repeat.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    token_ids: Annotated[list[str] | None, typer.Option(help='A prompt as token ids, "1,2,3"; may repeat.')] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to sample for each prompt.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = None,
    num_samples: Annotated[int, typer.Option(help="Samples a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random key.")] = 0,
    stop_token: Annotated[list[int] | None, typer.Option(help="Token that ends a sample; default: the folder's eos tokens.")] = None,
    cache_length: Annotated[int | None, typer.Option(help="Slots of the KV cache.")] = None,
    scaling: Annotated[str | None, typer.Option(help="Mode of the NVFP4 layers, where not the stored one.")] = None,
    scan_layers: Annotated[bool, typer.Option(help="Scan equal layers: compiles faster, runs slower.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
    follow_links: _FOLLOW_LINKS = False,
) -> None:
    """Sample continuations of prompts."""
    import jax
    import numpy as np

    from nvfp4jax.checkpoint import load_model
    from nvfp4jax.rollout import generate

    _follow_links(follow_links)
    rows, tokenizer = _prompt_rows(checkpoint, prompt or (), prompt_file, token_ids, ("--prompt", "--prompt-file", "--token-ids"))
    options = {} if scaling is None else {"scaling": _scaling(scaling)}
    model = load_model(checkpoint, scan_layers=scan_layers, **options)
    ids, mask = _padded(rows)
    result = generate(
        model, ids, mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, key=jax.random.key(seed),
        num_samples=num_samples, stop_tokens=_stop_tokens(checkpoint) if stop_token is None else stop_token, cache_length=cache_length,
    )  # fmt: skip
    tokens, lengths, logprobs = (np.asarray(v) for v in (result.tokens, result.lengths, result.logprobs))
    sampled = [tokens[i, : lengths[i]].tolist() for i in range(tokens.shape[0])]
    texts = [None] * len(sampled) if tokenizer is None else tokenizer.decode(sampled)
    for i, (new, text) in enumerate(zip(sampled, texts, strict=True)):
        if as_json:
            record = {"prompt": i // num_samples, "sample": i % num_samples, "tokens": new, "logprobs": logprobs[i, : lengths[i]].tolist()}
            print(json.dumps(record if text is None else record | {"text": text}))
        else:
            print(f"[{i // num_samples}.{i % num_samples}] " + (",".join(map(str, new)) if text is None else text))


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


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Hugging Face folder or Orbax folder.")], follow_links: _FOLLOW_LINKS = False
) -> None:
    """Print the layers of a checkpoint: formats, shapes, scales, sizes."""
    from nvfp4jax.checkpoint import orbax
    from nvfp4jax.checkpoint.survey import require_folder

    _follow_links(follow_links)
    require_folder(directory)
    if orbax.exists(directory):
        _inspect_orbax(directory)
    else:
        _inspect_huggingface(directory)


def _inspect_huggingface(directory: Path) -> None:
    from nvfp4jax.checkpoint import formats

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
        globals_, inputs = [], []
        for m in modules if packed else ():
            for name, found in ((f"{m}.weight_scale_2", globals_), (f"{m}.input_scale", inputs)):
                if name in tensors:
                    found.append(float(formats.read_scalar(checkpoint, name)))
            for name, found in ((f"{m}.weight_global_scale", globals_), (f"{m}.input_global_scale", inputs)):
                if name in tensors:
                    found.append(float(formats.reciprocal(formats.read_scalar(checkpoint, name))))
        nbytes = sum(tensors[name].nbytes for name in names) + sum(part.nbytes for part in parts)
        count = sum(tensors[name].nbytes // info.dtype.itemsize for name in names) * (2 if packed else 1)
        elements += count
        kind = "nvfp4" if packed else str(info.dtype)
        rows.append([pattern, str(len(names)), kind, str(list(shape)), _range(globals_), _range(inputs), f"{nbytes:,}"])
    _print_table(["tensor", "count", "format", "shape", "global scale", "input scale", "bytes"], rows)
    _print_total(sum(info.nbytes for info in tensors.values()), elements)


def _inspect_orbax(directory: Path) -> None:
    import numpy as np

    from nvfp4jax.checkpoint import orbax

    folder = orbax.read_folder(directory)
    metadata, shapes = folder.metadata, folder.shapes
    config = metadata.get("config") if isinstance(metadata.get("config"), dict) else {}
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
        elements += sum(shapes[name].size for name in names) * (2 if packed else 1)
        shape = (*leaf.shape[:-1], 2 * leaf.shape[-1]) if packed else leaf.shape
        kind = "nvfp4" if packed else str(leaf.dtype)
        rows.append([pattern, str(len(names)), kind, str(list(shape)), _range(globals_), _range([v for n in inputs for v in values[n]]), f"{nbytes:,}"])
    _print_table(["leaf", "count", "format", "shape", "global scale", "input scale", "bytes"], rows)
    _print_total(sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values()), elements)


@app.command()
def demo(
    directory: Annotated[Path | None, typer.Argument(help="A bfloat16 Hugging Face folder; without one, a tiny random Qwen3-MoE.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to sample for each prompt.")] = 16,
) -> None:
    """Load, swap, save, restore, roll out, reload, roll out again; then a table of the modes."""
    from nvfp4jax import demo

    if directory is not None:
        demo.run(directory, new_tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        demo.write_tiny_folder(Path(folder))
        demo.run(Path(folder), new_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, or 2 with one line on stderr for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.WARNING, format="nvfp4jax: %(message)s")
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = command.main(args=arguments, prog_name="nvfp4jax", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("nvfp4jax: interrupted", file=sys.stderr)
        sys.exit(130)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what typer raises for bad usage has one
        if message is None and not isinstance(error, ValueError | NotImplementedError):
            raise
        print(f"nvfp4jax: {' '.join((str(error) if message is None else message()).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
