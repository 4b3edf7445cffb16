"""A folder's tokenizer.json, run in a child process: a hostile one may take the time and memory of all expressions in the world.

    python tokenizer.py < request     the child: {"file", "texts" | "rows"} -> {"rows"} | {"texts"} | {"error"}, JSON both
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_FILE_BYTES = 100_000_000  # the largest known has 33 MB
_MAX_MEMORY_BYTES = 2**30
_MAX_ANSWER_BYTES = 2**28


class Tokenizer:
    """Text to token ids and back. ValueError of one line where the file cannot be read, or takes more than its share.

    A call may take 4 s of CPU time, and one more for each megabyte of text or million of tokens, and 1 GB.
    """

    def __init__(self, file: Path):
        from nvfp4jax import arguments
        from nvfp4jax.checkpoint.errors import CheckpointError
        from nvfp4jax.checkpoint.safetensors import open_regular

        file = arguments.path("Tokenizer: file", file)
        opened, size = open_regular(file)
        opened.close()
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{file}: {size} bytes of tokenizer; at most {MAX_FILE_BYTES} are read")
        self.file = file

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ask({"texts": list(texts)}, sum(map(len, texts)))["rows"]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self._ask({"rows": [list(row) for row in rows]}, sum(map(len, rows)))["texts"]

    def _ask(self, request: dict, size: int) -> dict:
        seconds = 4 + size // 1_000_000
        request |= {"file": str(self.file), "seconds": seconds}
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-P", __file__], input=json.dumps(request).encode(), capture_output=True, env=environment, timeout=60 + 10 * seconds
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{self.file}: the tokenizer does not come to an end") from None
        try:
            answer = json.loads(done.stdout)
        except ValueError:  # killed, or panicked
            answer = {"error": f"it took more than {seconds} s or {_MAX_MEMORY_BYTES >> 20} MB, or broke down"}
        if "error" in answer:
            raise ValueError(f"{self.file}: cannot be read as a tokenizer, or used ({' '.join(str(answer['error']).split())[:200]})")
        return answer


def _main() -> None:
    import resource

    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        from tokenizers import Tokenizer as Library

        tokenizer = Library.from_file(request["file"])
        if "texts" in request:
            answer = {"rows": [tokenizer.encode(text).ids for text in request["texts"]]}
        else:
            answer = {"texts": [tokenizer.decode(row) for row in request["rows"]]}
        text = json.dumps(answer)
        if len(text) > _MAX_ANSWER_BYTES:
            text = json.dumps({"error": f"its answer has {len(text)} bytes"})
    except BaseException as error:  # the library raises bare Exceptions, and its panics are BaseExceptions
        text = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
    sys.stdout.write(text)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
