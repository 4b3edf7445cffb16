"""The command line: what it prints, and one line with exit code 2 for what is wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from checkpoint import folders
from checkpoint.test_huggingface import leaves
from conftest import DATA

from nvfp4jax import cli, inspection
from nvfp4jax.checkpoint import load_model
from nvfp4jax.checkpoint.convert import Calibration, Selection, quantize_folder
from nvfp4jax.rollout import generate

MOE = DATA / "qwen3-moe-tiny"


@pytest.fixture
def run(capsys):
    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert end.value.code == code, captured.err
        return captured.err if code else captured.out

    return call


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", str(path), "--keep-last-n", "1", "--exclude", "k_proj"])
    assert end.value.code == 0
    return path


def test_inspect_orbax(run, quantized):
    text = run("inspect", quantized)
    assert "Qwen3MoeForCausalLM" in text and "te-exact/token" in text
    row = next(line for line in text.splitlines() if line.startswith("layers/*/mlp/experts/gate_up"))
    assert row.split()[1:3] == ["3", "nvfp4"] and "[8, 2, 64, 128]" in row
    row = next(line for line in text.splitlines() if line.startswith("layers/*/self_attn/k_proj/kernel"))
    assert row.split()[1:3] == ["4", "bfloat16"]
    assert f"{3 * 8 * 2 * 64 * (64 + 8) + 3 * 8 * 4:,}" in text  # codes, block scales and global scales of gate_up


def test_inspect_tells_layers_of_two_formats_apart(run, tmp_path):
    run("quantize", "--model-dir", MOE / "bf16", "--save-dir", tmp_path / "q", "--keep-first-n", 1)
    rows = [line.split()[1:3] for line in run("inspect", tmp_path / "q").splitlines() if line.startswith("layers/*/self_attn/k_proj/kernel")]
    assert sorted(rows) == [["1", "bfloat16"], ["3", "nvfp4"]]


@pytest.mark.parametrize("form", ["bf16", "modelopt-nvfp4", "compressed-tensors-nvfp4"])
def test_inspect_hugging_face(run, form):
    text = run("inspect", MOE / form)
    row = next(line for line in text.splitlines() if "experts.*.down_proj" in line)
    assert row.split()[1:3] == ["32", "bfloat16" if form == "bf16" else "nvfp4"] and "[128, 64]" in row
    total = sum(value.nbytes for value in folders.tensors(MOE / form).values())
    assert f"total: {total:,} bytes" in text and "1,119,616 weights" in text


@pytest.mark.parametrize("form", ["modelopt-nvfp4", "compressed-tensors-nvfp4", "orbax", "bf16"])
def test_inspect_draws_scales(run, form, quantized, tmp_path):
    """A picture; what is drawn is what the files hold."""
    pytest.importorskip("matplotlib")
    directory = quantized if form == "orbax" else MOE / form
    if form == "bf16":
        assert "no NVFP4 weight" in run("inspect", directory, "--plot", tmp_path / "scales.png", code=2)
        return
    assert "scales drawn" in run("inspect", directory, "--plot", tmp_path / "scales.png")
    assert (tmp_path / "scales.png").read_bytes()[:4] == b"\x89PNG"
    if form != "orbax":
        tensors = folders.tensors(directory)
        drawn = inspection._huggingface_scales(directory)
        blocks = [value for name, value in tensors.items() if name.endswith(".weight_scale")]
        np.testing.assert_array_equal(np.sort(drawn["block scales"]), np.sort(np.concatenate([b.ravel() for b in blocks]).astype(np.float32)))
        given = [value.reshape(-1).astype(np.float32) for name, value in tensors.items() if name.endswith(("weight_scale_2", "weight_global_scale"))]
        plain = np.concatenate(given) if form == "modelopt-nvfp4" else 1 / np.concatenate(given)
        np.testing.assert_allclose(np.sort(drawn["global scales"]), np.sort(plain), rtol=1e-6)
    assert "--plot" in run("inspect", directory, "--plot", tmp_path / "absent" / "scales.png", code=2)


@pytest.mark.parametrize("command", ["quantize", "rollout", "inspect", "demo"])
def test_help_fits_80_columns(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(command, "--help").splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


def test_rollout_of_token_ids(run, quantized):
    common = ("rollout", "--checkpoint", quantized, "--scan-layers", "--max-new-tokens", 5, "--num-samples", 2,
              "--token-ids", "1,2,3", "--token-ids", "7 8 9 10 11")  # fmt: skip
    lines = run(*common, "--stop-token", 10_000, "--json").splitlines()  # one that no row draws: all three share a program
    records = [json.loads(line) for line in lines]
    assert [(r["prompt"], r["sample"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ids, mask = np.array([[0, 0, 1, 2, 3], [7, 8, 9, 10, 11]]), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = generate(load_model(quantized, scan_layers=True), ids, mask, max_new_tokens=5, num_samples=2, stop_tokens=[10_000])
    for i, record in enumerate(records):
        assert record["tokens"] == np.asarray(expected.tokens)[i].tolist()
        np.testing.assert_allclose(record["logprobs"], np.asarray(expected.logprobs)[i], rtol=1e-6)
    first, second = records[0]["tokens"][:2]
    assert first != second
    text = run(*common, "--stop-token", second)
    assert text.startswith(f"[0.0] {first},{second}\n[0.1] {first},{second}\n[1.0] ")


@pytest.mark.slow
def test_rollout_through_a_queue(run, quantized):
    common = ("rollout", "--checkpoint", quantized, "--scan-layers", "--max-new-tokens", 4, "--num-samples", 2, "--json",
              "--token-ids", "1,2,3", "--token-ids", "7 8 9", "--token-ids", "5 6")  # fmt: skip
    found, expected = ([json.loads(line) for line in run(*common, *more).splitlines()] for more in (("--rows-in-flight", 2), ()))
    assert [r | dict(logprobs=None) for r in found] == [r | dict(logprobs=None) for r in expected] and len(found) == 6


def save_tokenizer(folder):
    """Word w7 is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 512)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_calibration_prompts(run, tmp_path):
    """From a file of text and as token ids: the scales that the library makes of the same prompts, in batches of any kind."""
    config = folders.small_config(vocab_size=512)
    source = folders.write(tmp_path / "source", config, folders.small_weights(config))
    save_tokenizer(source)
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\n\nw9\n" + "w5 w400 w17 w6 w8 w9 w10\n" * 9)
    common = ("quantize", "--model-dir", source, "--scaling", "static", "--calibration-headroom", 1.5)
    run(*common, "--save-dir", tmp_path / "a", "--calibration-prompts", tmp_path / "prompts.txt", "--calibration-token-ids", "77 78 79")
    prompts = [[1, 2, 3], [9], [5, 400, 17, 6, 8, 9, 10], [77, 78, 79]]
    quantize_folder(source, tmp_path / "b", Selection(scaling="static"), calibration=Calibration([np.array([p]) for p in prompts], 1.5))
    found, expected = leaves(load_model(tmp_path / "a")), leaves(load_model(tmp_path / "b"))
    assert found.keys() == expected.keys() and sum("input_scale" in path for path in found) == 4 + 4 + 3 + 2
    for path in found:
        np.testing.assert_allclose(found[path].astype(np.float32), expected[path].astype(np.float32), rtol=2e-2, err_msg=path)
    text = run("inspect", tmp_path / "a")
    assert "te-exact/static" in text
    run("quantize", "--model-dir", tmp_path / "a", "--save-dir", tmp_path / "mo", "--output", "modelopt", "--calibration-token-ids", "1,2")
    assert leaves(load_model(tmp_path / "mo", scaling="static")).keys() == found.keys()


