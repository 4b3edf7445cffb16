"""Every public function with each of its arguments wrong in turn: one readable line that names the argument (or the layer), raised by the
library at the call that has the mistake; never an error from the depths, never acceptance.

To add a function: a `Row` in TABLE. `test_every_public_name` holds the table against the package, `test_every_argument` each row against
its function's signature, `test_good` that the arguments are right until one of them is made wrong.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import folders
from flax import nnx
from integrations import tunix_stand_in

import nvfp4jax
from nvfp4jax import checkpoint, models, routing, telemetry
from nvfp4jax.checkpoint import convert, huggingface, orbax, reload, safetensors, saved_model
from nvfp4jax.checkpoint.tokenizer import Tokenizer
from nvfp4jax.integrations import linen
from nvfp4jax.models import Output
from nvfp4jax.scaling import Delayed, Static

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning", "ignore::ResourceWarning"),
]
BF16 = jnp.bfloat16
LABEL = "a label: whatever it is, messages can show it"


@dataclasses.dataclass(frozen=True)
class Row:
    """good: makes arguments that work. wrong: argument -> values, each refused when it takes the place of the good one (an `Of`: what
    its function makes of the good one). names: argument -> a regular expression that a message may hold in its place, e.g. a layer's
    path. free: argument -> why there is no wrong value of it. of: the function itself, where `call` only leads to it."""

    call: Callable
    good: Callable[[], dict[str, Any]]
    wrong: dict[str, list]
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    free: dict[str, str] = dataclasses.field(default_factory=dict)
    of: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Of:
    make: Callable
    label: str = ""


# --- what the good arguments are made of -------------------------------------------------------------------------------


def rand(*shape, dtype=BF16):
    return jnp.asarray(np.random.default_rng().normal(size=shape), dtype)


class Net(nnx.Module):
    """Somebody's own decoder, as small as one can be: it reads no other token."""

    def __init__(self, rngs, width=32):
        self.config = {"vocab_size": 16}
        self.embed = nnx.Embed(16, width, param_dtype=BF16, dtype=BF16, rngs=rngs)
        self.up = nnx.Linear(width, 32, param_dtype=BF16, rngs=rngs)
        self.head = nnx.Linear(32, 16, use_bias=False, param_dtype=BF16, rngs=rngs)

    def init_cache(self, batch, length, dtype=None):
        return models.cache.CacheArray(jnp.zeros((batch, length), BF16), batch=-2, slots=-1)

    def __call__(self, tokens, positions, cache=None, *, valid=None, last=None):
        x = self.embed(tokens)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return Output(self.head(self.up(x)).astype(jnp.float32), cache)


@functools.cache
def net(width=32):
    model = Net(nnx.Rngs(0), width)
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    return model


@functools.cache
def qnet(scaling="token"):
    return nvfp4jax.quantize_model(net(), nvfp4jax.Rule("up", scaling=scaling))


@functools.cache
def layer(kind):
    rngs = nnx.Rngs(0)
    return {
        "linear": lambda: nnx.Linear(32, 16, param_dtype=BF16, rngs=rngs),
        "general": lambda: nnx.LinearGeneral((2, 16), (4, 4), axis=(-2, -1), param_dtype=BF16, rngs=rngs),
        "einsum": lambda: nnx.Einsum("btd,dnh->btnh", (32, 2, 8), param_dtype=BF16, rngs=rngs),
        "experts": lambda: nvfp4jax.Experts(2, 32, 16, param_dtype=BF16, rngs=rngs),
        "norm": lambda: nvfp4jax.layers.RMSNorm(32, 1e-6, param_dtype=BF16),
    }[kind]()


@functools.cache
def qlayer(kind):
    cls = {"linear": nvfp4jax.NVFP4Linear, "general": nvfp4jax.NVFP4LinearGeneral, "einsum": nvfp4jax.NVFP4Einsum, "experts": nvfp4jax.NVFP4Experts}[kind]
    return cls.from_float(layer(kind), name=f"the/{kind}", scaling="tensor")


_quantize_weight = jax.jit(nvfp4jax.ops.quantize_weight)


@functools.cache
def weights(*shape):
    return dataclasses.replace(_quantize_weight(rand(*shape)), source=None)


@functools.cache
def gate_up():
    w = weights(2, 2 * 16, 32)
    return nvfp4jax.NVFP4Array(w.packed.reshape(2, 2, 16, 16), w.scale.reshape(2, 2, 16, 2), w.global_scale[..., None])


ROOT: list[Path] = []  # a folder of the test run


@functools.cache
def folder(kind: str) -> Path:
    path = ROOT[0] / kind
    config = folders.small_config(num_hidden_layers=1, mlp_only_layers=[0])
    if kind == "float":
        folders.write(path, config, folders.small_weights(config))
    elif kind == "packed":
        convert.quantize_folder(folder("float"), path)
    elif kind == "saved":
        checkpoint.save_model(path, qnet(), {"any": "json"})
    elif kind == "steps":
        reload.publish(path, 1, qnet(), {"any": "json"})
    elif kind == "file":
        path.write_text("x")
    elif kind == "empty":
        path.mkdir()
    return path


def fresh(name="new") -> Path:
    """A path where nothing is."""
    number = sum(1 for _ in ROOT[0].iterdir())
    return ROOT[0] / f"{name}-{number}"


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    ROOT[:] = [tmp_path_factory.mktemp("misuse")]


# --- wrong values that many arguments share ----------------------------------------------------------------------------

SCALING = ["tokn", 3, ["token"], jnp.float32(1)]
FOUR_OVER_SIX = ["mze", True, 4]
IMPLEMENTATION = ["hoper", 3, (), ("xla", "hoper"), (None,), "hopper"]
NOT_FLOAT = ["text", None, 3, Of(lambda x: np.asarray(x).tolist(), "list"), Of(lambda x: jnp.ones(x.shape, jnp.int32), "int"), Of(lambda x: jnp.ones(x.shape, bool), "bool"),
             Of(lambda x: jnp.ones(x.shape, jnp.complex64), "complex")]  # fmt: skip
