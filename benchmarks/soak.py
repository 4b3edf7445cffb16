"""One process trains, publishes, reloads in flight and rolls out, while faults are injected from a seed.

    python benchmarks/soak.py --seconds 3600 --seed 0

Every token is computed again from the weights of the step that `weight_versions` names, made in memory without any file. Prints one
JSON line; exit status 1 for a wrong token, a reader that stopped, a publish that failed without cause, or memory that grows.
"""

import argparse
import ctypes
import dataclasses
import errno
import gc
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nvfp4jax
from nvfp4jax import models
from nvfp4jax.checkpoint import CheckpointError, orbax, reload, saved_model
from nvfp4jax.checkpoint.reload import Reader, Weights, publish, steps

CONFIG = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=64, hidden_size=32, intermediate_size=48,
    moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=3,
    num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[0], tie_word_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-6,
)  # fmt: skip
RULES = [nvfp4jax.Rule("lm_head|.*/mlp/gate", skip=True), nvfp4jax.Rule(".*")]
FIRST_STEP = 2**33
NEW_TOKENS, SWAP_EVERY = 16, 3
OBJECTS_A_RELOAD = 2  # measured: 47 objects more after 118 loads and saves
OBJECTS_ONCE = 6_000  # what is in flight at a mark, one of it a model that is loaded or refused (measured: up to 5,000 more at one mark, gone at the next)
GROWTH_BYTES = 48e6
# Python's blocks, also those that the garbage collector does not see. Measured: 11 a load or save, of them 3 or 4 parts of paths, which
# Python 3.12.1 keeps for ever; TensorStore's JSON took 100 and more.
BLOCKS_A_RELOAD, BLOCKS_ONCE = 30, 12_000
IN_USE_GROWTH_BYTES = 8e6  # measured: 1e6 up and down, with what is in flight at a mark


MARKS = 24
# Python's list of all objects holds tuples that another thread still fills, which then fails: nothing is published meanwhile.
publishing = threading.Lock()


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def in_use() -> int:
    """Bytes that malloc has given out; 0 without glibc 2.33. Resident memory also has the gaps between them, in sixteen arenas.

    A leak grows here, or in `sys.getallocatedblocks`: Python has its own allocator for what is small.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def resident() -> tuple[int, Counter]:
    """(resident bytes, objects that the garbage collector sees, by type)."""
    with publishing:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        objects = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), objects


class Trainer:
    """Weights that follow from the step's number alone."""

    def __init__(self):
        self.model = models.build(CONFIG, rngs=nnx.Rngs(0))
        nnx.update(self.model, jax.device_put(nnx.state(self.model), jax.devices()[0]))
        self.qmodel = nvfp4jax.quantize_model(self.model, RULES)
        self._float_graph, base = nnx.split(self.model)
        self._packed_graph = nnx.graphdef(self.qmodel)
        leaves, structure = jax.tree.flatten(base)

        @jax.jit
        def step(number):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), len(leaves))
            return jax.tree.unflatten(structure, [x + jax.random.normal(k, x.shape, x.dtype) * jnp.asarray(0.1, x.dtype) for k, x in zip(keys, leaves)])

        self._step = step
        self._quantize = jax.jit(lambda state: nvfp4jax.quantize_params(state, self.qmodel))

    def floats(self, step: int) -> nnx.Module:
        return nnx.merge(self._float_graph, jax.device_put(self._step(np.uint32(step % 2**32)), jax.devices()[0]))

    def packed_state(self, step: int) -> nnx.State:
        return jax.device_put(self._quantize(nnx.state(self.floats(step))), jax.devices()[0])

    def packed(self, step: int) -> nnx.Module:
        return nnx.merge(self._packed_graph, self.packed_state(step))


class Replay:
    """A weight source that hands over what a rollout was handed, at the same looks."""

    def __init__(self, trainer: Trainer, versions: np.ndarray):
        self.active_step = -1
        starts = [0, *range(1, len(versions), SWAP_EVERY)]
        self._at = {look: int(versions[start]) for look, start in enumerate(starts)}
        self._trainer, self._look = trainer, -1

    def take(self) -> Weights | None:
        self._look += 1
        step = self._at[self._look]
        if step in (self.active_step, -2):
            return None
        self.active_step = step
        return Weights(step, self._trainer.packed_state(step))


