"""An NVFP4 rollout engine for google-tunix 0.1.7: what `ClusterConfig(rollout_engine=...)` takes.

    from nvfp4jax.integrations.tunix_rollout import NVFP4Rollout
    ClusterConfig(rollout_engine=functools.partial(NVFP4Rollout), ...)

The actor is one of tunix's models, or one of ours in a `TunixModel`, whose paths begin with `model/`. The engine holds a quantized copy; the trainer's model is
read and never written. Use tunix 0.1.7 with jax 0.11.1 or newer, below 0.12; tunix' HEAD asks for jax below 0.11.1, which is too old for
nvfp4jax.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tunix.rl.rollout import base_rollout

from nvfp4jax import arguments, layers
from nvfp4jax.integrations import tunix
from nvfp4jax.requantize import quantize_params
from nvfp4jax.rollout import generate, logprobs
from nvfp4jax.rollout.request import check_model
from nvfp4jax.swap import Path, Rule, path_string, quantize_model

_log = logging.getLogger(__name__)
_OF_A_TOKENIZER = ("encode", "decode", "pad_id", "eos_id", "bos_id", "dedup_bos_ids")
_A, _B, _EINSUM = "_lora_a", "_lora_b", "_lora_einsum_str"  # what qwix calls what it hangs beside a Param


class TunixModel(nnx.Module):
    """One of our models (any `models.Decoder`), called as tunix calls its own: so its trainers train it.

    The rows' tokens, wherever padding stands, are moved to the left end for the model and their logits back to where they were.
    Without a cache: answers come from `NVFP4Rollout`.
    """

    def __init__(self, model: nnx.Module):
        check_model(model)
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: None = None, attention_mask: Bool[Array, "B T T"] | None = None
    ) -> tuple[Float[Array, "B T V"], None]:
        """attention_mask: tunix's, causal and without the padding as keys; positions follow from it."""
        if cache is not None:
            raise NotImplementedError("TunixModel runs without a cache; roll out with NVFP4Rollout, not with tunix's own sampler")
        shape = tokens.shape
        valid = jnp.ones(shape, bool) if attention_mask is None else jnp.diagonal(attention_mask.astype(bool), axis1=-2, axis2=-1)
        order = jnp.argsort(~valid, axis=1, stable=True)
        take = lambda x, at: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
        slots = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
        out = self.model(take(tokens, order), slots, valid=take(valid, order))
        return take(out.logits, jnp.argsort(order, axis=1)[..., None]), None