@pytest.mark.slow
def test_rollout_telemetry(quantized, capsys):
    """The table goes to stderr: stdout stays what it is."""
    with pytest.raises(SystemExit) as end:
        cli.main(["rollout", "--checkpoint", str(quantized), "--scan-layers", "--token-ids", "1,2", "--max-new-tokens", "2", "--json", "--telemetry"])
    captured = capsys.readouterr()
    assert end.value.code == 0 and len(json.loads(captured.out)["tokens"]) == 2
    assert re.search(r"inputs of NVFP4 layers, [\d,]+ blocks: saturated 0, .*\nlayer +amax +saturated +beyond +flushed\nlayers/", captured.err)


def test_rollout_of_text(run, tmp_path, quantized, monkeypatch):
    folder = tmp_path / "with"
    shutil.copytree(quantized, folder)
    save_tokenizer(folder)
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\n\nw9\n")
    text = run("rollout", "--checkpoint", folder, "--scan-layers", "--prompt", "w1 w2 w3", "--prompt-file", tmp_path / "prompts.txt", "--max-new-tokens", 3)
    lines = text.splitlines()
    assert len(lines) == 3 and lines[0].removeprefix("[0.0] ") == lines[1].removeprefix("[1.0] ")
    expected = generate(load_model(folder, scan_layers=True), np.array([[1, 2, 3]]), max_new_tokens=3)
    words = [f"w{i}" for i in np.asarray(expected.tokens)[0]]
    assert lines[0] == "[0.0] " + " ".join(words)
    # Prompts from stdin, cut at a word; JSON lines into a file; text as it is sampled.
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2 w3\n\nw9\n"))
    common = ("rollout", "--checkpoint", folder, "--scan-layers", "--max-new-tokens", 3)
    text = run(*common, "--prompt-file", "-", "--stop", " " + words[1], "--output", tmp_path / "out.jsonl")
    assert text.splitlines()[0] == f"[0.0] {words[0]}"
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == [0, 1] and records[0]["text"] == words[0]
    assert records[0]["tokens"] == np.asarray(expected.tokens)[0, :2].tolist()
    np.testing.assert_allclose(records[0]["logprobs"], np.asarray(expected.logprobs)[0, :2], rtol=1e-5)
    assert run(*common, "--prompt", "w1 w2 w3", "--stream") == " ".join(words) + "\n"
    assert "one prompt as text" in run(*common, "--prompt", "w1", "--num-samples", 2, "--stream", code=2)