class Faults:
    """What goes wrong around a publish; each by name, as often as `counts` says."""

    def __init__(self, directory: Path, trainer: Trainer, rng: random.Random):
        self.directory, self.trainer, self.rng = directory, trainer, rng
        self.counts: Counter = Counter()
        self.unlistable = False
        self.full_disk = False
        listed, saved = reload.steps, orbax.ocp.save

        def steps_or_not(where):
            if self.unlistable:
                raise OSError(errno.ESTALE, "Stale file handle", str(where))
            return listed(where)

        def save_or_not(path, *args, **options):
            if self.full_disk:
                Path(path).mkdir()
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return saved(path, *args, **options)

        reload.steps, orbax.ocp.save = steps_or_not, save_or_not

    def _a_file(self) -> Path | None:
        present = steps(self.directory)
        files = sorted(p for p in (self.directory / str(present[-1])).rglob("*") if p.is_file() and p.stat().st_size) if present else []
        return self.rng.choice(files) if files else None

    def before(self, step: int) -> str | None:
        """One fault, perhaps; its name."""
        kind = self.rng.choice([None, None, None, "flipped byte", "lost file", "cut file", "pipe", "empty step", "bad config", "bad shape",
                                "unlistable", "full disk", "killed writer", "leftovers", "odd names"])  # fmt: skip
        file = self._a_file()
        if kind is None or (kind in ("flipped byte", "lost file", "cut file", "pipe") and file is None):
            return None
        self.counts[kind] += 1
        if kind == "flipped byte":
            raw = bytearray(file.read_bytes())
            raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(raw)
        elif kind == "lost file":
            file.unlink()
        elif kind == "cut file":
            os.truncate(file, self.rng.randrange(file.stat().st_size))
        elif kind == "pipe":
            file.unlink()
            os.mkfifo(file)
        elif kind == "empty step":
            (self.directory / str(step - 1)).mkdir(exist_ok=True)
        elif kind in ("bad config", "bad shape"):
            change = {"rope_theta": 1e6} if kind == "bad config" else {"moe_intermediate_size": 32}
            path = self.directory / str(step - 1)
            if not path.exists():
                saved_model.save_model(path, models.build(CONFIG | change, rngs=nnx.Rngs(1)), CONFIG | change, step=step - 1)
        elif kind == "unlistable":
            self.unlistable = True
            threading.Timer(self.rng.uniform(0.05, 0.5), setattr, (self, "unlistable", False)).start()
        elif kind == "killed writer":
            self._kill_a_writer()
        elif kind == "leftovers":
            for name in (".publishing.orbax-checkpoint-tmp", f".removed-{step - 5}-x", f"{step - 2}.orbax-checkpoint-tmp"):
                (self.directory / name).mkdir(exist_ok=True)
                (self.directory / name / "half").write_bytes(b"0" * 1000)
        elif kind == "odd names":
            (self.directory / "0009").mkdir(exist_ok=True)
            (self.directory / "latest").unlink(missing_ok=True)
            (self.directory / "latest").symlink_to(str(step))
        return kind

    def _kill_a_writer(self) -> None:
        """A process that holds the lock and has written half a step."""
        code = ("import fcntl, os, sys, time; f = open(sys.argv[1] + '/.publish.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
                "os.makedirs(sys.argv[1] + '/.publishing/state', exist_ok=True); print('READY', flush=True); time.sleep(60)")  # fmt: skip
        writer = subprocess.Popen([sys.executable, "-c", code, str(self.directory)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        threading.Timer(0.2, writer.kill).start()


@dataclasses.dataclass
class Outcome:
    published: int = 0
    refused_for_a_full_disk: int = 0
    rewinds: int = 0
    rollouts: int = 0
    tokens: int = 0
    swaps_in_flight: int = 0
    reloads: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


def train(directory: Path, trainer: Trainer, faults: Faults, rng: random.Random, stop: threading.Event, outcome: Outcome) -> None:
    step, rewind = FIRST_STEP, False
    while not stop.is_set():
        step += rng.randint(2, 4)
        if not rewind and rng.random() < 0.04:  # until it is published: a full disk may refuse it
            step, rewind = step - 30, True
            outcome.rewinds += 1
        fault = faults.before(step)
        faults.full_disk = fault == "full disk"
        model = trainer.floats(step) if rng.random() < 0.5 else trainer.packed(step)
        try:
            with publishing:
                publish(directory, step, model, CONFIG, keep=4, rewind=rewind)
            rewind = False
            outcome.published += 1
        except CheckpointError as error:
            if fault == "full disk" and "No space left" in str(error):
                outcome.refused_for_a_full_disk += 1
            else:
                outcome.problems.append(f"publish({step}) after {fault}: {error}")
        except Exception as error:
            outcome.problems.append(f"publish({step}) after {fault}: {type(error).__name__}: {error}")
        faults.full_disk = False
        stop.wait(rng.uniform(0, 0.3))


def watched(*arguments) -> None:
    """`train`, whose end by an error is a problem: nothing is published from then on."""
    try:
        train(*arguments)
    except Exception as error:
        arguments[-1].problems.append(f"the trainer's thread has ended: {type(error).__name__}: {error}")


def soak(seconds: float, seed: int) -> dict:
    logging.getLogger("nvfp4jax").setLevel(logging.CRITICAL)
    rng = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    trainer, outcome, stop = Trainer(), Outcome(), threading.Event()
    faults = Faults(directory, trainer, random.Random(seed + 1))
    live = nvfp4jax.quantize_model(trainer.model, RULES)
    ids = np.asarray([[1, 2, 3, 4]] * 2)
    versions = np.asarray([FIRST_STEP] * SWAP_EVERY + [FIRST_STEP + 1] * (NEW_TOKENS - SWAP_EVERY))
    nvfp4jax.generate(trainer.packed(0), ids, max_new_tokens=NEW_TOKENS, weights=Replay(trainer, versions), swap_every=SWAP_EVERY)  # compiles
    thread = threading.Thread(target=watched, args=(directory, trainer, faults, random.Random(seed + 2), stop, outcome), daemon=True)
    thread.start()
    begin, marks, seen = time.monotonic(), [], -1
    kinds: dict[str, Counter] = {}  # of the middle and of the last mark alone: a thousand names a mark would be growth of our own
    with Reader(directory, live, poll_seconds=0.05) as reader:
        while time.monotonic() - begin < seconds:
            prompt = np.asarray([[rng.randrange(64) for _ in range(4)] for _ in range(2)])
            entry = nnx.clone(live)
            out = nvfp4jax.generate(live, prompt, max_new_tokens=NEW_TOKENS, weights=reader, swap_every=SWAP_EVERY)
            versions = np.asarray(out.weight_versions)[0]
            model = entry if versions[0] == -2 else trainer.packed(int(versions[0]))
            again = nvfp4jax.generate(model, prompt, max_new_tokens=NEW_TOKENS, weights=Replay(trainer, versions), swap_every=SWAP_EVERY)
            wrong = int((np.asarray(out.tokens) != np.asarray(again.tokens)).sum())
            if wrong:
                outcome.problems.append(f"{wrong} wrong tokens, versions {versions.tolist()}")
            if not reader.health().watching:
                outcome.problems.append("the reader's thread has ended")
                break
            outcome.rollouts += 1
            outcome.tokens += out.tokens.size
            outcome.swaps_in_flight += int((np.diff(versions) != 0).sum())
            outcome.reloads += len({*versions.tolist()} - {seen})
            seen = int(versions[-1])
            if time.monotonic() - begin > seconds * len(marks) / MARKS:
                bytes_now, objects = resident()
                marks.append((time.monotonic() - begin, outcome.reloads + outcome.published, bytes_now, objects.total(), in_use(), sys.getallocatedblocks()))
                kinds |= {"middle": objects, "last": objects} if len(marks) <= MARKS // 2 + 1 else {"last": objects}
        stop.set()
        thread.join()
        faults.unlistable = False
        last = max(steps(directory)) + 1
        publish(directory, last, trainer.packed(last), CONFIG)
        end = time.monotonic() + 60
        while reader.health().ready != last and time.monotonic() < end:
            time.sleep(0.05)
        if reader.health().ready != last:
            outcome.problems.append(f"the last good step {last} was not taken: {reader.health()}")
    shutil.rmtree(directory)
    figures = dataclasses.asdict(outcome) | {"seconds": round(time.monotonic() - begin), "seed": seed, "faults": dict(faults.counts)}
    settled = marks[len(marks) // 2 :]
    if len(settled) > 1:
        first, last_mark = settled[0], settled[-1]
        files, grown, objects, leaked = (last_mark[i] - first[i] for i in range(1, 5))
        more = kinds["last"] - kinds["middle"]
        figures |= {"resident_mb": [round(m[2] / 1e6) for m in (marks[0], first, last_mark)], "loads_and_saves_between": files, "objects_between": objects,
                    "objects": [m[3] for m in marks], "grown": dict(more.most_common(6)),
                    "resident_mb_all": [round(m[2] / 1e6, 1) for m in marks], "in_use_mb": [round(m[4] / 1e6, 1) for m in marks],
                    "python_blocks": [m[5] for m in marks]}  # fmt: skip
        if grown > GROWTH_BYTES:
            outcome.problems.append(f"memory grew by {grown / 1e6:.0f} MB in the second half")
        if leaked > IN_USE_GROWTH_BYTES:
            outcome.problems.append(f"memory that is in use grew by {leaked / 1e6:.1f} MB in the second half")
        if (blocks := last_mark[5] - first[5]) > BLOCKS_A_RELOAD * files + BLOCKS_ONCE:
            outcome.problems.append(f"{blocks} of Python's blocks stay of {files} loads and saves")
        if objects > OBJECTS_A_RELOAD * files + OBJECTS_ONCE:
            outcome.problems.append(f"{objects} objects stay of {files} loads and saves")
    return figures | {"problems": outcome.problems}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = soak(arguments.seconds, arguments.seed)
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(bool(result["problems"]))  # a writer's timer may still run
