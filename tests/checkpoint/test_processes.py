"""Several processes at one directory of steps, and what a process leaves on stderr: the library driven as a job drives it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import nvfp4jax
from checkpoint.test_reader import CONFIG, contents, net
from nvfp4jax.checkpoint.reload import Reader, publish, steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning", "ignore::ResourceWarning"),
]
TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{Path(nvfp4jax.__file__).parents[1]}:{TESTS}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
WRITER = """
    import sys
    from checkpoint.test_reader import CONFIG, net
    from nvfp4jax.checkpoint import CheckpointError
    from nvfp4jax.checkpoint.reload import publish

    model = net(int(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        directory, step, keep = line.split()
        try:
            publish(directory, int(step), model, CONFIG, keep=int(keep))
            print("published", flush=True)
        except CheckpointError as error:
            print(error, flush=True)
"""


@pytest.fixture
def writers():
    """Two processes that publish what they are asked to on stdin: the weights of net(1), and of net(2)."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER)]
    processes = [subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) for seed in (1, 2)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 2
    yield processes
    for p in processes:
        p.stdin.close()
        assert p.wait(60) == 0


def ask(writers, directory, numbers, keep):
    for p, step in zip(writers, numbers, strict=True):
        p.stdin.write(f"{directory} {step} {keep}\n")
        p.stdin.flush()
    return [p.stdout.readline().strip() for p in writers]


def test_two_processes_publish(tmp_path, writers):
    """The same step at once: one wins, the other says so, and what is there is the winner's. Different steps: what was said to be
    published is there, or was removed as one of the old ones."""
    weights = {seed: contents(net(seed)) for seed in (1, 2)}
    reader = Reader(tmp_path, net(0))
    for step in range(1, 7):
        said = ask(writers, tmp_path, (step, step), 3)
        (winner,) = [seed for seed, what in zip((1, 2), said, strict=True) if what == "published"]
        assert f"step {step} is not after step {step}, which is published already" in said[2 - winner]
        assert reader.poll() == step and contents(reader.take().state) == weights[winner]
    for step in range(10, 30, 5):
        said = ask(writers, tmp_path, (step + 1, step), 1)
        assert said[0] == "published" and (said[1] == "published" or f"step {step} is not after step {step + 1}" in said[1])
        assert step + 1 in steps(tmp_path) and reader.poll() == step + 1 and contents(reader.take().state) == weights[1]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_failed_read_is_quiet(tmp_path):
    """Of a damaged step a process says one line, also at its exit: no traceback of a loop that is closed, no unawaited coroutine. The same of
    reads whose errors nobody tells: each may end in another order, so there are some."""
    for step in (1, 2, 3, 4):
        publish(tmp_path, step, net(step), CONFIG)
    for step, part in ((2, 0.3), (3, 0.6), (4, 0.9)):
        for file in (tmp_path / str(step)).rglob("*"):
            if file.is_file() and (file.parent.name == "d" or file.name == "manifest.ocdbt"):
                raw = bytearray(file.read_bytes())
                raw[int(part * len(raw))] ^= 255
                file.write_bytes(raw)
    code = """
        import sys
        from checkpoint.test_reader import net
        from flax import nnx
        from nvfp4jax.checkpoint import CheckpointError, orbax
        from nvfp4jax.checkpoint.reload import Reader
        for step in (2, 3, 4) * 10:
            try:
                orbax.restore(f"{sys.argv[1]}/{step}", nnx.state(net(0)))
            except CheckpointError:
                pass
        with Reader(sys.argv[1], net(0), poll_seconds=0.05) as reader:
            print(reader.health().ready, sorted(reader.health().refused))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.stdout == "1 [2, 3, 4]\n", done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all("is refused, the weights of step -1 keep serving" in line for line in lines), done.stderr
