"""A calibration pass: the input scales of static layers, from what a set of prompts makes of the activations.

The forward pass quantizes no activation, and with `float_model` no weight either, as ModelOpt calibrates. Each layer notes the amax
of its input, in an nnx.Variable that only the copy made here has; padding takes no part. The experts of a layer share one scale for
each of their two inputs. q, k and v, and gate and up, read the same input, so they agree without being told to.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from nvfp4jax import arguments, layers, numerics, swap
from nvfp4jax.layers import InputAmax, LargestAmax
from nvfp4jax.models.protocol import Decoder
from nvfp4jax.rollout.decoding import call
from nvfp4jax.rollout.generate import committed
from nvfp4jax.rollout.prompts import bucket, check_prompts, pack
from nvfp4jax.scaling import Calibrate, Static, current_valid
from nvfp4jax.swap import Path, path_string

Batch = ArrayLike | tuple[Any, ...]


def calibrate[M: nnx.Module](
    qmodel: M, batches: Iterable[Batch], *, headroom: float = 1.0, float_model: nnx.Module | None = None
) -> M:
    """A model with the weights of `qmodel`, shared, whose static layers have the input scales that `batches` call for.

    qmodel: what `quantize_model` made with scaling="static", or any other after `nnx.view(qmodel, scaling="static")`. Scales that
        its static layers have already are replaced; its other layers stay as they are.
    batches: for a `models.Decoder`, which is called as `generate` calls it: each the token ids [B, T] of some prompts, or (ids,
        attention_mask [B, T]); what is masked takes no part. For any other module: each what it is called with, an array or a
        tuple of arguments; then every row counts.
    headroom: at least 1, times the largest amax seen: activations may grow by it before they saturate.
    float_model: the model that qmodel was made from, to calibrate on what its float layers read. None: on qmodel itself,
        its weights in NVFP4 and its activations not quantized.

    An input scale is the contract's global scale of headroom * amax: that divided by 2688 (1536 where the layer's activations are
    four-over-six). ValueError names a layer that no valid token reached, and an argument that does not fit.
    """
    result = nnx.merge(*nnx.split(arguments.module("calibrate: qmodel", qmodel)))
    modules = swap.scaled_layers(result)
    for path, scales in input_scales(qmodel, batches, headroom=headroom, float_model=float_model).items():
        layer = modules[path]
        if isinstance(layer, layers.NVFP4Experts):
            scales = {name: jnp.broadcast_to(s[..., None], (*layer.lead, layer.num_experts)) for name, s in scales.items()}
        layers.set_scaling(layer, layer.scaling, scales)
    return result


def input_scales(
    qmodel: nnx.Module, batches: Iterable[Batch], *, headroom: float = 1.0, float_model: nnx.Module | None = None
) -> dict[Path, dict[str, jax.Array]]:
    """What `calibrate` sets: layer's path -> its inputs ("input"; "gate_up_input" and "down_input" of experts) -> f32 [].

    [L] for a stack of layers. With a float_model, qmodel may be abstract.
    """
    headroom = check_headroom(headroom)
    batches = check_batches(batches)
    if float_model is not None:
        arguments.module("calibrate: float_model", float_model)
    static: dict[Path, Any] = {path: layer for path, layer in swap.scaled_layers(qmodel).items() if isinstance(layer.scaling, Static)}
    if not static:
        raise ValueError("calibrate: qmodel: no layer of the model has scaling='static'; swap with Rule(..., scaling='static'), or take "
                         "flax.nnx.view(model, scaling='static')")
    model, watches = _watched(qmodel, static) if float_model is None else _watched_float(float_model, static)
    graphdef, none_yet, *rest = nnx.split(model, InputAmax, ...)
    params = jax.tree.map(committed, rest[0])
    seen = None
    for number, batch in enumerate(batches):
        try:
            called_with = _arguments(model, batch)
        except ValueError as error:
            raise ValueError(f"calibrate: batches[{number}]: {error}") from error
        found = _observe(graphdef, params, none_yet, called_with)
        seen = found if seen is None else jax.tree.map(jnp.maximum, seen, found)
    if seen is None:
        raise ValueError("calibrate: batches: no batch of prompts was given")
    nnx.update(model, seen)
    found = {}
    for path, layer in static.items():
        amaxes = {name: getattr(watches[path], f"{name}_amax").get_value() for name in layer.inputs}
        found[path] = {name: _scale(path_string(path), name, amax, headroom, layer.scaling.four_over_six) for name, amax in amaxes.items()}
    return found


def _arguments(model: nnx.Module, batch: Any) -> tuple:
    """What `_observe` calls the model with: a decoder's ids and positions i32 [B, T] and valid bool [B, T]; another's batch."""
    if not isinstance(model, Decoder):
        return batch if isinstance(batch, tuple) else (batch,)
    if isinstance(batch, tuple) and len(batch) != 2:
        raise ValueError(f"token ids [B, T], or a pair of them and a mask, are needed, not {len(batch)} values")
    ids, mask = check_prompts(model, *(batch if isinstance(batch, tuple) else (batch, None)))
    packed = pack(ids, mask, bucket(int(mask.sum(1).max())))  # near lengths share a program
    return tuple(map(jnp.asarray, (packed.ids, packed.positions(), packed.valid)))


def check_headroom(headroom: float) -> float:
    headroom = math.nan if isinstance(headroom, bool | str) or not np.isscalar(headroom) else float(headroom)
    if not (math.isfinite(headroom) and headroom >= 1):
        raise ValueError(f"headroom={headroom}: a finite factor of at least 1")
    return headroom


def check_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches themselves; an array of token ids alone is no sequence of batches."""
    if isinstance(batches, str) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise ValueError(f"calibrate: batches: a sequence of batches is needed, e.g. of token ids [B, T], not {arguments.shown(batches)}")
    return batches