class NVFP4Rollout(base_rollout.BaseRollout):
    """See the module. Logprobs are of softmax(logits / temperature), before top-k and top-p, and the stop token is part of an answer.

    rules: of `quantize_model`; paths as in the actor. None: every layer of the stack, "token" scaling.
    lora_scale: alpha / rank of qwix' adapters, needed where the actor has some: they are merged before each quantization.

    Of `rollout_config`: max_tokens_to_generate, temperature (0 is greedy, whatever top_p says), top_p, top_k (-1 or None: all), seed
    (None: new randomness in each call), max_prompt_length (longer prompts make the batch as wide as the next power of two, as in
    tunix's sampler), eos_tokens, return_logprobs; what is for other engines is not read.

    qmodel: the quantized copy, live: what it holds is what the next call of `generate` reads. With the cluster's `offload_to_cpu=True`
    it lies in pinned host memory between rollouts.
    """

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        mesh: jax.sharding.Mesh | None,
        rollout_config: base_rollout.RolloutConfig,
        rules: Rule | Sequence[Rule] | None = None,
        lora_scale: float | None = None,
    ):
        if not isinstance(rollout_actor, TunixModel):
            tunix.check_model("rollout_actor", rollout_actor)
        if missing := [name for name in _OF_A_TOKENIZER if not callable(getattr(tokenizer, name, None))]:
            raise ValueError(f"tokenizer: {arguments.shown(tokenizer)} has no {missing[0]}(); one of tunix' TokenizerAdapters has")
        if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
            raise ValueError(f"mesh: a jax.sharding.Mesh is needed, or None, not {arguments.shown(mesh)}")
        _check_config(rollout_config)
        lora_scale = None if lora_scale is None else arguments.number("lora_scale", lora_scale)
        self._actor, self._tokenizer = rollout_actor, tokenizer
        self._lora_scale = jnp.float32(lora_scale or 0.0)  # on the device: a cluster forbids transfers while it hands over weights
        self._on = None if mesh is None or mesh.empty else mesh  # tunix takes an attribute `mesh` for its own
        self._calls, self._ran = 0, False
        self._offloads = False  # whether the cluster has ever asked for it
        self._temperature = rollout_config.temperature or 1.0
        self._ends = [int(token) for token in rollout_config.eos_tokens or [tokenizer.eos_id()]]
        if rollout_config.data_type is not None:
            _log.warning("rollout_config.data_type=%s is not read: weights are NVFP4, the rest keeps the actor's dtype", rollout_config.data_type)
        if self._adapters() and lora_scale is None:
            raise ValueError("the actor has low-rank adapters; pass lora_scale=alpha / rank, so that they can be merged into the weights")
        plain = _without_adapters(rollout_actor)
        graphdef, state = nnx.split(plain)
        inside = "model/" if isinstance(rollout_actor, TunixModel) else ""
        self.qmodel = quantize_model(nnx.merge(graphdef, self._moved(state)), Rule(inside + r"layers/.*") if rules is None else rules)
        self._decoder = self.qmodel.model if isinstance(rollout_actor, TunixModel) else tunix.Decoder(self.qmodel)
        shardings = jax.tree.map(lambda x: x.sharding, nnx.state(self.qmodel, layers.WEIGHTS))
        # Copies: what the swap left is the trainer's own array, which its next step may donate.
        fresh = lambda floats: jax.tree.map(jnp.copy, quantize_params(floats, self.qmodel))  # noqa: E731
        self._requantize = jax.jit(fresh, out_shardings=shardings)
        equations = {tuple(path): m.einsum_str for path, m in nnx.iter_modules(plain) if hasattr(m, "einsum_str")}
        self._merge = jax.jit(functools.partial(_merged, equations=equations))
        self.update_params(nnx.state(rollout_actor, nnx.Param), (nnx.Param,))

    def generate(self, prompts: list[str], rollout_config: base_rollout.RolloutConfig, **kwargs: Any) -> base_rollout.RolloutOutput:
        if kwargs:
            raise TypeError(f"NVFP4Rollout.generate: {sorted(kwargs)} are not known")
        config, pad = _check_config(rollout_config), self.pad_id()
        rows = [self._tokens(prompt) for prompt in arguments.items("prompts", prompts, str, "text")]
        if not rows:
            raise ValueError("prompts: no prompt is given")
        longest = max(map(len, rows))
        width = config.max_prompt_length or 0
        width = width if width >= longest else 1 << (longest - 1).bit_length()
        ids, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, True
        self._load()
        # A pad_id outside the vocabulary is well: masked ids are not read.
        out = generate(
            self._decoder, ids, mask, max_new_tokens=config.max_tokens_to_generate,
            temperature=float(config.temperature), top_k=None if config.top_k in (None, -1) else int(config.top_k),
            top_p=None if config.top_p is None else float(config.top_p), key=self._key(config.seed),
            stop_tokens=[int(token) for token in config.eos_tokens or [self.eos_id()]], pad_id=pad,
        )  # fmt: skip
        tokens, logprobs, lengths = (np.asarray(x) for x in (out.tokens, out.logprobs, out.lengths))
        answers = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        return base_rollout.RolloutOutput(
            text=[self._tokenizer.decode(row.tolist()) for row in answers],
            logits=[],
            tokens=answers,
            left_padded_prompt_tokens=ids,
            logprobs=[row[:n] for row, n in zip(logprobs, lengths, strict=True)] if config.return_logprobs else None,
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """f32, shaped like completion_tokens: under the rollout's own weights, at the temperature of its config; 0 at padding."""
        arguments.array("prompt_tokens", prompt_tokens, "int", ("B", "T"))
        arguments.array("completion_tokens", completion_tokens, "int", (prompt_tokens.shape[0], "T"))
        text = np.concatenate([np.asarray(prompt_tokens), np.asarray(completion_tokens)], axis=1)
        self._load()
        mask = _tokens_in(np.asarray(prompt_tokens), np.asarray(completion_tokens), self.pad_id(), self._ends)
        logps = logprobs(self._decoder, text, mask, temperature=self._temperature)
        return logps[:, prompt_tokens.shape[1] :]

    def update_params(self, params: nnx.State, filter_types: tuple[Any, ...] | None = None) -> None:
        """New weights: the trainer's Params, or its adapters alone (LoRA), quantized; or this engine's own state, taken as it is.

        `filter_types` is not needed: what came tells what it is. A state without a leaf, which a cluster with `offload_to_cpu=True` makes of
        `model()` before and after each rollout, moves the weights to the host if they have been used. ValueError that names the leaf for
        what does not fit.
        """
        if not isinstance(params, nnx.State):
            raise ValueError(f"params: the nnx.State of a model is needed, not {arguments.shown(params)}")
        flat = dict(nnx.to_flat_state(params))
        if not flat:
            self._offloads = True
            if self._ran:
                nnx.update(self.qmodel, _in_memory(nnx.state(self.qmodel), "pinned_host"))
            self._ran = False
            return
        self._ran = False
        if any(isinstance(leaf, layers.NVFP4Param) for leaf in flat.values()):
            expected = {path for path, _ in nnx.to_flat_state(nnx.state(self.qmodel))}
            if wrong := sorted(map(path_string, flat.keys() ^ expected)):
                raise ValueError(f"{wrong[0]}: this state is not the one of this engine's model")
            nnx.update(self.qmodel, params)
            return
        adapters = {path: leaf for path, leaf in flat.items() if _is_adapter(path)}
        floats = {path: leaf for path, leaf in flat.items() if not _is_adapter(path)}
        if adapters and not floats:  # their base is the trainer's, which does not change
            floats = {p: v for p, v in nnx.to_flat_state(nnx.state(self._actor, nnx.Param)) if not _is_adapter(p)}
        floats = nnx.from_flat_state(floats)
        if adapters:
            floats = self._merge(self._moved(floats), self._moved(nnx.from_flat_state(adapters)), self._lora_scale)
        made = self._requantize(self._moved(floats))
        nnx.update(self.qmodel, _in_memory(made, "pinned_host") if self._offloads else made)

    def pad_id(self) -> int:
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        return self._tokenizer.eos_id()

    def model(self) -> None:
        """None, as tunix's vLLM engine gives: a cluster of one mesh writes what comes here into the trainer's model."""
        return None

    def _tokens(self, text: str) -> list[int]:
        """As tunix's sampler makes them: the tokenizer's, behind one bos."""
        tokens, bos = self._tokenizer.encode(text), self._tokenizer.bos_id()
        return [int(token) for token in self._tokenizer.dedup_bos_ids(([bos] if bos else []) + list(tokens))]

    def _key(self, seed: Any) -> jax.Array:
        self._calls += 1
        if seed is None:
            return jax.random.fold_in(jax.random.key(0), self._calls)
        return seed if isinstance(seed, jax.Array) else jax.random.key(arguments.whole("rollout_config: seed", seed))

    def _load(self) -> None:
        """The weights on the device: they may have been offloaded."""
        nnx.update(self.qmodel, _in_memory(nnx.state(self.qmodel), "device"))
        self._ran = True

    def _moved(self, state: nnx.State) -> nnx.State:
        """The state on the rollout's mesh, each leaf with its own spec, in the devices' memory."""
        if self._on is None:
            return _in_memory(state, "device")

        def move(x: jax.Array) -> jax.Array:
            spec = x.sharding.spec if isinstance(x.sharding, jax.sharding.NamedSharding) else jax.sharding.PartitionSpec()
            return jax.device_put(x, jax.sharding.NamedSharding(self._on, spec))

        return jax.tree.map(move, state)

    def _adapters(self) -> bool:
        return any(_is_adapter(path) for path, _ in nnx.to_flat_state(nnx.state(self._actor, nnx.Param)))


def _check_config(config: Any) -> base_rollout.RolloutConfig:
    """The config itself; ValueError for one whose fields, those that are read, are not numbers. Their bounds are judged by `generate`."""
    if not isinstance(config, base_rollout.RolloutConfig):
        raise ValueError(f"rollout_config: tunix' RolloutConfig is needed, not {arguments.shown(config)}")
    for name, check in (("max_tokens_to_generate", arguments.whole), ("max_prompt_length", arguments.whole), ("temperature", arguments.number),
                        ("top_p", arguments.number), ("top_k", arguments.whole)):  # fmt: skip
        value = getattr(config, name)
        if value is not None:
            check(f"rollout_config: {name}", value)
    for token in config.eos_tokens or ():
        arguments.whole("rollout_config: eos_tokens", token)
    return config


def _tokens_in(prompts: np.ndarray, answers: np.ndarray, pad: int, ends: Sequence[int]) -> np.ndarray:
    """bool [B, prompt and answer]: which ids are tokens, of prompts padded on the left and answers padded on the right.

    A pad may be a token, too: tunix' adapter pads with the stop token where a tokenizer has no pad. Then the first behind an answer's
    other tokens is its end, unless it has ended with another stop token.
    """
    of_prompts = np.logical_or.accumulate(prompts != pad, axis=1)
    of_answers = np.logical_or.accumulate((answers != pad)[:, ::-1], axis=1)[:, ::-1]
    if pad in ends and answers.shape[1]:
        lengths = of_answers.sum(1)
        last = np.take_along_axis(answers, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        open_ended = (lengths == 0) | ~np.isin(last, ends)
        of_answers |= open_ended[:, None] & (np.arange(answers.shape[1]) == lengths[:, None])
    return np.concatenate([of_prompts, of_answers], axis=1)


def _in_memory(state: nnx.State, kind: str) -> nnx.State:
    return jax.tree.map(lambda x: x if x.sharding.memory_kind == kind else jax.device_put(x, x.sharding.with_memory_kind(kind)), state)


def _is_adapter(path: Path) -> bool:
    return isinstance(path[-1], str) and path[-1].endswith((_A, _B))


def _without_adapters(model: nnx.Module) -> nnx.Module:
    """A copy of the actor as it was before qwix hung adapters into it (its arrays are the actor's)."""
    copy = nnx.clone(model)
    for _, module in nnx.iter_modules(copy):
        for name in [name for name in vars(module) if name.endswith((_A, _B, _EINSUM))]:
            delattr(module, name)
    copy.__class__ = getattr(type(copy), "_unquantized_type", type(copy))
    return copy


def _merged(floats: nnx.State, adapters: nnx.State, scale: Float[Array, ""], equations: Mapping[Path, str]) -> nnx.State:
    """The weights with scale * a b added, as qwix' LoRA computes it. equations: the einsum of each module that has one."""
    weights, given = dict(nnx.to_flat_state(floats)), dict(nnx.to_flat_state(adapters))
    for path, a in given.items():
        if not path[-1].endswith(_A):
            continue
        home, name = path[:-1], path[-1].removesuffix(_A)
        weight, b = weights.get((*home, name)), given.get((*home, name + _B))
        if weight is None or b is None:
            raise ValueError(f"{path_string(path)}: this adapter has no weight, or no second half, beside it")
        a_, b_ = (v.get_value().astype(jnp.float32) for v in (a, b))
        if home in equations:
            lhs, rhs = equations[home].split("->")[0].replace(" ", "").split(",")
            rank = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in lhs + rhs)
            shared, own = ("".join(c for c in rhs if (c in lhs) == both) for both in (True, False))
            delta = jnp.einsum(f"{shared}{rank},{rank}{own}->{rhs}", a_, b_)
        else:
            delta = (a_ @ b_).reshape(weight.shape)
        value = weight.get_value()
        weights[(*home, name)] = weight.replace((value.astype(jnp.float32) + scale * delta).astype(value.dtype))
    return nnx.from_flat_state(weights)
