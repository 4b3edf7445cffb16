"""Frozen dataclasses as pytrees whose leaves may be anything: shapes, shardings, a transformation's placeholders."""

import dataclasses
from typing import Any

import jax


def register(cls: type, *data: str) -> type:
    """Makes a dataclass a pytree: the fields named are its children, the others are static. `__init__` does not run on unflattening."""
    static = [f.name for f in dataclasses.fields(cls) if f.name not in data]

    def flatten_with_keys(value: Any):
        children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in data]
        return children, tuple(getattr(value, name) for name in static)

    def unflatten(aux: tuple, children: tuple) -> Any:
        value = object.__new__(cls)
        for name, child in zip((*static, *data), (*aux, *children), strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls
