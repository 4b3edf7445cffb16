"""New weights for a rollout that runs: published by a trainer step by step, found, checked and staged by a reader beside it.

    trainer:  publish(directory, step, model, config)             bf16 or NVFP4; a step appears whole or not at all
    rollout:  with Reader(directory, model) as reader:
                  out = generate(model, ids, ..., weights=reader) takes newer weights between chunks of tokens;
                                                                  out.weight_versions has the step of each token's weights
              or, in a loop of one's own:
                  weights = reader.take()                         between decode steps; None, or newer checked weights
                  if weights is not None: params = weights.state  one reference; tokens from here on have version weights.step

Equal shapes, dtypes and shardings, so nothing is compiled again; the weights in use are untouched until the reference is swapped,
and remain whole for who still holds them. A step that is damaged, or is another model's, is named once in the log and not tried again
as long as its files stay as they are; one that cannot be read this time is tried again, less and less often. In both cases
the next older step is taken (if it is newer than what serves), and the old weights keep serving.

Memory, in copies of the packed weights: the live ones, and either those that are ready or those that are being loaded. Steps in floating
point are loaded and quantized some layers at a time, `quantizer.PIECE_BYTES` of them; stacked layers take one more leaf.
"""

import ctypes
import functools
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from nvfp4jax import arguments
from nvfp4jax.checkpoint import orbax, saved_model
from nvfp4jax.checkpoint.errors import CheckpointError, may_pass
from nvfp4jax.checkpoint.publish import generation, publish, steps
from nvfp4jax.checkpoint.quantizer import Quantizer, shapes_of
from nvfp4jax.checkpoint.survey import signature

__all__ = ["Health", "Quantizer", "Reader", "Weights", "publish", "steps"]

_log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # of malloc.h
_FIRST_LOOK_SECONDS = 60.0
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0


@functools.cache
def _return_freed_memory() -> None:
    """Host buffers of a megabyte and more go back to the system when they are freed.

    By default glibc keeps them after the first few, in an arena for each of TensorStore's many threads: a process that reloads
    grew by a third of a model's bytes before that came to an end. Other C libraries have no such knob, and no need.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


@dataclass(frozen=True)
class Weights:
    """The weights of one step: `state` has the tree, shapes, dtypes and shardings of the live model's (without a delayed layer's
    history of amaxes, which stays the live model's own)."""

    step: int
    state: nnx.State


@dataclass(frozen=True)
class Health:
    """What a Reader does, at one moment; times as `time.time()` has them.

    serving: the step of the weights that were taken last, -1 for the model's own; since: when they were taken.
    ready: the step that waits to be taken, or None. watching: whether the thread runs.
    refused: step -> why it is damaged or another model's. retried: step -> why it could not be read yet.
    problem: what went wrong with the last look as a whole, e.g. a directory that cannot be listed, or None.
    looked: when the last look ended; None before the first has.
    """

    serving: int
    since: float
    ready: int | None
    watching: bool
    refused: dict[int, str]
    retried: dict[int, str]
    problem: str | None
    looked: float | None


@dataclass(frozen=True)
class _Refusal:
    """Why a step was not taken, and what its files were like then."""

    files: tuple
    reason: str
    final: bool
    attempts: int
    next_attempt: float  # as time.monotonic() has it


@dataclass
class _Staged:
    weights: Weights
    global_scales: dict[str, np.ndarray]
    generation: int
    load_seconds: float
    since: float = field(default_factory=time.monotonic)


