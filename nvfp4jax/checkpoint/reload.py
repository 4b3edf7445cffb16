"""New weights for a rollout that runs: published by a trainer step by step, found, checked and staged by a reader beside it.

    trainer:  publish(directory, step, model, config)             bf16 or NVFP4; a step appears whole or not at all
    rollout:  with Reader(directory, model) as reader:
                  out = generate(model, ids, ..., weights=reader) takes newer weights between chunks of tokens;
                                                                  out.weight_versions has the step of each token's weights
              or, in a loop of one's own:
                  weights = reader.take()                         between decode steps; None, or newer checked weights
                  if weights is not None: params = weights.state  one reference; tokens from here on have version weights.step

Equal shapes, dtypes and shardings, so nothing is compiled again; the weights in use are untouched until the reference is swapped,
and remain whole for who still holds them. A step that fails a check is named once in the log and never tried again, the next
older one is (if it is newer than what serves), and the old weights keep serving.
"""

import logging
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from nvfp4jax import models
from nvfp4jax.checkpoint import orbax
from nvfp4jax.checkpoint.digest import unhealthy
from nvfp4jax.checkpoint.safetensors import CheckpointError
from nvfp4jax.layers import WEIGHTS
from nvfp4jax.requantize import quantize_params
from nvfp4jax.swap import path_string, quantized_layers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The weights of one step: `state` has the tree, shapes, dtypes and shardings of the live model's (without a delayed layer's
    history of amaxes, which stays the live model's own)."""

    step: int
    state: nnx.State


def steps(directory: str | Path) -> list[int]:
    """The published steps of a directory, ascending. Unfinished ones have other names and do not count."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if re.fullmatch(r"\d{1,18}", entry.name) and entry.is_dir())


def publish(
    directory: str | Path, step: int, model: nnx.Module, config: Mapping[str, Any], *, keep: int = 5, **metadata: Any
) -> Path:
    """Saves a model (float or quantized) as the next step of a directory, and removes all but the newest `keep` steps.

    config: the Hugging Face config.json. Further `metadata` must be JSON. A reader sees the step once it is complete.
    CheckpointError where the step is not after the newest one, or a weight is not finite.
    """
    directory = Path(directory)
    present = steps(directory)
    if present and step <= present[-1]:
        raise CheckpointError(f"{directory}: step {step} is not after step {present[-1]}, which is published already")
    if step < 0 or keep < 1:
        raise ValueError(f"publish: step={step} must not be negative, keep={keep} must be at least 1")
    orbax.save_model(directory / str(step), model, config, step=step, **metadata)
    for old in [*present, step][:-keep]:
        # Out of sight at once: no reader may start on half a step.
        hidden = directory / f".removed-{old}"
        (directory / str(old)).rename(hidden)
        shutil.rmtree(hidden)
    return directory / str(step)


def _shapes_of(state: nnx.State) -> nnx.State:
    """The state without its values, with its shardings."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


class Quantizer:
    """bfloat16 (or float32) weights in memory -> the live model's NVFP4 weights, layer by layer.

    The bits are those of the offline route. Weights may lie in any sharding over the live model's devices. Each shape of weight is
    compiled once in a process, so a deep model costs no more than a shallow one.
    """

    def __init__(self, model: nnx.Module):
        """model: the live, quantized model; only its structure, shardings and static input scales are kept."""
        graphdef, state, seen = nnx.split(model, WEIGHTS, ...)
        self._abstract = _shapes_of(state)
        self._model = nnx.merge(graphdef, self._abstract, _shapes_of(seen))
        self._input_scales = {path: leaf for path, leaf in nnx.to_flat_state(state) if str(path[-1]).endswith("input_scale")}
        stacked = orbax.has_layers(model) and any(depth is not None for depth in models.depths(model))
        self._lengths = [depth or 1 for depth in models.depths(model)] if stacked else None
        self._single = models.unstack_layers(self._model) if stacked else None

    def __call__(self, state: nnx.State | nnx.Module, *, donate: bool = False) -> nnx.State:
        """state: that of the float model, its layers stacked as the live model's or single.

        donate: its arrays are given up, each as soon as its layer is done; otherwise the result shares no memory with them.
        CheckpointError that names the leaf where one is missing or misshapen, or the result is not finite.
        """
        state = nnx.state(state, nnx.Param) if isinstance(state, nnx.Module) else state
        given = dict(nnx.to_flat_state(state))
        model, stack = self._model, False
        if self._lengths is not None and len({path[1] for path in given if path[0] == "layers"}) != len(self._lengths):
            model, stack = self._single, True
        made: dict[tuple, Any] = {}
        for path, layer in quantized_layers(model).items():
            sources = [(*path, *name) for name in layer.float_names()]
            own = {p: _take(given, p, "weights in memory") for p in sources}
            relative = {p[len(path) :]: variable for p, variable in own.items()}
            scales = {p[len(path) :]: v for p, v in nnx.to_flat_state(nnx.state(layer)) if str(p[-1]).endswith("input_scale")}
            try:
                quantized = quantize_params(nnx.from_flat_state(relative | scales), layer)
            except ValueError as error:  # NaN, or another shape; it names the layer
                raise CheckpointError(f"weights in memory: {error}") from error
            made |= {(*path, *name): variable for name, variable in nnx.to_flat_state(quantized)}
            if donate:
                results = [made[p].get_value() for p in made if p[: len(path)] == path]
                jax.block_until_ready(results)
                for variable in own.values():
                    if not any(variable.get_value() is result for result in results):  # a bias is passed on as it is
                        variable.get_value().delete()
        for path, target in nnx.to_flat_state(nnx.state(model, WEIGHTS)):
            if path not in made:
                value = _take(given, path, "weights in memory").get_value().astype(target.dtype)
                made[path] = target.replace(value if donate else jnp.copy(value))
            if made[path].shape != target.shape:
                raise CheckpointError(f"weights in memory: {path_string(path)} has shape {made[path].shape}, expected {target.shape}")
        result = nnx.from_flat_state(made)
        if stack:
            result = models.stack_state(result, self._lengths)
        result = nnx.from_flat_state(dict(nnx.to_flat_state(result)) | self._input_scales)
        result = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), result, self._abstract)
        if complaints := unhealthy(orbax.flatten(result)):
            raise CheckpointError(f"weights in memory: {complaints[0]}")
        return result


