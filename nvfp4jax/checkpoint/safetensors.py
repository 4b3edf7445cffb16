"""Reading and writing safetensors files and the JSON beside them; what is read is not trusted.

A file is 8 bytes (the header's length, little endian), a JSON header, then the tensors' bytes without holes. Everything is checked
before any tensor's memory is allocated, and no more is ever allocated than the file holds. Only one tensor is read at a time, so a
caller's memory is its own choice.
"""

import contextvars
import json
import logging
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from nvfp4jax import arguments
from nvfp4jax.checkpoint.errors import CheckpointError, failure

_log = logging.getLogger(__name__)

# What the format's own library accepts as a header; a larger one is an attack or an accident.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_RANK = 32
# Values in a JSON file, about: each takes a hundred bytes or two once it is parsed. An index of 300,000 tensors has 300,000.
MAX_JSON_VALUES = 3_000_000
MAX_NAME = 1000

# Whether files that are links out of their folder are read: a folder of others could hand on any file of this machine.
FOLLOW_LINKS = contextvars.ContextVar("FOLLOW_LINKS", default=False)

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` in bytes from the file's start."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _parse_json(raw: bytes, where: str) -> dict:
    def unique(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            raise CheckpointError(f"{where}: a key appears twice")
        return table

    values = sum(raw.count(mark) for mark in (b",", b"{", b"["))
    if values > MAX_JSON_VALUES:
        raise CheckpointError(f"{where}: about {values} values of JSON; at most {MAX_JSON_VALUES} are read")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and integers of absurd length
        raise CheckpointError(f"{where}: not valid JSON ({type(error).__name__}: {str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is needed, not {type(value).__name__}")
    return value


def is_inside(path: Path, folder: Path) -> bool:
    """Whether what `path` leads to lies in `folder`, or, in the hub's cache, among the blobs beside it; or links are followed."""
    try:
        if FOLLOW_LINKS.get() or not path.is_symlink():
            return True
    except (OSError, ValueError):  # opening it tells
        return True
    root, target = os.path.realpath(folder), os.path.realpath(path)
    above, revisions = os.path.split(os.path.dirname(root))
    allowed = [root, os.path.join(above, "blobs")] if revisions == "snapshots" else [root]
    return any(os.path.commonpath([place, target]) == place for place in allowed)


def open_regular(path: Path):
    """The open file and its size. A pipe or a device is refused: reading it could block or never end; so is a link out of the folder."""
    if not is_inside(path, path.parent):
        raise CheckpointError(f"{path}: a link out of its folder, to {os.path.realpath(path)}; --follow-links (in Python safetensors.FOLLOW_LINKS.set(True)) reads it all the same")
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except (OSError, ValueError) as error:
        raise failure(f"{path}: cannot be opened", error) from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise CheckpointError(f"{path}: not a regular file")
    return file, status.st_size


def read_json(path: str | Path) -> dict:
    """A JSON object from a file of at most MAX_JSON_BYTES, or CheckpointError."""
    path = Path(path)
    file, size = open_regular(path)
    with file:
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
        return _parse_json(file.read(), str(path))


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, entry, data_start: int, data_size: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: a JSON object is needed")
    tag, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(tag, str) or tag not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {str(tag)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: a shape of at most {MAX_RANK} non-negative integers is needed, not {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets must be two non-negative integers, not {str(offsets)[:80]}")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[tag].itemsize
    if end > data_size:
        raise CheckpointError(f"{where} ends at byte {data_start + end}, the file at {data_start + data_size}: the file is truncated")
    if end - begin != wanted:
        raise CheckpointError(f"{where}: {tag} of shape {tuple(shape)} needs {wanted} bytes, data_offsets give {end - begin}")
    return TensorInfo(name, path, DTYPES[tag], tuple(shape), data_start + begin, wanted)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file by name, everything checked: sizes, types, offsets without overlap or holes.

    Raises CheckpointError naming the file and the tensor.
    """
    path = arguments.path("read_header: path", path)
    file, size = open_regular(path)
    with file:
        if size < 8:
            raise CheckpointError(f"{path}: {size} bytes; a safetensors file begins with 8: the file is truncated")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        if 8 + length > size:
            raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}: the file is truncated")
        raw = file.read(length)
    header = _parse_json(raw, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    for name in header:
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise CheckpointError(f"{path}: a tensor's name is not printable, or longer than {MAX_NAME}: {name[:80]!r}")
    data_start = 8 + length
    infos = [_entry(path, name, entry, data_start, size - data_start) for name, entry in header.items()]
    position = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {info.name!r} {problem} (byte {info.offset}, expected {position})")
        position += info.nbytes
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor")
    return {info.name: info for info in infos}


def read_index(path: str | Path) -> dict[str, str]:
    """The weight map of a `*.safetensors.index.json`: tensor name -> file name, each a plain name inside the folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' must map tensor names to file names")
    for name, shard in weight_map.items():
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise CheckpointError(f"{path}: a tensor's name is not printable, or longer than {MAX_NAME}: {name[:80]!r}")
        inside = isinstance(shard, str) and shard.isprintable() and shard == os.path.basename(shard) and "\\" not in shard
        if not inside or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {name!r} points to {str(shard)[:80]!r}, which is no .safetensors file of this folder")
    return weight_map


def read_folder(directory: str | Path) -> dict[str, TensorInfo]:
    """All tensors of a Hugging Face folder: of the files that the index names where there is one, else of its safetensors files.

    As transformers does, a file is read whole, also what the index does not list of it; a tensor in two files is refused.

    model.safetensors beside an index that does not know it is what transformers reads: it is taken, and that is logged.
    """
    directory = arguments.path("read_folder: directory", directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {'a file; the folder that holds a checkpoint is needed' if directory.exists() else 'no such folder'}")
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    weight_map = read_index(index) if index.exists() else {}
    if weight_map and single.exists() and single.name not in weight_map.values():
        _log.warning("%s: model.safetensors is read, not the shards of the index beside it (as transformers does); remove one", directory)
        weight_map = {}
    if weight_map:
        headers = {shard: read_header(directory / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise CheckpointError(f"{index}: tensor {name!r} is not in {shard}")
        return _merged(headers.values())
    files = [directory / "model.safetensors"]
    if not files[0].exists():
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no .safetensors file (other weight formats are not read)")
    return _merged(map(read_header, files))


def _merged(headers: Iterable[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                raise CheckpointError(f"{info.file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = info
    return tensors


def read_tensor(info: TensorInfo) -> np.ndarray:
    """One tensor's bytes as a fresh array; CheckpointError where the file has become shorter since its header was read."""
    file, size = open_regular(info.file)
    with file:
        if size < info.offset + info.nbytes:
            raise CheckpointError(f"{info.file}: tensor {info.name!r} reaches beyond the end: the file is truncated")
        raw = np.fromfile(file, np.uint8, info.nbytes, offset=info.offset)
    if raw.size != info.nbytes:
        raise CheckpointError(f"{info.file}: tensor {info.name!r}: {raw.size} of {info.nbytes} bytes could be read")
    return raw.view(info.dtype).reshape(info.shape)


class Writer:
    """A safetensors file whose tensors are written one by one, in any order, with nothing kept in memory.

    with Writer(path, {"a": (dtype, shape), ...}) as writer:
        writer.write("a", array)

    The file appears under its name only when complete; until then its name ends in ".tmp", and it is removed on an error.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        self.path = Path(path)
        self._temporary = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.tmp")  # another writer's is another file
        self._missing = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        # Widest types first, as the format's own library does: every tensor is then aligned to its type.
        for name in sorted(specs, key=lambda name: (-np.dtype(specs[name][0]).itemsize, name)):
            dtype, shape = np.dtype(specs[name][0]), tuple(specs[name][1])
            if dtype not in TAGS:
                raise CheckpointError(f"{path}: tensor {name!r}: safetensors has no tag for {dtype}")
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": TAGS[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._missing[name] = (dtype, shape, position)
            position = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        self._header = raw + b" " * (-len(raw) % 8)
        self._size = 8 + len(self._header) + position

    def __enter__(self) -> "Writer":
        self._file = open(self._temporary, "wb")
        self._file.write(struct.pack("<Q", len(self._header)) + self._header)
        self._file.truncate(self._size)
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        dtype, shape, offset = self._missing.pop(name)
        if array.dtype != dtype or array.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} was announced as {dtype} {shape}, written as {array.dtype} {array.shape}"
            )
        self._file.seek(8 + len(self._header) + offset)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def __exit__(self, kind, error, traceback) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None and not self._missing:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
        if kind is None and self._missing:
            raise CheckpointError(f"{self.path}: tensors announced but never written: {sorted(self._missing)[:3]}")
