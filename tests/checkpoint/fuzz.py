"""Damaged folders, made at random: whatever they hold, the reader ends with a model or one CheckpointError (a ValueError).

`python tests/checkpoint/fuzz.py 600` tries for ten minutes and prints how many inputs that were; test_fuzz.py runs a few.
"""

import copy
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import folders
from nvfp4jax.checkpoint import formats, huggingface
from nvfp4jax.checkpoint.safetensors import read_folder, read_tensor

MAX_BYTES = 64 * 2**20  # that reading a folder of 100 kB may ever take
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 16, 31, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 2**200, -(2**63), 0.0, -0.5, 1.5, 1e308,
    float("nan"), float("inf"), "", "a", "\0", "../x", "/etc/passwd", "é" * 50, "\ud800", "re:(a+)+", "re:(", "*", "x" * 5000, "U8", "BF16",
    "F8_E4M3", "F32", "F4", [], {}, [[]], [0], [0, 1], [1, 0], [-1, 4], [2**63, 2**64], [None], ["a"], [0.5], [True], [1] * 100, {"a": 1},
    {"": {}}, "modelopt", "compressed-tensors", "fp8", "NVFP4", "MIXED_PRECISION", "qwen3", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
]  # fmt: skip


def _value(rng: random.Random):
    """One of VALUES, its own: damage must not reach the list, nor put a value into itself."""
    return copy.deepcopy(rng.choice(VALUES))


def _places(value, found=None, parent=None, key=None) -> list:
    """Every (container, key) in a JSON value."""
    found = [] if found is None else found
    if parent is not None:
        found.append((parent, key))
    if isinstance(value, dict):
        for k in list(value):
            _places(value[k], found, value, k)
    elif isinstance(value, list):
        for i in range(min(len(value), 20)):
            _places(value[i], found, value, i)
    return found


def damage_json(value, rng: random.Random):
    """A JSON value with a few places replaced, removed, renamed or copied elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(value)
        if not places:
            return _value(rng)
        parent, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind <= 1:
            parent[key] = _value(rng)
        elif kind == 2:
            del parent[key]
        elif kind == 3 and isinstance(parent, dict):
            parent[str(rng.choice(VALUES))] = parent.pop(key)
        else:
            source, name = rng.choice(places)
            try:
                parent[key] = json.loads(json.dumps(source[name]))
            except (KeyError, IndexError, TypeError):
                parent[key] = _value(rng)
    return value


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        position = rng.randrange(len(raw)) if raw else 0
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[position:]
        elif kind == 2:
            raw[position:position] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            del raw[position : position + rng.randrange(1, 9)]
        else:
            raw[position : position + 8] = struct.pack("<Q", rng.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1]))
    return bytes(raw)


def encode(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


class Target:
    """Small sound folders (float, ModelOpt, compressed-tensors, FP8), and damage to one file of one of them at a time."""

    def __init__(self, root: Path):
        import ml_dtypes
        import numpy as np

        config = folders.small_config()
        weights = folders.small_weights(config)
        packed, inverse, fp8 = {}, {}, {}
        for name, value in weights.items():
            if "_proj" not in name:
                for tensors in (packed, inverse, fp8):
                    tensors[name] = value
                continue
            module, (n, k) = name.removesuffix(".weight"), value.shape
            codes, scale = np.ones((n, k // 2), np.uint8), np.ones((n, k // 16), ml_dtypes.float8_e4m3fn)
            packed |= {name: codes, f"{module}.weight_scale": scale, f"{module}.weight_scale_2": np.float32(0.01)}
            packed[f"{module}.input_scale"] = np.float32(0.01)
            inverse |= {f"{module}.weight_packed": codes, f"{module}.weight_scale": scale}
            inverse[f"{module}.weight_global_scale"] = np.ones(1, np.float32) * 100
            fp8 |= {name: value.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.ones((-(-n // 16), -(-k // 16)), np.float32)}
        group = {"format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
        quantizations = {
            "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "re:.*gate$", "*norm*"], "group_size": 16},
            "ct": {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": ["lm_head"]},
            "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
        }
        self.folders = [
            folders.write(root / "float", config, weights, shards=2),
            folders.write(root / "modelopt", config | {"quantization_config": quantizations["modelopt"]}, packed),
            folders.write(root / "ct", config | {"quantization_config": quantizations["ct"]}, inverse, shards=2),
            folders.write(root / "fp8", config | {"quantization_config": quantizations["fp8"]}, fp8),
        ]
        for folder in self.folders:
            huggingface.load_model(folder)
        self.outcomes: Counter = Counter()

    def attempt(self, rng: random.Random, deep: float = 0.2) -> str:
        """Damages one file, reads the folder, repairs the file. Raises what a reader must not raise.

        deep: the share of attempts that build and fill the model; the rest open the folder and read its tensors.
        """
        folder = rng.choice(self.folders)
        file = rng.choice(sorted(folder.iterdir()))
        sound = file.read_bytes()
        if file.suffix == ".json":
            data = encode(damage_json(json.loads(sound), rng)) if rng.random() < 0.8 else damage_bytes(sound, rng)
        elif rng.random() < 0.7:
            start = 8 + struct.unpack("<Q", sound[:8])[0]
            header = encode(damage_json(json.loads(sound[8:start]), rng))
            data = struct.pack("<Q", len(header)) + header + sound[start:]
        else:
            start = rng.choice([0, 8, len(sound) // 2])
            data = sound[:start] + damage_bytes(sound[start : start + 4000], rng) + sound[start + 4000 :]
        file.write_bytes(data)
        tracemalloc.start()
        try:
            if rng.random() < deep:
                huggingface.load_model(folder, scaling=rng.choice([None, "token", "static"]))
            else:
                formats.open_checkpoint(folder)
                for info in read_folder(folder).values():
                    read_tensor(info)
            outcome = "read"
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000 and str(error).isprintable(), repr(str(error))
            outcome = "refused"
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            file.write_bytes(sound)
        assert peak < MAX_BYTES, f"{peak} bytes for {file}"
        self.outcomes[outcome] += 1
        return outcome


def main(seconds: float, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        target = Target(Path(root))
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            number += 1
            state = rng.getstate()
            try:
                target.attempt(rng, deep=0.02)
            except BaseException:
                print(f"input {number} of seed {seed}; replay with random state {hash(state)}", file=sys.stderr)
                raise
    print(f"{number} inputs in {seconds:.0f} s, seed {seed}: {dict(target.outcomes)}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
