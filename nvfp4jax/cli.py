"""The command line: quantize, rollout, inspect, demo. Bad input ends with exit code 2 and one line on stderr."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

# Plain help: the framed one cuts words off where the terminal is narrow.
app = typer.Typer(rich_markup_mode=None, help="NVFP4 checkpoints and rollouts in JAX.")


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


def _scaling(name: str, four_over_six: Any = None) -> Any:
    from nvfp4jax import scaling

    if name not in MODES:
        raise ValueError(f"--scaling {name}: one of {', '.join(MODES)}")
    scaling.check_four_over_six(four_over_six, "--scaling-four-over-six")
    mode = None if name == "none" else scaling.NAMES[name]
    return mode if mode is None or four_over_six is None else dataclasses.replace(mode, four_over_six=four_over_six)


@app.command()
def quantize(
    model_dir: Annotated[Path, typer.Option(help="Hugging Face folder (bf16, FP8 by blocks, NVFP4), or an Orbax folder of ours.")],
    save_dir: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    output: Annotated[str, typer.Option(help="orbax, modelopt or compressed-tensors (these two share a global scale among fused layers).")] = "orbax",
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
    """Quantize a model to NVFP4. It is read shard by shard; a run that was interrupted goes on when it is started again."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from nvfp4jax.checkpoint import convert
    from nvfp4jax.rollout.prompts import pad_left

    _follow_links(follow_links)
    of_weights: Any = four_over_six  # any word: Selection says which it knows
    selection = convert.Selection(
        keep_first_n, keep_last_n, tuple(exclude or ()), experts_only, of_weights, _scaling(scaling, scaling_four_over_six)
    )
    calibration = None
    if calibration_prompts is not None or calibration_token_ids:
        rows, _ = _prompt_rows(model_dir, (), calibration_prompts, calibration_token_ids, ("--calibration-prompts", "--calibration-token-ids"))
        rows.sort(key=len)  # little padding
        batches = [pad_left(rows[i : i + _CALIBRATION_BATCH]) for i in range(0, len(rows), _CALIBRATION_BATCH)]
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
            content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
            # Nothing but a line break ends a prompt: splitlines() would also cut at U+2028, U+0085 and form feeds.
            lines = (line.removesuffix("\r") for line in content.removeprefix("\ufeff").split("\n"))
            texts += [line for line in lines if line.strip()]
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


def _tokenizer(checkpoint: Path, ids_option: str):
    from nvfp4jax.checkpoint.tokenizer import Tokenizer

    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file, so text cannot be turned into tokens; pass {ids_option}")
    return Tokenizer(file)


def _stop_tokens(checkpoint: Path) -> list[int]:
    """As transformers finds them: of generation_config.json, or, where there is none, of the model's own config."""
    from nvfp4jax.checkpoint import orbax
    from nvfp4jax.checkpoint.safetensors import read_json

    file = checkpoint / "generation_config.json"
    if file.is_file():
        found = read_json(file).get("eos_token_id")
    elif orbax.exists(checkpoint):
        file = checkpoint / orbax.METADATA_FILE
        found = (orbax.read_folder(checkpoint).metadata.get("config") or {}).get("eos_token_id")
    else:
        file = checkpoint / "config.json"
        found = read_json(file).get("eos_token_id")
    found = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in found):
        raise ValueError(f"{file}: eos_token_id must be an integer or a list of them")
    return found