K_OF_24 = [Of(lambda x: x[..., :24], "K=24"), Of(lambda x: x[..., :0], "K=0")]
OTHER_K = [Of(lambda x: x[..., : x.shape[-1] // 2], "half K")]
NO_AXIS = [jnp.bfloat16(1)]
VALID = ["text", True, [True, False], Of(lambda v: jnp.where(v, 0.0, -1e9), "additive"), Of(lambda v: v.astype(jnp.int32), "int"), Of(lambda v: v[..., :-1], "short"),
         Of(lambda v: v[None], "an axis more")]  # fmt: skip
SIZES = ["text", 16, None, [8, 8], Of(lambda s: s[:1], "short"), Of(lambda s: s.astype(jnp.float32), "float"), Of(lambda s: s[None], "an axis more")]
OUT_DTYPE = ["flaot32", 3, "int32", jnp.uint8, True]
RESIDUAL = ["text", 3, [1.0], Of(lambda r: r[:, :-1], "narrow"), Of(lambda r: r[:-1], "short"), Of(lambda r: r.astype(jnp.int32), "int")]
PACKED = ["text", None, 3, Of(lambda w: w.packed, "codes alone"), Of(lambda w: jnp.ones(w.shape, jnp.int32), "int")]
MODULES = ["text", None, 3, {}, nnx.Linear]
FLAG = ["yes", 1, None]
PATHS = [3, None, "", b"x", ["x"], Of(lambda p: ROOT[0] / "absent" / "x", "absent"), Of(lambda p: folder("file"), "a file")]
NEW_PATHS = [3, None, "", b"x", ["x"], Of(lambda p: folder("file"), "there already"), Of(lambda p: folder("file") / "below", "under a file")]
READ_DTYPE = ["flaot32", 3, "int8", None, jnp.uint8]
RULES = ["token", 3, ["token"], [None], {}]
X = lambda: rand(4, 32)
ROWS = lambda: jnp.ones(4, bool)
ROUTE = lambda: routing.route(jnp.zeros((4, 1), jnp.int32), 2)


def activation(call, **arrays):
    """The row of an operation that makes an activation."""
    good = lambda: {name: make() for name, make in arrays.items()} | dict(scaling="token", valid=ROWS(), implementation="xla", name="the_layer")
    return Row(
        call,
        good,
        {name: NOT_FLOAT + K_OF_24 + NO_AXIS for name in arrays} | dict(scaling=[*SCALING, "static", "delayed"], valid=VALID, implementation=IMPLEMENTATION),
        names=dict.fromkeys((*arrays, "valid", "implementation"), "the_layer"),
        free=dict(name=LABEL),
    )


def extended(row: Row, **changes) -> Row:
    good = changes.pop("good", dict)
    return dataclasses.replace(row, good=lambda: row.good() | good(), wrong=row.wrong | changes.pop("wrong", {}), **changes)


PRODUCT = dict(scaling=[*SCALING, "static"], valid=VALID, out_dtype=OUT_DTYPE, implementation=IMPLEMENTATION)
PRODUCT_GOOD = lambda: dict(scaling="tensor", valid=ROWS(), out_dtype=None, implementation="xla", name="the_layer")
PRODUCT_NAMES = dict(valid="the_layer", implementation="the_layer")
BAD_X = NOT_FLOAT + K_OF_24 + OTHER_K + NO_AXIS
LINEN = dict(precision=["highest", jax.lax.Precision.HIGHEST, 3], preferred_element_type=OUT_DTYPE, scaling=[*SCALING, "static", "delayed"],
             weight_four_over_six=FOUR_OVER_SIX, implementation=IMPLEMENTATION)  # fmt: skip
LINEN_GOOD = lambda: dict(precision=None, scaling="token", weight_four_over_six=None, implementation="xla", name="the_layer")
LINEN_NAMES = dict(implementation="the_layer", preferred_element_type="out_dtype", weight_four_over_six="four_over_six")


def from_float(kind, cls):
    other = "linear" if kind != "linear" else "experts"
    return Row(
        cls.from_float,
        lambda: dict(layer=layer(kind), name="the/layer", scaling="token", weight_four_over_six=None, implementation=None),
        dict(layer=[*MODULES, Of(lambda _: layer(other), "another layer"), Of(lambda _: layer("norm"), "a norm"), Of(lambda _: qlayer(kind), "swapped already")],
             scaling=SCALING, weight_four_over_six=FOUR_OVER_SIX, implementation=IMPLEMENTATION[:-1]),
        names=dict.fromkeys(("layer", "scaling", "weight_four_over_six"), "the/layer"),
        free=dict(name=LABEL),
    )  # fmt: skip


def layer_call(kind, shape, lead, cls):
    residual = dict(residual=RESIDUAL) if kind == "linear" else {}
    return Row(
        lambda **given: qlayer(kind)(**given),
        lambda: dict(inputs=rand(*shape), valid=jnp.ones(lead, bool)) | ({"residual": rand(4, 16)} if residual else {}),
        dict(inputs=[*NOT_FLOAT, *OTHER_K, *NO_AXIS], valid=VALID) | residual,
        names=dict(inputs=f"the/{kind}", valid=f"the/{kind}"),
        free=dict(out_sharding="jax judges shardings") | (dict(einsum_str="None, or refused") if kind == "einsum" else {}),
        of=cls.__call__,
    )


def valid_rows(mask):
    with nvfp4jax.valid_rows(mask):
        qlayer("linear")(rand(4, 32))


def registered(module_type, convert):
    nvfp4jax.register(module_type)(convert)
    del nvfp4jax.layers.CONVERTERS[module_type]


IDS = lambda: np.array([[1, 2, 3, 4]])
TELEMETRY = lambda: telemetry.read(telemetry.observed(qnet()))
GENERATE = lambda: dict(
    model=qnet(), input_ids=IDS(), attention_mask=np.ones((1, 4), bool), max_new_tokens=2, temperature=0.5, top_k=4, top_p=0.9, key=jax.random.key(0),
    min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={3: 1.0}, num_samples=1, stop_tokens=(), pad_id=0, top_logprobs=2, telemetry=False,
    return_experts=False, cache_length=None, cache_dtype=None, weights=None, swap_every=2, on_tokens=None, rows_in_flight=None, progress=False,
)  # fmt: skip


class Letters:
    """A tokenizer: a is 1, b is 2, ..."""

    def encode(self, texts):
        return [[ord(letter) - 96 for letter in text] for text in texts]

    def decode(self, rows):
        return ["".join(chr(96 + token) for token in row) for row in rows]


tunix_rollout = tunix_stand_in.rollout_module()


class TunixLetters(Letters):
    """The same, as tunix adapts a tokenizer."""

    pad_id, eos_id, bos_id = (lambda self: 0), (lambda self: 15), (lambda self: 0)
    encode, decode = (lambda self, text: [ord(letter) - 96 for letter in text]), (lambda self, ids: "".join(chr(96 + i) for i in ids))
    dedup_bos_ids = lambda self, ids: ids


@functools.cache
def engine():
    with jax.numpy_dtype_promotion("standard"):
        return tunix_rollout.NVFP4Rollout(tunix_rollout.TunixModel(net()), TunixLetters(), None, tunix_stand_in.RolloutConfig(), nvfp4jax.Rule("model/up"))


class Source:
    """A weight source; of another model, where it is asked to."""

    active_step = -1

    def __init__(self, state=None):
        self.state = state

    def take(self):
        state, self.state = self.state, None
        return None if state is None else reload.Weights(1, state)


def without(state, *path):
    """A pure dict of the state, a leaf left out."""
    tree = nnx.to_pure_dict(state)
    node = tree
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]
    return tree


def changed(state, path, f):
    tree = nnx.to_pure_dict(state)
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = f(node[path[-1]])
    return tree


def deleted(array):
    array = jnp.copy(array)
    array.delete()
    return array


STATE = [
    "text", None, 3, [], {},
    Of(lambda s: without(nnx.state(s), "up", "kernel"), "a leaf is missing"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: k.reshape(16, -1)), "misshapen"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: k.astype(jnp.int8)), "int8"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: k > 0), "bool"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: k.astype(jnp.float8_e4m3fn)), "float8"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: "x"), "no array"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: jax.ShapeDtypeStruct(k.shape, k.dtype)), "a shape"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: deleted(k)), "deleted"),
    Of(lambda s: changed(nnx.state(s), ("up", "kernel"), lambda k: k.at[3, 5].set(jnp.inf)), "infinite"),
    Of(lambda s: changed(nnx.state(s), ("embed", "embedding"), lambda k: deleted(k)), "another leaf deleted"),
    Of(lambda s: changed(nnx.state(s), ("embed", "embedding"), lambda k: k.at[3, 5].set(jnp.nan)), "another leaf with NaN"),
    Of(lambda s: changed(nnx.state(s), ("embed", "embedding"), lambda k: np.asarray(k.at[3, 5].set(jnp.nan))), "another leaf of numpy's with NaN"),
    Of(lambda s: changed(nnx.state(s), ("embed", "embedding"), lambda k: jnp.full(k.shape, 3.4e38, jnp.float32)), "another leaf beyond bfloat16"),
    Of(lambda s: changed(nnx.state(s), ("embed", "embedding"), lambda k: k.astype(jnp.float8_e4m3fn)), "another leaf in float8"),
    Of(lambda s: changed(nnx.state(s), ("embed", "embedding"), lambda k: k.astype(jnp.int32)), "another leaf of ints"),
    Of(lambda s: nnx.to_pure_dict(nnx.state(s)) | {"rngs": {"kernel": jnp.ones(3)}}, "floats among random states"),
    Of(lambda s: nnx.to_pure_dict(nnx.state(s)) | {"more": jnp.ones(3)}, "a leaf too many"),
    Of(lambda s: nnx.to_pure_dict(nnx.state(s)) | {"up": jnp.ones(3)}, "a leaf for a layer"),
]  # fmt: skip
STATE_NAMES = r"state|weights in memory|\bup\b|\bmore\b|\bembed\b|\brngs\b"
REQUANTIZE = dict(
    good=lambda: dict(state=net(), qmodel=qnet(), merge_lora=False),
    wrong=dict(state=STATE, qmodel=[*MODULES, Of(lambda _: net(), "a float model")], merge_lora=["yes", None, float("nan"), [1]]),
    names=dict(state=STATE_NAMES),
)
HISTORY = Of(lambda h: h[:3], "short")

