"""Reading of untrusted safetensors files, against the format's own library and against damage."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from nvfp4jax.checkpoint.safetensors import CheckpointError, Writer, read_folder, read_header, read_json, read_tensor


def build(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_formats_own_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.integers(0, 255, (2, 8), dtype=np.uint8),
        "scalar": np.asarray(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    found = read_folder(tmp_path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        read = read_tensor(found[name])
        assert read.dtype == value.dtype and read.shape == value.shape
        np.testing.assert_array_equal(read, value)


def test_what_we_write_the_formats_own_library_reads(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        "codes": rng.integers(0, 255, (6, 8), dtype=np.uint8),
        "scale": rng.integers(0, 126, (6, 1), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "bf16": rng.normal(size=(3,)).astype(ml_dtypes.bfloat16),
        "global": np.asarray(0.125, np.float32),
    }
    path = tmp_path / "model.safetensors"
    with Writer(path, {name: (value.dtype, value.shape) for name, value in tensors.items()}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(tensors)
        np.testing.assert_array_equal(file.get_tensor("codes"), tensors["codes"])
        np.testing.assert_array_equal(file.get_tensor("global"), tensors["global"])
    for name, info in read_header(path).items():
        assert read_tensor(info).tobytes() == tensors[name].tobytes()
        assert info.offset % info.dtype.itemsize == 0


def test_an_interrupted_write_leaves_nothing(tmp_path):
    specs = {"a": (np.dtype(np.uint8), (4,)), "b": (np.dtype(np.uint8), (4,))}
    with pytest.raises(RuntimeError, match="stop"), Writer(tmp_path / "x.safetensors", specs) as writer:
        writer.write("a", np.zeros(4, np.uint8))
        raise RuntimeError("stop")
    with pytest.raises(CheckpointError, match="never written"), Writer(tmp_path / "x.safetensors", specs) as writer:
        writer.write("a", np.zeros(4, np.uint8))
    with pytest.raises(CheckpointError, match="'a' was announced"), Writer(tmp_path / "x.safetensors", specs) as writer:
        writer.write("a", np.zeros(5, np.uint8))
    assert list(tmp_path.iterdir()) == []


BAD_HEADERS = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "header beyond the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "absurd header length": (struct.pack("<Q", 2**63) + b"{}", "at most"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "not valid JSON"),
    "not JSON": (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "a JSON object"),
    "deep nesting": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
    "an absurd integer": (struct.pack("<Q", 10_000) + b'{"a":' + b"9" * 9_994 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_files(tmp_path, case):
    raw, message = BAD_HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


BAD_ENTRIES = {
    "entry is a number": ({"t": 5}, "JSON object"),
    "unknown dtype": ({"t": entry(dtype="F4")}, "unknown dtype"),
    "dtype is a list": ({"t": entry() | {"dtype": ["U8"]}}, "unknown dtype"),
    "negative shape": ({"t": entry(shape=(-4,))}, "shape"),
    "a bool in the shape": ({"t": entry(shape=(True, 4))}, "shape"),
    "absurd rank": ({"t": entry(shape=(1,) * 1000 + (4,))}, "shape"),
    "absurd shape": ({"t": entry(shape=(2**62, 2**62))}, "needs"),
    "wrong shape": ({"t": entry(shape=(5,))}, "needs 5 bytes"),
    "negative offset": ({"t": entry(offsets=(-4, 0))}, "non-negative"),
    "reversed offsets": ({"t": entry(offsets=(4, 0))}, "needs"),
    "one offset": ({"t": entry(offsets=(0,))}, "two"),
    "float offsets": ({"t": entry(offsets=(0.0, 4.0))}, "two"),
    "beyond the file": ({"t": entry(shape=(8,), offsets=(0, 8))}, "truncated"),
    "overlap": ({"t": entry(), "u": entry(shape=(2,), offsets=(2, 4))}, "overlaps"),
    "same bytes twice": ({"t": entry(), "u": entry()}, "overlaps"),
    "hole": ({"t": entry(shape=(2,), offsets=(2, 4))}, "hole"),
    "trailing bytes": ({"t": entry(shape=(2,), offsets=(0, 2))}, "after the last"),
    "surrogate in a name": (b'{"\\ud800": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "not printable"),
    "newline in a name": ({"a\nb": entry()}, "not printable"),
    "name twice": (b'{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"t":{}}', "twice"),
    "metadata with a number": ({"__metadata__": {"format": 1}, "t": entry()}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_headers(tmp_path, case):
    header, message = BAD_ENTRIES[case]
    path = build(tmp_path / "model.safetensors", header, b"abcd")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_truncation_is_seen(tmp_path):
    build(tmp_path / "whole", {"t": entry(), "u": entry(shape=(2,), offsets=(4, 6))}, b"abcdef")
    raw = (tmp_path / "whole").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="cut"):
            read_header(tmp_path / "cut")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 5, "a\0.safetensors",
                                   "..\\x.safetensors"])
def test_index_cannot_leave_the_folder(tmp_path, shard):
    build(tmp_path / "model.safetensors", {"t": entry()}, b"abcd")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(CheckpointError, match="of this folder"):
        read_folder(inner)


def test_index_names_a_missing_file_or_tensor(tmp_path):
    build(tmp_path / "a.safetensors", {"t": entry()}, b"abcd")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "a.safetensors", "u": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match="b.safetensors"):
        read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"t": "a.safetensors", "u": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match="'u' is not in a.safetensors"):
        read_folder(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="index.json"):
        read_folder(tmp_path)


def test_no_pipe_no_directory_no_absent_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be opened|regular file"):
        read_json(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no .safetensors"):
        read_folder(tmp_path)


def test_a_file_cut_after_its_header_was_read(tmp_path):
    path = build(tmp_path / "model.safetensors", {"t": entry()}, b"abcd")
    info = read_header(path)["t"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensor(info)
