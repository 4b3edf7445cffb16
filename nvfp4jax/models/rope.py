"""Rotary frequencies as Hugging Face configs name them: default, linear, llama3, yarn.

Formulas: transformers `modeling_rope_utils.py`; Llama 3.1; YaRN, arXiv 2309.00071.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """kind: "default", "linear", "llama3" or "yarn". The fields behind `theta` are read by some kinds alone.

    factor: how many times longer texts grow than original_max_position_embeddings, the length that was trained on.
    attention_factor: times cos and sin; None: what yarn derives from factor, mscale and mscale_all_dim, 1 elsewhere.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, dim: int) -> np.ndarray:
        """f32 [dim / 2], radians a position."""
        plain = 1.0 / self.theta ** (np.arange(0, dim, 2) / dim)
        return {"default": lambda f, _: f, "linear": lambda f, _: f / self.factor, "llama3": self._llama3, "yarn": self._yarn}[
            self.kind
        ](plain, dim).astype(np.float32)

    def _llama3(self, plain: np.ndarray, dim: int) -> np.ndarray:
        """Short waves stay, long ones are stretched by `factor`, those between are blended."""
        waves = 2 * math.pi / plain
        turns = self.original_max_position_embeddings / waves
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * plain / self.factor + blend * plain

    def _yarn(self, plain: np.ndarray, dim: int) -> np.ndarray:
        def dimension(turns: float) -> float:
            trained = self.original_max_position_embeddings
            return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # As transformers: of a beta_slow above beta_fast the ramp falls.
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        return plain / self.factor * ramp + plain * (1 - ramp)

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1 (YaRN), 1 for a factor of at most 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
