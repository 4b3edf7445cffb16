"""Swapping a model's layers for NVFP4 ones.

Plain module surgery: no sample input, no forward pass, no interception. The model given is left as it is.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from nvfp4jax import arguments, layers, ops, report
from nvfp4jax import scaling as modes
from nvfp4jax.ops import Implementation
from nvfp4jax.scaling import FourOverSix, Name, Scaling

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers whose path matches.

    module_path: a regular expression for `re.fullmatch` on the path joined by '/', e.g. r"layers/\\d+/mlp/.*"; the first
        rule that matches a layer decides. One that skips also matches what lies in a module that it names.
    scaling: None (weights only), "static", "delayed", "tensor", "tensor_pow2", "token", for experts also "expert"; or a value of
        `nvfp4jax.scaling`, e.g. Token(four_over_six="mse").
    weight_four_over_six: None, "mae" or "mse".
    skip: leave the layers in floating point.
    implementation: passed to the layer's operations.

    A raw Param of 3 axes [E, K, N] in a module that nobody registered is taken by a rule with scaling=None that matches
    the Param's own path: its weights only, decoded where they are read.
    """

    module_path: str
    scaling: Name | Scaling | None = "token"
    weight_four_over_six: FourOverSix | None = None
    skip: bool = False
    implementation: Implementation = None

    def __post_init__(self):
        if not isinstance(self.module_path, str):
            raise ValueError(f"Rule: module_path={str(self.module_path)[:40]} is no regular expression")
        name = f"Rule({self.module_path!r})"
        try:
            re.compile(self.module_path)
        except re.error as error:
            raise ValueError(f"{name}: module_path is no regular expression: {error}") from error
        object.__setattr__(self, "scaling", modes.parse(self.scaling, name))
        modes.check_four_over_six(self.weight_four_over_six, f"{name}: weight_four_over_six")
        arguments.flag(f"{name}: skip", self.skip)
        object.__setattr__(self, "implementation", ops.check_implementation(self.implementation))

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("module_path", "skip")}


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """The modules, containers and Params that a module or container holds, by name or index."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, list | tuple | nnx.List):
        items = enumerate(node)
    else:
        items = [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__") and k != "_object__state"]
    for key, value in items:
        if isinstance(value, nnx.Module | nnx.Variable | Mapping | list | tuple):
            yield key, value


def set_child(parent: Any, key: Any, value: Any) -> None:
    if isinstance(parent, tuple):
        raise ValueError(f"a layer at index {key} sits in a tuple, which cannot be changed in place; hold your layers in an nnx.List")
    has_items = isinstance(parent, Mapping | list | nnx.List)
    if has_items:
        parent[key] = value
    else:
        setattr(parent, key, value)


def path_string(path: Path) -> str:
    return "/".join(map(str, path))


def quantize_model[M: nnx.Module](model: M, rules: Rule | Sequence[Rule]) -> M:
    """A copy of `model` whose layers are swapped for NVFP4 ones as the first matching rule says.

    Works on a model of arrays and on an abstract one (`nnx.eval_shape`); layers that two parents share stay shared, and a Param that two
    layers share is found again by `quantize_params`. What was packed and what stayed is logged; `describe` returns it.
    ValueError for a rule that matches nothing, and for a layer that cannot be quantized, naming its path and shape.
    """
    rules = [rules] if isinstance(rules, Rule) else rules
    if not isinstance(rules, Sequence):
        raise ValueError(f"quantize_model: rules: a Rule or a sequence of them is needed, not {arguments.shown(rules)}")
    rules = [rules] if isinstance(rules, str) else list(rules)
    if wrong := [rule for rule in rules if not isinstance(rule, Rule)]:
        raise ValueError(f"quantize_model: {wrong[0]!r} is no Rule; write Rule({wrong[0]!r}) or Rule(r'.*')")
    if not isinstance(model, nnx.Module):
        raise ValueError(f"quantize_model: model: {arguments.shown(model)} is no nnx.Module; a Linen module or a tree of arrays cannot be swapped")
    patterns = [re.compile(rule.module_path) for rule in rules]
    used = [False] * len(rules)  # the rule has decided
    late = [False] * len(rules)  # or it has matched a layer that an earlier one decides
    done: dict[int, nnx.Module] = {}
    seen_layers: list[str] = []
    seen_containers: set[int] = set()  # skip rules that have matched a container
    copy = nnx.clone(model)
    homes = {id(node): tuple(path) for path, node in nnx.iter_graph(copy) if isinstance(node, nnx.Variable)}
    places: dict[int, list[Path]] = {}
    for path, module in nnx.iter_modules(copy):
        for key, child in children(module):
            if isinstance(child, nnx.Variable):
                places.setdefault(id(child), []).append((*path, key))

    def matching(path: str, wanted: Callable[[Rule], bool]) -> list[int]:
        return [i for i, (rule, p) in enumerate(zip(rules, patterns, strict=True)) if (rule.skip or wanted(rule)) and p.fullmatch(path)]

    def decide(path: str, wanted: Callable[[Rule], bool], around: tuple[int, ...] = ()) -> Rule | None:
        """The first rule that matches a layer, or, among those that skip, a container that it lies in (`around`)."""
        found = sorted({*matching(path, wanted), *around})
        for i in found[1:]:
            late[i] = True
        if not found:
            return None
        used[found[0]] = True
        return rules[found[0]]

    def converted(node: nnx.Module, path: Path, rule: Rule) -> nnx.Module:
        name = path_string(path)
        new: Any = layers.CONVERTERS[type(node)](node, name=name or type(node).__name__, **rule.options())
        if hasattr(new, "float_names"):
            # Where a float state has what this layer is made of: a Param that is shared stands at the first of its places.
            own = {names: _get(node, names) for names in new.float_names()}
            homes_of = {names: homes.get(id(v), (*path, *names)) for names, v in own.items()}
            new.float_paths = tuple((names, home) for names, home in homes_of.items() if home != (*path, *names))
            new.float_places = tuple((names, place) for names, v in own.items() for place in places.get(id(v), ()) if place != (*path, *names))
        return new

    def visit(node: Any, path: Path, around: tuple[int, ...] = ()) -> Any:
        name = path_string(path)
        if id(node) in done:
            return done[id(node)]
        new = node
        if isinstance(node, nnx.Variable):
            if len(node.shape) == 3 and isinstance(node, nnx.Param):
                rule = decide(name, lambda rule: rule.scaling is None, around)
                if rule is not None and not rule.skip:
                    new = layers.NVFP4Weight(node, name=name, weight_four_over_six=rule.weight_four_over_six)
            done[id(node)] = new
            return new
        if type(node) in layers.CONVERTERS:
            seen_layers.append(name)
            rule = decide(name, lambda rule: True, around)
            if rule is not None and not rule.skip:
                new = converted(node, path, rule)
                # What it keeps as it was, a router say, is skipped: a rule that says so has matched.
                kept = [inside for inside, m in nnx.iter_modules(new) if inside and type(m) in layers.CONVERTERS]
                for inside in kept:
                    decide(path_string((*path, *inside)), lambda rule: False)
            done[id(node)] = new
            return new
        if isinstance(node, nnx.Module):
            # A skip rule that names a container keeps all below it that no earlier rule takes.
            around = (*around, *matching(name, lambda rule: False))
            seen_containers.update(around)
        done[id(node)] = node
        for key, child in list(children(node)):
            replaced = visit(child, (*path, key), around)
            if replaced is not child:
                set_child(node, key, replaced)
        return node

    result = visit(copy, ())
    # To skip a container without layers, a norm say, is no mistake; to skip layers behind a rule that takes them all is one.
    unused = [rule.module_path for i, rule in enumerate(rules) if not used[i] and (late[i] or i not in seen_containers)]
    if unused:
        raise ValueError(f"rule {unused[0]!r} matches no layer that an earlier rule has not taken; {_what_there_is(model, seen_layers)}")
    report.log(report.describe(result), rules)
    return result


def shared_places(qmodel: nnx.Module) -> dict[Path, Path]:
    """Where else a swapped layer's float Params stood, e.g. an embedding's table: each place -> the layer's own path to it."""
    layers_ = quantized_layers(qmodel).items()
    return {place: (*path, *names) for path, layer in layers_ for names, place in getattr(layer, "float_places", ())}


def _get(node: Any, names: Path) -> Any:
    for name in names:
        node = getattr(node, name)
    return node


def _what_there_is(model: nnx.Module, seen: Sequence[str]) -> str:
    if seen:
        return f"the layers are: {', '.join(seen[:6])}{', ...' if len(seen) > 6 else ''}"
    if quantized_layers(model):
        return "the model is swapped already"
    known = ", ".join(sorted(cls.__name__ for cls in layers.CONVERTERS))
    return f"the model has no layer of a known class ({known}); teach it yours with nvfp4jax.register"


def scaled_layers(model: nnx.Module) -> dict[Path, layers.NVFP4Linear | layers.NVFP4Experts]:
    """The NVFP4 layers that scale their input, by path."""
    return {tuple(path): m for path, m in nnx.iter_modules(model) if isinstance(m, layers.NVFP4Linear | layers.NVFP4Experts)}


def quantized_layers(model: nnx.Module) -> dict[Path, Any]:
    """The NVFP4 layers of a swapped model by path: modules with `quantize_params` and `float_names`, registered ones among them."""
    return {tuple(path): m for path, m in nnx.iter_modules(model) if hasattr(m, "quantize_params") and hasattr(m, "float_names")}
