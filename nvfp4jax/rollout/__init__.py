"""From prompts to sampled tokens: the jitted rollout function and what it is made of."""

from nvfp4jax.rollout.decoding import Controls, DecodeState, Settings, decode, prefill, rollout
from nvfp4jax.rollout.generate import Rollout, generate
from nvfp4jax.rollout.sampling import Sampling, row_keys, sample

__all__ = [
    "Controls", "DecodeState", "Rollout", "Sampling", "Settings", "decode", "generate", "prefill", "rollout",
    "row_keys", "sample",
]  # fmt: skip