@jax.jit
def _observe(graphdef, params: Mapping, seen: Mapping, arguments: tuple) -> nnx.State:
    """The amaxes of one batch, `arguments` as `_arguments` gives them; seen: zeros in their place."""
    model: Any = nnx.merge(graphdef, params, seen)
    is_decoder = isinstance(model, Decoder)
    if is_decoder:
        ids, positions, valid = arguments
        batch, steps = ids.shape
        call(model, ids, positions, model.init_cache(batch, steps, None), valid=valid)
    else:
        model(*arguments)
    return nnx.state(model, InputAmax)


def _scale(layer: str, name: str, amax: jax.Array, headroom: float, four_over_six: str | None) -> jax.Array:
    amax = amax * jnp.float32(headroom)
    for index, value in np.ndenumerate(np.asarray(amax)):
        where = f"{layer}: {name}" + (f", layer {index[0]} of the stack" if index else "")
        if value < numerics.AMAX_MIN:
            raise ValueError(f"{where}: no token of the prompts reached it (its amax is {value}), so it gets no input scale; "
                             "calibrate on prompts that reach it, or give it a rule of its own in front of the others: an online mode, or "
                             "scaling=None (weights only) for a layer that the model reads as a matrix")
        if not np.isfinite(value):
            raise ValueError(f"{where}: headroom={headroom} takes its amax beyond float32")
    _, scale, _ = numerics.global_scales(amax, four_over_six=four_over_six is not None)
    return scale


def _watch(observer: Any, layer: Any) -> Any:
    """A float `observer` itself, with an amax to note for each input of the NVFP4 `layer`."""
    for name in layer.inputs:
        setattr(observer, f"{name}_amax", LargestAmax(jnp.zeros(layer.lead, jnp.float32)))
    return observer


def _watched(qmodel: nnx.Module, static: Mapping[Path, Any]) -> tuple[nnx.Module, dict[Path, Any]]:
    """A copy that shares the weights and quantizes no activation; the layers that take notes, by path."""
    model = nnx.view(qmodel, scaling=None)
    watched = {path: layer for path, layer in swap.scaled_layers(model).items() if path in static}
    for layer in watched.values():
        layers.set_scaling(layer, Calibrate())
    return model, watched


class _Watched(nnx.Module):
    """A float layer, its input noted on the way in, in the dtype that the layer computes in."""

    def __init__(self, layer: nnx.Linear | nnx.LinearGeneral | nnx.Einsum, name: str):
        self.layer, self.name = layer, name

    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        dtype = self.layer.dtype if self.layer.dtype is not None else jnp.promote_types(inputs.dtype, self.layer.kernel.dtype)
        rows = layers.contracted_last(self.layer, inputs).astype(dtype)
        layers.watch(self, "input", rows, current_valid(rows, self.name))
        return self.layer(inputs, *args, **kwargs)


def _watched_float(float_model: nnx.Module, static: Mapping[Path, Any]) -> tuple[nnx.Module, dict[Path, Any]]:
    model = nnx.merge(*nnx.split(float_model))
    floats = {tuple(path): module for path, module in nnx.iter_modules(model)}
    watches, wrapped = {}, {}
    for path, layer in static.items():
        kind = layers.Experts if isinstance(layer, layers.NVFP4Experts) else nnx.Linear | nnx.LinearGeneral | nnx.Einsum
        found = floats.get(path)
        if not isinstance(found, kind):
            raise ValueError(f"{path_string(path)}: float_model has {type(found).__name__ if path in floats else 'nothing'} there, not "
                             "the layer that this one was made from; pass the model that was quantized, or calibrate without float_model")
        watches[path] = _watch(found if isinstance(found, layers.Experts) else _Watched(found, path_string(path)), layer)
        if watches[path] is not found:
            wrapped[id(found)] = watches[path]
    _replace(model, wrapped, set())
    return model, watches


def _replace(node, replacements: Mapping[int, nnx.Module], done: set[int]) -> None:
    """Puts modules in the place of others (by id), wherever these are held."""
    if id(node) in done or isinstance(node, nnx.Variable | _Watched):
        return
    done.add(id(node))
    for key, child in list(swap.children(node)):
        if id(child) in replacements:
            swap.set_child(node, key, replacements[id(child)])
        else:
            _replace(child, replacements, done)