class Reader:
    """Looks for newer steps in a directory, in a thread of its own, and keeps the newest good one ready.

    model: the live model; its state's tree, shapes, dtypes and shardings are what every step must fit, and its function is what the
        step's config must describe. Only its structure is kept.
    float_model: for steps in floating point, the float model (abstract will do) in the shardings that its weights are to be loaded in;
        built from the step's own config where None, on one device or replicated over the live model's mesh; needed for a model of
        your own, which no config builds. Such steps are quantized on the device, as weights from memory are.
    poll_seconds: between two looks. active_step: steps up to this one are not wanted.

    As a context manager it runs its thread; the block begins when the first look is over (or after a minute), so that a step that is
    there already serves from the start. `failures` tells why steps were not taken, `health()` all there is to tell.
    """

    def __init__(
        self,
        directory: str | Path,
        model: nnx.Module,
        *,
        float_model: nnx.Module | None = None,
        poll_seconds: float = 1.0,
        active_step: int = -1,
    ):
        if arguments.number("Reader: poll_seconds", poll_seconds) <= 0:
            raise ValueError(f"Reader: poll_seconds={poll_seconds!r} must be a positive number of seconds")
        self.directory = arguments.path("Reader: directory", directory).absolute()
        self.active_step = arguments.whole("Reader: active_step", active_step)
        graphdef, state = nnx.split(arguments.module("Reader: model", model))
        if float_model is not None:
            arguments.module("Reader: float_model", float_model)
        _return_freed_memory()
        self._model = nnx.merge(graphdef, shapes_of(state))
        self._quantizer = Quantizer(model)
        if float_model is not None:
            self._quantizer.check_float_model(float_model)
        self._float_model = float_model
        self._built: tuple[str, nnx.Module] | None = None  # the float model of the last float step's config
        self._global_scales = self._scales_of(state)
        self._poll_seconds = poll_seconds
        self._active_generation = 0
        self._passed_over: tuple[int, int] | None = None  # (generation, step) up to which the directory is not wanted
        self._since = time.time()
        self._staged: _Staged | None = None
        self._refusals: dict[int, _Refusal] = {}
        self._generations: dict[int, tuple[tuple, int]] = {}  # of steps that are not newer: their files, and what they say
        self._problem: str | None = None
        self._looked: float | None = None
        self._lock = threading.Lock()  # of what is ready and what serves
        self._looking = threading.Lock()  # one look at a time
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def failures(self) -> dict[int, str]:
        """Step -> why it was not taken: damaged or another model's, or not readable so far."""
        return {step: refusal.reason for step, refusal in dict(self._refusals).items()}

    def health(self) -> Health:
        """What it serves, since when, and what is wrong. Waits for nothing but a moment's lock."""
        refusals = dict(self._refusals)
        with self._lock:
            serving, since, ready = self.active_step, self._since, None if self._staged is None else self._staged.weights.step
        return Health(
            serving=serving,
            since=since,
            ready=ready,
            watching=self._thread is not None and self._thread.is_alive(),
            refused={step: r.reason for step, r in refusals.items() if r.final},
            retried={step: r.reason for step, r in refusals.items() if not r.final},
            problem=self._problem,
            looked=self._looked,
        )

    def __enter__(self) -> "Reader":
        if self._thread is not None:
            raise RuntimeError(f"Reader of {self.directory}: it is in a `with` block already; end that one, or make a second Reader")
        self._stop = threading.Event()
        first = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._stop, first), name="nvfp4jax-reader", daemon=True)
        self._thread.start()
        first.wait(_FIRST_LOOK_SECONDS)
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_FIRST_LOOK_SECONDS)
            if thread.is_alive():
                _log.warning("%s: a look has not come to its end; the thread stops when it does", self.directory)

    def _watch(self, stop: threading.Event, first: threading.Event) -> None:
        while not stop.is_set():
            try:
                with self._looking:
                    self._look(patient=True)
            except Exception as error:  # whatever it is, the next look may do better
                self._note(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            first.set()
            stop.wait(self._poll_seconds)

    def poll(self) -> int | None:
        """Looks once, in the caller's thread; the step that is ready afterwards, or None.

        It replaces what is ready by what is newer, and tries again what could not be read before, at once.
        """
        with self._looking:
            self._look(patient=False)
        with self._lock:
            return None if self._staged is None else self._staged.weights.step

    def take(self) -> Weights | None:
        """The newest checked weights, once; None where there are none newer than those taken last.

        Waits for no load and no device: microseconds, between two decode steps.
        """
        with self._lock:
            staged, self._staged = self._staged, None
            if staged is None:
                return None
            self._serve(staged.weights.step, staged.generation, staged.global_scales)
            return staged.weights

    def from_memory(self, step: int, state: nnx.State | nnx.Module, *, donate: bool = False, rewind: bool = False) -> Weights:
        """Weights of a float state in memory, made active.

        rewind: the trainer has gone back to this step; what lies in the directory by now is not wanted any more.
        CheckpointError where the step is not newer (other weights may have overtaken it), or a weight is not finite; the live weights
        stay.
        """
        step = arguments.whole("from_memory: step", step, 0)
        arguments.flag("from_memory: rewind", rewind)
        passed_over = self._newest_on_disk() if rewind else None
        with self._lock:
            self._refuse_old(step, rewind)
            self._staged = None  # room for the new ones; where it is newer than they, the next look finds it again
        weights = Weights(step, self._quantizer(state, donate=donate))
        scales = self._scales_of(weights.state)
        with self._lock:
            self._refuse_old(step, rewind)  # another step may have been taken meanwhile
            self._passed_over = passed_over or self._passed_over
            self._serve(step, self._active_generation, scales)
            if self._staged is not None and self._staged.weights.step <= step:
                self._staged = None
        return weights

    def _refuse_old(self, step: int, rewind: bool) -> None:
        if step <= self.active_step and not rewind:
            raise CheckpointError(f"step {step} is not after step {self.active_step}, which serves; a trainer that goes back says so: rewind=True")

    def _serve(self, step: int, era: int, global_scales: dict[str, np.ndarray]) -> None:
        self.active_step, self._active_generation, self._global_scales, self._since = step, era, global_scales, time.time()

    def _note(self, problem: str | None) -> None:
        """The outcome of a look as a whole; a new problem is logged."""
        if problem is not None and problem != self._problem:
            _log.warning("the weights of step %d keep serving: %s", self.active_step, problem)
        self._problem, self._looked = problem, time.time()

    def _look(self, patient: bool) -> None:
        try:
            present = steps(self.directory)
        except OSError as error:
            self._note(f"{self.directory}: cannot be listed ({error.strerror or error})")
            return
        for table in (self._refusals, self._generations):
            for step in set(table) - set(present):
                table.pop(step)
        with self._lock:
            ready_until = 0.0 if self._staged is None else self._staged.since + max(self._poll_seconds, self._staged.load_seconds)
        # What is ready stays so for a while even where newer steps come fast, or a slow taker would never meet it.
        if not (patient and time.monotonic() < ready_until):
            for step in reversed(present):
                if not self._is_newer(step):
                    break
                if not self._is_put_off(step, patient) and self._try(step):
                    break
        self._note(None)

    def _newest(self) -> tuple[int, int]:
        """(generation, step) of the weights that are ready, or else of those that serve."""
        with self._lock:
            if self._staged is not None:
                return self._staged.generation, self._staged.weights.step
            return self._active_generation, self.active_step

    def _is_newer(self, step: int) -> bool:
        """Whether a step of the directory comes after what there is; of a lower number, only where the trainer went back to it."""
        newest = self._newest()
        if step > newest[1] and self._passed_over is None:
            return True
        era = self._generation_of(step)
        if self._passed_over is not None and (era, step) <= self._passed_over:
            return False
        return step > newest[1] or era > newest[0]

    def _generation_of(self, step: int) -> int:
        """0 where the step does not tell."""
        path = self.directory / str(step)
        try:
            files, _ = signature(path)
            if step not in self._generations or self._generations[step][0] != files:
                self._generations[step] = (files, generation(path))
            return self._generations[step][1]
        except CheckpointError:
            return 0

    def _newest_on_disk(self) -> tuple[int, int] | None:
        try:
            newest = max(steps(self.directory), default=None)
        except OSError:
            return None
        return None if newest is None else (self._generation_of(newest), newest)

    def _is_put_off(self, step: int, patient: bool) -> bool:
        """Whether a step was refused, and its files are as they were, or it is too early to try again."""
        refusal = self._refusals.get(step)
        if refusal is None:
            return False
        if not refusal.final:
            return patient and time.monotonic() < refusal.next_attempt
        try:
            return signature(self.directory / str(step))[0] == refusal.files
        except CheckpointError:  # it cannot be looked at now
            return True

    def _try(self, step: int) -> bool:
        """Loads a step; whether it is ready now. Whatever happens here, the old weights keep serving."""
        path = self.directory / str(step)
        files: tuple = ()
        begin = time.monotonic()
        try:
            files, _ = signature(path)
            weights, scales, era = self._load(step, path)
        except Exception as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            known = self._refusals.get(step)
            attempts = 1 if known is None or known.final else known.attempts + 1
            delay = min(_LAST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2 ** min(attempts - 1, 16))
            final = not may_pass(error)
            self._refusals[step] = _Refusal(files, reason, final, attempts, time.monotonic() + delay)
            if known is None or known.reason != reason:
                then = "is refused" if final else "cannot be read yet and is tried again"
                _log.warning("step %d %s, the weights of step %d keep serving: %s", step, then, self.active_step, reason)
            return False
        self._refusals.pop(step, None)
        with self._lock:
            if (era, step) > (self._active_generation, self.active_step):  # weights from memory may have overtaken it
                self._staged = _Staged(weights, scales, era, time.monotonic() - begin)
        return True

    def _load(self, step: int, path: Path) -> tuple[Weights, dict[str, np.ndarray], int]:
        folder = orbax.read_folder(path)
        metadata = folder.metadata
        if metadata.get("step", step) != step:
            raise CheckpointError(f"{path}: the metadata say step {metadata['step']}")
        if (difference := saved_model.other_function(self._model, metadata.get("config"))) is not None:
            raise CheckpointError(f"{path}: {difference}")
        era = generation(path)
        float_model = self._float(path, metadata) if metadata.get("recipe") == "float" else None
        with self._lock:
            self._staged = None  # room for the new weights: never three copies
        if float_model is None:
            state = saved_model.restore_state(folder, self._model)
        else:
            state = self._quantizer.load(folder, float_model)
        scales = self._scales_of(state)
        self._check_against_live(path, scales)
        return Weights(step, state), scales, era

    def _float(self, path: Path, metadata: Mapping[str, Any]) -> nnx.Module:
        """The abstract float model that a step's own config and dtype describe, sharded for the live model's devices."""
        if self._float_model is not None:
            return self._float_model
        of = json.dumps([metadata.get("config"), metadata.get("dtype")], sort_keys=True)
        if self._built is None or self._built[0] != of:
            way_out = "a step in floating point of a model of your own needs Reader(..., float_model=the float model)"
            model = saved_model.abstract_model(path, metadata, way_out=way_out)
            shardings = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(self._model))]
            meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
            sharding = NamedSharding(meshes[0], PartitionSpec()) if meshes else SingleDeviceSharding(next(iter(shardings[0].device_set)))
            graphdef, state = nnx.split(model)
            state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
            self._built = (of, nnx.merge(graphdef, state))
        return self._built[1]

    @staticmethod
    def _scales_of(state: nnx.State) -> dict[str, np.ndarray]:
        scales = {path: leaf for path, leaf in orbax.flatten(state).items() if path.endswith("_global_scale")}
        return dict(zip(scales, jax.device_get(list(scales.values())), strict=True))

    def _check_against_live(self, path: Path, scales: Mapping[str, np.ndarray]) -> None:
        """An inverted global scale (2688 / amax for amax / 2688) is close to one over the live one."""
        for name, scale in scales.items():
            live = self._global_scales[name]
            product = np.median(np.abs(np.log2(scale * live)))
            if product < 1 and np.median(np.abs(np.log2(live))) > 1.5:
                raise CheckpointError(f"{path}: {name} is about one over the live weights' scale: is it inverted? (it multiplies: amax / 2688)")