@pytest.mark.slow
def test_sampling_depends_on_the_seed_alone(run, quantized):
    def call(seed):
        return run(
            "rollout", "--checkpoint", quantized, "--scan-layers", "--token-ids", "1,2", "--max-new-tokens", 8, "--temperature", 2.0,
            "--seed", seed,
        )  # fmt: skip

    assert call(0) == call(0) != call(1)


def test_the_folders_stop_tokens(tmp_path, quantized):
    """Of generation_config.json, where there is one, else of the model's config, as transformers' GenerationConfig.from_model_config has it."""
    folder = folders.copy(MOE / "bf16", tmp_path / "a", config={"eos_token_id": 7})
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert cli._stop_tokens(folder) == [7]
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert cli._stop_tokens(folder) == [3, 5]
    (folder / "generation_config.json").write_text("{}")
    assert cli._stop_tokens(folder) == []
    (folder / "generation_config.json").write_text('{"eos_token_id": "5"}')
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be an integer"):
        cli._stop_tokens(folder)
    (folder / "generation_config.json").unlink()
    quantize_folder(folder, tmp_path / "packed", Selection(experts_only=True))
    assert cli._stop_tokens(tmp_path / "packed") == [7]


def test_where_the_output_goes(tmp_path):
    """Through a link, and into a pipe: neither is replaced by a file, as a device would be."""
    real, link, dangling, pipe = (tmp_path / name for name in ("real.jsonl", "link", "dangling", "pipe"))
    real.write_text("old")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "new.jsonl")
    os.mkfifo(pipe)
    before = sorted(os.listdir(tmp_path))
    for output, target in ((link, real), (dangling, tmp_path / "new.jsonl"), (real, real)):
        places = cli._place_of(output)
        assert sorted(os.listdir(tmp_path)) == before  # nothing is left where it ends before it writes
        cli._write(output, *places, f"to {output.name}\n")
        assert target.read_text() == f"to {output.name}\n" and not target.is_symlink()
        before = sorted({*before, target.name})
    assert link.is_symlink() and dangling.is_symlink()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    cli._write(pipe, *cli._place_of(pipe), "to the pipe\n")
    assert os.read(reader, 100) == b"to the pipe\n" and pipe.is_fifo()
    os.close(reader)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_output_that_cannot_be_kept(tmp_path):
    """One line, and nothing half-written beside it."""
    output = tmp_path / "out.jsonl"
    places = cli._place_of(output)
    output.mkdir()
    with pytest.raises(ValueError, match="--output .*out.jsonl: not written: Is a directory"):
        cli._write(output, *places, "text")
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_line_of_a_file_of_prompts(tmp_path, monkeypatch):
    """A line break ends a prompt, nothing else does; a byte order mark is no part of the first."""
    save_tokenizer(tmp_path)
    read = []
    monkeypatch.setattr("nvfp4jax.checkpoint.tokenizer.Tokenizer.encode", lambda self, texts: read.extend(texts) or [[1]] * len(texts))
    text = "a\u2028b\x0cc\u0085d\r\n\r\ne\n"
    (tmp_path / "prompts.txt").write_bytes(("\ufeff" + text).encode())
    options = ("--prompt", "--prompt-file", "--token-ids")
    cli._prompt_rows(tmp_path, (), tmp_path / "prompts.txt", (), options)
    monkeypatch.setattr("sys.stdin", io.StringIO(text, newline=""))
    cli._prompt_rows(tmp_path, (), Path("-"), (), options)
    assert read == ["a\u2028b\x0cc\u0085d", "e"] * 2