ROUTES = ["text", 3, Of(lambda r: tuple(r), "a plain tuple"), Of(lambda r: r._replace(group_sizes=r.group_sizes[:1]), "of fewer experts"),
          Of(lambda r: r._replace(row_of_slot=r.row_of_slot[:2], token_of_row=r.token_of_row[:2]), "of fewer tokens")]  # fmt: skip
EXPERTS_CALL = dict(
    x=[*NOT_FLOAT, *OTHER_K, *NO_AXIS],
    expert_ids=["text", None, Of(lambda i: i.astype(jnp.float32), "float"), Of(lambda i: i[:2], "short")],
    weights=["text", None, Of(lambda w: w.astype(jnp.int32), "int"), Of(lambda w: w[:2], "short")],
    valid=VALID,
    residual=RESIDUAL,
    route=ROUTES,
)  # fmt: skip
READERS = ["text", None, 3, (), ["text"], [None], Of(lambda r: r[0], "a layer alone")]

TABLE: dict[str, Row] = {
    # the modes
    "Token": Row(nvfp4jax.Token, lambda: dict(four_over_six="mse"), dict(four_over_six=FOUR_OVER_SIX)),
    "PerExpert": Row(nvfp4jax.PerExpert, lambda: dict(four_over_six="mse"), dict(four_over_six=FOUR_OVER_SIX)),
    "Tensor": Row(
        nvfp4jax.Tensor, lambda: dict(pow2=True, axes=("data",), four_over_six=None),
        dict(pow2=FLAG, axes=["data", 3, [3], (None,), None], four_over_six=FOUR_OVER_SIX),
    ),  # fmt: skip
    "Static": Row(
        nvfp4jax.Static, lambda: dict(scale=jnp.float32(1), four_over_six=None),
        dict(scale=["text", 1.0, jnp.int32(1), [1.0]], four_over_six=FOUR_OVER_SIX),
    ),  # fmt: skip
    "Delayed": Row(
        nvfp4jax.Delayed, lambda: dict(history=jnp.zeros(16), four_over_six=None),
        dict(history=["text", jnp.zeros(16, int), 3, HISTORY], four_over_six=FOUR_OVER_SIX),
    ),  # fmt: skip
    "valid_rows": Row(valid_rows, lambda: dict(mask=ROWS()), dict(mask=VALID), names=dict(mask="valid_rows")),
    # the operations
    "NVFP4Array": Row(
        nvfp4jax.NVFP4Array, lambda: dict(packed=jnp.zeros((4, 16), jnp.uint8), scale=jnp.ones((4, 2), jnp.float8_e4m3fn), global_scale=jnp.float32(1), layer=None, source=None),
        dict(packed=["text", None, jnp.zeros((4, 16), jnp.int8), jnp.zeros((4, 32), jnp.uint8), jnp.zeros((), jnp.uint8)],
             scale=["text", None, jnp.ones((4, 2)), jnp.ones((4, 3), jnp.float8_e4m3fn), jnp.ones((3, 2), jnp.float8_e4m3fn)],
             global_scale=["text", None, jnp.int32(1), jnp.ones(3), jnp.ones((1, 1, 1))], layer=["text", 1.5, jnp.float32(1), jnp.zeros(2, jnp.int32)],
             source=["text", 3, jnp.ones((4, 16)), jnp.ones((4, 32), jnp.int32)]),
        names=dict(packed="scale"),
    ),  # fmt: skip
    "quantize": Row(
        nvfp4jax.quantize, lambda: dict(x=X(), scaling="tensor", amax=jnp.float32(3), valid=ROWS(), implementation="xla"),
        dict(x=["text", None, 3, 3.5, *NOT_FLOAT[4:], *K_OF_24, *NO_AXIS], scaling=[*SCALING, None, "expert", "static", "delayed", Static(jnp.ones(3))],
             amax=["text", jnp.int32(1), jnp.ones(3), jnp.ones((4, 32)), [1.0], -1.0, float("nan")], valid=VALID, implementation=IMPLEMENTATION),
        names=dict(implementation="quantize"),
    ),  # fmt: skip
    "quantize_activation": extended(
        activation(nvfp4jax.quantize_activation, x=X), good=lambda: dict(scaling="expert", group_sizes=jnp.array([1, 3], jnp.int32)),
        wrong=dict(group_sizes=[s for s in SIZES if s is not None and not (isinstance(s, Of) and s.label == "short")], scaling=SCALING),
    ),  # fmt: skip
    "rms_norm": extended(
        activation(nvfp4jax.rms_norm, x=X), good=lambda: dict(weight=rand(32), eps=1e-6),
        wrong=dict(weight=[*NOT_FLOAT, *OTHER_K, Of(lambda w: w[None], "an axis more")], eps=["text", None, float("nan"), -1e-6, [1e-6]]),
    ),  # fmt: skip
    "silu_mul": extended(activation(nvfp4jax.silu_mul, gate=X, up=X), wrong=dict(up=[*NOT_FLOAT, *OTHER_K, Of(lambda x: x[:2], "short")])),
    "matmul": Row(
        nvfp4jax.matmul, lambda: dict(x=X(), w=weights(16, 32), bias=rand(16), residual=rand(4, 16)) | PRODUCT_GOOD(),
        dict(x=[*BAD_X, Of(lambda x: nvfp4jax.quantize(x[:, :16]), "another K, packed"), Of(lambda x: nvfp4jax.quantize_activation(x[:, :16]), "another K, made")],
             w=[*PACKED, Of(lambda w: weights(2, 16, 32), "three axes"), Of(lambda w: rand(16, 24), "K=24"), Of(lambda w: rand(16, 48), "another K")],
             residual=RESIDUAL, bias=[*(v for v in NOT_FLOAT if v is not None), Of(lambda b: b[:3], "short"), Of(lambda b: b[None], "an axis more")]) | PRODUCT,
        names=PRODUCT_NAMES | dict(w="weight"), free=dict(name=LABEL),
    ),  # fmt: skip
    "grouped_matmul": Row(
        nvfp4jax.grouped_matmul, lambda: dict(x=X(), w=weights(2, 16, 32), group_sizes=jnp.array([1, 3], jnp.int32)) | PRODUCT_GOOD(),
        dict(x=[*BAD_X, Of(lambda x: x[None], "three axes")], w=[*PACKED, Of(lambda w: weights(16, 32), "two axes"), Of(lambda w: rand(2, 16, 48), "another K")], group_sizes=SIZES) | PRODUCT,
        names=PRODUCT_NAMES | dict(w="weight"), free=dict(name=LABEL),
    ),  # fmt: skip
    "grouped_swiglu": Row(
        nvfp4jax.grouped_swiglu, lambda: dict(x=X(), w=gate_up(), group_sizes=jnp.array([1, 3], jnp.int32)) | PRODUCT_GOOD(),
        dict(x=[*BAD_X, Of(lambda x: x[None], "three axes")],
             w=[*PACKED, Of(lambda w: weights(2, 32, 32), "three axes"), Of(lambda w: rand(2, 2, 16, 48), "another K"), Of(lambda w: rand(2, 3, 16, 32), "three halves")],
             group_sizes=SIZES) | PRODUCT,
        names=PRODUCT_NAMES | dict(w="weight"), free=dict(name=LABEL),
    ),  # fmt: skip
    "experts": Row(
        nvfp4jax.experts,
        lambda: dict(x=X(), expert_ids=jnp.zeros((4, 1), jnp.int32), weights=jnp.ones((4, 1)), gate_up=gate_up(), down=weights(2, 32, 16), residual=X(), route=ROUTE()) | PRODUCT_GOOD(),
        dict(x=[*BAD_X, Of(lambda x: x[None], "three axes"), Of(lambda x: x[:2], "fewer rows")], residual=RESIDUAL, route=ROUTES,
             expert_ids=["text", None, 3, Of(lambda i: i.astype(jnp.float32), "float"), Of(lambda i: i[:2], "short"), Of(lambda i: i[:, 0], "an axis less")],
             weights=["text", None, 3, Of(lambda w: w.astype(jnp.int32), "int"), Of(lambda w: w[:2], "short"), Of(lambda w: w[:, 0], "an axis less")],
             gate_up=[*PACKED, Of(lambda w: weights(2, 32, 32), "three axes"), Of(lambda w: weights(2, 2, 16, 48), "another K")],
             down=[*PACKED, Of(lambda w: weights(32, 16), "two axes"), Of(lambda w: weights(3, 32, 16), "more experts"), Of(lambda w: weights(2, 16, 32), "turned"), Of(lambda w: weights(2, 48, 16), "another width")],
             ) | PRODUCT | dict(scaling=[*SCALING, "static", ("token",), ("token", "tokn")]),
        names=PRODUCT_NAMES | dict(x="expert_ids"), free=dict(name=LABEL),
    ),  # fmt: skip
    # the layers
    "Experts": Row(
        nvfp4jax.Experts, lambda: dict(num_experts=2, hidden=32, intermediate=16, dtype=None, param_dtype=BF16, rngs=nnx.Rngs(0)),
        dict(num_experts=["text", 0, -1, 2.5, None], hidden=["text", 0, 2.5, None], intermediate=["text", 0, 2.5, None], dtype=OUT_DTYPE, param_dtype=OUT_DTYPE, rngs=[None, 3, "text"]),
        of=nvfp4jax.Experts.__init__,
    ),  # fmt: skip
    "Experts.__call__": Row(
        lambda **given: layer("experts")(**given), lambda: dict(x=X(), expert_ids=jnp.zeros((4, 1), jnp.int32), weights=jnp.ones((4, 1)), valid=ROWS(), residual=X(), route=ROUTE()),
        EXPERTS_CALL, of=nvfp4jax.Experts.__call__,
    ),  # fmt: skip
    "NVFP4Linear": from_float("linear", nvfp4jax.NVFP4Linear),
    "NVFP4LinearGeneral": from_float("general", nvfp4jax.NVFP4LinearGeneral),
    "NVFP4Einsum": from_float("einsum", nvfp4jax.NVFP4Einsum),
    "NVFP4Experts": from_float("experts", nvfp4jax.NVFP4Experts),
    "NVFP4Linear.__call__": layer_call("linear", (4, 32), (4,), nvfp4jax.NVFP4Linear),
    "NVFP4LinearGeneral.__call__": layer_call("general", (4, 2, 16), (4,), nvfp4jax.NVFP4LinearGeneral),
    "NVFP4Einsum.__call__": layer_call("einsum", (2, 3, 32), (2, 3), nvfp4jax.NVFP4Einsum),
    "NVFP4Experts.__call__": Row(
        lambda **given: qlayer("experts")(**given),
        lambda: dict(x=X(), expert_ids=jnp.zeros((4, 1), jnp.int32), weights=jnp.ones((4, 1)), valid=ROWS(), residual=X(), route=ROUTE()),
        EXPERTS_CALL, names=dict.fromkeys(EXPERTS_CALL, "the/experts"), of=nvfp4jax.NVFP4Experts.__call__,
    ),  # fmt: skip
    "feed": Row(
        nvfp4jax.feed, lambda: dict(x=X(), readers=(qlayer("linear"),), valid=ROWS()),
        dict(x=[*NOT_FLOAT, *OTHER_K, *NO_AXIS], readers=READERS, valid=VALID), names=dict(x="the/linear", valid="the/linear"),
    ),  # fmt: skip
    "feed_norm": Row(
        nvfp4jax.feed_norm, lambda: dict(norm=layer("norm"), x=X(), readers=(qlayer("linear"),), valid=ROWS()),
        dict(norm=[*MODULES, Of(lambda _: layer("linear"), "a linear layer"), Of(lambda _: nnx.RMSNorm(32, rngs=nnx.Rngs(0)), "flax's")],
             x=[*NOT_FLOAT, *OTHER_K, *NO_AXIS], readers=READERS, valid=VALID), names=dict(x="the/linear", valid="the/linear"),
    ),  # fmt: skip
    "feed_gated": Row(
        nvfp4jax.feed_gated, lambda: dict(gate=X(), up=X(), readers=(qlayer("linear"),), valid=ROWS()),
        dict(gate=[*NOT_FLOAT, *OTHER_K], up=[*NOT_FLOAT, *OTHER_K], readers=READERS, valid=VALID), names=dict(gate="up", valid="the/linear"),
    ),  # fmt: skip
    "register": Row(
        registered, lambda: dict(module_type=nnx.BatchNorm, convert=lambda layer, **options: layer),
        dict(module_type=["Linear", None, 3, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), int], convert=["text", None, 3]),
    ),  # fmt: skip
    # whole models
    "Rule": Row(
        nvfp4jax.Rule, lambda: dict(module_path=".*", scaling="token", weight_four_over_six=None, skip=False, implementation=None),
        dict(module_path=[3, None, "(", ["a"]], scaling=SCALING, weight_four_over_six=FOUR_OVER_SIX, skip=FLAG, implementation=IMPLEMENTATION[:-1]),
    ),  # fmt: skip
    "quantize_model": Row(
        nvfp4jax.quantize_model, lambda: dict(model=net(), rules=[nvfp4jax.Rule("up")]),
        dict(model=[*MODULES, Of(lambda _: qnet(), "swapped already"), Of(lambda _: nnx.BatchNorm(4, rngs=nnx.Rngs(0)), "nothing to swap")],
             rules=[*RULES, [nvfp4jax.Rule("no/such/layer")], [nvfp4jax.Rule("up"), nvfp4jax.Rule("up")]]),
        names=dict(model="rule|the model", rules="[Rr]ule"),
    ),  # fmt: skip
    "describe": Row(nvfp4jax.describe, lambda: dict(qmodel=qnet()), dict(qmodel=MODULES)),
    "quantize_params": Row(nvfp4jax.quantize_params, **REQUANTIZE),
    "straight_through": Row(lambda state, qmodel, merge_lora: nvfp4jax.straight_through(qmodel, state, merge_lora=merge_lora), **REQUANTIZE),
    "calibrate": Row(
        nvfp4jax.calibrate, lambda: dict(qmodel=qnet("static"), batches=[IDS()], headroom=1.5, float_model=net()),
        dict(qmodel=[*MODULES, Of(lambda _: qnet(), "no static layer"), Of(lambda _: net(), "a float model")],
             batches=["text", None, 3, [], ["text"], [3], [np.ones((1, 4))], [np.full((1, 4), 99)], np.array([1, 2, 3]), IDS(), [(IDS(), np.ones((1, 3)))],
                      [(IDS(), np.ones((1, 4)), 3)], [(IDS(), np.zeros((1, 4)))]],
             headroom=["text", None, 0.5, float("nan"), float("inf"), [2.0], True], float_model=["text", 3, {}, Of(lambda _: layer("linear"), "another model"), Of(lambda _: qnet(), "a swapped one")]),
    ),  # fmt: skip
    "generate": Row(
        nvfp4jax.generate, GENERATE,
        dict(
            model=[*MODULES, Of(lambda _: layer("linear"), "no decoder")],
            input_ids=["text", None, 3, [1, 2, 3, 4], np.ones((1, 4)), [[1, 2, 3, 16]], [[1, 2, 3, -1]], np.ones((1, 0), int), [[1, 2], [1]]],
            attention_mask=["text", 3, np.ones((1, 3), bool), np.zeros((1, 4), bool), np.array([[0.0, 0.0, -1e9, 0.0]]), np.full((1, 4), 2)],
            max_new_tokens=["text", None, 0, -1, 2.5, True, [2, 2], [0], [2.5], np.ones((1, 2), int), np.ones(1)],
            temperature=["text", None, -1.0, float("nan"), float("inf"), [0.5], True],
            min_p=["text", -0.1, 1.5, float("nan"), [0.1], True], repetition_penalty=["text", None, 0.0, -1.0, float("nan"), float("inf"), [1.0]],
            presence_penalty=["text", None, float("nan"), float("inf"), [1.0]], logit_bias=["text", 3, [3], {16: 1.0}, {-1: 1.0}, {"a": 1.0}, {3: float("nan")}, {3: "x"}],
            top_logprobs=["text", None, -1, 2.5, True, 17], on_tokens=["text", 3, [1]],
            top_k=["text", 0, -1, 2.5, True], top_p=["text", 0.0, 1.5, float("nan"), [0.5], True],
            key=["text", None, 0, jnp.float32(1), jnp.zeros(3, jnp.uint32), Of(lambda k: jax.random.split(k), "two keys for one prompt")],
            num_samples=["text", None, 0, 2.5, True], stop_tokens=["text", None, 5, [2.5], ["a"], [None]], pad_id=["text", None, 2.5, 2**40],
            return_experts=[*FLAG, True], cache_length=["text", 2, 2.5, -1, True], cache_dtype=[jnp.float8_e5m2, jnp.float8_e4m3fn, *(d for d in READ_DTYPE if d is not None)],
            telemetry=FLAG, weights=["text", 3, {}, Of(lambda _: Source(nnx.state(net())), "another model's")], swap_every=["text", None, 0, 2.5, True],
            rows_in_flight=["text", 0, -1, 2.5, True, [2]], progress=FLAG,
        ),
        names=dict(cache_length="cache_length", weights="weights"),
    ),  # fmt: skip
    "generate_text": Row(
        nvfp4jax.generate_text, lambda: dict(model=qnet(), tokenizer=Letters(), prompts=["abc"], max_new_tokens=2, stop_strings=("b",), on_text=lambda row, text: None),
        dict(model=[*MODULES, Of(lambda _: layer("linear"), "no decoder")], tokenizer=["text", None, 3, {}], prompts=["abc", None, 3, [3], [None], [], [""]],
             max_new_tokens=["text", None, 0, 2.5, True], stop_strings=["b", None, 3, (3,), ("",)], on_text=["text", 3, [1]]),
        names=dict(prompts="prompt"),
    ),  # fmt: skip
    "logprobs": Row(
        nvfp4jax.logprobs, lambda: dict(model=qnet(), input_ids=IDS(), attention_mask=np.ones((1, 4), bool), temperature=0.5, cache_dtype=None),
        dict(model=MODULES, cache_dtype=[jnp.float8_e5m2, jnp.float8_e4m3fn, *(d for d in READ_DTYPE if d is not None)], input_ids=["text", None, 3, [1, 2, 3, 4], np.ones((1, 4)), [[1, 2, 3, 16]], [[1, 2], [1]]],
             attention_mask=["text", 3, np.ones((1, 3), bool), np.zeros((1, 4), bool)], temperature=["text", None, 0, -1.0, float("nan"), float("inf"), [0.5], True, jnp.ones(2), jnp.int32(1)]),
    ),  # fmt: skip
    "telemetry.observed": Row(
        telemetry.observed, lambda: dict(qmodel=qnet()), dict(qmodel=[*MODULES, Of(lambda _: net(), "a float model"), Of(lambda _: layer("linear"), "a float layer")])
    ),
    "telemetry.read": Row(telemetry.read, lambda: dict(model=telemetry.observed(qnet())), dict(model=[*MODULES, Of(lambda _: qnet(), "not observed")])),
    "Telemetry.summary": Row(lambda **given: TELEMETRY().summary(**given), lambda: dict(worst=3), dict(worst=["text", None, -1, 2.5, True]), of=telemetry.Telemetry.summary),
    "Telemetry.plot": Row(
        lambda **given: TELEMETRY().plot(**given), lambda: dict(to=fresh("plot").with_suffix(".svg")),
        dict(to=[3, b"x", ["x"], "", "plot.jpg", Of(lambda p: ROOT[0] / "absent" / "x.png", "absent"), Of(lambda p: folder("empty"), "a folder")]), of=telemetry.Telemetry.plot,
    ),  # fmt: skip
    # Linen
    "linen.dot_general": Row(
        linen.dot_general,
        lambda: dict(lhs=X(), rhs=rand(32, 16), dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=None) | LINEN_GOOD(),
        dict(lhs=BAD_X, rhs=[*NOT_FLOAT, *NO_AXIS, Of(lambda w: w[:16], "another K"), Of(lambda w: w[:24], "K=24")],
             dimension_numbers=["text", None, 3, (), ((1,), (0,)), (((1,), (1,)), ((), ())), (((2,), (0,)), ((), ())), (((1.0,), (0,)), ((), ())), (((1,), (0, 1)), ((), ())),
                                (((1, 1), (0, 0)), ((), ())), (((), ()), ((), ())), (((1,), (0,)), ((0,), (1,)))]) | LINEN,
        names=LINEN_NAMES | dict(dimension_numbers="batch axes"), free=dict(name=LABEL),
    ),  # fmt: skip
    "linen.einsum": Row(
        linen.einsum, lambda: dict(einsum_str="td,dn->tn", inputs=X(), kernel=rand(32, 16), preferred_element_type=None) | LINEN_GOOD(),
        dict(einsum_str=["text", None, 3, "td->t", "td,dn", "td,td->td", "btd,dn->btn", "td,dn,nk->tk", "td,dn->tnz", "td,dn->"],
             inputs=[*BAD_X, Of(lambda x: x[None], "an axis more")], kernel=[*NOT_FLOAT, *NO_AXIS, Of(lambda w: w[:16], "another K"), Of(lambda w: w[None], "an axis more")]) | LINEN,
        names=LINEN_NAMES | dict(einsum_str="einsum|fit"), free=dict(name=LABEL),
    ),  # fmt: skip
    "linen.ragged_dot": Row(
        linen.ragged_dot, lambda: dict(lhs=X(), rhs=rand(2, 32, 16), group_sizes=jnp.array([1, 3], jnp.int32), preferred_element_type=None) | LINEN_GOOD(),
        dict(lhs=[*BAD_X, Of(lambda x: x[None], "three axes")], rhs=[*NOT_FLOAT, *NO_AXIS, Of(lambda w: w[0], "two axes"), Of(lambda w: w[:, :16], "another K"), Of(lambda w: w[:, :24], "K=24")],
             group_sizes=SIZES) | LINEN,
        names=LINEN_NAMES, free=dict(name=LABEL),
    ),  # fmt: skip
    # tunix
    "tunix_rollout.TunixModel": Row(tunix_rollout.TunixModel, lambda: dict(model=net()), dict(model=[*MODULES, Of(lambda _: layer("linear"), "no decoder")]),
                                    of=tunix_rollout.TunixModel.__init__),
    "tunix_rollout.NVFP4Rollout": Row(
        tunix_rollout.NVFP4Rollout,
        lambda: dict(rollout_actor=tunix_rollout.TunixModel(net()), tokenizer=TunixLetters(), mesh=None, rollout_config=tunix_stand_in.RolloutConfig(), rules=nvfp4jax.Rule("model/up"),
                     lora_scale=2.0),
        dict(rollout_actor=[*MODULES, Of(lambda _: net(), "neither tunix's nor wrapped")], tokenizer=["text", None, 3, {}, Letters()], mesh=["text", 3, ["data"]],
             rollout_config=["text", None, 3, {}], rules=[*(r for r in RULES if r != {}), [nvfp4jax.Rule("no/such/layer")]], lora_scale=["text", float("nan"), [1.0], True]),
        names=dict(rules="[Rr]ule"), of=tunix_rollout.NVFP4Rollout.__init__,
    ),  # fmt: skip
    "tunix_rollout.generate": Row(
        lambda **given: engine().generate(**given), lambda: dict(prompts=["abc", "abc"], rollout_config=tunix_stand_in.RolloutConfig()),
        dict(prompts=["abc", None, 3, [3], [None], []],
             rollout_config=["text", None, 3, {}, *(tunix_stand_in.RolloutConfig(**{n: v}) for n, v in (("max_tokens_to_generate", 0), ("temperature", "hot"), ("top_p", 2.0), ("top_k", 0),
                             ("max_prompt_length", "x"), ("seed", "x"), ("eos_tokens", ["a"])))]),
        names=dict(rollout_config="max_new_tokens|temperature|top_p|top_k|seed|stop_tokens"), of=lambda prompts, rollout_config: None,
    ),  # fmt: skip
    "tunix_rollout.get_per_token_logps": Row(
        lambda **given: engine().get_per_token_logps(**given), lambda: dict(prompt_tokens=jnp.asarray([[1, 2]]), completion_tokens=jnp.asarray([[3, 4]])),
        dict(prompt_tokens=["text", None, 3, Of(lambda t: t[0], "an axis less"), Of(lambda t: jnp.ones((1, 2)), "floats"), Of(lambda t: jnp.ones((2, 2), int), "more rows")],
             completion_tokens=["text", None, 3, Of(lambda t: t[0], "an axis less"), Of(lambda t: jnp.ones((1, 2)), "floats"), Of(lambda t: jnp.ones((2, 2), int), "more rows")]),
        names=dict(prompt_tokens="completion_tokens"), of=tunix_rollout.NVFP4Rollout.get_per_token_logps,
    ),  # fmt: skip
    "tunix_rollout.update_params": Row(
        lambda **given: engine().update_params(**given), lambda: dict(params=nnx.state(tunix_rollout.TunixModel(net()), nnx.Param)),
        dict(params=["text", None, 3, [], {}, Of(lambda s: nnx.state(net(), nnx.Param), "another model's"), Of(lambda s: nnx.state(qnet()), "another engine's")]),
        names=dict(params="state|weights in memory"), free=dict(filter_types="not needed"), of=tunix_rollout.NVFP4Rollout.update_params,
    ),  # fmt: skip
    # folders
    "load_model": Row(
        checkpoint.load_model, lambda: dict(directory=folder("packed"), dtype=BF16, scaling="token", scan_layers=False),
        dict(directory=[*PATHS, Of(lambda p: folder("empty"), "empty")], dtype=[d for d in READ_DTYPE if d is not None], scaling=SCALING, scan_layers=FLAG),
        names=dict(directory="absent|file|empty|directory"), free=dict(rules="in huggingface.load_model's row", like="in the next row"),
    ),  # fmt: skip
    "load_model, like": Row(
        lambda directory, like: checkpoint.load_model(directory, like=like), lambda: dict(directory=folder("saved"), like=qnet()),
        dict(directory=[*PATHS, Of(lambda p: folder("empty"), "empty")], like=[m for m in MODULES if m is not None] + [Of(lambda _: net(), "the float model")]),
        names=dict(directory="absent|file|empty|directory", like="kernel"),
    ),  # fmt: skip
    "huggingface.load_model": Row(
        huggingface.load_model, lambda: dict(directory=folder("float"), dtype=BF16, scaling=None, scan_layers=False, rules=[nvfp4jax.Rule(".*up_proj")]),
        dict(directory=[*PATHS, Of(lambda p: folder("empty"), "empty")], dtype=READ_DTYPE, scaling=["token", *SCALING], scan_layers=FLAG, rules=RULES),
        names=dict(directory="absent|file|empty|directory", rules="[Rr]ule"),
    ),  # fmt: skip
    "saved_model.load_model": Row(
        saved_model.load_model, lambda: dict(path=folder("packed"), dtype=BF16, scaling="token", scan_layers=False),
        dict(path=[*PATHS, Of(lambda p: folder("empty"), "empty")], dtype=[d for d in READ_DTYPE if d is not None], scaling=[*SCALING, "static"], scan_layers=FLAG),
        names=dict(path="absent|file|empty|path"),
    ),  # fmt: skip
    "orbax.save": Row(
        orbax.save, lambda: dict(path=fresh(), state=nnx.state(qnet()), metadata={"a": 1}),
        dict(path=NEW_PATHS, state=["text", None, {}, {"a": "text"}, {"a": jnp.full(3, jnp.nan)}, {"a": jax.ShapeDtypeStruct((3,), BF16)}, Of(lambda s: {"a": deleted(jnp.ones(3))}, "deleted")], metadata=["text", None, 3, {"a": object()}, {1: object()}]),
        names=dict(path="new|file|path", state="a: (a value that is NaN|.* has been deleted|.* is a shape without values)"),
    ),  # fmt: skip
    "save_model": Row(
        checkpoint.save_model, lambda: dict(path=fresh(), model=qnet(), config={"any": "json"}, rules=None),
        dict(path=NEW_PATHS, model=MODULES, config=["text", 3, {"a": object()}], rules=[r for r in RULES if r != {}]),
        names=dict(path="new|file|path", config="config|metadata", rules="[Rr]ule"), free=dict(metadata="any JSON, by names of the caller's"),
    ),  # fmt: skip
    "orbax.read_folder": Row(orbax.read_folder, lambda: dict(path=folder("saved")), dict(path=PATHS), names=dict(path="absent|file|path")),
    "orbax.restore": Row(
        orbax.restore, lambda: dict(path=folder("saved"), abstract=nnx.state(qnet())),
        dict(path=PATHS, abstract=["text", None, {}, {"a": 3}, Of(lambda _: nnx.state(net()), "another model's")]), names=dict(path="absent|file|path", abstract="abstract|kernel"),
    ),  # fmt: skip
    "saved_model.restore_state": Row(
        saved_model.restore_state, lambda: dict(path=folder("saved"), model=qnet()),
        dict(path=PATHS, model=[*MODULES, Of(lambda _: net(), "another model")]), names=dict(path="absent|file|path", model="model|kernel"),
    ),  # fmt: skip
    "quantize_folder": Row(
        convert.quantize_folder,
        lambda: dict(source=folder("float"), save_dir=fresh(), selection=convert.Selection(), output="orbax", calibration=None, progress=lambda *done: None),
        dict(source=[*PATHS, Of(lambda p: folder("empty"), "empty")], save_dir=NEW_PATHS, selection=["text", None, 3, {}], output=["orbx", None, 3, ["orbax"]],
             calibration=["text", 3, [IDS()]], progress=["text", 3, None]),
        names=dict(source="absent|file|empty|source", save_dir="save_dir|file"),
    ),  # fmt: skip
    "Selection": Row(
        convert.Selection, lambda: dict(keep_first_n=1, keep_last_n=1, exclude=("a",), experts_only=False, four_over_six="mse", scaling="token"),
        dict(keep_first_n=["text", None, -1, 2.5, True], keep_last_n=["text", None, -1, 2.5, True], exclude=["a", 3, None, (3,), ("(",)], experts_only=FLAG,
             four_over_six=FOUR_OVER_SIX, scaling=[*SCALING, Static(jnp.float32(1)), Delayed(jnp.zeros(16))]),
    ),  # fmt: skip
    "Calibration": Row(
        convert.Calibration, lambda: dict(batches=[IDS()], headroom=1.0),
        dict(batches=["text", None, 3, [], np.array([1, 2, 3])], headroom=["text", None, 0.5, float("nan"), True]),
    ),  # fmt: skip
    "safetensors.read_folder": Row(safetensors.read_folder, lambda: dict(directory=folder("float")), dict(directory=PATHS), names=dict(directory="absent|file|directory")),
    "safetensors.read_header": Row(
        safetensors.read_header, lambda: dict(path=folder("float") / "model.safetensors"), dict(path=[*PATHS, Of(lambda p: folder("empty"), "a folder")]), names=dict(path="absent|file|empty|path"),
    ),  # fmt: skip
    "Tokenizer": Row(
        Tokenizer, lambda: dict(file=folder("file")), dict(file=[*PATHS[:-1], Of(lambda p: folder("empty"), "a folder")]), names=dict(file="absent|file|empty"),
    ),  # fmt: skip
    # steps
    "publish": Row(
        reload.publish, lambda: dict(directory=fresh(), step=1, model=qnet(), config={"any": "json"}, keep=5, rewind=False),
        dict(directory=[p for p in NEW_PATHS if not isinstance(p, Of)] + [Of(lambda p: folder("file"), "a file"), Of(lambda p: folder("file") / "below", "under a file")],
             step=["text", None, -1, 2.5, True, 10**18], model=MODULES, config=["text", 3, {"a": object()}], keep=["text", None, 0, 2.5, True], rewind=FLAG),
        names=dict(directory="directory|file", config="config|metadata"), free=dict(metadata="any JSON, by names of the caller's"),
    ),  # fmt: skip
    "steps": Row(reload.steps, lambda: dict(directory=folder("steps")), dict(directory=[p for p in PATHS if not isinstance(p, Of)])),
    "Reader": Row(
        reload.Reader, lambda: dict(directory=folder("steps"), model=qnet(), float_model=net(), poll_seconds=1.0, active_step=-1),
        dict(directory=[p for p in PATHS if not isinstance(p, Of)], model=MODULES,
             float_model=["text", 3, {}, Of(lambda _: layer("linear"), "another model")], poll_seconds=["text", None, 0, -1.0, float("nan"), float("inf"), [1.0], True],
             active_step=["text", None, 2.5, True]),
    ),  # fmt: skip
    "Reader.from_memory": Row(
        lambda **given: reload.Reader(folder("steps"), qnet()).from_memory(**given), lambda: dict(step=3, state=nnx.clone(net()), donate=False, rewind=False),
        dict(step=["text", None, 2.5, True, -1], state=STATE, donate=FLAG, rewind=FLAG), names=dict(state=STATE_NAMES), of=reload.Reader.from_memory,
    ),  # fmt: skip
    "Quantizer": Row(reload.Quantizer, lambda: dict(model=qnet()), dict(model=MODULES)),
    "Quantizer.__call__": Row(
        lambda **given: reload.Quantizer(qnet())(**given), lambda: dict(state=nnx.clone(net()), donate=False), dict(state=STATE, donate=FLAG), names=dict(state=STATE_NAMES),
        of=reload.Quantizer.__call__,
    ),  # fmt: skip
}


