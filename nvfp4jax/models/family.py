"""What the rest of the package must know of an architecture: a `Family`, one registration each.

To add one: a file in models/ with a config reader and a decoder, which ends in `register(Family(...))`, and its name in
models/__init__.py. A family of your own registers from anywhere, before a folder of it is loaded.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """How a mixture's experts are called in a checkpoint, below the module that holds them.

    gate, up, down: one expert's modules, '<experts>.<e>.<gate>'. fused_gate_up, fused_down: tensors of all experts.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = "gate_up_proj"
    fused_down: str = "down_proj"

    def module(self, experts: str, index: int, role: str) -> str:
        """Expert `index`'s "gate", "up" or "down": 'model.layers.0.mlp.experts.3.up_proj'."""
        return f"{experts}.{index}.{getattr(self, role)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture.

    architectures: what a config.json calls it. model: `model(config, *, dtype, param_dtype, rngs)`, a Decoder whose
        modules are named as the checkpoint's, with '/' for '.'; its cache comes from its own `init_cache`.
    read_config: config.json -> config. ValueError that names the key for what is missing, unknown or not computed.
    kept: a regular expression (fullmatch) of module paths that stay in floating point unless a rule names them; where a
        folder stores one in NVFP4 all the same, its weight is decoded and its input is not quantized.
    shared: names of sibling modules that read one activation and that serving stacks fuse: in the formats of others
        they share one global scale.
    prefix: in front of every tensor but those of the modules in `bare`.
    head, embedding: the modules at the top that share a weight where config.json says tie_word_embeddings.
    tensors: what a Param is called in a checkpoint, where the names differ.
    experts: the names of a mixture's experts.
    unread: (regular expression of tensors that the model does not compute with, the reason), left out without a word.
    """

    architectures: tuple[str, ...]
    model: Callable[..., nnx.Module]
    read_config: Callable[[Mapping[str, Any]], Any]
    kept: str = "lm_head"
    shared: tuple[tuple[str, ...], ...] = ()
    prefix: str = "model."
    bare: tuple[str, ...] = ("lm_head",)
    head: str = "lm_head"
    embedding: str = "embed_tokens"
    tensors: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"kernel": "weight", "embedding": "weight", "scale": "weight"}
    )
    experts: ExpertNames = ExpertNames()
    unread: tuple[tuple[str, str], ...] = ((r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed"),)

    def module_name(self, path: Sequence[Any]) -> str:
        """('layers', 0, 'mlp', 'up_proj') -> 'model.layers.0.mlp.up_proj'."""
        name = ".".join(map(str, path))
        return name if str(path[0]) in self.bare else f"{self.prefix}{name}"

    def tensor_name(self, path: Sequence[Any]) -> str:
        """A Param's path -> its tensor: ('norm', 'scale') -> 'model.norm.weight'."""
        return f"{self.module_name(path[:-1])}.{self.tensors.get(str(path[-1]), str(path[-1]))}"

    def keeps(self, path: str) -> bool:
        """Whether the module at 'layers/0/mlp/gate' stays in floating point by default."""
        return re.fullmatch(self.kept, path) is not None

    def group(self, path: Path) -> tuple[Path, ...]:
        """The paths of the modules that share a global scale with this one, itself among them."""
        for names in self.shared:
            if path[-1] in names:
                return tuple((*path[:-1], name) for name in names)
        return (path,)


_families: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes an architecture known to `build`, the loaders, the converter and the command line. ValueError if it is taken."""
    for name in family.architectures:
        if name in _families and _families[name] != family:
            raise ValueError(f"architecture {name!r} is registered already")
    _families.update(dict.fromkeys(family.architectures, family))
    return family


def architectures() -> tuple[str, ...]:
    return tuple(_families)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names. ValueError lists those that are known."""
    names = config.get("architectures") or []
    known = [name for name in names if isinstance(name, str) and name in _families]
    if not known:
        raise ValueError(
            f"config.json: architectures={str(names)[:80]} is not supported; known: {', '.join(_families)}"
        )
    return _families[known[0]]


def build(
    config: Mapping[str, Any],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    param_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """The model that a Hugging Face config.json describes, with random weights, or abstract where `rngs` is None.

    An abstract model holds ShapeDtypeStructs, for a loader to fill. ValueError for an architecture that is not
    registered, and for a config that the model cannot compute, naming the key.
    """
    family = family_of(config)
    parsed = family.read_config(config)
    make = lambda rngs: family.model(parsed, dtype=dtype, param_dtype=param_dtype, rngs=rngs)  # noqa: E731
    return nnx.eval_shape(lambda: make(nnx.Rngs(0))) if rngs is None else make(rngs)
