"""`nvfp4jax.integrations.tunix_rollout` without google-tunix: what it imports of it, as empty as it can be. For wrong arguments alone;
what the engine computes is held against the real one in test_tunix_rollout.py."""

import dataclasses
import importlib
import sys
import types
from unittest import mock

from flax import nnx

from nvfp4jax import integrations, layers


@dataclasses.dataclass
class RolloutConfig:
    max_tokens_to_generate: int = 2
    max_prompt_length: int | None = 8
    temperature: float = 0.5
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = 0
    eos_tokens: list | None = None
    return_logprobs: bool = True
    data_type: object = None


def _modules() -> dict[str, types.ModuleType]:
    made = {name: types.ModuleType(name) for name in ("tunix", "tunix.models", "tunix.rl", "tunix.rl.rollout", "tunix.rl.rollout.base_rollout")}
    output = dataclasses.make_dataclass("RolloutOutput", ["text", "logits", "tokens", "left_padded_prompt_tokens", "logprobs"])
    vars(made["tunix.rl.rollout.base_rollout"]).update(BaseRollout=object, RolloutConfig=RolloutConfig, RolloutOutput=output)
    for family in ("gemma", "gemma3", "llama3", "qwen2", "qwen3"):
        made |= {name: types.ModuleType(name) for name in (f"tunix.models.{family}", f"tunix.models.{family}.model")}
        for kind in ("Einsum", "MoELayer", "Gemma"):
            setattr(made[f"tunix.models.{family}.model"], kind, type(kind, (nnx.Module,), {}))
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    return made


def rollout_module() -> types.ModuleType:
    """Nothing else in this process sees the stand-in, whether tunix is there or not."""
    ours = ("nvfp4jax.integrations.tunix", "nvfp4jax.integrations.tunix_rollout")
    with mock.patch.dict(sys.modules, _modules()), mock.patch.dict(vars(integrations)), mock.patch.dict(layers.CONVERTERS):
        for name in ours:
            sys.modules.pop(name, None)
            vars(integrations).pop(name.rpartition(".")[2], None)
        return importlib.import_module(ours[1])
