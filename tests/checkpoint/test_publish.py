"""A publish that returns has published; one that cannot says so in one line and leaves the directory as it was."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from checkpoint.test_reader import CONFIG, contents, floats, net
from nvfp4jax.checkpoint import CheckpointError, orbax
from nvfp4jax.checkpoint import publish as publishing
from nvfp4jax.checkpoint.reload import Reader, publish, steps

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning", "ignore::ResourceWarning")


def test_the_same_step_by_many_writers(tmp_path):
    """One wins, the others say that it is there already; what is there is the winner's, whole."""
    said: dict[int, str] = {}
    start = threading.Barrier(4)

    def write(seed):
        start.wait()
        try:
            publish(tmp_path, 1, net(seed), CONFIG)
            said[seed] = "published"
        except CheckpointError as error:
            said[seed] = str(error)

    for seed in range(1, 5):
        net(seed)
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(1, 5)]
    [w.start() for w in writers]
    [w.join() for w in writers]
    (winner,) = [seed for seed, what in said.items() if what == "published"]
    assert all("step 1 is not after step 1, which is published already" in what for seed, what in said.items() if seed != winner)
    reader = Reader(tmp_path, net(0))
    assert reader.poll() == 1 and contents(reader.take().state) == contents(net(winner))
    assert os.listdir(tmp_path) == ["1"]


def test_different_steps_by_two_writers(tmp_path, monkeypatch):
    """The later step comes while the earlier one waits for its turn: both are there, and neither is removed by who published it."""
    publish(tmp_path, 1, net(1), CONFIG)
    inside, go = threading.Event(), threading.Event()
    write = orbax.write

    def slow(path, *args):
        if not inside.is_set():
            inside.set()
            go.wait(10)
        return write(path, *args)

    monkeypatch.setattr(orbax, "write", slow)
    first = threading.Thread(target=publish, args=(tmp_path, 4, net(4), CONFIG), kwargs={"keep": 1})
    first.start()
    inside.wait(10)
    second = threading.Thread(target=publish, args=(tmp_path, 3, net(3), CONFIG), kwargs={"keep": 1})
    second.start()
    time.sleep(0.2)  # it has looked, and waits
    go.set()
    first.join()
    second.join()
    assert steps(tmp_path) == [3, 4]
    with pytest.raises(CheckpointError, match="step 2 is not after step 4"):
        publish(tmp_path, 2, net(1), CONFIG)