def _place_of(output: Path) -> tuple[Path, Path]:
    """(where an --output goes, the file that is written first). ValueError for one that cannot be written.

    A link is followed. A device or a pipe is written itself: nothing may take its place.
    """
    try:
        if output.is_dir():
            raise ValueError(f"--output {output}: a folder")
        if output.exists() and not output.is_file():
            if not os.access(output, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return output, output
        place = Path(os.path.realpath(output))
        if not place.parent.is_dir():
            raise ValueError(f"--output {output}: {place.parent} is no folder")
        part = place.with_name(place.name + ".part")
        part.open("w").close()
        part.unlink()
    except OSError as error:
        raise ValueError(f"--output {str(output)[:200]}: {error.strerror}") from None
    return place, part


def _write(output: Path, place: Path, part: Path, text: str) -> None:
    """The text, in its place as a whole or not at all."""
    try:
        part.write_text(text, encoding="utf-8")
        if part != place:
            part.replace(place)
    except OSError as error:
        raise ValueError(f"--output {str(output)[:200]}: not written: {error.strerror}") from None
    finally:
        if part != place:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


@app.command()
def rollout(
    checkpoint: Annotated[Path, typer.Option(help="Hugging Face folder or Orbax folder.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may repeat.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file of prompts, one a line; - is stdin.")] = None,
    token_ids: Annotated[list[str] | None, typer.Option(help='A prompt as token ids, "1,2,3"; may repeat.')] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to sample for each prompt.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this share of the likeliest one's probability.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what the text holds already becomes less likely.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logits of what the answer holds already.")] = 0.0,
    num_samples: Annotated[int, typer.Option(help="Samples a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random key.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a sample, and is cut off; may repeat.")] = None,
    stop_token: Annotated[list[int] | None, typer.Option(help="Token that ends a sample; default: the folder's eos tokens.")] = None,
    cache_length: Annotated[int | None, typer.Option(help="Slots of the KV cache.")] = None,
    rows_in_flight: Annotated[int | None, typer.Option(help="Samples decoded at a time, the others in a queue; default: all.")] = None,
    scaling: Annotated[str | None, typer.Option(help="Mode of the NVFP4 layers, where not the stored one.")] = None,
    scan_layers: Annotated[bool, typer.Option(help="Scan equal layers: compiles faster.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print the text as it is sampled; default: on a terminal, one sample.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample, with its logprobs.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON objects to this file, one a line.")] = None,
    telemetry: Annotated[bool, typer.Option("--telemetry", help="Say on stderr what NVFP4 made of the layers' activations.")] = False,
    follow_links: _FOLLOW_LINKS = False,
) -> None:
    """Sample continuations of prompts."""
    import jax
    import numpy as np
    from flax import nnx
    from rich.console import Console

    from nvfp4jax import arguments
    from nvfp4jax.checkpoint import load_model
    from nvfp4jax.rollout import generate, generate_text
    from nvfp4jax.rollout.prompts import pad_left

    _follow_links(follow_links)
    rows, tokenizer = _prompt_rows(checkpoint, prompt or (), prompt_file, token_ids, ("--prompt", "--prompt-file", "--token-ids"))
    if stop and tokenizer is None:
        tokenizer = _tokenizer(checkpoint, "no --stop")
    if stream and (tokenizer is None or as_json or len(rows) * num_samples != 1):
        raise ValueError("--stream: one prompt as text and one sample, without --json")
    if stream is None:
        stream = tokenizer is not None and not as_json and len(rows) * num_samples == 1 and sys.stdout.isatty()
    places = None if output is None else _place_of(output)  # before anything is loaded or sampled
    arguments.whole("--seed", seed, -(2**63), 2**63 - 1)
    if scaling is not None:
        _scaling(scaling)  # its name is known
    with Console(stderr=True).status(f"loading {checkpoint}"):
        model = load_model(checkpoint, scan_layers=scan_layers, scaling=None if scaling == "none" else scaling)  # type: ignore[arg-type]
    if scaling == "none":  # to load_model None is "as stored"
        model = nnx.view(model, scaling=None)
    settings: Any = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, key=jax.random.key(seed), num_samples=num_samples, cache_length=cache_length,
        stop_tokens=_stop_tokens(checkpoint) if stop_token is None else stop_token, rows_in_flight=rows_in_flight, telemetry=telemetry,
    )  # fmt: skip
    texts: Sequence[str | None]
    if stream:
        waiting = Console(stderr=True).status("compiling, and reading the prompt")

        def show(row: int, new: str) -> None:
            waiting.stop()
            print(new, end="", flush=True)

        with waiting:
            texts, result = generate_text(model, tokenizer, rows, stop_strings=stop or (), on_text=show, swap_every=4, **settings)
        print()
    else:
        settings |= dict(progress=Console(stderr=True).is_terminal)
        if tokenizer is not None:
            texts, result = generate_text(model, tokenizer, rows, stop_strings=stop or (), **settings)
        else:
            result = generate(model, *pad_left(rows), **settings)
            texts = [None] * result.tokens.shape[0]
    tokens, lengths, logprobs = (np.asarray(v) for v in (result.tokens, result.lengths, result.logprobs))
    records = []
    for i, text in enumerate(texts):
        new = tokens[i, : lengths[i]].tolist()
        record = {"prompt": i // num_samples, "sample": i % num_samples, "tokens": new, "logprobs": logprobs[i, : lengths[i]].tolist()}
        records.append(json.dumps(record if text is None else record | {"text": text}))
        if as_json:
            print(records[-1])
        elif not stream:
            print(f"[{i // num_samples}.{i % num_samples}] " + (",".join(map(str, new)) if text is None else text))
    if telemetry:
        print(result.telemetry, file=sys.stderr)
    if output is not None and places is not None:
        _write(output, *places, "".join(record + "\n" for record in records))


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Hugging Face folder or Orbax folder.")],
    plot: Annotated[Path | None, typer.Option(help="Draw histograms of the scales into this file (.png, .svg, .pdf).")] = None,
    follow_links: _FOLLOW_LINKS = False,
) -> None:
    """Print layers of a checkpoint: formats, shapes, scales, sizes."""
    from nvfp4jax import inspection

    _follow_links(follow_links)
    inspection.show(directory)
    if plot is not None:
        inspection.plot_scales(directory, plot)
        print(f"scales drawn: {plot}")


@app.command()
def demo(
    directory: Annotated[Path | None, typer.Argument(help="A bfloat16 Hugging Face folder; without one, a tiny random Qwen3-MoE.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to sample for each prompt.")] = 16,
) -> None:
    """Load, swap, save, restore, roll out, reload. Then roll out again, and a table of the modes."""
    from nvfp4jax import arguments, demo

    arguments.whole("--new-tokens", new_tokens, 1)
    arguments.device()
    if directory is not None:
        demo.run(directory, new_tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        demo.write_tiny_folder(Path(folder))
        demo.run(Path(folder), new_tokens)


_OTHER_NAMES = {"headroom": "--calibration-headroom", "input_ids": "the prompts", "stop_tokens": "--stop-token"}


def _with_flags(message: str, command: Any) -> str:
    """The message of an error in the library, its arguments called what they are on the command line."""
    flags = _OTHER_NAMES | {option.name: option.opts[0] for option in command.params if option.opts[0].startswith("--")}
    for name, flag in flags.items():
        # A name that may also be a word is one where a value follows, or at the beginning.
        name = rf"(?<![\w/-]){name}(?![\w/-])" if "_" in name else rf"(?<![\w/-]){name}(?==)|^{name}(?=: )"
        message = re.sub(name, flag, message, count=1)  # what follows is advice
    return message


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, or 2 with one line on stderr for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.WARNING, format="nvfp4jax: %(message)s")
    command = typer.main.get_command(app)
    arguments = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
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
        said = message() if message is not None else _with_flags(str(error), command.commands[arguments[0]])  # type: ignore[attr-defined]
        print(f"nvfp4jax: {' '.join(said.split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