def _take(given: dict[tuple, Any], path: tuple, what: str):
    if path not in given:
        raise CheckpointError(f"{what}: {path_string(path)} is missing")
    return given[path]


class Reader:
    """Looks for newer steps in a directory, in a thread of its own, and keeps the newest good one ready.

    model: the live model; its state's tree, shapes, dtypes and shardings are what every step must fit. Only its structure is kept.
    float_model: for steps in floating point, the float model (abstract will do) in the shardings that its weights are to be loaded in;
        built from the step's own config where None, on one device or replicated over the live model's mesh. Such steps are quantized
        on the device, as weights from memory are.
    poll_seconds: between two looks. active_step: steps up to this one are not wanted.

    `failures` tells why each bad step was refused.
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
        self.directory = Path(directory).absolute()
        self.active_step = active_step
        self.failures: dict[int, str] = {}
        graphdef, state = nnx.split(model)
        self._model = nnx.merge(graphdef, _shapes_of(state))
        self._quantizer = Quantizer(model)
        self._float_model = float_model
        self._global_scales = self._scales_of(state)
        self._poll_seconds = poll_seconds
        self._staged: tuple[Weights, dict[str, np.ndarray]] | None = None  # with its global scales
        self._lock = threading.Lock()
        self._looking = threading.Lock()  # one look at a time
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Reader":
        self._thread = threading.Thread(target=self._watch, name="nvfp4jax-reader", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.poll()
            self._stop.wait(self._poll_seconds)

    def poll(self) -> int | None:
        """Looks once, in the caller's thread; the step that is ready afterwards, or None."""
        with self._looking:
            with self._lock:
                newest = self.active_step if self._staged is None else self._staged[0].step
            for step in reversed(steps(self.directory)):
                if step <= newest:
                    break
                if step in self.failures:
                    continue
                try:
                    staged = self._load(step)
                except Exception as error:  # whatever happens here, the old weights keep serving
                    reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                    self.failures[step] = reason
                    _log.warning("step %d is refused, the weights of step %d keep serving: %s", step, newest, reason)
                    continue
                with self._lock:
                    if step > self.active_step:  # weights from memory may have overtaken it
                        self._staged = staged
                break
            with self._lock:
                return None if self._staged is None else self._staged[0].step

    def take(self) -> Weights | None:
        """The newest checked weights, once; None where there are none newer than those taken last.

        Waits for no load and no device: microseconds, between two decode steps.
        """
        with self._lock:
            if self._staged is None:
                return None
            (weights, self._global_scales), self._staged = self._staged, None
            self.active_step = weights.step
            return weights

    def from_memory(self, step: int, state: nnx.State | nnx.Module, *, donate: bool = False) -> Weights:
        """Weights of a float state in memory, made active. CheckpointError where the step is not newer, or a weight is not finite."""
        if step <= self.active_step:
            raise CheckpointError(f"step {step} is not after step {self.active_step}, which serves")
        weights = Weights(step, self._quantizer(state, donate=donate))
        scales = self._scales_of(weights.state)
        with self._lock:
            self.active_step = step
            self._global_scales = scales
            if self._staged is not None and self._staged[0].step <= step:
                self._staged = None
        return weights

    def _load(self, step: int) -> tuple[Weights, dict[str, np.ndarray]]:
        path = self.directory / str(step)
        folder = orbax.read_folder(path)
        metadata = folder.metadata
        if metadata.get("step", step) != step:
            raise CheckpointError(f"{path}: the metadata say step {metadata['step']}")
        if metadata.get("recipe") == "float":
            state = self._quantizer(orbax.restore_state(folder, self._float(path, metadata)), donate=True)
        else:
            state = orbax.restore_state(folder, self._model)
        scales = self._scales_of(state)
        self._check_against_live(path, scales)
        return Weights(step, state), scales

    def _float(self, path: Path, metadata: Mapping[str, Any]) -> nnx.Module:
        if self._float_model is None:
            model = orbax.abstract_model(path, metadata)
            shardings = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(self._model))]
            meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
            sharding = NamedSharding(meshes[0], PartitionSpec()) if meshes else SingleDeviceSharding(next(iter(shardings[0].device_set)))
            graphdef, state = nnx.split(model)
            state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
            self._float_model = nnx.merge(graphdef, state)
        return self._float_model

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