QUANTIZE = ["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", "{tmp}/x"]
BAD = {
    "no folder": (["inspect", "{tmp}/absent"], "no such folder"),
    "empty folder": (["inspect", "{tmp}/empty"], "config.json"),
    "truncated": (["inspect", "{tmp}/cut"], "model.safetensors.*truncated"),
    "save-dir exists": (["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", "{tmp}/empty"], "exists already"),
    "unknown mode": (["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", "{tmp}/x", "--scaling", "fast"], "--scaling fast: one of"),
    "exclude nothing": (["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", "{tmp}/x", "--exclude", "zzz"], "'zzz' matches no layer"),
    "architecture": (["quantize", "--model-dir", "{tmp}/llama", "--save-dir", "{tmp}/x"], "architectures"),
    "static": ([*QUANTIZE, "--scaling", "static"], "calibrate on some prompts .--calibration-prompts."),
    "no calibration file": ([*QUANTIZE, "--calibration-prompts", "{tmp}/absent.txt"], "--calibration-prompts .*absent.txt: cannot be read"),
    "empty calibration file": ([*QUANTIZE, "--calibration-prompts", "{tmp}/none.txt"], "none.txt: no prompt in it"),
    "calibration text": ([*QUANTIZE, "--calibration-prompts", "{tmp}/one.txt"], "tokenizer.json.*pass --calibration-token-ids"),
    "calibration ids": ([*QUANTIZE, "--calibration-token-ids", "1,x"], "--calibration-token-ids '1,x': integers"),
    "headroom alone": ([*QUANTIZE, "--calibration-headroom", "2"], "--calibration-headroom: without --calibration-prompts"),
    "headroom": ([*QUANTIZE, "--calibration-token-ids", "1", "--calibration-headroom", "0.5"], "--calibration-headroom=0.5: a finite factor"),
    "nothing to scale": ([*QUANTIZE, "--scaling", "none", "--calibration-token-ids", "1"], "scaling=None quantizes no activation"),
    "usage": (["quantize", "--model-dir", "x"], "save-dir"),
    "no such option": (["rollout", "--nonsense"], "nonsense"),
    "no such command": (["train"], "train"),
    "a number": (["quantize", "--model-dir", "x", "--save-dir", "y", "--keep-first-n", "two"], "keep-first-n"),
    "no prompt": (["rollout", "--checkpoint", str(MOE / "bf16")], "no prompt"),
    "no tokenizer": (["rollout", "--checkpoint", str(MOE / "bf16"), "--prompt", "hello"], "tokenizer.json.*--token-ids"),
    "bad tokenizer": (["rollout", "--checkpoint", "{tmp}/llama", "--prompt", "hello"], "cannot be read as a tokenizer"),
    "ids": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1,x"], "integers"),
    "no ids": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", ""], "no token"),
    "vocabulary": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1,512"], "vocabulary"),
    "prompt file": (["rollout", "--checkpoint", str(MOE / "bf16"), "--prompt-file", "{tmp}/absent.txt"], "prompt-file.*absent.txt"),
    "a huge id": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1,99999999999999999999"], "prompt 0: token=99999999999999999999: at most"),
    "a huge seed": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--seed", "99999999999999999999"], "--seed=99999999999999999999: at most"),
    "output": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--output", "{tmp}"], "--output .*: a folder"),
    "an output whose part cannot be written": (["rollout", "--checkpoint", "{tmp}/cut", "--token-ids", "1", "--output", "{tmp}/out.jsonl"],
                                               "--output .*out.jsonl: Is a directory"),
    "an output where nothing can be written": (["rollout", "--checkpoint", "{tmp}/cut", "--token-ids", "1", "--output", "/proc/self/x.jsonl"],
                                               "--output /proc/self/x.jsonl: No such file or directory"),
    "a long name": (["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", "{tmp}/" + "x" * 300], "cannot be looked at .File name too long"),
    "cache": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1,2,3", "--cache-length", "16"],
              r"the prompts \[1, 3\] and --max-new-tokens=32 need 35 slots; the cache has --cache-length=16"),
    "samples": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--num-samples", "0"], "^nvfp4jax: --num-samples=0: at least 1"),
    "a long output": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--output", "{tmp}/" + "x" * 300], "--output .*: File name too long"),
    "a huge stop token": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--stop-token", "99999999999"], "--stop-token=99999999999: at most"),
    "static of floats": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--scaling", "static"],
               r"--scaling='static': the folder stores no layer in NVFP4.*rules=\[Rule\(..., scaling="),
    "four over six of activations": (["quantize", "--model-dir", str(MOE / "bf16"), "--save-dir", "{tmp}/out", "--scaling-four-over-six", "foo"],
                                     "^nvfp4jax: --scaling-four-over-six='foo': None, 'mae' or 'mse'"),
    "a demo of no token": (["demo", "--new-tokens", "0"], "^nvfp4jax: --new-tokens=0: at least 1"),
    "temperature": (["rollout", "--checkpoint", str(MOE / "bf16"), "--token-ids", "1", "--temperature", "-1"], "^nvfp4jax: --temperature=-1.0: 0 .greedy., or at least"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(run, tmp_path, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out.jsonl.part").mkdir()
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("a prompt\n")
    shutil.copytree(MOE / "bf16", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    folders.copy(MOE / "bf16", tmp_path / "llama", config={"architectures": ["FalconForCausalLM"]})
    (tmp_path / "llama" / "tokenizer.json").write_text("{")
    arguments, message = BAD[case]
    error = run(*(argument.format(tmp=tmp_path) for argument in arguments), code=2)
    # A progress bar may have cleared its line.
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", error).strip()
    assert re.search(message, line) and "\n" not in line and line.startswith("nvfp4jax: "), error
    assert not list(tmp_path.glob("x*"))


def test_a_device_that_is_not_there(tmp_path, quantized):
    """It is the device that is missing, not the folder that is bad. In a process of its own: jax looks for devices once."""
    for command in (["inspect", quantized], ["rollout", "--checkpoint", quantized, "--token-ids", "1,2"], ["quantize", "--model-dir", MOE / "bf16", "--save-dir", tmp_path / "x"]):
        environment = os.environ | {"JAX_PLATFORMS": "rocm", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-m", "nvfp4jax.cli", *map(str, command)], capture_output=True, text=True, env=environment)
        line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stderr).strip().splitlines()[-1]
        assert done.returncode == 2 and line.startswith("nvfp4jax: JAX_PLATFORMS=rocm: jax finds no such device here"), done.stderr
    assert not os.listdir(tmp_path)


def test_help(run, monkeypatch):
    """Every word of it, also where the terminal is narrow; and no argument at all asks for it."""
    monkeypatch.setenv("COLUMNS", "80")
    command = typer.main.get_command(cli.app)
    for name, sub in command.commands.items():
        text = " ".join(run(name, "--help").split())
        for option in sub.params:
            assert f"--{option.name.replace('_', '-')}" in text or option.name in ("directory", "as_json")
            assert " ".join(option.help.split()) in text
        assert sub.help.split(".")[0] in " ".join(run("--help").split())
    assert run() == run("--help") and "..." not in run().replace("[ARGS]...", "")