KILLED = """
    import sys, os
    sys.path[:0] = [{root!r}, {tests!r}]
    os.environ["JAX_PLATFORMS"] = "cpu"
    from checkpoint.test_reader import CONFIG, net
    from nvfp4jax.checkpoint import orbax, publish as publishing
    def stop(*args):
        print("READY", flush=True)
        import time; time.sleep(60)
    setattr({where}, {name!r}, stop)
    publishing.publish({directory!r}, 2, net(2), CONFIG, keep=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where, name", [("orbax", "appear"), ("publishing", "_remove")], ids=["before it appears", "before old ones go"])
def test_a_writer_that_is_killed(tmp_path, where, name):
    """Its lock is free, its leftovers go, the same step or the next one is published."""
    publish(tmp_path, 1, net(1), CONFIG)
    tests = Path(__file__).parents[1]
    code = textwrap.dedent(KILLED.format(root=str(tests.parent), tests=str(tests), where=where, name=name, directory=str(tmp_path)))
    writer = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "READY\n"
    with pytest.raises(CheckpointError, match=f"process {writer.pid} on .* is at work there"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publishing, "_WAIT_SECONDS", 0.05)
            publish(tmp_path, 3, net(3), CONFIG)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    reader = Reader(tmp_path, net(0))
    if where == "orbax":
        assert reader.poll() == 1
        publish(tmp_path, 2, net(3), CONFIG, keep=2)
        assert sorted(os.listdir(tmp_path)) == ["1", "2"]
        assert reader.poll() == 2 and contents(reader.take().state) == contents(net(3))
    else:
        assert reader.poll() == 2 and contents(reader.take().state) == contents(net(2))
        publish(tmp_path, 3, net(3), CONFIG, keep=1)
        assert os.listdir(tmp_path) == ["3"]


def test_leftovers_of_killed_writers_go(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step, net(1), CONFIG)
    os.rename(tmp_path / "1", tmp_path / ".removed-1")
    shutil.copytree(tmp_path / "2", tmp_path / ".publishing")
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "2", tmp_path / "4.orbax-checkpoint-tmp-5")
    shutil.copytree(tmp_path / "2", tmp_path / "9.orbax-checkpoint-tmp")  # perhaps somebody's at work, of another kind
    (tmp_path / ".publish.lock").write_text("process 1 on nowhere")
    (tmp_path / "notes.txt").write_text("not ours")
    publish(tmp_path, 4, net(1), CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "4", "9.orbax-checkpoint-tmp", "notes.txt"]


def test_a_run_begun_anew_in_the_same_directory(tmp_path):
    for step in (1, 2):
        publish(tmp_path, step, net(1), CONFIG)
    os.rename(tmp_path / "1", tmp_path / ".removed-1")
    shutil.rmtree(tmp_path / "2")
    for step in (1, 2):
        publish(tmp_path, step, net(step), CONFIG, keep=1)
    assert os.listdir(tmp_path) == ["2"]


def test_removing_old_steps_never_fails_a_publish(tmp_path, monkeypatch, caplog):
    """Files that cannot be removed (open on NFS, another owner), a link in place of a step, a step that went by itself."""
    outside = tmp_path / "outside"
    directory = tmp_path / "steps"
    publish(directory, 1, net(1), CONFIG)
    shutil.copytree(directory / "1", outside)
    (directory / "2").symlink_to(outside)
    publish(directory, 3, net(3), CONFIG, keep=1)
    assert os.listdir(directory) == ["3"] and outside.is_dir() and list(outside.iterdir())

    def denied(*args, **options):
        raise OSError(errno.EACCES, "Permission denied", str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(publishing.shutil, "rmtree", lambda path, onexc: onexc(None, path, OSError(errno.EBUSY, "Device or resource busy")))
        publish(directory, 4, net(4), CONFIG, keep=1)
    assert "cannot be removed yet" in caplog.text and steps(directory) == [4]
    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda a, b: denied(a) if ".removed-" in str(b) else rename(a, b))
        publish(directory, 5, net(5), CONFIG, keep=1)
    assert "an old step stays for now" in caplog.text and steps(directory) == [4, 5]
    publish(directory, 6, net(6), CONFIG, keep=1)
    assert os.listdir(directory) == ["6"]


@pytest.mark.parametrize("rewind", [False, True])
def test_a_full_disk_leaves_the_directory_as_it_was(tmp_path, monkeypatch, rewind):
    publish(tmp_path, 1, net(1), CONFIG)
    publish(tmp_path, 2, net(2), CONFIG)

    def full(path, *args, **options):
        path.mkdir()
        (path / "half").write_bytes(b"0" * 100)
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    for target in ("save", "rename"):
        with monkeypatch.context() as patch:
            if target == "save":
                patch.setattr(orbax.ocp, "save", full)
            else:
                patch.setattr(orbax, "appear", lambda *args: (_ for _ in ()).throw(CheckpointError("cannot be given its name")))
            with pytest.raises(CheckpointError, match="not saved .*No space left|cannot be given its name") as error:
                publish(tmp_path, 1 if rewind else 3, net(3), CONFIG, rewind=rewind, keep=1)
        assert "\n" not in str(error.value) and sorted(n for n in os.listdir(tmp_path) if n[0] != ".") == ["1", "2"]
        assert Reader(tmp_path, net(0)).poll() == 2


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "dangling"):
        with pytest.raises(CheckpointError) as error:
            publish(place, 1, net(1), CONFIG)
        assert str(place) in str(error.value) or str(place.parent) in str(error.value)
    assert "dangling: a link to what is not there" in str(error.value)
    os.mkfifo(tmp_path / ".publish.lock")
    with pytest.raises(CheckpointError, match="not a regular file"):
        publish(tmp_path, 1, net(1), CONFIG)


@pytest.mark.parametrize("name", ["a b", "a[1]*?", "a%20b#c", "ä\u2028ü", "'\"", "x.orbax-checkpoint-tmp", "-n", "{0}"])
def test_odd_names_of_directories(tmp_path, name):
    publish(tmp_path / name, 1, net(1), CONFIG)
    (tmp_path / "link").symlink_to(tmp_path / name)
    publish(tmp_path / "link", 2, net(2), CONFIG, keep=1)
    reader = Reader(tmp_path / name, net(0))
    assert reader.poll() == 2 and contents(reader.take().state) == contents(net(2))


def test_what_is_refused_before_anything_is_touched(tmp_path):
    directory = tmp_path / "steps"
    for step in (-1, 10**18, 1.5, "7", None, True):
        with pytest.raises(ValueError, match="publish: step="):
            publish(directory, step, net(1), CONFIG)
    for keep in (0, -1, 2.0):
        with pytest.raises(ValueError, match="publish: keep="):
            publish(directory, 1, net(1), CONFIG, keep=keep)
    for name in ("digests", "extras"):
        with pytest.raises(ValueError, match=f"publish: '{name}' is an entry of the step's own metadata"):
            publish(directory, 1, net(1), CONFIG, **{name: {}})
    assert not directory.exists()
    with pytest.raises(CheckpointError, match="the metadata are no JSON"):
        publish(directory, 1, net(1), CONFIG, loss=jnp.float32(1))
    assert os.listdir(directory) == []
    (directory / "7").write_text("a file")
    with pytest.raises(CheckpointError, match="7: exists already"):
        publish(directory, 7, net(1), CONFIG)
    assert os.listdir(directory) == ["7"]
    publish(directory, 10**18 - 1, floats(1), CONFIG, loss=1.5)
    assert steps(directory) == [10**18 - 1] and orbax.read_folder(directory / str(10**18 - 1)).metadata["loss"] == 1.5


def test_clocks_do_not_matter(tmp_path, monkeypatch):
    """A writer on a machine whose clock is an hour, or fifty years, behind."""
    publish(tmp_path, 5, net(1), CONFIG)
    publish(tmp_path, 3, net(2), CONFIG, rewind=True)
    monkeypatch.setattr(publishing.time, "time", lambda: 1000.0)
    publish(tmp_path, 4, net(3), CONFIG)
    reader = Reader(tmp_path, net(0))
    assert reader.poll() == 4 and reader.take().step == 4
    publish(tmp_path, 2, net(4), CONFIG, rewind=True)
    assert reader.poll() == 2 and contents(reader.take().state) == contents(net(4))


def test_saves_of_one_folder_beside_each_other(tmp_path, monkeypatch):
    """`orbax.save` outside of a directory of steps: the second is refused by name, the first is whole; leftovers go."""
    write, refused = orbax.write, []

    def again(path, *args):
        with pytest.raises(CheckpointError, match="is at work there") as error:
            orbax.save(tmp_path / "a", net(2), {})
        refused.append(str(error.value))
        return write(path, *args)

    shutil.copytree(tmp_path, tmp_path / ".a.saving")
    monkeypatch.setattr(orbax, "write", again)
    orbax.save(tmp_path / "a", net(1), {})
    assert refused and os.listdir(tmp_path) == ["a"]
