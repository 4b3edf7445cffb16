"""From prompts to sampled tokens: the jitted rollout function and what it is made of."""

from nvfp4jax.rollout.decoding import Controls, DecodeState, Settings, decode, prefill, rollout
from nvfp4jax.rollout.generate import Rollout, generate
from nvfp4jax.rollout.logprobs import logprobs
from nvfp4jax.rollout.sampling import Edits, Sampling, likeliest, row_keys, sample
from nvfp4jax.rollout.text import generate_text

__all__ = [
    "Controls", "DecodeState", "Edits", "Rollout", "Sampling", "Settings", "decode", "generate", "generate_text", "likeliest", "logprobs", "prefill",
    "rollout", "row_keys", "sample",
]  # fmt: skip
