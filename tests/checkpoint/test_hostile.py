"""Folders made to hurt: each ends in one line, within seconds of CPU time and a bounded memory, or is read right.

Each case runs in a child whose address space is limited, so that what is claimed cannot be allocated.
"""

import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from checkpoint import folders
from nvfp4jax.checkpoint import CheckpointError, formats, quantization_config
from nvfp4jax.checkpoint.safetensors import FOLLOW_LINKS, read_folder, read_json
from nvfp4jax.checkpoint.tokenizer import Tokenizer

CONFIG = folders.small_config()


def refused(act, match: str, seconds: float = 5.0) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match=match) as error:
        act()
    assert time.process_time() - begin < seconds and "\n" not in str(error.value) and len(str(error.value)) < 2000


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return folders.write(tmp_path_factory.mktemp("sound") / "a", CONFIG, folders.small_weights(CONFIG))


def test_pipes_and_devices_in_place_of_each_file(sound, tmp_path):
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "hf_quant_config.json"):
        folder = folders.copy(sound, tmp_path / f"pipe-{name}")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused(lambda: formats.open_checkpoint(folder), "not a regular file")
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refused(lambda: formats.open_checkpoint(folder), "a link out of its folder, to /dev/zero")


def test_links_are_followed_where_asked(sound, tmp_path):
    folder = folders.copy(sound, tmp_path / "a")
    os.rename(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    refused(lambda: read_folder(folder), "a link out of its folder, to .*blob; .*--follow-links")
    token = FOLLOW_LINKS.set(True)
    try:
        assert len(read_folder(folder)) == len(read_folder(sound))
    finally:
        FOLLOW_LINKS.reset(token)
    (folder / "model.safetensors").unlink()
    os.rename(tmp_path / "blob", folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert len(read_folder(folder)) == len(read_folder(sound))
    # The hub's cache: every file of a revision is a link to a blob beside it.
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    revision = folders.copy(sound, cache / "snapshots" / "0123")
    for i, file in enumerate(sorted(revision.iterdir())):
        os.rename(file, cache / "blobs" / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    assert len(formats.open_checkpoint(revision).tensors) == len(read_folder(sound))


@pytest.mark.parametrize("layers", [257, 20_000, 10**7, 10**30, -1, True, 1.5, "8"])
def test_depth(sound, tmp_path, layers):
    folder = folders.copy(sound, tmp_path / "a", config={"num_hidden_layers": layers})
    refused(lambda: formats.open_checkpoint(folder), "num_hidden_layers=.* must be a count of at most 256")


@pytest.mark.slow
def test_twenty_thousand_empty_tensors(tmp_path):
    header = {f"model.layers.{i}.mlp.up_proj.weight": {"dtype": "BF16", "shape": [0, 8], "data_offsets": [0, 0]} for i in range(20_000)}
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 256}))
    code = f"""
        import re, resource, sys
        sys.path.insert(0, {str(Path(formats.__file__).parents[2])!r})
        resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
        import nvfp4jax
        import time
        begin = time.process_time()
        try:
            nvfp4jax.load_model({str(tmp_path)!r})
        except ValueError as error:
            status = open("/proc/self/status").read()  # ru_maxrss would be that of the process that this one was forked from
            print(time.process_time() - begin, re.search(r"VmHWM:\\s+(\\d+) kB", status)[1], error)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    seconds, kilobytes, message = done.stdout.split(" ", 2)
    assert "is missing" in message and message.count("\n") == 1
    assert float(seconds) < 15 and int(kilobytes) < 1_000_000


@pytest.mark.parametrize(
    "raw, match",
    [
        (b"[" * 10_000_000, "values of JSON|not valid JSON"),
        (b'{"a":' * 500_000 + b"1" + b"}" * 500_000, "not valid JSON"),
        (b"[" + b"{}," * 5_000_000 + b"{}]", "values of JSON"),
        (b'{"a":' + b"[" + b"0," * 40_000_000 + b"0]}", "values of JSON"),
        (b'{"a":' + b"9" * 20_000 + b"}", "not valid JSON"),
        (b'{"a":1,"a":2}', "a key appears twice"),
        (b'{"a": "\xff"}', "not valid JSON"),
    ],
    ids=["open brackets", "nested", "many objects", "many numbers", "a long number", "twice", "no text"],
)
def test_json(tmp_path, raw, match):
    (tmp_path / "config.json").write_bytes(raw)
    refused(lambda: read_json(tmp_path / "config.json"), match)


NAME = "model.layers.17.mlp.experts.101.gate_proj"


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(?=(a+)+$)b", r"(?!(.*a)*b)", r"(?<=(aa))(a|a)*", r"(?>(a+)+)b", r"((a*)*)*+b", r"(a)\1", r"(a)?(?(1)b|c)", ".*" * 40,
     r"(?=a*a*a*a*a*b)", "a" * 2000, "(?i:(x+x+)+y)"],
)  # fmt: skip
def test_expressions_that_could_take_for_ever(pattern):
    refused(lambda: quantization_config.is_excluded("a" * 40, [f"re:{pattern}"]), "exclude pattern")


def test_expressions_that_are_in_use():
    for pattern in (r".*lm_head", r"(?!.*experts).*gate_proj", r"model\.layers\.\d+\.mlp\.experts\..*", r".*mlp\.(gate|up)_proj", r"^model.*17.*$"):
        assert quantization_config.is_excluded(NAME.replace("gate_proj", "gate_proj"), [f"re:{pattern}"]) == (re.match(pattern, NAME) is not None)


def test_many_patterns():
    names = [f"model.layers.{i}.mlp" for i in range(100_000)]
    begin = time.process_time()
    assert quantization_config.is_excluded(NAME, names) and not quantization_config.is_excluded(NAME.replace("17", "x"), names)
    for i in range(200):
        quantization_config.is_excluded(f"model.layers.{i}.self_attn.q_proj", names)
    assert time.process_time() - begin < 3
    refused(lambda: quantization_config.is_excluded(NAME, [f"*{i}*" for i in range(300)]), "300 exclude patterns with wildcards")


def tokenizer(tmp_path, **parts) -> Tokenizer:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}
    base = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(base | {"model": model} | parts))
    return Tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer as Library

    ours = tokenizer(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["a b a", "", "b c"]
    assert ours.encode(texts) == [library.encode(text).ids for text in texts]
    assert ours.decode([[0, 1], []]) == [library.decode([0, 1]), ""]


@pytest.mark.parametrize("case", ["grows", "backtracks", "panics", "no file of one", "pipe"])
def test_a_tokenizer_that_blows_up(tmp_path, case):
    if case == "grows":
        step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
        bad = tokenizer(tmp_path, normalizer={"type": "Sequence", "normalizers": [step] * 20})
    elif case == "backtracks":
        bad = tokenizer(tmp_path, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(?:a|a|aa)+$"}, "behavior": "Isolated", "invert": False})
    elif case == "panics":
        bad = tokenizer(tmp_path, model={"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]})
    elif case == "no file of one":
        bad = tokenizer(tmp_path, model=[[]])
    else:
        os.mkfifo(tmp_path / "tokenizer.json")
        with pytest.raises(CheckpointError, match="not a regular file"):
            Tokenizer(tmp_path / "tokenizer.json")
        return
    refused(lambda: bad.encode(["a" * 60 + "b"]), r"tokenizer\.json: cannot be read as a tokenizer, or used")