TAKE_ANY_NAME = {
    "publish": "what it does not know becomes metadata", "save_model": "what it does not know becomes metadata",
}  # fmt: skip

# Public names that no row stands for, and why.
NO_CALL = {
    "CheckpointError": "an exception", "QuantizedActivation": "made by quantize_activation, rms_norm and silu_mul alone", "Rollout": "a result",
    "Weights": "a result", "Health": "a result",
}  # fmt: skip
# Of each module of nvfp4jax.checkpoint, what users call; the rest of it the package calls.
CALLED = {
    "convert": ("Selection", "Calibration", "quantize_folder"), "huggingface": ("load_model",), "publish": ("publish", "steps"), "quantizer": ("Quantizer",),
    "orbax": ("save", "read_folder", "restore"), "saved_model": ("load_model", "save_model", "restore_state"), "reload": ("Reader",),
    "safetensors": ("read_folder", "read_header"), "tokenizer": ("Tokenizer",),
    "digest": (), "errors": (), "formats": (), "locks": (), "outputs": (), "pieces": (), "quantization_config": (), "resume": (), "survey": (),
}  # fmt: skip

# --- the tests ---------------------------------------------------------------------------------------------------------

KINDS = (ValueError, TypeError, FileNotFoundError, NotImplementedError)


def cases():
    for name, row in TABLE.items():
        for argument, values in row.wrong.items():
            for value in values:
                label = value.label if isinstance(value, Of) else re.sub(" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))[:40]
                yield pytest.param(name, argument, value, id=f"{name}-{argument}-{label}")


@pytest.mark.parametrize("name, argument, value", list(cases()))
def test_a_wrong_argument(name, argument, value):
    row = TABLE[name]
    given = row.good()
    given[argument] = value.make(given[argument]) if isinstance(value, Of) else value
    with pytest.raises(Exception) as caught:
        row.call(**given)
    message = str(caught.value)
    assert isinstance(caught.value, KINDS), f"{type(caught.value).__name__}: {message[:300]}"
    assert "\n" not in message and len(message) <= 500, message
    assert re.search(rf"\b{argument}\b", message) or re.search(row.names.get(argument, r"^\b$"), message), message
    raised = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert raised.is_relative_to(Path(nvfp4jax.__file__).parent), raised


@pytest.mark.parametrize("name", TABLE)
def test_good(name):
    TABLE[name].call(**TABLE[name].good())


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_name(name):
    row = TABLE[name]
    parameters = inspect.signature(row.of or row.call).parameters
    if name in TAKE_ANY_NAME:
        pytest.skip(TAKE_ANY_NAME[name])
    with pytest.raises(TypeError, match="no_such_argument"):
        row.call(**row.good(), no_such_argument=1)
    assert "no_such_argument" not in parameters


@pytest.mark.parametrize("name", TABLE)
def test_every_argument(name):
    row = TABLE[name]
    parameters = [p for p in inspect.signature(row.of or row.call).parameters.values() if p.name != "self"]
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    covered = {*row.wrong, *row.free}
    assert names <= covered and (covered <= names or len(names) < len(parameters))


def test_every_public_name():
    """A row, or a reason, for each."""
    rows = {part for key in TABLE for part in (key, key.split(".")[0])}
    for names in (nvfp4jax.__all__, checkpoint.__all__, reload.__all__):
        assert not {*names} - rows - {*NO_CALL}
    integrations = {"linen": ("dot_general", "einsum", "ragged_dot"), "telemetry": ("observed", "read"), "tunix_rollout": ("TunixModel", "NVFP4Rollout")}
    assert not {f"{module}.{name}" for module, names in integrations.items() for name in names} - rows
    modules = {m.name: importlib.import_module(f"nvfp4jax.checkpoint.{m.name}") for m in pkgutil.iter_modules(checkpoint.__path__)}
    assert modules.keys() == CALLED.keys()
    for module, names in CALLED.items():
        for name in names:
            assert hasattr(modules[module], name) and {name, f"{module}.{name}"} & rows, (module, name)


def test_the_integrations(recwarn):
    tunix = pytest.importorskip("nvfp4jax.integrations.tunix", reason="needs google-tunix==0.1.7", exc_type=ImportError)
    for wrong in [*MODULES, net()]:
        with pytest.raises(ValueError, match="Decoder: model"):
            tunix.Decoder(wrong)
